"""Run every method of the README's tables, all with the same seeds; a finished run is one CSV file on disk.

  python benchmark/evidence.py                     # the whole grid
  python benchmark/evidence.py --methods marvel --tasks SafetyBallRun-v0 --seeds 0 1

A run counts as finished when benchmark/results/<task>/<method>/seed<k>.csv exists: its metrics.csv, copied
after it ended well. So an interrupted grid continues where it stopped; remove a file to run it again, the
folder to run all.
benchmark/report.py turns the files into tables and pictures.
"""
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmark" / "results"
# From scratch needs more steps and more first exploration; all else is the scripts' defaults.
SCRATCH = ["--from-scratch", "--total-timesteps", "40000", "--alpha", "0.1"]
METHODS = {
    # the README's main table
    "marvel": [],
    "warm-start": ["--vpa-steps", "0"],
    "vpa-dual": ["--multiplier", "dual", "--lagrange-init", "0"],
    "from-scratch": SCRATCH,
    # the margin below the limit that the multiplier aims at, all else Marvel
    "margin-0": ["--cost-margin", "0"],
    # the first multiplier, all else Marvel
    "lagrange-0": ["--lagrange-init", "0"],
    "lagrange-aligned": ["--lagrange-init", "aligned"],
    "lagrange-norm-ratio": ["--lagrange-init", "norm-ratio"],
    "lagrange-1500": ["--lagrange-init", "1500", "--lagrange-max", "2000"],
    # offline_pretrain.py without the imitation term
    "offline-no-imitation": ["--bc-weight", "0"],
}


@dataclass
class Args:
    tasks: tuple[str, ...] = ("SafetyBallCircle-v0", "SafetyBallRun-v0")
    """tasks"""
    methods: tuple[str, ...] = tuple(METHODS)
    """methods, names as in METHODS"""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """seeds of every method; the offline policy has the same seed"""
    jobs: int = 2
    """runs at the same time, one core each"""
    work_dir: str = "runs/evidence"
    """folder of the runs themselves"""


def result_file(task: str, method: str, seed: int) -> Path:
    """The file whose existence says that a run is finished."""
    return RESULTS / task / method / f"seed{seed}.csv"


def run(task: str, method: str, seed: int, work: Path) -> bool:
    """One run; False if it failed."""
    run_dir = work / task / method / f"seed{seed}"
    if method.startswith("offline"):
        command = ["offline_pretrain.py", *METHODS.get(method, [])]
    elif method == "from-scratch":
        command = ["marvel_sac_pid.py", *METHODS[method]]
    else:
        checkpoint = work / task / "offline" / f"seed{seed}" / "checkpoint.pt"
        command = ["marvel_sac_pid.py", "--checkpoint", str(checkpoint), *METHODS[method]]
    run_dir.mkdir(parents=True, exist_ok=True)
    command += ["--env-id", task, "--seed", str(seed), "--run-dir", str(run_dir), "--overwrite"]
    one_core = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    with open(run_dir / "log.txt", "w") as log:
        status = subprocess.run([sys.executable, *command], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT,
                                env=one_core).returncode
    if status:
        print(f"FAILED {task} {method} seed {seed}: see {run_dir / 'log.txt'}", flush=True)
        return False
    result = result_file(task, method, seed)
    result.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(run_dir / "metrics.csv", result.with_suffix(".part"))
    result.with_suffix(".part").replace(result)
    print(f"finished {task} {method} seed {seed}", flush=True)
    return True


def main(args: Args) -> None:
    unknown = set(args.methods) - set(METHODS)
    if unknown:
        print(f"error: --methods {' '.join(sorted(unknown))}: known are {' '.join(METHODS)}", file=sys.stderr)
        raise SystemExit(2)
    work = Path(args.work_dir).resolve()
    jobs = [(task, method, seed) for seed in args.seeds for task in args.tasks for method in args.methods]
    jobs = [job for job in jobs if not result_file(*job).exists()]
    # first the offline policies that these runs start from, unless their checkpoints are still there
    alone = "offline", "from-scratch"
    starts = {(task, seed) for task, method, seed in jobs if not method.startswith(alone)}
    first = [(task, "offline", seed) for task, seed in sorted(starts)
             if not (work / task / "offline" / f"seed{seed}" / "checkpoint.pt").exists()]
    with ThreadPoolExecutor(args.jobs) as pool:
        done = [*pool.map(lambda job: run(*job, work), first)]
        done += pool.map(lambda job: run(*job, work), jobs)
    raise SystemExit(0 if all(done) else 1)


if __name__ == "__main__":
    main(tyro.cli(Args))
