"""Both scripts and the baselines, end to end and small: every mode takes its updates and leaves its files."""

import contextlib
import hashlib
import io
import json
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, TASK, TINY_MARVEL, TINY_OFFLINE, command_line, run_script, single_line
from small import args_of, equal, files, kinds, saved

import common
import marvel_sac_pid
import offline_pretrain
from benchmark.baselines import marvel_released_pid
from benchmark.tools.curves import read_metrics

NETWORKS = ("actor", "q", "qc")


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """Script and options of every kind of run, and the folder of the offline run that they start from."""
    folder = tmp_path_factory.mktemp("start")
    return {**kinds(folder), "folder": folder}


@pytest.fixture(scope="module")
def offline_run(settings):
    """The folder of an offline run."""
    return settings["folder"] / "offline"


def finetune(settings, run_dir, kind="marvel", **options):
    script, small = settings[kind]
    script.main(script.Args(**{**small, "run_dir": str(run_dir), **options}))
    return saved(run_dir)


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
    assert len(events) == 1 and names - events == {"config.json", "metrics.csv", "checkpoint.pt"}
    assert all((run_dir / name).stat().st_size > 0 for name in names)


# --- Every mode ---
def test_offline_run_updates_all_networks_and_says_what_it_was_made_of(settings, offline_run):
    checkpoint, (_, options) = saved(offline_run), settings["offline"]
    torch.manual_seed(0)
    fresh = {"actor": offline_pretrain.Actor(3, 2), "q": offline_pretrain.Critic(2, 3, 2),
             "qc": offline_pretrain.Critic(1, 3, 2)}
    assert moved({name: net.state_dict() for name, net in fresh.items()}, checkpoint) == list(NETWORKS)
    for name in ("actor", "critic"):
        assert updates(checkpoint[f"{name}_optimizer"]) == 30
    check_files(offline_run)
    metrics = read_metrics(offline_run / "metrics.csv")
    assert metrics["update_steps"].tolist() == [10, 20, 30]
    assert all(np.isfinite(column[-1]) for column in metrics.values())
    data = (settings["folder"] / "data.hdf5").read_bytes()
    assert checkpoint["dataset_sha256"] == hashlib.sha256(data).hexdigest()
    assert (checkpoint["env_id"], checkpoint["obs_dim"], checkpoint["act_dim"]) == ("small:Small-v0", 3, 2)
    assert json.loads((offline_run / "config.json").read_text()) == checkpoint["args"]
    assert options.items() <= checkpoint["args"].items()


@pytest.mark.parametrize("options", [
    {}, {"vpa_steps": 0}, {"vpa_critics": "fresh"}, {"multiplier": "pid"}, {"multiplier": "fixed"},
    {"multiplier": "dual", "rollout_episodes": 2}, {"multiplier": "fixed", "lagrange_init": 0.5},
    {"lagrange_init": "aligned"}, {"lagrange_init": "norm-ratio"}, {"utd": 0.1},
    {"autotune": False, "alpha": 0.03}], ids=str)
def test_mode_updates_all_networks_as_often_as_asked(tmp_path, settings, offline_run, options):
    checkpoint = finetune(settings, tmp_path / "run", **options)
    check_files(tmp_path / "run")
    assert moved(saved(offline_run), checkpoint) == list(NETWORKS)
    for name in ("q", "qc"):
        assert moved({**checkpoint, name: checkpoint[f"{name}_target"]}, checkpoint) == [name]
    metrics = read_metrics(tmp_path / "run/metrics.csv")
    env_steps, online = metrics["env_steps"][-1], updates(checkpoint["actor_optimizer"])
    assert env_steps >= 160 and metrics["env_steps"][-1 - options.get("rollout_episodes", 1)] < 160
    assert online == int(options.get("utd", 0.2) * env_steps)
    assert updates(checkpoint["critic_optimizer"]) == online + options.get("vpa_steps", 20)
    multiplier = metrics["lagrange_multiplier"]
    assert np.isfinite(multiplier).all() and (multiplier >= 0).all()
    if options.get("multiplier") == "fixed":
        assert set(multiplier) == {options.get("lagrange_init", multiplier[0])}
    tuned = float(checkpoint["log_alpha"]) != pytest.approx(np.log(options.get("alpha", 0.01)), abs=1e-6)
    assert tuned == options.get("autotune", True)
    for name in ("eval_sampled_return", "eval_sampled_cost", "eval_mean_return", "eval_mean_cost"):
        assert np.isfinite(metrics[name][-1])


def test_scripts_name_their_default_folders_after_task_script_and_seed(tmp_path, settings, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for kind, script in settings.items():
        if kind in ("rollouts", "from scratch", "folder"):  # Marvel's script again
            continue
        script, options = script
        brief = {"update_steps": 1} if "update_steps" in options else {"total_timesteps": 0}
        script.main(args_of(script, **{**options, **brief, "seed": 7}))
    folders = {folder.name for folder in (tmp_path / "runs").iterdir()}
    scripts = ("offline_pretrain", "cpq", "bear_lag", "bc_safe", "marvel_sac_pid", "marvel_released_pid",
               "jsrl", "pex", "so2", "rlpd", "marvel_td3_pid")
    assert folders == {f"small:Small-v0__{script}__seed7" for script in scripts}


@pytest.mark.parametrize(("program", "printed"), [
    (ROOT / "marvel_sac_pid.py", "{0}/marvel_sac_pid.py"),
    ("/usr/lib/ipykernel_launcher.py", "marvel_sac_pid.py"),
    (ROOT / "benchmark/baselines/jsrl.py", "{0}/benchmark/baselines/jsrl.py")])
def test_command_that_goes_on_with_a_run_is_the_scripts_also_in_a_notebook(monkeypatch, program, printed):
    monkeypatch.setattr(sys, "argv", [str(program), "-f", "kernel.json"])
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(common.Run, "keep", lambda run, *_, **__: common.stop(run.command))
    with pytest.raises(SystemExit), contextlib.redirect_stderr(io.StringIO()) as error:
        marvel_sac_pid.main(marvel_sac_pid.Args(from_scratch=True, run_dir="x"))
    assert f"`python {printed.format(ROOT)} --resume x`" in error.getvalue()


def test_released_law_has_a_folder_per_run_in_a_sweep_and_leaves_its_options_alone(monkeypatch):
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep")
    monkeypatch.setenv("WANDB_RUN_ID", "abc")
    given, args = [], marvel_sac_pid.Args()
    monkeypatch.setattr(marvel_sac_pid, "main", lambda args: given.append(args.run_dir))
    marvel_released_pid.main(args)
    assert given == ["runs/SafetyBallCircle-v0__marvel_released_pid__seed0__abc"] and args.run_dir is None


def test_from_scratch_needs_neither_checkpoint_nor_dataset_and_waits_for_learning_starts(tmp_path, settings):
    checkpoint = finetune(settings, tmp_path / "run", "from scratch", learning_starts=1000)
    assert checkpoint["actor_optimizer"]["state"] == checkpoint["critic_optimizer"]["state"] == {}
    checkpoint = finetune(settings, tmp_path / "again", "from scratch")
    assert 0 < updates(checkpoint["actor_optimizer"]) < 0.2 * 160
    assert read_metrics(tmp_path / "again/metrics.csv")["lagrange_multiplier"][0] == 0  # uniform actions yet


def test_no_timesteps_ends_after_vpa_with_aligned_critics_and_the_offline_policy(
        tmp_path, settings, offline_run):
    checkpoint = finetune(settings, tmp_path / "run", total_timesteps=0)
    assert moved(saved(offline_run), checkpoint) == ["q", "qc"]
    assert equal(saved(offline_run)["actor"], checkpoint["actor"])
    check_files(tmp_path / "run")
    assert (tmp_path / "run/metrics.csv").read_text() == ",".join(marvel_sac_pid.COLUMNS) + "\n"


@pytest.mark.parametrize("multiplier", ["apid", "pid", "dual"])
def test_limit_0_divides_by_nothing(tmp_path, settings, multiplier):
    with np.errstate(divide="raise", invalid="raise"):
        finetune(settings, tmp_path / "run", cost_limit=0.0, multiplier=multiplier)
    metrics = read_metrics(tmp_path / "run/metrics.csv")
    assert metrics["normalized_cost"].tolist() == (metrics["episode_cost"] + 1).tolist()  # DSRL's eps is 1


# --- Hand-over ---
def test_both_scripts_act_alike_with_the_offline_policy(offline_run):
    observations = np.random.default_rng(0).normal(size=(100, 3)).astype(np.float32)

    def acts(script):
        actor = script.Actor(3, 2)
        actor.load_state_dict(saved(offline_run)["actor"])
        policy, rng = actor.numpy_policy(), np.random.default_rng(0)
        torch.manual_seed(0)
        with torch.no_grad():
            sample, log_prob = actor(torch.from_numpy(observations))
            mean = actor.gaussian(torch.from_numpy(observations))[0].tanh()
        means, samples = zip(*[(policy(obs), policy(obs, rng)) for obs in observations], strict=True)
        return [sample.numpy(), log_prob.numpy(), mean.numpy(), np.stack(means), np.stack(samples)]

    one, other = acts(offline_pretrain), acts(marvel_sac_pid)
    assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
    _, _, mean, numpy_mean, numpy_sample = one
    np.testing.assert_allclose(mean, numpy_mean, atol=1e-5)
    assert not np.array_equal(numpy_mean, numpy_sample)


# --- The command line ---
def test_both_scripts_run_from_the_command_line_with_default_folders(tmp_path, ball_file):
    options = [*command_line(TINY_OFFLINE), "--dataset-path", ball_file]
    status, _, stderr = run_script("offline_pretrain.py", *options, cwd=tmp_path)
    assert status == 0, stderr
    assert "Traceback" not in stderr and "Warning" not in stderr
    options = command_line({**TINY_MARVEL, "total_timesteps": 200, "vpa_steps": 0, "dataset_path": ball_file})
    status, _, stderr = run_script("marvel_sac_pid.py", *options, cwd=tmp_path)
    assert status == 0, stderr
    assert "Traceback" not in stderr and "Warning" not in stderr
    assert [file.name for file in tmp_path.iterdir()] == ["runs"]
    for script in "offline_pretrain", "marvel_sac_pid":
        check_files(tmp_path / f"runs/{TASK}__{script}__seed0")
    before = files(tmp_path)
    single_line(*run_script("marvel_sac_pid.py", *options, cwd=tmp_path)[::2])
    assert files(tmp_path) == before


def test_unknown_option_ends_with_status_2(tmp_path):
    status, _, stderr = run_script("offline_pretrain.py", "--no-such-option", cwd=tmp_path)
    assert status == 2 and "Traceback" not in stderr and "no-such-option" in stderr
    assert not list(tmp_path.iterdir())
