"""The documents say what the commands and the files do."""

import re
from pathlib import Path

import pytest

from benchmark.evidence import report

pytestmark = pytest.mark.pins
ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "benchmark").glob("**/*.md"))]
COMMAND = re.compile(r"python ((?:benchmark/)?[\w/]+\.py)")


def test_ci_runs_the_readmes_test_command():
    (command,) = re.findall(r"^test_command='(.*)'$", (ROOT / ".ci/run").read_text(), re.MULTILINE)
    blocks = re.findall(r"^```bash\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert command in [line.strip() for block in blocks for line in block.splitlines()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_and_link_of_a_page_leads_to_a_file(page):
    text = page.read_text()
    if page.parent.name not in ("reports", "results"):  # those tell which command made them, at their time
        assert [path for path in COMMAND.findall(text) if not (ROOT / path).is_file()] == []
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    assert [link for link in links if link and not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_to_a_heading_has_one(page):
    for link in re.findall(r"\]\(([^)\s]*#[^)\s]+)\)", page.read_text()):
        file, _, anchor = link.partition("#")
        if "://" in link:
            continue
        target = (page.parent / file) if file else page
        headings = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
        anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
        assert anchor in anchors, link


def test_summary_is_what_the_report_makes_of_the_result_files():
    assert (report.RESULTS / "summary.md").read_text() == report.summary(report.read_results())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_tables_of_a_page_are_what_the_report_makes_of_the_result_files(page):
    text = page.read_text()
    assert report.fill_tables(text, report.read_results()) == text
