"""Bad input: one line that names it and what is wrong, exit status 2, nothing written, nothing executed.

Each case is broken in one place only, and given to a script's main twice: with a new folder for the run, and
with --overwrite and a folder that holds a run, of which every byte must stay. All faults of datasets,
checkpoints and tasks are in tests of their own; here are one or two of a kind.
"""

import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, command_line, run_script, single_line
from small import Payload, kill, kinds, run, saved, transitions, write_arrays
from test_custom_environment import WRONG_STEPS

import common
import marvel_sac_pid
import offline_pretrain
from benchmark.baselines import bc_safe, cpq

NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """What is not broken: a dataset, an offline checkpoint, options, and an unfinished run of each phase."""
    folder = tmp_path_factory.mktemp("sound")
    options = kinds(folder)
    made = types.SimpleNamespace(
        data=transitions(), dataset_path=folder / "data.hdf5", content=saved(folder / "offline"),
        checkpoint=folder / "offline/checkpoint.pt", options={
            offline_pretrain: options["offline"][1], cpq: options["cpq"][1], bc_safe: options["bc_safe"][1],
            marvel_sac_pid: options["marvel"][1]})
    made.offline, made.online = folder / "stopped offline", folder / "stopped online"
    for script, run_dir in (offline_pretrain, made.offline), (marvel_sac_pid, made.online):
        assert run(script, run_dir, at=("gradient step", 60), do=kill, **made.options[script])[0] == -9
        assert not saved(run_dir)["finished"]
    return made


# --- Ways to break it; each gives build(sound, folder) -> script, options ---
def option(script=marvel_sac_pid, **options):
    return lambda sound, folder: (script, options)


def dataset(script=offline_pretrain, attributes=None, **changes):
    """A dataset with other arrays, None to leave one out, or attributes."""
    def build(sound, folder):
        arrays = {key: array for key, array in {**sound.data, **changes}.items() if array is not None}
        write_arrays(folder / "broken.hdf5", arrays, **attributes or {})
        return script, {"dataset_path": str(folder / "broken.hdf5")}
    return build


def checkpoint(**changes):
    """A checkpoint in which fields are others."""
    def build(sound, folder):
        torch.save(sound.content | changes, folder / "broken.pt")
        return marvel_sac_pid, {"checkpoint": str(folder / "broken.pt")}
    return build


def half(what, script):
    """Half of the dataset's or of the checkpoint's file."""
    def build(sound, folder):
        content = getattr(sound, what).read_bytes()
        (folder / "broken").write_bytes(content[:len(content) // 2])
        return script, {what: str(folder / "broken")}
    return build


def resumed(change, script=marvel_sac_pid, run="online", **options):
    """--resume of an unfinished run's folder that change(folder) changed."""
    def build(sound, folder):
        shutil.copytree(getattr(sound, run), folder / "stopped")
        change(folder / "stopped")
        return script, {"resume": str(folder / "stopped"), **options}
    return build


def run_dir(prepare, **options):
    """--run-dir of what prepare(sound, folder) gives."""
    return lambda sound, folder: (marvel_sac_pid, {"run_dir": str(prepare(sound, folder)), **options})


# Changes of a run's folder:
def unchanged(_):
    pass


def config(**changes):
    def change(folder):
        old = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(old | changes))
    return change


def file(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def cut(name, size):
    return lambda folder: os.truncate(folder / name, max(0, (folder / name).stat().st_size + size))


def removed(name):
    return lambda folder: (folder / name).unlink()


def rewritten(**changes):
    def change(folder):
        content = {name: value for name, value in (saved(folder) | changes).items() if value is not None}
        torch.save(content, folder / "checkpoint.pt")
    return change


def with_data(path):
    """As if the run had been started with another --dataset-path."""
    return lambda folder: (config(dataset_path=path)(folder), rewritten(
        args=saved(folder)["args"] | {"dataset_path": path})(folder))


HOLDERS = []
HOLD = ("import fcntl, sys; file = open(sys.argv[1], 'a'); fcntl.flock(file, fcntl.LOCK_EX); "
        "print(flush=True); sys.stdin.read()")


def lock_elsewhere(folder):
    """Another process has the lock; it ends with this one's pipe."""
    process = subprocess.Popen([sys.executable, "-S", "-c", HOLD, folder / "metrics.csv"],
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline()
    HOLDERS.append(process)
    return folder


def copied(sound, folder):
    return shutil.copytree(sound.online, folder / "there")


def made(name, content=None):
    """A path in the case's folder: a file with this content, or a folder."""
    def prepare(sound, folder):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).mkdir() if content is None else (folder / name).write_bytes(content)
        return folder / name
    return prepare


NOT_HDF5, NOT_READ, NO_FILE = "not a readable HDF5 file", "not a readable checkpoint", "no such file"
NO_CONFIG, OTHER_RUN = "has no config.json (start it again) or one of", "are not those of one run"
OTHER, NO_PLACE = "takes no other option", "cannot write there"
KINDS = {
    "task": {
        "misspelt": (option(env_id="SafetyBalCircle-v0"), "the nearest names are SafetyBallCircle-v0"),
        "no-name": (option(env_id=""), "--env-id"),
        "without-costs": (option(env_id="Pendulum-v1"), "no info['cost']"),
        "without-costs-offline": (option(offline_pretrain, env_id="Pendulum-v1"), "no info['cost']"),
        "discrete-actions": (option(env_id="CartPole-v1"), "must be boxes of one dimension"),
        "module-missing": (option(env_id="no_such_module:Task-v0"), "no_such_module"),
        "not-in-its-module": (option(env_id="small:Other-v0"), "does not run", "Other"),
        "without-dataset": (option(offline_pretrain, env_id="SafetyCarReach-v0", dataset_path=None),
                            "SafetyCarReach-v0", "benchmark/tools/collect_dataset.py"),
    },
    "data": {
        "half": (half("dataset_path", offline_pretrain), "broken", NOT_HDF5),
        "half-for-finetuning": (half("dataset_path", marvel_sac_pid), "broken", NOT_HDF5),
        "nowhere": (option(offline_pretrain, dataset_path="typo.hdf5"), "typo.hdf5", NO_FILE),
        "a-folder": (option(offline_pretrain, dataset_path="."), "--dataset-path"),
        "name-too-long": (option(offline_pretrain, dataset_path="x" * 300), NO_FILE),
        "without-costs": (dataset(costs=None), "broken.hdf5", "lacks the arrays costs"),
        "nan-for-finetuning": (dataset(marvel_sac_pid, rewards=np.full(181, NAN)), "rewards is not finite"),
        "negative-cost": (dataset(costs=np.full(181, -1)), "broken.hdf5", "costs"),
        "other-lengths": (dataset(rewards=np.zeros(180)), "broken.hdf5", "(180, 3)"),
        "no-transitions": (
            dataset(**{key: array[:0] for key, array in transitions().items()}), "broken.hdf5"),
        "other-dimension": (dataset(actions=np.zeros((181, 3))), "broken.hdf5", "actions"),
        "actions-out-of-bounds": (dataset(actions=np.full((181, 2), 1.5)), "broken.hdf5", "actions"),
        "other-task": (dataset(attributes={"task": "SafetyCarRun-v0"}), "from SafetyCarRun-v0, not"),
        "nothing-safe-to-imitate": (dataset(bc_safe, costs=np.full(181, 99)), "no episode of cost <= 20"),
    },
    "checkpoint": {
        "half": (half("checkpoint", marvel_sac_pid), "broken", NOT_READ),
        "code": (checkpoint(rng=Payload("created")), "broken.pt", NOT_READ),
        "of-the-offline-run-not-made-yet": (
            option(checkpoint=None), "--checkpoint runs/", NO_FILE, "`python offline_pretrain.py` makes one"),
        "other-task": (checkpoint(env_id="SafetyCarCircle-v0"), "env_id is SafetyCarCircle-v0"),
        "other-discount": (option(gamma=0.9), "gamma is 0.99, this run needs 0.9"),
        "other-reward-scale": (option(reward_scale=1.0), "reward_scale is 0.1, this run needs 1.0"),
        "of-pex": (checkpoint(actor=None), "broken.pt", "actor"),
        "unfinished": (checkpoint(finished=False), "broken.pt"),
        "a-folder": (option(checkpoint="."), "--checkpoint"),
        **{f"resume-{name}": case for name, case in {
            "truncated": (resumed(cut("checkpoint.pt", -1000)), "checkpoint.pt", NOT_READ),
            "code": (resumed(rewritten(rng=Payload("created"))), "checkpoint.pt", NOT_READ),
            "something-else": (resumed(lambda folder: common.save_checkpoint(
                folder / "checkpoint.pt", {"actor": {}})), "stopped"),
            "other-data": (resumed(rewritten(dataset_sha256="0")), "checkpoint.pt", "dataset_sha256 is 0"),
            "without-hash": (resumed(rewritten(dataset_sha256=None), offline_pretrain, "offline"),
                             "dataset_sha256 is None")}.items()},
    },
    "option": {
        **{f"{name}={value}": (option(**{name: value}),
                               f"--{name.replace('_', '-')} {value}: must be between")
           for name, value in [
            ("cost_limit", -1.0), ("cost_limit", NAN), ("cost_limit", INF), ("cost_margin", 2.5),
            ("gamma", 1.0), ("gamma", NAN), ("reward_scale", 0.0), ("batch_size", 0), ("critic_lr", 1.1),
            ("actor_lr", INF), ("vpa_steps", -1), ("vpa_tau", 1.5), ("vpa_alpha", -0.01),
            ("total_timesteps", -1), ("utd", -0.25), ("rollout_episodes", 0), ("learning_starts", -1),
            ("tau", 1.01), ("alpha", -1.0), ("adapt_rate", 2.0), ("lagrange_init", -1.0),
            ("lagrange_init", NAN), ("lagrange_max", -1.0), ("kp", -1.0), ("kd", NAN), ("eval_every", 0),
            ("eval_episodes", 0), ("checkpoint_every", 0), ("seed", -1), ("seed", 2**32)]},
        **{f"offline-{name}={value}": (option(offline_pretrain, **{name: value}), f"{value}: must be between")
           for name, value in [
            ("cost_limit", NAN), ("update_steps", 0), ("qc_tau", 1.1), ("bc_weight", NAN)]},
        **{f"cpq-{name}={value}": (option(cpq, **{name: value}), f"{value}: must be between")
           for name, value in [
            ("vae_beta", -0.1), ("vae_lr", 2.0), ("ood_actions", 0), ("ood_quantile", 1.1),
            ("ood_weight", -1.0)]},
        **{f"{name}={value!r}": (option(**{name: value}), f"--{name.replace('_', '-')} {value!r}: must be")
           for name, value in [
            ("multiplier", "PID"), ("lagrange_init", "0.5"), ("lagrange_init", "norm_ratio"),
            ("vpa_data", "rollout"), ("vpa_critics", "none"), ("seed", "3"), ("seed", 0.5), ("seed", None),
            ("total_timesteps", None), ("total_timesteps", True), ("autotune", 1), ("run_dir", 3)]},
        "from-scratch-with-checkpoint": (option(from_scratch=True), "takes neither --checkpoint nor"),
        "no-gpu": (option(cuda=True), "--cuda: torch finds no GPU here"),
        **{f"resume-{where}": (option(script, resume=where), "--resume", NO_CONFIG)
           for where, script in {"nowhere": marvel_sac_pid, "": marvel_sac_pid, ".": offline_pretrain,
                                 __file__: marvel_sac_pid, "x" * 300: marvel_sac_pid}.items()},
        "resume-offline-run-online": (resumed(unchanged, run="offline"), NO_CONFIG),
        "resume-online-run-offline": (resumed(unchanged, offline_pretrain), NO_CONFIG),
        "resume-with-other-options": (resumed(unchanged, cost_limit=30.0), OTHER),
        "resume-with-run-dir": (resumed(unchanged, run_dir="elsewhere"), OTHER),
        "resume-with-overwrite": (resumed(unchanged, offline_pretrain, "offline", overwrite=True), OTHER),
        "resume-with-fewer-steps": (resumed(unchanged, total_timesteps=100), "may only raise it"),
    },
    "file system": {
        "run-dir-below-a-file": (run_dir(lambda *_: "/dev/null/x"), f"{NO_PLACE} (Not a directory)"),
        "run-dir-is-a-file": (run_dir(made("plain", b"text")), f"plain: {NO_PLACE} (File exists)"),
        "run-dir-is-a-file-overwrite": (run_dir(made("plain", b"text"), overwrite=True), NO_PLACE),
        "run-dir-name-too-long": (run_dir(lambda *_: "x" * 300), f"{NO_PLACE} (File name too long)"),
        "metrics-is-a-folder": (run_dir(lambda *x: made("run/metrics.csv")(*x).parent), "(Is a directory)"),
        "run-dir-holds-a-run": (
            run_dir(copied), "there: holds a run", "there` goes on with it", "--overwrite"),
        **{f"resume-config-{name}": (resumed(change), NO_CONFIG) for name, change in {
            "not-json": cut("config.json", -5), "empty": file("config.json", b""),
            "bytes": file("config.json", b"\xff\xfe\x00{"), "list": file("config.json", b"[1, 2]"),
            "unknown-option": config(colour="red"), "missing": removed("config.json")}.items()},
        "resume-config-of-another-run": (resumed(config(seed=5)), OTHER_RUN),
        "resume-config-out-of-range": (resumed(lambda folder: (
            removed("checkpoint.pt")(folder), config(batch_size=0)(folder))),
            "--batch-size 0: must be between"),
        "resume-metrics-shortened": (resumed(cut("metrics.csv", -10**6)), OTHER_RUN),
        "resume-metrics-missing": (resumed(removed("metrics.csv")), OTHER_RUN),
        "resume-dataset-gone": (resumed(with_data("gone.hdf5")), "--dataset-path gone.hdf5", NO_FILE),
    },
    "process": {
        "run-dir-of-another": (run_dir(lambda *x: lock_elsewhere(copied(*x)), overwrite=True),
                               "there: another process is writing there"),
        "resume-in-another": (resumed(lock_elsewhere), "--run-dir", "another process is writing"),
        "resume-in-another-offline": (
            resumed(lock_elsewhere, offline_pretrain, "offline"), "--run-dir", "another process is writing"),
        "more-transitions-than-memory": (
            option(total_timesteps=10**9), "--total-timesteps", "this machine has"),
    },
}
CASES = {f"{kind}: {name}": case for kind, cases in KINDS.items() for name, case in cases.items()}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder in which a case runs, with an empty cache of datasets and without a GPU."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DSRL_DATASET_DIR", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()  # DSRL's import would make it
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # asking for a GPU is a mistake
    yield tmp_path
    while HOLDERS:
        HOLDERS.pop().communicate()


def snapshot(folder):
    """Every path below a folder, its time of change, and its bytes."""
    return {path: (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else None)
            for path in (folder, *folder.rglob("*"))}


def attempts(sound, folder, script, options):
    """The options of a case for a new folder, and for one that holds a run and may be overwritten."""
    if "resume" in options:
        return [options]
    options = {**sound.options[script], **options}
    if "run_dir" in options:
        return [options]
    shutil.copytree(sound.offline, folder / "old")
    return [options | {"run_dir": str(folder / "new")},
            options | {"run_dir": str(folder / "old"), "overwrite": True}]


def check(line, *words):
    for word in words:
        assert word in line, line


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_named_in_one_line_and_nothing_is_written(sound, folder, refusal, name):
    build, *words = CASES[name]
    script, options = build(sound, folder)
    for attempt in attempts(sound, folder, script, options):
        before = snapshot(folder)
        line = refusal(script.main, script.Args(**attempt))
        check(line, *words)
        assert snapshot(folder) == before


@pytest.mark.pins
def test_readme_counts_the_cases_by_kinds():
    counts = ", ".join(f"{kind} {len(cases)}" for kind, cases in KINDS.items())
    text = " ".join((ROOT / "README.md").read_text().split())
    assert f"in {len(CASES)} ways ({counts})" in text
    assert f"({len(WRONG_STEPS)} ways, `tests/runs/test_custom_environment.py`)" in text


@pytest.mark.parametrize("name", ["checkpoint: code", "file system: resume-config-not-json"])
def test_command_line_ends_with_status_2_and_without_traceback(sound, folder, name):
    build, *words = CASES[name]
    script, options = build(sound, folder)
    attempt = attempts(sound, folder, script, options)[0]
    before = snapshot(folder)
    status, _, stderr = run_script(
        f"{script.__name__}.py", *command_line(attempt), cwd=folder,
        env={"PYTHONPATH": str(Path(__file__).parent), "PYTHONDONTWRITEBYTECODE": "1"})
    check(single_line(status, stderr), *words)
    assert snapshot(folder) == before


def test_tracking_that_does_not_start_leaves_the_run_that_it_would_overwrite(
        sound, folder, refusal, monkeypatch):
    def init(**_):
        raise RuntimeError("out of order\nsince Monday")

    monkeypatch.setattr("wandb.init", init)
    for attempt in attempts(sound, folder, marvel_sac_pid, {"track": True}):
        before = snapshot(folder)
        line = refusal(marvel_sac_pid.main, marvel_sac_pid.Args(**attempt))
        check(line, "--track", "out of order since Monday")
        assert snapshot(folder) == before


# --- Downloads ---
DOWNLOADED = "SafetyCarCircle-v0-100-1450.hdf5"


def download(folder, endpoint):
    """A run on a new machine: no login, no cache; and libraries that do not wait between retries."""
    (folder / "site").mkdir(exist_ok=True)
    (folder / "site/sitecustomize.py").write_text("import time\ntime.sleep = lambda seconds: None\n")
    options = {"env_id": "SafetyCarCircle-v0", "run_dir": folder / "run", "update_steps": 2, "batch_size": 8,
               "eval_episodes": 1}
    return run_script("offline_pretrain.py", *command_line(options), cwd=folder, env={
        "HOME": str(folder / "home"), "PYTHONPATH": str(folder / "site"), "PYTHONDONTWRITEBYTECODE": "1",
        "DSRL_DATASET_DIR": str(folder / "cache"), "NO_PROXY": "127.0.0.1", "HF_ENDPOINT": endpoint})


class Mirror(http.server.BaseHTTPRequestHandler):
    """The mirror of datasets; unless it is `whole`, it promises a file and closes the connection half way."""

    whole, content, sent = False, b"", []

    def do_HEAD(self):
        self.send_response(200)
        self.send_header("ETag", '"1234"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()

    def do_GET(self):
        self.do_HEAD()
        part = self.content if self.whole else self.content[:len(self.content) // 2]
        self.sent.append(len(part))
        self.wfile.write(part)

    def log_message(self, *_):
        pass


@pytest.fixture
def mirror(ball_data, folder, monkeypatch):
    """Its address; the file is of a task with BallCircle's dimensions."""
    path = write_arrays(folder / "sent", ball_data, task="SafetyCarCircle-v0")
    monkeypatch.setattr(Mirror, "content", path.read_bytes())
    monkeypatch.setattr(Mirror, "sent", [])
    path.unlink()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Mirror) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_download_that_fails_or_is_cut_short_is_never_taken_for_the_dataset(folder, mirror, monkeypatch):
    says = DOWNLOADED, "cannot download", str(folder / "cache"), "https://huggingface.co/datasets/YYY-45/DSRL"
    status, _, stderr = download(folder, "http://127.0.0.1:9")  # the port of a service that nobody runs
    check(single_line(status, stderr), *says)

    status, _, stderr = download(folder, mirror)
    lines = stderr.replace("\r", "\n").splitlines()  # beside the downloader's progress bar
    (line,) = [line for line in lines if line.startswith("error: ")]
    check(line, *says)
    assert status == 2 and lines[-1] == line and "Traceback" not in stderr
    assert not (folder / "run").exists()
    left = {path.name for path in folder.rglob("*") if path.is_file() and ".cache" not in path.parts}
    assert left == {"sitecustomize.py"}  # but for the downloader's own notes

    monkeypatch.setattr(Mirror, "whole", True)
    status, _, stderr = download(folder, mirror)
    assert status == 0, stderr
    assert 0 < Mirror.sent[0] < Mirror.sent[-1] == len(Mirror.content)
    assert (folder / "cache" / DOWNLOADED).read_bytes() == Mirror.content
    assert (folder / "run/checkpoint.pt").exists()


# --- What is not refused ---
SOUND = {
    "dataset": dataset(),
    "dataset-for-finetuning": dataset(marvel_sac_pid),
    "resume-rewritten": resumed(rewritten()),
    "resume-metrics-longer": resumed(lambda folder: open(folder / "metrics.csv", "a").write("x" * 5000)),
    "run-dir-deep": run_dir(lambda sound, folder: folder / "new/deep"),
    "run-dir-empty": run_dir(made("new")),
    "run-dir-of-empty-files": run_dir(lambda *x: made("new/metrics.csv", b"")(*x).parent),
    "rollouts-of-one-episode": option(vpa_data="rollouts", learning_starts=0, dataset_path=None),
    "smallest": option(batch_size=1, checkpoint_every=1, eval_every=1, kp=0.0, ki=0.0, kd=0.0, adapt_rate=0.0,
                       tau=0.0, alpha=0.0, lagrange_init=0.0, lagrange_max=0.0, vpa_steps=0, utd=0.05),
    "smallest-offline": option(offline_pretrain, batch_size=1, update_steps=1, checkpoint_every=1,
                               gamma=0.0, tau=0.0, qc_tau=0.0, cost_limit=0.0),
    "largest": option(seed=2**32 - 1, tau=1.0, vpa_tau=1.0, cost_margin=1.0, adapt_rate=1.0),
    "largest-offline": option(offline_pretrain, seed=2**32 - 1, gamma=0.9999, tau=1.0, qc_tau=1.0),
}


@pytest.mark.parametrize("name", SOUND)
def test_what_is_not_broken_runs(sound, folder, name):
    script, options = SOUND[name](sound, folder)
    if "resume" not in options:
        options = {**sound.options[script], "run_dir": str(folder / "new"), **options}
    script.main(script.Args(**options))
    assert saved(Path(options.get("resume") or options["run_dir"]))["finished"]
    assert not (folder / "created").exists()
