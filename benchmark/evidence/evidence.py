"""Run every method of the tables, all with the same seeds; a finished run is one CSV file on disk.

  python benchmark/evidence/evidence.py                     # the whole grid, as settings.csv has it
  python benchmark/evidence/evidence.py --methods marvel --tasks SafetyBallRun-v0 --seeds 0 1
  python benchmark/evidence/evidence.py --dry-run           # the command of every run, and nothing else
  python benchmark/evidence/evidence.py --ray auto          # on a Ray cluster; benchmark/evidence/cluster.md

settings.csv, beside this file, is the one table of per-task settings: how many seeds and which methods of the
task are in the evidence, and the options that the task needs beyond the scripts' defaults, to collect its
dataset, to train offline, online and from scratch.

A run counts as finished when results/<task>/<method>/seed<k>.csv exists: its metrics.csv, copied after it
ended well; seed<k>.json beside it has what it took. So an interrupted grid continues where it stopped, and an
interrupted run goes on from its last checkpoint, if neither its command nor the code has changed since.
Remove a file to run it again. Without options this runs what is missing of every method, up to the seeds that
settings.csv gives the task. A dataset that is missing is collected first, offline policies are trained before
what starts from them. report.py turns the files into tables and pictures.
"""
import csv
import hashlib
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import tyro

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import common  # noqa: E402
from benchmark.speed.clock import cpu_name  # noqa: E402

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
    "offline-long": (OFFLINE, None, "--update-steps 10000"),
    # the main table
    "marvel": (MARVEL, "offline", ""),
    "warm-start": (MARVEL, "offline", "--vpa-steps 0"),
    "from-scratch": (MARVEL, None, "--from-scratch"),
    "jsrl": (BASELINES + "jsrl.py", "offline", ""),
    "pex": (BASELINES + "pex.py", "offline", ""),
    "so2": (BASELINES + "so2.py", "offline", ""),
    "rlpd": (BASELINES + "rlpd.py", None, ""),
    # another learner, other starts
    "marvel-td3": (BASELINES + "marvel_td3_pid.py", "offline", ""),
    "warm-start-td3": (BASELINES + "marvel_td3_pid.py", "offline", "--vpa-steps 0"),
    "marvel-from-cpq": (MARVEL, "cpq", ""),
    "marvel-from-bear-lag": (MARVEL, "bear-lag", ""),
    "marvel-from-bc-safe": (MARVEL, "bc-safe", ""),
    # as WSRL: the offline policy's own episodes as warm-up, no pre-alignment and no offline data
    "wsrl-lag": (MARVEL, "offline", "--vpa-data rollouts --vpa-steps 0"),
    # what the parts of Marvel bring
    "vpa-dual": (MARVEL, "offline", "--multiplier dual --lagrange-init 0"),
    "vpa-pid": (MARVEL, "offline", "--multiplier pid"),
    "apid-only": (MARVEL, "offline", "--vpa-steps 0 --lagrange-init 0"),
    "fresh-q": (MARVEL, "offline", "--vpa-critics fresh"),
    "no-average": (MARVEL, "offline", "--actor-tau 1"),
    "fixed": (MARVEL, "offline", "--multiplier fixed"),  # at the multiplier that the task's Marvel settled at
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
}


# known only when another run has ended
LAST_MULTIPLIER = "<the multiplier that the start ended with>"
SETTLED_MULTIPLIER = "<mean multiplier in the second half of Marvel's run>"
# a process that ends with the one that started it: a worker that is killed leaves no run at work
FOLLOWER = ("import ctypes, os, signal, sys\n"
            "ctypes.CDLL(None).prctl(1, signal.SIGKILL)\n"  # PR_SET_PDEATHSIG
            "os.getppid() == int(sys.argv[1]) or sys.exit(1)\n"
            "os.execv(sys.executable, [sys.executable, *sys.argv[2:]])")


@dataclass
class Args:
    tasks: tuple[str, ...] = tuple(SETTINGS)
    """tasks, of settings.csv"""
    methods: tuple[str, ...] = ()
    """methods, names as in METHODS; default those that settings.csv gives the task"""
    seeds: tuple[int, ...] = ()
    """seeds of every method and of its offline policy; default as many as settings.csv gives the task"""
    jobs: int = 2
    """runs at the same time, one core each; with --ray local the size of that cluster"""
    ray: str | None = None
    """run on Ray: local (a cluster here, for this grid), auto (the one that runs here), or host:port"""
    dry_run: bool = False
    """print the command of every run that is missing, in an order in which they could be run, and end"""
    work_dir: str = "runs/evidence"
    """folder of the runs themselves; with --ray one that all machines share"""


@dataclass(frozen=True)
class Job:
    """One dataset to be collected or one run. All that a machine needs to know to do it."""

    name: str
    command: tuple[str, ...]
    needs: tuple[str, ...]  # names of the jobs that must have ended well before
    product: Path  # what others start from: the dataset or the checkpoint
    folder: Path  # of its log, and of a run
    result: Path  # what the grid keeps: metrics.csv, or for a dataset what is in it
    start: Path | None = None  # folder of the run that it starts from


def result_file(task: str, method: str, seed: int) -> Path:
    """The file whose existence says that a run is finished."""
    return RESULTS / task / method / f"seed{seed}.csv"


def finished(checkpoint: Path) -> bool:
    """Whether a run ended and left this checkpoint; that of an interrupted run is nothing to start from."""
    try:
        return checkpoint.exists() and common.load_checkpoint(checkpoint)["finished"]
    except SystemExit:  # of an older version
        return False


# --- What is to be done ---
def dataset_job(task: str, work: Path) -> Job:
    """The task's dataset: collected unless it is there."""
    options = SETTINGS[task]["collect"].split()
    command = ("benchmark/tools/collect_dataset.py", "--env-id", task, *options, "--jobs", "1",
               "--work-dir", str(work / "collect"))
    return Job(f"{task} dataset", command, (), DATASETS / f"{task}.hdf5", work / task / "dataset",
               RESULTS / task / "dataset.csv")


def run_job(task: str, method: str, seed: int, work: Path) -> Job:
    """One run of a method."""
    script, start, options = METHODS[method]
    folder = work / task / method / f"seed{seed}"
    phase = "offline" if script in OFFLINE_SCRIPTS else "online" if start else "scratch"
    command = [script, "--env-id", task, "--seed", str(seed), "--run-dir", str(folder)]
    needs = [f"{task} dataset"]
    start_folder = None
    if start:
        start_folder = work / task / start / f"seed{seed}"
        command += ["--checkpoint", str(start_folder / "checkpoint.pt")]
        needs.append(f"{task} {start} seed {seed}")
    if method == "dual-from-bear-lag":
        command += ["--lagrange-init", LAST_MULTIPLIER]
    if method == "fixed":
        command += ["--lagrange-init", SETTLED_MULTIPLIER]
        needs.append(f"{task} marvel seed {seed}")
    command += SETTINGS[task][phase].split() + options.split()
    return Job(f"{task} {method} seed {seed}", tuple(command), tuple(needs), folder / "checkpoint.pt", folder,
               result_file(task, method, seed), start_folder)


def plan(args: Args, work: Path) -> list[Job]:
    """The jobs that are missing, every one after those that it needs."""
    wanted = [(task, method, seed) for task in args.tasks
              for seed in args.seeds or range(int(SETTINGS[task]["seeds"]))
              for method in args.methods or SETTINGS[task]["methods"].split()]
    wanted += [(task, "marvel", seed) for task, method, seed in wanted if method == "fixed"]
    wanted = [key for key in wanted if not result_file(*key).exists()]
    starts = [(task, METHODS[method][1], seed) for task, method, seed in wanted if METHODS[method][1]]
    # a policy to start from is trained again if its checkpoint is gone
    starts = [key for key in starts
              if not finished(run_job(*key, work).product) or not result_file(*key).exists()]
    offline = [key for key in wanted if METHODS[key[1]][0] in OFFLINE_SCRIPTS]
    wanted.sort(key=lambda key: key[1] == "fixed")  # after what it needs
    keys = dict.fromkeys([*starts, *offline, *wanted])
    jobs = [dataset_job(task, work) for task in dict.fromkeys(task for task, _, _ in keys)]
    return jobs + [run_job(*key, work) for key in keys]


# --- One job, on whichever machine ---
def call(command: list[str], log_file: Path) -> tuple[int, float, float]:
    """Run one of the project's scripts on one core: its status, and its wall and CPU seconds."""
    log_file.parent.mkdir(parents=True, exist_ok=True)
    one_core = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    began = time.monotonic()
    with open(log_file, "w") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", FOLLOWER, str(os.getpid()), *command], cwd=ROOT, env=one_core,
            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
        _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, time.monotonic() - began, used.ru_utime + used.ru_stime


def code_hash(script: str) -> str:
    """sha256 of what a run runs: one of other code is not gone on with."""
    files = script, MARVEL, "common.py"  # the released controller runs Marvel's script
    return hashlib.sha256(b"".join((ROOT / file).read_bytes() for file in files)).hexdigest()


def write(file: Path, text: str) -> None:
    """The whole file or nothing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    common.write_file(file, text.encode())


def perform(job: Job, *failures: str | None) -> str | None:
    """Do a job, given the outcomes of those that it needs. Its own: why it failed, or None."""
    if any(failures):
        return "what it needs failed"
    command = list(job.command)
    log = job.folder / "log.txt"
    if job.product.suffix == ".hdf5":
        if not job.product.exists():
            status, _, _ = call(command, log)
            if status:
                return f"see {log}"
        write(job.result, describe_dataset(job.product))
        return None

    if job.start is not None and not finished(job.start / "checkpoint.pt"):
        return f"{job.start} has no finished policy to start from"
    if LAST_MULTIPLIER in command:
        rows = list(csv.DictReader((job.start / "metrics.csv").open()))
        command[command.index(LAST_MULTIPLIER)] = rows[-1]["lagrange_multiplier"]
    if SETTLED_MULTIPLIER in command:
        rows = list(csv.DictReader((job.result.parents[1] / "marvel" / job.result.name).open()))
        settled = statistics.fmean(float(row["lagrange_multiplier"]) for row in rows[len(rows) // 2:])
        command[command.index(SETTLED_MULTIPLIER)] = f"{settled:.4g}"
    begun_as = {"command": command, "code": code_hash(command[0])}
    note = job.folder / "begun.json"
    goes_on = (note.exists() and json.loads(note.read_text()) == begun_as
               and job.product.exists() and not finished(job.product))
    write(note, json.dumps(begun_as, indent=1) + "\n")
    options = ["--resume", str(job.folder)] if goes_on else [*command[1:], "--overwrite"]
    status, seconds, cpu_seconds = call([command[0], *options], log)
    if status:
        return f"see {log}"
    took = {"wall_seconds": round(seconds, 1), "cpu_seconds": round(cpu_seconds, 1), "resumed": goes_on,
            "processor": cpu_name()}  # another one rounds differently: the same seed has other numbers there
    write(job.result.with_suffix(".json"), json.dumps(took) + "\n")
    write(job.result, (job.folder / "metrics.csv").read_text())
    return None


def describe_dataset(file: Path) -> str:
    """What is in a dataset, as a table of one line."""
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
    return ",".join(facts) + "\n" + ",".join(f"{value:.6g}" for value in facts.values()) + "\n"


# --- All jobs, here or on Ray: both give (job, why it failed or None, how many are at work) as jobs end ---
def on_threads(jobs: list[Job], workers: int) -> Iterator[tuple[Job, str | None, int]]:
    """On this machine."""
    names = {job.name for job in jobs}
    waiting, running, done = list(jobs), {}, {}
    with ThreadPoolExecutor(workers) as pool:
        while waiting or running:
            for job in list(waiting):
                needs = [name for name in job.needs if name in names]
                if done.keys() >= set(needs):
                    waiting.remove(job)
                    running[pool.submit(perform, job, *(done[name] for name in needs))] = job
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                job = running.pop(future)
                done[job.name] = outcome_of(future.result)
                yield job, done[job.name], min(workers, len(waiting) + len(running))


def on_ray(jobs: list[Job], workers: int, address: str) -> Iterator[tuple[Job, str | None, int]]:
    """On a Ray cluster. Ray keeps the order of the jobs by their results, which are arguments of others."""
    if address == "local":
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # before the import: loopback addresses only
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    try:
        import ray
    except ImportError:
        common.stop("--ray needs Ray: pip install -r benchmark/evidence/requirements-grid.txt")
    options = {"num_cpus": workers, "include_dashboard": False} if address == "local" else {}
    try:
        if ":" in address:  # Ray itself tries for minutes and then ends the process
            host, port = address.rsplit(":", 1)
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(address=address, runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}}, log_to_driver=False,
                 **options)
    except (OSError, ValueError) as error:  # ConnectionError is an OSError
        common.stop(f"--ray {address}: no such cluster, or one that asks for a token, and then set "
                    f"RAY_AUTH_MODE=token ({error!s:.150})")
    try:
        # a worker that dies is replaced, and its run goes on from its checkpoint; an exception ends a job
        remote = ray.remote(num_cpus=1, max_retries=5)(perform)
        results = {}
        for job in jobs:
            results[job.name] = remote.remote(job, *(results[name] for name in job.needs if name in results))
        pending = {result: job for job, result in zip(jobs, results.values(), strict=True)}
        while pending:
            (result,), _ = ray.wait(list(pending), num_returns=1)
            job = pending.pop(result)
            at_work = min(len(pending), int(ray.cluster_resources().get("CPU", 0)))
            yield job, outcome_of(lambda result=result: ray.get(result)), at_work
    finally:
        ray.shutdown()


def outcome_of(result: Callable[[], str | None]) -> str | None:
    """What `perform` gave; an exception is a failure too, and does not end the grid."""
    try:
        return result()
    except Exception as error:
        return f"{type(error).__name__}: {error!s:.500}"


def main(args: Args) -> None:
    for name, given, known in ("methods", args.methods, METHODS), ("tasks", args.tasks, SETTINGS):
        unknown = sorted(set(given) - set(known))
        common.stop_unless(not unknown, f"--{name} {' '.join(unknown)}: known are {' '.join(known)}")
    common.stop_unless(args.jobs >= 1, f"--jobs {args.jobs}: at least 1")
    jobs = plan(args, Path(args.work_dir).resolve())
    if args.dry_run:
        for job in jobs:
            if job.product.suffix != ".hdf5" or not job.product.exists():
                print("python", *(repr(word) if " " in word else word for word in job.command))
        return
    began = time.monotonic()
    ended = failed = 0
    outcomes = on_ray(jobs, args.jobs, args.ray) if args.ray else on_threads(jobs, args.jobs)
    for job, failure, at_work in outcomes:
        ended += 1
        failed += failure is not None
        left = len(jobs) - ended
        minutes = (time.monotonic() - began) / ended * left / 60
        print(f"FAILED {job.name}: {failure}" if failure else f"finished {job.name}",
              f"| {ended - failed} finished, {failed} failed, {at_work} running, {left - at_work} waiting, "
              f"about {minutes:.0f} min to go", flush=True)
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main(tyro.cli(Args))
