"""Start, kill, stop, resume and corrupt runs of both scripts at random, and check what must hold throughout.

  python benchmark/soak.py                # two hours on two cores; writes benchmark/evidence/results/soak.md
  python benchmark/soak.py --minutes 5

A round takes one of four tasks and one of both scripts and runs it in small pieces: a run is killed (SIGKILL)
or asked to stop (SIGTERM, SIGINT or SIGUSR1) after a random time, finds the disk full (a limit of the file
size), or is started a second time while it works; between two pieces one of its files may be corrupted and is
put back after it was refused. Then it is resumed, until it ends. What must hold:
  - the end is that of a run without interruption: metrics.csv byte for byte, every number of checkpoint.pt;
  - there is no moment at which checkpoint.pt or config.json is there and cannot be read;
  - a corrupted file is refused with one line and exit status 2, and changes nothing; a changed byte that is
    accepted has changed no number;
  - whatever happens, no traceback.
The last line says how often each thing happened, and how many of these checks failed.
"""
import contextlib
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import common  # noqa: E402

TASKS = ("SafetyBallCircle-v0", "SafetyBallRun-v0", "SafetyCarRun-v0", "SafetyHopperVelocityGymnasium-v1")
COLLECT = "--from-scratch --learning-starts 2000 --total-timesteps 1500 --eval-episodes 1 --alpha 0.1"
OFFLINE = "--update-steps 300 --batch-size 64 --eval-every 100 --eval-episodes 1 --checkpoint-every 40"
ONLINE = ("--total-timesteps 900 --vpa-steps 100 --batch-size 64 --utd 0.1 --eval-every 300 "
          "--eval-episodes 1 --checkpoint-every 60")
EVENTS = ("rounds", "SIGKILL", "stopped", "full disk", "second start", "corrupted", "resumed")
INTERRUPTIONS = ("SIGKILL", "stopped", "full disk", "second start")
STOPPING_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
MOST_INTERRUPTIONS = 12  # of one run; then it may end
MOST_PIECES = 100  # a run that has not ended by then never will
FULL_DISK_BYTES = 200_000  # a file size that a checkpoint exceeds and the small files do not
EARLIEST, LATEST = 0.2, 1.5  # when a run is interrupted, in units of the time of an untouched one
CORRUPTED_SHARE = 0.5  # of the pieces after which a file is corrupted


@dataclass
class Args:
    minutes: float = 120.0
    """how long, after the runs without interruption are made"""
    jobs: int = 2
    """rounds at the same time, one core each"""
    seed: int = 0
    """seed of what happens when; the clock has its part in it, so no two soaks are the same"""
    work_dir: str = "runs/soak"
    """folder of the runs; its content is removed first"""
    output: str = "benchmark/evidence/results/soak.md"
    """report to write"""


class Soak:
    """Counts, failures and the references that rounds in several threads share."""

    def __init__(self, work: Path):
        self.work = work
        self.counts = Counter()
        self.failures = []
        self.lock = threading.Lock()

    def count(self, event: str) -> None:
        """One more of these events."""
        with self.lock:
            self.counts[event] += 1

    def check(self, holds: bool, what: str) -> None:
        """Put down what does not hold."""
        if not holds:
            with self.lock:
                self.failures.append(what)
                print("FAILED", what, flush=True)


def start(command: list[str], log: Path, file_limit: int | None = None) -> subprocess.Popen:
    """Start one of the scripts on one core; with file_limit it can write no file of more bytes."""
    def limit():
        if file_limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, resource.RLIM_INFINITY))

    one_core = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    with open(log, "a") as file:
        return subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT,
                                env=one_core, preexec_fn=limit)


def run(command: list[str], log: Path) -> int:
    """Run one of the scripts to its end; its exit status."""
    return start(command, log).wait()


def equal(a: object, b: object) -> bool:
    """Whether two values out of checkpoints are the same, bit for bit."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(
            a.reshape(-1).contiguous().view(torch.uint8), b.reshape(-1).contiguous().view(torch.uint8))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def numbers(folder: Path) -> dict:
    """The checkpoint without what differs between two folders of the same run."""
    checkpoint = common.load_checkpoint(folder / "checkpoint.pt")
    return {name: value for name, value in checkpoint.items() if name != "args"}


def corrupt(folder: Path, rng: random.Random) -> tuple[Path, str]:
    """Damage one file of a run; the file and how."""
    files = [folder / name for name in ("checkpoint.pt", "config.json", "metrics.csv")]
    file = rng.choice([file for file in files if file.exists() and file.stat().st_size > 2])
    content = bytearray(file.read_bytes())
    how = "cut" if file.name != "checkpoint.pt" else rng.choice(["cut", "byte", "zeros"])
    k = rng.randrange(1, len(content))
    if how == "cut":
        del content[k - 1:]
    elif how == "byte":
        content[k] ^= 1 << rng.randrange(8)
    else:
        content[k:] = bytes(len(content) - k)
    file.write_bytes(content)
    return file, how


def snapshot(folder: Path) -> dict[str, bytes]:
    """All files of a run but TensorBoard's."""
    return {file.name: file.read_bytes() for file in folder.iterdir() if "tfevents" not in file.name}


def try_corrupted(soak: Soak, folder: Path, command: list[str], rng: random.Random) -> None:
    """Damage a file, see that resuming is refused and touches nothing, and put it back."""
    before = snapshot(folder)
    whole = numbers(folder) if "checkpoint.pt" in before else {"metrics_bytes": 0}
    file, how = corrupt(folder, rng)
    soak.count("corrupted")
    where = f"{file.name} {how} in {folder.name}"
    if file.name == "metrics.csv" and file.stat().st_size >= whole["metrics_bytes"]:
        file.write_bytes(before[file.name])  # what comes after the checkpoint is cut off anyway
        return
    if how == "byte":
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                accepted = equal(whole, numbers(folder))
        except SystemExit:
            accepted = None  # refused; else the byte is one between the numbers, and nothing has changed
        soak.check(accepted is not False, f"{where}: accepted, with other numbers")
        if accepted is not None:
            file.write_bytes(before[file.name])
            return
    damaged = snapshot(folder)
    log = folder.with_name(f"{folder.name}.corrupted.txt")
    log.unlink(missing_ok=True)
    status = run(command, log)
    errors = re.findall("^error: .*", log.read_text(), re.MULTILINE)
    soak.check(status == common.MISTAKE and len(errors) == 1, f"{where}: exit status {status}, {errors}")
    soak.check(snapshot(folder) == damaged, f"{where}: files were changed by a refused run")
    file.write_bytes(before[file.name])


def one_round(soak: Soak, k: int, references: dict, rng: random.Random) -> None:
    """Run one of the references in pieces until it ends, and compare."""
    (task, script), (options, reference, seconds) = rng.choice(list(references.items()))
    folder = soak.work / f"round{k}"
    resume = [script, "--resume", str(folder)]
    for piece in range(MOST_PIECES):
        resumable = (folder / "config.json").exists()
        command = resume if resumable else [script, *options, "--run-dir", str(folder)]
        soak.count("resumed" if resumable else "started")
        event = rng.choice(INTERRUPTIONS) if piece < MOST_INTERRUPTIONS else "none"
        run_piece(soak, command, event, [script, *options], folder, seconds, rng)
        try:
            if (folder / "config.json").exists():
                json.loads((folder / "config.json").read_text())
            finished = (folder / "checkpoint.pt").exists() and numbers(folder)["finished"]
        except (ValueError, SystemExit) as error:
            soak.check(False, f"{event} of {script} in {folder.name} left an unreadable file: {error}")
            return
        if finished:
            break
        if (folder / "config.json").exists() and rng.random() < CORRUPTED_SHARE:
            try_corrupted(soak, folder, resume, rng)
    same = (folder / "metrics.csv").read_bytes() == (reference / "metrics.csv").read_bytes()
    soak.check(same, f"{script} on {task} in {folder.name}: metrics.csv is not that of {reference}")
    same = equal(numbers(folder), numbers(reference))
    soak.check(same, f"{script} on {task} in {folder.name}: checkpoint.pt is not that of {reference}")
    for text in folder.parent.glob(f"{folder.name}*.txt"):
        soak.check(not has_traceback(text), f"a traceback in {text}")
        if not soak.failures:
            text.unlink()
    soak.count("rounds")
    if not soak.failures:
        shutil.rmtree(folder)


def run_piece(soak: Soak, command: list[str], event: str, first: list[str], folder: Path, seconds: float,
              rng: random.Random) -> None:
    """Run until the event or the end. `first`: script and options of the start that a second one repeats."""
    log = folder.with_name(f"{folder.name}.txt")
    process = start(command, log, FULL_DISK_BYTES if event == "full disk" else None)
    allowed = {0}
    if event in ("SIGKILL", "stopped", "second start"):
        time.sleep(rng.uniform(EARLIEST, LATEST) * seconds)
    if event == "second start" and process.poll() is None and (folder / "config.json").exists():
        second = folder.with_name(f"{folder.name}.second.txt")
        second.unlink(missing_ok=True)
        status = run([*first, "--run-dir", str(folder)], second)
        soak.check(status == common.MISTAKE, f"second start in {folder.name}: exit status {status}")
    if event in ("SIGKILL", "stopped"):
        number = signal.SIGKILL if event == "SIGKILL" else rng.choice(STOPPING_SIGNALS)
        process.send_signal(number)
        # a stop may come before the script has begun to listen, or after it has ended
        allowed |= {-number} if event == "SIGKILL" else {-number, 128 + number}
    if event == "full disk":
        allowed |= {common.FAILURE}
    status = process.wait()
    soak.check(status in allowed, f"{event} of {command[0]}: exit status {status}, see {log}")
    if event != "none":
        soak.count(event)


def has_traceback(log: Path) -> bool:
    """Whether there is one, but for a stop before the script listens, and TensorBoard's thread's own."""
    text = log.read_text()
    return text.count("Traceback") > text.count("KeyboardInterrupt\n") + text.count("Exception in thread")


def make_references(task: str, work: Path) -> dict:
    """Untouched runs of both scripts on a task: {(task, script): (options, folder, seconds)}."""
    references = {}
    folder = work / task
    folder.mkdir(parents=True)
    data = folder / "data.hdf5"
    collect = folder / "collect"
    offline = folder / "offline_pretrain"
    for command in (
            ["marvel_sac_pid.py", "--env-id", task, *COLLECT.split(), "--run-dir", str(collect)],
            ["benchmark/tools/export_dataset.py", "--checkpoint", f"{collect}/checkpoint.pt",
             "--output", str(data)]):
        if run(command, folder / "log.txt"):
            common.stop(f"{' '.join(command)} failed: see {folder / 'log.txt'}", common.FAILURE)
    for script, options in (
            ("offline_pretrain.py", OFFLINE.split()),
            ("marvel_sac_pid.py", [*ONLINE.split(), "--checkpoint", f"{offline}/checkpoint.pt"])):
        options = ["--env-id", task, "--dataset-path", str(data), *options]
        reference = folder / script.removesuffix(".py")
        begin = time.time()
        if run([script, *options, "--run-dir", str(reference)], folder / "log.txt"):
            common.stop(f"{script} on {task} failed: see {folder / 'log.txt'}", common.FAILURE)
        references[task, script] = options, reference, time.time() - begin
    return references


def main(args: Args) -> None:
    common.stop_unless(args.minutes > 0 and args.jobs > 0, "--minutes, --jobs: must be above 0")
    work = (ROOT / args.work_dir).resolve()
    shutil.rmtree(work, ignore_errors=True)
    soak = Soak(work)
    references = {}
    with ThreadPoolExecutor(args.jobs) as pool:
        for made in pool.map(lambda task: make_references(task, work), TASKS):
            references |= made
        begin = time.time()
        deadline = begin + 60 * args.minutes

        def worker(job: int) -> None:
            rng = random.Random(1000 * args.seed + job)
            k = job
            while time.time() < deadline:
                one_round(soak, k, references, rng)
                k += args.jobs

        for result in [pool.submit(worker, job) for job in range(args.jobs)]:
            result.result()
    events = ", ".join(f"{soak.counts[event]} {event}" for event in EVENTS)
    total = (f"{(time.time() - begin) / 60:.0f} minutes, {args.jobs} jobs, {len(TASKS)} tasks: {events}; "
             f"{len(soak.failures)} failures")
    command = f"`python benchmark/soak.py --minutes {args.minutes:g} --jobs {args.jobs} --seed {args.seed}`"
    output = ROOT / args.output
    output.parent.mkdir(parents=True, exist_ok=True)
    failures = [f"- {failure}".replace(f"{ROOT}/", "") for failure in soak.failures]
    common.write_file(output, "\n".join([command, "", total, *failures, ""]).encode())
    print(total)
    raise SystemExit(1 if soak.failures else 0)


if __name__ == "__main__":
    main(tyro.cli(Args))
