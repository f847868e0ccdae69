"""Datasets are read as DSRL means them, found, thinned evenly, and every fault is named in one line."""

import gymnasium as gym
import h5py
import numpy as np
import pytest
import torch
from conftest import TASK

import common
import offline_pretrain
from benchmark.tools.collect_dataset import thin

FLAGS = ("terminals", "timeouts")


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
def test_good_file_gives_contiguous_float32_of_the_tasks_shapes(ball_file, ball_data, ball_task):
    data = common.read_dataset(ball_file, ball_task)
    assert tuple(data) == common.DATASET_KEYS
    for key, tensor in data.items():
        assert tensor.dtype == torch.float32 and tensor.is_contiguous(), key
        assert np.array_equal(tensor.numpy(), ball_data[key].astype(np.float32)), key
    assert data["observations"].shape == data["next_observations"].shape == (600, 8)
    assert data["actions"].shape == (600, 2)
    assert data["rewards"].shape == data["costs"].shape == data["terminals"].shape == (600,)


@pytest.mark.parametrize("flag_type", [bool, np.float32, np.uint8, np.int64])
def test_columns_and_every_type_of_flag_are_accepted(tmp_path, ball_data, flag_type):
    raw = {key: array.astype(flag_type if key in FLAGS else np.float64) for key, array in ball_data.items()}
    for key in ("rewards", "costs", *FLAGS):
        raw[key] = raw[key][:, None]
    data = common.read_dataset(write_raw(tmp_path / "x.hdf5", raw), task())
    for key, tensor in data.items():
        assert tensor.dtype == torch.float32 and tensor.is_contiguous(), key
        assert np.array_equal(tensor.numpy(), ball_data[key].astype(np.float32)), key


def test_terminals_and_timeouts_are_kept_apart(tmp_path, ball_data):
    raw = dict(ball_data, terminals=np.arange(600) == 41, timeouts=np.arange(600) == 177)
    data = common.read_dataset(write_raw(tmp_path / "x.hdf5", raw), task())
    assert data["terminals"].nonzero().tolist() == [[41]]
    assert data["timeouts"].nonzero().tolist() == [[177]]


@pytest.mark.parametrize(("terminals", "timeouts"), [([599], []), ([], [599]), ([199, 599], [199, 399])])
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


# --- Broken files ---
def changed(key, row, value):
    def change(data):
        array = data[key].astype(np.float32)
        array[row] = value
        data[key] = array
    return change


def replaced(**arrays):
    return lambda data: data.update(arrays)


def without(key):
    return lambda data: data.pop(key)


def shortened(*keys, rows=-1):
    return lambda data: data.update({key: data[key][:rows] for key in keys})


FAULTS = {
    **{f"missing-{key}": (without(key), f"lacks the arrays {key}") for key in common.DATASET_KEYS},
    **{f"length-{key}": (shortened(key), "has shape") for key in common.DATASET_KEYS},
    **{f"nan-{key}": (changed(key, 7, np.nan), f"{key} is not finite at transition 7")
       for key in common.DATASET_KEYS},
    **{f"inf-{key}": (changed(key, 599, -np.inf), f"{key} is not finite at transition 599")
       for key in common.DATASET_KEYS},
    **{f"string-{key}": (replaced(**{key: np.array([b"1"] * 600)}), f"{key} holds |S1, not numbers")
       for key in common.DATASET_KEYS},
    **{f"object-{key}": (replaced(**{key: ["1"] * 600}), f"{key} holds object, not numbers")
       for key in common.DATASET_KEYS},
    "width-observations": (replaced(observations=np.zeros((600, 7))), "observations has shape (600, 7)"),
    "width-next": (replaced(next_observations=np.zeros((600, 9))), "next_observations has shape (600, 9)"),
    "width-actions": (replaced(actions=np.zeros((600, 3))), "actions has shape (600, 3)"),
    "flat-actions": (replaced(actions=np.zeros(600)), "actions has shape (600,)"),
    "two-columns": (replaced(rewards=np.zeros((600, 2))), "rewards has shape (600, 2)"),
    "complex": (replaced(rewards=np.zeros(600, complex)), "rewards holds complex128"),
    "empty": (shortened(*common.DATASET_KEYS, rows=0), "holds 0 transitions, at least two are needed"),
    "one": (shortened(*common.DATASET_KEYS, rows=1), "holds 1 transitions, at least two are needed"),
    "no-episode-end": (replaced(terminals=np.zeros(600), timeouts=np.zeros(600)), "no episode ends"),
    "terminal-2": (changed("terminals", 3, 2), "terminals and timeouts must be 0 or 1"),
    "timeout-half": (changed("timeouts", 3, 0.5), "terminals and timeouts must be 0 or 1"),
    "flags-alike": (lambda data: data.update(terminals=data["timeouts"]),
                    "every time limit is a terminal too"),
    "action-outside": (changed("actions", 3, (0, -1.5)), "actions reach 1.5, outside [-1, 1]"),
    "negative-cost": (changed("costs", 11, -1), "costs are negative at transition 11"),
    "group": (replaced(observations=None), "lacks the arrays observations"),
    "scalar": (replaced(rewards=1.0), "lacks the arrays rewards"),
    "null": (replaced(rewards=h5py.Empty("f")), "rewards"),
    "text": (replaced(rewards="none"), "lacks the arrays rewards"),
    "too-large": (replaced(rewards=np.full(600, 1e300)), "rewards is not finite at transition 0"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_named_in_one_line(tmp_path, ball_data, refusal, name):
    change, words = FAULTS[name]
    raw = dict(ball_data)
    change(raw)
    path = write_raw(tmp_path / "broken.hdf5", raw, task=TASK)
    line = refusal(common.read_dataset, path, task())
    assert str(path) in line and words in line, line


@pytest.mark.parametrize("share", [0, 0.001, 0.1, 0.5, 0.9, 0.999])
def test_truncated_file_is_named_in_one_line(tmp_path, ball_file, refusal, share):
    whole, path = ball_file.read_bytes(), tmp_path / "truncated.hdf5"
    path.write_bytes(whole[:int(share * len(whole))])
    line = refusal(common.read_dataset, path, task())
    assert str(path) in line and "not a readable HDF5 file" in line


@pytest.mark.parametrize("content", [b"observations,actions\n1,2\n", b"\x00" * 4096, b"PK\x03\x04"])
def test_file_that_is_not_hdf5_is_named_in_one_line(tmp_path, refusal, content):
    path = tmp_path / "table.hdf5"
    path.write_bytes(content)
    line = refusal(common.read_dataset, path, task())
    assert str(path) in line and "not a readable HDF5 file" in line


def test_damaged_data_are_named_in_one_line(tmp_path, ball_file, refusal):
    content, path = bytearray(ball_file.read_bytes()), tmp_path / "damaged.hdf5"
    with h5py.File(ball_file) as file:
        chunk = file["observations"].id.get_chunk_info(0)
    content[chunk.byte_offset + 20:chunk.byte_offset + 60] = b"\xff" * 40
    path.write_bytes(content)
    line = refusal(common.read_dataset, path, task())
    assert str(path) in line and "not a readable HDF5 file" in line


def test_another_tasks_file_is_refused(ball_file, refusal):
    line = refusal(common.read_dataset, ball_file, task("SafetyCarCircle-v0"))
    assert str(ball_file) in line and f"collected from {TASK}, not from SafetyCarCircle-v0" in line


def test_another_tasks_file_without_attributes_is_refused_by_its_width(tmp_path, ball_data, refusal):
    path = write_raw(tmp_path / "x.hdf5", ball_data)
    line = refusal(common.read_dataset, path, task("SafetyBallRun-v0", 7))
    assert "observations has shape (600, 8), SafetyBallRun-v0 needs (600, 7)" in line


# --- Episodes and scores ---
def test_episode_sums_end_at_terminals_and_timeouts_and_leave_out_the_rest():
    table = {"rewards": [1, 2, 4, 8, 16, 32, 64], "costs": [0, 1, 0, 1, 1, 0, 9],
             "terminals": [0, 1, 0, 0, 0, 1, 0], "timeouts": [0, 0, 0, 0, 1, 0, 0]}
    ends, returns, costs = offline_pretrain.episode_sums(
        {key: np.array(row, np.float32) for key, row in table.items()})
    assert ends.tolist() == [1, 4, 5]
    assert returns.tolist() == [3, 28, 32]
    assert costs.tolist() == [1, 2, 0]


def test_episode_sums_keep_their_digits_over_many_transitions():
    n = 200_000
    data = {"rewards": np.full(n, 0.1, np.float32), "costs": np.ones(n, np.float32),
            "terminals": np.zeros(n), "timeouts": np.arange(n) % 200 == 199}
    _, returns, costs = offline_pretrain.episode_sums(data)
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


def test_dataset_is_looked_for_at_the_path_then_shipped_then_in_the_cache(places, tmp_path):
    shipped, cached, described = places
    cached.parent.mkdir()
    cached.touch()
    assert common.find_dataset(described, None) == cached
    shipped.touch()
    assert common.find_dataset(described, None) == shipped
    given = tmp_path / "mine.hdf5"
    given.touch()
    assert common.find_dataset(described, str(given)) == given


def test_downloaded_file_comes_from_the_mirror_into_dsrls_cache(places, monkeypatch):
    _, cached, described = places
    asked = []

    def download(repo_id, filename, *, repo_type, local_dir):
        asked.append((repo_id, filename, repo_type))
        return str(local_dir / filename)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert common.find_dataset(described, None) == cached
    assert asked == [("YYY-45/DSRL", cached.name, "dataset")]


def test_failed_download_names_file_mirror_and_folder_and_leaves_nothing(places, tmp_path, refusal):
    _, cached, described = places
    before = sorted(tmp_path.rglob("*"))
    line = refusal(common.find_dataset, described, None)
    assert cached.name in line and str(cached.parent) in line
    assert "https://huggingface.co/datasets/YYY-45/DSRL" in line
    assert sorted(tmp_path.rglob("*")) == before


def test_path_that_does_not_exist_is_not_replaced_by_another_file(places, tmp_path, refusal):
    places[0].touch()
    assert "no such file" in refusal(common.find_dataset, places[2], str(tmp_path / "typo.hdf5"))
    assert "no such file" in refusal(common.find_dataset, places[2], str(tmp_path))


def test_task_without_a_known_dataset_is_told_how_to_give_one(places, refusal):
    line = refusal(common.find_dataset, task("SafetyCarReach-v0"), None)
    assert "SafetyCarReach-v0" in line and "benchmark/tools/collect_dataset.py" in line


# --- Thinning ---
def plane(n=400):
    rng = np.random.default_rng(0)
    crowded = rng.integers(0, 3, n) < 2  # two thirds of the episodes lie in one corner
    return np.where(crowded, 1.0, rng.integers(0, 60, n)), np.where(crowded, 0.5, rng.uniform(0, 900, n))


@pytest.mark.parametrize("most", [1, 30, 150, 399, 400, 1000])
def test_thinning_keeps_at_most_so_many_different_episodes(most):
    costs, returns = plane()
    kept = thin(costs, returns, most, np.random.default_rng(0))
    assert 0 < len(kept) <= most
    assert np.array_equal(kept, np.unique(kept))
    if most >= len(costs):
        assert np.array_equal(kept, np.arange(len(costs)))


def test_thinning_takes_evenly_from_the_cells():
    costs, returns = np.repeat([0.0, 60.0, 30.0], [90, 10, 3]), np.repeat([0.0, 50.0, 25.0], [90, 10, 3])
    evenly = {3: [1, 1, 1], 8: [2, 2, 2], 9: [3, 3, 3], 20: [8, 8, 3], 33: [20, 10, 3]}
    for most, expected in evenly.items():
        kept = thin(costs, returns, most, np.random.default_rng(0))
        assert [int((costs[kept] == cost).sum()) for cost in (0, 60, 30)] == expected


def test_thinning_is_the_same_for_a_seed_and_another_for_another():
    costs, returns = plane()
    first, again, other = (thin(costs, returns, 100, np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
