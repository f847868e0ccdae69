"""Checkpoints come back bit-equal, run no code, and anything else is refused in one line."""

import os
import pickle
from functools import partial
from importlib.metadata import version

import pytest
import torch

import common


class Payload:
    """Unpickled without care, this creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def contents():
    torch.manual_seed(0)
    net = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    net(torch.randn(5, 3)).square().sum().backward()
    optimizer.step()
    return {"actor": net.state_dict(), "optimizer": optimizer.state_dict(), "env_id": "SafetyBallCircle-v0",
            "gamma": 0.99, "costs": [1.0, 0.1 + 0.2], "nested": {"none": None, "flag": True, "n": 3},
            "special": torch.tensor([float("inf"), -0.0, 1e-45])}


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a.view(-1).view(torch.uint8), b.view(-1).view(torch.uint8))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and a == b


def test_saved_checkpoint_comes_back_bit_equal(tmp_path):
    saved = contents()
    common.save_checkpoint(tmp_path / "checkpoint.pt", saved)
    loaded = common.load_checkpoint(tmp_path / "checkpoint.pt")
    assert loaded.pop("version") == common.CHECKPOINT_VERSION
    assert loaded.pop("packages") == {name: version(name) for name in ("torch", "numpy", "gymnasium")}
    assert equal(saved, loaded)
    assert not equal(saved, loaded | {"special": torch.tensor([float("inf"), 0.0, 1e-45])})


def test_no_other_file_is_left_beside_the_checkpoint(tmp_path):
    common.save_checkpoint(tmp_path / "checkpoint.pt", contents())
    assert os.listdir(tmp_path) == ["checkpoint.pt"]


def test_failed_saving_leaves_the_old_checkpoint_as_it_was(tmp_path):
    path = tmp_path / "checkpoint.pt"
    common.save_checkpoint(path, contents())
    before = path.read_bytes()
    with pytest.raises((pickle.PicklingError, AttributeError)):
        common.save_checkpoint(path, {"actor": torch.zeros(10_000), "bad": lambda: None})
    assert path.read_bytes() == before


@pytest.mark.parametrize("share", [0.001, 0.3, 0.9, 0.999])
def test_truncated_checkpoint_is_refused(tmp_path, refusal, share):
    path = tmp_path / "checkpoint.pt"
    common.save_checkpoint(path, contents())
    whole = path.read_bytes()
    path.write_bytes(whole[:max(1, int(share * len(whole)))])
    line = refusal(common.load_checkpoint, path)
    assert str(path) in line and "not a readable checkpoint" in line


@pytest.mark.parametrize("content", [b"PK\x03\x04", b"\x00" * 1000, b"step,return\n1,2\n", os.urandom(1000)])
def test_other_bytes_are_refused(tmp_path, refusal, content):
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(content)
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


def test_empty_file_is_refused(tmp_path, refusal):
    path = tmp_path / "checkpoint.pt"
    path.touch()
    assert str(path) in refusal(common.load_checkpoint, path)


@pytest.mark.parametrize("how", ["pickle", "torch", "old-torch"])
def test_checkpoint_that_carries_code_is_refused_and_the_code_not_run(tmp_path, refusal, how):
    path, created = tmp_path / "checkpoint.pt", tmp_path / "created"
    payload = {"version": common.CHECKPOINT_VERSION, "actor": Payload(created)}
    with open(path, "wb") as file:
        if how == "pickle":
            pickle.dump(payload, file, protocol=2)
        else:
            torch.save(payload, file, _use_new_zipfile_serialization=how == "torch")
    assert str(path) in refusal(common.load_checkpoint, path)
    assert not created.exists()
    if how == "torch":  # the payload is a live one: a careless reader runs it
        torch.load(path, weights_only=False)["actor"].close()
        assert created.exists()


def test_missing_file_is_answered_with_the_command_that_makes_one(tmp_path, refusal):
    line = refusal(common.load_checkpoint, tmp_path / "nothing.pt")
    assert "nothing.pt: no such file" in line and "offline_pretrain.py" in line
    assert "no such file" in refusal(common.load_checkpoint, tmp_path)


@pytest.mark.parametrize("content", [
    {"version": common.CHECKPOINT_VERSION + 1}, {"version": common.CHECKPOINT_VERSION - 1},
    {"version": str(common.CHECKPOINT_VERSION)}, {}, [1, 2], torch.zeros(3)])
def test_other_version_or_no_version_is_refused(tmp_path, refusal, content):
    path = tmp_path / "checkpoint.pt"
    torch.save(content, path)
    line = refusal(common.load_checkpoint, path)
    assert str(path) in line and "version" in line


EXPECTED = {"env_id": "SafetyBallCircle-v0", "obs_dim": 8, "act_dim": 2, "hidden": 256, "activation": "relu",
            "gamma": 0.99, "reward_scale": 0.1, "finished": True}
NETWORKS = {name: torch.nn.Linear(3, 2) for name in ("actor", "q", "qc")}
GOOD = EXPECTED | {name: net.state_dict() for name, net in NETWORKS.items()} | {"more": 1}


@pytest.mark.parametrize(("field", "value"), [
    ("env_id", "SafetyCarCircle-v0"), ("obs_dim", 7), ("act_dim", 3), ("hidden", 64), ("activation", "tanh"),
    ("gamma", 0.95), ("reward_scale", 1.0), ("finished", False)])
def test_checkpoint_of_another_run_is_refused_by_the_name_of_the_field(refusal, field, value):
    common.check_checkpoint("some.pt", GOOD, EXPECTED)
    line = refusal(common.check_checkpoint, "some.pt", GOOD | {field: value}, EXPECTED)
    assert f"some.pt: {field} is {value}, this run needs {EXPECTED[field]}" in line
    lacking = {name: x for name, x in GOOD.items() if name != field}
    assert f"{field} is None" in refusal(common.check_checkpoint, "some.pt", lacking, EXPECTED)


@pytest.mark.parametrize("bad", [
    None, {}, 3, "text", torch.zeros(2), {"weight": "text"}, {"weight": None},
    {"weight": torch.ones(2, 3), "bias": torch.tensor([0.0, float("nan")])},
    {"weight": torch.ones(2, 3), "bias": torch.tensor([0.0, float("inf")])},
    {"weight": torch.ones(3, 2), "bias": torch.zeros(2)}, {"weight": torch.ones(2, 3)},
    {"weight": torch.ones(2, 3), "bias": torch.zeros(2), "more": torch.zeros(2)}], ids=repr)
@pytest.mark.parametrize("network", NETWORKS)
def test_network_that_is_no_network_or_not_finite_is_refused_by_its_name(refusal, network, bad):
    common.check_checkpoint("some.pt", GOOD, EXPECTED, **NETWORKS)
    line = refusal(partial(common.check_checkpoint, **NETWORKS), "some.pt", GOOD | {network: bad}, EXPECTED)
    assert f"some.pt: {network} is missing" in line and "not finite, or of another shape" in line


@pytest.mark.parametrize("network", NETWORKS)
def test_only_the_networks_that_are_needed_have_to_be_there(refusal, network):
    lacking = {name: x for name, x in GOOD.items() if name != network}
    line = refusal(partial(common.check_checkpoint, **NETWORKS), "some.pt", lacking, EXPECTED)
    assert f"some.pt: {network} is missing" in line
    others = {name: net for name, net in NETWORKS.items() if name != network}
    common.check_checkpoint("some.pt", lacking, EXPECTED, **others)
