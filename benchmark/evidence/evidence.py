"""Run every method of the tables, all with the same seeds; a finished run is one CSV file on disk.

  python benchmark/evidence/evidence.py                     # the whole grid, as settings.csv has it
  python benchmark/evidence/evidence.py --methods marvel --tasks SafetyBallRun-v0 --seeds 0 1

settings.csv, beside this file, is the one table of per-task settings: how many seeds and which methods of the
task are in the evidence, and the options that the task needs beyond the scripts' defaults, to collect its
dataset, to train offline, online and from scratch.

A run counts as finished when results/<task>/<method>/seed<k>.csv exists: its metrics.csv, copied after it
ended well. So an interrupted grid continues where it stopped; remove a file to run it again. The files that
are shipped have five seeds for some methods of a task and fewer, or none, for others: without options this
runs what is missing of every method, up to the seeds that settings.csv gives the task. A dataset that is
missing is collected first, offline policies are trained before what starts from them. report.py turns the
files into tables and pictures.
"""
import csv
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import tyro

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import common  # noqa: E402

RESULTS = Path(__file__).parent / "results"
DATASETS = ROOT / "datasets"
SETTINGS = {row["env_id"]: row for row in csv.DictReader((Path(__file__).parent / "settings.csv").open())}
OFFLINE, MARVEL, BASELINES = "offline_pretrain.py", "marvel_sac_pid.py", "benchmark/baselines/"
OFFLINE_SCRIPTS = OFFLINE, BASELINES + "cpq.py", BASELINES + "bear_lag.py", BASELINES + "bc_safe.py"
# The official code's setting: five episodes, then 20 gradient steps of 64 rows (0.02 per step at 200 steps an
# episode), its learning rates, gains, law, entropy weight and budget, multiplier from 0, no margin.
AS_RELEASED = (
    "--rollout-episodes 5 --utd 0.02 --batch-size 64 --actor-lr 5e-5 --critic-lr 5e-3 --alpha 1e-3 "
    "--no-autotune --kp 5e-6 --ki 5e-6 --kd 5e-6 --lagrange-init 0 "
    "--cost-margin 0 --vpa-steps 20000 --vpa-tau 0.005 --vpa-alpha 0 --vpa-alpha-cost 0 "
    "--total-timesteps 100000 --eval-every 50000")
# method: script, the method whose checkpoint it starts from, options
METHODS = {
    "offline": (OFFLINE, None, ""),
    "bear-lag": (BASELINES + "bear_lag.py", None, ""),
    "bc-safe": (BASELINES + "bc_safe.py", None, ""),
    # what the parts of offline_pretrain.py bring
    "cpq": (BASELINES + "cpq.py", None, ""),
    "offline-no-imitation": (OFFLINE, None, "--bc-weight 0"),
    "offline-no-average": (OFFLINE, None, "--actor-tau 1"),
    "offline-one-tau": (OFFLINE, None, "--qc-tau 0.02"),
    # the main table
    "marvel": (MARVEL, "offline", ""),
    "warm-start": (MARVEL, "offline", "--vpa-steps 0"),
    "from-scratch": (MARVEL, None, "--from-scratch"),
    "jsrl": (BASELINES + "jsrl.py", "offline", ""),
    "pex": (BASELINES + "pex.py", "offline", ""),
    "so2": (BASELINES + "so2.py", "offline", ""),
    # what the parts of Marvel bring
    "vpa-dual": (MARVEL, "offline", "--multiplier dual --lagrange-init 0"),
    "vpa-pid": (MARVEL, "offline", "--multiplier pid"),
    "apid-only": (MARVEL, "offline", "--vpa-steps 0 --lagrange-init 0"),
    "fresh-q": (MARVEL, "offline", "--vpa-critics fresh"),
    "fixed": (MARVEL, "offline", "--multiplier fixed --lagrange-init 0.22"),  # where from-scratch settles
    "as-released": (BASELINES + "marvel_released_pid.py", "offline", AS_RELEASED),
    # the first multiplier; dual-from-bear-lag takes BEAR-Lag's policy and the multiplier that it ended with
    "dual-from-bear-lag": (MARVEL, "bear-lag", "--multiplier dual --lagrange-max 1e6"),
    "lagrange-0": (MARVEL, "offline", "--lagrange-init 0"),
    "lagrange-aligned": (MARVEL, "offline", "--lagrange-init aligned"),
    "lagrange-norm-ratio": (MARVEL, "offline", "--lagrange-init norm-ratio"),
    "lagrange-1500": (MARVEL, "offline", "--lagrange-init 1500 --lagrange-max 2000"),
    # the margin below the limit that the multiplier aims at
    "margin-0": (MARVEL, "offline", "--cost-margin 0"),
    # other limits, in both phases
    "offline-at-10": (OFFLINE, None, "--cost-limit 10"),
    "marvel-at-10": (MARVEL, "offline-at-10", "--cost-limit 10"),
    "offline-at-40": (OFFLINE, None, "--cost-limit 40"),
    "marvel-at-40": (MARVEL, "offline-at-40", "--cost-limit 40"),
    # gradient steps per environment step
    "utd-0.125": (MARVEL, "offline", "--utd 0.125"),
    "utd-0.25": (MARVEL, "offline", "--utd 0.25"),
    "utd-1": (MARVEL, "offline", "--utd 1"),
    # a faster target network
    "tau-0.02": (MARVEL, "offline", "--tau 0.02"),
}


@dataclass
class Args:
    tasks: tuple[str, ...] = tuple(SETTINGS)
    """tasks, of settings.csv"""
    methods: tuple[str, ...] = ()
    """methods, names as in METHODS; default those that settings.csv gives the task"""
    seeds: tuple[int, ...] = ()
    """seeds of every method and of its offline policy; default as many as settings.csv gives the task"""
    jobs: int = 2
    """runs at the same time, one core each"""
    work_dir: str = "runs/evidence"
    """folder of the runs themselves"""


def result_file(task: str, method: str, seed: int) -> Path:
    """The file whose existence says that a run is finished."""
    return RESULTS / task / method / f"seed{seed}.csv"


def call(command: list[str], log_file: Path) -> bool:
    """Run one of the project's scripts on one core; False if it failed."""
    log_file.parent.mkdir(parents=True, exist_ok=True)
    one_core = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    with open(log_file, "w") as log:
        status = subprocess.run([sys.executable, *command], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT,
                                env=one_core).returncode
    if status:
        print(f"FAILED {' '.join(command[:3])}: see {log_file}", flush=True)
    return status == 0


def collect(task: str, work: Path) -> bool:
    """Make the task's dataset unless it is there, and put down what is in it; False if it failed."""
    file, options = DATASETS / f"{task}.hdf5", SETTINGS[task]["collect"].split()
    if not file.exists() and not call(
            ["benchmark/tools/collect_dataset.py", "--env-id", task, *options, "--jobs", "1",
             "--work-dir", str(work / "collect")], work / task / "collect.txt"):
        return False
    with h5py.File(file) as f:
        data = {key: f[key][()] for key in ("rewards", "costs", "terminals", "timeouts")}
    _, returns, costs = common.episode_sums(data)
    safe = returns[costs <= 20]
    quartiles = np.quantile(safe, [0.25, 0.5, 0.75]) if len(safe) else [float("nan")] * 3
    facts = dict(
        transitions=len(data["rewards"]), episodes=len(returns), return_min=returns.min(),
        return_max=returns.max(), cost_min=costs.min(), cost_max=costs.max(), safe_episodes=len(safe),
        safe_mean_cost=costs[costs <= 20].mean() if len(safe) else float("nan"),
        safe_q25=quartiles[0], safe_q50=quartiles[1], safe_q75=quartiles[2])
    (RESULTS / task).mkdir(parents=True, exist_ok=True)
    (RESULTS / task / "dataset.csv").write_text(
        ",".join(facts) + "\n" + ",".join(f"{value:.6g}" for value in facts.values()) + "\n")
    return True


def finished(checkpoint: Path) -> bool:
    """Whether a run ended and left this checkpoint; that of an interrupted run is nothing to start from."""
    try:
        return checkpoint.exists() and common.load_checkpoint(checkpoint)["finished"]
    except SystemExit:  # of an older version
        return False


def run(task: str, method: str, seed: int, work: Path) -> bool:
    """One run; False if it failed."""
    script, start, options = METHODS[method]
    run_dir = work / task / method / f"seed{seed}"
    phase = "offline" if script in OFFLINE_SCRIPTS else "online" if start else "scratch"
    command = [script, "--env-id", task, "--seed", str(seed), "--run-dir", str(run_dir), "--overwrite"]
    if start:
        command += ["--checkpoint", str(work / task / start / f"seed{seed}" / "checkpoint.pt")]
    if start and not finished(work / task / start / f"seed{seed}" / "checkpoint.pt"):
        print(f"FAILED {task} {method} seed {seed}: no {start} policy to start from", flush=True)
        return False
    if method == "dual-from-bear-lag":
        with open(work / task / start / f"seed{seed}" / "metrics.csv") as file:
            command += ["--lagrange-init", list(csv.DictReader(file))[-1]["lagrange_multiplier"]]
    if not call(command + SETTINGS[task][phase].split() + options.split(), run_dir / "log.txt"):
        return False
    result = result_file(task, method, seed)
    result.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(run_dir / "metrics.csv", result.with_suffix(".part"))
    result.with_suffix(".part").replace(result)
    print(f"finished {task} {method} seed {seed}", flush=True)
    return True


def main(args: Args) -> None:
    for name, given, known in ("methods", args.methods, METHODS), ("tasks", args.tasks, SETTINGS):
        if set(given) - set(known):
            print(f"error: --{name} {' '.join(set(given) - set(known))}: known are {' '.join(known)}",
                  file=sys.stderr)
            raise SystemExit(2)
    if args.jobs < 1:
        common.stop(f"--jobs {args.jobs}: at least 1")
    work = Path(args.work_dir).resolve()
    jobs = [(task, method, seed) for task in args.tasks
            for seed in args.seeds or range(int(SETTINGS[task]["seeds"]))
            for method in args.methods or SETTINGS[task]["methods"].split()]
    jobs = [job for job in jobs if not result_file(*job).exists()]
    # first the offline policies that these runs start from, unless their checkpoints are still there
    starts = {(task, METHODS[method][1], seed): None for task, method, seed in jobs if METHODS[method][1]}
    first = [job for job in [*starts, *(job for job in jobs if METHODS[job[1]][0] in OFFLINE_SCRIPTS)]
             if not finished(work / job[0] / job[1] / f"seed{job[2]}" / "checkpoint.pt")
             or not result_file(*job).exists()]
    first = list(dict.fromkeys(first))
    with ThreadPoolExecutor(args.jobs) as pool:
        done = [*pool.map(lambda task: collect(task, work), dict.fromkeys(job[0] for job in first + jobs))]
        done += pool.map(lambda job: run(*job, work), first)
        done += pool.map(lambda job: run(*job, work), [job for job in jobs if job not in first])
    raise SystemExit(0 if all(done) else 1)


if __name__ == "__main__":
    main(tyro.cli(Args))
