"""Write a folder for students: the scripts with some bodies taken out, and the grader of those exercises.

  python benchmark/course/make.py --exercises 1 2 4 --output assignment
  python benchmark/course/make.py --exercises 1 2 4 --output assignment --variant 7

The exercises are the bodies between `# exercise N: ...` and `# end of exercise N` in the scripts;
exercises.py has their texts. A variant changes constants and signs in scripts, texts and grader. The folder
holds no solution of its exercises; the pictures `expected_N.png` are drawn with the bodies in place.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
from dataclasses import dataclass
from pathlib import Path

import tyro

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))
import common  # noqa: E402
from benchmark.course.exercises import CPQ, EXERCISES, OFFLINE, ONLINE, constants  # noqa: E402

GIVEN = (
    "common.py",
    "requirements.txt",
    "LICENSE",
    "dsrl_for_py311",
    "datasets/SafetyBallCircle-v0.hdf5",
    "benchmark/tools/curves.py",
)  # what the scripts need to run, and what is looked at afterwards
BODY = r"(?P<mark>^ *# exercise {n}: [^\n]*\n)(?P<body>.*?)(?P<end>^ *# end of exercise {n}\n)"


@dataclass
class Args:
    exercises: tuple[int, ...]
    """numbers of the exercises, as in benchmark/course/README.md"""
    output: str
    """folder to write; must not exist"""
    variant: int = 0
    """0: the scripts' own constants and signs; any other number: others, the same for the same number"""


def one_line(text: str) -> str:
    """The text without line breaks."""
    return " ".join(text.split())


def filled(text: str, values: dict) -> str:
    """The text with every {name} of `values` replaced; other braces stay."""
    return re.sub(r"\{(\w+)\}", lambda found: str(values[found[1]]), text)


def bodies(script: str, number: int) -> list[re.Match]:
    """The marked bodies of an exercise in a script's text, in their order."""
    return list(re.finditer(BODY.format(n=number), script, re.MULTILINE | re.DOTALL))


def varied(texts: dict, numbers: tuple[int, ...], values: dict) -> dict:
    """The texts {name: text} of scripts and exercises with a variant's constants and signs."""
    for number in numbers:
        for old, new in EXERCISES[number].substitutions:
            assert any(old in text for text in texts.values()), f"exercise {number}, in no text: {old}"
            texts = {name: text.replace(old, filled(new, values)) for name, text in texts.items()}
    return texts


def blank(script: str, number: int, tasks: list[str]) -> str:
    """The script with the bodies of an exercise replaced by its task. A function's head stays."""
    coming = iter(tasks)

    def task_of(found: re.Match) -> str:
        head = re.match(r"(?:@[^\n]*\n)*(def .*?\n    \"\"\".*?\"\"\"\n)", found["body"], re.DOTALL)
        indent = re.match(" *", found["end"])[0]
        comment = textwrap.wrap(
            next(coming), 108, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# "
        )
        lines = [*comment, f'{indent}raise NotImplementedError("exercise {number}")']
        return found["mark"] + (head[1] if head else "") + "\n".join(lines) + "\n" + found["end"]

    return re.sub(BODY.format(n=number), task_of, script, flags=re.MULTILINE | re.DOTALL)


def points(number: int) -> int:
    """What the tests of an exercise add up to."""
    return sum(
        map(int, re.findall(r"points\((\d+)\)", (HERE / f"grader/test_exercise_{number}.py").read_text()))
    )


def readme(numbers: tuple[int, ...], texts: dict) -> str:
    """The folder's README.md."""
    parts = [(HERE / "student.md").read_text()]
    for number in numbers:
        exercise = EXERCISES[number]
        files = " and ".join(f"`{path}`" for path in exercise.tasks if path in texts)
        parts.append(f"""
## Exercise {number}: {exercise.title}

{files}, about {exercise.minutes} minutes, {points(number)} points.

{textwrap.fill(texts[f"equations {number}"], 120)}

`pytest -m exercise_{number}` grades it. `python sanity.py {number}` draws `sanity_{number}.png`, to be
compared with `expected_{number}.png`. {exercise.sanity}
""")
    return "".join(parts)


def assignment(numbers: tuple[int, ...], variant: int) -> tuple[dict[str, str], dict[str, str], str]:
    """Scripts {path: text} with all bodies, the same without those of the exercises, and the README."""
    paths = [ONLINE, OFFLINE, *([CPQ] if 7 in numbers else [])]
    texts = {path: (ROOT / path).read_text() for path in paths}
    for number in numbers:
        texts[f"equations {number}"] = one_line(EXERCISES[number].equations)
        for path in set(EXERCISES[number].tasks) & set(paths):
            for k, task in enumerate(EXERCISES[number].tasks[path]):
                texts[f"task {number}.{k} of {path}"] = one_line(task)
    if variant != 0:
        texts = varied(texts, numbers, constants(variant))
    solved = {path: texts[path] for path in paths}
    blanks = dict(solved)
    for number in numbers:
        for path in set(EXERCISES[number].tasks) & set(paths):
            tasks = [texts[f"task {number}.{k} of {path}"] for k in range(len(EXERCISES[number].tasks[path]))]
            blanks[path] = blank(blanks[path], number, tasks)
    return solved, blanks, readme(numbers, texts)


def write(folder: Path, scripts: dict[str, str], text: str, numbers: tuple[int, ...], variant: int) -> None:
    """The folder, with these scripts and this README."""
    for path in GIVEN:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / path).is_dir():
            built = shutil.ignore_patterns("__pycache__", "*.egg-info", "build")
            shutil.copytree(ROOT / path, folder / path, ignore=built)
        else:
            shutil.copy(ROOT / path, folder / path)
    for path, script in scripts.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(script)
    shutil.copy(HERE / "sanity.py", folder)
    (folder / "grader").mkdir()
    for name in "conftest.py", "checks.py", *(f"test_exercise_{number}.py" for number in numbers):
        shutil.copy(HERE / "grader" / name, folder / "grader")
    (folder / "grader/variant.json").write_text(json.dumps(constants(variant), indent=1) + "\n")
    marks = "".join(f"\n    exercise_{number}: {EXERCISES[number].title}" for number in numbers)
    (folder / "pytest.ini").write_text(
        "[pytest]\ntestpaths = grader\npythonpath = . grader benchmark/baselines\n"
        "addopts = --strict-markers --continue-on-collection-errors -q\n"
        f"markers =\n    points: what a test is worth{marks}\n"
    )
    (folder / "README.md").write_text(text)


def main(args: Args) -> None:
    numbers = tuple(sorted(set(args.exercises)))
    common.stop_unless(
        numbers and set(numbers) <= set(EXERCISES),
        f"--exercises takes numbers from 1 to {max(EXERCISES)}, not {args.exercises}",
    )
    output = Path(args.output).absolute()
    common.stop_unless(not os.path.lexists(output), f"{output} exists: remove it, or name another --output")
    common.stop_unless(
        output.parent.is_dir(), f"{output.parent} is not a folder: make it, or name another --output"
    )
    solved, blanks, text = assignment(numbers, args.variant)
    try:
        parent = tempfile.TemporaryDirectory(dir=output.parent)
    except OSError as error:
        common.stop(f"{output.parent}: cannot be written ({error.strerror}); name another --output")
    with parent as work:  # written beside the output and renamed: never half a folder
        answer, given = Path(work) / "answer", Path(work) / "given"
        write(answer, solved, text, numbers, args.variant)
        write(given, blanks, text, numbers, args.variant)
        for number in numbers:
            subprocess.run(
                [sys.executable, "sanity.py", str(number), "--output", given / f"expected_{number}.png"],
                cwd=answer,
                check=True,
            )
        given.rename(output)
    print(
        f"{output}: exercises {', '.join(map(str, numbers))}, variant {args.variant}, "
        f"{sum(map(points, numbers))} points"
    )


if __name__ == "__main__":
    main(tyro.cli(Args))
