"""The curves command: table, costs against the limit and panels are those of the run's files."""

import json

import numpy as np
import pytest
from conftest import TASK, TINY_MARVEL, TINY_OFFLINE, run_script, single_line
from PIL import Image

import common
import marvel_sac_pid
import offline_pretrain
from benchmark.baselines import bc_safe, bear_lag
from benchmark.tools import curves

TABLE_HEAD = ["sampled", "return", "cost", "mean-action", "return", "cost"]


@pytest.fixture(scope="module")
def offline_runs(ball_file, tmp_path_factory):
    """{algorithm: folder} of one tiny run of every offline algorithm."""
    scripts = {"offline": offline_pretrain, "bear-lag": bear_lag, "bc-safe": bc_safe}
    folders = {algorithm: tmp_path_factory.mktemp("runs") / algorithm for algorithm in scripts}
    for algorithm, script in scripts.items():
        script.main(script.Args(**TINY_OFFLINE, cost_limit=500.0, dataset_path=str(ball_file),
                                run_dir=str(folders[algorithm])))
    return folders


@pytest.fixture(scope="module")
def online_run(ball_file, offline_runs, tmp_path_factory):
    """The folder of one tiny finetuning."""
    run_dir = tmp_path_factory.mktemp("runs") / "online"
    marvel_sac_pid.main(marvel_sac_pid.Args(
        **TINY_MARVEL, checkpoint=str(offline_runs["offline"] / "checkpoint.pt"), dataset_path=str(ball_file),
        run_dir=str(run_dir)))
    return run_dir


class Interruption(Exception):
    pass


@pytest.fixture
def drawn(monkeypatch):
    """A list that gets every figure that is saved."""
    figures, save = [], curves.Figure.savefig

    def savefig(self, *args, **options):
        figures.append(self)
        save(self, *args, **options)

    monkeypatch.setattr(curves.Figure, "savefig", savefig)
    return figures


def show(run_dir):
    """Run the command, which changes nothing in the folder but the picture."""
    before = contents(run_dir)
    try:
        curves.main(curves.Args(str(run_dir)))
    finally:
        assert contents(run_dir) == before


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.glob("*") if file.name != "curves.png"}


def panels(figure):
    """{title: {label: [(x, y), ...]}}; the limit, a line across, is its height alone."""
    found = {}
    for axes in figure.axes:
        lines = {line.get_label(): np.transpose(line.get_data()) for line in axes.get_lines()}
        if "cost limit" in lines:
            (height,) = set(lines["cost limit"][:, 1])
            lines["cost limit"] = height
        assert [text.get_text() for text in axes.get_legend().get_texts()] == list(lines)
        found[axes.get_title()] = lines
    return found


def logged(run_dir, x, column):
    """The points of a column as metrics.csv has them."""
    rows = [line.split(",") for line in (run_dir / "metrics.csv").read_text().splitlines()]
    at = rows[0].index(x), rows[0].index(column)
    return np.array([[float(row[at[0]]), float(row[at[1]])] for row in rows[1:] if row[at[1]]])


def check_picture(run_dir):
    with Image.open(run_dir / "curves.png") as picture:
        assert picture.format == "PNG"
        picture.load()  # raises where the file is cut short
        width, height = picture.size
        dark = (np.array(picture.convert("L")) < 128).sum()
    assert width > height > 300 and dark > 1000
    assert not list(run_dir.glob("*.part*"))


def check_figure(drawn, run_dir, x, cost_limit, expected):
    """The one figure has these panels with these lines, whose points are those of metrics.csv."""
    (figure,) = drawn
    found = panels(figure)
    assert {title: list(lines) for title, lines in found.items()} == expected
    assert found["cost"].pop("cost limit") == cost_limit
    for lines in found.values():
        for label, points in lines.items():
            assert len(points) > 0
            np.testing.assert_array_equal(points, logged(run_dir, x, label.replace(" ", "_")))
    assert {axes.get_xlabel() for axes in figure.axes} == {x.replace("_", " ")}
    check_picture(run_dir)


# --- The table ---
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
    evaluation = {"eval_sampled_return": 1.5, "eval_sampled_cost": 3.5, "eval_mean_return": 2.5,
                  "eval_mean_cost": 4.5}
    curves.print_result({"after finetuning": evaluation}, curves.read_metrics(tmp_path / "metrics.csv"), 20.0)
    out = capsys.readouterr().out
    assert words in out
    assert out.splitlines()[-1].endswith(f"violation regret {regret[-1]}")
    assert "after finetuning               1.5     3.5                 2.5     4.5" in out


def test_metrics_are_floats_and_an_empty_cell_is_nan(tmp_path):
    (tmp_path / "metrics.csv").write_text("a,b\n1,\n2.5,nan\n-3e2,7\n")
    metrics = curves.read_metrics(tmp_path / "metrics.csv")
    np.testing.assert_equal(metrics, {"a": np.array([1, 2.5, -300]), "b": np.array([np.nan, np.nan, 7])})
    (tmp_path / "metrics.csv").write_text("a,b\n")
    empty = curves.read_metrics(tmp_path / "metrics.csv")
    assert {name: len(values) for name, values in empty.items()} == {"a": 0, "b": 0}


def check_table(lines, evaluations):
    """Its lines say what the checkpoint's evaluations are, in their order."""
    assert lines[0].split() == TABLE_HEAD
    assert len(lines) == 1 + len(evaluations)
    for line, (name, result) in zip(lines[1:], evaluations.items(), strict=True):
        assert line[:18].strip() == name
        assert line[18:].split() == [f"{result[f'eval_{how}_{what}']:.1f}" for how in ("sampled", "mean")
                                     for what in ("return", "cost")]


# --- Finished runs ---
def test_finished_online_run_gives_its_table_its_costs_and_three_panels(online_run, capsys, drawn):
    (online_run / "curves.png").write_bytes(b"an older picture")
    show(online_run)
    head, empty, *table, costs, where = capsys.readouterr().out.splitlines()
    assert head == f"{online_run}: finished, vpa_steps 30, env_steps 400" and empty == ""
    evaluations = common.load_checkpoint(online_run / "checkpoint.pt")["evaluations"]
    assert list(evaluations) == ["offline policy", "after finetuning"]
    check_table(table, evaluations)
    regret = logged(online_run, "env_steps", "violation_regret")[-1, 1]
    assert costs == f"windows of 20 episodes over the limit: 0 of 0; violation regret {regret:.0f}"
    assert where == f"curves in {online_run / 'curves.png'}"

    check_figure(drawn, online_run, "env_steps", 20, {
        "return": ["episode return", "eval sampled return"],
        "cost": ["episode cost", "eval sampled cost", "cost limit"],
        "Lagrange multiplier": ["lagrange multiplier"]})


OFFLINE_PANELS = {
    "offline": {"mean target": ["q mean", "qc mean"], "actor loss": ["actor loss"]},
    "bear-lag": {"mean target": ["q mean", "qc mean"], "Lagrange multiplier": ["lagrange multiplier"],
                 "actor loss": ["actor loss"]},
    "bc-safe": {"actor loss": ["actor loss"]},
}


@pytest.mark.parametrize("algo", OFFLINE_PANELS)
def test_finished_offline_run_gives_its_table_and_the_panels_of_its_algorithm(
        offline_runs, capsys, drawn, algo):
    run_dir = offline_runs[algo]
    show(run_dir)
    head, _, *table, where = capsys.readouterr().out.splitlines()
    assert head == f"{run_dir}: finished, update_steps 60"
    check_table(table, common.load_checkpoint(run_dir / "checkpoint.pt")["evaluations"])
    assert len(table) == 2 and where == f"curves in {run_dir / 'curves.png'}"

    check_figure(drawn, run_dir, "update_steps", 500, {
        "return": ["eval sampled return", "eval mean return"],
        "cost": ["eval sampled cost", "eval mean cost", "cost limit"]} | OFFLINE_PANELS[algo])


# --- Unfinished runs ---
def interrupt(monkeypatch, run_dir, ball_file, offline_runs, blocks):
    """A finetuning of 1000 steps that ends with an error before block number `blocks` + 1."""
    update, seen = marvel_sac_pid.PIDLagrangian.update, []

    def stop(self, *costs, **options):
        seen.append(costs)
        if len(seen) > blocks:
            raise Interruption
        return update(self, *costs, **options)

    monkeypatch.setattr(marvel_sac_pid.PIDLagrangian, "update", stop)
    with pytest.raises(Interruption):
        marvel_sac_pid.main(marvel_sac_pid.Args(
            **TINY_MARVEL | {"total_timesteps": 1000, "eval_every": 10**9}, checkpoint_every=300,
            checkpoint=str(offline_runs["offline"] / "checkpoint.pt"), dataset_path=str(ball_file),
            run_dir=str(run_dir)))


def test_unfinished_run_gives_what_there_is_so_far(
        tmp_path, monkeypatch, ball_file, offline_runs, capsys, drawn):
    interrupt(monkeypatch, tmp_path / "x", ball_file, offline_runs, blocks=3)
    capsys.readouterr()
    show(tmp_path / "x")
    head, _, *table, costs, _ = capsys.readouterr().out.splitlines()
    assert head == f"{tmp_path / 'x'}: unfinished, vpa_steps 30, env_steps 400"
    evaluations = common.load_checkpoint(tmp_path / "x/checkpoint.pt")["evaluations"]
    assert list(evaluations) == ["offline policy"]
    check_table(table, evaluations)
    assert costs.startswith("windows of 20 episodes over the limit: 0 of 0; violation regret ")
    (figure,) = drawn
    found = panels(figure)
    assert found["return"]["episode return"][:, 0].tolist() == [200, 400, 600]  # beyond the checkpoint too
    assert len(found["return"]["eval sampled return"]) == 0  # no evaluation yet: an empty line
    check_picture(tmp_path / "x")


def test_run_without_a_checkpoint_gives_its_curves(tmp_path, monkeypatch, ball_file, offline_runs, capsys):
    interrupt(monkeypatch, tmp_path / "x", ball_file, offline_runs, blocks=1)
    assert not (tmp_path / "x/checkpoint.pt").exists()
    capsys.readouterr()
    show(tmp_path / "x")
    assert capsys.readouterr().out == f"curves in {tmp_path / 'x/curves.png'}\n"
    check_picture(tmp_path / "x")


def test_last_row_that_was_cut_short_is_read_as_far_as_it_goes(online_run, tmp_path, drawn):
    for name in ("config.json", "metrics.csv"):
        (tmp_path / name).write_bytes((online_run / name).read_bytes())
    with open(tmp_path / "metrics.csv", "a") as file:
        file.write("600,3,-12.5")  # env_steps, episode, episode_return
    show(tmp_path)
    found = panels(drawn[0])
    assert found["return"]["episode return"][-1].tolist() == [600, -12.5]
    assert found["cost"]["episode cost"][:, 0].tolist() == [200, 400]
    check_picture(tmp_path)


# --- What holds no run ---
def test_run_that_has_logged_nothing_gives_its_evaluation_and_no_curves(
        tmp_path, ball_file, offline_runs, refusal, capsys):
    marvel_sac_pid.main(marvel_sac_pid.Args(
        **TINY_MARVEL | {"total_timesteps": 0}, checkpoint=str(offline_runs["offline"] / "checkpoint.pt"),
        dataset_path=str(ball_file), run_dir=str(tmp_path / "x")))
    capsys.readouterr()
    show(tmp_path / "x")
    head, _, *table, last = capsys.readouterr().out.splitlines()
    assert head == f"{tmp_path / 'x'}: finished, vpa_steps 30, env_steps 0"
    check_table(table, common.load_checkpoint(tmp_path / "x/checkpoint.pt")["evaluations"])
    assert len(table) == 2 and last == "no line in metrics.csv yet, so no curves"
    (tmp_path / "x/metrics.csv").write_text("")  # stopped before the first flush
    assert "metrics.csv is not a run's" in refusal(show, tmp_path / "x")
    assert not (tmp_path / "x/curves.png").exists()


def write(folder, config, metrics):
    folder.mkdir()
    for name, text in ("config.json", config), ("metrics.csv", metrics):
        if text is not None:
            (folder / name).write_text(text)
    return folder


CONFIG, METRICS = json.dumps({"cost_limit": 20.0, "env_id": TASK}), "env_steps,episode_return\n200,1\n"
NO_RUN = {
    "no-config": (None, METRICS), "no-metrics": (CONFIG, None), "cut-config": (CONFIG[:10], METRICS),
    "other-config": ("[1, 2]", METRICS), "null-config": ("null", METRICS),
    "no-limit": ('{"env_id": "x"}', METRICS), "limit-is-text": ('{"cost_limit": "a lot"}', METRICS),
    "text-metrics": (CONFIG, "env_steps,episode_return\nmany,1\n"),
    "other-columns": (CONFIG, "step,reward\n1,2\n"),
}


@pytest.mark.parametrize("name", NO_RUN)
def test_folder_without_a_run_is_refused_in_one_line(tmp_path, refusal, name):
    folder = write(tmp_path / "x", *NO_RUN[name])
    assert refusal(show, folder).startswith(f"error: --run-dir {folder}: ")
    assert not (folder / "curves.png").exists()


def test_binary_metrics_and_missing_folders_are_refused_in_one_line(tmp_path, refusal):
    folder = write(tmp_path / "x", CONFIG, METRICS)
    (folder / "metrics.csv").write_bytes(b"\xff\xfe\x00\x81" * 50)
    for place in (folder, tmp_path / "nowhere", folder / "config.json"):
        assert f"--run-dir {place}: holds no run" in refusal(show, place)


def test_checkpoint_that_is_none_is_refused_in_one_line(tmp_path, refusal):
    folder = write(tmp_path / "x", CONFIG, METRICS)
    (folder / "checkpoint.pt").write_bytes(b"text")
    assert f"{folder / 'checkpoint.pt'}: not a readable checkpoint" in refusal(show, folder)
    assert not (folder / "curves.png").exists()


def test_command_line_takes_the_folder_and_refuses_one_that_is_none(tmp_path, online_run):
    status, stdout, stderr = run_script("benchmark/tools/curves.py", "--run-dir", online_run, cwd=tmp_path)
    assert (status, stderr) == (0, "")
    assert stdout.splitlines()[0] == f"{online_run}: finished, vpa_steps 30, env_steps 400"
    status, stdout, stderr = run_script("benchmark/tools/curves.py", cwd=tmp_path)
    assert stdout == "" and f"--run-dir runs/{TASK}__marvel_sac_pid__seed0: " in single_line(status, stderr)
    assert list(tmp_path.iterdir()) == []
