"""How fast the scripts are on this CPU, on one thread: gradient steps, acting, the simulator, the whole loop.

  python benchmark/speed/throughput.py                # three to four minutes
  python benchmark/speed/throughput.py --peer osrl    # OSRL's trainer too, if its sources are on PYTHONPATH

Every version runs for one short slice in every round, in shuffled order, and ratios are taken inside a round:
what else the machine does then falls on all of them. An update is timed as in the scripts' loops, with the
drawing of its batch, without logging and progress bar, against

  plain            the same update as one writes it first: a network per critic, torch.distributions, Adam as
                   it comes, a loop over the target's parameters. A test holds its results to the script's
  matrix products  nothing but the products of the script's update, forward and backward, into memory that is
                   there before: the floor
  OSRL             its BEAR-Lag trainer on one batch that is ready, and with its DataLoader (no workers):
                   settings of its examples, our batch size. It is not the same function (methods.md)
"""
import contextlib
import io
import math
import os
import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Literal

import tyro

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before numpy: a second pool of threads slows both down
import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn as nn  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch.distributions import Normal, TanhTransform, kl_divergence  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import common  # noqa: E402
import marvel_sac_pid as marvel  # noqa: E402
import offline_pretrain as offline  # noqa: E402
from benchmark.baselines import bear_lag  # noqa: E402
from benchmark.speed.clock import cpu_name, measure, spread  # noqa: E402

BULLET, MUJOCO = "SafetyBallCircle-v0", "SafetyHalfCheetahVelocityGymnasium-v1"
BALL = common.Task(BULLET, obs_dim=8, act_dim=2, max_episode_steps=200)
CAPTION = """Made by `python benchmark/speed/throughput.py{option}`.

{cpu}, one thread, torch {torch}, load average {load} at the end; {rounds} rounds of {slice_seconds:g} s.
Updates and acting: {obs_dim} observations, {act_dim} actions, batch {batch}, networks of 256 x 256, from
random networks on, on BallCircle's dataset.

A cell is minimum / **median** / maximum over rounds. *script / this*: how many times as fast as the version
of this row the script's own is; for matrix products that is the share of the floor that the script reaches.

| what | version | per second | per CPU second | µs of CPU each | script / this | script / this, CPU |
|---|---|---|---|---|---|---|
"""


@dataclass
class Args:
    rounds: int = 25
    """rounds; in each, every version runs once"""
    slice_seconds: float = 0.4
    """seconds that a version runs in one round, at least one step"""
    obs_dim: int = 8
    """observations in the updates and in acting; 8 are BallCircle's, beyond that they repeat"""
    act_dim: int = 2
    """actions in the updates and in acting; 2 are BallCircle's, beyond that they repeat"""
    output: str = "benchmark/speed/reports/throughput.md"
    """file of the table"""
    peer: Literal["osrl"] | None = None
    """another project whose trainers are timed as well"""


def transitions(obs_dim: int, act_dim: int) -> dict[str, torch.Tensor]:
    """BallCircle's shipped dataset, rewards scaled; its columns repeat where more than it has are asked for.

    Noise would not do: more units die of it, whose moments in Adam decay to denormal numbers, which are slow.
    """
    data = common.read_dataset(common.SHIPPED_DATASETS / f"{BULLET}.hdf5", BALL)
    data["rewards"] *= marvel.Args.reward_scale
    for key, width in ("observations", obs_dim), ("next_observations", obs_dim), ("actions", act_dim):
        data[key] = data[key][:, torch.arange(width) % data[key].shape[1]]
    return data


# --- The scripts' updates ---
# In the scripts they are steps of main. Here they are put together from the scripts' own functions, as main
# does it; a test trains both and finds the same parameters, bit for bit.
def start(obs_dim: int, act_dim: int, args: marvel.Args, vae: bool = True) -> SimpleNamespace:
    """What updates work on: the networks, in the order in which main makes them, threshold and controller."""
    limit, horizon = offline.Args(), BALL.max_episode_steps
    s = SimpleNamespace(actor=offline.Actor(obs_dim, act_dim), q=offline.Critic(2, obs_dim, act_dim),
                        qc=offline.Critic(1, obs_dim, act_dim))
    if vae:
        s.vae = bear_lag.VAE(obs_dim, act_dim)
    for name in ("q", "qc", "actor"):
        setattr(s, f"{name}_target", deepcopy(getattr(s, name)).requires_grad_(False))
    s.qc_threshold = limit.cost_limit / horizon * (1 - limit.gamma**horizon) / (1 - limit.gamma)
    s.largest_cost = 1.0  # of a step
    s.controller = marvel.PIDLagrangian(args.cost_limit, args.kp, args.ki, args.kd, margin=args.cost_margin,
                                        cost_unit=args.cost_limit, adapt_rate=args.adapt_rate,
                                        lagrange_max=args.lagrange_max)
    s.controller.start(0.5 if isinstance(args.lagrange_init, str) else args.lagrange_init)
    return s


def check_finite(metrics: dict) -> None:
    """The scripts' run.check_finite, without a run."""
    common.Run.check_finite(None, metrics)


def step(optimizer: torch.optim.Optimizer, loss: torch.Tensor, **options) -> None:
    """The three lines of a gradient step in the scripts."""
    optimizer.zero_grad()
    loss.backward(**options)
    optimizer.step()


def critic_adam(args, s: SimpleNamespace) -> torch.optim.Adam:
    """The optimiser of both critics."""
    return torch.optim.Adam([*s.q.parameters(), *s.qc.parameters()], args.critic_lr, fused=True)


def offline_update(args: offline.Args, s: SimpleNamespace) -> Callable[[dict], dict]:
    """The update of offline_pretrain.py: a batch in, what main logs out."""
    critic_optimizer = critic_adam(args, s)
    actor_optimizer = torch.optim.Adam(s.actor.parameters(), args.actor_lr, fused=True)
    s.average = deepcopy(s.actor)
    s.steps = 0

    def update(batch):
        s.steps += 1
        targets = offline.cpq_targets(batch, s.actor, s.q_target, s.qc_target, args.gamma, s.qc_threshold,
                                      s.largest_cost)
        loss, metrics = offline.critic_loss(batch, s.q, s.qc, *targets)
        step(critic_optimizer, loss)
        loss, actor_metrics = offline.actor_loss(batch, s.actor, s.q, s.qc, s.qc_threshold, args.bc_weight)
        step(actor_optimizer, loss, inputs=list(s.actor.parameters()))
        metrics |= actor_metrics
        offline.follow(s.q_target, s.q, args.tau)
        offline.follow(s.qc_target, s.qc, args.qc_tau)
        offline.follow(s.average, s.actor, max(args.actor_tau, 1 / s.steps))
        check_finite(metrics)
        return metrics

    return update


def bear_lag_update(args: bear_lag.Args, s: SimpleNamespace) -> Callable[[dict], dict]:
    """The update of bear_lag.py."""
    critic_optimizer = critic_adam(args, s)
    actor_optimizer = torch.optim.Adam(s.actor.parameters(), args.actor_lr, fused=True)
    vae_optimizer = torch.optim.Adam(s.vae.parameters(), args.vae_lr, fused=True)
    controller = bear_lag.CriticPID(args.kp, args.ki, args.kd)
    s.log_mmd_weight = log_mmd_weight = torch.zeros((), requires_grad=True)
    mmd_optimizer = torch.optim.Adam([log_mmd_weight], args.critic_lr)

    def update(batch):
        vae_loss, _ = s.vae.loss(batch["observations"], batch["actions"], args.vae_beta)
        step(vae_optimizer, vae_loss)
        targets = bear_lag.bear_targets(batch, s.actor_target, s.q_target, s.qc_target, args.gamma,
                                        args.bear_actions, s.largest_cost)
        loss, metrics = bear_lag.critic_loss(batch, s.q, s.qc, *targets)
        step(critic_optimizer, loss)
        loss, policy_qc, distance = bear_lag.bear_loss(
            batch["observations"], s.actor, s.vae, s.q, s.qc, args.bear_actions, controller.multiplier,
            log_mmd_weight.detach().exp())
        step(actor_optimizer, loss, inputs=list(s.actor.parameters()))
        metrics |= {"vae_loss": vae_loss.detach(), "actor_loss": loss.detach(), "policy_qc": policy_qc,
                    "mmd": distance}
        controller.update(policy_qc.item() - s.qc_threshold)
        step(mmd_optimizer, -log_mmd_weight.exp() * (distance - args.mmd_limit))
        log_mmd_weight.data.clamp_(bear_lag.LOG_MMD_WEIGHT_MIN, bear_lag.LOG_MMD_WEIGHT_MAX)
        metrics |= {"lagrange_multiplier": controller.multiplier, "mmd_weight": log_mmd_weight.detach().exp()}
        for name in ("q", "qc", "actor"):
            bear_lag.follow(getattr(s, f"{name}_target"), getattr(s, name), args.tau)
        check_finite(metrics)
        return metrics

    return update


def vpa_update(args: marvel.Args, s: SimpleNamespace) -> Callable[[dict], dict]:
    """One step of value pre-alignment."""
    critic_optimizer = critic_adam(args, s)

    def update(batch):
        targets = marvel.soft_targets(batch, s.actor, s.q_target, s.qc_target, args.gamma, args.vpa_alpha,
                                      args.vpa_alpha_cost, s.largest_cost)
        loss, metrics = marvel.critic_loss(batch, s.q, s.qc, *targets)
        step(critic_optimizer, loss)
        marvel.follow(s.q_target, s.q, args.vpa_tau)
        marvel.follow(s.qc_target, s.qc, args.vpa_tau)
        check_finite(metrics)
        return metrics

    return update


def online_update(args: marvel.Args, s: SimpleNamespace) -> Callable[[dict], dict]:
    """One gradient step of online SAC: critics, actor, entropy weight, target networks, average."""
    critic_optimizer = critic_adam(args, s)
    actor_optimizer = torch.optim.Adam(s.actor.parameters(), args.actor_lr, fused=True)
    s.log_alpha = log_alpha = torch.tensor(math.log(max(args.alpha, 1e-8)), requires_grad=True)
    alpha_optimizer = torch.optim.Adam([log_alpha], args.actor_lr)
    target_entropy = -(s.actor.head.out_features // 2)
    s.average = deepcopy(s.actor).requires_grad_(False)

    def update(batch):
        alpha = log_alpha.detach().exp()
        targets = marvel.soft_targets(batch, s.actor, s.q_target, s.qc_target, args.gamma, alpha, 0.0,
                                      s.largest_cost)
        loss, metrics = marvel.critic_loss(batch, s.q, s.qc, *targets)
        step(critic_optimizer, loss)
        loss, log_prob = marvel.actor_loss(batch["observations"], s.actor, s.q, s.qc, alpha,
                                           s.controller.multiplier)
        step(actor_optimizer, loss, inputs=list(s.actor.parameters()))
        metrics |= {"actor_loss": loss.detach(), "alpha": alpha, "entropy": -log_prob.mean()}
        if args.autotune:
            step(alpha_optimizer, -(log_alpha.exp() * (log_prob + target_entropy)).mean())
        marvel.follow(s.q_target, s.q, args.tau)
        marvel.follow(s.qc_target, s.qc, args.tau)
        marvel.follow(s.average, s.actor, args.actor_tau)
        check_finite(metrics)
        return metrics

    return update


def online_loop(args: marvel.Args, s: SimpleNamespace, env_id: str) -> Callable[[], None]:
    """The online loop of marvel_sac_pid.py: a call plays one episode, then makes its gradient steps."""
    env, task = common.make_env(env_id)
    update, rng, policy = online_update(args, s), np.random.default_rng(args.seed), s.average.numpy_policy()
    buffer = marvel.ReplayBuffer(task.obs_dim, task.act_dim, torch.device("cpu"))

    def block():
        first, episode_cost, done = buffer.size, 0.0, False
        obs, _ = env.reset(seed=rng.integers(2**31))
        while not done:
            action = policy(obs, rng)
            next_obs, reward, terminated, truncated, info = env.step(action)
            buffer.add(observations=obs, next_observations=next_obs, actions=action,
                       rewards=args.reward_scale * reward, costs=info["cost"], terminals=terminated,
                       timeouts=truncated)
            s.largest_cost = max(s.largest_cost, info["cost"])
            obs, done = next_obs, terminated or truncated
            episode_cost += info["cost"]
        gradient_steps = int(args.utd * buffer.size) - int(args.utd * first)
        s.controller.update(episode_cost, gradient_steps=gradient_steps)
        for _ in range(gradient_steps):
            update(buffer.sample(args.batch_size))

    return block


# --- The same updates, plainly ---
class PlainActor(nn.Module):
    """CleanRL's SAC actor, with the weights of ours: a head for the mean and one for the log std."""

    def __init__(self, actor: nn.Module):
        super().__init__()
        self.fc1, self.fc2 = deepcopy(actor.fc1), deepcopy(actor.fc2)
        act_dim = actor.head.out_features // 2
        self.fc_mean, self.fc_logstd = (nn.Linear(actor.head.in_features, act_dim) for _ in range(2))
        self.fc_mean.weight.data, self.fc_logstd.weight.data = deepcopy(actor.head.weight.data).split(act_dim)
        self.fc_mean.bias.data, self.fc_logstd.bias.data = deepcopy(actor.head.bias.data).split(act_dim)

    def normal(self, obs):
        x = F.relu(self.fc2(F.relu(self.fc1(obs))))
        return Normal(self.fc_mean(x), self.fc_logstd(x).clamp(-5, 2).exp())

    def forward(self, obs):
        normal = self.normal(obs)
        u = normal.rsample()
        act = torch.tanh(u)
        return act, (normal.log_prob(u) - TanhTransform().log_abs_det_jacobian(u, act)).sum(-1)


def separate(critic: nn.Module) -> nn.ModuleList:
    """A stacked critic as one network of its own per member."""
    members = nn.ModuleList()
    for k in range(len(critic.weights[0])):
        layers = []
        for weight, bias in zip(critic.weights, critic.biases, strict=True):
            layers += [nn.Linear(*weight.shape[1:]), nn.ReLU()]
            layers[-2].weight.data = weight.data[k].T.clone(memory_format=torch.contiguous_format)
            layers[-2].bias.data = bias.data[k, 0].clone()
        members.append(nn.Sequential(*layers[:-1]))
    return members


def plain_start(s: SimpleNamespace) -> SimpleNamespace:
    """Plain networks with the parameters of ours."""
    return SimpleNamespace(
        actor=PlainActor(s.actor), actor_target=PlainActor(s.actor_target), encoder=deepcopy(s.vae.encoder),
        decoder=deepcopy(s.vae.decoder), q=separate(s.q), q_target=separate(s.q_target), qc=separate(s.qc),
        qc_target=separate(s.qc_target), qc_threshold=s.qc_threshold, largest_cost=s.largest_cost,
        controller=s.controller)


def values(critics, obs, act):
    return torch.stack([critic(torch.cat([obs, act], 1)).squeeze(1) for critic in critics])


def descend(loss, optimizer):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def polyak(network, target, tau):
    for param, target_param in zip(network.parameters(), target.parameters(), strict=True):
        target_param.data.copy_(tau * param.data + (1 - tau) * target_param.data)


def plain_critics(args, p: SimpleNamespace) -> Callable[..., dict]:
    """A gradient step of every critic towards the targets y and yc."""
    q_optimizer = torch.optim.Adam(p.q.parameters(), lr=args.critic_lr)
    qc_optimizer = torch.optim.Adam(p.qc.parameters(), lr=args.critic_lr)

    def update(batch, y, yc, penalty=0.0):
        q_loss = sum(F.mse_loss(q, y) for q in values(p.q, batch["observations"], batch["actions"]))
        qc_loss = sum(F.mse_loss(qc, yc) for qc in values(p.qc, batch["observations"], batch["actions"]))
        descend(q_loss, q_optimizer)
        descend(qc_loss + penalty, qc_optimizer)
        return dict(q_loss=q_loss, qc_loss=qc_loss, q_mean=y.mean(), qc_mean=yc.mean())

    return update


def plain_soft_critics(args: marvel.Args, p: SimpleNamespace) -> Callable[..., dict]:
    """SAC's update of the critics, with entropy weights for reward and cost."""
    fit = plain_critics(args, p)

    def update(batch, policy, alpha, alpha_cost, tau):
        with torch.no_grad():
            next_act, log_prob = policy(batch["next_observations"])
            q = values(p.q_target, batch["next_observations"], next_act).min(0).values - alpha * log_prob
            qc = values(p.qc_target, batch["next_observations"], next_act).mean(0)
            qc = qc.clamp(0, p.largest_cost / (1 - args.gamma)) - alpha_cost * log_prob
            y = batch["rewards"] + (1 - batch["terminals"]) * args.gamma * q
            yc = batch["costs"] + (1 - batch["terminals"]) * args.gamma * qc
        losses = fit(batch, y, yc)
        polyak(p.q, p.q_target, tau)
        polyak(p.qc, p.qc_target, tau)
        return losses

    return update


def plain_vpa(args: marvel.Args, p: SimpleNamespace) -> Callable[[dict], dict]:
    """One step of value pre-alignment."""
    update = plain_soft_critics(args, p)
    return lambda batch: update(batch, p.actor, args.vpa_alpha, args.vpa_alpha_cost, args.vpa_tau)


def plain_online(args: marvel.Args, p: SimpleNamespace) -> Callable[[dict], dict]:
    """One gradient step of SAC-Lagrangian."""
    update_critics = plain_soft_critics(args, p)
    actor_optimizer = torch.optim.Adam(p.actor.parameters(), lr=args.actor_lr)
    p.log_alpha = torch.tensor(math.log(args.alpha), requires_grad=True)
    alpha_optimizer = torch.optim.Adam([p.log_alpha], lr=args.actor_lr)
    p.average = deepcopy(p.actor)

    def update(batch):
        obs, alpha, multiplier = batch["observations"], p.log_alpha.exp().item(), p.controller.multiplier
        losses = update_critics(batch, p.actor, alpha, 0.0, args.tau)
        act, log_prob = p.actor(obs)
        q, qc = values(p.q, obs, act).min(0).values, values(p.qc, obs, act).mean(0)
        actor_loss = ((alpha * log_prob - q + multiplier * qc) / (1 + multiplier)).mean()
        descend(actor_loss, actor_optimizer)
        descend((-p.log_alpha.exp() * (log_prob.detach() - act.shape[1])).mean(), alpha_optimizer)
        polyak(p.actor, p.average, args.actor_tau)
        return losses | dict(actor_loss=actor_loss, entropy=-log_prob.mean())

    return update


def plain_vae(args: bear_lag.Args, p: SimpleNamespace) -> tuple[Callable, Callable]:
    """The VAE's KL (batch,) of an action with its posterior, and its gradient step."""
    vae_optimizer = torch.optim.Adam([*p.encoder.parameters(), *p.decoder.parameters()], lr=args.vae_lr)

    def encode(obs, act):
        mean, log_std = p.encoder(torch.cat([obs, act], 1)).chunk(2, 1)
        posterior = Normal(mean, log_std.clamp(-4, 15).exp())
        return kl_divergence(posterior, Normal(0.0, 1.0)).sum(1), posterior

    def update(obs, act):
        kl, posterior = encode(obs, act)
        reconstruction = p.decoder(torch.cat([obs, posterior.rsample()], 1))
        loss = ((reconstruction - act) ** 2).sum(1).mean() + args.vae_beta * kl.mean()
        descend(loss, vae_optimizer)
        return loss, kl.detach()

    return encode, update


def plain_offline(args: offline.Args, p: SimpleNamespace) -> Callable[[dict], dict]:
    """One gradient step of offline_pretrain.py."""
    fit = plain_critics(args, p)
    actor_optimizer = torch.optim.Adam(p.actor.parameters(), lr=args.actor_lr)
    p.average, p.steps = deepcopy(p.actor), 0

    def update(batch):
        obs, act, next_obs = batch["observations"], batch["actions"], batch["next_observations"]
        with torch.no_grad():
            next_act, _ = p.actor(next_obs)
            next_q = values(p.q_target, next_obs, next_act).min(0).values
            next_qc = values(p.qc_target, next_obs, next_act).mean(0)
            next_qc = next_qc.clamp(0, p.largest_cost / (1 - args.gamma))
            next_q = torch.where(next_qc <= p.qc_threshold, next_q, 0.0)
            y = batch["rewards"] + args.gamma * (1 - batch["terminals"]) * next_q
            yc = batch["costs"] + args.gamma * (1 - batch["terminals"]) * next_qc
        losses = fit(batch, y, yc)

        new_act, _ = p.actor(obs)
        q = values(p.q, obs, new_act).min(0).values
        with torch.no_grad():
            safe = values(p.qc, obs, new_act).mean(0) <= p.qc_threshold
            good = values(p.qc, obs, act).mean(0) <= p.qc_threshold
            data_q = values(p.q, obs, act).min(0).values
            good &= data_q >= q
            advantage = (data_q - q).abs().mean()
        u = torch.atanh(act.clamp(-0.995, 0.995))
        log_prob = (p.actor.normal(obs).log_prob(u) + 0.5 * math.log(2 * math.pi)).sum(1)  # without constants
        actor_loss = -torch.where(safe, q, 0.0).mean() / advantage.clamp(min=1e-6)
        actor_loss = actor_loss - args.bc_weight * torch.where(good, log_prob, 0.0).mean()
        descend(actor_loss, actor_optimizer)
        polyak(p.q, p.q_target, args.tau)
        polyak(p.qc, p.qc_target, args.qc_tau)
        p.steps += 1
        polyak(p.actor, p.average, max(args.actor_tau, 1 / p.steps))
        return losses | dict(actor_loss=actor_loss)

    return update


def plain_mmd(x, y, sigma=50.0):
    """MMD (batch,) of two sets of actions, each (batch, n, act_dim), in the form of BEAR's code."""
    def kernel(a, b):
        squares = ((a.unsqueeze(2) - b.unsqueeze(1)) ** 2).sum(-1)
        return torch.mean(torch.exp(-squares / (2 * sigma)), dim=(1, 2))

    return (kernel(x, x) + kernel(y, y) - 2 * kernel(x, y) + 1e-6).sqrt()


def plain_bear_lag(args: bear_lag.Args, p: SimpleNamespace) -> Callable[[dict], dict]:
    """One gradient step of BEAR-Lag."""
    fit, (_, update_vae), n = plain_critics(args, p), plain_vae(args, p), args.bear_actions
    actor_optimizer = torch.optim.Adam(p.actor.parameters(), lr=args.actor_lr)
    p.log_mmd_weight = torch.tensor(0.0, requires_grad=True)
    mmd_optimizer = torch.optim.Adam([p.log_mmd_weight], lr=args.critic_lr)
    pid = SimpleNamespace(error=0.0, integral=0.0, multiplier=0.0)

    def update(batch):
        obs, next_obs, size = batch["observations"], batch["next_observations"], len(batch["rewards"])
        vae_loss, _ = update_vae(obs, batch["actions"])
        with torch.no_grad():
            next_act = torch.tanh(p.actor_target.normal(next_obs).sample((n,))).reshape(n * size, -1)
            q = values(p.q_target, torch.cat([next_obs] * n), next_act)
            q = 0.75 * q.min(0).values + 0.25 * q.max(0).values
            qc = values(p.qc_target, torch.cat([next_obs] * n), next_act).mean(0).reshape(n, size).mean(0)
            discount = args.gamma * (1 - batch["terminals"])
            y = batch["rewards"] + discount * q.reshape(n, size).max(0).values
            yc = batch["costs"] + discount * qc.clamp(0, p.largest_cost / (1 - args.gamma))
        losses = fit(batch, y, yc)

        act = torch.tanh(p.actor.normal(obs).rsample((n,)))
        with torch.no_grad():
            z = torch.randn(n, size, 2 * act.shape[2]).clamp(-0.5, 0.5)
            data_act = p.decoder(torch.cat([torch.stack([obs] * n), z], 2))
        mmd = plain_mmd(act.transpose(0, 1), data_act.transpose(0, 1)).mean()
        q, qc = values(p.q, obs, act[0]).min(0).values.mean(), values(p.qc, obs, act[0]).mean()
        actor_loss = (pid.multiplier * qc - q) / (1 + pid.multiplier) + p.log_mmd_weight.exp().item() * mmd
        descend(actor_loss, actor_optimizer)

        error = qc.item() - p.qc_threshold
        pid.integral = max(0.0, pid.integral + error)
        pid.multiplier = args.kp * max(0.0, error) + args.ki * pid.integral
        pid.multiplier, pid.error = pid.multiplier + args.kd * max(0.0, error - pid.error), error
        descend(-p.log_mmd_weight.exp() * (mmd.detach() - args.mmd_limit), mmd_optimizer)
        p.log_mmd_weight.data.clamp_(-5, 10)
        for name in ("q", "qc", "actor"):
            polyak(getattr(p, name), getattr(p, f"{name}_target"), args.tau)
        return losses | dict(actor_loss=actor_loss, vae_loss=vae_loss, mmd=mmd)

    return update


UPDATES = {"offline update": (offline.Args(), offline_update, plain_offline),
           "BEAR-Lag update": (bear_lag.Args(), bear_lag_update, plain_bear_lag),
           "VPA update": (marvel.Args(), vpa_update, plain_vpa),
           "online update": (marvel.Args(), online_update, plain_online)}


# --- The floor ---
class Products(TorchDispatchMode):
    """Collects the two factors of every matrix product that runs under it."""

    def __init__(self):
        super().__init__()
        self.factors = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.addmm,
                                   torch.ops.aten.baddbmm):
            self.factors.append(tuple(x.detach() for x in args[-2:]))
        return func(*args, **(kwargs or {}))


def matrix_products(step: Callable[[], object]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The factors of the matrix products of one step, forward and backward, as they lie in its memory."""
    with Products() as products:
        step()
    return products.factors


def floor(factors: list[tuple[torch.Tensor, torch.Tensor]]) -> Callable[[], None]:
    """A call makes all these products, into memory that is there already."""
    calls = [(torch.mm if a.ndim == 2 else torch.bmm, a, b, a @ b) for a, b in factors]

    def run():
        for product, a, b, result in calls:
            product(a, b, out=result)

    return run


# --- Acting, simulator, peer ---
def acting(s: SimpleNamespace, obs_dim: int) -> dict[str, Callable[[], object]]:
    """An action for one observation: the script's, its mean, and with the plain network."""
    rng, policy, plain = np.random.default_rng(0), s.actor.numpy_policy(), PlainActor(s.actor)
    obs = rng.standard_normal(obs_dim, np.float32)
    return {"script, sampled": lambda: policy(obs, rng), "script, mean": lambda: policy(obs),
            "plain, sampled": lambda: plain(torch.as_tensor(obs)[None])[0].detach().numpy()[0]}


def simulator(env_id: str) -> Callable[[], None]:
    """A call is one step of the task with a uniform action, and a reset where an episode ends."""
    env, task = common.make_env(env_id)
    rng = np.random.default_rng(0)
    env.reset(seed=0)

    def one_step():
        _, _, terminated, truncated, _ = env.step(rng.uniform(-1, 1, task.act_dim).astype(np.float32))
        if terminated or truncated:
            env.reset(seed=rng.integers(2**31))

    return one_step


def osrl_trainers(data: dict[str, torch.Tensor], batch_size: int) -> dict[str, dict[str, Callable]]:
    """A step of OSRL's BEAR-Lag trainer, without and with its DataLoader."""
    logger = SimpleNamespace(store=lambda **values: None)
    loggers = SimpleNamespace(DummyLogger=lambda: logger, WandbLogger=None)  # all that it takes from fsrl
    sys.modules["fsrl"], sys.modules["fsrl.utils"] = ModuleType("fsrl"), loggers
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints which packages it misses
            from osrl.algorithms import BEARL, BEARLTrainer
            from osrl.common import TransitionDataset
    except ImportError as error:
        common.stop(f"--peer osrl: needs a checkout of github.com/liuzuxin/OSRL on PYTHONPATH "
                    f"({error!s:.100})")
    arrays = {key: value.numpy() for key, value in data.items()}
    loader = iter(torch.utils.data.DataLoader(TransitionDataset(arrays), batch_size))
    sizes = dict(state_dim=arrays["observations"].shape[1], action_dim=arrays["actions"].shape[1],
                 max_action=1.0, a_hidden_sizes=[256, 256], c_hidden_sizes=[256, 256], vae_hidden_sizes=400,
                 sample_action_num=10, beta=0.5, num_q=2, num_qc=2)
    rates, ready = dict(actor_lr=1e-4, critic_lr=1e-3, vae_lr=1e-3), next(loader)
    trainers = {"BEAR-Lag update": BEARLTrainer(BEARL(**sizes, start_update_policy_step=0), None, logger,
                                                **rates | {"actor_lr": 1e-3})}
    return {name: {"OSRL": lambda step=trainer.train_one_step: step(*ready),
                   "OSRL with DataLoader": lambda step=trainer.train_one_step: step(*next(loader))}
            for name, trainer in trainers.items()}


def table_rows(groups: dict[str, dict[str, Callable]], rates: dict[tuple[str, str], np.ndarray]) -> str:
    """The lines of the table; a group's first version is the script's own."""
    lines = []
    for group, versions in groups.items():
        script = rates[group, next(iter(versions))]
        for version in versions:
            rate = rates[group, version]
            ratio = [spread(x) for x in (script / rate).T] if rate is not script else ["", ""]
            cells = [group, version, *map(spread, rate.T), spread(1e6 / rate[:, 1]), *ratio]
            lines.append("| " + " | ".join(cells) + " |\n")
    return "".join(lines)


def main(args: Args) -> None:
    for name in ("rounds", "obs_dim", "act_dim"):
        if not 1 <= getattr(args, name) <= 10_000:
            common.stop(f"--{name.replace('_', '-')} {getattr(args, name)}: must be between 1 and 10000")
    if not 0 < args.slice_seconds <= 60:
        common.stop(f"--slice-seconds {args.slice_seconds}: must be above 0 and at most 60")
    output = Path(args.output)
    if output.is_dir() or not (output.parent.is_dir() and os.access(output.parent, os.W_OK)):
        common.stop(f"--output {output}: must be a file in a folder that exists and can be written to")
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    torch.manual_seed(0)
    data, batch = transitions(args.obs_dim, args.act_dim), marvel.Args.batch_size
    buffer = marvel.ReplayBuffer(args.obs_dim, args.act_dim, torch.device("cpu"))
    buffer.load_state_dict(data)
    peers = osrl_trainers(data, batch) if args.peer == "osrl" else {}

    groups = {}
    for name, (options, script, plain) in UPDATES.items():
        def on_a_batch(update):
            return lambda: update(buffer.sample(batch))

        s = start(args.obs_dim, args.act_dim, marvel.Args())
        groups[name] = {"script": on_a_batch(script(options, s)),
                        "plain": on_a_batch(plain(options, plain_start(s)))}
        groups[name]["matrix products"] = floor(matrix_products(on_a_batch(script(options, deepcopy(s)))))
        groups[name] |= peers.get(name, {})
    groups["acting"] = acting(start(args.obs_dim, args.act_dim, marvel.Args()), args.obs_dim)
    for env_id in (BULLET, MUJOCO):
        groups[f"{env_id} alone"] = {"one step": simulator(env_id)}
    options = marvel.Args()
    loop = f"{BULLET}, online loop, {options.utd:g} updates per step"
    groups[loop] = {"script": online_loop(options, start(BALL.obs_dim, BALL.act_dim, options), BULLET)}

    rates = measure(groups, {loop: BALL.max_episode_steps}, args.rounds, args.slice_seconds)
    caption = CAPTION.format(option=" --peer osrl" * (args.peer == "osrl"), cpu=cpu_name(),
                             torch=torch.__version__, batch=batch, load=f"{os.getloadavg()[0]:.1f}",
                             **vars(args))
    text = caption + table_rows(groups, rates)
    part = output.with_name(output.name + ".part")
    part.write_text(text)
    part.replace(output)
    print(f"\n{text}\nwritten to {output}")


if __name__ == "__main__":
    main(tyro.cli(Args))
