"""Memory of a long run, and time and memory of reading a large dataset.

  python benchmark/speed/memory.py

The first line is resident memory at 20,000 and at 200,000 environment steps of marvel_sac_pid.py, from
scratch on a task of three observations in episodes of 100 steps, with as good as no gradient steps,
evaluations and checkpoints every 2,000 steps. The second line is read_dataset, in a process of its own, on a
million transitions of HalfCheetah's size, compressed like DSRL's.
"""
import multiprocessing
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import h5py
import numpy as np
import tyro

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import common  # noqa: E402
import marvel_sac_pid  # noqa: E402
from benchmark.speed.clock import cpu_name  # noqa: E402


@dataclass
class Args:
    first: int = 20_000
    """environment steps of the first reading, a multiple of 100"""
    last: int = 200_000
    """environment steps of the run, and of the last reading, a multiple of 100"""
    output: str = "benchmark/speed/reports/memory.md"
    """report to write"""


class Drift(gym.Env):
    """A point that drifts: the action pushes it, being far from the origin costs."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,))
    action_space = gym.spaces.Box(-1, 1, (1,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state = self.np_random.normal(size=3)
        return self.state.copy(), {}

    def step(self, action):
        self.state = 0.9 * self.state + 0.1 * float(action[0])
        return self.state.copy(), float(self.state[0]), False, False, {"cost": float(abs(self.state[1]) > 1)}


def resident_megabytes(what: str = "VmRSS") -> float:
    """Memory of this process that is in use now, or was in use at most (VmHWM)."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what)]
    return int(line.split()[1]) * 1024 / 1e6


def write_large_dataset(path: Path, n: int = 1_000_000) -> None:
    """Write n transitions of 17 observations and 6 actions."""
    rng = np.random.default_rng(0)
    sizes = dict(observations=(n, 17), next_observations=(n, 17), actions=(n, 6))
    with h5py.File(path, "w") as file:
        for key in common.DATASET_KEYS:
            array = rng.uniform(0, 1, sizes.get(key, n)).astype(np.float32).round(3)
            if key in ("terminals", "timeouts"):
                array = (np.arange(n) % 1000 == 999) & (key == "timeouts")
            file.create_dataset(key, data=array, compression="gzip")


def read_large_dataset(path: Path) -> str:
    """Read it and say what it took."""
    before, begin = resident_megabytes(), time.time()
    data = common.read_dataset(path, common.Task("HalfCheetah", 17, 6, 1000))
    seconds = time.time() - begin
    size = sum(value.nbytes for value in data.values()) / 1e6
    peak = resident_megabytes("VmHWM") - before
    return f"{len(data['costs'])} transitions, {size:.0f} MB: read in {seconds:.1f} s, {peak:.0f} MB at most"


def main(args: Args) -> None:
    common.stop_unless(0 < args.first < args.last,
                       f"--first {args.first}: must be between 0 and --last {args.last}")
    common.stop_unless(args.first % 100 == args.last % 100 == 0,
                       f"--first {args.first}, --last {args.last}: no multiples of an episode's 100 steps")
    gym.register("Drift-v0", Drift, max_episode_steps=100)
    readings, row = {}, common.Run.row

    def reading_row(run: common.Run, step: int, values: dict) -> None:
        row(run, step, values)
        if step in (args.first, args.last):
            readings[step] = resident_megabytes()

    common.Run.row = reading_row
    with tempfile.TemporaryDirectory() as folder:
        write_large_dataset(Path(folder) / "large.hdf5")
        with multiprocessing.get_context("spawn").Pool(1) as pool:  # where nothing else has had a peak
            large = pool.apply(read_large_dataset, (Path(folder) / "large.hdf5",))
        marvel_sac_pid.main(marvel_sac_pid.Args(
            env_id="Drift-v0", from_scratch=True, total_timesteps=args.last, utd=0.001, eval_every=2_000,
            eval_episodes=1, checkpoint_every=2_000, run_dir=folder + "/run"))
    first, last = (readings[step] for step in (args.first, args.last))
    text = (f"`python benchmark/speed/memory.py`, {cpu_name()}:\n\n"
            f"- a run: {first:.0f} MB at {args.first} steps, {last:.0f} MB at {args.last}: "
            f"{last - first:+.0f} MB\n"
            f"- a dataset: {large}\n")
    common.write_file(Path(args.output), text.encode())
    print(text)


if __name__ == "__main__":
    main(tyro.cli(Args))
