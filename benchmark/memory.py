"""Memory of a long run: resident megabytes at 20,000 and at 200,000 environment steps of a tiny environment.

  python benchmark/memory.py

Runs marvel_sac_pid.py from scratch on a task of three observations in episodes of 100 steps, with as good as
no gradient steps, evaluations and checkpoints every 2,000 steps, and reads the resident memory in between.
"""
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import numpy as np
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import common  # noqa: E402
import marvel_sac_pid  # noqa: E402


@dataclass
class Args:
    first: int = 20_000
    """environment steps of the first reading"""
    last: int = 200_000
    """environment steps of the run, and of the last reading"""


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


def resident_megabytes() -> float:
    """Memory of this process that is in use now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def main(args: Args) -> None:
    common.need(0 < args.first < args.last, f"--first {args.first}: must be between 0 and --last {args.last}")
    gym.register("Drift-v0", Drift, max_episode_steps=100)
    readings, row = {}, common.Run.row

    def reading_row(run: common.Run, step: int, values: dict) -> None:
        row(run, step, values)
        if step in (args.first, args.last):
            readings[step] = resident_megabytes()

    common.Run.row = reading_row
    with tempfile.TemporaryDirectory() as folder:
        marvel_sac_pid.main(marvel_sac_pid.Args(
            env_id="Drift-v0", from_scratch=True, total_timesteps=args.last, utd=0.001, eval_every=2_000,
            eval_episodes=1, checkpoint_every=2_000, run_dir=folder + "/run"))
    first, last = (readings[step] for step in (args.first, args.last))
    print(f"{first:.0f} MB at {args.first} steps, {last:.0f} MB at {args.last}: {last - first:+.0f} MB")


if __name__ == "__main__":
    main(tyro.cli(Args))
