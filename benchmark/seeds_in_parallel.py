"""What two seeds on two cores bring: the time of one offline run alone against that of two at the same time.

  python benchmark/seeds_in_parallel.py

Interleaved rounds; 2.0 would be two runs in the time of one. Imports and reading the data are part of it.
"""
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import common  # noqa: E402
from benchmark.throughput import cpu_name  # noqa: E402


@dataclass
class Args:
    seeds: int = 2
    """runs at the same time"""
    update_steps: int = 500
    """gradient steps of each"""
    rounds: int = 3
    """how often both are timed"""
    output: str = "benchmark/results/seeds_in_parallel.md"
    """report to write"""


def seconds(seeds: int, update_steps: int) -> float:
    """Wall time of that many offline runs at the same time, one core each."""
    one_core = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        begin = time.time()
        runs = [subprocess.Popen(
            [sys.executable, str(ROOT / "offline_pretrain.py"), "--update-steps", str(update_steps), "--seed",
             str(seed), "--eval-episodes", "1", "--run-dir", f"{folder}/{seed}"],
            env=one_core, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for seed in range(seeds)]
        common.need(not any([run.wait() for run in runs]), "offline_pretrain.py failed")
        return time.time() - begin


def main(args: Args) -> None:
    for name in ("seeds", "update_steps", "rounds"):
        common.need(getattr(args, name) > 0, f"--{name.replace('_', '-')} {getattr(args, name)}: at least 1")
    gains = []
    for _ in range(args.rounds):
        alone, together = seconds(1, args.update_steps), seconds(args.seeds, args.update_steps)
        gains.append(args.seeds * alone / together)
    text = (f"`python benchmark/seeds_in_parallel.py`, {cpu_name()}, {os.cpu_count()} cores:\n\n"
            f"{args.seeds} runs of {args.update_steps} updates at the same time: {min(gains):.2f} / "
            f"{statistics.median(gains):.2f} / {max(gains):.2f} times as many updates per second as one "
            f"(minimum, median, maximum of {args.rounds} rounds; "
            f"load average {os.getloadavg()[0]:.1f} at the end)\n")
    common.write_file(Path(args.output), text.encode())
    print(text)


if __name__ == "__main__":
    main(tyro.cli(Args))
