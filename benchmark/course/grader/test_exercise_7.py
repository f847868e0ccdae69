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
    """Draws 10 s + 1, 10 s + 2, ... as it is asked: an action tells its state s and its number."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(1.0))
        self.drawn = 0

    def forward(self, obs):
        number = self.drawn + torch.arange(1.0, len(obs) + 1)[:, None]
        self.drawn += len(obs)
        return self.scale * (10 * obs + number), torch.zeros(len(obs))


class Vae(torch.nn.Module):
    """The KL of a pair is 2 where the action is odd, or always `kl`."""

    def __init__(self, kl=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(1.0))
        self.kl = kl

    def encode(self, obs, act):
        require(len(obs) == len(act), f"the VAE is given {len(obs)} states and {len(act)} actions")
        require_pairs("the VAE", obs, act)
        odd = act.detach()[:, 0].round() % 2
        kl = 2 * odd if self.kl is None else torch.full((len(act),), self.kl)
        return None, None, kl * self.weight


class Qc(torch.nn.Module):
    """weight times the state, and a little for the action's number; `asked` are the pairs it was given."""

    def __init__(self, weight=4.0):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(weight))
        self.asked = []

    def forward(self, obs, act):
        require_pairs("Qc", obs, act)
        number = act[:, 0] - 10 * obs[:, 0]
        self.asked += list(zip(obs[:, 0].tolist(), act[:, 0].tolist(), strict=True))
        return (self.weight * obs[:, 0] + 0.01 * number)[None]


def require_pairs(who, obs, act):
    """Every action with the state that it was drawn for."""
    number = act.detach()[:, 0] - 10 * obs[:, 0]
    require(
        ((number > 0) & (number <= N * len(OBS))).all(),
        f"{who} is given actions that were drawn for other states",
    )


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


def mean_hinge(qc, weight, unknown=lambda action: True, over_all=False):
    """By hand, from the pairs that Qc was asked about."""
    pairs = [(state, action) for state, action in qc.asked if unknown(action)]
    values = hinge(*(weight * state + 0.01 * (action - 10 * state) for state, action in pairs))
    return sum(values) / (len(qc.asked) if over_all else len(values))


def odd(action):
    return round(action) % 2 == 1


def hinge(*values):
    return [max(0.0, HINGE * QC_THRESHOLD - value) for value in values]


@pytest.mark.points(3)
def test_the_penalty_is_the_mean_over_unknown_actions():
    got, share, (_, _, qc) = penalty(qc_weight=2.0, kl=2.0)  # all are unknown: three of Qc = 2 and three of 4
    right = mean_hinge(qc, 2)
    require_close(
        "the penalty of six unknown actions",
        got,
        right,
        {
            "has the wrong sign": -right,
            "is the sum, not the mean": 6 * right,
            "is that of the threshold without its factor": right + (1 - HINGE) * QC_THRESHOLD,
        },
    )
    require_close("the share of unknown actions", share, 1.0, {"is that of the known ones": 0.0})
    got, share, (_, _, qc) = penalty(qc_weight=2.0)
    require_close("the share of unknown actions", share, sum(odd(action) for _, action in qc.asked) / 6, {})
    require_close(
        "the penalty where half are unknown",
        got,
        mean_hinge(qc, 2, odd),
        {
            "is divided by all pairs, not by the unknown ones": mean_hinge(qc, 2, odd, over_all=True),
            "counts the known actions": mean_hinge(qc, 2),
            "counts the known actions instead": mean_hinge(qc, 2, lambda action: not odd(action)),
        },
    )
    got, share, _ = penalty(kl=0.5)
    require_close("the penalty without unknown actions", got, 0.0, {"counts the known actions": right})
    require_close("the share where all are known", share, 0.0, {"is that of the known ones": 1.0})


@pytest.mark.points(2)
def test_nothing_is_gained_above_the_threshold():
    got, _, (_, _, qc) = penalty(qc_weight=14.0, kl=2.0)  # 14 and 28: both above
    require_close("the penalty where Qc is above the threshold", got, 0.0, {})
    require(got.item() >= 0, "the penalty is negative: lifting Qc further would pay")
    got, _, (_, _, qc) = penalty(qc_weight=6.0, kl=2.0)  # 6 and 12, or one of them above
    mean = sum(6 * state + 0.01 * (action - 10 * state) for state, action in qc.asked) / len(qc.asked)
    require_close(
        "the penalty of actions below and above",
        got,
        mean_hinge(qc, 6),
        {"lets one action pay for another": hinge(mean)[0]},
    )


@pytest.mark.points(3)
def test_qc_learns_from_it_and_actor_and_vae_do_not():
    got, _, (actor, vae, qc) = penalty(qc_weight=2.0, kl=2.0)
    require(
        got.requires_grad, "the penalty has no gradient: it does nothing to Qc (the defect of OSRL's CPQ)"
    )
    got.backward()
    require(qc.weight.grad is not None, "Qc has no gradient: is its value detached?")
    require_close(
        "the slope of the penalty in Qc's parameter", qc.weight.grad, -1.5, {"has the wrong sign": 1.5}
    )
    for name, parameter in ("the actor", actor.scale), ("the VAE", vae.weight):
        require(
            parameter.grad is None or parameter.grad == 0,
            f"{name} learns from the penalty: no gradient there",
        )
