"""Evaluation plays the episodes that its seeds stand for, counts them rightly and disturbs nothing random."""

import random

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import TASK, same

import common


class Recorder(gym.Wrapper):
    """Keeps every episode's first observation, rewards, costs and way of ending."""

    def __init__(self, env):
        super().__init__(env)
        self.episodes = []

    def reset(self, **options):
        obs, info = self.env.reset(**options)
        self.episodes.append({"first": obs, "rewards": [], "costs": [], "terminated": False})
        return obs, info

    def step(self, action):
        step = self.env.step(action)
        self.episodes[-1]["rewards"].append(step[1])
        self.episodes[-1]["costs"].append(step[4]["cost"])
        self.episodes[-1]["terminated"] = step[2]
        return step


def sine_policy(act_dim):
    """A deterministic policy that depends on the observation."""
    return lambda obs: np.sin(3 * obs[:act_dim] + np.arange(act_dim)).astype(np.float32)


def play(env_id, episodes=3, seed=10_000, times=1):
    """The result and the recording of the last of `times` evaluations in a new simulator."""
    env, task = common.make_env(env_id)
    env = Recorder(env)
    for _ in range(times):
        env.episodes.clear()
        result = common.evaluate(env, sine_policy(task.act_dim), episodes, seed)
    env.close()
    return result, env.episodes


def test_every_random_state_is_left_as_it_was():
    env, task = common.make_env(TASK)
    np.random.seed(5)
    torch.manual_seed(5)
    random.seed(5)
    before = np.random.get_state(), torch.get_rng_state(), random.getstate()
    common.evaluate(env, sine_policy(task.act_dim), 2)
    after = np.random.get_state(), torch.get_rng_state(), random.getstate()
    env.close()
    assert all(np.array_equal(x, y) for x, y in zip(before[0], after[0], strict=True))
    assert torch.equal(before[1], after[1])
    assert before[2] == after[2]


@pytest.mark.parametrize("env_id", [TASK, "SafetyCarRun-v0", "SafetyHopperVelocityGymnasium-v1"])
def test_episodes_differ_and_repeat_exactly_in_a_fresh_environment(env_id):
    first, recording = play(env_id)
    observations = [episode["first"] for episode in recording]
    assert len(recording) == 3
    assert all(not np.array_equal(observations[i], observations[j]) for i in range(3) for j in range(i))
    again, repeated = play(env_id)
    assert same(first, again)
    assert all(np.array_equal(a["first"], b["first"]) for a, b in zip(recording, repeated, strict=True))


@pytest.mark.parametrize("env_id", [
    TASK, "SafetyHopperVelocityGymnasium-v1", "SafetyAntRun-v0",
    "SafetyCarRun-v0", "SafetyDroneCircle-v0"])
def test_an_episode_does_not_depend_on_the_episodes_before_it(env_id):
    first, recording = play(env_id)
    again, repeated = play(env_id, times=2)
    assert same(first, again)
    assert all(np.array_equal(a["first"], b["first"]) for a, b in zip(recording, repeated, strict=True))


def test_seed_of_an_evaluation_counts_up_over_its_episodes():
    long, _ = play(TASK, episodes=3, seed=7)
    short, _ = play(TASK, episodes=1, seed=9)
    assert long["return"][2] == short["return"][0]
    assert long["return"][0] != short["return"][0]


@pytest.mark.parametrize(("env_id", "terminates"), [
    (TASK, False), ("SafetyHopperVelocityGymnasium-v1", True), ("SafetyDroneCircle-v0", True)])
def test_returns_costs_and_lengths_are_sums_over_every_step(env_id, terminates):
    result, recording = play(env_id)
    assert [episode["terminated"] for episode in recording] == [terminates] * 3
    assert result["length"].tolist() == [len(episode["rewards"]) for episode in recording]
    for name in "reward", "cost":
        sums = [sum(episode[f"{name}s"]) for episode in recording]
        np.testing.assert_allclose(result["return" if name == "reward" else name], sums, rtol=1e-12)
    if not terminates:
        assert result["length"].tolist() == [200] * 3
        assert result["cost"].max() > 0


def test_policy_gets_float32_observations_of_the_step_before():
    env, _ = common.make_env(TASK)
    seen, given = [], []

    class Raw(gym.Wrapper):
        def reset(self, **options):
            obs, info = self.env.reset(**options)
            given.append(obs)
            return obs, info

        def step(self, action):
            step = self.env.step(action)
            given.append(step[0])
            return step

    def policy(obs):
        seen.append(obs)
        return np.zeros(2, np.float32)

    common.evaluate(Raw(env), policy, 1)
    env.close()
    assert len(seen) == 200 and all(obs.dtype == np.float32 for obs in seen)
    assert all(np.array_equal(a, b.astype(np.float32)) for a, b in zip(seen, given[:-1], strict=True))


# --- Tasks ---
class Slider(gym.Env):
    """A point that an action in [-2, 2] x [0, 1] moves; the cost is the first action's size."""

    observation_space = gym.spaces.Box(-1, 1, (1,))
    action_space = gym.spaces.Box(np.float32([-2, 0]), np.float32([2, 1]))

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        return self.np_random.uniform(-1, 1, 1).astype(np.float32), {}

    def step(self, action):
        assert self.action_space.contains(action)
        return np.zeros(1, np.float32), float(action[1]), False, False, {"cost": float(abs(action[0]))}


@pytest.fixture
def register():
    names = []

    def add(name, **options):
        names.append(name)
        gym.register(name, Slider, **options)

    yield add
    for name in names:
        del gym.registry[name]


def test_actions_in_minus_one_to_one_are_rescaled_to_the_tasks_box(register):
    register("SafetySlider-v0", max_episode_steps=10)
    env, task = common.make_env("SafetySlider-v0")
    assert (task.obs_dim, task.act_dim, task.max_episode_steps) == (1, 2, 10)
    result = common.evaluate(env, lambda obs: np.float32([1, -1]), 2)
    assert (result["return"] == 0).all() and (result["cost"] == 20).all() and (result["length"] == 10).all()


def test_task_without_a_time_limit_is_refused(register, refusal):
    register("SafetyEndless-v0")
    line = refusal(common.make_env, "SafetyEndless-v0")
    assert "SafetyEndless-v0" in line and "max_episode_steps" in line


def test_task_is_described_as_dsrl_has_it():
    from dsrl import infos

    env, task = common.make_env(TASK)
    env.close()
    assert (task.env_id, task.obs_dim, task.act_dim, task.max_episode_steps) == (TASK, 8, 2, 200)
    assert task.min_return == infos.MIN_EPISODE_REWARD["BallCircle"]
    assert task.max_return == infos.MAX_EPISODE_REWARD["BallCircle"]
    assert task.dataset_file == "SafetyBallCircle-v0-80-886.hdf5"


@pytest.mark.parametrize(("env_id", "near"), [
    ("SafetyBalCircle-v0", TASK), ("HopperVelocityGymnasium-v1", "SafetyHopperVelocityGymnasium-v1")])
def test_unknown_task_is_answered_with_the_nearest_names(refusal, env_id, near):
    line = refusal(common.make_env, env_id)
    assert f"--env-id {env_id}: no such task" in line and near in line


@pytest.mark.parametrize(("env_id", "words"), [
    ("", "no such task"), ("x", "no such task"), ("no/such-v0", "no such task"),
    ("gymnasium:Nothing-v0", "does not run (NameNotFound: Environment `Nothing` doesn't exist")])
def test_unlike_anything_is_still_answered_in_one_line(refusal, env_id, words):
    assert words in refusal(common.make_env, env_id)


@pytest.mark.parametrize(("env_id", "words"), [
    ("Pendulum-v1", "info['cost']"), ("CartPole-v1", "Discrete(2)"), ("Blackjack-v1", "Tuple(")])
def test_task_that_does_not_fit_is_refused_with_the_reason(refusal, env_id, words):
    line = refusal(common.make_env, env_id)
    assert line.startswith(f"error: --env-id {env_id}: ") and words in line


@pytest.mark.parametrize("env_id", ["LunarLander-v2"])
def test_task_that_cannot_be_made_or_stepped_is_refused_in_one_line(refusal, env_id):
    assert f"--env-id {env_id}" in refusal(common.make_env, env_id)
