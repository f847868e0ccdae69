"""What stands in several scripts on purpose is the same there, and every option is documented."""

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
from benchmark.baselines import bc_safe, bear_lag, cpq, jsrl, marvel_td3_pid, pex, rlpd, so2

pytestmark = pytest.mark.pins
ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = {"marvel_sac_pid.py": marvel_sac_pid, "offline_pretrain.py": offline_pretrain,
           "benchmark/baselines/cpq.py": cpq, "benchmark/baselines/bear_lag.py": bear_lag,
           "benchmark/baselines/bc_safe.py": bc_safe,
           "benchmark/baselines/jsrl.py": jsrl, "benchmark/baselines/pex.py": pex,
           "benchmark/baselines/so2.py": so2, "benchmark/baselines/rlpd.py": rlpd,
           "benchmark/baselines/marvel_td3_pid.py": marvel_td3_pid}
ONLINE, OFFLINE = {jsrl, pex, so2, rlpd, marvel_td3_pid}, {offline_pretrain, cpq, bear_lag, bc_safe}
# names that stand for the same thing only among the scripts of one group
OWN_TO_A_METHOD = {"Args", "main", "actor_loss"}
# what a baseline may change of Marvel's options: those it has not, those it adds, other defaults
OWN_TO_VPA = {"vpa_steps", "vpa_tau", "vpa_alpha", "vpa_alpha_cost", "vpa_data", "vpa_critics"}
WITHOUT = {jsrl: OWN_TO_VPA | {"dataset_path"}, pex: OWN_TO_VPA | {"learning_starts"},
           so2: OWN_TO_VPA | {"learning_starts"}, rlpd: OWN_TO_VPA | {"checkpoint"},
           marvel_td3_pid: {"vpa_alpha", "vpa_alpha_cost", "vpa_data", "vpa_critics", "learning_starts",
                            "alpha", "autotune"}}
ADDED = {jsrl: ["jump_start_share"], pex: ["temperature"], rlpd: [],
         so2: ["target_noise", "noise_clip", "critic_updates"],
         marvel_td3_pid: ["policy_delay", "exploration_noise", "target_noise", "noise_clip"]}
OTHER_DEFAULTS = {jsrl: {"lagrange_init", "alpha"}, pex: {"lagrange_init"}, so2: {"lagrange_init"},
                  rlpd: {"lagrange_init", "alpha"}, marvel_td3_pid: {"utd"}}
# marked steps of main that a method leaves as they are
SAME_STEPS = {
    jsrl: {"Seeding and task", "Target networks and optimisers", "Update actor", "Update entropy weight"},
    pex: {"Seeding and task", "Target networks and optimisers", "Update actor", "Update entropy weight"},
    so2: {"Seeding and task", "Target networks and optimisers", "Update actor"},
    rlpd: {"Seeding and task", "Networks", "Target networks and optimisers", "Update actor",
           "Update entropy weight", "Update target networks", "Average the actor", "Evaluate, log, save"},
    marvel_td3_pid: {"Seeding and task", "Networks", "Align the multiplier: its unit, and where it begins",
                     "Collect full episodes", "Evaluate, log, save"}}


def definitions(script):
    """Names of the classes and functions that a script defines."""
    own = script.__name__
    return {name for name, item in vars(script).items() if getattr(item, "__module__", None) == own}


def text_of(item):
    """Its source without the marks of the course's exercises, which the baselines do not have."""
    return re.sub(r"^ *# (end of )?exercise \d.*\n", "", inspect.getsource(item), flags=re.MULTILINE)


def sections(script):
    """{mark: text} of the marked steps of main."""
    _, *parts = re.split(r"^ +# --- (.+?) ---$", text_of(script.main), flags=re.MULTILINE)
    return dict(zip(parts[::2], parts[1::2], strict=True))


def options(path):
    """(name, docstring) of every field of a script's Args."""
    (args,) = [node for node in ast.parse((ROOT / path).read_text()).body
               if isinstance(node, ast.ClassDef) and node.name == "Args"]
    for k, field in enumerate(args.body):
        if isinstance(field, ast.AnnAssign):
            below = args.body[k + 1] if k + 1 < len(args.body) else None
            is_text = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
            yield field.target.id, below.value.value if is_text else None


@pytest.mark.parametrize("script", [script for script in SCRIPTS.values() if script is not marvel_sac_pid])
def test_what_a_script_shares_with_marvel_is_the_same_text(script):
    shared = definitions(marvel_sac_pid) & definitions(script) - OWN_TO_A_METHOD
    assert {"Actor", "Critic", "ReplayBuffer"} <= shared
    if script in ONLINE:
        assert {"PIDLagrangian", "critic_loss", "follow"} <= shared
    if script is rlpd:
        shared = shared - {"Critic"}  # its layers are normalised: the test below
    for name in shared:
        ours, theirs = (text_of(getattr(module, name)) for module in (marvel_sac_pid, script))
        assert ours == theirs, name


@pytest.mark.parametrize(("name", "scripts"), [
    ("VAE", (cpq, bear_lag)), ("log_likelihood", (offline_pretrain, cpq, bc_safe)),
    ("cpq_targets", (offline_pretrain, cpq)),
    ("actor_loss", (marvel_sac_pid, jsrl, pex, so2, rlpd)), ("sample_mixed", (pex, so2, rlpd))])
def test_what_some_scripts_share_is_the_same_text(name, scripts):
    assert len({text_of(getattr(script, name)) for script in scripts}) == 1


def test_critics_of_rlpd_are_marvels_but_for_the_normalised_layers():
    text = text_of(rlpd.Critic).replace("(obs, action), with normalised layers.", "(obs, action).")
    text = re.sub(r"^ +self.(scales|shifts) = .*\n", "", text, flags=re.MULTILINE)
    for layer in "01":
        normalised = f"(F.layer_norm(x, x.shape[-1:]) * self.scales[{layer}] + self.shifts[{layer}])"
        text = text.replace(f"self.weights[{layer}])\n        x = {normalised}.relu_()",
                            f"self.weights[{layer}]).relu_()")
    assert text == text_of(marvel_sac_pid.Critic)


@pytest.mark.parametrize("script", ONLINE)
def test_steps_of_a_baseline_that_its_method_leaves_alone_are_marvels(script):
    ours, theirs = sections(marvel_sac_pid), sections(script)
    for mark in SAME_STEPS[script]:
        assert theirs[mark] == ours[mark], mark


@pytest.mark.parametrize("script", ONLINE)
def test_options_of_a_baseline_are_marvels_in_the_same_order_with_the_same_defaults(script):
    path = next(path for path, module in SCRIPTS.items() if module is script)
    gone = WITHOUT[script] | {"from_scratch"}
    expected = [name for name, _ in options("marvel_sac_pid.py")
                if name not in gone]
    found = [name for name, _ in options(path)]
    assert [name for name in found if name not in ADDED[script]] == expected
    assert [name for name in found if name in ADDED[script]] == ADDED[script]
    ours, theirs = marvel_sac_pid.Args(), script.Args()
    changed = {name for name in expected if getattr(theirs, name) != getattr(ours, name)}
    assert changed == OTHER_DEFAULTS[script]


@pytest.mark.parametrize("script", [script for script in SCRIPTS.values() if script is not marvel_sac_pid])
def test_options_that_the_handover_depends_on_have_the_same_default(script):
    for name in ("env_id", "seed", "cost_limit", "gamma", "reward_scale"):
        assert getattr(script.Args(), name) == getattr(marvel_sac_pid.Args(), name), name


@pytest.mark.parametrize("path", SCRIPTS)
def test_a_script_imports_nothing_of_ours_but_common(path):
    nodes = list(ast.walk(ast.parse((ROOT / path).read_text())))
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert {name for name in imported if (ROOT / f"{name}.py").is_file()} == {"common"}
    assert not {name for name in imported if (ROOT / name.split(".")[0]).is_dir()}


@pytest.mark.parametrize("path", SCRIPTS)
def test_help_shows_every_option_with_its_docstring(path):
    found = list(options(path))
    assert [name for name, text in found if not (text or "").strip()] == []
    environment = {**os.environ, "COLUMNS": "200", "NO_COLOR": "1", "PYTHONIOENCODING": "utf-8"}
    run = subprocess.run([sys.executable, ROOT / path, "--help"], capture_output=True, env=environment,
                         encoding="utf-8")
    assert run.returncode == 0, run.stderr
    shown = re.sub(r"[\s│]", "", run.stdout)
    for name, text in found:
        assert re.search(rf"--{name.replace('_', '-')}\b", run.stdout), name
        assert re.sub(r"\s", "", text) in shown, name
