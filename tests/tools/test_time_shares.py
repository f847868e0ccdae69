"""benchmark/speed/time_shares.py books all of the time, once."""

import re

import pytest
from conftest import run_script, single_line


def test_shares_add_up_and_every_part_takes_time(tmp_path):
    status, stdout, stderr = run_script(
        "benchmark/speed/time_shares.py", "--update-steps", 20, "--total-timesteps", 200, "--vpa-steps", 10,
        "--output", tmp_path / "shares.md", cwd=tmp_path)
    assert status == 0, stderr
    rows = dict(re.findall(r"^\| ([^|]+) \| ([^|]+ \| [^|]+) \|$", stdout, re.MULTILINE))
    assert rows.pop("share of the time") == "offline_pretrain.py | marvel_sac_pid.py"
    seconds = [float(x) for x in rows.pop("seconds").split(" | ")]
    shares = [[float(x.removesuffix(" %")) for x in row.split(" | ")] for row in rows.values()]
    assert [sum(column) for column in zip(*shares, strict=True)] == pytest.approx([100, 100], abs=1)
    assert min(seconds) > 0
    assert all(max(share) > 0 for part, share in zip(rows, shares, strict=True)
               if part in ("simulator", "losses, backward", "dataset and checkpoints"))
    assert (tmp_path / "shares.md").read_text() in stdout


@pytest.mark.parametrize("option", ["--update-steps", "--total-timesteps", "--vpa-steps"])
def test_runs_of_no_step_are_refused(tmp_path, option):
    status, _, stderr = run_script("benchmark/speed/time_shares.py", option, 0, cwd=tmp_path)
    assert f"{option} 0" in single_line(status, stderr)
