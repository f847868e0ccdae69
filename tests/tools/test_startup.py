"""benchmark/speed/startup.py times runs that train, and counts every import once."""

import re

import pytest
from conftest import run_script, single_line

from benchmark.speed.startup import import_seconds


def test_imports_are_counted_by_package_without_those_inside_them():
    report = ("import time: self [us] | cumulative | imported package\n"
              "import time:       100 |        100 |     torch.nn\n"
              "import time:      2000 |       2100 |   torch\n"
              "a warning of some package\n"
              "import time:        50 |       2150 | common\n")
    assert import_seconds(report) == {"torch": pytest.approx(2100e-6), "common": pytest.approx(50e-6)}


def test_both_scripts_are_timed_and_torch_is_among_the_imports(tmp_path):
    status, stdout, stderr = run_script(
        "benchmark/speed/startup.py", "--rounds", 1, "--output", "x.md", cwd=tmp_path)
    assert status == 0, stderr
    assert (tmp_path / "x.md").read_text() in stdout
    offline, online, imports = stdout.strip().splitlines()[-3:]
    for line, script in (offline, "offline_pretrain.py"), (online, "marvel_sac_pid.py"):
        low, middle, high = map(float, re.match(rf"- {script}, .*: (\S+) / (\S+) / (\S+) s", line).groups())
        assert 0.1 < low <= middle <= high
    total, torch = map(float, re.search(r", ([\d.]+) s while .*torch ([\d.]+)", imports).groups())
    assert 0 < torch < total
    assert list(tmp_path.iterdir()) == [tmp_path / "x.md"]


@pytest.mark.parametrize("option", ["--rounds", "--packages"])
def test_nothing_to_time_is_refused(tmp_path, option):
    status, _, stderr = run_script("benchmark/speed/startup.py", option, 0, cwd=tmp_path)
    assert f"{option} 0" in single_line(status, stderr)
