"""Datasets are read as DSRL means them, found, thinned evenly, and every fault is named in one line."""

import gymnasium as gym
import h5py
import numpy as np
import pytest
import torch
from conftest import TASK

import common
from benchmark.tools.collect_dataset import thin

KEYS, FLAGS = common.DATASET_KEYS, ("terminals", "timeouts")


def write_raw(path, data, **attributes):
    """Any arrays under any names: write_dataset would not write most of the faults below."""
    with h5py.File(path, "w") as file:
        for key, value in data.items():
            file.create_group(key) if value is None else file.create_dataset(key, data=value)
        file.attrs.update(attributes)
    return path


def task(env_id=TASK, obs_dim=8, act_dim=2, **more):
    return common.Task(env_id, obs_dim, act_dim, 200, **more)


# --- Good files ---
@pytest.mark.parametrize("flag_type", [bool, np.float32, np.uint8, np.int64])
def test_good_file_gives_contiguous_float32_of_the_tasks_shapes(tmp_path, ball_data, flag_type):
    raw = {key: array.astype(flag_type if key in FLAGS else np.float64) for key, array in ball_data.items()}
    if flag_type is not bool:  # columns are accepted, too
        raw |= {key: raw[key][:, None] for key in ("rewards", "costs", *FLAGS)}
    data = common.read_dataset(write_raw(tmp_path / "x.hdf5", raw), task())
    assert tuple(data) == KEYS
    for key, tensor in data.items():
        assert tensor.dtype == torch.float32 and tensor.is_contiguous(), key
        assert np.array_equal(tensor.numpy(), ball_data[key].astype(np.float32)), key
    assert data["observations"].shape == data["next_observations"].shape == (600, 8)
    assert data["actions"].shape == (600, 2)
    assert data["rewards"].shape == data["costs"].shape == data["terminals"].shape == (600,)


@pytest.mark.parametrize(("terminals", "timeouts"), [
    ([599], []), ([], [599]), ([199, 599], [199, 399]), ([41], [177])])
def test_episodes_may_end_either_way_as_long_as_not_every_time_limit_is_a_terminal(
        tmp_path, ball_data, terminals, timeouts):
    raw = dict(ball_data, terminals=np.isin(np.arange(600), terminals),
               timeouts=np.isin(np.arange(600), timeouts))
    data = common.read_dataset(write_raw(tmp_path / "x.hdf5", raw), task())
    assert data["terminals"].nonzero().flatten().tolist() == terminals
    assert data["timeouts"].nonzero().flatten().tolist() == timeouts


def test_dsrl_reads_what_write_dataset_wrote(ball_file, ball_data):
    import dsrl  # noqa: F401  (registers the tasks)

    env = gym.make("OfflineBallCircle-v0")
    read = env.unwrapped.get_dataset(h5path=str(ball_file))
    env.close()
    assert read.keys() == ball_data.keys()
    for key, array in read.items():
        assert array.dtype == ball_data[key].dtype and np.array_equal(array, ball_data[key]), key


# --- Own action units ---
LOW, HIGH = np.float32([0, -4]), np.float32([2, 0])
OWN = task(action_low=LOW, action_high=HIGH)


@pytest.mark.parametrize(("attributes", "scaled"), [
    ({}, True), ({"seed": 1, "action_units": "simulator"}, True), ({"seed": 1}, True), ({"task": TASK}, True),
    ({"seed": 1, "task": TASK, "author": "somebody"}, True), ({"seed": 1, "task": "a sentence"}, True),
    ({"seed": 1, "task": TASK}, False),
    ({"seed": 1, "task": TASK, "command": "python ...", "versions": "..."}, False)])
def test_actions_of_a_file_are_in_the_simulators_units_but_for_our_files_of_before(
        tmp_path, ball_data, attributes, scaled):
    own = np.tile(np.float32([[0, -4], [2, 0], [1.5, -1]]), (200, 1))
    unit = np.tile(np.float32([[-1, -1], [1, 1], [0.5, 0.5]]), (200, 1))
    raw = dict(ball_data, actions=own if scaled else unit)
    data = common.read_dataset(write_raw(tmp_path / "x.hdf5", raw, **attributes), OWN)
    np.testing.assert_allclose(data["actions"].numpy(), unit, atol=1e-6)
    assert data["actions"].dtype == torch.float32


def test_actions_in_units_that_are_not_known_are_refused(tmp_path, ball_data, refusal):
    path = write_raw(tmp_path / "x.hdf5", ball_data, action_units="normalized")
    assert "action_units are normalized, not 'simulator'" in refusal(common.read_dataset, path, task())


def test_action_outside_the_simulators_bounds_is_refused(tmp_path, ball_data, refusal):
    actions = np.tile(np.float32([1, -1]), (600, 1))
    actions[7] = 1, 0.5
    line = refusal(common.read_dataset, write_raw(tmp_path / "x.hdf5", dict(ball_data, actions=actions)), OWN)
    assert "actions[7] is [1.0, 0.5], outside the task's bounds" in line


# --- Broken files ---
def changed(key, row, value):
    def change(data):
        array = data[key].astype(np.float32)
        array[row] = value
        data[key] = array
    return change


def replaced(**arrays):
    return lambda data: data.update(arrays)


def shortened(*keys, rows=-1):
    return lambda data: data.update({key: data[key][:rows] for key in keys})


FAULTS = {
    **{f"missing-{key}": (lambda data, key=key: data.pop(key), f"lacks the arrays {key}") for key in KEYS},
    **{f"length-{key}": (shortened(key), "has shape") for key in KEYS},
    **{f"nan-{key}": (changed(key, 7, np.nan), f"{key} is not finite at transition 7") for key in KEYS},
    "inf": (changed("costs", 599, -np.inf), "costs is not finite at transition 599"),
    "too-large": (replaced(rewards=np.full(600, 1e300)), "rewards is not finite at transition 0"),
    "strings": (replaced(actions=np.full((600, 2), b"1")), "actions holds |S1, not numbers"),
    "objects": (replaced(costs=["1"] * 600), "costs holds object, not numbers"),
    "complex": (replaced(rewards=np.zeros(600, complex)), "rewards holds complex128"),
    "records": (replaced(costs=np.zeros(600, "f4,f4")), "costs holds"),
    "width-observations": (replaced(observations=np.zeros((600, 7))), "observations has shape (600, 7)"),
    "width-next": (replaced(next_observations=np.zeros((600, 9))), "next_observations has shape (600, 9)"),
    "width-actions": (replaced(actions=np.zeros((600, 3))), "actions has shape (600, 3)"),
    "flat-actions": (replaced(actions=np.zeros(600)), "actions has shape (600,)"),
    "images": (replaced(observations=np.zeros((600, 2, 2, 2))), "shape (600, 2, 2, 2)"),
    "two-columns": (replaced(rewards=np.zeros((600, 2))), "rewards has shape (600, 2)"),
    "empty": (shortened(*KEYS, rows=0), "holds 0 transitions, at least two are needed"),
    "one": (shortened(*KEYS, rows=1), "holds 1 transitions, at least two are needed"),
    "no-episode-end": (replaced(terminals=np.zeros(600), timeouts=np.zeros(600)), "no episode ends"),
    "terminal-2": (changed("terminals", 3, 2), "terminals and timeouts must be 0 or 1"),
    "timeout-half": (changed("timeouts", 3, 0.5), "terminals and timeouts must be 0 or 1"),
    "timeout-minus-1": (changed("timeouts", 3, -1), "terminals and timeouts must be 0 or 1"),
    "flags-alike": (lambda data: data.update(terminals=data["timeouts"]),
                    "every time limit is a terminal too"),
    "action-outside": (changed("actions", 3, (0, -1.5)), "actions[3] is [0.0, -1.5], outside [-1, 1]"),
    "negative-cost": (changed("costs", 11, -1), "costs are negative at transition 11"),
    "group": (replaced(observations=None), "lacks the arrays observations"),
    "scalar": (replaced(rewards=1.0), "lacks the arrays rewards"),
    "null": (replaced(rewards=h5py.Empty("f")), "rewards"),
    "text": (replaced(rewards="none"), "lacks the arrays rewards"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_named_in_one_line(tmp_path, ball_data, refusal, name):
    change, words = FAULTS[name]
    raw = dict(ball_data)
    change(raw)
    path = write_raw(tmp_path / "broken.hdf5", raw, task=TASK)
    line = refusal(common.read_dataset, path, task())
    assert str(path) in line and words in line, line


def damaged(content, file):
    """Bytes in the middle of an array are others."""
    start = file["observations"].id.get_chunk_info(0).byte_offset + 20
    return content[:start] + b"\xff" * 40 + content[start + 40:]


@pytest.mark.parametrize("change", [
    *(lambda x, _, share=share: x[:int(share * len(x))] for share in (0, 0.001, 0.1, 0.5, 0.9, 0.999)),
    damaged, lambda *_: b"observations,actions\n1,2\n", lambda *_: bytes(4096), lambda *_: b"PK\x03\x04"])
def test_file_that_is_cut_damaged_or_something_else_is_named(tmp_path, ball_file, refusal, change):
    path = tmp_path / "broken.hdf5"
    with h5py.File(ball_file) as file:
        path.write_bytes(change(ball_file.read_bytes(), file))
    line = refusal(common.read_dataset, path, task())
    assert str(path) in line and "not a readable HDF5 file" in line


def test_array_that_no_memory_holds_is_named_in_one_line(tmp_path, ball_data, refusal):
    path = write_raw(tmp_path / "x.hdf5", {key: ball_data[key] for key in KEYS if key != "rewards"})
    with h5py.File(path, "a") as file:  # a few bytes
        file.create_dataset("rewards", (2**50,), np.float32, chunks=(1024,))
    assert "not a readable HDF5 file" in refusal(common.read_dataset, path, task())


@pytest.mark.parametrize(("made_for", "refused"), [
    (TASK, False), (f"my_tasks:{TASK}", False), ("a sentence: of another project", False), (None, False),
    ("my-medium-v2", False), (TASK.replace("Safety", "Offline"), False), (np.array([TASK.encode()]), False),
    ("OfflineCarCircle-v0", True), (np.array([b"SafetyCarCircle-v0"]), True),
    ("SafetyCarCircle-v0", True), ("my_tasks:SafetyCarCircle-v0", True), (b"SafetyCarCircle-v0", True)])
def test_file_that_names_another_task_is_refused(tmp_path, ball_data, refusal, made_for, refused):
    path = write_raw(tmp_path / "x.hdf5", ball_data, **{} if made_for is None else {"task": made_for})
    if refused:
        line = refusal(common.read_dataset, path, task())
        assert str(path) in line and "SafetyCarCircle-v0, not from" in line
    else:
        assert len(common.read_dataset(path, task())["rewards"]) == 600


# --- Episodes and scores ---
TABLE = {key: np.array(row, np.float32) for key, row in {
    "rewards": [1, 2, 4, 8, 16, 32, 64], "costs": [0, 1, 0, 1, 1, 0, 9],
    "terminals": [0, 1, 0, 0, 0, 1, 0], "timeouts": [0, 0, 0, 0, 1, 0, 0]}.items()}


def test_episode_sums_end_at_terminals_and_timeouts_and_leave_out_the_rest():
    ends, returns, costs = common.episode_sums(TABLE)
    assert ends.tolist() == [1, 4, 5]
    assert returns.tolist() == [3, 28, 32]
    assert costs.tolist() == [1, 2, 0]
    assert common.longest_episode(TABLE) == 3


def test_dataset_is_described_by_its_episodes_and_a_longest_one_that_is_not_the_tasks(tmp_path):
    line, warning = common.describe_dataset(tmp_path / "x.hdf5", TABLE, 1.5, task()).split("\n")
    assert line.startswith("x.hdf5: 3 episodes, 7 transitions; 2 episodes within the limit")
    assert line.endswith("75th percentile of their return 24.8")  # 3 + 0.75 * (32 - 3)
    assert "3 steps" in warning and "200" in warning
    same = common.Task(TASK, 8, 2, 3)
    assert "\n" not in common.describe_dataset(tmp_path / "x.hdf5", TABLE, 0.0, same)


def test_episode_sums_keep_their_digits_over_many_transitions():
    n = 200_000
    data = {"rewards": np.full(n, 0.1, np.float32), "costs": np.ones(n, np.float32),
            "terminals": np.zeros(n), "timeouts": np.arange(n) % 200 == 199}
    _, returns, costs = common.episode_sums(data)
    assert len(returns) == 1000
    np.testing.assert_allclose(returns, 20, rtol=1e-6)
    np.testing.assert_array_equal(costs, 200)


@pytest.mark.parametrize("limit", [20, 0])
@pytest.mark.parametrize("env_id", [TASK, "SafetyHopperVelocityGymnasium-v1"])
def test_normalized_scores_are_dsrls(env_id, limit):
    import dsrl  # noqa: F401  (registers the tasks)

    ours, described = common.make_env(env_id)
    theirs = gym.make(env_id.replace("Safety", "Offline"))
    theirs.unwrapped.set_target_cost(limit)
    for episode_return, cost in ((0.0, 0.0), (700.0, 20.0), (-3.5, 61.0)):
        expected = theirs.unwrapped.get_normalized_score(episode_return, cost)
        assert described.normalized_return(episode_return) == expected[0]
        assert common.normalized_cost(cost, limit) == expected[1]
    ours.close()
    theirs.close()


# --- Where the file is looked for ---
@pytest.fixture
def places(tmp_path, monkeypatch):
    """A shipped folder, a cache that does not exist yet, a network that fails, and a task that DSRL has."""
    shipped, cache = tmp_path / "shipped", tmp_path / "cache"
    shipped.mkdir()
    monkeypatch.setattr(common, "SHIPPED_DATASETS", shipped)
    monkeypatch.setenv("DSRL_DATASET_DIR", str(cache))

    def no_network(*args, **kwargs):
        raise ConnectionError("no route to host\nand a second line")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", no_network)
    return shipped / f"{TASK}.hdf5", cache / "SafetyBallCircle-v0-80-886.hdf5", task(
        dataset_file="SafetyBallCircle-v0-80-886.hdf5")


def test_dataset_is_looked_for_at_the_path_then_shipped_then_in_the_cache_then_downloaded(
        places, tmp_path, monkeypatch):
    shipped, cached, described = places
    asked = []

    def download(repo_id, filename, *, repo_type, local_dir):
        asked.append((repo_id, filename, repo_type))
        return str(local_dir / filename)

    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.hf_hub_download", download)
        assert common.find_dataset(described, None) == cached
    assert asked == [("YYY-45/DSRL", cached.name, "dataset")]
    given = tmp_path / "mine.hdf5"
    for place, path in (cached, None), (shipped, None), (given, str(given)):
        place.parent.mkdir(exist_ok=True)
        place.touch()
        assert common.find_dataset(described, path) == place


def test_failed_download_names_file_mirror_and_folder_and_leaves_nothing(places, tmp_path, refusal):
    _, cached, described = places
    before = sorted(tmp_path.rglob("*"))
    line = refusal(common.find_dataset, described, None)
    assert cached.name in line and str(cached.parent) in line
    assert "https://huggingface.co/datasets/YYY-45/DSRL" in line
    assert sorted(tmp_path.rglob("*")) == before


def test_path_that_does_not_exist_is_not_replaced_by_another_file(places, tmp_path, refusal):
    places[0].touch()
    for path in tmp_path / "typo.hdf5", tmp_path:
        assert "no such file" in refusal(common.find_dataset, places[2], str(path))


def test_task_without_a_known_dataset_is_told_how_to_make_one(places, refusal):
    line = refusal(common.find_dataset, task("SafetyCarReach-v0"), None)
    assert "SafetyCarReach-v0" in line and "benchmark/tools/collect_dataset.py" in line


# --- Thinning ---
def plane(n=400):
    rng = np.random.default_rng(0)
    crowded = rng.integers(0, 3, n) < 2  # two thirds of the episodes lie in one corner
    return np.where(crowded, 1.0, rng.integers(0, 60, n)), np.where(crowded, 0.5, rng.uniform(0, 900, n))


@pytest.mark.parametrize("most", [1, 30, 399, 400, 1000])
def test_thinning_keeps_at_most_so_many_different_episodes_the_same_for_a_seed(most):
    kept, again, other = (thin(*plane(), most, np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert 0 < len(kept) <= most
    assert np.array_equal(kept, np.unique(kept)) and np.array_equal(kept, again)
    assert np.array_equal(kept, other) == (most >= 400)
    if most >= 400:
        assert np.array_equal(kept, np.arange(400))


def test_thinning_takes_evenly_from_the_cells():
    costs, returns = np.repeat([0.0, 60.0, 30.0], [90, 10, 3]), np.repeat([0.0, 50.0, 25.0], [90, 10, 3])
    evenly = {3: [1, 1, 1], 8: [2, 2, 2], 9: [3, 3, 3], 20: [8, 8, 3], 33: [20, 10, 3]}
    for most, expected in evenly.items():
        kept = thin(costs, returns, most, np.random.default_rng(0))
        assert [int((costs[kept] == cost).sum()) for cost in (0, 60, 30)] == expected
