"""Helpers that both scripts use and that hold no algorithm: tasks, datasets, evaluation, run files.

Units: a return or a cost is an undiscounted sum over one episode in the task's own units, unless its name
says otherwise; actions are in [-1, 1]; a terminal ends the task, a timeout only cuts the episode.
"""
import csv
import fcntl
import hashlib
import importlib
import io
import json
import os
import random
import shlex
import signal
import sys
import time
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

import gymnasium as gym
import h5py
import numpy as np
import torch
from tqdm import tqdm

DSRL_MIRROR = "YYY-45/DSRL"  # as in DSRL's main branch; the address inside the published package is dead
SHIPPED_DATASETS = Path(__file__).parent / "datasets"
DATASET_KEYS = ("observations", "next_observations", "actions", "rewards", "costs", "terminals", "timeouts")
RUN_FILES = "config.json", "checkpoint.pt", "curves.png", "events.out.tfevents.*"  # and metrics.csv, the lock
CHECKPOINT_VERSION = 2


def stop(message: str, status: int = 2) -> NoReturn:
    """End the program with one line on stderr and no traceback; status 2 is a user's mistake."""
    tqdm.write("error: " + " ".join(message.splitlines()), sys.stderr)  # not behind a progress bar
    raise SystemExit(status)


def need(condition: Any, message: str) -> None:
    """Stop with the message unless the condition holds."""
    if not condition:
        stop(message)


def check_options(args: Any) -> None:
    """Stop at the first option that makes no sense."""
    counts = "update_steps batch_size eval_every checkpoint_every eval_episodes rollout_episodes".split()
    most = dict(gamma=0.9999, tau=1, vpa_tau=1, cost_margin=1, ood_quantile=1, adapt_rate=1, seed=2**32 - 1)
    for name, value in asdict(args).items():
        low = 1 if name in counts or name.endswith("_actions") else 1e-9 * (name in ("utd", "reward_scale"))
        high = most.get(name, 1 if name.endswith("_lr") else 1e9)
        need(not isinstance(value, (int, float)) or low <= value <= high,
             f"--{name.replace('_', '-')} {value}: must be between {low:g} and {high:.4g}")
    need(not getattr(args, "from_scratch", False) or not (args.checkpoint or args.dataset_path),
         "--from-scratch takes neither --checkpoint nor --dataset-path")
    need(not args.cuda or torch.cuda.is_available(), "--cuda: torch finds no GPU here")


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
    dataset_sha256: str | None = None  # read_dataset notes it here

    def normalized_return(self, episode_return: float) -> float:
        """(R - min R) / (max R - min R), DSRL's reference returns; nan for a task that DSRL does not have."""
        return (episode_return - self.min_return) / (self.max_return - self.min_return)


def normalized_cost(episode_cost: float, cost_limit: float) -> float:
    """(C + eps) / (limit + eps) with eps = 1 for limit 0, else 0: DSRL's; safe is at most 1."""
    eps = float(cost_limit == 0)
    return (episode_cost + eps) / (cost_limit + eps)


def make_env(env_id: str) -> tuple[gym.Env, Task]:
    """The simulator and its description. Stops with one line if the task is unknown or does not fit.

    Actions are rescaled to [-1, 1]. The first reset is thrown away, as bullet's Car and Drone differ in it.
    """
    import bullet_safety_gym  # noqa: F401  (registers the tasks)
    from dsrl import infos  # also registers safety-gymnasium's tasks
    module, _, registered = env_id.rpartition(":")
    if not module and registered not in gym.registry:
        known = [url.rsplit("/", 1)[1].rsplit("-", 2)[0] for url in infos.DATASET_URLS.values()]
        near = get_close_matches(env_id, known, n=3, cutoff=0.4)
        stop(f"--env-id {env_id}: no such task; the nearest names are {', '.join(near) or 'none'}")
    name = env_id.removeprefix("Safety").split("-v")[0].removesuffix("Gymnasium")
    try:
        if module:  # Gymnasium's "module:Name-v0": the module, here or on PYTHONPATH, registers the task
            sys.path.append(os.getcwd())
            importlib.import_module(module)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            spec = gym.spec(registered)
            env = gym.make(replace(spec, max_episode_steps=None), disable_env_checker=True)  # limited below
        spaces = env.observation_space, env.action_space
        boxes = all(isinstance(space, gym.spaces.Box) and len(space.shape) == 1 for space in spaces)
        need(boxes and spaces[1].is_bounded(),
             f"--env-id {env_id}: observations and bounded actions must be boxes of one dimension: {spaces}")
        middle = (env.action_space.low + env.action_space.high) / 2
        reset_env(env, 0)
        if len(env.step(middle)) == 6:
            from safety_gymnasium.wrappers import SafetyGymnasium2Gymnasium
            env = SafetyGymnasium2Gymnasium(env)  # Safety-Gymnasium's own step returns the cost by itself
        info = env.step(middle)[4]
    except Exception as error:  # a simulator that is not installed, a constructor with arguments, ...
        stop(f"--env-id {env_id}: does not run ({type(error).__name__}: {error!s:.100})")
    need(np.asarray(info.get("cost")).dtype.kind in "fiub" and np.ndim(info["cost"]) == 0,
         f"--env-id {env_id}: its step() gives no number info['cost'] to keep under a limit")
    horizon = spec.max_episode_steps or infos.DEFAULT_MAX_EPISODE_STEPS.get(name)
    need(horizon, f"--env-id {env_id}: it has no time limit; register it with max_episode_steps")
    env = gym.wrappers.TimeLimit(env, horizon)
    if (env.action_space.low != -1).any() or (env.action_space.high != 1).any():
        env = gym.wrappers.RescaleAction(env, -1.0, 1.0)
    low, high = (x.get(name, float("nan")) for x in (infos.MIN_EPISODE_REWARD, infos.MAX_EPISODE_REWARD))
    return env, Task(env_id, *env.observation_space.shape, *env.action_space.shape, horizon, low, high,
                     infos.DATASET_URLS.get(name, "").rpartition("/")[2] or None)


def reset_env(env: gym.Env, seed: int) -> np.ndarray:
    """Start the episode that `seed` stands for and return its first observation, float32 (obs_dim,).

    Bullet draws from numpy's global state; its motors keep their targets in a reset, so they are stopped.
    """
    if type(env.unwrapped).__module__.startswith("bullet_safety_gym"):
        env.unwrapped.agent.apply_action(np.zeros(env.action_space.shape))
        np.random.seed(seed % 2**32)
        env.unwrapped.reset()
    np.random.seed(seed % 2**32)
    random.seed(int(seed))  # an environment of one's own may draw from it
    return env.reset(seed=int(seed))[0].astype(np.float32)


def evaluate(env: gym.Env, policy: Callable, episodes: int, seed: int = 10_000) -> dict[str, np.ndarray]:
    """Play episodes with the seeds seed, seed + 1, ...; global random states are left as they were.

    policy: observation (obs_dim,) -> action (act_dim,). Returns "return", "cost", "length", each (episodes,).
    """
    numpy_state, python_state = np.random.get_state(), random.getstate()
    totals = np.zeros((3, episodes))
    for k in range(episodes):
        obs, done = reset_env(env, seed + k), False
        while not done:
            next_obs, reward, terminated, truncated, info = env.step(policy(obs))
            obs, done = next_obs.astype(np.float32), terminated or truncated
            totals[:, k] += reward, info["cost"], 1
    np.random.set_state(numpy_state)
    random.setstate(python_state)
    return dict(zip(("return", "cost", "length"), totals, strict=True))


# --- Datasets ---
def find_dataset(task: Task, dataset_path: str | None) -> Path:
    """The dataset's file: --dataset-path, else shipped, else in DSRL's cache, else downloaded into that."""
    cache = Path(os.environ.get("DSRL_DATASET_DIR", "~/.dsrl/datasets")).expanduser()
    here = SHIPPED_DATASETS / f"{task.env_id}.hdf5", cache / (task.dataset_file or "none")
    for file in filter(os.path.isfile, [Path(dataset_path)] if dataset_path else here):
        return file
    need(not dataset_path, f"--dataset-path {dataset_path}: no such file")
    need(task.dataset_file, f"{task.env_id} has no dataset: make one with benchmark/collect_dataset.py")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # or every retry prints two lines
    from huggingface_hub import hf_hub_download  # resumes, retries, puts only a whole file in place
    print(f"downloading {task.dataset_file} from huggingface.co/datasets/{DSRL_MIRROR} to {cache}")
    try:
        return Path(hf_hub_download(DSRL_MIRROR, task.dataset_file, repo_type="dataset", local_dir=cache))
    except Exception as error:  # whatever the network does, the user needs the same three facts
        stop(f"cannot download {task.dataset_file} ({type(error).__name__}): get it from "
             f"https://huggingface.co/datasets/{DSRL_MIRROR} and put it into {cache}, or give --dataset-path")


def read_dataset(path: Path, task: Task, saved: dict | None = None) -> dict[str, torch.Tensor]:
    """Read a DSRL file and check all that can be checked of it; stops with one line at the first fault.

    Returns contiguous float32 tensors under DATASET_KEYS: observations (n, obs_dim), actions (n, act_dim),
    the others (n,). Flags are 0 or 1, and 1 ends the episode. Must be the file of the checkpoint `saved`.
    """
    try:
        task.dataset_sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        with h5py.File(path, "r") as file:
            arrays = {key: file[key] for key in DATASET_KEYS if isinstance(file.get(key), h5py.Dataset)}
            missing = [key for key in DATASET_KEYS if key not in arrays or arrays[key].ndim == 0]
            need(not missing, f"{path}: not a DSRL dataset, it lacks the arrays {', '.join(missing)}")
            raw = {key: array[()] for key, array in arrays.items()}
            made_for = str(file.attrs.get("task", task.env_id))
    except Exception as error:  # h5py raises many types
        stop(f"{path}: not a readable HDF5 file ({error!s:.100})")
    need(not saved or saved.get("dataset_sha256") == task.dataset_sha256, f"{path}: not this run's dataset")
    need(made_for == task.env_id, f"{path}: collected from {made_for}, not from {task.env_id}")
    n, data = len(raw["rewards"]), {}
    shapes = dict.fromkeys(DATASET_KEYS[:2], (n, task.obs_dim)) | {"actions": (n, task.act_dim)}
    need(n > 1, f"{path}: holds {n} transitions, at least two are needed")
    for key, array in raw.items():
        need(array.dtype.kind in "fiub", f"{path}: {key} holds {array.dtype}, not numbers")
        shape = shapes.get(key, (n,))
        array = array[:, 0] if (shape, array.shape) == ((n,), (n, 1)) else array
        need(array.shape == shape, f"{path}: {key} has shape {array.shape}, {task.env_id} needs {shape}")
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite and is refused below
            data[key] = torch.from_numpy(np.ascontiguousarray(array, np.float32))
        finite = data[key].isfinite().reshape(n, -1).all(1)
        need(finite.all(), f"{path}: {key} is not finite at transition {int(finite.int().argmin())}")
    terminals, timeouts = flags = torch.stack([data["terminals"], data["timeouts"]])
    need(((flags == 0) | (flags == 1)).all(), f"{path}: terminals and timeouts must be 0 or 1")
    need(flags.any(), f"{path}: no episode ends: terminals and timeouts are all 0")
    need(not timeouts.any() or (timeouts > terminals).any(),
         f"{path}: every time limit is a terminal too; only one may be 1, terminals if the task itself ends")
    largest, least = data["actions"].abs().max(), data["costs"].argmin()
    need(largest <= 1 + 1e-5, f"{path}: actions reach {largest:g}, outside [-1, 1]")
    need(data["costs"][least] >= 0, f"{path}: costs are negative at transition {least}: are they rewards?")
    return data


# --- Run files ---
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
        part.unlink(missing_ok=True)
        stop(f"{path}: cannot be written ({error.strerror}); what was there is still whole", status=1)


def save_checkpoint(path: Path, checkpoint: dict) -> None:
    """Write tensors, numbers, strings, lists and dicts."""
    packages = {"torch": str(torch.__version__), "numpy": np.__version__, "gymnasium": gym.__version__}
    file = io.BytesIO()
    torch.save({"version": CHECKPOINT_VERSION, "packages": packages, **checkpoint}, file)
    write_file(path, file.getvalue())


def load_checkpoint(path: str | Path) -> dict:
    """Read a checkpoint with torch's weights_only reader, which cannot execute code; stops with one line."""
    need(os.path.isfile(path), f"--checkpoint {path}: no such file; `python offline_pretrain.py` makes one")
    try:
        damaged = zipfile.ZipFile(path).testzip()  # torch does not compare the checksums that it writes
        checkpoint = None if damaged else torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # torch raises many types, with long explanations
        stop(f"--checkpoint {path}: not a readable checkpoint: truncated, none, or with code (never run)")
    need(isinstance(checkpoint, dict) and repr(checkpoint.get("version")) == repr(CHECKPOINT_VERSION),
         f"--checkpoint {path}: damaged, or not written by this version of offline_pretrain.py")
    return checkpoint


def check_checkpoint(path: str | Path, checkpoint: dict, expected: dict, **nets: torch.nn.Module) -> None:
    """Stop with one line at the first field or network of a checkpoint that is not what the script needs."""
    for name, value in expected.items():
        need(not torch.is_tensor(its := checkpoint.get(name)) and its == value,
             f"--checkpoint {path}: {name} is {its}, this run needs {value}")
    for name, net in nets.items():
        its, mine = checkpoint.get(name), net.state_dict()
        need(isinstance(its, dict) and its.keys() == mine.keys() and all(
            torch.is_tensor(x) and x.is_cpu and (x.shape, x.dtype, x.layout) == (y.shape, y.dtype, y.layout)
            and x.isfinite().all() for x, y in ((its[key], mine[key]) for key in mine)),
             f"--checkpoint {path}: {name} is missing (PEX has two), not finite, or of another shape or type")


def start(args: Any) -> tuple[Any, dict | None]:
    """Check the options; with --resume, give that run's and its last checkpoint (None: none yet)."""
    saved, folder = None, Path(args.resume or "")
    if args.resume is not None:
        typed = sys.argv[3:] if type(args).__module__ == "__main__" else []  # though it be the default
        need(args == type(args)(resume=args.resume) and not typed,
             "--resume takes no other option: the run goes on with those that it was started with")
        try:
            config = json.loads((folder / "config.json").read_text())
            args = type(args)(**config | {"run_dir": str(folder), "resume": str(folder)})
        except (OSError, ValueError, TypeError):
            stop(f"--resume {folder}: has no config.json (start it again) or one of another script, version")
        if (folder / "checkpoint.pt").exists():
            saved = load_checkpoint(folder / "checkpoint.pt")
            size = sum(file.stat().st_size for file in folder.glob("metrics.csv"))
            need(saved.get("args") == config and size >= saved["metrics_bytes"],
                 f"--resume {folder}: config.json, metrics.csv and checkpoint.pt are not those of one run")
        if saved and saved["finished"]:
            print(f"{folder}: this run is finished")
            raise SystemExit(0)
    check_options(args)
    return args, saved


class Run:
    """One run's folder and what is written there. With `saved`, `start`'s, metrics.csv is cut back to it."""

    def __init__(self, args: Any, name: str, columns: list[str], saved: dict | None = None):
        self.dir = Path(args.run_dir or f"runs/{args.env_id}__{name}__seed{args.seed}")
        config, self.every, self.signal, self.gpu = self.dir / "config.json", args.checkpoint_every, 0, {}
        self.step = self.saved_at = saved["step"] if saved else 0  # of all phases; the script counts it up
        self.command = f"`{shlex.join(['python', sys.argv[0], '--resume', str(self.dir)])}`"
        try:
            there = [file for name in (*RUN_FILES, "metrics.csv") for file in self.dir.glob(name)]
            need(args.overwrite or args.resume or not any(x.is_file() and x.stat().st_size for x in there),
                 f"--run-dir {self.dir}: holds a run; {self.command} goes on with it, --overwrite restarts")
            self.args = json.loads(config.read_text()) if args.resume else asdict(args)
            if args.track:  # before anything is written, as it may fail
                import wandb
                wandb.init(project=os.environ.get("WANDB_PROJECT", "marvel"), name=self.dir.name,
                           dir=self.dir, config=self.args, sync_tensorboard=True, save_code=True)
            self.dir.mkdir(parents=True, exist_ok=True)
            self.file = open(self.dir / "metrics.csv", "a", newline="")
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # one process to a folder
            steps = [load_checkpoint(x)["step"] for x in self.dir.glob("checkpoint.pt") if args.resume]
            need(sum(steps) == self.step and (args.resume or args.overwrite or not self.file.tell()),
                 f"--run-dir {self.dir}: another process has just been at work there")
            self.handlers = {k: signal.signal(k, self.on_signal) for k in (signal.SIGINT, signal.SIGTERM)}
            for old in () if saved else RUN_FILES[bool(args.resume):]:  # a resumed run keeps its options
                for file in self.dir.glob(old):
                    file.unlink()
            self.file.seek(self.file.truncate(saved["metrics_bytes"] if saved else 0))  # where tell() is
            if not args.resume:
                write_file(config, json.dumps(self.args, indent=2).encode() + b"\n")
            self.csv = csv.DictWriter(self.file, columns, lineterminator="\n")
            if saved:
                torch.set_rng_state(saved["torch_rng"])
                torch.cuda.set_rng_state_all(saved["cuda_rng"])
            else:
                self.csv.writeheader()
            from torch.utils.tensorboard import SummaryWriter
            self.board = SummaryWriter(str(self.dir))
        except OSError as error:
            locked, why = isinstance(error, BlockingIOError), f"cannot write there ({error.strerror})"
            stop(f"--run-dir {self.dir}: {'another process is writing there' if locked else why}")
        except Exception as error:
            stop(f"--run-dir {self.dir}: cannot start ({error!s:.100}); if it is Weights & Biases (--track), "
                 "WANDB_MODE=offline needs no account")

    def on_signal(self, number: int, _frame: Any) -> None:
        """SIGTERM or Ctrl-C: end the program at the next `checkpoint`; the second time, at once."""
        if self.signal:
            raise SystemExit(128 + number)
        time.sleep(0.1)  # Ctrl-C ends `| tee` as well, and `timeout` sends a signal twice: that counts as one
        self.signal = number
        try:  # print may be under way
            os.write(2, b"\nends at the next checkpoint; once more ends at once\n")
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)

    def row(self, step: int, values: dict[str, float], to_csv: bool = True) -> None:
        """Numbers to TensorBoard (and W&B through it), and as a line, flushed, to metrics.csv."""
        self.check_finite(**{k: float(v) for k, v in (self.gpu | values | {"normalized_return": 0}).items()})
        try:
            if to_csv:
                self.csv.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in values.items()})
                self.file.flush()
            for name, value in values.items():
                self.board.add_scalar(name, value, step)
        except OSError as error:
            stop(f"{self.dir}: cannot be written ({error.strerror}); {self.command} goes on", status=1)

    def check_finite(self, **values: Any) -> None:
        """End the run at a number, an array or a tensor that is not finite, before it is logged or saved."""
        for name, value in values.items():
            if getattr(value, "is_cuda", False):  # for row and checkpoint, as each step would wait
                self.gpu[name] = self.gpu.get(name, 0) + 0 * value.detach()  # stays nan
            elif not torch.as_tensor(value).isfinite().all():
                stop(f"{self.dir}: {name} is not finite at step {self.step}; the last good checkpoint is of "
                     f"step {self.saved_at or '0, that is none'}", status=1)

    def checkpoint(self, state: Callable[[], dict], last: bool = False) -> None:
        """Save state() where it is time, a signal has come (which ends the program), or it is the last."""
        if self.step - self.saved_at >= self.every or self.signal or last:
            self.check_finite(**{name: float(value) for name, value in self.gpu.items()})
            here = [os.path.samefile(x, self.file.fileno()) for x in self.dir.glob("metrics.csv")]
            need(any(here), f"--run-dir {self.dir}: was deleted or moved; this run ends")
            self.file.flush()
            os.fsync(self.file.fileno())  # never behind the checkpoint
            save_checkpoint(self.dir / "checkpoint.pt", {
                **state(), "args": self.args, "step": self.step, "metrics_bytes": self.file.tell(),
                "finished": last, "torch_rng": torch.get_rng_state(),
                "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []})
            self.saved_at = self.step
        if self.signal and not last:
            self.close()
            tqdm.write(f"stopped at step {self.step}: {self.command} goes on with it", sys.stderr)
            raise SystemExit(128 + self.signal)

    def close(self) -> None:
        """Flush and close everything."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.file.close()
        self.board.close()
