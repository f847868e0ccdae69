"""What both `main` functions hand to the functions above them, in which order, and what becomes of it."""

import inspect
from itertools import groupby
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import TASK, TINY_MARVEL, TINY_OFFLINE, played
from scipy.stats import kstest

import common
import marvel_sac_pid
import offline_pretrain
from benchmark.curves import read_metrics

# Every value differs from its default and from the others, so that none can stand in for another.
BOTH = dict(gamma=0.98, reward_scale=0.2)
OFFLINE = dict(**BOTH, cost_limit=12.0, update_steps=40, eval_episodes=2, tau=0.03, bc_weight=0.2,
               ood_actions=3, ood_quantile=0.8)
MARVEL = dict(**BOTH, cost_limit=7.0, cost_margin=0.3, eval_every=400, eval_episodes=2, vpa_alpha=0.03,
              vpa_alpha_cost=0.004, vpa_tau=0.2, alpha=0.02, tau=0.01, kp=0.02, ki=0.01, kd=0.03)
LIMIT = 7.0 * (1 - 0.3)  # what the multiplier aims at
QUICK = dict(vpa_steps=0, total_timesteps=200, lagrange_init=0.5)  # one episode, no pre-alignment


# --- Recording ---
def snapshot(network):
    """Every 29th parameter: enough to tell networks apart."""
    return torch.cat([p.detach().flatten() for p in network.parameters()])[::29].clone()


def frozen(value):
    """A copy that later updates do not change; networks stay what they are."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: frozen(item) for key, item in value.items()}
    return tuple(map(frozen, value)) if isinstance(value, tuple) else value


def record(patch, calls, owner, name):
    """Append every call of owner.name to `calls`: its arguments by name, the result, and of networks their
    parameters and whether a gradient has reached them.
    """
    original = getattr(owner, name)
    signature = inspect.signature(original)

    def spy(*args, **options):
        given = signature.bind(*args, **options).arguments
        call = {key: frozen(value) for key, value in given.items()}
        for key, value in given.items():
            if isinstance(value, torch.nn.Module):
                call[f"{key}_parameters"] = snapshot(value)
                call[f"{key}_was_trained"] = any(p.grad is not None for p in value.parameters())
        result = original(*args, **options)
        calls.append(SimpleNamespace(function=name, **call, result=frozen(result)))
        return result

    patch.setattr(owner, name, spy)


class Watched(gym.Wrapper):
    """Records every step. Costs are drawn, more in every episode, as a tiny run may have none of its own.

    The first episode ends the task after `terminate_at` steps, if that is given.
    """

    def __init__(self, env, calls, terminate_at):
        super().__init__(env)
        self.calls, self.left, self.rng, self.share = calls, terminate_at, np.random.default_rng(0), 0.0

    def reset(self, **options):
        self.share += 0.05
        return self.env.reset(**options)

    def step(self, action):
        next_obs, reward, terminated, truncated, info = self.env.step(action)
        info["cost"] = float(self.rng.random() < self.share)
        if self.left:
            self.left -= 1
            terminated = self.left == 0
        self.calls.append(SimpleNamespace(function="step", action=action.copy(), reward=reward,
                                          cost=info["cost"], terminated=terminated, truncated=truncated))
        return next_obs, reward, terminated, truncated, info


def watch_training(patch, calls, terminate_at=None):
    """Record the steps in the first simulator that the script makes, the one that it trains in."""
    make, made = common.make_env, []

    def make_env(env_id):
        env, task = make(env_id)
        made.append(env)
        return (Watched(env, calls, terminate_at) if len(made) == 1 else env), task

    patch.setattr(common, "make_env", make_env)


def no_evaluation(patch):
    nothing = np.zeros(1)
    patch.setattr(common, "evaluate", lambda *_: {"return": nothing, "cost": nothing, "length": nothing})


def of(calls, name):
    return [call for call in calls if call.function == name]


def finish(script, args):
    """Run a script's main; its arguments, checkpoint and metrics."""
    script.main(args)
    return SimpleNamespace(args=args, checkpoint=common.load_checkpoint(f"{args.run_dir}/checkpoint.pt"),
                           metrics=read_metrics(f"{args.run_dir}/metrics.csv"))


def pretrain(run_dir, ball_file, **options):
    options = {**TINY_OFFLINE, **OFFLINE, "dataset_path": str(ball_file), "run_dir": str(run_dir), **options}
    return finish(offline_pretrain, offline_pretrain.Args(**options))


def finetune(patch, run_dir, ball_file, offline, terminate_at=None, **options):
    """One recorded run: calls, metrics, checkpoint, and the saved episodes as a dict of arrays."""
    calls = []
    watch_training(patch, calls, terminate_at)
    for name in ("soft_targets", "critic_loss", "actor_loss"):
        record(patch, calls, marvel_sac_pid, name)
    record(patch, calls, marvel_sac_pid.PIDLagrangian, "update")
    source = {}
    if not options.get("from_scratch"):
        source = {"checkpoint": f"{offline.args.run_dir}/checkpoint.pt", "dataset_path": str(ball_file)}
    options = {**TINY_MARVEL, **MARVEL, **source, "run_dir": str(run_dir), **options}
    run = finish(marvel_sac_pid, marvel_sac_pid.Args(**options))
    task = SimpleNamespace(env_id=TASK, obs_dim=8, act_dim=2)
    run.calls, run.saved = calls, arrays(played(run_dir, task))
    return run


@pytest.fixture(scope="module")
def offline(ball_file, tmp_path_factory):
    """One recorded offline run."""
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("cpq_targets", "critic_loss", "ood_shortfall", "actor_loss"):
            record(patch, calls, offline_pretrain, name)
        record(patch, calls, offline_pretrain.VAE, "loss")
        run = pretrain(tmp_path_factory.mktemp("runs") / "offline", ball_file)
    run.calls = calls
    return run


@pytest.fixture(scope="module")
def online(ball_file, offline, tmp_path_factory):
    """One recorded finetuning: pre-alignment, then two blocks of one episode."""
    with pytest.MonkeyPatch.context() as patch:
        run = finetune(patch, tmp_path_factory.mktemp("runs") / "online", ball_file, offline)
    targets = of(run.calls, "soft_targets")
    run.vpa, run.after = targets[:run.args.vpa_steps], targets[run.args.vpa_steps:]
    run.actor_updates = of(run.calls, "actor_loss")
    assert len(run.actor_updates) == len(run.after) == 100
    return run


@pytest.fixture
def quick(tmp_path, monkeypatch, ball_file, offline):
    """quick(**options): a recorded finetuning of one episode without pre-alignment and evaluation."""
    no_evaluation(monkeypatch)

    def run(**options):
        return finetune(monkeypatch, tmp_path / "quick", ball_file, offline, **{**QUICK, **options})

    return run


# --- What is compared ---
def arrays(data):
    return {key: np.asarray(value, np.float32) for key, value in data.items()}


def rows_of(batch, data, reward_scale):
    """Row numbers of a batch's transitions in a dataset that must hold them, with scaled rewards."""
    def keys(part):
        return [row.tobytes() for row in np.concatenate([part["observations"], part["actions"]], 1)]

    batch, index = arrays(batch), {key: row for row, key in enumerate(keys(data))}
    unknown = sum(key not in index for key in keys(batch))
    assert unknown == 0, f"{unknown} of {len(batch['rewards'])} transitions are not from there"
    rows = [index[key] for key in keys(batch)]
    for key in common.DATASET_KEYS:
        expected = data[key][rows] * (reward_scale if key == "rewards" else 1)
        np.testing.assert_allclose(batch[key], expected, rtol=1e-5, err_msg=key)
    return rows


def check_targets_follow(targets, losses, tau, networks=("q", "qc")):
    """Between two updates the target networks go the share tau of the way to the updated critics."""
    for name in networks:
        for before, after, critic in zip(targets[:-1], targets[1:], losses[1:], strict=True):
            old = getattr(before, f"{name}_target_parameters")
            new = getattr(after, f"{name}_target_parameters")
            way = getattr(critic, f"{name}_parameters") - old
            assert way.abs().max() > 0
            torch.testing.assert_close(new - old, tau * way, rtol=1e-3, atol=1e-7)


def evaluation_of(run, script):
    """What the checkpoint's policy gets, sampled with the run's seed and by its mean actions."""
    env, task = common.make_env(TASK)
    actor = script.Actor(task.obs_dim, task.act_dim)
    actor.load_state_dict(run.checkpoint["actor"])
    policy, rng = actor.numpy_policy(), np.random.default_rng(run.args.seed)
    played = {"sampled": common.evaluate(env, lambda obs: policy(obs, rng), run.args.eval_episodes),
              "mean": common.evaluate(env, policy, run.args.eval_episodes)}
    env.close()
    return {f"eval_{how}_{what}": result[what].mean() for how, result in played.items()
            for what in ("return", "cost")}


def check_last_evaluation(run, script, policy_name):
    """The last row's evaluation, and the checkpoint's own, are what the checkpoint's policy gets."""
    expected = evaluation_of(run, script)
    assert expected["eval_sampled_return"] != expected["eval_mean_return"]
    assert {name: run.metrics[name][-1] for name in expected} == pytest.approx(expected, rel=1e-4)
    assert run.checkpoint["evaluations"][policy_name] == pytest.approx(expected, rel=1e-6)


# --- Pre-training ---
def test_offline_threshold_is_the_limit_spent_evenly_and_discounted(offline):
    threshold = sum(12.0 / 200 * 0.98**t for t in range(200))
    for name in ("cpq_targets", "ood_shortfall", "actor_loss"):
        np.testing.assert_allclose([call.qc_threshold for call in of(offline.calls, name)], threshold)
    assert {call.gamma for call in of(offline.calls, "cpq_targets")} == {0.98}


def test_offline_critics_learn_from_the_dataset_with_scaled_rewards(offline, ball_data):
    data, drawn = arrays(ball_data), set()
    for call in of(offline.calls, "cpq_targets"):
        drawn |= set(rows_of(call.batch, data, reward_scale=0.2))
    assert len(drawn) > 0.8 * len(data["rewards"])


def test_offline_step_uses_one_batch_and_its_own_targets(offline):
    steps = zip(*(of(offline.calls, name) for name in (
        "loss", "cpq_targets", "critic_loss", "ood_shortfall", "actor_loss")), strict=True)
    for vae, targets, critics, ood, actor in steps:
        for other in (vae.obs, critics.batch["observations"], ood.obs, actor.batch["observations"]):
            assert torch.equal(other, targets.batch["observations"])
        for other in (vae.act, critics.batch["actions"], actor.batch["actions"]):
            assert torch.equal(other, targets.batch["actions"])
        assert torch.equal(critics.q_target_value, targets.result[0])
        assert torch.equal(critics.qc_target_value, targets.result[1])
        assert targets.actor is actor.actor is ood.actor
        assert critics.q is actor.q and critics.qc is actor.qc is ood.qc
        assert targets.q_target is not critics.q and targets.qc_target is not critics.qc


def test_offline_target_networks_follow_at_tau(offline):
    check_targets_follow(of(offline.calls, "cpq_targets"), of(offline.calls, "critic_loss"), tau=0.03)


def test_actions_are_out_of_distribution_beyond_the_quantile_of_the_batchs_own_kl(offline):
    vae, ood = of(offline.calls, "loss"), of(offline.calls, "ood_shortfall")
    for own, call in zip(vae, ood, strict=True):
        assert call.kl_threshold == pytest.approx(float(own.result[1].quantile(0.8)))
        assert call.n == 3 and call.vae is own.self


def test_vae_learns_the_datasets_actions(offline):
    calls = of(offline.calls, "loss")
    losses = [float(call.result[0]) for call in calls]
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])
    assert all(not torch.equal(a.self_parameters, b.self_parameters)
               for a, b in zip(calls[:-1], calls[1:], strict=True))
    assert {call.beta for call in calls} == {offline_pretrain.Args.vae_beta}


def test_imitation_has_its_weight(offline, tmp_path, monkeypatch, ball_file):
    assert {call.bc_weight for call in of(offline.calls, "actor_loss")} == {0.2}
    no_evaluation(monkeypatch)
    runs = [pretrain(tmp_path / str(weight), ball_file, update_steps=3, bc_weight=weight)
            for weight in (0.0, 5.0)]
    assert not torch.equal(*(run.checkpoint["actor"]["head.weight"] for run in runs))


def test_penalty_raises_qc_of_the_policys_actions(tmp_path, monkeypatch, ball_file, ball_data):
    no_evaluation(monkeypatch)
    obs, values = torch.from_numpy(ball_data["observations"].copy()), []
    for weight in (0.0, 5.0):
        run = pretrain(tmp_path / str(weight), ball_file, ood_weight=weight)
        actor, qc = offline_pretrain.Actor(8, 2), offline_pretrain.Critic(1, 8, 2)
        actor.load_state_dict(run.checkpoint["actor"])
        qc.load_state_dict(run.checkpoint["qc"])
        with torch.no_grad():
            values.append(float(qc(obs, actor(obs)[0]).mean()))
    assert values[1] > values[0] + 0.1


def test_offline_last_row_and_checkpoint_evaluate_the_final_policy(offline):
    check_last_evaluation(offline, offline_pretrain, "offline policy")
    assert list(offline.checkpoint["evaluations"]) == ["offline policy"]


# --- Value pre-alignment ---
def test_vpa_evaluates_the_frozen_offline_policy(online, offline):
    actor = marvel_sac_pid.Actor(8, 2)
    actor.load_state_dict(offline.checkpoint["actor"])
    assert len(online.vpa) == 30
    for call in online.vpa:
        assert torch.equal(call.actor_parameters, snapshot(actor))
        assert not call.actor_was_trained
    first, second, *_ = online.after  # the first online targets are of the policy as it was handed over
    assert torch.equal(first.actor_parameters, snapshot(actor)) and not first.actor_was_trained
    assert not torch.equal(second.actor_parameters, snapshot(actor)) and second.actor_was_trained


def test_vpa_learns_from_the_dataset_only(online, ball_data):
    for call in online.vpa:
        rows_of(call.batch, arrays(ball_data), reward_scale=0.2)


def test_vpa_has_its_own_entropy_weights_and_target_step(online):
    assert {(call.gamma, call.alpha, call.alpha_cost) for call in online.vpa} == {(0.98, 0.03, 0.004)}
    check_targets_follow(online.vpa, of(online.calls, "critic_loss")[:len(online.vpa)], tau=0.2)


def test_vpa_on_rollouts_fits_to_the_offline_policys_first_episodes_which_count(
        tmp_path, monkeypatch, ball_file, offline):
    no_evaluation(monkeypatch)
    run = finetune(monkeypatch, tmp_path / "rollouts", ball_file, offline, vpa_data="rollouts",
                   learning_starts=250, total_timesteps=600, vpa_steps=20)
    order = [name for name, _ in groupby(x.function for x in run.calls if x.function != "critic_loss")]
    assert order[:4] == ["step", "soft_targets", "step", "update"]
    targets, offline_actor = of(run.calls, "soft_targets")[:20], marvel_sac_pid.Actor(8, 2)
    offline_actor.load_state_dict(offline.checkpoint["actor"])
    drawn = set()
    for call in targets:
        drawn |= set(rows_of(call.batch, run.saved, reward_scale=0.2))
        assert torch.equal(call.actor_parameters, snapshot(offline_actor))
    assert 300 < max(drawn) < 400  # two episodes, the first that reach learning_starts
    assert run.metrics["env_steps"].tolist() == [200, 400, 600]
    assert np.isnan(run.metrics["lagrange_multiplier"]).tolist() == [True, True, False]
    costs = np.array([step.cost for step in of(run.calls, "step")]).reshape(3, 200).sum(1)
    np.testing.assert_allclose(run.metrics["cumulative_cost"], np.cumsum(costs))


# --- Online: the data ---
def test_replay_holds_what_the_simulator_did(online):
    steps, saved = of(online.calls, "step"), online.saved
    assert len(steps) == len(saved["rewards"]) == 400
    np.testing.assert_array_equal(saved["actions"], [step.action for step in steps])
    np.testing.assert_allclose(saved["rewards"], [step.reward for step in steps], rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(saved["costs"], [step.cost for step in steps])


def test_time_limit_is_stored_as_timeout_and_bootstraps(online):
    assert np.flatnonzero(online.saved["timeouts"]).tolist() == [199, 399]
    assert not online.saved["terminals"].any()
    ends = [call.batch["timeouts"] > 0 for call in online.after]
    assert sum(int(end.sum()) for end in ends) > 0
    assert not any(call.batch["terminals"].any() for call in online.after)


def test_terminal_is_stored_as_terminal_and_stops_the_bootstrap(quick):
    run = quick(terminate_at=120)
    assert np.flatnonzero(run.saved["terminals"]).tolist() == [119]
    assert np.flatnonzero(run.saved["timeouts"]).tolist() == [319]
    ended = set()
    for call in of(run.calls, "soft_targets"):
        rows, terminals = np.array(rows_of(call.batch, run.saved, 0.2)), call.batch["terminals"].numpy()
        ended |= set(rows[terminals > 0].tolist())
    assert ended == {119}


def test_online_updates_learn_from_all_of_the_replay_and_nothing_else(online):
    blocks = set(), set()
    for k, call in enumerate(online.after):
        blocks[k // 50].update(rows_of(call.batch, online.saved, reward_scale=0.2))
    assert max(blocks[0]) < 200
    assert min(blocks[1]) < 100 and max(blocks[1]) > 300


def constant_policy(self):
    return lambda obs, rng=None: np.full(2, 0.25, np.float32)


def test_scratch_explores_uniformly_until_learning_starts(quick, monkeypatch):
    monkeypatch.setattr(marvel_sac_pid.Actor, "numpy_policy", constant_policy)
    run = quick(from_scratch=True, total_timesteps=600, learning_starts=500)
    explored, played = run.saved["actions"][:500], run.saved["actions"][500:]
    for one in explored.T:
        assert kstest(one, "uniform", args=(-1, 2)).pvalue > 0.01
    np.testing.assert_allclose(np.quantile(np.abs(explored), [0.25, 0.5, 0.75]), [0.25, 0.5, 0.75], atol=0.05)
    assert abs(np.corrcoef(explored.T)[0, 1]) < 0.15
    assert (played == 0.25).all()
    first = next(k for k, call in enumerate(run.calls) if call.function == "soft_targets")
    assert len(of(run.calls[:first], "step")) == 600  # the first block that ends after learning_starts


def test_finetuning_never_explores_uniformly(quick, monkeypatch):
    monkeypatch.setattr(marvel_sac_pid.Actor, "numpy_policy", constant_policy)
    assert (quick(utd=1e-9).saved["actions"] == 0.25).all()


# --- Online: the updates ---
def test_block_is_collected_then_the_multiplier_updated_once_then_the_networks(online):
    names = {"soft_targets": "learn", "critic_loss": "learn", "actor_loss": "learn"}
    order = [names.get(call.function, call.function) for call in online.calls]
    runs = [(name, len(list(group))) for name, group in groupby(order)]
    assert runs == [("learn", 60)] + 2 * [("step", 200), ("update", 1), ("learn", 150)]


def test_online_targets_use_the_current_policy_with_its_entropy_and_none_in_the_cost(online):
    for targets, update in zip(online.after, online.actor_updates, strict=True):
        assert targets.actor is update.actor
        assert torch.equal(targets.actor_parameters, update.actor_parameters)
        assert (targets.gamma, targets.alpha_cost) == (0.98, 0.0)
        assert targets.alpha == update.alpha
    assert online.after[0].alpha == pytest.approx(0.02)
    assert len({float(call.alpha) for call in online.after}) == len(online.after)
    assert not torch.equal(online.after[0].actor_parameters, online.after[-1].actor_parameters)
    assert online.metrics["alpha"][-1] == pytest.approx(float(online.after[-1].alpha), rel=1e-5)


def test_online_step_uses_one_batch_and_its_own_targets(online):
    critics = of(online.calls, "critic_loss")[-len(online.after):]
    for targets, critic, update in zip(online.after, critics, online.actor_updates, strict=True):
        assert torch.equal(critic.batch["observations"], targets.batch["observations"])
        assert torch.equal(update.obs, targets.batch["observations"])
        assert torch.equal(critic.q_target_value, targets.result[0])
        assert torch.equal(critic.qc_target_value, targets.result[1])


def test_online_target_networks_follow_at_tau(online):
    check_targets_follow(online.after, of(online.calls, "critic_loss")[-len(online.after):], tau=0.01)


def test_actor_follows_the_current_critics(online):
    critics = of(online.calls, "critic_loss")[-len(online.after):]
    for critic, update, later in zip(critics, online.actor_updates, critics[1:] + [None], strict=True):
        assert update.q is critic.q and update.qc is critic.qc
        if later:  # the critics were updated before the actor and not after it
            assert torch.equal(update.q_parameters, later.q_parameters)
    for name in ("q", "qc"):
        network = getattr(online.actor_updates[-1], name)
        assert all(torch.equal(online.checkpoint[name][key], value)
                   for key, value in network.state_dict().items())


def test_actor_gets_the_multiplier_as_this_blocks_update_left_it(online):
    multipliers, given = [], []
    for call in online.calls:
        if call.function == "update":
            multipliers.append(call.result)
        elif call.function == "actor_loss":
            assert call.lagrange_multiplier == multipliers[-1]
            given.append(call.lagrange_multiplier)
    assert len(set(multipliers)) == len(set(given)) == 2
    np.testing.assert_allclose(online.metrics["lagrange_multiplier"], multipliers, rtol=1e-5)


@pytest.mark.parametrize(("log_std", "direction"), [(-2.7, 1), (-2.1, -1)])
def test_entropy_weight_rises_below_the_entropy_target_and_falls_above(
        quick, tmp_path, offline, log_std, direction):
    changed = {**offline.checkpoint, "actor": dict(offline.checkpoint["actor"])}
    changed["actor"]["head.weight"] = torch.zeros(4, 256)
    changed["actor"]["head.bias"] = torch.tensor([0.0, 0.0, log_std, log_std])
    common.save_checkpoint(tmp_path / "changed.pt", changed)
    run = quick(checkpoint=str(tmp_path / "changed.pt"), actor_lr=1e-5)
    entropies = [-float(call.result[1].mean()) for call in of(run.calls, "actor_loss")]
    assert (np.mean(entropies) < -2) == (direction == 1) and abs(np.mean(entropies) + 2) < 1
    assert direction * (float(run.checkpoint["log_alpha"]) - np.log(0.02)) > 1e-4


def test_online_last_row_evaluates_the_final_policy(online):
    check_last_evaluation(online, marvel_sac_pid, "after finetuning")
    assert list(online.checkpoint["evaluations"]) == ["offline policy", "after finetuning"]


def test_online_run_starts_with_the_evaluation_of_the_offline_policy(online, offline):
    start = SimpleNamespace(args=online.args, checkpoint=offline.checkpoint)
    expected = evaluation_of(start, offline_pretrain)
    assert online.checkpoint["evaluations"]["offline policy"] == pytest.approx(expected, rel=1e-6)


# --- Multiplier ---
def test_multiplier_takes_the_mean_cost_of_a_blocks_episodes_once(quick):
    run = quick(rollout_episodes=2, total_timesteps=800, utd=1e-9)
    costs = np.array([step.cost for step in of(run.calls, "step")]).reshape(4, 200).sum(1)
    assert len(set(costs)) > 2 and costs[0] != costs[1]
    updates = of(run.calls, "update")
    assert [call.episode_cost for call in updates] == costs.reshape(2, 2).mean(1).tolist()
    np.testing.assert_allclose(run.metrics["lagrange_multiplier"],
                               np.repeat([call.result for call in updates], 2), rtol=1e-5)


FIRST = {  # integral and proportional part before the first update; least squares 0.3, ratio of norms 0.8
    "relax": (dict(lagrange_init="relax"), 0.3, 0.5),
    "aligned": (dict(lagrange_init="aligned"), 0.3, 0.0),
    "norm-ratio": (dict(lagrange_init="norm-ratio"), 0.8, 0.0),
    "number": (dict(lagrange_init=0.6), 0.6, 0.0),
    "relax-without-kp": (dict(lagrange_init="relax", kp=0.0), 0.8, 0.0),
}


@pytest.mark.parametrize("start", FIRST)
def test_first_multiplier_and_first_update(quick, monkeypatch, start):
    options, integral, proportional = FIRST[start]
    asked = []

    def fake(obs, actor, q, qc):
        asked.append((obs, snapshot(actor), len(q.weights[0]), len(qc.weights[0])))
        return 0.3, 0.8

    monkeypatch.setattr(marvel_sac_pid, "aligned_multipliers", fake)
    run = quick(**options, utd=1e-9)
    (update,) = of(run.calls, "update")
    cost = sum(step.cost for step in of(run.calls, "step"))
    assert update.episode_cost == cost > 0
    error, kp = cost - LIMIT, options.get("kp", 0.02)
    expected = integral + 0.01 * error + 0.9 * proportional + kp * 0.1 * error + 0.03 * 0.1 * cost
    assert update.result == pytest.approx(expected)
    assert run.metrics["lagrange_multiplier"][0] == pytest.approx(expected, rel=1e-5)
    assert len(asked) == isinstance(options["lagrange_init"], str)
    if asked:
        assert asked[0][2:] == (2, 1)


@pytest.mark.parametrize(("multiplier", "gains", "rate", "published"), [
    ("apid", [0.02, 0.01, 0.03], 0.07, False), ("apid-published", [0.02, 0.01, 0.03], 0.07, True),
    ("pid", [0.02, 0.01, 0.03], 0.0, False), ("dual", [0.0, 0.01, 0.0], 0.0, False),
    ("fixed", [0.0, 0.0, 0.0], 0.0, False)])
def test_law_of_the_multiplier_has_its_gains_and_the_limit_with_its_margin(
        quick, multiplier, gains, rate, published):
    run = quick(multiplier=multiplier, adapt_rate=0.07, utd=1e-9)
    (update,) = of(run.calls, "update")
    controller = update.self
    assert controller.cost_limit == pytest.approx(LIMIT)
    assert (controller.first_gains, controller.adapt_rate, controller.published) == (gains, rate, published)
