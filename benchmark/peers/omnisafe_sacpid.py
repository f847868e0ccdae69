"""OmniSafe's SACPID (omnisafe 0.5.0) on a velocity task: what Marvel and From Scratch stand beside.

  python -m venv omnisafe && omnisafe/bin/pip install -r requirements.txt
  omnisafe/bin/pip install --no-deps -r benchmark/peers/requirements-omnisafe.txt
  omnisafe/bin/python benchmark/peers/omnisafe_sacpid.py --settings theirs
  omnisafe/bin/python benchmark/peers/omnisafe_sacpid.py --settings ours

`theirs` are OmniSafe's defaults, under which the multiplier is left alone for the first 100 epochs, 200,000
steps. `ours` are those of From Scratch (marvel_sac_pid.py) as far as OmniSafe has the option, its controller
from the first update on, with its own gains. Either is asked for the same cost limit. OmniSafe logs means of
the last ten episodes. Writes one line per 2,000 steps: env_steps, episode_return, episode_cost, cpu_seconds.
"""
import argparse
import csv
import tempfile
import time
from pathlib import Path

import omnisafe

RESULTS = Path(__file__).parent / "results"
OURS = {
    "algo_cfgs": {"start_learning_steps": 1_000, "update_cycle": 2, "policy_delay": 1, "auto_alpha": True,
                  "alpha": 0.1, "warmup_epochs": 0, "cost_normalize": False},
    "model_cfgs": {"actor": {"lr": 3e-4}, "critic": {"lr": 1e-3}},
}


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
    options = {"seed": args.seed, "lagrange_cfgs": {"cost_limit": args.cost_limit}}
    options["train_cfgs"] = {"total_steps": args.total_timesteps, "torch_threads": 1}
    if args.settings == "ours":
        options |= OURS
    with tempfile.TemporaryDirectory() as folder:
        options["logger_cfgs"] = {"log_dir": folder, "use_wandb": False, "use_tensorboard": False}
        began = time.process_time()
        agent = omnisafe.Agent("SACPID", args.env_id, custom_cfgs=options)
        agent.learn()
        seconds = time.process_time() - began
        (file,) = Path(folder).rglob("progress.csv")
        rows = list(csv.DictReader(file.open()))
    result.parent.mkdir(parents=True, exist_ok=True)
    part = result.with_suffix(".part")
    total = float(rows[-1]["Time/Total"])
    with open(part, "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["env_steps", "episode_return", "episode_cost", "cpu_seconds"])
        for row in rows:  # its log has wall seconds
            table.writerow([int(float(row["TotalEnvSteps"])), row["Metrics/EpRet"], row["Metrics/EpCost"],
                            f"{seconds * float(row['Time/Total']) / total:.1f}"])
    part.rename(result)


if __name__ == "__main__":
    main()
