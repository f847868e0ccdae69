"""What every script's `main` hands to its functions, in which order, and what becomes of it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import parameters, same
from scipy.stats import kstest
from tiny import (
    ACT_DIM,
    BOTH,
    HORIZON,
    KINDS,
    OFFLINE,
    ONLINE,
    SOURCE,
    VPA,
    Ledger,
    dataset,
    evaluation_of,
    new_run,
    of,
    options_of,
    record,
    rows_of,
    run,
    snapshot,
    start_from,
    steps_of,
)

import common
import marvel_sac_pid

ONLINE_KINDS = ("marvel", "rollouts", "scratch", "jsrl", "pex", "so2", "rlpd", "td3")
VPA_ROLLOUTS = 20  # two episodes, the first that reach 15 steps
CRITIC_UPDATES = {"so2": 3}  # per gradient step
COST_LIMIT = 2.0
FIRST_TARGET = COST_LIMIT - 0.25 * np.sqrt(19 / 20)  # what the multiplier aims at after one episode
ONE_EPISODE = dict(total_timesteps=1, vpa_steps=0)  # no pre-alignment either
WITHOUT_LEARNING = dict(actor_lr=0.0, critic_lr=0.0, vpa_steps=0)


def kinds(*names):
    return pytest.mark.parametrize("kind", names)


def equal(one, other):
    """Whether two networks in checkpoints are the same."""
    return same(parameters({"": one}), parameters({"": other}))


def flat(weights):
    """What `snapshot` gives of a network with these weights of a checkpoint."""
    return torch.cat([values.flatten() for values in weights.values()])[::29]


def vpa_steps(kind):
    """Gradient steps before the online ones in the run of a kind."""
    return VPA["vpa_steps"] if kind in ("marvel", "rollouts", "td3") else 0


def blocks(kind, result=None, function="critic_loss"):
    """(steps before, steps after, calls of a function of critic updates) of every block of one episode."""
    result = result or run(kind)
    calls, before = of(result, function)[vpa_steps(kind):], 0
    waits = {"rollouts": VPA_ROLLOUTS + 1, "scratch": 15, "jsrl": 15, "rlpd": 15}.get(kind, 0)
    for after in result.metrics["env_steps"].astype(int):
        n = (after - before) * CRITIC_UPDATES.get(kind, 1) if after >= waits else 0
        yield before, after, calls[:n]
        calls, before = calls[n:], after
    assert n > 0 and not calls


# --- Every script ---
@kinds(*(kind for kind in KINDS if kind != "released"))
def test_seed_fixes_every_number(kind):
    first = run(kind)
    np.random.seed(1)
    torch.manual_seed(1)
    again, other = new_run(kind), new_run(kind, seed=1)
    texts = [Path(result.args.run_dir, "metrics.csv").read_bytes() for result in (first, again, other)]
    assert texts[0] == texts[1] != texts[2]
    actor = "new_actor" if kind == "pex" else "actor"
    for name in (actor, "q", "qc"):
        assert equal(first.checkpoint[name], again.checkpoint[name])
    assert not equal(again.checkpoint[actor], other.checkpoint[actor])


@kinds(*(kind for kind in KINDS if kind != "released"))
def test_optimisers_take_the_steps_that_are_asked_for(kind):
    """One gradient step per environment step here, once the script learns."""
    result = run(kind)
    expected = {}
    if kind in ("offline", "cpq", "bear_lag", "bc_safe"):
        steps = OFFLINE["update_steps"]
    else:
        critic_updates = sum(len(calls) for _, _, calls in blocks(kind))
        steps = critic_updates // CRITIC_UPDATES.get(kind, 1)
        assert steps > 20
        expected = {"critic_optimizer": critic_updates + vpa_steps(kind)}
    for name, value in result.checkpoint.items():
        if name.endswith("_optimizer"):
            taken = {int(state["step"]) for state in value["state"].values()}
            assert taken == {expected.get(name, steps)}, name


@kinds("offline", "cpq", "bear_lag", "bc_safe", "marvel", "rollouts", "scratch", "jsrl", "so2", "rlpd", "td3")
def test_last_evaluation_is_of_the_final_policy(kind):
    result = run(kind)
    expected = evaluation_of(result, result.checkpoint["actor"])
    assert expected["eval_sampled_return"] != expected["eval_mean_return"]
    assert {name: result.metrics[name][-1] for name in expected} == pytest.approx(expected, rel=1e-4)
    *_, last = result.checkpoint["evaluations"].values()
    assert last == pytest.approx(expected, rel=1e-6)


@kinds("marvel", "rollouts", "jsrl", "pex", "so2")
def test_online_run_begins_with_the_evaluation_of_the_offline_policy(kind):
    expected = evaluation_of(run(kind), run(SOURCE[kind]).checkpoint["actor"])
    assert run(kind).checkpoint["evaluations"]["offline policy"] == pytest.approx(expected, rel=1e-6)


@kinds(*ONLINE_KINDS)
def test_evaluations_come_at_the_first_end_of_a_block_after_every_eval_every_steps(kind):
    metrics = run(kind).metrics
    passed = np.diff(metrics["env_steps"] // ONLINE["eval_every"], prepend=0) > 0
    passed[-1] = True
    passed &= np.isfinite(metrics["lagrange_multiplier"])  # not in the rollouts for VPA
    assert np.isfinite(metrics["eval_mean_return"]).tolist() == passed.tolist()


# --- Target networks ---
def brief(kind):
    """Runs of a kind with no, one and two gradient steps."""
    if kind == "bear_lag":
        return run(kind, tau=0.0, update_steps=1), *(run(kind, tau=0.3, update_steps=n) for n in (1, 2))
    if kind in ("offline", "cpq"):
        return run(kind, tau=0.0, qc_tau=0.0, update_steps=1), \
            *(run(kind, tau=0.3, qc_tau=0.6, update_steps=n) for n in (1, 2))
    if kind == "vpa":
        return [run("marvel", vpa_tau=0.3, vpa_steps=n, total_timesteps=0) for n in (0, 1, 2)]
    options = dict(total_timesteps=1, tau=0.3, ki=0.0)  # or the multiplier would depend on their number
    options |= {"so2": dict(critic_updates=1)}.get(kind, {})
    options |= dict(vpa_steps=0) if kind in ("marvel", "td3") else {}
    options |= dict(learning_starts=1) if kind in ("scratch", "jsrl", "rlpd") else {}
    start = run(kind, **options, utd=1e-9)
    (steps,) = start.metrics["env_steps"]
    return start, *(run(kind, **options, utd=(n + 0.5) / steps) for n in (1, 2))


@kinds("offline", "cpq", "bear_lag", "vpa", "marvel", "scratch", "jsrl", "pex", "so2", "rlpd", "td3")
def test_target_networks_go_the_share_tau_of_the_way_after_every_step(kind):
    start, *later = (result.checkpoint for result in brief(kind))
    targets = [name for name in start if name.endswith("_target")]
    assert {"q_target", "qc_target"} <= set(targets)
    for name in targets:
        before = start[name]
        share = 0.6 if name == "qc_target" and kind in ("offline", "cpq") else 0.3
        for checkpoint in later:
            for key, now in checkpoint[name].items():
                goal = checkpoint[name.removesuffix("_target")][key]
                assert (goal - before[key]).abs().max() > 0
                torch.testing.assert_close(now, (1 - share) * before[key] + share * goal)
            before = checkpoint[name]


@kinds("offline", "cpq")
def test_policy_is_the_mean_of_the_first_trained_actors_and_then_a_moving_average(kind):
    """Step 0.4: the mean of one and of two actors, then 0.6 of what it was and 0.4 of the trained one."""
    checkpoints = [run(kind, actor_tau=0.4, update_steps=n).checkpoint for n in (1, 2, 3)]
    for key in checkpoints[0]["actor"]:
        one, two, three = (checkpoint["trained_actor"][key] for checkpoint in checkpoints)
        expected = [one, (one + two) / 2, 0.6 * (one + two) / 2 + 0.4 * three]
        for checkpoint, value in zip(checkpoints, expected, strict=True):
            torch.testing.assert_close(checkpoint["actor"][key], value)
        assert not torch.equal(two, three)


@kinds(*ONLINE_KINDS)
def test_online_policy_is_a_moving_average_of_the_trained_actor(kind):
    """Each step takes it 0.3 of the way to the trained actor, whose parameters the next loss shows."""
    result = new_run(kind, actor_tau=0.3)
    trained = [call.actor_parameters for call in of(result, "actor_loss")]
    assert len(trained) > 10 and not torch.equal(trained[0], trained[-1])
    average = trained[0]  # both are the same before the first step
    for after in [*trained[1:], flat(result.checkpoint["trained_actor"])]:
        average = 0.7 * average + 0.3 * after
    policy = result.checkpoint["new_actor" if kind == "pex" else "actor"]
    torch.testing.assert_close(flat(policy), average)


@kinds("marvel", "so2", "released", "td3")
def test_finetuning_plays_the_average_not_the_trained_actor(kind):
    """A step of almost nothing leaves the policy where it began, wherever the trained actor goes."""
    result = new_run(kind, actor_tau=1e-9, checkpoint=start_from((0.5, -0.3)))
    assert np.abs(steps_of(result)["actions"] - np.tanh([0.5, -0.3])).mean() < 0.1
    assert not equal(result.checkpoint["trained_actor"], result.checkpoint["actor"])
    ended = result.checkpoint["evaluations"]["after finetuning"]
    assert ended == evaluation_of(result, result.checkpoint["actor"])
    assert ended != evaluation_of(result, result.checkpoint["trained_actor"])


# --- What a gradient step is made of ---
@kinds("offline", "cpq", "bear_lag", *ONLINE_KINDS)
def test_critics_step_has_its_own_targets_of_one_batch(kind):
    result = run(kind)
    for targets, critics in zip(of(result, "_targets"), of(result, "critic_loss"), strict=True):
        assert all(torch.equal(critics.batch[key], value) for key, value in targets.batch.items())
        assert torch.equal(critics.q_target_value, targets.result[0])
        assert torch.equal(critics.qc_target_value, targets.result[1])
        assert targets.q_target is not critics.q and targets.qc_target is not critics.qc
        assert targets.gamma == BOTH["gamma"]


@kinds("offline", "cpq", "bear_lag", *ONLINE_KINDS)
def test_bound_of_qc_is_of_the_largest_cost_so_far(kind, monkeypatch):
    """The dataset's costs are 0 and 1; those of the k-th step online are 0 and k."""
    step = Ledger.step

    def dearer(self, action):
        obs, reward, terminated, truncated, info = step(self, action)
        return obs, reward, terminated, truncated, {"cost": info["cost"] * len(self.steps)}

    options = options_of(kind)  # before the costs rise: it runs what the kind starts from
    monkeypatch.setattr(Ledger, "step", dearer)
    result = new_run(kind, **options)
    if kind in ("offline", "cpq", "bear_lag"):
        assert {call.largest_cost for call in of(result, "_targets")} == {1.0}
        return
    costs = result.checkpoint["buffer"]["costs"]
    at_first = {"rollouts": float(costs[:VPA_ROLLOUTS].max()), "scratch": 0.0, "jsrl": 0.0}.get(kind, 1.0)
    for call in of(result, "_targets")[:vpa_steps(kind)]:
        assert call.largest_cost == at_first
    seen = set()
    for _, after, calls in blocks(kind, result, "_targets"):
        largest = max(at_first, float(costs[:after].max()))
        assert [call.largest_cost for call in calls] == [largest] * len(calls)
        seen.add(largest)
    assert len(seen) > 2


@kinds("offline", "cpq", "bear_lag", *ONLINE_KINDS)
def test_actor_follows_the_critics_as_the_same_step_has_left_them(kind):
    result = run(kind)
    actors = of(result, "actor_loss", "bear_loss")
    critics = of(result, "critic_loss")[-len(actors) * CRITIC_UPDATES.get(kind, 1):]
    critics = critics[CRITIC_UPDATES.get(kind, 1) - 1::CRITIC_UPDATES.get(kind, 1)]
    after = [*critics[1:], None] if kind != "so2" else [None] * len(critics)
    for critic, actor, later in zip(critics, actors, after, strict=True):
        obs = actor.obs if hasattr(actor, "obs") else actor.batch["observations"]
        assert torch.equal(obs, critic.batch["observations"])
        assert actor.q is critic.q and actor.qc is critic.qc
        assert not torch.equal(actor.q_parameters, critic.q_parameters)
        if later:
            assert torch.equal(actor.q_parameters, later.q_parameters)
    for name in ("q", "qc"):
        network = getattr(actors[-1], name)
        assert all(torch.equal(result.checkpoint[name][key], value)
                   for key, value in network.state_dict().items())


@kinds("marvel", "scratch", "jsrl", "pex", "so2", "rlpd")
def test_online_targets_are_of_the_current_policy_with_its_entropy_and_none_in_the_cost(kind):
    result = run(kind)
    updates = of(result, "actor_loss")
    every = CRITIC_UPDATES.get(kind, 1)
    for targets, update in zip(of(result, "_targets")[-len(updates) * every::every], updates, strict=True):
        assert targets.actor is update.actor
        assert torch.equal(targets.actor_parameters, update.actor_parameters)
        assert targets.alpha == update.alpha
        assert getattr(targets, "alpha_cost", 0.0) == 0.0
    assert updates[0].alpha == pytest.approx(ONLINE["alpha"])
    assert updates[1].alpha != updates[0].alpha
    assert result.metrics["alpha"][-1] == pytest.approx(float(updates[-1].alpha), rel=1e-5)
    assert not torch.equal(updates[0].actor_parameters, updates[-1].actor_parameters)


# --- The data ---
@kinds("jsrl", "pex", "so2")
def test_baseline_begins_with_the_offline_networks_it_is_meant_to(kind):
    before, begun = run(SOURCE[kind]).checkpoint, new_run(kind, total_timesteps=1, utd=1e-9).checkpoint
    critics = {name: name.removesuffix("_target") for name in ("q", "qc", "q_target", "qc_target")}
    taken = {"jsrl": {"guide": "actor"}, "pex": {"offline_actor": "actor", **critics}}
    taken = taken.get(kind, {"actor": "actor", **critics})
    for name in {"actor", "new_actor", "guide", "offline_actor", *critics} & begun.keys():
        source = taken.get(name, name.removeprefix("new_").removesuffix("_target"))
        assert equal(begun[name], before[source]) == (name in taken), name


@pytest.mark.parametrize(("kind", "name"), [("jsrl", "guide"), ("pex", "offline_actor")])
def test_offline_policy_stays_as_it_was_beside_the_one_that_learns(kind, name):
    assert equal(run(kind).checkpoint[name], run(SOURCE[kind]).checkpoint["actor"])
    # neither of PEX's two is the policy, so no other script takes one
    assert ("actor" in run(kind).checkpoint) == (kind == "jsrl")


@kinds("marvel", "jsrl", "pex", "so2", "td3")
def test_checkpoint_of_another_setting_is_refused(kind, refusal, tmp_path):
    script, _ = KINDS[kind]
    options = {**options_of(kind), "run_dir": str(tmp_path / "run")}
    for name, value in ("gamma", 0.9), ("reward_scale", 0.3):
        assert f"{name} is {options[name]}" in refusal(script.main, script.Args(**{**options, name: value}))
    assert not list(tmp_path.iterdir())


@kinds("bear_lag", "bc_safe")
def test_finetuning_starts_from_the_checkpoint_of_any_offline_script(kind):
    before = run(kind)
    after = new_run("marvel", total_timesteps=0, vpa_steps=0,
                    checkpoint=f"{before.args.run_dir}/checkpoint.pt")
    assert all(equal(after.checkpoint[name], before.checkpoint[name]) for name in ("actor", "q", "qc"))


@kinds(*ONLINE_KINDS)
def test_replay_and_log_hold_what_the_simulator_did(kind):
    result = run(kind)
    steps, metrics = steps_of(result), result.metrics
    for key, values in steps.items():
        scale = BOTH["reward_scale"] if key == "rewards" else 1
        np.testing.assert_allclose(result.checkpoint["buffer"][key], scale * values, rtol=1e-6, err_msg=key)
    assert steps["terminals"].any() and (steps["timeouts"] > steps["terminals"]).any()
    ends, returns, costs = common.episode_sums(steps)
    assert metrics["env_steps"].tolist() == (ends + 1).tolist()
    assert metrics["episode"].tolist() == list(range(1, len(ends) + 1))
    np.testing.assert_allclose(metrics["episode_return"], returns, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(metrics["episode_cost"], costs)
    np.testing.assert_allclose(metrics["cumulative_cost"], np.cumsum(costs))
    np.testing.assert_allclose(metrics["violation_regret"], np.cumsum(np.maximum(0, costs - 2.0)))
    np.testing.assert_allclose(metrics["normalized_cost"], costs / 2.0, rtol=1e-5)


def different(n, draws):
    """How many different ones of n are expected among so many draws."""
    return n * (1 - (1 - 1 / n) ** draws)


@kinds(*ONLINE_KINDS)
def test_online_critics_learn_from_all_of_the_replay_so_far(kind):
    """PEX, SO2 and RLPD take half of every batch from the dataset, the others nothing."""
    replay, n = steps_of(run(kind)), BOTH["batch_size"]
    for before, after, calls in blocks(kind):
        drawn = []
        for call in calls:
            rows, offline = rows_of(call.batch, replay), rows_of(call.batch, dataset()[0])
            assert ((rows >= 0) != (offline >= 0)).all()
            assert abs((offline >= 0).sum() - (n / 2 if kind in ("pex", "so2", "rlpd") else 0)) <= 0.5
            drawn += rows[rows >= 0].tolist()
        if calls:
            assert max(drawn) < after
            assert len(set(drawn)) > 0.8 * different(after, len(drawn))
            assert before <= max(drawn) or after - before < 4


@kinds("offline", "cpq", "bear_lag", "marvel", "rollouts", "td3")
def test_offline_critics_learn_from_the_dataset_alone(kind):
    """So do the critics in VPA, or from the first rollouts."""
    calls = of(run(kind), "critic_loss")[:vpa_steps(kind) or None]
    data = dataset()[0]
    if kind == "rollouts":
        data = {key: values[:VPA_ROLLOUTS] for key, values in steps_of(run(kind)).items()}
    rows = np.concatenate([rows_of(call.batch, data) for call in calls])
    assert rows.min() >= 0
    assert len(set(rows.tolist())) > 0.85 * different(len(data["rewards"]), len(rows))


def test_vpa_on_rollouts_plays_the_offline_policys_first_episodes_which_count():
    result = new_run("rollouts", checkpoint=start_from((0.5, -0.3)))
    assert np.abs(steps_of(result)["actions"][:VPA_ROLLOUTS] - np.tanh([0.5, -0.3])).mean() < 0.1
    assert result.metrics["env_steps"][:2].tolist() == [10, 20]
    assert np.isnan(result.metrics["lagrange_multiplier"]).tolist()[:3] == [True, True, False]


@kinds("scratch", "rlpd")
def test_scratch_explores_uniformly_until_learning_starts(monkeypatch, kind):
    monkeypatch.setattr(KINDS[kind][0].Actor, "numpy_policy",
                        lambda self: lambda obs, rng=None: np.full(ACT_DIM, 0.25, np.float32))
    actions = steps_of(new_run(kind, utd=1e-9, learning_starts=500, total_timesteps=520))["actions"]
    explored = actions[:500]
    for one in explored.T:
        assert kstest(one, "uniform", args=(-1, 2)).pvalue > 0.01
    assert abs(np.corrcoef(explored.T)[0, 1]) < 0.15
    assert len(actions) >= 520 and (actions[500:] == 0.25).all()


def test_finetuning_plays_the_policy_from_its_first_step():
    actions = steps_of(new_run("marvel", **WITHOUT_LEARNING, lagrange_init=0.5,
                               checkpoint=start_from((0.5, -0.3))))["actions"]
    assert np.abs(actions - np.tanh([0.5, -0.3])).mean() < 0.1  # uniform ones have half a unit and more
    assert actions.std(0).min() > 1e-3  # samples


# --- CPQ ---
def test_threshold_is_the_limit_spent_evenly_and_discounted():
    threshold = sum(OFFLINE["cost_limit"] / HORIZON * BOTH["gamma"] ** t for t in range(HORIZON))
    for call in of(run("cpq"), "cpq_targets", "ood_shortfall", "actor_loss"):
        assert call.qc_threshold == pytest.approx(threshold)


def test_actions_are_out_of_distribution_beyond_the_quantile_of_the_batchs_own_kl():
    result = run("cpq")
    for vae, ood, actor in zip(*(of(result, name) for name in ("VAE.loss", "ood_shortfall", "actor_loss")),
                               strict=True):
        assert ood.kl_threshold == pytest.approx(float(np.quantile(vae.result[1], 0.8)), rel=1e-5)
        assert torch.equal(ood.obs, actor.batch["observations"])
        assert (ood.n, actor.bc_weight) == (3, 0.2)
        assert ood.vae is vae.self and ood.qc is actor.qc and ood.actor is actor.actor


@kinds("cpq", "bear_lag")
def test_vae_learns_the_actions_of_the_batch(kind):
    result = run(kind, update_steps=60)
    for vae, critics in zip(of(result, "VAE.loss"), of(result, "critic_loss"), strict=True):
        assert torch.equal(vae.obs, critics.batch["observations"])
        assert torch.equal(vae.act, critics.batch["actions"])
        assert vae.beta == result.args.vae_beta
    losses = [float(call.result[0]) for call in of(result, "VAE.loss")]
    assert np.mean(losses[-10:]) < 0.9 * np.mean(losses[:10])


def test_penalty_raises_qc_of_the_policys_actions():
    obs, values = torch.from_numpy(dataset()[0]["observations"]), []
    for weight in (0.0, 5.0):
        call = of(new_run("cpq", ood_weight=weight, ood_quantile=0.0, update_steps=40), "actor_loss")[-1]
        with torch.no_grad():
            values.append(float(call.qc(obs, call.actor(obs)[0]).mean()))
    assert values[1] > values[0] + 0.1


# --- Entropy weight ---
@pytest.mark.parametrize(("log_std", "autotune", "direction"), [
    (-2.6, True, 1), (-2.2, True, -1), (-2.6, False, 0)])
def test_entropy_weight_rises_below_the_entropy_target_and_falls_above(log_std, autotune, direction):
    """The entropy is about 2 (log_std + 1.42), its target -2; Adam's steps have the learning rate's size."""
    result = new_run("marvel", **ONE_EPISODE, checkpoint=start_from((0.0, 0.0), log_std), actor_lr=1e-5,
                     autotune=autotune, batch_size=256)
    assert (result.metrics["entropy"][0] < -2) == (log_std == -2.6)
    moved = float(result.checkpoint["log_alpha"]) - np.log(ONLINE["alpha"])
    assert moved == pytest.approx(direction * 1e-5 * result.metrics["env_steps"][0], rel=0.1, abs=1e-6)


# --- Multiplier ---
@pytest.fixture
def aligned(monkeypatch):
    """The aligned critics give least squares 0.3 and a ratio of norms of 0.8, which is the unit too."""
    monkeypatch.setattr(marvel_sac_pid, "aligned_multipliers", lambda *_: (0.3, 0.8))


def test_multiplier_takes_the_mean_cost_of_a_blocks_episodes_once(aligned):
    """By dual ascent, which is a sum; there is a gradient step per environment step."""
    metrics = new_run("marvel", **WITHOUT_LEARNING, multiplier="dual", lagrange_init=0.5,
                      rollout_episodes=2, total_timesteps=100).metrics
    episodes, multiplier, expected = metrics["episode_cost"], 0.5, []
    costs = episodes.reshape(-1, 2).mean(1)
    lengths = np.diff(metrics["env_steps"][1::2], prepend=0)  # of the blocks
    for k, (cost, steps) in enumerate(zip(costs, lengths, strict=True)):
        played = 2 * k + 2
        assert played < 20  # the others count as 1, half the limit
        deviation = np.sqrt((played * episodes[:played].var() + (20 - played)) / 20)
        error = (cost - (COST_LIMIT - 0.25 * min(max(deviation, 0.5), 1.0))) / COST_LIMIT
        multiplier = max(0.0, multiplier + 0.8 * ONLINE["ki"] * steps * error)
        expected += [multiplier, multiplier]
    assert len(set(costs)) > 2
    np.testing.assert_allclose(metrics["lagrange_multiplier"], expected, rtol=1e-5)


@kinds("marvel", "rollouts", "scratch", "jsrl", "pex", "rlpd", "td3")
def test_actor_gets_the_multiplier_as_this_blocks_update_left_it(kind):
    result, given = run(kind), iter(of(run(kind), "actor_loss"))
    for (_, _, calls), logged in zip(blocks(kind), result.metrics["lagrange_multiplier"], strict=True):
        for _ in calls:
            assert next(given).lagrange_multiplier == pytest.approx(logged, rel=1e-5)
    assert len(set(result.metrics["lagrange_multiplier"])) > 2


@kinds("scratch", "jsrl", "rlpd")
def test_multiplier_waits_until_learning_starts(kind):
    metrics = run(kind, seed=3).metrics
    waiting = metrics["env_steps"] < 15
    assert metrics["episode_cost"][waiting].max() > COST_LIMIT
    assert (metrics["lagrange_multiplier"] > 0).tolist()[:sum(waiting) + 1] == [False] * sum(waiting) + [True]


@pytest.mark.parametrize(("multiplier", "gains"), [
    ("apid", (0.02, 0.01, 0.03)), ("pid", (0.02, 0.01, 0.03)), ("dual", (0.0, 0.01, 0.0)),
    ("fixed", (0.0, 0.0, 0.0))])
def test_law_of_the_multiplier_has_its_gains_and_its_rate(aligned, multiplier, gains):
    """The first update is of the first gains; the adaptive law's factor is 1 + 0.07 (J - target) / J."""
    metrics = new_run("marvel", **ONE_EPISODE, lagrange_init=0.5, multiplier=multiplier).metrics
    (cost,), (steps,), (kp, ki, kd) = metrics["episode_cost"], metrics["env_steps"], gains
    error = cost - FIRST_TARGET
    assert error > 0 and steps > 1
    expected = 0.5 + 0.8 / COST_LIMIT * (ki * steps * error + kp * 0.1 * error + kd * 0.1 * cost)
    assert metrics["lagrange_multiplier"][0] == pytest.approx(expected, rel=1e-5)
    factor = 1 + 0.07 * error / cost if multiplier == "apid" else 1
    logged = [metrics[name][0] for name in ("kp", "ki", "kd")]
    assert logged == pytest.approx([kp * factor, ki * factor, kd], rel=1e-5)


FIRST = {  # integral and proportional part before the first update
    "relax": (dict(lagrange_init="relax"), 0.3, 0.5),
    "aligned": (dict(lagrange_init="aligned"), 0.3, 0.0),
    "norm-ratio": (dict(lagrange_init="norm-ratio"), 0.8, 0.0),
    "number": (dict(lagrange_init=0.6), 0.6, 0.0),
    "relax-without-kp": (dict(lagrange_init="relax", kp=0.0), 0.8, 0.0),
}


@pytest.mark.parametrize("start", FIRST)
def test_first_multiplier_and_first_update(aligned, start):
    options, integral, proportional = FIRST[start]
    metrics = new_run("marvel", **ONE_EPISODE, **options).metrics
    (cost,), (steps,), kp = metrics["episode_cost"], metrics["env_steps"], options.get("kp", ONLINE["kp"])
    error = cost - FIRST_TARGET
    change = ONLINE["ki"] * steps * error + kp * 0.1 * error + ONLINE["kd"] * 0.1 * cost
    expected = integral + 0.9 * proportional + 0.8 / COST_LIMIT * change
    assert metrics["lagrange_multiplier"][0] == pytest.approx(expected, rel=1e-5)


@kinds("scratch", "jsrl", "pex", "so2", "rlpd")
def test_multiplier_has_the_unit_1_where_no_critics_are_aligned(kind):
    result = run(kind)
    assert result.checkpoint["controller"]["unit"] == 1.0
    assert result.checkpoint["controller"]["cost_unit"] == COST_LIMIT


@pytest.mark.parametrize(("lambdas", "unit", "integral"), [
    ((0.05, 0.8), 0.8, 0.05),  # a cosine of 1/16
    ((0.03, 0.8), 1.0, 1.0),
    ((0.0, 0.8), 1.0, 1.0),
    ((0.0, 0.0), 1.0, 1.0)])
def test_unit_of_the_multiplier_is_the_ratio_of_norms_unless_the_gradients_do_not_agree(
        monkeypatch, lambdas, unit, integral):
    monkeypatch.setattr(marvel_sac_pid, "aligned_multipliers", lambda *_: lambdas)
    controller = new_run("marvel", **ONE_EPISODE, ki=0.0).checkpoint["controller"]
    assert controller["unit"] == unit
    assert controller["integral"] == pytest.approx(integral / unit)


def test_a_multiplier_that_is_given_is_kept_where_the_gradients_do_not_agree(monkeypatch):
    monkeypatch.setattr(marvel_sac_pid, "aligned_multipliers", lambda *_: (0.0, 0.8))
    result = new_run("marvel", **ONE_EPISODE, multiplier="fixed", lagrange_init=0.3)
    assert result.metrics["lagrange_multiplier"] == pytest.approx(0.3)


def test_first_multiplier_is_of_the_aligned_critics_at_the_datasets_states(monkeypatch):
    calls = []
    record(monkeypatch, calls, marvel_sac_pid, "aligned_multipliers")
    result = new_run("marvel", total_timesteps=0)
    (call,) = calls
    index = {obs.tobytes() for obs in dataset()[0]["observations"]}
    assert len(call.obs) > 1000 and all(obs.tobytes() in index for obs in call.obs.numpy())
    for name in ("actor", "q", "qc"):
        network = getattr(call, name)
        network.load_state_dict(result.checkpoint[name])
        assert torch.equal(getattr(call, f"{name}_parameters"), snapshot(network))
