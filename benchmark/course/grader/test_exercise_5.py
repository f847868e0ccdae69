"""Exercise 5: the actor's loss and gradient where critics and policy are known functions of one number."""

import pytest
import torch
from checks import CONSTANTS, SLOPE, TableActor, require, require_close, require_shape

import marvel_sac_pid

pytestmark = pytest.mark.exercise_5
KAPPA = CONSTANTS["kappa"]
OBS = torch.tensor([[1.0], [2.0], [3.0]])
LOG_PROB = [-1.0, 0.5, 2.0]
ALPHA, MULTIPLIER = 0.2, 3.0


class Lines(torch.nn.Module):
    """Critics that are slope times the action, one slope each."""

    def __init__(self, *slopes):
        super().__init__()
        self.slopes = torch.nn.Parameter(torch.tensor(slopes))

    def forward(self, obs, act):
        return self.slopes[:, None] * act.sum(-1)


def loss_of(multiplier=MULTIPLIER, log_prob=LOG_PROB, scale=2.0):
    actor, q, qc = TableActor(log_prob, scale), Lines(4.0, 5.0), Lines(3.0)
    loss, found = marvel_sac_pid.actor_loss(OBS, actor, q, qc, ALPHA, multiplier)
    return actor, q, qc, loss, found


@pytest.mark.points(3)
def test_the_loss_adds_entropy_reward_and_cost_with_their_signs():
    _, _, _, loss, found = loss_of()
    require_shape("the loss", loss, ())
    require_shape("log π", found, (3,))
    # the mean action is 4: Q = 16 (the smaller), Qc = 12; the mean of log pi is 0.5
    entropy, reward, cost = ALPHA * 0.5, 16.0, 12.0
    divisor = 1 + KAPPA * MULTIPLIER
    right = (entropy - reward + MULTIPLIER * cost) / divisor
    require_close(
        "the loss",
        loss,
        right,
        {
            "has the sign of the objective: it is minimised": -right,
            "has the entropy with the wrong sign": (-entropy - reward + MULTIPLIER * cost) / divisor,
            "lacks the entropy": (-reward + MULTIPLIER * cost) / divisor,
            "rewards the cost: its sign": (entropy - reward - MULTIPLIER * cost) / divisor,
            "takes the larger reward critic": (entropy - 20 + MULTIPLIER * cost) / divisor,
            "takes the mean of the reward critics": (entropy - 18 + MULTIPLIER * cost) / divisor,
            "is the sum over the batch, not its mean": 3 * right,
        },
    )


@pytest.mark.points(2)
def test_the_scale_keeps_the_step_from_growing_with_the_multiplier():
    for multiplier in 0.0, 1.0, 50.0:
        _, _, _, loss, _ = loss_of(multiplier)
        whole = ALPHA * 0.5 - 16 + multiplier * 12
        require_close(
            f"the loss for a multiplier of {multiplier:g}",
            loss,
            whole / (1 + KAPPA * multiplier),
            {
                "is not divided": whole,
                "is divided by 1 + λ": whole / (1 + multiplier),
                "divides the cost alone": ALPHA * 0.5 - 16 + multiplier * 12 / (1 + KAPPA * multiplier),
            },
        )


@pytest.mark.points(3)
def test_the_actor_learns_through_its_action():
    actor, _, _, loss, found = loss_of()
    require(
        not found.requires_grad, "log π comes back with a gradient: the entropy weight would teach the actor"
    )
    require(loss.requires_grad, "the loss has no gradient")
    (gradient,) = torch.autograd.grad(loss, actor.scale, allow_unused=True)
    require(
        gradient is not None, "the loss has no gradient in the actor's parameters: is the action detached?"
    )
    divisor = 1 + KAPPA * MULTIPLIER
    through_action = 2 * (MULTIPLIER * 3 - 4) / divisor  # the mean of the states is 2
    right = through_action + ALPHA * SLOPE / divisor
    require_close(
        "the slope of the loss in the actor's parameter",
        gradient,
        right,
        {
            "has the wrong sign: the actor climbs": -right,
            "lacks the entropy's part: log π is detached inside the loss": through_action,
            "is that of the entropy alone: the action is detached": ALPHA * SLOPE / divisor,
            "is that of Q alone: Qc is detached": (2 * -4 + ALPHA * SLOPE) / divisor,
            "is that of Qc alone: Q is detached": (2 * MULTIPLIER * 3 + ALPHA * SLOPE) / divisor,
        },
    )
