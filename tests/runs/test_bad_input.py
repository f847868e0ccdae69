"""Bad input: one line that names it and what is wrong, exit status 2, nothing written, nothing executed.

CASES is the whole table. Each case is broken in one place only, and given to a script's main twice: with a
new folder for the run, and with --overwrite and a folder that holds a run, of which every byte must stay.
"""

import ast
import contextlib
import http.server
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import types
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from conftest import TASK, TINY_MARVEL, TINY_OFFLINE, command_line, run_script, single_line

import common
import marvel_sac_pid
import offline_pretrain
from benchmark.curves import read_metrics

NAN, INF = float("nan"), float("inf")
KEYS, FLAGS, NETWORKS = common.DATASET_KEYS, ("terminals", "timeouts"), ("actor", "q", "qc")
OFFLINE = {**TINY_OFFLINE, "update_steps": 20}
ONLINE = {**TINY_MARVEL, "total_timesteps": 200, "vpa_steps": 10}


# --- What is not broken ---
@pytest.fixture(scope="module")
def sound(ball_data, tmp_path_factory):
    """A dataset (arrays, file), an offline checkpoint (dict, file), and an unfinished run of each script."""
    folder = tmp_path_factory.mktemp("sound")
    made = types.SimpleNamespace(data=ball_data, dataset=folder / "data.hdf5", checkpoint=folder / "actor.pt")
    write_arrays(made.dataset, ball_data)
    options = {"dataset_path": str(made.dataset), "checkpoint_every": 1}
    offline_pretrain.main(offline_pretrain.Args(run_dir=str(folder / "whole"), **OFFLINE, **options))
    whole = common.load_checkpoint(folder / "whole/checkpoint.pt")
    made.content = {name: value for name, value in whole.items() if name in NETWORKS or "_" not in name}
    made.content.update({name: whole[name] for name in ("env_id", "obs_dim", "act_dim", "reward_scale")})
    torch.save(made.content, made.checkpoint)

    made.offline, made.online = folder / "offline", folder / "online"
    checkpoint = common.Run.checkpoint
    with pytest.MonkeyPatch.context() as patch:  # as if SIGTERM came in the first update, or episode
        patch.setattr(common.Run, "checkpoint", lambda run, state, last=False: (
            setattr(run, "signal", signal.SIGTERM), checkpoint(run, state, last)))
        for script, run_dir in (offline_pretrain, made.offline), (marvel_sac_pid, made.online):
            args = script.Args(**complete(made, script, options | {"run_dir": str(run_dir)}))
            args.vpa_steps = 0  # so that the online run stops after an episode
            with pytest.raises(SystemExit):
                script.main(args)
    return made


def complete(sound, script, options):
    """The options of a tiny run with a sound dataset and checkpoint, but for those given."""
    if script is offline_pretrain:
        return {**OFFLINE, "dataset_path": str(sound.dataset), **options}
    return {**ONLINE, "dataset_path": str(sound.dataset), "checkpoint": str(sound.checkpoint), **options}


def write_arrays(path, arrays, **attributes):
    """An HDF5 file of any arrays; None is written as a group."""
    with h5py.File(path, "w") as file:
        for key, array in arrays.items():
            if array is None:
                file.create_group(key)
            elif np.ndim(array) == 0:
                file[key] = array
            else:
                file.create_dataset(key, data=array, compression="gzip")
        file.attrs.update({"task": TASK} | attributes)


def nothing(_):
    """Break nothing."""


# --- Ways to break it; each gives build(sound, folder) -> script, options, what the line must name ---
def dataset(change, script=offline_pretrain, attributes=None, **options):
    """A dataset of which change(arrays) replaced arrays, or with other attributes."""
    def build(sound, folder):
        arrays = dict(sound.data)
        change(arrays)
        write_arrays(folder / "broken.hdf5", arrays, **attributes or {})
        return script, {"dataset_path": str(folder / "broken.hdf5"), **options}, "broken.hdf5"
    return build


def dataset_file(change, script=offline_pretrain):
    """A dataset's file of which change(bytes) made another."""
    def build(sound, folder):
        (folder / "broken.hdf5").write_bytes(change(sound.dataset.read_bytes()))
        return script, {"dataset_path": str(folder / "broken.hdf5")}, "broken.hdf5"
    return build


def hdf5(change):
    """A dataset's file after change(file), with the file opened by h5py."""
    def build(sound, folder):
        shutil.copy(sound.dataset, folder / "broken.hdf5")
        with h5py.File(folder / "broken.hdf5", "a") as file:
            change(file)
        return offline_pretrain, {"dataset_path": str(folder / "broken.hdf5")}, "broken.hdf5"
    return build


def checkpoint(change, save=torch.save, **options):
    """A checkpoint of which change(dict) changed fields or, if it returns something, made something else."""
    def build(sound, folder):
        content = {name: dict(x) if isinstance(x, dict) else x for name, x in sound.content.items()}
        changed = change(content)
        save(content if changed is None else changed, folder / "broken.pt")
        return marvel_sac_pid, {"checkpoint": str(folder / "broken.pt"), **options}, "broken.pt"
    return build


def checkpoint_file(change):
    """A checkpoint's file of which change(bytes) made another."""
    def build(sound, folder):
        (folder / "broken.pt").write_bytes(change(sound.checkpoint.read_bytes()))
        return marvel_sac_pid, {"checkpoint": str(folder / "broken.pt")}, "broken.pt"
    return build


def payload(wrap, save=torch.save):
    """A checkpoint with, where wrap(content, code) puts it, a pickle that creates the folder `created`."""
    return lambda sound, folder: checkpoint(
        lambda content: wrap(content, Payload(folder / "created")), save)(sound, folder)


class Payload:
    """Unpickled without care, this creates a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def option(script=marvel_sac_pid, names=None, **options):
    """Options; the line must name the first of them and its value."""
    name, value = next(iter(options.items()))
    names = f"--{name.replace('_', '-')} {value}" if names is None else names
    return lambda sound, folder: (script, options, names)


def module(source, env_id):
    """--env-id of a module with this source, in the folder in which the script runs."""
    def build(sound, folder):
        (folder / f"{env_id.split(':')[0]}.py").write_text(source)
        return marvel_sac_pid, {"env_id": env_id}, f"--env-id {env_id}"
    return build


def resume(change, script=marvel_sac_pid, run="online", names="--resume", **options):
    """--resume of an unfinished run's folder that change(folder) changed."""
    def build(sound, folder):
        shutil.copytree(getattr(sound, run), folder / "stopped")
        change(folder / "stopped")
        return script, {"resume": str(folder / "stopped"), **options}, names
    return build


def run_dir(prepare, names="--run-dir", **options):
    """--run-dir of what prepare(sound, folder) gives."""
    return lambda sound, folder: (
        marvel_sac_pid, {"run_dir": str(prepare(sound, folder)), **options}, names)


# Changes of a dataset's arrays:
def replaced(**arrays):
    return lambda data: data.update(arrays)


def without(key):
    return lambda data: data.pop(key)


def shortened(*keys, rows=-1):
    return lambda data: data.update({key: data[key][:rows] for key in keys})


def entry(key, row, value):
    def change(data):
        data[key] = data[key].astype(np.float32)
        data[key][row] = value
    return change


def swapped(data):
    data.update(rewards=data["costs"][:, None], costs=data["rewards"][:, None] - 100)


def another_float(file):
    """A number format that HDF5 can describe and numpy cannot hold: an exponent of 30 bits."""
    kind = h5py.h5t.IEEE_F64LE.copy()
    kind.set_fields(63, 33, 30, 0, 33)
    del file["rewards"]
    h5py.h5d.create(file.id, b"rewards", kind, h5py.h5s.create_simple((600,)))


def endless(file):
    """More rows than any memory has, in a file of a few bytes."""
    del file["rewards"]
    file.create_dataset("rewards", (2**50,), np.float32, chunks=(1024,))


def damaged(file):
    chunk = file["observations"].id.get_chunk_info(0)
    with open(file.filename, "r+b") as raw:
        raw.seek(chunk.byte_offset + 20)
        raw.write(b"\xff" * 40)


# Changes of a checkpoint:
def field(name, value):
    return lambda content: content.update({name: value})


def lacking(name):
    return lambda content: (content.pop(name), None)[1]


def weight(network, value):
    def change(content):
        name = list(content[network])[2]
        content[network][name] = content[network][name].clone()
        content[network][name].view(-1)[5] = value
    return change


def other_kind(change):
    """One weight is another kind of tensor, with the same numbers where it can hold them."""
    def replace(content):
        content["actor"]["fc1.weight"] = change(content["actor"]["fc1.weight"])
    return replace


def other_shapes(content):
    content["actor"] = marvel_sac_pid.Actor(8, 2, hidden=64).state_dict()


def layer_lost(content):
    content["q"].pop(list(content["q"])[1])


def flipped(content):
    """One bit of one weight, which is still a number."""
    at = len(content) // 2
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1:]


def as_actor(content, code):
    content["actor"] = code


def nested(content, code):
    content["evaluations"] = [{"mean": (1, [code])}]


def plain_pickle(content, path):
    path.write_bytes(pickle.dumps(content, protocol=2))


def old_format(content, path):
    torch.save(content, path, _use_new_zipfile_serialization=False)


def torchscript(_, path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), path)


# Changes of a run's folder:
def config(**changes):
    def change(folder):
        old = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(old | changes))
    return change


def file(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def cut(name, size):
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size + size)


def saved(change):
    def rewrite(folder):
        content = torch.load(folder / "checkpoint.pt", weights_only=True)
        change(content)
        torch.save(content, folder / "checkpoint.pt")
    return rewrite


def saved_payload(folder):
    saved(field("rng", Payload(folder / "created")))(folder)


def never_saved(**changes):
    return lambda folder: ((folder / "checkpoint.pt").unlink(), config(**changes)(folder))


def with_data(path):
    """As if the run had been started with another --dataset-path."""
    return lambda folder: (config(dataset_path=path)(folder), saved(
        lambda content: content["args"].update(dataset_path=path))(folder))


def other_data(folder):
    """The dataset was replaced since, by one of the same shapes."""
    path = folder.parent / "replaced.hdf5"
    with h5py.File(json.loads((folder / "config.json").read_text())["dataset_path"]) as old:
        write_arrays(path, {key: old[key][()] for key in KEYS}, made="again")
    with_data(str(path))(folder)


def held(sound, folder):
    """A folder in which another process has the lock; it ends with this one's pipe."""
    shutil.copytree(sound.online, folder / "busy")
    lock_elsewhere(folder / "busy/metrics.csv")
    return folder / "busy"


HOLDERS = []
HOLD = ("import fcntl, sys; file = open(sys.argv[1], 'a'); fcntl.flock(file, fcntl.LOCK_EX); "
        "print(flush=True); sys.stdin.read()")


def lock_elsewhere(path):
    process = subprocess.Popen([sys.executable, "-S", "-c", HOLD, path], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE)
    assert process.stdout.readline()
    HOLDERS.append(process)


def copied(sound, folder):
    return shutil.copytree(sound.online, folder / "there")


def made(name, content=None):
    """A path in the case's folder: a file with this content, or a folder."""
    def prepare(sound, folder):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).mkdir() if content is None else (folder / name).write_bytes(content)
        return folder / name
    return prepare


def table(folder):
    """An array of numpy, in the zip format that looks most like a checkpoint's."""
    with zipfile.ZipFile(folder, "w") as archive:
        archive.writestr("archive/data.txt", "1,2")


NOT_HDF5, NOT_READ = "not a readable HDF5 file", "not a readable checkpoint"
NO_CONFIG, OTHER_RUN = "has no config.json (start it again) or one of", "are not those of one run"
NO_RANGE, NO_FILE, OTHER = "must be between", "no such file", "takes no other option"
CASES = {
    # --- Datasets: the file ---
    "data-one-byte": (dataset_file(lambda x: x[:1]), NOT_HDF5),
    "data-header-only": (dataset_file(lambda x: x[:96]), NOT_HDF5),
    "data-half": (dataset_file(lambda x: x[:len(x) // 2]), NOT_HDF5),
    "data-last-byte-missing": (dataset_file(lambda x: x[:-1]), NOT_HDF5),
    "data-half-for-finetuning": (dataset_file(lambda x: x[:len(x) // 2], marvel_sac_pid), NOT_HDF5),
    "data-empty-file": (dataset_file(lambda x: b""), NOT_HDF5),
    "data-csv": (dataset_file(lambda x: b"observations,actions\n1,2\n"), NOT_HDF5),
    "data-zeros": (dataset_file(lambda x: bytes(len(x))), NOT_HDF5),
    "data-damaged-in-the-middle": (hdf5(damaged), NOT_HDF5),
    "data-directory": (option(offline_pretrain, dataset_path="."), NO_FILE),
    "data-nowhere": (option(offline_pretrain, dataset_path="typo.hdf5"), NO_FILE),
    "data-name-too-long": (option(offline_pretrain, dataset_path="x" * 300), NO_FILE),
    # --- Datasets: the arrays ---
    **{f"data-without-{key}": (dataset(without(key)), f"lacks the arrays {key}") for key in KEYS},
    **{f"data-shorter-{key}": (dataset(shortened(key)), "has shape (599", "needs (600") for key in KEYS
       if key != "rewards"},
    "data-shorter-rewards": (dataset(shortened("rewards")), "has shape (600, 8)", "needs (599, 8)"),
    **{f"data-nan-{key}": (dataset(entry(key, 7, NAN)), f"{key} is not finite at transition 7")
       for key in KEYS},
    **{f"data-inf-{key}": (dataset(entry(key, 599, INF)), f"{key} is not finite at transition 599")
       for key in KEYS},
    "data-nan-for-finetuning": (dataset(entry("costs", 0, NAN), marvel_sac_pid), "costs is not finite"),
    "data-beyond-float32": (dataset(replaced(rewards=np.full(600, 1e300))), "rewards is not finite"),
    "data-group": (dataset(replaced(observations=None)), "lacks the arrays observations"),
    "data-scalar": (dataset(replaced(rewards=1.0)), "lacks the arrays rewards"),
    "data-text": (dataset(replaced(costs="none")), "lacks the arrays costs"),
    "data-null": (dataset(replaced(costs=h5py.Empty("f"))), "lacks the arrays costs"),
    "data-strings": (dataset(replaced(actions=np.full((600, 2), b"1"))), "actions holds |S1, not numbers"),
    "data-objects": (dataset(replaced(rewards=np.array(["1"] * 600, h5py.string_dtype()))),
                     "rewards holds object, not numbers"),
    "data-complex": (dataset(replaced(costs=np.zeros(600, complex))), "costs holds complex128"),
    "data-records": (dataset(replaced(costs=np.zeros(600, "f4,f4"))), "costs holds", "not numbers"),
    "data-floats-unknown-to-numpy": (hdf5(another_float), NOT_HDF5),
    "data-endless": (hdf5(endless), NOT_HDF5),
    "data-narrow-observations": (dataset(replaced(observations=np.zeros((600, 7)))),
                                 "observations has shape (600, 7)", "needs (600, 8)"),
    "data-wide-next": (dataset(replaced(next_observations=np.zeros((600, 9)))),
                       "next_observations has shape (600, 9)"),
    "data-wide-actions": (dataset(replaced(actions=np.zeros((600, 3)))), "actions has shape (600, 3)"),
    "data-flat-actions": (dataset(replaced(actions=np.zeros(600))), "actions has shape (600,)"),
    "data-images": (dataset(replaced(observations=np.zeros((600, 2, 2, 2)))), "shape (600, 2, 2, 2)"),
    "data-two-costs": (dataset(replaced(costs=np.zeros((600, 2)))), "costs has shape (600, 2)"),
    # --- Datasets: what they say ---
    "data-no-transition": (dataset(shortened(*KEYS, rows=0)), "holds 0 transitions"),
    "data-one-transition": (dataset(shortened(*KEYS, rows=1)), "holds 1 transitions, at least two"),
    "data-no-episode-end": (dataset(replaced(terminals=np.zeros(600), timeouts=np.zeros(600))),
                            "no episode ends: terminals and timeouts are all 0"),
    "data-flags-everywhere-the-same": (dataset(lambda x: x.update(terminals=x["timeouts"])),
                                       "every time limit is a terminal too"),
    "data-both-flags-always": (dataset(replaced(terminals=np.ones(600), timeouts=np.ones(600))),
                               "every time limit is a terminal too"),
    "data-terminal-2": (dataset(entry("terminals", 3, 2)), "terminals and timeouts must be 0 or 1"),
    "data-timeout-half": (dataset(entry("timeouts", 3, 0.5)), "terminals and timeouts must be 0 or 1"),
    "data-timeout-minus-1": (dataset(entry("timeouts", 3, -1)), "terminals and timeouts must be 0 or 1"),
    "data-rewards-swapped-with-costs": (dataset(swapped), "costs are negative", "are they rewards?"),
    "data-negative-cost": (dataset(entry("costs", 11, -1)), "costs are negative at transition 11"),
    "data-action-outside": (dataset(entry("actions", 3, (0, -1.5))), "actions reach 1.5, outside [-1, 1]"),
    "data-other-task-by-name": (dataset(nothing, attributes={"task": "SafetyCarCircle-v0"}),
                                f"collected from SafetyCarCircle-v0, not from {TASK}"),
    "data-other-task-by-width": (dataset(nothing, env_id="SafetyBallRun-v0",
                                         attributes={"task": "SafetyBallRun-v0"}),
                                 "observations has shape (600, 8), SafetyBallRun-v0 needs (600, 7)"),
    "data-two-tasks": (dataset(nothing, attributes={"task": [TASK, "SafetyCarCircle-v0"]}), "collected from"),
    "data-no-task-but-null": (dataset(nothing, attributes={"task": h5py.Empty("f")}), "collected from"),
    "data-nothing-safe-to-imitate": (dataset(replaced(costs=np.ones(600)), algo="bc-safe", cost_limit=1),
                                     "--algo bc-safe", "has no episode of cost <= 1"),
    # --- Checkpoints: the file ---
    "checkpoint-one-byte": (checkpoint_file(lambda x: x[:1]), NOT_READ),
    "checkpoint-header-only": (checkpoint_file(lambda x: x[:64]), NOT_READ),
    "checkpoint-half": (checkpoint_file(lambda x: x[:len(x) // 2]), NOT_READ),
    "checkpoint-last-byte-missing": (checkpoint_file(lambda x: x[:-1]), NOT_READ),
    "checkpoint-empty-file": (checkpoint_file(lambda x: b""), NOT_READ),
    "checkpoint-csv": (checkpoint_file(lambda x: b"step,return\n1,2\n"), NOT_READ),
    "checkpoint-one-bit-flipped": (checkpoint_file(flipped), "damaged"),
    "checkpoint-other-zip": (checkpoint(nothing, lambda _, path: table(path)), NOT_READ),
    "checkpoint-hdf5": (option(checkpoint=str(common.SHIPPED_DATASETS / f"{TASK}.hdf5")), NOT_READ),
    "checkpoint-directory": (option(checkpoint="."), NO_FILE),
    "checkpoint-nowhere": (option(checkpoint="typo.pt"), NO_FILE, "`python offline_pretrain.py` makes one"),
    "checkpoint-of-the-offline-run-not-made-yet": (
        option(checkpoint=None, names="--checkpoint"), NO_FILE, f"runs/{TASK}__offline_pretrain__seed0"),
    "checkpoint-name-too-long": (option(checkpoint="x" * 300), NO_FILE),
    # --- Checkpoints: with code ---
    "checkpoint-code": (payload(as_actor), NOT_READ),
    "checkpoint-code-nested": (payload(nested), NOT_READ),
    "checkpoint-code-among-weights": (payload(lambda content, code: content["q"].update(b=code)), NOT_READ),
    "checkpoint-code-ordered": (payload(lambda content, code: OrderedDict(content, extra=code)), NOT_READ),
    "checkpoint-code-as-version": (payload(lambda content, code: content.update(version=code)), NOT_READ),
    "checkpoint-code-alone": (payload(lambda content, code: code), NOT_READ),
    "checkpoint-code-old-format": (payload(as_actor, old_format), NOT_READ),
    "checkpoint-code-old-format-nested": (payload(nested, old_format), NOT_READ),
    "checkpoint-code-plain-pickle": (payload(nested, plain_pickle), NOT_READ),
    "checkpoint-torchscript": (checkpoint(nothing, torchscript), NOT_READ),
    "checkpoint-whole-module": (checkpoint(lambda content: torch.nn.Linear(2, 2)), NOT_READ),
    "checkpoint-numpy": (checkpoint(field("costs", np.zeros(3))), NOT_READ),
    # --- Checkpoints: of something else ---
    "checkpoint-other-version": (checkpoint(field("version", common.CHECKPOINT_VERSION + 1)), "version"),
    "checkpoint-version-1": (checkpoint(field("version", 1)), "version"),
    "checkpoint-no-version": (checkpoint(lacking("version")), "version"),
    "checkpoint-list": (checkpoint(lambda content: [1, 2]), "version"),
    "checkpoint-tensor": (checkpoint(lambda content: torch.zeros(3)), "version"),
    "checkpoint-other-task": (checkpoint(field("env_id", "SafetyCarCircle-v0")),
                              f"env_id is SafetyCarCircle-v0, this run needs {TASK}"),
    "checkpoint-other-observations": (checkpoint(field("obs_dim", 7)), "obs_dim is 7, this run needs 8"),
    "checkpoint-other-actions": (checkpoint(field("act_dim", 3)), "act_dim is 3, this run needs 2"),
    "checkpoint-other-size": (checkpoint(field("hidden", 64)), "hidden is 64, this run needs 256"),
    "checkpoint-other-activation": (checkpoint(field("activation", "tanh")),
                                    "activation is tanh, this run needs relu"),
    "checkpoint-other-discount": (checkpoint(nothing, gamma=0.9), "gamma is 0.99, this run needs 0.9"),
    "checkpoint-other-reward-scale": (checkpoint(nothing, reward_scale=1.0),
                                      "reward_scale is 0.1, this run needs 1.0"),
    "checkpoint-field-missing": (checkpoint(lacking("gamma")), "gamma is None, this run needs 0.99"),
    "checkpoint-unfinished": (checkpoint(field("finished", False)), "finished is False, this run needs True"),
    "checkpoint-of-pex": (checkpoint(field("actor", None)), "PEX has two"),
    **{f"checkpoint-nan-{name}": (checkpoint(weight(name, NAN)), f"{name} is", "not finite")
       for name in NETWORKS},
    "checkpoint-inf-actor": (checkpoint(weight("actor", -INF)), "actor is", "not finite"),
    **{f"checkpoint-without-{name}": (checkpoint(lacking(name)), f"{name} is missing") for name in NETWORKS},
    "checkpoint-empty-network": (checkpoint(field("qc", {})), "qc is missing"),
    "checkpoint-network-of-other-shapes": (checkpoint(other_shapes), "actor is", "shape"),
    "checkpoint-layer-lost": (checkpoint(layer_lost), "q is", "shape"),
    "checkpoint-network-is-a-number": (checkpoint(field("actor", 3)), "actor is"),
    **{f"checkpoint-weight-is-{name}": (checkpoint(other_kind(kind)), "actor is", "type") for name, kind in {
        "sparse": lambda x: x.to_sparse(),
        "meta": lambda x: x.to("meta"), "double": lambda x: x.double(), "half": lambda x: x.half(),
        "integer": lambda x: x.to(torch.int8), "complex": lambda x: x.to(torch.complex64)}.items()},
    "checkpoint-version-of-two": (checkpoint(field("version", torch.tensor([2, 2]))), "not written by this"),
    "checkpoint-size-of-two": (checkpoint(field("obs_dim", torch.tensor([8, 8]))), "obs_dim is"),
    "checkpoint-weights-are-text": (checkpoint(field("actor", {"fc1.weight": "0.5"})), "actor is"),
    # --- Options ---
    **{f"{name}={value}": (option(**{name: value}), NO_RANGE) for name, value in [
        ("cost_limit", -1.0), ("cost_limit", NAN), ("cost_limit", INF), ("cost_margin", -0.1),
        ("cost_margin", 1.5), ("gamma", 1.0), ("gamma", -0.1), ("gamma", NAN), ("reward_scale", -1.0),
        ("batch_size", 0), ("critic_lr", -1e-3), ("critic_lr", NAN), ("actor_lr", INF), ("vpa_steps", -1),
        ("vpa_tau", 1.5), ("vpa_alpha", -0.01), ("total_timesteps", -1), ("rollout_episodes", 0),
        ("utd", -0.25), ("utd", NAN), ("learning_starts", -1), ("tau", 1.01), ("alpha", -0.01),
        ("lagrange_init", -1.0), ("lagrange_init", NAN), ("lagrange_max", -1.0), ("kp", -1.0),
        ("ki", -0.001), ("kd", NAN), ("adapt_rate", 1.5), ("eval_every", 0), ("eval_episodes", 0),
        ("checkpoint_every", 0), ("seed", -1), ("seed", 2**32), ("actor_lr", 1.1), ("critic_lr", 1e30),
        ("utd", 2e9), ("total_timesteps", 10**10)]},
    **{f"offline-{name}={value}": (option(offline_pretrain, **{name: value}), NO_RANGE) for name, value in [
        ("cost_limit", -1.0), ("cost_limit", NAN), ("gamma", 1.0), ("batch_size", 0), ("update_steps", 0),
        ("tau", -0.1), ("vae_beta", -0.1), ("bc_weight", NAN), ("ood_actions", 0), ("ood_quantile", 1.1),
        ("bear_actions", 0), ("mmd_limit", -1.0), ("kp", -0.1), ("eval_every", 0), ("checkpoint_every", -1),
        ("seed", -1), ("vae_lr", 2.0)]},
    "from-scratch-with-checkpoint": (option(from_scratch=True, names="--from-scratch"),
                                     "takes neither --checkpoint nor --dataset-path"),
    **({} if torch.cuda.is_available() else {
        "no-gpu": (option(cuda=True, names="--cuda"), "torch finds no GPU here")}),
    # --- Tasks ---
    "task-misspelt": (option(env_id="SafetyBalCircle-v0"), f"no such task; the nearest names are {TASK}"),
    "task-without-version": (option(offline_pretrain, env_id="SafetyBallCircle"), f"names are {TASK}"),
    "task-other-version": (option(env_id="SafetyBallCircle-v7"), f"nearest names are {TASK}"),
    "task-like-nothing": (option(env_id="xyzzy"), "no such task; the nearest names are none"),
    "task-empty": (option(env_id=""), "no such task"),
    "task-without-costs": (option(env_id="Pendulum-v1"), "gives no number info['cost']"),
    "task-without-costs-offline": (option(offline_pretrain, env_id="Pendulum-v1"), "no number info['cost']"),
    "task-of-discrete-actions": (option(env_id="CartPole-v1"), "box", "Discrete(2)"),
    "task-without-dataset": (option(offline_pretrain, env_id="SafetyCarReach-v0", dataset_path=None,
                                    names="SafetyCarReach-v0"),
                             "has no dataset", "benchmark/collect_dataset.py"),
    "module-missing": (option(env_id="no_such_module_here:P-v0"), "No module named 'no_such_module_here'"),
    "module-needs-a-missing-one": (module("import no_such_library\n", "needy:P-v7"), "'no_such_library'"),
    "module-raises": (module("raise ValueError('out of order\\nsince Monday')\n", "sick:P-v7"),
                      "ValueError: out of order since Monday"),
    "module-syntax": (module("def f(:\n", "garbled:P-v7"), "SyntaxError"),
    "module-registers-nothing": (module("", "silent:Silent-v7"), "does not run", "Silent"),
    # --- Where the run goes ---
    "run-dir-below-a-file": (run_dir(lambda *_: "/dev/null/x"), "cannot write there (Not a directory)"),
    "run-dir-is-a-file": (run_dir(made("plain", b"text")), "cannot write there (File exists)"),
    "run-dir-is-a-file-overwrite": (run_dir(made("plain", b"text"), overwrite=True), "cannot write there"),
    "run-dir-name-too-long": (run_dir(lambda *_: "x" * 300), "cannot write there (File name too long)"),
    "metrics-is-a-folder": (run_dir(lambda *x: made("run/metrics.csv")(*x).parent), "(Is a directory)"),
    "run-dir-holds-a-run": (run_dir(copied), "there: holds a run", "there` goes on with it",
                            "--overwrite restarts"),
    "run-dir-holds-a-config-only": (run_dir(lambda *x: made("run/config.json", b"{}")(*x).parent),
                                    "holds a run", "--overwrite"),
    "run-dir-of-another-process": (run_dir(held, overwrite=True), "busy: another process is writing there"),
    # --- Resuming ---
    "resume-nowhere": (option(resume="nowhere"), NO_CONFIG),
    "resume-nowhere-offline": (option(offline_pretrain, resume="nowhere"), NO_CONFIG),
    "resume-empty": (option(resume="", names="--resume"), NO_CONFIG),
    "resume-folder-of-something-else": (option(resume="."), NO_CONFIG),
    "resume-file": (option(resume=__file__), NO_CONFIG),
    "resume-name-too-long": (option(resume="x" * 300), NO_CONFIG),
    "resume-offline-run-online": (resume(nothing, run="offline"), NO_CONFIG),
    "resume-online-run-offline": (resume(nothing, offline_pretrain), NO_CONFIG),
    "resume-with-other-options": (resume(nothing, cost_limit=30.0), OTHER),
    "resume-with-run-dir": (resume(nothing, run_dir="elsewhere"), OTHER),
    "resume-with-overwrite": (resume(nothing, offline_pretrain, "offline", overwrite=True), OTHER),
    "resume-config-not-json": (resume(cut("config.json", -5)), NO_CONFIG),
    "resume-config-empty": (resume(file("config.json", b"")), NO_CONFIG),
    "resume-config-bytes": (resume(file("config.json", b"\xff\xfe\x00{")), NO_CONFIG),
    "resume-config-list": (resume(file("config.json", b"[1, 2]")), NO_CONFIG),
    "resume-config-unknown-option": (resume(config(colour="red")), NO_CONFIG),
    "resume-config-missing": (resume(lambda folder: (folder / "config.json").unlink()), NO_CONFIG),
    "resume-config-of-another-run": (resume(config(seed=5)), OTHER_RUN),
    "resume-config-of-another-limit": (resume(config(cost_limit=25.0), offline_pretrain, "offline"),
                                       OTHER_RUN),
    "resume-config-out-of-range": (resume(never_saved(batch_size=0), names="--batch-size 0"), NO_RANGE),
    "resume-metrics-shortened": (resume(cut("metrics.csv", -3)), OTHER_RUN),
    "resume-metrics-shortened-offline": (resume(cut("metrics.csv", -3), offline_pretrain, "offline"),
                                         OTHER_RUN),
    "resume-metrics-missing": (resume(lambda folder: (folder / "metrics.csv").unlink()), "metrics.csv"),
    "resume-checkpoint-truncated": (resume(cut("checkpoint.pt", -1000), names="checkpoint.pt"), NOT_READ),
    "resume-checkpoint-code": (resume(saved_payload, names="checkpoint.pt"), NOT_READ),
    "resume-checkpoint-version": (resume(saved(field("version", 1)), names="checkpoint.pt"), "version"),
    "resume-checkpoint-nan": (resume(saved(weight("actor", NAN)), names="checkpoint.pt"),
                              "actor is", "not finite"),
    "resume-checkpoint-nan-offline": (resume(saved(weight("q", NAN)), offline_pretrain, "offline",
                                             names="checkpoint.pt"), "q is", "not finite"),
    "resume-checkpoint-without-network": (resume(saved(lacking("qc")), names="checkpoint.pt"),
                                          "qc is missing"),
    "resume-other-data": (resume(other_data, names="replaced.hdf5"), "not this run's dataset"),
    "resume-other-data-offline": (resume(other_data, offline_pretrain, "offline", names="replaced.hdf5"),
                                  "not this run's dataset"),
    "resume-without-hash": (resume(saved(lacking("dataset_sha256")), names="data.hdf5"),
                            "not this run's dataset"),
    "resume-dataset-gone": (resume(with_data("gone.hdf5"), names="--dataset-path gone.hdf5"), NO_FILE),
    "resume-in-another-process": (resume(lambda folder: lock_elsewhere(folder / "metrics.csv"),
                                         names="--run-dir"), "another process is writing there"),
}
CODE = [name for name in CASES if name.startswith("checkpoint-code")]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder in which a case runs, with an empty cache of datasets."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DSRL_DATASET_DIR", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()  # DSRL's import would make it
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
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
    options = complete(sound, script, options)
    if "run_dir" in options:
        return [options]
    shutil.copytree(sound.offline, folder / "old", ignore=shutil.ignore_patterns("*.pt"))
    (folder / "old/checkpoint.pt").write_bytes(b"weights")
    return [options | {"run_dir": str(folder / "new")},
            options | {"run_dir": str(folder / "old"), "overwrite": True}]


def check(line, names, words):
    assert names in line, line
    for word in words:
        assert word in line, line


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_named_in_one_line_and_nothing_is_written(sound, folder, refusal, name):
    build, *words = CASES[name]
    script, options, names = build(sound, folder)
    for attempt in attempts(sound, folder, script, options):
        before = snapshot(folder)
        line = refusal(script.main, script.Args(**attempt))
        check(line, names, words)
        assert snapshot(folder) == before


def test_the_table_is_as_long_as_it_should_be():
    assert len(CASES) >= 45
    source = ast.parse(Path(__file__).read_text())  # a name used twice would hide the first case
    (table,) = [node.value for node in source.body
                if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "CASES"]
    names = [key.value for key in table.keys if isinstance(key, ast.Constant)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("name", CODE)
def test_code_in_the_table_is_live(sound, folder, name):
    CASES[name][0](sound, folder)
    with contextlib.suppress(Exception):
        torch.load(folder / "broken.pt", weights_only=False)
    with contextlib.suppress(Exception):
        pickle.loads((folder / "broken.pt").read_bytes())
    assert (folder / "created").exists()


# --- The same through the command line ---
@pytest.mark.parametrize("name", ["data-half", "checkpoint-code", "task-misspelt", "run-dir-holds-a-run",
                                  "resume-config-not-json"])
def test_command_line_ends_with_status_2_and_without_traceback(sound, folder, name):
    build, *words = CASES[name]
    script, options, names = build(sound, folder)
    attempt = attempts(sound, folder, script, options)[0]
    before = snapshot(folder)
    status, _, stderr = run_script(f"{script.__name__}.py", *command_line(attempt), cwd=folder)
    check(single_line(status, stderr), names, words)
    assert snapshot(folder) == before
    if name == "run-dir-holds-a-run":
        assert f"`python {Path(script.__file__)} --resume {folder / 'there'}` goes on" in stderr


CLOSED = "http://127.0.0.1:9"  # the port of a service that nobody runs any more


def environment(folder, **more):
    """Variables of a new machine: no login, no cache; and libraries that do not wait between retries."""
    (folder / "site").mkdir(exist_ok=True)
    (folder / "site/sitecustomize.py").write_text("import time\ntime.sleep = lambda seconds: None\n")
    return {"HOME": str(folder / "home"), "PYTHONPATH": str(folder / "site"), "PYTHONDONTWRITEBYTECODE": "1",
            "DSRL_DATASET_DIR": str(folder / "cache"), "NO_PROXY": "127.0.0.1", **more}


def test_tracking_without_a_login_leaves_the_run_that_it_would_overwrite(sound, folder, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    variables = environment(folder, WANDB_MODE="online", WANDB_BASE_URL=CLOSED)
    there, before = copied(sound, folder), snapshot(folder)
    status, _, stderr = run_script("marvel_sac_pid.py", "--from-scratch", "--track", "--run-dir", there,
                                   "--overwrite", cwd=folder, env=variables)
    check(single_line(status, stderr), "--track", ["Weights & Biases", "WANDB_MODE=offline"])
    assert snapshot(folder) == before


def test_tracking_that_does_not_start_writes_nothing(sound, folder, refusal, monkeypatch):
    def init(**_):
        raise RuntimeError("out of order\nsince Monday")

    monkeypatch.setattr("wandb.init", init)
    for attempt in attempts(sound, folder, marvel_sac_pid, {"track": True}):
        before = snapshot(folder)
        line = refusal(marvel_sac_pid.main, marvel_sac_pid.Args(**attempt))
        check(line, "--track", ["cannot start", "out of order since Monday", "WANDB_MODE=offline"])
        assert snapshot(folder) == before


# --- Downloads ---
DOWNLOADED = "SafetyCarCircle-v0-100-1450.hdf5"  # of a task with BallCircle's dimensions


def files(folder):
    """All but the downloader's own notes, its lock and what is on the way."""
    inside = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    return {str(path) for path in inside if ".cache" not in path.parts}


def download(folder, endpoint):
    return run_script("offline_pretrain.py", "--env-id", "SafetyCarCircle-v0", "--run-dir", folder / "run",
                      *command_line({**OFFLINE, "update_steps": 2}), cwd=folder,
                      env=environment(folder, HF_ENDPOINT=endpoint))


def test_dataset_without_network_is_one_line_with_where_to_get_it(folder):
    status, _, stderr = download(folder, CLOSED)
    check(single_line(status, stderr), DOWNLOADED, [
        "cannot download", str(folder / "cache"), "https://huggingface.co/datasets/YYY-45/DSRL"])
    assert files(folder) == {"site/sitecustomize.py"}


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
def mirror(sound, folder, monkeypatch):
    write_arrays(folder / "sent", sound.data, task="SafetyCarCircle-v0")
    monkeypatch.setattr(Mirror, "content", (folder / "sent").read_bytes())
    monkeypatch.setattr(Mirror, "sent", [])
    (folder / "sent").unlink()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Mirror) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_download_that_is_cut_short_is_never_taken_for_the_dataset(folder, mirror, monkeypatch):
    status, _, stderr = download(folder, mirror)
    lines = stderr.replace("\r", "\n").splitlines()  # beside the downloader's progress bar
    (line,) = [line for line in lines if line.startswith("error: ")]
    check(line, DOWNLOADED, ["cannot download", str(folder / "cache")])
    assert status == 2 and lines[-1] == line and "Traceback" not in stderr
    assert files(folder) == {"site/sitecustomize.py"} and not (folder / "run").exists()

    monkeypatch.setattr(Mirror, "whole", True)
    status, _, stderr = download(folder, mirror)
    assert status == 0, stderr
    assert 0 < Mirror.sent[0] < Mirror.sent[-1] == len(Mirror.content)
    assert (folder / "cache" / DOWNLOADED).read_bytes() == Mirror.content
    assert (folder / "run/checkpoint.pt").exists()


# --- What is not refused ---
def columns(data):
    data.update({key: data[key][:, None] for key in ("rewards", "costs", *FLAGS)})


SOUND = {
    "dataset": dataset(nothing),
    "dataset-for-finetuning": dataset(nothing, marvel_sac_pid),
    "dataset-file": dataset_file(lambda x: x),
    "dataset-without-task": hdf5(lambda file: file.attrs.pop("task")),
    "dataset-of-columns": dataset(columns),
    "dataset-of-two": dataset(lambda x: x.update({key: x[key][-2:] for key in KEYS})),
    "dataset-with-terminals-only": dataset(replaced(terminals=np.arange(600) == 99, timeouts=np.zeros(600))),
    "dataset-with-something-safe": dataset(nothing, algo="bc-safe", cost_limit=200.0),
    "checkpoint": checkpoint(nothing),
    "checkpoint-file": checkpoint_file(lambda x: x),
    "resume-online": resume(nothing),
    "resume-offline": resume(nothing, offline_pretrain, "offline"),
    "resume-rewritten": resume(saved(nothing)),
    "resume-metrics-longer": resume(file("metrics.csv", b"x" * 5000)),
    "run-dir": run_dir(lambda sound, folder: folder / "new/deep"),
    "run-dir-empty": run_dir(made("new")),
    "run-dir-overwritten": run_dir(copied, overwrite=True),
    "from-scratch": option(from_scratch=True, checkpoint=None, dataset_path=None, learning_starts=0),
    "rollouts-of-one-episode": option(vpa_data="rollouts", learning_starts=0, dataset_path=None),
    "smallest": option(batch_size=1, checkpoint_every=1, eval_every=1, kp=0.0, ki=0.0, kd=0.0, adapt_rate=0.0,
                       tau=0.0, alpha=0.0, lagrange_init=0.0, lagrange_max=0.0, vpa_steps=0, utd=0.05),
    "smallest-offline": option(offline_pretrain, batch_size=1, update_steps=1, checkpoint_every=1,
                               ood_actions=1, gamma=0.0, tau=0.0, cost_limit=0.0),
    "largest": option(seed=2**32 - 1, tau=1.0, vpa_tau=1.0, cost_margin=1.0, adapt_rate=1.0),
    "largest-offline": option(offline_pretrain, seed=2**32 - 1, gamma=0.9999, tau=1.0, ood_quantile=1.0),
}


@pytest.mark.parametrize("name", SOUND)
def test_what_is_not_broken_runs(sound, folder, name):
    script, options, _ = SOUND[name](sound, folder)
    if "resume" not in options:
        options = complete(sound, script, {"run_dir": str(folder / "new"), **options})
    script.main(script.Args(**options))
    where = Path(options.get("resume") or options["run_dir"])
    assert common.load_checkpoint(where / "checkpoint.pt")["finished"]


@pytest.mark.parametrize("multiplier", ["apid", "apid-published", "pid", "dual"])
def test_limit_0_divides_by_nothing(sound, folder, multiplier):
    options = complete(sound, marvel_sac_pid, dict(cost_limit=0.0, multiplier=multiplier, run_dir="run"))
    with np.errstate(divide="raise", invalid="raise"):
        marvel_sac_pid.main(marvel_sac_pid.Args(**options))
    metrics = read_metrics(folder / "run/metrics.csv")
    assert metrics["normalized_cost"].tolist() == (metrics["episode_cost"] + 1).tolist()  # DSRL's eps is 1
    assert np.isfinite(metrics["lagrange_multiplier"]).all() and (metrics["lagrange_multiplier"] >= 0).all()
    assert common.normalized_cost(0.0, 0.0) == 1


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("costs", [[0.0] * 30, [0.0, 5.0, 0.0, 0.0] * 10, [1e6] * 30])
def test_controller_at_limit_0_stays_finite(published, costs):
    pid = marvel_sac_pid.PIDLagrangian(0.0, 0.005, 0.001, 0.005, published=published)
    assert all(np.isfinite([pid.update(cost), *pid.gains]).all() for cost in costs)
