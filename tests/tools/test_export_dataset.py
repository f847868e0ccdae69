"""The export writes what was played, in the task's own units, or says in a line why not."""

import hashlib
from dataclasses import fields
from importlib import import_module

import gymnasium as gym
import h5py
import numpy as np
import pytest
from conftest import TASK, TINY_MARVEL, run_script, single_line

import common
import marvel_sac_pid
import offline_pretrain
from benchmark.tools import export_dataset
from benchmark.tools.curves import read_metrics
from benchmark.tools.export_dataset import Args, main, write_dataset

SCRIPTS = {"marvel_sac_pid": marvel_sac_pid} | {
    name: import_module(f"benchmark.baselines.{name}")
    for name in ("jsrl", "pex", "so2", "rlpd", "marvel_td3_pid")}
TRANSITION = ("observations", "next_observations", "actions", "rewards", "costs", "terminals", "timeouts")


class Recorder(gym.Wrapper):
    """Keeps every transition as the simulator gave it; the first episode ends by itself after 120 steps.

    A tiny run has hardly a cost of its own, so every seventh step costs 1 and every fiftieth 2.5.
    """

    def __init__(self, env, rows):
        super().__init__(env)
        self.rows, self.obs = rows, None

    def reset(self, **options):
        self.obs, info = self.env.reset(**options)
        return self.obs, info

    def step(self, action):
        next_obs, reward, terminated, truncated, info = self.env.step(action)
        n = len(self.rows) + 1
        info["cost"] = float(n % 7 == 0) + 2.5 * (n % 50 == 0)
        terminated = n == 120
        self.rows.append((self.obs, next_obs, action.copy(), reward, info["cost"], terminated, truncated))
        self.obs = next_obs
        return next_obs, reward, terminated, truncated, info


def watched(run):
    """All transitions of the first simulator that run() makes, which is the one that it trains in."""
    rows, made, make = [], [], common.make_env

    def make_env(env_id):
        env, task = make(env_id)
        made.append(env)
        return (Recorder(env, rows) if len(made) == 1 else env), task

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "make_env", make_env)
        run()
    return {key: np.array(column) for key, column in zip(TRANSITION, zip(*rows, strict=True), strict=True)}


@pytest.fixture(scope="module")
def offline(ball_file, tmp_path_factory):
    """The checkpoint of one tiny offline run, with another scale of the reward than the default: its path."""
    run_dir = tmp_path_factory.mktemp("runs") / "offline"
    offline_pretrain.main(offline_pretrain.Args(
        update_steps=10, batch_size=32, eval_episodes=1, reward_scale=0.3, dataset_path=str(ball_file),
        run_dir=str(run_dir)))
    return run_dir / "checkpoint.pt"


@pytest.fixture(scope="module")
def online(ball_file, offline, tmp_path_factory):
    """online(script): the folder of one tiny run of it and all that was played."""
    runs = {}

    def run(name):
        if name not in runs:
            run_dir = tmp_path_factory.mktemp("runs") / name
            options = TINY_MARVEL | dict(total_timesteps=500, utd=0.1, seed=3, reward_scale=0.3,
                                         checkpoint=str(offline), dataset_path=str(ball_file))
            known = {field.name for field in fields(SCRIPTS[name].Args)}
            args = SCRIPTS[name].Args(**{key: value for key, value in options.items() if key in known},
                                      run_dir=str(run_dir))
            runs[name] = run_dir, watched(lambda: SCRIPTS[name].main(args))
        return runs[name]

    return run


# --- What was played ---
@pytest.mark.parametrize("name", SCRIPTS)
def test_file_holds_every_transition_that_was_played(tmp_path, capsys, ball_task, online, name):
    run_dir, seen = online(name)
    capsys.readouterr()
    output = tmp_path / "made/here/x.hdf5"
    main(Args(f"{run_dir}/checkpoint.pt", str(output)))
    said = capsys.readouterr().out

    data = common.read_dataset(output, ball_task)
    assert len(data["rewards"]) == len(seen["rewards"]) == 520  # the block that ends after the 500th step
    for key in TRANSITION:
        if key == "rewards":  # scaled in the buffer, in float32
            np.testing.assert_allclose(data[key], seen[key], rtol=1e-6)
        else:
            np.testing.assert_array_equal(data[key].numpy(), seen[key].astype(np.float32), err_msg=key)
    assert np.flatnonzero(data["terminals"]).tolist() == [119]
    assert np.flatnonzero(data["timeouts"]).tolist() == [319, 519]

    metrics = read_metrics(run_dir / "metrics.csv")
    ends, returns, costs = common.episode_sums(data)
    assert (ends + 1).tolist() == metrics["env_steps"].tolist()
    np.testing.assert_allclose(returns, metrics["episode_return"], rtol=1e-5)
    np.testing.assert_allclose(costs, metrics["episode_cost"], rtol=1e-5)
    assert said == (f"{output}: 3 episodes, 520 transitions; return {returns.min():.1f} to "
                    f"{returns.max():.1f}, cost {costs.min():g} to {costs.max():g}\n")
    with h5py.File(output) as file:
        assert dict(file.attrs) == {"task": TASK, "seed": 3, "action_units": "simulator"}
    assert [file.name for file in output.parent.iterdir()] == ["x.hdf5"]


def test_offline_training_takes_the_file(tmp_path, online):
    main(Args(f"{online('marvel_sac_pid')[0]}/checkpoint.pt", str(tmp_path / "x.hdf5")))
    offline_pretrain.main(offline_pretrain.Args(
        update_steps=5, batch_size=32, eval_episodes=1, dataset_path=str(tmp_path / "x.hdf5"),
        run_dir=str(tmp_path / "run")))
    digest = hashlib.sha256((tmp_path / "x.hdf5").read_bytes()).hexdigest()
    assert common.load_checkpoint(tmp_path / "run/checkpoint.pt")["dataset_sha256"] == digest


def test_same_checkpoint_gives_the_same_bytes_and_stays_as_it_is(tmp_path, online):
    checkpoint = online("marvel_sac_pid")[0] / "checkpoint.pt"
    before = checkpoint.read_bytes()
    for name in ("a.hdf5", "b.hdf5"):
        main(Args(str(checkpoint), str(tmp_path / name)))
    assert (tmp_path / "a.hdf5").read_bytes() == (tmp_path / "b.hdf5").read_bytes()
    assert checkpoint.read_bytes() == before
    main(Args(str(checkpoint), str(tmp_path / "b.hdf5")))  # over the one that is there
    assert (tmp_path / "a.hdf5").read_bytes() == (tmp_path / "b.hdf5").read_bytes()


def test_checkpoint_of_an_unfinished_run_gives_its_episodes_so_far(tmp_path, ball_task, online):
    whole = common.load_checkpoint(online("marvel_sac_pid")[0] / "checkpoint.pt")
    part = whole | {"finished": False, "buffer": {key: x[:320] for key, x in whole["buffer"].items()}}
    common.save_checkpoint(tmp_path / "part.pt", part)
    main(Args(str(tmp_path / "part.pt"), str(tmp_path / "x.hdf5")))
    data = common.read_dataset(tmp_path / "x.hdf5", ball_task)
    assert len(data["rewards"]) == 320 and len(common.episode_sums(data)[0]) == 2


class Wide(gym.Env):
    """Its actions lie in [0, 4] and [-3, -1]; it keeps those that it gets."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (1,))
    action_space = gym.spaces.Box(np.array([0, -3], np.float32), np.array([4, -1], np.float32))
    got = []

    def reset(self, *, seed=None, options=None):
        return np.zeros(1), {}

    def step(self, action):
        self.got.append(action)
        return np.zeros(1), 0.0, False, False, {"cost": 0.0}


def test_actions_are_written_in_the_units_of_the_simulator_and_read_back_in_the_scripts(tmp_path):
    gym.register("Wide-v0", Wide, max_episode_steps=10)
    marvel_sac_pid.main(marvel_sac_pid.Args(
        env_id="Wide-v0", from_scratch=True, total_timesteps=40, eval_episodes=1,
        run_dir=str(tmp_path / "x")))
    main(Args(str(tmp_path / "x/checkpoint.pt"), str(tmp_path / "x.hdf5")))
    with h5py.File(tmp_path / "x.hdf5") as file:
        written = file["actions"][()]
    played = np.array(Wide.got)
    first = next(k for k in range(len(played)) if np.allclose(played[k], written[0], atol=1e-5))
    np.testing.assert_allclose(written, played[first : first + 40], atol=1e-5)
    assert np.ptp(written, axis=0) == pytest.approx([4, 2], abs=0.8)  # uniform over the box
    _, task = common.make_env("Wide-v0")
    scaled = common.read_dataset(tmp_path / "x.hdf5", task)["actions"].numpy()
    np.testing.assert_allclose(scaled, written / [2, 1] + [-1, 2], atol=1e-5)
    del gym.registry["Wide-v0"]


def test_checkpoint_of_a_task_whose_bounds_were_others_is_refused(tmp_path, refusal, monkeypatch):
    """Its actions, in [-1, 1], would be written in units that they did not have."""
    monkeypatch.setitem(gym.registry, "Wide-v0", gym.envs.registration.EnvSpec(
        "Wide-v0", Wide, max_episode_steps=10))
    marvel_sac_pid.main(marvel_sac_pid.Args(
        env_id="Wide-v0", from_scratch=True, total_timesteps=40, eval_episodes=1,
        run_dir=str(tmp_path / "x")))
    monkeypatch.setattr(Wide, "action_space", gym.spaces.Box(-5, 5, (2,)))
    for refused in (lambda: main(Args(str(tmp_path / "x/checkpoint.pt"), str(tmp_path / "x.hdf5"))),
                    lambda: marvel_sac_pid.main(marvel_sac_pid.Args(
                        resume=str(tmp_path / "x"), total_timesteps=80))):
        line = refusal(refused)
        assert "action_low is [" in line and "this run needs [-5.0, -5.0]" in line
    assert not (tmp_path / "x.hdf5").exists()


# --- Writing ---
def test_interrupted_writing_leaves_the_old_file_as_it_was(tmp_path, ball_data, ball_file):
    path = tmp_path / "x.hdf5"
    path.write_bytes(ball_file.read_bytes())
    with pytest.raises(KeyError):
        write_dataset(path, {key: ball_data[key] for key in common.DATASET_KEYS[:4]}, {})
    assert path.read_bytes() == ball_file.read_bytes()


# --- What is refused ---
def export(checkpoint, output):
    main(Args(str(checkpoint), str(output)))


def test_checkpoint_without_episodes_is_refused(tmp_path, offline, online, refusal):
    output = tmp_path / "x.hdf5"
    assert f"--checkpoint {offline}: holds no episodes" in refusal(export, offline, output)
    whole = common.load_checkpoint(online("marvel_sac_pid")[0] / "checkpoint.pt")
    empty = {key: x[:0] for key, x in whole["buffer"].items()}
    for name, buffer in ("empty", empty), ("none", None), ("nothing", {}):
        common.save_checkpoint(tmp_path / f"{name}.pt", whole | {"buffer": buffer})
        line = refusal(export, tmp_path / f"{name}.pt", output)
        assert f"{name}.pt: holds no episodes of an online run" in line
    assert not output.exists()


def test_task_that_is_not_the_checkpoints_is_refused(tmp_path, online, refusal):
    args = Args(f"{online('marvel_sac_pid')[0]}/checkpoint.pt", str(tmp_path / "x.hdf5"), "SafetyBallRun-v0")
    assert f"env_id is {TASK}, this run needs SafetyBallRun-v0" in refusal(main, args)
    assert not (tmp_path / "x.hdf5").exists()


def test_output_that_cannot_be_written_is_refused(tmp_path, online, refusal, monkeypatch):
    checkpoint = online("marvel_sac_pid")[0] / "checkpoint.pt"
    (tmp_path / "file").write_text("x")
    for output in (tmp_path, tmp_path / "file/x.hdf5", tmp_path / "file/below/x.hdf5"):
        assert f"--output {output}: " in refusal(export, checkpoint, output)
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "x"
    monkeypatch.setattr(export_dataset.os, "access", lambda folder, mode: folder != tmp_path)
    for output in (tmp_path / "x.hdf5", tmp_path / "deep/down/x.hdf5"):
        assert f"--output {output}: " in refusal(export, checkpoint, output)
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_command_line_writes_the_file_where_it_is_run_or_gives_one_line(tmp_path, ball_task, online):
    checkpoint = online("marvel_sac_pid")[0] / "checkpoint.pt"
    command = ["benchmark/tools/export_dataset.py", "--checkpoint", checkpoint, "--output"]
    status, stdout, stderr = run_script(*command, "x.hdf5", cwd=tmp_path)
    assert (status, stderr) == (0, "")
    assert stdout.startswith("x.hdf5: 3 episodes, 520 transitions; ")
    assert len(common.read_dataset(tmp_path / "x.hdf5", ball_task)["rewards"]) == 520
    status, stdout, stderr = run_script(*command, ".", cwd=tmp_path)
    assert stdout == "" and "--output .: " in single_line(status, stderr)
    status, _, stderr = run_script(*command[:1], "--checkpoint", checkpoint, cwd=tmp_path)
    assert status == 2 and "Traceback" not in stderr and "--output" in stderr
    assert [file.name for file in tmp_path.iterdir()] == ["x.hdf5"]
