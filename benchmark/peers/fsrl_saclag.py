"""FSRL's SAC-Lagrangian (fast-safe-rl 0.1.0) on a bullet task: what Marvel and From Scratch stand beside.

  python -m venv fsrl && fsrl/bin/pip install -r benchmark/peers/requirements-fsrl.txt
  fsrl/bin/python benchmark/peers/fsrl_saclag.py --settings theirs
  fsrl/bin/python benchmark/peers/fsrl_saclag.py --settings ours

It needs an environment of its own: its numpy is older than ours. `theirs` are the defaults of FSRL's training
script for bullet tasks, but for ten simulators in processes, of which there is one here. `ours` are those of
From Scratch (marvel_sac_pid.py) as far as FSRL has the option. Either is asked for the same cost limit.
Writes one line per training episode: env_steps, episode_return, episode_cost, cpu_seconds.
"""
import argparse
import csv
import time
import warnings
from pathlib import Path

warnings.filterwarnings("ignore")
import bullet_safety_gym  # noqa: E402, F401  (registers its tasks)
import gymnasium as gym  # noqa: E402
from fsrl.agent import SACLagAgent  # noqa: E402
from fsrl.config.sacl_cfg import Bullet1MCfg  # noqa: E402

RESULTS = Path(__file__).parent / "results"
BULLET = Bullet1MCfg()
SETTINGS = {
    "theirs": (
        dict(actor_lr=BULLET.actor_lr, critic_lr=BULLET.critic_lr, hidden_sizes=BULLET.hidden_sizes,
             alpha_lr=BULLET.alpha_lr, tau=BULLET.tau, n_step=BULLET.n_step, gamma=BULLET.gamma,
             unbounded=BULLET.unbounded, lagrangian_pid=BULLET.lagrangian_pid),
        dict(episode_per_collect=BULLET.episode_per_collect, update_per_step=BULLET.update_per_step,
             batch_size=BULLET.batch_size)),
    "ours": (
        dict(actor_lr=3e-4, critic_lr=1e-3, hidden_sizes=(256, 256), alpha_lr=3e-4, tau=0.005, n_step=1,
             gamma=0.99, unbounded=True),
        dict(episode_per_collect=1, update_per_step=0.5, batch_size=256)),
}


class Recorder(gym.Wrapper):
    """Writes a line per episode."""

    def __init__(self, env, file):
        super().__init__(env)
        self.file = file
        self.rows = csv.writer(file)
        self.rows.writerow(["env_steps", "episode_return", "episode_cost", "cpu_seconds"])
        self.env_steps = 0

    def reset(self, **options):
        self.episode_return = 0.0
        self.episode_cost = 0.0
        return super().reset(**options)

    def step(self, action):
        obs, reward, terminated, truncated, info = super().step(action)
        self.env_steps += 1
        self.episode_return += reward
        self.episode_cost += info["cost"]
        if terminated or truncated:
            self.rows.writerow([self.env_steps, f"{self.episode_return:.6g}", f"{self.episode_cost:.6g}",
                                f"{time.process_time():.1f}"])
            self.file.flush()
        return obs, reward, terminated, truncated, info


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--env-id", default="SafetyBallCircle-v0")
    parser.add_argument("--settings", choices=SETTINGS, default="theirs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cost-limit", type=float, default=20.0)
    parser.add_argument("--total-timesteps", type=int, default=40_000)
    args = parser.parse_args()
    agent_options, training_options = SETTINGS[args.settings]
    result = RESULTS / args.env_id / f"fsrl-{args.settings}" / f"seed{args.seed}.csv"
    result.parent.mkdir(parents=True, exist_ok=True)
    part = result.with_suffix(".part")  # renamed when the run has ended
    with open(part, "w", newline="") as file:
        env = Recorder(gym.make(args.env_id), file)
        env.reset(seed=args.seed)
        agent = SACLagAgent(env, cost_limit=args.cost_limit, seed=args.seed, thread=1, **agent_options)
        agent.learn(env, epoch=1, step_per_epoch=args.total_timesteps, save_ckpt=False, verbose=False,
                    reward_threshold=float("inf"), **training_options)
    part.rename(result)


if __name__ == "__main__":
    main()
