"""Helpers that all scripts use and that hold no algorithm: tasks, datasets, evaluation, a run's files.

Units: a return or a cost is an undiscounted sum over one episode in the task's own units, unless its name
says otherwise; actions are in [-1, 1]; a terminal ends the task, a timeout only cuts the episode.
"""
import csv
import errno
import fcntl
import functools
import hashlib
import importlib
import inspect
import io
import json
import math
import os
import random
import re
import shlex
import signal
import sys
import threading
import time
import typing
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import Any, NoReturn

import gymnasium as gym
import h5py
import numpy as np
import torch
from tqdm import tqdm

DSRL_MIRROR = "YYY-45/DSRL"  # as in DSRL's main branch; the address inside the published package is dead
ROOT = Path(__file__).resolve().parent
SCRIPT_FOLDERS = (ROOT, ROOT / "benchmark/baselines")
SHIPPED_DATASETS = ROOT / "datasets"
DATASET_KEYS = ("observations", "next_observations", "actions", "rewards", "costs", "terminals", "timeouts")
CHECKPOINT_VERSION = 4
RUN_FILES = ("config.json", "checkpoint.pt", "metrics.csv", "curves.png", "wandb_id", "events.out.tfevents.*")
MAY_BE_RAISED = ("total_timesteps", "update_steps")  # by --resume
GENERATORS = (np.random.Generator, torch.Generator)
LONG_EPISODE = 100_000  # steps, of which one is told
FLOAT32_MAX = float(np.finfo(np.float32).max)
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
MISTAKE, FAILURE = 2, 1  # exit status: what the user has to mend, and what went wrong in a sound run

# Smallest and largest value of the options that are checked; an option that is not listed is not.
OPTION_BOUNDS = {
    "seed": (0, 2**32 - 1),
    "gamma": (0, 0.9999),
    "reward_scale": (1e-9, 1e9),
    "batch_size": (1, 1e6),
    "critic_lr": (0, 1),
    "actor_lr": (0, 1),
    "vae_lr": (0, 1),
    "tau": (0, 1),
    "qc_tau": (0, 1),
    "actor_tau": (0, 1),
    "vpa_tau": (0, 1),
    "cost_limit": (0, 1e9),
    "cost_margin": (0, 2),
    "utd": (1e-9, 1e9),
    "update_steps": (1, 1e9),
    "vpa_steps": (0, 1e9),
    "total_timesteps": (0, 1e9),
    "learning_starts": (0, 1e9),
    "rollout_episodes": (1, 1e9),
    "checkpoint_every": (1, 1e9),
    "eval_every": (1, 1e9),
    "eval_episodes": (1, 1e5),
    "alpha": (0, 1e9),
    "vpa_alpha": (0, 1e9),
    "vpa_alpha_cost": (0, 1e9),
    "lagrange_init": (0, 1e9),
    "lagrange_max": (0, 1e9),
    "kp": (0, 1e9),
    "ki": (0, 1e9),
    "kd": (0, 1e9),
    "adapt_rate": (0, 1),
    "vae_beta": (0, 1e9),
    "bc_weight": (0, 1e9),
    "ood_actions": (1, 1e9),
    "ood_quantile": (0, 1),
    "ood_weight": (0, 1e9),
    "bear_actions": (1, 1e9),
    "mmd_limit": (0, 1e9),
    "jump_start_share": (0, 1),
    "temperature": (1e-9, 1e9),
    "exploration_noise": (0.0068, 7.3),
    "policy_delay": (1, 1e9),
    "target_noise": (0, 1e9),
    "noise_clip": (0, 1e9),
    "critic_updates": (1, 1e9),
}


def stop(message: str, status: int = MISTAKE) -> NoReturn:
    """End the program with one line on stderr and no traceback."""
    tqdm.write("error: " + " ".join(message.splitlines()), sys.stderr)  # not behind a progress bar
    raise SystemExit(status)


def stop_unless(condition: Any, message: str) -> None:
    """Stop with the message unless the condition holds."""
    if not condition:
        stop(message)


def checked_option(name: str, value: Any, hint: Any) -> Any:
    """An option's value, whole floats as int where that is asked for; stops if it is none of its types."""
    is_union = typing.get_origin(hint) in (typing.Union, UnionType)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    for kind in typing.get_args(hint) if is_union else [hint]:
        base = typing.get_origin(kind) or kind  # tuple of tuple[int, ...]
        if base is typing.Literal:
            if isinstance(value, str) and value in typing.get_args(kind):
                return value
        elif base is int:
            if is_number and float(value).is_integer():
                return int(value)
        elif base is float:
            if is_number:
                return value
        elif not isinstance(base, type) or isinstance(value, base):  # the first: Any, say
            return value
    words = getattr(hint, "__name__", str(hint)).replace("typing.", "")
    stop(f"--{name.replace('_', '-')} {value!r:.60}: must be {words}")


def check_options(args: Any) -> None:
    """Stop at the first option that makes no sense."""
    for name, (low, high) in OPTION_BOUNDS.items():
        value = getattr(args, name, None)
        if isinstance(value, (int, float)):
            stop_unless(low <= value <= high,
                        f"--{name.replace('_', '-')} {value}: must be between {low:g} and {high:.4g}")
    if getattr(args, "from_scratch", False):
        stop_unless(args.multiplier != "fixed" or not isinstance(args.lagrange_init, str),
                    "--multiplier fixed: with --from-scratch --lagrange-init has to be a number")
        stop_unless(not args.checkpoint and not args.dataset_path,
                    "--from-scratch takes neither --checkpoint nor --dataset-path")
    stop_unless(not args.cuda or torch.cuda.is_available(), "--cuda: torch finds no GPU here")


# --- Tasks ---
@dataclass
class Task:
    """What a script has to know of a task; reference returns and file name are DSRL's, if it has the task."""
    env_id: str
    obs_dim: int
    act_dim: int
    max_episode_steps: int
    min_return: float = float("nan")
    max_return: float = float("nan")
    dataset_file: str | None = None
    action_low: np.ndarray | None = None  # the simulator's own bounds (act_dim,); None: -1 and 1
    action_high: np.ndarray | None = None

    def facts(self) -> dict:
        """What a checkpoint of this task must agree in: its name, sizes, and bounds of actions."""
        is_scaled = self.action_low is not None
        return {"env_id": self.env_id, "obs_dim": self.obs_dim, "act_dim": self.act_dim,
                "action_low": self.action_low.tolist() if is_scaled else None,
                "action_high": self.action_high.tolist() if is_scaled else None}

    def scaled_actions(self, actions: np.ndarray) -> np.ndarray:
        """Actions in the simulator's own units -> in [-1, 1], what the scripts use."""
        if self.action_low is None:
            return actions
        return 2 * (actions - self.action_low) / (self.action_high - self.action_low) - 1

    def own_actions(self, actions: np.ndarray) -> np.ndarray:
        """Actions in [-1, 1] -> in the simulator's own units, what datasets hold."""
        if self.action_low is None:
            return actions
        return self.action_low + (actions + 1) / 2 * (self.action_high - self.action_low)

    def normalized_return(self, episode_return: float) -> float:
        """(R - min R) / (max R - min R), DSRL's reference returns; nan for a task that DSRL does not have."""
        return (episode_return - self.min_return) / (self.max_return - self.min_return)


def normalized_cost(episode_cost: float, cost_limit: float) -> float:
    """(C + eps) / (limit + eps) with eps = 1 for limit 0, else 0: DSRL's; safe is at most 1."""
    eps = float(cost_limit == 0)
    return (episode_cost + eps) / (cost_limit + eps)


class SafeEnv(gym.Wrapper):
    """A task as all scripts step it: seeded alike whatever the simulator draws from, and checked.

    Observations are float32 (obs_dim,), the reward and info["cost"] finite floats, the cost not negative.
    Anything else ends the program with one line. The simulator gets a copy of the action. An episode is
    truncated after `time_limit` steps.
    """

    def __init__(self, env: gym.Env, env_id: str, time_limit: float = math.inf):
        super().__init__(env)
        self.env_id = env_id
        self.time_limit = time_limit
        self.steps = 0  # since it was made
        self.episode_steps = 0

    def reset(self, *, seed: int, options: dict | None = None) -> tuple[np.ndarray, dict]:
        """Start the episode that `seed` stands for.

        Bullet draws from numpy's global state; its motors keep their targets in a reset, so they are stopped.
        """
        seed = int(seed)
        if type(self.unwrapped).__module__.startswith("bullet_safety_gym"):
            self.unwrapped.agent.apply_action(np.zeros(self.action_space.shape))
            np.random.seed(seed % 2**32)
            self.unwrapped.reset()
        np.random.seed(seed % 2**32)
        random.seed(seed)  # an environment of one's own may draw from it
        self.episode_steps = 0
        result = self.env.reset(seed=seed, options=options)
        stop_unless(isinstance(result, tuple) and len(result) == 2,
                    f"{self.place()}: reset() must return an observation and info")
        obs, info = result
        return self.checked_observation(obs), info

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        """One step of the simulator."""
        self.steps += 1
        self.episode_steps += 1
        if self.episode_steps == LONG_EPISODE:
            tqdm.write(f"warning: {self.place()}: this episode has {LONG_EPISODE} steps and no end; nothing "
                       "is learnt or saved before it ends", sys.stderr)
        if not np.isfinite(action).all():  # a message is made only where one is needed: that takes time
            stop(f"{self.place()}: the policy's action is not finite: {action}")
        result = self.env.step(np.array(action))
        if not isinstance(result, tuple) or len(result) != 5:
            stop(f"{self.place()}: step() must return five values: observation, reward, terminated, "
                 "truncated, info")
        obs, reward, terminated, truncated, info = result
        if not isinstance(info, dict) or "cost" not in info:
            stop(f"{self.place()}: there is no info['cost'], which every step must have")
        cost = self.checked_number("info['cost']", info["cost"])
        if cost < 0:
            stop(f"{self.place()}: info['cost'] is {cost:g}; a cost is not negative")
        reward = self.checked_number("the reward", reward)
        obs = self.checked_observation(obs)
        terminated = self.checked_flag("terminated", terminated)
        truncated = self.checked_flag("truncated", truncated) or self.episode_steps >= self.time_limit
        return obs, reward, terminated, truncated, {**info, "cost": cost}

    def place(self) -> str:
        """Where a message is from."""
        return f"--env-id {self.env_id}, step {self.steps}"

    def checked_observation(self, obs: Any) -> np.ndarray:
        """A float32 copy (obs_dim,)."""
        shape = self.observation_space.shape
        try:
            with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite and is refused below
                checked = np.array(obs, np.float32)
        except Exception:  # NumPy's and torch's are of many types
            stop(f"{self.place()}: the observation is no array of numbers but {type(obs).__name__}")
        if checked.shape != shape:
            stop(f"{self.place()}: the observation has shape {checked.shape}, its space {shape}")
        if not np.isfinite(checked).all():
            stop(f"{self.place()}: the observation is not finite: {checked}")
        return checked

    def checked_number(self, name: str, value: Any) -> float:
        """A float of a number in any wrapping: NumPy's, an array or a tensor of one."""
        try:
            array = np.asarray(value)
        except Exception:  # ragged lists, tensors with a gradient
            stop(f"{self.place()}: {name} must be a number, it is {value!r:.60}")
        if array.dtype.kind not in "fiub" or array.size != 1:
            stop(f"{self.place()}: {name} must be a number, it is {value!r:.60}")
        number = float(array.reshape(()))
        if not abs(number) <= FLOAT32_MAX:  # nan is not either
            stop(f"{self.place()}: {name} is not finite: {number}")
        return number

    def checked_flag(self, name: str, value: Any) -> bool:
        """A bool of a 0 or 1 in any wrapping."""
        if isinstance(value, (bool, np.bool_)):
            return bool(value)
        number = self.checked_number(name, value)
        if number not in (0, 1):
            stop(f"{self.place()}: {name} must be True or False, it is {value!r:.60}")
        return bool(number)


@contextmanager
def named_streams() -> Iterator[None]:
    """bullet_safety_gym looks for C streams called like sys.stdout and stderr; a notebook's are not."""
    before = sys.stdout, sys.stderr
    if getattr(sys.stdout, "name", "") != "<stdout>" or getattr(sys.stderr, "name", "") != "<stderr>":
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def make_env(env_id: str) -> tuple[SafeEnv, Task]:
    """The simulator and its description. Stops with one line if the task is unknown or does not fit.

    Actions are rescaled to [-1, 1]. The first reset is thrown away, as bullet's Car and Drone differ in it.
    """
    with named_streams():
        import bullet_safety_gym  # noqa: F401  (registers the tasks)
        from dsrl import infos  # also registers safety-gymnasium's tasks
    env_id = usual_name(env_id)
    module, _, registered = env_id.rpartition(":")
    if not module and registered not in gym.registry:
        names = [url.rsplit("/", 1)[1].rsplit("-", 2)[0] for url in infos.DATASET_URLS.values()]
        nearest = get_close_matches(env_id, [name for name in names if name in gym.registry], n=3, cutoff=0.4)
        stop(f"--env-id {env_id}: no such task; the nearest names are {', '.join(nearest) or 'none'}")
    name = env_id.removeprefix("Safety").split("-v")[0].removesuffix("Gymnasium")
    try:
        if module:  # Gymnasium's "module:Name-v0": the module, here or on PYTHONPATH, registers the task
            sys.path.append(os.getcwd())
            importlib.import_module(module)
        with warnings.catch_warnings(), named_streams():
            warnings.simplefilter("ignore")
            spec = gym.spec(registered)
            # the time limit is set below; after an automatic reset the last step's cost would be elsewhere
            plain_spec = replace(spec, max_episode_steps=None, autoreset=False)
            env = gym.make(plain_spec, disable_env_checker=True)
        spaces = env.observation_space, env.action_space
        are_boxes = all(isinstance(space, gym.spaces.Box) and len(space.shape) == 1 for space in spaces)
        stop_unless(are_boxes, f"--env-id {env_id}: observations and actions must be boxes of one dimension: "
                    f"{spaces}")
        width = spaces[1].high.astype(np.float64) - spaces[1].low
        stop_unless((width > 0).all() and (width <= FLOAT32_MAX).all(),
                    f"--env-id {env_id}: every action needs finite bounds, one below the other: {spaces[1]}")
        middle = (env.action_space.low + env.action_space.high) / 2
        SafeEnv(env, env_id).reset(seed=0)
        returned = len(env.step(middle))
        stop_unless(returned in (5, 6), f"--env-id {env_id}: its step() returns {returned} values; Gymnasium "
                    "asks for five: observation, reward, terminated, truncated, info")
        if returned == 6:
            from safety_gymnasium.wrappers import SafetyGymnasium2Gymnasium
            env = SafetyGymnasium2Gymnasium(env)  # Safety-Gymnasium's own step returns the cost by itself
        probe = SafeEnv(env, env_id)
        probe.reset(seed=0)
        probe.step(middle)
    except Exception as error:  # a simulator that is not installed, a constructor with arguments, ...
        stop(f"--env-id {env_id}: does not run ({type(error).__name__}: {error!s:.100})")
    horizon = spec.max_episode_steps or infos.DEFAULT_MAX_EPISODE_STEPS.get(name)
    stop_unless(horizon and horizon > 0,
                f"--env-id {env_id}: it has no time limit; register it with max_episode_steps")
    action_low = action_high = None
    if (env.action_space.low != -1).any() or (env.action_space.high != 1).any():
        action_low, action_high = env.action_space.low, env.action_space.high
        env = gym.wrappers.RescaleAction(env, -1.0, 1.0)
    min_return = infos.MIN_EPISODE_REWARD.get(name, float("nan"))
    max_return = infos.MAX_EPISODE_REWARD.get(name, float("nan"))
    dataset_file = infos.DATASET_URLS.get(name, "").rpartition("/")[2] or None
    (obs_dim,), (act_dim,) = env.observation_space.shape, env.action_space.shape
    task = Task(env_id, obs_dim, act_dim, horizon, min_return, max_return, dataset_file, action_low,
                action_high)
    return SafeEnv(env, env_id, horizon), task


def usual_name(env_id: str) -> str:
    """One name for a task: DSRL's Offline... is its Safety...; modules that are imported anyway go."""
    for prefix in ("safety_gymnasium:", "bullet_safety_gym:", "dsrl:"):
        env_id = env_id.removeprefix(prefix)
    return re.sub("^Offline", "Safety", env_id)


def evaluate(env: SafeEnv, policy: Callable, episodes: int, seed: int = 10_000) -> dict[str, np.ndarray]:
    """Play episodes with the seeds seed, seed + 1, ...; global random states are left as they were.

    policy: observation (obs_dim,) -> action (act_dim,). Returns "return", "cost", "length", each (episodes,).
    """
    numpy_state, python_state = np.random.get_state(), random.getstate()
    result = {"return": np.zeros(episodes), "cost": np.zeros(episodes), "length": np.zeros(episodes)}
    for k in range(episodes):
        obs, _ = env.reset(seed=seed + k)
        done = False
        while not done:
            obs, reward, terminated, truncated, info = env.step(policy(obs))
            result["return"][k] += reward
            result["cost"][k] += info["cost"]
            result["length"][k] += 1
            done = terminated or truncated
    np.random.set_state(numpy_state)
    random.setstate(python_state)
    return result


def evaluate_both_ways(env: SafeEnv, policy: Callable, episodes: int, seed: int) -> dict[str, float]:
    """Mean return and cost of the sampled policy, policy(obs, rng), and of its mean action, policy(obs)."""
    rng = np.random.default_rng(seed)
    sampled = evaluate(env, lambda obs: policy(obs, rng), episodes)
    mean_action = evaluate(env, policy, episodes)
    return {"eval_sampled_return": float(sampled["return"].mean()),
            "eval_sampled_cost": float(sampled["cost"].mean()),
            "eval_mean_return": float(mean_action["return"].mean()),
            "eval_mean_cost": float(mean_action["cost"].mean())}


# --- Datasets ---
def find_dataset(task: Task, dataset_path: str | None) -> Path:
    """The dataset's file: --dataset-path, else shipped, else in DSRL's cache, else downloaded into that."""
    if dataset_path:
        stop_unless(os.path.isfile(dataset_path), f"--dataset-path {dataset_path}: no such file")
        return Path(dataset_path)
    cache = Path(os.environ.get("DSRL_DATASET_DIR", "~/.dsrl/datasets")).expanduser()
    shipped = SHIPPED_DATASETS / f"{task.env_id}.hdf5"
    if shipped.is_file():
        return shipped
    if task.dataset_file and (cache / task.dataset_file).is_file():
        return cache / task.dataset_file
    stop_unless(task.dataset_file,
                f"{task.env_id} has no dataset: make one with benchmark/tools/collect_dataset.py")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # or every retry prints two lines
    from huggingface_hub import hf_hub_download  # resumes, retries, puts only a whole file in place
    print(f"downloading {task.dataset_file} from huggingface.co/datasets/{DSRL_MIRROR} to {cache}")
    try:
        return Path(hf_hub_download(DSRL_MIRROR, task.dataset_file, repo_type="dataset", local_dir=cache))
    except Exception as error:  # whatever the network does, the user needs the same three facts
        stop(f"cannot download {task.dataset_file} ({type(error).__name__}): get it from "
             f"https://huggingface.co/datasets/{DSRL_MIRROR} and put it into {cache}, or give --dataset-path")


def file_sha256(path: Path) -> str:
    """Checksum of a file, as hexadecimal digits."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_dataset(path: Path, task: Task) -> dict[str, torch.Tensor]:
    """Read a DSRL file and check all that can be checked of it; stops with one line at the first fault.

    Returns contiguous float32 tensors under DATASET_KEYS: observations (n, obs_dim), actions (n, act_dim),
    the others (n,). Flags are 0 or 1, and 1 ends the episode. The file holds actions in the simulator's own
    units, as DSRL's do; they are returned in [-1, 1].
    """
    raw, attributes = read_arrays(path)
    made_for = task_of_file(attributes)
    # other people's files may hold anything
    is_task = made_for in gym.registry or re.fullmatch(r"[\w.]+:[\w-]+-v\d+", made_for)
    stop_unless(same_task(made_for, task) or not is_task,
                f"{path}: collected from {made_for}, not from {task.env_id}")
    n = len(raw["rewards"])
    stop_unless(n > 1, f"{path}: holds {n} transitions, at least two are needed")
    shapes = {"observations": (n, task.obs_dim), "next_observations": (n, task.obs_dim),
              "actions": (n, task.act_dim)}
    data = {}
    for key, array in raw.items():
        stop_unless(array.dtype.kind in "fiub", f"{path}: {key} holds {array.dtype}, not numbers")
        shape = shapes.get(key, (n,))
        if shape == (n,) and array.shape == (n, 1):
            array = array[:, 0]
        stop_unless(array.shape == shape,
                    f"{path}: {key} has shape {array.shape}, {task.env_id} needs {shape}")
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite and is refused below
            data[key] = torch.from_numpy(np.ascontiguousarray(array, np.float32))
        finite = data[key].isfinite().reshape(n, -1).all(1)
        stop_unless(finite.all(), f"{path}: {key} is not finite at transition {int(finite.int().argmin())}")
    check_flags(path, data["terminals"], data["timeouts"])
    data["actions"] = scale_file_actions(path, data["actions"], task, attributes)
    least = data["costs"].argmin()
    stop_unless(data["costs"][least] >= 0,
                f"{path}: costs are negative at transition {least}: are they rewards?")
    return data


def task_of_file(attributes: dict) -> str:
    """The task that a file's attribute names, or ""."""
    values = np.ravel(attributes.get("task", ""))
    return usual_name(str(plain(values[0]))) if len(values) else ""


def same_task(name: str, task: Task) -> bool:
    """Whether a name is the task's, be it of another module."""
    return name.rpartition(":")[2] == task.env_id.rpartition(":")[2]


def scale_file_actions(path: Path, actions: torch.Tensor, task: Task, attributes: dict) -> torch.Tensor:
    """A file's actions in [-1, 1]; stops with one line if they are outside the task's bounds."""
    units = attributes.get("action_units", "simulator")
    stop_unless(str(units) == "simulator", f"{path}: its action_units are {units}, not 'simulator'")
    # what this project wrote before it wrote "action_units" is in [-1, 1] already
    scaled_before = ({"task", "seed"} <= set(attributes) <= {"task", "seed", "command", "versions"}
                     and same_task(task_of_file(attributes), task))
    if task.action_low is None or scaled_before:
        bounds, scaled = "[-1, 1]", actions
    else:
        bounds = f"the task's bounds {task.action_low} and {task.action_high}"
        scaled = torch.from_numpy(task.scaled_actions(actions.numpy()).astype(np.float32))
    outside = (scaled.abs() > 1 + 1e-5).any(1)
    if outside.any():
        first = int(outside.int().argmax())
        stop(f"{path}: actions[{first}] is {actions[first].tolist()}, outside {bounds}")
    return scaled


def read_arrays(path: Path) -> tuple[dict[str, np.ndarray], dict]:
    """The seven arrays of a DSRL file as they are, and its attributes, text as str."""
    try:
        with h5py.File(path, "r") as file:
            arrays = {key: file[key] for key in DATASET_KEYS if isinstance(file.get(key), h5py.Dataset)}
            missing = [key for key in DATASET_KEYS if key not in arrays or arrays[key].ndim == 0]
            stop_unless(not missing, f"{path}: not a DSRL dataset, it lacks the arrays {', '.join(missing)}")
            attributes = {name: plain(value) for name, value in file.attrs.items()}
            return {key: array[()] for key, array in arrays.items()}, attributes
    except Exception as error:  # h5py raises many types
        stop(f"{path}: not a readable HDF5 file ({error!s:.100})")


def check_flags(path: Path, terminals: torch.Tensor, timeouts: torch.Tensor) -> None:
    """Stop if the ends of episodes are not told apart as DSRL does."""
    flags = torch.stack([terminals, timeouts])
    stop_unless(((flags == 0) | (flags == 1)).all(), f"{path}: terminals and timeouts must be 0 or 1")
    stop_unless(flags.any(), f"{path}: no episode ends: terminals and timeouts are all 0")
    stop_unless(not timeouts.any() or (timeouts > terminals).any(),
                f"{path}: every time limit is a terminal too; only one may be 1, terminals if the task "
                "itself ends")


def episode_sums(data: dict) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(last row, return, cost) of every finished episode of a dataset, each (episodes,)."""
    ends = np.flatnonzero((np.asarray(data["terminals"]) > 0) | (np.asarray(data["timeouts"]) > 0))
    returns = np.cumsum(np.asarray(data["rewards"], np.float64))[ends]
    costs = np.cumsum(np.asarray(data["costs"], np.float64))[ends]
    return ends, np.diff(returns, prepend=0.0), np.diff(costs, prepend=0.0)


def longest_episode(data: dict) -> int:
    """Steps of a dataset's longest finished episode."""
    ends, _, _ = episode_sums(data)
    return int(np.diff(ends, prepend=-1).max())


def describe_dataset(path: Path, data: dict, cost_limit: float, task: Task) -> str:
    """A line for the screen; the percentile is what an offline policy should reach."""
    _, returns, costs = episode_sums(data)
    safe_returns = returns[costs <= cost_limit]
    percentile = np.quantile(safe_returns, 0.75) if len(safe_returns) else float("nan")
    line = (f"{path.name}: {len(returns)} episodes, {len(data['rewards'])} transitions; {len(safe_returns)} "
            f"episodes within the limit, 75th percentile of their return {percentile:.1f}")
    longest = longest_episode(data)
    if longest != task.max_episode_steps:
        line += (f"\nwarning: the longest episode has {longest} steps, the task's time limit is "
                 f"{task.max_episode_steps}: the limit is spread over {longest}")
    return line


# --- Checkpoints ---
def write_file(path: Path, content: bytes) -> None:
    """Write under a temporary name, flush, then rename: what was there stays whole until the new file is."""
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        with suppress(OSError):
            part.unlink()
        stop(f"{path}: cannot be written ({error.strerror}); what was there is still whole", FAILURE)


def save_checkpoint(path: Path, checkpoint: dict) -> None:
    """Write tensors, numbers, strings, lists and dicts."""
    packages = {"torch": str(torch.__version__), "numpy": np.__version__, "gymnasium": gym.__version__}
    file = io.BytesIO()
    torch.save({"version": CHECKPOINT_VERSION, "packages": packages, **checkpoint}, file)
    write_file(path, file.getvalue())


def load_checkpoint(path: str | Path) -> dict:
    """Read a checkpoint with torch's weights_only reader, which cannot execute code; stops with one line."""
    stop_unless(os.path.isfile(path),
                f"--checkpoint {path}: no such file; `python offline_pretrain.py` makes one")
    try:
        damaged = zipfile.ZipFile(path).testzip()  # torch does not compare the checksums that it writes
        checkpoint = None if damaged else torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # torch raises many types, with long explanations
        stop(f"--checkpoint {path}: not a readable checkpoint: truncated, none, or with code (never run)")
    stop_unless(isinstance(checkpoint, dict) and repr(checkpoint.get("version")) == repr(CHECKPOINT_VERSION),
                f"--checkpoint {path}: damaged, or not written by this version of the scripts")
    return checkpoint


def check_facts(path: str | Path, checkpoint: dict, facts: dict) -> None:
    """Stop with one line at the first fact, a number or a string, in which a checkpoint is another."""
    for name, value in facts.items():
        found = checkpoint.get(name)
        stop_unless(not torch.is_tensor(found) and found == value,
                    f"--checkpoint {path}: {name} is {found}, this run needs {value}")


def check_network(path: str | Path, name: str, weights: Any, net: torch.nn.Module) -> None:
    """Stop with one line unless a checkpoint's weights are finite and those of such a network."""
    stop_unless(isinstance(weights, dict), f"--checkpoint {path}: it holds no network {name}")
    needed = net.state_dict()
    other = sorted(set(weights) ^ set(needed), key=str)
    stop_unless(not other, f"--checkpoint {path}: {name} is another network, it differs in {other[:3]}")
    for key, expected in needed.items():
        found = weights[key]
        stop_unless(torch.is_tensor(found) and found.is_cpu and found.layout == expected.layout
                    and (found.shape, found.dtype) == (expected.shape, expected.dtype),
                    f"--checkpoint {path}: {name}.{key} is {describe(found)}, this run needs "
                    f"{describe(expected)}")
        stop_unless(found.isfinite().all(), f"--checkpoint {path}: {name}.{key} is not finite")


def describe(value: Any) -> str:
    """Shape and type of a tensor in a few words, or what else it is."""
    return f"{tuple(value.shape)} of {value.dtype}" if torch.is_tensor(value) else type(value).__name__


def load_weights(path: str | Path, facts: dict, **nets: torch.nn.Module) -> None:
    """Take networks by name from a finished run's checkpoint with the same facts; stops with one line."""
    checkpoint = load_checkpoint(path)
    stop_unless(checkpoint.get("finished") is True,
                f"--checkpoint {path}: its run has not ended; --resume goes on with it")
    check_facts(path, checkpoint, facts)
    for name, net in nets.items():
        check_network(path, name, checkpoint.get(name), net)
        net.load_state_dict(checkpoint[name])


def storable(name: str, value: Any) -> Any:
    """A value as a checkpoint can hold it, NumPy's numbers as Python's; stops with one line if it cannot."""
    if isinstance(value, dict):
        return {key: storable(f"{name}.{key}", item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(storable(name, item) for item in value)
    if isinstance(value, np.generic):
        return value.item()
    stop_unless(torch.is_tensor(value) or type(value) in (bool, int, float, str, type(None)),
                f"a checkpoint cannot hold {name}, a {type(value).__name__}: give run.keep its numbers")
    return value


def state_of(part: Any) -> Any:
    """What a checkpoint keeps of a dict of numbers, a tensor, a generator, or what has a state_dict."""
    if isinstance(part, dict):
        return dict(part)
    if torch.is_tensor(part):
        return part.detach().clone()
    if isinstance(part, np.random.Generator):
        return part.bit_generator.state
    if isinstance(part, torch.Generator):
        return part.get_state()
    return part.state_dict()


def restore(part: Any, state: Any) -> None:
    """Put back what state_of gave."""
    if isinstance(part, dict):
        part.update(state)
    elif torch.is_tensor(part):
        part.data.copy_(state)
    elif isinstance(part, np.random.Generator):
        part.bit_generator.state = state
    elif isinstance(part, torch.Generator):
        part.set_state(state)
    else:
        part.load_state_dict(state)


def is_finite(state: Any) -> bool:
    """Whether all tensors and numbers of a state are finite."""
    if isinstance(state, dict):
        return all(is_finite(value) for value in state.values())
    if isinstance(state, (list, tuple)):
        return all(is_finite(value) for value in state)
    if torch.is_tensor(state):
        return bool(state.isfinite().all())
    return not isinstance(state, float) or math.isfinite(state)


# --- Runs ---
open_runs = []  # the run that a script's main has begun
main_at_work = threading.Lock()


def closes_its_run(main: Callable) -> Callable:
    """Decorator of a script's main: its run is closed however it ends, so that it can be called again."""
    @functools.wraps(main)
    def closing_main(args):
        stop_unless(main_at_work.acquire(blocking=False), "a run is at work in this process, which has one "
                    "random state: start the other in a process of its own")
        try:
            return main(args)
        finally:
            while open_runs:
                open_runs.pop().close()
            main_at_work.release()

    return closing_main


class PatientStream:
    """Standard output or error of a program that goes on when nobody reads it any more."""

    def __init__(self, stream: Any):
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write, or drop what cannot be written from then on."""
        try:
            return self.stream.write(text)
        except OSError:
            self.give_up()
            return len(text)

    def flush(self) -> None:
        """Flush, or drop what cannot be written from then on."""
        try:
            self.stream.flush()
        except OSError:
            self.give_up()

    def give_up(self) -> None:
        """Send what is buffered, and all that follows, to nowhere."""
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


@contextmanager
def patient_streams() -> Iterator[None]:
    """A program's standard streams as patient ones: a broken pipe or a closed stream does not end it."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:  # closed: or a file of ours would get the number
        pass
    os.close(number)
    before = sys.stdout, sys.stderr
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by `>&-`
            setattr(sys, name, open(os.devnull, "w"))
        else:
            setattr(sys, name, PatientStream(stream))
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


class Run:
    """One run: its options, its folder, what it logs, and its checkpoint.

    Making one only reads: it checks the options, and with --resume takes that run's options and checkpoint.
    `keep` begins: it names all that changes in training, opens the folder, and puts back what was saved.
    """

    def __init__(self, args: Any, script: str, columns: tuple[str, ...]):
        hints = typing.get_type_hints(type(args))
        args = replace(args, **{name: checked_option(name, plain(value), hints[name])
                                for name, value in vars(args).items()})
        args = replace(args, env_id=usual_name(args.env_id))
        self.script, self.columns = script, columns
        self.args, self.config = args, json.loads(json.dumps(asdict(args)))
        self.saved = None  # the last checkpoint of a run that goes on
        if args.resume is not None:
            self.args, self.config, self.saved = read_run(args)
        check_options(self.args)
        self.dir = Path(self.args.run_dir or default_run_dir(self.args, script))
        program = sys.argv[0]
        if Path(program).resolve().parent not in SCRIPT_FOLDERS:  # a notebook's, or another program
            program = os.path.relpath(inspect.currentframe().f_back.f_globals.get("__file__", program))
        self.command = f"`{shlex.join(['python', program, '--resume', str(self.dir)])}`"
        self.signal = 0  # the last one that asked for an end
        self.signal_time = -math.inf
        self.handlers = {}
        self.file = self.board = self.wandb_run = None
        self.board_step = 0  # the last one that TensorBoard got

    @property
    def resumed(self) -> bool:
        """Whether there is a checkpoint that the run goes on from."""
        return self.saved is not None

    def keep(self, facts: dict, progress: dict, constant: tuple = (), **parts: Any) -> None:
        """Name everything that changes in training: `checkpoint` saves it, and --resume puts it back, here.

        facts: what a resumed run must agree in. progress: numbers, of which those named ..._steps are
        counted. parts: networks, optimisers, buffers, generators, tensors, dicts of numbers, by name.
        constant: what has a state but stays as it is, a dataset.
        A part that main has among its variables and not here ends the run, now or at the next save.
        """
        for name, part in parts.items():
            can_be_put_back = isinstance(part, (dict, torch.Tensor, *GENERATORS)) or (
                hasattr(part, "state_dict") and hasattr(part, "load_state_dict"))
            stop_unless(can_be_put_back, f"run.keep cannot put back {name}, a {type(part).__name__}: give it "
                        "a dict, or a class with state_dict and load_state_dict")
        stop_unless(not facts.keys() & parts.keys(), "run.keep: a fact has the name of a part: "
                    f"{', '.join(facts.keys() & parts.keys())}")
        stop_unless(any(name.endswith("_steps") for name in progress),
                    "run.keep: progress needs a number named ..._steps, or nothing says when to save")
        self.main_frame, self.constant = inspect.currentframe().f_back, constant
        check_memory(self.args, facts)
        self.facts, self.progress, self.parts = facts, progress, {"progress": progress, **parts}
        self.refuse_forgotten_parts()
        if self.resumed:
            self.put_back()
        self.saved_at = self.step
        open_runs.append(self)
        self.open_folder()

    @property
    def step(self) -> int:
        """Steps of all kinds so far: --checkpoint-every counts them."""
        return sum(steps for name, steps in self.progress.items() if name.endswith("_steps"))

    def place(self) -> str:
        """How far the run is, in words."""
        steps = {name: value for name, value in self.progress.items() if name.endswith("_steps")}
        return ", ".join(f"{name} {value}" for name, value in steps.items())

    def stop_as_not_finite(self, names: str) -> NoReturn:
        """End the run before such a number is logged or saved."""
        last = f"is of step {self.saved_at}" if self.saved_at else "does not exist"
        stop(f"{self.dir}: {names} is not finite at {self.place()}; the last good checkpoint {last}", FAILURE)

    def refuse_forgotten_parts(self) -> None:
        """Stop if one of main's variables has a state that a checkpoint would lack."""
        known = {id(part) for part in (*self.parts.values(), *self.constant)}
        for part in self.parts.values():
            if isinstance(part, torch.nn.Module):
                known |= {id(parameter) for parameter in part.parameters()}
        forgotten = [name for name, value in self.main_frame.f_locals.items()
                     if any(id(item) not in known for item in items_with_state(value))]
        stop_unless(not forgotten, f"run.keep lacks {', '.join(forgotten)}: a resumed run would lose it")

    # --- Beginning ---
    def put_back(self) -> None:
        """Restore all parts; stops with one line if the checkpoint is not one of this script and dataset."""
        path = self.dir / "checkpoint.pt"
        check_facts(path, self.saved, self.facts)
        for name, part in self.parts.items():
            if isinstance(part, torch.nn.Module):
                check_network(path, name, self.saved.get(name), part)
            try:
                restore(part, self.saved[name])
            except Exception as error:  # as many types as there are kinds of parts
                stop(f"--resume {self.dir}: {name} is not in its checkpoint, or another ({error!s:.80})")
        self.board_step = self.saved["board_step"]
        torch.set_rng_state(self.saved["torch_rng"])  # last, as making networks draws from it
        torch.cuda.set_rng_state_all(self.saved["cuda_rng"])

    def open_folder(self) -> None:
        """Make or enter the folder, lock it, and open what is written there."""
        if not self.args.resume and not self.args.overwrite:
            try:
                found = [file for pattern in RUN_FILES for file in self.dir.glob(pattern)
                         if file.is_file() and file.stat().st_size]
            except OSError as error:
                stop(f"--run-dir {self.dir}: cannot write there ({error.strerror})")
            stop_unless(not found,
                        f"--run-dir {self.dir}: holds a run; {self.command} goes on with it, --overwrite "
                        "restarts")
        if self.args.track:
            self.start_wandb()  # before anything is written, as it may fail
        try:
            self.dir.mkdir(parents=True, exist_ok=True)
            self.file = open(self.dir / "metrics.csv", "a", newline="")
            self.lock()
            self.catch_signals()
            if not self.args.resume:  # first: what is left of an older run cannot be resumed without it
                (self.dir / "config.json").unlink(missing_ok=True)
            if not self.resumed:
                for pattern in set(RUN_FILES) - {"config.json", "metrics.csv"}:
                    for file in self.dir.glob(pattern):
                        file.unlink()
            if self.config != self.written_config():  # a resumed run may have got more steps
                write_file(self.dir / "config.json", json.dumps(self.config, indent=2).encode() + b"\n")
            self.file.seek(self.file.truncate(self.saved["metrics_bytes"] if self.resumed else 0))
            self.csv = csv.DictWriter(self.file, self.columns, lineterminator="\n")
            if not self.resumed:
                self.csv.writeheader()
            from torch.utils.tensorboard import SummaryWriter
            # what was written after the checkpoint is written again: without this, curves would run backwards
            purge_step = self.saved["board_step"] + 1 if self.resumed else None
            self.board = SummaryWriter(str(self.dir), purge_step=purge_step)
            if self.args.track:
                write_file(self.dir / "wandb_id", self.wandb_run.id.encode())
        except OSError as error:
            stop(f"--run-dir {self.dir}: cannot write there ({error.strerror})")

    def written_config(self) -> dict | None:
        """What config.json holds."""
        file = self.dir / "config.json"
        return json.loads(file.read_text()) if self.args.resume and file.exists() else None

    def lock(self) -> None:
        """Keep the folder for this process until the file is closed."""
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stop(f"--run-dir {self.dir}: another process is writing there")
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                raise
            tqdm.write(f"warning: {self.dir}: no locks on this disk: start no second run there", sys.stderr)

    def start_wandb(self) -> None:
        """Log to Weights & Biases what TensorBoard gets; a resumed run goes on in its run there."""
        id_file = self.dir / "wandb_id"
        try:
            import wandb
            known_id = id_file.read_text() if self.args.resume and id_file.exists() else None
            self.wandb_run = wandb.init(
                # its folder is not within the run's, or it would copy its own copies of the events
                project=os.environ.get("WANDB_PROJECT", "marvel"), name=self.dir.name, dir=self.dir.parent,
                config=self.config, sync_tensorboard=True, save_code=True, id=known_id, resume="allow")
        except Exception as error:  # it raises many types
            stop(f"--track: Weights & Biases cannot start ({error!s:.100}); WANDB_MODE=offline needs no "
                 "account")

    # --- Signals ---
    def catch_signals(self) -> None:
        """Let Ctrl-C and a cluster's signals end the run at the next `checkpoint`; only a main thread can."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in SIGNALS:
            nohup = number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN
            if not nohup:
                self.handlers[number] = signal.signal(number, self.on_signal)

    def on_signal(self, number: int, _frame: Any) -> None:
        """Note the signal. One that comes more than a second later (`timeout` sends two) ends at once."""
        if self.signal and time.monotonic() - self.signal_time > 1:
            raise SystemExit(128 + number)
        self.signal, self.signal_time = number, time.monotonic()
        with suppress(OSError):  # print may be under way, or Ctrl-C has ended a `| tee` too
            os.write(2, b"\nends at the next checkpoint; once more ends at once\n")

    # --- Logging ---
    def check_finite(self, values: dict) -> None:
        """End the run at a number or a tensor of one that is not finite, before it is logged or saved."""
        for name, value in values.items():
            if not math.isfinite(value):
                self.stop_as_not_finite(name)

    def check_columns(self, values: dict) -> None:
        """Stop at a number that metrics.csv has no column for."""
        unknown = set(values) - set(self.columns)
        stop_unless(not unknown, f"metrics.csv has no column {', '.join(sorted(unknown))}: add it to COLUMNS")

    def row(self, step: int, values: dict[str, float]) -> None:
        """One line of metrics.csv, flushed, and the same numbers to TensorBoard."""
        self.check_finite({name: value for name, value in values.items() if name != "normalized_return"})
        self.check_columns(values)
        try:
            self.csv.writerow({name: value if isinstance(value, int) else f"{float(value):.6g}"
                               for name, value in values.items()})
            self.file.flush()
        except OSError as error:
            stop(f"{self.dir}: cannot be written ({error.strerror}); {self.command} goes on", FAILURE)
        self.scalars(step, values)

    def after_update(self, step: int, metrics: dict, prefix: str, every: int) -> None:
        """End of an update outside metrics.csv: finite? Every so many steps to TensorBoard; saved in time."""
        self.check_finite(metrics)
        self.check_columns(metrics)
        if step % every == 0:
            self.scalars(step, {f"{prefix}/{name}": value for name, value in metrics.items()})
        self.checkpoint()

    def scalars(self, step: int, values: dict) -> None:
        """Numbers to TensorBoard, and to W&B through it."""
        try:
            for name, value in values.items():
                self.board.add_scalar(name, float(value), step)
            self.board_step = step
        except OSError as error:
            stop(f"{self.dir}: cannot be written ({error.strerror}); {self.command} goes on", FAILURE)

    # --- Saving ---
    def checkpoint(self) -> None:
        """Save where it is time or a signal has come, which then ends the program."""
        signal_number = self.signal  # one that comes from here on waits for the next call
        if signal_number or self.step - self.saved_at >= self.args.checkpoint_every:
            self.save(finished=False)
        if signal_number:
            self.close()
            tqdm.write(f"stopped at {self.place()}: {self.command} goes on with it", sys.stderr)
            raise SystemExit(128 + signal_number)

    def finish(self) -> None:
        """Save the last checkpoint and close."""
        self.save(finished=True)
        self.close()

    def save(self, finished: bool) -> None:
        """Write checkpoint.pt, of all that `keep` was given."""
        self.refuse_forgotten_parts()
        state = {name: storable(name, state_of(part)) for name, part in self.parts.items()}
        not_finite = [name for name, value in state.items() if not is_finite(value)]
        if not_finite:
            self.stop_as_not_finite(", ".join(not_finite))
        try:
            self.file.flush()
            os.fsync(self.file.fileno())  # never behind the checkpoint
        except OSError as error:
            stop(f"{self.dir}: cannot be written ({error.strerror}); {self.command} goes on", FAILURE)
        cuda_rng = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        save_checkpoint(self.dir / "checkpoint.pt", {
            **self.facts, **state, "args": self.config, "finished": finished,
            "metrics_bytes": self.file.tell(), "board_step": self.board_step,
            "torch_rng": torch.get_rng_state(), "cuda_rng": cuda_rng})
        self.saved_at = self.step

    def close(self) -> None:
        """Give back the signals and the lock, flush and close the files; twice does no harm."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.handlers = {}
        self.main_frame = None  # it holds all of main's variables
        for file in (self.file, self.board):
            if file is not None:
                with suppress(OSError):  # of a full disk: what it could not take is not in the checkpoint
                    file.close()
        if self.wandb_run is not None:
            self.wandb_run.finish()
            self.wandb_run = None


def items_with_state(value: Any) -> list:
    """What a variable is, or holds in a list, tuple or dict, that changes in training."""
    if isinstance(value, (list, tuple)):
        return [item for part in value for item in items_with_state(part)]
    if isinstance(value, dict):
        return items_with_state(list(value.values()))
    if torch.is_tensor(value):
        return [value] if value.requires_grad and value.is_leaf else []
    has_state = hasattr(value, "state_dict") or isinstance(value, GENERATORS)
    return [value] if has_state and not isinstance(value, type) else []


def plain(value: Any) -> Any:
    """A value as JSON can hold it: a path and bytes as text, NumPy's number as Python's."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return value.item() if isinstance(value, np.generic) else value


def default_run_dir(args: Any, script: str) -> str:
    """Folder of a script's run: the runs of a W&B sweep share task and seed, so its id is in their names."""
    name = f"{args.env_id}__{script}__seed{args.seed}"
    if "WANDB_SWEEP_ID" in os.environ:
        name += f"__{os.environ.get('WANDB_RUN_ID', '')}"
    return f"runs/{name}"


def check_memory(args: Any, facts: dict) -> None:
    """Stop if the transitions of an online run cannot fit into this machine's memory."""
    steps = getattr(args, "total_timesteps", 0)
    row = 4 * (2 * facts["obs_dim"] + facts["act_dim"] + 4)  # bytes of one transition, float32
    needed = 3 * row * steps  # the buffer, its room to grow, and its copy in a checkpoint
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    stop_unless(needed <= memory, f"--total-timesteps {steps}: its transitions need {needed / 1e9:.0f} GB, "
                f"this machine has {memory / 1e9:.0f} GB")


def read_run(args: Any) -> tuple[Any, dict, dict | None]:
    """Of the run that --resume names: its options as Args and as config.json has them, and its checkpoint.

    The checkpoint is None if there is none yet. Ends the program if the run is finished.
    """
    folder = Path(args.resume)
    given = {name: value for name, value in vars(args).items() if value != getattr(type(args), name, None)}
    typed = [word.removeprefix("--resume=") for word in sys.argv]
    if args.resume in typed:  # what is typed counts, though it be the default
        words = [word for word in sys.argv[1:] if word.startswith("--")]
        names = [word[2:].partition("=")[0].replace("-", "_") for word in words]
        given |= {name: getattr(args, name, None) for name in names}
    del given["resume"]
    stop_unless(set(given) <= set(MAY_BE_RAISED),
                "--resume takes no other option, but for a larger --total-timesteps or --update-steps: the "
                "run goes on with those that it was started with")
    try:
        config = json.loads((folder / "config.json").read_text())
        args = type(args)(**config)
    except (OSError, ValueError, TypeError):
        stop(f"--resume {folder}: has no config.json (start it again) or one of another script, version")
    first_config = dict(config)
    for name, value in given.items():
        stop_unless(value >= config[name], f"--{name.replace('_', '-')} {value}: --resume may only raise it, "
                    f"the run has {config[name]}")
        config[name] = value
    options = {name: tuple(value) if isinstance(value, list) else value for name, value in config.items()}
    args = replace(type(args)(**options), run_dir=str(folder), resume=str(folder))
    if not (folder / "checkpoint.pt").exists():
        return args, config, None
    saved = load_checkpoint(folder / "checkpoint.pt")
    metrics = folder / "metrics.csv"
    size = metrics.stat().st_size if metrics.exists() else 0
    its_config = saved.get("args")
    is_of_this_run = isinstance(its_config, dict) and {**first_config, **steps_of(its_config)} == its_config
    stop_unless(is_of_this_run and size >= saved["metrics_bytes"],
                f"--resume {folder}: config.json, metrics.csv and checkpoint.pt are not those of one run")
    if saved["finished"] and steps_of(config) == steps_of(its_config):
        print(f"{folder}: this run is finished")
        raise SystemExit(0)
    return args, config, saved


def steps_of(config: dict) -> dict:
    """The options that --resume may raise."""
    return {name: config[name] for name in MAY_BE_RAISED if name in config}
