"""benchmark/seeds_in_parallel.py and memory.py: what they write, and what they refuse."""

import re

import pytest
from conftest import run_script, single_line


def test_report_gives_the_gain_of_running_together(tmp_path):
    status, stdout, stderr = run_script("benchmark/seeds_in_parallel.py", "--update-steps", 10, "--rounds", 1,
                                        "--output", "x.md", cwd=tmp_path)
    assert status == 0, stderr
    low, middle, high = map(float, re.search(r"time: (\S+) / (\S+) / (\S+) times", stdout).groups())
    assert 0 < low == middle == high and (tmp_path / "x.md").read_text() in stdout


@pytest.mark.parametrize(("script", "options"), [
    ("seeds_in_parallel", ("--seeds", 0)), ("seeds_in_parallel", ("--rounds", 0)),
    ("seeds_in_parallel", ("--update-steps", 0)), ("memory", ("--first", 250)),
    ("memory", ("--last", 20_050)), ("memory", ("--first", 300, "--last", 200))])
def test_what_cannot_be_measured_is_refused(tmp_path, script, options):
    status, _, stderr = run_script(f"benchmark/{script}.py", *options, cwd=tmp_path)
    assert f"{options[0]} {options[1]}" in single_line(status, stderr) and list(tmp_path.iterdir()) == []
