"""The Lagrange multiplier's controller: its start, plain PID, our adaptation, and the released one."""

import math
from copy import deepcopy

import numpy as np
import pytest
from tiny import new_run

import marvel_sac_pid
from benchmark.baselines import marvel_released_pid
from benchmark.baselines.marvel_released_pid import ReleasedPIDLagrangian
from marvel_sac_pid import PIDLagrangian

SETTINGS = [(5e-6, 5e-6, 5e-6), (0.02, 0.002, 0.01), (0.0, 0.002, 0.0)]
TARGET = 20.0
ADVERSARIAL = {
    "huge": [1e9] * 300,
    "alternating": [0.0, 1e6] * 150,
    "tiny": [1e-12] * 300,
    "one spike": [0.0] * 20 + [1e8] + [0.0] * 280,
    "up, down, up": [60.0] * 100 + [0.0] * 100 + [1000.0] * 100,
    "random": list(np.random.default_rng(0).exponential(40, 300)),
}


def multipliers(controller, costs):
    return [controller.update(cost) for cost in costs]


def gains(controller):
    return [controller.metrics()[name] for name in ("kp", "ki", "kd")]


def gains_of(args):
    return [args.kp, args.ki, args.kd]


def smoothed(values):
    """The exponential average from 0 of a history, as an explicit sum."""
    return sum(0.1 * 0.9 ** (len(values) - 1 - k) * value for k, value in enumerate(values))


# --- Start ---
@pytest.mark.parametrize("rate", [0.0, 0.05])
def test_started_controller_holds_its_multiplier_at_zero_error(rate):
    controller = PIDLagrangian(TARGET, 0.02, 0.01, 0.0, adapt_rate=rate)
    assert controller.multiplier == 0
    controller.start(0.7)
    assert controller.multiplier == 0.7
    assert multipliers(controller, [TARGET] * 30) == pytest.approx([0.7] * 30)
    assert controller.update(TARGET + 1) == pytest.approx(0.7 + 0.01 + 0.02 * 0.1)


@pytest.mark.parametrize("ema", [0.9, 0.5])
def test_excess_of_the_first_multiplier_shrinks_by_ema_per_update_at_zero_error(ema):
    controller = PIDLagrangian(TARGET, 0.02, 0.01, 0.0, ema=ema)
    controller.start(0.3, fading_from=1.3)
    assert controller.multiplier == pytest.approx(1.3)
    assert multipliers(controller, [TARGET] * 40) == pytest.approx([0.3 + ema**k for k in range(1, 41)])


@pytest.mark.parametrize(("first", "fading_from", "kp", "begin", "end"), [
    (0.8, 0.3, 0.02, 0.8, 0.8),  # there is no excess
    (0.3, 0.8, 0.0, 0.8, 0.8),  # without a proportional gain it stays
    (50.0, 300.0, 0.02, 100.0, 50.0),  # cut to lagrange_max
    (200.0, 300.0, 0.02, 100.0, 100.0),
    (200.0, None, 0.02, 100.0, 100.0),
])
def test_first_multiplier_where_it_does_not_fade_or_is_above_the_maximum(first, fading_from, kp, begin, end):
    controller = PIDLagrangian(TARGET, kp, 0.01, 0.0, lagrange_max=100.0)
    controller.start(first, fading_from)
    assert controller.multiplier == pytest.approx(begin)
    values = multipliers(controller, [TARGET] * 300)
    assert values[0] == pytest.approx(end + 0.9 * (begin - end))
    assert values[-1] == pytest.approx(end)


# --- Plain law ---
def test_plain_law_against_a_table_by_hand():
    """Target 20, kp 1/10, ki 1/100, kd 1/10, smoothing 9/10, delay 2.

    cost   e    I = max(0, I + e/100)   P = .9 P + .1 e   C = .9 C + .1 J   rise over 2 updates
    60    40    0.4                     4                 6                 6 - 0 = 6
    60    40    0.8                     7.6               11.4              11.4 - 0 = 11.4
    30    10    0.9                     7.84              13.26             13.26 - 6 = 7.26
    0    -20    0.7                     5.056             11.934            11.934 - 11.4 = 0.534
    0    -20    0.5                     2.5504            10.7406           below 13.26: 0
    0    -20    0.3                     0.29536           9.66654           below 11.934: 0
    0    -20    0.1                     -1.734176         8.699886          0
    0    -20    0 (not -0.1)            -3.5607584        7.8298974         0
    60    40    0.4                     0.79531744        13.04690766       13.04690766 - 8.699886
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
        (60, 0.4 + 0.079531744 + 0.434702166),
    ]
    for cost, expected in table:
        assert controller.update(cost) == pytest.approx(expected, abs=1e-12)
        assert controller.metrics() == {
            "lagrange_multiplier": pytest.approx(expected, abs=1e-12), "kp": 0.1, "ki": 0.01, "kd": 0.1}


@pytest.mark.parametrize("delay", [1, 3, 10])
def test_derivative_looks_back_by_its_delay(delay):
    """One cost of 100 leaves C = 10 * 0.9^k: the term is positive until that enters the window, then zero."""
    options = {} if delay == 10 else dict(d_delay=delay)  # it is the default
    controller = PIDLagrangian(1000, 0.0, 0.0, 1.0, adapt_rate=0.0, **options)
    values = multipliers(controller, [100] + [0] * 20)
    assert values == pytest.approx([10 * 0.9**k if k < delay else 0.0 for k in range(21)])


def test_integral_alone_is_dual_ascent_and_no_gain_at_all_holds_the_multiplier():
    costs = np.random.default_rng(2).uniform(0, 40, 200)  # so that it is at 0 again and again
    dual, fixed = (PIDLagrangian(TARGET, 0.0, ki, 0.0, adapt_rate=0.0) for ki in (0.003, 0.0))
    dual.start(0.5)
    fixed.start(0.5)
    multiplier = 0.5
    for cost in costs:
        multiplier = max(0.0, multiplier + 0.003 * (cost - TARGET))
        assert dual.update(cost) == pytest.approx(multiplier, abs=1e-12)
        assert fixed.update(cost) == 0.5


def test_multiplier_stays_under_its_maximum_without_windup():
    controller = PIDLagrangian(TARGET, 0.0, 0.01, 0.0, adapt_rate=0.0, lagrange_max=2.0)
    assert max(multipliers(controller, [1000.0] * 100)) == 2.0
    assert controller.update(10.0) == pytest.approx(1.9)  # 2 - 0.01 * 10 at once
    controller = PIDLagrangian(TARGET, 0.1, 0.01, 0.1, lagrange_max=2.0)
    assert max(multipliers(controller, [1000.0] * 100)) == 2.0


# --- Our adaptation ---
def test_our_adaptation_against_a_table_by_hand():
    """Target 20, rate 1/20; J = 60, 30, 0, 0, 0: mean and deviation of the costs so far, all in the window.

    60        m 60     s 0            f = 1 + (40/60)/20    kd by 1
    60 30     m 45     s 15           f = 1 + (25/45)/20    kd by 1 + (15/45)/20
    60 30 0   m 30     s sqrt(600)    f = 1 + (10/30)/20    kd by 1 + (sqrt(600)/30)/20
    ... 0     m 22.5   s sqrt(618.75) f = 1 + (2.5/22.5)/20 kd by 1 + 1/20, as s > m
    ... 0 0   m 18     -              f = 1 - (2/20)/20     kd by f too, and I
    """
    controller = PIDLagrangian(TARGET, 0.1, 0.2, 0.4)
    controller.start(10.0)
    kp, ki, kd, integral, costs = 0.1, 0.2, 0.4, 10.0, []
    for cost, f, widening, unwinding in [
            (60, 1 + 1 / 30, 1, 1), (30, 1 + 1 / 36, 1 + 1 / 60, 1),
            (0, 1 + 1 / 60, 1 + math.sqrt(600) / 600, 1), (0, 1 + 1 / 180, 1.05, 1),
            (0, 0.995, 0.995, 0.995), (0, 0.9875, 0.9875, 0.9875)]:
        costs.append(cost)
        integral = max(0, integral + ki * (cost - 20))
        expected = kp * smoothed([cost - 20 for cost in costs]) + integral + kd * smoothed(costs)
        assert controller.update(cost) == pytest.approx(expected)
        kp, ki, kd, integral = kp * f, ki * f, kd * widening, integral * unwinding
        assert gains(controller) == pytest.approx([kp, ki, kd])


def test_adaptation_looks_at_the_last_d_delay_costs():
    """Delay 2: after 90 and 10 twice, the mean is 10, so the gains come down by 1 - (10 / 20) / 20."""
    controller = PIDLagrangian(TARGET, 1.0, 1.0, 1.0, d_delay=2)
    multipliers(controller, [90.0] * 9 + [10.0])
    before = gains(controller)
    controller.update(10.0)
    assert gains(controller) == pytest.approx([0.975 * gain for gain in before])


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_gains_change_slowly_and_stay_in_their_range(name):
    for setting in SETTINGS:
        for target, rate in [(TARGET, 0.05), (TARGET, 0.5), (0.0, 0.05), (0.0, 0.5)]:
            controller = PIDLagrangian(target, *setting, adapt_rate=rate)
            for cost in ADVERSARIAL[name]:
                before = gains(controller)
                assert 0 <= controller.update(cost) <= 100
                for old, new, first in zip(before, gains(controller), setting, strict=True):
                    assert (1 - rate - 1e-12) * old <= new <= (1 + rate + 1e-12) * old
                    assert first <= new <= 10 * first


def test_steady_violation_takes_the_gains_to_their_bound_and_safety_back_to_their_first_values():
    controller = PIDLagrangian(TARGET, 0.02, 0.002, 0.01)
    multipliers(controller, [60.0, 0.0, 100.0] * 100)
    assert gains(controller) == pytest.approx([0.2, 0.02, 0.1])
    multipliers(controller, [0.0] * 100)
    assert gains(controller) == [0.02, 0.002, 0.01]


@pytest.mark.parametrize("setting", SETTINGS)
def test_our_multiplier_unwinds_as_fast_as_it_wound_up_and_the_released_one_does_not(setting):
    for law, unwinds in [(PIDLagrangian, True), (ReleasedPIDLagrangian, False)]:
        controller = law(TARGET, *setting)
        peak = max(multipliers(controller, [60.0] * 200))
        assert (multipliers(controller, [5.0] * 200)[-1] < 0.05 * peak) == unwinds


@pytest.mark.parametrize(("setting", "cost"), [
    *((setting, cost) for setting in SETTINGS for cost in (22.0, 500.0)),
    # nearer to the target the released derivative gain, which only grows, wins while C is still rising from 0
    *(((kp, ki, 0.0), 20.1) for kp, ki, _ in SETTINGS),
])
def test_constant_violation_raises_ours_at_least_as_fast_as_the_released_one(setting, cost):
    laws = PIDLagrangian, ReleasedPIDLagrangian
    ours, released = (multipliers(law(TARGET, *setting), [cost] * 400) for law in laws)
    assert all(mine >= other * (1 - 1e-9) for mine, other in zip(ours, released, strict=True))


@pytest.mark.parametrize("law", [PIDLagrangian, ReleasedPIDLagrangian])
def test_target_zero_without_cost_is_finite(law):
    for setting in SETTINGS:
        controller = law(0.0, *setting)
        with np.errstate(all="raise"):
            assert multipliers(controller, [0.0] * 50) == [0.0] * 50
            assert all(math.isfinite(value) for value in multipliers(controller, [1.0, 0.0] * 50))
        assert all(math.isfinite(gain) for gain in gains(controller))


# --- The released adaptation ---
def test_released_adaptation_cuts_the_gains_at_its_first_violation():
    """Target 20, cost 60 twice; the window holds smoothed costs after a zero.

    First: {0, 6}, mean 3 + 0.1, deviation 3. Second: {0, 6, 11.4}, mean 5.8 + 0.1, deviation sqrt(65.04 / 3).
    """
    controller = ReleasedPIDLagrangian(TARGET, 1.0, 2.0, 3.0)
    controller.update(60)
    kp, ki, kd = gains(controller)
    assert kp == pytest.approx(0.727, abs=5e-4)
    assert [kp, ki / 2, kd / 3] == pytest.approx([1 - 0.05 * 16.9 / 3.1] * 2 + [1 + 0.05 * 3 / 3.1])
    controller.update(60)
    factor, widening = 1 - 0.05 * 14.1 / 5.9, 1 + 0.05 * math.sqrt(65.04 / 3) / 5.9
    assert gains(controller) == pytest.approx([kp * factor, ki * factor, kd * widening])


def test_released_gain_falls_to_its_floor_in_one_update_at_low_cost():
    """Cost 5: {0, 0.5}, mean 0.25 + 0.1: factor 1 - 0.05 * 19.65 / 0.35 = -1.81, so the floor of a tenth."""
    controller = ReleasedPIDLagrangian(TARGET, 1.0, 1.0, 1.0)
    controller.update(5)
    assert gains(controller)[:2] == [0.1, 0.1]


def test_released_adaptation_hardly_unwinds():
    controller = ReleasedPIDLagrangian(TARGET, 5e-6, 5e-6, 5e-6)
    assert multipliers(controller, [60.0] * 1000)[-1] == pytest.approx(1.856, abs=1e-3)
    assert gains(controller)[1] == pytest.approx(5e-5)  # at most ten times its first value
    assert multipliers(controller, [5.0] * 1000)[-1] == pytest.approx(1.821, abs=1e-3)
    assert gains(controller)[1] == pytest.approx(5e-7)


def test_gains_of_the_released_script_are_the_official_ones_unless_given():
    assert gains_of(marvel_released_pid.Args()) == [5e-6, 5e-6, 5e-6]
    assert gains_of(marvel_released_pid.Args(ki=0.15)) == [5e-6, 0.15, 5e-6]


def test_script_of_the_released_law_runs_marvel_with_it_and_leaves_marvel_as_it_was():
    run = new_run("released", total_timesteps=10, lagrange_init=0.5)
    (cost,), target = run.metrics["episode_cost"], 2.0 - 0.25 * math.sqrt(19 / 20)
    mean, deviation = 0.1 * cost / 2 + 0.1, 0.1 * cost / 2  # of {0, C}
    factor, widening = 1 + 0.07 * (mean - target) / mean, 1 + 0.07 * deviation / mean
    for name, first, by in [("kp", 0.02, factor), ("ki", 0.01, factor), ("kd", 0.03, widening)]:
        assert run.metrics[name][0] == pytest.approx(first * max(by, 0.1), rel=1e-5)
    expected = 0.5 + 0.01 * (cost - target) + 0.02 * 0.1 * (cost - target) + 0.03 * 0.1 * cost
    assert run.metrics["lagrange_multiplier"][0] == pytest.approx(expected, rel=1e-5)
    assert marvel_sac_pid.PIDLagrangian is PIDLagrangian


# --- Units ---
def test_rewards_times_ten_give_the_multiplier_times_ten():
    """The critics' gradients of the reward, so lambda_ls and lambda_norm, are ten times as large."""
    one, ten = (PIDLagrangian(TARGET, 0.2, 0.01, 0.3, cost_unit=40.0, lagrange_max=1e6) for _ in range(2))
    one.start(0.2, fading_from=0.7, unit=0.7)
    ten.start(2.0, fading_from=7.0, unit=7.0)
    costs = ADVERSARIAL["up, down, up"]
    expected = [10 * value for value in multipliers(one, costs)]
    assert max(expected) > 1 and multipliers(ten, costs) == pytest.approx(expected)
    assert gains(ten) == pytest.approx(gains(one))


def test_costs_and_limit_times_three_give_the_multiplier_by_three():
    one = PIDLagrangian(TARGET, 0.2, 0.01, 0.3, margin=1.0, cost_unit=40.0)
    three = PIDLagrangian(3 * TARGET, 0.2, 0.01, 0.3, margin=1.0, cost_unit=120.0)
    one.start(0.3, fading_from=0.9, unit=0.9)
    three.start(0.1, fading_from=0.3, unit=0.3)
    costs = np.random.default_rng(0).exponential(40, 300)
    expected = [value / 3 for value in multipliers(one, costs)]
    assert len(set(expected)) > 100 and multipliers(three, 3 * costs) == pytest.approx(expected)
    assert gains(three) == pytest.approx(gains(one))


def test_integral_winds_per_gradient_step():
    """Unit 2, costs in units of 40: 100 gradient steps at 40 above the target add 2 * 0.01 * 100 * 1."""
    controller = PIDLagrangian(TARGET, 0.0, 0.01, 0.0, cost_unit=40.0, adapt_rate=0.0)
    controller.start(0.5, unit=2.0)
    assert controller.update(60.0, gradient_steps=100) == pytest.approx(0.5 + 2.0)
    assert controller.update(60.0, gradient_steps=25) == pytest.approx(0.5 + 2.0 + 0.5)
    assert controller.update(0.0, gradient_steps=0) == pytest.approx(3.0)


# --- Margin ---
def test_target_is_the_margin_times_the_deviation_of_the_last_costs_below_the_limit():
    """Limit 20, the last four episodes. Of those that are missing each is 10, half the limit, off the mean.

    costs            deviation                             target by a margin of 0.8
    6                sqrt((0 + 3 * 100) / 4) = 8.66        13.07
    6 18             sqrt((2 * 36 + 2 * 100) / 4) = 8.25   13.40
    6 18 0 0         sqrt((0 + 144 + 36 + 36) / 4) = 7.35  14.12
    18 0 0 18        9                                     12.8
    0 0 18 0         7.79                                  13.76
    """
    controller = PIDLagrangian(20.0, 0.0, 0.0, 0.0, margin=0.8, spread_window=4)
    assert controller.target_cost == 20.0
    for costs, deviation in [([6], math.sqrt(75)), ([18], math.sqrt(68)), ([0, 0], math.sqrt(54)),
                             ([18], 9.0), ([0], math.sqrt(60.75))]:
        controller.update(*costs)
        assert controller.target_cost == pytest.approx(20 - 0.8 * deviation)


@pytest.mark.parametrize(("costs", "deviation"), [([7.0] * 20, 5.0), ([0.0, 1e6] * 10, 10.0)])
def test_deviation_is_kept_between_a_quarter_and_half_of_the_limit(costs, deviation):
    controller = PIDLagrangian(20.0, 0.0, 0.0, 0.0, margin=1.0)
    controller.update(*costs)
    assert controller.target_cost == 20 - deviation


def test_target_is_never_below_zero_and_a_target_of_zero_is_no_division_by_zero():
    controller = PIDLagrangian(20.0, 0.1, 0.01, 0.1, margin=3.0)
    with np.errstate(all="raise"):
        assert controller.spread() == 10.0
        assert multipliers(controller, [0.0] * 5) == [0.0] * 5
    assert controller.target_cost == 0.0


def test_block_counts_as_the_mean_of_its_episodes():
    blocks = [(3.0, 50.0), (0.0, 0.0), (90.0, 10.0)]
    whole, means = (PIDLagrangian(TARGET, 0.1, 0.01, 0.1) for _ in range(2))
    for block in blocks:
        assert whole.update(*block) == pytest.approx(means.update(sum(block) / 2))


# --- Saving ---
@pytest.mark.parametrize("law", [PIDLagrangian, ReleasedPIDLagrangian])
@pytest.mark.parametrize("length", [0, 3, 25])
def test_saved_controller_continues_identically(law, length):
    costs = np.random.default_rng(3).uniform(0, 90, length + 40).tolist()
    controller, other = (law(TARGET, 0.02, 0.002, 0.01) for _ in range(2))
    controller.start(0.3, fading_from=0.8)
    multipliers(controller, costs[:length])
    state = controller.state_dict()
    expected = multipliers(controller, costs[length:])  # the state does not change with it
    other.load_state_dict(state)
    third = deepcopy(other)
    third.load_state_dict(state)
    assert multipliers(other, costs[length:]) == expected
    assert other.metrics() == controller.metrics()
    assert multipliers(third, costs[length:]) == expected  # what another took from the state is its own
