"""What stands in both scripts is the same, and their options are documented."""

import ast
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import marvel_sac_pid
import offline_pretrain

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = {"marvel_sac_pid.py": marvel_sac_pid, "offline_pretrain.py": offline_pretrain}
SAME = {"Actor", "Critic", "sample", "critic_loss"}
DIFFERENT = {"Args", "actor_loss", "main"}


def definitions(script):
    items = vars(script).items()
    return {name for name, item in items if getattr(item, "__module__", None) == script.__name__}


def options(script):
    """Name, annotation and docstring of every field of Args."""
    (args,) = [node for node in ast.parse((ROOT / script).read_text()).body
               if isinstance(node, ast.ClassDef) and node.name == "Args"]
    for k, field in enumerate(args.body):
        if isinstance(field, ast.AnnAssign):
            below = args.body[k + 1] if k + 1 < len(args.body) else None
            is_text = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
            yield field.target.id, ast.unparse(field.annotation), below.value.value if is_text else None


def test_every_shared_name_is_either_the_same_or_meant_to_differ():
    assert definitions(marvel_sac_pid) & definitions(offline_pretrain) == SAME | DIFFERENT


@pytest.mark.parametrize("name", sorted(SAME))
def test_shared_code_is_textually_identical(name):
    ours, theirs = (inspect.getsource(getattr(script, name)) for script in SCRIPTS.values())
    assert ours == theirs


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_option_has_a_docstring_under_it(script):
    found = list(options(script))
    assert len(found) > 15
    assert [name for name, _, text in found if not isinstance(text, str) or not text.strip()] == []


def test_shared_options_have_the_same_type():
    ours, theirs = ({name: annotation for name, annotation, _ in options(script)} for script in SCRIPTS)
    shared = ours.keys() & theirs.keys()
    assert len(shared) > 10
    assert {name: ours[name] for name in shared} == {name: theirs[name] for name in shared}


@pytest.mark.parametrize("name", ["env_id", "seed", "cost_limit", "gamma", "reward_scale"])
def test_options_that_the_handover_depends_on_have_the_same_default(name):
    assert getattr(marvel_sac_pid.Args(), name) == getattr(offline_pretrain.Args(), name)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_mentions_every_option_and_its_text(script):
    run = subprocess.run([sys.executable, ROOT / script, "--help"], capture_output=True, text=True,
                         env={**os.environ, "COLUMNS": "200", "NO_COLOR": "1", "PYTHONIOENCODING": "utf-8"},
                         encoding="utf-8")
    assert run.returncode == 0, run.stderr
    shown = re.sub(r"[\s│]", "", run.stdout)
    for name, _, text in options(script):
        assert re.search(rf"--{name.replace('_', '-')}\b", run.stdout), name
        assert re.sub(r"\s", "", text) in shown, name
