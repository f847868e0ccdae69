"""Exercise 4: the controller, one term at a time, against tables by hand."""

import pytest
from checks import CONSTANTS, require, require_close

from marvel_sac_pid import PIDLagrangian

pytestmark = pytest.mark.exercise_4
LEAK = CONSTANTS["leak"]
EMA = 0.9


def controller(kp=0.0, ki=0.0, kd=0.0, **options):
    """Limit 20, no margin, cost unit 10, no adaptation unless told."""
    return PIDLagrangian(20.0, kp, ki, kd, **{"cost_unit": 10.0, "adapt_rate": 0.0, **options})


def run(law, costs, **options):
    """The multiplier after each of the blocks."""
    return [law.update(cost, **options) for cost in costs]


@pytest.mark.points(2)
def test_the_proportional_term_is_a_moving_average_of_the_error():
    # e = (50 - 20) / 10 = 3, P = 0.3, 0.57, 0.813; then e = 0: P falls by a tenth
    table = [0.3, 0.57, 0.813, 0.7317]
    got = run(controller(kp=2.0), [50, 50, 50, 20])
    require_close(
        "the multiplier of kp alone",
        got,
        [2 * p for p in table],
        {
            "is that of the error itself, not of its moving average": [6.0, 6.0, 6.0, 0.0],
            "has the two weights of the average exchanged": [5.4, 5.94, 5.994, 0.5994],
            "counts costs in their own unit, not in cost_unit": [20 * p for p in table],
            "has the error's sign the wrong way round": [0.0, 0.0, 0.0, 0.0],
        },
    )


@pytest.mark.points(2)
def test_the_integral_grows_by_the_error_of_every_gradient_step():
    keep = 1 - LEAK
    one = 0.01 * 5 * 3
    right = [one, keep * one + one, keep * (keep * one + one)]
    got = run(controller(ki=0.01), [50, 50, 20], gradient_steps=5)
    require_close(
        "the multiplier of ki alone",
        got,
        right,
        {
            "does not count the block's gradient steps": [value / 5 for value in right],
            "counts costs in their own unit, not in cost_unit": [10 * value for value in right],
            "loses nothing of the integral": [one, 2 * one, 2 * one],
            "is that of the last block alone": [one, one, 0.0],
            "is 0: the sign of the error": [0.0, 0.0, 0.0],
        },
    )


@pytest.mark.points(2)
def test_costs_below_the_target_take_back_what_costs_above_it_brought():
    law = controller(ki=0.01)
    got = run(law, [50, 0], gradient_steps=5)
    above = 0.01 * 5 * 3
    require_close(
        "the multiplier of ki after costs of 50 and 0",
        got[1],
        (1 - LEAK) * above - 0.01 * 5 * 2,
        {"does not fall: errors below 0 count too": (1 - LEAK) * above},
    )
    law = controller(kp=1.0)
    law.start(2.0)
    require_close(
        "the multiplier of kp and an integral of 2, after a cost of 0",
        law.update(0),
        2 * (1 - LEAK) - 0.2,
        {"does not fall: the moving average may be below 0": 2 * (1 - LEAK)},
    )
    law = controller(kp=1.0, ki=0.1)
    law.error_ema = 0.5
    require_close(
        "the multiplier while the integral is at its floor",
        law.update(0),
        0.9 * 0.5 - 0.2,
        {"is that of the integral before it was cut": 0.9 * 0.5 - 0.4},
    )
    law = controller(kp=1.0, margin=1.0)
    law.update(50)
    require_close(
        "the multiplier with a margin",
        law.multiplier,
        0.1 * (50 - law.target_cost) / 10,
        {"aims at the limit, not at the target": 0.3},
    )


@pytest.mark.points(3)
def test_the_integral_stays_between_0_and_the_largest_multiplier():
    law = controller(ki=0.1)
    run(law, [0] * 30)
    require(
        law.integral >= 0,
        "the integral falls below 0 while costs are low, and the multiplier then answers "
        "to the first high costs too late: keep it at 0 or above",
    )
    require_close(
        "the multiplier after 30 blocks without cost and one of 50",
        law.update(50),
        0.3,
        {"is 0: the integral has wound up below 0": 0.0},
    )
    law = controller(ki=0.1, lagrange_max=4.0)
    law.start(0.0, unit=2.0)
    run(law, [50] * 30)
    require(
        law.integral <= 2.0 + 1e-9,
        f"the integral winds up to {law.integral:.3g} where lagrange_max / unit is 2",
    )
    require_close(
        "the multiplier at its largest",
        law.multiplier,
        4.0,
        {"is in the controller's unit: multiply by it": 2.0, "is not bounded by lagrange_max": 18.0},
    )
    law = controller(kp=1.0)
    run(law, [0] * 5)
    require_close(
        "the multiplier after costs below the target",
        law.multiplier,
        0.0,
        {"is negative: its floor is 0": -2 * (1 - EMA**5)},
    )


@pytest.mark.points(2)
def test_the_derivative_answers_to_rising_costs_only():
    # C = 1, 1.9 for costs of 100, then it falls; the delay line holds zeros first
    law = controller(kd=1.0, d_delay=2)
    c = [1.0, 1.9, 1.71, 1.539]
    right = [c[0], c[1], c[2] - c[0], 0.0]
    got = run(law, [100, 100, 0, 0])
    require_close(
        "the multiplier of kd alone",
        got,
        right,
        {
            "compares with the last block's C instead of that of d_delay updates ago": [1.0, 0.9, 0.0, 0.0],
            "takes the costs themselves instead of their moving average": [10.0, 10.0, 0.0, 0.0],
            "takes costs in their own unit, not in cost_unit": [10 * value for value in right],
        },
    )
    law = controller(kd=1.0, d_delay=2)
    law.start(2.0)
    run(law, [100, 100, 0, 0])
    kept = 2 * (1 - LEAK) ** 4
    require_close(
        "the multiplier of kd and an integral, after falling costs",
        law.multiplier,
        kept,
        {"falls with the costs: only their rise counts": kept + c[3] - c[1]},
    )


@pytest.mark.points(1)
def test_the_three_terms_add_up_in_the_multipliers_unit():
    parts = [run(controller(**{gain: 0.2}), [30, 60])[-1] for gain in ("kp", "ki", "kd")]
    law = controller(0.2, 0.2, 0.2)
    law.start(0.0, unit=3.0)
    got = run(law, [30, 60])[-1]
    require_close(
        "the multiplier of all terms in the unit 3", got, 3 * sum(parts), {"is not in `unit`": sum(parts)}
    )


@pytest.mark.points(2)
def test_above_the_target_the_gains_grow_up_to_their_bound():
    law = controller(0.1, 0.2, 0.3, adapt_rate=0.04)
    law.integral = 1.0
    law.update(40)  # m = 40, s = 0: f = 1 + 0.04 (40 - 20) / 40
    require_close(
        "the gains after one block of 40",
        law.gains,
        [0.102, 0.204, 0.3],
        {
            "have not changed": [0.1, 0.2, 0.3],
            "grow by the same factor: kd follows the spread": [0.102, 0.204, 0.306],
            "shrink": [0.1 / 1.02, 0.2 / 1.02, 0.3],
            "have not the mean in the factor's divisor": [0.104, 0.208, 0.3],
        },
    )
    grown = (1 - LEAK) + 0.2 * 2
    require_close(
        "the integral above the target",
        law.integral,
        grown,
        {"grows by the factor too: it unwinds below the target only": 1.02 * grown},
    )
    law.update(60)  # m = 50, s = 10
    require_close(
        "kd after costs of 40 and 60",
        law.gains[2],
        0.3 * (1 + 0.04 * 0.2),
        {"does not follow the spread of the costs": 0.3},
    )
    law = controller(0.1, 0.2, 0.3, adapt_rate=0.04)
    run(law, [0, 0, 100])  # m = 33, s = 47
    require_close(
        "kd after costs of 0, 0 and 100",
        law.gains[2],
        0.3 * 1.04,
        {"grows by more than adapt_rate: s / m counts as at most 1": 0.3 * (1 + 0.04 * 2**0.5)},
    )
    run(law, [1000] * 400)
    found = [round(gain, 3) for gain in law.gains]
    require(
        all(gain <= 10 * first + 1e-9 for gain, first in zip(law.gains, law.first_gains, strict=True)),
        f"the gains grow to {found}: beyond max_growth (10) times their first values",
    )
    require_close("kp after 400 blocks of 1000", law.gains[0], 1.0, {})


@pytest.mark.points(2)
def test_below_the_target_the_integral_unwinds_and_the_gains_return():
    law = controller(0.1, 0.2, 0.3, adapt_rate=0.05)
    law.integral = 2.0
    law.gains = [0.2, 0.2, 0.4]
    law.target_cost = 20.0
    law.costs.append(10)
    law.adapt()  # f = 1 + 0.05 (10 - 20) / 20 = 0.975
    require_close(
        "the integral below the target", law.integral, 0.975 * 2, {"does not unwind": 2.0, "grows": 1.025 * 2}
    )
    require_close(
        "the gains below the target",
        law.gains,
        [0.195, 0.2, 0.39],
        {
            "shrink below their first values: each has its floor there": [0.195, 0.195, 0.39],
            "have not changed": [0.2, 0.2, 0.4],
            "shrink but for kd": [0.195, 0.2, 0.4],
        },
    )
    law = controller(0.1, 0.2, 0.3, adapt_rate=0.05)
    law.target_cost = 0.0
    law.costs.append(0.0)
    law.adapt()
    require_close("the gains where costs and target are 0", law.gains, [0.1, 0.2, 0.3], {})
