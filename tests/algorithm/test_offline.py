"""The offline policy: its targets, the actor's loss; and CPQ's penalty, with the VAE that it needs."""

import pytest
import torch
from scipy.stats import mannwhitneyu
from tiny import BATCH, Q_TABLE, StubActor, StubCritic, cost_critics
from torch import nn
from torch.distributions import Independent, Normal, TanhTransform, TransformedDistribution, kl_divergence

import common
import offline_pretrain
from benchmark.baselines import bc_safe
from benchmark.baselines.cpq import VAE, Args, ood_shortfall
from offline_pretrain import Actor, Critic, ReplayBuffer, actor_loss, cpq_targets

THRESHOLD = 5.0
OBS = torch.tensor([[0.9], [-0.8], [0.7], [0.1], [-0.2]])  # the first three are out of distribution at KL 1/2


@pytest.fixture(scope="module")
def n_cost():
    """How many cost critics there are: here all are equal, so that their mean is their maximum."""
    return cost_critics("offline")


class OneAction(nn.Module):
    """Acts obs + shift; its density has parameters of its own, to tell the two gradients apart."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(()))
        self.mean, self.log_std = nn.Parameter(torch.tensor(0.3)), nn.Parameter(torch.tensor(-0.7))

    def forward(self, obs):
        return obs + self.shift, torch.zeros(len(obs))

    def gaussian(self, obs):
        return self.mean.expand(len(obs), 1), self.log_std.expand(len(obs), 1)


class Magnitude:
    """Stands for a VAE whose KL is the size of the action."""

    def encode(self, obs, act):
        return None, None, act.abs().sum(-1)


class Table(nn.Module):
    """A cost critic with one free value for each row of the batch, the same for every repetition of it."""

    def __init__(self, n, *values):
        super().__init__()
        self.n, self.values = n, nn.Parameter(torch.tensor(values))

    def forward(self, obs, act):
        return self.values.repeat(len(obs) // len(self.values)).expand(self.n, -1)


# --- Targets ---
def test_targets_mask_the_reward_bootstrap_where_the_next_cost_value_is_unsafe(n_cost):
    """gamma 1/2, threshold 5: transitions 1 and 2 lead to unsafe actions, 3 is exactly at the threshold."""
    batch = {**BATCH, "terminals": torch.tensor([0.0, 0.0, 1.0, 0.0])}
    q, qc = StubCritic(*Q_TABLE), StubCritic(*n_cost * [[2.0, 6.0, 7.0, 5.0]])
    target, cost_target = cpq_targets(batch, StubActor([9.0] * 4), q, qc, 0.5, 5.0, 4.0)
    assert target.tolist() == [3.0, 2.0, 3.0, 7.5]  # 1 + 4/2, 2, 3, 4 + 7/2
    assert cost_target.tolist() == [1.0, 4.0, 0.0, 3.5]  # 0 + 2/2, 1 + 6/2, terminal, 1 + 5/2


def test_bootstrap_of_qc_is_within_what_costs_can_add_up_to():
    """gamma 1/2, costs up to 3 a step: values from 0 to 6; what is unsafe stays so."""
    batch = {**BATCH, "terminals": torch.tensor([0.0, 0.0, 1.0, 0.0])}
    q, qc = StubCritic(*Q_TABLE), StubCritic([-5.0, 7.0, 5.0, 5.0])
    target, cost_target = cpq_targets(batch, StubActor([9.0] * 4), q, qc, 0.5, 5.5, 3.0)
    assert cost_target.tolist() == [0.0, 4.0, 0.0, 3.5]  # 0, 1 + 6/2, terminal, 1 + 5/2
    assert target.tolist() == [3.0, 2.0, 3.0, 7.5]


def test_targets_carry_no_gradient(n_cost):
    torch.manual_seed(0)
    actor, q, qc = Actor(1, 1, hidden=8), Critic(2, 1, 1, hidden=8), Critic(n_cost, 1, 1, hidden=8)
    assert not any(target.requires_grad for target in cpq_targets(BATCH, actor, q, qc, 0.9, 1.0, 1.0))


# --- Penalty ---
def shortfall(qc, n=1, kl_threshold=0.5):
    return ood_shortfall(OBS, OneAction(), Magnitude(), qc, n, kl_threshold, THRESHOLD)


@pytest.mark.parametrize("n", [1, 3])
def test_shortfall_is_the_mean_lack_over_the_out_of_distribution_actions(n_cost, n):
    qc = Table(n_cost, 1.0, 3.0, 9.0, 0.0, 0.0)
    value, share = shortfall(qc, n)
    assert value.item() == pytest.approx((4 + 2 + 0) / 3)
    assert share.item() == pytest.approx(3 / 5)
    value.backward()  # it rises only where it lacks, and not beyond the threshold
    assert qc.values.grad.tolist() == pytest.approx([-1 / 3, -1 / 3, 0, 0, 0])


def test_shortfall_reaches_the_cost_critic_only(n_cost):
    torch.manual_seed(0)
    actor, vae, qc = Actor(3, 2, hidden=16), VAE(3, 2, hidden=16), Critic(n_cost, 3, 2, hidden=16)
    ood_shortfall(torch.randn(20, 3), actor, vae, qc, 2, -1.0, THRESHOLD)[0].backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in qc.parameters())
    assert all(parameter.grad is None for parameter in (*actor.parameters(), *vae.parameters()))


def test_shortfall_is_zero_without_an_out_of_distribution_action(n_cost):
    qc = Table(n_cost, 0.0, 0.0, 0.0, 0.0, 0.0)
    value, share = shortfall(qc, kl_threshold=1.0)
    value.backward()
    assert (value.item(), share.item()) == (0.0, 0.0)
    assert qc.values.grad.tolist() == [0.0] * 5


# --- VAE ---
def test_vae_kl_is_that_of_its_gaussian():
    torch.manual_seed(0)
    vae, obs, act = VAE(3, 2, hidden=16), torch.randn(50, 3), torch.rand(50, 2) * 2 - 1
    with torch.no_grad():
        vae.encoder[-1].weight.mul_(10)
        mean, log_std, kl = vae.encode(obs, act)
    assert mean.shape == log_std.shape == (50, 4)
    assert log_std.std() > 0.5
    exact = kl_divergence(Normal(mean, log_std.exp()), Normal(0.0, 1.0)).sum(1)
    torch.testing.assert_close(kl, exact)


def test_vae_loss_is_reconstruction_plus_weighted_kl():
    torch.manual_seed(0)
    vae, obs, act = VAE(3, 2, hidden=16), torch.randn(5, 3), torch.rand(5, 2) * 2 - 1
    with torch.no_grad():
        vae.decoder[-2].weight.zero_()
        vae.decoder[-2].bias.copy_(torch.tensor([0.5, -0.2]).atanh())
        mean, log_std, _ = vae.encode(obs, act)
    loss, kl = vae.loss(obs, act, 0.3)
    exact_kl = kl_divergence(Normal(mean, log_std.exp()), Normal(0.0, 1.0)).sum(1)
    error = ((act[:, 0] - 0.5) ** 2 + (act[:, 1] + 0.2) ** 2).mean()
    torch.testing.assert_close(loss, error + 0.3 * exact_kl.mean())
    torch.testing.assert_close(kl, exact_kl)
    assert loss.requires_grad and not kl.requires_grad


def test_vae_tells_far_actions_from_the_datas():
    """After training on actions near 0 with the script's own settings."""
    torch.manual_seed(0)
    vae = VAE(2, 2, hidden=64)
    optimizer = torch.optim.Adam(vae.parameters(), Args.vae_lr)
    for _ in range(600):
        optimizer.zero_grad()
        act = (0.15 * torch.randn(128, 2)).clamp(-1, 1)
        vae.loss(torch.randn(128, 2), act, Args.vae_beta)[0].backward()
        optimizer.step()
    obs, near = torch.randn(1000, 2), (0.15 * torch.randn(1000, 2)).clamp(-1, 1)
    far = torch.sign(torch.randn(1000, 2)) * (0.9 + 0.1 * torch.rand(1000, 2))
    with torch.no_grad():
        kl_near, kl_far = (vae.encode(obs, act)[2].numpy() for act in (near, far))
    assert mannwhitneyu(kl_far, kl_near).statistic / 1000**2 > 0.9  # the area under the ROC curve


@pytest.mark.parametrize(("beta", "low", "high"), [(Args.vae_beta, 0.5, 10.0), (0.5, 0.0, 0.2)])
def test_vae_keeps_a_code_on_the_shipped_data_where_a_larger_beta_loses_it(beta, low, high):
    task = common.Task("SafetyBallCircle-v0", 8, 2, 200)
    data = ReplayBuffer(8, 2, torch.device("cpu"))
    data.load_state_dict(common.read_dataset(common.find_dataset(task, None), task))
    torch.manual_seed(0)
    vae = VAE(8, 2, hidden=64)
    optimizer = torch.optim.Adam(vae.parameters(), Args.vae_lr)
    for _ in range(600):
        batch = data.sample(128)
        loss, kl = vae.loss(batch["observations"], batch["actions"], beta)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert low < kl.mean() < high


# --- Actor ---
@pytest.mark.parametrize("log_likelihood", [offline_pretrain.log_likelihood, bc_safe.log_likelihood])
def test_likelihood_is_the_squashed_gaussians_but_for_a_constant_of_the_data(log_likelihood):
    torch.manual_seed(0)
    obs, act = torch.randn(50, 3), torch.rand(50, 2) * 1.9 - 0.95
    differences = []
    for actor in [Actor(3, 2, hidden=16) for _ in range(2)]:
        mean, log_std = actor.gaussian(obs)
        policy = TransformedDistribution(Normal(mean, log_std.exp()), TanhTransform())
        exact = Independent(policy, 1).log_prob(act)
        ours = log_likelihood(obs, act, actor)
        differences.append((exact - ours).detach())
        for a, b in zip(*(torch.autograd.grad(value.mean(), list(actor.parameters()), retain_graph=True)
                          for value in (exact, ours)), strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)
    assert exact.std() > 0.1
    torch.testing.assert_close(*differences, atol=1e-4, rtol=1e-4)


def slope_three(obs, act):
    return torch.stack([3 * act[:, 0], 3 * act[:, 0] + 1])


@pytest.fixture(scope="module")
def ten_times_the_size(n_cost):
    return lambda obs, act: 10 * act.abs().T.expand(n_cost, -1)


def loss_of(actor, obs, data_act, qc, bc_weight):
    batch = {"observations": obs, "actions": data_act}
    return actor_loss(batch, actor, slope_three, qc, THRESHOLD, bc_weight)


def test_actor_is_not_moved_by_its_unsafe_actions(ten_times_the_size):
    """Actions obs + shift, Q = 3 a, Qc = 10 |a|: three rows are above threshold 5; E|Q(b) - Q(a)| = 1.62."""
    actor = OneAction()
    data = OBS + torch.tensor([[0.6], [-0.6], [0.5], [0.5], [0.5]])  # Q differs by 1.8, -1.8 and 1.5
    loss, metrics = loss_of(actor, OBS, data, ten_times_the_size, 0.0)
    loss.backward()
    assert metrics["safe_share"].item() == pytest.approx(2 / 5)
    assert loss.item() == metrics["actor_loss"].item() == pytest.approx(-3 * (0.1 - 0.2) / 5 / 1.62)
    assert actor.shift.grad.item() == pytest.approx(-3 * 2 / 5 / 1.62)
    actor.shift.grad = None
    loss, metrics = loss_of(actor, OBS[:3], -OBS[:3], ten_times_the_size, 0.0)
    loss.backward()
    assert (loss.item(), metrics["safe_share"].item(), actor.shift.grad.item()) == (0.0, 0.0, 0.0)


def test_action_at_the_threshold_is_safe(ten_times_the_size):
    obs = torch.tensor([[0.5]])
    _, metrics = loss_of(OneAction(), obs, obs, ten_times_the_size, 0.1)
    assert (metrics["safe_share"].item(), metrics["imitated_share"].item()) == (1.0, 1.0)


def test_actor_imitates_the_datas_safe_actions_that_are_no_worse_than_its_own(ten_times_the_size):
    """Q = 3 a and Qc = 10 |a| with threshold 5, so "no worse" is "no smaller" and "safe" is "at most 1/2"."""
    actor = OneAction()
    data = torch.tensor([[0.4],  # safe, but worse than 0.9
                         [-0.3],  # safe and better than -0.8
                         [0.8],  # better than 0.7, but unsafe
                         [0.1],  # the same
                         [-0.4]])  # safe, but worse than -0.2
    loss, metrics = loss_of(actor, OBS, data, ten_times_the_size, 0.25)
    loss.backward()
    assert metrics["imitated_share"].item() == pytest.approx(2 / 5)
    mean, log_std = actor.mean.detach().requires_grad_(), actor.log_std.detach().requires_grad_()
    policy = TransformedDistribution(Normal(mean, log_std.exp()), TanhTransform())
    (-0.25 * policy.log_prob(data[[1, 3]]).sum() / 5).backward()
    assert actor.mean.grad.item() == pytest.approx(mean.grad.item(), rel=1e-5)
    assert actor.log_std.grad.item() == pytest.approx(log_std.grad.item(), rel=1e-5)
    # as without imitation; E|Q(b) - Q(a)| = 3 (0.5 + 0.5 + 0.1 + 0 + 0.2) / 5 = 0.78
    assert actor.shift.grad.item() == pytest.approx(-3 * 2 / 5 / 0.78)


def test_actors_objective_has_no_unit_of_the_reward(ten_times_the_size):
    batch = {"observations": OBS, "actions": OBS.flip(0)}
    losses = [actor_loss(batch, OneAction(), lambda obs, act, x=x: x * slope_three(obs, act),
                         ten_times_the_size, THRESHOLD, 0.25)[0].item() for x in (1.0, 10.0)]
    assert losses[0] == pytest.approx(losses[1]) != 0


def test_share_at_the_threshold_is_of_cost_values_within_two_percent_of_it(ten_times_the_size):
    """Qc = 10 |a|, the threshold 5: from 4.9 to 5.1."""
    obs = torch.tensor([[0.5], [0.495], [-0.505], [0.489], [0.511]])
    _, metrics = loss_of(OneAction(), obs, obs, ten_times_the_size, 0.1)
    assert metrics["at_threshold_share"].item() == pytest.approx(3 / 5)


def test_imitating_an_action_on_the_border_is_finite(n_cost):
    actor = OneAction()
    data = torch.tensor([[1.0], [1.0], [1.0], [-1.0], [-1.0]])
    loss, metrics = loss_of(actor, OBS, data, lambda obs, act: 0 * act.T.expand(n_cost, -1), 0.25)
    loss.backward()
    assert metrics["imitated_share"].item() == pytest.approx(3 / 5)
    assert all(torch.isfinite(x).all() for x in (loss, actor.mean.grad, actor.log_std.grad))
