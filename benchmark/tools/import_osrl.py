"""Turn an OSRL run (CPQ, BEAR-Lag or BC) into a checkpoint of ours, to evaluate and to finetune.

  python benchmark/tools/import_osrl.py --source FOLDER
  python benchmark/tools/import_osrl.py --source FOLDER --std 0.1

FOLDER holds config.yaml and model.pt (or checkpoint/model.pt), as OSRL writes them; the names of the
parameters tell the algorithm. Every parameter is either taken or known to be dropped: target networks, the
VAE, critics beyond ours. Mean actions and the values of the critics that are taken stay what they are.

  actor     OSRL clamps log std to [-20, 2], ours to [-5, 2]: samples differ where it is smaller
            BC has no std and gets 0.1
  CPQ       Q: the first two nets of its critic. Qc: the first of its cost critic (OSRL: the minimum of all)
  BEAR-Lag  Q: the first net of both groups of its critic. Qc: the first of its cost critic's first group
  BC        Q and Qc are fresh, from seed 0

The critics follow OSRL's targets, so value pre-alignment has to fit them to the policy. CPQ and BEAR-Lag have
no entropy term and may shrink the std to nothing: such a policy does not explore, and under the clamp the std
has no gradient. --std replaces it and leaves the mean action alone. The activation stands in no file: OSRL's
is ReLU everywhere. Marvel's official code has tanh in the actor, under the same names: do not import that.
"""
import hashlib
import math
import os
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import tyro
import yaml

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before numpy: a second pool of threads slows both down
import numpy as np  # noqa: E402
import torch  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import common  # noqa: E402
import marvel_sac_pid  # noqa: E402

HIDDEN = 256
BC_STD = 0.1


class Layout(NamedTuple):
    """Names in one algorithm's state dict: its layers and nets that are taken, and what may be dropped."""

    trunk: tuple[str, str]
    heads: tuple[str, ...]  # of u's mean and of its log std, if there is one
    q: tuple[str, ...]
    qc: tuple[str, ...]
    dropped: str

    @property
    def first(self) -> str:
        return f"{self.q[0]}.0.weight" if self.q else f"{self.trunk[0]}.weight"


GAUSSIAN = ("actor.net.0", "actor.net.2"), ("actor.mu_layer", "actor.log_std_layer")
DROPPED = r"(actor_old|critic_old|cost_critic_old|vae)\..+|(cost_)?critic\.%s\.\d+\.[024]\.(weight|bias)"
LAYOUTS = {
    "CPQ": Layout(*GAUSSIAN, q=("critic.q_nets.0", "critic.q_nets.1"), qc=("cost_critic.q_nets.0",),
                  dropped=DROPPED % "q_nets"),
    "BEAR-Lag": Layout(*GAUSSIAN, q=("critic.q1_nets.0", "critic.q2_nets.0"), qc=("cost_critic.q1_nets.0",),
                       dropped=DROPPED % "q[12]_nets"),
    "BC": Layout(("actor.pi.0", "actor.pi.2"), ("actor.pi.4",), q=(), qc=(), dropped="(?!)"),
}


@dataclass
class Args:
    source: str
    """folder of an OSRL run: config.yaml and model.pt"""
    std: float | None = None
    """standard deviation of u in a = tanh(u), in place of the policy's own; BC has none and gets 0.1"""
    output: str | None = None
    """checkpoint to write; default runs/<task>__osrl__<name of the folder>/checkpoint.pt"""


def read_run(folder: Path) -> tuple[Path, dict, dict]:
    """model.pt of an OSRL run, its parameters and its configuration; stops with one line if it is none."""
    model, config_file = folder / "model.pt", folder / "config.yaml"
    if not model.is_file():
        model = folder / "checkpoint" / "model.pt"
    for file in model, config_file:
        if not file.is_file():
            common.stop(f"--source {folder}: holds no {file.name}")
    try:
        config = yaml.safe_load(config_file.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        common.stop(f"{config_file}: not readable ({error!s:.100})")
    if not isinstance(config, dict) or not re.fullmatch(r"Offline[\w-]+", str(config.get("task"))):
        common.stop(f"{config_file}: names no task of DSRL (Offline...)")
    try:
        content = torch.load(model, map_location="cpu", weights_only=True)
    except Exception as error:  # truncated, something else, or carrying code: torch raises many types
        common.stop(f"{model}: not a readable checkpoint ({error!s:.100})")
    if not isinstance(content, dict) or content.keys() != {"model_state"}:
        common.stop(f"{model}: not written by OSRL, which stores model_state and nothing else")
    state = content["model_state"]
    if not isinstance(state, dict) or not all(
            isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in state.items()):
        common.stop(f"{model}: model_state is not a dictionary of tensors")
    return model, state, config


def check_parameters(model: Path, state: dict, obs_dim: int, act_dim: int) -> tuple[str, list[str]]:
    """The algorithm and the groups that are dropped; stops at a parameter unknown, missing or unfit."""
    algorithm = next((name for name, layout in LAYOUTS.items() if layout.first in state), None)
    if algorithm is None:
        common.stop(f"{model}: its parameters are not those of OSRL's {', '.join(LAYOUTS)}")
    layout = LAYOUTS[algorithm]
    sizes = {layout.trunk[0]: (HIDDEN, obs_dim), layout.trunk[1]: (HIDDEN, HIDDEN)}
    sizes |= {head: (act_dim, HIDDEN) for head in layout.heads}
    for net in layout.q + layout.qc:
        sizes |= {f"{net}.0": (HIDDEN, obs_dim + act_dim), f"{net}.2": (HIDDEN, HIDDEN),
                  f"{net}.4": (1, HIDDEN)}
    shapes = {f"{layer}.weight": size for layer, size in sizes.items()}
    shapes |= {f"{layer}.bias": size[:1] for layer, size in sizes.items()}

    dropped = [key for key in state if key not in shapes]
    for key in dropped:
        if not re.fullmatch(layout.dropped, key):
            common.stop(f"{model}: {key} is no part of {algorithm} with two hidden layers of {HIDDEN}")
    for key, shape in shapes.items():
        if key not in state:
            common.stop(f"{model}: {key} of {algorithm} is missing")
        if tuple(state[key].shape) != shape:
            common.stop(f"{model}: {key} has shape {tuple(state[key].shape)}, needed is {shape}")
        if not state[key].isfinite().all():
            common.stop(f"{model}: {key} is not finite")
    # critic.q_nets.2.4.bias belongs to the group critic.q_nets.2, vae.e1.bias to vae
    return algorithm, sorted({re.match(r"\w*critic\.\w+\.\d+|\w+", key)[0] for key in dropped})


def convert(state: dict, algorithm: str, obs_dim: int, act_dim: int, std: float | None):
    """Our actor, q and qc from checked parameters; `std` of u replaces the policy's own if given."""
    layout = LAYOUTS[algorithm]
    actor = marvel_sac_pid.Actor(obs_dim, act_dim)
    q, qc = (marvel_sac_pid.Critic(n, obs_dim, act_dim) for n in (2, 1))
    parameters = {}
    for kind in "weight", "bias":
        heads = [state[f"{head}.{kind}"] for head in layout.heads][: 1 if std else 2]
        if std:
            heads.append(torch.full_like(heads[0], math.log(std) if kind == "bias" else 0.0))
        parameters |= {f"fc1.{kind}": state[f"{layout.trunk[0]}.{kind}"],
                       f"fc2.{kind}": state[f"{layout.trunk[1]}.{kind}"], f"head.{kind}": torch.cat(heads)}
    actor.load_state_dict(parameters)
    for critic, nets in (q, layout.q), (qc, layout.qc):
        parameters = {}
        for i, layer in enumerate((0, 2, 4) if nets else ()):  # ours are stacked: (n, fan_in, fan_out)
            parameters[f"weights.{i}"] = torch.stack([state[f"{net}.{layer}.weight"].T for net in nets])
            parameters[f"biases.{i}"] = torch.stack([state[f"{net}.{layer}.bias"][None] for net in nets])
        critic.load_state_dict(parameters or critic.state_dict())
    return actor, q, qc


def main(args: Args) -> None:
    low, high = math.exp(-5), math.exp(2)
    if args.std is not None and not low <= args.std <= high:
        common.stop(f"--std {args.std}: must be between {low:.2g} and {high:.2g}")
    folder = Path(args.source)
    model, state, config = read_run(folder)
    env, task = common.make_env(config["task"].replace("Offline", "Safety", 1))
    algorithm, dropped = check_parameters(model, state, task.obs_dim, task.act_dim)

    # --- Configuration ---
    output = Path(args.output or f"runs/{task.env_id}__osrl__{folder.resolve().name}/checkpoint.pt")
    defaults = marvel_sac_pid.Args()
    from_config = ["cost_limit"]
    if algorithm != "BC":  # which has no critics
        from_config += ["gamma", "reward_scale", "cost_scale"]
    for name in from_config:
        if not isinstance(config.get(name), (int, float)) or not math.isfinite(config[name]):
            common.stop(f"{folder / 'config.yaml'}: {name} is {config.get(name)}, not a number")
    if config.get("cost_scale", 1) != 1:
        common.stop(f"{folder / 'config.yaml'}: cost_scale is {config['cost_scale']}, our costs have none")
    units = {name: config[name] if name in from_config else getattr(defaults, name)
             for name in ("gamma", "reward_scale")}

    # --- Networks ---
    torch.manual_seed(0)
    std = BC_STD if algorithm == "BC" and args.std is None else args.std
    actor, q, qc = convert(state, algorithm, task.obs_dim, task.act_dim, std)
    layout = LAYOUTS[algorithm]
    print(f"{algorithm} on {task.env_id}: cost limit {config['cost_limit']:g}, "
          f"discount {units['gamma']:g}, reward scale {units['reward_scale']:g}")
    print(f"Q: {', '.join(layout.q) or 'fresh'}; Qc: {', '.join(layout.qc) or 'fresh'}")
    print(f"dropped: {', '.join(dropped) or 'nothing'}")

    # --- One episode, to see that it acts and how much it explores ---
    policy, observations = actor.numpy_policy(), []

    def recorded_policy(obs):
        observations.append(obs)
        return policy(obs)

    result = common.evaluate(env, recorded_policy, 1)
    env.close()
    with torch.no_grad():
        median = actor.gaussian(torch.from_numpy(np.array(observations)))[1].exp().median().item()
    print(f"one mean-action episode: return {result['return'][0]:.1f}, cost {result['cost'][0]:g}, "
          f"{result['length'][0]:.0f} steps; std of u {median:.2g}{'' if std else ' (median)'}, clamped to "
          f"[{low:.2g}, {high:.2g}], in OSRL to [{math.exp(-20):.1g}, {high:.2g}]")
    if median <= 1.001 * low:
        again = ["--source", args.source, *(["--output", args.output] if args.output else []), "--std", "0.1"]
        print("  it hardly explores, and under the clamp the std cannot be trained: import it with\n"
              f"  python benchmark/tools/import_osrl.py {shlex.join(again)}")

    # --- Save ---
    if args.output and Path(args.output).is_dir():
        common.stop(f"--output {args.output}: is a folder")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        common.save_checkpoint(output, {
            "env_id": task.env_id, "obs_dim": task.obs_dim, "act_dim": task.act_dim, "hidden": HIDDEN,
            "activation": "relu", **units, "cost_limit": config["cost_limit"], "finished": True,
            "actor": actor.state_dict(), "q": q.state_dict(), "qc": qc.state_dict(), "source": {
                "name": folder.resolve().name, "algorithm": algorithm, "task": config["task"], "std": std,
                "sha256": hashlib.sha256(model.read_bytes()).hexdigest(), "q": list(layout.q),
                "qc": list(layout.qc), "dropped": dropped}})
    except OSError as error:
        common.stop(f"--output {output}: cannot write there ({error.strerror})")
    command = ["marvel_sac_pid.py", "--env-id", task.env_id, "--checkpoint", str(output),
               "--vpa-data", "rollouts"]
    for name, value in (units | {"cost_limit": config["cost_limit"]}).items():
        if value != getattr(defaults, name):
            command += [f"--{name.replace('_', '-')}", f"{value:g}"]
    print(f"{output}: written; finetune it with\n  python {shlex.join(command)}")


if __name__ == "__main__":
    with common.patient_streams():
        main(tyro.cli(Args))
