"""A small task, small runs of every script, and processes to run, watch, kill and resume them in.

`small:Small-v0` has episodes of 20 steps, so a run takes well under a second. The runs are forked processes,
so that a SIGKILL is a real one.
"""

import contextlib
import io
import multiprocessing
import os
import signal
import traceback
from pathlib import Path

import bullet_safety_gym  # noqa: F401  (imported here, as each forked process would import it anew)
import dsrl  # noqa: F401
import gymnasium as gym
import h5py
import numpy as np
import torch
import torch.utils.tensorboard  # noqa: F401

import common
import marvel_sac_pid
import offline_pretrain
from benchmark.baselines import (
    bc_safe,
    bear_lag,
    cpq,
    jsrl,
    marvel_released_pid,
    marvel_td3_pid,
    pex,
    rlpd,
    so2,
)

TASK = "small:Small-v0"
FORK = multiprocessing.get_context("fork")
OFFLINE = dict(env_id=TASK, update_steps=30, batch_size=8, eval_every=10, eval_episodes=1, checkpoint_every=7)
ONLINE = dict(env_id=TASK, total_timesteps=160, batch_size=8, utd=0.2, eval_every=60, eval_episodes=1,
              checkpoint_every=27)
SEEN = {  # what is counted while a run works, and can be interrupted just before
    "environment step": (common.SafeEnv, "step"),
    "gradient step": (torch.optim.Adam, "step"),
    "flush to disk": (os, "fsync"),  # of metrics.csv, or of a file that is written beside the old one
    "rename": (Path, "replace"),
    "row": (common.Run, "row"),
}


class Small(gym.Env):
    """Stay near the origin; one episode in five ends early, and a large first action costs 1."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,))
    action_space = gym.spaces.Box(-1, 1, (2,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state = self.np_random.normal(size=3)
        return self.state.copy(), {}

    def step(self, action):
        self.state[:2] += 0.3 * action
        self.state[2] += 0.2 * self.np_random.normal()
        reward = 1 - np.abs(self.state[:2]).sum()
        return self.state.copy(), reward, bool(self.state[2] > 1.2), False, {"cost": float(action[0] > 0.5)}


gym.register("Small-v0", Small, max_episode_steps=20)


def transitions(episodes=10):
    """A dataset's arrays from uniform actions, in DSRL's types."""
    env, rng, rows = gym.make("Small-v0", disable_env_checker=True), np.random.default_rng(0), []
    for k in range(episodes):
        obs, _ = env.reset(seed=k)
        done = False
        while not done:
            action = rng.uniform(-1, 1, 2)
            next_obs, reward, terminated, truncated, info = env.step(action)
            rows.append((obs, next_obs, action, reward, info["cost"], terminated, truncated))
            obs, done = next_obs, terminated or truncated
    columns = zip(common.DATASET_KEYS, zip(*rows, strict=True), strict=True)
    return {key: np.array(values, bool if key.startswith("t") else np.float32) for key, values in columns}


def write_arrays(path, arrays, **attributes):
    """An HDF5 file of any arrays under any names; None is written as a group."""
    with h5py.File(path, "w") as file:
        for key, array in arrays.items():
            file.create_group(key) if array is None else file.create_dataset(key, data=array)
        file.attrs.update(attributes)
    return path


def kinds(folder):
    """Script and options of every kind of run; a dataset and an offline run are put into the folder."""
    data = write_arrays(folder / "data.hdf5", transitions())
    start, dataset = {"checkpoint": str(folder / "offline/checkpoint.pt")}, {"dataset_path": str(data)}
    # in this process: what it imports and sets up on the way, no child has to do again
    offline_pretrain.main(offline_pretrain.Args(**OFFLINE, **dataset, run_dir=str(folder / "offline")))
    vpa = {"vpa_steps": 20}
    return {
        "offline": (offline_pretrain, {**OFFLINE, **dataset}),
        "cpq": (cpq, {**OFFLINE, **dataset}),
        "bear_lag": (bear_lag, {**OFFLINE, **dataset}),
        "bc_safe": (bc_safe, {**OFFLINE, **dataset}),
        "marvel": (marvel_sac_pid, {**ONLINE, **dataset, **start, **vpa, "checkpoint_every": 13}),
        "rollouts": (marvel_sac_pid, {**ONLINE, **start, **vpa, "vpa_data": "rollouts",
                                      "learning_starts": 50}),
        "from scratch": (marvel_sac_pid, {**ONLINE, "from_scratch": True, "learning_starts": 50,
                                          "rollout_episodes": 2, "multiplier": "dual"}),
        "released": (marvel_released_pid, {**ONLINE, **dataset, **start, **vpa}),
        "jsrl": (jsrl, {**ONLINE, **start, "learning_starts": 50}),
        "pex": (pex, {**ONLINE, **dataset, **start}),
        "so2": (so2, {**ONLINE, **dataset, **start, "critic_updates": 2}),
        "rlpd": (rlpd, {**ONLINE, **dataset, "learning_starts": 50}),
        "td3": (marvel_td3_pid, {**ONLINE, **dataset, **start, **vpa, "checkpoint_every": 13}),
    }


# --- Runs in processes of their own ---
def args_of(script, **options):
    """The script's options; the released law has Marvel's."""
    return getattr(script, "Args", marvel_sac_pid.Args)(**options)


def watched(main, args, pipe, at, do):
    """In the child: run main, count what SEEN lists, and call `do` just before occurrence at = (what, n)."""
    counts, printed = dict.fromkeys(SEEN, 0), io.StringIO()
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # `nohup pytest` ignores it, and so would the run

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
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            main(args)
        except Exception:
            traceback.print_exc()
            raise SystemExit(70) from None
        finally:
            pipe.send((printed.getvalue(), counts))


def begin(script, folder, at=None, do=None, **options):
    """Start a script in a child. With `resume`, options are those of the run that goes on."""
    where = {} if "resume" in options else {"run_dir": str(folder)}
    args = args_of(script, **where, **options)
    reader, pipe = FORK.Pipe(duplex=False)
    child = FORK.Process(target=watched, args=(script.main, args, pipe, at, do))
    child.start()
    pipe.close()
    return child, reader


def end(child, reader):
    """A child's exit code (negative: the signal that ended it), what it printed, and its counts."""
    try:
        printed, counts = reader.recv()
    except EOFError:  # killed
        printed, counts = "", {}
    child.join(60)
    return child.exitcode, printed, counts


def run(script, folder, **how):
    """Run a script in a child; its exit code and what it printed."""
    status, printed, _ = end(*begin(script, folder, **how))
    return status, printed


def resume(script, folder, **how):
    """Go on with the run of a folder."""
    return run(script, folder, resume=str(folder), **how)


def send(number):
    """send(number)(): this process gets the signal."""
    return lambda: os.kill(os.getpid(), number)


kill = send(signal.SIGKILL)


class Payload:
    """Unpickled without care, this creates a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


# --- Comparing ---
def saved(folder):
    """The checkpoint of a run's folder."""
    return common.load_checkpoint(folder / "checkpoint.pt")


def equal(a, b):
    """Whether two values out of checkpoints are the same, bit for bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(
            a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and a == b


def assert_same_end(folder, reference):
    """Two finished runs: metrics.csv byte for byte, and every number of the checkpoint."""
    assert (folder / "metrics.csv").read_bytes() == (reference / "metrics.csv").read_bytes()
    one, other = saved(folder), saved(reference)
    assert one.pop("finished") and other.pop("finished")
    for checkpoint in one, other:
        checkpoint.pop("args")  # it names the folder
    assert one.keys() == other.keys()
    assert [name for name in other if not equal(one[name], other[name])] == []


def files(folder):
    """All files below a folder: {path: (time of change, bytes)}."""
    return {path: (path.stat().st_mtime_ns, path.read_bytes())
            for path in folder.rglob("*") if path.is_file()}
