"""BC-Safe: the likelihood, the selection of the episodes within the limit, and whole runs."""

import numpy as np
import pytest
import torch
from conftest import TASK, TINY_MARVEL, TINY_OFFLINE, parameters, same
from test_wiring import arrays, no_evaluation, of, record, rows_of
from torch.distributions import Independent, Normal, TanhTransform, TransformedDistribution

import common
import marvel_sac_pid
import offline_pretrain
from benchmark.curves import read_metrics
from benchmark.export_dataset import write_dataset
from offline_pretrain import Actor, Args, log_likelihood

FILES = {"config.json", "metrics.csv", "checkpoint.pt"}


def train(run_dir, dataset, **options):
    options = {**TINY_OFFLINE, "algo": "bc-safe", "dataset_path": str(dataset), "run_dir": str(run_dir),
               **options}
    offline_pretrain.main(Args(**options))
    return common.load_checkpoint(run_dir / "checkpoint.pt")


# --- Likelihood ---
def test_likelihood_differs_from_the_squashed_gaussians_by_a_constant_of_the_data():
    torch.manual_seed(0)
    obs, act = torch.randn(50, 3), torch.rand(50, 2) * 1.9 - 0.95
    actors, differences, gradients = [Actor(3, 2, hidden=16) for _ in range(2)], [], []
    for actor in actors:
        mean, log_std = actor.gaussian(obs)
        policy = TransformedDistribution(Normal(mean, log_std.exp()), TanhTransform())
        exact = Independent(policy, 1).log_prob(act)
        ours = log_likelihood(obs, act, actor)
        differences.append((exact - ours).detach())
        gradients.append([torch.autograd.grad(value.mean(), list(actor.parameters()), retain_graph=True)
                          for value in (exact, ours)])
    assert exact.std() > 0.1
    torch.testing.assert_close(*differences, atol=1e-4, rtol=1e-4)
    for exact, ours in gradients:
        for a, b in zip(exact, ours, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)


# --- The data ---
@pytest.fixture(scope="module")
def four_episodes(ball_data):
    """600 transitions: episodes of 150 of cost 5, 100 and 20, then one without end that costs nothing."""
    ends, costs = np.zeros(600, bool), np.zeros(600, np.float32)
    ends[[149, 299, 449]] = True
    costs[:5], costs[150:250], costs[300:320] = 1, 1, 1
    return {**ball_data, "timeouts": ends, "terminals": np.zeros(600, bool), "costs": costs}


@pytest.fixture(scope="module")
def four_episodes_file(four_episodes, tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "four.hdf5"
    write_dataset(path, four_episodes, {"task": TASK})
    return path


@pytest.mark.parametrize(("cost_limit", "expected"), [(20.0, {0, 2}), (19.0, {0}), (100.0, {0, 1, 2})])
def test_only_whole_episodes_within_the_limit_are_imitated(
        tmp_path, monkeypatch, four_episodes, four_episodes_file, cost_limit, expected):
    calls = []
    record(monkeypatch, calls, offline_pretrain, "sample")
    record(monkeypatch, calls, offline_pretrain, "log_likelihood")
    no_evaluation(monkeypatch)
    train(tmp_path / "x", four_episodes_file, cost_limit=cost_limit)
    rows, data = set(), arrays(four_episodes)
    for batch, likelihood in zip(of(calls, "sample"), of(calls, "log_likelihood"), strict=True):
        rows |= set(rows_of(batch.result, data, Args.reward_scale))
        assert torch.equal(likelihood.obs, batch.result["observations"])
        assert torch.equal(likelihood.act, batch.result["actions"])
    assert {row // 150 for row in rows} == expected
    assert len(rows) > 0.9 * 150 * len(expected)


def test_data_without_an_episode_within_the_limit_is_refused(tmp_path, four_episodes_file, refusal):
    line = refusal(lambda: train(tmp_path / "x", four_episodes_file, cost_limit=4.0))
    assert "--algo bc-safe" in line and str(four_episodes_file) in line and "4" in line
    assert not list(tmp_path.iterdir())


# --- Whole runs ---
@pytest.fixture(scope="module")
def run_dir(four_episodes_file, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "bc"
    train(run_dir, four_episodes_file)
    return run_dir


def test_run_leaves_its_files_and_updates_the_actor_alone(run_dir):
    checkpoint, metrics = (common.load_checkpoint(run_dir / "checkpoint.pt"),
                           read_metrics(run_dir / "metrics.csv"))
    assert {file.name for file in run_dir.iterdir() if not file.name.startswith("events.")} == FILES
    assert list(metrics) == ["update_steps", "actor_loss", "eval_sampled_return", "eval_sampled_cost",
                             "eval_mean_return", "eval_mean_cost"]
    assert all(np.isfinite(column[-1]) for column in metrics.values())
    torch.manual_seed(0)
    networks = {"actor": Actor(8, 2), "q": offline_pretrain.Critic(2, 8, 2),
                "qc": offline_pretrain.Critic(1, 8, 2)}
    fresh = {name: network.state_dict() for name, network in networks.items()}
    moved = [name for name in fresh
             if not same(*(parameters({name: state[name]}) for state in (fresh, checkpoint)))]
    assert moved == ["actor"]
    assert checkpoint["lagrange_multiplier"] is None


def test_run_is_repeatable(tmp_path, run_dir, four_episodes_file):
    again = train(tmp_path / "again", four_episodes_file)
    first = common.load_checkpoint(run_dir / "checkpoint.pt")
    assert (tmp_path / "again/metrics.csv").read_bytes() == (run_dir / "metrics.csv").read_bytes()
    assert same(*(parameters({"actor": state["actor"]}) for state in (first, again)))


def test_finetuning_starts_from_the_checkpoint(tmp_path, monkeypatch, run_dir, four_episodes_file):
    no_evaluation(monkeypatch)
    options = {**TINY_MARVEL, "total_timesteps": 200, "checkpoint": str(run_dir / "checkpoint.pt"),
               "dataset_path": str(four_episodes_file), "run_dir": str(tmp_path / "online")}
    marvel_sac_pid.main(marvel_sac_pid.Args(**options))
    assert len(read_metrics(tmp_path / "online/metrics.csv")["episode_return"]) == 1


def test_policy_recovers_the_distribution_of_the_safe_actions(tmp_path, monkeypatch):
    """Safe episodes act tanh(N(s / 2 - 0.5, 0.3^2)), unsafe ones tanh(N(s / 2 + 2, 0.3^2))."""
    no_evaluation(monkeypatch)
    rng = np.random.default_rng(0)
    obs, unsafe = rng.normal(size=(2, 4000, 8)), np.arange(4000) // 10 % 2
    u = 0.5 * obs[0, :, :1] + np.where(unsafe, 2.0, -0.5)[:, None] + 0.3 * rng.normal(size=(4000, 2))
    write_dataset(tmp_path / "two.hdf5", dict(
        observations=obs[0], next_observations=obs[1], actions=np.tanh(u), rewards=unsafe, costs=10 * unsafe,
        terminals=np.zeros(4000), timeouts=np.arange(4000) % 10 == 9), {"task": TASK})
    checkpoint = train(tmp_path / "x", tmp_path / "two.hdf5", update_steps=400, batch_size=128, actor_lr=1e-3)
    actor, states = Actor(8, 2), torch.randn(500, 8, generator=torch.Generator().manual_seed(0))
    actor.load_state_dict(checkpoint["actor"])
    with torch.no_grad():
        mean, log_std = actor.gaussian(states)
    error = mean - (0.5 * states[:, :1] - 0.5)
    assert error.mean().abs() < 0.1 and error.abs().mean() < 0.2
    assert log_std.exp().mean().item() == pytest.approx(0.3, abs=0.08)
