"""What stands in several scripts is the same, and their options are documented."""

import ast
import inspect
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import marvel_sac_pid
import offline_pretrain
from benchmark import throughput
from benchmark.baselines import jsrl, pex, so2

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = {"marvel_sac_pid.py": marvel_sac_pid, "offline_pretrain.py": offline_pretrain}
SAME = {"Actor", "Critic", "sample", "critic_loss"}
DIFFERENT = {"Args", "actor_loss", "main"}

# What a baseline may change of marvel_sac_pid.py: functions, options, and the sections of main.
BASELINES = {"benchmark/baselines/jsrl.py": jsrl, "benchmark/baselines/pex.py": pex,
             "benchmark/baselines/so2.py": so2}
WITHOUT = {  # of no use without pre-alignment, and what the method has instead
    jsrl: {"aligned_multipliers"},
    pex: {"aligned_multipliers", "soft_targets"},
    so2: {"aligned_multipliers", "soft_targets"},
}
OWN = {
    jsrl: {"guide_steps"},
    pex: {"sample_mixed", "choice_probabilities", "composed_policy", "composed_targets"},
    so2: {"sample_mixed", "perturbed_targets"},
}
MEANT_TO_DIFFER = {"Args", "main"}
WITHOUT_OPTIONS = {
    jsrl: {"dataset_path"}, pex: {"learning_starts"}, so2: {"learning_starts"}}
OWN_OPTIONS = {
    jsrl: ["jump_start_share"], pex: ["temperature"], so2: ["target_noise", "noise_clip", "critic_updates"]}
OTHER_DEFAULTS = {jsrl: {"lagrange_init", "alpha"}, pex: {"lagrange_init"}, so2: {"lagrange_init"}}
CHECKPOINT = "Checkpoint: all but the simulator's state, as every episode starts afresh from a seed"
OTHER_SECTIONS = {
    jsrl: {"Networks, optimisers", "Replay buffer", "Lagrange multiplier", CHECKPOINT,
           "Update the multiplier", "Evaluate and log"},
    pex: {"Offline dataset, networks, optimisers", "Replay buffer", "Lagrange multiplier", CHECKPOINT,
          "Collect full episodes", "Update the multiplier", "Gradient steps", "Update critics",
          "Evaluate and log"},
    so2: {"Offline dataset, networks, optimisers", "Replay buffer", "Lagrange multiplier", CHECKPOINT,
          "Update the multiplier", "Gradient steps", "Update critics"},
}
OTHER_CLOSURES = {  # functions inside main: what acts is another policy, and there is nothing to align
    jsrl: {"evaluate", "play_episode", "state"},
    pex: {"evaluate", "update_critics", "play_episode", "state"},
    so2: {"update_critics", "play_episode", "state"},
}


def definitions(script):
    items = vars(script).items()
    return {name for name, item in items if getattr(item, "__module__", None) == script.__name__}


def closures(script):
    """{name: text} of the functions inside main, with their indentation."""
    source = inspect.getsource(script.main)
    (main,) = ast.parse(source).body
    return {node.name: ast.get_source_segment(source, node, padded=True) for node in main.body
            if isinstance(node, ast.FunctionDef)}


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


@pytest.mark.parametrize("script", [*SCRIPTS.values(), *BASELINES.values()], ids=[*SCRIPTS, *BASELINES])
def test_every_loss_is_minimised_by_the_same_code(script):
    text = closures(script)["minimise"]
    assert text == closures(marvel_sac_pid)["minimise"]
    assert len(text.splitlines()) == 7 and "check_finite" in text
    timed = inspect.getsource(throughput.minimise_with)
    assert textwrap.dedent(text) in textwrap.dedent(timed.partition("\n\n")[2])
    # and by no other: nothing else in the script takes a gradient step
    source = inspect.getsource(script)
    for word in (".backward(", ".step()", ".zero_grad("):
        assert source.count(word) == text.count(word) == 1, word


# --- Baselines ---
def sections(script):
    """The text of main by section; the first one, before any heading, is left out."""
    _, *parts = re.split(r"^ +# --- (.+) ---$", inspect.getsource(script.main), flags=re.MULTILINE)
    return dict(zip(parts[::2], parts[1::2], strict=True))


@pytest.mark.parametrize("script", BASELINES.values(), ids=BASELINES)
def test_baseline_holds_all_of_marvel_but_what_its_method_replaces(script):
    assert definitions(script) == definitions(marvel_sac_pid) - WITHOUT[script] | OWN[script]
    assert script.COLUMNS == marvel_sac_pid.COLUMNS


@pytest.mark.parametrize("script", BASELINES.values(), ids=BASELINES)
def test_baselines_shared_code_is_textually_identical(script):
    shared = definitions(marvel_sac_pid) & definitions(script) - MEANT_TO_DIFFER
    assert len(shared) >= 6
    for name in shared:
        ours, theirs = (inspect.getsource(getattr(module, name)) for module in (marvel_sac_pid, script))
        assert ours == theirs, name


@pytest.mark.parametrize("script", BASELINES.values(), ids=BASELINES)
def test_sections_of_a_baselines_main_are_marvels_where_not_meant_to_differ(script):
    ours, theirs = sections(marvel_sac_pid), sections(script)
    assert {name for name in theirs if theirs[name] != ours.get(name)} == OTHER_SECTIONS[script]
    assert [name for name in ours if name in theirs] == [name for name in theirs if name in ours]


@pytest.mark.parametrize("script", BASELINES.values(), ids=BASELINES)
def test_functions_inside_a_baselines_main_are_marvels_where_not_meant_to_differ(script):
    ours, theirs = closures(marvel_sac_pid), closures(script)
    assert list(theirs) == list(ours)
    assert {name for name in theirs if theirs[name] != ours[name]} == OTHER_CLOSURES[script]


def test_baselines_save_and_restore_what_marvel_does_but_for_the_alignment():
    """Only the list of parts, and what else a method has, may differ between them."""
    states = [closures(script)["state"] for script in BASELINES.values()]
    assert len(set(states)) == 1
    ours = closures(marvel_sac_pid)["state"]
    assert {word for word in re.findall(r"\w+", ours)} - {word for word in re.findall(r"\w+", states[0])} == {
        "aligned"}
    restored = [re.search(r"^    if saved:\n.*?\n\n", inspect.getsource(script.main),
                          re.MULTILINE | re.DOTALL)[0] for script in [marvel_sac_pid, *BASELINES.values()]]
    assert len(set(restored[1:])) == 1
    assert restored[0].replace("count, aligned, evaluations", "count, evaluations").replace(
        'saved["aligned"], ', "") == restored[1]


def test_baselines_that_mix_batches_do_it_alike():
    assert inspect.getsource(pex.sample_mixed) == inspect.getsource(so2.sample_mixed)


@pytest.mark.parametrize("path", BASELINES)
def test_baselines_options_are_marvels_in_the_same_order_with_the_same_defaults(path):
    script, ours = BASELINES[path], marvel_sac_pid.Args()
    names = [name for name, *_ in options("marvel_sac_pid.py") if not name.startswith("vpa_")
             and name not in WITHOUT_OPTIONS[script] | {"from_scratch"}]
    theirs = [name for name, *_ in options(path)]
    assert [name for name in theirs if name not in OWN_OPTIONS[script]] == names
    assert [name for name in theirs if name in OWN_OPTIONS[script]] == OWN_OPTIONS[script]
    changed = {name for name in names if getattr(script.Args(), name) != getattr(ours, name)}
    assert changed == OTHER_DEFAULTS[script]
    assert script.Args().lagrange_init == 0


@pytest.mark.parametrize("script", BASELINES)
def test_baseline_imports_nothing_of_ours_but_common_and_stays_short(script):
    text = (ROOT / script).read_text()
    imported = {alias.name for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import)
                for alias in node.names} | {node.module for node in ast.walk(ast.parse(text))
                                            if isinstance(node, ast.ImportFrom)}
    assert {name for name in imported if (ROOT / f"{name.split('.')[0]}.py").is_file()
            or (ROOT / name.split(".")[0]).is_dir()} == {"common"}
    assert len(text.splitlines()) < 500


# --- Options ---
@pytest.mark.parametrize("script", [*SCRIPTS, *BASELINES])
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


@pytest.mark.parametrize("script", [*SCRIPTS, *BASELINES])
def test_help_mentions_every_option_and_its_text(script):
    run = subprocess.run([sys.executable, ROOT / script, "--help"], capture_output=True, text=True,
                         env={**os.environ, "COLUMNS": "200", "NO_COLOR": "1", "PYTHONIOENCODING": "utf-8"},
                         encoding="utf-8")
    assert run.returncode == 0, run.stderr
    shown = re.sub(r"[\s│]", "", run.stdout)
    for name, _, text in options(script):
        assert re.search(rf"--{name.replace('_', '-')}\b", run.stdout), name
        assert re.sub(r"\s", "", text) in shown, name
