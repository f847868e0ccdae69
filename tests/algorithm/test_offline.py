"""CPQ: the penalty on out-of-distribution actions, the VAE that finds them, and the actor's loss."""

import pytest
import torch
from scipy.stats import mannwhitneyu
from torch import nn
from torch.distributions import Normal, TanhTransform, TransformedDistribution, kl_divergence

import common
from offline_pretrain import VAE, Actor, Args, Critic, actor_loss, ood_shortfall, sample


class OneAction(nn.Module):
    """Acts obs + shift; its density has parameters of its own, to tell the two gradients apart."""

    def __init__(self, shift=0.0):
        super().__init__()
        self.shift = nn.Parameter(torch.tensor(shift))
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

    def __init__(self, *values):
        super().__init__()
        self.values = nn.Parameter(torch.tensor(values))

    def forward(self, obs, act):
        return self.values.repeat(len(obs) // len(self.values))[None]


THRESHOLD = 5.0
OBS = torch.tensor([[0.9], [-0.8], [0.7], [0.1], [-0.2]])  # the first three are out of distribution at KL 1/2


def shortfall(qc, n=1, kl_threshold=0.5):
    return ood_shortfall(OBS, OneAction(), Magnitude(), qc, n, kl_threshold, THRESHOLD)


@pytest.mark.parametrize("n", [1, 3])
def test_shortfall_is_the_mean_lack_over_the_out_of_distribution_actions(n):
    value, share = shortfall(Table(1.0, 3.0, 9.0, 0.0, 0.0), n)
    assert value.item() == pytest.approx((4 + 2 + 0) / 3)
    assert share.item() == pytest.approx(3 / 5)


def test_shortfall_reaches_the_cost_critic_only():
    torch.manual_seed(0)
    actor, vae, qc = Actor(3, 2, hidden=16), VAE(3, 2, hidden=16), Critic(1, 3, 2, hidden=16)
    ood_shortfall(torch.randn(20, 3), actor, vae, qc, 2, -1.0, THRESHOLD)[0].backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in qc.parameters())
    assert all(parameter.grad is None for parameter in (*actor.parameters(), *vae.parameters()))


def test_shortfall_raises_the_cost_value_to_the_threshold_and_not_beyond():
    first = [0.0, 4.0, 9.0, 1.0, 6.0]
    qc = Table(*first)
    optimizer = torch.optim.Adam(qc.parameters(), 0.02)
    highest = torch.tensor(first)
    for _ in range(1000):
        optimizer.zero_grad()
        shortfall(qc)[0].backward()
        optimizer.step()
        highest = torch.maximum(highest, qc.values.detach())
    torch.testing.assert_close(qc.values.detach()[:2], torch.full((2,), THRESHOLD), atol=0.25, rtol=0)
    assert highest[:2].max() < THRESHOLD + 0.25
    assert qc.values[2:].tolist() == first[2:]


def test_shortfall_raises_a_networks_values_out_of_distribution():
    torch.manual_seed(0)
    qc = Critic(1, 1, 1, hidden=32)
    optimizer = torch.optim.Adam(qc.parameters(), 0.01)
    for _ in range(200):
        optimizer.zero_grad()
        shortfall(qc)[0].backward()
        optimizer.step()
    with torch.no_grad():
        value = qc(OBS, OBS)[0, :3]
    assert value.min() > 0.9 * THRESHOLD
    assert shortfall(qc)[0] < 0.1 * THRESHOLD


def test_shortfall_is_zero_without_an_out_of_distribution_action():
    qc = Table(0.0, 0.0, 0.0, 0.0, 0.0)
    value, share = shortfall(qc, kl_threshold=1.0)
    value.backward()
    assert (value.item(), share.item()) == (0.0, 0.0)
    assert qc.values.grad.tolist() == [0.0] * 5


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


@pytest.fixture(scope="module")
def trained_vae():
    """A VAE of actions near 0, trained with the script's own settings."""
    torch.manual_seed(0)
    args, vae = Args(), VAE(2, 2, hidden=64)
    optimizer = torch.optim.Adam(vae.parameters(), args.vae_lr)
    for _ in range(600):
        optimizer.zero_grad()
        act = (0.15 * torch.randn(args.batch_size, 2)).clamp(-1, 1)
        vae.loss(torch.randn(args.batch_size, 2), act, args.vae_beta)[0].backward()
        optimizer.step()
    return vae


def test_vae_tells_far_actions_from_the_datas(trained_vae):
    torch.manual_seed(1)
    obs, near = torch.randn(1000, 2), (0.15 * torch.randn(1000, 2)).clamp(-1, 1)
    far = torch.sign(torch.randn(1000, 2)) * (0.9 + 0.1 * torch.rand(1000, 2))
    with torch.no_grad():
        kl_near, kl_far = (trained_vae.encode(obs, act)[2].numpy() for act in (near, far))
    assert mannwhitneyu(kl_far, kl_near).statistic / 1000**2 > 0.9  # the area under the ROC curve


def slope_three(obs, act):
    return torch.stack([3 * act[:, 0], 3 * act[:, 0] + 1])


def ten_times_the_size(obs, act):
    return 10 * act.abs().T


def test_actor_is_not_moved_by_its_unsafe_actions():
    """Actions obs + shift, Q = 3 a, Qc = 10 |a|: three rows are above threshold 5; E|Q| = 8.1 / 5 = 1.62."""
    actor = OneAction(0.0)
    loss, share, _ = actor_loss({"observations": OBS, "actions": OBS}, actor, slope_three, ten_times_the_size,
                                THRESHOLD, 0.0)
    loss.backward()
    assert share.item() == pytest.approx(2 / 5)
    assert loss.item() == pytest.approx(-3 * (0.1 - 0.2) / 5 / 1.62)
    assert actor.shift.grad.item() == pytest.approx(-3 * 2 / 5 / 1.62)
    actor.shift.grad = None
    loss, share, _ = actor_loss({"observations": OBS[:3], "actions": OBS[:3]}, actor, slope_three,
                                ten_times_the_size, THRESHOLD, 0.0)
    loss.backward()
    assert (loss.item(), share.item(), actor.shift.grad.item()) == (0.0, 0.0, 0.0)


def test_action_at_the_threshold_is_safe():
    obs = torch.tensor([[0.5]])
    _, share, imitated = actor_loss({"observations": obs, "actions": obs}, OneAction(), slope_three,
                                    ten_times_the_size, THRESHOLD, 0.1)
    assert (share.item(), imitated.item()) == (1.0, 1.0)


def test_actor_imitates_the_datas_safe_actions_that_are_no_worse_than_its_own():
    """Q = 3 a and Qc = 10 |a| with threshold 5, so "no worse" is "no smaller" and "safe" is "at most 1/2"."""
    actor = OneAction(0.0)
    data = torch.tensor([[0.4],  # safe, but worse than 0.9
                         [-0.3],  # safe and better than -0.8
                         [0.8],  # better than 0.7, but unsafe
                         [0.1],  # the same
                         [-0.4]])  # safe, but worse than -0.2
    loss, _, imitated = actor_loss({"observations": OBS, "actions": data}, actor, slope_three,
                                   ten_times_the_size, THRESHOLD, 0.25)
    loss.backward()
    assert imitated.item() == pytest.approx(2 / 5)
    mean, log_std = actor.mean.detach().requires_grad_(), actor.log_std.detach().requires_grad_()
    policy = TransformedDistribution(Normal(mean, log_std.exp()), TanhTransform())
    (-0.25 * policy.log_prob(data[[1, 3]]).sum() / 5).backward()
    assert actor.mean.grad.item() == pytest.approx(mean.grad.item(), rel=1e-5)
    assert actor.log_std.grad.item() == pytest.approx(log_std.grad.item(), rel=1e-5)
    assert actor.shift.grad.item() == pytest.approx(-3 * 2 / 5 / 1.62)  # as without imitation


def test_imitating_an_action_on_the_border_is_finite():
    actor = OneAction(0.0)
    data = torch.tensor([[1.0], [1.0], [1.0], [-1.0], [-1.0]])
    loss, _, imitated = actor_loss({"observations": OBS, "actions": data}, actor, slope_three,
                                   lambda obs, act: 0 * act.T, THRESHOLD, 0.25)
    loss.backward()
    assert imitated.item() == pytest.approx(3 / 5)
    assert all(torch.isfinite(x).all() for x in (loss, actor.mean.grad, actor.log_std.grad))


def test_vae_keeps_a_code_on_the_shipped_data_where_a_larger_beta_loses_it():
    task = common.Task("SafetyBallCircle-v0", 8, 2, 200)
    data = common.read_dataset(common.find_dataset(task, None), task)
    kl = {}
    for beta in (Args.vae_beta, 0.5):
        torch.manual_seed(0)
        vae = VAE(8, 2)
        optimizer = torch.optim.Adam(vae.parameters(), Args.vae_lr)
        for _ in range(500):
            batch = sample(data, 256)
            loss, _ = vae.loss(batch["observations"], batch["actions"], beta)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        kl[beta] = float(vae.loss(batch["observations"], batch["actions"], beta)[1].mean())
    assert kl[Args.vae_beta] > 0.5 > 0.15 > kl[0.5]
