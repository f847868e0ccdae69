"""BEAR-Lag: the MMD, the targets, the multiplier on the critic's estimates, the loss, and what it learns."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import ACT_DIM, BOTH, HORIZON, OBS_DIM, TASK, new_run, of, run

from benchmark.baselines import bear_lag
from benchmark.baselines.bear_lag import (
    Actor,
    Args,
    CriticPID,
    bear_loss,
    bear_targets,
    mmd,
    repeated_actions,
)
from benchmark.tools.export_dataset import write_dataset


# --- MMD ---
@pytest.mark.parametrize("sigma", [0.7, 50.0])
def test_mmd_is_the_mean_of_the_kernel_over_all_pairs(sigma):
    rng = np.random.default_rng(0)
    x, y = rng.uniform(-1, 1, (3, 5, 2)), rng.uniform(-1, 1, (4, 5, 2))

    def kernel(a, b):
        return math.exp(-sum((i - j) ** 2 for i, j in zip(a, b, strict=True)) / (2 * sigma))

    expected = []
    for state in range(5):
        within = [[kernel(a[state], b[state]) for a in part for b in part] for part in (x, y)]
        between = [kernel(a[state], b[state]) for a in x for b in y]
        expected.append(sum(map(np.mean, within)) - 2 * np.mean(between))
    value = mmd(torch.tensor(x), torch.tensor(y), sigma)
    np.testing.assert_allclose(value.numpy() ** 2 - 1e-6, expected, rtol=1e-6)


def test_mmd_with_the_default_width_is_the_distance_of_the_means():
    x, y = torch.tensor([[[-0.2, 0.1]], [[0.4, 0.3]]]), torch.tensor([[[0.5, 0.0]], [[0.3, -0.4]]])
    assert mmd(x, y).item() == pytest.approx(math.sqrt((0.3**2 + 0.4**2) / 50), rel=0.02)
    assert mmd(x, x[[1, 0]]).item() == pytest.approx(1e-3, rel=0.2)  # of equal sets: the root of its epsilon


# --- Actions and targets ---
def test_repeated_actions_are_samples_of_the_actor():
    torch.manual_seed(0)
    actor, obs = Actor(3, 2, hidden=16), torch.randn(4, 3)
    with torch.no_grad():
        many = repeated_actions(obs, actor, 4000)
        others = actor(obs.expand(4000, -1, -1))[0]
    assert many.shape == (4000, 4, 2)
    torch.testing.assert_close(many.mean(0), others.mean(0), atol=0.05, rtol=0)
    torch.testing.assert_close(many.std(0), others.std(0), atol=0.03, rtol=0)


def test_targets_by_hand_with_a_terminal_and_a_time_limit(monkeypatch):
    """Next actions 0.2 and 0.4 times the state; Q = (10 s a, 20 s - 10 s a), Qc = 5 s + 10 a."""
    obs = torch.tensor([[1.0], [2.0], [3.0]])
    batch = {"next_observations": obs, "rewards": torch.tensor([1.0, 2.0, 3.0]),
             "costs": torch.tensor([0.0, 1.0, 1.0]), "terminals": torch.tensor([0.0, 1.0, 0.0]),
             "timeouts": torch.tensor([0.0, 0.0, 1.0])}
    monkeypatch.setattr(bear_lag, "repeated_actions",
                        lambda obs, actor, n: torch.stack([0.2 * obs, 0.4 * obs]).requires_grad_())

    def q(obs, act):
        return torch.stack([10 * obs * act, 20 * obs - 10 * obs * act])[..., 0]

    def qc(obs, act):
        return (5 * obs + 10 * act).T

    target, cost_target = bear_targets(batch, None, q, qc, 0.5, 2, 12.0)
    # s = 1: Q is (2, 18) and (4, 16), of which 3/4 of the smaller and 1/4 of the larger are 6 and 7
    # s = 3: Q is (18, 42) and (36, 24): 24 and 27; Qc is 7 and 9 for s = 1, 21 and 27 for s = 3
    torch.testing.assert_close(target, torch.tensor([1 + 7 / 2, 2.0, 3 + 27 / 2]))
    torch.testing.assert_close(cost_target, torch.tensor([8 / 2, 1.0, 1 + 24 / 2]))


def test_targets_are_of_the_target_actor_and_several_actions_and_carry_no_gradient():
    targets, losses = of(run("bear_lag"), "bear_targets"), of(run("bear_lag"), "bear_loss")
    for target, loss in zip(targets, losses, strict=True):
        assert target.actor_target is not loss.actor
        assert (target.n, loss.n) == (3, 3)
    assert not torch.equal(targets[0].actor_target_parameters, targets[-1].actor_target_parameters)
    call = targets[-1]
    assert not any(x.requires_grad for x in bear_targets(
        call.batch, losses[-1].actor, losses[-1].q, losses[-1].qc, call.gamma, call.n, call.largest_cost))


# --- Multiplier ---
def test_multiplier_follows_a_table_made_by_hand():
    """Errors 1, 3, -2, -4, 2: the integral is 1, 4, 2, 0, 2, the rise 1, 2, 0, 0, 6."""
    pid, multipliers = CriticPID(kp=0.5, ki=0.1, kd=2.0), []
    for error in (1.0, 3.0, -2.0, -4.0, 2.0):
        pid.update(error)
        multipliers.append(pid.multiplier)
    assert multipliers == pytest.approx([0.5 + 0.1 + 2, 1.5 + 0.4 + 4, 0.2, 0.0, 1 + 0.2 + 12])


def test_multiplier_winds_up_without_bound_while_the_critic_finds_the_policy_unsafe():
    pid = CriticPID(0.0, Args.ki, 0.0)
    for _ in range(100_000):
        pid.update(5.0)
    assert pid.multiplier == pytest.approx(0.003 * 5 * 100_000)


@pytest.mark.parametrize("cost_limit", [0.0, 0.2])
def test_multiplier_comes_from_the_critics_estimate_above_its_threshold(cost_limit):
    """It acts in the next step; every step is logged here. The threshold is the limit, discounted evenly."""
    result = run("bear_lag", cost_limit=cost_limit, eval_every=1)
    threshold = sum(cost_limit / HORIZON * BOTH["gamma"] ** t for t in range(HORIZON))
    error = result.metrics["policy_qc"] - threshold
    integral, expected = 0.0, []
    for now, before in zip(error, [0.0, *error[:-1]], strict=True):
        integral = max(0.0, integral + now)
        expected.append(0.1 * max(0.0, now) + 0.003 * integral + 0.001 * max(0.0, now - before))
    np.testing.assert_allclose(result.metrics["lagrange_multiplier"], expected, rtol=1e-4, atol=1e-7)
    used = [call.lagrange_multiplier for call in of(result, "bear_loss")]
    np.testing.assert_allclose(used, [0.0, *expected[:-1]], rtol=1e-4, atol=1e-7)
    assert min(expected[5:]) > 0
    for call, logged in zip(of(result, "bear_loss"), result.metrics["policy_qc"], strict=True):
        assert float(call.result[1]) == pytest.approx(logged, rel=1e-5)


# --- Loss ---
class OneAction(torch.nn.Module):
    """Always the action tanh(u)."""

    def __init__(self, action):
        super().__init__()
        self.u = torch.nn.Parameter(torch.tensor(action).atanh())

    def gaussian(self, obs):
        return self.u.expand(len(obs), 1), torch.full((len(obs), 1), -math.inf)


class OneCode:
    """Stands for a VAE that decodes one action."""

    def __init__(self, action):
        self.action = action

    def decoder(self, x):
        return torch.full((*x.shape[:-1], 1), self.action)


def slope(*slopes):
    return lambda obs, act: torch.stack([k * act[:, 0] for k in slopes])


def lagrangian(multiplier, mmd_weight=0.0, action=0.3, vae_action=-0.4):
    """Loss, E[Qc], MMD and d loss / d action, where Q = 3 a (the smaller one) and Qc = 2 a."""
    actor, obs = OneAction(action), torch.zeros(5, 2)
    loss, qc, distance = bear_loss(obs, actor, OneCode(vae_action), slope(3.0, 4.0), slope(2.0), 3,
                                   multiplier, mmd_weight)
    loss.backward()
    return SimpleNamespace(loss=loss.item(), qc=qc.item(), mmd=distance.item(),
                           slope=actor.u.grad.item() / (1 - action**2))


@pytest.mark.parametrize(("multiplier", "expected"), [(0.0, -3.0), (1.0, -0.5), (1.5, 0.0), (4.0, 1.0)])
def test_loss_is_the_lagrangian_over_one_plus_the_multiplier(multiplier, expected):
    """(2 lambda - 3) / (1 + lambda): up with Q for a small multiplier, down with Qc for a large one."""
    result = lagrangian(multiplier)
    assert result.slope == pytest.approx(expected, abs=1e-6)
    assert result.loss == pytest.approx(expected * 0.3, abs=1e-6)
    assert result.qc == pytest.approx(2 * 0.3)


@pytest.mark.parametrize(("vae_action", "sign"), [(-0.4, 1), (0.8, -1)])
def test_mmd_draws_the_policy_to_the_vaes_actions(vae_action, sign):
    free, drawn = (lagrangian(1.5, weight, vae_action=vae_action) for weight in (0.0, 10.0))
    assert free.mmd == drawn.mmd == pytest.approx(abs(vae_action - 0.3) / math.sqrt(50), rel=0.02)
    assert drawn.loss == pytest.approx(10 * drawn.mmd, rel=1e-4)
    assert sign * drawn.slope == pytest.approx(10 / math.sqrt(50), rel=0.02)


def test_loss_has_no_gradient_in_the_vae():
    torch.manual_seed(0)
    actor, vae = Actor(3, 2, hidden=16), bear_lag.VAE(3, 2, hidden=16)
    q, qc = bear_lag.Critic(2, 3, 2, hidden=16), bear_lag.Critic(1, 3, 2, hidden=16)
    bear_loss(torch.randn(20, 3), actor, vae, q, qc, 2, 0.5, 1.0)[0].backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in actor.parameters())
    assert all(parameter.grad is None for parameter in vae.parameters())


@pytest.mark.parametrize(("mmd_limit", "direction"), [(0.0, 1), (10.0, -1)])
def test_weight_of_the_mmd_rises_above_its_limit_and_falls_below_and_is_used(mmd_limit, direction):
    """Adam's steps have the learning rate's size while the sign stays."""
    result = run("bear_lag", mmd_limit=mmd_limit, critic_lr=1e-3)
    expected = np.exp(direction * 1e-3 * np.arange(20))
    np.testing.assert_allclose([call.mmd_weight for call in of(result, "bear_loss")], expected, rtol=2e-3)
    assert float(result.checkpoint["log_mmd_weight"]) == pytest.approx(direction * 0.02, rel=0.1)


# --- Learning ---
def test_multiplier_keeps_the_policy_safe_and_the_mmd_keeps_it_in_the_data(tmp_path):
    """Episodes of one step with actions in [-0.6, 0.6]^2; the reward is the first one, above 0.2 it costs 10.

    So the best safe action is 0.2. An MMD of 0.05 allows 0.35 more than the data's mean action, 0.
    """
    rng, n, actions = np.random.default_rng(0), 2000, []
    obs, act = rng.normal(size=(2, n, OBS_DIM)), rng.uniform(-0.6, 0.6, (n, ACT_DIM))
    write_dataset(tmp_path / "bandit.hdf5", dict(
        observations=obs[0], next_observations=obs[1], actions=act, rewards=act[:, 0],
        costs=10 * (act[:, 0] > 0.2), terminals=np.ones(n), timeouts=np.zeros(n)), {"task": TASK})
    options = dict(dataset_path=str(tmp_path / "bandit.hdf5"), cost_limit=1.0, bear_actions=4,
                   update_steps=200, batch_size=64, critic_lr=1e-2, actor_lr=2e-3)
    for gains in {}, dict(kp=0.0, ki=0.0, kd=0.0):
        result = new_run("bear_lag", **options, **gains)
        with torch.no_grad():
            mean, _ = of(result, "bear_loss")[-1].actor.gaussian(torch.randn(500, OBS_DIM))
        actions.append(mean.tanh().mean(0)[0].item())
    safe, greedy = actions
    assert -0.2 < safe < 0.2 < 0.27 < greedy < 0.6, actions
