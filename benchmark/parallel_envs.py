"""Does it pay to play the episodes of a rollout block in several processes? Environment steps per second.

  python benchmark/parallel_envs.py    # about five minutes, on a machine that does nothing else

Every version plays the same block of episodes into the same buffer, once in every round, in shuffled order,
and ratios are taken inside a round. An episode is a function of its seed, which starts the simulator
(common.reset_env) and the policy's noise: a test holds all versions to the same bits. The versions:
  today's loop  play_episode of marvel_sac_pid.py: what a step gives is checked and stored at once
  by episode    the same in one process, but checked and stored when an episode is over
  vector of n   gymnasium's AsyncVectorEnv: one policy pass and two messages per process for every step
  pool of n     processes that get the weights once per block and play whole episodes
"""
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import tyro

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before numpy: a second pool of threads slows both down
import gymnasium as gym  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common  # noqa: E402
import marvel_sac_pid as marvel  # noqa: E402
from benchmark import throughput  # noqa: E402

TODAY, UPDATE = "today's loop", "online update"
CAPTION = """Made by `python benchmark/parallel_envs.py{option}`.

{cpu}, {cores} cores, one thread per process, load average {load:.1f} at the end; {rounds} rounds, blocks of
{episodes} episodes. A cell is minimum / **median** / maximum over rounds; CPU time is that of all processes:
divided by the cores that are free it bounds the rate, whatever else the machine did meanwhile.
*Online phase*: the same with {utd:g} online updates per env step, which are made in one process.

| task | version | per second | CPU µs each | × today's | online phase × today's |
|---|---|---|---|---|---|
"""


@dataclass
class Args:
    env_ids: tuple[str, ...] = (throughput.BULLET, "SafetyCarCircle-v0", throughput.MUJOCO)
    """tasks"""
    num_envs: tuple[int, ...] = (1, 2, 4)
    """numbers of processes"""
    episodes: int = 4
    """episodes of a block"""
    rounds: int = 12
    """rounds; in each, every version plays one block"""
    output: str = "benchmark/results/parallel_envs.md"
    """file of the table"""


# --- In one process ---
def play_today(env: gym.Env, actor: marvel.Actor, buffer: dict, seeds: Sequence[int]) -> int:
    """Play an episode per seed as play_episode does (rewards are not scaled); returns env steps."""
    step, policy = 0, actor.numpy_policy()
    for seed in seeds:
        rng, obs, done = np.random.default_rng(seed), common.reset_env(env, seed), False
        while not done:
            action = policy(obs, rng)
            throughput.check_finite(observation=obs, action=action)
            next_obs, reward, terminated, truncated, info = env.step(action)
            next_obs, done, cost = next_obs.astype(np.float32), terminated or truncated, info["cost"]
            throughput.check_finite(observation=next_obs, reward=reward, cost=cost)
            transition = obs, next_obs, action, reward, cost, terminated, truncated
            for key, value in zip(common.DATASET_KEYS, transition, strict=True):
                buffer[key][step] = torch.as_tensor(value)
            obs, step = next_obs, step + 1
    return step


def play(env: gym.Env, policy: Callable, seed: int) -> list[np.ndarray]:
    """The episode that the seed stands for: float32 arrays (steps, ...) in the order of DATASET_KEYS."""
    rng, obs, done, rows = np.random.default_rng(seed), common.reset_env(env, seed), False, []
    while not done:
        action = policy(obs, rng)
        next_obs, reward, terminated, truncated, info = env.step(action)
        next_obs, done = next_obs.astype(np.float32), terminated or truncated
        rows.append((obs, next_obs, action, reward, info["cost"], terminated, truncated))
        obs = next_obs
    return [np.array(column, np.float32) for column in zip(*rows, strict=True)]


def store(buffer: dict, episodes: list[list[np.ndarray]]) -> int:
    """Check whole episodes and put them into the buffer; returns env steps."""
    for key, *columns in zip(common.DATASET_KEYS, *episodes, strict=True):
        values = np.concatenate(columns)
        common.need(np.isfinite(values).all(), "not finite")
        buffer[key][:len(values)] = torch.from_numpy(values)
    return len(values)


# --- AsyncVectorEnv ---
class Waiting(gym.Wrapper):
    """An environment whose steps do nothing after the end of its episode, until it is given a seed again."""

    def reset(self, *, seed=None, options=None):  # without a seed: it waits from the start
        obs = np.zeros(self.observation_space.shape) if seed is None else common.reset_env(self.env, seed)
        self.last = obs, 0.0, False, False, dict(cost=0.0, terminated=seed is None, truncated=False)
        return obs, {}

    def step(self, action):
        if not (self.last[4]["terminated"] or self.last[4]["truncated"]):
            obs, reward, *ends, info = self.env.step(action)
            # told in info: where AsyncVectorEnv sees an end, it starts an episode without a seed
            ends = dict(zip(("terminated", "truncated"), map(bool, ends), strict=True))
            self.last = obs, reward, False, False, {"cost": float(info["cost"]), **ends}
        return self.last


def batched_policy(actor: marvel.Actor) -> Callable[[np.ndarray, list], np.ndarray]:
    """numpy_policy's sample for observations (n, obs_dim) and n generators: actions (n, act_dim).

    One matrix-vector product per observation, as there: a product of matrices would round differently.
    """
    w1, b1, w2, b2, w3, b3 = (p.detach().numpy() for p in actor.parameters())

    def act(obs, rngs):
        x = np.maximum(w1 @ obs[:, :, None] + b1[:, None], 0)
        x = np.maximum(w2 @ x + b2[:, None], 0)
        mean, log_std = np.split((w3 @ x)[:, :, 0] + b3, 2, axis=1)
        noise = np.stack([rng.standard_normal(mean.shape[1], np.float32) for rng in rngs])
        return np.tanh(mean + np.exp(log_std.clip(-5, 2)) * noise)

    return act


def play_vector(envs: gym.vector.VectorEnv, actor: marvel.Actor, buffer: dict, seeds: Sequence[int]) -> int:
    """Play an episode per seed, as many at a time as there are environments; returns env steps."""
    policy, n, episodes = batched_policy(actor), envs.num_envs, []
    for first in range(0, len(seeds), n):
        own = [*seeds[first:first + n], *[None] * (first + n - len(seeds))]
        rngs = [np.random.default_rng(seed) for seed in own]
        obs, rows, over = envs.reset(seed=own)[0].astype(np.float32), [], np.zeros(n, bool)
        while not over.all():
            actions = policy(obs, rngs)
            next_obs, rewards, _, _, info = envs.step(actions)
            next_obs, ends = next_obs.astype(np.float32), (info["terminated"], info["truncated"])
            rows.append((obs, next_obs, actions, rewards, info["cost"], *ends))
            obs, over = next_obs, ends[0] | ends[1]
        columns = [np.array(column, np.float32) for column in zip(*rows, strict=True)]  # (steps, n, ...)
        lengths = 1 + (columns[5] + columns[6]).argmax(0)
        episodes += [[column[:lengths[k], k] for column in columns] for k in range(n) if own[k] is not None]
    return store(buffer, episodes)


# --- Pool ---
worker = {}  # what a process of the pool keeps between its blocks


def start_worker(env_id: str, actor: marvel.Actor) -> None:
    """Make this process's own simulator. Ctrl-C is the parent's to handle, SIGTERM ends the process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    worker.update(env=common.make_env(env_id)[0], actor=actor)


def play_share(weights: list[np.ndarray], seeds: Sequence[int]) -> list[list[np.ndarray]]:
    """In a process of the pool: take the policy's weights, play an episode per seed."""
    for parameter, value in zip(worker["actor"].parameters(), weights, strict=True):
        parameter.data = torch.from_numpy(value)
    return [play(worker["env"], worker["actor"].numpy_policy(), seed) for seed in seeds]


def play_pool(pool, n: int, actor: marvel.Actor, buffer: dict, seeds: Sequence[int]) -> int:
    """Play an episode per seed in the pool's n processes; returns env steps."""
    weights = [p.detach().numpy() for p in actor.parameters()]
    shares = pool.starmap(play_share, [(weights, seeds[k::n]) for k in range(n)], chunksize=1)
    return store(buffer, [shares[k % n][k // n] for k in range(len(seeds))])


# --- Measuring ---
def open_versions(env_id: str, num_envs: Sequence[int], episodes: int, stack: ExitStack) -> tuple[dict, dict]:
    """All versions, {name: seeds -> env steps}, and the buffer that they write to; the stack ends them."""
    env, task = common.make_env(env_id)
    actor = marvel.Actor(task.obs_dim, task.act_dim)
    widths = dict(observations=(task.obs_dim,), next_observations=(task.obs_dim,), actions=(task.act_dim,))
    buffer = {key: torch.zeros(episodes * task.max_episode_steps, *widths.get(key, ()))
              for key in common.DATASET_KEYS}
    versions = {TODAY: partial(play_today, env, actor, buffer), "by episode": lambda seeds: store(
        buffer, [play(env, actor.numpy_policy(), seed) for seed in seeds])}
    for n in num_envs:
        envs = gym.vector.AsyncVectorEnv([lambda: Waiting(common.make_env(env_id)[0])] * n, context="fork")
        stack.callback(envs.close, terminate=True)
        versions[f"vector of {n}"] = partial(play_vector, envs, actor, buffer)
    for n in num_envs:
        pool = stack.enter_context(multiprocessing.get_context("fork").Pool(n, start_worker, (env_id, actor)))
        versions[f"pool of {n}"] = partial(play_pool, pool, n, actor, buffer)
    return versions, buffer


def cpu_seconds() -> float:
    """CPU time of this process and its living children; the clock of another process is Linux's."""
    clocks = [~child.pid << 3 | 2 for child in multiprocessing.active_children()]
    return time.process_time() + sum(map(time.clock_gettime, clocks))


def measure(env_id: str, args: Args) -> str:
    """The lines of a task in the table."""
    options, task, rounds, lines = marvel.Args(), common.make_env(env_id)[1], [], ""
    step = throughput.online_update(options, throughput.start(task.obs_dim, task.act_dim, options))
    data = throughput.transitions(task.obs_dim, task.act_dim)
    with ExitStack() as stack:
        versions = open_versions(env_id, args.num_envs, args.episodes, stack)[0]
        versions[UPDATE] = lambda seeds: [step(marvel.sample(data, 256)) for _ in range(100)] and 100
        for k in tqdm(range(args.rounds + 1), env_id):
            rounds.append({})
            for name in random.Random(k).sample(list(versions), len(versions)):
                start = np.array([time.perf_counter(), cpu_seconds()])
                units = versions[name](range(k * args.episodes, (k + 1) * args.episodes))
                rounds[k][name] = (np.array([time.perf_counter(), cpu_seconds()]) - start) / units
    for name in versions:  # the first round makes what is made once
        wall, cpu, today, update = np.array([[*x[name], x[TODAY][0], x[UPDATE][0]] for x in rounds[1:]]).T
        ratios = today / wall, (today + options.utd * update) / (wall + options.utd * update)
        cells = map(throughput.spread, (1 / wall, 1e6 * cpu, *(ratios if name != UPDATE else ())))
        lines += f"| {' | '.join([env_id, name, *cells])} {'| | ' * (name == UPDATE)}|\n"
    return lines


def main(args: Args) -> None:
    for name, values in ("rounds", [args.rounds]), ("episodes", [args.episodes]), ("num-envs", args.num_envs):
        common.need(all(1 <= n <= 1000 for n in values), f"--{name}: must be between 1 and 1000")
    output = Path(args.output)
    common.need(not output.is_dir() and output.parent.is_dir() and os.access(output.parent, os.W_OK),
                f"--output {output}: must be a file in a folder that exists and can be written to")
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    torch.manual_seed(0)
    rows = "".join(measure(env_id, args) for env_id in args.env_ids)
    option = f" --episodes {args.episodes}" * (args.episodes != Args.episodes)
    text = CAPTION.format(option=option, cpu=throughput.cpu_name(), cores=os.cpu_count(), utd=marvel.Args.utd,
                          load=os.getloadavg()[0], **vars(args)) + rows
    common.write_file(output, text.encode())  # under a temporary name first
    print(f"\n{text}\nwritten to {output}")


if __name__ == "__main__":
    main(tyro.cli(Args))
