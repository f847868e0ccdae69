"""time_shares.py books all of the time, once."""

import re
import time
from functools import partial
from types import SimpleNamespace

import pytest

import marvel_sac_pid
import offline_pretrain
from benchmark.speed import time_shares


def test_time_is_booked_on_the_innermost_part_and_an_error_ends_it(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def work(seconds, then=lambda: None):
        now[0] += seconds
        then()
        now[0] += seconds

    def fail():
        raise ValueError

    clock, owner = time_shares.Clock(), SimpleNamespace(inner=lambda: work(10), outer=None, fail=fail)
    owner.outer = lambda: work(1, owner.inner)
    for name in ("inner", "outer", "fail"):
        clock.watch(name, owner, name)
    work(100, owner.outer)
    with pytest.raises(ValueError):
        owner.fail()
    clock.switch()
    assert clock.seconds == {"the rest": 200, "outer": 2, "inner": 20, "fail": 0}
    assert clock.inside == ["the rest"]


def test_shares_of_real_runs_add_up_and_the_large_parts_take_time(tmp_path, monkeypatch, capsys):
    for functions in time_shares.PARTS.values():
        for owner, name in functions:
            monkeypatch.setattr(owner, name, getattr(owner, name))  # to be put back after the test
    for script in (offline_pretrain, marvel_sac_pid):
        monkeypatch.setattr(script, "Args", partial(script.Args, eval_episodes=1))
    time_shares.main(time_shares.Args(
        update_steps=20, total_timesteps=200, vpa_steps=10, output=str(tmp_path / "shares.md")))
    text = (tmp_path / "shares.md").read_text()
    assert text in capsys.readouterr().out
    rows = dict(re.findall(r"^\| ([^|]+) \| ([^|]+ \| [^|]+) \|$", text, re.MULTILINE))
    assert rows.pop("share of the time") == "offline_pretrain.py | marvel_sac_pid.py"
    assert min(float(x) for x in rows.pop("seconds").split(" | ")) > 0
    shares = [[float(x.removesuffix(" %")) for x in row.split(" | ")] for row in rows.values()]
    assert [sum(column) for column in zip(*shares, strict=True)] == pytest.approx([100, 100], abs=1)
    assert rows.keys() == {*time_shares.PARTS, "the rest"}
    large = "simulator", "targets", "losses, forward", "losses, backward", "Adam", "dataset and checkpoints"
    assert all(max(share) > 0 for part, share in zip(rows, shares, strict=True) if part in large)


@pytest.mark.parametrize("option", ["update_steps", "total_timesteps", "vpa_steps"])
def test_runs_of_no_step_are_refused(refusal, option):
    assert f"--{option.replace('_', '-')} 0" in refusal(time_shares.main, time_shares.Args(**{option: 0}))
