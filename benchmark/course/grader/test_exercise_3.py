"""Exercise 3: the script's own main on a tiny dataset, watched: what is asked, learned and followed."""

import functools
import tempfile
from pathlib import Path

import gymnasium as gym
import h5py
import numpy as np
import pytest
import torch
from checks import CONSTANTS, require, require_close

import common
import marvel_sac_pid

pytestmark = pytest.mark.exercise_3
EVERY = CONSTANTS["follow_every"]
STEPS = 3 * EVERY + 2
BATCH_SIZE, TAU, GAMMA, ALPHA, ALPHA_COST = 16, 0.25, 0.9, 0.03, 0.004
TASK = "Nothing-v0"
OBS_DIM, ACT_DIM = 3, 2


class Nothing(gym.Env):
    """A task without a state: VPA plays no step of it."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (OBS_DIM,))
    action_space = gym.spaces.Box(-1, 1, (ACT_DIM,))

    def reset(self, *, seed=None, options=None):
        return np.zeros(OBS_DIM, np.float32), {}

    def step(self, action):
        return np.zeros(OBS_DIM, np.float32), 0.0, False, False, {"cost": 0.0}


gym.register(TASK, Nothing, max_episode_steps=200)


@functools.cache
def watched():
    """What a run of VPA did: calls of the targets, and the (found, right) gradients of every step."""
    folder = Path(tempfile.mkdtemp())
    draw = np.random.default_rng(0)
    rows = 400
    with h5py.File(folder / "data.hdf5", "w") as file:
        file["observations"] = draw.normal(size=(rows, OBS_DIM)).astype(np.float32)
        file["next_observations"] = draw.normal(size=(rows, OBS_DIM)).astype(np.float32)
        file["actions"] = draw.uniform(-1, 1, (rows, ACT_DIM)).astype(np.float32)
        file["rewards"] = draw.uniform(0, 10, rows).astype(np.float32)
        file["costs"] = (draw.uniform(size=rows) < 0.3).astype(np.float32)
        file["terminals"] = np.zeros(rows, bool)
        file["timeouts"] = np.arange(rows) % 200 == 199
    seen = {"asked": [], "gradients": [], "critics": [], "rows": file_rows(folder / "data.hdf5")}

    class WatchedCritic(marvel_sac_pid.Critic):
        def __init__(self, *sizes):
            super().__init__(*sizes)
            seen["critics"].append(self)

    def targets(batch, actor, q_target, qc_target, gamma, alpha, alpha_cost, largest_cost):
        q, qc = seen["critics"]
        require(
            q_target not in (q, qc) and qc_target not in (q, qc),
            "the targets are asked of the critics themselves: give soft_targets their target networks",
        )
        require(q_target.n == 2 and qc_target.n == 1, "the target networks of Q and Qc are exchanged")
        zeros = torch.zeros_like(batch["actions"])
        with torch.no_grad():
            values = (
                batch["rewards"] + 0.5 * q_target(batch["next_observations"], zeros).amin(0),
                batch["costs"] + 0.5 * qc_target(batch["next_observations"], zeros).amin(0),
            )
        seen["asked"].append(
            dict(
                batch=batch,
                actor=weights(actor),
                numbers=(gamma, alpha, alpha_cost, largest_cost),
                values=values,
                critics=[weights(q), weights(qc)],
                targets=[weights(q_target), weights(qc_target)],
            )
        )
        return values

    adam_step = torch.optim.Adam.step

    def step(optimizer, *args):
        q, qc = seen["critics"]
        found = [parameter.grad for parameter in (*q.parameters(), *qc.parameters())]
        if seen["asked"]:
            last = seen["asked"][-1]
            obs, act = last["batch"]["observations"], last["batch"]["actions"]
            loss = sum(
                ((critic(obs, act) - value) ** 2).mean(1).sum()
                for critic, value in zip((q, qc), last["values"], strict=True)
            )
            right = torch.autograd.grad(loss, [*q.parameters(), *qc.parameters()])
            seen["gradients"].append((found and [None if g is None else g.clone() for g in found], right))
        return adam_step(optimizer, *args)

    result = {
        "eval_sampled_return": 0.0,
        "eval_sampled_cost": 0.0,
        "eval_mean_return": 0.0,
        "eval_mean_cost": 0.0,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(marvel_sac_pid, "Critic", WatchedCritic)
        patch.setattr(marvel_sac_pid, "soft_targets", targets)
        patch.setattr(marvel_sac_pid, "aligned_multipliers", lambda *networks: (1.0, 1.0))
        patch.setattr(common, "load_weights", lambda *args, **networks: None)
        patch.setattr(common, "evaluate_both_ways", lambda *args: dict(result))
        patch.setattr(torch.optim.Adam, "step", step)
        try:
            marvel_sac_pid.main(
                marvel_sac_pid.Args(
                    env_id=TASK,
                    dataset_path=str(folder / "data.hdf5"),
                    run_dir=str(folder / "run"),
                    total_timesteps=0,
                    seed=3,
                    batch_size=BATCH_SIZE,
                    gamma=GAMMA,
                    vpa_steps=STEPS,
                    vpa_tau=TAU,
                    vpa_alpha=ALPHA,
                    vpa_alpha_cost=ALPHA_COST,
                    tau=0.1,
                    alpha=0.5,
                )
            )
        except UnboundLocalError as error:
            pytest.fail(f"{error}: leave critic_loss's second result in `metrics`", pytrace=False)
    seen["end"] = common.load_checkpoint(folder / "run/checkpoint.pt")
    return seen


def file_rows(path):
    with h5py.File(path) as file:
        return {row.tobytes() for row in file["observations"][()]}


def weights(network):
    return torch.cat([parameter.detach().flatten() for parameter in network.parameters()]).clone()


@pytest.mark.points(2)
def test_every_step_takes_a_new_batch_of_the_dataset():
    asked = watched()["asked"]
    require(
        len(asked) == STEPS, f"the targets were asked for {len(asked)} times in {STEPS} steps: once per step"
    )
    for call in asked:
        observations = call["batch"]["observations"].numpy()
        require(
            len(observations) == BATCH_SIZE,
            f"a batch has {len(observations)} rows where args.batch_size is {BATCH_SIZE}",
        )
        require(
            all(row.tobytes() in watched()["rows"] for row in observations), "a batch is not of the dataset"
        )
    first, second = (call["batch"]["observations"] for call in asked[:2])
    require(not torch.equal(first, second), "every step has the same batch")


@pytest.mark.points(2)
def test_the_targets_are_those_of_the_frozen_offline_policy():
    first, last = watched()["asked"][0], watched()["asked"][-1]
    require(torch.equal(first["actor"], last["actor"]), "the policy changes during VPA: it is frozen")
    gamma, alpha, alpha_cost, largest_cost = first["numbers"]
    require(gamma == GAMMA, "the targets have another discount than args.gamma")
    require(
        alpha == ALPHA,
        f"the entropy weight is {alpha:g} where args.vpa_alpha is {ALPHA:g}: --alpha is online's",
    )
    require(
        alpha_cost == ALPHA_COST,
        f"the cost's entropy weight is {alpha_cost:g} where args.vpa_alpha_cost is {ALPHA_COST:g}",
    )
    require(largest_cost == 1.0, 'largest_cost is not progress["largest_cost"]')


@pytest.mark.points(3)
def test_the_critics_learn_from_this_steps_loss_alone():
    require(
        len(watched()["gradients"]) == STEPS,
        f"{len(watched()['gradients'])} steps of an optimiser in {STEPS}",
    )
    for k, (found, right) in enumerate(watched()["gradients"]):
        require(
            all(gradient is not None for gradient in found),
            "a critic has no gradient when its optimiser steps",
        )
        found = torch.cat([gradient.flatten() for gradient in found])
        right = torch.cat([gradient.flatten() for gradient in right])
        before = sum(torch.cat([g.flatten() for g in other]) for _, other in watched()["gradients"][: k + 1])
        half = torch.cat([g.flatten() for g in watched()["gradients"][k][1]]) / 2
        require_close(
            "the gradient of the critics",
            found,
            right,
            {
                "still holds those of the steps before: zero_grad is missing": before,
                "is 0": 0.0,
                "is that of half the squared error": half,
                "has the wrong sign: they climb": -right,
            },
        )


@pytest.mark.points(2)
def test_the_target_networks_follow_with_vpas_own_step():
    end = [
        torch.cat([values.flatten() for values in watched()["end"][name].values()])
        for name in ("q", "qc", "q_target", "qc_target")
    ]
    asked = [*watched()["asked"], dict(critics=end[:2], targets=end[2:])]
    moved = [
        k + 1 for k in range(STEPS) if not torch.equal(asked[k]["targets"][0], asked[k + 1]["targets"][0])
    ]
    due = [k + 1 for k in range(STEPS) if (k + 1) % EVERY == 0]
    require(moved == due, f"Q's target network moved after the steps {moved}, of {STEPS}; right is {due}")
    for k in range(STEPS):
        for name, which in ("Q", 0), ("Qc", 1):
            before, now = asked[k]["targets"][which], asked[k + 1]["critics"][which]
            right = torch.lerp(before, now, TAU) if k + 1 in due else before
            require_close(
                f"{name}'s target network",
                asked[k + 1]["targets"][which],
                right,
                {
                    "does not follow": before,
                    "is a copy of the critic": now,
                    "follows with args.tau, which is the online step": torch.lerp(before, now, 0.1),
                    "follows the critic of before the update": torch.lerp(
                        before, asked[k]["critics"][which], TAU
                    ),
                },
                tolerance=1e-5,
            )
