"""The README's own environment goes through both phases; what does not fit is refused with one line."""

import os
import re
import shlex
import sys

import gymnasium as gym
import numpy as np
import pytest
from conftest import ROOT, run_script

import common
from benchmark.curves import read_metrics
from marvel_sac_pid import Args, main

README = ROOT / "README.md"
HEADING = "## Your own environment\n"
TINY = {
    "--from-scratch": "--total-timesteps 300 --learning-starts 200 --batch-size 16 --eval-episodes 1",
    "benchmark/export_dataset.py": "",
    "offline_pretrain.py": "--update-steps 20 --batch-size 16 --eval-episodes 1",
    "marvel_sac_pid.py": "--total-timesteps 200 --vpa-steps 10 --batch-size 16 --eval-episodes 1",
}


def blocks(language):
    """The fenced blocks of a language in the README's section about one's own environment."""
    section = README.read_text().split(HEADING)[1].split("\n## ")[0]
    return re.findall(rf"^```{language}\n(.*?)^```", section, re.MULTILINE | re.DOTALL)


@pytest.fixture
def readme_task(tmp_path, monkeypatch):
    """The README's module in the present folder, not imported yet."""
    (source,) = blocks("python")
    (tmp_path / "my_task.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "my_task", raising=False)
    monkeypatch.delitem(gym.registry, "Point-v0", raising=False)
    return tmp_path


def test_readme_s_environment_goes_through_both_phases_by_the_readme_s_commands(readme_task):
    (commands,) = blocks("bash")
    commands = [shlex.split(line) for line in commands.splitlines()]
    assert [command[:2] for command in commands] == [
        ["python", "marvel_sac_pid.py"], ["python", "benchmark/export_dataset.py"],
        ["python", "offline_pretrain.py"], ["python", "marvel_sac_pid.py"]]
    for command in commands:
        tiny = next(options for word, options in TINY.items() if word in command)
        status, _, error = run_script(*command[1:], *tiny.split(), cwd=readme_task)
        assert status == 0, error
    task = common.Task("my_task:Point-v0", 4, 2, 100)
    data = common.read_dataset(readme_task / "point.hdf5", task)
    assert len(data["rewards"]) == 300
    offline, online = (common.load_checkpoint(path) for path in readme_task.glob("runs/*/checkpoint.pt")
                       if "collect" not in str(path))
    for checkpoint in offline, online:
        assert checkpoint["env_id"] == "my_task:Point-v0"
        assert np.isfinite(checkpoint["q"]["weights.0"].numpy()).all()
    metrics = read_metrics(*readme_task.glob("runs/*marvel*/metrics.csv"))
    assert list(metrics["env_steps"]) == [100, 200]
    assert np.isnan(metrics["normalized_return"]).all()  # DSRL has no reference for it


def test_readme_s_environment_is_what_the_readme_says(readme_task):
    (source,) = blocks("python")
    assert len([line for line in source.splitlines() if line.strip()]) <= 25
    env, task = common.make_env("my_task:Point-v0")
    assert (task.obs_dim, task.act_dim, task.max_episode_steps) == (4, 2, 100)

    def episode(target):  # straight to a distance from the origin
        obs, total, cost, truncated, steps = common.reset_env(env, 1), 0.0, 0.0, False, 0
        while not truncated:
            aim = (target / np.linalg.norm(obs[:2]) - 1) * obs[:2] - 2 * obs[2:]
            obs, reward, terminated, truncated, info = env.step(np.clip(aim, -1, 1).astype(np.float32))
            total, cost, steps = total + reward, cost + info["cost"], steps + 1
            assert not terminated
        return total, cost, steps

    outside, inside = episode(1.2), episode(0.2)
    assert outside[1:] == (0, 100) and inside[2] == 100
    assert inside[0] > outside[0] + 30 and inside[1] > 50  # what is better is over the limit
    np.testing.assert_array_equal(common.reset_env(env, 5), common.reset_env(env, 5))
    assert not np.array_equal(common.reset_env(env, 5), common.reset_env(env, 6))


# --- What fits ---
BOX = gym.spaces.Box


class Custom(gym.Env):
    """One observation and one action; `result` is what step() gives after the observation."""

    def __init__(self, observation_space=None, action_space=None, result=(0.0, False, False, {"cost": 0.0})):
        self.observation_space = observation_space or BOX(-1, 1, (1,))
        self.action_space = action_space or BOX(-1, 1, (1,))
        self.result, self.seen = result, []

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        assert self.action_space.contains(action)
        self.seen.append(action)
        return self.observation_space.sample(), *self.result[:-1], dict(self.result[-1])


@pytest.fixture
def register(monkeypatch):
    """register(...): a task with these arguments of Custom; forgotten after the test."""
    def add(entry_point=Custom, max_episode_steps=10, **kwargs):
        monkeypatch.setitem(gym.registry, "Custom-v0", gym.envs.registration.EnvSpec(
            "Custom-v0", entry_point, max_episode_steps=max_episode_steps, kwargs=kwargs))
        return "Custom-v0"

    return add


@pytest.mark.parametrize("cost", [1, 0.5, True, np.float32(2), np.array(3.0)], ids=repr)
def test_any_number_is_a_cost(register, cost):
    env, _ = common.make_env(register(result=(0.0, False, False, {"cost": cost})))
    result = common.evaluate(env, lambda obs: np.zeros(1, np.float32), 1)
    assert result["cost"] == [10 * float(cost)]


def test_cost_of_a_six_value_step_is_the_third_value(register):
    env, _ = common.make_env(register(result=(0.5, 2.0, False, False, {})))
    result = common.evaluate(env, lambda obs: np.zeros(1, np.float32), 1)
    assert (result["return"], result["cost"], result["length"]) == ([5], [20], [10])


@pytest.mark.parametrize(("low", "high"), [(0.0, 3.0), (2.0, 3.0), (-5.0, -1.0)])
def test_actions_are_rescaled_to_the_box_of_the_task(register, low, high):
    env, _ = common.make_env(register(action_space=BOX(low, high, (1,))))
    common.reset_env(env, 0)
    env.unwrapped.seen.clear()
    for action in -1, 0, 0.5, 1:
        env.step(np.full(1, action, np.float32))
    assert np.array(env.unwrapped.seen)[:, 0] == pytest.approx(
        [low, (low + high) / 2, low + 0.75 * (high - low), high])


# --- What does not fit ---
@pytest.mark.parametrize(("custom", "says"), [
    (dict(observation_space=gym.spaces.Dict(a=BOX(0, 1, (2,)))), "must be boxes of one dimension"),
    (dict(observation_space=gym.spaces.Discrete(3)), "must be boxes of one dimension"),
    (dict(observation_space=BOX(0, 255, (4, 4, 3), np.uint8)), "must be boxes of one dimension"),
    (dict(action_space=gym.spaces.Discrete(3)), "must be boxes of one dimension"),
    (dict(action_space=gym.spaces.MultiDiscrete([2, 3])), "must be boxes of one dimension"),
    (dict(action_space=BOX(-np.inf, np.inf, (2,))), "bounded actions must be boxes"),
    (dict(action_space=BOX(-1, np.inf, (2,))), "bounded actions must be boxes"),
    (dict(result=(0.0, False, False, {})), "no number info['cost']"),
    (dict(result=(0.0, False, False, {"cost": None})), "no number info['cost']"),
    (dict(result=(0.0, False, False, {"cost": np.zeros(2)})), "no number info['cost']"),
    (dict(result=(0.0, False, False, {"cost": "1"})), "no number info['cost']"),
    (dict(max_episode_steps=None), "no time limit; register it with max_episode_steps"),
    (dict(entry_point=lambda size: None), "does not run (TypeError: "),
    (dict(entry_point="nowhere.at_all:Custom"), "does not run (ModuleNotFoundError: "),
])
def test_task_that_does_not_fit_is_refused_and_nothing_written(register, custom, says, refusal, tmp_path):
    line = refusal(main, Args(env_id=register(**custom), from_scratch=True, run_dir=str(tmp_path / "run")))
    assert line.startswith("error: --env-id Custom-v0: ") and says in line
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("env_id", "source", "says"), [
    ("no_such_module_here:Point-v0", None, "No module named 'no_such_module_here'"),
    ("registers_nothing:Nothing-v7", "", "does not run (NameNotFound: Environment `Nothing` doesn't exist"),
    ("breaks:Point-v7", "import no_such_library\n", "No module named 'no_such_library'"),
    ("raises:Point-v7", "raise ValueError('out of order\\nsince Monday')\n", "out of order"),
    ("SafetyBalCircle-v0", None, "the nearest names are SafetyBallCircle-v0"),
])
def test_unknown_module_or_task_is_refused(env_id, source, says, refusal, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    if source is not None:
        (tmp_path / f"{env_id.split(':')[0]}.py").write_text(source)
    line = refusal(common.make_env, env_id)
    assert line.startswith(f"error: --env-id {env_id}: ") and says in line
