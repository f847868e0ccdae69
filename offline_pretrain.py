# An offline safe policy: CPQ (arXiv 2107.09003) with imitation in place of its penalty. Docs: README.md
import math
import os
from copy import deepcopy
from dataclasses import dataclass

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before numpy: its own threads would get in torch's way
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
    """folder of a run to go on with, under its own options; takes no other but a larger --update-steps"""
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
    update_steps: int = 4_000
    """gradient steps"""
    critic_lr: float = 1e-3
    """learning rate of both critics"""
    actor_lr: float = 3e-4
    """learning rate of the actor"""
    tau: float = 0.02
    """target Q's step per gradient step"""
    qc_tau: float = 0.05
    """target Qc's: a constant error of a critic fades by about exp(-steps * tau * (1 - gamma))"""
    actor_tau: float = 4e-3
    """step of the averaged actor, which is the policy, towards the trained one; 1: no average"""

    # --- Policy ---
    bc_weight: float = 5.0
    """weight of imitating the data's actions that are safe and better than the policy's own"""

    # --- Evaluation ---
    eval_every: int = 2_000
    """gradient steps between evaluations"""
    eval_episodes: int = 20
    """episodes of each evaluation, sampled and mean-action"""


LOG_STD_MIN, LOG_STD_MAX = -5, 2
MAX_ACTION = 0.995  # the data's actions are cut to it where their tanh is undone, or it would be infinite
AT_THRESHOLD = 0.02  # of the threshold: a value of Qc that is no farther from it counts as at it
LOG_EVERY = 250  # gradient steps between lines of metrics.csv

# metrics.csv, one line per LOG_EVERY gradient steps; a new number needs its name here
COLUMNS = (
    "update_steps", "q_loss", "qc_loss", "q_mean", "qc_mean", "actor_loss",
    "safe_share", "at_threshold_share", "imitated_share",
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
        # exercise 1: log-density of the squashed Gaussian
        u = mean + log_std.exp() * noise
        log_normal = -0.5 * noise**2 - log_std - 0.5 * math.log(2 * math.pi)
        log_det_tanh = 2 * (math.log(2) - u - F.softplus(-2 * u))  # log(1 - tanh(u)^2) without cancellation
        return u.tanh(), (log_normal - log_det_tanh).sum(-1)
        # end of exercise 1

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


# exercise 2: critic targets
@torch.no_grad()
def cpq_targets(batch, actor, q_target, qc_target, gamma, qc_threshold, largest_cost):
    """One-step targets (batch,) of Q and Qc; Q's bootstrap is masked where the next action is unsafe (eq. 8).

    A terminal stops the bootstrap, a time limit does not: `terminals` is 0 there. Qc's bootstrap is kept
    within what costs of 0 to `largest_cost` per step can add up to.
    """
    next_act, _ = actor(batch["next_observations"])
    next_qc = cost_value(qc_target, batch["next_observations"], next_act).clamp(0, largest_cost / (1 - gamma))
    next_q = reward_value(q_target, batch["next_observations"], next_act)
    next_q = next_q * (next_qc <= qc_threshold)
    discount = gamma * (1 - batch["terminals"])
    return batch["rewards"] + discount * next_q, batch["costs"] + discount * next_qc
    # end of exercise 2


def critic_loss(batch, q, qc, q_target_value, qc_target_value):
    """Mean squared Bellman errors of Q and Qc, summed over all networks, and their numbers for the log."""
    obs, act = batch["observations"], batch["actions"]
    q_loss = ((q(obs, act) - q_target_value) ** 2).mean(1).sum()
    qc_loss = ((qc(obs, act) - qc_target_value) ** 2).mean(1).sum()
    metrics = {"q_loss": q_loss.detach(), "qc_loss": qc_loss.detach(),
               "q_mean": q_target_value.mean(), "qc_mean": qc_target_value.mean()}
    return q_loss + qc_loss, metrics


def log_likelihood(obs, act, actor):
    """log pi(act | obs) (batch,), up to a term without parameters of the actor."""
    u = act.clamp(-MAX_ACTION, MAX_ACTION).atanh()
    mean, log_std = actor.gaussian(obs)
    return (-0.5 * ((u - mean) / log_std.exp()) ** 2 - log_std).sum(-1)


def actor_loss(batch, actor, q, qc, qc_threshold, bc_weight):
    """CPQ's objective (eq. 9) and filtered imitation, and its numbers for the log.

    With a ~ actor and b the data's action, -E[1(Qc(s, a) <= threshold) Q(s, a)] / E|Q(s, b) - Q(s, a)| has no
    gradient where the policy is unsafe, and follows Q's errors wherever Qc finds them safe. So actions b that
    are safe and worth more than the policy's are imitated:
    -bc_weight E[1(Qc(s, b) <= threshold, Q(s, b) >= Q(s, a)) log pi(b | s)],
    which is critic-regularised regression (Wang et al. 2020) under CPQ's condition. Both terms have no unit:
    Q is divided by what the choice of the action changes in it, which is 1 to 6 % of it, from task to task.
    """
    obs, data_act = batch["observations"], batch["actions"]
    act, _ = actor(obs)
    value = reward_value(q, obs, act)
    with torch.no_grad():
        act_qc = cost_value(qc, obs, act)
        safe = (act_qc <= qc_threshold).float()
        at_threshold = (act_qc - qc_threshold).abs() <= AT_THRESHOLD * qc_threshold
        data_safe = cost_value(qc, obs, data_act) <= qc_threshold
        data_value = reward_value(q, obs, data_act)
        better = data_safe & (data_value >= value)
        scale = (data_value - value).abs().mean().clamp_min(1e-6)
    imitation = (better * log_likelihood(obs, data_act, actor)).mean()
    loss = -(safe * value).mean() / scale - bc_weight * imitation
    metrics = {"actor_loss": loss.detach(), "safe_share": safe.mean(),
               "at_threshold_share": at_threshold.float().mean(), "imitated_share": better.float().mean()}
    return loss, metrics


def follow(target, network, tau):
    """Polyak averaging of a target network: target <- (1 - tau) target + tau network."""
    with torch.no_grad():
        for slow, fast in zip(target.parameters(), network.parameters(), strict=True):
            slow.lerp_(fast, tau)


@common.closes_its_run
def main(args: Args) -> None:
    run = common.Run(args, "offline_pretrain", COLUMNS)
    args = run.args  # with --resume, those of the run that goes on

    # --- Seeding and task ---
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)  # one core per run; run seeds in parallel
    torch.set_flush_denormal(True)  # Adam's moments of idle units become denormal, which is slow
    device = torch.device("cuda" if args.cuda else "cpu")
    env, task = common.make_env(args.env_id)

    # --- Dataset ---
    dataset_file = common.find_dataset(task, args.dataset_path)
    dataset_sha256 = common.file_sha256(dataset_file)
    dataset = common.read_dataset(dataset_file, task)
    print(common.describe_dataset(dataset_file, dataset, args.cost_limit, task))
    dataset["rewards"] *= args.reward_scale
    data = ReplayBuffer(task.obs_dim, task.act_dim, device)
    data.load_state_dict(dataset)

    # --- Networks ---
    trained_actor = Actor(task.obs_dim, task.act_dim).to(device)
    actor = deepcopy(trained_actor)  # its average: what is evaluated and handed over
    q = Critic(2, task.obs_dim, task.act_dim).to(device)
    qc = Critic(1, task.obs_dim, task.act_dim).to(device)
    # what both phases must agree on
    facts = task.facts() | dict(hidden=256, activation="relu", gamma=args.gamma,
                                reward_scale=args.reward_scale)
    q_target = deepcopy(q).requires_grad_(False)
    qc_target = deepcopy(qc).requires_grad_(False)
    critic_optimizer = torch.optim.Adam([*q.parameters(), *qc.parameters()], args.critic_lr, fused=True)
    actor_optimizer = torch.optim.Adam(trained_actor.parameters(), args.actor_lr, fused=True)

    # The limit is a sum over an episode's T steps (T: of the data's longest episode), Qc a discounted one:
    # spent evenly, the limit has the discounted sum (limit / T) (1 + gamma + ... + gamma^(T-1)).
    horizon = common.longest_episode(dataset)
    qc_threshold = args.cost_limit / horizon * (1 - args.gamma**horizon) / (1 - args.gamma)
    largest_cost = float(data.storage["costs"].max())  # of a step

    # --- What a checkpoint holds, with torch's random state; --resume puts all of it back here ---
    progress = dict(update_steps=0)
    evaluations = {}
    run.keep(facts | dict(cost_limit=args.cost_limit, dataset_sha256=dataset_sha256), progress,
             actor=actor, trained_actor=trained_actor, q=q, qc=qc, q_target=q_target, qc_target=qc_target,
             critic_optimizer=critic_optimizer, actor_optimizer=actor_optimizer,
             evaluations=evaluations, constant=(data,))

    bar = tqdm(range(progress["update_steps"] + 1, args.update_steps + 1), "offline", mininterval=1)
    for step in bar:
        batch = data.sample(args.batch_size)

        # --- Update critics ---
        targets = cpq_targets(batch, trained_actor, q_target, qc_target, args.gamma, qc_threshold,
                              largest_cost)
        loss, metrics = critic_loss(batch, q, qc, *targets)
        critic_optimizer.zero_grad()
        loss.backward()
        critic_optimizer.step()

        # --- Update actor ---
        loss, actor_metrics = actor_loss(batch, trained_actor, q, qc, qc_threshold, args.bc_weight)
        actor_optimizer.zero_grad()
        loss.backward(inputs=list(trained_actor.parameters()))  # leaves the critics alone
        actor_optimizer.step()
        metrics |= actor_metrics

        # --- Update target networks ---
        follow(q_target, q, args.tau)
        follow(qc_target, qc, args.qc_tau)

        # --- Average the actor ---
        follow(actor, trained_actor, max(args.actor_tau, 1 / step))

        # --- Evaluate, log, save ---
        progress["update_steps"] += 1
        run.check_finite(metrics)
        evaluating = step % args.eval_every == 0 or step == args.update_steps
        if step % LOG_EVERY == 0 or evaluating:
            row = {"update_steps": step} | {name: float(value) for name, value in metrics.items()}
            if evaluating:
                evaluations["offline policy"] = common.evaluate_both_ways(
                    env, actor.numpy_policy(), args.eval_episodes, args.seed)
                row |= evaluations["offline policy"]
                bar.set_postfix(sampled_return=f"{row['eval_sampled_return']:.0f}",
                                cost=f"{row['eval_sampled_cost']:.0f}", refresh=False)
            run.row(step, row)
        run.checkpoint()

    run.finish()
    env.close()


if __name__ == "__main__":
    with common.patient_streams():
        main(tyro.cli(Args))
