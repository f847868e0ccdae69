"""import_osrl.py: OSRL's policies and critics compute the same in our networks, or are refused."""

import copy
import hashlib
import os
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import TASK, Payload
from torch import nn

import common
import marvel_sac_pid
from benchmark.tools import import_osrl
from benchmark.tools.curves import read_metrics

REAL = Path(os.environ.get("OSRL_CHECKPOINTS", "no-such-folder"))
CONFIG = {"task": "OfflineBallCircle-v0", "seed": 0, "cost_limit": 20, "gamma": 0.99, "reward_scale": 0.1,
          "cost_scale": 1, "num_q": 2}
TARGETS = ["actor_old", "cost_critic_old", "critic_old", "vae"]
# What stays out of our networks, with three nets per critic in CPQ and two per group in BEAR-Lag.
DROPPED = {
    "CPQ": sorted([*TARGETS, "critic.q_nets.2", "cost_critic.q_nets.1", "cost_critic.q_nets.2"]),
    "BEAR-Lag": sorted([*TARGETS, "critic.q1_nets.1", "critic.q2_nets.1", "cost_critic.q1_nets.1",
                        "cost_critic.q2_nets.0", "cost_critic.q2_nets.1"]),
    "BC": []}


# --- Networks that are laid out as OSRL lays them out ---
def mlp(*sizes, last):
    """Linear layers at the even places of a Sequential, ReLU between them, `last` at its end."""
    layers = []
    for fan_in, fan_out in zip(sizes[:-1], sizes[1:], strict=True):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1], last)


def osrl_model(algorithm, obs_dim=8, act_dim=2, hidden=(256, 256)):
    torch.manual_seed(1)
    if algorithm == "BC":
        return nn.ModuleDict({"actor": nn.ModuleDict({"pi": mlp(obs_dim, *hidden, act_dim, last=nn.Tanh())})})

    def nets(n):
        return nn.ModuleList([mlp(obs_dim + act_dim, *hidden, 1, last=nn.Identity()) for _ in range(n)])

    def critic():
        return nn.ModuleDict({"q_nets": nets(3)} if algorithm == "CPQ" else
                             {"q1_nets": nets(2), "q2_nets": nets(2)})

    model = nn.ModuleDict({
        "actor": nn.ModuleDict({"net": mlp(obs_dim, *hidden, last=nn.ReLU()),
                                "mu_layer": nn.Linear(hidden[-1], act_dim),
                                "log_std_layer": nn.Linear(hidden[-1], act_dim)}),
        "critic": critic(), "cost_critic": critic(),
        "vae": nn.ModuleDict({"e1": nn.Linear(obs_dim + act_dim, 7), "log_std": nn.Linear(7, 4)})})
    for name in "actor", "critic", "cost_critic":
        model[f"{name}_old"] = copy.deepcopy(model[name])
    for parameter in model["actor"]["log_std_layer"].parameters():
        parameter.data *= 40  # some beyond both clamps
    return model


def write_run(folder, state, config=CONFIG):
    folder.mkdir()
    torch.save({"model_state": state}, folder / "model.pt")
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def imported(folder, **options):
    """The checkpoint that the command writes for this run, and its networks."""
    output = folder / "ours" / "checkpoint.pt"
    import_osrl.main(import_osrl.Args(str(folder), output=str(output), **options))
    checkpoint = common.load_checkpoint(output)
    sizes = checkpoint["obs_dim"], checkpoint["act_dim"]
    networks = {"actor": marvel_sac_pid.Actor(*sizes), "q": marvel_sac_pid.Critic(2, *sizes),
                "qc": marvel_sac_pid.Critic(1, *sizes)}
    for name, network in networks.items():
        network.load_state_dict(checkpoint[name])
    return checkpoint, networks


def assert_equal(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-5)


# --- The same functions ---
@pytest.mark.parametrize("algorithm", ["CPQ", "BEAR-Lag"])
def test_actions_and_values_are_those_of_the_source(tmp_path, capsys, algorithm):
    model = osrl_model(algorithm)
    checkpoint, ours = imported(write_run(tmp_path / "run", model.state_dict()))
    obs, act = 3 * torch.randn(500, 8), 2 * torch.rand(500, 2) - 1
    with torch.no_grad():
        features = model["actor"]["net"](obs)
        mean, log_std = ours["actor"].gaussian(obs)
        assert_equal(mean, model["actor"]["mu_layer"](features))
        assert_equal(log_std, model["actor"]["log_std_layer"](features).clamp(-5, 2))
        assert log_std.min() == -5 and log_std.max() == 2 and log_std.std() > 1
        policy = ours["actor"].numpy_policy()
        actions = torch.from_numpy(np.array([policy(row) for row in obs.numpy()]))
        assert_equal(actions, torch.tanh(model["actor"]["mu_layer"](features)))
        pairs, critic, cost_critic = torch.cat([obs, act], -1), model["critic"], model["cost_critic"]
        first, second, cost = (
            (critic["q_nets"][0], critic["q_nets"][1], cost_critic["q_nets"][0]) if algorithm == "CPQ" else
            (critic["q1_nets"][0], critic["q2_nets"][0], cost_critic["q1_nets"][0]))
        assert_equal(ours["q"](obs, act), torch.stack([first(pairs)[:, 0], second(pairs)[:, 0]]))
        assert_equal(ours["qc"](obs, act), cost(pairs).T)
    stdout = capsys.readouterr().out
    assert algorithm in stdout and all(name in stdout for name in DROPPED[algorithm])
    assert checkpoint["source"]["dropped"] == DROPPED[algorithm]


def test_deterministic_policy_of_bc_keeps_its_actions_and_gets_a_small_std_and_fresh_critics(tmp_path):
    model = osrl_model("BC")
    config = {key: CONFIG[key] for key in ("task", "seed", "cost_limit")}
    checkpoint, ours = imported(write_run(tmp_path / "run", model.state_dict(), config))
    obs, act = 3 * torch.randn(500, 8), torch.rand(500, 2)
    with torch.no_grad():
        mean, log_std = ours["actor"].gaussian(obs)
        assert_equal(mean.tanh(), model["actor"]["pi"](obs))
        assert_equal(log_std.exp(), torch.full((500, 2), 0.1))
        q = ours["q"](obs, act)
    assert q.std() > 0 and not torch.equal(q[0], q[1])
    assert (checkpoint["gamma"], checkpoint["reward_scale"]) == (0.99, 0.1)
    assert checkpoint["source"]["dropped"] == [] and checkpoint["source"]["q"] == []
    again, _ = imported(write_run(tmp_path / "again", model.state_dict(), config))
    assert all(torch.equal(again["q"][name], value) for name, value in checkpoint["q"].items())


@pytest.mark.parametrize("algorithm", ["CPQ", "BC"])
def test_std_replaces_the_policys_own_and_leaves_the_mean_alone(tmp_path, algorithm):
    model = osrl_model(algorithm)
    run = write_run(tmp_path / "run", model.state_dict())
    obs = torch.randn(100, 8)
    with torch.no_grad():
        mean, _ = imported(run)[1]["actor"].gaussian(obs)
        same_mean, log_std = imported(run, std=0.3)[1]["actor"].gaussian(obs)
    assert torch.equal(mean, same_mean)
    assert_equal(log_std.exp(), torch.full((100, 2), 0.3))


def test_policy_without_exploration_is_pointed_out_with_the_command_that_mends_it(tmp_path, capsys):
    model = osrl_model("CPQ")
    model["actor"]["log_std_layer"].bias.data[:] = -500
    run = write_run(tmp_path / "a run", model.state_dict())
    imported(run)
    before = capsys.readouterr().out
    assert "std of u 0.0067" in before
    (line,) = [line for line in before.splitlines() if "import_osrl.py" in line]
    assert shlex.split(line) == ["python", "benchmark/tools/import_osrl.py", "--source", str(run),
                                 "--output", str(run / "ours/checkpoint.pt"), "--std", "0.1"]
    imported(run, std=0.1)
    after = capsys.readouterr().out
    assert "std of u 0.1" in after and "--std" not in after


# --- What the checkpoint says ---
def test_checkpoint_says_what_it_is_and_where_it_comes_from(tmp_path, ball_task):
    config = CONFIG | {"gamma": 0.95, "reward_scale": 1.0, "cost_limit": 40}
    run = write_run(tmp_path / "run7", osrl_model("CPQ").state_dict(), config)
    checkpoint, _ = imported(run)
    expected = dict(env_id=TASK, obs_dim=8, act_dim=2, hidden=256, activation="relu", gamma=0.95,
                    reward_scale=1.0, cost_limit=40)
    assert {name: checkpoint[name] for name in expected} == expected
    source = checkpoint["source"]
    assert (source["name"], source["algorithm"], source["task"]) == ("run7", "CPQ", "OfflineBallCircle-v0")
    assert source["sha256"] == hashlib.sha256((run / "model.pt").read_bytes()).hexdigest()


def test_default_output_and_the_command_that_finetunes_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = CONFIG | {"gamma": 0.95, "reward_scale": 1.0, "cost_limit": 40}
    run = write_run(tmp_path / "run 7", osrl_model("CPQ").state_dict(), config)
    import_osrl.main(import_osrl.Args(str(run)))
    output = f"runs/{TASK}__osrl__run 7/checkpoint.pt"
    assert [file.name for file in (tmp_path / output).parent.iterdir()] == ["checkpoint.pt"]
    assert shlex.split(capsys.readouterr().out.splitlines()[-1]) == [
        "python", "marvel_sac_pid.py", "--env-id", TASK, "--checkpoint", output, "--vpa-data", "rollouts",
        "--gamma", "0.95", "--reward-scale", "1", "--cost-limit", "40"]


def test_folder_as_osrl_leaves_it_is_read_too(tmp_path):
    run = write_run(tmp_path / "run", osrl_model("BC").state_dict())
    (run / "checkpoint").mkdir()
    (run / "model.pt").rename(run / "checkpoint" / "model.pt")
    assert imported(run)[0]["source"]["algorithm"] == "BC"


def test_finetuning_accepts_it(tmp_path):
    run = write_run(tmp_path / "run", osrl_model("BEAR-Lag").state_dict())
    checkpoint, _ = imported(run, std=0.1)
    marvel_sac_pid.main(marvel_sac_pid.Args(
        checkpoint=str(run / "ours" / "checkpoint.pt"), run_dir=str(tmp_path / "marvel"), vpa_data="rollouts",
        learning_starts=200, total_timesteps=600, vpa_steps=20, batch_size=32, eval_episodes=1))
    after = common.load_checkpoint(tmp_path / "marvel" / "checkpoint.pt")
    for name in "actor", "q", "qc":
        assert any(not torch.equal(after[name][key], value) for key, value in checkpoint[name].items()), name
    assert len(read_metrics(tmp_path / "marvel" / "metrics.csv")["episode"]) == 3


# --- What is refused ---
def three_layers():
    return osrl_model("CPQ", hidden=(256, 256, 256)).state_dict()


def without(state, *names):
    return {key: value for key, value in state.items() if not key.startswith(names)}


REFUSED_STATES = {
    "three hidden layers": (three_layers, "net.4.weight is no part of CPQ with two hidden layers of 256"),
    "another width": (lambda: osrl_model("CPQ", hidden=(128, 128)).state_dict(),
                      "actor.net.0.weight has shape (128, 8), needed is (256, 8)"),
    "another action": (lambda: osrl_model("BC", act_dim=3).state_dict(),
                       "actor.pi.4.weight has shape (3, 256), needed is (2, 256)"),
    "one reward critic": (lambda: without(osrl_model("CPQ").state_dict(), "critic.q_nets.1."),
                          "critic.q_nets.1.0.weight of CPQ is missing"),
    "one group": (lambda: without(osrl_model("BEAR-Lag").state_dict(), "critic.q2_nets"),
                  "critic.q2_nets.0.0.weight of BEAR-Lag is missing"),
    "no log std": (lambda: without(osrl_model("CPQ").state_dict(), "actor.log_std"),
                   "actor.log_std_layer.weight of CPQ is missing"),
    "unknown part": (lambda: osrl_model("CPQ").state_dict() | {"nu_net.0.weight": torch.zeros(1)},
                     "nu_net.0.weight is no part of CPQ"),
    "another algorithm": (lambda: {"transformer.0.weight": torch.zeros(2, 2)}, "not those of OSRL's CPQ"),
    "not finite": (lambda: osrl_model("BC").state_dict() | {"actor.pi.4.bias": torch.tensor([0, torch.nan])},
                   "actor.pi.4.bias is not finite"),
    "not tensors": (lambda: {"actor.pi.0.weight": 1.0}, "not a dictionary of tensors"),
    "not a dictionary": (lambda: [1.0], "not a dictionary of tensors"),
}


@pytest.mark.parametrize("fault", REFUSED_STATES)
def test_state_dict_that_does_not_fit_is_refused_by_name(tmp_path, refusal, fault):
    make, words = REFUSED_STATES[fault]
    run = write_run(tmp_path / "run", make())
    line = refusal(import_osrl.main, import_osrl.Args(str(run), output=str(tmp_path / "x" / "y.pt")))
    assert words in line and "model.pt" in line
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(("change", "words"), [
    ({"task": "os:OfflineBallCircle-v0"}, "names no task"), ({"cost_scale": 0.1}, "cost_scale is 0.1"),
    ({"task": "OfflineMetadrive-easysparse-v0"}, "no such task"), ({"gamma": None}, "gamma is None"),
    ({"reward_scale": "x"}, "reward_scale is x"), ({"cost_limit": float("nan")}, "cost_limit is nan")])
def test_configuration_that_does_not_serve_is_refused(tmp_path, refusal, change, words):
    run = write_run(tmp_path / "run", osrl_model("CPQ").state_dict(), CONFIG | change)
    assert words in refusal(import_osrl.main, import_osrl.Args(str(run), output=str(tmp_path / "y.pt")))
    assert not (tmp_path / "y.pt").exists()


@pytest.mark.parametrize(
    "content", ["{", "!!python/object/apply:os.system ['touch executed']", "- a list", "\0"])
def test_configuration_that_is_no_plain_yaml_is_refused_and_runs_nothing(
        tmp_path, monkeypatch, refusal, content):
    monkeypatch.chdir(tmp_path)
    run = write_run(tmp_path / "run", osrl_model("BC").state_dict())
    (run / "config.yaml").write_text(content)
    assert "config.yaml" in refusal(import_osrl.main, import_osrl.Args(str(run)))
    assert [file.name for file in tmp_path.iterdir()] == ["run"]


def test_pickled_code_is_refused_and_not_executed(tmp_path, refusal):
    state = osrl_model("BC").state_dict() | {"payload": Payload(tmp_path / "executed")}
    run = write_run(tmp_path / "run", state)
    (tmp_path / "executed").unlink(missing_ok=True)
    line = refusal(import_osrl.main, import_osrl.Args(str(run), output=str(tmp_path / "y.pt")))
    assert "model.pt: not a readable checkpoint" in line
    assert [file.name for file in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("std", [0, 1e-3, 100.0, float("nan")])
def test_std_out_of_the_clamp_is_refused(tmp_path, refusal, std):
    assert f"--std {std}" in refusal(import_osrl.main, import_osrl.Args(str(tmp_path), std=std))


def test_missing_and_unlike_files_are_refused(tmp_path, refusal):
    args = import_osrl.Args(str(tmp_path / "run"), output=str(tmp_path / "file" / "y.pt"))
    assert "holds no model.pt" in refusal(import_osrl.main, args)
    run = write_run(tmp_path / "run", osrl_model("BC").state_dict())
    (tmp_path / "file").write_text("")
    assert "--output" in refusal(import_osrl.main, args)
    torch.save({"model_state": {}, "optimizer": {}}, run / "model.pt")
    assert "not written by OSRL" in refusal(import_osrl.main, args)
    (run / "model.pt").write_bytes(b"")
    assert "not a readable checkpoint" in refusal(import_osrl.main, args)
    (run / "config.yaml").unlink()
    assert "holds no config.yaml" in refusal(import_osrl.main, args)


# --- Real ones ---
@pytest.mark.parametrize("name", ["hopper_CPQ_cost20-4e4f", "hopper_CPQ_cost20_seed10-0ed4"])
def test_real_policy_reproduces_its_authors_recorded_evaluation(tmp_path, name):
    """Their last line is the mean of 10 unseeded episodes, ours is 20 seeded ones.

    Both play the same policy, so an episode has one standard deviation s, and the difference of the two means
    has the standard error s sqrt(1/20 + 1/10); s is taken from ours.
    """
    if not (REAL / name / "model.pt").is_file():
        pytest.skip("OSRL_CHECKPOINTS names no folder with OSRL's checkpoints")
    output = tmp_path / "checkpoint.pt"
    import_osrl.main(import_osrl.Args(str(REAL / name), output=str(output)))
    checkpoint = common.load_checkpoint(output)
    assert checkpoint["env_id"] == "SafetyHopperVelocityGymnasium-v1"
    assert checkpoint["source"]["dropped"] == sorted([*TARGETS, "cost_critic.q_nets.1"])
    env, task = common.make_env(checkpoint["env_id"])
    actor = marvel_sac_pid.Actor(task.obs_dim, task.act_dim)
    actor.load_state_dict(checkpoint["actor"])
    result = common.evaluate(env, actor.numpy_policy(), 20, seed=0)
    env.close()
    header, *_, last = (REAL / name / "progress.txt").read_text().splitlines()
    recorded = dict(zip(header.split("\t"), map(float, last.split("\t")), strict=True))
    for key, column in ("return", "eval/Reward"), ("cost", "eval/Cost"), ("length", "eval/Length"):
        error = result[key].std(ddof=1) * np.sqrt(1 / 20 + 1 / 10)
        assert abs(result[key].mean() - recorded[column]) < 2 * error, key
        assert error < 0.02 * recorded[column]  # or the comparison would say little
