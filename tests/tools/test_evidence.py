"""The grid runs what is not finished, offline policies first, and says when a run fails."""

import contextlib
import importlib
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import pytest
import tyro

import common
import marvel_sac_pid
import offline_pretrain
from benchmark.evidence import evidence, report
from benchmark.tools import collect_dataset

TASK = "SafetyBallRun-v0"


def processes_with(text):
    """Numbers of the processes with this in their command line, but for zombies."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if text.encode() in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
    return found


@pytest.fixture
def grid(tmp_path, monkeypatch):
    """run(*methods): the exit status and every run's (script, folder), in order.

    `fail` names what fails, `interrupted` what is ended by a signal and leaves an unfinished checkpoint.
    """
    monkeypatch.setattr(evidence, "RESULTS", tmp_path / "results")
    fail, interrupted = set(), set()

    def fake(command, log_file):
        if "collect_dataset" in command[0]:
            runs.append(("collect_dataset.py", command[command.index("--env-id") + 1]))
            shutil.copy(shipped / f"{TASK}.hdf5", evidence.DATASETS)
            return 0, 1.0, 1.0
        folder = Path(command[command.index("--resume" if "--resume" in command else "--run-dir") + 1])
        runs.append((Path(command[0]).name, folder.parent.name))
        if folder.parent.name in fail:
            return 2, 1.0, 1.0
        if "--checkpoint" in command:
            assert Path(command[command.index("--checkpoint") + 1]).is_file()
        common.save_checkpoint(folder / "checkpoint.pt", {"finished": folder.parent.name not in interrupted})
        (folder / "metrics.csv").write_text("lagrange_multiplier\n3.5\n41.25\n")
        options[folder.parent.name] = command
        return 143 if folder.parent.name in interrupted else 0, 12.34, 5.67

    monkeypatch.setattr(evidence, "call", fake)

    def run(*methods):
        runs.clear()
        with pytest.raises(SystemExit) as end:
            evidence.main(evidence.Args(tasks=(TASK,), methods=methods, seeds=(0,), jobs=1,
                                        work_dir=str(tmp_path / "work")))
        return end.value.code, list(runs)

    runs, options, shipped = [], {}, evidence.DATASETS
    return SimpleNamespace(run=run, fail=fail, interrupted=interrupted, folder=tmp_path, options=options)


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


def test_checkpoint_of_an_interrupted_run_is_nothing_to_start_from(grid, capsys):
    grid.interrupted.add("offline")
    assert grid.run("marvel") == (1, [("offline_pretrain.py", "offline")])
    out = capsys.readouterr().out
    assert f"FAILED {TASK} offline seed 0: see " in out
    assert f"FAILED {TASK} marvel seed 0: what it needs failed" in out
    assert not (grid.folder / "results" / TASK / "marvel").exists()
    grid.interrupted.clear()
    both = [("offline_pretrain.py", "offline"), ("marvel_sac_pid.py", "marvel")]
    assert grid.run("marvel") == (0, both)
    assert grid.run("marvel") == (0, [])


def test_failed_run_leaves_no_result_and_a_status(grid, capsys):
    grid.fail.add("from-scratch")
    assert grid.run("from-scratch", "marvel")[0] == 1
    out = capsys.readouterr().out
    assert f"FAILED {TASK} from-scratch seed 0: see " in out
    assert "| 3 finished, 1 failed, 0 running, 0 waiting, about 0 min to go" in out
    assert not (grid.folder / "results" / TASK / "from-scratch").exists()
    assert (grid.folder / "results" / TASK / "marvel/seed0.csv").exists()


def test_an_interrupted_run_goes_on_if_neither_command_nor_code_has_changed(grid, monkeypatch):
    grid.interrupted.add("from-scratch")
    for _ in range(2):
        assert grid.run("from-scratch")[0] == 1
    assert grid.options["from-scratch"][1] == "--resume"
    monkeypatch.setattr(evidence, "code_hash", lambda script: "other code")
    grid.interrupted.clear()
    assert grid.run("from-scratch")[0] == 0
    assert grid.options["from-scratch"][1] != "--resume" and grid.options["from-scratch"][-1] == "--overwrite"
    took = json.loads((grid.folder / "results" / TASK / "from-scratch/seed0.json").read_text())
    assert took == {"wall_seconds": 12.3, "cpu_seconds": 5.7, "resumed": False,
                    "processor": evidence.cpu_name()}
    assert len(took["processor"]) > 3


def test_dry_run_prints_the_commands_in_order_and_runs_nothing(grid, capsys):
    evidence.main(evidence.Args(tasks=(TASK,), methods=("marvel", "dual-from-bear-lag"), seeds=(3,),
                                dry_run=True, work_dir=str(grid.folder / "work")))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1].rpartition("/")[2] for line in lines] == [
        "offline_pretrain.py", "bear_lag.py", "marvel_sac_pid.py", "marvel_sac_pid.py"]
    assert all(line.startswith("python ") and f"--env-id {TASK} --seed 3" in line for line in lines)
    assert not (grid.folder / "work").exists() and not (grid.folder / "results").exists()


def test_an_exception_in_a_job_is_told_and_does_not_end_the_grid(grid, monkeypatch, capsys):
    described = evidence.describe_dataset
    monkeypatch.setattr(evidence, "describe_dataset", lambda file: 1 / 0)
    assert grid.run("from-scratch") == (1, [])
    assert "ZeroDivisionError" in capsys.readouterr().out
    monkeypatch.setattr(evidence, "describe_dataset", described)
    assert grid.run("from-scratch")[0] == 0


def test_a_run_takes_the_seconds_that_it_took_and_ends_with_the_one_that_started_it(tmp_path):
    busy = "import time; time.sleep(0.5); sum(range(20_000_000)); raise SystemExit(3)"
    status, wall, cpu = evidence.call(["-c", busy], tmp_path / "log.txt")
    assert status == 3 and wall > 0.5 and 0.05 < cpu < wall - 0.3
    code = ("import sys; from pathlib import Path; from benchmark.evidence import evidence; "
            "evidence.call(['-c', 'import time; time.sleep(60)', sys.argv[1]], Path(sys.argv[1]))")
    mark = str(tmp_path / "orphan.txt")
    parent = subprocess.Popen([sys.executable, "-c", code, mark], cwd=evidence.ROOT)
    deadline = time.time() + 30
    while len(processes_with(mark)) < 2 and time.time() < deadline:
        time.sleep(0.1)
    assert len(processes_with(mark)) == 2
    parent.kill()
    parent.wait()
    while processes_with(mark) and time.time() < deadline:
        time.sleep(0.1)
    assert not processes_with(mark)


def test_unknown_method_is_refused(grid, capsys):
    assert grid.run("marvell") == (2, [])
    assert "marvell" in capsys.readouterr().err


def test_dual_ascent_starts_from_the_multiplier_that_bear_lag_ended_with(grid):
    assert grid.run("dual-from-bear-lag") == (0, [("bear_lag.py", "bear-lag"),
                                                  ("marvel_sac_pid.py", "dual-from-bear-lag")])
    command = grid.options["dual-from-bear-lag"]
    assert command[command.index("--lagrange-init") + 1] == "41.25"


def test_fixed_multiplier_is_the_mean_of_the_second_half_of_marvels_run(grid):
    """Which is run first, if it has no result yet."""
    expected = [("offline_pretrain.py", "offline"), ("marvel_sac_pid.py", "marvel"),
                ("marvel_sac_pid.py", "fixed")]
    assert grid.run("fixed") == (0, expected)
    command = grid.options["fixed"]
    assert command[command.index("--lagrange-init") + 1] == "41.25"
    (grid.folder / "results" / TASK / "fixed/seed0.csv").unlink()
    marvel = grid.folder / "results" / TASK / "marvel/seed0.csv"
    marvel.write_text("lagrange_multiplier\n9\n9\n9\n1\n2\n4\n")
    assert grid.run("fixed") == (0, expected[2:])
    command = grid.options["fixed"]
    assert command[command.index("--lagrange-init") + 1] == "2.333"


def test_a_plan_has_every_job_after_those_that_it_needs(grid):
    """Ray takes the jobs in this order; threads would wait."""
    args = evidence.Args(tasks=(TASK,), methods=("fixed", "marvel-from-cpq", "cpq", "marvel"), seeds=(1, 0))
    before = set()
    for job in evidence.plan(args, grid.folder):
        assert before >= set(job.needs), job.name
        before.add(job.name)
    assert len(before) == 11


def test_missing_dataset_is_collected_first(grid, monkeypatch):
    monkeypatch.setattr(evidence, "DATASETS", grid.folder)
    assert grid.run("marvel")[1][0] == ("collect_dataset.py", TASK)
    facts = (grid.folder / "results" / TASK / "dataset.csv").read_text().splitlines()
    assert facts[0].startswith("transitions,episodes,") and facts[1].startswith("48100,481,")
    assert [script for script, _ in grid.run("vpa-dual")[1]] == ["marvel_sac_pid.py"]


def test_settings_name_known_tasks_methods_and_options():
    """Every line of settings.csv is a task that exists, its methods are of the grid, all options parse."""
    import bullet_safety_gym  # noqa: F401  (registers its tasks)
    import dsrl  # noqa: F401

    for task, row in evidence.SETTINGS.items():
        assert task in gym.registry
        assert set(row["methods"].split()) <= set(evidence.METHODS) and int(row["seeds"]) > 0
        for phase, script in (("collect", collect_dataset), ("offline", offline_pretrain),
                              ("online", marvel_sac_pid), ("scratch", marvel_sac_pid)):
            tyro.cli(script.Args, args=row[phase].split())
    for script, start, options in evidence.METHODS.values():
        assert (evidence.ROOT / script).is_file() and (start is None or start in evidence.METHODS)
        module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
        args = getattr(module, "Args", marvel_sac_pid.Args)  # the released controller runs under Marvel's
        tyro.cli(args, args=options.split())


def test_settings_have_every_method_that_the_pages_tables_name():
    """Or its results would be left out."""
    for page in report.PAGES:
        for task, methods in re.findall(r"<!-- (?:narrow |equal )?(Safety\S+): (.+) -->", page.read_text()):
            assert set(methods.split()) <= set(evidence.SETTINGS[task]["methods"].split()), (page, task)
        for methods in re.findall(r"<!-- overall: (.+) -->", page.read_text()):
            assert set(methods.split()) <= set(report.OVERALL), page


def test_settings_ask_for_every_seed_that_the_tables_have():
    shipped = Path(evidence.__file__).parent / "results"
    for task, row in evidence.SETTINGS.items():
        seeds = [int(file.stem[4:]) for file in (shipped / task).glob("*/seed*.csv")]
        assert max(seeds, default=0) < int(row["seeds"]), task
