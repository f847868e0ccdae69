"""The README's own environment goes through both phases; what one may give, and what is refused."""

import os
import re
import shlex
import sys

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT, run_script
from small import files, saved

import common
from benchmark.tools.curves import read_metrics
from marvel_sac_pid import Args, main

README = ROOT / "README.md"
HEADING = "## Your own environment\n"
TINY = {
    "--from-scratch": "--total-timesteps 300 --learning-starts 200 --batch-size 16 --eval-episodes 1",
    "benchmark/tools/export_dataset.py": "",
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
    assert [command[1] for command in commands] == [
        "marvel_sac_pid.py", "benchmark/tools/export_dataset.py", "offline_pretrain.py", "marvel_sac_pid.py"]
    for command in commands:
        tiny = next(options for word, options in TINY.items() if word in command)
        status, _, error = run_script(*command[1:], *tiny.split(), cwd=readme_task)
        assert status == 0, error
    task = common.Task("my_task:Point-v0", 4, 2, 100)
    assert len(common.read_dataset(readme_task / "point.hdf5", task)["rewards"]) == 300
    for run in "offline", "my_task:Point-v0__marvel_sac_pid__seed0":
        checkpoint = saved(readme_task / "runs" / run)
        assert checkpoint["env_id"] == "my_task:Point-v0" and checkpoint["finished"]
    metrics = read_metrics(readme_task / "runs" / run / "metrics.csv")
    assert list(metrics["env_steps"]) == [100, 200]
    assert np.isnan(metrics["normalized_return"]).all()  # DSRL has no reference for it


# --- An environment of which the sixth step is what a test makes it ---
BOX = gym.spaces.Box
GOOD = ([0.5, -0.5, 0.25], 2.0, False, False, {"cost": 1.0})  # observation, reward, two flags, info


class Custom(gym.Env):
    """Every step gives GOOD, but the sixth and later ones have been given to `change`."""

    def __init__(self, change=lambda *step: step, first=GOOD[0], observation_space=None, action_space=None,
                 after=5):
        self.observation_space = observation_space or BOX(-1, 1, (3,))
        self.action_space = action_space or BOX(-1, 1, (2,))
        self.change, self.first, self.after, self.seen, self.steps = change, first, after, [], 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.first, {}

    def step(self, action):
        assert self.action_space.contains(action.astype(np.float32))
        self.seen.append(action)
        self.steps += 1
        obs, reward, terminated, truncated, info = GOOD
        step = np.array(obs), reward, terminated, truncated, dict(info)
        return step if self.steps <= self.after else self.change(*step)


@pytest.fixture
def register(monkeypatch):
    """register(...): a task with these arguments of Custom; forgotten after the test."""
    def add(entry_point=Custom, max_episode_steps=10, **kwargs):
        monkeypatch.setitem(gym.registry, "Custom-v0", gym.envs.registration.EnvSpec(
            "Custom-v0", entry_point, max_episode_steps=max_episode_steps, kwargs=kwargs))
        return "Custom-v0"

    return add


def with_obs(obs):
    return lambda _, *more: (obs, *more)


def with_reward(reward):
    return lambda obs, _, *more: (obs, reward, *more)


def with_ends(terminated, truncated):
    return lambda obs, reward, _, __, info: (obs, reward, terminated, truncated, info)


def with_info(info):
    return lambda *step: (*step[:-1], info)


def with_cost(cost):
    return with_info({"cost": cost})


@pytest.mark.parametrize("change", [
    with_obs(list(GOOD[0])), with_obs(tuple(GOOD[0])), with_obs(torch.tensor(GOOD[0])),
    with_obs(np.array(GOOD[0], np.float64)), with_reward(np.array([2.0])), with_reward(np.float32(2)),
    with_reward(2), with_reward(torch.tensor(2.0)), with_cost(np.array([1])), with_cost(np.array(1.0)),
    with_cost(torch.tensor([1.0])), with_cost(True), with_cost(1), with_ends([False], np.array([[False]])),
    with_ends(np.False_, torch.tensor(False)), with_ends(0, 0.0)])
def test_number_and_observation_in_any_wrapping_are_taken(register, change):
    env, _ = common.make_env(register(change=change, after=0))
    obs, _ = env.reset(seed=0)
    for _ in range(8):
        obs, reward, terminated, truncated, info = env.step(np.zeros(2, np.float32))
        assert obs.dtype == np.float32 and obs.tolist() == GOOD[0]
        assert (reward, terminated, truncated, info["cost"]) == (2.0, False, False, 1.0)
        assert [type(x) for x in (reward, terminated, truncated, info["cost"])] == [float, bool, bool, float]


NAN, INF = float("nan"), float("inf")


WRONG_STEPS = [  # what the step becomes, and what the line says
    (with_info({}), "cost"), (with_cost(None), "info['cost']"), (with_cost("1"), "info['cost']"),
    (with_cost(np.zeros(2)), "info['cost']"), (with_cost([[1], [2, 3]]), "info['cost']"),
    (with_cost(NAN), "info['cost'] is not finite: nan"), (with_cost(-1.0), "a cost is not negative"),
    (with_cost(-INF), "info['cost'] is not finite"), (with_cost(1j), "info['cost']"),
    (with_info(None), "info"),
    (with_reward(None), "the reward must be a number, it is None"), (with_reward(np.zeros(2)), "the reward"),
    (with_reward(NAN), "the reward is not finite: nan"), (with_reward(INF), "the reward is not finite: inf"),
    (with_reward(torch.zeros(1, requires_grad=True)), "the reward"),
    (with_obs([0.0, 0.0]), "shape (2,), its space (3,)"), (with_obs(np.zeros((1, 3))), "shape (1, 3)"),
    (with_obs([0.0, NAN, 0.0]), "the observation is not finite"),
    (with_obs([0.0, 1e300, 0.0]), "the observation is not finite"),
    (with_cost(1e300), "info['cost'] is not finite"),  # as float32, in which it is stored
    (with_ends([True, False], False), "terminated must be a number"),
    (with_ends(False, "False"), "truncated must be a number"), (with_ends(None, False), "terminated must be"),
    (with_ends(2, False), "terminated must be True or False, it is 2"),
    (lambda obs, reward, terminated, _, info: (obs, reward, terminated, info), "must return five values"),
    (lambda *_: None, "must return five values"),
    (with_obs({"a": 1}), "observation"), (with_obs(None), "observation"),
    (with_obs(torch.zeros(3, requires_grad=True)), "observation")]


@pytest.mark.parametrize(("change", "says"), WRONG_STEPS)
def test_step_that_gives_something_else_in_mid_run_ends_it_with_one_line(register, refusal, change, says):
    env, _ = common.make_env(register(change=change, after=7))  # two steps are make_env's

    def play():
        env.reset(seed=0)
        for _ in range(8):
            env.step(np.zeros(2, np.float32))

    line = refusal(play)
    assert line.startswith("error: --env-id Custom-v0, step 6: ") and says in line


@pytest.mark.parametrize("ends", [[True], np.True_, torch.tensor([True]), 1])
def test_episode_ends_where_a_flag_in_any_wrapping_says_so(register, ends):
    env, _ = common.make_env(register(change=with_ends(ends, [False]), after=5))  # two steps are make_env's
    assert common.evaluate(env, lambda obs: np.zeros(2, np.float32), 1)["length"] == [4]


def test_reset_that_returns_something_else_later_ends_with_one_line(register, refusal):
    env, _ = common.make_env(register())
    env.unwrapped.reset = lambda **_: GOOD[0]
    assert "reset() must return an observation and info" in refusal(env.reset, seed=0)


def test_episode_without_an_end_is_told_once(register, capsys, monkeypatch):
    monkeypatch.setattr(common, "LONG_EPISODE", 30)
    env, _ = common.make_env(register(max_episode_steps=10**9))
    for _ in range(2):
        env.reset(seed=0)
        for _ in range(40):
            assert env.step(np.zeros(2, np.float32))[2:4] == (False, False)
    assert capsys.readouterr().err.count("this episode has 30 steps and no end") == 2  # once per episode


def test_run_that_ends_so_keeps_its_last_checkpoint_and_logs_no_more(tmp_path, register, capsys):
    options = dict(env_id=register(change=with_cost(NAN), after=26), from_scratch=True, learning_starts=10**6,
                   total_timesteps=100, checkpoint_every=1, run_dir=str(tmp_path / "run"), batch_size=8)
    with pytest.raises(SystemExit):
        main(Args(**options))
    assert "step 25: info['cost'] is not finite" in capsys.readouterr().err
    assert saved(tmp_path / "run")["progress"]["env_steps"] == 20
    assert len((tmp_path / "run/metrics.csv").read_text().splitlines()) == 1 + 2


def test_first_observation_is_checked_like_all_others(register, refusal):
    assert "the observation is not finite" in refusal(common.make_env, register(first=[NAN, 0, 0]))
    assert "shape (2,)" in refusal(common.make_env, register(first=[0.0, 0.0]))


def test_action_that_is_not_finite_is_not_given_to_the_simulator(register, refusal):
    env, _ = common.make_env(register())
    env.reset(seed=0)
    seen = len(env.unwrapped.seen)
    assert "the policy's action is not finite" in refusal(env.step, np.array([0, NAN], np.float32))
    assert len(env.unwrapped.seen) == seen


# --- Arrays that are shared with the simulator ---
class Shared(gym.Env):
    """It halves the action that it is given, in place, and gives one observation array, changed in place."""

    observation_space, action_space = BOX(-np.inf, np.inf, (2,)), BOX(-1, 1, (2,))
    shares = True

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.obs = self.np_random.normal(size=2).astype(np.float32)
        return (self.obs if self.shares else self.obs.copy()), {}

    def step(self, action):
        if self.shares:
            action *= 0.5
            self.obs += action
            return self.obs, float(action[0]), False, False, {"cost": 0.0}
        self.obs = self.obs + 0.5 * action
        return self.obs.copy(), float(0.5 * action[0]), False, False, {"cost": 0.0}


class Careful(Shared):
    shares = False


def test_environment_that_works_in_place_gives_the_run_of_one_that_copies(tmp_path, register):
    for kind in Shared, Careful:
        main(Args(env_id=register(kind), from_scratch=True, total_timesteps=60, learning_starts=20,
                  batch_size=8, eval_episodes=1, run_dir=str(tmp_path / kind.__name__)))
    one, other = (saved(tmp_path / kind.__name__)["buffer"] for kind in (Shared, Careful))
    assert all(torch.equal(one[name], other[name]) for name in one)
    step = one["next_observations"] - one["observations"]
    torch.testing.assert_close(step, 0.5 * one["actions"])  # the buffer's actions are the policy's
    one, other = ((tmp_path / kind.__name__ / "metrics.csv").read_bytes() for kind in (Shared, Careful))
    assert one == other


# --- What fits ---
def test_cost_of_a_six_value_step_is_the_third_value(register):
    env, _ = common.make_env(register(change=lambda obs, *_: (obs, 0.5, 2.0, False, False, {}), after=0))
    result = common.evaluate(env, lambda obs: np.zeros(2, np.float32), 1)
    assert (result["return"], result["cost"], result["length"]) == ([5], [20], [10])


@pytest.mark.parametrize(("low", "high"), [(0.0, 3.0), (2.0, 3.0), (-5.0, -1.0)])
def test_actions_are_rescaled_to_the_box_of_the_task_and_back(register, low, high):
    env, task = common.make_env(register(action_space=BOX(low, high, (2,))))
    env.reset(seed=0)
    env.unwrapped.seen.clear()
    actions = np.array([[-1, 0], [0.5, 1]], np.float32)
    own = [[low, (low + high) / 2], [low + 0.75 * (high - low), high]]
    for action in actions:
        env.step(action)
    np.testing.assert_allclose(env.unwrapped.seen, own, rtol=1e-6)
    np.testing.assert_allclose(task.own_actions(actions), own, rtol=1e-6)
    np.testing.assert_allclose(task.scaled_actions(np.array(own, np.float32)), actions, atol=1e-6)


def test_environment_that_resets_itself_is_played_to_its_own_ends(register, monkeypatch):
    env_id = register(change=lambda obs, reward, *_: (obs, reward, True, False, {"cost": 3.0}), after=2)
    monkeypatch.setattr(gym.registry[env_id], "autoreset", True)
    env, _ = common.make_env(env_id)
    env.unwrapped.steps = 0
    result = common.evaluate(env, lambda obs: np.zeros(2, np.float32), 1)
    assert (result["length"], result["cost"]) == ([3], [1 + 1 + 3])


# --- What does not fit ---
@pytest.mark.parametrize(("custom", "says"), [
    (dict(observation_space=gym.spaces.Dict(a=BOX(0, 1, (2,)))), "must be boxes of one dimension"),
    (dict(observation_space=gym.spaces.Discrete(3)), "must be boxes of one dimension"),
    (dict(observation_space=BOX(0, 255, (4, 4, 3), np.uint8)), "must be boxes of one dimension"),
    (dict(action_space=gym.spaces.Discrete(3)), "must be boxes of one dimension"),
    (dict(action_space=BOX(-np.inf, np.inf, (2,))), "every action needs finite bounds"),
    (dict(action_space=BOX(-1, np.inf, (2,))), "every action needs finite bounds"),
    (dict(action_space=BOX(*np.float32([[-3e38, -1], [3e38, 1]]))), "every action needs finite bounds"),
    (dict(action_space=BOX(*np.float32([[-1, 0.5], [1, 0.5]]))), "one below the other"),
    (dict(change=with_info({}), after=0), "no info['cost']"),
    (dict(change=with_reward(None), after=0), "the reward must be a number"),
    (dict(change=with_obs([0.0]), after=0), "the observation has shape (1,)"),
    (dict(max_episode_steps=-1), "no time limit"),
    (dict(change=with_info(None), after=0), "info"),
    (dict(change=lambda obs, reward, terminated, truncated, info: (obs, reward, terminated, info), after=0),
     "returns 4 values"),
    (dict(max_episode_steps=None), "no time limit; register it with max_episode_steps"),
    (dict(entry_point=lambda size: None), "does not run (TypeError: "),
    (dict(entry_point="nowhere.at_all:Custom"), "does not run (ModuleNotFoundError: "),
])
def test_task_that_does_not_fit_is_refused_and_nothing_written(register, custom, says, refusal, tmp_path):
    line = refusal(main, Args(env_id=register(**custom), from_scratch=True, run_dir=str(tmp_path / "run")))
    assert line.startswith("error: --env-id Custom-v0") and says in line
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("env_id", "source", "says"), [
    ("no_such_module_here:Point-v0", None, "No module named 'no_such_module_here'"),
    ("registers_nothing:Nothing-v7", "", "does not run (NameNotFound: Environment `Nothing` doesn't exist"),
    ("breaks:Point-v7", "import no_such_library\n", "No module named 'no_such_library'"),
    ("raises:Point-v7", "raise ValueError('out of order\\nsince Monday')\n", "out of order since Monday"),
    ("garbled:P-v7", "def f(:\n", "SyntaxError"),
    *((env_id, None, says) for env_id, says in {
        "SafetyBalCircle-v0": "the nearest names are SafetyBallCircle-v0",
        "HopperVelocityGymnasium-v1": "SafetyHopperVelocityGymnasium-v1",
        "SafetyBallCircle-v7": "no such task; the nearest names are SafetyBallCircle-v0", "": "no such task",
        "xyzzy": "no such task; the nearest names are none", "no/such-v0": "no such task",
        "LunarLander-v2": "does not run", "Pendulum-v1": "info['cost']", "CartPole-v1": "Discrete(2)",
        "Blackjack-v1": "Tuple("}.items())])
def test_unknown_module_or_task_and_one_that_does_not_fit_are_refused(
        env_id, source, says, refusal, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    if source is not None:
        (tmp_path / f"{env_id.split(':')[0]}.py").write_text(source)
    before = files(tmp_path)
    line = refusal(common.make_env, env_id)
    assert line.startswith(f"error: --env-id {env_id}") and says in line
    assert before.items() <= files(tmp_path).items()
