"""What a run did: a table of its policies, its training costs against the limit, and curves.png.

  python benchmark/tools/curves.py
  python benchmark/tools/curves.py --run-dir runs/SafetyBallRun-v0__marvel_sac_pid__seed0

Works on finished and unfinished runs of all scripts, from metrics.csv, config.json and checkpoint.pt.
"""
import csv
import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from matplotlib.figure import Figure  # no pyplot: it needs no display and keeps no global state

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import common  # noqa: E402

# column of the x-axis: panels, each a title and the columns that it shows where the run has them
PANELS = {
    "env_steps": {
        "return": ["episode_return", "eval_sampled_return"],
        "cost": ["episode_cost", "eval_sampled_cost"],
        "Lagrange multiplier": ["lagrange_multiplier"]},
    "update_steps": {
        "return": ["eval_sampled_return", "eval_mean_return"],
        "cost": ["eval_sampled_cost", "eval_mean_cost"],
        "mean target": ["q_mean", "qc_mean"],
        "Lagrange multiplier": ["lagrange_multiplier"],
        "actor loss": ["actor_loss"]},
}


@dataclass
class Args:
    run_dir: str = "runs/SafetyBallCircle-v0__marvel_sac_pid__seed0"
    """folder of the run"""


def read_metrics(path: str | Path) -> dict[str, np.ndarray]:
    """metrics.csv as float arrays (rows,), nan where a cell is empty."""
    reader = csv.DictReader(Path(path).read_text().splitlines())
    rows = list(reader)
    return {name: np.array([float(row[name] or "nan") for row in rows]) for name in reader.fieldnames or ()}


def panels_of(metrics: dict[str, np.ndarray]) -> tuple[str, dict[str, list[str]]]:
    """Column of the x-axis and the panels that these metrics can fill, none if they are not a run's."""
    x = next((name for name in PANELS if name in metrics), "")
    known = PANELS.get(x, {}).items()
    panels = {title: [name for name in columns if name in metrics] for title, columns in known}
    return x, {title: columns for title, columns in panels.items() if columns}


def plot_curves(run_dir: Path, metrics: dict[str, np.ndarray], cost_limit: float) -> None:
    """curves.png: a panel per title, its columns as lines, the limit where it says cost."""
    x, panels = panels_of(metrics)
    figure = Figure(figsize=(4.5 * len(panels), 3.2), layout="constrained")
    for axes, (title, columns) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for column in columns:
            seen = ~np.isnan(metrics[column])
            axes.plot(metrics[x][seen], metrics[column][seen], label=column.replace("_", " "), lw=1)
        if "cost" in title:
            axes.axhline(cost_limit, color="k", ls="--", lw=1, label="cost limit")
        axes.set(title=title, xlabel=x.replace("_", " "))
        axes.legend(fontsize=7)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    common.write_file(run_dir / "curves.png", picture.getvalue())


def print_result(evaluations: dict[str, dict], metrics: dict[str, np.ndarray], cost_limit: float) -> None:
    """The policies' evaluations and, of an online run, how often training exceeded the limit."""
    print(f"{'':18s}{'sampled return':>16s}{'cost':>8s}{'mean-action return':>20s}{'cost':>8s}")
    for name, result in evaluations.items():
        print(f"{name:18s}{result['eval_sampled_return']:16.1f}{result['eval_sampled_cost']:8.1f}"
              f"{result['eval_mean_return']:20.1f}{result['eval_mean_cost']:8.1f}")
    if len(metrics.get("episode_cost", ())):
        cost = metrics["episode_cost"]
        above = np.flatnonzero(np.convolve(cost, np.ones(20))[19 : len(cost)] > 20 * cost_limit) + 19
        when = f", none after step {metrics['env_steps'][above[-1]]:.0f}" if len(above) else ""
        print(f"windows of 20 episodes over the limit: {len(above)} of {max(len(cost) - 19, 0)}{when}; "
              f"violation regret {metrics['violation_regret'][-1]:.0f}")


def main(args: Args) -> None:
    run_dir = Path(args.run_dir)
    try:
        cost_limit = float(json.loads((run_dir / "config.json").read_text())["cost_limit"])
        metrics = read_metrics(run_dir / "metrics.csv")
    except (OSError, ValueError, KeyError, TypeError):
        common.stop(f"--run-dir {run_dir}: holds no run (config.json and metrics.csv)")
    common.stop_unless(panels_of(metrics)[1], f"--run-dir {run_dir}: its metrics.csv is not a run's")
    if (run_dir / "checkpoint.pt").exists():
        checkpoint = common.load_checkpoint(run_dir / "checkpoint.pt")
        state = "finished" if checkpoint["finished"] else "unfinished"
        progress = checkpoint["progress"].items()
        steps = ", ".join(f"{name} {value}" for name, value in progress if name.endswith("_steps"))
        print(f"{run_dir}: {state}, {steps}\n")
        print_result(checkpoint["evaluations"], metrics, cost_limit)
    if not any(len(values) for values in metrics.values()):
        print("no line in metrics.csv yet, so no curves")
        return
    plot_curves(run_dir, metrics, cost_limit)
    print(f"curves in {run_dir / 'curves.png'}")


if __name__ == "__main__":
    with common.patient_streams():
        main(tyro.cli(Args))
