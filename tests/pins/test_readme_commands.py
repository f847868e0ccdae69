"""The command that the README tells users to run is the command that continuous integration runs."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_ci_runs_the_readme_test_command():
    (command,) = re.findall(r"^test_command='(.*)'$", (ROOT / ".ci/run").read_text(), re.MULTILINE)
    blocks = re.findall(r"^```bash\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    readme_lines = [line.strip() for block in blocks for line in block.splitlines()]
    assert command in readme_lines


def test_summary_is_what_the_report_makes_of_the_result_files(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmark")
    import report

    assert (report.RESULTS / "summary.md").read_text() == report.summary(report.read_results())


@pytest.mark.parametrize("readme", ["README.md", "benchmark/README.md"])
def test_tables_of_the_readmes_are_what_the_report_makes_of_the_result_files(monkeypatch, readme):
    monkeypatch.syspath_prepend(ROOT / "benchmark")
    import report

    text = (ROOT / readme).read_text()
    assert text.count("<!-- ") >= 2
    assert report.fill_tables(text, report.read_results()) == text
