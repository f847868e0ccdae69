"""The grid runs what is not finished, offline policies first, and says when a run fails."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmark import evidence

TASK = "SafetyBallRun-v0"


@pytest.fixture
def grid(tmp_path, monkeypatch):
    """run(*methods): the exit status and every run's (script, folder), in order; `fail` names what fails."""
    monkeypatch.setattr(evidence, "RESULTS", tmp_path / "results")
    fail = set()

    def fake(command, **options):
        folder = Path(command[command.index("--run-dir") + 1])
        runs.append((Path(command[1]).name, folder.parent.name))
        if folder.parent.name in fail:
            return SimpleNamespace(returncode=2)
        if "--checkpoint" in command:
            assert Path(command[command.index("--checkpoint") + 1]).is_file()
        for name in "metrics.csv", "checkpoint.pt":
            (folder / name).write_text("x")
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(evidence.subprocess, "run", fake)

    def run(*methods):
        runs.clear()
        with pytest.raises(SystemExit) as end:
            evidence.main(evidence.Args(tasks=(TASK,), methods=methods, seeds=(0,), jobs=1,
                                        work_dir=str(tmp_path / "work")))
        return end.value.code, list(runs)

    runs = []
    return SimpleNamespace(run=run, fail=fail, folder=tmp_path)


def test_offline_policy_comes_first_and_finished_runs_are_not_run_again(grid):
    both = [("offline_pretrain.py", "offline"), ("marvel_sac_pid.py", "marvel")]
    assert grid.run("marvel") == (0, both)
    assert grid.run("marvel", "from-scratch") == (0, [("marvel_sac_pid.py", "from-scratch")])
    assert grid.run("marvel", "from-scratch") == (0, [])


def test_removed_result_is_run_again_and_its_offline_policy_too_if_that_is_gone(grid):
    grid.run("marvel")
    (grid.folder / "results" / TASK / "marvel/seed0.csv").unlink()
    assert [folder for _, folder in grid.run("marvel")[1]] == ["marvel"]
    (grid.folder / "results" / TASK / "marvel/seed0.csv").unlink()
    (grid.folder / "work" / TASK / "offline/seed0/checkpoint.pt").unlink()
    assert [folder for _, folder in grid.run("marvel")[1]] == ["offline", "marvel"]


def test_failed_run_leaves_no_result_and_a_status(grid, capsys):
    grid.fail.add("from-scratch")
    assert grid.run("from-scratch", "marvel")[0] == 1
    assert "FAILED SafetyBallRun-v0 from-scratch seed 0" in capsys.readouterr().out
    assert not (grid.folder / "results" / TASK / "from-scratch").exists()
    assert (grid.folder / "results" / TASK / "marvel/seed0.csv").exists()


def test_unknown_method_is_refused(grid, capsys):
    assert grid.run("marvell") == (2, [])
    assert "marvell" in capsys.readouterr().err
