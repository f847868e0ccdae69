"""Evaluate a checkpoint: return, cost and length of the sampled and of the mean-action policy, and a video.

  python benchmark/tools/evaluate.py --checkpoint FILE
  python benchmark/tools/evaluate.py --checkpoint FILE --episodes 100 --video episode.gif

With the default seed and as many episodes these are the numbers at the end of the run that wrote the file.
The video is the first mean-action episode of the table, at most 100 frames of it. The numbers come first: no
fault of a renderer can lose them.
"""
import gc
import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import tyro
from PIL import Image

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before numpy: a second pool of threads slows both down
import numpy as np  # noqa: E402
from scipy.stats import t  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import common  # noqa: E402
from marvel_sac_pid import Actor  # noqa: E402

MAX_FRAMES, FRAME_MS, MAX_SIDE = 100, 50, 320


@dataclass
class Args:
    checkpoint: str
    """what offline_pretrain.py, marvel_sac_pid.py or import_osrl.py wrote"""
    env_id: str | None = None
    """task; default the checkpoint's. One in a module of your own (module:Name-v0) has to be named"""
    episodes: int = 20
    """episodes of either policy"""
    seed: int = 10_000
    """seed of the first episode, the k-th has seed + k"""
    cost_limit: float | None = None
    """limit of the cost per episode; default the checkpoint's"""
    video: str | None = None
    """GIF file to write"""


def load_policy(args: Args) -> tuple[gym.Env, common.Task, Callable, dict]:
    """Task, its description, the checkpoint's policy act(obs, rng=None), and the checkpoint."""
    checkpoint = common.load_checkpoint(args.checkpoint)
    env_id = args.env_id or str(checkpoint.get("env_id"))
    if ":" in env_id and not args.env_id:  # a file must not choose what Python imports
        common.stop(f"--checkpoint {args.checkpoint}: its task is in a module; give --env-id {env_id}")
    common.stop_unless("offline_actor" not in checkpoint,
                       f"--checkpoint {args.checkpoint}: of PEX, whose policy chooses between two networks")
    env, task = common.make_env(env_id)
    actor = Actor(task.obs_dim, task.act_dim)
    common.check_facts(args.checkpoint, checkpoint, {
        "env_id": task.env_id, "obs_dim": task.obs_dim, "act_dim": task.act_dim, "hidden": 256,
        "activation": "relu"})
    common.check_network(args.checkpoint, "actor", checkpoint.get("actor"), actor)
    actor.load_state_dict(checkpoint["actor"])
    return env, task, actor.numpy_policy(), checkpoint


def mean_and_interval(values: np.ndarray) -> tuple[float, float]:
    """Mean and half the width of its 95 % interval (Student's t), nan for a single value."""
    n = len(values)
    half = t.ppf(0.975, n - 1) * values.std(ddof=1) / np.sqrt(n) if n > 1 else np.nan
    return float(values.mean()), float(half)


def print_table(results: dict[str, dict[str, np.ndarray]], task: common.Task, cost_limit: float) -> None:
    """One line per policy; normalised scores are DSRL's, a task that DSRL does not have has nan."""
    print(f"{'':12s}{'return':>18s}{'cost':>16s}{'length':>16s}{'normalised return':>19s}{'cost':>7s}"
          f"{'over the limit':>16s}")
    for name, result in results.items():
        cells = [f"{mean:.1f} ± {half:.1f}" for mean, half in (
            mean_and_interval(result[key]) for key in ("return", "cost", "length"))]
        over = 100 * (result["cost"] > cost_limit).mean()
        print(f"{name:12s}{cells[0]:>18s}{cells[1]:>16s}{cells[2]:>16s}"
              f"{task.normalized_return(result['return'].mean()):19.3f}"
              f"{common.normalized_cost(result['cost'].mean(), cost_limit):7.2f}{over:14.0f} %", flush=True)


def record(env: gym.Env, policy: Callable, seed: int, length: int) -> tuple[list[Image.Image], dict]:
    """Play the episode of `seed`, about `length` steps, and keep at most MAX_FRAMES pictures of it."""
    bullet = type(env.unwrapped).__module__.startswith("bullet_safety_gym")
    every, steps, frames = -(-length // MAX_FRAMES), 0, []

    def filmed_policy(obs):
        nonlocal steps
        if steps % every == 0:
            # bullet's env.render() opens a window, and ends the process where there is no display
            frame = Image.fromarray(env.unwrapped.render("rgb_array") if bullet else env.render())
            frame.thumbnail((MAX_SIDE, MAX_SIDE))
            frames.append(frame.quantize(64, dither=Image.Dither.NONE))
        steps += 1
        return policy(obs)

    return frames, common.evaluate(env, filmed_policy, 1, seed)


def rendering_env(env: gym.Env, env_id: str) -> gym.Env | None:
    """The task of `env` with a renderer of pictures, or None if it has none."""
    module = type(env.unwrapped).__module__
    if module.startswith("bullet_safety_gym"):
        return env
    if "rgb_array" not in env.unwrapped.metadata.get("render_modes", []):
        return None
    options = {"render_mode": "rgb_array"}
    if module.startswith("safety_gymnasium"):
        importlib.import_module(f"mujoco.{os.environ['MUJOCO_GL']}")  # a viewer without it fails less quietly
        options |= {"width": 256, "height": 256, "camera_name": "track"}
    spec = gym.registry[env_id.split(":")[-1]]
    kwargs, spec.kwargs = spec.kwargs, spec.kwargs | options
    try:
        return common.make_env(env_id)[0]
    finally:
        spec.kwargs = kwargs


def main(args: Args) -> None:
    if args.episodes < 1 or args.seed < 0:
        common.stop(f"--episodes {args.episodes}, --seed {args.seed}: need at least 1 and 0")
    video = args.video and Path(args.video)
    if video and (video.suffix.lower() != ".gif" or not video.parent.is_dir()):
        common.stop(f"--video {video}: must be a .gif file in a folder that exists")
    # MuJoCo loads the renderer that this names, and not at all without it: it is set for the film only
    renderer = os.environ.pop("MUJOCO_GL", "egl")  # EGL needs no display
    env, task, policy, checkpoint = load_policy(args)
    cost_limit = checkpoint.get("cost_limit") if args.cost_limit is None else args.cost_limit
    if not isinstance(cost_limit, (int, float)) or not 0 <= cost_limit < np.inf:
        common.stop(f"--cost-limit {cost_limit}: must be a number, at least 0")

    # --- Evaluate ---
    run_args = checkpoint.get("args")
    run_seed = run_args.get("seed") if isinstance(run_args, dict) else None
    rng = np.random.default_rng(run_seed if isinstance(run_seed, int) else 0)
    results = {"sampled": common.evaluate(env, lambda obs: policy(obs, rng), args.episodes, args.seed),
               "mean action": common.evaluate(env, policy, args.episodes, args.seed)}
    print(f"{task.env_id}, cost limit {cost_limit:g}, episodes {args.seed} to "
          f"{args.seed + args.episodes - 1}; mean ± 95 % interval")
    print_table(results, task, cost_limit)

    # --- Film ---
    if video:
        os.environ["MUJOCO_GL"] = renderer
        try:
            film_env = rendering_env(env, task.env_id)
            if film_env is None:
                common.stop(f"--video {video}: {task.env_id} has no renderer of pictures (rgb_array)")
            frames, episode = record(film_env, policy, args.seed, int(results["mean action"]["length"][0]))
            part = video.with_name(video.name + ".part")
            frames[0].save(part, "GIF", save_all=True, append_images=frames[1:], duration=FRAME_MS, loop=0)
            part.replace(video)
            film_env.close()
            del film_env
            gc.collect()  # Safety-Gymnasium leaves its viewer open, and at exit it could no longer be closed
        except Exception as error:  # no EGL, no display, a renderer with a fault of its own, a full disk
            common.stop(f"--video {video}: no picture ({type(error).__name__}: {error!s:.100}); "
                        "for MuJoCo, MUJOCO_GL names the way: egl, osmesa or glfw")
        print(f"{video}: mean-action episode {args.seed}, {len(frames)} pictures of {episode['length'][0]:g} "
              f"steps; return {episode['return'][0]:.1f}, cost {episode['cost'][0]:g}")
    env.close()


if __name__ == "__main__":
    with common.patient_streams():
        main(tyro.cli(Args))
