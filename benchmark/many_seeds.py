"""Whether seeds train faster as one batch of stacked networks than one after the other: VPA and CPQ.

  python benchmark/many_seeds.py              # two minutes
  python benchmark/many_seeds.py --cuda       # the same on the GPU

Offline training and VPA touch no simulator, so one update of networks with one more dimension can be one of
many seeds, each with a batch and random numbers of its own. `script` is the scripts' update of one seed; runs
one after the other are as fast. Every version runs for one short slice in every round, in shuffled order, and
ratios are taken inside a round.

The stacked networks are the scripts' own, with stacked layers, and so are the functions, but for those that
reduce a batch to a number: here these keep the seeds apart. A test trains seeds stacked and alone.
"""
import os
import random
import sys
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn as nn
import tyro
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common  # noqa: E402
import marvel_sac_pid as marvel  # noqa: E402
import offline_pretrain as offline  # noqa: E402
from benchmark.throughput import (  # noqa: E402
    BALL,
    UPDATES,
    check_finite,
    cpu_name,
    minimise_with,
    spread,
    start,
    transitions,
)

CAPTION = """Made by `python benchmark/many_seeds.py{option}`.

{device}, torch {torch}, load average {load} at the end; {rounds} rounds of {slice_seconds:g} s. BallCircle's
dataset, batch {batch} per seed, networks of 256 x 256, from random networks on, one thread.

A seed-step is one update of one seed. A cell is minimum / **median** / maximum over rounds; *this / script*
above 1 is a gain.

| update | version | seed-steps per second | per CPU second | this / script | this / script, CPU |
|---|---|---|---|---|---|
"""


@dataclass
class Args:
    rounds: int = 25
    """rounds; in each, every version runs once"""
    slice_seconds: float = 0.5
    """seconds that a version runs in one round, at least one update"""
    seeds: tuple[int, ...] = (1, 5, 20)
    """numbers of seeds to stack"""
    cuda: bool = False
    """train on the GPU"""
    output: str = "benchmark/results/many_seeds.md"
    """file of the table"""


# --- Stacked networks: what was (batch, ...) is (seeds, batch, ...) ---
class Linear(nn.Module):
    """The same linear layer of every seed, each with its own parameters."""

    def __init__(self, layers: list[nn.Linear]):
        super().__init__()
        self.weight = nn.Parameter(torch.stack([layer.weight.detach().T for layer in layers]))
        self.bias = nn.Parameter(torch.stack([layer.bias.detach()[None] for layer in layers]))

    def forward(self, x):
        return torch.baddbmm(self.bias, x, self.weight)


class Critics(nn.Module):
    """The critics of all seeds in one of the scripts' Critic; member i seeds + k is member i of seed k."""

    def __init__(self, critics: list[nn.Module]):
        super().__init__()
        self.critic = deepcopy(critics[0])
        for mine, *theirs in zip(self.critic.parameters(), *(c.parameters() for c in critics), strict=True):
            mine.data = torch.stack([p.detach() for p in theirs], 1).flatten(0, 1)

    def forward(self, obs, act):
        """obs (seeds, batch, obs_dim), act (seeds, batch, act_dim) -> (n, seeds, batch)."""
        n = len(self.critic.weights[0]) // len(obs)
        return self.critic(obs.repeat(n, 1, 1), act.repeat(n, 1, 1)).unflatten(0, (n, -1))


def stack(networks: list[nn.Module]) -> nn.Module:
    """One actor, VAE or critic that computes those of all seeds."""
    if isinstance(networks[0], offline.Critic):
        return Critics(networks)
    stacked = deepcopy(networks[0])
    for name, module in networks[0].named_modules():
        if isinstance(module, nn.Linear):
            parent, _, child = name.rpartition(".")
            setattr(stacked.get_submodule(parent), child, Linear([x.get_submodule(name) for x in networks]))
    return stacked


def stack_seeds(seeds: list[SimpleNamespace], args: offline.Args) -> SimpleNamespace:
    """What the stacked updates work on, with optimisers, from what throughput.start gives for each seed."""
    s = SimpleNamespace(qc_threshold=seeds[0].qc_threshold)
    for name in ("actor", "q", "qc", "vae", "q_target", "qc_target", "actor_target"):
        network = stack([getattr(seed, name) for seed in seeds])
        setattr(s, name, network.requires_grad_(not name.endswith("target")))
    s.critic_params, s.actor_params = [*s.q.parameters(), *s.qc.parameters()], list(s.actor.parameters())
    s.critic_targets = [*s.q_target.parameters(), *s.qc_target.parameters()]
    s.actor_targets = list(s.actor_target.parameters())
    s.critic_optimizer = torch.optim.Adam(s.critic_params, args.critic_lr, fused=True)
    s.actor_optimizer = torch.optim.Adam(s.actor_params, args.actor_lr, fused=True)
    s.vae_optimizer = torch.optim.Adam(s.vae.parameters(), args.vae_lr, fused=True)
    return s


# --- Stacked updates: losses, and what main logs, are (seeds,) ---
def sample(data, seeds, n):
    """`n` transitions for every seed, (seeds, n, ...), uniformly with replacement."""
    return {key: x.unflatten(0, (seeds, n)) for key, x in offline.sample(data, seeds * n).items()}


minimise_one = minimise_with(check_finite)  # the scripts' own


def minimise(losses, optimizer):
    minimise_one("stacked", losses.sum(), optimizer)  # no parameter is in two seeds' losses


def update_critics(batch, s, targets, penalty=0.0):
    obs, act = batch["observations"], batch["actions"]
    q_loss = ((s.q(obs, act) - targets[0]) ** 2).mean(-1).sum(0)
    qc_loss = ((s.qc(obs, act) - targets[1]) ** 2).mean(-1).sum(0)
    minimise(q_loss + qc_loss + penalty, s.critic_optimizer)
    return dict(q_loss=q_loss, qc_loss=qc_loss, q_mean=targets[0].mean(-1), qc_mean=targets[1].mean(-1))


def vpa_update(args: marvel.Args, s: SimpleNamespace, batch: dict) -> dict:
    """marvel_sac_pid.py's step of value pre-alignment for all seeds."""
    losses = update_critics(batch, s, marvel.soft_targets(
        batch, s.actor, s.q_target, s.qc_target, args.gamma, args.vpa_alpha, args.vpa_alpha_cost))
    with torch.no_grad():
        torch._foreach_lerp_(s.critic_targets, s.critic_params, args.vpa_tau)
    return losses


def cpq_update(args: offline.Args, s: SimpleNamespace, batch: dict) -> dict:
    """offline_pretrain.py's step of CPQ for all seeds."""
    # --- Update VAE ---
    obs, data_act = batch["observations"], batch["actions"]
    vae_loss, kl = s.vae.loss(obs, data_act, args.vae_beta)
    minimise(len(obs) * vae_loss, s.vae_optimizer)  # the script's loss is the mean over batch and seeds

    # --- Update critics ---
    targets = offline.cpq_targets(batch, s.actor, s.q_target, s.qc_target, args.gamma, s.qc_threshold)
    ood_obs = obs.repeat(1, args.ood_actions, 1)
    with torch.no_grad():
        act, _ = s.actor(ood_obs)
        ood = (s.vae.encode(ood_obs, act)[2] > kl.quantile(args.ood_quantile, -1, keepdim=True)).float()
    shortfall = (s.qc_threshold - s.qc(ood_obs, act).mean(0)).relu()
    shortfall = (ood * shortfall).sum(-1) / ood.sum(-1).clamp_min(1)
    losses = update_critics(batch, s, targets, args.ood_weight * shortfall)

    # --- Update actor ---
    act, _ = s.actor(obs)
    value = s.q(obs, act).amin(0)
    with torch.no_grad():
        safe = (s.qc(obs, act).mean(0) <= s.qc_threshold).float()
        better = s.qc(obs, data_act).mean(0) <= s.qc_threshold
        better &= s.q(obs, data_act).amin(0) >= value
    scale = value.detach().abs().mean(-1).clamp_min(1e-6)
    imitation = (better * offline.log_likelihood(obs, data_act, s.actor)).mean(-1)
    loss = -(safe * value).mean(-1) / scale - args.bc_weight * imitation
    minimise(loss, s.actor_optimizer)

    with torch.no_grad():
        torch._foreach_lerp_(s.critic_targets + s.actor_targets, s.critic_params + s.actor_params, args.tau)
    return losses | dict(actor_loss=loss, safe_share=safe.mean(-1), imitated_share=better.float().mean(-1),
                         ood_share=ood.mean(-1), ood_shortfall=shortfall)


STACKED = {"VPA update": vpa_update, "CPQ update": cpq_update}


# --- Measuring ---
def make_step(name: str, seeds: int, device: str) -> Callable[[], dict]:
    """An update of `seeds` stacked seeds, or the script's own if 0, with the drawing of the batch."""
    data = {key: value.to(device) for key, value in transitions(BALL.obs_dim, BALL.act_dim).items()}
    (args, script, _), networks = UPDATES[name], []
    with torch.device(device):
        for seed in range(max(seeds, 1)):
            torch.manual_seed(seed)
            networks.append(start(BALL.obs_dim, BALL.act_dim, marvel.Args()))
    if seeds == 0:
        update = script(args, networks[0])
        return lambda: update(offline.sample(data, args.batch_size))
    s = stack_seeds(networks, offline.Args())

    return lambda: STACKED[name](args, s, sample(data, seeds, args.batch_size))


def measure(step: Callable[[], object], seeds: int, seconds: float, cuda: bool) -> tuple[float, float]:
    """Seed-steps per second and per CPU second, measured for `seconds` or one step."""
    finish = torch.cuda.synchronize if cuda else lambda: None  # a GPU is handed work, not waited for
    finish()
    calls, cpu, wall = 0, time.process_time(), time.perf_counter()
    while calls == 0 or time.perf_counter() - wall < seconds:
        step()
        calls += 1
    finish()
    return seeds * calls / (time.perf_counter() - wall), seeds * calls / (time.process_time() - cpu)


def main(args: Args) -> None:
    for name, value in [("rounds", args.rounds), *(("seeds", k) for k in args.seeds)]:
        common.need(1 <= value <= 1000, f"--{name} {value}: must be between 1 and 1000")
    common.need(0 < args.slice_seconds <= 60, f"--slice-seconds {args.slice_seconds}: must be within (0, 60]")
    common.need(not args.cuda or torch.cuda.is_available(), "--cuda: torch finds no GPU here")
    output, device = Path(args.output), "cuda" if args.cuda else "cpu"
    common.need(not output.is_dir() and output.parent.is_dir() and os.access(output.parent, os.W_OK),
                f"--output {output}: must be a file in a folder that exists and can be written to")
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    steps = {(name, k): make_step(name, k, device) for name in STACKED for k in (0, *args.seeds)}
    rates, order, shuffler = {key: [] for key in steps}, list(steps), random.Random(0)
    for step in steps.values():  # optimisers make their memory in the first step
        step()
    for _ in tqdm(range(args.rounds), "rounds"):
        shuffler.shuffle(order)
        for name, k in order:
            rates[name, k].append(measure(steps[name, k], max(k, 1), args.slice_seconds, args.cuda))

    text = CAPTION.format(option=" --cuda" * args.cuda, torch=torch.__version__, batch=marvel.Args.batch_size,
                          device=torch.cuda.get_device_name() if args.cuda else cpu_name(),
                          load=f"{os.getloadavg()[0]:.1f}", **vars(args))
    for (name, k), rate in rates.items():
        rate, script = np.array(rate), np.array(rates[name, 0])
        cells = [name, f"{k} stacked" if k else "script", *map(spread, rate.T)]
        text += "| " + " | ".join([*cells, *(map(spread, (rate / script).T) if k else ["", ""])]) + " |\n"
    common.write_file(output, text.encode())
    print(f"\n{text}\nwritten to {output}")


if __name__ == "__main__":
    main(tyro.cli(Args))
