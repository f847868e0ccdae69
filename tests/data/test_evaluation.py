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


@pytest.mark.parametrize("env_id", [
    TASK, "SafetyHopperVelocityGymnasium-v1", "SafetyAntRun-v0",
    "SafetyCarRun-v0", "SafetyDroneCircle-v0"])
def test_episodes_differ_and_do_not_depend_on_those_before_them(env_id):
    first, recording = play(env_id)
    assert len({episode["first"].tobytes() for episode in recording}) == len(recording) == 3
    again, repeated = play(env_id, times=2)
    assert same(first, again)
    assert all(np.array_equal(a["first"], b["first"]) for a, b in zip(recording, repeated, strict=True))


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


class Counter(gym.Env):
    """An observation counts steps and holds the seed; an episode has five steps."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,))
    action_space = gym.spaces.Box(-1, 1, (1,))

    def reset(self, *, seed=None, options=None):
        self.obs = np.array([0.0, seed])
        return self.obs, {}

    def step(self, action):
        self.obs = self.obs + [1, 0]
        return self.obs, float(action[0]), False, False, {"cost": 2 * float(action[0])}


def test_policy_gets_float32_observations_of_the_step_before_sampled_and_not(monkeypatch):
    monkeypatch.setitem(gym.registry, "Counter-v0", gym.envs.registration.EnvSpec(
        "Counter-v0", Counter, max_episode_steps=5))
    env, _ = common.make_env("Counter-v0")
    seen, drawn = [], []

    def policy(obs, rng=None):
        assert obs.dtype == np.float32
        seen.append(obs.tolist())
        drawn.append(None if rng is None else rng.uniform())
        return np.float32([0.5 if rng is None else drawn[-1]])

    result = common.evaluate_both_ways(env, policy, 2, seed=7)
    episodes = [[step, 10_000 + k] for k in range(2) for step in range(5)]
    assert seen == 2 * episodes
    numbers = np.random.default_rng(7).uniform(size=10)
    np.testing.assert_allclose(drawn[:10], numbers)
    assert drawn[10:] == [None] * 10
    assert result == pytest.approx({
        "eval_sampled_return": numbers.sum() / 2, "eval_sampled_cost": numbers.sum(),
        "eval_mean_return": 2.5, "eval_mean_cost": 5.0}, rel=1e-6)
    assert all(type(value) is float for value in result.values())
