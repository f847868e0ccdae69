"""Makes bullet_safety_gym usable under pytest; tiny data, options and runs for all tests."""

import contextlib
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

# bullet_safety_gym 1.4.0 hides PyBullet's messages, at its import and in every environment it makes, through
# the C stream called like sys.stderr or sys.stdout. Under pytest's capture no C stream has their names.
captured, sys.stderr = sys.stderr, sys.__stderr__
try:
    from bullet_safety_gym.envs import builder
finally:
    sys.stderr = captured
builder.RedirectStream = contextlib.nullcontext

ROOT = Path(__file__).resolve().parents[1]
TASK = "SafetyBallCircle-v0"
TINY_OFFLINE = dict(update_steps=60, batch_size=32, eval_every=30, eval_episodes=1)
TINY_MARVEL = dict(total_timesteps=400, vpa_steps=30, batch_size=32, eval_every=200, eval_episodes=1)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    import torch

    torch.set_num_threads(1)


def random_transitions(env_id, episodes, seed):
    """Uniform actions in the simulator: a dataset's arrays, in DSRL's dtypes."""
    import common

    env, task = common.make_env(env_id)
    rng, rows = np.random.default_rng(seed), []
    for k in range(episodes):
        obs, _ = env.reset(seed=seed + k)
        done = False
        while not done:
            action = rng.uniform(-1, 1, task.act_dim).astype(np.float32)
            next_obs, reward, terminated, truncated, info = env.step(action)
            rows.append((obs, next_obs, action, reward, info["cost"], terminated, truncated))
            obs = next_obs
            done = terminated or truncated
    env.close()
    columns = zip(common.DATASET_KEYS, zip(*rows, strict=True), strict=True)
    return {key: np.array(values, bool if key.startswith("t") else np.float32) for key, values in columns}


@pytest.fixture(scope="session")
def ball_data():
    """Three episodes of BallCircle, 600 transitions, in a dict of arrays; tests must not change it."""
    data = random_transitions(TASK, episodes=3, seed=0)
    for array in data.values():
        array.setflags(write=False)
    return data


@pytest.fixture(scope="session")
def ball_file(ball_data, tmp_path_factory):
    """The same as a file."""
    from benchmark.tools.export_dataset import write_dataset

    path = tmp_path_factory.mktemp("data") / "ball.hdf5"
    write_dataset(path, ball_data, {"task": TASK})
    return path


@pytest.fixture(scope="session")
def ball_task():
    import common

    env, task = common.make_env(TASK)
    env.close()
    return task


@pytest.fixture(autouse=True)
def signal_handlers():
    """A run that a test cuts short leaves its handlers, which Ctrl-C and the next run's lock would feel."""
    import common

    before = {number: signal.getsignal(number) for number in common.SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def refusal(capsys):
    """refusal(function, *arguments): checks exit status 2 and one line on stderr, and returns it."""

    def check(function, *arguments, **options):
        capsys.readouterr()
        with warnings.catch_warnings(), pytest.raises(SystemExit) as stopped:
            warnings.simplefilter("error")  # on a terminal a warning would be a second line
            warnings.simplefilter("ignore", ResourceWarning)
            function(*arguments, **options)
        return single_line(stopped.value.code, capsys.readouterr().err)

    return check


def single_line(status, stderr):
    assert status == 2
    assert stderr.startswith("error: ") and stderr.endswith("\n")
    assert len(stderr.splitlines()) == 1, stderr
    return stderr.strip()


def run_script(script, *options, cwd, env=None):
    """Run a script of the repository as a user does; (returncode, stdout, stderr)."""
    run = subprocess.run(
        [sys.executable, str(ROOT / script), *map(str, options)], cwd=cwd, capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}, timeout=300)
    return run.returncode, run.stdout, run.stderr


def played(run_dir, task):
    """The training episodes in a run's checkpoint, exported to a file beside the folder and read from it."""
    import common
    from benchmark.tools import export_dataset

    file = Path(f"{run_dir}.hdf5")
    export_dataset.main(export_dataset.Args(checkpoint=f"{run_dir}/checkpoint.pt", output=str(file)))
    return common.read_dataset(file, task)


def command_line(options):
    """{"update_steps": 60} -> ["--update-steps", "60"]."""
    return [str(word) for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]


def parameters(networks):
    """{"q.weights.0": array, ...} of a checkpoint's networks, to compare them at once."""
    return {f"{network}.{name}": value.numpy().copy() for network, state in networks.items()
            for name, value in state.items()}


def same(a, b):
    """Whether two dicts of arrays are equal, bit for bit."""
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


class Payload:
    """Unpickled without care, this creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")
