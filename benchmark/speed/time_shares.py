"""Where the time of the README's main command goes: a table of shares of offline training and of finetuning.

  python benchmark/speed/time_shares.py

Runs both scripts with their defaults and takes the time inside their functions, each without what it calls
of the others in the list. What is in no row is the scripts' own code and what torch does in between.
"""
import os
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import torch
import tyro

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import common  # noqa: E402
import marvel_sac_pid  # noqa: E402
import offline_pretrain  # noqa: E402
from benchmark.speed.clock import cpu_name  # noqa: E402

PARTS = {  # row: owners and names of what it counts
    "simulator": [(gym.wrappers.OrderEnforcing, "step"), (gym.wrappers.OrderEnforcing, "reset")],
    "evaluations but for the simulator": [(common, "evaluate")],
    "dataset and checkpoints": [
        (common, "read_dataset"), (common, "load_checkpoint"), (common, "save_checkpoint")],
    "metrics.csv and TensorBoard": [(common.Run, "row"), (common.Run, "close")],
    "checks that all is finite": [(common.Run, "check_finite")],
    "checks of the simulator's steps": [(common.SafeEnv, "step")],
    "replay buffer": [(script.ReplayBuffer, name) for script in (marvel_sac_pid, offline_pretrain)
                      for name in ("add", "sample")],
    "targets": [(marvel_sac_pid, "soft_targets"), (offline_pretrain, "cpq_targets")],
    "losses, forward": [(marvel_sac_pid, "critic_loss"), (marvel_sac_pid, "actor_loss"),
                        (offline_pretrain, "critic_loss"), (offline_pretrain, "actor_loss")],
    "losses, backward": [(torch.Tensor, "backward")],
    "Adam": [(torch.optim.Adam, "step"), (torch.optim.Adam, "zero_grad")],
    "target networks": [(marvel_sac_pid, "follow"), (offline_pretrain, "follow")],
}


@dataclass
class Args:
    update_steps: int = offline_pretrain.Args.update_steps
    """gradient steps of offline training"""
    total_timesteps: int = marvel_sac_pid.Args.total_timesteps
    """environment steps of finetuning"""
    vpa_steps: int = marvel_sac_pid.Args.vpa_steps
    """gradient steps of pre-alignment"""
    output: str = "benchmark/speed/reports/time_shares.md"
    """report to write"""


class Clock:
    """Seconds inside the parts, each without the parts that it calls."""

    def __init__(self):
        self.seconds, self.inside, self.since = Counter(), ["the rest"], time.perf_counter()

    def switch(self) -> None:
        """Book the time since the last switch on the part that is running."""
        now = time.perf_counter()
        self.seconds[self.inside[-1]] += now - self.since
        self.since = now

    def watch(self, part: str, owner: object, name: str) -> None:
        """Replace owner.name by one that books its time on the part."""
        original = getattr(owner, name)

        def timed(*args, **options):
            self.switch()
            self.inside.append(part)
            try:
                return original(*args, **options)
            finally:
                self.switch()
                self.inside.pop()

        setattr(owner, name, timed)


def main(args: Args) -> None:
    for name in ("update_steps", "total_timesteps", "vpa_steps"):
        common.stop_unless(getattr(args, name) > 0,
                           f"--{name.replace('_', '-')} {getattr(args, name)}: at least 1")
    clock, columns = Clock(), {}
    for part, functions in PARTS.items():
        for owner, name in functions:
            clock.watch(part, owner, name)
    with tempfile.TemporaryDirectory() as folder:
        offline = offline_pretrain.Args(update_steps=args.update_steps, run_dir=f"{folder}/offline")
        online = marvel_sac_pid.Args(total_timesteps=args.total_timesteps, vpa_steps=args.vpa_steps,
                                     checkpoint=f"{folder}/offline/checkpoint.pt", run_dir=f"{folder}/online")
        for title, script, options in (("offline_pretrain.py", offline_pretrain, offline),
                                       ("marvel_sac_pid.py", marvel_sac_pid, online)):
            clock.switch()
            clock.seconds.clear()
            script.main(options)
            clock.switch()
            columns[title] = dict(clock.seconds)
    lines = [f"`python benchmark/speed/time_shares.py`: {args.update_steps} offline updates, "
             f"{args.vpa_steps} of VPA and {args.total_timesteps} environment steps online. {cpu_name()}, "
             f"load average {os.getloadavg()[0]:.1f} at the end.", "",
             "| share of the time | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for part in [*PARTS, "the rest"]:
        shares = [100 * seconds.get(part, 0.0) / sum(seconds.values()) for seconds in columns.values()]
        lines.append(f"| {part} | " + " | ".join(f"{share:.1f} %" for share in shares) + " |")
    total = [f"{sum(seconds.values()):.0f}" for seconds in columns.values()]
    lines.append("| seconds | " + " | ".join(total) + " |")
    common.write_file(Path(args.output), ("\n".join(lines) + "\n").encode())
    print("\n".join(lines))


if __name__ == "__main__":
    main(tyro.cli(Args))
