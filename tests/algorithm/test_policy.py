"""The squashed Gaussian policy: its density, its gradient, and its numpy form."""

import numpy as np
import pytest
import torch
from scipy.stats import norm

from marvel_sac_pid import Actor


def constant_policy(mean, log_std):
    """A policy whose u ~ N(mean, exp(log_std)^2) in every state."""
    actor = Actor(1, len(mean), hidden=4)
    with torch.no_grad():
        actor.head.weight.zero_()
        actor.head.bias.copy_(torch.tensor([*mean, *log_std]))
    return actor


def at_noise(monkeypatch, actor, noise):
    """Actions and log-densities where the policy draws exactly `noise` (batch, act_dim)."""
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randn_like", lambda mean: noise.to(mean.dtype))
        return actor(torch.zeros(len(noise), 1, dtype=next(actor.parameters()).dtype))


def density_on_a_grid(monkeypatch, mean, log_std):
    """Increasing actions and the policy's density there, in double precision."""
    actor = constant_policy([mean], [log_std]).double()
    with torch.no_grad():
        noise = torch.linspace(-9, 9, 20_001, dtype=torch.double)
        action, log_prob = at_noise(monkeypatch, actor, noise[:, None])
    return action.squeeze(1).numpy(), log_prob.exp().numpy()


def trapezium(y, x):
    return ((y[1:] + y[:-1]) / 2 * np.diff(x)).sum()


@pytest.mark.parametrize(("mean", "log_std"), [(0.0, 0.0), (0.7, -1.0), (-2.0, 0.5), (0.3, 1.0), (1.5, -5.0)])
def test_density_integrates_to_one_over_the_actions(monkeypatch, mean, log_std):
    action, density = density_on_a_grid(monkeypatch, mean, log_std)
    assert trapezium(density, action) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(("mean", "log_std"), [(0.0, 0.0), (0.7, -1.0), (-1.0, 0.5)])
def test_density_of_an_interval_is_the_frequency_of_its_samples(monkeypatch, mean, log_std):
    action, density = density_on_a_grid(monkeypatch, mean, log_std)
    torch.manual_seed(0)
    n = 40_000
    with torch.no_grad():
        samples = constant_policy([mean], [log_std])(torch.zeros(n, 1))[0].squeeze(1).numpy()
    for low, high in [(-0.99, -0.5), (-0.5, 0.1), (0.1, 0.6), (0.6, 0.99)]:
        inside = (action >= low) & (action <= high)
        probability = trapezium(density[inside], action[inside])
        u_low, u_high = np.arctanh([low, high])
        exact = np.diff(norm.cdf([u_low, u_high], mean, np.exp(log_std)))[0]
        assert probability == pytest.approx(exact, abs=2e-3)
        frequency = ((samples >= low) & (samples <= high)).mean()
        assert frequency == pytest.approx(exact, abs=4 * np.sqrt(exact * (1 - exact) / n))


def test_log_prob_of_a_vector_is_the_sum_over_its_dimensions(monkeypatch):
    noise = torch.randn(100, 3, generator=torch.Generator().manual_seed(0))
    mean, log_std = [0.5, -1.0, 0.0], [0.3, -1.0, -2.0]
    action, log_prob = at_noise(monkeypatch, constant_policy(mean, log_std), noise)
    parts = [at_noise(monkeypatch, constant_policy([mean[k]], [log_std[k]]), noise[:, [k]]) for k in range(3)]
    torch.testing.assert_close(action, torch.cat([part[0] for part in parts], 1))
    torch.testing.assert_close(log_prob, sum(part[1] for part in parts))


@pytest.mark.parametrize("u", [-20.0, -19.5, -5.0, 5.0, 20.0])
def test_log_prob_is_exact_and_differentiable_far_in_the_tails(monkeypatch, u):
    actor = constant_policy([0.0], [1.0])
    _, log_prob = at_noise(monkeypatch, actor, torch.tensor([[u / np.exp(1.0)]]))
    exact = norm.logpdf(u, 0, np.exp(1.0)) + 2 * np.log(np.cosh(u))  # 1 - tanh^2 = 1 / cosh^2
    assert log_prob.item() == pytest.approx(exact, rel=1e-5)
    log_prob.sum().backward()
    assert torch.isfinite(actor.head.bias.grad).all()


@pytest.mark.parametrize("noise", [-1.5, 0.4])
def test_action_carries_the_reparameterised_gradient(monkeypatch, noise):
    actor, std = constant_policy([0.3], [-0.5]), np.exp(-0.5)
    action, _ = at_noise(monkeypatch, actor, torch.tensor([[noise]]))
    action.sum().backward()
    u, step = 0.3 + std * noise, 1e-6
    slope = (np.tanh(u + step) - np.tanh(u - step)) / (2 * step)
    np.testing.assert_allclose(actor.head.bias.grad, [slope, slope * std * noise], rtol=1e-4)


def test_gradient_of_the_expected_log_prob_is_that_of_the_negative_entropy():
    """Against finite differences of a quadrature: more entropy is a wider policy."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(100)

    def negative_entropy(mean, log_std):
        u = mean + np.exp(log_std) * nodes
        log_prob = norm.logpdf(u, mean, np.exp(log_std)) + 2 * np.log(np.cosh(u))
        return (log_prob * weights).sum() / weights.sum()

    mean, log_std, step = 0.8, -0.7, 1e-4
    exact = [(negative_entropy(mean + step, log_std) - negative_entropy(mean - step, log_std)) / (2 * step),
             (negative_entropy(mean, log_std + step) - negative_entropy(mean, log_std - step)) / (2 * step)]
    assert exact[1] < -0.1
    torch.manual_seed(0)
    actor = constant_policy([mean], [log_std])
    actor(torch.zeros(100_000, 1))[1].mean().backward()
    np.testing.assert_allclose(actor.head.bias.grad, exact, atol=0.02)


def test_numpy_policy_gives_torchs_mean_action():
    torch.manual_seed(0)
    actor, obs = Actor(5, 3, hidden=32), 3 * torch.randn(50, 5)
    policy = actor.numpy_policy()
    with torch.no_grad():
        expected = actor.gaussian(obs)[0].tanh().numpy()
    actions = np.stack([policy(row) for row in obs.numpy()])
    assert actions.dtype == np.float32
    np.testing.assert_allclose(actions, expected, atol=1e-5)


@pytest.mark.parametrize("log_std", [[-0.5, 0.2], [-10.0, 10.0]], ids=["inside", "beyond the clamp"])
def test_numpy_policy_samples_torchs_distribution(log_std):
    actor, n = constant_policy([0.4, -0.8], log_std), 20_000
    policy, rng, obs = actor.numpy_policy(), np.random.default_rng(0), np.zeros(1, np.float32)
    actions = np.stack([policy(obs, rng) for _ in range(n)])
    torch.manual_seed(0)
    with torch.no_grad():
        expected = actor(torch.zeros(n, 1))[0].numpy()
    std = expected.std(0)
    np.testing.assert_array_less(abs(actions.mean(0) - expected.mean(0)), 5 * std * np.sqrt(2 / n))
    np.testing.assert_allclose(actions.std(0), std, rtol=0.04)
    for bound in (-0.9, -0.3, 0.4, 0.9):
        np.testing.assert_allclose((actions < bound).mean(0), (expected < bound).mean(0), atol=0.02)


def test_numpy_policy_follows_the_parameters_on_the_cpu():
    torch.manual_seed(0)
    actor, obs = Actor(4, 2, hidden=16), torch.randn(1, 4)
    policy = actor.numpy_policy()
    before = policy(obs[0].numpy())
    optimizer = torch.optim.Adam(actor.parameters(), 0.01, fused=True)
    actor(obs)[0].sum().backward()
    optimizer.step()
    after = policy(obs[0].numpy())
    assert abs(after - before).max() > 1e-3
    np.testing.assert_allclose(after, actor.gaussian(obs)[0].tanh()[0].detach(), atol=1e-5)
    other = Actor(4, 2, hidden=16)
    actor.load_state_dict(other.state_dict())
    np.testing.assert_allclose(policy(obs[0].numpy()), other.gaussian(obs)[0].tanh()[0].detach(), atol=1e-5)


def test_numpy_policy_repeats_with_the_generators_seed():
    policy, obs = Actor(4, 2, hidden=16).numpy_policy(), np.ones(4, np.float32)
    first, again, other = (policy(obs, np.random.default_rng(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).all()
