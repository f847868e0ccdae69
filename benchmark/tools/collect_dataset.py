"""Make a DSRL-format dataset for any task: SAC with a PID multiplier, under a schedule of cost limits.

  python benchmark/tools/collect_dataset.py --env-id SafetyBallCircle-v0
  python benchmark/tools/collect_dataset.py --env-id SafetyBallRun-v0 --timesteps 12000 --utd 0.25

As DSRL's collectors did: train from scratch under several limits, keep every training episode, thin evenly
over the (cost, return) plane. The same seed on the same machine gives the same file. Finished runs stay in
--work-dir, so an interrupted collection continues where it stopped.
"""
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import h5py
import numpy as np
import tyro

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import common  # noqa: E402
from benchmark.tools.export_dataset import episodes_of, write_dataset  # noqa: E402


@dataclass
class Args:
    env_id: str = "SafetyBallCircle-v0"
    """task to collect from"""
    cost_limits: tuple[float, ...] = (5, 10, 20, 40, 80, 160)
    """cost limits per episode, one training run each"""
    timesteps: int = 20_000
    """environment steps of each run"""
    utd: float = 0.5
    """gradient steps per environment step"""
    max_episodes: int = 500
    """episodes kept after thinning, at most"""
    seed: int = 0
    """seed of the first run (the k-th has seed + k) and of the thinning"""
    jobs: int = 2
    """runs at the same time"""
    output: str | None = None
    """file to write; default datasets/<task>.hdf5"""
    work_dir: str = "runs/collect"
    """folder of the training runs"""


def thin(costs: np.ndarray, returns: np.ndarray, max_episodes: int, rng: np.random.Generator) -> np.ndarray:
    """Which episodes to keep, sorted, of those with these costs and returns, each (n,).

    At most k, drawn evenly, of every cell of a 60 x 50 grid over the (cost, return) plane (DSRL's grid), with
    the largest k that keeps at most max_episodes.
    """
    cells = {}
    bins = [np.floor((x - x.min()) / max(np.ptp(x), 1e-9) * n * (1 - 1e-9)).astype(int)
            for x, n in ((costs, 60), (returns, 50))]
    for row in rng.permutation(len(costs)):
        cells.setdefault((bins[0][row], bins[1][row]), []).append(row)
    kept = [row for cell in cells.values() for row in cell[:1]]
    for k in range(2, len(costs) + 1):
        more = [row for cell in cells.values() for row in cell[:k]]
        if len(more) > max_episodes:
            break
        kept = more
    return np.sort(np.array(kept)[:max_episodes])


def main(args: Args) -> None:
    args = replace(args, env_id=common.usual_name(args.env_id))
    output = Path(args.output or ROOT / "datasets" / f"{args.env_id}.hdf5")
    if min(args.timesteps, args.max_episodes, args.jobs, len(args.cost_limits)) < 1:
        common.stop("--timesteps, --max-episodes, --jobs: at least 1; --cost-limits: at least one")
    if output.is_dir() or (output.parent.exists() and not os.access(output.parent, os.W_OK)):
        common.stop(f"--output {output}: must be a file in a folder that can be written to")
    common.make_env(args.env_id)[0].close()
    settings = f"{args.timesteps}steps__utd{args.utd!r}"
    work = Path(args.work_dir) / f"{args.env_id}__{settings}"
    work.mkdir(parents=True, exist_ok=True)
    names = [f"limit{float(limit)!r}__seed{args.seed + k}" for k, limit in enumerate(args.cost_limits)]

    # --- Train under every limit ---
    def collect(k: int) -> int:
        dataset = work / f"{names[k]}.hdf5"
        if dataset.exists():
            return 0
        run_dir = work / names[k]
        command = [sys.executable, str(ROOT / "marvel_sac_pid.py"), "--from-scratch", "--env-id", args.env_id,
                   "--cost-limit", str(args.cost_limits[k]), "--total-timesteps", str(args.timesteps),
                   "--utd", str(args.utd), "--alpha", "0.1", "--cost-margin", "0",
                   "--seed", str(args.seed + k), "--eval-every", str(args.timesteps), "--eval-episodes", "5",
                   "--run-dir", str(run_dir), "--overwrite"]
        with open(work / f"{names[k]}.log", "w") as log:
            status = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT).returncode
        if status == 0:
            write_dataset(dataset, *episodes_of(run_dir / "checkpoint.pt", args.env_id))
        return status

    with ThreadPoolExecutor(args.jobs) as pool:
        for k, status in enumerate(pool.map(collect, range(len(names)))):
            if status:
                common.stop(f"the run under limit {args.cost_limits[k]:g} failed: see {work / names[k]}.log")

    # --- Thin and write ---
    parts = []
    for name in names:
        with h5py.File(work / f"{name}.hdf5") as f:
            parts.append({key: f[key][()] for key in common.DATASET_KEYS})
    data = {key: np.concatenate([part[key] for part in parts]) for key in common.DATASET_KEYS}
    ends, returns, costs = common.episode_sums(data)
    kept = thin(costs, returns, args.max_episodes, np.random.default_rng(args.seed))
    starts = np.concatenate([[0], ends[:-1] + 1])
    rows = np.concatenate([np.arange(starts[k], ends[k] + 1) for k in kept])
    limits = " ".join(f"{limit:g}" for limit in args.cost_limits)
    write_dataset(output, {key: value[rows] for key, value in data.items()}, {
        "task": args.env_id, "seed": args.seed,
        "command": f"python benchmark/tools/collect_dataset.py --env-id {args.env_id} --cost-limits {limits} "
                   f"--timesteps {args.timesteps} --utd {args.utd:g} --max-episodes {args.max_episodes} "
                   f"--seed {args.seed}",
        "versions": " ".join(f"{name}=={version(name)}" for name in (
            "torch", "numpy", "gymnasium", "mujoco", "pybullet", "bullet-safety-gym", "dsrl"))})
    safe = returns[kept][costs[kept] <= 20]
    returns, costs = returns[kept], costs[kept]
    print(f"{output}: {len(kept)} of {len(ends)} episodes, {len(rows)} transitions, "
          f"{output.stat().st_size / 1e6:.1f} MB; return {returns.min():.1f} to {returns.max():.1f}, "
          f"cost {costs.min():.0f} to {costs.max():.0f}; {len(safe)} episodes with cost <= 20, "
          f"75th percentile of their return "
          f"{np.quantile(safe, 0.75) if len(safe) else float('nan'):.1f}")


if __name__ == "__main__":
    with common.patient_streams():
        main(tyro.cli(Args))
