"""BC-Safe: which episodes are imitated, and how well. The likelihood is in test_offline."""

import numpy as np
import pytest
import torch
from tiny import ACT_DIM, OBS_DIM, TASK, dataset, new_run, of, rows_of, run

import common
from benchmark.tools.export_dataset import write_dataset


def costs_of_episodes():
    """The cost of the dataset's episode that each row belongs to."""
    data = dataset()[0]
    ends, _, costs = common.episode_sums(data)
    return costs[np.searchsorted(ends, np.arange(len(data["rewards"])))]


@pytest.mark.parametrize("cost_limit", [0.0, 2.0, 100.0])
def test_only_whole_episodes_within_the_limit_are_imitated(cost_limit):
    data, costs = dataset()[0], costs_of_episodes()
    calls = of(run("bc_safe", cost_limit=cost_limit, batch_size=100), "log_likelihood")
    drawn = rows_of({"observations": torch.cat([call.obs for call in calls]),
                     "actions": torch.cat([call.act for call in calls])},
                    {key: data[key] for key in ("observations", "actions")})
    assert drawn.min() >= 0
    assert set(costs[drawn]) == {cost for cost in costs if cost <= cost_limit}
    assert len(set(drawn)) > 0.9 * (costs <= cost_limit).sum()


def test_policy_recovers_the_distribution_of_the_safe_actions(tmp_path):
    """Safe episodes act tanh(N(s / 2 - 0.5, 0.3^2)), unsafe ones tanh(N(s / 2 + 2, 0.3^2))."""
    rng = np.random.default_rng(0)
    obs, unsafe = rng.normal(size=(2, 4000, OBS_DIM)), np.arange(4000) // 10 % 2
    u = 0.5 * obs[0, :, :1] + np.where(unsafe, 2.0, -0.5)[:, None] + 0.3 * rng.normal(size=(4000, ACT_DIM))
    write_dataset(tmp_path / "two.hdf5", dict(
        observations=obs[0], next_observations=obs[1], actions=np.tanh(u), rewards=unsafe, costs=10 * unsafe,
        terminals=np.zeros(4000), timeouts=np.arange(4000) % 10 == 9), {"task": TASK})
    actor = of(new_run("bc_safe", dataset_path=str(tmp_path / "two.hdf5"), update_steps=400, batch_size=128,
                       actor_lr=1e-3), "log_likelihood")[-1].actor
    states = torch.randn(500, OBS_DIM, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        mean, log_std = actor.gaussian(states)
    error = mean - (0.5 * states[:, :1] - 0.5)
    assert error.mean().abs() < 0.1 and error.abs().mean() < 0.2
    assert log_std.exp().mean().item() == pytest.approx(0.3, abs=0.08)
