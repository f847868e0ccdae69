"""Programs whose standard streams are closed, full or not read any more, go on or end with one line."""

import os
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT, command_line
from small import OFFLINE, kinds

from benchmark.tools.curves import read_metrics

SMALL = {"PYTHONPATH": str(ROOT / "tests/runs"), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A folder with a dataset and an offline run."""
    folder = tmp_path_factory.mktemp("streams")
    kinds(folder)
    return folder


def shell(command, folder):
    """Run a line of bash in which {python} and {root} stand; its status and what came out of it."""
    line = command.format(python=shlex.quote(sys.executable), root=shlex.quote(str(ROOT)))
    run = subprocess.run(["bash", "-c", f"set -o pipefail; {line}"], cwd=folder, capture_output=True,
                         text=True, env={**os.environ, **SMALL}, timeout=120)
    return run.returncode, run.stdout + run.stderr


@pytest.mark.parametrize("redirection", ["<&- >&- 2>&-", "<&- 2>&-", ">&-", "2>&-", ">/dev/full 2>/dev/full"])
def test_run_without_its_streams_writes_its_files_as_ever(begun, redirection, tmp_path):
    options = {**OFFLINE, "dataset_path": begun / "data.hdf5", "run_dir": tmp_path / "run"}
    words = " ".join(command_line(options))
    status, printed = shell(f"{{python}} {{root}}/offline_pretrain.py {words} {redirection}", tmp_path)
    assert (status, "Traceback" in printed) == (0, False), printed
    assert (tmp_path / "run/metrics.csv").read_bytes() == (begun / "offline/metrics.csv").read_bytes()


def test_signal_to_a_run_without_streams_does_not_write_into_its_files(begun, tmp_path):
    """A daemon's run: its metrics.csv must not get the number of standard error."""
    options = "--env-id small:Small-v0 --from-scratch --total-timesteps 100000 --run-dir run --batch-size 8"
    status, printed = shell(
        f"{{python}} {{root}}/marvel_sac_pid.py {options} <&- >&- 2>&- & "
        "for k in $(seq 400); do sleep 0.1; grep -q ^20, run/metrics.csv && break; done; "
        "kill -USR1 $!; wait $!", tmp_path)
    assert status == 128 + 10, printed
    metrics = read_metrics(tmp_path / "run/metrics.csv")
    assert (metrics["env_steps"] > 0).all()
    assert "ends at" not in (tmp_path / "run/metrics.csv").read_text()


@pytest.mark.parametrize("command", [
    "{{python}} {{root}}/marvel_sac_pid.py --help | true",
    "{{python}} {{root}}/benchmark/tools/curves.py --run-dir {0}/offline | true",
    "{{python}} {{root}}/benchmark/tools/curves.py --run-dir {0}/offline > /dev/full",
    "{{python}} {{root}}/benchmark/tools/evaluate.py --checkpoint {0}/offline/checkpoint.pt --episodes 1 "
    "--env-id small:Small-v0 | true"])
def test_output_that_nobody_reads_gives_no_traceback(begun, command, tmp_path):
    status, printed = shell(command.format(begun), tmp_path)
    assert (status, "Traceback" in printed) == (0, False), printed
