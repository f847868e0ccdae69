# Marvel with the adaptation law of the official code, for comparison; all else is marvel_sac_pid.py.
# It averages smoothed costs, from a first 0, and its factor is not bounded below: one safe block throws the
# gains to a tenth, the integral never shrinks, and the multiplier does not come down (benchmark/methods.md).
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import common  # noqa: E402
import marvel_sac_pid  # noqa: E402

MEAN_OFFSET = 0.1  # the official code's, against a division by 0
MIN_SHARE = 0.1  # of its first value, to which a gain may fall
CONTROLLER = marvel_sac_pid.PIDLagrangian


@dataclass
class Args(marvel_sac_pid.Args):
    kp: float = 5e-6
    """proportional gain per unit of episode cost"""
    ki: float = 5e-6
    """integral gain per unit of episode cost and multiplier update"""
    kd: float = 5e-6
    """derivative gain per unit of episode cost"""


class ReleasedPIDLagrangian(CONTROLLER):
    """PIDLagrangian with the released law, by m and s, mean and deviation of the last d_delay values of C:

        factor = 1 + adapt_rate (m + 0.1 - target) / (m + 0.1)
        kp, ki <- factor kp, factor ki       kd <- (1 + adapt_rate s / (m + 0.1)) kd

    each within 0.1 and 10 times its first value. Its gains are per unit of episode cost and per update, in
    scaled reward: they know of no unit of the multiplier and no number of gradient steps.
    """

    def start(self, multiplier: float, fading_from: float | None = None, unit: float = 1.0) -> None:
        """As PIDLagrangian's, but for the units."""
        self.cost_unit = 1.0
        super().start(multiplier, fading_from)

    def update(self, *episode_costs: float, gradient_steps: int = 1) -> float:
        """As PIDLagrangian's, but for the number of gradient steps."""
        return super().update(*episode_costs)

    def adapt(self) -> None:
        """Change the gains for the next update."""
        mean = float(np.mean(self.cost_emas)) + MEAN_OFFSET
        std = float(np.std(self.cost_emas))
        factor = 1 + self.adapt_rate * (mean - self.target_cost) / mean
        factors = [factor, factor, 1 + self.adapt_rate * std / mean]
        for k, first_gain in enumerate(self.first_gains):
            gain = max(factors[k] * self.gains[k], MIN_SHARE * first_gain)
            self.gains[k] = min(gain, self.max_growth * first_gain)


def main(args: Args) -> None:
    """Run Marvel with this controller in the place of its own."""
    if args.run_dir is None and args.resume is None:
        args = replace(args, run_dir=common.default_run_dir(args, "marvel_released_pid"))
    marvel_sac_pid.PIDLagrangian = ReleasedPIDLagrangian
    try:
        marvel_sac_pid.main(args)
    finally:
        marvel_sac_pid.PIDLagrangian = CONTROLLER


if __name__ == "__main__":
    with common.patient_streams():
        main(tyro.cli(Args))
