"""The paper's baselines: what makes each of them the method it is, and that each runs end to end."""

import csv
import json
import math
from itertools import groupby

import numpy as np
import pytest
import torch
import tyro
from conftest import TASK, TINY_MARVEL, TINY_OFFLINE, command_line, parameters, played, run_script, same
from scipy.stats import norm

import common
import offline_pretrain
from benchmark import curves
from benchmark.baselines import jsrl, pex, so2
from benchmark.curves import read_metrics

BASELINES = {"jsrl": jsrl, "pex": pex, "so2": so2}
TINY = {key: value for key, value in TINY_MARVEL.items() if not key.startswith("vpa")}
TINY_OWN = {"jsrl": {"learning_starts": 300}, "pex": {}, "so2": {"critic_updates": 3}}
every_baseline = pytest.mark.parametrize("name", BASELINES)


@pytest.fixture(scope="module")
def offline(ball_file, tmp_path_factory):
    """The checkpoint of one tiny offline run: its path."""
    run_dir = tmp_path_factory.mktemp("runs") / "offline"
    offline_pretrain.main(offline_pretrain.Args(
        **TINY_OFFLINE, dataset_path=str(ball_file), run_dir=str(run_dir)))
    return run_dir / "checkpoint.pt"


@pytest.fixture
def finetune(tmp_path, ball_file, offline):
    """finetune(name, folder, **options): the checkpoint of one run of a baseline."""
    def run(name, folder="run", **options):
        source = {} if name == "jsrl" else {"dataset_path": str(ball_file)}
        options = {**TINY, **TINY_OWN[name], **source, "checkpoint": str(offline),
                   "run_dir": str(tmp_path / folder), **options}
        BASELINES[name].main(BASELINES[name].Args(**options))
        return common.load_checkpoint(tmp_path / folder / "checkpoint.pt")

    return run


@pytest.fixture
def episodes(tmp_path, ball_task, finetune, monkeypatch):
    """episodes(name, **options): all that a run of a baseline put into its replay buffer; no evaluation."""
    def run(name, **options):
        nothing = np.zeros(1)
        monkeypatch.setattr(common, "evaluate",
                            lambda *_: {"return": nothing, "cost": nothing, "length": nothing})
        finetune(name, **options)
        return played(tmp_path / "run", ball_task)

    return run


def fresh_networks(script):
    """The networks as seed 0 makes them, before the first update."""
    torch.manual_seed(0)
    made = {"actor": script.Actor(8, 2), "q": script.Critic(2, 8, 2), "qc": script.Critic(1, 8, 2)}
    return {name: network.state_dict() for name, network in made.items()}


def equal(one, other):
    return same(parameters({"": one}), parameters({"": other}))


def updates(optimizer):
    """Steps that an Adam optimiser has taken, which must be the same for all its parameters."""
    (steps,) = {int(state["step"]) for state in optimizer["state"].values()}
    return steps


def act_as(monkeypatch, script, offline, frozen, learning):
    """The frozen offline policy plays the action `frozen`, any other `learning`, both without noise."""
    weights = common.load_checkpoint(offline)["actor"]["head.weight"]

    def numpy_policy(self):
        value = frozen if torch.equal(self.head.weight, weights) else learning
        return lambda obs, rng=None: np.full(2, value, np.float32)

    monkeypatch.setattr(script.Actor, "numpy_policy", numpy_policy)


def evaluated_actions(monkeypatch):
    """A list that gets the action that each evaluated policy plays at one observation."""
    actions, nothing = [], np.zeros(1)

    def evaluate(env, policy, episodes):
        actions.append(float(policy(np.ones(8, np.float32))[0]))
        return {"return": nothing, "cost": nothing, "length": nothing}

    monkeypatch.setattr(common, "evaluate", evaluate)
    return actions


def constant_actor(script, mean, log_std=-5.0, obs_dim=3):
    """A policy with u ~ N(mean, exp(log_std)^2) in every state, one action."""
    actor = script.Actor(obs_dim, 1)
    with torch.no_grad():
        actor.head.weight.zero_()
        actor.head.bias.copy_(torch.tensor([mean, log_std]))
    return actor


def random_batch(n, obs_dim=3, act_dim=1, seed=0):
    """Transitions of which every third is a terminal."""
    torch.manual_seed(seed)
    return {"observations": torch.randn(n, obs_dim), "next_observations": torch.randn(n, obs_dim),
            "actions": torch.rand(n, act_dim) * 2 - 1, "rewards": torch.randn(n), "costs": torch.rand(n),
            "terminals": (torch.arange(n) % 3 == 0).float(), "timeouts": torch.zeros(n)}


# --- End to end ---
@every_baseline
def test_run_leaves_its_files_and_the_seed_fixes_every_number(tmp_path, finetune, name):
    first = finetune(name, "first")
    np.random.seed(1)
    again, other = finetune(name, "again"), finetune(name, "other", seed=1)
    files = {file.name for file in (tmp_path / "first").iterdir()}
    events = {file for file in files if file.startswith("events.out.tfevents.")}
    assert files - events == {"config.json", "metrics.csv", "checkpoint.pt"}
    assert len(events) == 1
    assert json.loads((tmp_path / "first/config.json").read_text())["total_timesteps"] == 400
    texts = [(tmp_path / folder / "metrics.csv").read_bytes() for folder in ("first", "again", "other")]
    assert texts[0] == texts[1] != texts[2]
    actor = "new_actor" if name == "pex" else "actor"
    assert all(equal(first[network], again[network]) for network in (actor, "q", "qc"))
    assert not equal(first[actor], other[actor])

    with open(tmp_path / "first/metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["env_steps"] for row in rows] == ["200", "400"]
    assert all(rows[-1].values())
    learning = 0.25 * (200 if name == "jsrl" else 400)  # JSRL learns from its second block on
    assert updates(first["actor_optimizer"]) == learning
    assert updates(first["critic_optimizer"]) == learning * (3 if name == "so2" else 1)
    for network in ("q", "qc"):
        assert not equal(first[network], first[f"{network}_target"])


@every_baseline
def test_baseline_runs_from_the_command_line_with_its_own_default_folder(
        tmp_path, monkeypatch, capsys, ball_file, offline, name):
    options = {**TINY, **TINY_OWN[name], "total_timesteps": 200, "checkpoint": offline}
    options |= {} if name == "jsrl" else {"dataset_path": ball_file}
    status, _, stderr = run_script(
        f"benchmark/baselines/{name}.py", *command_line(options), cwd=tmp_path)
    assert status == 0, stderr
    assert "Traceback" not in stderr and "Warning" not in stderr
    run_dir = f"runs/{TASK}__{name}__seed0"
    assert (tmp_path / run_dir / "checkpoint.pt").is_file()
    assert {file.name for file in tmp_path.iterdir()} == {"runs"}
    monkeypatch.chdir(tmp_path)
    curves.main(curves.Args(run_dir))
    stdout = capsys.readouterr().out
    assert f"{run_dir}: finished, 200 steps" in stdout
    assert "offline policy" in stdout and "after finetuning" in stdout and "violation regret" in stdout
    assert (tmp_path / run_dir / "curves.png").stat().st_size > 0


@every_baseline
def test_wrong_checkpoint_is_refused_in_one_line(tmp_path, ball_file, offline, refusal, name):
    source = {} if name == "jsrl" else {"dataset_path": ball_file}
    (tmp_path / "text.pt").write_text("no checkpoint")
    common.save_checkpoint(tmp_path / "begun.pt", common.load_checkpoint(offline) | {"finished": False})
    for options, words in [({"checkpoint": tmp_path / "text.pt"}, "not a readable checkpoint"),
                           ({"checkpoint": tmp_path / "none.pt"}, "no such file"),
                           ({"checkpoint": tmp_path / "begun.pt"}, "finished is False"),
                           ({"checkpoint": offline, "gamma": 0.95}, "gamma is 0.99, this run needs 0.95")]:
        options = {**TINY, **source, **options, "run_dir": tmp_path / "x"}
        args = tyro.cli(BASELINES[name].Args, args=command_line(options))
        assert words in refusal(BASELINES[name].main, args)
    assert {file.name for file in tmp_path.iterdir()} == {"text.pt", "begun.pt"}


@pytest.mark.parametrize(("name", "option", "value"), [
    ("jsrl", "jump_start_share", 1.5), ("jsrl", "jump_start_share", -0.5), ("pex", "temperature", 0.0),
    ("so2", "critic_updates", 0), ("so2", "target_noise", -1.0), ("so2", "cost_margin", 2.0)])
def test_option_without_sense_is_refused_before_anything_is_written(
        tmp_path, offline, refusal, name, option, value):
    args = BASELINES[name].Args(run_dir=str(tmp_path / "x"), checkpoint=str(offline), **{option: value})
    assert f"--{option.replace('_', '-')} {value}" in refusal(BASELINES[name].main, args)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["pex", "so2"])
def test_method_starts_from_the_offline_networks_it_is_meant_to(episodes, offline, tmp_path, name):
    episodes(name, utd=1e-9, total_timesteps=200)
    begun, before = common.load_checkpoint(tmp_path / "run/checkpoint.pt"), common.load_checkpoint(offline)
    for network in ("q", "qc"):
        assert equal(begun[network], before[network]) and equal(begun[f"{network}_target"], before[network])
    if name == "pex":
        assert equal(begun["new_actor"], fresh_networks(pex)["actor"])
    else:
        assert equal(begun["actor"], before["actor"])


@pytest.mark.parametrize("name", ["pex", "so2"])
def test_every_batch_is_half_dataset_and_half_replay(episodes, monkeypatch, ball_data, name):
    script = BASELINES[name]
    loss, batches = script.critic_loss, []

    def spy(batch, *networks):
        batches.append(batch)
        return loss(batch, *networks)

    monkeypatch.setattr(script, "critic_loss", spy)
    replay = episodes(name, total_timesteps=200, batch_size=9, reward_scale=0.1)

    def rows(data, part=slice(None)):
        return {(o.tobytes(), a.tobytes()) for o, a in
                zip(np.asarray(data["observations"])[part], np.asarray(data["actions"])[part], strict=True)}

    assert len(batches) == 50 * (3 if name == "so2" else 1)
    assert {len(batch["rewards"]) for batch in batches} == {9}
    old, new = rows(ball_data), rows(replay)
    assert not old & new
    assert all(rows(batch, slice(4)) <= old and rows(batch, slice(4, None)) <= new for batch in batches)
    scale = {float(r) for r in 0.1 * torch.tensor(ball_data["rewards"])}
    assert all(float(batch["rewards"][0]) in scale for batch in batches)


# --- JSRL ---
@pytest.mark.parametrize(("env_steps", "annealing_steps", "expected"), [
    (0, 1000, 200), (250, 1000, 150), (500, 1000, 100), (999, 1000, 1), (1000, 1000, 0), (5000, 1000, 0),
    (0, 0, 0), (400, 0, 0)])
def test_guide_begins_with_whole_episodes_and_ends_with_none(env_steps, annealing_steps, expected):
    assert jsrl.guide_steps(env_steps, annealing_steps, 200) == expected


def test_guide_acts_first_and_shorter_and_only_the_learning_policy_is_evaluated(
        finetune, monkeypatch, offline, tmp_path, ball_task):
    act_as(monkeypatch, jsrl, offline, frozen=0.25, learning=-0.5)
    evaluated = evaluated_actions(monkeypatch)
    finetune("jsrl", total_timesteps=1200, eval_every=200, jump_start_share=0.75, utd=1e-9)
    data = played(tmp_path / "run", ball_task)
    actions = data["actions"][:, 0].reshape(6, 200)
    # episodes begin at steps 0, 200, ...; the guide's part ends at step 900: h = 200 (1 - step / 900)
    for episode, h in zip(actions, [200, 156, 112, 67, 23, 0], strict=True):
        assert episode.tolist() == [0.25] * h + [-0.5] * (200 - h)
    assert evaluated == [0.25, 0.25] + [-0.5, -0.5] * 6  # the offline policy's own row, then every evaluation


@pytest.mark.parametrize(("share", "first"), [(0.0, -0.5), (1.0, 0.25)])
def test_share_of_the_jump_start_ranges_from_no_guide_to_one_in_every_episode(
        episodes, monkeypatch, offline, share, first):
    act_as(monkeypatch, jsrl, offline, frozen=0.25, learning=-0.5)
    data = episodes("jsrl", total_timesteps=800, jump_start_share=share, utd=1e-9)
    assert data["actions"][::200, 0].tolist() == [first] * 4


def test_jsrl_takes_nothing_but_the_guide_from_the_offline_phase(episodes, tmp_path):
    episodes("jsrl", utd=1e-9, total_timesteps=200)
    begun, fresh = common.load_checkpoint(tmp_path / "run/checkpoint.pt"), fresh_networks(jsrl)
    assert all(equal(begun[network], fresh[network]) for network in ("actor", "q", "qc"))


def test_jsrl_learns_from_the_guides_transitions_too(episodes, monkeypatch, offline):
    act_as(monkeypatch, jsrl, offline, frozen=0.25, learning=-0.5)
    loss, seen = jsrl.critic_loss, set()

    def spy(batch, *networks):
        seen.update(batch["actions"][:, 0].tolist())
        return loss(batch, *networks)

    monkeypatch.setattr(jsrl, "critic_loss", spy)
    episodes("jsrl")
    assert seen == {0.25, -0.5}


# --- PEX ---
def by_hand(q, qc, obs, act, multiplier):
    """The Lagrangian of one action of one state, as a number."""
    obs, act = torch.tensor(obs)[None], torch.tensor(act)[None]
    with torch.no_grad():
        return (min(q(obs, act).flatten().tolist()) - multiplier * float(qc(obs, act))) / (1 + multiplier)


def test_choice_is_a_softmax_of_the_penalised_values():
    q, qc = torch.tensor([[1.0], [2.0]]), torch.tensor([[0.0], [3.0]])
    for multiplier, temperature in [(0.0, 0.5), (0.2, 0.5), (0.5, 0.5), (0.5, 2.0)]:
        old, new = math.exp(1 / (1 + multiplier) / temperature), math.exp(
            (2 - multiplier * 3) / (1 + multiplier) / temperature)
        expected = [old / (old + new), new / (old + new)]
        chosen = pex.choice_probabilities(q, qc, multiplier, temperature)
        np.testing.assert_allclose(chosen.flatten(), expected, rtol=1e-5)
    assert chosen[0] > chosen[1]  # the new policy earns more and costs too much for it


@pytest.mark.parametrize("multiplier", [0.0, 0.7])
def test_composed_policy_draws_in_the_softmaxs_frequencies(multiplier):
    torch.manual_seed(0)
    q, qc = pex.Critic(2, 3, 1), pex.Critic(1, 3, 1)
    obs, n = np.array([0.3, -0.2, 0.5], np.float32), 4000
    low, high = (by_hand(q, qc, obs, [math.tanh(u)], multiplier) for u in (-1.0, 1.0))
    temperature = abs(high - low)  # so that the better one has the probability 1 / (1 + 1 / e)
    act = pex.composed_policy(constant_actor(pex, -1.0), constant_actor(pex, 1.0), q, qc, multiplier,
                              temperature)
    rng = np.random.default_rng(0)
    drawn = np.array([act(obs, rng)[0] for _ in range(n)])
    expected = 1 / (1 + math.exp((low - high) / temperature))
    assert (drawn > 0).mean() == pytest.approx(expected, abs=4 * math.sqrt(0.25 / n))
    assert np.abs(np.abs(drawn) - math.tanh(1)).max() < 0.02
    assert len(set(drawn)) > 0.9 * n  # samples of the policies, not their means


def test_composed_policys_mean_action_is_the_better_of_both_means():
    torch.manual_seed(2)
    q, qc = pex.Critic(2, 3, 1), pex.Critic(1, 3, 1)
    act = pex.composed_policy(constant_actor(pex, -1.0), constant_actor(pex, 1.0), q, qc, 0.4, 0.1)
    won = []
    for obs in np.random.default_rng(0).normal(0, 2, (50, 3)).astype(np.float32):
        values = [by_hand(q, qc, obs, [math.tanh(u)], 0.4) for u in (-1.0, 1.0)]
        won.append(np.argmax(values))
        assert act(obs)[0] == pytest.approx(math.tanh([-1.0, 1.0][won[-1]]), abs=1e-6)
    assert set(won) == {0, 1}


def test_composed_policy_chooses_by_the_critics_of_the_moment():
    torch.manual_seed(0)
    q, qc, obs = pex.Critic(2, 3, 1), pex.Critic(1, 3, 1), np.array([1, 0, 0], np.float32)
    act = pex.composed_policy(constant_actor(pex, -1.0), constant_actor(pex, 1.0), q, qc, 0.0, 0.1)
    with torch.no_grad():
        for array in (*q.weights, *q.biases):
            array[1] = array[0]  # of two equal networks the minimum changes its sign with them
        before = act(obs)
        q.weights[2].neg_()
        q.biases[2].neg_()
    assert act(obs)[0] == -before[0] != 0


def test_composed_targets_are_the_expectation_over_the_choice_with_the_new_policys_entropy():
    batch = random_batch(12)
    q, qc = pex.Critic(2, 3, 1), pex.Critic(1, 3, 1)
    proposals = torch.rand(2, 12, 1) * 2 - 1
    log_prob = torch.randn(12)
    y, yc = pex.composed_targets(batch, lambda obs: (proposals[0], torch.full((12,), 99.0)),
                                 lambda obs: (proposals[1], log_prob), q, qc, 0.9, 0.3, 0.6, 0.05)
    for k in range(12):
        obs, values, q_values, qc_values = batch["next_observations"][k : k + 1], [], [], []
        for proposal in proposals[:, k]:
            with torch.no_grad():
                q_values.append(min(q(obs, proposal[None]).flatten().tolist()))
                qc_values.append(float(qc(obs, proposal[None])))
            values.append((q_values[-1] - 0.6 * qc_values[-1]) / 1.6)
        new = 1 / (1 + math.exp((values[0] - values[1]) / 0.05))
        value = (1 - new) * q_values[0] + new * (q_values[1] - 0.3 * float(log_prob[k]))
        cost = (1 - new) * qc_values[0] + new * qc_values[1]
        go_on = 0.0 if k % 3 == 0 else 0.9
        assert float(y[k]) == pytest.approx(float(batch["rewards"][k]) + go_on * value, abs=1e-5)
        assert float(yc[k]) == pytest.approx(float(batch["costs"][k]) + go_on * cost, abs=1e-5)


@pytest.mark.parametrize(("winner", "action"), [(0, 0.25), (1, -0.5)])
def test_chosen_policy_is_the_one_that_plays_and_is_evaluated(
        finetune, monkeypatch, offline, tmp_path, ball_task, winner, action):
    act_as(monkeypatch, pex, offline, frozen=0.25, learning=-0.5)
    evaluated = evaluated_actions(monkeypatch)
    monkeypatch.setattr(pex, "choice_probabilities",
                        lambda q, *_: torch.eye(2)[winner].reshape(2, *[1] * (q.ndim - 1)).expand_as(q))
    finetune("pex", total_timesteps=200)
    data = played(tmp_path / "run", ball_task)
    assert set(data["actions"].flatten().tolist()) == {action}
    assert evaluated == [0.25, 0.25, action, action]


def test_only_the_new_policy_learns_and_both_are_saved(finetune, offline):
    checkpoint = finetune("pex")
    assert equal(checkpoint["offline_actor"], common.load_checkpoint(offline)["actor"])
    assert not equal(checkpoint["new_actor"], fresh_networks(pex)["actor"])
    assert not equal(checkpoint["new_actor"], checkpoint["offline_actor"])
    assert "actor" not in checkpoint  # neither of the two is the policy, so no other script takes one


def test_choice_and_targets_use_the_multiplier_of_their_block(episodes, monkeypatch, tmp_path):
    targets, policy, given = pex.composed_targets, pex.composed_policy, {"targets": [], "policy": []}

    def spy_targets(*args):
        given["targets"].append((args[-2], args[-1]))
        return targets(*args)

    def spy_policy(*args):
        given["policy"].append((args[-2], args[-1]))
        return policy(*args)

    monkeypatch.setattr(pex, "composed_targets", spy_targets)
    monkeypatch.setattr(pex, "composed_policy", spy_policy)
    episodes("pex", total_timesteps=400, eval_every=10**9, temperature=0.2, lagrange_init=0.5)
    logged = read_metrics(tmp_path / "run/metrics.csv")["lagrange_multiplier"]
    assert {temperature for calls in given.values() for _, temperature in calls} == {0.2}
    blocks = [multiplier for multiplier, _ in groupby(multiplier for multiplier, _ in given["targets"])]
    np.testing.assert_allclose(blocks, logged, rtol=1e-5)
    # each block is played under the multiplier so far; the last evaluation under the last one
    np.testing.assert_allclose([multiplier for multiplier, _ in given["policy"]], [0.5, *logged], rtol=1e-5)


# --- SO2 ---
class Recorder:
    """A critic that returns 0 and keeps the actions that it was asked about."""

    def __call__(self, obs, act):
        self.act = act.clone()
        return torch.zeros(2, len(obs))


def noise_at(action, n=20_000, std=0.3, clip=0.6):
    """The target actions (n, act_dim) that perturbed_targets asks both critics about."""
    torch.manual_seed(0)
    act = torch.tensor(action).expand(n, -1)
    q, qc = Recorder(), Recorder()
    batch = random_batch(n)
    so2.perturbed_targets(batch, lambda obs: (act, torch.zeros(n)), q, qc, 0.9, 0.1, std, clip)
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


def test_without_noise_the_target_action_is_the_policys():
    np.testing.assert_array_equal(noise_at([0.5], n=9, std=0.0), np.full((9, 1), 0.5, np.float32))
    np.testing.assert_array_equal(noise_at([0.5], n=9, clip=0.0), np.full((9, 1), 0.5, np.float32))


def test_perturbed_targets_are_values_of_the_noisy_action_with_the_policys_entropy(monkeypatch):
    batch, act, log_prob = random_batch(12), torch.linspace(-1, 1, 12)[:, None], torch.randn(12)
    q, qc = so2.Critic(2, 3, 1), so2.Critic(1, 3, 1)
    noise = torch.linspace(3, -3, 12)[:, None]
    monkeypatch.setattr(torch, "randn_like", lambda _: noise)
    y, yc = so2.perturbed_targets(batch, lambda obs: (act, log_prob), q, qc, 0.9, 0.3, 0.2, 0.35)
    for k in range(12):
        moved = min(max(float(act[k]) + min(max(0.2 * float(noise[k]), -0.35), 0.35), -1.0), 1.0)
        obs = batch["next_observations"][k : k + 1]
        with torch.no_grad():
            value = min(q(obs, torch.tensor([[moved]])).flatten().tolist()) - 0.3 * float(log_prob[k])
            cost = float(qc(obs, torch.tensor([[moved]])))
        go_on = 0.0 if k % 3 == 0 else 0.9
        assert float(y[k]) == pytest.approx(float(batch["rewards"][k]) + go_on * value, abs=1e-5)
        assert float(yc[k]) == pytest.approx(float(batch["costs"][k]) + go_on * cost, abs=1e-5)


def test_critics_are_updated_several_times_on_new_batches_before_each_actor_update(episodes, monkeypatch):
    targets, critics, actor, calls = so2.perturbed_targets, so2.critic_loss, so2.actor_loss, []

    def spy_targets(batch, *args):
        assert args[-2:] == (0.2, 0.5)
        return targets(batch, *args)

    def spy_critics(batch, *args):
        calls.append(("critics", batch["observations"]))
        return critics(batch, *args)

    def spy_actor(obs, *args):
        calls.append(("actor", obs))
        return actor(obs, *args)

    for name, spy in {"perturbed_targets": spy_targets, "critic_loss": spy_critics,
                      "actor_loss": spy_actor}.items():
        monkeypatch.setattr(so2, name, spy)
    episodes("so2", total_timesteps=200, critic_updates=4, utd=0.1, target_noise=0.2, noise_clip=0.5)
    order = [(name, len(list(group))) for name, group in groupby(name for name, _ in calls)]
    assert order == 20 * [("critics", 4), ("actor", 1)]
    batches = {obs.numpy().tobytes() for name, obs in calls if name == "critics"}
    assert len(batches) == 80
    assert so2.Args.critic_updates == 10
