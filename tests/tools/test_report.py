"""The numbers of the tables, on runs small enough to count by hand."""

import numpy as np
import pytest

from benchmark.evidence import report


def run(returns, costs, steps_per_episode=100):
    steps = steps_per_episode * np.arange(1.0, len(returns) + 1)
    returns, costs = np.array(returns, float), np.array(costs, float)
    return {"env_steps": steps, "episode_return": returns, "episode_cost": costs}


def test_interval_is_the_mean_and_the_half_width_of_students_t():
    # standard error of 1, 2, 6 is sqrt(7/3); the 97.5 % quantile of t with 2 degrees of freedom is 4.3027
    assert report.interval([1.0, 2.0, 6.0]) == f"3.0 ± {4.3027 * np.sqrt(7 / 3):.1f}"
    assert report.interval([5.0]) == "5.0"
    assert report.interval([1.0, float("nan"), 2.0]) == "reached by 2 of 3"


def test_rolling_mean_of_fewer_entries_at_the_start():
    np.testing.assert_allclose(report.rolling_mean(np.array([3.0, 1.0, 5.0, 7.0]), 3), [3, 2, 3, 13 / 3])


def test_plateau_is_the_last_quarter_of_the_steps():
    assert report.plateau([run([0] * 6 + [10, 20], [0] * 8), run([0] * 6 + [30, 40], [0] * 8)]) == 25


@pytest.mark.parametrize(("returns", "costs", "expected"), [
    ([0, 0, 10, 10, 10, 10, 10, 10], [0] * 8, 700),  # five episodes of return 10 end at the seventh
    ([10] * 8, [60, 40, 0, 0, 0, 0, 0, 0], 500),  # the mean cost of the first five is 20, the limit
    ([10] * 8, [60, 41, 0, 0, 0, 0, 0, 0], 600),
    ([10] * 4, [0] * 4, np.nan),  # fewer than five episodes
    ([9] * 8, [0] * 8, np.nan),
])
def test_steps_to_a_safe_return(returns, costs, expected):
    np.testing.assert_equal(report.steps_to(run(returns, costs), target=10), expected)


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A folder with one task of every kind of table; costs are 30 in one episode of forty."""
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    columns = ["env_steps", "episode_return", "episode_cost", "violation_regret", "lagrange_multiplier"]
    ends = [f"eval_{how}_{what}" for how in ("sampled", "mean") for what in ("return", "cost")]

    def write(task, method, seed, offline=False):
        folder = tmp_path / task / method
        folder.mkdir(parents=True, exist_ok=True)
        if offline:
            lines = [",".join(["update_steps", *ends]), f"100,{50 + seed},1,{60 + seed},2"]
        else:
            lines = [",".join([*columns, *ends])]
            for k in range(1, 40):
                lines.append(f"{100 * k},10,{30 if k == 7 else 0},{10 if k >= 7 else 0},0.1,,,,")
            lines += [f"4000,10,0,10,0.1,{70 + seed},3,{80 + seed},4"]
        (folder / f"seed{seed}.csv").write_text("\n".join(lines))

    for seed in (0, 1):
        for method in ("offline", "bear-lag", "bc-safe"):
            write("SafetyBallCircle-v0", method, seed, offline=True)
        for method in ("marvel", "from-scratch", "dual-from-bear-lag"):
            write("SafetyBallCircle-v0", method, seed)
    write("SafetyCarRun-v0", "offline", 0, offline=True)
    write("SafetyCarRun-v0", "marvel", 0)
    for task in ("SafetyBallCircle-v0", "SafetyCarRun-v0"):
        (tmp_path / task / "dataset.csv").write_text(
            "transitions,safe_episodes,safe_mean_cost,safe_q25,safe_q50,safe_q75\n1234,5,6.5,7,8,9\n")
    return report.read_results()


def test_summary_of_small_results(results):
    text = report.summary(results).splitlines()
    marvel = next(line for line in text if line.startswith("| marvel (2) |"))
    cells = [cell.strip() for cell in marvel.strip("|").split("|")]
    assert cells[1] == "4000" and cells[2].startswith("70.5 ± ") and cells[5] == "4.0 ± 0.0"
    # one of forty episodes over the limit; the worst twenty hold it: 30 / 20
    assert cells[6:9] == ["10.0 ± 0.0", "2.5 ± 0.0 %", "1.5 ± 0.0"]
    assert cells[9:] == ["500.0 ± 0.0"] * 2
    assert any("| steps to a safe return of 9 | steps to a safe return of 10 |" in line for line in text)
    assert "| SafetyBallCircle-v0 | BC-Safe (2) | 50.5 ± 6.4 | 1.0 ± 0.0 | 60.5 ± 6.4 | 2.0 ± 0.0 |" in text
    assert any("5 episodes within the limit, quartiles | 7.0, 8.0, 9.0 | 6.5 on average" in x for x in text)
    assert "| SafetyCarRun-v0 | 1234 | 50.0 | 1.0 | 4000 | 70.0 | 3.0 | 80.0 | 4.0 | 10.0 | 1.5 |" in text


def test_parts_of_the_offline_policy_are_shown_seed_by_seed_beside_the_datas_best_quarter(results):
    runs = results["SafetyBallCircle-v0"]
    runs["offline-one-tau"] = runs["bear-lag"][:1]
    assert report.fill_tables("<!-- offline parts -->\n", results).splitlines()[3:] == [
        "| SafetyBallCircle-v0 (9) | offline_pretrain.py | 50, 51 | 1.0, 1.0 |",
        "| SafetyBallCircle-v0 (9) | Qc's target as slow as Q's | 50 | 1.0 |"]


def test_table_of_the_average_shows_every_seed_with_and_without_it(results):
    """The seventh of forty episodes costs 30: 1.5 on average of twenty."""
    runs = results["SafetyBallCircle-v0"]
    assert len(report.fill_tables("<!-- average -->\n", results).splitlines()) == 3
    runs["no-average"] = runs["marvel"][:1]
    assert report.fill_tables("<!-- average -->\n", results).splitlines()[3:] == [
        "| SafetyBallCircle-v0 | marvel | 10, 10 | 1.5, 1.5 | 10, 10 |",
        "| SafetyBallCircle-v0 | no-average | 10 | 1.5 | 10 |"]


def test_table_of_times_leaves_resumed_runs_out_and_mixes_no_processors(results, tmp_path):
    folder = tmp_path / "SafetyBallCircle-v0/marvel"
    took = [(10, 12, "false", "A"), (20, 22.4, "false", "A"), (1, 1, "true", "A"), (50, 60, "false", "B")]
    for seed, (cpu, wall, resumed, processor) in enumerate(took):
        (folder / f"seed{seed}.json").write_text(
            f'{{"cpu_seconds": {cpu}, "wall_seconds": {wall}, "resumed": {resumed}, '
            f'"processor": "{processor}"}}')
    assert report.fill_tables("<!-- times -->\n", results).splitlines()[3:] == [
        "| SafetyBallCircle-v0 | marvel (2) | A | 15 | 17 |",
        "| SafetyBallCircle-v0 | marvel (1) | B | 50 | 60 |"]


def test_table_of_limits_counts_the_windows_over_each_ones_own(results):
    """The seventh of forty episodes costs 30: it is in 7 of the 21 windows of 20, whose means are 1.5."""
    runs = results["SafetyBallCircle-v0"]
    assert len(report.fill_tables("<!-- limits -->\n", results).splitlines()) == 3
    runs["marvel-at-10"] = runs["marvel-at-40"] = [run([10] * 40, [0] * 6 + [30] + [0] * 33) | {
        "violation_regret": np.full(40, 20.0), "eval_sampled_return": np.array([7.0]),
        "eval_sampled_cost": np.array([3.0])}]
    rows = report.fill_tables("<!-- limits -->\n", results).splitlines()[3:]
    assert rows[0] == "| SafetyBallCircle-v0 | 10 (1) | 7.0 | 3.0 | 10.0 | 20.0 | 2.5 % | 1.5 | 0 of 21 |"
    assert [row.split(" | ")[1] for row in rows] == ["10 (1)", "20 (2)", "40 (1)"]
    assert rows[2].endswith("| 0.0 % | 1.5 | 0 of 21 |")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(report.LIMITS, "marvel-at-10", 1.4)
        row = report.fill_tables("<!-- limits -->\n", results).splitlines()[3]
    assert row.endswith("| 7 of 21 |")


def test_normalised_scores_are_dsrls_and_shares_of_the_limit():
    """DSRL's reference returns of HalfCheetahVelocity are 5.75 and 2806.93."""
    last = {"eval_sampled_return": np.array([0.0, 1406.342]), "eval_sampled_cost": np.array([99.0, 5.0])}
    task = "SafetyHalfCheetahVelocityGymnasium-v1"
    assert report.normalized(task, last) == pytest.approx((0.5, 0.25), abs=1e-4)


def test_interquartile_mean_leaves_the_best_and_worst_quarter_out():
    scores = np.array([100.0, 1.0, 2.0]), np.array([3.0, 4.0, -50.0, 5.0, 0.0])
    assert report.interquartile_mean(*scores) == 2.5


def test_summary_over_tasks_is_of_the_tasks_that_all_methods_have(results):
    """Two seeds of returns 70 and 71 at a cost of 3: 0.079 between 0.38 and 881.46, and 0.15 of the limit."""
    mark = "<!-- overall: offline marvel from-scratch -->\n"
    head, _, *rows = report.fill_tables(mark, results).splitlines()[1:]
    assert head.startswith("| over BallCircle (runs) | normalised return | cost / limit | last policies over")
    assert rows[1] == "| marvel (2) | 0.08 (0.08 to 0.08) | 0.15 (0.15 to 0.15) | 0 |"
    results["SafetyCarRun-v0"]["from-scratch"] = results["SafetyBallCircle-v0"]["from-scratch"]
    head, _, *rows = report.fill_tables(mark, results).splitlines()[1:]
    assert head.startswith("| over BallCircle, CarRun (runs)") and rows[1].startswith("| marvel (3) | ")
    assert " to " not in rows[1]  # one seed has no interval
    assert len(report.fill_tables("<!-- overall: marvel so2 -->\n", results).splitlines()) == 3


def test_summary_over_tasks_takes_equal_numbers_of_seeds_and_hides_no_violation():
    """Equal seeds are equal whatever else one method has; a policy at four times the limit shows."""
    def runs(cost, *returns):
        return [{"eval_sampled_return": np.array([x]), "eval_sampled_cost": np.array([cost])}
                for x in returns]
    results = {"SafetyBallCircle-v0": {"a": runs(5.0, 100.0, 100.0, 100.0), "b": runs(5.0, 100.0)},
               "SafetyCarRun-v0": {"a": runs(80.0, 500.0), "b": runs(80.0, 500.0, 500.0, 500.0)}}
    scores = report.overall_scores(results, ["a", "b"])
    assert scores["a"]["return"][0] == scores["b"]["return"][0]
    assert scores["a"]["runs"] == scores["b"]["runs"] == 2
    assert scores["a"]["cost"][0] == pytest.approx((0.25 + 4) / 2) and scores["a"]["over"] == 1


def test_interval_of_the_summary_draws_seeds_within_tasks():
    """Two tasks far from each other, seeds near: drawing over all runs would give an interval of 0.5."""
    def runs(*returns):
        return [{"eval_sampled_return": np.array([x]), "eval_sampled_cost": np.array([0.0])} for x in returns]
    results = {"SafetyBallCircle-v0": {"marvel": runs(0.38, 0.38, 9.19, 9.19)},
               "SafetyCarRun-v0": {"marvel": runs(574.7, 574.7, 570.9, 570.9)}}
    scores = report.overall_scores(results, ["marvel"])
    mean, low, high = scores["marvel"]["return"]
    assert mean == pytest.approx(0.5, abs=0.01) and low > 0.48 and high < 0.52 and low < mean < high


def test_table_of_gradient_steps_has_the_seconds_of_runs_that_were_not_interrupted(results, tmp_path):
    runs = results["SafetyBallCircle-v0"]
    assert len(report.fill_tables("<!-- gradient steps -->\n", results).splitlines()) == 3
    runs["utd-1"] = runs["marvel"][:1]
    folder = tmp_path / "SafetyBallCircle-v0/marvel"
    for seed, (seconds, resumed) in enumerate([(30, "false"), (1, "true")]):
        (folder / f"seed{seed}.json").write_text(
            f'{{"cpu_seconds": {seconds}, "resumed": {resumed}, "processor": "A"}}')
    assert report.fill_tables("<!-- gradient steps -->\n", results).splitlines()[3:] == [
        "| SafetyBallCircle-v0 | 0.5 (2) | 70.5 ± 6.4 | 3.0 ± 0.0 | 10.0 ± 0.0 | 1.5 ± 0.0 | 30 |",
        "| SafetyBallCircle-v0 | 1 (1) | 70.0 | 3.0 | 10.0 | 1.5 |  |"]


def test_table_of_strangers_tells_until_when_the_mean_cost_is_above_the_limit(tmp_path, monkeypatch):
    """Of 60 episodes the first 30 cost 40: the mean of 20 is 20.5 at the fortieth, then 18.6."""
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    (tmp_path / "imported/cost-99").mkdir(parents=True)
    lines = ["env_steps,episode_cost,violation_regret,eval_sampled_return,eval_sampled_cost,eval_mean_return,"
             "eval_mean_cost"]
    for k in range(1, 61):
        lines.append(f"{10 * k},{40 if k <= 30 else 1},{20 * min(k, 30)},5,6,7,8")
    (tmp_path / "imported/cost-99/seed2.csv").write_text("\n".join(lines))
    assert report.fill_tables("<!-- imported -->\n", {}).splitlines()[3:] == [
        "| cost-99 | 2 | 600 | 5.0 | 6.0 | 7.0 | 8.0 | 600.0 | 1.0 | 400 |"]


@pytest.fixture
def peers(results, tmp_path, monkeypatch):
    """FSRL: 40 episodes, the last four earn 40 and cost 30. OmniSafe: a line per 2,000 steps."""
    monkeypatch.setattr(report, "PEER_RESULTS", tmp_path / "peers")
    for method, n, steps in ("fsrl-theirs", 40, 100), ("omnisafe-ours", 10, 2000):
        folder = tmp_path / "peers/SafetyBallCircle-v0" / method
        folder.mkdir(parents=True)
        lines = ["env_steps,episode_return,episode_cost,cpu_seconds"]
        for k in range(1, n + 1):
            late = k > 0.9 * n
            lines.append(f"{steps * k},{40 if late else 1},{30 if late else 25},{3 * k}")
        (folder / "seed0.csv").write_text("\n".join(lines))
    took = {"offline": (50, 70), "marvel": (100, 110), "from-scratch": (300, 1)}
    for method, seconds in took.items():
        for seed in (0, 1):
            resumed = str(seconds[seed] == 1).lower()
            (tmp_path / "SafetyBallCircle-v0" / method / f"seed{seed}.json").write_text(
                f'{{"cpu_seconds": {seconds[seed]}, "resumed": {resumed}, "processor": "A"}}')
    return results


def test_peers_stand_beside_ours_with_the_seconds_of_the_offline_phase_in_marvels(peers, tmp_path):
    """36 episodes cost 5 more than the limit and four 10 more: 220."""
    rows = report.fill_tables("<!-- peers -->\n", peers).splitlines()[3:]
    assert rows == [
        "| SafetyBallCircle-v0 | FSRL's SACLag, its settings (1) | 4000 | 40.0 | 30.0 | 220.0 | 120 |",
        "| SafetyBallCircle-v0 | OmniSafe's SACPID, ours (1) | 20000 | 40.0 | 30.0 |  | 30 |",
        "| SafetyBallCircle-v0 | From Scratch (2) | 4000 | 10.0 ± 0.0 | 0.0 ± 0.0 | 10.0 ± 0.0 | 300 |",
        "| SafetyBallCircle-v0 | Marvel (2) | 4000 | 10.0 ± 0.0 | 0.0 ± 0.0 | 10.0 ± 0.0 | 165 |"]
    first, second = report.peer_runs()["SafetyBallCircle-v0"]["marvel"]
    assert first["cpu_seconds"][[0, 19]].tolist() == [52.5, 100.0]
    assert second["cpu_seconds"][-1] == 180.0
    report.peers_picture()
    assert (tmp_path / "peers.png").exists()


def test_narrow_table_has_five_columns_of_the_sampled_policy(results):
    mark = "<!-- narrow SafetyBallCircle-v0: offline so2 marvel -->\n"
    assert report.fill_tables(mark, results).splitlines()[1:] == [
        "| method (seeds) | env steps | return | cost | violation regret |", "|---|---|---|---|---|",
        "| offline (2) | 0 | 50.5 ± 6.4 | 1.0 ± 0.0 |  |",  # 0.5 is the standard error, 12.7 the quantile
        "| marvel (2) | 4000 | 70.5 ± 6.4 | 3.0 ± 0.0 | 10.0 ± 0.0 |"]


def test_equal_table_compares_at_the_fewest_steps_and_at_a_safe_return(tmp_path, monkeypatch):
    """Fast: 30 episodes to step 3000. Slow: 60, of which the last quarter earns 100: 95 is asked for."""
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    returns = {"marvel": [10] * 4 + [96] * 26, "from-scratch": [1] * 45 + [100] * 15}
    costs = {"marvel": [50, 0] + [0] * 28, "from-scratch": [30] * 40 + [0] * 20}
    for method in returns:
        lines, regret = ["env_steps,episode_return,episode_cost,violation_regret"], 0
        for k, (earned, cost) in enumerate(zip(returns[method], costs[method], strict=True), 1):
            regret += max(0, cost - 20)
            lines.append(f"{100 * k},{earned},{cost},{regret}")
        (tmp_path / "SafetyBallCircle-v0" / method).mkdir(parents=True)
        (tmp_path / "SafetyBallCircle-v0" / method / "seed0.csv").write_text("\n".join(lines))
    mark = "<!-- equal SafetyBallCircle-v0: marvel so2 from-scratch -->\n"
    head, _, fast, slow = report.fill_tables(mark, report.read_results()).splitlines()[1:]
    assert "until step 3000: " in head and "until a safe return of 95: " in head
    # marvel: 1 of 30 episodes over the limit, by 30; the first five episodes of return 96 end at the ninth
    assert fast == "| marvel (1) | 96.0 | 30.0 | 3.3 % | 900.0 | 30.0 |"
    # from scratch: all of the first 30 are over by 10; five of return 100 end at the fiftieth, after 40 such
    assert slow == "| from-scratch (1) | 1.0 | 300.0 | 100.0 % | 5000.0 | 400.0 |"


def test_equal_table_of_what_is_not_there_is_empty_and_an_offline_policy_takes_no_steps(results):
    for mark in ("<!-- equal SafetyAntRun-v0: marvel from-scratch -->\n",
                 "<!-- equal SafetyBallCircle-v0: offline -->\n"):
        assert len(report.fill_tables(mark, results).splitlines()) == 3
    mark = "<!-- equal SafetyBallCircle-v0: offline marvel -->\n"
    assert len(report.fill_tables(mark, results).splitlines()) == 4


def test_pictures_of_small_results(results, tmp_path):
    report.picture("SafetyBallCircle-v0", results["SafetyBallCircle-v0"])
    report.mismatch_picture(results)
    report.overall_picture(results, [["marvel", "so2"]])  # no task has both: no picture
    assert not (tmp_path / "overall.png").exists()
    report.overall_picture(results, [["offline", "marvel", "dual-from-bear-lag"], ["marvel", "so2"]])
    made = {file.name for file in tmp_path.glob("*.png")}
    assert made == {"SafetyBallCircle-v0.png", "lagrangian_mismatch.png", "overall.png"}


def test_tables_below_marks_are_filled_and_absent_methods_and_tasks_left_out(results):
    text = ["a", "", "<!-- SafetyBallCircle-v0: offline jsrl marvel -->", "| old |", "",
            "<!-- SafetyAntRun-v0: marvel -->", "", "b", ""]
    lines = report.fill_tables("\n".join(text), results).splitlines()
    assert lines[:3] == ["a", "", "<!-- SafetyBallCircle-v0: offline jsrl marvel -->"]
    assert [line.split(" (")[0] for line in lines[5:7]] == ["| offline", "| marvel"]
    assert lines[7] == "" and lines[8] == "<!-- SafetyAntRun-v0: marvel -->"
    assert lines[9].startswith("| method") and lines[11:] == ["", "b"]
    assert report.fill_tables("\n".join(lines) + "\n", results).splitlines() == lines
