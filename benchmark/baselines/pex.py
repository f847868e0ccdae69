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

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before numpy: its own threads would get in torch's way
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
    """folder of a run to go on with, under its own options; takes no other but a larger --total-timesteps"""
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
    cost_margin: float = 1.0
    """the multiplier aims this many standard deviations of an episode's cost below the limit; 0: at it"""

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
    utd: float = 0.5
    """gradient steps per environment step"""
    actor_lr: float = 3e-4
    """learning rate of the actor and of the entropy weight"""
    tau: float = 0.005
    """target networks' step per gradient step"""
    actor_tau: float = 0.02
    """the same of the policy, an average of the trained actor, towards that actor; 1: no average"""
    alpha: float = 0.01
    """entropy weight per step in units of scaled reward: the first value if tuned"""
    autotune: bool = True
    """tune the entropy weight towards an entropy of -act_dim"""

    # --- Lagrange multiplier ---
    multiplier: Literal["apid", "pid", "dual", "fixed"] = "apid"
    """adaptive PID, PID with constant gains, dual ascent with step --ki, or fixed at --lagrange-init"""
    lagrange_init: float = 0.0
    """first multiplier; there are no aligned critics to read one off"""
    lagrange_max: float = 100.0
    """largest multiplier, in scaled reward per cost"""
    kp: float = 0.15
    """proportional gain: change of the multiplier, in its unit, per cost limit's worth of episode cost"""
    ki: float = 0.0006
    """integral gain: the same per gradient step; dual ascent's step size too"""
    kd: float = 0.15
    """derivative gain, as the proportional one"""
    adapt_rate: float = 0.05
    """largest relative change per multiplier update, of a gain or, below the target, of the integral"""

    # --- Evaluation ---
    eval_every: int = 5_000
    """environment steps between evaluations"""
    eval_episodes: int = 20
    """episodes of each evaluation, sampled and mean-action"""


LOG_STD_MIN, LOG_STD_MAX = -5, 2

# metrics.csv, one line per episode; a new number needs its name here. Losses are those of the last gradient
# step, q_mean and qc_mean are the critics' targets there, the gains are the next update's
COLUMNS = (
    "env_steps", "episode", "episode_return", "episode_cost", "normalized_return", "normalized_cost",
    "cumulative_cost", "violation_regret", "lagrange_multiplier", "kp", "ki", "kd",
    "q_loss", "qc_loss", "q_mean", "qc_mean", "actor_loss", "alpha", "entropy",
    "eval_sampled_return", "eval_sampled_cost", "eval_mean_return", "eval_mean_cost",
)


class Actor(nn.Module):
    """Squashed Gaussian policy (SAC): a = tanh(u), u ~ N(mean(s), std(s)^2), actions in [-1, 1]^act_dim."""

    def __init__(self, obs_dim: int, act_dim: int, hidden: int = 256):
        super().__init__()
        self.fc1 = nn.Linear(obs_dim, hidden)
        self.fc2 = nn.Linear(hidden, hidden)
        self.head = nn.Linear(hidden, 2 * act_dim)

    def gaussian(self, obs):
        """Mean and log standard deviation of u, each (batch, act_dim)."""
        x = F.relu(self.fc1(obs))
        x = F.relu(self.fc2(x))
        mean, log_std = self.head(x).chunk(2, -1)
        return mean, log_std.clamp(LOG_STD_MIN, LOG_STD_MAX)

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

        Faster than torch for a single state. On the CPU its arrays are views of the parameters and follow
        every update; from a GPU they are copies.
        """
        # the parameters in the order of __init__: weight and bias of fc1, of fc2, of head
        w1, b1, w2, b2, w3, b3 = (parameter.detach().cpu().numpy() for parameter in self.parameters())

        def gaussian(obs):
            x = np.maximum(w1 @ obs + b1, 0)
            x = np.maximum(w2 @ x + b2, 0)
            mean, log_std = np.split(w3 @ x + b3, 2)
            return mean, log_std.clip(LOG_STD_MIN, LOG_STD_MAX)

        def act(obs, rng=None):
            mean, log_std = gaussian(obs)
            if rng is not None:
                mean = mean + np.exp(log_std) * rng.standard_normal(mean.shape, np.float32)
            return np.tanh(mean)

        with torch.no_grad():
            expected = self.gaussian(torch.ones_like(self.fc1.weight[:1]))
        for ours, theirs in zip(gaussian(np.ones_like(w1[0])), expected, strict=True):
            assert not (np.abs(ours - theirs[0].cpu().numpy()) > 1e-3).any(), "change both gaussians alike"
        return act


class Critic(nn.Module):
    """`n` independent Q-networks of (obs, action)."""

    # One batched product per layer serves all n: a list of n networks takes about a tenth longer on a CPU.
    def __init__(self, n: int, obs_dim: int, act_dim: int, hidden: int = 256):
        super().__init__()
        self.n = n
        self.weights = nn.ParameterList()
        self.biases = nn.ParameterList()
        sizes = [obs_dim + act_dim, hidden, hidden, 1]
        for fan_in, fan_out in zip(sizes[:-1], sizes[1:], strict=True):  # nn.Linear's own initialisation
            self.weights.append(torch.empty(n, fan_in, fan_out).uniform_(-1, 1) / math.sqrt(fan_in))
            self.biases.append(torch.empty(n, 1, fan_out).uniform_(-1, 1) / math.sqrt(fan_in))

    def forward(self, obs, act):
        """obs (batch, obs_dim), act (batch, act_dim) -> (n, batch)."""
        x = torch.cat([obs, act], -1).expand(self.n, -1, -1)
        x = torch.baddbmm(self.biases[0], x, self.weights[0]).relu_()
        x = torch.baddbmm(self.biases[1], x, self.weights[1]).relu_()
        # the last layer has one column: a sum is faster than a matrix product
        return (x * self.weights[2].mT).sum(-1) + self.biases[2].squeeze(-1)


def reward_value(q, obs, act):
    """Q(s, a) (batch,): the smallest of the networks', as in SAC."""
    return q(obs, act).amin(0)


def cost_value(qc, obs, act):
    """Qc(s, a) (batch,): the mean over the networks, of which there is one."""
    return qc(obs, act).mean(0)


class ReplayBuffer:
    """Transitions in the order in which they came. Its room doubles when full; nothing is overwritten."""

    def __init__(self, obs_dim: int, act_dim: int, device: torch.device):
        self.size = 0
        self.storage = {
            "observations": torch.zeros(0, obs_dim, device=device),
            "next_observations": torch.zeros(0, obs_dim, device=device),
            "actions": torch.zeros(0, act_dim, device=device),
            "rewards": torch.zeros(0, device=device),
            "costs": torch.zeros(0, device=device),
            "terminals": torch.zeros(0, device=device),  # 1: the task ended: no bootstrap
            "timeouts": torch.zeros(0, device=device),  # 1: the time limit cut it: not used here
        }

    def add(self, **transition):
        """One transition: an array or a number for every name in the storage."""
        assert transition.keys() == self.storage.keys()
        if self.size == len(self.storage["rewards"]):
            more = max(1024, self.size)
            for name, values in self.storage.items():
                self.storage[name] = torch.cat([values, values.new_zeros(more, *values.shape[1:])])
        for name, value in transition.items():
            self.storage[name][self.size] = torch.as_tensor(value)
        self.size += 1

    def sample(self, n):
        """`n` transitions, uniformly with replacement: {name: (n, ...)}."""
        index = torch.randint(self.size, (n,), device=self.storage["rewards"].device)
        return {name: values[index] for name, values in self.storage.items()}

    def state_dict(self):
        """All transitions: {name: (size, ...)}, what a dataset is too."""
        return {name: values[:self.size].clone() for name, values in self.storage.items()}

    def load_state_dict(self, transitions):
        """Hold these transitions instead."""
        assert transitions.keys() == self.storage.keys()
        self.size = len(transitions["rewards"])
        self.storage = {name: values.to(self.storage[name]) for name, values in transitions.items()}


class PIDLagrangian:
    """Lagrange multiplier set by a PID controller with adaptive gains (Stooke et al. 2020; Marvel).

    With J the mean undiscounted episode cost of a rollout block, e = (J - target) / cost_unit, and n the
    gradient steps that the block is followed by, one update is
        I <- clip(I + ki n e, 0, lagrange_max / unit)
        P <- ema P + (1 - ema) e     C <- ema C + (1 - ema) J / cost_unit
        multiplier = unit clip(kp P + I + kd max(0, C - C of d_delay updates ago), 0, lagrange_max / unit)
    and then, with m and s the mean and standard deviation of the last d_delay costs J, and
    f = 1 + adapt_rate (m - target) / max(m, target), within [1 - adapt_rate, 1 + adapt_rate]:
        m above the target:  kp, ki <- f kp, f ki       kd <- (1 + adapt_rate min(1, s / m)) kd
        else:                I <- f I                   each gain <- max(f gain, its first value)
    Gains stay below max_growth times their first value; f is 1 where m and the target are 0. adapt_rate = 0
    is plain PID, with kp = kd = 0 dual ascent. C starts at 0, so that the first d_delay updates see it rise.
    P, I, C and the gains have no unit; that of the multiplier, reward per cost, is in `unit` alone. The
    scripts' gains are for cost_unit = cost_limit and the n of every block: copy these with the class.

    The target is `margin` standard deviations of the last `spread_window` episodes' costs below the limit. An
    episode that is not played yet counts as half the limit away from their mean, and the deviation is kept
    between a quarter and a half of the limit: safe episodes say little of those nearer to it, and where the
    deviation is larger, half the limit is margin enough for the mean of twenty episodes.
    """

    def __init__(self, cost_limit: float, kp: float, ki: float, kd: float, margin: float = 0.0,
                 cost_unit: float = 1.0, ema: float = 0.9, d_delay: int = 10, adapt_rate: float = 0.05,
                 max_growth: float = 10.0, lagrange_max: float = 100.0, spread_window: int = 20):
        self.cost_limit = cost_limit
        self.margin = margin
        self.target_cost = cost_limit  # until the first update
        self.cost_unit = cost_unit
        self.first_gains = [kp, ki, kd]
        self.gains = [kp, ki, kd]
        self.ema = ema
        self.adapt_rate = adapt_rate
        self.max_growth = max_growth
        self.lagrange_max = lagrange_max
        self.unit = 1.0
        self.multiplier = 0.0
        self.integral = 0.0  # I
        self.error_ema = 0.0  # P
        self.cost_ema = 0.0  # C
        self.cost_emas = deque([0.0], maxlen=d_delay)
        self.costs = deque(maxlen=d_delay)
        self.episode_costs = deque(maxlen=spread_window)

    def start(self, multiplier: float, fading_from: float | None = None, unit: float = 1.0) -> None:
        """Begin at `multiplier`, or at the larger `fading_from`, whose excess shrinks by ema per update.

        The excess sits in P, which forgets (kp may grow meanwhile). Without a proportional gain it stays.
        """
        kp, _, _ = self.gains
        first = multiplier if fading_from is None else max(multiplier, fading_from)
        first = min(first, self.lagrange_max)
        self.unit = unit
        self.multiplier = first
        self.integral = first / unit
        if fading_from is not None and kp > 0:
            self.integral = min(multiplier, self.lagrange_max) / unit
            self.error_ema = (first / unit - self.integral) / kp

    def update(self, *episode_costs: float, gradient_steps: int = 1) -> float:
        """Take the undiscounted costs of the last block's episodes, return the new multiplier."""
        kp, ki, kd = self.gains
        mean_cost = sum(episode_costs) / len(episode_costs)
        self.episode_costs.extend(episode_costs)
        self.target_cost = max(0.0, self.cost_limit - self.margin * self.spread())
        error = (mean_cost - self.target_cost) / self.cost_unit
        # the integral is kept within the multiplier's range, or it would go on winding up unseen
        largest = self.lagrange_max / self.unit
        self.integral = min(max(0.0, self.integral + ki * gradient_steps * error), largest)
        self.error_ema = self.ema * self.error_ema + (1 - self.ema) * error
        self.cost_ema = self.ema * self.cost_ema + (1 - self.ema) * mean_cost / self.cost_unit
        cost_rise = max(0.0, self.cost_ema - self.cost_emas[0])
        multiplier = kp * self.error_ema + self.integral + kd * cost_rise
        self.multiplier = self.unit * min(max(0.0, multiplier), largest)
        self.cost_emas.append(self.cost_ema)
        self.costs.append(mean_cost)
        if self.adapt_rate > 0:
            self.adapt()
        return self.multiplier

    def spread(self) -> float:
        """Standard deviation of an episode's cost, as far as it is known."""
        played = len(self.episode_costs)
        missing = self.episode_costs.maxlen - played
        squares = missing * (self.cost_limit / 2) ** 2
        if played:
            squares += played * np.var(self.episode_costs)
        deviation = math.sqrt(squares / (played + missing))
        return min(max(self.cost_limit / 4, deviation), self.cost_limit / 2)

    def adapt(self) -> None:
        """Change the gains for the next update, or below the target unwind the integral."""
        target = self.target_cost
        rate = self.adapt_rate
        mean = float(np.mean(self.costs))
        std = float(np.std(self.costs))
        if mean > target:
            factor = 1 + rate * (mean - target) / mean
            factors = [factor, factor, 1 + rate * min(1.0, std / mean)]
        else:
            factor = 1 + rate * (mean - target) / target if target > 0 else 1.0
            factors = [factor, factor, factor]
            self.integral *= factor
        for k, first_gain in enumerate(self.first_gains):
            gain = max(factors[k] * self.gains[k], first_gain)
            self.gains[k] = min(gain, self.max_growth * first_gain)

    def metrics(self) -> dict:
        """Its numbers for the log."""
        kp, ki, kd = self.gains
        return {"lagrange_multiplier": self.multiplier, "kp": kp, "ki": ki, "kd": kd}

    def state_dict(self) -> dict:
        """Everything in it, as numbers and lists."""
        return {name: list(x) if isinstance(x, (list, deque)) else x for name, x in vars(self).items()}

    def load_state_dict(self, state: dict) -> None:
        """Continue from what state_dict gave."""
        for name, value in deepcopy(state).items():
            mine = getattr(self, name)
            setattr(self, name, deque(value, mine.maxlen) if isinstance(mine, deque) else value)


def sample_mixed(offline_data, buffer, n):
    """`n` transitions, one half from the offline dataset, the other from the replay buffer."""
    offline_half = offline_data.sample(n // 2)
    online_half = buffer.sample(n - n // 2)
    return {name: torch.cat([offline_half[name], online_half[name]]) for name in offline_half}


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
    policies = offline_actor.numpy_policy(), actor.numpy_policy()
    device = q.biases[0].device

    @torch.no_grad()
    def act(obs, rng=None):
        proposals = np.stack([policy(obs, rng) for policy in policies])
        both_obs = torch.as_tensor(obs).expand(2, -1).to(device)
        both_acts = torch.as_tensor(proposals).to(device)
        q_value = reward_value(q, both_obs, both_acts)
        qc_value = cost_value(qc, both_obs, both_acts)
        _, p_new = choice_probabilities(q_value, qc_value, lagrange_multiplier, temperature).tolist()
        drawn = 0.5 if rng is None else rng.random()
        return proposals[1] if drawn < p_new else proposals[0]

    return act


@torch.no_grad()
def composed_targets(batch, offline_actor, actor, q_target, qc_target, gamma, alpha, lagrange_multiplier,
                     temperature, largest_cost):
    """One-step targets (batch,) of Q and Qc for the composed policy, which chooses by the target critics.

    Given one proposal of each policy, this is the expectation over the choice. The composed policy's density
    is not at hand, so the entropy term is the new policy's alone, times the probability that it is chosen.
    A terminal stops the bootstrap, a time limit does not: `terminals` is 0 there. Qc's bootstrap is kept
    within what costs of 0 to `largest_cost` per step can add up to.
    """
    next_obs = batch["next_observations"]
    offline_act, _ = offline_actor(next_obs)
    act, log_prob = actor(next_obs)
    next_q = torch.stack([reward_value(q_target, next_obs, a) for a in (offline_act, act)])
    next_qc = torch.stack([cost_value(qc_target, next_obs, a) for a in (offline_act, act)])
    chosen = choice_probabilities(next_q, next_qc, lagrange_multiplier, temperature)
    next_q = (chosen * next_q).sum(0) - chosen[1] * alpha * log_prob
    next_qc = (chosen * next_qc).sum(0).clamp(0, largest_cost / (1 - gamma))
    discount = gamma * (1 - batch["terminals"])
    return batch["rewards"] + discount * next_q, batch["costs"] + discount * next_qc


def critic_loss(batch, q, qc, q_target_value, qc_target_value):
    """Mean squared Bellman errors of Q and Qc, summed over all networks, and their numbers for the log."""
    obs, act = batch["observations"], batch["actions"]
    q_loss = ((q(obs, act) - q_target_value) ** 2).mean(1).sum()
    qc_loss = ((qc(obs, act) - qc_target_value) ** 2).mean(1).sum()
    metrics = {"q_loss": q_loss.detach(), "qc_loss": qc_loss.detach(),
               "q_mean": q_target_value.mean(), "qc_mean": qc_target_value.mean()}
    return q_loss + qc_loss, metrics


def actor_loss(obs, actor, q, qc, alpha, lagrange_multiplier):
    """(alpha log pi - Q + lambda Qc) / (1 + lambda), Stooke et al.'s scaling, and log pi (batch,)."""
    act, log_prob = actor(obs)
    lagrangian = reward_value(q, obs, act) - lagrange_multiplier * cost_value(qc, obs, act)
    return (alpha * log_prob - lagrangian).mean() / (1 + lagrange_multiplier), log_prob.detach()


def follow(target, network, tau):
    """Polyak averaging of a target network: target <- (1 - tau) target + tau network."""
    with torch.no_grad():
        for slow, fast in zip(target.parameters(), network.parameters(), strict=True):
            slow.lerp_(fast, tau)


@common.closes_its_run
def main(args: Args) -> None:
    run = common.Run(args, "pex", COLUMNS)
    args = run.args  # with --resume, those of the run that goes on

    # --- Seeding and task ---
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)  # one core per run; run seeds in parallel
    torch.set_flush_denormal(True)  # Adam's moments of idle units become denormal, which is slow
    device = torch.device("cuda" if args.cuda else "cpu")
    rng = np.random.default_rng(args.seed)
    env, task = common.make_env(args.env_id)
    eval_env, _ = common.make_env(args.env_id)

    # --- Networks ---
    trained_actor = Actor(task.obs_dim, task.act_dim).to(device)
    q = Critic(2, task.obs_dim, task.act_dim).to(device)
    qc = Critic(1, task.obs_dim, task.act_dim).to(device)

    # --- Offline policy, critics and dataset ---
    # what both phases must agree on
    facts = task.facts() | dict(hidden=256, activation="relu", gamma=args.gamma,
                                reward_scale=args.reward_scale)
    offline_actor = Actor(task.obs_dim, task.act_dim).to(device).requires_grad_(False)
    if not run.resumed:
        checkpoint = args.checkpoint or f"runs/{args.env_id}__offline_pretrain__seed{args.seed}/checkpoint.pt"
        common.load_weights(checkpoint, facts, actor=offline_actor, q=q, qc=qc)
    dataset_file = common.find_dataset(task, args.dataset_path)
    dataset_sha256 = common.file_sha256(dataset_file)
    dataset = common.read_dataset(dataset_file, task)
    dataset["rewards"] *= args.reward_scale
    offline_data = ReplayBuffer(task.obs_dim, task.act_dim, device)
    offline_data.load_state_dict(dataset)

    # --- Target networks and optimisers ---
    q_target = deepcopy(q).requires_grad_(False)
    qc_target = deepcopy(qc).requires_grad_(False)
    actor = deepcopy(trained_actor).requires_grad_(False)  # its average: what plays, is evaluated and saved
    critic_optimizer = torch.optim.Adam([*q.parameters(), *qc.parameters()], args.critic_lr, fused=True)
    actor_optimizer = torch.optim.Adam(trained_actor.parameters(), args.actor_lr, fused=True)
    first_alpha = max(args.alpha, 1e-8)  # 0 has no logarithm
    log_alpha = torch.tensor(math.log(first_alpha), device=device, requires_grad=True)
    alpha_optimizer = torch.optim.Adam([log_alpha], args.actor_lr)
    target_entropy = -task.act_dim

    # --- Lagrange multiplier ---
    kp = args.kp if args.multiplier in ("apid", "pid") else 0.0
    ki = args.ki if args.multiplier != "fixed" else 0.0
    kd = args.kd if args.multiplier in ("apid", "pid") else 0.0
    adapt_rate = args.adapt_rate if args.multiplier == "apid" else 0.0
    controller = PIDLagrangian(args.cost_limit, kp, ki, kd, margin=args.cost_margin,
                               cost_unit=args.cost_limit or 1.0, adapt_rate=adapt_rate,
                               lagrange_max=args.lagrange_max)
    controller.start(args.lagrange_init)

    # --- What a checkpoint holds, with torch's random state; --resume puts all of it back here ---
    buffer = ReplayBuffer(task.obs_dim, task.act_dim, device)
    progress = dict(env_steps=0, episode=0, cumulative_cost=0.0, violation_regret=0.0,
                    largest_cost=float(offline_data.storage["costs"].max()))
    evaluations = {}
    run.keep(facts | dict(cost_limit=args.cost_limit, dataset_sha256=dataset_sha256), progress,
             new_actor=actor, trained_actor=trained_actor, offline_actor=offline_actor, q=q, qc=qc,
             q_target=q_target, qc_target=qc_target, log_alpha=log_alpha,
             critic_optimizer=critic_optimizer, actor_optimizer=actor_optimizer,
             alpha_optimizer=alpha_optimizer, controller=controller, buffer=buffer, rng=rng,
             evaluations=evaluations, constant=(offline_data,))

    def play_episode(policy):
        """Play one episode into the buffer and return its row of metrics.csv."""
        episode_return = 0.0
        episode_cost = 0.0
        done = False
        obs, _ = env.reset(seed=rng.integers(2**31))
        while not done:
            action = policy(obs, rng)
            next_obs, reward, terminated, truncated, info = env.step(action)
            buffer.add(observations=obs, next_observations=next_obs, actions=action,
                       rewards=args.reward_scale * reward, costs=info["cost"],
                       terminals=terminated, timeouts=truncated)
            progress["largest_cost"] = max(progress["largest_cost"], info["cost"])
            progress["env_steps"] += 1
            episode_return += reward
            episode_cost += info["cost"]
            obs = next_obs
            done = terminated or truncated
        progress["episode"] += 1
        progress["cumulative_cost"] += episode_cost
        progress["violation_regret"] += max(0.0, episode_cost - args.cost_limit)
        return {"env_steps": progress["env_steps"], "episode": progress["episode"],
                "episode_return": episode_return, "episode_cost": episode_cost,
                "normalized_return": task.normalized_return(episode_return),
                "normalized_cost": common.normalized_cost(episode_cost, args.cost_limit),
                "cumulative_cost": progress["cumulative_cost"],
                "violation_regret": progress["violation_regret"]}

    if not evaluations:
        evaluations["offline policy"] = common.evaluate_both_ways(
            eval_env, offline_actor.numpy_policy(), args.eval_episodes, args.seed)

    # --- Finetuning ---
    bar = tqdm(total=args.total_timesteps, desc="online", mininterval=1, initial=progress["env_steps"])
    while progress["env_steps"] < args.total_timesteps:
        # --- Collect full episodes ---
        steps_before = progress["env_steps"]
        policy = composed_policy(offline_actor, actor, q, qc, controller.multiplier, args.temperature)
        rows = [play_episode(policy) for _ in range(args.rollout_episodes)]
        env_steps = progress["env_steps"]

        # --- Update the multiplier ---
        gradient_steps = int(args.utd * env_steps) - int(args.utd * steps_before)
        controller.update(*(row["episode_cost"] for row in rows), gradient_steps=gradient_steps)

        # --- Gradient steps ---
        metrics = {}
        for _ in range(gradient_steps):
            batch = sample_mixed(offline_data, buffer, args.batch_size)  # as in the authors' code
            alpha = log_alpha.detach().exp()

            # --- Update critics ---
            targets = composed_targets(
                batch, offline_actor, trained_actor, q_target, qc_target, args.gamma, alpha,
                controller.multiplier, args.temperature, progress["largest_cost"])
            loss, metrics = critic_loss(batch, q, qc, *targets)
            critic_optimizer.zero_grad()
            loss.backward()
            critic_optimizer.step()

            # --- Update actor ---
            loss, log_prob = actor_loss(
                batch["observations"], trained_actor, q, qc, alpha, controller.multiplier)
            actor_optimizer.zero_grad()
            loss.backward(inputs=list(trained_actor.parameters()))  # leaves the critics alone
            actor_optimizer.step()
            metrics |= {"actor_loss": loss.detach(), "alpha": alpha, "entropy": -log_prob.mean()}

            # --- Update entropy weight ---
            if args.autotune:
                loss = -(log_alpha.exp() * (log_prob + target_entropy)).mean()
                alpha_optimizer.zero_grad()
                loss.backward()
                alpha_optimizer.step()

            # --- Update target networks ---
            follow(q_target, q, args.tau)
            follow(qc_target, qc, args.tau)

            # --- Average the actor ---
            follow(actor, trained_actor, args.actor_tau)
            run.check_finite(metrics)

        # --- Evaluate, log, save ---
        last_row = rows[-1] | {name: float(value) for name, value in metrics.items()} | controller.metrics()
        passed_evaluation = env_steps // args.eval_every > steps_before // args.eval_every
        if passed_evaluation or env_steps >= args.total_timesteps:
            policy = composed_policy(offline_actor, actor, q, qc, controller.multiplier, args.temperature)
            evaluations["after finetuning"] = common.evaluate_both_ways(
                eval_env, policy, args.eval_episodes, args.seed)
            last_row |= evaluations["after finetuning"]
        for row in [*rows[:-1], last_row]:  # with the multiplier that these episodes led to
            run.row(row["env_steps"], row | {"lagrange_multiplier": controller.multiplier})
        bar.set_postfix(episode_return=f"{last_row['episode_return']:.0f}",
                        cost=f"{last_row['episode_cost']:.0f}",
                        multiplier=f"{controller.multiplier:.3f}", refresh=False)
        bar.update(env_steps - steps_before)
        run.checkpoint()

    run.finish()
    env.close()
    eval_env.close()


if __name__ == "__main__":
    with common.patient_streams():
        main(tyro.cli(Args))
