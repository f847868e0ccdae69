"""BEAR-Lag: the MMD, the targets, the multiplier on the critic's estimates, the loss, and whole runs."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TASK, TINY_MARVEL, TINY_OFFLINE, parameters, same
from test_wiring import check_targets_follow, no_evaluation, of, record

import common
import marvel_sac_pid
import offline_pretrain
from benchmark.curves import read_metrics
from benchmark.export_dataset import write_dataset
from offline_pretrain import Actor, Args, CriticPID, bear_loss, bear_targets, mmd, repeated_actions

NUMBERS = ("update_steps", "lagrange_multiplier", "policy_qc", "mmd", "mmd_weight", "q_loss", "qc_loss")


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


def test_mmd_of_two_single_actions():
    x, y = torch.tensor([[[0.1]]]), torch.tensor([[[0.7]]])
    assert mmd(x, y, 0.5).item() == pytest.approx(math.sqrt(2 - 2 * math.exp(-0.36)), rel=1e-4)


def test_mmd_is_zero_for_equal_sets_and_small_for_equal_distributions():
    torch.manual_seed(0)
    x, y = 0.3 * torch.randn(2, 400, 3, 2)
    assert mmd(x, x[torch.randperm(400)], 0.5).max() < 2e-3
    assert mmd(x, y, 0.5).max() < 0.1 < 0.3 < mmd(x, y + 0.5, 0.5).min()


def test_mmd_with_the_default_width_is_the_distance_of_the_means():
    x, y = torch.tensor([[[-0.2, 0.1]], [[0.4, 0.3]]]), torch.tensor([[[0.5, 0.0]], [[0.3, -0.4]]])
    assert mmd(x, y).item() == pytest.approx(math.sqrt((0.3**2 + 0.4**2) / 50), rel=0.02)


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
    monkeypatch.setattr(offline_pretrain, "repeated_actions",
                        lambda obs, actor, n: torch.stack([0.2 * obs, 0.4 * obs]))

    def q(obs, act):
        return torch.stack([10 * obs * act, 20 * obs - 10 * obs * act])[..., 0]

    def qc(obs, act):
        return (5 * obs + 10 * act).T

    target, cost_target = bear_targets(batch, None, q, qc, 0.5, 2)
    # s = 1: Q is (2, 18) and (4, 16), of which 3/4 of the smaller and 1/4 of the larger are 6 and 7
    # s = 3: Q is (18, 42) and (36, 24): 24 and 27; Qc is 7 and 9 for s = 1, 21 and 27 for s = 3
    torch.testing.assert_close(target, torch.tensor([1 + 7 / 2, 2.0, 3 + 27 / 2]))
    torch.testing.assert_close(cost_target, torch.tensor([8 / 2, 1.0, 1 + 24 / 2]))


# --- Multiplier ---
def test_multiplier_follows_a_table_made_by_hand():
    pid, multipliers, integrals = CriticPID(kp=0.5, ki=0.1, kd=2.0), [], []
    for error in (1.0, 3.0, -2.0, -4.0, 2.0):
        pid.update(error)
        multipliers.append(pid.multiplier)
        integrals.append(pid.integral)
    assert integrals == [1, 4, 2, 0, 2]
    # 0.5 + 0.1 + 2, 1.5 + 0.4 + 4, 0.2, 0, 1 + 0.2 + 12
    assert multipliers == pytest.approx([2.6, 5.9, 0.2, 0.0, 13.2])


def test_multiplier_winds_up_without_bound_while_the_critic_finds_the_policy_unsafe():
    pid = CriticPID(0.0, Args.ki, 0.0)
    for _ in range(100_000):
        pid.update(5.0)
    assert pid.multiplier == pytest.approx(0.003 * 5 * 100_000)


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
    actor, vae = Actor(3, 2, hidden=16), offline_pretrain.VAE(3, 2, hidden=16)
    q, qc = offline_pretrain.Critic(2, 3, 2, hidden=16), offline_pretrain.Critic(1, 3, 2, hidden=16)
    bear_loss(torch.randn(20, 3), actor, vae, q, qc, 2, 0.5, 1.0)[0].backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in actor.parameters())
    assert all(parameter.grad is None for parameter in vae.parameters())


# --- Whole runs ---
def train(run_dir, dataset, **options):
    options = {**TINY_OFFLINE, "algo": "bear-lag", "dataset_path": str(dataset), "run_dir": str(run_dir),
               **options}
    offline_pretrain.main(Args(**options))
    return common.load_checkpoint(run_dir / "checkpoint.pt")


@pytest.fixture(scope="module")
def run(ball_file, tmp_path_factory):
    """One recorded run whose limit is 0, so that the multiplier has something to do."""
    calls, run_dir = [], tmp_path_factory.mktemp("runs") / "bear"
    with pytest.MonkeyPatch.context() as patch:
        for name in ("bear_targets", "critic_loss", "bear_loss"):
            record(patch, calls, offline_pretrain, name)
        record(patch, calls, CriticPID, "update")
        checkpoint = train(run_dir, ball_file, cost_limit=0.0, gamma=0.9, bear_actions=3, tau=0.03)
    return SimpleNamespace(dir=run_dir, calls=calls, checkpoint=checkpoint,
                           metrics=read_metrics(run_dir / "metrics.csv"))


def test_step_uses_one_batch_its_own_targets_and_the_target_actor(run):
    names = "bear_targets", "critic_loss", "bear_loss"
    steps = list(zip(*(of(run.calls, name) for name in names), strict=True))
    assert len(steps) == TINY_OFFLINE["update_steps"]
    for targets, critics, actor in steps:
        assert torch.equal(critics.batch["observations"], targets.batch["observations"])
        assert torch.equal(actor.obs, targets.batch["observations"])
        assert torch.equal(critics.q_target_value, targets.result[0])
        assert torch.equal(critics.qc_target_value, targets.result[1])
        assert (targets.gamma, targets.n, actor.n) == (0.9, 3, 3)
        assert critics.q is actor.q is not targets.q_target
        assert critics.qc is actor.qc is not targets.qc_target
        assert actor.actor is not targets.actor_target
    check_targets_follow([step[0] for step in steps], [step[1] for step in steps], tau=0.03)
    for (before, _, _), (after, _, now) in zip(steps[:-1], steps[1:], strict=True):
        way = now.actor_parameters - before.actor_target_parameters
        torch.testing.assert_close(after.actor_target_parameters - before.actor_target_parameters, 0.03 * way,
                                   rtol=1e-3, atol=1e-7)


def test_multiplier_comes_from_the_critics_estimate_above_its_threshold(run):
    losses, updates = of(run.calls, "bear_loss"), of(run.calls, "update")
    assert [call.error for call in updates] == pytest.approx([float(call.result[1]) for call in losses])
    assert losses[0].lagrange_multiplier == 0
    again = CriticPID(Args.kp, Args.ki, Args.kd)
    for update, later in zip(updates[:-1], losses[1:], strict=True):
        again.update(update.error)
        assert later.lagrange_multiplier == pytest.approx(again.multiplier)
    assert again.multiplier > 0


def test_threshold_is_the_limit_spent_evenly_and_discounted(tmp_path, monkeypatch, ball_file):
    calls = []
    record(monkeypatch, calls, offline_pretrain, "bear_loss")
    record(monkeypatch, calls, CriticPID, "update")
    no_evaluation(monkeypatch)
    train(tmp_path / "x", ball_file, update_steps=3, cost_limit=12.0, gamma=0.98)
    threshold = sum(12 / 200 * 0.98**t for t in range(200))
    for loss, update in zip(of(calls, "bear_loss"), of(calls, "update"), strict=True):
        assert update.error == pytest.approx(float(loss.result[1]) - threshold)


def test_weight_of_the_mmd_rises_above_its_limit_and_falls_below(tmp_path, monkeypatch, ball_file):
    no_evaluation(monkeypatch)
    low, high = (train(tmp_path / str(limit), ball_file, update_steps=10, mmd_limit=limit)
                 for limit in (0.0, 10.0))
    way = 10 * Args.critic_lr  # Adam's steps have about the learning rate's size
    assert float(low["log_mmd_weight"]) == pytest.approx(way, rel=0.2)
    assert float(high["log_mmd_weight"]) == pytest.approx(-way, rel=0.2)


def test_checkpoint_holds_the_multiplier_and_the_weight_that_the_log_ends_with(run):
    multiplier = run.checkpoint["lagrange_multiplier"]
    assert isinstance(multiplier, float) and multiplier > 0
    assert multiplier == pytest.approx(run.metrics["lagrange_multiplier"][-1], rel=1e-5)
    weight = float(run.checkpoint["log_mmd_weight"].exp())
    assert weight == pytest.approx(run.metrics["mmd_weight"][-1], rel=1e-5) != 1
    assert all(np.isfinite(run.metrics[name]).all() for name in NUMBERS)


def test_run_is_repeatable_and_updates_every_network(tmp_path, ball_file, run):
    torch.manual_seed(0)
    fresh = {"actor": Actor(8, 2), "q": offline_pretrain.Critic(2, 8, 2),
             "qc": offline_pretrain.Critic(1, 8, 2), "vae": offline_pretrain.VAE(8, 2)}
    options = dict(cost_limit=0.0, gamma=0.9, bear_actions=3, tau=0.03)
    again = train(tmp_path / "again", ball_file, **options)
    assert (tmp_path / "again/metrics.csv").read_bytes() == (run.dir / "metrics.csv").read_bytes()
    first, second = ({name: state[name] for name in fresh} for state in (run.checkpoint, again))
    assert same(parameters(first), parameters(second))
    for name, network in fresh.items():
        for key, value in network.state_dict().items():
            assert not torch.equal(value, first[name][key]), (name, key)


def test_finetuning_starts_from_the_checkpoint(tmp_path, monkeypatch, ball_file):
    no_evaluation(monkeypatch)
    train(tmp_path / "offline", ball_file, update_steps=5)
    options = {**TINY_MARVEL, "total_timesteps": 200, "checkpoint": str(tmp_path / "offline/checkpoint.pt"),
               "dataset_path": str(ball_file), "run_dir": str(tmp_path / "online")}
    marvel_sac_pid.main(marvel_sac_pid.Args(**options))
    assert len(read_metrics(tmp_path / "online/metrics.csv")["episode_return"]) == 1


# --- Learning ---
def bandit(path, n=2000):
    """Episodes of one step, actions uniform in [-0.6, 0.6]^2; reward a_1, cost 10 where a_1 > 0.2."""
    rng = np.random.default_rng(0)
    obs, act = rng.normal(size=(2, n, 8)), rng.uniform(-0.6, 0.6, (n, 2))
    write_dataset(path, dict(
        observations=obs[0], next_observations=obs[1], actions=act, rewards=act[:, 0],
        costs=10 * (act[:, 0] > 0.2), terminals=np.ones(n), timeouts=np.zeros(n)), {"task": TASK})
    return path


@pytest.fixture
def learned(tmp_path, monkeypatch):
    """learned(**options): the mean of the first action after training on the bandit."""
    no_evaluation(monkeypatch)
    dataset = bandit(tmp_path / "bandit.hdf5")

    def first_action(**options):
        # the threshold is 100 / 200 / (1 - 0.5) = 1, a tenth of what an unsafe action costs
        checkpoint = train(tmp_path / "run", dataset, update_steps=300, batch_size=64, reward_scale=0.2,
                           gamma=0.5, cost_limit=100.0, critic_lr=1e-2, actor_lr=2e-3, overwrite=True,
                           **options)
        actor = Actor(8, 2)
        actor.load_state_dict(checkpoint["actor"])
        with torch.no_grad():
            return actor.gaussian(torch.randn(500, 8))[0].tanh().mean(0)[0].item()

    return first_action


def test_multiplier_keeps_the_policy_safe_and_the_mmd_keeps_it_in_the_data(learned):
    """The data's mean action is 0; an MMD of 0.05 allows 0.35 more, of which the constraint leaves 0.2."""
    no_multiplier = dict(kp=0.0, ki=0.0, kd=0.0)
    safe, greedy, timid = learned(), learned(**no_multiplier), learned(**no_multiplier, mmd_limit=0.0)
    assert -0.2 < safe < 0.2 and -0.2 < timid < 0.2, (safe, timid)
    assert 0.3 < greedy < 0.6
