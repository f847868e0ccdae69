"""Numbers in a log can be believed: nothing that watches a run changes it, and what is not finite ends it."""

import csv
import re
import types
from functools import partial

import gymnasium as gym
import numpy as np
import pytest
from small import assert_same_end, begin, end, equal, kinds, run, saved
from tqdm import tqdm

import common
from benchmark.tools.curves import read_metrics

TRAINED = ("actor", "q", "qc", "q_target", "qc_target", "actor_optimizer", "critic_optimizer", "torch_rng")


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """Script and options of every kind of run."""
    return kinds(tmp_path_factory.mktemp("start"))


@pytest.fixture
def train(tmp_path, settings):
    """train(kind, folder, **options): the checkpoint of a small run in this process."""
    def call(kind, folder="run", **options):
        script, small = settings[kind]
        script.main(script.Args(**{**small, "run_dir": str(tmp_path / folder), **options}))
        return saved(tmp_path / folder)

    return call


# --- Watching changes nothing ---
@pytest.mark.parametrize("kind", ["offline", "marvel"])
def test_evaluating_logging_and_saving_change_nothing_of_the_training(
        tmp_path, settings, train, monkeypatch, kind):
    plain = train(kind, "plain", checkpoint_every=10**6, eval_every=10**6)
    watched = train(kind, "watched", checkpoint_every=1, eval_every=7, eval_episodes=4)
    script, _ = settings[kind]
    monkeypatch.setattr(common, "evaluate_both_ways", lambda *_: {
        "eval_sampled_return": 0.0, "eval_sampled_cost": 0.0})
    monkeypatch.setattr(common.Run, "row", lambda *_: None)
    monkeypatch.setattr(common.Run, "scalars", lambda *_: None)
    monkeypatch.setattr(script, "tqdm", partial(tqdm, disable=True))
    unseen = train(kind, "unseen")
    for other in watched, unseen:
        assert [name for name in TRAINED if not equal(plain[name], other[name])] == []
    if kind == "marvel":
        names = [name for name in script.COLUMNS if not name.startswith("eval_")]
        one, other = (read_metrics(tmp_path / folder / "metrics.csv") for folder in ("plain", "watched"))
        assert all(np.array_equal(one[name], other[name], equal_nan=True) for name in names)
        assert np.isfinite(one["eval_mean_cost"]).sum() < np.isfinite(other["eval_mean_cost"]).sum()


@pytest.mark.parametrize("kind", ["offline", "marvel"])
def test_same_seed_gives_the_same_files_alone_and_beside_other_runs(tmp_path, settings, kind):
    script, options = settings[kind]
    assert run(script, tmp_path / "alone", **options)[0] == 0
    beside = [begin(script, tmp_path / f"beside{seed}", **{**options, "seed": seed}) for seed in (0, 1)]
    assert [end(*child)[0] for child in beside] == [0, 0]
    assert_same_end(tmp_path / "beside0", tmp_path / "alone")
    alone, other = ((tmp_path / name / "metrics.csv").read_bytes() for name in ("alone", "beside1"))
    assert alone != other


# --- What is not finite ---
def poison(monkeypatch, script, name, call, value):
    """From its `call`-th call on, the script's function gives a loss times `value`."""
    original, calls = getattr(script, name), []

    def poisoned(*arguments):
        calls.append(1)
        result = original(*arguments)
        if len(calls) < call:
            return result
        if not isinstance(result, tuple):
            return result * value
        loss, *others = result
        others = [{key: loss_ * value for key, loss_ in other.items()} if isinstance(other, dict) else other
                  for other in others]
        return (loss * value, *others)

    monkeypatch.setattr(script, name, poisoned)


def one_line(capsys, function, *arguments, **options):
    """Exit status and the error line of a run, without a traceback."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        function(*arguments, **options)
    (line,) = re.findall("error: .*", capsys.readouterr().err)  # amid the progress bars
    return stopped.value.code, line


def assert_all_that_is_there_is_good(folder):
    with open(folder / "metrics.csv", newline="") as file:
        written = [value for row in csv.DictReader(file) for name, value in row.items()
                   if value and name != "normalized_return"]  # for which this task has no reference
    assert np.isfinite(np.array(written, float)).all()
    content = saved(folder)
    for network in "actor", "new_actor", "q", "qc", "vae":
        assert all(np.isfinite(weights.numpy()).all() for weights in content.get(network, {}).values())


@pytest.mark.parametrize(("kind", "function", "call", "where"), [
    ("offline", "critic_loss", 19, "update_steps 19"), ("offline", "actor_loss", 19, "update_steps 19"),
    ("bear_lag", "critic_loss", 19, "update_steps 19"), ("bear_lag", "bear_loss", 19, "update_steps 19"),
    ("bc_safe", "log_likelihood", 19, "update_steps 19"),
    ("marvel", "critic_loss", 17, "vpa_steps 17, env_steps 0"),
    ("marvel", "critic_loss", 40, "vpa_steps 20, env_steps 1[0-9]+"),
    ("marvel", "actor_loss", 20, "vpa_steps 20, env_steps 1[0-9]+"),
    ("rollouts", "critic_loss", 5, "vpa_steps 5, env_steps [5-6][0-9]"),
    ("from scratch", "critic_loss", 15, "env_steps [0-9]+"), ("jsrl", "critic_loss", 15, "env_steps [0-9]+"),
    ("pex", "critic_loss", 15, "env_steps [0-9]+"), ("so2", "critic_loss", 30, "env_steps [0-9]+"),
    ("rlpd", "critic_loss", 15, "env_steps [0-9]+"), ("td3", "critic_loss", 17, "vpa_steps 17, env_steps 0"),
    ("td3", "actor_loss", 15, "vpa_steps 20, env_steps [0-9]+")])
def test_loss_that_is_not_finite_ends_the_run_before_it_is_logged_or_saved(
        tmp_path, monkeypatch, capsys, settings, train, kind, function, call, where):
    script, _ = settings[kind]
    poison(monkeypatch, script, function, call, float("inf" if function == "actor_loss" else "nan"))
    status, line = one_line(capsys, train, kind)
    assert status == 1 and str(tmp_path / "run") in line
    assert re.search(f"(_loss|_mean|_qc) is not finite at (vpa_steps 0, )?{where}; the last good", line), line
    assert re.search("checkpoint is of step [1-9]", line)
    assert_all_that_is_there_is_good(tmp_path / "run")


def test_gradient_that_is_not_finite_ends_the_run_though_the_loss_is(
        tmp_path, monkeypatch, capsys, settings, train):
    script, _ = settings["bc_safe"]
    original, calls = script.log_likelihood, []

    def spiked(*arguments):
        calls.append(1)
        result = original(*arguments)
        if len(calls) == 14:  # a checkpoint is due after that update
            result.register_hook(lambda gradient: gradient * float("inf"))
        return result

    monkeypatch.setattr(script, "log_likelihood", spiked)
    status, line = one_line(capsys, train, "bc_safe")
    assert status == 1 and "actor, actor_optimizer is not finite at update_steps 14" in line
    assert line.endswith("of step 7")
    assert_all_that_is_there_is_good(tmp_path / "run")


# --- The log against a recording ---
class Recorder(gym.Wrapper):
    """Writes down every step on its own account."""

    def __init__(self, env, steps):
        super().__init__(env)
        self.recorded = steps

    def step(self, action):
        obs, reward, terminated, truncated, info = self.env.step(action)
        self.recorded.append((reward, info["cost"], terminated, truncated))
        return obs, reward, terminated, truncated, info


def test_logged_costs_and_regret_are_those_of_an_independent_recording(
        tmp_path, monkeypatch, settings, train):
    make, made, steps = common.make_env, [], []

    def make_env(env_id):
        env, task = make(env_id)
        made.append(env)
        return (Recorder(env, steps) if len(made) == 1 else env), task

    monkeypatch.setattr(common, "make_env", make_env)
    checkpoint = train("marvel", cost_limit=4.0, rollout_episodes=2, total_timesteps=300)
    metrics = read_metrics(tmp_path / "run/metrics.csv")
    reward, cost, terminated, truncated = (np.array(column) for column in zip(*steps, strict=True))
    ends = np.flatnonzero(terminated | truncated)
    assert terminated.any() and truncated.any() and len(ends) % 2 == 0
    assert metrics["env_steps"].tolist() == (ends + 1).tolist()
    assert metrics["episode"].tolist() == list(range(1, len(ends) + 1))
    parts = np.split(np.arange(len(cost)), ends[:-1] + 1)
    costs = np.array([sum(cost[part]) for part in parts])
    assert (costs > 4).any() and (costs < 4).any()
    for name, expected in {
            "episode_return": [sum(reward[part]) for part in parts],
            "episode_cost": costs,
            "normalized_cost": costs / 4,
            "cumulative_cost": [sum(costs[:k + 1]) for k in range(len(parts))],
            "violation_regret": [sum(max(0.0, c - 4.0) for c in costs[:k + 1]) for k in range(len(parts))],
            }.items():
        np.testing.assert_allclose(metrics[name], expected, rtol=1e-5, err_msg=name)
    buffer = {name: values.numpy() for name, values in checkpoint["buffer"].items()}
    np.testing.assert_array_equal(buffer["terminals"], terminated)
    np.testing.assert_array_equal(buffer["timeouts"], truncated)
    np.testing.assert_array_equal(buffer["costs"], cost.astype(np.float32))
    np.testing.assert_allclose(buffer["rewards"], 0.1 * reward, rtol=1e-5)  # --reward-scale
    inside = np.delete(np.arange(len(cost)), ends)
    np.testing.assert_array_equal(buffer["next_observations"][inside], buffer["observations"][inside + 1])


def test_simulators_are_closed_at_the_end(monkeypatch, train):
    make, open_ones = common.make_env, []

    def make_env(env_id):
        env, task = make(env_id)
        open_ones.append(env)
        close = env.close
        env.close = types.MethodType(lambda env: (open_ones.remove(env), close()), env)
        return env, task

    monkeypatch.setattr(common, "make_env", make_env)
    train("marvel", "online")
    train("offline", "offline")
    assert open_ones == []
