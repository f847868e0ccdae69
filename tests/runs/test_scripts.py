"""Both scripts, end to end and tiny: every mode takes its updates, leaves its files and is repeatable."""

import csv
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro
from conftest import (
    TASK,
    TINY_MARVEL,
    TINY_OFFLINE,
    command_line,
    parameters,
    played,
    run_script,
    same,
    single_line,
)

import common
import marvel_sac_pid
import offline_pretrain
from benchmark.curves import read_metrics
from benchmark.export_dataset import write_dataset

FILES = {"config.json", "metrics.csv", "checkpoint.pt"}
NETWORKS = ("actor", "q", "qc")


@pytest.fixture(scope="module")
def offline_run(ball_file, tmp_path_factory):
    """The folder of one tiny offline run."""
    run_dir = tmp_path_factory.mktemp("runs") / "offline"
    train_offline(run_dir, ball_file)
    return run_dir


def train_offline(run_dir, ball_file, **options):
    options = {**TINY_OFFLINE, "dataset_path": str(ball_file), "run_dir": str(run_dir), **options}
    offline_pretrain.main(offline_pretrain.Args(**options))
    return common.load_checkpoint(run_dir / "checkpoint.pt")


def finetune(run_dir, ball_file, offline_run, **options):
    options = {**TINY_MARVEL, "checkpoint": str(offline_run / "checkpoint.pt"),
               "dataset_path": str(ball_file), "run_dir": str(run_dir), **options}
    marvel_sac_pid.main(marvel_sac_pid.Args(**options))
    return common.load_checkpoint(run_dir / "checkpoint.pt")


def networks(checkpoint):
    return {name: checkpoint[name] for name in NETWORKS}


def fresh_networks(script):
    """The networks as seed 0 makes them, before the first update."""
    torch.manual_seed(0)
    made = {"actor": script.Actor(8, 2), "q": script.Critic(2, 8, 2), "qc": script.Critic(1, 8, 2)}
    return {name: network.state_dict() for name, network in made.items()}


def moved(before, after):
    """Names of the networks of which every weight matrix differs."""
    return [name for name in NETWORKS
            if all(not torch.equal(before[name][key], value) for key, value in after[name].items())]


def updates(optimizer):
    """Steps that an Adam optimiser has taken, which must be the same for all its parameters."""
    (steps,) = {int(state["step"]) for state in optimizer["state"].values()}
    return steps


def check_files(run_dir):
    names = {file.name for file in run_dir.iterdir()}
    events = {name for name in names if name.startswith("events.out.tfevents.")}
    assert len(events) == 1 and names - events == FILES
    assert all((run_dir / name).stat().st_size > 0 for name in names)


def check_metrics(run_dir, cost_limit=20.0):
    with open(run_dir / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    metrics = read_metrics(run_dir / "metrics.csv")
    assert (np.diff(metrics["env_steps"]) > 0).all()
    assert metrics["episode"].tolist() == list(range(1, len(rows) + 1))
    np.testing.assert_allclose(metrics["cumulative_cost"], np.cumsum(metrics["episode_cost"]), rtol=1e-5)
    regret = np.cumsum(np.maximum(0, metrics["episode_cost"] - cost_limit))
    np.testing.assert_allclose(metrics["violation_regret"], regret, rtol=1e-5)
    for how in ("sampled", "mean"):
        for what in ("return", "cost"):
            assert np.isfinite(metrics[f"eval_{how}_{what}"][-1])
    for name in ("env_steps", "episode_return", "episode_cost", "normalized_return", "normalized_cost",
                 "lagrange_multiplier"):
        assert np.isfinite(metrics[name]).all(), name
        assert all(row[name] for row in rows), name
    return metrics


# --- Every mode ---
def test_offline_run_updates_all_networks_and_leaves_its_files(offline_run):
    checkpoint = common.load_checkpoint(offline_run / "checkpoint.pt")
    assert moved(fresh_networks(offline_pretrain), checkpoint) == list(NETWORKS)
    for name in ("actor", "critic", "vae"):
        assert updates(checkpoint[f"{name}_optimizer"]) == TINY_OFFLINE["update_steps"]
    for name in ("q", "qc"):
        assert moved({**checkpoint, name: checkpoint[f"{name}_target"]}, checkpoint) == [name]
    check_files(offline_run)
    metrics = read_metrics(offline_run / "metrics.csv")
    assert metrics["update_steps"][-1] == TINY_OFFLINE["update_steps"]
    assert all(np.isfinite(column[-1]) for column in metrics.values())


def test_offline_checkpoint_says_what_it_was_made_of(offline_run, ball_file):
    checkpoint = common.load_checkpoint(offline_run / "checkpoint.pt")
    assert checkpoint["dataset_sha256"] == hashlib.sha256(ball_file.read_bytes()).hexdigest()
    assert (checkpoint["env_id"], checkpoint["obs_dim"], checkpoint["act_dim"]) == (TASK, 8, 2)
    assert json.loads((offline_run / "config.json").read_text()) == checkpoint["args"]
    assert checkpoint["args"]["update_steps"] == TINY_OFFLINE["update_steps"]


MODES = {
    "default": {},
    "no-vpa": {"vpa_steps": 0},
    "fresh-critics": {"vpa_critics": "fresh"},
    "apid-published": {"multiplier": "apid-published"},
    "pid": {"multiplier": "pid"},
    "dual": {"multiplier": "dual", "rollout_episodes": 2, "total_timesteps": 300},
    "fixed": {"multiplier": "fixed", "lagrange_init": 0.5},
    "aligned": {"lagrange_init": "aligned", "multiplier": "fixed"},
    "norm-ratio": {"lagrange_init": "norm-ratio", "multiplier": "fixed"},
    "number": {"lagrange_init": 0.5},
    "fewer-updates": {"utd": 0.1},
    "fixed-alpha": {"autotune": False, "alpha": 0.03},
    "margin": {"cost_margin": 0.5, "cost_limit": 0.0},
}


@pytest.mark.parametrize("mode", MODES)
def test_mode_updates_all_networks_as_often_as_asked(tmp_path, ball_file, offline_run, mode):
    options = {**TINY_MARVEL, **MODES[mode]}
    run_dir = tmp_path / mode
    checkpoint = finetune(run_dir, ball_file, offline_run, **options)
    metrics = check_metrics(run_dir, options.get("cost_limit", 20.0))
    check_files(run_dir)

    assert moved(common.load_checkpoint(offline_run / "checkpoint.pt"), checkpoint) == list(NETWORKS)
    for name in ("q", "qc"):
        assert moved({**checkpoint, name: checkpoint[f"{name}_target"]}, checkpoint) == [name]
    env_steps = metrics["env_steps"][-1]
    assert env_steps == 400  # also where 300 are asked in blocks of two episodes
    utd = options.get("utd", marvel_sac_pid.Args.utd)
    assert updates(checkpoint["actor_optimizer"]) == round(utd * env_steps)
    assert updates(checkpoint["critic_optimizer"]) == round(utd * env_steps) + options["vpa_steps"]

    multiplier = metrics["lagrange_multiplier"]
    if options.get("multiplier") == "fixed":
        assert (multiplier == multiplier[0]).all()
        assert (multiplier[0] == 0.5) if mode == "fixed" else multiplier[0] >= 0
    elif mode in ("number", "margin"):
        assert len(set(multiplier)) > 1
    if mode == "fixed-alpha":
        assert float(checkpoint["log_alpha"]) == pytest.approx(np.log(0.03))
    else:
        assert float(checkpoint["log_alpha"]) != pytest.approx(np.log(marvel_sac_pid.Args.alpha))


def test_from_scratch_needs_neither_checkpoint_nor_dataset(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    marvel_sac_pid.main(marvel_sac_pid.Args(**TINY_MARVEL, from_scratch=True, learning_starts=201))
    run_dir = tmp_path / f"runs/{TASK}__marvel_sac_pid__seed0"
    checkpoint, metrics = common.load_checkpoint(run_dir / "checkpoint.pt"), check_metrics(run_dir)
    check_files(run_dir)
    assert moved(fresh_networks(marvel_sac_pid), checkpoint) == list(NETWORKS)
    assert metrics["lagrange_multiplier"][0] == 0  # only uniform actions until here


def test_from_scratch_takes_no_update_before_learning_starts(tmp_path):
    options = {**TINY_MARVEL, "from_scratch": True, "learning_starts": 600, "total_timesteps": 400}
    marvel_sac_pid.main(marvel_sac_pid.Args(**options, run_dir=str(tmp_path / "x")))
    checkpoint = common.load_checkpoint(tmp_path / "x/checkpoint.pt")
    assert checkpoint["actor_optimizer"]["state"] == checkpoint["critic_optimizer"]["state"] == {}


def test_saved_episodes_are_a_dataset_of_what_was_logged(tmp_path, ball_file, offline_run, ball_task):
    finetune(tmp_path / "x", ball_file, offline_run)
    data = played(tmp_path / "x", ball_task)
    ends, returns, costs = offline_pretrain.episode_sums(data)
    metrics = read_metrics(tmp_path / "x/metrics.csv")
    assert (ends + 1).tolist() == metrics["env_steps"].tolist()
    np.testing.assert_allclose(returns, metrics["episode_return"], rtol=1e-4)
    np.testing.assert_allclose(costs, metrics["episode_cost"], rtol=1e-4)
    assert torch.equal(data["observations"][1:200], data["next_observations"][:199])


# --- Hand-over ---
class Stop(Exception):
    pass


def test_both_scripts_act_alike_with_the_offline_policy(offline_run):
    state = common.load_checkpoint(offline_run / "checkpoint.pt")["actor"]
    actors = [script.Actor(8, 2) for script in (offline_pretrain, marvel_sac_pid)]
    for actor in actors:
        actor.load_state_dict(state)
    observations = np.random.default_rng(0).normal(size=(100, 8)).astype(np.float32)

    def acts(actor):
        torch.manual_seed(0)
        policy, rng = actor.numpy_policy(), np.random.default_rng(0)
        with torch.no_grad():
            sample, log_prob = actor(torch.from_numpy(observations))
            mean = actor.gaussian(torch.from_numpy(observations))[0].tanh()
        return {"torch": sample.numpy(), "log_prob": log_prob.numpy(), "mean": mean.numpy(),
                "numpy_mean": np.stack([policy(obs) for obs in observations]),
                "numpy_sample": np.stack([policy(obs, rng) for obs in observations])}

    one, other = (acts(actor) for actor in actors)
    assert same(one, other)
    np.testing.assert_allclose(one["mean"], one["numpy_mean"], atol=1e-5)
    assert not np.array_equal(one["numpy_mean"], one["numpy_sample"])


def test_run_starts_with_the_offline_scripts_actions(tmp_path, monkeypatch, ball_file, offline_run):
    observations, actions = np.random.default_rng(0).normal(size=(100, 8)).astype(np.float32), []

    def record(env, policy, episodes):
        actions.append(np.stack([policy(obs) for obs in observations]))
        if len(actions) == 2:  # sampled, then mean actions
            raise Stop
        return {}

    monkeypatch.setattr(common, "evaluate", record)
    with pytest.raises(Stop):
        finetune(tmp_path / "x", ball_file, offline_run)
    offline = offline_pretrain.Actor(8, 2)
    offline.load_state_dict(common.load_checkpoint(offline_run / "checkpoint.pt")["actor"])
    policy, rng = offline.numpy_policy(), np.random.default_rng(0)
    assert np.array_equal(actions[0], np.stack([policy(obs, rng) for obs in observations]))
    assert np.array_equal(actions[1], np.stack([policy(obs) for obs in observations]))


@pytest.mark.parametrize(("options", "expected"), [
    ({}, ["q", "qc"]), ({"vpa_steps": 0}, []), ({"vpa_critics": "fresh", "vpa_steps": 0}, ["q", "qc"])])
def test_only_the_critics_differ_when_finetuning_begins(
        tmp_path, monkeypatch, ball_file, offline_run, options, expected):
    targets, loss, begun, calls = marvel_sac_pid.soft_targets, marvel_sac_pid.critic_loss, {}, []

    def record_actor(batch, actor, *more):
        begun["actor"] = actor.state_dict()
        return targets(batch, actor, *more)

    def record_critics(batch, q, qc, *more):
        calls.append(len(batch["rewards"]))
        if len(calls) > options.get("vpa_steps", TINY_MARVEL["vpa_steps"]):  # the first online batch
            begun.update(q=q.state_dict(), qc=qc.state_dict())
            raise Stop
        return loss(batch, q, qc, *more)

    monkeypatch.setattr(marvel_sac_pid, "soft_targets", record_actor)
    monkeypatch.setattr(marvel_sac_pid, "critic_loss", record_critics)
    with pytest.raises(Stop):
        finetune(tmp_path / "x", ball_file, offline_run, **options)
    offline = common.load_checkpoint(offline_run / "checkpoint.pt")
    assert moved(offline, begun) == expected
    assert same(parameters({"actor": offline["actor"]}), parameters({"actor": begun["actor"]}))


# --- Repeatability ---
def test_offline_seed_fixes_every_number(tmp_path, ball_file, offline_run):
    checkpoint = common.load_checkpoint(offline_run / "checkpoint.pt")
    np.random.seed(1)
    again = train_offline(tmp_path / "again", ball_file)
    other = train_offline(tmp_path / "other", ball_file, seed=1)
    assert (tmp_path / "again/metrics.csv").read_bytes() == (offline_run / "metrics.csv").read_bytes()
    assert same(parameters(networks(checkpoint)), parameters(networks(again)))
    assert (tmp_path / "other/metrics.csv").read_bytes() != (offline_run / "metrics.csv").read_bytes()
    assert moved(checkpoint, other) == list(NETWORKS)


def test_finetuning_seed_fixes_every_number(tmp_path, ball_file, offline_run):
    first = finetune(tmp_path / "first", ball_file, offline_run)
    np.random.seed(1)
    again = finetune(tmp_path / "again", ball_file, offline_run)
    other = finetune(tmp_path / "other", ball_file, offline_run, seed=1)
    texts = [(tmp_path / name / "metrics.csv").read_bytes() for name in ("first", "again", "other")]
    assert texts[0] == texts[1] != texts[2]
    assert same(parameters(networks(first)), parameters(networks(again)))
    assert moved(first, other) == list(NETWORKS)


def test_evaluation_does_not_change_offline_training(tmp_path, ball_file, offline_run):
    often = train_offline(tmp_path / "often", ball_file, eval_every=10, eval_episodes=2)
    assert same(parameters(networks(common.load_checkpoint(offline_run / "checkpoint.pt"))),
                parameters(networks(often)))
    metrics = read_metrics(tmp_path / "often/metrics.csv")
    assert metrics["update_steps"].tolist() == [10, 20, 30, 40, 50, 60]  # not every 250 steps
    assert np.isfinite(metrics["eval_sampled_cost"]).all()


def test_evaluation_does_not_change_finetuning(tmp_path, ball_file, offline_run):
    often = finetune(tmp_path / "often", ball_file, offline_run, eval_every=200, eval_episodes=2)
    never = finetune(tmp_path / "never", ball_file, offline_run, eval_every=10**9, eval_episodes=1)
    assert same(parameters(networks(often)), parameters(networks(never)))
    counts = [np.isfinite(read_metrics(tmp_path / name / "metrics.csv")["eval_mean_cost"]).sum()
              for name in ("often", "never")]
    assert counts == [2, 1]


# --- The command line ---
def contents(folder):
    return {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_both_scripts_run_from_the_command_line_with_default_folders(tmp_path, ball_file):
    status, _, stderr = run_script(
        "offline_pretrain.py", *command_line(TINY_OFFLINE), "--dataset-path", ball_file, cwd=tmp_path)
    assert status == 0, stderr
    assert "Traceback" not in stderr and "Warning" not in stderr
    check_files(tmp_path / f"runs/{TASK}__offline_pretrain__seed0")
    options = {**TINY_MARVEL, "total_timesteps": 200, "vpa_steps": 0, "dataset_path": ball_file}
    options = command_line(options)
    status, _, stderr = run_script("marvel_sac_pid.py", *options, cwd=tmp_path)
    assert status == 0, stderr
    assert "Traceback" not in stderr and "Warning" not in stderr
    check_files(tmp_path / f"runs/{TASK}__marvel_sac_pid__seed0")
    check_metrics(tmp_path / f"runs/{TASK}__marvel_sac_pid__seed0")
    assert {file.name for file in tmp_path.iterdir()} == {"runs"}

    before = contents(tmp_path)
    single_line(*run_script("marvel_sac_pid.py", *options, cwd=tmp_path)[::2])
    assert contents(tmp_path) == before

    status, stdout, stderr = run_script("benchmark/curves.py", cwd=tmp_path)
    assert (status, stderr) == (0, "")
    assert "offline policy" in stdout and "after finetuning" in stdout and "violation regret" in stdout
    assert contents(tmp_path).keys() - before.keys() == {
        Path(f"runs/{TASK}__marvel_sac_pid__seed0/curves.png")}
    assert {name: contents(tmp_path)[name] for name in before} == before


def test_tracked_run_works_without_a_network(tmp_path, ball_file, offline_run):
    options = {**TINY_MARVEL, "total_timesteps": 200, "vpa_steps": 0, "dataset_path": ball_file,
               "checkpoint": offline_run / "checkpoint.pt", "run_dir": "tracked"}
    status, _, stderr = run_script(
        "marvel_sac_pid.py", *command_line(options), "--track", cwd=tmp_path,
        env={"WANDB_MODE": "offline", "WANDB_PROJECT": "project-of-the-test", "HOME": str(tmp_path),
             "HTTPS_PROXY": "http://127.0.0.1:9"})
    assert status == 0, stderr
    (record,) = (tmp_path / "tracked").glob("wandb/offline-run-*/*.wandb")
    assert b"episode_cost" in record.read_bytes() and b"project-of-the-test" in record.read_bytes()


@pytest.mark.parametrize(("options", "words"), [
    ({"env_id": "SafetyCarCircle-v0"}, f"env_id is {TASK}, this run needs SafetyCarCircle-v0"),
    ({"gamma": 0.95}, "gamma is 0.99, this run needs 0.95"),
    ({"reward_scale": 1.0}, "reward_scale is 0.1, this run needs 1.0")])
def test_checkpoint_of_another_setting_is_refused(
        tmp_path, monkeypatch, ball_data, offline_run, refusal, options, words):
    monkeypatch.chdir(tmp_path)
    write_dataset(tmp_path / "data.hdf5", ball_data, {"task": options.get("env_id", TASK)})
    default = {**TINY_MARVEL, "checkpoint": offline_run / "checkpoint.pt", "dataset_path": "data.hdf5"}
    args = tyro.cli(marvel_sac_pid.Args, args=command_line(default | options))
    assert words in refusal(marvel_sac_pid.main, args)
    assert [file.name for file in tmp_path.iterdir()] == ["data.hdf5"]


# --- A folder that holds a run ---
def test_second_offline_run_into_a_folder_is_refused_unless_overwriting(tmp_path, ball_file, refusal):
    train_offline(tmp_path / "x", ball_file, update_steps=2)
    before = contents(tmp_path)
    line = refusal(train_offline, tmp_path / "x", ball_file)
    assert str(tmp_path / "x") in line and "--overwrite" in line
    assert contents(tmp_path) == before
    train_offline(tmp_path / "x", ball_file, update_steps=3, overwrite=True)
    check_files(tmp_path / "x")
    assert json.loads((tmp_path / "x/config.json").read_text())["update_steps"] == 3


def test_second_finetuning_into_a_folder_is_refused_too(tmp_path, ball_file, offline_run, refusal):
    options = {"total_timesteps": 200, "vpa_steps": 0}

    def again(**more):
        return finetune(tmp_path / "x", ball_file, offline_run, **options, **more)

    again()
    before = contents(tmp_path)
    assert "--overwrite" in refusal(again)
    assert contents(tmp_path) == before
    again(seed=1, overwrite=True)
    check_files(tmp_path / "x")
    assert json.loads((tmp_path / "x/config.json").read_text())["seed"] == 1


@pytest.mark.parametrize("script", [offline_pretrain, marvel_sac_pid])
def test_folder_that_cannot_be_made_is_refused(tmp_path, ball_file, offline_run, refusal, script):
    (tmp_path / "file").touch()
    start = train_offline if script is offline_pretrain else (
        lambda run_dir, dataset: finetune(run_dir, dataset, offline_run))
    for folder in ("file", "file/below"):
        line = refusal(start, tmp_path / folder, ball_file)
        assert f"--run-dir {tmp_path / folder}: cannot write there" in line


def test_no_timesteps_ends_after_vpa_with_aligned_critics_and_the_offline_policy(
        tmp_path, ball_file, offline_run):
    before = parameters(networks(common.load_checkpoint(offline_run / "checkpoint.pt")))
    after = parameters(networks(finetune(tmp_path / "vpa", ball_file, offline_run, total_timesteps=0)))
    assert {name for name in before if np.array_equal(before[name], after[name])} == {
        name for name in before if name.startswith("actor")}
    assert {file.name for file in (tmp_path / "vpa").iterdir() if "tfevents" not in file.name} == {
        "config.json", "metrics.csv", "checkpoint.pt"}
    assert len((tmp_path / "vpa/metrics.csv").read_text().splitlines()) == 1


@pytest.mark.parametrize("options", [{}, {"vpa_steps": 0, "vpa_critics": "fresh"}, {"vpa_data": "rollouts"}])
def test_checkpoint_of_a_run_that_is_not_finished_is_no_starting_point(
        tmp_path, ball_file, offline_run, refusal, options):
    content = common.load_checkpoint(offline_run / "checkpoint.pt")
    for name, change in ("false.pt", {"finished": False}), ("none.pt", {"finished": None}):
        common.save_checkpoint(tmp_path / name, content | change)
        args = marvel_sac_pid.Args(**TINY_MARVEL | options, checkpoint=str(tmp_path / name),
                                   dataset_path=str(ball_file), run_dir=str(tmp_path / "x"))
        assert f"finished is {change['finished']}, this run needs True" in refusal(marvel_sac_pid.main, args)
    assert not (tmp_path / "x").exists()


def test_checkpoint_of_two_policies_is_refused(tmp_path, ball_file, offline_run, refusal):
    content = common.load_checkpoint(offline_run / "checkpoint.pt")
    actor = content.pop("actor")
    common.save_checkpoint(tmp_path / "pex.pt", content | {"offline_actor": actor, "new_actor": actor})
    args = marvel_sac_pid.Args(**TINY_MARVEL, checkpoint=str(tmp_path / "pex.pt"),
                               dataset_path=str(ball_file), run_dir=str(tmp_path / "x"))
    assert "actor is missing (PEX has two)" in refusal(marvel_sac_pid.main, args)


# --- Options without sense ---
def refused(script, name, value):
    return pytest.param(script, {name: value}, id=f"{script.__name__}-{name}-{value}")


def test_unknown_option_ends_with_status_2(tmp_path):
    status, _, stderr = run_script("offline_pretrain.py", "--no-such-option", cwd=tmp_path)
    assert status == 2 and "Traceback" not in stderr and "no-such-option" in stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("script", "options"), [
    refused(offline_pretrain, "update_steps", 0), refused(offline_pretrain, "gamma", 1.0),
    refused(offline_pretrain, "batch_size", 0), refused(offline_pretrain, "eval_every", 0),
    refused(offline_pretrain, "ood_quantile", 2.0), refused(offline_pretrain, "eval_episodes", 0),
    refused(marvel_sac_pid, "adapt_rate", 5.0), refused(marvel_sac_pid, "seed", 2**32),
    refused(marvel_sac_pid, "total_timesteps", -1), refused(marvel_sac_pid, "batch_size", 0),
    refused(marvel_sac_pid, "eval_every", 0), refused(marvel_sac_pid, "seed", -1),
    refused(offline_pretrain, "checkpoint_every", 0), refused(marvel_sac_pid, "checkpoint_every", 0),
    refused(marvel_sac_pid, "eval_episodes", 0),
    refused(marvel_sac_pid, "rollout_episodes", 0), refused(marvel_sac_pid, "cost_margin", 2.0),
    refused(marvel_sac_pid, "utd", -1.0), refused(marvel_sac_pid, "lagrange_init", -1.0),
])
def test_option_without_sense_is_refused_before_anything_is_written(
        tmp_path, monkeypatch, ball_file, offline_run, refusal, script, options):
    tiny = TINY_OFFLINE if script is offline_pretrain else {
        **TINY_MARVEL, "checkpoint": str(offline_run / "checkpoint.pt"), "learning_starts": 0}
    args = script.Args(**{**tiny, "dataset_path": str(ball_file), "run_dir": str(tmp_path / "x"), **options})
    assert f"--{next(reversed(options)).replace('_', '-')}" in refusal(script.main, args)
    assert not list(tmp_path.iterdir())
