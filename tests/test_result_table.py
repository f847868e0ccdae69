"""The lines at the end of a run say when the rolling cost came under the limit."""

import numpy as np
import pytest

import common


@pytest.mark.parametrize(("costs", "words"), [
    ([100] * 5, "windows of 20 episodes over the limit: 0 of 0;"),
    ([20] * 40, "over the limit: 0 of 21;"),
    # windows ending at episodes 20, 21, 22 hold 7, 6 and 5 episodes of cost 60: means 21, 18, 15
    ([60] * 7 + [0] * 33, "over the limit: 1 of 21, none after step 2000;"),
    ([0] * 33 + [60] * 7, "over the limit: 1 of 21, none after step 4000;"),
])
def test_windows_of_twenty_episodes_over_the_limit_are_counted(tmp_path, capsys, costs, words):
    regret = np.cumsum(np.maximum(0, np.array(costs) - 20))
    rows = [f"{100 * (k + 1)},{costs[k]},{regret[k]}" for k in range(len(costs))]
    (tmp_path / "metrics.csv").write_text("\n".join(["env_steps,episode_cost,violation_regret", *rows]))
    episodes = {"return": np.array([1.0, 2.0]), "cost": np.array([3.0, 4.0])}
    evaluation = {"sampled": episodes, "mean": episodes}
    common.print_result(tmp_path, {"after finetuning": evaluation}, 20.0)
    out = capsys.readouterr().out
    assert words in out
    assert f"violation regret {regret[-1]};" in out
    assert "after finetuning               1.5     3.5                 1.5     3.5" in out
