"""Seeds that train stacked learn what each learns alone, with the scripts' own updates."""

from dataclasses import replace

import pytest
import torch

import marvel_sac_pid as marvel
import offline_pretrain as offline
from benchmark import many_seeds
from benchmark.throughput import UPDATES, start

QUICK = dict(rounds=1, slice_seconds=1e-4, seeds=(1, 2))
CRITICS = ("q", "qc", "q_target", "qc_target")
TRAINED = {"VPA update": CRITICS, "CPQ update": (*CRITICS, "actor", "actor_target", "vae")}
BATCH, STEPS = 64, 5

# what is 0 or 1 as long as one branch only is taken
SHARES = {"safe_share", "ood_share", "imitated_share"}


@pytest.fixture
def double_precision():
    """Adam's first step is the learning rate times the sign of a gradient: float32 cannot compare that."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def data(double_precision):
    torch.manual_seed(0)
    return dict(observations=torch.randn(500, 5), next_observations=torch.randn(500, 5),
                actions=torch.rand(500, 3) * 2 - 1, rewards=torch.randn(500), costs=torch.randn(500) / 10,
                terminals=(torch.rand(500) < 0.3).double())


def networks(seed, data):
    """A seed's own, with a threshold that makes some of the policies' actions safe and some not."""
    torch.manual_seed(seed)
    s = start(5, 3, marvel.Args())
    s.qc_threshold = 0.0
    s.qc.biases[2].data -= s.qc(data["observations"], s.actor(data["observations"])[0]).median()
    return s


def draw_per_seed(monkeypatch, seeds):
    """From now on random numbers for all seeds are those that each seed alone draws."""
    generators, randint = [torch.Generator().manual_seed(seed) for seed in seeds], torch.randint

    def indices(high, size, device):
        return torch.cat([randint(high, (size[0] // len(seeds),), generator=g) for g in generators])

    def noise(like):
        return torch.stack([torch.randn(like.shape[1:], generator=g) for g in generators])

    monkeypatch.setattr(torch, "randint", indices)
    monkeypatch.setattr(torch, "randn_like", noise)


def part_of(network, k, seeds):
    """The parameters of seed k in a stacked network, laid out as the script's."""
    for module in network.modules():
        if isinstance(module, many_seeds.Linear):
            yield from (module.weight[k].T, module.bias[k, 0])
        elif isinstance(module, offline.Critic):
            yield from (p.unflatten(0, (-1, seeds))[:, k] for p in module.parameters())


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("seeds", [[7], [3, 1, 2]])
def test_every_stacked_seed_equals_its_run_alone(name, seeds, data, monkeypatch):
    args, script, _ = UPDATES[name]
    if name == "CPQ update":
        args = replace(args, ood_quantile=0.5)
    alone, losses = [networks(seed, data) for seed in seeds], []
    stacked = many_seeds.stack_seeds([networks(seed, data) for seed in seeds], offline.Args())
    first = [networks(seed, data) for seed in seeds]
    for seed, s in zip(seeds, alone, strict=True):
        update = script(args, s)
        torch.manual_seed(seed)
        losses.append([update(offline.sample(data, BATCH)) for _ in range(STEPS)])

    draw_per_seed(monkeypatch, seeds)
    seen = set()
    for step in range(STEPS):
        batch = many_seeds.sample(data, len(seeds), BATCH)
        assert batch["observations"].shape == (len(seeds), BATCH, 5)
        for key, value in many_seeds.STACKED[name](args, stacked, batch).items():
            expected = torch.stack([torch.as_tensor(losses[k][step][key]) for k in range(len(seeds))])
            torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12, msg=key)
            seen |= {key} if ((value > 0) & (value < 1)).any() else set()
    assert name == "VPA update" or seen >= SHARES

    for network in TRAINED[name]:
        for k in range(len(seeds)):
            mine = list(part_of(getattr(stacked, network), k, len(seeds)))
            before, theirs = (list(getattr(x[k], network).parameters()) for x in (first, alone))
            for old, a, b in zip(before, mine, theirs, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
                assert not torch.equal(old, b), network


def test_command_writes_its_table(tmp_path, capsys):
    output = tmp_path / "seeds.md"
    many_seeds.main(many_seeds.Args(**QUICK, output=str(output)))
    assert list(tmp_path.iterdir()) == [output]
    text = output.read_text()
    assert text in capsys.readouterr().out and str(tmp_path) not in text
    header, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()
                     if line.startswith("| ")]
    versions = ["script", "1 stacked", "2 stacked"]
    assert [row[:2] for row in rows] == [[name, version] for name in TRAINED for version in versions]
    assert all(len(row) == len(header) and (row[1] == "script") == (row[-1] == "") for row in rows)


def test_a_call_is_a_step_of_every_seed(monkeypatch):
    clock = dict(wall=0.0, cpu=0.0)
    monkeypatch.setattr(many_seeds.time, "perf_counter", lambda: clock["wall"])
    monkeypatch.setattr(many_seeds.time, "process_time", lambda: clock["cpu"])

    def step():
        clock["wall"] += 2.0
        clock["cpu"] += 0.5

    assert many_seeds.measure(step, 20, 5.0, cuda=False) == (10.0, 40.0)
    assert clock["wall"] == 6.0
    many_seeds.measure(step, 20, 0.0, cuda=False)
    assert clock["wall"] == 8.0


@pytest.mark.parametrize(("options", "word"), [
    (dict(rounds=0), "--rounds"), (dict(seeds=(5, 0)), "--seeds"),
    (dict(slice_seconds=0.0), "--slice-seconds"),
    (dict(slice_seconds=float("nan")), "--slice-seconds"), (dict(output="no/such/folder/x.md"), "--output"),
    (dict(cuda=True), "--cuda: torch finds no GPU here")])
def test_bad_option_is_one_line(options, word, refusal, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    options = {**QUICK, "output": str(tmp_path / "x.md"), **options}
    assert word in refusal(many_seeds.main, many_seeds.Args(**options))
    assert list(tmp_path.iterdir()) == []
