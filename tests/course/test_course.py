"""The course folder: blanks fail their own tests, wrong solutions fail with their name, right ones pass."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmark.course import make
from benchmark.course.exercises import CPQ, EXERCISES, OFFLINE, ONLINE, constants

ROOT = Path(__file__).resolve().parents[2]
ALL = tuple(EXERCISES)
VARIANTS = 0, 7


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{variant: folder} of all exercises, with the bodies in place; a test puts other scripts into it."""
    made = {}
    for variant in VARIANTS:
        made[variant] = tmp_path_factory.mktemp("course") / "folder"
        solved, _, text = make.assignment(ALL, variant)
        make.write(made[variant], solved, text, ALL, variant)
    return made


def grade(folder, scripts, *options):
    """(passed tests, {failed test: message}) of the grader on these scripts."""
    for path, script in scripts.items():
        (folder / path).write_text(script)
    (folder / "results.json").unlink(missing_ok=True)
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert run.returncode in (0, 1), run.stdout + run.stderr
    tests = json.loads((folder / "results.json").read_text())["tests"]
    failed = {test["name"]: test["output"] for test in tests if test["status"] != "passed"}
    return {test["name"] for test in tests} - failed.keys(), failed


def graded_number(name):
    """The exercise that a test of results.json belongs to."""
    return int(name.partition(":")[0].removeprefix("test_exercise_"))


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_scripts_own_bodies_get_all_points(folders, variant):
    solved, _, _ = make.assignment(ALL, variant)
    passed, failed = grade(folders[variant], solved)
    assert not failed and {graded_number(name) for name in passed} == set(ALL)
    results = json.loads((folders[variant] / "results.json").read_text())
    assert results["score"] == sum(test["max_score"] for test in results["tests"])
    assert results["score"] == sum(map(make.points, ALL))


@pytest.mark.parametrize("number", ALL)
def test_a_blank_fails_all_of_its_own_tests_and_no_other(folders, number):
    solved, blanks, _ = make.assignment((number,), 0)
    everything, _, _ = make.assignment(ALL, 0)
    passed, failed = grade(folders[0], {**everything, **blanks})
    assert {graded_number(name) for name in failed} == {number}
    assert {graded_number(name) for name in passed} == set(ALL) - {number}
    assert {output.partition(" in ")[0] for output in failed.values()} == {
        f"exercise {number} is still to be written"
    }


def with_bodies(script, number, bodies):
    """A script with other texts between the marks of an exercise, in the order of the file."""
    holes = make.bodies(script, number)
    for hole, body in reversed(list(zip(holes, bodies, strict=True))):
        script = script[: hole.start("body")] + body + script[hole.end("body") :]
    return script


def refilled(blanks, solved, numbers):
    """The blanks with the bodies of the solved scripts."""
    scripts = dict(blanks)
    for number in numbers:
        for path in scripts:
            bodies = [found["body"] for found in make.bodies(solved[path], number)]
            scripts[path] = with_bodies(scripts[path], number, bodies)
    return scripts


@pytest.mark.parametrize("numbers", [ALL, (1, 2, 4), (7,)])
def test_refilled_scripts_are_the_originals_byte_for_byte(numbers):
    solved, blanks, _ = make.assignment(numbers, 0)
    assert set(solved) == ({ONLINE, OFFLINE, CPQ} if 7 in numbers else {ONLINE, OFFLINE})
    for path, script in refilled(blanks, solved, numbers).items():
        assert script == (ROOT / path).read_text()
    assert blanks[ONLINE] != solved[ONLINE] or numbers == (7,)


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_file_that_students_get_has_the_lines_of_a_solution(tmp_path, variant):
    solved, blanks, text = make.assignment(ALL, variant)
    make.write(tmp_path / "folder", blanks, text, ALL, variant)
    given = [path for path in (tmp_path / "folder").rglob("*") if path.suffix in (".py", ".md")]
    assert len(given) > 10
    found = 0
    for number, exercise in EXERCISES.items():
        for path in exercise.tasks:
            for body in make.bodies(solved[path], number):
                for line in map(str.strip, body["body"].split('"""')[-1].splitlines()):
                    if len(line) > 60 and not line.startswith("#"):
                        found += 1
                        assert not [file.name for file in given if line in file.read_text()], line
    assert found > 10
    assert not (tmp_path / "folder/.git").exists()


def test_a_variant_changes_every_exercise_so_that_solutions_of_another_fail(folders):
    solved, blanks, text = make.assignment(ALL, 7)
    public, _, own_text = make.assignment(ALL, 0)
    copied = refilled(blanks, {path: public[path] for path in blanks}, ALL)
    _, failed = grade(folders[7], copied)
    assert {graded_number(name) for name in failed} == set(ALL)
    assert text != own_text and make.assignment(ALL, 7) == (solved, blanks, text)
    for variant in range(1, 200):
        assert not {
            name
            for name, value in constants(variant).items()
            if value == constants(0)[name] and name != "cost_entropy_sign"
        }


# exercise, what is replaced in its script, by what, and what the grader says
WRONG = {
    "no Jacobian": (1, "(log_normal - log_det_tanh)", "(log_normal)", "lacks the Jacobian of tanh"),
    "Jacobian's sign": (
        1,
        "(log_normal - log_det_tanh)",
        "(log_normal + log_det_tanh)",
        "with the wrong sign",
    ),
    "mean over dimensions": (1, "log_det_tanh).sum(-1)", "log_det_tanh).mean(-1)", "it is their sum"),
    "batch mean": (
        1,
        "log_det_tanh).sum(-1)",
        "log_det_tanh).sum(-1).mean().expand(len(u))",
        "averaged over the batch",
    ),
    "epsilon": (
        1,
        "2 * (math.log(2) - u - F.softplus(-2 * u))",
        "torch.log(1 - u.tanh() ** 2 + 1e-6)",
        "find a form without a difference",
    ),
    "detached sample": (
        1,
        "u = mean + log_std.exp() * noise",
        "u = (mean + log_std.exp() * noise).detach()",
        "the sample has no gradient",
    ),
    "time limit as terminal": (
        2,
        '(1 - batch["terminals"])',
        '(1 - torch.maximum(batch["terminals"], batch["timeouts"]))',
        "treats the time limit as the end",
    ),
    "terminal bootstrapped": (
        2,
        'gamma * (1 - batch["terminals"])',
        "gamma",
        "bootstraps through a terminal",
    ),
    "gradient through targets": (
        2,
        "@torch.no_grad()\ndef soft_targets",
        "def soft_targets",
        "has a gradient",
    ),
    "entropy's sign": (2, "- alpha * log_prob", "+ alpha * log_prob", "entropy term with the wrong sign"),
    "mean of critics": (
        2,
        'reward_value(q_target, batch["next_observations"], next_act)',
        'q_target(batch["next_observations"], next_act).mean(0)',
        "the mean of the two critics",
    ),
    "Qc not cut": (2, "next_qc.clamp(0, largest_cost / (1 - gamma))", "next_qc", "is not cut"),
    "gradients pile up": (
        3,
        "            critic_optimizer.zero_grad()\n            loss.backward()\n"
        "            critic_optimizer.step()\n            follow(q_target, q, args.vpa_tau)",
        "            loss.backward()\n            critic_optimizer.step()\n"
        "            follow(q_target, q, args.vpa_tau)",
        "zero_grad is missing",
    ),
    "online tau": (3, "follow(q_target, q, args.vpa_tau)", "follow(q_target, q, args.tau)", "args.tau"),
    "online entropy": (3, "args.gamma, args.vpa_alpha,", "args.gamma, args.alpha,", "--alpha is online's"),
    "no floor of the integral": (
        4,
        "min(max(0.0, self.integral + ki * gradient_steps * error), largest)",
        "min(self.integral + ki * gradient_steps * error, largest)",
        "the integral falls below 0",
    ),
    "negative multiplier": (
        4,
        "self.unit * min(max(0.0, multiplier), largest)",
        "self.unit * min(multiplier, largest)",
        "its floor is 0",
    ),
    "gains not bounded": (
        4,
        "self.gains[k] = min(gain, self.max_growth * first_gain)",
        "self.gains[k] = gain",
        "the gains grow to",
    ),
    "no unwinding": (4, "            self.integral *= factor\n", "", "does not unwind"),
    "error's sign": (
        4,
        "error = (mean_cost - self.target_cost)",
        "error = (self.target_cost - mean_cost)",
        "the wrong way round",
    ),
    "cost's sign": (
        5,
        "- lagrange_multiplier * cost_value",
        "+ lagrange_multiplier * cost_value",
        "rewards the cost",
    ),
    "not divided": (
        5,
        ").mean() / (1 + lagrange_multiplier), log_prob",
        ").mean(), log_prob",
        "is not divided",
    ),
    "log pi with gradient": (
        5,
        "lagrange_multiplier), log_prob.detach()",
        "lagrange_multiplier), log_prob",
        "comes back with a gradient",
    ),
    "mean of ratios": (
        6,
        "(grad_q * grad_qc).sum() / (grad_qc**2).sum().clamp_min(1e-12)",
        "((grad_q * grad_qc).sum(1) / (grad_qc**2).sum(1).clamp_min(1e-12)).mean()",
        "every state's own multiplier",
    ),
    "negative first": (6, "max(0.0, least_squares.item())", "least_squares.item()", "is negative"),
    "log pi detached in the loss": (
        5,
        "(alpha * log_prob - lagrangian)",
        "(alpha * log_prob.detach() - lagrangian)",
        "lacks the entropy's part",
    ),
    "Q cut too": (
        2,
        "- alpha * log_prob\n",
        "- alpha * log_prob\n    next_q = next_q.clamp(0, 20)\n",
        "only Qc has bounds",
    ),
    "reward's terminal bootstrapped": (
        2,
        "discount * next_q,",
        "gamma * next_q,",
        "bootstraps through a terminal",
    ),
    "no discount of Q": (2, "discount * next_q,", '(1 - batch["terminals"]) * next_q,', "lacks the discount"),
    "threshold unsafe": (
        2,
        "(next_qc <= qc_threshold)",
        "(next_qc < qc_threshold)",
        "at the threshold itself",
    ),
    "critics as targets": (
        3,
        "soft_targets(batch, actor, q_target, qc_target, args.gamma, args.vpa_alpha,",
        "soft_targets(batch, actor, q, qc, args.gamma, args.vpa_alpha,",
        "of the critics themselves",
    ),
    "no metrics": (
        3,
        "            loss, metrics = critic_loss(batch, q, qc, *targets)\n"
        "            critic_optimizer.zero_grad()\n            loss.backward()\n"
        "            critic_optimizer.step()\n            follow(q_target, q, args.vpa_tau)",
        "            loss, _ = critic_loss(batch, q, qc, *targets)\n"
        "            critic_optimizer.zero_grad()\n            loss.backward()\n"
        "            critic_optimizer.step()\n            follow(q_target, q, args.vpa_tau)",
        "in `metrics`",
    ),
    "limit for the target": (
        4,
        "(mean_cost - self.target_cost)",
        "(mean_cost - self.cost_limit)",
        "aims at the limit",
    ),
    "errors above 0 only": (
        4,
        "error = (mean_cost - self.target_cost) / self.cost_unit",
        "error = max(0.0, mean_cost - self.target_cost) / self.cost_unit",
        "errors below 0 count",
    ),
    "falling costs count": (
        4,
        "max(0.0, self.cost_ema - self.cost_emas[0])",
        "self.cost_ema - self.cost_emas[0]",
        "only their rise counts",
    ),
    "integral times factor above too": (
        4,
        "            factors = [factor, factor, 1 + rate * min(1.0, std / mean)]\n",
        "            factors = [factor, factor, 1 + rate * min(1.0, std / mean)]\n"
        "            self.integral *= factor\n",
        "below the target only",
    ),
    "average floored": (
        4,
        "(1 - self.ema) * error\n",
        "(1 - self.ema) * error\n        self.error_ema = max(0.0, self.error_ema)\n",
        "may be below 0",
    ),
    "integral cut after use": (
        4,
        "kp * self.error_ema + self.integral + kd * cost_rise",
        "kp * self.error_ema + self.integral + kd * cost_rise + min(0.0, ki * gradient_steps "
        "* error + 1e-9) * (self.integral == 0)",
        "before it was cut",
    ),
    "spread not bounded": (4, "min(1.0, std / mean)", "std / mean", "counts as at most 1"),
    "kd does not return": (
        4,
        "            factors = [factor, factor, factor]\n",
        "            factors = [factor, factor, 1.0]\n",
        "but for kd",
    ),
    "action not detached": (
        6,
        "actor(obs)[0].detach().requires_grad_()",
        "actor(obs)[0]",
        "the actor is frozen",
    ),
    "divided by all pairs": (7, "/ ood.sum().clamp_min(1)", "/ len(ood)", "divided by all pairs"),
    "other states' actions": (
        7,
        "        _, _, kl = vae.encode(obs, act)\n",
        "        _, _, kl = vae.encode(obs, act)\n        obs = obs.flip(0)\n",
        "drawn for other states",
    ),
    "actor learns": (
        7,
        "    with torch.no_grad():\n        act, _ = actor(obs)\n        _, _, kl",
        "    act, _ = actor(obs)\n    with torch.no_grad():\n        _, _, kl",
        "the actor learns",
    ),
    "penalty without gradient": (
        7,
        "cost_value(qc, obs, act))\n",
        "cost_value(qc, obs, act).detach())\n",
        "the penalty has no gradient",
    ),
    "hinge of the mean": (
        7,
        "F.relu(qc_threshold - cost_value(qc, obs, act))",
        "F.relu(qc_threshold - cost_value(qc, obs, act).mean()) + 0 * ood",
        "lets one action pay",
    ),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_a_wrong_solution_fails_and_is_told_why(folders, mistake):
    number, old, new, message = WRONG[mistake]
    scripts, _, _ = make.assignment(ALL, 0)
    wrong = {
        path: scripts[path].replace(old, new) if path in EXERCISES[number].tasks else scripts[path]
        for path in scripts
    }
    assert wrong != scripts
    _, failed = grade(folders[0], wrong, "-m", f"exercise_{number}")
    assert any(message in output for output in failed.values()), failed


RIGHT = {
    1: [
        """\
        normal = torch.distributions.Normal(mean, log_std.exp())
        tanh = torch.distributions.transforms.TanhTransform(cache_size=1)
        policy = torch.distributions.TransformedDistribution(normal, [tanh])
        action = tanh(mean + torch.exp(log_std) * noise)
        return action, policy.log_prob(action).sum(dim=1)
"""
    ],
    2: [
        """\
def soft_targets(batch, actor, q_target, qc_target, gamma, alpha, alpha_cost, largest_cost):
    obs = batch["next_observations"]
    with torch.no_grad():
        sample, density = actor(obs)
        both = q_target(obs, sample)
        value = torch.minimum(both[0], both[1])
        cost = torch.clip(qc_target(obs, sample)[0], min=0, max=largest_cost / (1 - gamma))
        over = batch["terminals"].bool()
        zero = torch.zeros_like(value)
        bootstrap = torch.where(over, zero, value - alpha * density)
        cost_bootstrap = torch.where(over, zero, cost - alpha_cost * density)
    return batch["rewards"] + gamma * bootstrap, batch["costs"] + gamma * cost_bootstrap
"""
    ],
    3: [
        """\
            rows = offline_data.sample(args.batch_size)
            reward_target, cost_target = soft_targets(
                rows, actor, q_target, qc_target, gamma=args.gamma, alpha=args.vpa_alpha,
                alpha_cost=args.vpa_alpha_cost, largest_cost=progress["largest_cost"])
            for parameter in [*q.parameters(), *qc.parameters()]:
                parameter.grad = None
            found, metrics = critic_loss(rows, q, qc, reward_target, cost_target)
            found.backward()
            critic_optimizer.step()
            with torch.no_grad():
                for target, network in ((q_target, q), (qc_target, qc)):
                    for slow, fast in zip(target.parameters(), network.parameters()):
                        slow.copy_((1 - args.vpa_tau) * slow + args.vpa_tau * fast)
"""
    ],
    4: [
        """\
        too_much = (mean_cost - self.target_cost) / self.cost_unit
        bound = self.lagrange_max / self.unit
        self.integral += gradient_steps * ki * too_much
        if self.integral < 0:
            self.integral = 0.0
        if self.integral > bound:
            self.integral = bound
        self.error_ema += (1 - self.ema) * (too_much - self.error_ema)
        self.cost_ema += (1 - self.ema) * (mean_cost / self.cost_unit - self.cost_ema)
        rise = self.cost_ema - list(self.cost_emas)[0]
        terms = kp * self.error_ema + self.integral
        if rise > 0:
            terms += kd * rise
        self.multiplier = self.unit * float(np.clip(terms, 0, bound))
""",
        """\
        if target == 0 and mean == 0:
            f = 1.0
        else:
            f = 1 + rate * (mean - target) / max(mean, target)
        kp, ki, kd = self.gains
        if mean > target:
            new = [f * kp, f * ki, kd + kd * rate * min(1.0, std / mean)]
        else:
            new = [f * kp, f * ki, f * kd]
            self.integral = f * self.integral
        lowest = np.array(self.first_gains)
        self.gains = np.clip(new, lowest, self.max_growth * lowest).tolist()
""",
    ],
    6: [
        """\
        a, _ = actor(obs)
        a = a.detach().clone().requires_grad_(True)
        g = torch.autograd.grad(reward_value(q, obs, a).sum(), [a])[0].double()
        h = torch.autograd.grad(cost_value(qc, obs, a).sum(), [a])[0].double()
        size = float((h * h).mean())
        if size == 0:
            return 0.0, 0.0
        return max(0.0, float((g * h).mean()) / size), math.sqrt(float((g * g).mean()) / size)
""".replace("        ", "    ")
    ],
}


@pytest.mark.parametrize("number", RIGHT)
def test_a_right_solution_in_other_words_gets_all_points(folders, number):
    scripts, _, _ = make.assignment(ALL, 0)
    own = scripts[ONLINE]
    for path in EXERCISES[number].tasks if number == 1 else [ONLINE]:
        scripts[path] = with_bodies(scripts[path], number, RIGHT[number])
    assert scripts[ONLINE] != own
    passed, failed = grade(folders[0], scripts, "-m", f"exercise_{number}")
    assert passed and not failed, failed


BROKEN = {
    "syntax error": ("def soft_targets(", "def soft_targets((", "SyntaxError"),
    "ends the process": (
        "    next_act, log_prob = actor(",
        "    os._exit(0)\n    next_act, log_prob = actor(",
        "did not end",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_results_of_a_script_that_does_not_run_are_zeros_not_those_of_before(folders, kind):
    scripts, _, _ = make.assignment(ALL, 0)
    grade(folders[0], scripts, "-m", "exercise_2")
    old, new, message = BROKEN[kind]
    assert old in scripts[ONLINE]
    (folders[0] / ONLINE).write_text(scripts[ONLINE].replace(old, new))
    subprocess.run([sys.executable, "-m", "pytest", "-m", "exercise_2"], cwd=folders[0], capture_output=True)
    results = json.loads((folders[0] / "results.json").read_text())
    assert results["score"] == 0
    tests = [test for test in results["tests"] if graded_number(test["name"]) == 2]
    assert sum(test["max_score"] for test in tests) == make.points(2)
    assert all(message in test["output"] for test in tests)


def test_an_endless_loop_ends(folders):
    scripts, _, _ = make.assignment(ALL, 0)
    endless = scripts[ONLINE].replace(
        "    next_act, log_prob = actor(", "    while True: pass\n    next_act, log_prob = actor("
    )
    conftest = folders[0] / "grader/conftest.py"
    text = conftest.read_text()
    conftest.write_text(text.replace("SECONDS = 60", "SECONDS = 1"))
    passed, failed = grade(folders[0], {**scripts, ONLINE: endless}, "-m", "exercise_2")
    conftest.write_text(text)
    assert any("an endless loop?" in output for output in failed.values())


def test_the_command_writes_a_folder_whose_pictures_are_drawn_and_whose_blanks_say_so(tmp_path):
    command = [
        sys.executable,
        ROOT / "benchmark/course/make.py",
        "--exercises",
        "5",
        "2",
        "--output",
        "folder",
        "--variant",
        "3",
    ]
    subprocess.run(command, cwd=tmp_path, check=True)
    assert {path.name for path in tmp_path.iterdir()} == {"folder"}
    files = {path.name for path in (tmp_path / "folder").iterdir()}
    assert {
        "README.md",
        "expected_2.png",
        "expected_5.png",
        "sanity.py",
        "pytest.ini",
        ONLINE,
        OFFLINE,
    } <= files
    assert {path.name for path in (tmp_path / "folder/grader").glob("test_*.py")} == {
        "test_exercise_2.py",
        "test_exercise_5.py",
    }
    sanity = subprocess.run(
        [sys.executable, "sanity.py", "2"], cwd=tmp_path / "folder", capture_output=True, text=True
    )
    assert sanity.returncode == 2 and "exercise 2 is still to be written" in sanity.stderr
    assert not (tmp_path / "folder/sanity_2.png").exists()


def test_bad_input_gets_one_line(refusal, tmp_path):
    assert "1 to 7" in refusal(make.main, make.Args(exercises=(8,), output=str(tmp_path / "a")))
    assert "1 to 7" in refusal(make.main, make.Args(exercises=(), output=str(tmp_path / "a")))
    assert "exists" in refusal(make.main, make.Args(exercises=(1,), output=str(tmp_path)))
    assert "not a folder" in refusal(make.main, make.Args(exercises=(1,), output=str(tmp_path / "a/b")))
    assert not list(tmp_path.iterdir())


def test_the_lecturers_page_says_what_the_graders_add_up_to_and_how_many_solutions_are_tried():
    page = (ROOT / "benchmark/course/README.md").read_text()
    rows = dict(re.findall(r"^\| (\d) \|.*\| (\d+) \|$", page, re.MULTILINE))
    assert {int(number): int(worth) for number, worth in rows.items()} == {n: make.points(n) for n in ALL}
    assert (
        f"{len(WRONG)} wrong solutions" in page
        and f"that {['no', 'one', 'two', 'three', 'four', 'five'][len(RIGHT)]}" in page
    )
