"""Checkpoints come back bit-equal, run no code, and anything else is refused in one line."""

import os
import pickle
from importlib.metadata import version

import pytest
import torch
from small import Payload, equal

import common


def contents():
    torch.manual_seed(0)
    net = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    net(torch.randn(5, 3)).square().sum().backward()
    optimizer.step()
    return {"actor": net.state_dict(), "optimizer": optimizer.state_dict(), "env_id": "SafetyBallCircle-v0",
            "gamma": 0.99, "costs": [1.0, 0.1 + 0.2], "nested": {"none": None, "flag": True, "n": 3},
            "special": torch.tensor([float("inf"), -0.0, 1e-45])}


@pytest.fixture
def path(tmp_path):
    """A good checkpoint's file."""
    common.save_checkpoint(tmp_path / "checkpoint.pt", contents())
    return tmp_path / "checkpoint.pt"


def test_saved_checkpoint_comes_back_bit_equal_and_alone(path):
    loaded = common.load_checkpoint(path)
    assert loaded.pop("version") == common.CHECKPOINT_VERSION
    assert loaded.pop("packages") == {name: version(name) for name in ("torch", "numpy", "gymnasium")}
    assert equal(contents(), loaded)
    assert not equal(contents(), loaded | {"special": torch.tensor([float("inf"), 0.0, 1e-45])})
    assert os.listdir(path.parent) == ["checkpoint.pt"]


def test_failed_saving_leaves_the_old_checkpoint_as_it_was(path):
    before = path.read_bytes()
    with pytest.raises((pickle.PicklingError, AttributeError)):
        common.save_checkpoint(path, {"actor": torch.zeros(10_000), "bad": lambda: None})
    assert path.read_bytes() == before


@pytest.mark.parametrize("change", [
    *(lambda x, share=share: x[:int(share * len(x))] for share in (0, 0.001, 0.3, 0.9, 0.999)),
    lambda x: x[:-1], lambda x: b"PK\x03\x04", lambda x: bytes(len(x)), lambda x: b"step,return\n1,2\n",
    lambda x: os.urandom(1000)])
def test_truncated_file_and_other_bytes_are_refused(path, refusal, change):
    path.write_bytes(change(path.read_bytes()))
    line = refusal(common.load_checkpoint, path)
    assert str(path) in line and "not a readable checkpoint" in line


@pytest.mark.parametrize("k", [0, 1700, 3999])
def test_single_bit_of_a_number_that_has_changed_is_noticed(tmp_path, refusal, k):
    path, weights = tmp_path / "checkpoint.pt", torch.arange(1.0, 1001)  # none is denormal when changed
    common.save_checkpoint(path, {"actor": weights})
    content = bytearray(path.read_bytes())
    start = content.index(weights.numpy().tobytes())
    content[start + k] ^= 1
    path.write_bytes(content)
    assert not torch.equal(torch.load(path, weights_only=True)["actor"], weights)  # torch does not notice
    assert f"{path}: damaged" in refusal(common.load_checkpoint, path)


@pytest.mark.parametrize("wrap", [
    lambda code: {"actor": code}, lambda code: {"evaluations": [{"mean": (1, [code])}]},
    lambda code: {"version": code}, lambda code: code], ids=["network", "nested", "version", "alone"])
@pytest.mark.parametrize("how", ["torch", "old torch", "pickle"])
def test_checkpoint_that_carries_code_is_refused_and_the_code_not_run(tmp_path, refusal, wrap, how):
    path, created = tmp_path / "checkpoint.pt", tmp_path / "created"
    content = wrap(Payload(created))
    if isinstance(content, dict):
        content = {"version": common.CHECKPOINT_VERSION} | content
    if how == "pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how == "torch")
    assert str(path) in refusal(common.load_checkpoint, path)
    assert not created.exists()
    with open(path, "rb") as file:  # the payload is a live one: a careless reader runs it
        pickle.load(file) if how == "pickle" else torch.load(file, weights_only=False)
    assert created.exists()


def test_missing_file_is_answered_with_the_command_that_makes_one(tmp_path, refusal):
    for path in tmp_path / "nothing.pt", tmp_path, "x" * 300:
        line = refusal(common.load_checkpoint, path)
        assert f"{path}: no such file" in line and "offline_pretrain.py" in line


@pytest.mark.parametrize("content", [
    {"version": common.CHECKPOINT_VERSION + 1}, {"version": common.CHECKPOINT_VERSION - 1},
    {"version": str(common.CHECKPOINT_VERSION)}, {"version": torch.tensor([3, 3])}, {}, [1, 2],
    torch.zeros(3)], ids=repr)
def test_other_version_or_no_version_is_refused(tmp_path, refusal, content):
    path = tmp_path / "checkpoint.pt"
    torch.save(content, path)
    line = refusal(common.load_checkpoint, path)
    assert str(path) in line and "version" in line


FACTS = {"env_id": "SafetyBallCircle-v0", "obs_dim": 8, "act_dim": 2, "hidden": 256, "activation": "relu",
         "gamma": 0.99, "reward_scale": 0.1}
NETWORKS = {name: torch.nn.Linear(3, 2) for name in ("actor", "q")}
GOOD = FACTS | {name: net.state_dict() for name, net in NETWORKS.items()} | {"finished": True, "more": 1}


@pytest.fixture
def load(tmp_path):
    """load(checkpoint, names): take networks of these names from a file with this content."""
    def call(content, names=("actor", "q")):
        path = tmp_path / "some.pt"
        common.save_checkpoint(path, content)
        nets = {name: torch.nn.Linear(3, 2) for name in names}
        common.load_weights(path, FACTS, **nets)
        return nets

    return call


def test_weights_are_taken_by_name_and_only_those_that_are_asked_for_have_to_be_there(load):
    for names in ("actor", "q"), ("actor",):
        needed = {*FACTS, *names, "finished"}
        nets = load({key: value for key, value in GOOD.items() if key in needed}, names)
        assert all(equal(nets[name].state_dict(), GOOD[name]) for name in names)


@pytest.mark.parametrize(("fact", "value"), [
    ("env_id", "SafetyCarCircle-v0"), ("obs_dim", 7), ("act_dim", 3), ("hidden", 64), ("activation", "tanh"),
    ("gamma", 0.95), ("reward_scale", 1.0), ("gamma", None), ("obs_dim", torch.tensor([8, 8]))], ids=str)
def test_checkpoint_of_another_run_is_refused_by_the_name_of_the_fact(load, refusal, fact, value):
    line = refusal(load, GOOD | {fact: value})
    assert f"some.pt: {fact} is {value}, this run needs {FACTS[fact]}" in line
    assert f"{fact} is None" in refusal(load, {name: x for name, x in GOOD.items() if name != fact})


@pytest.mark.parametrize("finished", [False, None, 1])
def test_checkpoint_of_a_run_that_is_not_finished_is_no_starting_point(load, refusal, finished):
    assert "some.pt: " in refusal(load, GOOD | {"finished": finished})


WEIGHTS = {"weight": torch.ones(2, 3), "bias": torch.zeros(2)}


@pytest.mark.parametrize("bad", [
    None, {}, 3, "text", torch.zeros(2), {"weight": "text"}, {"weight": torch.ones(2, 3)},
    WEIGHTS | {"weight": None}, WEIGHTS | {"more": torch.zeros(2)}, WEIGHTS | {"weight": torch.ones(3, 2)},
    *(WEIGHTS | {"bias": torch.tensor([0.0, value])} for value in (float("nan"), float("inf"))),
    *(WEIGHTS | {"weight": change(torch.ones(2, 3))} for change in (
        torch.Tensor.to_sparse, torch.Tensor.double, torch.Tensor.half, torch.Tensor.int,
        lambda x: x.to("meta"), lambda x: x.to(torch.complex64)))], ids=repr)
@pytest.mark.parametrize("network", NETWORKS)
def test_network_that_is_another_or_not_finite_is_refused_by_its_name(load, refusal, network, bad):
    line = refusal(load, GOOD | {network: bad})
    assert "some.pt: " in line and network in line.partition("some.pt: ")[2]
