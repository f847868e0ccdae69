"""OmniSafe's SACPID (omnisafe 0.5.0) on a velocity task: what Marvel and From Scratch stand beside.

  python -m venv omnisafe && omnisafe/bin/pip install -r requirements.txt
  omnisafe/bin/pip install --no-deps -r benchmark/peers/requirements-omnisafe.txt
  omnisafe/bin/python benchmark/peers/omnisafe_sacpid.py --settings theirs
  omnisafe/bin/python benchmark/peers/omnisafe_sacpid.py --settings ours

`theirs` are OmniSafe's defaults, under which the multiplier is left alone for the first 100 epochs, 200,000
steps. `ours` are those of From Scratch (marvel_sac_pid.py) as far as OmniSafe has the option: its controller,
with its own gains, from the second epoch of 2,000 steps on. Either is asked for the same cost limit. Writes
one line per training episode: env_steps, episode_return, episode_cost, cpu_seconds (with the evaluation
episode that OmniSafe plays after every epoch).
"""
import argparse
import csv
import tempfile
import time
from pathlib import Path

import omnisafe
import safety_gymnasium

RESULTS = Path(__file__).parent / "results"
OURS = {
    "algo_cfgs": {"start_learning_steps": 1_000, "update_cycle": 2, "policy_delay": 1, "auto_alpha": True,
                  "alpha": 0.1, "warmup_epochs": 0, "cost_normalize": False},
    "model_cfgs": {"actor": {"lr": 3e-4}, "critic": {"lr": 1e-3}},
}


class Recorder:
    """A simulator that writes a line per episode; its step returns the cost as the third of six values."""

    def __init__(self, env, file):
        self.env = env
        self.file = file
        self.rows = csv.writer(file)
        self.rows.writerow(["env_steps", "episode_return", "episode_cost", "cpu_seconds"])
        self.env_steps = 0
        self.episode_return = 0.0
        self.episode_cost = 0.0

    def __getattr__(self, name):
        return getattr(self.env, name)

    def step(self, action):
        result = self.env.step(action)
        _, reward, cost, terminated, truncated, _ = result
        self.env_steps += 1
        self.episode_return += reward
        self.episode_cost += cost
        if terminated or truncated:
            self.rows.writerow([self.env_steps, f"{self.episode_return:.6g}", f"{self.episode_cost:.6g}",
                                f"{time.process_time():.1f}"])
            self.file.flush()
            self.episode_return = 0.0
            self.episode_cost = 0.0
        return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--env-id", default="SafetyHalfCheetahVelocity-v1")
    parser.add_argument("--settings", choices=("theirs", "ours"), default="theirs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cost-limit", type=float, default=20.0)
    parser.add_argument("--total-timesteps", type=int, default=40_000)
    args = parser.parse_args()
    task = args.env_id.replace("-v", "Gymnasium-v")  # Safety-Gymnasium's name of the task as Gymnasium has it
    result = RESULTS / task / f"omnisafe-{args.settings}" / f"seed{args.seed}.csv"
    result.parent.mkdir(parents=True, exist_ok=True)
    part = result.with_suffix(".part")  # renamed when the run has ended
    options = {"seed": args.seed, "lagrange_cfgs": {"cost_limit": args.cost_limit}}
    options["train_cfgs"] = {"total_steps": args.total_timesteps, "torch_threads": 1}
    if args.settings == "ours":
        options |= OURS
    with tempfile.TemporaryDirectory() as folder, open(part, "w", newline="") as file:
        options["logger_cfgs"] = {"log_dir": folder, "use_wandb": False, "use_tensorboard": False}
        make, made = safety_gymnasium.make, []

        def recorded(*names, **given):
            """The first simulator that OmniSafe makes is the one that it trains in, the second evaluates."""
            made.append(make(*names, **given))
            return Recorder(made[0], file) if len(made) == 1 else made[-1]

        safety_gymnasium.make = recorded
        omnisafe.Agent("SACPID", args.env_id, custom_cfgs=options).learn()
    part.rename(result)


if __name__ == "__main__":
    main()
