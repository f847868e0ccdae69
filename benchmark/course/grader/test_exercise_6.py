"""Exercise 6: critics whose action-gradients are given vectors, and the minimum found by trying."""

import math

import numpy as np
import pytest
import torch
from checks import CONSTANTS, require, require_close

import marvel_sac_pid

pytestmark = pytest.mark.exercise_6
SHARE = CONSTANTS["share"]


class Slopes(torch.nn.Module):
    """n critics whose gradient in the action is the vector of the state, whose number is obs[:, 0]."""

    def __init__(self, vectors, n=1):
        super().__init__()
        self.vectors = torch.nn.Parameter(torch.tensor(vectors, dtype=torch.float))
        self.n = n

    def forward(self, obs, act):
        value = (self.vectors[obs[:, 0].long()] * act).sum(-1)
        return torch.stack([(1 + k) * value + 100 * k for k in range(self.n)])  # the first is the smallest


class Actor(torch.nn.Module):
    """The same action in every state."""

    def __init__(self):
        super().__init__()
        self.bias = torch.nn.Parameter(torch.tensor([0.1, -0.2]))

    def forward(self, obs):
        return self.bias.expand(len(obs), 2).tanh(), torch.zeros(len(obs))


def multipliers(reward_slopes, cost_slopes, learning=False):
    obs = torch.arange(len(reward_slopes), dtype=torch.float)[:, None]
    networks = Actor(), Slopes(reward_slopes, 2), Slopes(cost_slopes)
    try:
        got = marvel_sac_pid.aligned_multipliers(
            obs, *(network.requires_grad_(learning) for network in networks)
        )
    except NotImplementedError:
        raise
    except RuntimeError as error:
        pytest.fail(
            f"{error} | the actor is frozen: the action itself has to ask for gradients", pytrace=False
        )
    require(
        isinstance(got, tuple) and len(got) == 2 and all(type(value) is float for value in got),
        f"two Python floats are asked for, not {got!r}",
    )
    return got, networks


REWARD, COST = [[1.0, 2.0], [3.0, -1.0], [0.5, 0.5]], [[0.5, 1.0], [1.0, 1.0], [-1.0, 2.0]]


def by_trying(reward, cost):
    """The multiplier on a fine grid with the smallest mean square."""
    grid = np.linspace(0, 5, 500_001)
    reward, cost = np.array(reward), np.array(cost)
    squares = (reward**2).sum() - 2 * grid * (reward * cost).sum() + grid**2 * (cost**2).sum()
    return grid[squares.argmin()]


@pytest.mark.points(4)
def test_the_first_is_the_least_squares_multiplier():
    (got, _), _ = multipliers(REWARD, COST)
    pairs = [(np.array(r), np.array(c)) for r, c in zip(REWARD, COST, strict=True)]
    require_close(
        "lambda_ls",
        got,
        by_trying(REWARD, COST),
        {
            "is the mean of every state's own multiplier: minimise the mean of the squares": np.mean(
                [r @ c / (c @ c) for r, c in pairs]
            ),
            "is that of the sums of the gradients: multiply state by state": sum(r for r, _ in pairs)
            @ sum(c for _, c in pairs)
            / (sum(c for _, c in pairs) @ sum(c for _, c in pairs)),
            "is the ratio of the norms": math.sqrt(np.square(REWARD).sum() / np.square(COST).sum()),
            "is divided by the reward's gradient": sum(r @ c for r, c in pairs) / np.square(REWARD).sum(),
            "is a cosine": sum(r @ c for r, c in pairs)
            / math.sqrt(np.square(REWARD).sum() * np.square(COST).sum()),
        },
    )


@pytest.mark.points(3)
def test_the_second_is_the_given_share_of_the_way_to_the_ratio_of_norms():
    (first, second), _ = multipliers(REWARD, COST)
    least, norm = by_trying(REWARD, COST), math.sqrt(np.square(REWARD).sum() / np.square(COST).sum())
    require_close(
        "the second multiplier",
        second,
        least + SHARE * (norm - least),
        {
            "is the ratio of norms itself": norm,
            "is lambda_ls": least,
            "is the mean of every state's ratio": np.mean(
                np.linalg.norm(REWARD, axis=1) / np.linalg.norm(COST, axis=1)
            ),
            "goes the way from the other end": norm + SHARE * (least - norm),
        },
    )


@pytest.mark.points(2)
def test_gradients_that_disagree_give_0():
    (first, second), _ = multipliers([[1.0, 0.0]], [[-2.0, 0.0]])
    require_close("lambda_ls of opposite gradients", first, 0.0, {"is negative": -0.5})
    require_close(
        "the second multiplier of opposite gradients",
        second,
        SHARE * 0.5,
        {"starts from the negative lambda_ls": -0.5 + SHARE * 1.0},
    )
    (first, second), _ = multipliers([[1.0, 0.0]], [[0.0, 0.0]])
    require(first == 0, f"lambda_ls is {first:g} where Qc has no gradient: 0 is asked for")
    require(math.isfinite(second), "a Qc without gradient gives infinity or nan")


@pytest.mark.points(1)
def test_no_network_learns_from_it():
    _, networks = multipliers(REWARD, COST, learning=True)
    for name, network in zip(("the actor", "Q", "Qc"), networks, strict=True):
        require(
            all(parameter.grad is None or not parameter.grad.any() for parameter in network.parameters()),
            f"{name} has gotten a gradient: take only those in the action",
        )
