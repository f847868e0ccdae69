"""The critics, their targets and losses, the actor's loss and the first multiplier, by hand."""

import numpy as np
import pytest
import torch
from tiny import BATCH, NEXT_OBS, Q_TABLE, StubActor, StubCritic, both_scripts, cost_critics
from torch import nn

from marvel_sac_pid import Actor, Critic, actor_loss, aligned_multipliers, soft_targets


@pytest.fixture(scope="module")
def n_cost():
    """How many cost critics there are: here all are equal, so that their mean is their maximum."""
    return cost_critics("scratch")


class LinearCritic(nn.Module):
    """n times the value a . g(s), with one gradient g for each state; the states are one-hot."""

    def __init__(self, gradients, n):
        super().__init__()
        self.gradients, self.n = nn.Parameter(torch.tensor(gradients)), n

    def forward(self, obs, act):
        return (act * (obs @ self.gradients)).sum(-1).expand(self.n, -1)


# --- Networks ---
@pytest.mark.parametrize("n", [1, 2, 5])
@both_scripts
def test_critic_ensemble_is_that_many_separate_networks(script, n):
    torch.manual_seed(0)
    critic, obs, act = script.Critic(n, 6, 2, hidden=24), torch.randn(17, 6), torch.randn(17, 2)
    act.requires_grad_()
    members = []
    for k in range(n):
        layers = []
        for weight, bias in zip(critic.weights, critic.biases, strict=True):
            layer = nn.Linear(weight.shape[1], weight.shape[2])
            layer.weight.data.copy_(weight[k].T)
            layer.bias.data.copy_(bias[k, 0])
            layers += [layer, nn.ReLU()]
        members.append(nn.Sequential(*layers[:-1]))
    value = critic(obs, act)
    expected = torch.stack([member(torch.cat([obs, act], 1)).squeeze(1) for member in members])
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


@both_scripts
def test_critic_starts_like_linear_layers(script):
    torch.manual_seed(0)
    critic = script.Critic(3, 7, 2, hidden=100)
    for weight, bias, fan_in in zip(critic.weights, critic.biases, (9, 100, 100), strict=True):
        bound = fan_in**-0.5
        assert weight.abs().max().item() == pytest.approx(bound, rel=0.02)
        assert max(weight.abs().max(), bias.abs().max()) <= bound
        assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.07)  # of a uniform distribution
        assert bias.numel() < 100 or bias.std().item() == pytest.approx(bound / 3**0.5, rel=0.07)
        assert abs(weight.mean().item()) < 0.15 * bound
    assert not torch.equal(critic.weights[0][0], critic.weights[0][1])


@both_scripts
def test_target_network_goes_the_share_tau_of_the_way(script):
    torch.manual_seed(0)
    target, network = nn.Linear(3, 2), nn.Linear(3, 2)
    before, goal = ([p.detach().clone() for p in x.parameters()] for x in (target, network))
    script.follow(target, network, 0.25)
    for now, old, new, kept in zip(target.parameters(), before, goal, network.parameters(), strict=True):
        torch.testing.assert_close(now.detach(), 0.75 * old + 0.25 * new)
        assert torch.equal(kept, new) and not kept.grad_fn and not now.grad_fn
    script.follow(target, network, 1.0)
    assert all(torch.equal(now, new) for now, new in zip(target.parameters(), goal, strict=True))


@both_scripts
def test_value_is_the_smallest_of_the_reward_critics_and_the_mean_of_the_cost_critics(script, n_cost):
    q, qc = StubCritic(*Q_TABLE), StubCritic(*([2.0 * k, 0.0, 4.0 * k, 1.0] for k in range(n_cost)))
    assert script.reward_value(q, NEXT_OBS, 2 * NEXT_OBS).tolist() == [4.0, 1.0, 3.0, 7.0]
    assert script.cost_value(qc, NEXT_OBS, 2 * NEXT_OBS).tolist() == [n_cost - 1, 0.0, 2 * (n_cost - 1), 1.0]


# --- Targets ---
def test_time_limit_bootstraps_and_terminal_does_not(n_cost):
    """gamma 1/2, entropy weights 1/2 and 1/4, min Q = (4, 1, 3, 7), log pi = (1, -2, 1/2, -1)."""
    q, qc = StubCritic(*Q_TABLE), StubCritic(*n_cost * [[2.0, 4.0, 6.0, 8.0]])
    target, cost_target = soft_targets(BATCH, StubActor([1.0, -2.0, 0.5, -1.0]), q, qc, 0.5, 0.5, 0.25, 4.0)
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


def test_bootstrap_of_qc_is_within_what_costs_can_add_up_to():
    """gamma 1/2, costs up to 3 a step: values from 0 to 6; the entropy term comes on top."""
    qc = StubCritic([-5.0, 7.0, 5.0, -1.0])
    _, cost_target = soft_targets(BATCH, StubActor([0.0, -2.0, 0.0, 2.0]), StubCritic(*Q_TABLE), qc, 0.5, 0.5,
                                  0.25, 3.0)
    assert cost_target.tolist() == [0.0, 4.25, 2.5, 0.75]  # terminal, 1 + 6.5 / 2, 5 / 2, 1 - 0.5 / 2


def test_targets_carry_no_gradient(n_cost):
    torch.manual_seed(0)
    actor, q, qc = Actor(1, 1, hidden=8), Critic(2, 1, 1, hidden=8), Critic(n_cost, 1, 1, hidden=8)
    assert not any(target.requires_grad for target in soft_targets(BATCH, actor, q, qc, 0.9, 0.1, 0.1, 1.0))


# --- Losses ---
@both_scripts
def test_critic_loss_sums_the_mean_squared_errors_of_all_networks(script, n_cost):
    batch = {"observations": NEXT_OBS, "actions": 2 * NEXT_OBS}
    q = StubCritic([1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 0.0, 0.0])
    qc = StubCritic(*n_cost * [[1.0, 1.0, 1.0, 1.0]])
    q.table.requires_grad_()
    qc.table.requires_grad_()
    targets = torch.tensor([1.0, 1.0, 1.0, 2.0]), torch.tensor([3.0, 1.0, 1.0, 5.0])
    loss, metrics = script.critic_loss(batch, q, qc, *targets)
    # (0 + 1 + 4 + 4) / 4 and (1 + 1 + 1 + 4) / 4 of Q, (4 + 0 + 0 + 16) / 4 of each Qc
    expected = {"q_loss": 4.0, "qc_loss": 5.0 * n_cost, "q_mean": 1.25, "qc_mean": 2.5}
    assert {name: metrics[name].item() for name in expected} == expected
    assert loss.item() == 4.0 + 5.0 * n_cost
    assert not any(value.requires_grad for value in metrics.values())
    loss.backward()
    assert q.table.grad.tolist() == [[0.0, 0.5, 1.0, 1.0], [-0.5, -0.5, -0.5, -1.0]]  # 2 (Q - y) / 4
    assert qc.table.grad.tolist() == n_cost * [[-1.0, 0.0, 0.0, -2.0]]


@pytest.mark.parametrize(("multiplier", "expected"), [
    (0.0, -3.5),  # mean of alpha log pi is (0.5 - 1 + 0.25 + 1.25) / 4 = 0.25, of min Q 3.75, of Qc 5
    (1.0, 0.75),  # (-3.5 + 5) / 2
    (3.0, 2.875),  # (-3.5 + 15) / 4
])
def test_actor_loss_is_the_lagrangian_over_one_plus_the_multiplier(n_cost, multiplier, expected):
    log_prob = [1.0, -2.0, 0.5, 2.5]
    loss, returned = actor_loss(NEXT_OBS, StubActor(log_prob), StubCritic(*Q_TABLE),
                                StubCritic(*n_cost * [[2.0, 4.0, 6.0, 8.0]]), 0.5, multiplier)
    assert loss.item() == pytest.approx(expected)
    assert returned.tolist() == log_prob


def test_actor_follows_the_gradients_of_the_smaller_q_of_qc_and_of_its_density(n_cost):
    """log pi has slope 1, Q (2, 5) below 0 and (5, 2) above it, Qc 3; of four actions one is positive."""
    act, log_prob = torch.tensor([[-1.0], [-2.0], [-1.0], [3.0]], requires_grad=True), torch.zeros(4)

    def actor(obs):
        return act, log_prob + act[:, 0]

    def q(obs, act):
        return torch.stack([torch.where(act < 0, 2 * act + 100, 5 * act), torch.where(act < 0, 5 * act + 200,
                                                                                      2 * act)])[..., 0]

    actor_loss(NEXT_OBS, actor, q, lambda obs, act: 3 * act.T.expand(n_cost, -1), 0.5, 0.25)[0].backward()
    # (alpha - dQ + lambda dQc) / (1 + lambda) / 4 with dQ = 2 for every one of them
    assert act.grad.flatten().tolist() == pytest.approx(4 * [(0.5 - 2 + 0.75) / 1.25 / 4])


# --- First multiplier ---
@pytest.mark.parametrize(("g1", "g2", "least_squares", "norm_ratio"), [
    ([3.0, 4.0], [0.0, 2.0], 2.0, 2.5),  # 8 / 4 and 5 / 2
    ([3.0, 4.0], [6.0, 8.0], 0.5, 0.5),  # parallel: the two agree
    ([3.0, 4.0], [-4.0, 3.0], 0.0, 1.0),  # perpendicular
    ([3.0, 4.0], [-3.0, -4.0], 0.0, 1.0),  # opposed: -1 is clipped
])
def test_first_multiplier_of_known_gradients(n_cost, g1, g2, least_squares, norm_ratio):
    q, qc = LinearCritic([g1], 2), LinearCritic([g2], n_cost)
    multipliers = aligned_multipliers(torch.ones(5, 1), Actor(1, 2, hidden=8), q, qc)
    assert multipliers == pytest.approx((least_squares, norm_ratio), abs=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_aligned_multiplier_minimises_the_lagrangians_gradient(n_cost, seed):
    rng = np.random.default_rng(seed)
    g2 = rng.normal(size=(6, 3)).astype(np.float32)
    g1 = (rng.uniform(-0.5, 2) * g2 + 0.5 * rng.normal(size=(6, 3))).astype(np.float32)
    q, qc = LinearCritic(g1, 2), LinearCritic(g2, n_cost)
    aligned, norm_ratio = aligned_multipliers(torch.eye(6), Actor(6, 3, hidden=8), q, qc)
    grid = np.arange(0, 4, 1e-3)
    residual = [((g1 - value * g2) ** 2).sum() for value in grid]
    assert aligned == pytest.approx(grid[np.argmin(residual)], abs=1e-3)
    squares = [sum(x**2 for row in gradients.tolist() for x in row) for gradients in (g1, g2)]
    assert norm_ratio == pytest.approx((squares[0] / squares[1]) ** 0.5, rel=1e-5)
    assert norm_ratio >= aligned


def test_first_multiplier_uses_the_lower_of_the_two_reward_critics(n_cost):
    def two_slopes(obs, act):
        return torch.stack([3 * act[:, 0] + 100, 5 * act[:, 0] - 100])

    actor, qc = Actor(1, 1, hidden=8), LinearCritic([[2.0]], n_cost)
    assert aligned_multipliers(torch.ones(5, 1), actor, two_slopes, qc) == pytest.approx((2.5, 2.5))


def test_first_multiplier_is_finite_where_the_cost_critic_is_flat(n_cost):
    q, qc = LinearCritic([[1.0]], 2), LinearCritic([[0.0]], n_cost)
    assert np.isfinite(aligned_multipliers(torch.ones(5, 1), Actor(1, 1, hidden=8), q, qc)).all()
