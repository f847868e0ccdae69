"""A picture of what an exercise should do, in under 30 seconds: python sanity.py 2

That of exercise 3 needs exercises 1 and 2. Every function below uses the scripts' own; compare
sanity_N.png with expected_N.png.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import tyro
from matplotlib.figure import Figure

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent / "benchmark/baselines")]
import common  # noqa: E402
import marvel_sac_pid  # noqa: E402

CONSTANTS = json.loads((Path(__file__).parent / "grader/variant.json").read_text())


@dataclass
class Args:
    exercise: tyro.conf.Positional[int]
    """number of the exercise"""
    output: str | None = None
    """picture to write; default sanity_N.png"""


def log_density(axes):
    actor = marvel_sac_pid.Actor(1, 1, hidden=4)
    with torch.no_grad():
        actor.head.weight.zero_()
        actor.head.bias.copy_(torch.tensor([0.6, -0.3]))
        action, log_prob = actor(torch.zeros(20_000, 1))
    action, order = action[:, 0].sort()
    density = log_prob[order].exp()
    integral = float(torch.trapezoid(density, action))
    axes.hist(action.numpy(), bins=80, density=True, alpha=0.4, label="20,000 samples")
    axes.plot(action, density, label=f"exp(log π), integral {integral:.3f}")
    axes.set(xlabel="action", ylabel="density")


class Table:
    """The same value in every state."""

    def __init__(self, *values):
        self.values = torch.tensor(values)

    def __call__(self, obs, act):
        return self.values[:, None].expand(-1, len(obs))


def critic_targets(axes):
    n = 8
    obs = torch.zeros(n, 1)
    batch = {
        "next_observations": obs,
        "rewards": torch.ones(n),
        "costs": torch.zeros(n),
        "terminals": torch.zeros(n),
        "timeouts": torch.zeros(n),
    }
    batch["terminals"][3] = 1
    batch["timeouts"][7] = 1
    targets = marvel_sac_pid.soft_targets(
        batch, lambda obs: (obs, torch.full((n,), -2.0)), Table(10.0, 12.0), Table(5.0), 0.9, 0.5, 0.25, 1.0
    )
    for k, (name, values) in enumerate(zip(("Q's target", "Qc's target"), targets, strict=True)):
        axes.bar(np.arange(n) + 0.4 * k, values, width=0.4, label=name)
    axes.set_xticks(np.arange(n) + 0.2, ["", "", "", "terminal", "", "", "", "time limit"])
    axes.set(xlabel="transition", ylabel="target")


class Walk(gym.Env):
    """A number that actions push; a step costs what it is beyond 1, 50 steps an episode."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (1,))
    action_space = gym.spaces.Box(-1, 1, (1,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state = self.np_random.uniform(-2, 2, 1).astype(np.float32)
        return self.state, {}

    def step(self, action):
        self.state = (0.9 * self.state + 0.3 * action).astype(np.float32)
        return self.state, float(action[0]), False, False, {"cost": float(max(0.0, abs(self.state[0]) - 1))}


def value_pre_alignment(axes):
    gym.register("Walk-v0", Walk, max_episode_steps=50)
    gamma = 0.9
    env, task = common.make_env("Walk-v0")
    draw = np.random.default_rng(0)
    rows = []
    for episode in range(200):
        obs, _ = env.reset(seed=episode)
        truncated = False
        while not truncated:
            action = draw.uniform(-1, 1, 1).astype(np.float32)
            next_obs, reward, _, truncated, info = env.step(action)
            rows.append((obs, next_obs, action, reward, info["cost"], False, truncated))
            obs = next_obs
    dataset = {
        key: torch.tensor(np.array(values, np.float32))
        for key, values in zip(common.DATASET_KEYS, zip(*rows, strict=True), strict=True)
    }
    # the script's own main on that data; its first policy stands in for an offline one
    patched = {
        "find_dataset": lambda *args: Path(__file__),
        "read_dataset": lambda *args: dict(dataset),
        "load_weights": lambda *args, **networks: None,
    }
    kept = {name: getattr(common, name) for name in patched}
    for name, stand_in in patched.items():
        setattr(common, name, stand_in)
    marvel_sac_pid.aligned_multipliers = lambda *networks: (1.0, 1.0)  # of exercise 6: not looked at here
    run_dir = Path(__file__).parent / "runs/sanity"
    marvel_sac_pid.main(
        marvel_sac_pid.Args(
            env_id="Walk-v0",
            run_dir=str(run_dir),
            overwrite=True,
            total_timesteps=0,
            vpa_steps=1500,
            gamma=gamma,
            batch_size=128,
            vpa_alpha=0.0,
            vpa_alpha_cost=0.0,
            eval_episodes=1,
            lagrange_init=0.0,
        )
    )
    for name, own in kept.items():
        setattr(common, name, own)
    checkpoint = common.load_checkpoint(run_dir / "checkpoint.pt")
    actor, qc = marvel_sac_pid.Actor(1, 1), marvel_sac_pid.Critic(1, 1, 1)
    actor.load_state_dict(checkpoint["actor"])
    qc.load_state_dict(checkpoint["qc"])
    policy = actor.numpy_policy()
    estimated, met = [], []
    for episode in range(40):
        obs, _ = env.reset(seed=1000 + episode)
        action = policy(obs, draw)
        with torch.no_grad():
            estimated.append(float(qc(torch.tensor(obs)[None], torch.tensor(action)[None])))
        discounted = 0.0
        for k in range(50):
            obs, _, _, _, info = env.step(action)
            discounted += gamma**k * info["cost"]
            action = policy(obs, draw)
        met.append(discounted)
    largest = max(met + estimated)
    axes.plot([0, largest], [0, largest], "k:", label="the same")
    axes.plot(met, estimated, "o", label="40 first states")
    axes.set(xlabel="discounted cost that the policy meets", ylabel="Qc after VPA")


def pid(axes):
    law = marvel_sac_pid.PIDLagrangian(20.0, kp=0.15, ki=6e-4, kd=0.15, cost_unit=20.0)
    draw = np.random.default_rng(0)
    costs, multipliers = [], []
    level = 60.0
    for _ in range(150):
        level += 0.2 * (70 / (1 + 3 * law.multiplier) - level)  # a policy that follows the multiplier slowly
        cost = max(0.0, level + 3 * draw.standard_normal())
        costs.append(cost)
        multipliers.append(100 * law.update(cost, gradient_steps=100))
    axes.plot(costs, label="episode cost")
    axes.plot(multipliers, label="100 λ")
    axes.axhline(20, color="black", linestyle=":", label="limit")
    axes.set(xlabel="block")


class Line(torch.nn.Module):
    """A policy that knows one action."""

    def __init__(self):
        super().__init__()
        self.action = torch.nn.Parameter(torch.tensor(0.0))

    def forward(self, obs):
        return self.action.expand(len(obs), 1), torch.zeros(len(obs))


def lagrangian(axes):
    def q(obs, act):
        return -(act - 1).square().T  # best at 1

    def qc(obs, act):
        return act.square().T  # safest at 0

    multipliers = np.linspace(0, 5, 11)
    found = []
    for multiplier in multipliers:
        actor = Line()
        optimizer = torch.optim.SGD(actor.parameters(), lr=0.2)
        for _ in range(200):
            loss, _ = marvel_sac_pid.actor_loss(torch.zeros(4, 1), actor, q, qc, 0.1, float(multiplier))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        found.append(actor.action.item())
    axes.plot(multipliers, found, "o-", label="the action that is learned")
    axes.plot(multipliers, 1 / (1 + multipliers), "k:", label="1 / (1 + λ), the exact one")
    axes.set(xlabel="λ", ylabel="action")


def aligned(axes):
    angles = np.linspace(0, 120, 25)
    rows = []
    for angle in np.deg2rad(angles):
        slope = torch.tensor([2 * np.cos(angle), 2 * np.sin(angle)], dtype=torch.float)
        rows.append(
            marvel_sac_pid.aligned_multipliers(
                torch.zeros(64, 1),
                lambda obs: (torch.zeros(len(obs), 2), None),
                lambda obs, act, slope=slope: (act @ slope)[None],
                lambda obs, act: act[:, :1].T * 1.0,
            )
        )
    for values, name in zip(zip(*rows, strict=True), ("first", "second"), strict=True):
        axes.plot(angles, values, "o-", label=f"{name} multiplier")
    axes.set(xlabel="angle between the gradients, degrees", ylabel="λ")


def penalty(axes):
    import cpq

    class Vae:
        def encode(self, obs, act):
            return None, None, 5 * (act[:, 0].abs() > 0.5).float()  # unknown beyond 0.5

    torch.manual_seed(0)
    threshold = 10.0
    qc = marvel_sac_pid.Critic(1, 1, 1, hidden=64)
    optimizer = torch.optim.Adam(qc.parameters(), 3e-3)
    for _ in range(800):
        obs, act = torch.zeros(64, 1), torch.rand(64, 1) - 0.5
        shortfall, _ = cpq.ood_shortfall(
            obs, lambda obs: (2 * torch.rand(len(obs), 1) - 1, None), Vae(), qc, 4, 1.0, threshold
        )
        loss = (qc(obs, act) - 3).square().mean() + shortfall  # the data costs 3
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    actions = torch.linspace(-1, 1, 101)[:, None]
    axes.plot(actions[:, 0], qc(torch.zeros(101, 1), actions)[0].detach(), label="Qc")
    axes.axhline(CONSTANTS["hinge"] * threshold, color="black", linestyle=":", label="where the penalty ends")
    axes.axvspan(-0.5, 0.5, alpha=0.2, label="known actions")
    axes.set(xlabel="action", ylabel="Qc")


PICTURES = [log_density, critic_targets, value_pre_alignment, pid, lagrangian, aligned, penalty]


def main(args: Args) -> None:
    common.stop_unless(1 <= args.exercise <= len(PICTURES), f"exercises are 1 to {len(PICTURES)}")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.add_subplot()
    try:
        PICTURES[args.exercise - 1](axes)
    except NotImplementedError as unwritten:
        common.stop(f"{unwritten} is still to be written")
    axes.legend()
    output = args.output or f"sanity_{args.exercise}.png"
    figure.savefig(output, dpi=80)
    print(output)


if __name__ == "__main__":
    main(tyro.cli(Args))
