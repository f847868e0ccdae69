"""A task of a few steps, a small run of every script on it, and what its functions were given."""

import dataclasses
import functools
import inspect
import tempfile
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch

import common
import marvel_sac_pid
import offline_pretrain
from benchmark.baselines import (
    bc_safe,
    bear_lag,
    cpq,
    jsrl,
    marvel_released_pid,
    marvel_td3_pid,
    pex,
    rlpd,
    so2,
)
from benchmark.tools.curves import read_metrics
from benchmark.tools.export_dataset import write_dataset

TASK = "Ledger-v0"
HORIZON = 10
OBS_DIM, ACT_DIM = 3, 2
FOLDER = tempfile.TemporaryDirectory()  # of all runs; removed at the end
both_scripts = pytest.mark.parametrize("script", [marvel_sac_pid, offline_pretrain], ids=lambda x: x.__name__)


class Ledger(gym.Env):
    """Every observation is new, so that it names its step. The simulator keeps a list of what happened.

    One step in fifteen ends the task. An episode costs as much as is drawn for it, 0 to 7, if it lasts.
    """

    observation_space = gym.spaces.Box(-np.inf, np.inf, (OBS_DIM,))
    action_space = gym.spaces.Box(-1, 1, (ACT_DIM,))
    made = []

    def __init__(self):
        self.steps = []
        Ledger.made.append(self)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.length, self.cost = 0, self.np_random.integers(8)
        self.obs = self.np_random.normal(size=OBS_DIM).astype(np.float32)
        return self.obs, {}

    def step(self, action):
        obs, self.obs = self.obs, self.np_random.normal(size=OBS_DIM).astype(np.float32)
        self.length += 1
        reward, cost = float(obs[0] + action[0]), float(self.length <= self.cost)
        terminated, truncated = bool(self.obs[2] > 1.5), self.length == HORIZON
        self.steps.append((obs, self.obs, action.astype(np.float32), reward, cost, terminated, truncated))
        return self.obs, reward, terminated, False, {"cost": cost}


gym.register(TASK, Ledger, max_episode_steps=HORIZON)


def arrays_of(steps):
    """The arrays of a dataset."""
    columns = zip(common.DATASET_KEYS, zip(*steps, strict=True), strict=True)
    return {key: np.array(values, np.float32) for key, values in columns}


@functools.cache
def dataset():
    """30 episodes of uniform actions: arrays, which tests must not change, and their file."""
    env, rng = gym.make(TASK, disable_env_checker=True), np.random.default_rng(0)
    for k in range(30):
        env.reset(seed=1000 + k)
        done = False
        while not done:
            _, _, terminated, truncated, _ = env.step(rng.uniform(-1, 1, ACT_DIM))
            done = terminated or truncated
    data = arrays_of(env.unwrapped.steps)
    data["timeouts"] *= 1 - data["terminals"]
    write_dataset(Path(FOLDER.name) / "data.hdf5", data, {"task": TASK})
    return data, Path(FOLDER.name) / "data.hdf5"


# --- Runs ---
# Values differ from the defaults and from each other, so that none can stand in for another.
BOTH = dict(env_id=TASK, batch_size=17, eval_episodes=2, gamma=0.95, reward_scale=0.2)
OFFLINE = dict(**BOTH, update_steps=20, eval_every=7, cost_limit=3.0)
ONLINE = dict(**BOTH, total_timesteps=50, utd=1.0, eval_every=20, cost_limit=2.0, cost_margin=0.25,
              tau=0.01, actor_tau=0.06, alpha=0.02, kp=0.02, ki=0.01, kd=0.03, adapt_rate=0.07)
VPA = dict(vpa_steps=12, vpa_tau=0.2, vpa_alpha=0.03, vpa_alpha_cost=0.004)
POLICY = dict(tau=0.03, qc_tau=0.04, bc_weight=0.2)
PENALTY = dict(ood_actions=3, ood_quantile=0.8, ood_weight=0.05)
KINDS = {
    "offline": (offline_pretrain, {**OFFLINE, **POLICY}),
    "cpq": (cpq, {**OFFLINE, **POLICY, **PENALTY}),
    "bear_lag": (bear_lag, {**OFFLINE, "tau": 0.03, "bear_actions": 3}),
    "bc_safe": (bc_safe, OFFLINE),
    "marvel": (marvel_sac_pid, {**ONLINE, **VPA}),
    "rollouts": (marvel_sac_pid, {**ONLINE, **VPA, "vpa_data": "rollouts", "learning_starts": 15}),
    "scratch": (marvel_sac_pid, {**ONLINE, "from_scratch": True, "learning_starts": 15}),
    "released": (marvel_released_pid, {**ONLINE, **VPA}),
    "jsrl": (jsrl, {**ONLINE, "learning_starts": 15}),
    "pex": (pex, ONLINE),
    "so2": (so2, {**ONLINE, "critic_updates": 3, "target_noise": 0.2, "noise_clip": 0.5}),
    "rlpd": (rlpd, {**ONLINE, "learning_starts": 15}),
    "td3": (marvel_td3_pid, {**ONLINE, **VPA, "policy_delay": 1, "target_noise": 0.25, "noise_clip": 0.4}),
}
SOURCE = {"marvel": "offline", "rollouts": "offline", "released": "offline", "td3": "offline",
          "jsrl": "bear_lag", "pex": "bear_lag", "so2": "bear_lag"}  # whose checkpoint a run starts from
RECORDED = ("_targets", "_loss", "_shortfall", "_likelihood", "composed_policy")  # ends of names


def options_of(kind):
    """The options of a kind of run as far as the script has them, with the files that it starts from."""
    script, options = KINDS[kind]
    known = {field.name for field in dataclasses.fields(getattr(script, "Args", marvel_sac_pid.Args))}
    options = {name: value for name, value in options.items() if name in known}
    if kind not in ("rollouts", "scratch", "jsrl"):
        options = {**options, "dataset_path": str(dataset()[1])}
    if kind in SOURCE:
        options = {**options, "checkpoint": f"{run(SOURCE[kind]).args.run_dir}/checkpoint.pt"}
    return options


def new_run(kind, **options):
    """A run of a script: its arguments, checkpoint, metrics, simulators and recorded calls."""
    script, _ = KINDS[kind]
    options = {**options_of(kind), "run_dir": tempfile.mkdtemp(dir=FOLDER.name), **options}
    args, calls = getattr(script, "Args", marvel_sac_pid.Args)(**options), []
    made_before = len(Ledger.made)
    with pytest.MonkeyPatch.context() as patch:
        recorded = marvel_sac_pid if script is marvel_released_pid else script
        for name in [name for name in vars(recorded) if name.endswith(RECORDED)]:
            record(patch, calls, recorded, name)
        if hasattr(recorded, "VAE"):
            record(patch, calls, recorded.VAE, "loss")
        script.main(args)
    checkpoint = common.load_checkpoint(f"{args.run_dir}/checkpoint.pt")
    metrics = read_metrics(f"{args.run_dir}/metrics.csv")
    return SimpleNamespace(script=recorded, args=args, checkpoint=checkpoint, metrics=metrics, calls=calls,
                           made=Ledger.made[made_before:])


run = functools.cache(new_run)  # tests share a run of the same options, and must not change it


@functools.cache
def start_from(mean, log_std=-5.0, source="offline"):
    """A file like an offline run's, but for its policy: a = tanh(u), u ~ N(mean, exp(log_std)^2)."""
    checkpoint = run(source).checkpoint
    bias = torch.tensor([*mean, *[log_std] * ACT_DIM])
    weight = torch.zeros_like(checkpoint["actor"]["head.weight"])
    file = Path(tempfile.mkdtemp(dir=FOLDER.name)) / "start.pt"
    actor = {**checkpoint["actor"], "head.weight": weight, "head.bias": bias}
    common.save_checkpoint(file, {**checkpoint, "actor": actor})
    return str(file)


def steps_of(result):
    """What the simulator did that the run was trained in, from its first episode on, as arrays."""
    first = result.checkpoint["buffer"]["observations"][0].numpy()
    (steps,) = [env.steps[k:] for env in result.made for k, step in enumerate(env.steps)
                if np.array_equal(step[0], first)]
    return arrays_of(steps)


def evaluation_of(result, weights):
    """What a policy of these weights gets, sampled with the run's seed and by its mean actions."""
    env, _ = common.make_env(TASK)
    actor = result.script.Actor(OBS_DIM, ACT_DIM)
    actor.load_state_dict(weights)
    policy, rng = actor.numpy_policy(), np.random.default_rng(result.args.seed)
    played = {"sampled": common.evaluate(env, lambda obs: policy(obs, rng), result.args.eval_episodes),
              "mean": common.evaluate(env, policy, result.args.eval_episodes)}
    env.close()
    return {f"eval_{how}_{what}": result[what].mean() for how, result in played.items()
            for what in ("return", "cost")}


def cost_critics(kind):
    """How many networks a script's cost critic has: stubs have as many, equal ones."""
    call = of(run(kind), "critic_loss")[0]
    return len(call.qc(call.batch["observations"], call.batch["actions"]))


# --- Recording ---
def snapshot(network):
    """Every 29th parameter: enough to tell networks apart."""
    return torch.cat([p.detach().flatten() for p in network.parameters()])[::29].clone()


def frozen(value):
    """A copy that later updates do not change; networks stay what they are."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: frozen(item) for key, item in value.items()}
    return tuple(map(frozen, value)) if isinstance(value, tuple) else value


def record(patch, calls, owner, name):
    """Append every call of owner.name to `calls`: its arguments by name, and the result.

    Of networks it keeps what their parameters were, too.
    """
    original = getattr(owner, name)
    signature = inspect.signature(original)

    def spy(*args, **options):
        given = signature.bind(*args, **options).arguments
        call = {key: frozen(value) for key, value in given.items()}
        networks = {key: value for key, value in given.items() if isinstance(value, torch.nn.Module)}
        call |= {f"{key}_parameters": snapshot(network) for key, network in networks.items()}
        result = original(*args, **options)
        calls.append(SimpleNamespace(function=f"{owner.__name__}.{name}", **call, result=frozen(result)))
        return result

    patch.setattr(owner, name, spy)


def of(result, *names):
    """A run's recorded calls of functions whose names end so."""
    return [call for call in result.calls if call.function.endswith(names)]


def rows_of(batch, data, reward_scale=BOTH["reward_scale"]):
    """Row numbers in `data` of a batch's transitions, -1 for those that it does not hold."""
    index = {obs.tobytes(): row for row, obs in enumerate(data["observations"])}
    rows = np.array([index.get(obs.tobytes(), -1) for obs in batch["observations"].numpy()])
    found = rows >= 0
    for key, values in data.items():
        expected = values[rows[found]] * (reward_scale if key == "rewards" else 1)
        np.testing.assert_allclose(batch[key].numpy()[found], expected, rtol=1e-5, atol=1e-7, err_msg=key)
    return rows


# --- Stubs ---
NEXT_OBS = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
BATCH = {"observations": -NEXT_OBS, "actions": torch.zeros(4, 1), "next_observations": NEXT_OBS,
         "rewards": torch.tensor([1.0, 2.0, 3.0, 4.0]), "costs": torch.tensor([0.0, 1.0, 0.0, 1.0]),
         "terminals": torch.tensor([1.0, 0.0, 0.0, 0.0]), "timeouts": torch.tensor([0.0, 1.0, 0.0, 0.0])}
Q_TABLE = [5.0, 1.0, 3.0, 8.0], [4.0, 2.0, 6.0, 7.0]  # the smaller ones are 4, 1, 3, 7


class StubActor:
    """Twice the observation as action, and given log-densities."""

    def __init__(self, log_prob):
        self.log_prob = torch.tensor(log_prob)

    def __call__(self, obs):
        return 2 * obs, self.log_prob


class StubCritic:
    """A given table (n, batch), where the action is the stub actor's on the expected observations."""

    def __init__(self, *rows, obs=NEXT_OBS):
        self.table, self.obs = torch.tensor(rows), obs

    def __call__(self, obs, act):
        torch.testing.assert_close(obs, self.obs)
        torch.testing.assert_close(act, 2 * self.obs)
        return self.table


def constant_actor(script, mean, log_std, obs_dim=1):
    """A small policy whose u ~ N(mean, exp(log_std)^2) in every state."""
    actor = script.Actor(obs_dim, len(mean), hidden=4)
    with torch.no_grad():
        actor.head.weight.zero_()
        actor.head.bias.copy_(torch.tensor([*mean, *log_std]))
    return actor
