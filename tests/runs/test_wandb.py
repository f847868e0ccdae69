"""Weights & Biases: a sweep's command line runs, its runs have own folders, a resumed run goes on."""

import os
import sys

import pytest
from conftest import run_script
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

import common
import marvel_sac_pid

TINY = dict(from_scratch=True, total_timesteps=200, learning_starts=100, eval_episodes=1, utd=0.01)


def folder_of(**options):
    return common.Run(marvel_sac_pid.Args(**options), "marvel_sac_pid", marvel_sac_pid.COLUMNS).dir.name


def test_runs_of_a_sweep_have_folders_of_their_own(monkeypatch):
    assert folder_of(seed=3) == "SafetyBallCircle-v0__marvel_sac_pid__seed3"
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep")
    names = set()
    for run_id in ("aaa", "bbb"):
        monkeypatch.setenv("WANDB_RUN_ID", run_id)
        names.add(folder_of(seed=3))
    assert names == {f"SafetyBallCircle-v0__marvel_sac_pid__seed3__{run_id}" for run_id in ("aaa", "bbb")}


@pytest.mark.parametrize("autotune", [True, False])
def test_the_agents_own_command_line_runs(tmp_path, autotune):
    """As benchmark/runs.md says, with no-autotune as a parameter that is on or off."""
    given = {"seed": 2, "total-timesteps": 200, "no-autotune": not autotune, "from-scratch": True,
             "eval-episodes": 1, "utd": 0.01, "run-dir": "run"}
    words = create_sweep_command_args({"args": {name: {"value": value} for name, value in given.items()}})
    template = create_sweep_command(["${env}", "python", "${program}", "${args_no_boolean_flags}"])
    assert template[-1] == "${args_no_boolean_flags}"
    status, _, stderr = run_script("marvel_sac_pid.py", *words["args_no_boolean_flags"], cwd=tmp_path)
    assert status == 0, stderr
    args = common.load_checkpoint(tmp_path / "run/checkpoint.pt")["args"]
    assert (args["seed"], args["autotune"], args["utd"]) == (2, autotune, 0.01)


def test_resumed_run_goes_on_in_the_same_wandb_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    marvel_sac_pid.main(marvel_sac_pid.Args(**TINY, track=True, run_dir="run"))
    first = (tmp_path / "run/wandb_id").read_text()
    marvel_sac_pid.main(marvel_sac_pid.Args(resume="run", total_timesteps=400))
    assert (tmp_path / "run/wandb_id").read_text() == first
    folders = [name for name in os.listdir(tmp_path / "wandb") if name.startswith("offline-run-")]
    assert len(folders) == 2 and all(name.endswith(first) for name in folders)
    # W&B has seen TensorBoard's file once in each part, and no copy of its own
    assert len(list((tmp_path / "wandb").rglob("*tfevents*"))) == 2 and not (tmp_path / "run/wandb").exists()
    assert sys.modules["wandb"].run is None  # the program that called main has none open


def test_wandb_that_cannot_start_is_one_line_and_nothing_is_written(tmp_path, monkeypatch, refusal):
    import wandb

    def fail(**options):
        raise wandb.errors.UsageError("no API key\nconfigured")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(wandb, "init", fail)
    line = refusal(marvel_sac_pid.main, marvel_sac_pid.Args(**TINY, track=True, run_dir="run"))
    assert "--track" in line and "WANDB_MODE=offline" in line
    assert not (tmp_path / "run").exists()
