"""benchmark/soak.py sees what it is there to see: other numbers, refused damage, and what does not hold."""

import random

import pytest
import torch
from conftest import TINY_OFFLINE, run_script, single_line

import offline_pretrain
from benchmark import soak


@pytest.fixture
def run_dir(tmp_path, ball_file):
    """A finished tiny run."""
    offline_pretrain.main(offline_pretrain.Args(
        **{**TINY_OFFLINE, "update_steps": 5}, dataset_path=str(ball_file), run_dir=str(tmp_path / "run")))
    return tmp_path / "run"


def test_one_bit_makes_two_checkpoints_differ(run_dir):
    one, other = soak.numbers(run_dir), soak.numbers(run_dir)
    assert soak.equal(one, other)
    other["actor"]["fc1.bias"].view(torch.int32)[3] ^= 1
    assert not soak.equal(one, other)
    assert not soak.equal(one, {**one, "step": one["step"] + 1})
    assert not soak.equal({**one, "step": float("nan")}, one)


@pytest.mark.parametrize("seed", range(12))
def test_damage_changes_exactly_one_file(run_dir, seed):
    before = soak.snapshot(run_dir)
    file, how = soak.corrupt(run_dir, random.Random(seed))
    after = soak.snapshot(run_dir)
    assert {name for name in before if before[name] != after[name]} == {file.name}
    assert how in ("cut", "byte", "zeros")


def test_what_does_not_hold_is_counted_and_named(tmp_path, capsys):
    watch = soak.Soak(tmp_path)
    watch.check(True, "fine")
    watch.check(False, "metrics.csv differs")
    watch.count("SIGKILL")
    assert watch.failures == ["metrics.csv differs"] and watch.counts == {"SIGKILL": 1}
    assert "FAILED metrics.csv differs" in capsys.readouterr().out


@pytest.mark.parametrize("options", [["--minutes", 0], ["--jobs", 0]])
def test_soak_of_no_time_is_refused(tmp_path, options):
    status, _, stderr = run_script("benchmark/soak.py", *options, cwd=tmp_path)
    assert "--minutes, --jobs" in single_line(status, stderr)
