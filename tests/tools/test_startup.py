"""startup.py times runs that train, and counts every import once."""

import pytest

from benchmark.speed import startup


def test_imports_are_counted_by_package_without_those_inside_them():
    report = ("import time: self [us] | cumulative | imported package\n"
              "import time:       100 |        100 |     torch.nn\n"
              "import time:      2000 |       2100 |   torch\n"
              "a warning of some package\n"
              "import time:        50 |       2150 | common\n")
    assert startup.import_seconds(report) == {"torch": pytest.approx(2100e-6), "common": pytest.approx(50e-6)}


def test_a_timed_run_trains_and_its_imports_are_a_part_of_its_time(tmp_path):
    seconds, report = startup.run(tmp_path, startup.OFFLINE, "-X", "importtime")
    imports = startup.import_seconds(report)
    assert 0 < imports["torch"] < imports.total() < seconds
    assert (tmp_path / "offline/checkpoint.pt").is_file()


def test_report_has_both_scripts_times_and_the_largest_imports(tmp_path, monkeypatch, capsys):
    # the first run of either is not counted
    times = {"offline_pretrain.py": [9.0, 3.0, 1.0, 2.0], "marvel_sac_pid.py": [9.0, 6.0, 5.0, 4.0]}

    def run(folder, command, *options):
        if options:
            return 0.0, "import time: 2000000 | 1 | torch\nimport time: 500000 | 1 | common\n"
        return times[command.split()[0]].pop(0), ""

    monkeypatch.setattr(startup, "run", run)
    startup.main(startup.Args(rounds=3, packages=1, output=str(tmp_path / "x.md")))
    text = (tmp_path / "x.md").read_text()
    assert "offline_pretrain.py, a run of one gradient step: 1.00 / 2.00 / 3.00 s" in text
    assert "marvel_sac_pid.py, a run of one gradient step: 4.00 / 5.00 / 6.00 s" in text
    assert text.endswith(", 2.50 s while each is timed: torch 2.00\n") and text in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [tmp_path / "x.md"]


@pytest.mark.parametrize("option", ["rounds", "packages"])
def test_nothing_to_time_is_refused(refusal, option):
    assert f"--{option} 0" in refusal(startup.main, startup.Args(**{option: 0}))
