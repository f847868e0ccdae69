"""Tables and pictures of the README from the files that benchmark/evidence.py left under benchmark/results/.

  python benchmark/report.py

Writes benchmark/results/summary.md and one picture per task. Numbers are of the last policy: the mean over
seeds and the half-width of its 95 % t-interval.
"""
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from scipy import stats

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmark" / "results"
sys.path.insert(0, str(ROOT))
import common  # noqa: E402

COST_LIMIT = 20.0
COLOURS = {"from-scratch": "gray", "warm-start": "orange", "vpa-dual": "green", "marvel": "blue"}


def interval(values: list[float]) -> str:
    """Mean and half-width of the 95 % t-interval over seeds, or how many seeds have a value if not all do."""
    x = np.array(values, float)
    if np.isnan(x).any():
        return f"reached by {np.isfinite(x).sum()} of {len(x)}"
    if len(x) == 1:
        return f"{x[0]:.1f}"
    return f"{x.mean():.1f} ± {stats.t.ppf(0.975, len(x) - 1) * stats.sem(x):.1f}"


def rolling_mean(x: np.ndarray, window: int) -> np.ndarray:
    """Mean of the last `window` entries at every entry, of fewer at the start."""
    sums = np.cumsum(np.concatenate([[0.0], x]))
    k = np.arange(1, len(x) + 1)
    return (sums[k] - sums[np.maximum(k - window, 0)]) / np.minimum(k, window)


def plateau(runs: list[dict]) -> float:
    """Mean training return over the last quarter of each run's steps, averaged over runs."""
    late = [run["env_steps"] > 0.75 * run["env_steps"][-1] for run in runs]
    return float(np.mean([run["episode_return"][rows].mean() for run, rows in zip(runs, late, strict=True)]))


def steps_to(run: dict, target: float, window: int = 5) -> float:
    """First step at which the last `window` episodes have mean return >= target and mean cost <= limit."""
    good = ((rolling_mean(run["episode_return"], window) >= target)
            & (rolling_mean(run["episode_cost"], window) <= COST_LIMIT))
    good[: window - 1] = False
    return float(run["env_steps"][np.argmax(good)]) if good.any() else float("nan")


def table(task: str, runs: dict[str, list[dict]]) -> list[str]:
    """The task's rows of summary.md."""
    target = 0.95 * plateau(runs["from-scratch"]) if "from-scratch" in runs else float("nan")
    lines = [f"### {task}, cost limit {COST_LIMIT:g}", "",
             "| method (seeds) | env steps | sampled return | sampled cost | mean-action return "
             "| mean-action cost | violation regret | episodes over the limit | worst 20-episode cost "
             f"| steps to a safe return of {target:.0f} |", "|" + "---|" * 10]
    for method, seeds in runs.items():
        cells = [f"{method} ({len(seeds)})", "0" if method.startswith("offline")
                 else f"{seeds[0]['env_steps'][-1]:.0f}"]
        cells += [interval([run[f"eval_{how}_{what}"][-1] for run in seeds])
                  for how in ("sampled", "mean") for what in ("return", "cost")]
        if method.startswith("offline"):
            cells += [""] * 4
        else:
            over = [100 * (run["episode_cost"] > COST_LIMIT).mean() for run in seeds]
            worst = [rolling_mean(run["episode_cost"], 20)[19:].max() for run in seeds]
            cells += [interval([run["violation_regret"][-1] for run in seeds]), interval(over) + " %",
                      interval(worst), interval([steps_to(run, target) for run in seeds])]
        lines.append("| " + " | ".join(cells) + " |")
    return lines + [""]


def picture(task: str, runs: dict[str, list[dict]]) -> None:
    """Return and cost (means of 10 episodes) and multiplier: thin lines are seeds, thick ones their mean."""
    figure = Figure(figsize=(13, 3.4), layout="constrained")
    panels = figure.subplots(1, 3)
    for method, colour in COLOURS.items():
        columns = "episode_return", "episode_cost", "lagrange_multiplier"
        for axes, column in zip(panels, columns, strict=True):
            smooth = []
            for run in runs.get(method, []):
                y = run[column] if column == "lagrange_multiplier" else rolling_mean(run[column], 10)
                axes.plot(run["env_steps"] / 1000, y, color=f"tab:{colour}", lw=0.4, alpha=0.5)
                smooth.append(y)
            if smooth:
                n = min(map(len, smooth))
                mean = np.mean([y[:n] for y in smooth], axis=0)
                steps = runs[method][0]["env_steps"][:n] / 1000
                axes.plot(steps, mean, color=f"tab:{colour}", lw=1.8, label=method)
    for axes, title in zip(panels, ("return", "cost", "Lagrange multiplier"), strict=True):
        axes.set(title=f"{title}, {task}" if title == "return" else title, xlabel="thousand steps")
    panels[1].axhline(COST_LIMIT, color="k", ls="--", lw=1)
    panels[2].set_ylim(0, 1.5)
    panels[0].legend(fontsize=8)
    figure.savefig(RESULTS / f"{task}.png", dpi=100)


def read_results() -> dict[str, dict[str, list[dict]]]:
    """Task -> method -> the seeds' metrics, methods in the order of the tables."""
    order = ["offline", "marvel", "warm-start", "vpa-dual", "from-scratch"]
    results = {}
    for folder in sorted(path for path in RESULTS.iterdir() if path.is_dir()):
        names = sorted((path.name for path in folder.iterdir()),
                       key=lambda name: (order.index(name) if name in order else 99, name))
        files = {name: sorted((folder / name).glob("seed*.csv")) for name in names}
        results[folder.name] = {name: [common.read_metrics(file) for file in files[name]] for name in names}
    return results


def summary(results: dict[str, dict[str, list[dict]]]) -> str:
    """The text of summary.md."""
    lines = ["Made by `python benchmark/report.py`.", ""]
    for task, runs in results.items():
        lines += table(task, runs)
    return "\n".join(lines)


def main() -> None:
    results = read_results()
    (RESULTS / "summary.md").write_text(summary(results))
    for task, runs in results.items():
        picture(task, runs)
    print(summary(results))


if __name__ == "__main__":
    main()
