"""Exercise 1: the sample and its density, against the change of variables done numerically."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch
from checks import CONSTANTS, FOLDER, require, require_close, require_shape

pytestmark = pytest.mark.exercise_1
SQUASH = CONSTANTS["squash"]
SCRIPTS = [
    path
    for path in ("marvel_sac_pid.py", "offline_pretrain.py", "benchmark/baselines/cpq.py")
    if (FOLDER / path).exists()
]


def actors(mean, log_std):
    """(script, policy in doubles that is the same in every state) of every script."""
    for path in SCRIPTS:
        spec = importlib.util.spec_from_file_location(Path(path).stem, FOLDER / path)
        script = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(script)
        actor = script.Actor(1, len(mean), hidden=4).double()
        with torch.no_grad():
            actor.head.weight.zero_()
            actor.head.bias.copy_(torch.tensor([*mean, *log_std]))
        yield path, actor


def log_slope(u):
    """log |da / du| of the squashing by a central difference, in doubles."""
    step = 1e-6
    rise = torch.tanh((u + step) / SQUASH) - torch.tanh((u - step) / SQUASH)
    return torch.log(rise / (2 * step))


@pytest.mark.points(2)
def test_the_sample_is_a_squashed_gaussian_that_gradients_pass_through():
    mean, log_std = [0.4, -0.3], [-1.0, -0.5]
    for path, actor in actors(mean, log_std):
        torch.manual_seed(0)
        action, _ = actor(torch.zeros(50_000, 1, dtype=torch.double))
        require_shape(f"{path}: the action", action, (50_000, 2))
        require((action.abs() <= 1).all(), f"{path}: actions leave [-1, 1]: they are not squashed")
        u = SQUASH * torch.atanh(action.detach())
        require_close(
            f"{path}: the mean of u",
            u.mean(0),
            mean,
            {"is that of an action squashed by another constant": torch.tensor(mean) * SQUASH},
            tolerance=0.02,
        )
        require_close(
            f"{path}: the standard deviation of u",
            u.std(0),
            torch.tensor(log_std).exp(),
            {
                "is log_std itself: take its exponential": torch.tensor(log_std),
                "is that of a policy without noise": torch.zeros(2),
                "is the square of the right one": torch.tensor(log_std).exp() ** 2,
            },
            tolerance=0.02,
        )
        require(action.requires_grad, f"{path}: the sample has no gradient: write it as mean + std * noise")
        (gradient,) = torch.autograd.grad(action.sum(), actor.head.bias)
        require((gradient != 0).all(), f"{path}: the sample has no gradient in mean or log_std")


@pytest.mark.points(4)
def test_the_log_density_is_that_of_the_squashed_action():
    mean, log_std = torch.tensor([0.7, -0.5, 0.0]).double(), torch.tensor([-1.0, 0.2, -2.0]).double()
    for path, actor in actors(mean.tolist(), log_std.tolist()):
        torch.manual_seed(1)
        action, log_prob = actor(torch.zeros(500, 1, dtype=torch.double))
        require_shape(f"{path}: log π", log_prob, (500,))
        u = SQUASH * torch.atanh(action.detach())
        z = (u - mean) / log_std.exp()
        normal = -0.5 * z**2 - log_std - 0.5 * math.log(2 * math.pi)
        slope = log_slope(u)
        right = (normal - slope).sum(1)
        entropy = (0.5 + 0.5 * math.log(2 * math.pi) + log_std).sum()
        require_close(
            f"{path}: log π",
            log_prob,
            right,
            {
                "lacks the Jacobian of tanh: off by Σ log |da / du|": normal.sum(1),
                "has the Jacobian of tanh with the wrong sign": (normal + slope).sum(1),
                "has the wrong sign as a whole": -right,
                "is averaged over the batch: every sample has its own": right.mean(),
                "is the mean over the action's dimensions: it is their sum": right / 3,
                "lacks the constant log √(2π) per dimension": right + 1.5 * math.log(2 * math.pi),
                "lacks the slope 1 / c of u -> u / c: off by log c per dimension": right
                - 3 * math.log(SQUASH),
                "lacks - log_std": right + log_std.sum(),
                "has the Gaussian's negative entropy instead of its density": -entropy - slope.sum(1),
            },
        )


@pytest.mark.points(2)
def test_the_log_density_is_right_where_tanh_rounds_to_1():
    for size in 20.0, -20.0, 200.0:
        for path, actor in actors([size * SQUASH], [-4.0]):
            check_tail(path, actor.float(), size)


def check_tail(path, actor, size):
    where = f"u / c about {size:g}"
    torch.manual_seed(2)
    _, log_prob = actor(torch.zeros(1000, 1))
    require(
        torch.isfinite(log_prob).all(),
        f"{path}: log π is not finite for {where}: log(1 - tanh²) is log 0 in float32, and cosh overflows",
    )
    # there da / du is 4 exp(-2 |u / c|) / c, and E[log N] the negative entropy
    negative_entropy = -(0.5 + 0.5 * math.log(2 * math.pi) - 4.0)
    expected = negative_entropy - (math.log(4 / SQUASH) - 2 * abs(size))
    floors = {
        f"is that of {epsilon:g} added to 1 - tanh²: find a form without a difference": negative_entropy
        - math.log(epsilon / SQUASH)
        for epsilon in (1e-6, 1e-7, 1e-8)
    }
    require_close(f"{path}: the mean of log π at {where}", log_prob.mean(), expected, floors, tolerance=0.01)
    (gradient,) = torch.autograd.grad(log_prob.mean(), actor.head.bias)
    require(torch.isfinite(gradient).all(), f"{path}: the gradient of log π is not finite at {where}")
    slope = math.copysign(2 / SQUASH, size)
    require_close(
        f"{path}: the slope of E[log π] in the mean at {where}",
        gradient[0],
        slope,
        {"is 0: the Jacobian has no gradient, or has been clipped away": 0.0},
        tolerance=0.01,
    )
    require_close(
        f"{path}: the slope of E[log π] in log_std at {where}",
        gradient[1],
        -1.0,
        {"is 0: the density of the Gaussian has no gradient in its deviation": 0.0},
        tolerance=0.05,
    )
