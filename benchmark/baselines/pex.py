# Policy Expansion, PEX (Zhang et al. 2023, arXiv 2302.00935), on Marvel's SAC with an adaptive PID Lagrangian
# The frozen offline policy and a new one, which learns, each propose an action; one of the two is drawn by a
# softmax over their values. The new policy starts from a random network, the critics from the offline ones.
# ruff: noqa: E402
import math
import os
import sys
from collections import deque
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before numpy: a second pool of threads slows both down
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import common


@dataclass
class Args:
    # --- Experiment ---
    env_id: str = "SafetyBallCircle-v0"
    """task to finetune on"""
    seed: int = 0
    """seed of everything random"""
    cuda: bool = False
    """train on the GPU"""
    track: bool = False
    """log to Weights & Biases too (project: environment variable WANDB_PROJECT, or marvel)"""
    run_dir: str | None = None
    """folder of this run's files; default runs/<task>__pex__seed<seed>"""
    overwrite: bool = False
    """start over in a folder that holds a run"""
    resume: str | None = None
    """folder of a run to go on with, under its own options; takes no other option"""
    checkpoint_every: int = 2_000
    """environment steps between saves of all that --resume needs"""

    # --- Where it starts ---
    checkpoint: str | None = None
    """what offline_pretrain.py wrote; default runs/<task>__offline_pretrain__seed<seed>/checkpoint.pt"""
    dataset_path: str | None = None
    """half of every batch (DSRL HDF5); default the task's own: shipped, in DSRL's cache, or downloaded"""

    # --- Constraint ---
    cost_limit: float = 20.0
    """limit of the expected cost per episode (undiscounted sum)"""
    cost_margin: float = 0.5
    """the multiplier aims at (1 - cost_margin) * cost_limit; aiming at the limit exceeds it half the time"""

    # --- Critics ---
    gamma: float = 0.99
    """discount per step, of reward and of cost"""
    reward_scale: float = 0.1
    """factor on the reward inside the critics (costs are not scaled); logs are unscaled"""
    batch_size: int = 256
    """transitions per gradient step"""
    critic_lr: float = 1e-3
    """learning rate of both critics"""

    # --- Policy expansion ---
    temperature: float = 0.1
    """of the softmax that chooses between the two policies; the authors' inverse temperature is 10"""

    # --- Online SAC ---
    total_timesteps: int = 10_000
    """environment steps of finetuning"""
    rollout_episodes: int = 1
    """full episodes collected between two updates of the multiplier"""
    utd: float = 0.25
    """gradient steps per environment step"""
    actor_lr: float = 3e-4
    """learning rate of the actor and of the entropy weight"""
    tau: float = 0.005
    """target networks' step per gradient step"""
    alpha: float = 0.01
    """entropy weight per step in units of scaled reward: the first value if tuned"""
    autotune: bool = True
    """tune the entropy weight towards an entropy of -act_dim"""

    # --- Lagrange multiplier ---
    multiplier: Literal["apid", "apid-published", "pid", "dual", "fixed"] = "apid"
    """adaptive PID, its published law, plain PID, dual ascent, or fixed at --lagrange-init"""
    lagrange_init: float = 0.0
    """first multiplier; there are no aligned critics to read one off"""
    lagrange_max: float = 100.0
    """largest multiplier"""
    kp: float = 0.005
    """proportional gain per unit of episode cost"""
    ki: float = 0.001
    """integral gain per unit of episode cost and multiplier update; dual ascent's step size too"""
    kd: float = 0.005
    """derivative gain per unit of episode cost"""
    adapt_rate: float = 0.05
    """largest relative change of a gain per multiplier update"""

    # --- Evaluation ---
    eval_every: int = 5_000
    """environment steps between evaluations"""
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


class PIDLagrangian:
    """Lagrange multiplier set by a PID controller with adaptive gains (Stooke et al. 2020; Marvel).

    With J the mean undiscounted episode cost of a rollout block and e = J - cost_limit, one update is
        I <- max(0, I + ki e)       P <- ema P + (1 - ema) e       C <- ema C + (1 - ema) J
        multiplier = clip(kp P + I + kd max(0, C - C of d_delay updates ago), 0, lagrange_max)
    and then, with m and s the mean and standard deviation of the last d_delay costs J, and
    f = 1 + adapt_rate (m - limit) / max(m, limit), within [1 - adapt_rate, 1 + adapt_rate]:
        m above the limit:  kp, ki <- f kp, f ki       kd <- (1 + adapt_rate min(1, s / m)) kd
        else:               I <- f I                   each gain <- max(f gain, its first value)
    Gains stay below 10 times their first value. adapt_rate = 0 is plain PID, with kp = kd = 0 dual ascent.
    `published` keeps the released law instead, for comparison (README, differences).
    """

    def __init__(self, cost_limit: float, kp: float, ki: float, kd: float, ema: float = 0.9,
                 d_delay: int = 10, adapt_rate: float = 0.05, lagrange_init: float = 0.0,
                 lagrange_max: float = 100.0, published: bool = False):
        self.cost_limit, self.ema, self.adapt_rate = cost_limit, ema, adapt_rate
        self.lagrange_max, self.published = lagrange_max, published
        self.first_gains, self.gains = [kp, ki, kd], [kp, ki, kd]
        self.integral, self.error_ema, self.cost_ema = min(lagrange_init, lagrange_max), 0.0, 0.0
        self.cost_emas, self.costs = deque([0.0], maxlen=d_delay), deque(maxlen=d_delay)
        self.multiplier = self.integral

    def update(self, episode_cost: float) -> float:
        """Take the mean undiscounted cost of the last block's episodes, return the new multiplier."""
        kp, ki, kd = self.gains
        error = episode_cost - self.cost_limit
        # the integral is kept within the multiplier's range, or it would go on winding up unseen
        self.integral = min(max(0.0, self.integral + ki * error), self.lagrange_max)
        self.error_ema = self.ema * self.error_ema + (1 - self.ema) * error
        self.cost_ema = self.ema * self.cost_ema + (1 - self.ema) * episode_cost
        rise = max(0.0, self.cost_ema - self.cost_emas[0])
        self.multiplier = min(max(0.0, kp * self.error_ema + self.integral + kd * rise), self.lagrange_max)
        self.cost_emas.append(self.cost_ema)
        self.costs.append(episode_cost)
        if self.adapt_rate > 0:
            self._adapt()
        return self.multiplier

    def _adapt(self) -> None:
        rate, limit = self.adapt_rate, self.cost_limit
        history = self.cost_emas if self.published else self.costs
        mean, std = float(np.mean(history)), float(np.std(history))
        if self.published:
            mean += 0.1
            factor = 1 + rate * (mean - limit) / mean
            factors, low = [factor, factor, 1 + rate * std / mean], 0.1
        elif mean > limit:
            factor = 1 + rate * (mean - limit) / mean
            factors, low = [factor, factor, 1 + rate * min(1.0, std / mean)], 1.0
        else:
            factor = 1 + rate * (mean - limit) / limit if limit > 0 else 1.0
            factors, low = [factor] * 3, 1.0
            self.integral *= factor
        self.gains = [min(max(k * f, low * k0), 10 * k0)
                      for k, f, k0 in zip(self.gains, factors, self.first_gains, strict=True)]

    def state_dict(self) -> dict:
        """Everything in it, as numbers and lists."""
        return {name: list(x) if isinstance(x, deque) else x for name, x in vars(self).items()}

    def load_state_dict(self, state: dict) -> None:
        """Continue from what state_dict gave."""
        for name, value in state.items():
            mine = getattr(self, name)
            setattr(self, name, deque(value, mine.maxlen) if isinstance(mine, deque) else value)


def sample(data, n):
    """`n` transitions, uniformly with replacement."""
    index = torch.randint(len(data["rewards"]), (n,), device=data["rewards"].device)
    return {key: value[index] for key, value in data.items()}


def sample_mixed(offline_data, online_data, n):
    """`n` transitions, one half from the offline dataset, the other from the replay buffer."""
    halves = sample(offline_data, n // 2), sample(online_data, n - n // 2)
    return {key: torch.cat([half[key] for half in halves]) for key in halves[0]}


def choice_probabilities(q_value, qc_value, lagrange_multiplier, temperature):
    """softmax((Q - lambda Qc) / (1 + lambda) / temperature) over dimension 0, the policies that propose.

    The paper's softmax is over Q. The penalty makes it the choice that suits the Lagrangian, scaled as the
    actor's loss is, so that the temperature means the same under any multiplier.
    """
    lagrangian = (q_value - lagrange_multiplier * qc_value) / (1 + lagrange_multiplier)
    return (lagrangian / temperature).softmax(0)


def composed_policy(offline_actor, actor, q, qc, lagrange_multiplier, temperature):
    """Both policies as one numpy function: act(obs, rng) draws one of two samples, act(obs) the better mean.

    It chooses by the critics as they are when it is called. In the authors' code the offline policy proposes
    its mean in training too; here a sample, for that is the policy that was trained to be safe.
    """
    policies, device = (offline_actor.numpy_policy(), actor.numpy_policy()), q.biases[0].device

    @torch.no_grad()
    def act(obs, rng=None):
        proposals = np.stack([policy(obs, rng) for policy in policies])
        obs, acts = torch.as_tensor(obs).expand(2, -1).to(device), torch.as_tensor(proposals).to(device)
        q_value, qc_value = q(obs, acts).amin(0), qc(obs, acts).mean(0)
        new = choice_probabilities(q_value, qc_value, lagrange_multiplier, temperature)[1].item()
        return proposals[int((0.5 if rng is None else rng.random()) < new)]

    return act


@torch.no_grad()
def composed_targets(batch, offline_actor, actor, q_target, qc_target, gamma, alpha, lagrange_multiplier,
                     temperature):
    """One-step targets (batch,) of Q and Qc for the composed policy, which chooses by the target critics.

    Given one proposal of each policy, this is the expectation over the choice. The composed policy's density
    is not at hand, so the entropy term is the new policy's alone, times the probability that it is chosen.
    A terminal stops the bootstrap, a time limit does not: `terminals` is 0 there.
    """
    next_obs = batch["next_observations"]
    (offline_act, _), (act, log_prob) = offline_actor(next_obs), actor(next_obs)
    next_q = torch.stack([q_target(next_obs, a).amin(0) for a in (offline_act, act)])
    next_qc = torch.stack([qc_target(next_obs, a).mean(0) for a in (offline_act, act)])
    chosen = choice_probabilities(next_q, next_qc, lagrange_multiplier, temperature)
    next_q = (chosen * next_q).sum(0) - chosen[1] * alpha * log_prob
    discount = gamma * (1 - batch["terminals"])
    return batch["rewards"] + discount * next_q, batch["costs"] + discount * (chosen * next_qc).sum(0)


def critic_loss(batch, q, qc, q_target_value, qc_target_value):
    """Mean squared Bellman errors of Q and Qc, each summed over its ensemble."""
    obs, act = batch["observations"], batch["actions"]
    q_error, qc_error = q(obs, act) - q_target_value, qc(obs, act) - qc_target_value
    return (q_error**2).mean(1).sum(), (qc_error**2).mean(1).sum()


def actor_loss(obs, actor, q, qc, alpha, lagrange_multiplier):
    """(alpha log pi - Q + lambda Qc) / (1 + lambda), Stooke et al.'s scaling, and log pi (batch,)."""
    act, log_prob = actor(obs)
    lagrangian = q(obs, act).amin(0) - lagrange_multiplier * qc(obs, act).mean(0)
    return (alpha * log_prob - lagrangian).mean() / (1 + lagrange_multiplier), log_prob.detach()


COLUMNS = ("env_steps episode episode_return episode_cost normalized_return normalized_cost cumulative_cost "
           "violation_regret lagrange_multiplier kp ki kd q_loss qc_loss q_mean qc_mean actor_loss alpha "
           "entropy eval_sampled_return eval_sampled_cost eval_mean_return eval_mean_cost").split()


def main(args: Args) -> None:
    args, saved = common.start(args)
    if args.temperature == 0:
        common.stop("--temperature 0.0: must be above 0")

    # --- Seeding and task ---
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)  # one core per run; run seeds in parallel
    torch.set_flush_denormal(True)  # Adam's moments of idle units become denormal, which is slow
    device = torch.device("cuda" if args.cuda else "cpu")
    rng = np.random.default_rng(args.seed)
    env, task = common.make_env(args.env_id)
    eval_env, _ = common.make_env(args.env_id)
    needed = dict(env_id=args.env_id, obs_dim=task.obs_dim, act_dim=task.act_dim, hidden=256,
                  activation="relu", gamma=args.gamma, reward_scale=args.reward_scale)

    # --- Offline dataset, networks, optimisers ---
    actor = Actor(task.obs_dim, task.act_dim).to(device)
    q, qc = Critic(2, task.obs_dim, task.act_dim).to(device), Critic(1, task.obs_dim, task.act_dim).to(device)
    dataset = common.read_dataset(common.find_dataset(task, args.dataset_path), task, saved)
    dataset["rewards"] *= args.reward_scale
    offline_data = {key: value.to(device) for key, value in dataset.items()}
    path = args.checkpoint or f"runs/{args.env_id}__offline_pretrain__seed{args.seed}/checkpoint.pt"
    offline = common.load_checkpoint(path)
    common.check_checkpoint(path, offline, needed | {"finished": True}, actor=actor, q=q, qc=qc)
    offline_actor = Actor(task.obs_dim, task.act_dim).to(device).requires_grad_(False)
    offline_actor.load_state_dict(offline["actor"])
    q.load_state_dict(offline["q"])
    qc.load_state_dict(offline["qc"])
    q_target, qc_target = deepcopy(q).requires_grad_(False), deepcopy(qc).requires_grad_(False)
    critic_params = [*q.parameters(), *qc.parameters()]
    target_params = [*q_target.parameters(), *qc_target.parameters()]
    critic_optimizer = torch.optim.Adam(critic_params, args.critic_lr, fused=True)
    actor_optimizer = torch.optim.Adam(actor.parameters(), args.actor_lr, fused=True)
    log_alpha = torch.tensor(math.log(max(args.alpha, 1e-8)), device=device, requires_grad=True)
    alpha_optimizer = torch.optim.Adam([log_alpha], args.actor_lr)
    run = common.Run(args, "pex", COLUMNS, saved)

    def evaluate(policy):
        eval_rng = np.random.default_rng(args.seed)
        played = {"sampled": common.evaluate(eval_env, lambda obs: policy(obs, eval_rng), args.eval_episodes),
                  "mean": common.evaluate(eval_env, policy, args.eval_episodes)}
        return {f"eval_{how}_{what}": float(result[what].mean())
                for how, result in played.items() for what in ("return", "cost")}

    def minimise(name, loss, optimizer):
        params = optimizer.param_groups[0]["params"]
        optimizer.zero_grad()
        loss.backward(inputs=params)  # the actor's loss leaves the critics alone
        norm = torch.nn.utils.get_total_norm([p.grad for p in params])
        run.check_finite(**{f"{name} loss": loss, f"{name} gradient": norm})
        optimizer.step()

    def update_critics(batch, alpha, lagrange_multiplier, tau):
        targets = composed_targets(batch, offline_actor, actor, q_target, qc_target, args.gamma, alpha,
                                   lagrange_multiplier, args.temperature)
        q_loss, qc_loss = critic_loss(batch, q, qc, *targets)
        minimise("critic", q_loss + qc_loss, critic_optimizer)
        with torch.no_grad():
            torch._foreach_lerp_(target_params, critic_params, tau)
        return dict(q_loss=q_loss, qc_loss=qc_loss, q_mean=targets[0].mean(), qc_mean=targets[1].mean())

    # --- Lagrange multiplier ---
    kp, ki, kd = {"dual": (0.0, args.ki, 0.0), "fixed": (0.0, 0.0, 0.0)}.get(
        args.multiplier, (args.kp, args.ki, args.kd))
    controller = PIDLagrangian(
        args.cost_limit * (1 - args.cost_margin), kp, ki, kd, lagrange_max=args.lagrange_max,
        lagrange_init=args.lagrange_init,
        adapt_rate=args.adapt_rate if args.multiplier.startswith("apid") else 0.0,
        published=args.multiplier == "apid-published")

    # --- Replay buffer ---
    # the last block may end after the last step
    capacity = args.total_timesteps + args.rollout_episodes * task.max_episode_steps
    widths = dict(observations=(task.obs_dim,), next_observations=(task.obs_dim,), actions=(task.act_dim,))
    storage = {key: torch.zeros(capacity, *widths.get(key, ()), device=device) for key in common.DATASET_KEYS}
    count = dict(env_steps=0, episode=0, cumulative_cost=0.0, violation_regret=0.0)
    evaluations = {}

    def play_episode(policy):
        """Play one episode, put it into the buffer, and return its row of metrics.csv."""
        obs, done, episode_return, episode_cost = common.reset_env(env, rng.integers(2**31)), False, 0.0, 0.0
        while not done:
            action = policy(obs, rng)
            run.check_finite(observation=obs, action=action)
            next_obs, reward, terminated, truncated, info = env.step(action)
            next_obs, done, cost = next_obs.astype(np.float32), terminated or truncated, info["cost"]
            run.check_finite(observation=next_obs, reward=reward, cost=cost)
            transition = obs, next_obs, action, args.reward_scale * reward, cost, terminated, truncated
            for key, value in zip(common.DATASET_KEYS, transition, strict=True):
                storage[key][count["env_steps"]] = torch.as_tensor(value)
            obs, count["env_steps"], run.step = next_obs, count["env_steps"] + 1, run.step + 1
            episode_return, episode_cost = episode_return + float(reward), episode_cost + float(cost)
        count["episode"] += 1
        count["cumulative_cost"] += episode_cost
        count["violation_regret"] += max(0.0, episode_cost - args.cost_limit)
        return count | dict(episode_return=episode_return, episode_cost=episode_cost,
                            normalized_return=task.normalized_return(episode_return),
                            normalized_cost=common.normalized_cost(episode_cost, args.cost_limit))

    # --- Checkpoint: all but the simulator's state, as every episode starts afresh from a seed ---
    parts = dict(new_actor=actor, q=q, qc=qc, q_target=q_target, qc_target=qc_target, multiplier=controller,
                 critic_optimizer=critic_optimizer, actor_optimizer=actor_optimizer,
                 alpha_optimizer=alpha_optimizer, offline_actor=offline_actor)

    def state():
        return needed | {name: part.state_dict() for name, part in parts.items()} | dict(
            cost_limit=args.cost_limit, log_alpha=log_alpha.detach(), count=count, evaluations=evaluations,
            rng=rng.bit_generator.state, dataset_sha256=task.dataset_sha256,
            buffer={key: value[:count["env_steps"]].clone() for key, value in storage.items()})

    if saved:
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        log_alpha.data.copy_(saved["log_alpha"])
        for key, value in saved["buffer"].items():
            storage[key][:len(value)] = value
        count, evaluations = saved["count"], saved["evaluations"]
        rng.bit_generator.state = saved["rng"]

    if not evaluations:
        evaluations["offline policy"] = evaluate(offline_actor.numpy_policy())

    bar = tqdm(total=args.total_timesteps, desc="online", mininterval=1, initial=count["env_steps"])
    while count["env_steps"] < args.total_timesteps:
        # --- Collect full episodes ---
        first = count["env_steps"]
        policy = composed_policy(offline_actor, actor, q, qc, controller.multiplier, args.temperature)
        rows = [play_episode(policy) for _ in range(args.rollout_episodes)]
        env_steps = count["env_steps"]

        # --- Update the multiplier ---
        controller.update(float(np.mean([row["episode_cost"] for row in rows])))

        # --- Gradient steps ---
        losses, online_data = {}, {key: value[:env_steps] for key, value in storage.items()}
        for _ in range(int(args.utd * env_steps) - int(args.utd * first)):
            batch = sample_mixed(offline_data, online_data, args.batch_size)  # as in the authors' code

            # --- Update critics ---
            alpha = log_alpha.detach().exp()
            losses = update_critics(batch, alpha, controller.multiplier, args.tau)

            # --- Update actor ---
            loss, log_prob = actor_loss(batch["observations"], actor, q, qc, alpha, controller.multiplier)
            minimise("actor", loss, actor_optimizer)

            # --- Update entropy weight ---
            if args.autotune:
                alpha_loss = -(log_alpha.exp() * (log_prob - task.act_dim)).mean()
                minimise("entropy weight", alpha_loss, alpha_optimizer)
            losses |= dict(actor_loss=loss, alpha=alpha, entropy=-log_prob.mean())

        # --- Evaluate and log ---
        if env_steps // args.eval_every > first // args.eval_every or env_steps >= args.total_timesteps:
            policy = composed_policy(offline_actor, actor, q, qc, controller.multiplier, args.temperature)
            evaluations["after finetuning"] = evaluate(policy)
            rows[-1] |= evaluations["after finetuning"]
        rows[-1] |= {name: value.item() for name, value in losses.items()}
        rows[-1] |= dict(zip(("kp", "ki", "kd"), controller.gains, strict=True))
        for row in rows:
            run.row(row["env_steps"], row | {"lagrange_multiplier": controller.multiplier})
        bar.set_postfix({"return": f"{row['episode_return']:.0f}", "cost": f"{row['episode_cost']:.0f}",
                         "lambda": f"{controller.multiplier:.3f}"}, refresh=False)
        bar.update(env_steps - first)
        run.checkpoint(state)

    # --- Save ---
    run.checkpoint(state, last=True)
    run.close()
    env.close()
    eval_env.close()


if __name__ == "__main__":
    main(tyro.cli(Args))
