"""What `run.keep` promises, and how a run behaves as a guest of its process: signals, threads, locks."""

import errno
import fcntl
import importlib.util
import inspect
import os
import signal
import threading
from dataclasses import dataclass

import numpy as np
import pytest
import small
import torch
from small import assert_same_end, files, kill, kinds, resume, run, saved

import common
import marvel_sac_pid
import offline_pretrain


@dataclass
class Args:
    env_id: str = "any"
    seed: int = 0
    cuda: bool = False
    track: bool = False
    run_dir: str | None = None
    overwrite: bool = False
    resume: str | None = None
    checkpoint_every: int = 2
    update_steps: int = 6
    gamma: float = 0.9
    target_entropy: float = -2.0  # not in OPTION_BOUNDS: any value will do


@dataclass
class ArgsWithSizes(Args):
    sizes: tuple[int, ...] = (4, 4)  # a list in JSON


def nothing(step):
    """Happens after a step, if no test wants otherwise."""


happens = nothing
extra_variable = nothing


@common.closes_its_run
def main(args):
    """A script with one part of every kind, all of which change in every step."""
    run = common.Run(args, "mini", ("steps", "value"))
    args = run.args
    torch.manual_seed(args.seed)
    network = torch.nn.Linear(2, 1)
    tensor = torch.ones((), requires_grad=True)
    optimizer = torch.optim.Adam([*network.parameters(), tensor])
    generator = np.random.default_rng(args.seed)
    controller = marvel_sac_pid.PIDLagrangian(1.0, 0.1, 0.1, 0.1)
    buffer = marvel_sac_pid.ReplayBuffer(2, 1, torch.device("cpu"))
    numbers, progress = {}, dict(mini_steps=0, other_steps=0, total=0.0)
    extra = extra_variable(0)  # noqa: F841
    run.keep(dict(obs_dim=2, act_dim=1, gamma=args.gamma), progress, network=network, tensor=tensor,
             optimizer=optimizer, generator=generator, controller=controller, buffer=buffer, numbers=numbers)
    while progress["mini_steps"] < args.update_steps:
        obs = generator.normal(size=2).astype(np.float32)
        buffer.add(observations=obs, next_observations=obs, actions=obs[:1], rewards=1, costs=2, terminals=0,
                   timeouts=1)
        optimizer.zero_grad()
        loss = (network(buffer.sample(3)["observations"]) * tensor).square().mean() + torch.rand(())
        loss.backward()
        optimizer.step()
        numbers["multiplier"] = controller.update(loss.item())
        progress["total"] += numbers["multiplier"]
        progress["mini_steps"] += 1
        run.row(progress["mini_steps"], {"steps": progress["mini_steps"], "value": loss.item()})
        late = happens(progress["mini_steps"])  # noqa: F841
        run.checkpoint()
    run.finish()


@pytest.fixture
def mini(tmp_path, monkeypatch):
    """mini(folder, happens, ...): run the script above in this process."""
    def call(folder="run", at=nothing, extra=nothing, make=Args, **options):
        monkeypatch.setitem(globals(), "happens", at)
        monkeypatch.setitem(globals(), "extra_variable", extra)
        if "resume" not in options:
            options["run_dir"] = str(tmp_path / folder)
        main(make(**options))
        return saved(tmp_path / folder)

    return call


def broken_off(step):
    """Raise in the middle of a step."""
    def at(now):
        if now == step:
            raise KeyError("research")
    return at


# --- What it restores, and what it refuses ---
@pytest.mark.parametrize("step", [1, 2, 3, 6])
def test_every_kind_of_part_comes_back(tmp_path, mini, step):
    mini("untouched")
    with pytest.raises(KeyError, match="research"):
        mini("run", broken_off(step))
    assert (tmp_path / "run/checkpoint.pt").exists() == (step > 2)
    mini("run", resume=str(tmp_path / "run"))
    assert_same_end(tmp_path / "run", tmp_path / "untouched")
    kept = saved(tmp_path / "run")
    assert set(kept) >= {"network", "tensor", "optimizer", "generator", "controller", "buffer", "numbers"}
    assert kept["progress"]["mini_steps"] == 6 and len(kept["buffer"]["rewards"]) == 6


def leaf():
    return torch.zeros(2, requires_grad=True)


@pytest.mark.parametrize("variable", [
    lambda _: torch.nn.Linear(2, 1), lambda _: torch.optim.SGD([leaf()]), lambda _: leaf(),
    lambda _: [torch.nn.Linear(2, 1)], lambda _: {"a": (leaf(),)}, lambda _: np.random.default_rng(0)],
    ids=["network", "optimiser", "tensor", "list", "dict", "generator"])
def test_variable_that_learns_and_is_not_kept_ends_the_run_with_one_line(tmp_path, mini, refusal, variable):
    assert "run.keep lacks extra" in refusal(mini, "run", nothing, variable)
    assert list(tmp_path.iterdir()) == []


def test_variable_that_begins_to_learn_later_ends_the_run_at_the_next_save(tmp_path, mini, refusal):
    assert "run.keep lacks late" in refusal(mini, "run", lambda step: leaf() if step > 2 else None)
    assert saved(tmp_path / "run")["progress"]["mini_steps"] == 2


@pytest.mark.parametrize("variable", [
    lambda _: torch.nn.ReLU, lambda _: torch.zeros(2), lambda _: [1, "a", None], lambda _: np.zeros(2)])
def test_variable_that_does_not_change_need_not_be_kept(mini, variable):
    assert mini("run", nothing, variable)["finished"]


@pytest.mark.parametrize(("value", "says"), [
    (np.float64(2.5), None), (np.int64(3), None), (np.zeros(2), "numbers.x"), ({1, 2}, "numbers.x")],
    ids=repr)
def test_what_is_saved_can_be_read_again(tmp_path, mini, refusal, value, says):
    def at(step):
        numbers = inspect.currentframe().f_back.f_locals["numbers"]
        numbers["x"] = value

    if says:
        assert says in refusal(mini, "run", at)
    else:
        assert mini("run", at)["numbers"]["x"] == value


def test_option_that_is_a_tuple_comes_back(tmp_path, mini):
    with pytest.raises(KeyError):
        mini("run", broken_off(5), make=ArgsWithSizes, sizes=(8, 2))
    assert mini("run", make=ArgsWithSizes, resume=str(tmp_path / "run"))["finished"]


@pytest.mark.parametrize("change", [
    {"gamma": 0.8}, {"network": {"weight": torch.zeros(1, 3), "bias": torch.zeros(1)}}, {"network": None},
    {"network": {"weight": torch.full((1, 2), float("nan")), "bias": torch.zeros(1)}}, {"tensor": "text"},
    {"optimizer": {}}, {"generator": {}}, {"buffer": {"rewards": torch.zeros(3)}}, {"controller": {"new": 1}},
    {"controller": None}, {"buffer": None}, {"progress": None}, {"tensor": torch.zeros(3)}],
    ids=lambda change: f"{next(iter(change))}-{str(next(iter(change.values())))[:12]}")
def test_checkpoint_in_which_a_part_is_another_is_refused_by_its_name(tmp_path, mini, refusal, change):
    with pytest.raises(KeyError):
        mini("run", broken_off(5))
    content = saved(tmp_path / "run")
    torch.save(content | change, tmp_path / "run/checkpoint.pt")
    before = files(tmp_path)
    (name,) = change
    assert name in refusal(lambda: mini("run", resume=str(tmp_path / "run")))
    torch.save({key: value for key, value in content.items() if key != name}, tmp_path / "run/checkpoint.pt")
    assert name in refusal(lambda: mini("run", resume=str(tmp_path / "run")))
    assert files(tmp_path).keys() == before.keys()


def changed_script(tmp_path, *changes):
    """marvel_sac_pid.py with text replaced, as a module."""
    source = inspect.getsource(marvel_sac_pid)
    for old, new in changes:
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    (tmp_path / "changed.py").write_text(source)
    spec = importlib.util.spec_from_file_location("changed", tmp_path / "changed.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_copy_of_the_offline_policy_that_is_kept_is_still_that_after_kill_and_resume(tmp_path):
    """A change for research: a behaviour-cloning term towards the offline policy."""
    _, options = kinds(tmp_path)["marvel"]
    copy = "    run.keep(", "    offline_actor = deepcopy(actor).requires_grad_(False)\n    run.keep("
    lacking = changed_script(tmp_path, copy)
    status, printed = run(lacking, tmp_path / "run", **options)
    assert status == 2 and "run.keep lacks offline_actor" in printed and not (tmp_path / "run").exists()

    script = changed_script(tmp_path, copy, (
        "actor=actor, trained_actor", "offline_actor=offline_actor, actor=actor, trained_actor"))
    status, _ = run(script, tmp_path / "run", at=("environment step", 150), do=kill, **options)
    assert status == -signal.SIGKILL and saved(tmp_path / "run")["progress"]["env_steps"] > 0
    (tmp_path / "offline/checkpoint.pt").rename(tmp_path / "offline.pt")
    status, printed = resume(script, tmp_path / "run")
    assert status == 0, printed
    offline, end = common.load_checkpoint(tmp_path / "offline.pt"), saved(tmp_path / "run")
    assert small.equal(end["offline_actor"], offline["actor"])
    assert not small.equal(end["actor"], offline["actor"])


# --- Options and columns ---
@pytest.mark.parametrize(("options", "refused"), [
    ({"target_entropy": -2.0}, None), ({"target_entropy": 1e12}, None), ({"gamma": 1.0}, "--gamma 1.0"),
    ({"update_steps": 0}, "--update-steps 0"), ({"seed": -1}, "--seed -1")], ids=str)
def test_only_the_options_that_are_listed_are_checked(tmp_path, mini, refusal, options, refused):
    if refused:
        assert f"{refused}: must be between" in refusal(lambda: mini(**options))
        assert list(tmp_path.iterdir()) == []
    else:
        assert mini(**options)["args"]["target_entropy"] == options["target_entropy"]


def test_number_without_a_column_ends_the_run_with_a_line_that_names_columns(tmp_path, refusal):
    run_ = common.Run(Args(run_dir=str(tmp_path / "run")), "mini", ("steps", "value"))
    run_.keep(dict(obs_dim=2, act_dim=1), dict(mini_steps=0))
    run_.row(1, {"steps": 1})
    line = refusal(run_.row, 2, {"steps": 2, "value": 1.0, "new": 1.0})
    assert "no column new" in line and "COLUMNS" in line
    run_.close()
    assert (tmp_path / "run/metrics.csv").read_text() == "steps,value\n1,\n"


# --- Numbers that are not finite ---
NAN = float("nan")


@pytest.mark.parametrize(("name", "spoil"), [
    ("network", lambda part: part.weight.data[0].fill_(NAN)), ("tensor", lambda part: part.data.fill_(NAN)),
    ("optimizer", lambda part: next(iter(part.state.values()))["exp_avg"][0].fill_(NAN)),
    ("controller", lambda part: part.costs.append(NAN)),
    ("buffer", lambda part: part.storage["costs"][2].fill_(NAN)),
    ("numbers", lambda part: part.update(multiplier=NAN))])
def test_part_that_is_not_finite_is_never_saved(tmp_path, mini, capsys, name, spoil):
    def at(step):
        if step == 4:
            spoil(inspect.currentframe().f_back.f_locals[name])

    with pytest.raises(SystemExit) as stopped:
        mini("run", at)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert stopped.value.code == 1 and f"{name} is not finite at mini_steps 4, other_steps 0" in line
    assert "the last good checkpoint is of step 2" in line
    assert saved(tmp_path / "run")["progress"]["mini_steps"] == 2
    assert mini("run", resume=str(tmp_path / "run"))["progress"]["mini_steps"] == 6


# --- A guest in its process ---
def handlers():
    return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]


def is_free(folder):
    """Whether another open file could take the folder's lock."""
    with open(folder / "metrics.csv") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def interrupted(step):
    return lambda now: os.kill(os.getpid(), signal.SIGINT) if now == step else None


@pytest.mark.parametrize(("first", "error"), [
    (nothing, None), (broken_off(3), KeyError), (interrupted(3), SystemExit)],
    ids=["success", "error", "Ctrl-C"])
def test_script_can_be_called_again_in_one_process(tmp_path, mini, first, error):
    before, at_work = handlers(), []

    def at(step):
        at_work.append((handlers() != before, not is_free(tmp_path / "run")))
        first(step)

    for again in False, True:
        if error is None:
            mini("run", at, overwrite=again)
        else:
            with pytest.raises(error):
                mini("run", at, overwrite=again)
        assert handlers() == before and is_free(tmp_path / "run")
    assert all(all(pair) for pair in at_work)
    assert mini("run", overwrite=True)["finished"]


def test_second_run_at_the_same_time_in_one_process_is_refused(mini, refusal):
    lines = []
    assert mini("run", lambda step: lines.append(refusal(mini, "other")) if step == 3 else None)["finished"]
    (line,) = lines
    assert "a run is at work in this process" in line
    assert mini("other")["finished"]


def test_whole_floats_are_taken_as_the_integers_they_are(tmp_path, mini):
    assert mini("run", seed=np.float64(3))["args"]["seed"] == 3


def test_run_under_nohup_goes_on_when_its_terminal_closes(mini):
    before, at_work = signal.signal(signal.SIGHUP, signal.SIG_IGN), []
    try:
        assert mini("run", lambda step: at_work.append(handlers()))["finished"]
    finally:
        signal.signal(signal.SIGHUP, before)
    for interrupt, terminate, hang_up in at_work:
        assert hang_up == signal.SIG_IGN and interrupt == terminate != signal.SIG_DFL


def test_scripts_are_good_guests_too(tmp_path, monkeypatch):
    """Ctrl-C in the first of two calls, then --resume, all in this process."""
    before, step, settings = handlers(), torch.optim.Adam.step, kinds(tmp_path)
    for kind in "offline", "marvel":
        (script, options), steps = settings[kind], iter(range(1000))
        monkeypatch.setattr(torch.optim.Adam, "step", lambda *x, steps=steps: (
            next(steps) == 50 and os.kill(os.getpid(), signal.SIGINT), step(*x)))
        with pytest.raises(SystemExit) as stopped:
            script.main(script.Args(**options, run_dir=str(tmp_path / f"run of {kind}")))
        assert stopped.value.code == 130 and handlers() == before
        script.main(script.Args(resume=str(tmp_path / f"run of {kind}")))
        assert saved(tmp_path / f"run of {kind}")["finished"] and handlers() == before


def test_run_outside_the_main_thread_works_without_signal_handlers(tmp_path, mini):
    before, seen = handlers(), []
    thread = threading.Thread(target=lambda: mini("run", lambda step: seen.append(handlers())))
    thread.start()
    thread.join(60)
    assert seen == [before] * 6 and saved(tmp_path / "run")["finished"] and is_free(tmp_path / "run")


def test_disk_without_locks_gets_a_warning_and_the_run_goes_on(tmp_path, mini, monkeypatch, capsys):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    assert mini("run")["finished"]
    assert f"warning: {tmp_path / 'run'}: no locks on this disk" in capsys.readouterr().err


def test_signal_that_comes_while_it_is_asked_whether_to_save_is_not_lost(tmp_path, mini, monkeypatch):
    step = common.Run.step.fget

    def interrupting(run):
        if step(run) == 3 and not run.signal:
            os.kill(os.getpid(), signal.SIGINT)
        return step(run)

    monkeypatch.setattr(common.Run, "step", property(interrupting))
    with pytest.raises(SystemExit):
        mini("run", checkpoint_every=100)
    assert saved(tmp_path / "run")["progress"]["mini_steps"] >= 3


def test_signal_that_comes_while_the_folder_is_opened_saves_too(tmp_path, mini, monkeypatch):
    """The imports of TensorBoard take a second there."""
    write_file = common.write_file
    monkeypatch.setattr(common, "write_file", lambda path, content: (
        write_file(path, content), path.name == "config.json" and os.kill(os.getpid(), signal.SIGINT)))
    with pytest.raises((SystemExit, KeyboardInterrupt)) as stopped:
        mini("run", checkpoint_every=100)
    assert stopped.type is SystemExit
    assert saved(tmp_path / "run")["progress"]["mini_steps"] == 1


def test_disk_that_has_become_read_only_ends_the_run_with_one_line(tmp_path, mini, monkeypatch, capsys):
    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    def at(step):
        if step == 3:
            monkeypatch.setattr("pathlib.Path.unlink", refuse)
            monkeypatch.setattr("pathlib.Path.replace", refuse)

    with pytest.raises(SystemExit) as stopped:
        mini("run", at)
    assert stopped.value.code == 1 and "cannot be written (Read-only file system)" in capsys.readouterr().err


# --- Hand-over ---
def test_fresh_critics_need_the_offline_policy_only(tmp_path, refusal):
    _, options = kinds(tmp_path)["marvel"]
    content = saved(tmp_path / "offline")
    content["q"] = offline_pretrain.Critic(2, 3, 2, hidden=64).state_dict()
    del content["qc"]
    torch.save(content, tmp_path / "other.pt")
    options |= {"checkpoint": str(tmp_path / "other.pt"), "run_dir": str(tmp_path / "run")}
    assert "q" in refusal(marvel_sac_pid.main, marvel_sac_pid.Args(**options))
    marvel_sac_pid.main(marvel_sac_pid.Args(**options, vpa_critics="fresh"))
    assert saved(tmp_path / "run")["finished"]


def keep_only(tmp_path, counter="mini_steps", **parts):
    """run.keep of a script that hands it these."""
    args = Args(run_dir=str(tmp_path / "run"))
    common.Run(args, "mini", ("steps",)).keep(
        dict(obs_dim=2, act_dim=1), {counter: 0}, **parts)


@pytest.mark.parametrize("part", [[1.0, 2.0], 0.5, {1, 2}, object()], ids=["list", "number", "set", "object"])
def test_part_that_cannot_be_put_back_is_refused_at_once(tmp_path, refusal, part):
    line = refusal(keep_only, tmp_path, momentum=part)
    assert "run.keep cannot put back momentum" in line
    assert list(tmp_path.iterdir()) == []


def test_fact_with_the_name_of_a_part_is_refused_at_once(tmp_path, refusal):
    run_ = common.Run(Args(run_dir=str(tmp_path / "run")), "mini", ("steps",))
    rng = np.random.default_rng()
    line = refusal(run_.keep, dict(obs_dim=2, act_dim=1, rng=3), dict(mini_steps=0), rng=rng)
    assert "a fact has the name of a part: rng" in line


def test_progress_that_counts_no_steps_is_refused_at_once(tmp_path, refusal):
    assert "..._steps" in refusal(keep_only, tmp_path, "updates")


def test_generator_of_torch_comes_back_and_is_missed(tmp_path, mini, refusal):
    assert "run.keep lacks extra" in refusal(mini, "run", nothing, lambda _: torch.Generator())
    generator = torch.Generator().manual_seed(3)
    state = common.state_of(generator)
    first = torch.rand(4, generator=generator)
    common.restore(generator, state)
    assert torch.equal(torch.rand(4, generator=generator), first)
