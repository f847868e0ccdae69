"""The critics, their targets and losses, and the first multiplier, against numbers worked out by hand."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from marvel_sac_pid import Actor, Critic, actor_loss, aligned_multipliers, critic_loss, soft_targets
from offline_pretrain import cpq_targets


class StubActor:
    """Twice the observation as action, and given log-densities."""

    def __init__(self, log_prob):
        self.log_prob = torch.tensor(log_prob)

    def __call__(self, obs):
        return 2 * obs, self.log_prob


class StubCritic:
    """A given table (n, batch), where the action is the stub actor's on the expected observations."""

    def __init__(self, table, obs):
        self.table, self.obs = torch.tensor(table), obs

    def __call__(self, obs, act):
        torch.testing.assert_close(obs, self.obs)
        torch.testing.assert_close(act, 2 * self.obs)
        return self.table


class LinearCritic(nn.Module):
    """n times the value a . g(s), with one gradient g for each state; the states are one-hot."""

    def __init__(self, gradients, n):
        super().__init__()
        self.gradients, self.n = nn.Parameter(torch.tensor(gradients)), n

    def forward(self, obs, act):
        return (act * (obs @ self.gradients)).sum(-1).expand(self.n, -1)


NEXT_OBS = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
BATCH = {"observations": -NEXT_OBS, "actions": torch.zeros(4, 1), "next_observations": NEXT_OBS,
         "rewards": torch.tensor([1.0, 2.0, 3.0, 4.0]), "costs": torch.tensor([0.0, 1.0, 0.0, 1.0]),
         "terminals": torch.tensor([1.0, 0.0, 0.0, 0.0]), "timeouts": torch.tensor([0.0, 1.0, 0.0, 0.0])}


def linear_copies(critic):
    """The ensemble's members as networks of nn.Linear layers."""
    members = []
    for k in range(len(critic.weights[0])):
        layers = []
        for weight, bias in zip(critic.weights, critic.biases, strict=True):
            layer = nn.Linear(weight.shape[1], weight.shape[2])
            layer.weight.data.copy_(weight[k].T)
            layer.bias.data.copy_(bias[k, 0])
            layers += [layer, nn.ReLU()]
        members.append(nn.Sequential(*layers[:-1]))
    return members


@pytest.mark.parametrize("n", [1, 2, 5])
def test_critic_ensemble_is_that_many_separate_networks(n):
    torch.manual_seed(0)
    critic, obs, act = Critic(n, 6, 2, hidden=24), torch.randn(17, 6), torch.randn(17, 2, requires_grad=True)
    members = linear_copies(critic)
    value = critic(obs, act)
    expected = torch.stack([member(torch.cat([obs, act], 1)).squeeze(1) for member in members])
    assert value.shape == (n, 17)
    torch.testing.assert_close(value, expected)
    weight = torch.randn(n, 17)
    (act_grad,) = torch.autograd.grad((weight * expected).sum(), act, retain_graph=True)
    (weight * expected).sum().backward()
    act.grad = None
    (weight * value).sum().backward()
    torch.testing.assert_close(act.grad, act_grad)
    for k, member in enumerate(members):
        for layer, (w, b) in enumerate(zip(critic.weights, critic.biases, strict=True)):
            torch.testing.assert_close(w.grad[k].T, member[2 * layer].weight.grad)
            torch.testing.assert_close(b.grad[k, 0], member[2 * layer].bias.grad)


def test_critic_starts_like_linear_layers():
    torch.manual_seed(0)
    critic = Critic(3, 7, 2, hidden=100)
    for weight, bias, fan_in in zip(critic.weights, critic.biases, (9, 100, 100), strict=True):
        bound = fan_in**-0.5
        reference = nn.Linear(fan_in, 1000)
        for parameter in (weight, reference.weight, reference.bias, *[bias] * (bias.numel() > 100)):
            assert parameter.abs().max().item() == pytest.approx(bound, rel=0.02)
        assert max(weight.abs().max(), bias.abs().max()) <= bound
        assert weight.std().item() == pytest.approx(reference.weight.std().item(), rel=0.05)
        assert abs(weight.mean().item()) < 0.15 * bound
    assert not torch.equal(critic.weights[0][0], critic.weights[0][1])


def test_time_limit_bootstraps_and_terminal_does_not():
    """gamma 1/2, entropy weights 1/2 and 1/4, min Q = (4, 1, 3, 7), log pi = (1, -2, 1/2, -1)."""
    q = StubCritic([[5.0, 1.0, 3.0, 8.0], [4.0, 2.0, 6.0, 7.0]], NEXT_OBS)
    qc = StubCritic([[2.0, 4.0, 6.0, 8.0]], NEXT_OBS)
    target, cost_target = soft_targets(BATCH, StubActor([1.0, -2.0, 0.5, -1.0]), q, qc, 0.5, 0.5, 0.25)
    assert target.tolist() == [
        1.0,  # terminal: the reward alone, without entropy
        3.0,  # time limit: 2 + (1 + 1) / 2
        4.375,  # 3 + (3 - 0.25) / 2
        7.75,  # 4 + (7 + 0.5) / 2
    ]
    assert cost_target.tolist() == [
        0.0,
        3.25,  # 1 + (4 + 0.5) / 2
        2.9375,  # 0 + (6 - 0.125) / 2
        5.125,  # 1 + (8 + 0.25) / 2
    ]


def test_entropy_terms_belong_to_their_own_sample():
    zeros, ones = StubCritic([[0.0] * 4], NEXT_OBS), {**BATCH, "terminals": torch.zeros(4)}
    plain = soft_targets(ones, StubActor([0.0] * 4), zeros, zeros, 0.5, 1.0, 1.0)
    one = soft_targets(ones, StubActor([0.0, 0.0, 4.0, 0.0]), zeros, zeros, 0.5, 1.0, 0.5)
    assert (one[0] - plain[0]).tolist() == [0.0, 0.0, -2.0, 0.0]
    assert (one[1] - plain[1]).tolist() == [0.0, 0.0, -1.0, 0.0]


def test_targets_carry_no_gradient():
    torch.manual_seed(0)
    actor, q, qc = Actor(1, 1, hidden=8), Critic(2, 1, 1, hidden=8), Critic(1, 1, 1, hidden=8)
    soft, cpq = soft_targets(BATCH, actor, q, qc, 0.9, 0.1, 0.1), cpq_targets(BATCH, actor, q, qc, 0.9, 1.0)
    assert not any(target.requires_grad for target in (*soft, *cpq))


def test_cpq_masks_the_reward_bootstrap_where_the_next_cost_value_is_unsafe():
    """gamma 1/2, threshold 5: transitions 1 and 2 lead to unsafe actions, 3 is exactly at the threshold."""
    batch = {**BATCH, "terminals": torch.tensor([0.0, 0.0, 1.0, 0.0])}
    q = StubCritic([[5.0, 1.0, 3.0, 8.0], [4.0, 2.0, 6.0, 7.0]], NEXT_OBS)
    qc = StubCritic([[2.0, 6.0, 7.0, 5.0]], NEXT_OBS)
    target, cost_target = cpq_targets(batch, StubActor([0.0] * 4), q, qc, 0.5, 5.0)
    assert target.tolist() == [3.0, 2.0, 3.0, 7.5]  # 1 + 4/2, 2, 3, 4 + 7/2
    assert cost_target.tolist() == [1.0, 4.0, 0.0, 3.5]  # 0 + 2/2, 1 + 6/2, terminal, 1 + 5/2


def test_critic_loss_sums_the_mean_squared_errors_of_the_ensemble():
    batch = {"observations": NEXT_OBS, "actions": 2 * NEXT_OBS}
    q = StubCritic([[1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 0.0, 0.0]], NEXT_OBS)
    qc = StubCritic([[1.0, 1.0, 1.0, 1.0]], NEXT_OBS)
    targets = torch.tensor([1.0, 1.0, 1.0, 2.0]), torch.tensor([3.0, 1.0, 1.0, 5.0])
    q_loss, qc_loss = critic_loss(batch, q, qc, *targets)
    assert q_loss.item() == 9 / 4 + 7 / 4  # (0 + 1 + 4 + 4) / 4 and (1 + 1 + 1 + 4) / 4
    assert qc_loss.item() == 20 / 4  # (4 + 0 + 0 + 16) / 4


@pytest.mark.parametrize(("multiplier", "expected"), [
    (0.0, -3.5),  # mean of alpha log pi is (0.5 - 1 + 0.25 - 0.5 + 1.75) / 4 = 0.25, of min Q 3.75, of Qc 5
    (1.0, 0.75),  # (-3.5 + 5) / 2
    (3.0, 2.875),  # (-3.5 + 15) / 4
])
def test_actor_loss_is_the_lagrangian_over_one_plus_the_multiplier(multiplier, expected):
    q = StubCritic([[5.0, 1.0, 3.0, 8.0], [4.0, 2.0, 6.0, 7.0]], NEXT_OBS)
    qc = StubCritic([[2.0, 4.0, 6.0, 8.0]], NEXT_OBS)
    log_prob = [1.0, -2.0, 0.5, 2.5]  # times alpha 1/2: 0.5, -1, 0.25, 1.25
    loss, returned = actor_loss(NEXT_OBS, StubActor(log_prob), q, qc, 0.5, multiplier)
    assert loss.item() == pytest.approx(expected)
    assert returned.tolist() == log_prob


def test_actor_gradient_leaves_the_critics_gradients_alone():
    torch.manual_seed(0)
    actor, q, qc = Actor(3, 2, hidden=8), Critic(2, 3, 2, hidden=8), Critic(1, 3, 2, hidden=8)
    obs = torch.randn(9, 3)
    critic_params, actor_params = [*q.parameters(), *qc.parameters()], list(actor.parameters())
    for parameter in critic_params:
        parameter.grad = torch.full_like(parameter, 7.0)
    torch.manual_seed(1)
    actor_loss(obs, actor, q, qc, 0.1, 0.5)[0].backward(inputs=actor_params)
    assert all((parameter.grad == 7).all() for parameter in critic_params)
    other = copy.deepcopy(actor)
    other.zero_grad()
    torch.manual_seed(1)
    actor_loss(obs, other, q, qc, 0.1, 0.5)[0].backward()
    assert any((parameter.grad != 7).any() for parameter in critic_params)
    for mine, full in zip(actor_params, other.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, full.grad)


@pytest.mark.parametrize(("g1", "g2", "least_squares", "norm_ratio"), [
    ([3.0, 4.0], [0.0, 2.0], 2.0, 2.5),  # 8 / 4 and 5 / 2
    ([3.0, 4.0], [6.0, 8.0], 0.5, 0.5),  # parallel: the two agree
    ([3.0, 4.0], [-4.0, 3.0], 0.0, 1.0),  # perpendicular
    ([3.0, 4.0], [-3.0, -4.0], 0.0, 1.0),  # opposed: -1 is clipped
])
def test_first_multiplier_of_known_gradients(g1, g2, least_squares, norm_ratio):
    q, qc = LinearCritic([g1], 2), LinearCritic([g2], 1)
    multipliers = aligned_multipliers(torch.ones(5, 1), Actor(1, 2, hidden=8), q, qc)
    assert multipliers == pytest.approx((least_squares, norm_ratio), abs=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_aligned_multiplier_minimises_the_lagrangians_gradient(seed):
    rng = np.random.default_rng(seed)
    g2 = rng.normal(size=(6, 3)).astype(np.float32)
    g1 = (rng.uniform(-0.5, 2) * g2 + 0.5 * rng.normal(size=(6, 3))).astype(np.float32)
    q, qc = LinearCritic(g1, 2), LinearCritic(g2, 1)
    aligned, norm_ratio = aligned_multipliers(torch.eye(6), Actor(6, 3, hidden=8), q, qc)
    grid = np.arange(0, 4, 1e-3)
    residual = [((g1 - value * g2) ** 2).sum() for value in grid]
    assert aligned == pytest.approx(grid[np.argmin(residual)], abs=1e-3)
    squares = [sum(x**2 for row in gradients.tolist() for x in row) for gradients in (g1, g2)]
    assert norm_ratio == pytest.approx((squares[0] / squares[1]) ** 0.5, rel=1e-5)
    assert norm_ratio >= aligned


def test_first_multiplier_uses_the_lower_of_the_two_reward_critics():
    class TwoSlopes(nn.Module):
        def forward(self, obs, act):
            return torch.stack([3 * act[:, 0] + 100, 5 * act[:, 0] - 100])

    actor, qc = Actor(1, 1, hidden=8), LinearCritic([[2.0]], 1)
    assert aligned_multipliers(torch.ones(5, 1), actor, TwoSlopes(), qc) == pytest.approx((2.5, 2.5))


def test_first_multiplier_is_finite_where_the_cost_critic_is_flat():
    q, qc = LinearCritic([[1.0]], 2), LinearCritic([[0.0]], 1)
    assert np.isfinite(aligned_multipliers(torch.ones(5, 1), Actor(1, 1, hidden=8), q, qc)).all()
