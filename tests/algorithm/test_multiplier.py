"""The Lagrange multiplier's controller: plain PID, the published adaptation, and ours."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from marvel_sac_pid import PIDLagrangian

SETTINGS = [(5e-6, 5e-6, 5e-6), (0.02, 0.002, 0.01), (0.0, 0.002, 0.0)]
LIMIT = 20.0
ADVERSARIAL = {
    "zero": [0.0] * 300,
    "huge": [1e9] * 300,
    "alternating": [0.0, 1e6] * 150,
    "tiny": [1e-12] * 300,
    "at the limit": [LIMIT] * 300,
    "one spike": [0.0] * 20 + [1e8] + [0.0] * 280,
    "up, down, up": [60.0] * 100 + [0.0] * 100 + [1000.0] * 100,
    "random": list(np.random.default_rng(0).exponential(40, 300)),
}


def multipliers(controller, costs):
    return [controller.update(cost) for cost in costs]


def test_plain_law_against_a_table_by_hand():
    """Limit 20, kp 1/10, ki 1/100, kd 1/10, smoothing 9/10, delay 2.

    cost   e    I = max(0, I + e/100)   P = .9 P + .1 e   C = .9 C + .1 J   rise over 2 updates
    60    40    0.4                     4                 6                 6 - 0 = 6
    60    40    0.8                     7.6               11.4              11.4 - 0 = 11.4
    30    10    0.9                     7.84              13.26             13.26 - 6 = 7.26
    0    -20    0.7                     5.056             11.934            11.934 - 11.4 = 0.534
    0    -20    0.5                     2.5504            10.7406           below 13.26: 0
    0    -20    0.3                     0.29536           9.66654           below 11.934: 0
    0    -20    0.1                     -1.734176         ...               0
    0    -20    0 (not -0.1)            -3.5607584        ...               0
    """
    controller = PIDLagrangian(20, 0.1, 0.01, 0.1, ema=0.9, d_delay=2, adapt_rate=0.0)
    table = [
        (60, 0.4 + 0.4 + 0.6),
        (60, 0.8 + 0.76 + 1.14),
        (30, 0.9 + 0.784 + 0.726),
        (0, 0.7 + 0.5056 + 0.0534),
        (0, 0.5 + 0.25504),
        (0, 0.3 + 0.029536),
        (0, 0.0),  # 0.1 - 0.1734176 is negative
        (0, 0.0),
    ]
    for cost, expected in table:
        assert controller.update(cost) == pytest.approx(expected, abs=1e-12)
        assert controller.multiplier == pytest.approx(expected, abs=1e-12)
    assert controller.gains == [0.1, 0.01, 0.1]
    assert controller.integral == 0


def test_plain_law_in_closed_form():
    """Every term as an explicit sum over the history, in exact arithmetic, with a delay of 10 updates."""
    costs = [int(cost) for cost in np.random.default_rng(1).integers(0, 90, 60)]
    kp, ki, kd, keep = Fraction(1, 50), Fraction(1, 500), Fraction(1, 100), Fraction(9, 10)

    def smoothed(values):
        return sum((1 - keep) * keep ** (len(values) - 1 - k) * value for k, value in enumerate(values))

    controller = PIDLagrangian(LIMIT, float(kp), float(ki), float(kd), adapt_rate=0.0)
    for t, multiplier in enumerate(multipliers(controller, costs), start=1):
        errors = [cost - 20 for cost in costs[:t]]
        integral = ki * max(sum(errors[k:]) for k in range(t + 1))  # cutting at 0 leaves the best suffix
        rise = max(0, smoothed(costs[:t]) - smoothed(costs[:max(0, t - 10)]))
        expected = max(0, kp * smoothed(errors) + integral + kd * rise)
        assert multiplier == pytest.approx(float(expected), abs=1e-12)


@pytest.mark.parametrize("delay", [1, 3, 10])
def test_derivative_looks_back_by_its_delay(delay):
    """One cost of 100 leaves C = 10 * 0.9^k: the term is positive until that enters the window, then zero."""
    controller = PIDLagrangian(1000, 0.0, 0.0, 1.0, d_delay=delay, adapt_rate=0.0)
    values = multipliers(controller, [100] + [0] * 20)
    assert values == pytest.approx([10 * 0.9**k if k < delay else 0.0 for k in range(21)])


def test_published_adaptation_cuts_the_gains_at_its_first_violation():
    """Limit 20, cost 60 twice; the window holds smoothed costs after a zero.

    First: {0, 6}, mean 3 + 0.1, deviation 3. Second: {0, 6, 11.4}, mean 5.8 + 0.1, deviation sqrt(65.04 / 3).
    """
    controller = PIDLagrangian(LIMIT, 1.0, 2.0, 3.0, published=True)
    controller.update(60)
    kp, ki, kd = controller.gains
    assert kp == pytest.approx(0.727, abs=5e-4)
    assert [kp, ki / 2, kd / 3] == pytest.approx([1 - 0.05 * 16.9 / 3.1] * 2 + [1 + 0.05 * 3 / 3.1])
    controller.update(60)
    factor, widening = 1 - 0.05 * 14.1 / 5.9, 1 + 0.05 * math.sqrt(65.04 / 3) / 5.9
    assert controller.gains == pytest.approx([kp * factor, ki * factor, kd * widening])


def test_published_adaptation_hardly_unwinds():
    controller = PIDLagrangian(LIMIT, 5e-6, 5e-6, 5e-6, published=True)
    assert multipliers(controller, [60.0] * 1000)[-1] == pytest.approx(1.856, abs=1e-3)
    assert controller.gains[1] == pytest.approx(5e-5)
    assert multipliers(controller, [5.0] * 1000)[-1] == pytest.approx(1.821, abs=1e-3)
    assert controller.gains[1] == pytest.approx(5e-7)


def test_published_gain_falls_to_its_floor_in_one_update_at_low_cost():
    """Cost 5: {0, 0.5}, mean 0.25 + 0.1: factor 1 - 0.05 * 19.65 / 0.35 = -1.81, so the floor of a tenth."""
    controller = PIDLagrangian(LIMIT, 1.0, 1.0, 1.0, published=True)
    controller.update(5)
    assert controller.gains[:2] == [0.1, 0.1]


def test_our_adaptation_against_a_table_by_hand():
    """Limit 20, rate 1/20; J = 60, 30, 0, 0, 0: mean and deviation of the costs so far, all in the window.

    60        m 60     s 0            f = 1 + (40/60)/20    kd by 1
    60 30     m 45     s 15           f = 1 + (25/45)/20    kd by 1 + (15/45)/20
    60 30 0   m 30     s sqrt(600)    f = 1 + (10/30)/20    kd by 1 + (sqrt(600)/30)/20
    ... 0     m 22.5   s sqrt(618.75) f = 1 + (2.5/22.5)/20 kd by 1 + 1/20, as s > m
    ... 0 0   m 18     -              f = 1 - (2/20)/20     kd by f too; I by f
    """
    controller = PIDLagrangian(LIMIT, 0.1, 0.2, 0.4)
    kp, ki, kd = 0.1, 0.2, 0.4
    integral = 0.0
    for cost, f, widening in [(60, 1 + 1 / 30, 1), (30, 1 + 1 / 36, 1 + 1 / 60),
                              (0, 1 + 1 / 60, 1 + math.sqrt(600) / 600), (0, 1 + 1 / 180, 1.05)]:
        integral = max(0, integral + ki * (cost - 20))
        controller.update(cost)
        kp, ki, kd = kp * f, ki * f, kd * widening
        assert controller.gains == pytest.approx([kp, ki, kd])
        assert controller.integral == pytest.approx(integral)
    integral = max(0, integral - ki * 20)
    controller.update(0)
    assert controller.gains == pytest.approx([0.995 * kp, 0.995 * ki, 0.995 * kd])
    assert controller.integral == pytest.approx(0.995 * integral)


@pytest.mark.parametrize("name", ADVERSARIAL)
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("limit", [LIMIT, 0.0])
@pytest.mark.parametrize("rate", [0.05, 0.5])
def test_gains_change_slowly_and_stay_in_their_range(setting, name, limit, rate):
    controller = PIDLagrangian(limit, *setting, adapt_rate=rate)
    for cost in ADVERSARIAL[name]:
        before = controller.gains
        multiplier = controller.update(cost)
        assert math.isfinite(multiplier)
        assert 0 <= multiplier <= controller.lagrange_max
        for old, new, first in zip(before, controller.gains, setting, strict=True):
            assert (1 - rate - 1e-12) * old <= new <= (1 + rate + 1e-12) * old
            assert first / 10 <= new <= 10 * first


@pytest.mark.parametrize(("setting", "cost"), [
    *((setting, cost) for setting in SETTINGS for cost in (22.0, 25.0, 60.0, 500.0)),
    # nearer to the limit the published derivative gain, which only grows, wins while C is still rising from 0
    *(((kp, ki, 0.0), cost) for kp, ki, _ in SETTINGS for cost in (20.1, 21.0)),
])
def test_constant_violation_raises_ours_at_least_as_fast_as_published(setting, cost):
    ours = multipliers(PIDLagrangian(LIMIT, *setting), [cost] * 400)
    published = multipliers(PIDLagrangian(LIMIT, *setting, published=True), [cost] * 400)
    slower = [t for t in range(400) if ours[t] < published[t] * (1 - 1e-9)]
    assert not slower, (slower[0], ours[slower[0]], published[slower[0]])


@pytest.mark.parametrize("setting", SETTINGS)
def test_multiplier_unwinds_as_fast_as_it_wound_up(setting):
    controller = PIDLagrangian(LIMIT, *setting)
    peak = max(multipliers(controller, [60.0] * 200))
    assert multipliers(controller, [5.0] * 200)[-1] < 0.05 * peak
    published = PIDLagrangian(LIMIT, *setting, published=True)
    peak = max(multipliers(published, [60.0] * 200))
    assert multipliers(published, [5.0] * 200)[-1] > 0.05 * peak


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("setting", SETTINGS)
def test_limit_zero_without_cost_is_finite(setting, published):
    controller = PIDLagrangian(0.0, *setting, published=published)
    with np.errstate(all="raise"):
        assert multipliers(controller, [0.0] * 50) == [0.0] * 50
        assert all(math.isfinite(value) for value in multipliers(controller, [1.0, 0.0] * 50))
    assert all(math.isfinite(gain) for gain in controller.gains)


def test_integral_alone_is_dual_ascent():
    costs = np.random.default_rng(2).uniform(0, 60, 200)
    controller, multiplier = PIDLagrangian(LIMIT, 0.0, 0.003, 0.0, adapt_rate=0.0, lagrange_init=0.5), 0.5
    for cost in costs:
        multiplier = max(0.0, multiplier + 0.003 * (cost - LIMIT))
        assert controller.update(cost) == pytest.approx(multiplier, abs=1e-12)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("published", [False, True])
def test_multiplier_starts_at_its_first_value(setting, published):
    controller = PIDLagrangian(LIMIT, *setting, lagrange_init=0.7, published=published)
    assert controller.multiplier == 0.7
    _, ki, kd = setting
    assert controller.update(LIMIT) == pytest.approx(0.7 + kd * 2)  # no error, C rises from 0 to 2
    assert PIDLagrangian(LIMIT, 0.0, ki, 0.0, lagrange_init=0.7).update(LIMIT + 1) == pytest.approx(0.7 + ki)


def test_zero_gains_hold_the_multiplier():
    controller = PIDLagrangian(LIMIT, 0.0, 0.0, 0.0, adapt_rate=0.0, lagrange_init=0.7)
    assert multipliers(controller, [0.0, 100.0, 3.0] * 10) == [0.7] * 30


def test_multiplier_stays_under_its_maximum_without_windup():
    controller = PIDLagrangian(LIMIT, 0.0, 0.01, 0.0, adapt_rate=0.0, lagrange_max=2.0)
    values = multipliers(controller, [1000.0] * 100)
    assert max(values) == 2.0
    assert controller.update(10.0) == pytest.approx(1.9)  # 2 - 0.01 * 10 at once
    controller = PIDLagrangian(LIMIT, 0.1, 0.01, 0.1, lagrange_max=2.0)
    assert max(multipliers(controller, [1000.0] * 100)) == 2.0
    assert controller.integral <= 2.0


@pytest.mark.parametrize("law", [{}, {"published": True}, {"adapt_rate": 0.0}])
@pytest.mark.parametrize("length", [0, 3, 25])
def test_saved_controller_continues_identically(tmp_path, law, length):
    costs = np.random.default_rng(3).uniform(0, 90, length + 40).tolist()
    controller = PIDLagrangian(LIMIT, 0.02, 0.002, 0.01, lagrange_init=0.3, **law)
    multipliers(controller, costs[:length])
    torch.save(controller.state_dict(), tmp_path / "state.pt")
    other = PIDLagrangian(LIMIT, 0.02, 0.002, 0.01, **law)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert other.multiplier == controller.multiplier
    assert multipliers(other, costs[length:]) == multipliers(controller, costs[length:])
    assert other.gains == controller.gains


def test_saved_state_does_not_change_with_the_controller():
    controller = PIDLagrangian(LIMIT, 0.02, 0.002, 0.01)
    controller.update(60)
    state = controller.state_dict()
    saved = {key: list(value) if isinstance(value, list) else value for key, value in state.items()}
    multipliers(controller, [50.0, 3.0, 80.0])
    assert state == saved
