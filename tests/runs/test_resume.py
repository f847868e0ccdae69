"""A run that is killed, stopped, or finds the disk full goes on from its last checkpoint to the same end.

"The same end" is meant bit for bit: every number of the last checkpoint and every byte of metrics.csv are
those of a run that nobody touched.
"""

import contextlib
import os
import random
import re
import resource
import shlex
import signal
import subprocess
import sys
import time

import gymnasium as gym
import pytest
from conftest import ROOT, command_line, single_line
from small import FORK, assert_same_end, begin, end, files, kill, kinds, resume, run, saved, send
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import common
import marvel_sac_pid
import offline_pretrain
from benchmark.baselines import marvel_released_pid

NEVER = 10**6  # as checkpoint_every: only the end, or a signal, saves


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """Script and options of every kind of run, and the folder of the offline run that they start from."""
    folder = tmp_path_factory.mktemp("start")
    return {**kinds(folder), "start": folder / "offline"}


@pytest.fixture(scope="module")
def untouched(settings, tmp_path_factory):
    """untouched(kind): the folder of the run that nobody interrupts, and how often it did what SEEN lists."""
    folders = {}

    def get(kind):
        if kind not in folders:
            script, options = settings[kind]
            folder = tmp_path_factory.mktemp("untouched") / "run"
            status, printed, counts = end(*begin(script, folder, **options))
            assert status == 0, printed
            folders[kind] = folder, counts
        return folders[kind]

    return get


def error_line(status, printed):
    """The one line of a user's mistake, amid progress bars."""
    assert "Traceback" not in printed, printed
    return single_line(status, "\n".join(re.findall("error: .*", printed)) + "\n")


@contextlib.contextmanager
def hidden(path):
    """A file that is away meanwhile."""
    path.rename(path.with_name("hidden"))
    try:
        yield
    finally:
        path.with_name("hidden").rename(path)


def assert_resumes_to_the_same_end(script, folder, reference):
    status, printed = resume(script, folder)
    assert status == 0, printed
    assert_same_end(folder, reference)


# --- SIGKILL ---
@pytest.mark.parametrize(("kind", "what", "share"), [
    ("offline", "gradient step", 0.01), ("offline", "gradient step", 0.5), ("offline", "gradient step", 0.99),
    ("offline", "flush to disk", 0.4), ("offline", "row", 0.7),
    ("cpq", "gradient step", 0.6), ("bear_lag", "gradient step", 0.6), ("bc_safe", "gradient step", 0.6),
    ("marvel", "gradient step", 0.05), ("marvel", "gradient step", 0.15),  # in VPA
    ("marvel", "environment step", 0.5), ("marvel", "environment step", 0.9), ("marvel", "row", 0.6),
    *(("marvel", what, share) for what in ("flush to disk", "rename") for share in (0.0, 0.15, 0.6, 1.0)),
    ("rollouts", "environment step", 0.2), ("rollouts", "gradient step", 0.1),  # first episodes, then VPA
    ("rollouts", "environment step", 0.7),
    ("from scratch", "environment step", 0.1), ("from scratch", "gradient step", 0.5),
    ("released", "environment step", 0.7), ("jsrl", "environment step", 0.7),
    ("pex", "environment step", 0.7), ("so2", "environment step", 0.7),
    ("rlpd", "environment step", 0.7), ("td3", "environment step", 0.7), ("td3", "gradient step", 0.1)])
def test_killed_run_goes_on_to_the_same_end(tmp_path, settings, untouched, kind, what, share):
    script, options = settings[kind]
    reference, counts = untouched(kind)
    folder, moment = tmp_path / "run", max(1, round(share * counts[what]))
    status, _ = run(script, folder, at=(what, moment), do=kill, **options)
    assert status == -signal.SIGKILL
    if not (folder / "config.json").exists():  # there is nothing to resume: the same command again
        assert (what, share) == ("flush to disk", 0.0) or what == "rename"
        assert run(script, folder, **options)[0] == 0
        return assert_same_end(folder, reference)
    if share < 0.5:
        return assert_resumes_to_the_same_end(script, folder, reference)
    with hidden(settings["start"] / "checkpoint.pt"):  # it does not begin again
        assert_resumes_to_the_same_end(script, folder, reference)


def test_run_killed_again_and_again_by_the_clock_ends_as_if_untouched(tmp_path, settings, untouched):
    script, options = settings["marvel"]
    folder, rng, killed = tmp_path / "run", random.Random(1), 0
    for attempt in range(40):
        how = {"resume": str(folder)} if (folder / "config.json").exists() else options
        # longer every time: on a busy machine a start alone may take longer than the first ones
        child, reader = begin(script, folder, **how)
        time.sleep(rng.uniform(0.1, 0.3) * (1 + attempt / 5))
        child.kill()
        status, printed, _ = end(child, reader)
        assert status in (0, -signal.SIGKILL), printed
        if status == 0:
            break
        killed += 1
    assert killed > 0
    assert_same_end(folder, untouched("marvel")[0])


@pytest.mark.parametrize("env_id", [
    "SafetyCarRun-v0",  # bullet: the first reset of a simulator differs, motors keep their targets
    "SafetyHopperVelocityGymnasium-v1",  # MuJoCo, episodes that end early
    "SafetyPointGoal1Gymnasium-v0",  # a layout drawn at every reset
])
def test_resumed_simulator_plays_the_episodes_that_an_untouched_one_plays(tmp_path, monkeypatch, env_id):
    monkeypatch.setattr(gym.registry[env_id], "max_episode_steps", 50)
    options = dict(env_id=env_id, from_scratch=True, learning_starts=20, total_timesteps=180, utd=0.01,
                   checkpoint_every=1, batch_size=8, eval_episodes=1, eval_every=NEVER)
    assert run(marvel_sac_pid, tmp_path / "untouched", **options)[0] == 0
    status, _ = run(marvel_sac_pid, tmp_path / "run", at=("environment step", 140), do=kill, **options)
    assert status == -signal.SIGKILL
    assert 0 < saved(tmp_path / "run")["progress"]["env_steps"] < 140  # an episode's boundary in the middle
    assert_resumes_to_the_same_end(marvel_sac_pid, tmp_path / "run", tmp_path / "untouched")


def test_row_that_was_half_written_is_cut_off(tmp_path, settings, untouched):
    script, options = settings["marvel"]

    def tear():
        with open(tmp_path / "run/metrics.csv", "a") as file:
            file.write("600,3,12.")
        kill()

    assert run(script, tmp_path / "run", at=("row", 5), do=tear, **options)[0] == -signal.SIGKILL
    assert (tmp_path / "run/metrics.csv").read_text().endswith("600,3,12.")
    assert_resumes_to_the_same_end(script, tmp_path / "run", untouched("marvel")[0])


def test_resumed_run_may_be_moved_and_keeps_its_options(tmp_path, settings, untouched):
    script, options = settings["offline"]
    assert run(script, tmp_path / "run", at=("gradient step", 46), do=kill, **options)[0] == -signal.SIGKILL
    config = (tmp_path / "run/config.json").read_bytes()
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    assert_resumes_to_the_same_end(script, tmp_path / "elsewhere", untouched("offline")[0])
    assert (tmp_path / "elsewhere/config.json").read_bytes() == config


def test_finished_run_is_left_as_it_is(untouched):
    folder, _ = untouched("marvel")
    before = files(folder)
    status, printed = resume(marvel_sac_pid, folder)
    assert status == 0 and "this run is finished" in printed
    assert files(folder) == before


def curves(folder):
    """What TensorBoard shows: {name: [(step, number)]}."""
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    accumulator.Reload()
    return {name: [(event.step, event.value) for event in accumulator.Scalars(name)]
            for name in accumulator.Tags()["scalars"] if name != "normalized_return"}  # nan: no reference


@pytest.mark.parametrize(("kind", "options", "killed", "stopped"), [
    ("marvel", {}, ("environment step", 150), None),
    ("marvel", {"vpa_steps": 250, "checkpoint_every": 90}, ("gradient step", 240), None),
    ("offline", {}, ("row", 3), None),
    ("offline", {}, ("gradient step", 2 * 16), ("gradient step", 2))])  # stopped before it logs anything
def test_tensorboard_shows_every_number_once(tmp_path, settings, kind, options, killed, stopped):
    script, small = settings[kind]
    assert run(script, tmp_path / "untouched", **{**small, **options})[0] == 0
    assert run(script, tmp_path / "run", at=killed, do=kill, **{**small, **options})[0] == -signal.SIGKILL
    time.sleep(1)  # TensorBoard's files are in the order of their second
    if stopped:
        status, _ = resume(script, tmp_path / "run", at=stopped, do=send(signal.SIGTERM))
        assert status == 128 + signal.SIGTERM
        time.sleep(1)
    assert_resumes_to_the_same_end(script, tmp_path / "run", tmp_path / "untouched")
    assert curves(tmp_path / "run") == curves(tmp_path / "untouched")


# --- More steps ---
@pytest.mark.parametrize(("kind", "name", "steps"), [
    ("offline", "update_steps", (20, 40)), ("marvel", "total_timesteps", (80, 160))])
def test_finished_run_may_get_more_steps_and_ends_as_one_that_had_them_from_the_start(
        tmp_path, settings, kind, name, steps):
    script, options = settings[kind]
    options = {**options, "eval_every": 1}  # so that the first end is an evaluation of the other run, too
    few, many = ({name: n} for n in steps)
    assert run(script, tmp_path / "long", **{**options, **many})[0] == 0
    assert run(script, tmp_path / "run", **{**options, **few})[0] == 0
    assert "may only raise it" in error_line(*resume(script, tmp_path / "run", **{name: 10}))
    assert resume(script, tmp_path / "run", **many)[0] == 0
    assert_same_end(tmp_path / "run", tmp_path / "long")


def test_run_that_got_more_steps_and_is_killed_before_it_saves_can_be_resumed(tmp_path, settings, untouched):
    script, options = settings["offline"]
    first = {**options, "update_steps": 20}
    assert run(script, tmp_path / "run", at=("gradient step", 40), do=kill, **first)[0] == -signal.SIGKILL
    status, _ = resume(script, tmp_path / "run", at=("gradient step", 3), do=kill, update_steps=30)
    assert status == -signal.SIGKILL
    assert_resumes_to_the_same_end(script, tmp_path / "run", untouched("offline")[0])


def test_run_is_not_gone_on_with_under_another_law(tmp_path, settings):
    _, options = settings["marvel"]
    assert run(marvel_sac_pid, tmp_path / "run", **options)[0] == 0
    status, printed = resume(marvel_released_pid, tmp_path / "run", total_timesteps=400)
    assert "law is PIDLagrangian, this run needs ReleasedPIDLagrangian" in error_line(status, printed)


def test_number_of_steps_that_is_typed_counts_though_it_is_the_default(tmp_path, settings, monkeypatch):
    """10,000, and the run is stopped as soon as it goes on."""
    script, options = settings["marvel"]
    assert run(script, tmp_path / "run", **options)[0] == 0
    words = ["marvel_sac_pid.py", f"--resume={tmp_path / 'run'}", "--total-timesteps", "10000"]
    monkeypatch.setattr(sys, "argv", words)
    status, printed = resume(script, tmp_path / "run", at=("gradient step", 3), do=send(signal.SIGTERM),
                             total_timesteps=10_000)
    assert status == 128 + signal.SIGTERM and "this run is finished" not in printed
    assert saved(tmp_path / "run")["args"]["total_timesteps"] == 10_000


# --- Signals ---
@pytest.mark.parametrize(("number", "kind", "at", "where"), [
    (signal.SIGINT, "offline", ("gradient step", 2 * 12), "update_steps 12"),
    (signal.SIGTERM, "marvel", ("gradient step", 9), "vpa_steps 9, env_steps 0"),
    # 40 steps are of the evaluation before; then it is within the first or the second episode
    (signal.SIGTERM, "marvel", ("environment step", 40 + 5), "vpa_steps 20, env_steps 20"),
    (signal.SIGHUP, "rollouts", ("environment step", 40 + 5), "vpa_steps 0, env_steps 20"),
    (signal.SIGUSR1, "marvel", ("gradient step", 60), "vpa_steps 20, env_steps [1-9][0-9]+")])
def test_signal_saves_at_the_end_of_the_block_and_says_how_to_resume(
        tmp_path, settings, untouched, number, kind, at, where):
    script, options = settings[kind]
    options = {**options, "checkpoint_every": NEVER}
    status, printed = run(script, tmp_path / "run", at=at, do=send(number), **options)
    assert status == 128 + number and "Traceback" not in printed
    assert re.search(f"stopped at {where}: `python .* --resume {tmp_path / 'run'}` goes on", printed), printed
    assert not saved(tmp_path / "run")["finished"]
    assert_resumes_to_the_same_end(script, tmp_path / "run", untouched(kind)[0])


def test_run_that_is_stopped_before_it_logs_anything_can_be_resumed_again(tmp_path, settings, untouched):
    script, options = settings["offline"]
    # a checkpoint at step 7, the row of step 10, and the end before step 14: resuming cuts the row off
    assert run(script, tmp_path / "run", at=("gradient step", 2 * 12), do=kill, **options)[0] == -9
    first, metrics = saved(tmp_path / "run"), tmp_path / "run/metrics.csv"
    assert first["progress"] == {"update_steps": 7} and first["metrics_bytes"] < metrics.stat().st_size
    status, _ = resume(script, tmp_path / "run", at=("gradient step", 2), do=send(signal.SIGTERM))
    assert status == 128 + signal.SIGTERM
    again = saved(tmp_path / "run")
    assert again["progress"] == {"update_steps": 8} and again["metrics_bytes"] == metrics.stat().st_size
    assert_resumes_to_the_same_end(script, tmp_path / "run", untouched("offline")[0])


@pytest.mark.parametrize("pause", [0, 1.2])
def test_second_signal_within_a_second_counts_as_one_and_a_later_one_ends_at_once(
        tmp_path, settings, untouched, pause):
    script, options = settings["marvel"]

    def twice():
        send(signal.SIGTERM)()
        time.sleep(pause)
        send(signal.SIGTERM)()

    # in the middle of the first episode that counts, without any checkpoint before
    options = {**options, "checkpoint_every": NEVER}
    status, printed = run(script, tmp_path / "run", at=("environment step", 45), do=twice, **options)
    assert status == 128 + signal.SIGTERM and "Traceback" not in printed
    assert (tmp_path / "run/checkpoint.pt").exists() == ("stopped at" in printed) == (pause == 0)
    assert_resumes_to_the_same_end(script, tmp_path / "run", untouched("marvel")[0])


def command_of(tmp_path, **options):
    """The offline script on the command line, in a folder whose name a shell would tear apart."""
    module = str(ROOT / "tests/runs")
    command = [sys.executable, str(ROOT / "offline_pretrain.py"), "--run-dir", "a  run's"]
    return command + command_line(options), {"cwd": tmp_path, "env": {"PYTHONPATH": module}}


def started(command, how, folder, **streams):
    """A process of which the run has begun."""
    process = subprocess.Popen(command, **how, **streams)
    while not (folder / "config.json").exists():
        time.sleep(0.02)
        assert process.poll() is None
    return process


def test_command_that_an_interrupted_script_prints_resumes_it_and_takes_no_other_option(
        tmp_path, settings, untouched):
    command, how = command_of(tmp_path, **settings["offline"][1], seed=0)
    process = started(command, how, tmp_path / "a  run's", stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                      text=True)
    process.send_signal(signal.SIGINT)
    printed = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + signal.SIGINT, "the run was over before the signal came"
    words = shlex.split(re.search("`(.*)`", printed)[1])
    assert words[0] == "python"
    words[0] = sys.executable
    before = files(tmp_path)
    done = subprocess.run([*words, "--cost-limit", "20"], **how, capture_output=True, text=True)
    assert "--resume takes no other option" in single_line(done.returncode, done.stderr)  # though the default
    assert files(tmp_path) == before
    done = subprocess.run(words, **how, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_same_end(tmp_path / "a  run's", untouched("offline")[0])


def test_ctrl_c_saves_though_what_shows_the_messages_dies_of_it_too(tmp_path, settings, untouched):
    """As `2>&1 | tee` does; and though it comes twice, as from GNU's `timeout`."""
    command, how = command_of(tmp_path, **settings["offline"][1])
    shown = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    process = started(command, how, tmp_path / "a  run's", stdout=shown.stdin, stderr=shown.stdin)
    shown.stdin.close()
    shown.kill()
    shown.wait()
    for _ in range(2):
        process.send_signal(signal.SIGINT)
    assert process.wait(60) == 128 + signal.SIGINT
    assert_resumes_to_the_same_end(offline_pretrain, tmp_path / "a  run's", untouched("offline")[0])


# --- A full disk ---
def fill(most):
    """From now on this process can write no file of more bytes."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))


@pytest.mark.parametrize(("kind", "at", "most"), [
    ("offline", ("gradient step", 50), 4000),  # a checkpoint cannot be written
    ("offline", ("row", 2), 200),  # nor a line of metrics.csv
    ("marvel", ("environment step", 150), 4000), ("marvel", ("row", 5), 200), ("marvel", ("row", 13), 200)])
def test_full_disk_ends_the_run_with_one_line_and_the_old_checkpoint_is_whole(
        tmp_path, settings, untouched, kind, at, most):
    script, options = settings[kind]
    status, printed = run(script, tmp_path / "run", at=at, do=fill(most), **options)
    (line,) = re.findall("error: .*", printed)
    assert status == 1 and "cannot be written (File too large)" in line and str(tmp_path / "run") in line
    assert printed.count("Traceback") == printed.count("Exception in thread")  # TensorBoard's own complaint
    assert not list((tmp_path / "run").glob("*.part"))
    assert_resumes_to_the_same_end(script, tmp_path / "run", untouched(kind)[0])


def test_start_that_finds_the_disk_full_can_be_made_again(tmp_path, settings, untouched, monkeypatch):
    script, options = settings["offline"]
    with monkeypatch.context() as patch:
        patch.setattr(common, "write_file", lambda *_: common.stop("full", status=1))
        assert run(script, tmp_path / "run", **options)[0] == 1
    assert (tmp_path / "run/metrics.csv").exists() and not (tmp_path / "run/config.json").exists()
    assert run(script, tmp_path / "run", **options)[0] == 0
    assert_same_end(tmp_path / "run", untouched("offline")[0])


# --- One run, one folder ---
def test_second_run_cannot_write_where_one_is_at_work(tmp_path, settings, untouched):
    script, options = settings["marvel"]
    ready, go = FORK.Event(), FORK.Event()

    def wait():
        ready.set()
        go.wait(60)

    first = begin(script, tmp_path / "run", at=("row", 5), do=wait, **options)
    assert ready.wait(60)
    for how in ({**options, "overwrite": True}, {"resume": str(tmp_path / "run")}):
        assert "another process is writing there" in error_line(*run(script, tmp_path / "run", **how))
    go.set()
    assert end(*first)[0] == 0
    assert_same_end(tmp_path / "run", untouched("marvel")[0])


@pytest.mark.parametrize("name", ["config.json", "metrics.csv", "checkpoint.pt", "curves.png",
                                  "events.out.tfevents.1.of-another-project"])
def test_folder_that_holds_anything_of_a_run_is_refused_with_both_ways_out(tmp_path, settings, name):
    script, options = settings["offline"]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text("precious")
    line = error_line(*run(script, tmp_path / "run", **options))
    command = f"python {os.path.relpath(offline_pretrain.__file__)} --resume {tmp_path / 'run'}"
    assert f"run: holds a run; `{command}` goes on with it" in line
    assert "--overwrite restarts" in line
    assert {file.name: file.read_text() for file in (tmp_path / "run").iterdir()} == {name: "precious"}


@pytest.mark.parametrize("at", [None, ("rename", 1), ("flush to disk", 1)])  # at both, of config.json
def test_overwriting_starts_from_nothing_though_it_is_killed_while_it_starts(
        tmp_path, settings, untouched, at):
    script, options = settings["offline"]
    assert run(script, tmp_path / "run", at=("row", 2), do=kill, **{**options, "seed": 5})[0] == -9
    if at:
        assert run(script, tmp_path / "run", at=at, do=kill, overwrite=True, **options)[0] == -9
        assert "has no config.json (start it again)" in error_line(*resume(script, tmp_path / "run"))
    status, printed = run(script, tmp_path / "run", overwrite=True, **options)
    assert status == 0, printed
    assert_same_end(tmp_path / "run", untouched("offline")[0])
