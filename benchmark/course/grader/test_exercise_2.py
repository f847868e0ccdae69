"""Exercise 2: targets of four transitions by hand: inside an episode, a terminal, a time limit, large Qc."""

import importlib

import pytest
import torch
from checks import CONSTANTS, FOLDER, TableActor, require, require_close, require_shape

import marvel_sac_pid

pytestmark = pytest.mark.exercise_2
GAMMA, ALPHA, ALPHA_COST, LARGEST_COST = 0.9, 0.5, 0.25, 2.0
LOG_PROB = [-1.0, 1.2, -0.5, 0.8]
SIGN = {"+": 1, "-": -1}[CONSTANTS["cost_entropy_sign"]]
NEXT_OBS = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
BATCH = {
    "observations": -NEXT_OBS,
    "actions": torch.zeros(4, 1),
    "next_observations": NEXT_OBS,
    "rewards": torch.tensor([1.0, 2.0, 3.0, 4.0]),
    "costs": torch.tensor([0.0, 1.0, 0.5, 2.0]),
    "terminals": torch.tensor([0.0, 1.0, 0.0, 0.0]),
    "timeouts": torch.tensor([0.0, 0.0, 1.0, 0.0]),
}
# two reward critics and a cost critic: their values in the four next states
Q = torch.tensor([[5.0, 1.7, 3.4, 30.0], [4.2, 2.9, 6.0, 27.0]])
QC = torch.tensor([[3.0, 6.0, -4.0, 50.0]])


def batch():
    """A copy, which a solution may work on."""
    return {name: values.clone() for name, values in BATCH.items()}


class Table(torch.nn.Module):
    """A critic that knows the next states, for the action that the actor draws there, and nothing else."""

    def __init__(self, values):
        super().__init__()
        self.values = torch.nn.Parameter(values.clone())

    def forward(self, obs, act):
        require(
            torch.equal(obs, NEXT_OBS), "the target critics are asked about other states than the next ones"
        )
        require(
            torch.allclose(act, 2 * NEXT_OBS),
            "the target critics are asked about another action than the "
            "one that the actor draws in the next state",
        )
        return self.values


def offline_scripts():
    """Those that are in the folder."""
    found = [
        path
        for path in (FOLDER / "offline_pretrain.py", FOLDER / "benchmark/baselines/cpq.py")
        if path.exists()
    ]
    return [importlib.import_module(path.stem) for path in found]


def targets():
    return marvel_sac_pid.soft_targets(
        batch(), TableActor(LOG_PROB), Table(Q), Table(QC), GAMMA, ALPHA, ALPHA_COST, LARGEST_COST
    )


# per row, by hand: the smaller reward critic minus the entropy term; Qc cut to [0, 2 / (1 - 0.9)]
SOFT_Q = [4.2 + 0.5, 1.7 - 0.6, 3.4 + 0.25, 27 - 0.4]
CUT_QC = [3, 6, 0, 20]
SOFT_QC = [value + SIGN * ALPHA_COST * log_prob for value, log_prob in zip(CUT_QC, LOG_PROB, strict=True)]


@pytest.mark.points(3)
def test_the_reward_target_inside_an_episode():
    got, _ = targets()
    require_shape("the reward target", got, (4,))
    right = 1 + GAMMA * SOFT_Q[0]
    require_close(
        "the reward target",
        got[0],
        right,
        {
            "takes the larger of the two critics": right + GAMMA * 0.8,
            "takes the mean of the two critics": right + GAMMA * 0.4,
            "lacks the entropy term": right - GAMMA * 0.5,
            "has the entropy term with the wrong sign": right - 2 * GAMMA * 0.5,
            "has the mean log π of the batch instead of every row's": 1
            + GAMMA * (4 - ALPHA * sum(LOG_PROB) / 4),
            "lacks the discount": 1 + SOFT_Q[0],
            "lacks the reward": right - 1,
        },
    )
    require_close(
        "the reward target of a large Q",
        got[3],
        4 + GAMMA * SOFT_Q[3],
        {
            "is cut: only Qc has bounds": 4 + GAMMA * (20 - 0.4),
            "is cut after the entropy term: only Qc has bounds": 4 + GAMMA * 20,
        },
    )


@pytest.mark.points(3)
def test_a_terminal_ends_the_task_and_a_time_limit_does_not():
    got, got_cost = targets()
    end, end_cost = CONSTANTS["end_reward"], CONSTANTS["end_cost"]
    through = "bootstraps through a terminal"
    require_close(
        "the reward target of a terminal",
        got[1],
        2 + GAMMA * end,
        {
            through: 2 + GAMMA * SOFT_Q[1],
            "leaves out what Q is worth behind the end": 2.0,
            "keeps the entropy term behind the end": 2 + GAMMA * (end - ALPHA * LOG_PROB[1]),
        },
    )
    require_close(
        "the cost target of a terminal",
        got_cost[1],
        1 + GAMMA * end_cost,
        {
            through: 1 + GAMMA * SOFT_QC[1],
            "leaves out what Qc is worth behind the end": 1.0,
            "keeps the entropy term behind the end": 1 + GAMMA * (end_cost + SIGN * ALPHA_COST * LOG_PROB[1]),
        },
    )
    cut = "treats the time limit as the end of the task: only `terminals` are"
    require_close(
        "the reward target at the time limit", got[2], 3 + GAMMA * SOFT_Q[2], {cut: 3 + GAMMA * end}
    )
    require_close(
        "the cost target at the time limit",
        got_cost[2],
        0.5 + GAMMA * SOFT_QC[2],
        {cut: 0.5 + GAMMA * end_cost},
    )


@pytest.mark.points(3)
def test_the_cost_target_inside_an_episode():
    _, got = targets()
    require_shape("the cost target", got, (4,))
    entropy = SIGN * ALPHA_COST * LOG_PROB[0]
    right = GAMMA * (3 + entropy)
    require_close(
        "the cost target",
        got[0],
        right,
        {
            "lacks the entropy term": GAMMA * 3,
            "has the entropy term with the wrong sign": GAMMA * (3 - entropy),
            "has the weight of the reward's entropy": GAMMA * (3 + SIGN * ALPHA * LOG_PROB[0]),
            "lacks the discount": 3 + entropy,
        },
    )
    for row, bound, name in (2, 0.0, "below 0"), (3, 20.0, "above largest_cost / (1 - γ)"):
        cost = float(BATCH["costs"][row])
        entropy = SIGN * ALPHA_COST * LOG_PROB[row]
        require_close(
            f"the cost target of a Qc {name}",
            got[row],
            cost + GAMMA * (bound + entropy),
            {
                "is not cut": cost + GAMMA * (float(QC[0, row]) + entropy),
                "is cut after the entropy term: the bounds are those of costs": cost
                + GAMMA * min(max(float(QC[0, row]) + entropy, 0), 20),
            },
        )


@pytest.mark.points(3)
def test_the_offline_targets_are_masked_where_the_next_action_is_unsafe():
    for threshold in 8.0, 3.0:
        for script in offline_scripts():
            check_offline_targets(script, threshold)


def check_offline_targets(script, threshold):
    end, end_cost = CONSTANTS["end_reward"], CONSTANTS["end_cost"]
    # the first has Qc 3, which is safe under both thresholds; the second, a terminal, 6; the last far more
    through = 2 + GAMMA * (1.7 if threshold == 8.0 else 0.0)
    got, got_cost = script.cpq_targets(
        batch(), TableActor(LOG_PROB), Table(Q), Table(QC), GAMMA, threshold, LARGEST_COST
    )
    where = f"{script.__name__}.py, threshold {threshold:g}: the"
    right = [1 + GAMMA * 4.2, 2 + GAMMA * end, 3 + GAMMA * 3.4, 4]
    require_close(
        f"{where} reward targets",
        got,
        right,
        {
            "are not masked": [*right[:3], 4 + GAMMA * 27],
            "are masked where the next action is safe": [1, right[1], 3, 4 + GAMMA * 27],
            "are masked at the threshold itself, which is safe": [1, *right[1:]],
            "bootstrap through a terminal": [right[0], through, *right[2:]],
            "mask what is behind a terminal": [right[0], 2, *right[2:]],
            "treat the time limit as the end of the task": [*right[:2], 3 + GAMMA * end, right[3]],
            "have an entropy term": [1 + GAMMA * (4.2 + ALPHA), *right[1:]],
        },
    )
    right = [GAMMA * 3, 1 + GAMMA * end_cost, 0.5, 2 + GAMMA * 20]
    require_close(
        f"{where} cost targets",
        got_cost,
        right,
        {
            "are not cut": [*right[:2], 0.5 - GAMMA * 4, 2 + GAMMA * 50],
            "are masked: only Q's bootstrap is": [*right[:3], 2],
            "bootstrap through a terminal": [right[0], 1 + GAMMA * 6, *right[2:]],
            "treat the time limit as the end of the task": [*right[:2], 0.5 + GAMMA * end_cost, right[3]],
        },
    )
    require(not got.requires_grad and not got_cost.requires_grad, f"{where} targets have a gradient")


@pytest.mark.points(1)
def test_nothing_is_learned_through_the_targets():
    for name, value in zip(("reward", "cost"), targets(), strict=True):
        require(
            not value.requires_grad,
            f"the {name} target has a gradient: critics would learn to please their own targets",
        )
