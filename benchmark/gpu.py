"""How fast the updates are on a GPU: plain, as the scripts have them, compiled, and as one CUDA graph.

  python benchmark/gpu.py                   # one call, on a machine with a GPU: under ten minutes
  python benchmark/gpu.py --no-compile      # without torch.compile, which takes most of that
  python benchmark/gpu.py --device cpu      # the same code without a GPU, nothing captured: for the tests

This has never been run on a GPU. Tests hold the functions that are captured to the scripts' updates on the
CPU, and capture and replay them there with a stand-in for torch's graphs.

An update of networks as small as these is many small kernels, each of which costs more to launch than to
compute. A CUDA graph launches all of an update at once, but keeps nothing of Python: what the update reads
must lie on the device at an address that stays, so batch indices and multiplier are tensors that are filled
from outside. Before anything is timed, the graph of every update is held to the script's on this GPU.
"""
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common  # noqa: E402
import marvel_sac_pid as marvel  # noqa: E402
from benchmark.throughput import (  # noqa: E402
    BALL,
    UPDATES,
    cpu_name,
    measure,
    plain_start,
    spread,
    start,
    transitions,
)

MEASURED = ("VPA update", "CPQ update", "online update")
NETWORKS = ("actor", "q", "qc", "vae", "actor_target", "q_target", "qc_target")
ADAM = partial(torch.optim.Adam, fused=True, capturable=True)
BATCH = marvel.Args.batch_size  # offline_pretrain.py's too
WARM_UP = 3  # updates before a capture
CHECKED = (0.5, 0.5, 2.0, 2.0, 0.1, 0.1)  # multipliers of the updates that are compared, in reward per cost
TOLERANCE = 0.01  # rounding makes less than 0.001; other noise, batches or multipliers above 0.05

CAPTION = """Made by `python benchmark/gpu.py{option}`.

{device}, torch {torch}, CUDA {cuda}; {rounds} rounds of {slice_seconds:g} s. Every version runs once in each,
in shuffled order, between two synchronisations. BallCircle's dataset, on the device; batch {batch}, networks
of 256 x 256, from random networks on, float32. With the drawing of the batch, without logging.

- plain: the update as one writes it first (`throughput.py`)
- eager: the scripts' own, with the look at whether losses and gradients are finite
- {recorded}
- compiled: torch.compile of the same function; it breaks off at backward and in Adam

The last two compute the norms of the gradients, but do not look at them.

{checks}

A cell is minimum / **median** / maximum over rounds. The aim is 10 times plain for VPA and CPQ, 5 for online.

| update | version | updates per second | µs each | this / plain |
|---|---|---|---|---|
"""


@dataclass
class Args:
    rounds: int = 20
    """rounds; in each, every version runs once"""
    slice_seconds: float = 0.5
    """seconds that a version runs in one round, at least one update"""
    compile: bool = True
    """time torch.compile too"""
    device: Literal["cuda", "cpu"] = "cuda"
    """cpu runs the function that would be captured, eagerly"""
    output: str = "benchmark/results/gpu.md"
    """file of the table"""


def networks(device: torch.device, finish: Callable = lambda s: s) -> SimpleNamespace:
    """What updates work on, on the device, and the same at every call; `finish` is applied to it there."""
    torch.manual_seed(0)
    with torch.device(device):
        return finish(start(BALL.obs_dim, BALL.act_dim, marvel.Args()))


def build(make: Callable, name: str, s: SimpleNamespace, data: dict, *others: Callable) -> Callable:
    """The update (of a batch) that `make` puts together, with the entropy weight where the data lies."""
    with torch.device(data["rewards"].device):
        return make(UPDATES[name][0], s, *others)


# --- The update as a graph ---
def whole_update(name: str, s: SimpleNamespace, data: dict) -> tuple[Callable[[], dict], torch.Tensor]:
    """The script's update as a function of nothing, and the indices (batch,) of its transitions in `data`.

    All that it reads has an address that stays: data, indices, parameters, Adam's state, and the multiplier,
    which this turns into a tensor. Fill indices and s.controller.multiplier in place to change them.
    """
    device = data["rewards"].device
    s.controller = SimpleNamespace(multiplier=torch.tensor(s.controller.multiplier, device=device))
    update = build(UPDATES[name][1], name, s, data, ADAM, lambda **_: None)
    index = torch.randint(len(data["rewards"]), (BATCH,), device=device)

    def function():
        losses = update({key: value[index] for key, value in data.items()})
        return {key: value.detach() for key, value in losses.items()}

    return function, index


def capture(function: Callable[[], dict]) -> Callable[[], dict]:
    """`function` as one CUDA graph, after WARM_UP calls; replays fill the tensors that it gave last.

    A graph knows addresses only: what it gives keeps `function`, and with it all that is at them.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # on a side stream, as torch asks: Adam and cuBLAS make their memory
        for _ in range(WARM_UP):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):  # what the warm-up left is of this stream
        losses = function()

    def replay(_kept=function):
        graph.replay()
        return losses

    return replay


def eager(function: Callable[[], dict]) -> Callable[[], dict]:
    """`function` after WARM_UP calls: in the place of `capture` where there is no GPU."""
    for _ in range(WARM_UP):
        function()
    return function


def with_new_batch(function: Callable[[], dict], index: torch.Tensor, data: dict) -> Callable[[], dict]:
    """A step: new indices, uniformly with replacement as in the scripts' `sample`, and the update."""
    def step():
        index.random_(len(data["rewards"]))
        return function()

    return step


# --- Is it the same update? ---
def positions(s: SimpleNamespace) -> list[torch.Tensor]:
    """A copy of every network's parameters as one vector, and of the entropy weight's logarithm."""
    params = [list(getattr(s, name).parameters()) for name in NETWORKS]
    params += [[s.log_alpha]] if hasattr(s, "log_alpha") else []
    return [torch.cat([p.detach().flatten() for p in network]) for network in params]


def difference(name: str, data: dict, record: Callable) -> float:
    """How far apart the script's update and the one that `record` (capture or eager) gives end up.

    Both get the same batches, noise and multipliers. It is the distance of all parameters of a network over
    the length of the way that the script's went (1 if it stays), of the network where that is largest.
    """
    script, mine = networks(data["rewards"].device), networks(data["rewards"].device)
    update = build(UPDATES[name][1], name, script, data)
    first = positions(script)
    torch.manual_seed(1)
    batch = marvel.sample(data, BATCH)
    for _ in range(WARM_UP):
        update(batch)
    torch.manual_seed(2)
    for multiplier in CHECKED:
        script.controller.multiplier = multiplier
        update(marvel.sample(data, BATCH))

    torch.manual_seed(1)
    function, index = whole_update(name, mine, data)
    step = with_new_batch(record(function), index, data)
    torch.manual_seed(2)  # once more, as a capture may draw numbers of its own
    for multiplier in CHECKED:
        mine.controller.multiplier.fill_(multiplier)
        step()
    shares = []
    for start_at, its_end, my_end in zip(first, positions(script), positions(mine), strict=True):
        way, apart = (its_end - start_at).norm(), (its_end - my_end).norm()
        shares.append(apart / torch.where(way > 0, way, 1.0))
    return torch.stack(shares).max().item()  # nan if any is


# --- Measuring ---
def versions(name: str, data: dict, record: Callable) -> dict[str, Callable]:
    """Steps of an update by version, ready to be timed, all but torch.compile's."""
    device, (_, script, plain) = data["rewards"].device, UPDATES[name]
    steps = {}
    for version, make, s in [("plain", plain, networks(device, plain_start)),
                             ("eager", script, networks(device))]:
        update = build(make, name, s, data)
        steps[version] = eager(lambda update=update: update(marvel.sample(data, BATCH)))
    function, index = whole_update(name, networks(device), data)
    steps["graph" if record is capture else "not captured"] = with_new_batch(record(function), index, data)
    return steps


def table_rows(rates: dict[tuple[str, str], np.ndarray]) -> str:
    """The lines of the table, from what `measure` gives."""
    lines = []
    for (name, version), rate in rates.items():
        cells = [spread(x) for x in (rate[:, 0], 1e6 / rate[:, 0], rate[:, 0] / rates[name, "plain"][:, 0])]
        lines.append("| " + " | ".join([name, version, *cells]) + " |\n")
    return "".join(lines)


def main(args: Args) -> None:
    common.need(1 <= args.rounds <= 1000, f"--rounds {args.rounds}: must be between 1 and 1000")
    common.need(0 < args.slice_seconds <= 60, f"--slice-seconds {args.slice_seconds}: must be within (0, 60]")
    output, on_gpu = Path(args.output), args.device == "cuda"
    common.need(not output.is_dir() and output.parent.is_dir() and os.access(output.parent, os.W_OK),
                f"--output {output}: must be a file in a folder that exists and can be written to")
    common.need(not on_gpu or torch.cuda.is_available(),
                "torch finds no GPU here; --device cpu runs the same code without one, for tests")
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    warnings.filterwarnings("ignore", ".*capturable=True.*")  # the warm-up is not captured, and need not be
    record, finish = (capture, torch.cuda.synchronize) if on_gpu else (eager, lambda: None)
    data = {key: value.to(args.device) for key, value in transitions(BALL.obs_dim, BALL.act_dim).items()}

    kind, notes = "graph" if on_gpu else "not captured", []
    for name in MEASURED:
        apart = difference(name, data, record)
        notes.append(f"{name}: after {WARM_UP + len(CHECKED)} updates, {kind} and the script's are "
                     f"{apart:.1e} of the way apart (at most {TOLERANCE:g})")
        if not apart <= TOLERANCE:  # nan is not, either
            common.stop(f"{notes[-1]}: not the same update, nothing is timed", status=1)
        print(notes[-1], flush=True)
    groups = {name: versions(name, data, record) for name in MEASURED}
    for name in MEASURED * args.compile:  # after all captures, which its threads might disturb
        function, index = whole_update(name, networks(data["rewards"].device), data)
        try:
            groups[name]["compiled"] = with_new_batch(eager(torch.compile(function)), index, data)
        except Exception as error:  # no compiler, no Triton, ...: the others are worth a table all the same
            notes.append(f"{name}: torch.compile fails here ({type(error).__name__}: "
                         f"{' '.join(str(error).split())[:200]})")
    rates = measure(groups, {}, args.rounds, args.slice_seconds, finish)

    text = CAPTION.format(
        option=" --device cpu" * (not on_gpu) + " --no-compile" * (not args.compile), rounds=args.rounds,
        slice_seconds=args.slice_seconds, batch=BATCH, torch=torch.__version__, cuda=torch.version.cuda,
        device=torch.cuda.get_device_name() if on_gpu else f"No GPU: {cpu_name()}",
        recorded=f"{kind}: {'the whole update as one CUDA graph' if on_gpu else 'what would be a graph'}",
        checks="\n".join(f"- {note}" for note in notes))
    text += table_rows({(name, version): rates[name, version] for name in groups for version in groups[name]})
    common.write_file(output, text.encode())
    print(f"\n{text}\nwritten to {output}")


if __name__ == "__main__":
    main(tyro.cli(Args))
