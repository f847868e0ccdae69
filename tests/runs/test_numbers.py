"""Numbers in a log can be believed: nothing that watches a run changes it, and what is not finite ends it."""

import contextlib
import io
import re
import subprocess
import sys
import warnings
from functools import partial

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_MARVEL, TINY_OFFLINE, command_line, parameters, same
from tqdm import tqdm

import common
import marvel_sac_pid
import offline_pretrain
from benchmark import curves
from benchmark.curves import read_metrics

NETWORKS = ("actor", "q", "qc", "q_target", "qc_target")
TINY = {"offline": (offline_pretrain, TINY_OFFLINE), "online": (marvel_sac_pid, TINY_MARVEL)}


@pytest.fixture(scope="module")
def offline(ball_file, tmp_path_factory):
    """The checkpoint of a tiny offline run."""
    folder = tmp_path_factory.mktemp("runs") / "offline"
    offline_pretrain.main(offline_pretrain.Args(
        **TINY_OFFLINE, dataset_path=str(ball_file), run_dir=str(folder)))
    return folder / "checkpoint.pt"


@pytest.fixture
def train(tmp_path, ball_file, offline):
    """train(kind, folder, **options): the checkpoint of a tiny run of either script."""
    def run(kind, folder, **options):
        script, tiny = TINY[kind]
        start = {"checkpoint": str(offline)} if kind == "online" else {}
        script.main(script.Args(**{**tiny, **start, "dataset_path": str(ball_file),
                                   "run_dir": str(tmp_path / folder), **options}))
        return common.load_checkpoint(tmp_path / folder / "checkpoint.pt")

    return run


def weights(checkpoint):
    return parameters({name: checkpoint[name] for name in NETWORKS})


def training_columns(folder):
    """metrics.csv without the evaluations, as text."""
    lines = [line.split(",") for line in (folder / "metrics.csv").read_text().splitlines()]
    kept = [k for k, name in enumerate(lines[0]) if not name.startswith("eval_")]
    return [[line[k] for k in kept] for line in lines]


# --- Watching changes nothing ---
@pytest.mark.parametrize("kind", TINY)
@pytest.mark.parametrize("option", [{"eval_every": 7}, {"eval_episodes": 4}, {"checkpoint_every": 1}])
def test_evaluating_and_saving_more_often_changes_nothing_of_the_training(tmp_path, train, kind, option):
    plain, watched = train(kind, "plain", checkpoint_every=10**6), train(kind, "watched", **option)
    assert same(weights(plain), weights(watched))
    assert torch.equal(plain["torch_rng"], watched["torch_rng"])
    if kind == "online":
        assert plain["rng"] == watched["rng"] and plain["count"] == watched["count"]
        assert training_columns(tmp_path / "plain") == training_columns(tmp_path / "watched")


@pytest.mark.parametrize("kind", TINY)
def test_training_is_the_same_without_any_evaluation(monkeypatch, train, kind):
    watched, nothing = train(kind, "watched"), np.zeros(1)
    monkeypatch.setattr(common, "evaluate", lambda *_: dict.fromkeys(("return", "cost", "length"), nothing))
    assert same(weights(watched), weights(train(kind, "plain")))


@pytest.mark.parametrize("kind", TINY)
def test_logging_progress_and_plotting_change_nothing_of_the_training(monkeypatch, tmp_path, train, kind):
    script, _ = TINY[kind]
    shown = io.StringIO()
    with contextlib.redirect_stderr(shown):
        watched = train(kind, "watched")
    assert "100%" in shown.getvalue()
    monkeypatch.setattr(common.Run, "row", lambda *_, **__: None)
    monkeypatch.setattr(script, "tqdm", partial(tqdm, disable=True))
    silent = train(kind, "silent")
    assert same(weights(watched), weights(silent))
    state = torch.get_rng_state(), np.random.get_state()[1].tolist()
    curves.main(curves.Args(run_dir=str(tmp_path / "watched")))
    assert torch.equal(state[0], torch.get_rng_state()) and state[1] == np.random.get_state()[1].tolist()


def test_same_seed_gives_the_same_files_alone_and_beside_other_runs(tmp_path, ball_file, offline):
    options = command_line({**TINY_MARVEL, "checkpoint": offline, "dataset_path": ball_file})
    command = [sys.executable, str(ROOT / "marvel_sac_pid.py"), *options, "--run-dir"]

    def start(folder):
        return subprocess.Popen([*command, folder], cwd=tmp_path, stdout=subprocess.DEVNULL,
                                stderr=subprocess.DEVNULL)

    assert start("alone").wait(120) == 0
    beside = [start(f"beside{k}") for k in range(3)]
    assert [process.wait(120) for process in beside] == [0, 0, 0]
    alone = common.load_checkpoint(tmp_path / "alone/checkpoint.pt")
    for k in range(3):
        folder = tmp_path / f"beside{k}"
        assert (folder / "metrics.csv").read_bytes() == (tmp_path / "alone/metrics.csv").read_bytes()
        assert same(weights(common.load_checkpoint(folder / "checkpoint.pt")), weights(alone))


# --- What is not finite ---
def poison_loss(monkeypatch, script, name, call, value):
    """The `call`-th result of the script's function `name` has the first number replaced by `value`."""
    original, calls = getattr(script, name), []

    def poisoned(*arguments):
        calls.append(1)
        result = original(*arguments)
        return (result[0] * value, *result[1:]) if len(calls) == call else result

    monkeypatch.setattr(script, name, poisoned)


def ending(main, args):
    """Exit status and the error lines of a run."""
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr), pytest.raises(SystemExit) as stopped, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        main(args)
    return stopped.value.code, re.findall("error: .*", stderr.getvalue())  # amid the progress bars


@pytest.mark.parametrize(("kind", "function", "call", "named", "step"), [
    ("offline", "critic_loss", 35, "critic loss", 34), ("offline", "actor_loss", 35, "actor loss", 34),
    ("online", "critic_loss", 21, "critic loss", 20), ("online", "actor_loss", 3, "actor loss", 30 + 200)])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_loss_that_is_not_finite_ends_the_run_before_it_is_learned_from(
        tmp_path, monkeypatch, ball_file, offline, kind, function, call, named, step, value):
    script, tiny = TINY[kind]
    poison_loss(monkeypatch, script, function, call, value)
    start = {"checkpoint": str(offline)} if kind == "online" else {}
    status, (line,) = ending(script.main, script.Args(**{
        **tiny, **start, "dataset_path": str(ball_file), "checkpoint_every": 10,
        "run_dir": str(tmp_path / "x")}))
    saved = common.load_checkpoint(tmp_path / "x/checkpoint.pt")
    assert status == 1
    assert f"{named} is not finite at step {step}" in line and str(tmp_path / "x") in line
    assert line.endswith(f"the last good checkpoint is of step {saved['step']}") and 0 < saved["step"] <= step
    assert all(np.isfinite(value).all() for value in weights(saved).values())
    assert "nan" not in (tmp_path / "x/metrics.csv").read_text()


def test_gradient_that_is_not_finite_ends_the_run_though_the_loss_is(tmp_path, monkeypatch, ball_file):
    class Spike(torch.autograd.Function):
        """The identity, with an infinite derivative."""

        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * float("inf")

    original, calls = offline_pretrain.log_likelihood, []

    def spiked(*arguments):
        calls.append(1)
        result = original(*arguments)
        return Spike.apply(result) if len(calls) == 12 else result

    monkeypatch.setattr(offline_pretrain, "log_likelihood", spiked)
    status, (line,) = ending(offline_pretrain.main, offline_pretrain.Args(**{
        **TINY_OFFLINE, "dataset_path": str(ball_file), "run_dir": str(tmp_path / "x"), "checkpoint_every": 5,
        "algo": "bc-safe", "cost_limit": 300.0}))
    assert (status, "actor gradient is not finite at step 11" in line) == (1, True)
    assert line.endswith("of step 10")


class OnGpu(torch.Tensor):
    """Passes for a tensor on a GPU, and counts how often it, or what was computed from it, is waited for."""

    is_cuda, waits = True, 0

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.waits += function.__name__ in ("__float__", "__bool__", "item")
        return super().__torch_function__(function, types, args, kwargs or {})


@pytest.mark.parametrize("ending_by", ["row", "checkpoint"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_gpu_is_not_waited_for_until_something_is_logged_or_saved(tmp_path, ending_by, value):
    args = marvel_sac_pid.Args(run_dir=str(tmp_path / "x"), checkpoint_every=10)
    run = common.Run(args, "x", ["q_loss"])
    for run.step in range(1, 11):
        run.check_finite(**{"critic loss": torch.tensor(1.0, requires_grad=True).as_subclass(OnGpu)})
    assert run.gpu["critic loss"].grad_fn is None  # or the graph of every step would be kept
    OnGpu.waits = 0
    run.row(10, {"q_loss": 1.0})
    run.checkpoint(dict)
    assert OnGpu.waits == 2 and run.saved_at == 10
    before = {file: file.read_bytes() for file in (run.dir / "metrics.csv", run.dir / "checkpoint.pt")}
    for run.step in range(11, 21):
        number = torch.tensor(value if run.step == 15 else 1.0).as_subclass(OnGpu)
        run.check_finite(**{"critic loss": number})
    assert OnGpu.waits == 2
    line = io.StringIO()
    with contextlib.redirect_stderr(line), pytest.raises(SystemExit) as stopped:
        run.row(20, {"q_loss": 1.0}) if ending_by == "row" else run.checkpoint(dict)
    run.close()
    assert stopped.value.code == 1 and "critic loss is not finite at step 20; the last" in line.getvalue()
    assert before == {file: file.read_bytes() for file in before}


class Broken(gym.Wrapper):
    """From step `at` on, observation, reward or cost is not a number."""

    def __init__(self, env, what, at):
        super().__init__(env)
        self.what, self.left = what, at

    def step(self, action):
        obs, reward, terminated, truncated, info = self.env.step(action)
        self.left -= 1
        if self.left <= 0:
            obs = obs * np.nan if self.what == "observation" else obs
            reward = np.inf if self.what == "reward" else reward
            info["cost"] = np.nan if self.what == "cost" else info["cost"]
        return obs, reward, terminated, truncated, info


@pytest.mark.parametrize("what", ["observation", "reward", "cost"])
def test_simulator_that_gives_no_number_ends_the_run_at_that_step(
        tmp_path, monkeypatch, ball_file, offline, what):
    make, made = common.make_env, []

    def make_env(env_id):
        env, task = make(env_id)
        made.append(env)
        return (Broken(env, what, at=250) if len(made) == 1 else env), task

    monkeypatch.setattr(common, "make_env", make_env)
    status, (line,) = ending(marvel_sac_pid.main, marvel_sac_pid.Args(**{
        **TINY_MARVEL, "checkpoint": str(offline), "dataset_path": str(ball_file), "checkpoint_every": 100,
        "run_dir": str(tmp_path / "x")}))
    assert status == 1
    assert f"{what} is not finite at step {30 + 249}; the last good checkpoint is of step {30 + 200}" in line
    assert len((tmp_path / "x/metrics.csv").read_text().splitlines()) == 2  # the header and the good episode


def test_policy_that_gives_no_number_ends_the_run_before_it_acts(tmp_path, monkeypatch, ball_file, offline):
    original, steps = marvel_sac_pid.Actor.numpy_policy, []

    def numpy_policy(self):
        act = original(self)

        def broken(obs, rng=None):
            steps.append(1)
            broken_now = len(steps) > 400 + 20  # the evaluations of the offline policy take 400
            return act(obs, rng) * np.float32("nan" if broken_now else 1)

        return broken

    monkeypatch.setattr(marvel_sac_pid.Actor, "numpy_policy", numpy_policy)
    status, (line,) = ending(marvel_sac_pid.main, marvel_sac_pid.Args(**{
        **TINY_MARVEL, "checkpoint": str(offline), "dataset_path": str(ball_file),
        "run_dir": str(tmp_path / "x")}))
    assert (status, f"action is not finite at step {30 + 20}" in line) == (1, True)


def test_first_observation_that_is_no_number_ends_the_run_before_anything_is_logged(tmp_path, monkeypatch):
    reset, resets = common.reset_env, []

    def reset_env(env, seed):
        resets.append(seed)
        return reset(env, seed) * np.float32("nan" if len(resets) > 3 else 1)  # two of them are of make_env

    monkeypatch.setattr(common, "reset_env", reset_env)
    status, (line,) = ending(marvel_sac_pid.main, marvel_sac_pid.Args(**{
        **TINY_MARVEL, "from_scratch": True, "learning_starts": 400, "eval_every": 1000,
        "run_dir": str(tmp_path / "x")}))
    assert status == 1 and "observation is not finite at step" in line
    assert "nan" not in (tmp_path / "x/metrics.csv").read_text()


# --- The log against a recording ---
class Recorder(gym.Wrapper):
    """Writes down every step on its own account; the second episode ends the task after 70 steps."""

    def __init__(self, env, steps):
        super().__init__(env)
        self.steps, self.episodes, self.length, self.rng = steps, 0, 0, np.random.default_rng(0)

    def reset(self, **options):
        self.length = 0
        return self.env.reset(**options)

    def step(self, action):
        obs, reward, terminated, truncated, info = self.env.step(action)
        self.length += 1
        info["cost"] = float(self.rng.random() < 0.2)
        terminated = self.episodes == 1 and self.length == 70
        self.steps.append((reward, info["cost"], terminated, truncated))
        self.episodes += terminated or truncated
        return obs, reward, terminated, truncated, info


def test_logged_costs_and_regret_are_those_of_an_independent_recording(tmp_path, monkeypatch, train):
    make, made, steps = common.make_env, [], []

    def make_env(env_id):
        env, task = make(env_id)
        made.append(env)
        return (Recorder(env, steps) if len(made) == 1 else env), task

    monkeypatch.setattr(common, "make_env", make_env)
    checkpoint = train("online", "x", total_timesteps=600, cost_limit=30.0, rollout_episodes=2)
    metrics = read_metrics(tmp_path / "x/metrics.csv")
    reward, cost, terminated, truncated = (np.array(column) for column in zip(*steps, strict=True))
    ends = np.flatnonzero(terminated | truncated)
    assert (terminated.sum(), truncated.sum()) == (1, len(ends) - 1)
    assert metrics["env_steps"].tolist() == (ends + 1).tolist()
    parts = np.split(np.arange(len(cost)), ends[:-1] + 1)
    episode_costs = np.array([sum(cost[part]) for part in parts])
    assert set(np.diff(ends)) == {70, 200}  # early termination and time limits
    for name, expected in {
            "episode_return": [sum(reward[part]) for part in parts],
            "episode_cost": episode_costs,
            "cumulative_cost": [sum(episode_costs[:k + 1]) for k in range(len(parts))],
            "violation_regret": [sum(max(0.0, c - 30.0) for c in episode_costs[:k + 1])
                                 for k in range(len(parts))]}.items():
        np.testing.assert_allclose(metrics[name], expected, rtol=1e-5, err_msg=name)
    assert (episode_costs > 30).any() and (episode_costs < 30).any()
    assert checkpoint["buffer"]["terminals"].nonzero().flatten().tolist() == [ends[1]]
    np.testing.assert_array_equal(checkpoint["buffer"]["timeouts"].numpy(), truncated)


def test_simulators_are_closed_at_the_end(tmp_path, monkeypatch, train):
    make, open_ones = common.make_env, []

    def make_env(env_id):
        env, task = make(env_id)
        open_ones.append(env)
        close = env.close
        monkeypatch.setattr(env, "close", lambda: (open_ones.remove(env), close()))
        return env, task

    monkeypatch.setattr(common, "make_env", make_env)
    train("online", "on")
    train("offline", "off")
    assert open_ones == []
