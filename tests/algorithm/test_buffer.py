"""The replay buffer: what goes in comes out, uniformly."""

import numpy as np
import pytest
import torch
from tiny import both_scripts

pytestmark = both_scripts


def transition(k):
    """One whose every number tells k."""
    obs, next_obs, action = (np.array(x, np.float32) for x in ([k, -k], [k + 0.5, k], [k / 4096]))
    return dict(observations=obs, next_observations=next_obs, actions=action, rewards=float(k), costs=2.0 * k,
                terminals=k % 3 == 0, timeouts=k % 5 == 0)


def filled(script, *numbers):
    buffer = script.ReplayBuffer(2, 1, torch.device("cpu"))
    for k in numbers:
        buffer.add(**transition(k))
    return buffer


def check(batch, numbers):
    """Whether a batch is the transitions of these numbers in this order."""
    assert batch.keys() == transition(0).keys()
    for name, values in batch.items():
        expected = np.array([transition(k)[name] for k in numbers], np.float32)
        expected = expected.reshape(len(numbers), *np.shape(transition(0)[name]))  # where there is none, too
        np.testing.assert_array_equal(values, expected, err_msg=name)
        assert values.dtype == torch.float32


def test_transitions_are_kept_in_order_while_the_room_grows(script):
    buffer = filled(script, *range(2100))
    assert buffer.size == 2100
    check(buffer.state_dict(), range(2100))


def test_sample_is_uniform_with_replacement_over_what_was_added(script):
    torch.manual_seed(0)
    batch = filled(script, 7, 8, 9, 10, 11).sample(50_000)
    rows = {tuple(row) for row in torch.stack([batch["rewards"], batch["costs"], batch["observations"][:, 0],
                                               batch["actions"][:, 0] * 4096], 1).tolist()}
    # each from one transition, none from the unused room
    assert rows == {(k, 2 * k, k, k) for k in range(7, 12)}
    counts = np.bincount(batch["rewards"].int(), minlength=12)[7:]
    assert counts.sum() == 50_000
    assert ((counts - 10_000) ** 2 / 10_000).sum() < 18.5  # chi-squared of 4 degrees: one in a thousand


def test_samples_follow_torchs_seed(script):
    buffer, rewards = filled(script, *range(100)), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        rewards.append(buffer.sample(50)["rewards"].tolist())
    assert rewards[0] == rewards[1] != rewards[2]


@pytest.mark.parametrize("before", [0, 3, 1024])
def test_restored_buffer_goes_on(script, before):
    """An empty one and a full one, too."""
    state = filled(script, *range(before)).state_dict()
    other = filled(script, 5000, 5001)
    other.load_state_dict(state)
    check(other.state_dict(), range(before))
    other.add(**transition(before))
    check(other.state_dict(), range(before + 1))
    assert set(other.sample(20_000)["rewards"].int().tolist()) == set(range(before + 1))
    check(state, range(before))  # what was saved does not change with it, and has no unused room
    assert all(values.untyped_storage().nbytes() == values.nbytes for values in state.values())


@pytest.mark.parametrize("change", [lambda x: x.pop("costs"), lambda x: x.update(cost=1.0)])
def test_transition_with_a_missing_or_unknown_name_is_refused(script, change):
    wrong, buffer = transition(3), filled(script, 1, 2)
    change(wrong)
    with pytest.raises(AssertionError):
        buffer.add(**wrong)
    check(buffer.state_dict(), [1, 2])
    state = filled(script, 4).state_dict()
    change(state)
    with pytest.raises(AssertionError):
        buffer.load_state_dict(state)
    check(buffer.state_dict(), [1, 2])
