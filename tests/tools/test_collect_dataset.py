"""collect_dataset.py makes a dataset that can be made again, and continues what was interrupted."""

import subprocess
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
from conftest import TASK, random_transitions, run_script

import common
from benchmark.tools import collect_dataset

SCRIPT = "benchmark/tools/collect_dataset.py"
TINY = ["--cost-limits", "10", "40", "--timesteps", "400", "--max-episodes", "3", "--seed", "5",
        "--output", "made/ball.hdf5", "--work-dir", "work"]
WORK = f"work/{TASK}__400steps__utd0.5"
RUNS = ("limit10.0__seed5", "limit40.0__seed6")


@pytest.fixture(scope="module")
def collected(tmp_path_factory):
    """A folder in which a tiny collection ran."""
    folder = tmp_path_factory.mktemp("collect")
    status, stdout, stderr = run_script(SCRIPT, *TINY, cwd=folder)
    assert status == 0, stderr
    assert "made/ball.hdf5: 3 of 4 episodes, 600 transitions" in stdout
    return folder


def test_collected_file_is_a_dataset_of_whole_episodes_of_the_runs(collected, ball_task):
    data = common.read_dataset(collected / "made/ball.hdf5", ball_task)
    ends, returns, costs = common.episode_sums(data)
    assert ends.tolist() == [199, 399, 599]
    played = set()
    for name in RUNS:
        run = common.read_dataset(collected / WORK / f"{name}.hdf5", ball_task)
        _, run_returns, run_costs = common.episode_sums(run)
        played |= set(zip(run_returns.round(3), run_costs, strict=True))
    assert len(played) == 4
    assert set(zip(returns.round(3), costs, strict=True)) < played


def test_collected_file_says_how_it_was_made(collected):
    with h5py.File(collected / "made/ball.hdf5") as file:
        attributes = dict(file.attrs)
    assert (attributes["task"], attributes["seed"]) == (TASK, 5)
    words = attributes["command"].split()
    assert words[:4] == ["python", SCRIPT, "--env-id", TASK]
    assert words[words.index("--cost-limits") + 1:][:2] == ["10", "40"]
    for name, value in (("timesteps", 400), ("max-episodes", 3), ("seed", 5)):
        assert words[words.index(f"--{name}") + 1] == str(value)
    assert f"torch=={version('torch')}" in attributes["versions"].split()
    assert f"pybullet=={version('pybullet')}" in attributes["versions"].split()


def test_second_call_trains_only_what_is_missing_and_gives_the_same_bytes(collected):
    output = collected / "made/ball.hdf5"
    files = [collected / WORK / f"{name}.hdf5" for name in RUNS]
    before = output.read_bytes()
    trained = [file.stat().st_mtime_ns for file in files]
    output.unlink()
    files[1].unlink()
    status, _, stderr = run_script(SCRIPT, *TINY, cwd=collected)
    assert status == 0, stderr
    assert output.read_bytes() == before
    again = [file.stat().st_mtime_ns for file in files]
    assert again[0] == trained[0] and again[1] > trained[1]
    assert sorted(file.name for file in output.parent.iterdir()) == ["ball.hdf5"]


@pytest.mark.parametrize(("options", "words"), [
    ({"env_id": "SafetyBallCirle-v0"}, "nearest names are SafetyBallCircle-v0"),
    ({"jobs": 0}, "--jobs"), ({"max_episodes": 0}, "--max-episodes"), ({"timesteps": 0}, "--timesteps"),
    ({"output": "."}, "--output")])
def test_bad_options_are_refused_before_anything_is_trained_or_written(
        tmp_path, monkeypatch, refusal, options, words):
    monkeypatch.chdir(tmp_path)
    assert words in refusal(collect_dataset.main, collect_dataset.Args(**{"output": "x.hdf5"} | options))
    assert list(tmp_path.iterdir()) == []


def write_run(run_dir, seed):
    """What a run of one episode of uniform actions leaves: rewards in the buffer are scaled."""
    buffer = {key: torch.from_numpy(array.astype(np.float32))
              for key, array in random_transitions(TASK, episodes=1, seed=seed).items()}
    buffer["rewards"] *= 0.1
    run_dir.mkdir(parents=True, exist_ok=True)
    common.save_checkpoint(run_dir / "checkpoint.pt", {
        "env_id": TASK, "obs_dim": 8, "act_dim": 2, "reward_scale": 0.1, "args": {"seed": seed},
        "buffer": buffer, "finished": True})


def test_failed_run_is_named_with_its_log_and_nothing_is_made(tmp_path, monkeypatch, refusal):
    monkeypatch.chdir(tmp_path)

    def fail(command, **ignored):
        if "10.0" not in command:
            write_run(Path(command[command.index("--run-dir") + 1]), seed=1)
        return subprocess.CompletedProcess(command, int("10.0" in command))

    monkeypatch.setattr(collect_dataset, "subprocess", SimpleNamespace(run=fail, STDOUT=subprocess.STDOUT))
    line = refusal(collect_dataset.main, collect_dataset.Args(
        cost_limits=(10.0, 40.0), output="made/x.hdf5", work_dir="work", jobs=1))
    assert "limit 10 failed" in line and f"work/{TASK}__" in line and line.endswith("limit10.0__seed0.log")
    assert not (tmp_path / "made").exists()


@pytest.fixture
def fake_runs(tmp_path, monkeypatch):
    """Training replaced by random episodes, in the folder of the test; the list of commands that were run."""
    monkeypatch.chdir(tmp_path)
    commands = []

    def run(command, **options):
        commands.append(command)
        seed = int(command[command.index("--seed") + 1])
        write_run(Path(command[command.index("--run-dir") + 1]), seed)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(collect_dataset, "subprocess", SimpleNamespace(run=run, STDOUT=subprocess.STDOUT))
    return commands


def collect(**options):
    collect_dataset.main(collect_dataset.Args(
        **{"cost_limits": (5.0, 80.0), "output": "x.hdf5", "work_dir": "work", "jobs": 1, **options}))


def test_every_limit_has_a_run_with_a_seed_of_its_own(fake_runs):
    collect(env_id=TASK.replace("Safety", "Offline"), seed=3, timesteps=700)  # DSRL's name for the task
    names = ("--env-id", "--cost-limit", "--seed", "--total-timesteps")
    given = [[command[command.index(name) + 1] for name in names] for command in fake_runs]
    assert given == [[TASK, "5.0", "3", "700"], [TASK, "80.0", "4", "700"]]
    with h5py.File("x.hdf5") as file:
        assert np.flatnonzero(file["timeouts"][()]).tolist() == [199, 399]
        saved = {key: array[()] for key, array in file.items()}
    for k, seed in enumerate((3, 4)):
        for key, array in random_transitions(TASK, episodes=1, seed=seed).items():
            np.testing.assert_allclose(saved[key][200 * k : 200 * (k + 1)], array, rtol=1e-6, err_msg=key)


def test_finished_runs_are_not_run_again(fake_runs):
    collect()
    first = Path("x.hdf5").read_bytes()
    collect()
    assert len(fake_runs) == 2
    assert Path("x.hdf5").read_bytes() == first


def test_limits_in_another_order_or_the_same_twice_are_other_runs(fake_runs):
    collect(cost_limits=(5.0, 10.0))
    collect(cost_limits=(10.0, 5.0), output="y.hdf5")
    collect(cost_limits=(20.0, 20.0, 1000000.0, 1000001.0), output="z.hdf5")
    folders = [command[command.index("--run-dir") + 1] for command in fake_runs]
    assert len(folders) == len(set(folders)) == 8


def test_runs_with_other_options_stay_beside_these(fake_runs):
    collect(cost_limits=(2.5, 2.25))
    before = {file: file.stat().st_mtime_ns for file in Path("work").rglob("*")}
    assert len([file for file in before if file.suffix == ".log"]) == 2
    for k, change in enumerate(({"timesteps": 700}, {"utd": 0.25}, {"utd": 0.1}, {"seed": 7}), 2):
        collect(cost_limits=(2.5, 2.25), **change)
        assert len(fake_runs) == 2 * k
    for file, changed in before.items():
        if file.is_file():
            assert file.stat().st_mtime_ns == changed, file
