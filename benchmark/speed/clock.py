"""What the speed commands share: the processor's name, and timing versions beside each other."""
import contextlib
import platform
import random
import time
from collections.abc import Callable

import numpy as np
from tqdm import tqdm


def cpu_name() -> str:
    """What the processor calls itself."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        for line in file:
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.machine()


def measure(groups: dict[str, dict[str, Callable]], units: dict[str, int], rounds: int,
            slice_seconds: float) -> dict[tuple[str, str], np.ndarray]:
    """Calls per second and per CPU second of every version, (rounds, 2), times the group's units per call."""
    order, shuffler = [(group, version) for group in groups for version in groups[group]], random.Random(0)
    rates = {key: [] for key in order}
    for group, version in order:  # optimisers make their memory in the first step
        groups[group][version]()
    for _ in tqdm(range(rounds), "rounds"):
        shuffler.shuffle(order)
        for group, version in order:
            call, calls, cpu, wall = groups[group][version], 0, time.process_time(), time.perf_counter()
            while calls == 0 or time.perf_counter() - wall < slice_seconds:
                call()
                calls += 1
            seconds = np.array([time.perf_counter() - wall, time.process_time() - cpu])
            rates[group, version].append(units.get(group, 1) * calls / seconds)
    return {key: np.array(rate) for key, rate in rates.items()}


def spread(numbers: np.ndarray) -> str:
    """Minimum / median / maximum."""
    low, middle, high = (f"{x:.0f}" if x >= 100 else f"{x:.3g}" for x in np.quantile(numbers, [0, 0.5, 1]))
    return f"{low} / **{middle}** / {high}"
