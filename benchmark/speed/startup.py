"""How long it takes from the command to the end of a run of one gradient step, and which imports take it.

  python benchmark/speed/startup.py

That is more than the time to the first gradient step: it ends with an evaluation and a checkpoint.
"""
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import common  # noqa: E402
from benchmark.speed.clock import cpu_name  # noqa: E402

OFFLINE = "offline_pretrain.py --update-steps 1 --eval-episodes 1 --run-dir offline"
RUNS = (OFFLINE, "marvel_sac_pid.py --vpa-steps 1 --total-timesteps 0 --eval-episodes 1 --run-dir online "
                 "--checkpoint offline/checkpoint.pt")


@dataclass
class Args:
    rounds: int = 7
    """how often both scripts are timed"""
    packages: int = 8
    """packages in the list of imports"""
    output: str = "benchmark/speed/reports/startup.md"
    """report to write"""


def run(folder: str, command: str, *options: str) -> tuple[float, str]:
    """Wall seconds of a script's run, and what it wrote to stderr; `options` are Python's."""
    (script, *arguments), one_core = command.split(), os.environ | {"OMP_NUM_THREADS": "1"}
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, *options, str(ROOT / script), *arguments, "--overwrite"],
                          cwd=folder, env=one_core, capture_output=True, text=True)
    common.stop_unless(done.returncode == 0, f"{script} failed: {done.stderr[-200:]}")
    return time.perf_counter() - begin, done.stderr


def import_seconds(report: str) -> Counter:
    """Seconds by package, each import without those inside it, from what `python -X importtime` wrote."""
    seconds = Counter()
    for microseconds, name in re.findall(r"^import time: +(\d+) \| +\d+ \| +([\w.]+)$", report, re.MULTILINE):
        seconds[name.partition(".")[0]] += int(microseconds) / 1e6
    return seconds


def main(args: Args) -> None:
    for name in ("rounds", "packages"):
        common.stop_unless(getattr(args, name) > 0, f"--{name} {getattr(args, name)}: at least 1")
    with tempfile.TemporaryDirectory() as folder:
        for command in RUNS:  # the disk is warm afterwards
            run(folder, command)
        seconds = [[run(folder, command)[0] for command in RUNS] for _ in range(args.rounds)]
        imports = import_seconds(run(folder, OFFLINE, "-X", "importtime")[1])
    load = f"load average {os.getloadavg()[0]:.1f} at the end"
    text = f"`python benchmark/speed/startup.py`, {cpu_name()}, {load}:\n\n"
    for command, times in zip(RUNS, zip(*seconds, strict=True), strict=True):
        text += (f"- {command.split()[0]}, a run of one gradient step: {min(times):.2f} / "
                 f"{statistics.median(times):.2f} / {max(times):.2f} s (minimum, median, maximum of "
                 f"{args.rounds})\n")
    largest = ", ".join(f"{name} {value:.2f}" for name, value in imports.most_common(args.packages))
    text += f"- imports of offline_pretrain.py, {imports.total():.2f} s while each is timed: {largest}\n"
    common.write_file(Path(args.output), text.encode())
    print(text)


if __name__ == "__main__":
    main(tyro.cli(Args))
