"""What value pre-alignment (VPA) does to the critics: both, before and after, against Monte-Carlo values.

  python benchmark/evidence/q_alignment.py               # after evidence.py, which leaves offline policies
  python benchmark/evidence/q_alignment.py --table-only  # table and picture of the CSV files that are there

For every task and seed, VPA is run alone from the offline checkpoint that evidence.py left, with the options
of settings.csv; it ends with the very critics that the seed's Marvel run goes online with. Both
pairs of critics are compared with discounted returns and costs of the frozen offline policy, sampled, from

  dataset   states and actions of the dataset
  random    the same states with uniform actions
  rollouts  states and actions of the policy's own rollouts, after one to ten uniform actions

The first two need the simulator in a state of the dataset, so they are for tasks whose observation tells it:
bullet's Ball tasks and the MuJoCo velocity tasks. A state counts if the simulator, put into it, repeats the
recorded transition; it does not where something is hidden, such as the height of a ball that bounces.

A comparison is one CSV file, results/q_alignment/<task>/seed<k>.csv, a line per state and action; one that
exists is not made again. All files together give q_alignment.md and q_alignment.png.
"""
import csv
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import tyro

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before numpy: a second pool of threads slows both down
import gymnasium as gym  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from scipy import stats  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import common  # noqa: E402
from benchmark.evidence.evidence import SETTINGS, call, finished  # noqa: E402
from marvel_sac_pid import Actor, Critic  # noqa: E402

RESULTS = Path(__file__).parent / "results"
SETS = ("dataset", "random", "rollouts")
COLUMNS = ("monte_carlo_q", "monte_carlo_qc", "q_before", "qc_before", "q_after", "qc_after")
CAPTION = """Made by `python benchmark/evidence/q_alignment.py`.

Critics before → after value pre-alignment against Monte-Carlo values of the frozen offline policy: Spearman's
rank correlation ρ, and the bias, which is the mean of the critic minus that of the Monte-Carlo values. Means
over seeds and half-widths of their 95 % t-interval. *dataset*: states and actions of the dataset; *random*:
the same states with uniform actions; *rollouts*: the policy's own rollouts after one to ten uniform actions.

All values are in the critics' units: discounted sums, rewards times `reward_scale`, costs unscaled. Q after
VPA holds the entropy bonus of VPA (`vpa_alpha` times the policy's entropy in every step), which the returns
do not; its bias is given as it is. A Monte-Carlo value is one sampled rollout through all time limits, cut
after 400 steps (1.8 % of the weight is left at a discount of 0.99), so that its own noise keeps ρ below 1.
"""


@dataclass
class Args:
    env_ids: tuple[str, ...] = (
        "SafetyBallCircle-v0", "SafetyBallRun-v0", "SafetyHalfCheetahVelocityGymnasium-v1")
    """tasks"""
    seeds: tuple[int, ...] = (0, 1, 2)
    """seeds of the offline policies"""
    work_dir: str = "runs/evidence"
    """folder of benchmark/evidence/evidence.py's runs; VPA's go there too, under <task>/vpa/"""
    samples: int = 200
    """states and actions in each set"""
    table_only: bool = False
    """compare nothing, only make table and picture of the files that are there"""


# --- Monte-Carlo values ---
def wind_back(env: gym.Env) -> None:
    """Set the clock of every time limit to 0: critics bootstrap through it, so no rollout may end by it."""
    while env is not env.unwrapped:
        env._elapsed_steps, env = 0, env.env


def monte_carlo(env: gym.Env, task: common.Task, policy: Callable, gamma: float, seed: int,
                episodes: int = 20, tail: int = 400, every: int = 10) -> dict[str, np.ndarray]:
    """Discounted returns and costs that follow states and actions of the simulator, to judge Q-functions by.

    Every rollout starts with one to ten uniform actions, then samples the policy. Recorded are the last of
    those and every `every`-th step after it within the horizon that `tail` steps, half a horizon or the end
    follow. Critics bootstrap through time limits, so the clock is wound back. Float32, (n, ...), unscaled.
    """
    state, rng, horizon, rows = np.random.get_state(), np.random.default_rng(seed), task.max_episode_steps, []
    for k in range(episodes):
        obs, _ = env.reset(seed=20_000 + k)
        steps, prefix = [], int(rng.integers(min(10, horizon // 2)))
        terminated = truncated = False
        while not (terminated or truncated) and len(steps) < horizon + tail:
            wind_back(env)
            start = len(steps) <= prefix
            action = rng.uniform(-1, 1, task.act_dim).astype("f4") if start else policy(obs, rng)
            next_obs, reward, terminated, truncated, info = env.step(action)
            steps.append((obs, action, reward, info["cost"]))
            obs = next_obs
        value = np.zeros(2)
        for t in reversed(range(prefix, len(steps))):
            value = np.array(steps[t][2:], float) + gamma * value
            counts = t < horizon and (terminated or len(steps) - t >= min(tail, horizon // 2))
            if counts and (t - prefix) % every == 0:
                rows.append((*steps[t][:2], *value))
    np.random.set_state(state)
    columns = [np.array(column, np.float32) for column in zip(*rows, strict=True)]
    return dict(zip(("observations", "actions", "returns", "costs"), columns, strict=True))


def set_state(env: gym.Env, obs: np.ndarray) -> bool:
    """Start an episode in the state that `obs` stands for; False for a task whose observation hides it.

    What a Ball task and a velocity task do not show, the ball's turn about its centre and the x (and y) of
    the robot, changes neither next observation, reward nor cost. Only Ant's first reward is a little off
    (0.0003 in the median): it measures its speed from where the torso was one substep earlier.
    """
    env.reset(seed=0)
    sim, obs = env.unwrapped, np.asarray(obs, np.float64)
    if type(sim).__module__.startswith("safety_gymnasium.tasks.safety_velocity"):
        positions = len(obs) - sim.model.nv
        sim.set_state(np.append(np.zeros(sim.model.nq - positions), obs[:positions]), obs[positions:])
        return True
    if not type(sim).__module__.startswith("bullet_safety_gym") or type(sim.agent).__name__ != "Ball":
        return False
    ball, height_at_rest = sim.agent.body_id, 0.49999
    sim.bc.resetBasePositionAndOrientation(ball, [*10 * obs[:2], height_at_rest], [0, 0, 0, 1])
    sim.bc.resetBaseVelocity(ball, [*5 * obs[2:4], 0], 10 * obs[4:7])
    if hasattr(sim.task, "old_potential"):  # the reward of Run is the progress since the last state
        sim.task.old_potential = sim.task.calculate_task_potential()
    return True


def repeated(env: gym.Env, data: dict[str, np.ndarray], rows: np.ndarray) -> Iterator[int]:
    """Those `rows` of a dataset whose transition the simulator repeats from the recorded observation."""
    for row in rows:
        if set_state(env, data["observations"][row]):
            next_obs = env.step(data["actions"][row])[0]
            if np.abs(next_obs - data["next_observations"][row]).max() < 2e-4:
                yield row


def follow(env: gym.Env, policy: Callable, gamma: float, seed: int, observations: np.ndarray,
           actions: np.ndarray, tail: int = 400) -> dict[str, np.ndarray]:
    """Discounted return and cost of one rollout per row: from its state, its action, then the policy's.

    observations (n, obs_dim), actions (n, act_dim); the same fields as of `monte_carlo`.
    """
    rng, values = np.random.default_rng(seed), np.zeros((len(actions), 2))
    for k, action in enumerate(actions):
        set_state(env, observations[k])
        terminated, step = False, 0
        while not terminated and step < tail:
            wind_back(env)
            obs, reward, terminated, _, info = env.step(action)
            values[k] += gamma**step * np.array([reward, info["cost"]])
            action, step = policy(obs.astype(np.float32), rng), step + 1
    return dict(observations=observations, actions=actions, returns=values[:, 0], costs=values[:, 1])


# --- Comparison of one run ---
def critic_values(checkpoint: dict, samples: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Q (the smaller of two) and Qc of a checkpoint at the samples' states and actions, each (n,)."""
    obs, act = (torch.as_tensor(samples[key]) for key in ("observations", "actions"))
    q, qc = Critic(2, obs.shape[1], act.shape[1]), Critic(1, obs.shape[1], act.shape[1])
    q.load_state_dict(checkpoint["q"])
    qc.load_state_dict(checkpoint["qc"])
    with torch.no_grad():
        return q(obs, act).amin(0).numpy(), qc(obs, act).mean(0).numpy()


def alignment(values: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """Spearman's rank correlation (nan if either is constant) and bias of values against true ones, (n,)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.ConstantInputWarning)
        return float(stats.spearmanr(values, truth).statistic), float(np.mean(values) - np.mean(truth))


def compare(offline: dict, aligned: dict, seed: int, n: int) -> list[dict]:
    """The rows of a run's CSV file: about n per set, critics before and after VPA, Monte-Carlo values.

    `draw` counts the dataset's states that were tried up to this one, those that do not count included.
    """
    env, task = common.make_env(offline["env_id"])
    actor = Actor(task.obs_dim, task.act_dim)
    actor.load_state_dict(offline["actor"])
    policy, gamma, scale = actor.numpy_policy(), offline["gamma"], offline["reward_scale"]
    rng, state, draws, sets = np.random.default_rng(seed), np.random.get_state(), {}, {}
    env.reset(seed=0)
    if set_state(env, np.zeros(task.obs_dim)):
        file = common.find_dataset(task, offline["args"]["dataset_path"])
        data = {key: value.numpy() for key, value in common.read_dataset(file, task).items()}
        tried = rng.permutation(len(data["rewards"]))[: 20 * n]
        rows = [row for row, _ in zip(repeated(env, data, tried), range(n), strict=False)]
        if not rows:
            common.stop(f"{file}: the simulator of {task.env_id} repeats none of its transitions")
        obs, actions = data["observations"][rows], data["actions"][rows]
        uniform = rng.uniform(-1, 1, actions.shape).astype(np.float32)
        sets["dataset"] = follow(env, policy, gamma, seed, obs, actions)
        sets["random"] = follow(env, policy, gamma, seed, obs, uniform)
        draws["dataset"] = draws["random"] = np.flatnonzero(np.isin(tried, rows)) + 1
    np.random.set_state(state)
    sets["rollouts"] = monte_carlo(env, task, policy, gamma, seed, episodes=max(1, n // 10),
                                   every=max(1, task.max_episode_steps // 10))
    env.close()
    result = []
    for name, samples in sets.items():
        numbers = [scale * samples["returns"], samples["costs"],
                   *critic_values(offline, samples), *critic_values(aligned, samples)]
        draw = draws.get(name, np.arange(len(samples["costs"])) + 1)
        result += [{"set": name, "draw": draw[k]} | {key: f"{column[k]:.5g}" for key, column in
                                                     zip(COLUMNS, numbers, strict=True)}
                   for k in range(len(draw))]
    return result


def result_file(task: str, seed: int) -> Path:
    """The file whose existence says that a comparison is done."""
    return RESULTS / "q_alignment" / task / f"seed{seed}.csv"


def compare_run(task: str, seed: int, work: Path, n: int) -> bool:
    """Run VPA unless it is there, compare, and write the CSV file; False if VPA failed."""
    start, end = (work / task / phase / f"seed{seed}" / "checkpoint.pt" for phase in ("offline", "vpa"))
    offline = common.load_checkpoint(start)
    if not finished(end) or end.stat().st_mtime < start.stat().st_mtime:
        command = ["marvel_sac_pid.py", "--env-id", task, "--seed", str(seed), "--checkpoint", str(start),
                   "--run-dir", str(end.parent), "--overwrite"]
        if offline["args"]["dataset_path"]:
            command += ["--dataset-path", offline["args"]["dataset_path"]]
        command += SETTINGS[task]["online"].split() if task in SETTINGS else []
        command += ["--total-timesteps", "0", "--eval-episodes", "1"]
        status, _, _ = call(command, end.parent / "log.txt")
        if status:
            return False
    rows = compare(offline, common.load_checkpoint(end), seed, n)
    file = result_file(task, seed)
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file.with_suffix(".part"), "w", newline="") as part:
        writer = csv.DictWriter(part, ["set", "draw", *COLUMNS], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    file.with_suffix(".part").replace(file)
    print(f"finished {task} seed {seed}", flush=True)
    return True


# --- Table and picture ---
def read_results() -> dict[str, list[dict[str, dict[str, np.ndarray]]]]:
    """Task -> seeds -> set -> columns, of all CSV files."""
    results = {}
    for file in sorted((RESULTS / "q_alignment").glob("*/seed*.csv")):
        rows = list(csv.DictReader(file.read_text().splitlines()))
        results.setdefault(file.parent.name, []).append({
            name: {key: np.array([float(row[key]) for row in rows if row["set"] == name])
                   for key in ("draw", *COLUMNS)}
            for name in SETS if any(row["set"] == name for row in rows)})
    return results


def interval(values: list[float]) -> str:
    """Mean and half-width of the 95 % t-interval over the seeds where the value is defined."""
    x = np.array([value for value in values if np.isfinite(value)])
    if len(x) == 0:
        return "undefined"
    half = f" ± {stats.t.ppf(0.975, len(x) - 1) * stats.sem(x):.2f}" if len(x) > 1 else ""
    return f"{x.mean():.2f}{half}" + (f" ({len(x)} of {len(values)})" if len(x) < len(values) else "")


def table(results: dict[str, list[dict]]) -> str:
    """The text of q_alignment.md."""
    lines, notes = [CAPTION, "| task (seeds) | set | ρ of Q | bias of Q | ρ of Qc | bias of Qc |",
                    "|---|---|---|---|---|---|"], []
    for task, seeds in results.items():
        for name in SETS:
            runs, cells = [run[name] for run in seeds if name in run], [""] * 4
            if runs:
                pairs = {(value, phase): np.array([alignment(run[f"{value}_{phase}"],
                                                             run[f"monte_carlo_{value}"]) for run in runs])
                         for value in ("q", "qc") for phase in ("before", "after")}
                cells = [" → ".join(interval(pairs[value, phase][:, what]) for phase in ("before", "after"))
                         for value in ("q", "qc") for what in (0, 1)]
            else:
                cells[0] = "the observation does not tell the simulator's state"
            lines.append("| " + " | ".join([f"{task} ({len(seeds)})", name, *cells]) + " |")
        draws = [run["dataset"]["draw"] for run in seeds if "dataset" in run]
        if draws:
            notes.append(f"{task} {100 * np.mean([len(draw) / draw.max() for draw in draws]):.0f} %")
    if notes:
        lines += ["", "Share of the dataset's states whose transition the simulator repeats: "
                  + ", ".join(notes) + "."]
    return "\n".join(lines) + "\n"


def picture(results: dict[str, list[dict]]) -> None:
    """A row per task: Q before and after, Qc before and after, against the Monte-Carlo values."""
    figure = Figure(figsize=(12, 3 * len(results)), layout="constrained")
    panels = figure.subplots(len(results), 4, squeeze=False)
    for row, (task, seeds) in zip(panels, results.items(), strict=True):
        for k, (value, phase) in enumerate((v, p) for v in ("q", "qc") for p in ("before", "after")):
            for name, colour in zip(SETS, ("tab:blue", "tab:orange", "tab:green"), strict=True):
                runs = [run[name] for run in seeds if name in run]
                if runs:
                    x, y = (np.concatenate([run[key] for run in runs])
                            for key in (f"monte_carlo_{value}", f"{value}_{phase}"))
                    row[k].scatter(x, y, s=3, alpha=0.4, color=colour, label=name, linewidths=0)
            row[k].axline((0, 0), slope=1, color="k", lw=0.8)
            row[k].set(title=f"{value.capitalize()} {phase} VPA", xlabel="Monte-Carlo value")
            if k % 2:
                row[k].sharey(row[k - 1])
        row[0].set_ylabel(task.removesuffix("Gymnasium-v1").removesuffix("-v0"))
    panels[0, 0].legend(fontsize=8, markerscale=3)
    figure.savefig(RESULTS / "q_alignment.part.png", dpi=90)
    (RESULTS / "q_alignment.part.png").replace(RESULTS / "q_alignment.png")


def main(args: Args) -> None:
    work = Path(args.work_dir).resolve()
    jobs = [(task, seed) for task in args.env_ids for seed in args.seeds
            if not args.table_only and not result_file(task, seed).exists()]
    for task, seed in jobs:
        if not (work / task / "offline" / f"seed{seed}" / "checkpoint.pt").is_file():
            common.stop(
                f"no offline checkpoint of {task}, seed {seed}, in {args.work_dir}; this makes it: "
                f"rm -f benchmark/evidence/results/{task}/offline/seed{seed}.csv && "
                f"python benchmark/evidence/evidence.py "
                f"--methods offline --tasks {task} --seeds {seed} --work-dir {args.work_dir}")
    done = [compare_run(task, seed, work, args.samples) for task, seed in jobs]
    results = read_results()
    if not results:
        common.stop(f"no CSV file under {RESULTS / 'q_alignment'}")
    part = RESULTS / "q_alignment.md.part"
    part.write_text(table(results))
    part.replace(RESULTS / "q_alignment.md")
    picture(results)
    print(table(results))
    raise SystemExit(0 if all(done) else 1)


if __name__ == "__main__":
    main(tyro.cli(Args))
