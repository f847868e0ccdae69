"""Exercise 7: a VAE that tells given KL divergences, and a Qc that is a known function of one parameter."""

import cpq
import pytest
import torch
from checks import CONSTANTS, require, require_close, require_shape

pytestmark = pytest.mark.exercise_7
HINGE = CONSTANTS["hinge"]
N, KL_THRESHOLD, QC_THRESHOLD = 3, 1.0, 10.0
OBS = torch.tensor([[1.0], [2.0]])


class Actor(torch.nn.Module):
    """Draws 1, 2, 3, ... in the order in which it is asked for actions: all are different."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(1.0))
        self.drawn = 0

    def forward(self, obs):
        act = self.scale * (self.drawn + torch.arange(1.0, len(obs) + 1))[:, None]
        self.drawn += len(obs)
        return act, torch.zeros(len(obs))


class Vae(torch.nn.Module):
    """The KL of a pair is 2 where the action is odd, or always `kl`."""

    def __init__(self, kl=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(1.0))
        self.kl = kl

    def encode(self, obs, act):
        require(len(obs) == len(act), f"the VAE is given {len(obs)} states and {len(act)} actions")
        odd = act.detach()[:, 0].round() % 2
        kl = 2 * odd if self.kl is None else torch.full((len(act),), self.kl)
        return None, None, kl * self.weight


class Qc(torch.nn.Module):
    """weight times the state, whatever the action: 4 in the first, 8 in the second (or more)."""

    def __init__(self, weight=4.0):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(weight))

    def forward(self, obs, act):
        return (self.weight * obs[:, 0] + 0 * act.sum(-1))[None]


def penalty(qc_weight=4.0, kl=None):
    networks = Actor(), Vae(kl), Qc(qc_weight)
    actor, vae, qc = networks
    got, share = cpq.ood_shortfall(OBS, actor, vae, qc, N, KL_THRESHOLD, QC_THRESHOLD)
    require_shape("the penalty", got, ())
    require_shape("the share", share, ())
    require(
        actor.drawn == N * len(OBS), f"{actor.drawn} actions are drawn: {N} for each of {len(OBS)} states"
    )
    return got, share, networks


def hinge(*values):
    return [max(0.0, HINGE * QC_THRESHOLD - value) for value in values]


@pytest.mark.points(3)
def test_the_penalty_is_the_mean_over_unknown_actions():
    got, share, _ = penalty(kl=2.0)  # all are unknown: three of Qc = 4 and three of 8
    right = sum(hinge(4, 8)) / 2
    require_close(
        "the penalty of six unknown actions",
        got,
        right,
        {
            "has the wrong sign": -right,
            "is the sum, not the mean": 6 * right,
            "is that of the threshold without its factor": (6 + 2) / 2,
            "asks it of the mean of Qc, not of every action": hinge(6)[0],
        },
    )
    require_close("the share of unknown actions", share, 1.0, {"is that of the known ones": 0.0})
    got, share, _ = penalty()  # every second is unknown
    require_close("the share of unknown actions", share, 0.5, {})
    require(
        hinge(8)[0] - 1e-4 <= got.item() <= hinge(4)[0] + 1e-4,
        f"the penalty {got.item():.3g} is no mean over the unknown actions: is it divided by all of them?",
    )
    got, share, _ = penalty(kl=0.5)
    require_close("the penalty without unknown actions", got, 0.0, {"counts the known actions": right})
    require_close("the share where all are known", share, 0.0, {"is that of the known ones": 1.0})


@pytest.mark.points(2)
def test_nothing_is_gained_above_the_threshold():
    got, _, (_, _, qc) = penalty(qc_weight=12.0, kl=2.0)  # 12 and 24: both above
    require_close(
        "the penalty where Qc is above the threshold",
        got,
        sum(hinge(12, 24)) / 2,
        {"is negative: lifting Qc further would pay": HINGE * QC_THRESHOLD - 18},
    )
    got, _, _ = penalty(qc_weight=8.0, kl=2.0)  # 8 and 16
    require_close(
        "the penalty of one action below and one above",
        got,
        sum(hinge(8, 16)) / 2,
        {"lets one action pay for another": max(0.0, HINGE * QC_THRESHOLD - 12)},
    )


@pytest.mark.points(3)
def test_qc_learns_from_it_and_actor_and_vae_do_not():
    got, _, (actor, vae, qc) = penalty(kl=2.0)
    require(
        got.requires_grad, "the penalty has no gradient: it does nothing to Qc (the defect of OSRL's CPQ)"
    )
    got.backward()
    require(qc.weight.grad is not None, "Qc has no gradient: is its value detached?")
    right = -sum(obs for obs, value in ((1, 4), (2, 8)) if value < HINGE * QC_THRESHOLD) / 2
    require_close(
        "the slope of the penalty in Qc's parameter", qc.weight.grad, right, {"has the wrong sign": -right}
    )
    for name, parameter in ("the actor", actor.scale), ("the VAE", vae.weight):
        require(
            parameter.grad is None or parameter.grad == 0,
            f"{name} learns from the penalty: no gradient there",
        )
