"""Tables and pictures from the files that evidence.py left under results/.

  python benchmark/evidence/report.py

Writes results/summary.md, one picture per task that has From Scratch runs, the picture of the Lagrangian
mismatch, and the tables of README.md and of the pages in benchmark/ that stand below a mark:
`<!-- task: methods -->` (all columns), `<!-- narrow task: methods -->` (five), `<!-- equal task: methods -->`
(at equal steps and at equal return), `<!-- offline algorithms -->`, ... Numbers are of the last policy: the
mean over seeds and the half-width of its 95 % t-interval, if there is more than one seed.
"""
import csv
import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from dsrl import infos
from matplotlib.figure import Figure
from scipy import stats

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).parent / "results"
PEER_RESULTS = ROOT / "benchmark/peers/results"
sys.path.insert(0, str(ROOT))
from benchmark.tools.curves import read_metrics  # noqa: E402

PAGES = [ROOT / "README.md", *sorted((ROOT / "benchmark").glob("*.md")), ROOT / "benchmark/peers/README.md"]
COST_LIMIT = 20.0
COLOURS = {"from-scratch": "gray", "warm-start": "orange", "jsrl": "purple", "pex": "brown", "so2": "pink",
           "vpa-dual": "green", "marvel": "blue"}
MISMATCH = {"dual-from-bear-lag": "dual ascent from BEAR-Lag's multiplier", "vpa-dual": "dual ascent from 0",
            "marvel": "aPID, aligned start"}
OFFLINE = {"offline": "offline_pretrain.py", "cpq": "CPQ", "bear-lag": "BEAR-Lag", "bc-safe": "BC-Safe"}
OFFLINE_PARTS = {"offline": "offline_pretrain.py", "cpq": "with CPQ's penalty",
                 "offline-no-imitation": "without imitation", "offline-no-average": "without the average",
                 "offline-one-tau": "Qc's target as slow as Q's",
                 "offline-long": "10,000 updates instead of 4,000"}
# what the summary over tasks may compare, in its colours
OVERALL = {"offline": "black", "marvel": "tab:blue", "marvel-td3": "tab:cyan", "warm-start": "tab:orange",
           "jsrl": "tab:purple", "pex": "tab:brown", "so2": "tab:pink", "rlpd": "tab:olive",
           "from-scratch": "tab:gray"}
PEERS = {"fsrl-theirs": "FSRL's SACLag, its settings", "fsrl-ours": "FSRL's SACLag, ours",
         "omnisafe-theirs": "OmniSafe's SACPID, its settings", "omnisafe-ours": "OmniSafe's SACPID, ours",
         "from-scratch": "From Scratch", "marvel": "Marvel"}
PEER_PANELS = [(x, y) for x in ("env_steps", "cpu_seconds") for y in ("episode_return", "episode_cost")]
UTD = {"utd-0.125": 0.125, "utd-0.25": 0.25, "marvel": 0.5, "utd-1": 1.0}
LIMITS = {"marvel-at-10": 10.0, "marvel": COST_LIMIT, "marvel-at-40": 40.0}


def interval(values: list[float]) -> str:
    """Mean and half-width of the 95 % t-interval over seeds, or how many seeds have a value if not all do."""
    x = np.array(values, float)
    if np.isnan(x).any():
        return f"reached by {np.isfinite(x).sum()} of {len(x)}"
    if len(x) == 1:
        return f"{x[0]:.1f}"
    return f"{x.mean():.1f} ± {stats.t.ppf(0.975, len(x) - 1) * stats.sem(x):.1f}"


def rolling_mean(x: np.ndarray, window: int) -> np.ndarray:
    """Mean of the last `window` entries at every entry, of fewer at the start."""
    sums = np.cumsum(np.concatenate([[0.0], x]))
    k = np.arange(1, len(x) + 1)
    return (sums[k] - sums[np.maximum(k - window, 0)]) / np.minimum(k, window)


def worst_window(run: dict) -> float:
    """The largest mean cost of 20 consecutive episodes, or of all where there are fewer."""
    return float(rolling_mean(run["episode_cost"], 20)[min(20, len(run["episode_cost"])) - 1:].max())


def plateau(runs: list[dict]) -> float:
    """Mean training return over the last quarter of each run's steps, averaged over runs."""
    late = [run["env_steps"] > 0.75 * run["env_steps"][-1] for run in runs]
    return float(np.mean([run["episode_return"][rows].mean() for run, rows in zip(runs, late, strict=True)]))


def steps_to(run: dict, target: float, window: int = 5) -> float:
    """First step at which the last `window` episodes have mean return >= target and mean cost <= limit."""
    good = ((rolling_mean(run["episode_return"], window) >= target)
            & (rolling_mean(run["episode_cost"], window) <= COST_LIMIT))
    good[: window - 1] = False
    return float(run["env_steps"][np.argmax(good)]) if good.any() else float("nan")


def short_name(task: str) -> str:
    """DSRL's name of a task."""
    return re.sub("^Safety|Gymnasium|-v[0-9]+$", "", task)


def normalized(task: str, run: dict) -> tuple[float, float]:
    """The last sampled policy's return, 0 to 1 between DSRL's reference returns, and its cost / limit."""
    name = short_name(task)
    low, high = infos.MIN_EPISODE_REWARD[name], infos.MAX_EPISODE_REWARD[name]
    return (run["eval_sampled_return"][-1] - low) / (high - low), run["eval_sampled_cost"][-1] / COST_LIMIT


def interquartile_mean(*samples: np.ndarray) -> float:
    """The mean of the middle half of all scores (Agarwal et al. 2021)."""
    return float(stats.trim_mean(np.concatenate(samples), 0.25))


def mean_of_all(*samples: np.ndarray) -> float:
    """The mean of all scores."""
    return float(np.concatenate(samples).mean())


def overall_scores(results: dict[str, dict[str, list[dict]]], methods: Iterable[str]) -> dict[str, dict]:
    """Each method over the tasks that have all of them, with as many seeds of a task as all have.

    Of a method: tasks, runs, `over` (runs whose last policy costs more than the limit), and (mean, low, high)
    of the return's interquartile mean and of the cost's mean, which hides no violation. The interval is of a
    bootstrap that draws seeds within every task.
    """
    tasks = [task for task, runs in results.items() if set(methods) <= set(runs)]
    seeds = {task: min(len(results[task][method]) for method in methods) for task in tasks}
    scores = {}
    for method in methods if tasks else ():
        runs = [np.array([normalized(task, run) for run in results[task][method][:seeds[task]]])
                for task in tasks]
        over = sum(int((values[:, 1] > 1).sum()) for values in runs)
        scores[method] = {"tasks": tasks, "runs": sum(seeds.values()), "over": over}
        for k, (what, mean) in enumerate((("return", interquartile_mean), ("cost", mean_of_all))):
            samples = [values[:, k] for values in runs]
            low = high = float("nan")
            if min(seeds.values()) > 1:
                low, high = stats.bootstrap(samples, mean, n_resamples=2000, vectorized=False,
                                            method="percentile", rng=0).confidence_interval
            scores[method][what] = (mean(*samples), low, high)
    return scores


def overall_table(results: dict[str, dict[str, list[dict]]], methods: list[str]) -> list[str]:
    """The summary over tasks."""
    scores = overall_scores(results, methods)
    tasks = ", ".join(short_name(task)
                      for score in list(scores.values())[:1] for task in score["tasks"])
    header = [f"over {tasks} (runs)", "normalised return", "cost / limit", "last policies over the limit"]
    lines = ["", "", "| " + " | ".join(header) + " |", "|" + "---|" * 4]
    for method, score in scores.items():
        cells = []
        for what in ("return", "cost"):
            mean, low, high = score[what]
            cells.append(f"{mean:.2f}" + (f" ({low:.2f} to {high:.2f})" if np.isfinite(low) else ""))
        lines.append(f"| {method} ({score['runs']}) | {' | '.join(cells)} | {score['over']} |")
    return lines + [""]


def overall_picture(results: dict[str, dict[str, list[dict]]], groups: list[list[str]]) -> None:
    """Normalised return against normalised cost of the last policies, a panel per group of methods."""
    groups = [methods for methods in groups if overall_scores(results, methods)]
    if not groups:
        return
    figure = Figure(figsize=(5.5 * len(groups), 3.6), layout="constrained")
    for axes, methods in zip(figure.subplots(1, len(groups), squeeze=False)[0], groups, strict=True):
        for method, score in overall_scores(results, methods).items():
            (x, x_low, x_high), (y, y_low, y_high) = score["cost"], score["return"]
            errors = dict(xerr=[[x - x_low], [x_high - x]], yerr=[[y - y_low], [y_high - y]])
            axes.errorbar(x, y, **errors, fmt="o", color=OVERALL.get(method), capsize=2, lw=1,
                          label=f"{method} ({score['runs']})")
        axes.axvline(1, color="k", ls="--", lw=1)
        names = ", ".join(short_name(task) for task in score["tasks"])
        axes.set(title=names, xlabel="cost / limit (left of the line: safe)", ylabel="normalised return")
        axes.legend(fontsize=8)
    figure.savefig(RESULTS / "overall.png", dpi=100)


def table(task: str, runs: dict[str, list[dict]], methods: Iterable[str] = ()) -> list[str]:
    """The task's rows of summary.md, of all methods or of some."""
    targets = []
    if "from-scratch" in runs:
        targets = [share * plateau(runs["from-scratch"]) for share in (0.9, 0.95)]
    methods = methods or [name for name in runs if "-at-" not in name]  # those have a limit of their own
    lines = [f"### {task}, cost limit {COST_LIMIT:g}", "",
             "| method (seeds) | env steps | sampled return | sampled cost | mean-action return "
             "| mean-action cost | violation regret | episodes over the limit | worst 20-episode cost |"
             + "".join(f" steps to a safe return of {target:.0f} |" for target in targets),
             "|" + "---|" * (9 + len(targets))]
    for method, seeds in ((name, runs[name]) for name in methods if name in runs):
        offline = "episode_cost" not in seeds[0]
        cells = [f"{method} ({len(seeds)})", "0" if offline else f"{seeds[0]['env_steps'][-1]:.0f}"]
        cells += [interval([run[f"eval_{how}_{what}"][-1] for run in seeds])
                  for how in ("sampled", "mean") for what in ("return", "cost")]
        if offline:
            cells += [""] * (3 + len(targets))
        else:
            over = [100 * (run["episode_cost"] > COST_LIMIT).mean() for run in seeds]
            worst = [worst_window(run) for run in seeds]
            cells += [interval([run["violation_regret"][-1] for run in seeds]), interval(over) + " %",
                      interval(worst)]
            cells += [interval([steps_to(run, target) for run in seeds]) for target in targets]
        lines.append("| " + " | ".join(cells) + " |")
    return lines + [""]


def narrow_table(runs: dict[str, list[dict]], methods: Iterable[str]) -> list[str]:
    """Five columns for the first screen."""
    lines = ["", "", "| method (seeds) | env steps | return | cost | violation regret |", "|" + "---|" * 5]
    for method, seeds in ((name, runs[name]) for name in methods if name in runs):
        offline = "episode_cost" not in seeds[0]
        cells = [f"{method} ({len(seeds)})", "0" if offline else f"{seeds[0]['env_steps'][-1]:.0f}"]
        cells += [interval([run[f"eval_sampled_{name}"][-1] for run in seeds]) for name in ("return", "cost")]
        cells.append("" if offline else interval([run["violation_regret"][-1] for run in seeds]))
        lines.append("| " + " | ".join(cells) + " |")
    return lines + [""]


def equal_table(runs: dict[str, list[dict]], methods: Iterable[str]) -> list[str]:
    """Methods at equal environment steps, and each until its first safe return of 95 % of the plateau."""
    seeds_of = {name: runs[name] for name in methods if "episode_cost" in runs.get(name, [{}])[0]}
    steps = min((run["env_steps"][-1] for seeds in seeds_of.values() for run in seeds), default=float("nan"))
    target = 0.95 * plateau(runs["from-scratch"]) if "from-scratch" in runs else float("nan")
    header = ["method (seeds)", f"until step {steps:.0f}: return of the last 20 episodes",
              "violation regret", "episodes over the limit",
              f"until a safe return of {target:.0f}: env steps", "violation regret"]
    lines = ["", "", "| " + " | ".join(header) + " |", "|" + "---|" * 6]
    for name, seeds in seeds_of.items():
        returns, regrets, over, first_steps, first_regrets = [], [], [], [], []
        for run in seeds:
            part = run["env_steps"] <= steps
            returns.append(run["episode_return"][part][-20:].mean())
            regrets.append(run["violation_regret"][part][-1])
            over.append(100 * (run["episode_cost"][part] > COST_LIMIT).mean())
            first = steps_to(run, target)
            first_steps.append(first)
            reached = run["env_steps"] == first
            first_regrets.append(run["violation_regret"][reached][0] if reached.any() else float("nan"))
        cells = [f"{name} ({len(seeds)})", interval(returns), interval(regrets), interval(over) + " %",
                 interval(first_steps), interval(first_regrets)]
        lines.append("| " + " | ".join(cells) + " |")
    return lines + [""]


def offline_table(results: dict[str, dict[str, list[dict]]]) -> list[str]:
    """The offline algorithms beside the dataset's episodes within the limit, where a task has several."""
    lines = ["### Offline algorithms, cost limit 20", "",
             "| task | policy (seeds) | sampled return | sampled cost | mean-action return "
             "| mean-action cost |", "|" + "---|" * 6]
    for task, runs in results.items():
        if len(set(OFFLINE) & set(runs)) < 2 or not (RESULTS / task / "dataset.csv").exists():
            continue
        data = {name: x[0] for name, x in read_metrics(RESULTS / task / "dataset.csv").items()}
        quartiles = f"{data['safe_q25']:.1f}, {data['safe_q50']:.1f}, {data['safe_q75']:.1f}"
        lines.append(f"| {task} | the data's {data['safe_episodes']:.0f} episodes within the limit, quartiles"
                     f" | {quartiles} | {data['safe_mean_cost']:.1f} on average | | |")
        for method, name in OFFLINE.items():
            if method not in runs:
                continue
            cells = [interval([run[f"eval_{how}_{what}"][-1] for run in runs[method]])
                     for how in ("sampled", "mean") for what in ("return", "cost")]
            lines.append(f"| {task} | {name} ({len(runs[method])}) | " + " | ".join(cells) + " |")
    return lines + [""]


def offline_parts_table(results: dict[str, dict[str, list[dict]]]) -> list[str]:
    """What the parts of offline_pretrain.py bring: every seed's last sampled policy."""
    lines = ["### Parts of the offline policy, cost limit 20", "",
             "| task (75th percentile of the data's safe episodes) | policy | return of each seed | cost |",
             "|" + "---|" * 4]
    for task, runs in results.items():
        if not set(OFFLINE_PARTS) - {"offline"} & set(runs):
            continue
        best = read_metrics(RESULTS / task / "dataset.csv")["safe_q75"][0]
        for method, name in OFFLINE_PARTS.items():
            returns = ", ".join(f"{run['eval_sampled_return'][-1]:.0f}" for run in runs.get(method, []))
            costs = ", ".join(f"{run['eval_sampled_cost'][-1]:.1f}" for run in runs.get(method, []))
            if method in runs:
                lines.append(f"| {task} ({best:.0f}) | {name} | {returns} | {costs} |")
    return lines + [""]


def limits_table(results: dict[str, dict[str, list[dict]]]) -> list[str]:
    """Marvel under three limits, each task that was run under all of them."""
    lines = ["### Marvel under other limits", "",
             "| task | limit (seeds) | sampled return | sampled cost | return of the last 20 episodes "
             "| violation regret | episodes over the limit | worst 20-episode cost "
             "| windows of 20 over the limit |",
             "|" + "---|" * 9]
    for task, runs in results.items():
        for method, limit in LIMITS.items() if set(LIMITS) <= set(runs) else ():
            seeds = runs[method]
            windows = [rolling_mean(run["episode_cost"], 20)[19:] for run in seeds]
            over = sum(int((window > limit).sum()) for window in windows)
            cells = [task, f"{limit:g} ({len(seeds)})"]
            cells += [interval([run["eval_sampled_return"][-1] for run in seeds]),
                      interval([run["eval_sampled_cost"][-1] for run in seeds])]
            cells += [interval([run["episode_return"][-20:].mean() for run in seeds]),
                      interval([run["violation_regret"][-1] for run in seeds]),
                      interval([100 * (run["episode_cost"] > limit).mean() for run in seeds]) + " %",
                      interval([window.max() for window in windows]),
                      f"{over} of {sum(map(len, windows))}"]
            lines.append("| " + " | ".join(cells) + " |")
    return lines + [""]


def gradient_steps_table(results: dict[str, dict[str, list[dict]]]) -> list[str]:
    """Marvel with fewer and more gradient steps, against environment steps and CPU seconds."""
    lines = ["### Gradient steps per environment step, cost limit 20", "",
             "| task | gradient steps per environment step (seeds) | sampled return | sampled cost "
             "| violation regret | worst 20-episode cost | CPU seconds |", "|" + "---|" * 7]
    for task, runs in results.items():
        for method, utd in UTD.items() if len(set(UTD) & set(runs)) > 1 else ():
            seeds = runs.get(method, [])
            if not seeds:
                continue
            worst = [worst_window(run) for run in seeds]
            took = [json.loads(file.read_text()) for file in (RESULTS / task / method).glob("seed*.json")]
            # of one processor: where it was not recorded it was another
            seconds = [run["cpu_seconds"] for run in took
                       if not run["resumed"] and run["processor"] != "not recorded"]
            cells = [task, f"{utd:g} ({len(seeds)})",
                     interval([run["eval_sampled_return"][-1] for run in seeds]),
                     interval([run["eval_sampled_cost"][-1] for run in seeds]),
                     interval([run["violation_regret"][-1] for run in seeds]), interval(worst),
                     f"{np.mean(seconds):.0f}" if seconds else ""]
            lines.append("| " + " | ".join(cells) + " |")
    return lines + [""]


def short_runs_table(results: dict[str, dict[str, list[dict]]]) -> list[str]:
    """One line per task that has a single short Marvel run and is not compared with From Scratch."""
    lines = ["### Short runs, one seed, cost limit 20", "",
             "| task | transitions | offline policy: sampled return | cost | Marvel's steps "
             "| sampled return | cost | mean-action return | cost | violation regret "
             "| worst 20-episode cost |",
             "|" + "---|" * 11]
    for task, runs in results.items():
        if compared(runs) or not {"offline", "marvel"} <= set(runs):
            continue
        start, run = runs["offline"][0], runs["marvel"][0]
        worst = rolling_mean(run["episode_cost"], 20)[19:]
        transitions = read_metrics(RESULTS / task / "dataset.csv")["transitions"][0]
        last = [run[f"eval_{how}_{what}"][-1] for how in ("sampled", "mean") for what in ("return", "cost")]
        numbers = [start["eval_sampled_return"][-1], start["eval_sampled_cost"][-1], run["env_steps"][-1],
                   *last, run["violation_regret"][-1]]
        cells = [f"{x:.0f}" if abs(x) >= 100 else f"{x:.1f}" for x in numbers]
        cells.append(f"{worst.max():.1f}" if len(worst) else f"{len(run['episode_cost'])} episodes only")
        lines.append(f"| {task} | {transitions:.0f} | " + " | ".join(cells) + " |")
    return lines + [""]


def average_table(results: dict[str, dict[str, list[dict]]]) -> list[str]:
    """Marvel with and without its policy's average, seed by seed."""
    lines = ["### The average of the policy, cost limit 20", "",
             "| task | policy | violation regret of each seed | worst 20-episode cost "
             "| return of the last 20 episodes |",
             "|" + "---|" * 5]
    for task, runs in results.items():
        for method in ("marvel", "no-average") if {"marvel", "no-average"} <= set(runs) else ():
            regrets = ", ".join(f"{run['violation_regret'][-1]:.0f}" for run in runs[method])
            windows = [rolling_mean(run["episode_cost"], 20)[19:] for run in runs[method]]
            worst = ", ".join(f"{window.max():.1f}" for window in windows)
            returns = ", ".join(f"{run['episode_return'][-20:].mean():.0f}" for run in runs[method])
            lines.append(f"| {task} | {method} | {regrets} | {worst} | {returns} |")
    return lines + [""]


def times_table() -> list[str]:
    """What the runs took, of those that were not interrupted: means over seeds on one processor."""
    lines = ["### What it takes", "",
             "| task | method (runs) | processor | CPU seconds | wall seconds |", "|" + "---|" * 5]
    for folder in sorted({file.parent for file in RESULTS.glob("*/*/seed*.json")}):
        runs = [json.loads(file.read_text()) for file in sorted(folder.glob("seed*.json"))]
        for processor in sorted({run["processor"] for run in runs}):
            took = [run for run in runs if run["processor"] == processor and not run["resumed"]]
            if took:
                cpu, wall = (np.mean([run[f"{kind}_seconds"] for run in took]) for kind in ("cpu", "wall"))
                cells = [folder.parent.name, f"{folder.name} ({len(took)})", processor, f"{cpu:.0f}",
                         f"{wall:.0f}"]
                lines.append("| " + " | ".join(cells) + " |")
    return lines + [""]


def peer_runs() -> dict[str, dict[str, list[dict]]]:
    """Task -> method -> runs of the peers and of ours, with `cpu_seconds` of every episode.

    Ours have the seconds of the whole run only: they are spread evenly over the steps. Marvel's begin with
    those of the offline policy.
    """
    def seconds(task: str, method: str, seed: str) -> float:
        file = RESULTS / task / method / f"{seed}.json"
        took = json.loads(file.read_text()) if file.exists() else {"resumed": True, "processor": ""}
        compares = not took["resumed"] and took["processor"] != "not recorded"  # that was another machine
        return took["cpu_seconds"] if compares else float("nan")

    tasks = {}
    for task in sorted(folder.name for folder in PEER_RESULTS.glob("*")):
        tasks[task] = {}
        for method in PEERS:
            ours = method in ("marvel", "from-scratch")
            runs = []
            for file in sorted(((RESULTS if ours else PEER_RESULTS) / task / method).glob("seed*.csv")):
                run = read_metrics(file)
                if ours:
                    before = seconds(task, "offline", file.stem) if method == "marvel" else 0.0
                    share = run["env_steps"] / run["env_steps"][-1]
                    run["cpu_seconds"] = before + share * seconds(task, method, file.stem)
                runs.append(run)
            if runs:
                tasks[task][method] = runs
    return tasks


def peers_table() -> list[str]:
    """The peers and ours: training episodes in the last tenth of the steps, and what the run took."""
    lines = ["### Peers, cost limit 20", "",
             "| task | method (seeds) | env steps | return in the last tenth of the steps | cost there "
             "| violation regret | CPU seconds |", "|" + "---|" * 7]
    for task, runs in peer_runs().items():
        for method, seeds in runs.items():
            cells = [task, f"{PEERS[method]} ({len(seeds)})", f"{seeds[0]['env_steps'][-1]:.0f}"]
            for what in ("return", "cost"):
                late = [run["env_steps"] > 0.9 * run["env_steps"][-1] for run in seeds]
                cells.append(interval([run[f"episode_{what}"][rows].mean()
                                       for run, rows in zip(seeds, late, strict=True)]))
            regret = [np.maximum(run["episode_cost"] - COST_LIMIT, 0).sum() for run in seeds]
            cells.append("" if method.startswith("omnisafe") else interval(regret))  # it logs means only
            spent = [run["cpu_seconds"][-1] for run in seeds if np.isfinite(run["cpu_seconds"][-1])]
            cells.append(f"{np.mean(spent):.0f}" if spent else "")
            lines.append("| " + " | ".join(cells) + " |")
    return lines + [""]


def peers_picture() -> None:
    """Return and cost against environment steps and against CPU seconds, a row of four panels per task."""
    tasks = peer_runs()
    figure = Figure(figsize=(15, 3.2 * len(tasks)), layout="constrained")
    grid = figure.subplots(len(tasks), len(PEER_PANELS), squeeze=False)
    for (task, runs), panels in zip(tasks.items(), grid, strict=True):
        for method, colour in zip(PEERS, ("red", "orange", "purple", "pink", "gray", "blue"), strict=True):
            for k, run in enumerate(runs.get(method, [])):
                for axes, (x, y) in zip(panels, PEER_PANELS, strict=True):
                    axes.plot(run[x], rolling_mean(run[y], 10), color=f"tab:{colour}", lw=1, alpha=0.7,
                              label=None if k else PEERS[method])
        for axes, (x, y) in zip(panels, PEER_PANELS, strict=True):
            axes.set(title=f"{y.replace('_', ' ')}, {task}", xlabel=x.replace("_", " "))
            if y == "episode_cost":
                axes.axhline(COST_LIMIT, color="k", ls="--", lw=1)
        panels[0].legend(fontsize=7)
    figure.savefig(RESULTS / "peers.png", dpi=100)


def stranger_table() -> list[str]:
    """The runs from imported policies (methods.md), of results/imported/<policy>/seed<k>.csv."""
    lines = ["### A stranger's policy", "",
             "| policy | seed | env steps | sampled return | cost | mean-action return | cost "
             "| violation regret | mean cost of the last 20 episodes "
             "| that mean is above the limit until step |",
             "|" + "---|" * 10]
    for file in sorted((RESULTS / "imported").glob("*/seed*.csv")):
        run = read_metrics(file)
        rolling = rolling_mean(run["episode_cost"], 20)
        above = np.flatnonzero(rolling > COST_LIMIT)
        last = [run[f"eval_{how}_{what}"][-1] for how in ("sampled", "mean") for what in ("return", "cost")]
        numbers = [*last, run["violation_regret"][-1], rolling[-1]]
        cells = [file.parent.name, file.stem[4:], f"{run['env_steps'][-1]:.0f}"]
        cells += [f"{x:.1f}" for x in numbers]
        cells.append(f"{run['env_steps'][above[-1]]:.0f}" if len(above) else "never")
        lines.append("| " + " | ".join(cells) + " |")
    return lines + [""]


def mismatch_picture(results: dict[str, dict[str, list[dict]]]) -> None:
    """The Lagrangian mismatch: multiplier (logarithmic) and cost against steps, three starts on each task."""
    tasks = [task for task, runs in results.items() if "dual-from-bear-lag" in runs]
    figure = Figure(figsize=(9, 3.2 * len(tasks)), layout="constrained")
    for task, (left, right) in zip(tasks, figure.subplots(len(tasks), 2, squeeze=False), strict=True):
        for (method, label), colour in zip(MISMATCH.items(), ("red", "green", "blue"), strict=True):
            for k, run in enumerate(results[task].get(method, [])):
                steps, style = run["env_steps"] / 1000, dict(color=f"tab:{colour}", lw=1, alpha=0.7)
                left.plot(steps, run["lagrange_multiplier"].clip(1e-3), label=None if k else label, **style)
                right.plot(steps, rolling_mean(run["episode_cost"], 10), **style)
        left.set(title=f"Lagrange multiplier, {task}", xlabel="thousand steps", yscale="log")
        right.set(title="episode cost, mean of 10", xlabel="thousand steps")
        right.axhline(COST_LIMIT, color="k", ls="--", lw=1)
        left.legend(fontsize=8)
    figure.savefig(RESULTS / "lagrangian_mismatch.png", dpi=100)


def picture(task: str, runs: dict[str, list[dict]]) -> None:
    """Return and cost (means of 10 episodes) and multiplier: thin lines are seeds, thick ones their mean."""
    figure = Figure(figsize=(13, 3.4), layout="constrained")
    panels = figure.subplots(1, 3)
    for method, colour in COLOURS.items():
        columns = "episode_return", "episode_cost", "lagrange_multiplier"
        for axes, column in zip(panels, columns, strict=True):
            smooth = []
            for run in runs.get(method, []):
                y = run[column] if column == "lagrange_multiplier" else rolling_mean(run[column], 10)
                axes.plot(run["env_steps"] / 1000, y, color=f"tab:{colour}", lw=0.4, alpha=0.5)
                smooth.append(y)
            if smooth:
                n = min(map(len, smooth))
                mean = np.mean([y[:n] for y in smooth], axis=0)
                steps = runs[method][0]["env_steps"][:n] / 1000
                axes.plot(steps, mean, color=f"tab:{colour}", lw=1.8, label=method)
    for axes, title in zip(panels, ("return", "cost", "Lagrange multiplier"), strict=True):
        axes.set(title=f"{title}, {task}" if title == "return" else title, xlabel="thousand steps")
    panels[1].axhline(COST_LIMIT, color="k", ls="--", lw=1)
    panels[2].set_ylim(0, 1.5)
    panels[0].legend(fontsize=8)
    figure.savefig(RESULTS / f"{task}.png", dpi=100)


def read_results() -> dict[str, dict[str, list[dict]]]:
    """Task -> method -> the seeds' metrics, tasks and methods in the order of settings.csv."""
    settings = csv.DictReader((Path(__file__).parent / "settings.csv").open())
    results = {}
    for row in settings:
        files = {name: sorted((RESULTS / row["env_id"] / name).glob("seed*.csv"))
                 for name in row["methods"].split()}
        results[row["env_id"]] = {name: [read_metrics(file) for file in files[name]]
                                  for name in files if files[name]}
    return {task: runs for task, runs in results.items() if runs}


def compared(runs: dict[str, list[dict]]) -> bool:
    """Whether a task has a table of its own: more than a single short run."""
    return "from-scratch" in runs or len(runs.get("marvel", [])) > 1


def summary(results: dict[str, dict[str, list[dict]]]) -> str:
    """The text of summary.md."""
    lines = ["Made by `python benchmark/evidence/report.py`.", ""]
    for task, runs in results.items():
        if compared(runs):
            lines += table(task, runs)
    return "\n".join(lines + offline_table(results) + offline_parts_table(results) + limits_table(results)
                     + average_table(results) + short_runs_table(results) + stranger_table() + times_table())


def overall_marks() -> list[str]:
    """The marks of the pages' summaries over tasks, each group of methods once."""
    texts = "".join(page.read_text() for page in PAGES)
    return list(dict.fromkeys(re.findall(r"<!-- (overall: .+) -->", texts)))


def fill_tables(text: str, results: dict[str, dict[str, list[dict]]]) -> str:
    """A page's text with the tables below its marks made anew."""
    def rows(mark: re.Match) -> str:
        what, _, methods = mark[1].partition(": ")
        kind, _, task = what.partition(" ")
        if what == "offline algorithms":
            lines = offline_table(results)
        elif what == "offline parts":
            lines = offline_parts_table(results)
        elif what == "limits":
            lines = limits_table(results)
        elif what == "short runs":
            lines = short_runs_table(results)
        elif what == "average":
            lines = average_table(results)
        elif what == "times":
            lines = times_table()
        elif what == "peers":
            lines = peers_table()
        elif what == "imported":
            lines = stranger_table()
        elif what == "q_alignment" and (RESULTS / "q_alignment.md").exists():
            text = (RESULTS / "q_alignment.md").read_text().splitlines()
            lines = ["", "", *(line for line in text if line.startswith("|")), ""]
        elif what == "overall":
            lines = overall_table(results, methods.split())
        elif what == "gradient steps":
            lines = gradient_steps_table(results)
        elif kind == "narrow":
            lines = narrow_table(results.get(task, {}), methods.split())
        elif kind == "equal":
            lines = equal_table(results.get(task, {}), methods.split())
        else:
            lines = table(what, results.get(what, {}), methods.split())
        return f"<!-- {mark[1]} -->\n" + "".join(f"{line}\n" for line in lines[2:-1])

    return re.sub(r"<!-- (.+) -->\n(?:\|.*\n)*", rows, text)


def main() -> None:
    results = read_results()
    texts = {RESULTS / "summary.md": summary(results)}
    for page in PAGES:
        texts[page] = fill_tables(page.read_text(), results)
    for file, text in texts.items():
        part = file.with_name(file.name + ".part")
        part.write_text(text)
        part.replace(file)
    for task, runs in results.items():
        if compared(runs):
            picture(task, runs)
    if peer_runs():
        peers_picture()
    overall_picture(results, [re.split(r"[ :]+", mark)[1:] for mark in overall_marks()])
    if any("dual-from-bear-lag" in runs for runs in results.values()):
        mismatch_picture(results)
    print(summary(results))


if __name__ == "__main__":
    main()
