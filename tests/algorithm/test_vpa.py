"""Value pre-alignment, as marvel_sac_pid.main does it, finds the exact values of the offline policy."""

from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from tiny import new_run, run

import common
import marvel_sac_pid
import offline_pretrain
from benchmark.tools.export_dataset import write_dataset

# A ring of four states. From s, action a leads to s + 1 with probability (1 + a) / 2, else it stays; in
# state 1 it does not stay but terminates. All is linear in a, so the exact values are a linear system.
GAMMA, ALPHA, ALPHA_COST, REWARD_SCALE = 0.8, 0.5, 0.3, 0.5
REWARD, REWARD_SLOPE = np.array([1.0, 0.0, 2.0, -1.0]), np.array([0.5, 1.0, 0.0, -0.5])
COST, COST_SLOPE = np.array([0.0, 1.0, 0.5, 2.0]), np.array([0.0, 0.5, -0.5, 1.0])
ENDS = 1


class Ring(gym.Env):
    """The ring as a simulator, for the scripts to open; VPA must do without it."""

    observation_space = gym.spaces.Box(0, 1, (4,))
    action_space = gym.spaces.Box(-1, 1, (1,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.eye(4)[0], {}

    def step(self, action):
        return np.eye(4)[0], 0.0, False, False, {"cost": 0.0}


gym.register("Ring-v0", Ring, max_episode_steps=10)


def transitions():
    """Every outcome of uniform actions, in its proportion; every fifth transition is cut by a time limit."""
    rows = {key: [] for key in common.DATASET_KEYS}
    for s in range(4):
        for action in np.linspace(-1, 1, 41):
            for k in range(40):
                moves = (k + 0.5) / 40 < (1 + action) / 2
                rows["observations"].append(np.eye(4)[s])
                rows["next_observations"].append(np.eye(4)[(s + moves) % 4])
                rows["actions"].append([action])
                rows["rewards"].append((REWARD[s] + REWARD_SLOPE[s] * action) / REWARD_SCALE)
                rows["costs"].append(COST[s] + COST_SLOPE[s] * action)
                rows["terminals"].append(s == ENDS and not moves)
                rows["timeouts"].append(k % 5 == 0 and not rows["terminals"][-1])
    return {key: np.array(value) for key, value in rows.items()}


def exact_values(mean_action, entropy, actions, *, alpha=ALPHA, alpha_cost=ALPHA_COST, gamma=GAMMA,
                 reward_factor=1.0, terminal_ends=True, time_limit_ends=0.0):
    """Q and Qc (4, actions) of a policy with these mean actions and entropies, each (4,)."""
    def transition(action):
        p = np.zeros((len(action), 4, 4))
        for s in range(4):
            p[:, s, (s + 1) % 4] = (1 + action[:, s]) / 2
            if s != ENDS or not terminal_ends:
                p[:, s, s] = (1 - action[:, s]) / 2
        return gamma * (1 - time_limit_ends) * p

    result = []
    grid = np.repeat(actions[:, None], 4, 1)
    for base, slope, weight in ((reward_factor * REWARD, reward_factor * REWARD_SLOPE, alpha),
                                (COST, COST_SLOPE, alpha_cost)):
        # V = E[r] + weight H + P V, and Q = r + P V
        step = base + slope * mean_action + weight * entropy
        value = np.linalg.solve(np.eye(4) - transition(mean_action[None])[0], step)
        result.append((base + slope * grid + transition(grid) @ value).T)
    return result


def moments(actor):
    """Mean action and entropy of the policy in every state, by Gauss-Hermite quadrature."""
    with torch.no_grad():
        mean, log_std = (x.squeeze(1).double().numpy()[:, None] for x in actor.gaussian(torch.eye(4)))
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    weights = weights / weights.sum()
    u = mean + np.exp(log_std) * nodes
    log_prob = -nodes**2 / 2 - np.log(2 * np.pi) / 2 - log_std + 2 * np.log(np.cosh(u))
    return np.tanh(u) @ weights, -log_prob @ weights


@pytest.fixture(scope="module")
def aligned(tmp_path_factory):
    """What VPA leaves of critics as good as random: values at some actions, and the policy's moments."""
    folder = tmp_path_factory.mktemp("ring")
    options = dict(env_id="Ring-v0", gamma=GAMMA, reward_scale=REWARD_SCALE, eval_episodes=1, batch_size=128,
                   dataset_path=str(folder / "ring.hdf5"))
    write_dataset(folder / "ring.hdf5", transitions(), {"task": "Ring-v0"})
    offline_pretrain.main(offline_pretrain.Args(**options, update_steps=1, run_dir=str(folder / "offline")))
    before = common.load_checkpoint(folder / "offline/checkpoint.pt")
    before["actor"]["head.weight"][0] *= 10  # the policy depends on the state
    common.save_checkpoint(folder / "offline.pt", before)
    critics, loss = [], marvel_sac_pid.critic_loss

    def keep_critics(batch, q, qc, *targets):
        critics[:] = q, qc
        return loss(batch, q, qc, *targets)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(marvel_sac_pid, "critic_loss", keep_critics)
        marvel_sac_pid.main(marvel_sac_pid.Args(
            **options, vpa_steps=600, vpa_alpha=ALPHA, vpa_alpha_cost=ALPHA_COST, total_timesteps=0,
            checkpoint=str(folder / "offline.pt"), run_dir=str(folder / "run")))
    after = common.load_checkpoint(folder / "run/checkpoint.pt")
    actor, actions = marvel_sac_pid.Actor(4, 1), np.linspace(-0.9, 0.9, 7)
    actor.load_state_dict(before["actor"])
    obs, act = torch.eye(4).repeat_interleave(7, 0), torch.tensor(np.tile(actions, 4), dtype=torch.float32)
    values = []
    for name, network in zip(("q", "qc"), critics, strict=True):
        network.load_state_dict(after[name])
        values.append(network(obs, act[:, None]).detach().mean(0).reshape(4, 7).numpy())
    return SimpleNamespace(values=values, policy=moments(actor), actions=actions, before=before, after=after)


TOLERANCE = 0.09  # of the exact values' norm


def test_vpa_finds_the_exact_values(aligned):
    assert np.ptp(aligned.policy[0]) > 0.1
    for mine, exact in zip(aligned.values, exact_values(*aligned.policy, aligned.actions), strict=True):
        assert np.linalg.norm(mine - exact) < TOLERANCE * np.linalg.norm(exact)


@pytest.mark.parametrize("mistake", [
    {"time_limit_ends": 0.2}, {"terminal_ends": False}, {"alpha": 0.0, "alpha_cost": 0.0},
    {"alpha": -ALPHA, "alpha_cost": -ALPHA_COST}, {"alpha": ALPHA_COST, "alpha_cost": ALPHA},
    {"alpha": 0.01, "alpha_cost": 0.001}, {"gamma": 0.9}, {"reward_factor": 1 / REWARD_SCALE},
])
def test_vpa_values_are_told_from_those_of_a_mistake(aligned, mistake):
    right = exact_values(*aligned.policy, aligned.actions)
    wrong = exact_values(*aligned.policy, aligned.actions, **mistake)
    for mine, x, y in zip(aligned.values, right, wrong, strict=True):
        if not np.allclose(x, y):
            assert np.linalg.norm(mine - y) > 1.5 * TOLERANCE * np.linalg.norm(y)


def test_vpa_leaves_the_policy_alone(aligned):
    for key, weight in aligned.before["actor"].items():
        assert torch.equal(aligned.after["actor"][key], weight), key


@pytest.mark.parametrize("critics", ["offline", "fresh"])
def test_without_a_step_of_vpa_the_critics_are_the_offline_ones_or_fresh_ones(critics):
    before = run("offline").checkpoint
    after = new_run("marvel", vpa_steps=0, total_timesteps=0, vpa_critics=critics).checkpoint
    for network in ("q", "qc"):
        for key, weight in before[network].items():
            assert torch.equal(after[network][key], weight) == (critics == "offline"), (network, key)
            assert torch.equal(after[f"{network}_target"][key], after[network][key])
