"""benchmark/soak.py sees what it is there to see: other numbers, refused damage, and what does not hold."""

import random

import pytest
import torch
from small import OFFLINE, transitions, write_arrays

import offline_pretrain
from benchmark import soak


@pytest.fixture
def run_dir(tmp_path):
    """A finished small run."""
    data = write_arrays(tmp_path / "data.hdf5", transitions())
    offline_pretrain.main(offline_pretrain.Args(
        **{**OFFLINE, "update_steps": 5}, dataset_path=str(data), run_dir=str(tmp_path / "run")))
    return tmp_path / "run"


def test_one_bit_makes_two_checkpoints_differ(run_dir):
    one, other = soak.numbers(run_dir), soak.numbers(run_dir)
    assert soak.equal(one, other)
    other["actor"]["fc1.bias"].view(torch.int32)[3] ^= 1
    assert not soak.equal(one, other)
    assert not soak.equal(one, {**one, "progress": {"update_steps": 6}})
    assert not soak.equal({**one, "gamma": float("nan")}, one)


def test_damage_changes_exactly_one_file(run_dir):
    before, damaged = soak.snapshot(run_dir), set()
    for seed in range(12):
        file, how = soak.corrupt(run_dir, random.Random(seed))
        after = soak.snapshot(run_dir)
        assert [name for name in before if before[name] != after[name]] == [file.name]
        file.write_bytes(before[file.name])
        damaged.add((file.name, how))
    assert damaged == {("config.json", "cut"), ("metrics.csv", "cut"),
                       *(("checkpoint.pt", how) for how in ("cut", "byte", "zeros"))}


def test_corruption_of_every_kind_is_tried_and_found_to_be_refused(run_dir):
    watch, resume = soak.Soak(run_dir.parent), ["offline_pretrain.py", "--resume", str(run_dir)]
    before = soak.snapshot(run_dir)
    for seed in 0, 1:
        soak.try_corrupted(watch, run_dir, resume, random.Random(seed))
    assert watch.failures == [] and watch.counts == {"corrupted": 2}
    assert soak.snapshot(run_dir) == before


def test_what_does_not_hold_is_counted_and_named(tmp_path, capsys):
    watch = soak.Soak(tmp_path)
    watch.check(True, "fine")
    watch.check(False, "metrics.csv differs")
    watch.count("SIGKILL")
    assert watch.failures == ["metrics.csv differs"] and watch.counts == {"SIGKILL": 1}
    assert "FAILED metrics.csv differs" in capsys.readouterr().out


@pytest.mark.parametrize(("printed", "expected"), [
    ("stopped at step 3\n", False), ("Traceback (most recent call last):\nOSError: full\n", True),
    ("Traceback (most recent call last):\nKeyboardInterrupt\n", False),
    ("Exception in thread Thread-1:\nTraceback (most recent call last):\nOSError: full\n", False)])
def test_traceback_is_found_but_for_those_that_must_be(tmp_path, printed, expected):
    (tmp_path / "log.txt").write_text(printed)
    assert soak.has_traceback(tmp_path / "log.txt") == expected


@pytest.mark.parametrize("options", [{"minutes": 0}, {"jobs": 0}])
def test_soak_of_no_time_is_refused(refusal, options):
    assert "--minutes, --jobs" in refusal(soak.main, soak.Args(**options))
