"""All ways to play a block of episodes give the same bits, and leave no process behind."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack

import numpy as np
import pytest
import torch
from conftest import ROOT

import common
from benchmark import parallel_envs
from benchmark.parallel_envs import TODAY, Args, main, open_versions

HOPPER, DRONE = "SafetyHopperVelocityGymnasium-v1", "SafetyDroneCircle-v0"  # both end early

# With both kinds of processes open: prints their ids, then goes on with `ending`.
OPEN = """
import multiprocessing, time
from contextlib import ExitStack
from benchmark.parallel_envs import open_versions

with ExitStack() as stack:
    versions, _ = open_versions("SafetyHopperVelocityGymnasium-v1", [2], 2, stack)
    for play in versions.values():
        play([1, 2])
    print(*[child.pid for child in multiprocessing.active_children()], flush=True)
    {ending}
"""


@pytest.fixture(autouse=True)
def no_process_is_left():
    before = {child.pid for child in multiprocessing.active_children()}
    yield
    assert {child.pid for child in multiprocessing.active_children()} == before


# --- The same episodes ---
@pytest.mark.parametrize(("env_id", "num_envs", "seeds"), [
    (HOPPER, [1, 2, 4], [5, 2**31 - 1, 7]), (DRONE, [2], range(3)), ("SafetyBallCircle-v0", [2], [3, 4, 3])])
def test_every_version_plays_todays_episodes_bit_for_bit(env_id, num_envs, seeds):
    torch.manual_seed(1)
    with ExitStack() as stack:
        versions, buffer = open_versions(env_id, num_envs, len(seeds), stack)
        steps = versions[TODAY](seeds)
        todays = {key: value[:steps].clone() for key, value in buffer.items()}
        ends = (todays["terminals"] + todays["timeouts"]).nonzero()[:, 0]
        lengths = np.diff(ends, prepend=-1)
        assert len(ends) == len(seeds) and ends[-1] == steps - 1
        if env_id == "SafetyBallCircle-v0":
            assert torch.equal(todays["observations"][:200], todays["observations"][400:])  # equal seeds
        else:
            assert todays["terminals"].sum() > 0 and len(set(lengths)) > 1
        for name, play in versions.items():
            for value in buffer.values():
                value.fill_(-7)
            # other episodes in between: none depends on what its process played before
            assert name == TODAY or play([11, 12]) > 0
            assert play(seeds) == steps, name
            for key, value in buffer.items():
                assert torch.equal(value[:steps], todays[key]), (name, key)


def test_processes_follow_the_policy():
    with ExitStack() as stack:
        versions, buffer = open_versions(HOPPER, [2], 2, stack)
        actor = versions["pool of 2"].args[2]
        for step in range(2):
            with torch.no_grad():
                for parameter in actor.parameters():
                    parameter += 0.1 * step
            steps = versions[TODAY]([1, 2])
            todays = buffer["actions"][:steps].clone()
            for name, play in versions.items():
                assert play([1, 2]) == steps
                assert torch.equal(buffer["actions"][:steps], todays), (name, step)


# --- No process is left ---
@pytest.mark.filterwarnings("ignore:.*Calling `close` while waiting:UserWarning")
@pytest.mark.parametrize("version", ["vector of 2", "pool of 2"])
def test_processes_end_with_an_exception_inside_one(version, monkeypatch):
    reset_env = common.reset_env

    def breaks(env, seed):
        if seed == 13:
            raise RuntimeError("out of order")
        return reset_env(env, seed)

    monkeypatch.setattr(common, "reset_env", breaks)  # before the fork
    with pytest.raises(RuntimeError, match="out of order"), ExitStack() as stack:
        versions, _ = open_versions(HOPPER, [2], 2, stack)
        assert len(multiprocessing.active_children()) >= 4
        versions[version]([12, 13])


@pytest.mark.parametrize(("ending", "number", "status"), [
    ("time.sleep(300)", signal.SIGTERM, -15), ("time.sleep(300)", signal.SIGKILL, -9),
    ("while True: versions['vector of 2']([1, 2])", signal.SIGTERM, -15),
    ("while True: versions['pool of 2']([1, 2])", signal.SIGTERM, -15),
    ("raise ValueError", None, 1), ("", None, 0)])
def test_processes_end_with_their_parent(ending, number, status):
    program = subprocess.Popen([sys.executable, "-c", OPEN.format(ending=ending)], cwd=ROOT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    with program:
        pids = [int(pid) for pid in program.stdout.readline().split()]
        if number:
            program.send_signal(number)
        returned = program.wait(60)
    assert len(pids) == 4
    assert returned == status
    deadline = time.monotonic() + 60
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(alive, pids))


def alive(pid):
    """Whether the process runs; one that has ended and that nobody has waited for does not."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


# --- The command ---
def test_command_writes_its_table(tmp_path, capsys):
    output = tmp_path / "table.md"
    main(Args(env_ids=(HOPPER,), num_envs=(1, 2), episodes=2, rounds=1, output=str(output)))
    assert os.listdir(tmp_path) == ["table.md"]
    text = output.read_text()
    assert text in capsys.readouterr().out and str(tmp_path) not in text
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()
            if line.startswith("| ")]
    assert [row[1] for row in rows[1:]] == [TODAY, "by episode", "vector of 1", "vector of 2", "pool of 1",
                                            "pool of 2", parallel_envs.UPDATE]
    assert all(len(row) == len(rows[0]) and row[0] == HOPPER for row in rows[1:])


@pytest.mark.parametrize(("options", "word"), [
    (dict(rounds=0), "--rounds"), (dict(episodes=0), "--episodes"), (dict(num_envs=(2, 0)), "--num-envs"),
    (dict(output="no/such/folder/x.md"), "--output"), (dict(env_ids=("SafetyBalCircle-v0",)), "--env-id")])
def test_bad_option_is_one_line(options, word, refusal, tmp_path):
    options = dict(output=str(tmp_path / "x.md")) | options
    assert word in refusal(main, Args(**options))
    assert os.listdir(tmp_path) == []
