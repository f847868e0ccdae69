"""What all graders use: the variant's constants, stand-ins, and comparisons that name a mistake."""

import json
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(FOLDER))
torch.set_num_threads(1)
SLOPE = 0.3  # of the log-density of the stand-in for an actor, in its parameter
CONSTANTS = json.loads((Path(__file__).parent / "variant.json").read_text())


def require(condition, message):
    """Fail with one message."""
    if not condition:
        pytest.fail(message, pytrace=False)


def require_shape(what, got, shape):
    require(isinstance(got, torch.Tensor), f"{what} is a {type(got).__name__}, not a tensor")
    require(tuple(got.shape) == shape, f"{what} has the shape {tuple(got.shape)}, not {shape}")


def require_close(what, got, expected, mistakes, tolerance=1e-4):
    """Fail unless `got` is `expected`; of `mistakes` {message: value} name the one that it is."""
    got = torch.as_tensor(got, dtype=torch.double).detach()
    expected = torch.as_tensor(expected, dtype=torch.double)

    def equal(other):
        other = torch.as_tensor(other, dtype=torch.double).expand_as(expected)
        return torch.allclose(got, other, rtol=tolerance, atol=tolerance)

    require(torch.isfinite(got).all(), f"{what} is not finite everywhere")
    if equal(expected):
        return
    for message, value in mistakes.items():
        if equal(value):
            pytest.fail(f"{what} {message}", pytrace=False)
    worst = (got - expected).abs().argmax()
    pytest.fail(
        f"{what} is {got.flatten()[worst]:.4g} where {expected.flatten()[worst]:.4g} is right "
        f"(the largest of the differences)",
        pytrace=False,
    )


class TableActor(torch.nn.Module):
    """Draws the action `scale` times the observation, differentiable in `scale`, with given log-densities."""

    def __init__(self, log_prob, scale=2.0):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(scale))
        self.log_prob = torch.tensor(log_prob)

    def forward(self, obs):
        # the density depends on the parameter too: its slope is SLOPE everywhere, its value the given one
        slope = SLOPE * (self.scale - self.scale.detach())
        return self.scale * obs, self.log_prob[: len(obs)] + slope
