"""What judges the critics: Monte-Carlo values, states put into the simulator, and the command as a whole."""

import csv

import gymnasium as gym
import numpy as np
import pytest
import torch

import common
from benchmark.evidence import q_alignment
from benchmark.evidence.q_alignment import alignment, follow, monte_carlo, repeated, set_state
from marvel_sac_pid import Actor, Critic


# --- Monte-Carlo values ---
class Counter(gym.Env):
    """Reward 1 and cost 1/2 per step; terminates after `life` steps. Observes steps and last action."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,))
    action_space = gym.spaces.Box(-1, 1, (1,))

    def __init__(self, life):
        self.life = life

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return np.zeros(2), {}

    def step(self, action):
        self.steps += 1
        return np.array([self.steps, action[0]]), 1.0, self.steps == self.life, False, {"cost": 0.5}


HORIZON = 20
TASK = common.Task("Counter-v0", 2, 1, HORIZON)


def counter(life):
    return gym.wrappers.TimeLimit(Counter(life), HORIZON)


def steady(obs, rng=None):
    return np.full(1, 0.25, np.float32)


@pytest.mark.parametrize(("life", "end"), [(10**6, HORIZON + 30), (15, 15)], ids=["time limit", "terminal"])
def test_monte_carlo_goes_on_after_a_time_limit_and_stops_at_a_terminal(life, end):
    gamma = 0.9
    samples = monte_carlo(counter(life), TASK, steady, gamma, seed=3, episodes=25, tail=30, every=3)
    start = samples["observations"][:, 0]
    assert len(set(start)) > 10
    assert start.max() < min(end, HORIZON)
    exact = (1 - gamma ** (end - start)) / (1 - gamma)
    np.testing.assert_allclose(samples["returns"], exact, rtol=1e-5)
    np.testing.assert_allclose(samples["costs"], exact / 2, rtol=1e-5)


def test_monte_carlo_starts_with_one_uniform_action_then_follows_the_policy():
    samples = monte_carlo(counter(10**6), TASK, steady, 0.9, seed=3, episodes=200, tail=30, every=3)
    start, first = samples["observations"][:, 0], samples["actions"][:, 0] != 0.25
    assert first.sum() == 200
    assert set(start[first]) == set(range(HORIZON // 2))
    uniform = samples["actions"][first, 0]
    np.testing.assert_allclose(np.quantile(uniform, [0, 0.25, 0.5, 0.75, 1]), [-1, -0.5, 0, 0.5, 1], atol=0.2)
    assert sorted(start) == sorted(step for prefix in start[first] for step in np.arange(prefix, HORIZON, 3))


def test_monte_carlo_repeats_with_its_seed_and_leaves_the_global_random_state():
    np.random.seed(5)
    expected = np.random.RandomState(5).rand(3)
    one, two, other = (monte_carlo(counter(15), TASK, steady, 0.9, seed=seed, episodes=5, tail=30)
                       for seed in (3, 3, 4))
    for key in one:
        np.testing.assert_array_equal(one[key], two[key])
    assert not np.array_equal(one["actions"], other["actions"])
    np.testing.assert_array_equal(np.random.rand(3), expected)


def test_alignment_of_known_critics():
    truth = np.random.default_rng(0).uniform(-1, 3, 50)
    assert alignment(np.exp(truth), truth)[0] == pytest.approx(1)  # ranks, not values
    assert alignment(0.1 * truth + 0.3, truth)[1] == pytest.approx(0.3 - 0.9 * truth.mean())
    assert alignment(-truth, truth) == pytest.approx((-1, -2 * truth.mean()))
    shuffled = np.array([4.0, 1, 3, 2, 5])  # squared differences of ranks: 9, 1, 0, 4, 0
    assert alignment(shuffled, np.arange(5.0)) == pytest.approx((1 - 6 * 14 / (5 * 24), 1.0))
    assert np.isnan(alignment(truth, np.zeros(50))[0])


# --- States of the dataset ---
def stillness(env):
    """How far a ball is from lying still on the ground: height above it and vertical speed."""
    sim = env.unwrapped
    z = sim.bc.getBasePositionAndOrientation(sim.agent.body_id)[0][2]
    return abs(z - 0.5) + abs(sim.bc.getBaseVelocity(sim.agent.body_id)[0][2])


def record(env, task, steps, obs, seed=0):
    """Slowly changing actions from the simulator's present state: a dataset's arrays and the stillness."""
    rng, action, rows = np.random.default_rng(seed), 0.0, []
    for _ in range(steps):
        action = np.clip(0.8 * action + 0.6 * rng.standard_normal(task.act_dim), -1, 1).astype(np.float32)
        still = stillness(env) if "Ball" in task.env_id else 0.0
        next_obs, reward, terminated, _, info = env.step(action)
        rows.append((obs, next_obs.astype(np.float32), action, reward, info["cost"], terminated, still))
        obs = rows[-1][1]
    names = ("observations", "next_observations", "actions", "rewards", "costs", "terminals", "stillness")
    return {name: np.array(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}


def start(env, env_id, seed):
    """First observation; HalfCheetah starts at 4 m/s, above the speed that costs."""
    obs, _ = env.reset(seed=seed)
    if "HalfCheetah" in env_id:
        sim = env.unwrapped
        sim.set_state(sim.init_qpos + 0.1, 4.0 * (np.arange(sim.model.nv) == 0))
        obs = np.concatenate([sim.data.qpos[1:], sim.data.qvel]).astype(np.float32)
    return obs


@pytest.mark.parametrize("env_id", [
    "SafetyBallCircle-v0", "SafetyBallRun-v0", "SafetyHalfCheetahVelocityGymnasium-v1",
    "SafetySwimmerVelocity-v1"])
def test_simulator_put_into_a_recorded_state_gives_the_recorded_next_state_reward_and_cost(env_id):
    env, task = common.make_env(env_id)
    data = [record(env, task, 60, start(env, env_id, seed), seed) for seed in range(3)]
    data = {key: np.concatenate([part[key] for part in data]) for key in data[0]}
    assert 0 < data["costs"].mean() < 1
    rows = list(repeated(env, data, np.arange(180)))
    still = set(np.flatnonzero(data["stillness"] < 1e-3))  # a bouncing ball's height is not observed
    assert set(rows) <= still and len(rows) > max(30, 0.9 * len(still))
    for row in rows:
        assert set_state(env, data["observations"][row])
        next_obs, reward, terminated, _, info = env.step(data["actions"][row])
        np.testing.assert_allclose(next_obs, data["next_observations"][row], atol=2e-4)
        assert reward == pytest.approx(data["rewards"][row], abs=1e-4)
        assert (info["cost"], terminated) == (data["costs"][row], data["terminals"][row])
    env.close()


def test_velocities_that_the_observation_clips_do_not_count():
    env, task = common.make_env("SafetyHopperVelocityGymnasium-v1")
    env.reset(seed=0)
    sim = env.unwrapped
    data = []
    for speed in 9.0, 14.0:  # of a joint; the observation shows at most 10
        sim.set_state(sim.init_qpos, speed * (np.arange(sim.model.nv) == 5))
        obs = np.concatenate([sim.data.qpos[1:], sim.data.qvel.clip(-10, 10)]).astype(np.float32)
        data.append(record(env, task, 1, obs))
    data = {key: np.concatenate([part[key] for part in data]) for key in data[0]}
    assert list(repeated(env, data, np.arange(2))) == [0]
    env.close()


def test_task_whose_observation_hides_the_state_is_left_alone():
    env, task = common.make_env("SafetyCarRun-v0")
    assert not set_state(env, np.zeros(task.obs_dim))
    assert list(repeated(env, {"observations": np.zeros((3, task.obs_dim))}, np.arange(3))) == []
    env.close()


def test_rollouts_from_a_state_sum_what_follows_it_beyond_the_time_limit():
    env, task = common.make_env("SafetyBallRun-v0")
    obs, _ = env.reset(seed=0)
    push = np.array([1.0, 0.3], np.float32)
    observations, rewards, costs = [], [], []
    for _ in range(130):  # the unwrapped simulator has no time limit
        observations.append(obs)
        obs, reward, _, _, info = env.unwrapped.step(push)
        rewards.append(reward)
        costs.append(info["cost"])
    begin = np.array([0, 20, 90])
    result = follow(env, lambda obs, rng: push, 0.9, 0, np.array(observations, np.float32)[begin],
                    np.repeat(push[None], 3, 0), tail=35)
    weights = 0.9 ** np.arange(35)
    for k, t in enumerate(begin):
        assert result["returns"][k] == pytest.approx(weights @ rewards[t : t + 35], rel=1e-4)
        assert result["costs"][k] == pytest.approx(weights @ costs[t : t + 35], abs=1e-6)
    assert 0 < result["costs"][0] < result["costs"][2]
    env.close()


# --- The command ---
RUN = "SafetyBallRun-v0"


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """An offline checkpoint of random networks, one step of VPA, results into a temporary folder."""
    monkeypatch.setattr(q_alignment, "RESULTS", tmp_path / "results")
    monkeypatch.setitem(q_alignment.SETTINGS, RUN, {"online": "--vpa-steps 3 --total-timesteps 10000"})
    (tmp_path / "results").mkdir()
    folder = tmp_path / "work" / RUN / "offline/seed4"
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    common.save_checkpoint(folder / "checkpoint.pt", dict(
        env_id=RUN, obs_dim=7, act_dim=2, hidden=256, activation="relu", gamma=0.99, reward_scale=0.1,
        finished=True, args={"dataset_path": None}, actor=Actor(7, 2).state_dict(),
        q=Critic(2, 7, 2).state_dict(), qc=Critic(1, 7, 2).state_dict()))
    return tmp_path


def command(folder, **options):
    """The exit status of the command on seed 4."""
    options = dict(env_ids=(RUN,), seeds=(4,), work_dir=str(folder / "work"), samples=3) | options
    with pytest.raises(SystemExit) as end:
        q_alignment.main(q_alignment.Args(**options))
    return end.value.code


def test_command_compares_both_pairs_of_critics_and_a_finished_comparison_is_not_repeated(
        workplace, monkeypatch, capsys):
    assert command(workplace) == 0
    file = workplace / "results/q_alignment" / RUN / "seed4.csv"
    rows = list(csv.DictReader(file.read_text().splitlines()))
    assert {row["set"] for row in rows} == {"dataset", "random", "rollouts"}
    dataset, random = ([row for row in rows if row["set"] == name] for name in ("dataset", "random"))
    assert len(dataset) == len(random) == 3
    assert [row["draw"] for row in dataset] == [row["draw"] for row in random]  # the same states ...
    assert [row["q_after"] for row in dataset] != [row["q_after"] for row in random]  # ... other actions

    checkpoints = [common.load_checkpoint(workplace / "work" / RUN / phase / "seed4/checkpoint.pt")
                   for phase in ("offline", "vpa")]
    for key in checkpoints[0]["actor"]:
        torch.testing.assert_close(checkpoints[0]["actor"][key], checkpoints[1]["actor"][key], rtol=0, atol=0)
    assert checkpoints[1]["args"]["vpa_steps"] == checkpoints[1]["progress"]["vpa_steps"] == 3
    assert checkpoints[1]["args"]["total_timesteps"] == 0
    data = common.read_dataset(common.SHIPPED_DATASETS / f"{RUN}.hdf5", common.Task(RUN, 7, 2, 100))
    for checkpoint, phase in zip(checkpoints, ("before", "after"), strict=True):
        q, qc = Critic(2, 7, 2), Critic(1, 7, 2)
        q.load_state_dict(checkpoint["q"])
        qc.load_state_dict(checkpoint["qc"])
        every_q, every_qc = (critic(data["observations"], data["actions"]).detach().numpy()
                             for critic in (q, qc))
        for row in dataset:  # its values are of one and the same state and action of the dataset
            near = np.isclose(every_q.min(0), float(row[f"q_{phase}"]), rtol=1e-4)
            assert np.isclose(every_qc[0][near], float(row[f"qc_{phase}"]), rtol=1e-4).any()

    shown = (workplace / "results/q_alignment.md").read_text()
    bias = np.mean([float(row["qc_before"]) - float(row["monte_carlo_qc"]) for row in random])
    (line,) = [line for line in shown.splitlines() if line.startswith(f"| {RUN} (1) | random |")]
    assert line.split("|")[6].split("→")[0].strip() == f"{bias:.2f}"
    assert shown in capsys.readouterr().out

    monkeypatch.setattr(q_alignment, "call", lambda *arguments: pytest.fail("VPA again"))
    monkeypatch.setattr(q_alignment, "compare", lambda *arguments: pytest.fail("compared again"))
    (workplace / "results/q_alignment.png").unlink()
    (workplace / "work" / RUN / "offline/seed4/checkpoint.pt").unlink()  # nothing is read but the CSV file
    assert command(workplace) == 0
    assert (workplace / "results/q_alignment.md").read_text() == shown
    assert (workplace / "results/q_alignment.png").stat().st_size > 10_000
    assert not list(workplace.glob("results/**/*.part*"))


def test_pre_alignment_is_used_again_if_it_is_finished_and_newer_than_its_start(workplace, monkeypatch):
    calls = []

    def vpa(arguments, log_file):
        calls.append(arguments)
        log_file.parent.mkdir(parents=True, exist_ok=True)
        start = arguments[arguments.index("--checkpoint") + 1]
        common.save_checkpoint(log_file.parent / "checkpoint.pt", {
            key: value for key, value in common.load_checkpoint(start).items() if key != "version"})
        return 0, 1.0, 1.0

    monkeypatch.setattr(q_alignment, "call", vpa)
    monkeypatch.setattr(q_alignment, "picture", lambda results: None)
    monkeypatch.setattr(q_alignment, "compare", lambda *arguments: [
        {"set": "rollouts", "draw": k} | dict.fromkeys(q_alignment.COLUMNS, k) for k in range(3)])
    file = workplace / "results/q_alignment" / RUN / "seed4.csv"
    for runs in 1, 1:
        assert command(workplace) == 0
        assert len(calls) == runs
        file.unlink()
    start, end = (workplace / "work" / RUN / phase / "seed4/checkpoint.pt" for phase in ("offline", "vpa"))
    start.touch()
    assert command(workplace) == 0
    assert len(calls) == 2
    file.unlink()
    unfinished = common.load_checkpoint(end) | {"finished": False}
    common.save_checkpoint(end, unfinished)  # of an interrupted run, newer than what it started from
    assert command(workplace) == 0
    assert len(calls) == 3


def test_failed_pre_alignment_leaves_no_file_and_a_status(workplace, monkeypatch, refusal):
    monkeypatch.setattr(q_alignment, "call", lambda *arguments: (2, 1.0, 1.0))
    assert "no CSV file" in refusal(command_once, workplace)
    assert not (workplace / "results/q_alignment").exists()


def command_once(folder):
    q_alignment.main(q_alignment.Args(env_ids=(RUN,), seeds=(4,), work_dir=str(folder / "work")))


def test_missing_checkpoint_is_one_line_with_the_command_that_makes_it(workplace, refusal):
    (workplace / "work" / RUN / "offline/seed4/checkpoint.pt").unlink()
    line = refusal(command_once, workplace)
    assert f"python benchmark/evidence/evidence.py --methods offline --tasks {RUN} --seeds 4" in line
    assert not (workplace / "work" / RUN / "vpa").exists()


def test_table_of_known_values():
    """Two seeds; the second's costs are all 0, so that its rank correlation is undefined."""
    def run(shift, costs):
        truth = np.arange(4.0)
        return {"rollouts": dict(
            draw=truth + 1, monte_carlo_q=truth, q_before=truth - 2 + shift, q_after=-truth + 3,
            monte_carlo_qc=costs * truth, qc_before=truth, qc_after=costs * truth + 1)}

    text = q_alignment.table({"Task-v0": [run(0, 1), run(1, 0)]})
    assert "| Task-v0 (2) | dataset | the observation does not tell the simulator's state |" in text
    # the 97.5 % quantile of t with one degree of freedom is 12.706; biases -2 and -1 have standard error 1/2
    assert ("| Task-v0 (2) | rollouts | 1.00 ± 0.00 → -1.00 ± 0.00 | -1.50 ± 6.35 → 0.00 ± 0.00 "
            "| 1.00 (1 of 2) → 1.00 (1 of 2) | 0.75 ± 9.53 → 1.00 ± 0.00 |") in text


@pytest.mark.pins
def test_committed_table_is_what_the_committed_files_give():
    """There are none between a change of the defaults and the next measurement: then there is no table."""
    results = q_alignment.read_results()
    table = q_alignment.RESULTS / "q_alignment.md"
    assert table.exists() == bool(results)
    if results:
        assert table.read_text() == q_alignment.table(results)
