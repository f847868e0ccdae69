"""The grid on Ray: a small one on two nodes of this machine, and a worker that is killed. Needs Ray."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from benchmark.evidence import evidence

pytestmark = pytest.mark.grid
TASK = "SafetyBallRun-v0"
METHODS = {  # name: script, start, options; small ones of the grid's
    "offline": ("offline_pretrain.py", None, "--update-steps 60 --eval-every 60 --eval-episodes 1"),
    "marvel": ("marvel_sac_pid.py", "offline", "--vpa-steps 30 --total-timesteps 300 --eval-episodes 1"),
    "from-scratch": ("marvel_sac_pid.py", None, "--from-scratch --learning-starts 200 --total-timesteps 3000 "
                     "--checkpoint-every 300 --eval-every 3000 --eval-episodes 1"),
    "broken": ("marvel_sac_pid.py", None, "--from-scratch --total-timesteps -1"),
}


@pytest.fixture
def small_grid(tmp_path, monkeypatch):
    """run(name, *methods, **options): the exit status and {method: bytes of its result}."""
    pytest.importorskip("ray")
    monkeypatch.setattr(evidence, "METHODS", METHODS)
    settings = dict(seeds="1", collect="", offline="", online="", scratch="")
    monkeypatch.setattr(evidence, "SETTINGS", {TASK: settings})

    def run(name, *methods, **options):
        monkeypatch.setattr(evidence, "RESULTS", tmp_path / name / "results")
        with pytest.raises(SystemExit) as end:
            evidence.main(evidence.Args(tasks=(TASK,), methods=methods, seeds=(0,),
                                        work_dir=str(tmp_path / name / "work"), **options))
        return end.value.code, {file.parent.name: file.read_bytes()
                                for file in (tmp_path / name / "results").glob("*/*/seed0.csv")}

    return run


def test_two_nodes_do_a_small_grid_as_threads_do_with_one_bad_job_in_it(small_grid, monkeypatch, capfd):
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    status, here = small_grid("threads", "offline", "marvel")
    assert status == 0 and here.keys() == {"offline", "marvel"}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        cluster.add_node(num_cpus=1)
        status, there = small_grid("nodes", "broken", "marvel", ray=cluster.address)
    finally:
        cluster.shutdown()
    assert status == 1 and there == here
    out = capfd.readouterr().out
    assert f"FAILED {TASK} broken seed 0: see " in out and f"finished {TASK} marvel seed 0" in out
    assert "3 finished, 1 failed, 0 running, 0 waiting" in out


def worker_of(run_dir):
    """The process that started the run in this folder."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().decode().split("\0")
            if words[1] == "marvel_sac_pid.py" and str(run_dir) in words:
                return int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError):
            continue
    return None


def test_a_run_whose_worker_is_killed_goes_on_and_gives_the_same_bytes(small_grid, tmp_path):
    status, undisturbed = small_grid("threads", "from-scratch")
    assert status == 0
    folder = tmp_path / "killed/work" / TASK / "from-scratch/seed0"
    killer = os.fork()
    if killer == 0:
        deadline = time.time() + 300
        while time.time() < deadline:
            worker = worker_of(folder)
            if worker and (folder / "checkpoint.pt").exists():
                os.kill(worker, signal.SIGKILL)
                os._exit(0)
            time.sleep(0.05)
        os._exit(1)
    status, after = small_grid("killed", "from-scratch", ray="local", jobs=1)
    assert os.waitpid(killer, 0)[1] == 0, "no worker was killed"
    assert status == 0 and after == undisturbed
    assert '"resumed": true' in (tmp_path / "killed/results" / TASK / "from-scratch/seed0.json").read_text()


def test_no_cluster_gets_one_line(small_grid, capsys):
    assert small_grid("none", "from-scratch", ray="127.0.0.1:1")[0] == 2
    err = capsys.readouterr().err
    assert "error: --ray 127.0.0.1:1: no such cluster" in err


def test_without_ray_one_line_says_what_to_install(small_grid, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert small_grid("none", "from-scratch", ray="local")[0] == 2
    assert "pip install -r benchmark/evidence/requirements-grid.txt" in capsys.readouterr().err
