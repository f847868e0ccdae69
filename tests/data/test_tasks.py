"""Every family of tasks steps, repeats with its seed, ends where it should, and can be trained on."""

import subprocess
import sys
from pathlib import Path

import dsrl
import gymnasium as gym
import numpy as np
import pytest

import common
from benchmark.tools.curves import read_metrics
from marvel_sac_pid import Args, main

ROOT = Path(__file__).resolve().parents[2]

# Task: dimensions of observation and action, time limit, and how an episode of uniform actions ends: by time,
# by an earlier end of the task, or (slow simulators) it is not played to its end.
TASKS = {
    "SafetyBallRun-v0": (7, 2, 100, "time"),
    "SafetyBallCircle-v0": (8, 2, 200, "time"),
    "SafetyCarRun-v0": (7, 2, 200, "time"),
    "SafetyCarCircle-v0": (8, 2, 300, "time"),
    "SafetyDroneRun-v0": (17, 4, 200, "any"),
    "SafetyDroneCircle-v0": (18, 4, 300, "early"),
    "SafetyAntRun-v0": (33, 8, 200, "any"),
    "SafetyAntCircle-v0": (34, 8, 500, "early"),
    "SafetyHalfCheetahVelocityGymnasium-v1": (17, 6, 1000, "time"),
    "SafetyHopperVelocityGymnasium-v1": (11, 3, 1000, "early"),
    "SafetySwimmerVelocityGymnasium-v1": (8, 2, 1000, "time"),
    "SafetyWalker2dVelocityGymnasium-v1": (17, 6, 1000, "early"),
    "SafetyAntVelocityGymnasium-v1": (27, 8, 1000, "early"),
    "SafetyHopperVelocity-v1": (11, 3, 1000, "early"),
    "SafetyPointGoal1-v0": (60, 2, 1000, "slow"),
    "SafetyCarGoal2Gymnasium-v0": (72, 2, 1000, "slow"),
    "SafetyPointButton1-v0": (76, 2, 1000, "slow"),
    "SafetyCarButton2Gymnasium-v0": (88, 2, 1000, "slow"),
    "SafetyPointPush2Gymnasium-v0": (76, 2, 1000, "slow"),
    "SafetyCarPush1-v0": (88, 2, 1000, "slow"),
    "SafetyPointCircle2Gymnasium-v0": (28, 2, 500, "time"),
    "SafetyCarCircle1-v0": (40, 2, 500, "slow"),
}


def play(env, seed, steps):
    """Up to `steps` uniform actions: observations, rewards and costs as one array, and the last two flags."""
    rng, rows, terminated, truncated = np.random.default_rng(seed), [], False, False
    obs, _ = env.reset(seed=seed)
    while not (terminated or truncated) and len(rows) < steps:
        action = rng.uniform(-1, 1, env.action_space.shape).astype(np.float32)
        next_obs, reward, terminated, truncated, info = env.step(action)
        assert obs.dtype == np.float32 and obs.shape == env.observation_space.shape
        rows.append([*obs, reward, info["cost"]])
        obs = next_obs
    rows.append([*obs, 0.0, 0.0])
    return np.array(rows), terminated, truncated


@pytest.mark.parametrize("env_id", TASKS)
def test_task_steps_repeats_with_its_seed_and_ends_where_it_should(env_id):
    obs_dim, act_dim, limit, end = TASKS[env_id]
    env, task = common.make_env(env_id)
    assert (task.obs_dim, task.act_dim, task.max_episode_steps) == (obs_dim, act_dim, limit)
    assert env.observation_space.shape == (obs_dim,) and env.action_space.shape == (act_dim,)
    assert (env.action_space.low == -1).all() and (env.action_space.high == 1).all()

    rows, terminated, truncated = play(env, seed=3, steps=5 if end == "slow" else 2000)
    assert np.isfinite(rows).all() and (rows[:, -1] >= 0).all()
    if end == "slow":
        assert not terminated and not truncated
        env.episode_steps = limit - 2
        flags = [env.step(np.zeros(act_dim, np.float32))[2:4] for _ in range(2)]
        assert flags == [(False, False), (False, True)]
    else:
        assert terminated != truncated
        assert truncated == (len(rows) - 1 == limit)
        assert end == "any" or end == ("time" if truncated else "early")

    steps = 3 if end == "slow" else 50
    again, other = play(env, seed=3, steps=steps)[0], play(env, seed=4, steps=1)[0]
    n = min(len(again), len(rows)) - 1
    np.testing.assert_array_equal(again[:n], rows[:n])
    assert not np.array_equal(other[0], rows[0])
    env.close()
    env.close()


def test_every_task_of_dsrl_is_there_by_both_of_its_ids():
    import bullet_safety_gym  # noqa: F401  (registers its tasks)

    names = [name for name in dsrl.infos.DATASET_URLS if name[0].isupper()]
    for name in names:
        version = "v1" if name.endswith("Velocity") else "v0"
        ids = [f"Safety{name}-{version}", f"Safety{name}Gymnasium-{version}"]
        bullet = name.startswith(("Ball", "Drone")) or name in ("CarRun", "CarCircle", "AntRun", "AntCircle")
        for env_id in ids[:1 if bullet else 2]:
            assert gym.registry[env_id].max_episode_steps == dsrl.infos.DEFAULT_MAX_EPISODE_STEPS[name]
    assert len(names) == 29


def test_bullet_tasks_run_where_the_streams_are_not_the_c_librarys_as_in_a_notebook():
    code = ("import io, sys\nclass Stream(io.StringIO):\n    name = 'stdout'\n"
            "sys.stdout = sys.stderr = Stream()\nimport common\n"
            "env, _ = common.make_env('SafetyBallCircle-v0')\nenv.reset(seed=0)\n"
            "assert isinstance(sys.stdout, Stream)")
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize(("given", "usual"), [
    ("OfflineBallCircle-v0", "SafetyBallCircle-v0"), ("bullet_safety_gym:SafetyCarRun-v0", "SafetyCarRun-v0"),
    ("safety_gymnasium:SafetyPointGoal1-v0", "SafetyPointGoal1-v0")])
def test_other_names_of_a_task_are_one_task(given, usual):
    env, task = common.make_env(given)
    env.close()
    assert task.env_id == usual
    assert common.Run(Args(env_id=given), "x", ()).config["env_id"] == usual


@pytest.mark.parametrize(("env_id", "file", "low", "high"), [
    ("SafetyBallCircle-v0", "SafetyBallCircle-v0-80-886.hdf5", 0.38, 881.46),
    ("SafetyCarRun-v0", "SafetyCarRun-v0-40-651.hdf5", 204.29, 574.65),
    ("SafetyHopperVelocity-v1", "SafetyHopperVelocityGymnasium-v1-250-2240.hdf5", 37.05, 1911.4),
    ("SafetyPointGoal1-v0", "SafetyPointGoal1Gymnasium-v0-100-2022.hdf5", 0.01, 30.07),
    ("SafetyPointGoal1Gymnasium-v0", "SafetyPointGoal1Gymnasium-v0-100-2022.hdf5", 0.01, 30.07),
])
def test_dsrl_s_dataset_and_reference_returns_are_known_by_every_id(env_id, file, low, high):
    env, task = common.make_env(env_id)
    env.close()
    assert task.dataset_file == file
    normalized = [task.normalized_return(x) for x in (low, high, (low + 3 * high) / 4)]
    assert normalized == pytest.approx([0, 1, 0.75], abs=1e-3)


@pytest.mark.parametrize(("env_id", "ends_early"), [
    ("SafetyBallRun-v0", False), ("SafetyDroneCircle-v0", True),
    ("SafetyHopperVelocityGymnasium-v1", True), ("SafetyPointCircle1-v0", False)])
def test_training_from_scratch_runs_on_every_family(env_id, ends_early, tmp_path):
    main(Args(env_id=env_id, from_scratch=True, total_timesteps=1, learning_starts=1, batch_size=8, utd=0.2,
              eval_episodes=1, run_dir=str(tmp_path / "run")))
    metrics = read_metrics(tmp_path / "run/metrics.csv")
    for name in "episode_return", "episode_cost", "normalized_return", "q_loss", "eval_mean_return":
        assert np.isfinite(metrics[name]).all()
    data = common.load_checkpoint(tmp_path / "run/checkpoint.pt")["buffer"]
    limit = common.make_env(env_id)[1].max_episode_steps
    assert len(data["rewards"]) == metrics["env_steps"][-1]
    assert float(data["costs"].sum()) == pytest.approx(metrics["episode_cost"][0])
    assert (float(data["terminals"][-1]), float(data["timeouts"][-1])) == (ends_early, not ends_early)
    assert (len(data["rewards"]) == limit) != ends_early
