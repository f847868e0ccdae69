"""The squashed Gaussian policy: its samples, their density, the gradients, and its numpy form."""

import numpy as np
import pytest
import torch
from scipy.stats import norm
from tiny import both_scripts, constant_actor

pytestmark = both_scripts


def draw(script, mean, log_std, n):
    """Actions (n, act_dim) and log-densities (n,) of a policy that is the same in every state, in doubles."""
    torch.manual_seed(0)
    actor = constant_actor(script, mean, log_std).double()
    return actor, *actor(torch.zeros(n, 1, dtype=torch.double))


def test_log_prob_is_that_of_the_action_it_comes_with(script):
    """log pi(a) = sum of log N(atanh a; mean, std) - log(1 - a^2) over the dimensions."""
    mean, log_std = [0.7, -2.0, 0.0], [-1.0, 0.5, -3.0]
    _, action, log_prob = draw(script, mean, log_std, 1000)
    a = action.detach().numpy()
    exact = norm.logpdf(np.arctanh(a), mean, np.exp(log_std)) - np.log1p(-(a**2))
    assert log_prob.shape == (1000,)
    np.testing.assert_allclose(log_prob.detach(), exact.sum(1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("mean", "log_std"), [(0.0, 0.0), (0.7, -1.0), (-1.0, 0.5)])
def test_density_integrates_to_the_probability_of_an_interval(script, mean, log_std):
    _, action, log_prob = draw(script, [mean], [log_std], 40_000)
    action, order = action.detach().squeeze(1).sort()
    density = log_prob.detach().exp()[order]
    for low, high in [(-0.99, -0.5), (-0.5, 0.1), (0.1, 0.6), (0.6, 0.99)]:
        inside = (action >= low) & (action <= high)
        integral = torch.trapezoid(density[inside], action[inside])
        exact = np.diff(norm.cdf(np.arctanh([low, high]), mean, np.exp(log_std)))[0]
        assert integral.item() == pytest.approx(exact, abs=2e-3)


@pytest.mark.parametrize(("mean", "log_std"), [(0.8, -0.7), (20.0, -4.0), (-20.0, -4.0)])
def test_entropy_and_its_gradient_are_exact_in_float32_far_in_the_tails_too(script, mean, log_std):
    """Against a quadrature and its finite differences; there 1 - tanh(u)^2 = 1 / cosh(u)^2 rounds to 0."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(100)

    def negative_entropy(mean, log_std):
        u = mean + np.exp(log_std) * nodes
        log_prob = norm.logpdf(u, mean, np.exp(log_std)) + 2 * (np.logaddexp(u, -u) - np.log(2))
        return (log_prob * weights).sum() / weights.sum()

    step = 1e-4
    slopes = [negative_entropy(mean + step, log_std) - negative_entropy(mean - step, log_std),
              negative_entropy(mean, log_std + step) - negative_entropy(mean, log_std - step)]
    torch.manual_seed(0)
    actor = constant_actor(script, [mean], [log_std])
    value = actor(torch.zeros(100_000, 1))[1].mean()
    value.backward()
    assert value.item() == pytest.approx(negative_entropy(mean, log_std), abs=0.02)
    np.testing.assert_allclose(actor.head.bias.grad, np.array(slopes) / (2 * step), atol=0.02)


def test_action_carries_the_reparameterised_gradient(script):
    """With a = tanh(mean + std noise): da/dmean = 1 - a^2, da/dlog_std = (1 - a^2) (u - mean)."""
    actor, action, _ = draw(script, [0.3], [-0.5], 5)
    weight = torch.tensor([1.0, -2.0, 0.5, 3.0, -1.0], dtype=torch.double)
    (weight * action.squeeze(1)).sum().backward()
    a = action.detach().squeeze(1)
    slope = weight * (1 - a**2)
    expected = torch.stack([slope.sum(), (slope * (a.atanh() - 0.3)).sum()])
    torch.testing.assert_close(actor.head.bias.grad, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("form", ["torch", "numpy"])
@pytest.mark.parametrize(("log_std", "used"), [((-0.5, 0.2), (-0.5, 0.2)), ((-10.0, 10.0), (-5.0, 2.0))],
                         ids=["inside", "beyond the clamp"])
def test_samples_have_the_distribution(script, form, log_std, used):
    mean, n = np.array([0.4, -0.8]), 20_000
    if form == "torch":
        torch.manual_seed(0)
        with torch.no_grad():
            actions = constant_actor(script, mean, log_std)(torch.zeros(n, 1))[0].numpy()
    else:
        policy, rng = constant_actor(script, mean, log_std).numpy_policy(), np.random.default_rng(0)
        actions = np.stack([policy(np.zeros(1, np.float32), rng) for _ in range(n)])
    for p in (0.2, 0.35, 0.5, 0.65, 0.8):
        bound = np.tanh(mean + np.exp(used) * norm.ppf(p))
        np.testing.assert_allclose((actions < bound).mean(0), p, atol=5 * np.sqrt(p * (1 - p) / n))
    assert abs(np.corrcoef(actions.T)[0, 1]) < 0.04


def test_numpy_policy_gives_torchs_mean_action_and_follows_every_update(script):
    torch.manual_seed(0)
    actor, obs = script.Actor(5, 3, hidden=32), 3 * torch.randn(50, 5)
    policy = actor.numpy_policy()

    def check():
        actions = np.stack([policy(row) for row in obs.numpy()])
        assert actions.dtype == np.float32
        with torch.no_grad():
            np.testing.assert_allclose(actions, actor.gaussian(obs)[0].tanh(), atol=1e-5)
        return actions

    before = check()
    optimizer = torch.optim.Adam(actor.parameters(), 0.01, fused=True)
    actor(obs)[0].sum().backward()
    optimizer.step()
    after = check()
    actor.load_state_dict(script.Actor(5, 3, hidden=32).state_dict())
    assert abs(after - before).max() > 1e-3 < abs(check() - after).max()


def test_numpy_policy_repeats_with_the_generators_seed(script):
    policy, obs = script.Actor(4, 2, hidden=16).numpy_policy(), np.ones(4, np.float32)
    first, again, other = (policy(obs, np.random.default_rng(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).all()


def test_network_that_is_changed_in_one_form_only_is_refused(script):
    torch.manual_seed(0)
    actor = script.Actor(4, 2).requires_grad_(False)
    mean, log_std = actor.gaussian(torch.ones(1, 4))
    activation = actor.head(actor.fc2(actor.fc1(torch.ones(1, 4)).tanh()).tanh()).chunk(2, -1)
    for changed in (mean + 0.1, log_std), (mean, log_std - 0.1), activation:
        actor.gaussian = lambda obs, changed=changed: changed
        with pytest.raises(AssertionError):
            actor.numpy_policy()
