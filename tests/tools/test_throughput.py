"""The benchmark times what the scripts do: its updates are main's, and a plain version of each agrees."""

import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

import common
import marvel_sac_pid as marvel
import offline_pretrain as offline
from benchmark.baselines import bear_lag
from benchmark.speed import clock, throughput
from benchmark.speed.throughput import UPDATES, start

QUICK = dict(rounds=1, slice_seconds=1e-4)
NETWORKS = ("actor", "q", "qc", "q_target", "qc_target")


def buffer_of(data):
    """A buffer that holds these transitions."""
    buffer = marvel.ReplayBuffer(data["observations"].shape[1], data["actions"].shape[1], torch.device("cpu"))
    buffer.load_state_dict(data)
    return buffer


# --- The timed updates are those of main ---
def trained(script, run_dir, **options):
    """The arguments and the checkpoint of a run of a script's main, without evaluations."""
    args = script.Args(run_dir=str(run_dir), seed=3, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "evaluate", lambda *_: {"return": np.zeros(1), "cost": np.zeros(1)})
        script.main(args)
    return args, common.load_checkpoint(run_dir / "checkpoint.pt")


def read_scaled(file, task, reward_scale):
    data = common.read_dataset(file, task)
    data["rewards"] *= reward_scale
    return buffer_of(data)


def check_same_networks(s, checkpoint, names=NETWORKS):
    for name in names:
        for key, value in getattr(s, name).state_dict().items():
            assert torch.equal(value, checkpoint[name][key]), (name, key)


@pytest.mark.pins
@pytest.mark.parametrize(("script", "update", "names"), [
    (offline, throughput.offline_update, ("trained_actor", "average", *NETWORKS[1:])),
    (bear_lag, throughput.bear_lag_update, (*NETWORKS, "vae", "actor_target"))])
def test_timed_offline_update_is_the_one_of_main_bit_for_bit(
        script, update, names, tmp_path, ball_file, ball_task):
    args, checkpoint = trained(script, tmp_path, update_steps=6, dataset_path=str(ball_file))
    torch.manual_seed(args.seed)
    s = start(8, 2, marvel.Args(), vae=script is bear_lag)
    data = read_scaled(ball_file, ball_task, args.reward_scale)
    timed = update(args, s)
    for _ in range(args.update_steps):
        timed(data.sample(args.batch_size))
    if script is offline:
        s.trained_actor = s.actor
        checkpoint["average"] = checkpoint["actor"]
    check_same_networks(s, checkpoint, names)
    if script is bear_lag:
        assert torch.equal(s.log_mmd_weight, checkpoint["log_mmd_weight"]) and s.log_mmd_weight != 0


@pytest.fixture(scope="module")
def offline_run(ball_file, tmp_path_factory):
    """The folder of an offline run of two updates."""
    folder = tmp_path_factory.mktemp("offline")
    trained(offline, folder, update_steps=2, dataset_path=str(ball_file))
    return folder


@pytest.fixture
def finetuned(tmp_path, monkeypatch, ball_file, offline_run):
    """finetuned(**options): arguments and checkpoint of a run of marvel_sac_pid.py, and the networks that it
    started from; torch's random state is left as it was when main drew the first batch of VPA, or
    without VPA the first one online."""
    states, sample = [], marvel.ReplayBuffer.sample
    monkeypatch.setattr(marvel.ReplayBuffer, "sample",
                        lambda *a: states.append(torch.get_rng_state()) or sample(*a))

    def run(**options):
        start_file = offline_run / "checkpoint.pt"
        args, checkpoint = trained(marvel, tmp_path, checkpoint=str(start_file), dataset_path=str(ball_file),
                                   **options)
        s, source = start(8, 2, args), common.load_checkpoint(start_file)
        for name in NETWORKS:
            getattr(s, name).load_state_dict(source[name.removesuffix("_target")])
        torch.set_rng_state(states[0 if args.vpa_steps else 1])  # between them, the multiplier is aligned
        return args, checkpoint, s

    return run


@pytest.mark.pins
def test_timed_vpa_update_is_the_one_of_main_bit_for_bit(finetuned, ball_file, ball_task):
    args, checkpoint, s = finetuned(vpa_steps=6, total_timesteps=0)
    update, data = throughput.vpa_update(args, s), read_scaled(ball_file, ball_task, args.reward_scale)
    for _ in range(args.vpa_steps):
        update(data.sample(args.batch_size))
    check_same_networks(s, checkpoint)


@pytest.mark.pins
def test_timed_online_loop_and_its_update_are_those_of_main_bit_for_bit(finetuned):
    args, checkpoint, s = finetuned(vpa_steps=0, total_timesteps=400, utd=0.03, lagrange_init=0.7)
    s.controller.start(0.7, unit=checkpoint["controller"]["unit"])
    block = throughput.online_loop(args, s, args.env_id)
    block()
    block()
    s.trained_actor = s.actor
    checkpoint["average"] = checkpoint["actor"]
    check_same_networks(s, checkpoint, ("trained_actor", "average", *NETWORKS[1:]))
    assert torch.equal(s.log_alpha, checkpoint["log_alpha"])
    assert s.controller.state_dict() == checkpoint["controller"]


# --- An update equals a plain version of it ---
@pytest.fixture
def double_precision():
    """Adam's first step is the learning rate times the sign of a gradient: float32 cannot compare that."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


CRITICS = ("q", "qc", "q_target", "qc_target")
TRAINED = {"offline update": (*CRITICS, "actor"),
           "BEAR-Lag update": (*CRITICS, "actor", "actor_target", "encoder", "decoder"),
           "VPA update": CRITICS, "online update": (*CRITICS, "actor")}

# what is 0 or 1 as long as one branch only is taken
BRANCHES = {"safe_share", "imitated_share", "lagrange_multiplier"}


@pytest.mark.parametrize("name", UPDATES)
def test_update_equals_a_plain_version_of_it(name, double_precision):
    torch.manual_seed(0)
    data = dict(observations=torch.randn(500, 5), next_observations=torch.randn(500, 5),
                actions=torch.rand(500, 3) * 2 - 1, rewards=torch.randn(500), costs=torch.randn(500) / 10,
                terminals=(torch.rand(500) < 0.3).double(), timeouts=torch.zeros(500))
    buffer = buffer_of(data)
    s, (options, script, plain) = start(5, 3, marvel.Args()), UPDATES[name]
    # some actions are safe and some are not, and no multiplier is 0
    s.qc_threshold = s.qc(data["observations"], s.actor(data["observations"])[0]).quantile(0.4).item()
    assert s.controller.multiplier == 0.5
    p = throughput.plain_start(s)
    first, ours, theirs = throughput.plain_start(s), script(options, s), plain(options, p)
    seen = set()
    for _ in range(5):
        random_state = torch.get_rng_state()
        mine = ours(buffer.sample(64))
        torch.set_rng_state(random_state)
        for key, value in theirs(buffer.sample(64)).items():
            value, expected = torch.as_tensor(value), torch.as_tensor(mine[key])
            torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12, msg=key)
        seen |= {key for key in BRANCHES if 0 < mine.get(key, 0) < 1}
    assert seen == BRANCHES & mine.keys()
    ours = throughput.plain_start(s)
    for network in TRAINED[name]:
        old, mine, theirs = (list(getattr(x, network).parameters()) for x in (first, ours, p))
        assert all(not torch.equal(a, b) for a, b in zip(old, theirs, strict=True)), network
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
    for weight in ("log_alpha", "log_mmd_weight"):
        if hasattr(p, weight):
            torch.testing.assert_close(getattr(s, weight), getattr(p, weight), rtol=0, atol=1e-9)


def test_columns_of_the_data_repeat():
    own, wide = throughput.transitions(8, 2), throughput.transitions(11, 3)
    assert own["observations"].shape == (93_800, 8) and own["actions"].shape == (93_800, 2)
    assert torch.equal(wide["observations"][:, 8:], own["observations"][:, :3])
    assert torch.equal(wide["actions"], own["actions"][:, [0, 1, 0]])
    assert torch.equal(throughput.transitions(3, 1)["next_observations"], own["next_observations"][:, :3])


# --- The floor ---
def test_floor_is_the_matrix_products_of_forward_and_backward_and_no_others():
    obs, act, h, rows = 8, 2, 256, 64
    actor, critic, hidden = obs * h + h * h + h * 2 * act, (obs + act) * h + h * h, h * h
    encoder, decoder = (obs + act) * h + h * h + h * 4 * act, (obs + 2 * act) * h + h * h + h * act
    fit = 3 * (2 * critic + hidden)  # forward, gradients of the weights, of the hidden layer
    targets = actor + 3 * critic
    actor_backward = actor + hidden + h * 2 * act
    vae = 2 * (encoder + decoder) + decoder + hidden + h * 4 * act
    needed = {
        "VPA update": targets + fit,
        "online update": targets + fit + actor + 2 * 3 * critic + actor_backward,
        "offline update": targets + fit + 2 * (actor + actor_backward) + (2 * 2 + 1 + 3) * critic,
        "BEAR-Lag update": vae + actor + 4 * 3 * critic + fit + actor + actor_backward + 2 * 3 * critic
                           + 4 * decoder}
    buffer = buffer_of(throughput.transitions(obs, act))
    for name, (options, script, _) in UPDATES.items():
        update = script(options, start(obs, act, marvel.Args()))
        factors = throughput.matrix_products(lambda update=update: update(buffer.sample(rows)))
        assert sum(a.numel() * b.shape[-1] for a, b in factors) == rows * needed[name], name
        throughput.floor(factors)()


# --- The command ---
def test_command_writes_its_table(tmp_path, capsys):
    output = tmp_path / "speed.md"
    throughput.main(throughput.Args(**QUICK, obs_dim=5, act_dim=3, output=str(output)))
    assert list(tmp_path.iterdir()) == [output]
    text = output.read_text()
    assert text in capsys.readouterr().out
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()
            if line.startswith("| ")]
    versions = {}
    for row in rows[1:]:
        assert len(row) == len(rows[0])
        versions.setdefault(row[0], []).append(row[1])
    assert all(versions[name] == ["script", "plain", "matrix products"] for name in UPDATES)
    assert len(versions) == len(UPDATES) + 4
    assert "5 observations, 3 actions" in text and str(tmp_path) not in text


def test_ratios_are_taken_inside_a_round_and_spread_over_rounds():
    groups = {"update": {"script": None, "plain": None}}
    rates = {("update", "script"): np.array([[20.0, 40], [200, 400], [60, 120]]),
             ("update", "plain"): np.array([[10.0, 10], [50, 100], [20, 20]])}
    first, second = throughput.table_rows(groups, rates).splitlines()
    assert first.startswith("| update | script | 20 / **60** / 200 | 40 / **120** / 400 | 2500 / **8333** /")
    assert first.endswith(" 25000 |  |  |")
    assert second.endswith("| 10000 / **50000** / 100000 | 2 / **3** / 4 | 4 / **4** / 6 |")


def test_call_of_many_steps_counts_as_many():
    rates = clock.measure({"loop": {"script": lambda: None}, "step": {"script": lambda: None}},
                          {"loop": 10_000}, rounds=2, slice_seconds=0.01)
    assert rates["loop", "script"].shape == (2, 2)
    assert (rates["loop", "script"] > 100 * rates["step", "script"]).all()


@pytest.mark.parametrize(("options", "word"), [
    (dict(rounds=0), "--rounds"), (dict(slice_seconds=float("nan")), "--slice-seconds"),
    (dict(obs_dim=0), "--obs-dim"), (dict(output="no/such/folder/x.md"), "--output")])
def test_bad_option_is_one_line(options, word, refusal, tmp_path):
    options = {**QUICK, "output": str(tmp_path / "x.md"), **options}
    assert word in refusal(throughput.main, throughput.Args(**options))
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def own_fsrl(monkeypatch):
    """The stand-in for FSRL's loggers is gone after the test."""
    for name in ("fsrl", "fsrl.utils"):
        monkeypatch.setitem(sys.modules, name, None)


def test_missing_peer_is_one_line(monkeypatch, own_fsrl, refusal, tmp_path):
    monkeypatch.setitem(sys.modules, "osrl", None)  # as if it were not installed
    options = throughput.Args(**QUICK, peer="osrl", output=str(tmp_path / "x.md"))
    assert refusal(throughput.main, options).startswith("error: --peer osrl: needs a checkout")
    assert list(tmp_path.iterdir()) == []


def test_peers_trainers_are_timed_with_and_without_their_loader(monkeypatch, own_fsrl):
    """With a stand-in for OSRL that has its interface and only counts."""
    steps = []
    package, algorithms, parts = ModuleType("osrl"), ModuleType("osrl.algorithms"), ModuleType("osrl.common")
    package.__path__ = []

    def trainer(model, env, logger, **rates):
        return SimpleNamespace(train_one_step=lambda *batch: steps.append(batch))

    algorithms.BEARL = lambda **sizes: sizes
    algorithms.BEARLTrainer = trainer

    class Rows(torch.utils.data.IterableDataset):
        def __init__(self, arrays):
            self.arrays = arrays

        def __iter__(self):
            while True:
                yield tuple(self.arrays[key][0] for key in common.DATASET_KEYS[:6])

    parts.TransitionDataset = Rows
    for module in (package, algorithms, parts):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    trainers = throughput.osrl_trainers(throughput.transitions(5, 3), batch_size=4)
    assert list(trainers) == ["BEAR-Lag update"]
    for versions in trainers.values():
        assert list(versions) == ["OSRL", "OSRL with DataLoader"]
        for step in versions.values():
            step()
    assert len(steps) == 2
    assert all(batch[0].shape == (4, 5) for batch in steps)
