# An offline safe policy by CPQ (arXiv 2107.09003), BEAR-Lag (1906.00949) or BC-Safe. Docs: README.md
import math
import os
from copy import deepcopy
from dataclasses import dataclass
from typing import Literal

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before numpy: a second pool of threads slows both down
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from tqdm import tqdm

import common


@dataclass
class Args:
    # --- Experiment ---
    env_id: str = "SafetyBallCircle-v0"
    """task whose dataset to train on"""
    algo: Literal["cpq", "bear-lag", "bc-safe"] = "cpq"
    """bc-safe imitates the episodes within the limit; critics and VAE in its checkpoint stay untrained"""
    seed: int = 0
    """seed of everything random"""
    cuda: bool = False
    """train on the GPU"""
    track: bool = False
    """log to Weights & Biases too (project: environment variable WANDB_PROJECT, or marvel)"""
    run_dir: str | None = None
    """folder of this run's files; default runs/<task>__offline_pretrain__seed<seed>"""
    overwrite: bool = False
    """start over in a folder that holds a run"""
    resume: str | None = None
    """folder of a run to go on with, under its own options; takes no other option"""
    checkpoint_every: int = 1_000
    """gradient steps between saves of all that --resume needs"""

    # --- Data ---
    dataset_path: str | None = None
    """dataset (DSRL HDF5); default the task's own: shipped, in DSRL's cache, or downloaded"""

    # --- Constraint ---
    cost_limit: float = 20.0
    """limit of the expected cost per episode (undiscounted sum)"""

    # --- Networks ---
    gamma: float = 0.99
    """discount per step, of reward and of cost"""
    reward_scale: float = 0.1
    """factor on the reward inside the critics (costs are not scaled); logs are unscaled"""
    batch_size: int = 256
    """transitions per gradient step"""
    update_steps: int = 6_000
    """gradient steps"""
    critic_lr: float = 1e-3
    """learning rate of both critics, and of the MMD's weight"""
    actor_lr: float = 3e-4
    """learning rate of the actor"""
    tau: float = 0.02
    """target networks' step per gradient step"""
    vae_lr: float = 1e-3
    """learning rate of the VAE"""
    vae_beta: float = 0.1
    """weight of the VAE's KL term"""

    # --- CPQ ---
    bc_weight: float = 0.1
    """weight of imitating the data's actions that are safe and better than the policy's own"""
    ood_actions: int = 2
    """policy actions per state that are tested for being out of distribution"""
    ood_quantile: float = 0.95
    """out of distribution is a larger VAE KL than this share of the data's own actions has"""
    ood_weight: float = 0.01
    """weight of the penalty that raises Qc of out-of-distribution actions to the threshold"""

    # --- BEAR-Lag ---
    bear_actions: int = 4
    """actions per state in the targets, and of the policy and of the VAE in the MMD"""
    mmd_limit: float = 0.05
    """limit of the MMD between the policy's and the VAE's actions"""
    kp: float = 0.1
    """proportional gain of the multiplier, per unit of Qc above its threshold"""
    ki: float = 0.003
    """integral gain, per unit of Qc and gradient step"""
    kd: float = 0.001
    """derivative gain, per unit of Qc"""

    # --- Evaluation ---
    eval_every: int = 3_000
    """gradient steps between evaluations"""
    eval_episodes: int = 20
    """episodes of each evaluation, sampled and mean-action"""


class Actor(nn.Module):
    """Squashed Gaussian policy (SAC): a = tanh(u), u ~ N(mean(s), std(s)^2), actions in [-1, 1]^act_dim."""

    def __init__(self, obs_dim: int, act_dim: int, hidden: int = 256):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(obs_dim, hidden), nn.Linear(hidden, hidden)
        self.head = nn.Linear(hidden, 2 * act_dim)

    def gaussian(self, obs):
        """Mean and log standard deviation of u, each (batch, act_dim)."""
        mean, log_std = self.head(F.relu(self.fc2(F.relu(self.fc1(obs))))).chunk(2, -1)
        return mean, log_std.clamp(-5, 2)

    def forward(self, obs):
        """A reparameterised sample (batch, act_dim) and its log-density (batch,); SAC, appendix C, eq. 21."""
        mean, log_std = self.gaussian(obs)
        noise = torch.randn_like(mean)
        u = mean + log_std.exp() * noise
        log_normal = -0.5 * noise**2 - log_std - 0.5 * math.log(2 * math.pi)
        log_det_tanh = 2 * (math.log(2) - u - F.softplus(-2 * u))  # log(1 - tanh(u)^2) without cancellation
        return u.tanh(), (log_normal - log_det_tanh).sum(-1)

    def numpy_policy(self):
        """The policy as a numpy function of one observation: act(obs) is the mean, act(obs, rng) a sample.

        On the CPU its arrays are views of the parameters and follow every update; from a GPU they are copies.
        """
        w1, b1, w2, b2, w3, b3 = (p.detach().cpu().numpy() for p in self.parameters())

        def act(obs, rng=None):
            x = np.maximum(w2 @ np.maximum(w1 @ obs + b1, 0) + b2, 0)
            mean, log_std = np.split(w3 @ x + b3, 2)
            if rng is not None:
                mean = mean + np.exp(log_std.clip(-5, 2)) * rng.standard_normal(mean.shape, np.float32)
            return np.tanh(mean)

        return act


class Critic(nn.Module):
    """`n` independent Q-networks of (obs, action), stacked so that a layer of all is one matrix product."""

    def __init__(self, n: int, obs_dim: int, act_dim: int, hidden: int = 256):
        super().__init__()
        sizes = [obs_dim + act_dim, hidden, hidden, 1]
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for fan_in, fan_out in zip(sizes[:-1], sizes[1:], strict=True):  # nn.Linear's own initialisation
            self.weights.append(torch.empty(n, fan_in, fan_out).uniform_(-1, 1) / math.sqrt(fan_in))
            self.biases.append(torch.empty(n, 1, fan_out).uniform_(-1, 1) / math.sqrt(fan_in))

    def forward(self, obs, act):
        """obs (batch, obs_dim), act (batch, act_dim) -> (n, batch)."""
        x = torch.cat([obs, act], -1).expand(len(self.weights[0]), -1, -1)
        x = torch.baddbmm(self.biases[0], x, self.weights[0]).relu_()
        x = torch.baddbmm(self.biases[1], x, self.weights[1]).relu_()
        # the last layer has one column: a sum is faster than a matrix product
        return (x * self.weights[2].mT).sum(-1) + self.biases[2].squeeze(-1)


class VAE(nn.Module):
    """Conditional VAE of the data's actions; the KL of its encoder tells how far an action is from them."""

    def __init__(self, obs_dim: int, act_dim: int, hidden: int = 256):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Linear(obs_dim + act_dim, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(),
            nn.Linear(hidden, 4 * act_dim))
        self.decoder = nn.Sequential(
            nn.Linear(obs_dim + 2 * act_dim, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(),
            nn.Linear(hidden, act_dim), nn.Tanh())

    def encode(self, obs, act):
        """Mean and log std of the latent (batch, 2 act_dim) and KL(q(z | s, a) || N(0, 1)), (batch,)."""
        mean, log_std = self.encoder(torch.cat([obs, act], -1)).chunk(2, -1)
        log_std = log_std.clamp(-4, 15)
        return mean, log_std, 0.5 * (mean**2 + (2 * log_std).exp() - 1 - 2 * log_std).sum(-1)

    def loss(self, obs, act, beta):
        """Squared reconstruction error + beta KL, and the KL (batch,) for its quantile."""
        mean, log_std, kl = self.encode(obs, act)
        z = mean + log_std.exp() * torch.randn_like(mean)
        reconstruction = self.decoder(torch.cat([obs, z], -1))
        return ((reconstruction - act) ** 2).sum(-1).mean() + beta * kl.mean(), kl.detach()


class CriticPID:
    """BEAR-Lag's multiplier: PID (Stooke et al. 2020) in OSRL's form, on the critic as there are no episodes.

    With e = E[Qc(s, a)] - threshold, s from the data and a ~ actor, one update per gradient step is
        I <- max(0, I + e)       multiplier = kp max(0, e) + ki I + kd max(0, e - last e)
    Nothing bounds I: it winds up as long as the critic, right or wrong, finds the policy unsafe.
    """

    def __init__(self, kp: float, ki: float, kd: float):
        self.kp, self.ki, self.kd = kp, ki, kd
        self.error = self.integral = self.multiplier = 0.0

    def update(self, error: float) -> None:
        """Take e, in units of Qc, and set the multiplier, in units of scaled reward per cost."""
        rise, self.error = max(0.0, error - self.error), error
        self.integral = max(0.0, self.integral + error)
        self.multiplier = self.kp * max(0.0, error) + self.ki * self.integral + self.kd * rise

    def state_dict(self) -> dict:
        """Everything in it, as numbers."""
        return vars(self).copy()

    def load_state_dict(self, state: dict) -> None:
        """Continue from what state_dict gave."""
        vars(self).update(state)


def sample(data, n):
    """`n` transitions, uniformly with replacement."""
    index = torch.randint(len(data["rewards"]), (n,), device=data["rewards"].device)
    return {key: value[index] for key, value in data.items()}


def episode_sums(data: dict) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(last row, return, cost) of every finished episode of a dataset, each (episodes,)."""
    ends = np.flatnonzero((np.asarray(data["terminals"]) > 0) | (np.asarray(data["timeouts"]) > 0))
    totals = [np.cumsum(np.asarray(data[key], np.float64))[ends] for key in ("rewards", "costs")]
    return ends, *(np.diff(total, prepend=0.0) for total in totals)


@torch.no_grad()
def cpq_targets(batch, actor, q_target, qc_target, gamma, qc_threshold):
    """One-step targets (batch,) of Q and Qc; Q's bootstrap is masked where the next action is unsafe (eq. 8).

    A terminal stops the bootstrap, a time limit does not: `terminals` is 0 there.
    """
    next_act, _ = actor(batch["next_observations"])
    next_qc = qc_target(batch["next_observations"], next_act).mean(0)
    next_q = q_target(batch["next_observations"], next_act).amin(0) * (next_qc <= qc_threshold)
    discount = gamma * (1 - batch["terminals"])
    return batch["rewards"] + discount * next_q, batch["costs"] + discount * next_qc


def repeated_actions(obs, actor, n):
    """`n` reparameterised actions per state, (n, batch, act_dim)."""
    mean, log_std = actor.gaussian(obs)
    return (mean + log_std.exp() * torch.randn(n, *mean.shape, device=obs.device)).tanh()


@torch.no_grad()
def bear_targets(batch, actor_target, q_target, qc_target, gamma, n):
    """One-step targets (batch,) of Q and Qc from `n` next actions of the target actor (BEAR, alg. 1).

    Q takes the best by 3/4 min Q + 1/4 max Q; Qc evaluates the policy and takes the mean, where OSRL takes
    the largest min Qc. A terminal stops both bootstraps (in OSRL not Qc's), a time limit neither.
    """
    next_act = repeated_actions(batch["next_observations"], actor_target, n).flatten(0, 1)
    next_obs = batch["next_observations"].repeat(n, 1)
    values = q_target(next_obs, next_act)
    next_q = (0.75 * values.amin(0) + 0.25 * values.amax(0)).view(n, -1).amax(0)
    next_qc = qc_target(next_obs, next_act).mean(0).view(n, -1).mean(0)
    discount = gamma * (1 - batch["terminals"])
    return batch["rewards"] + discount * next_q, batch["costs"] + discount * next_qc


def critic_loss(batch, q, qc, q_target_value, qc_target_value):
    """Mean squared Bellman errors of Q and Qc, each summed over its ensemble."""
    obs, act = batch["observations"], batch["actions"]
    q_error, qc_error = q(obs, act) - q_target_value, qc(obs, act) - qc_target_value
    return (q_error**2).mean(1).sum(), (qc_error**2).mean(1).sum()


def ood_shortfall(obs, actor, vae, qc, n, kl_threshold, qc_threshold):
    """E[max(0, threshold - Qc(s, a))] over the policy's out-of-distribution actions, and their share.

    CPQ asks for E[Qc] >= threshold there (eq. 7). Ours asks it of every single action, so that nothing is
    gained by raising Qc above the threshold: under the expectation it inflates. The gradient goes through Qc.
    """
    obs = obs.repeat(n, 1)
    with torch.no_grad():
        act, _ = actor(obs)
        ood = (vae.encode(obs, act)[2] > kl_threshold).float()
    shortfall = F.relu(qc_threshold - qc(obs, act).mean(0))
    return (ood * shortfall).sum() / ood.sum().clamp_min(1), ood.mean()


def log_likelihood(obs, act, actor):
    """log pi(act | obs) (batch,), up to a term without parameters of the actor."""
    u = act.clamp(-0.995, 0.995).atanh()
    mean, log_std = actor.gaussian(obs)
    return (-0.5 * ((u - mean) / log_std.exp()) ** 2 - log_std).sum(-1)


def actor_loss(batch, actor, q, qc, qc_threshold, bc_weight):
    """CPQ's objective (eq. 9) and filtered imitation; also the shares of safe and of imitated actions.

    -E[1(Qc(s, a) <= threshold) Q(s, a)] / E|Q|, a ~ actor, has no gradient where the policy is unsafe, and
    follows Q's errors wherever Qc finds them safe. So the data's own actions b that are safe and worth more
    than the policy's are imitated: -bc_weight E[1(Qc(s, b) <= threshold, Q(s, b) >= Q(s, a)) log pi(b | s)],
    which is critic-regularised regression (Wang et al. 2020) under CPQ's condition.
    """
    obs, data_act = batch["observations"], batch["actions"]
    act, _ = actor(obs)
    value = q(obs, act).amin(0)
    with torch.no_grad():
        safe = (qc(obs, act).mean(0) <= qc_threshold).float()
        better = (qc(obs, data_act).mean(0) <= qc_threshold) & (q(obs, data_act).amin(0) >= value)
    scale = value.detach().abs().mean().clamp_min(1e-6)
    imitation = (better * log_likelihood(obs, data_act, actor)).mean()
    return -(safe * value).mean() / scale - bc_weight * imitation, safe.mean(), better.float().mean()


def mmd(x, y, sigma=50.0):
    """Maximum mean discrepancy (batch,) of two sets of actions, each (n, batch, act_dim), over all pairs.

    With its kernel exp(-|a - b|^2 / (2 sigma)) and OSRL's sigma, it is about |mean x - mean y| / sqrt(sigma).
    BEAR's code and OSRL compare actions before tanh, where those on the border are infinitely far away.
    """
    def mean_kernel(a, b):
        return (((a[:, None] - b[None]) ** 2).sum(-1) / (-2 * sigma)).exp().mean((0, 1))

    return (mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y) + 1e-6).sqrt()


def bear_loss(obs, actor, vae, q, qc, n, lagrange_multiplier, mmd_weight):
    """E[lambda Qc - Q] / (1 + lambda) + mmd_weight MMD(actor, VAE), a ~ actor; also E[Qc] and the MMD.

    Dividing by 1 + lambda is Stooke et al.'s; OSRL leaves it out, and a large lambda drowns the MMD.
    """
    act = repeated_actions(obs, actor, n)
    with torch.no_grad():  # z near the prior's mode, as in BEAR's code
        z = torch.randn(n, len(obs), 2 * act.shape[-1], device=obs.device).clamp(-0.5, 0.5)
        data_act = vae.decoder(torch.cat([obs.expand(n, -1, -1), z], -1))
    distance, act = mmd(act, data_act).mean(), act[0]  # one action is enough for the critics
    cost_value = qc(obs, act).mean()
    loss = (lagrange_multiplier * cost_value - q(obs, act).amin(0).mean()) / (1 + lagrange_multiplier)
    return loss + mmd_weight * distance, cost_value.detach(), distance.detach()


CRITICS = ["q_loss", "qc_loss", "q_mean", "qc_mean", "actor_loss", "vae_loss"]
COLUMNS = {"cpq": [*CRITICS, "safe_share", "imitated_share", "ood_share", "ood_shortfall"],
           "bear-lag": [*CRITICS, "policy_qc", "lagrange_multiplier", "mmd", "mmd_weight"],
           "bc-safe": ["actor_loss"]}
EVALUATION = ["eval_sampled_return", "eval_sampled_cost", "eval_mean_return", "eval_mean_cost"]


def main(args: Args) -> None:
    args, saved = common.start(args)

    # --- Seeding and task ---
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)  # one core per run; run seeds in parallel
    torch.set_flush_denormal(True)  # Adam's moments of idle units become denormal, which is slow
    device = torch.device("cuda" if args.cuda else "cpu")
    env, task = common.make_env(args.env_id)

    # --- Dataset ---
    dataset_file = common.find_dataset(task, args.dataset_path)
    dataset = common.read_dataset(dataset_file, task, saved)
    ends, returns, costs = episode_sums(dataset)
    safe_returns = returns[costs <= args.cost_limit]
    print(f"{dataset_file.name}: {len(returns)} episodes, {len(dataset['rewards'])} transitions; "
          f"{len(safe_returns)} episodes within the limit, 75th percentile of their return "
          f"{np.quantile(safe_returns, 0.75) if len(safe_returns) else float('nan'):.1f}")
    needed = dict(env_id=args.env_id, obs_dim=task.obs_dim, act_dim=task.act_dim, hidden=256,
                  activation="relu", gamma=args.gamma, reward_scale=args.reward_scale)
    dataset["rewards"] *= args.reward_scale
    if args.algo == "bc-safe":
        common.need(len(safe_returns) > 0,
                    f"--algo bc-safe: {dataset_file} has no episode of cost <= {args.cost_limit:g}")
        rows = np.flatnonzero(np.repeat(costs <= args.cost_limit, np.diff(ends, prepend=-1)))
        dataset = {key: value[rows] for key, value in dataset.items()}
    data = {key: value.to(device) for key, value in dataset.items()}

    # --- Networks and optimisers ---
    actor = Actor(task.obs_dim, task.act_dim).to(device)
    q, qc = Critic(2, task.obs_dim, task.act_dim).to(device), Critic(1, task.obs_dim, task.act_dim).to(device)
    q_target, qc_target, actor_target = (deepcopy(net).requires_grad_(False) for net in (q, qc, actor))
    vae = VAE(task.obs_dim, task.act_dim).to(device)
    critic_params, actor_params = [*q.parameters(), *qc.parameters()], list(actor.parameters())
    target_params = [*q_target.parameters(), *qc_target.parameters(), *actor_target.parameters()]
    critic_optimizer = torch.optim.Adam(critic_params, args.critic_lr, fused=True)
    actor_optimizer = torch.optim.Adam(actor_params, args.actor_lr, fused=True)
    vae_optimizer = torch.optim.Adam(vae.parameters(), args.vae_lr, fused=True)
    pid = CriticPID(args.kp, args.ki, args.kd)
    log_mmd_weight = torch.zeros((), device=device, requires_grad=True)
    mmd_optimizer = torch.optim.Adam([log_mmd_weight], args.critic_lr)
    # The limit is a sum over an episode's T steps, Qc a discounted one: spent evenly, the limit has the
    # discounted sum (limit / T) (1 + gamma + ... + gamma^(T-1)).
    horizon = task.max_episode_steps
    qc_threshold = args.cost_limit / horizon * (1 - args.gamma**horizon) / (1 - args.gamma)
    if saved:
        common.check_checkpoint(f"{args.resume}/checkpoint.pt", saved, needed, actor=actor, q=q, qc=qc)
    run = common.Run(args, "offline_pretrain", ["update_steps", *COLUMNS[args.algo], *EVALUATION], saved)

    def evaluate():
        policy, eval_rng = actor.numpy_policy(), np.random.default_rng(args.seed)
        played = {"sampled": common.evaluate(env, lambda obs: policy(obs, eval_rng), args.eval_episodes),
                  "mean": common.evaluate(env, policy, args.eval_episodes)}
        return {f"eval_{how}_{what}": float(result[what].mean())
                for how, result in played.items() for what in ("return", "cost")}

    def minimise(name, loss, optimizer):
        params = optimizer.param_groups[0]["params"]
        optimizer.zero_grad()
        loss.backward(inputs=params)  # the actor's loss leaves the critics alone
        norm = torch.nn.utils.get_total_norm([p.grad for p in params])
        run.check_finite(**{f"{name} loss": loss, f"{name} gradient": norm})
        optimizer.step()

    def update_critics(batch, targets, penalty=0.0):
        q_loss, qc_loss = critic_loss(batch, q, qc, *targets)
        minimise("critic", q_loss + qc_loss + penalty, critic_optimizer)
        return dict(q_loss=q_loss, qc_loss=qc_loss, q_mean=targets[0].mean(), qc_mean=targets[1].mean())

    def update_cpq(batch):
        # --- Update VAE ---
        vae_loss, kl = vae.loss(batch["observations"], batch["actions"], args.vae_beta)
        minimise("VAE", vae_loss, vae_optimizer)

        # --- Update critics ---
        targets = cpq_targets(batch, actor, q_target, qc_target, args.gamma, qc_threshold)
        shortfall, ood_share = ood_shortfall(batch["observations"], actor, vae, qc, args.ood_actions,
                                             kl.quantile(args.ood_quantile), qc_threshold)
        losses = update_critics(batch, targets, args.ood_weight * shortfall)

        # --- Update actor ---
        loss, safe_share, imitated_share = actor_loss(batch, actor, q, qc, qc_threshold, args.bc_weight)
        minimise("actor", loss, actor_optimizer)
        return losses | dict(actor_loss=loss, vae_loss=vae_loss, safe_share=safe_share, ood_share=ood_share,
                             imitated_share=imitated_share, ood_shortfall=shortfall)

    def update_bear_lag(batch):
        # --- Update VAE ---
        vae_loss, _ = vae.loss(batch["observations"], batch["actions"], args.vae_beta)
        minimise("VAE", vae_loss, vae_optimizer)

        # --- Update critics ---
        losses = update_critics(batch, bear_targets(batch, actor_target, q_target, qc_target, args.gamma,
                                                    args.bear_actions))

        # --- Update actor ---
        loss, policy_qc, distance = bear_loss(batch["observations"], actor, vae, q, qc, args.bear_actions,
                                              pid.multiplier, log_mmd_weight.detach().exp())
        minimise("actor", loss, actor_optimizer)

        # --- Update multiplier and MMD weight ---
        pid.update(policy_qc.item() - qc_threshold)
        minimise("MMD weight", -log_mmd_weight.exp() * (distance - args.mmd_limit), mmd_optimizer)
        log_mmd_weight.data.clamp_(-5, 10)  # BEAR's range
        multiplier, mmd_weight = torch.tensor(pid.multiplier), log_mmd_weight.exp()
        return losses | dict(actor_loss=loss, vae_loss=vae_loss, policy_qc=policy_qc, mmd=distance,
                             lagrange_multiplier=multiplier, mmd_weight=mmd_weight)

    def update_bc_safe(batch):
        loss = -log_likelihood(batch["observations"], batch["actions"], actor).mean()
        minimise("actor", loss, actor_optimizer)
        return dict(actor_loss=loss)

    # --- Checkpoint ---
    evaluations = {}
    parts = dict(actor=actor, q=q, qc=qc, q_target=q_target, qc_target=qc_target, multiplier=pid,
                 critic_optimizer=critic_optimizer, actor_optimizer=actor_optimizer,
                 actor_target=actor_target, vae=vae, vae_optimizer=vae_optimizer, mmd_optimizer=mmd_optimizer)

    def state():
        return needed | {name: part.state_dict() for name, part in parts.items()} | dict(
            cost_limit=args.cost_limit, dataset=dataset_file.name, dataset_sha256=task.dataset_sha256,
            log_mmd_weight=log_mmd_weight.detach(), evaluations=evaluations,
            lagrange_multiplier=pid.multiplier if args.algo == "bear-lag" else None)

    if saved:
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        log_mmd_weight.data.copy_(saved["log_mmd_weight"])
        evaluations = saved["evaluations"]

    update = {"cpq": update_cpq, "bear-lag": update_bear_lag, "bc-safe": update_bc_safe}[args.algo]
    bar = tqdm(range(run.step + 1, args.update_steps + 1), "offline", mininterval=1)
    for step in bar:
        losses = update(sample(data, args.batch_size))

        # --- Update target networks ---
        with torch.no_grad():
            torch._foreach_lerp_(target_params, critic_params + actor_params, args.tau)

        # --- Evaluate and log ---
        evaluating = step % args.eval_every == 0 or step == args.update_steps
        if step % 250 == 0 or evaluating:
            row = {"update_steps": step} | {name: value.item() for name, value in losses.items()}
            if evaluating:
                evaluations["offline policy"] = evaluate()
                row |= evaluations["offline policy"]
                bar.set_postfix({"return": f"{row['eval_sampled_return']:.0f}",
                                 "cost": f"{row['eval_sampled_cost']:.0f}"}, refresh=False)
            run.row(step, row)
        run.step = step
        run.checkpoint(state)

    # --- Save ---
    run.checkpoint(state, last=True)
    run.close()
    env.close()


if __name__ == "__main__":
    main(tyro.cli(Args))
