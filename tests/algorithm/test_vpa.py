"""Value pre-alignment finds the exact values of the policy that it is given."""

from copy import deepcopy

import gymnasium as gym
import numpy as np
import pytest
import torch

import common
from benchmark.export_dataset import write_dataset
from marvel_sac_pid import Actor, Args, Critic, critic_loss, main, sample, soft_targets

# A ring of four states. From s, action a leads to s + 1 with probability (1 + a) / 2, else it stays; in
# state 1 it does not stay but terminates. All is linear in a, so the exact values are a linear system.
GAMMA, ALPHA, ALPHA_COST = 0.9, 0.5, 0.3
REWARD, REWARD_SLOPE = np.array([1.0, 0.0, 2.0, -1.0]), np.array([0.5, 1.0, 0.0, -0.5])
COST, COST_SLOPE = np.array([0.0, 1.0, 0.5, 2.0]), np.array([0.0, -0.5, 0.5, 1.0])
ENDS = 1


def exact_values(mean_action, entropy, actions, *, alpha=ALPHA, alpha_cost=ALPHA_COST, time_limit_ends=0.0,
                 terminal_ends=True):
    """Q and Qc (4, actions) of a policy with these mean actions and entropies, each (4,)."""
    def transition(action):
        p = np.zeros((len(action), 4, 4))
        for s in range(4):
            p[:, s, (s + 1) % 4] = (1 + action[:, s]) / 2
            if s != ENDS or not terminal_ends:
                p[:, s, s] = (1 - action[:, s]) / 2
        return GAMMA * (1 - time_limit_ends) * p

    result = []
    grid = np.repeat(actions[:, None], 4, 1)
    for base, slope, weight in ((REWARD, REWARD_SLOPE, alpha), (COST, COST_SLOPE, alpha_cost)):
        step = base + slope * mean_action + weight * entropy
        value = np.linalg.solve(np.eye(4) - transition(mean_action[None])[0], step)
        result.append((base + slope * grid + transition(grid) @ value).T)
    return result


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
                rows["rewards"].append(REWARD[s] + REWARD_SLOPE[s] * action)
                rows["costs"].append(COST[s] + COST_SLOPE[s] * action)
                rows["terminals"].append(s == ENDS and not moves)
                rows["timeouts"].append(k % 5 == 0 and not rows["terminals"][-1])
    return {key: torch.tensor(np.array(value), dtype=torch.float32) for key, value in rows.items()}


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
def aligned():
    """Critics after the same update loop as in main, and the policy that they are of."""
    torch.manual_seed(0)
    args = Args()
    actor = Actor(4, 1, hidden=16).requires_grad_(False)
    actor.head.weight[0] *= 10
    data = transitions()
    q, qc = Critic(2, 4, 1, hidden=64), Critic(1, 4, 1, hidden=64)
    q_target, qc_target = deepcopy(q).requires_grad_(False), deepcopy(qc).requires_grad_(False)
    params = [*q.parameters(), *qc.parameters()]
    target_params = [*q_target.parameters(), *qc_target.parameters()]
    optimizer = torch.optim.Adam(params, args.critic_lr, fused=True)
    for step in range(2000):
        optimizer.param_groups[0]["lr"] = args.critic_lr if step < 1500 else args.critic_lr / 10
        batch = sample(data, args.batch_size)
        targets = soft_targets(batch, actor, q_target, qc_target, GAMMA, ALPHA, ALPHA_COST)
        loss = sum(critic_loss(batch, q, qc, *targets))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(target_params, params, args.vpa_tau)
    actions = np.linspace(-0.9, 0.9, 7)
    obs = torch.eye(4).repeat_interleave(7, 0)
    act = torch.tensor(np.tile(actions, 4), dtype=torch.float32)[:, None]
    with torch.no_grad():
        learned = [q(obs, act).mean(0).reshape(4, 7).numpy(), qc(obs, act).mean(0).reshape(4, 7).numpy()]
    return learned, moments(actor), actions


TOLERANCE = 0.04  # of the largest exact value


def worst_errors(learned, exact):
    return [abs(mine - true).max() / abs(true).max() for mine, true in zip(learned, exact, strict=True)]


def test_vpa_finds_the_exact_values(aligned):
    learned, policy, actions = aligned
    assert policy[0].max() - policy[0].min() > 0.1  # a policy that depends on the state
    assert max(worst_errors(learned, exact_values(*policy, actions))) < TOLERANCE


@pytest.mark.parametrize("mistake", [
    {"time_limit_ends": 0.2}, {"terminal_ends": False}, {"alpha": 0.0, "alpha_cost": 0.0},
    {"alpha": -ALPHA, "alpha_cost": -ALPHA_COST},
])
def test_vpa_values_are_told_from_those_of_a_mistake(aligned, mistake):
    learned, policy, actions = aligned
    assert min(worst_errors(learned, exact_values(*policy, actions, **mistake))) > 2 * TOLERANCE


class Ring(gym.Env):
    """The ring as a simulator, for the script to open; the values are judged without it."""

    observation_space = gym.spaces.Box(0, 1, (4,))
    action_space = gym.spaces.Box(-1, 1, (1,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.eye(4)[0], {}

    def step(self, action):
        return np.eye(4)[0], 0.0, False, False, {"cost": 0.0}


def test_vpa_of_the_script_finds_the_exact_values(tmp_path):
    gym.register("Ring-v0", entry_point=Ring, max_episode_steps=10)
    args = Args(env_id="Ring-v0", gamma=GAMMA, reward_scale=0.5, vpa_alpha=ALPHA, vpa_alpha_cost=ALPHA_COST,
                vpa_steps=1500, vpa_critics="fresh", utd=1e-9, total_timesteps=10, eval_episodes=1,
                checkpoint=str(tmp_path / "offline.pt"), dataset_path=str(tmp_path / "ring.hdf5"),
                run_dir=str(tmp_path / "run"))
    torch.manual_seed(0)
    actor = Actor(4, 1)
    actor.head.weight.data[0] *= 10
    common.save_checkpoint(tmp_path / "offline.pt", dict(
        env_id="Ring-v0", obs_dim=4, act_dim=1, hidden=256, activation="relu", gamma=GAMMA, reward_scale=0.5,
        finished=True, actor=actor.state_dict(), q=Critic(2, 4, 1).state_dict(),
        qc=Critic(1, 4, 1).state_dict()))
    data = transitions()
    data["rewards"] = data["rewards"] / args.reward_scale  # so that the scaled rewards are those of the table
    write_dataset(tmp_path / "ring.hdf5", data, {"task": "Ring-v0"})
    main(args)

    result = common.load_checkpoint(tmp_path / "run/checkpoint.pt")
    actions = np.linspace(-0.9, 0.9, 7)
    obs = torch.eye(4).repeat_interleave(7, 0)
    act = torch.tensor(np.tile(actions, 4), dtype=torch.float32)[:, None]
    learned = []
    for name, n in ("q", 2), ("qc", 1):
        critic = Critic(n, 4, 1)
        critic.load_state_dict(result[name])
        learned.append(critic(obs, act).detach().mean(0).reshape(4, 7).numpy())
    exact = exact_values(*moments(actor), actions)
    assert max(worst_errors(learned, exact)) < 2 * TOLERANCE  # no decay of the learning rate here
