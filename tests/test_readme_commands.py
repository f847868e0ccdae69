"""The command that the README tells users to run is the command that continuous integration runs."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_ci_runs_the_readme_test_command():
    (command,) = re.findall(r"^test_command='(.*)'$", (ROOT / ".ci/run").read_text(), re.MULTILINE)
    blocks = re.findall(r"^```bash\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    readme_lines = [line.strip() for block in blocks for line in block.splitlines()]
    assert command in readme_lines
