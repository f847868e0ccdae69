"""Write the training episodes that an online run's checkpoint holds as a DSRL dataset, to train offline on.

  python benchmark/tools/export_dataset.py --checkpoint runs/collect/checkpoint.pt --output point.hdf5
"""
import io
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import common  # noqa: E402


@dataclass
class Args:
    checkpoint: str
    """what marvel_sac_pid.py or a baseline wrote"""
    output: str
    """file to write"""
    env_id: str | None = None
    """task; default the checkpoint's. One in a module of your own (module:Name-v0) has to be named"""


def write_dataset(path: Path, data: dict[str, np.ndarray], attributes: dict[str, Any]) -> None:
    """Write a DSRL file, compressed, under a temporary name first; the same data gives the same bytes.

    data: arrays under common.DATASET_KEYS with unscaled rewards and actions in the simulator's own units,
    which the attribute action_units says.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    with h5py.File(content, "w") as file:
        for key in common.DATASET_KEYS:
            array = np.asarray(data[key], bool if key in ("terminals", "timeouts") else np.float32)
            file.create_dataset(key, data=array, compression="gzip", compression_opts=9, shuffle=True)
        file.attrs.update({"action_units": "simulator", **attributes})
    common.write_file(path, content.getvalue())


def episodes_of(path: str | Path, env_id: str | None = None) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """A checkpoint's training episodes, with rewards and actions in the task's own units; task and seed."""
    checkpoint = common.load_checkpoint(path)
    buffer = checkpoint.get("buffer")
    common.stop_unless(buffer and len(buffer["rewards"]),
                       f"--checkpoint {path}: holds no episodes of an online run")
    if ":" in checkpoint["env_id"] and not env_id:  # a file must not choose what Python imports
        common.stop(f"--checkpoint {path}: its task is in a module; give --env-id {checkpoint['env_id']}")
    env, task = common.make_env(env_id or checkpoint["env_id"])
    env.close()
    common.check_facts(path, checkpoint, task.facts())
    data = {key: value.numpy() for key, value in buffer.items()}
    data["rewards"] = data["rewards"] / checkpoint["reward_scale"]
    data["actions"] = task.own_actions(data["actions"])
    data["timeouts"] = data["timeouts"] * (1 - data["terminals"])  # at both, the task has ended
    return data, {"task": checkpoint["env_id"], "seed": checkpoint["args"]["seed"]}


def main(args: Args) -> None:
    output = Path(args.output)
    folder = next(parent for parent in output.absolute().parents if parent.exists())
    common.stop_unless(folder.is_dir() and not output.is_dir() and os.access(folder, os.W_OK),
                       f"--output {output}: must be a file in a folder that can be written to")
    data, attributes = episodes_of(args.checkpoint, args.env_id)
    write_dataset(output, data, attributes)
    _, returns, costs = common.episode_sums(data)
    print(f"{output}: {len(returns)} episodes, {len(data['rewards'])} transitions; "
          f"return {returns.min():.1f} to {returns.max():.1f}, cost {costs.min():g} to {costs.max():g}")


if __name__ == "__main__":
    with common.patient_streams():
        main(tyro.cli(Args))
