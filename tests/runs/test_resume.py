"""A run that is killed, stopped, or finds the disk full goes on from its last checkpoint to the same end.

"The same end" is meant bit for bit: every number of the last checkpoint and every byte of metrics.csv are
those of a run that nobody touched. The runs are forked processes, so that SIGKILL is a real one.
"""

import contextlib
import multiprocessing
import os
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import gymnasium as gym
import pytest
import torch
from conftest import ROOT, TINY_MARVEL, TINY_OFFLINE, command_line, single_line

import common
import marvel_sac_pid
import offline_pretrain
from benchmark.baselines import jsrl, pex, so2

fork = multiprocessing.get_context("fork")
SEEN = {  # what can be counted while a run works, and interrupted just before
    "environment step": (gym.wrappers.TimeLimit, "step"),
    "gradient step": (torch.optim.Adam, "step"),
    "flush to disk": (os, "fsync"),  # metrics.csv, or a checkpoint of which the temporary file is written
    "rename": (Path, "replace"),
    "row": (common.Run, "row"),
}


# --- Running in a process of its own ---
def watched(main, args, output, at=None, do=None):
    """In the child: run main, count what SEEN lists, and call `do` just before occurrence at = (what, n)."""
    counts = dict.fromkeys(SEEN, 0)

    def watch(what, owner, name):
        original = getattr(owner, name)

        def counting(*arguments, **options):
            counts[what] += 1
            if at == (what, counts[what]):
                do()
            return original(*arguments, **options)

        setattr(owner, name, counting)

    for what, (owner, name) in SEEN.items():
        watch(what, owner, name)
    with open(output, "w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        try:
            main(args)
        finally:
            file.flush()
            Path(f"{output}.counts").write_text(repr(counts))


def run(script, folder, at=None, do=None, seconds=None, **options):
    """Run a script in a child; its exit code (negative: the signal that ended it) and what it printed."""
    output = folder.with_name(f"{folder.name}.output")
    args = script.Args(**options) if "resume" in options else script.Args(run_dir=str(folder), **options)
    child = fork.Process(target=watched, args=(script.main, args, output, at, do))
    child.start()
    if seconds is not None:
        time.sleep(seconds)
        child.kill()
    child.join(120)
    return child.exitcode, output.read_text() if output.exists() else ""


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def resume(script, folder, **how):
    return run(script, folder, resume=str(folder), **how)


def contents(folder):
    """All that a run leaves: its metrics, byte for byte, and every number of its checkpoint."""
    checkpoint = common.load_checkpoint(folder / "checkpoint.pt")
    assert checkpoint.pop("finished")
    checkpoint.pop("args")  # it names the folder
    return (folder / "metrics.csv").read_bytes(), checkpoint


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(
            a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and a == b


def assert_same_end(folder, reference):
    (metrics, checkpoint), (metrics_there, checkpoint_there) = contents(folder), contents(reference)
    assert metrics == metrics_there
    differ = [name for name in checkpoint_there if not equal(checkpoint.get(name), checkpoint_there[name])]
    assert differ == [] and checkpoint.keys() == checkpoint_there.keys()


# --- Untouched runs ---
@pytest.fixture(scope="module")
def offline(ball_file, tmp_path_factory):
    """The checkpoint of an untouched offline run."""
    folder = tmp_path_factory.mktemp("offline") / "run"
    assert run(offline_pretrain, folder, **TINY_OFFLINE, dataset_path=str(ball_file))[0] == 0
    return folder / "checkpoint.pt"


@pytest.fixture(scope="module")
def settings(ball_file, offline):
    """Script and options of every kind of run; checkpoints are frequent and fall between the evaluations."""
    data, start = {"dataset_path": str(ball_file)}, {"checkpoint": str(offline)}
    offline_options = {**TINY_OFFLINE, **data, "checkpoint_every": 17}
    online = {**TINY_MARVEL, "checkpoint_every": 150, "total_timesteps": 800, "utd": 0.05}
    no_vpa = {key: value for key, value in online.items() if not key.startswith("vpa")}
    return {
        "cpq": (offline_pretrain, offline_options),
        "bear-lag": (offline_pretrain, {**offline_options, "algo": "bear-lag"}),
        "bc-safe": (offline_pretrain, {**offline_options, "algo": "bc-safe", "cost_limit": 300.0}),
        "vpa": (marvel_sac_pid, {**online, **data, **start, "total_timesteps": 200, "vpa_steps": 60,
                                 "checkpoint_every": 13}),
        "online": (marvel_sac_pid, {**online, **data, **start}),
        "rollouts": (marvel_sac_pid, {**online, **start, "vpa_data": "rollouts", "learning_starts": 300}),
        "from-scratch": (marvel_sac_pid, {**online, "from_scratch": True, "learning_starts": 300,
                                          "rollout_episodes": 2, "multiplier": "apid-published"}),
        "jsrl": (jsrl, {**no_vpa, **start, "learning_starts": 300}),
        "pex": (pex, {**no_vpa, **data, **start}),
        "so2": (so2, {**no_vpa, **data, **start, "critic_updates": 2}),
    }


@pytest.fixture(scope="module")
def untouched(settings, tmp_path_factory):
    """untouched(name): the folder of the run that nobody interrupts, and how often it did what SEEN lists."""
    folders = {}

    def get(name):
        if name not in folders:
            script, options = settings[name]
            folder = tmp_path_factory.mktemp(name) / "untouched"
            status, printed = run(script, folder, **options)
            assert status == 0, printed
            counts = eval(Path(f"{folder}.output.counts").read_text())  # our own file, of this moment
            folders[name] = folder, {what: n for what, n in counts.items() if n}
        return folders[name]

    return get


# --- SIGKILL ---
MOMENTS = [(name, what) for name, moments in {
    "cpq": ["gradient step", "flush to disk", "rename", "row"],
    "bear-lag": ["gradient step"],
    "vpa": ["gradient step", "gradient step", "flush to disk", "rename"],
    "online": ["environment step", "environment step", "gradient step", "flush to disk", "rename", "row"],
    "rollouts": ["environment step", "gradient step"],
    "from-scratch": ["environment step", "gradient step", "rename"],
}.items() for what in moments]


@pytest.mark.parametrize(("name", "what", "k"), [(*moment, k) for k, moment in enumerate(MOMENTS)])
def test_run_killed_at_a_random_moment_and_resumed_ends_as_if_untouched(
        tmp_path, settings, untouched, name, what, k):
    script, options = settings[name]
    reference, counts = untouched(name)
    moment, folder = random.Random(k).randint(1, counts[what]), tmp_path / "run"
    status, _ = run(script, folder, at=(what, moment), do=kill, **options)
    assert status == -signal.SIGKILL
    if (folder / "config.json").exists():
        status, printed = resume(script, folder)
    else:  # killed before there was anything to resume: the same command again
        status, printed = run(script, folder, **options)
    assert status == 0, printed
    assert_same_end(folder, reference)


@pytest.mark.parametrize("name", ["cpq", "online"])
def test_run_killed_again_and_again_by_the_clock_ends_as_if_untouched(tmp_path, settings, untouched, name):
    script, options = settings[name]
    reference, _ = untouched(name)
    folder, rng, killed = tmp_path / "run", random.Random(1), 0
    for attempt in range(60):
        how = {"resume": str(folder)} if (folder / "config.json").exists() else options
        # longer every time: on a busy machine a start alone may take longer than the first ones
        status, printed = run(script, folder, seconds=rng.uniform(0.1, 0.3) * (1 + attempt / 3), **how)
        assert status in (0, -signal.SIGKILL), printed
        if status == 0:
            break
        killed += 1
    assert status == 0 and killed > 0
    assert_same_end(folder, reference)


@pytest.mark.parametrize("name", ["bc-safe", "jsrl", "pex", "so2"])
def test_every_other_method_resumes_to_the_same_end(tmp_path, settings, untouched, name):
    script, options = settings[name]
    reference, counts = untouched(name)
    what = "gradient step" if name == "bc-safe" else "environment step"
    assert run(script, tmp_path / "run", at=(what, 3 * counts[what] // 5), do=kill, **options)[0] == -9
    assert (tmp_path / "run/checkpoint.pt").exists()
    status, printed = resume(script, tmp_path / "run")
    assert status == 0, printed
    assert_same_end(tmp_path / "run", reference)


@pytest.mark.parametrize(("env_id", "steps"), [
    ("SafetyCarRun-v0", 800),  # bullet: the first reset of a simulator differs, motors keep their targets
    ("SafetyHopperVelocityGymnasium-v1", 150),  # MuJoCo, episodes that end early
    ("SafetyPointGoal1Gymnasium-v0", 2000),  # a layout drawn at every reset
])
def test_resumed_simulator_plays_the_episodes_that_an_untouched_one_plays(tmp_path, env_id, steps):
    options = dict(env_id=env_id, from_scratch=True, learning_starts=20, total_timesteps=steps, utd=0.01,
                   eval_episodes=1, eval_every=10**6, checkpoint_every=1, batch_size=8)
    assert run(marvel_sac_pid, tmp_path / "untouched", **options)[0] == 0
    at = ("environment step", int(0.8 * steps) + 10)
    assert run(marvel_sac_pid, tmp_path / "run", at=at, do=kill, **options)[0] == -signal.SIGKILL
    saved = common.load_checkpoint(tmp_path / "run/checkpoint.pt")
    assert 0 < saved["count"]["env_steps"] < steps  # it goes on from the middle, on an episode's boundary
    assert resume(marvel_sac_pid, tmp_path / "run")[0] == 0
    assert_same_end(tmp_path / "run", tmp_path / "untouched")


def test_row_that_was_half_written_is_cut_off(tmp_path, settings, untouched):
    script, options = settings["online"]
    reference, counts = untouched("online")

    def tear():
        with open(tmp_path / "run/metrics.csv", "a") as file:
            file.write("600,3,12.")
        kill()

    assert run(script, tmp_path / "run", at=("row", 3), do=tear, **options)[0] == -signal.SIGKILL
    assert (tmp_path / "run/metrics.csv").read_text().endswith("600,3,12.")
    assert resume(script, tmp_path / "run")[0] == 0
    assert_same_end(tmp_path / "run", reference)


def test_checkpoint_before_is_whole_while_the_next_is_written(tmp_path, settings, untouched):
    script, options = settings["vpa"]
    reference, counts = untouched("vpa")
    # rename 1 is of config.json, each later one of a checkpoint, of which the temporary file is complete
    assert run(script, tmp_path / "run", at=("rename", 4), do=kill, **options)[0] == -signal.SIGKILL
    assert (tmp_path / "run/checkpoint.pt.part").exists()
    assert common.load_checkpoint(tmp_path / "run/checkpoint.pt")["step"] == 26
    assert resume(script, tmp_path / "run")[0] == 0
    assert_same_end(tmp_path / "run", reference)
    assert not (tmp_path / "run/checkpoint.pt.part").exists()


# --- SIGTERM, Ctrl-C ---
@pytest.mark.parametrize(("number", "name", "what"), [
    (signal.SIGTERM, "online", "environment step"), (signal.SIGINT, "online", "gradient step"),
    (signal.SIGTERM, "vpa", "gradient step"), (signal.SIGINT, "cpq", "gradient step")])
def test_signal_saves_and_says_how_to_resume(tmp_path, settings, untouched, number, name, what):
    script, options = settings[name]
    reference, counts = untouched(name)
    options = {**options, "checkpoint_every": 10**6}  # so that only the signal can have saved
    do = lambda: os.kill(os.getpid(), number)  # noqa: E731
    status, printed = run(script, tmp_path / "run", at=(what, counts[what] // 2), do=do, **options)
    assert status == 128 + number
    assert re.search(f"stopped at step [0-9]+: `python .* --resume {tmp_path / 'run'}` goes", printed)
    assert "Traceback" not in printed
    assert not common.load_checkpoint(tmp_path / "run/checkpoint.pt")["finished"]
    assert resume(script, tmp_path / "run")[0] == 0
    assert_same_end(tmp_path / "run", reference)


def test_run_that_is_stopped_before_it_logs_anything_can_be_resumed_again(tmp_path, settings, untouched):
    script, options = settings["cpq"]
    reference, _ = untouched("cpq")
    # a checkpoint at step 17, the row of step 30, and the end before step 34: resuming cuts the row off
    assert run(script, tmp_path / "run", at=("gradient step", 3 * 32), do=kill, **options)[0] == -9
    saved, metrics = common.load_checkpoint(tmp_path / "run/checkpoint.pt"), tmp_path / "run/metrics.csv"
    assert saved["step"] == 17 and saved["metrics_bytes"] < metrics.stat().st_size
    do = lambda: os.kill(os.getpid(), signal.SIGTERM)  # noqa: E731
    assert resume(script, tmp_path / "run", at=("gradient step", 3), do=do)[0] == 128 + signal.SIGTERM
    again = common.load_checkpoint(tmp_path / "run/checkpoint.pt")
    assert (again["step"], again["metrics_bytes"]) == (18, saved["metrics_bytes"])
    assert again["metrics_bytes"] == metrics.stat().st_size
    assert resume(script, tmp_path / "run")[0] == 0
    assert_same_end(tmp_path / "run", reference)


def test_second_signal_ends_the_run_at_once_and_the_checkpoint_stays(tmp_path, settings, untouched):
    script, options = settings["online"]

    def twice():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)

    at = "environment step", untouched("online")[1]["environment step"] // 2
    status, printed = run(script, tmp_path / "run", at=at, do=twice, **options)
    assert status == 128 + signal.SIGTERM and "Traceback" not in printed
    assert common.load_checkpoint(tmp_path / "run/checkpoint.pt")["step"] < 30 + at[1]
    assert resume(script, tmp_path / "run")[0] == 0
    assert_same_end(tmp_path / "run", untouched("online")[0])


def test_command_that_an_interrupted_script_prints_resumes_it(tmp_path, ball_file, settings, untouched):
    command = [sys.executable, str(ROOT / "offline_pretrain.py"), "--run-dir", "a run"]
    command += command_line({**TINY_OFFLINE, "dataset_path": ball_file, "update_steps": 60})
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                          text=True) as process:
        while not (tmp_path / "a run/config.json").exists():
            time.sleep(0.05)
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        printed = process.communicate(timeout=60)[1]
    if process.returncode == 0:
        pytest.fail("the run was over before the signal came")
    assert process.returncode == 128 + signal.SIGINT
    words = shlex.split(re.search("`(.*)`", printed)[1])
    assert words[0] == "python"
    again = subprocess.run([sys.executable, *words[1:]], cwd=tmp_path, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert_same_end(tmp_path / "a run", untouched("cpq")[0])


def test_signal_while_the_policy_that_vpa_fits_to_is_rolled_out_saves_after_that_episode(
        tmp_path, settings, untouched):
    script, options = settings["rollouts"]
    reference, _ = untouched("rollouts")
    options = {**options, "checkpoint_every": 10**6}
    do = lambda: os.kill(os.getpid(), signal.SIGTERM)  # noqa: E731
    at = "environment step", 400 + 50  # two episodes of evaluation, and into the first of two that count
    status, _ = run(script, tmp_path / "run", at=at, do=do, **options)
    saved = common.load_checkpoint(tmp_path / "run/checkpoint.pt")
    assert (status, saved["aligned"], saved["count"]["env_steps"]) == (128 + signal.SIGTERM, False, 200)
    assert resume(script, tmp_path / "run")[0] == 0
    assert_same_end(tmp_path / "run", reference)


def test_ctrl_c_saves_though_what_shows_the_messages_dies_of_it_too(tmp_path, ball_file, untouched):
    """As `2>&1 | tee` does; and though it comes twice, as from GNU's `timeout`."""
    command = [sys.executable, str(ROOT / "offline_pretrain.py"), "--run-dir", "run"]
    command += command_line({**TINY_OFFLINE, "dataset_path": ball_file})
    read, write = os.pipe()
    process = subprocess.Popen(command, cwd=tmp_path, stdout=write, stderr=write)
    os.close(write)
    while not (tmp_path / "run/config.json").exists():
        time.sleep(0.02)
        assert process.poll() is None
    os.close(read)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
    assert process.wait(60) == 128 + signal.SIGINT
    assert (tmp_path / "run/checkpoint.pt").exists()
    assert resume(offline_pretrain, tmp_path / "run")[0] == 0
    assert_same_end(tmp_path / "run", untouched("cpq")[0])


# --- A full disk ---
@pytest.mark.parametrize("name", ["cpq", "online"])
def test_full_disk_leaves_the_checkpoint_whole_and_is_named(tmp_path, settings, untouched, name):
    script, options = settings[name]
    reference, counts = untouched(name)
    fill = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4000, resource.RLIM_INFINITY))  # noqa: E731
    at = "gradient step", 3 * counts["gradient step"] // 5
    status, printed = run(script, tmp_path / "run", at=at, do=fill, **options)
    assert status == 1 and "Traceback" not in printed, printed
    (line,) = re.findall("error: .*", printed)
    assert "cannot be written (File too large)" in line and str(tmp_path / "run") in line
    assert not list((tmp_path / "run").glob("*.part"))
    assert common.load_checkpoint(tmp_path / "run/checkpoint.pt")["step"] > 0
    assert resume(script, tmp_path / "run")[0] == 0
    assert_same_end(tmp_path / "run", reference)


# --- One run, one folder ---
def test_second_run_cannot_write_where_one_is_at_work(tmp_path, settings, untouched):
    script, options = settings["online"]
    ready, go = fork.Event(), fork.Event()

    def wait():
        ready.set()
        go.wait(60)

    args = script.Args(run_dir=str(tmp_path / "run"), **options)
    first = fork.Process(target=watched, args=(script.main, args, tmp_path / "first", ("row", 2), wait))
    first.start()
    assert ready.wait(60)
    for how in ({**options, "overwrite": True}, {"resume": str(tmp_path / "run")}):
        status, printed = run(script, tmp_path / "run", **how)
        errors = [line for line in printed.splitlines(keepends=True) if line.startswith("error: ")]
        assert "another process is writing there" in single_line(status, "".join(errors))
    go.set()
    first.join(120)
    assert first.exitcode == 0
    assert_same_end(tmp_path / "run", untouched("online")[0])


@pytest.mark.parametrize("how", ["deleted", "moved"])
def test_run_whose_folder_was_taken_away_does_not_write_into_the_next_one(tmp_path, settings, untouched, how):
    script, options = settings["online"]
    next_run, _ = untouched("cpq")

    def replace():
        shutil.move(tmp_path / "run", tmp_path / "old")
        if how == "deleted":
            shutil.rmtree(tmp_path / "old")
        shutil.copytree(next_run, tmp_path / "run")

    status, printed = run(script, tmp_path / "run", at=("row", 2), do=replace, **options)
    assert "was deleted" in single_line(status, "\n".join(re.findall("error: .*", printed)) + "\n")
    assert "Traceback" not in printed
    for name in ("config.json", "metrics.csv", "checkpoint.pt"):
        assert (tmp_path / "run" / name).read_bytes() == (next_run / name).read_bytes()


@pytest.mark.parametrize("when", ["before its first checkpoint", "after it"])
def test_resuming_stops_where_another_process_went_on_with_the_run_meanwhile(tmp_path, settings, when):
    script, options = settings["cpq"]
    moment = 5 if when == "before its first checkpoint" else 100
    assert run(script, tmp_path / "run", at=("gradient step", moment), do=kill, **options)[0] == -9
    args, saved = common.start(script.Args(resume=str(tmp_path / "run")))
    assert (saved is None) == (moment == 5)
    assert resume(script, tmp_path / "run")[0] == 0
    before = {file: file.read_bytes() for file in (tmp_path / "run").iterdir()}
    with pytest.raises(SystemExit) as stopped:
        common.Run(args, "offline_pretrain", ["update_steps"], saved)
    assert stopped.value.code == 2
    assert before == {file: file.read_bytes() for file in (tmp_path / "run").iterdir()}


def test_two_that_start_at_once_in_a_new_folder_do_not_both_write_there(tmp_path, settings, monkeypatch):
    """The other is at work and gone between this one's look at the folder and its lock."""
    script, options = settings["cpq"]
    make, other = Path.mkdir, []

    def mkdir(path, **how):
        make(path, **how)
        if path == tmp_path / "run" and not other:
            other.append("at work")
            other.append(run(script, path, **{**options, "seed": 7})[0])

    args = script.Args(run_dir=str(tmp_path / "run"), **options)
    monkeypatch.setattr(Path, "mkdir", mkdir)
    with pytest.raises(SystemExit) as stopped:
        common.Run(args, "offline_pretrain", ["update_steps"])
    assert stopped.value.code == 2 and other == ["at work", 0]
    assert contents(tmp_path / "run")[1]["step"] == 60


def test_start_that_finds_the_disk_full_can_be_made_again(tmp_path, settings, untouched, monkeypatch):
    script, options = settings["cpq"]
    with monkeypatch.context() as patch:
        patch.setattr(common, "write_file", lambda *_: common.stop("full", status=1))
        assert run(script, tmp_path / "run", **options)[0] == 1
    assert (tmp_path / "run/metrics.csv").exists() and not (tmp_path / "run/config.json").exists()
    assert run(script, tmp_path / "run", **options)[0] == 0
    assert_same_end(tmp_path / "run", untouched("cpq")[0])


@pytest.mark.parametrize("name", ["metrics.csv", "curves.png", "events.out.tfevents.1.of-another-project"])
def test_files_of_another_project_are_not_taken_for_an_empty_folder(tmp_path, settings, name):
    script, options = settings["cpq"]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text("precious")
    status, printed = run(script, tmp_path / "run", **options)
    assert "holds a run" in single_line(status, printed[printed.index("error: "):])
    assert {file.name: file.read_text() for file in (tmp_path / "run").iterdir()} == {name: "precious"}


def test_option_typed_beside_resume_is_refused_though_it_is_the_default(tmp_path, settings):
    script, options = settings["cpq"]
    assert run(script, tmp_path / "run", at=("gradient step", 100), do=kill, **options)[0] == -9
    before = {file: file.read_bytes() for file in (tmp_path / "run").iterdir()}
    done = subprocess.run([sys.executable, ROOT / "offline_pretrain.py", "--resume", tmp_path / "run",
                           "--cost-limit", "20"], capture_output=True, text=True)
    assert "--resume takes no other option" in single_line(done.returncode, done.stderr)
    assert before == {file: file.read_bytes() for file in (tmp_path / "run").iterdir()}


def test_folder_that_holds_a_run_is_refused_with_both_ways_out(tmp_path, settings, untouched):
    script, options = settings["online"]
    folder, _ = untouched("online")
    before = {file: file.read_bytes() for file in folder.iterdir()}
    status, printed = run(script, folder, **options)
    line = single_line(status, printed[printed.index("error: "):])
    assert f"--resume {folder}" in line and "--overwrite" in line
    assert before == {file: file.read_bytes() for file in folder.iterdir()}


def test_checkpoint_whose_folder_has_lost_its_options_is_not_written_over(tmp_path, settings, untouched):
    script, options = settings["online"]
    (tmp_path / "run").mkdir()
    for name in ("checkpoint.pt", "metrics.csv"):
        (tmp_path / "run" / name).write_bytes((untouched("online")[0] / name).read_bytes())
    before = {file: file.read_bytes() for file in (tmp_path / "run").iterdir()}
    status, printed = run(script, tmp_path / "run", **options)
    assert "holds a run" in single_line(status, printed[printed.index("error: "):])
    assert before == {file: file.read_bytes() for file in (tmp_path / "run").iterdir()}


def test_options_are_never_away_while_a_run_without_a_checkpoint_is_resumed(tmp_path, settings, untouched):
    script, options = settings["cpq"]
    assert run(script, tmp_path / "run", at=("gradient step", 3), do=kill, **options)[0] == -signal.SIGKILL
    assert not (tmp_path / "run/checkpoint.pt").exists()
    config = tmp_path / "run/config.json"
    inode = config.stat().st_ino
    assert resume(script, tmp_path / "run")[0] == 0
    assert config.stat().st_ino == inode  # neither removed nor written again
    assert_same_end(tmp_path / "run", untouched("cpq")[0])


def test_resuming_command_survives_blanks_in_the_folder_s_name(tmp_path, settings, untouched):
    script, options = settings["cpq"]
    folder = tmp_path / "a  b ünï'x"
    status, _ = run(script, folder, at=("gradient step", 100), do=kill, **options)
    assert status == -signal.SIGKILL
    _, printed = run(script, folder, **options)
    words = shlex.split(re.search("`(.*)`", printed)[1])
    assert words[-2:] == ["--resume", str(folder)]


def test_finished_run_is_left_as_it_is(untouched):
    folder, _ = untouched("online")
    before = {file: file.read_bytes() for file in folder.iterdir()}
    status, printed = resume(marvel_sac_pid, folder)
    assert status == 0 and "this run is finished" in printed
    assert before == {file: file.read_bytes() for file in folder.iterdir()}


def test_overwriting_starts_from_nothing(tmp_path, settings, untouched):
    script, options = settings["online"]
    assert run(script, tmp_path / "run", at=("row", 3), do=kill, **{**options, "seed": 5})[0] == -9
    status, printed = run(script, tmp_path / "run", overwrite=True, **options)
    assert status == 0, printed
    assert_same_end(tmp_path / "run", untouched("online")[0])


def test_resumed_run_may_be_moved_and_keeps_its_options(tmp_path, settings, untouched):
    script, options = settings["cpq"]
    assert run(script, tmp_path / "run", at=("gradient step", 100), do=kill, **options)[0] == -signal.SIGKILL
    config = (tmp_path / "run/config.json").read_bytes()
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    assert resume(script, tmp_path / "elsewhere")[0] == 0
    assert (tmp_path / "elsewhere/config.json").read_bytes() == config
    assert_same_end(tmp_path / "elsewhere", untouched("cpq")[0])


