"""evaluate.py: the table is common.evaluate's, the film one of those episodes, a fault one line."""

import os
import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import TASK, TINY_OFFLINE, run_script, single_line
from PIL import Image, ImageSequence
from scipy.stats import sem, t

import common
import marvel_sac_pid
import offline_pretrain
from benchmark.tools import evaluate

SCRIPT = "benchmark/tools/evaluate.py"
HOPPER, CHEETAH = "SafetyHopperVelocityGymnasium-v1", "SafetyHalfCheetahVelocityGymnasium-v1"


def write_checkpoint(path, env_id, obs_dim, act_dim, **fields):
    torch.manual_seed(2)
    actor = marvel_sac_pid.Actor(obs_dim, act_dim)
    common.save_checkpoint(path, {
        "env_id": env_id, "obs_dim": obs_dim, "act_dim": act_dim, "hidden": 256, "activation": "relu",
        "cost_limit": 25.0, "args": {"seed": 4}, "actor": actor.state_dict(), **fields})
    return actor.numpy_policy()


@pytest.fixture
def ball(tmp_path):
    """A checkpoint's path and its policy."""
    return tmp_path / "ball.pt", write_checkpoint(tmp_path / "ball.pt", TASK, 8, 2)


@pytest.fixture
def table(capsys):
    """table(checkpoint, ...): what the command prints, as {line's name: its words}."""

    def run(path, **options):
        evaluate.main(evaluate.Args(str(path), **options))
        _, _, *lines = capsys.readouterr().out.splitlines()
        return {line[:12].strip(): line[12:].replace("±", " ").replace("%", " ").split() for line in lines}

    return run


# --- Numbers ---
def test_table_holds_the_means_intervals_and_scores_of_either_policy(ball, table):
    path, policy = ball
    rows = table(path, episodes=4, seed=7)
    env, _ = common.make_env(TASK)
    rng = np.random.default_rng(4)
    expected = {"sampled": common.evaluate(env, lambda obs: policy(obs, rng), 4, seed=7),
                "mean action": common.evaluate(env, policy, 4, seed=7)}
    env.close()
    assert rows.keys() == expected.keys()
    for name, result in expected.items():
        numbers = []
        for values in (result[key] for key in ("return", "cost", "length")):
            low, high = t.interval(0.95, 3, values.mean(), sem(values)) if np.ptp(values) else (0, 0)
            numbers += [f"{values.mean():.1f}", f"{(high - low) / 2:.1f}"]
        # DSRL's reference returns of BallCircle are 0.3831 and 881.4634
        numbers += [f"{(result['return'].mean() - 0.38312) / (881.46339 - 0.38312):.3f}",
                    f"{result['cost'].mean() / 25:.2f}", f"{25 * (result['cost'] > 25).sum():.0f}"]
        assert rows[name] == numbers
    assert rows["sampled"] != rows["mean action"] and float(rows["sampled"][2]) > 0


def test_cost_limit_of_the_command_replaces_the_checkpoints(ball, table):
    path, policy = ball
    env, _ = common.make_env(TASK)
    rng = np.random.default_rng(4)
    costs = common.evaluate(env, lambda obs: policy(obs, rng), 3)["cost"]
    env.close()
    middle = float(np.median(costs))
    row = table(path, episodes=3, cost_limit=middle)["sampled"]
    assert row[-2:] == [f"{costs.mean() / middle:.2f}", f"{100 * (costs > middle).mean():.0f}"]
    row = table(path, episodes=3, cost_limit=0.0)["sampled"]
    assert row[-2:] == [f"{costs.mean() + 1:.2f}", f"{100 * (costs > 0).mean():.0f}"]


def test_a_single_episode_has_no_interval(ball, table):
    row = table(ball[0], episodes=1)["sampled"]
    assert row[1] == row[3] == row[5] == "nan" and row[4] == "200.0"


def test_numbers_are_those_at_the_end_of_the_run_that_wrote_the_file(tmp_path, ball_file, table):
    options = TINY_OFFLINE | dict(seed=5, eval_episodes=2, dataset_path=str(ball_file))
    offline_pretrain.main(offline_pretrain.Args(run_dir=str(tmp_path), **options))
    recorded = common.load_checkpoint(tmp_path / "checkpoint.pt")["evaluations"]["offline policy"]
    rows = table(tmp_path / "checkpoint.pt", episodes=2)
    for name, how in ("sampled", "sampled"), ("mean action", "mean"):
        means = [f"{recorded[f'eval_{how}_{key}']:.1f}" for key in ("return", "cost")]
        assert [rows[name][0], rows[name][2]] == means


# --- Film ---
def frames_of(path):
    """Pictures of a film and how often each was taken in a row: the writer keeps equal ones once."""
    with Image.open(path) as film:
        frames = [(np.array(frame.convert("RGB")), frame.info["duration"] // evaluate.FRAME_MS)
                  for frame in ImageSequence.Iterator(film)]
    return zip(*frames, strict=True)


def film(folder, env_id, obs_dim, act_dim, *options, env=None):
    write_checkpoint(folder / "policy.pt", env_id, obs_dim, act_dim)
    return run_script(SCRIPT, "--checkpoint", "policy.pt", "--episodes", "1", "--video", "film.gif", *options,
                      cwd=folder, env=env)


def assert_filmed(folder, stdout, most_bytes):
    """The film is of 100 pictures and moves, is small, and is of the episode in the table's last line."""
    frames, times = frames_of(folder / "film.gif")
    assert sum(times) == 100 and len(frames) > 3
    assert max(frames[0].shape) <= 320 and frames[0].std() > 5
    assert not np.array_equal(frames[0], frames[-1])
    assert (folder / "film.gif").stat().st_size < most_bytes
    assert sorted(file.name for file in folder.iterdir()) == ["film.gif", "policy.pt"]
    mean_action, told = stdout.splitlines()[-2:]
    assert told.startswith("film.gif: mean-action episode 10000, 100 pictures")
    words = mean_action.split()
    assert words[:2] == ["mean", "action"]
    assert f"return {words[2]}," in told and f"cost {float(words[5]):g}" in told


def test_bullet_task_is_filmed_without_a_display(tmp_path):
    status, stdout, stderr = film(tmp_path, TASK, 8, 2, env={"DISPLAY": ""})
    assert status == 0, stderr
    assert_filmed(tmp_path, stdout, most_bytes=1_000_000)


def egl_is_missing():
    probe = subprocess.run([sys.executable, "-c", "import mujoco.egl"], capture_output=True)
    return probe.returncode != 0


def test_mujoco_task_is_filmed_without_a_display(tmp_path):
    if egl_is_missing():
        pytest.skip("EGL is missing here (apt install libegl1 libgl1-mesa-dri)")
    status, stdout, stderr = film(tmp_path, CHEETAH, 17, 6, env={"DISPLAY": ""})
    assert (status, stderr) == (0, "")
    assert_filmed(tmp_path, stdout, most_bytes=2_000_000)


@pytest.mark.parametrize("missing", [{"MUJOCO_EGL_DEVICE_ID": "99"}, {"MUJOCO_GL": "nothing"}])
def test_numbers_are_not_lost_where_mujoco_cannot_render(tmp_path, missing):
    status, stdout, stderr = film(tmp_path, HOPPER, 11, 3, env=missing)
    assert "film.gif: no picture" in single_line(status, stderr) and "MUJOCO_GL" in stderr
    assert [line.split()[0] for line in stdout.splitlines()[2:]] == ["sampled", "mean"]
    assert [file.name for file in tmp_path.iterdir()] == ["policy.pt"]


class Clock(gym.Env):
    """Its pictures are as bright as its step count, 0 to 249; every step costs 2 and gives 1."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}
    observation_space, action_space = gym.spaces.Box(-1, 1, (1,)), gym.spaces.Box(-1, 1, (1,))

    def __init__(self, render_mode=None, fault=None):
        self.render_mode, self.fault, self.steps = render_mode, fault, 0

    def reset(self, seed=None, options=None):
        self.steps = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.steps += 1
        return np.zeros(1, np.float32), 1.0, False, False, {"cost": 2.0}

    def render(self):
        if self.fault:
            raise RuntimeError(self.fault)
        if self.render_mode == "rgb_array":
            return np.full((500, 1000, 3), self.steps, np.uint8)


@pytest.fixture
def clock(tmp_path, monkeypatch):
    """Arguments for a checkpoint of Clock with 250 steps."""
    monkeypatch.setenv("MUJOCO_GL", os.environ.get("MUJOCO_GL", "egl"))  # undoes what the command sets
    gym.register("SafetyClock-v0", Clock, max_episode_steps=250, kwargs={"fault": None})
    write_checkpoint(tmp_path / "clock.pt", "SafetyClock-v0", 1, 1)
    yield evaluate.Args(str(tmp_path / "clock.pt"), episodes=1, video=str(tmp_path / "film.gif"))
    del gym.registry["SafetyClock-v0"]


def test_film_takes_every_kth_picture_scaled_down_and_leaves_the_task_as_it_was(tmp_path, clock):
    evaluate.main(clock)
    frames, _ = frames_of(tmp_path / "film.gif")
    assert {frame.shape for frame in frames} == {(160, 320, 3)}
    assert [int(frame.mean().round()) for frame in frames] == list(range(0, 250, 3))
    assert gym.spec("SafetyClock-v0").kwargs == {"fault": None}


def test_fault_of_a_renderer_is_one_line_and_leaves_no_file(tmp_path, clock, refusal):
    gym.spec("SafetyClock-v0").kwargs["fault"] = "out of ink\nand paper"
    assert "film.gif: no picture (RuntimeError: out of ink and paper)" in refusal(evaluate.main, clock)
    assert [file.name for file in tmp_path.iterdir()] == ["clock.pt"]


def test_task_without_a_renderer_has_its_table_and_one_line(clock, monkeypatch, capsys):
    monkeypatch.setattr(Clock, "metadata", {"render_modes": ["human"]})
    with pytest.raises(SystemExit) as stopped:
        evaluate.main(clock)
    stdout, stderr = capsys.readouterr()
    assert "SafetyClock-v0 has no renderer" in single_line(stopped.value.code, stderr)
    assert stdout.splitlines()[-1].replace("±", " ").split() == [
        "mean", "action", "250.0", "nan", "500.0", "nan", "250.0", "nan", "nan", "20.00", "100", "%"]


# --- Faults ---
@pytest.mark.parametrize(("fields", "words"), [
    ({"actor": None}, "no network actor"),
    ({"actor": marvel_sac_pid.Actor(8, 2, hidden=32).state_dict()}, "actor.fc1.weight is (32, 8)"),
    ({"obs_dim": 9}, "obs_dim is 9"), ({"hidden": 64}, "hidden is 64"), ({"activation": "tanh"}, "is tanh"),
    ({"env_id": None}, "no such task"),
    ({"cost_limit": None}, "--cost-limit None"), ({"cost_limit": float("nan")}, "--cost-limit nan"),
    ({"actor": None, "new_actor": {}, "offline_actor": {}}, "of PEX")])
def test_checkpoint_that_does_not_fit_is_refused(tmp_path, refusal, fields, words):
    write_checkpoint(tmp_path / "x.pt", **{"env_id": TASK, "obs_dim": 8, "act_dim": 2})
    content = common.load_checkpoint(tmp_path / "x.pt")
    common.save_checkpoint(tmp_path / "x.pt", content | fields)
    assert words in refusal(evaluate.main, evaluate.Args(str(tmp_path / "x.pt"), episodes=1))


def test_checkpoint_of_another_task_than_the_one_named_is_refused(ball, refusal):
    line = refusal(evaluate.main, evaluate.Args(str(ball[0]), env_id="SafetyBallRun-v0"))
    assert f"env_id is {TASK}, this run needs SafetyBallRun-v0" in line


def test_checkpoint_cannot_choose_what_is_imported(tmp_path, monkeypatch, refusal):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "module_of_a_stranger.py").write_text("open('executed', 'w')\n")
    write_checkpoint(tmp_path / "x.pt", "module_of_a_stranger:Task-v0", 1, 1)
    line = refusal(evaluate.main, evaluate.Args("x.pt"))
    assert "give --env-id module_of_a_stranger:Task-v0" in line
    assert not (tmp_path / "executed").exists()


def test_task_of_a_module_is_evaluated_and_filmed_where_it_is_named(tmp_path, monkeypatch, clock, capsys):
    (tmp_path / "my_clock.py").write_text(
        "import gymnasium as gym\nfrom test_evaluate_command import Clock\n"
        "gym.register('MyClock-v0', Clock, max_episode_steps=7)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    write_checkpoint(tmp_path / "x.pt", "my_clock:MyClock-v0", 1, 1)
    evaluate.main(evaluate.Args("x.pt", env_id="my_clock:MyClock-v0", episodes=2, video="film.gif"))
    assert "14.0 ± 0.0" in capsys.readouterr().out
    frames, _ = frames_of("film.gif")
    assert [int(frame.mean().round()) for frame in frames] == list(range(7))
    del gym.registry["MyClock-v0"]


@pytest.mark.parametrize(("options", "words"), [
    ({"episodes": 0}, "--episodes 0"), ({"seed": -1}, "--seed -1"), ({"cost_limit": -1.0}, "--cost-limit -1"),
    ({"video": "film.mp4"}, ".gif"), ({"video": "no/such/folder/film.gif"}, "folder that exists")])
def test_options_that_make_no_sense_are_refused_before_an_episode_is_played(ball, refusal, options, words):
    assert words in refusal(evaluate.main, evaluate.Args(str(ball[0]), **options))
