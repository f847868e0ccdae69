"""JSRL, PEX, SO2, RLPD and Marvel on TD3: what makes each the method it is. The rest is in test_wiring."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import norm
from tiny import (
    HORIZON,
    ONLINE,
    SOURCE,
    StubActor,
    constant_actor,
    evaluation_of,
    new_run,
    of,
    options_of,
    run,
    start_from,
    steps_of,
)

import marvel_sac_pid
from benchmark.baselines import jsrl, marvel_td3_pid, pex, rlpd, so2

OFFLINE_U = (0.5, -0.3)  # the offline policy always plays tanh of it, nearly


def by_the_offline_policy(actions):
    """Which of a run's actions are the offline policy's; a random network's are not by chance."""
    return np.abs(actions - np.tanh(OFFLINE_U)).max(1) < 0.03


def random_batch(n, obs_dim=3):
    """Transitions of which every third is a terminal."""
    torch.manual_seed(0)
    return {"next_observations": torch.randn(n, obs_dim), "rewards": torch.randn(n), "costs": torch.rand(n),
            "terminals": (torch.arange(n) % 3 == 0).float(), "timeouts": torch.zeros(n)}


# --- JSRL ---
@pytest.mark.parametrize(("env_steps", "annealing_steps", "expected"), [
    (0, 1000, 200), (250, 1000, 150), (500, 1000, 100), (999, 1000, 1), (1000, 1000, 0), (5000, 1000, 0),
    (0, 0, 0), (400, 0, 0)])
def test_guide_begins_with_whole_episodes_and_ends_with_none(env_steps, annealing_steps, expected):
    assert jsrl.guide_steps(env_steps, annealing_steps, 200) == expected


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_guide_acts_first_and_for_fewer_and_fewer_steps(share):
    result = new_run("jsrl", checkpoint=start_from(OFFLINE_U, source="bear_lag"), total_timesteps=80,
                     jump_start_share=share, utd=1e-9)
    guided = by_the_offline_policy(steps_of(result)["actions"])
    ends = result.metrics["env_steps"].astype(int)
    for begin, end in zip([0, *ends[:-1]], ends, strict=True):
        h = math.ceil(HORIZON * (1 - begin / (share * 80))) if begin < share * 80 else 0
        assert guided[begin:end].tolist() == [k < h for k in range(end - begin)]


# --- PEX ---
def by_hand(q, qc, obs, act, multiplier):
    """The Lagrangian of one action of one state, as a number."""
    obs, act = torch.tensor(obs)[None], torch.tensor(act)[None]
    with torch.no_grad():
        return (min(q(obs, act).flatten().tolist()) - multiplier * float(qc(obs, act))) / (1 + multiplier)


@pytest.fixture
def composed():
    """composed(multiplier, temperature): critics and the policy of two that play tanh(-1) and tanh(1)."""
    torch.manual_seed(2)
    q, qc = pex.Critic(2, 3, 1), pex.Critic(1, 3, 1)
    actors = [constant_actor(pex, [u], [-5.0], obs_dim=3) for u in (-1.0, 1.0)]
    return q, qc, lambda multiplier, temperature: pex.composed_policy(*actors, q, qc, multiplier, temperature)


def test_choice_is_a_softmax_of_the_penalised_values():
    q, qc = torch.tensor([[1.0], [2.0]]), torch.tensor([[0.0], [3.0]])
    for multiplier, temperature in [(0.0, 0.5), (0.2, 0.5), (0.5, 0.5), (0.5, 2.0)]:
        old = math.exp(1 / (1 + multiplier) / temperature)
        new = math.exp((2 - multiplier * 3) / (1 + multiplier) / temperature)
        expected = [old / (old + new), new / (old + new)]
        chosen = pex.choice_probabilities(q, qc, multiplier, temperature)
        np.testing.assert_allclose(chosen.flatten(), expected, rtol=1e-5)
    assert chosen[0] > chosen[1]  # the new policy earns more and costs too much for it


@pytest.mark.parametrize("multiplier", [0.0, 0.7])
def test_composed_policy_draws_in_the_softmaxs_frequencies(composed, multiplier):
    q, qc, policy = composed
    obs, n, rng = np.array([0.3, -0.2, 0.5], np.float32), 2000, np.random.default_rng(0)
    low, high = (by_hand(q, qc, obs, [math.tanh(u)], multiplier) for u in (-1.0, 1.0))
    temperature = abs(high - low)  # so that the better one has the probability 1 / (1 + 1 / e)
    act = policy(multiplier, temperature)
    drawn = np.array([act(obs, rng)[0] for _ in range(n)])
    expected = 1 / (1 + math.exp((low - high) / temperature))
    assert (drawn > 0).mean() == pytest.approx(expected, abs=4 * math.sqrt(0.25 / n))
    assert np.abs(np.abs(drawn) - math.tanh(1)).max() < 0.02
    assert len(set(drawn)) > 0.9 * n  # samples of the policies, not their means


def test_composed_policys_mean_action_is_the_better_of_both_means_by_the_critics_of_the_moment(composed):
    q, qc, policy = composed
    act, won = policy(0.4, 0.1), []
    for obs in np.random.default_rng(0).normal(0, 2, (50, 3)).astype(np.float32):
        values = [by_hand(q, qc, obs, [math.tanh(u)], 0.4) for u in (-1.0, 1.0)]
        won.append(np.argmax(values))
        assert act(obs)[0] == pytest.approx(math.tanh([-1.0, 1.0][won[-1]]), abs=1e-6)
        with torch.no_grad():
            q.weights[2].neg_()  # for the next state
            qc.weights[2].neg_()
    assert set(won) == {0, 1}


def test_composed_targets_are_the_expectation_over_the_choice_with_the_new_policys_entropy():
    batch = random_batch(12)
    q, qc = pex.Critic(2, 3, 1), pex.Critic(1, 3, 1)
    proposals = torch.rand(2, 12, 1) * 2 - 1
    log_prob = torch.randn(12)
    y, yc = pex.composed_targets(batch, lambda obs: (proposals[0], torch.full((12,), 99.0)),
                                 lambda obs: (proposals[1], log_prob), q, qc, 0.9, 0.3, 0.6, 0.05, 1.0)
    assert not y.requires_grad and not yc.requires_grad
    for k in range(12):
        obs, values, q_values, qc_values = batch["next_observations"][k : k + 1], [], [], []
        for proposal in proposals[:, k]:
            q_values.append(min(q(obs, proposal[None]).flatten().tolist()))
            qc_values.append(qc(obs, proposal[None]).item())
            values.append((q_values[-1] - 0.6 * qc_values[-1]) / 1.6)
        new = 1 / (1 + math.exp((values[0] - values[1]) / 0.05))
        value = (1 - new) * q_values[0] + new * (q_values[1] - 0.3 * float(log_prob[k]))
        cost = min(max(0.0, (1 - new) * qc_values[0] + new * qc_values[1]), 1.0 / (1 - 0.9))
        go_on = 0.0 if k % 3 == 0 else 0.9
        assert float(y[k]) == pytest.approx(float(batch["rewards"][k]) + go_on * value, abs=1e-5)
        assert float(yc[k]) == pytest.approx(float(batch["costs"][k]) + go_on * cost, abs=1e-5)


@pytest.mark.parametrize("winner", [0, 1])
def test_chosen_policy_is_the_one_that_plays_and_is_evaluated(monkeypatch, winner):
    monkeypatch.setattr(pex, "choice_probabilities",
                        lambda q, *_: torch.eye(2)[winner].reshape(2, *[1] * (q.ndim - 1)).expand_as(q))
    result = new_run("pex", checkpoint=start_from(OFFLINE_U, source="bear_lag"))
    assert set(by_the_offline_policy(steps_of(result)["actions"])) == {winner == 0}
    expected = evaluation_of(result, result.checkpoint[("offline_actor", "new_actor")[winner]])
    for what in ("eval_mean_return", "eval_mean_cost"):
        assert result.metrics[what][-1] == pytest.approx(expected[what], rel=1e-5)


def test_choice_and_targets_use_the_multiplier_of_their_block():
    """A block is played under the multiplier so far, and the last policy evaluated under the last one."""
    result = new_run("pex", temperature=0.2, lagrange_init=0.5, eval_every=10**9)
    logged = result.metrics["lagrange_multiplier"]
    lengths = np.diff(result.metrics["env_steps"], prepend=0).astype(int)
    targets, policies = of(result, "composed_targets"), of(result, "composed_policy")
    assert {call.temperature for call in [*targets, *policies]} == {0.2}
    for calls, expected in (targets, np.repeat(logged, lengths)), (policies, [0.5, *logged]):
        np.testing.assert_allclose([call.lagrange_multiplier for call in calls], expected, rtol=1e-5)


# --- SO2 ---
class Recorder:
    """Two critics of the first action, 3 a and 2 a + 1; it keeps the actions that it was asked about."""

    def __call__(self, obs, act):
        self.act = act.clone()
        return torch.stack([3 * act[:, 0], 2 * act[:, 0] + 1])


def noise_at(action, n=20_000, std=0.3, clip=0.6):
    """The target actions (n, act_dim) that perturbed_targets asks both critics about."""
    torch.manual_seed(0)
    act, q, qc = torch.tensor(action).expand(n, -1), Recorder(), Recorder()
    so2.perturbed_targets(random_batch(n), lambda obs: (act, torch.zeros(n)), q, qc, 0.9, 0.1, std, clip, 1.0)
    assert torch.equal(q.act, qc.act)
    return q.act.numpy()


def test_target_noise_is_a_clipped_gaussian_for_every_action_by_itself():
    noise = noise_at([0.0, 0.3, -0.1]) - np.float32([0.0, 0.3, -0.1])
    assert np.abs(noise).max() <= 0.6 + 1e-6
    assert (np.abs(noise) > 0.6 - 1e-6).mean() == pytest.approx(2 * norm.sf(2), abs=0.005)
    for quantile in (0.1, 0.25, 0.5, 0.75, 0.9):
        np.testing.assert_allclose(np.quantile(noise, quantile, axis=0), 0.3 * norm.ppf(quantile), atol=0.015)
    assert np.abs(np.corrcoef(noise.T) - np.eye(3)).max() < 0.03


def test_perturbed_target_actions_stay_within_the_box():
    actions = noise_at([0.95, -0.8])
    assert np.abs(actions).max() <= 1
    assert (actions[:, 0] == 1).mean() == pytest.approx(norm.sf(0.05 / 0.3), abs=0.02)
    assert actions[:, 0].min() >= 0.35 - 1e-6 and actions[:, 1].max() <= -0.2 + 1e-6
    for without_noise in (dict(std=0.0), dict(clip=0.0)):
        np.testing.assert_array_equal(noise_at([0.5], n=9, **without_noise), np.full((9, 1), np.float32(0.5)))


def test_perturbed_targets_are_values_of_the_noisy_action_with_the_policys_entropy():
    batch, log_prob, q = random_batch(12, obs_dim=1), torch.randn(12), Recorder()
    actor = StubActor(log_prob.tolist())
    y, yc = so2.perturbed_targets(batch, actor, q, lambda obs, act: 5 * act.T, 0.9, 0.3, 0.2, 0.35, 0.2)
    a = q.act[:, 0]
    go_on = 0.9 * (torch.arange(12) % 3 != 0)
    value = torch.minimum(3 * a, 2 * a + 1) - 0.3 * log_prob
    torch.testing.assert_close(y, batch["rewards"] + go_on * value)
    torch.testing.assert_close(yc, batch["costs"] + go_on * (5 * a).clamp(0, 2))


def test_every_update_of_the_critics_has_a_batch_and_noise_of_its_own():
    calls = of(run("so2"), "perturbed_targets")
    assert {(call.noise_std, call.noise_clip) for call in calls} == {(0.2, 0.5)}
    assert len({call.batch["observations"].numpy().tobytes() for call in calls}) == len(calls)


# --- RLPD ---
def test_critics_layers_are_normalised_before_their_activation():
    """By numpy, network by network: z of mean 0 and variance 1 over a layer's units, then scale and shift."""
    torch.manual_seed(0)
    critic = rlpd.Critic(2, 3, 1)
    with torch.no_grad():
        for parameter in [*critic.scales, *critic.shifts]:
            parameter += torch.randn_like(parameter)
    obs, act = torch.randn(5, 3), torch.randn(5, 1)
    with torch.no_grad():
        values = critic(obs, act).numpy()
    weights, biases, scales, shifts = (
        [x.detach().numpy() for x in group]
        for group in (critic.weights, critic.biases, critic.scales, critic.shifts))
    for k in range(2):
        x = np.concatenate([obs, act], 1)
        for layer in range(2):
            z = x @ weights[layer][k] + biases[layer][k]
            z = (z - z.mean(1, keepdims=True)) / np.sqrt(z.var(1, keepdims=True) + 1e-5)
            x = np.maximum(z * scales[layer][k] + shifts[layer][k], 0)
        np.testing.assert_allclose(values[k], (x @ weights[2][k] + biases[2][k])[:, 0], atol=1e-5)


def test_normalised_critics_stay_bounded_far_from_the_data():
    """A hundred times as far, a plain critic's values grow about a hundred times: these hardly do."""
    torch.manual_seed(0)
    obs, act = torch.randn(64, 3), torch.randn(64, 1)
    for script, low, high in (rlpd, 0.0, 3.0), (pex, 20.0, 200.0):
        critic = script.Critic(1, 3, 1)
        with torch.no_grad():
            near, far = critic(obs, act).std(), critic(100 * obs, 100 * act).std()
        assert low < float(far / near) < high


def test_marvels_script_refuses_critics_that_are_normalised(refusal, tmp_path):
    options = {**options_of("marvel"), "checkpoint": f"{run('rlpd').args.run_dir}/checkpoint.pt"}
    args = marvel_sac_pid.Args(**{**options, "run_dir": str(tmp_path / "run")})
    assert "q is another network, it differs in ['scales.0'" in refusal(marvel_sac_pid.main, args)


# --- TD3 ---
def test_smoothed_targets_are_values_at_the_mean_action_and_clipped_noise():
    """The policy's own noise, large here, has no part in them."""
    actor = constant_actor(marvel_td3_pid, [math.atanh(0.3)], [1.0])
    n = 20_000
    batch, q = random_batch(n, obs_dim=1), Recorder()
    y, yc = marvel_td3_pid.smoothed_targets(batch, actor, q, lambda obs, act: 5 * act.T, 0.9, 0.2, 0.5, 0.2)
    a = q.act[:, 0]
    noise = (a - 0.3).numpy()
    assert np.abs(noise).max() <= 0.5 + 1e-6
    for quantile in (0.1, 0.25, 0.5, 0.75, 0.9):
        assert np.quantile(noise, quantile) == pytest.approx(0.2 * norm.ppf(quantile), abs=0.01)
    go_on = 0.9 * (torch.arange(n) % 3 != 0)
    torch.testing.assert_close(y, batch["rewards"] + go_on * torch.minimum(3 * a, 2 * a + 1))
    torch.testing.assert_close(yc, batch["costs"] + go_on * (5 * a).clamp(0, 2))
    marvel_td3_pid.smoothed_targets(batch, actor, q, lambda obs, act: 5 * act.T, 0.9, 5.0, 9.0, 0.2)
    assert float(q.act.min()) == -1 and float(q.act.max()) == 1


def test_deterministic_actor_climbs_the_penalised_value_at_its_mean_action():
    """d/du of -(min Q - 0.5 Qc) / 1.5 at a = tanh(u) by hand, Q = 3 a and 2 a + 1, Qc = a^2."""
    actor = constant_actor(marvel_td3_pid, [0.4], [1.0])
    obs = torch.zeros(7, 1)
    loss = marvel_td3_pid.actor_loss(obs, actor, Recorder(), lambda obs, act: (act**2).T, 0.5)
    a = math.tanh(0.4)
    assert loss.item() == pytest.approx(-(min(3 * a, 2 * a + 1) - 0.5 * a**2) / 1.5, abs=1e-5)
    loss.backward()
    slope = 3.0 - 0.5 * 2 * a  # 3 a is the smaller one
    by_mean, by_log_std = actor.head.bias.grad.tolist()
    assert by_mean == pytest.approx(-slope * (1 - a**2) / 1.5, abs=1e-5)
    assert by_log_std == 0


def test_td3_starts_from_the_offline_policys_mean_with_its_own_noise():
    begun, before = new_run("td3", total_timesteps=0).checkpoint, run(SOURCE["td3"]).checkpoint
    obs = torch.randn(9, 3)
    for name in ("actor", "trained_actor"):
        policies = []
        for weights in (begun[name], before["actor"]):
            policy = marvel_td3_pid.Actor(3, 2)
            policy.load_state_dict(weights)
            policies.append(policy.gaussian(obs))
        assert torch.equal(policies[0][0], policies[1][0])
        torch.testing.assert_close(policies[0][1], torch.full((9, 2), math.log(0.1)))
    for name in ("q", "qc"):  # the critics are those of VPA
        assert not torch.equal(begun[name]["weights.0"], before[name]["weights.0"])


def test_td3_keeps_the_size_of_its_noise_and_plays_it():
    result = new_run("td3", exploration_noise=0.3, actor_lr=0.01)
    for name in ("actor", "trained_actor"):
        weights = result.checkpoint[name]
        assert (weights["head.weight"][2:] == 0).all()
        torch.testing.assert_close(weights["head.bias"][2:], torch.full((2,), math.log(0.3)))
    still = new_run("td3", exploration_noise=0.3, actor_lr=0.0, total_timesteps=2000, utd=1e-9,
                    checkpoint=start_from((0.5, -0.3)))
    u = np.arctanh(steps_of(still)["actions"])
    np.testing.assert_allclose(u.mean(0), (0.5, -0.3), atol=0.03)
    np.testing.assert_allclose(u.std(0), 0.3, atol=0.02)


def test_td3s_actor_and_its_average_step_once_every_policy_delay_and_the_multiplier_counts_those():
    result = new_run("td3", policy_delay=3, multiplier="dual", lagrange_init=0.5, cost_margin=0.0)
    lengths = np.diff(result.metrics["env_steps"], prepend=0).astype(int)
    steps = np.ceil(lengths / 3).astype(int)  # a gradient step of the critics per environment step
    losses = of(result, "actor_loss")
    assert len(losses) == steps.sum()
    np.testing.assert_allclose([call.lagrange_multiplier for call in losses],
                               np.repeat(result.metrics["lagrange_multiplier"], steps), rtol=1e-5)
    expected, multiplier, unit = [], 0.5, result.checkpoint["controller"]["unit"]
    for cost, n in zip(result.metrics["episode_cost"], steps, strict=True):
        multiplier = max(0.0, multiplier + unit * ONLINE["ki"] * n * (cost - 2.0) / 2.0)
        expected.append(multiplier)
    np.testing.assert_allclose(result.metrics["lagrange_multiplier"], expected, rtol=1e-5)
    average = losses[0].actor_parameters
    for call in losses[1:]:
        average = (1 - ONLINE["actor_tau"]) * average + ONLINE["actor_tau"] * call.actor_parameters
    assert len(of(result, "critic_loss")) == lengths.sum() + 12  # VPA's 12
    targets = of(result, "smoothed_targets")[12:]
    assert {id(call.actor) for call in targets}.isdisjoint({id(call.actor) for call in losses})
    before_the_last = targets[-1 - (lengths[-1] - 1) % 3]  # the targets of the actor's last step
    torch.testing.assert_close(before_the_last.actor_parameters, average)


def test_td3s_target_critics_follow_with_the_actor_and_its_noise_is_that_of_the_options():
    """Of a block's critic updates number 0, 3, 6 ... move the targets, which the next ones show."""
    result = new_run("td3", policy_delay=3)
    targets, losses = of(result, "smoothed_targets"), of(result, "critic_loss")
    assert {(call.noise_std, call.noise_clip) for call in targets} == {(0.25, 0.4)}  # VPA's too
    lengths = np.diff(result.metrics["env_steps"], prepend=0).astype(int)
    moves = [k % 3 == 0 for n in lengths for k in range(n)]
    for now, later, critics, moved in zip(targets[12:-1], targets[13:], losses[13:], moves, strict=False):
        expected = now.q_target_parameters
        if moved:  # by a step of tau to the critic, whose parameters the next loss shows
            expected = 0.99 * expected + 0.01 * critics.q_parameters
        torch.testing.assert_close(later.q_target_parameters, expected)
    assert 0 < sum(moves) < len(moves)
