"""requirements.txt gives a consistent installation in which every family of tasks runs."""

import hashlib
import importlib
import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest

from dsrl_for_py311 import repack

ROOT = Path(__file__).resolve().parents[2]
IMPORT_NAMES = {"PyYAML": "yaml", "pillow": "PIL", "bullet-safety-gym": "bullet_safety_gym"}


def requirements():
    lines = (line.partition("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines())
    return [line for line in lines if line]


def pins():
    return dict(line.split("==") for line in requirements() if not line.startswith("./"))


def test_every_requirement_is_pinned_and_the_local_one_comes_first():
    # pip prepares requirements in their order: on an unsupported Python the first one stops it at once
    local, *published = requirements()
    assert local == "./dsrl_for_py311"
    assert all(re.fullmatch(r"[\w-]+==[\w.]+", line) for line in published), published


@pytest.mark.parametrize("name", pins())
def test_requirement_is_importable_at_its_pinned_version(name):
    importlib.import_module(IMPORT_NAMES.get(name, name))
    installed = importlib.metadata.version(name).partition("+")[0]  # torch: 2.13.0+cpu, 2.13.0+cu130
    assert installed == pins()[name]


@pytest.mark.parametrize("name", ["dsrl", "safety_gymnasium"])
def test_the_repacked_wheel_is_installed(name):
    module = importlib.import_module(name)
    files = {file.locate().resolve() for file in importlib.metadata.files("dsrl")}
    assert importlib.metadata.version("dsrl") == repack.VERSION
    assert Path(module.__file__).resolve() in files


def test_the_licences_of_both_packages_are_installed():
    files = [str(file) for file in importlib.metadata.files("dsrl") if file.name == "LICENSE"]
    assert sorted(file.split("/")[-2] for file in files) == ["dsrl-0.1.0", "safety_gymnasium-0.4.0"]


def test_pip_check_is_clean():
    check = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True)
    assert check.returncode == 0, check.stdout + check.stderr


def test_import_dsrl_prints_nothing():
    run = subprocess.run([sys.executable, "-c", "import dsrl"], capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("module", "task"),
    [
        ("bullet_safety_gym", "SafetyBallCircle-v0"),
        ("dsrl", "SafetyHalfCheetahVelocityGymnasium-v1"),
        ("dsrl", "SafetyPointGoal1Gymnasium-v0"),
    ],
)
def test_one_task_of_every_family_steps(module, task):
    importlib.import_module(module)
    env = gym.make(task)
    try:
        observation, _ = env.reset(seed=0)
        assert np.isfinite(observation).all()
        for _ in range(5):
            step = env.step(env.action_space.sample())
            assert len(step) == 5
            observation, reward, terminated, truncated, info = step
            assert observation.shape == env.observation_space.shape
            assert np.isfinite(observation).all()
            assert np.isfinite(reward)
            assert np.isfinite(info["cost"])
            assert not (terminated or truncated)
    finally:
        env.close()


def test_a_wheel_with_another_sha256_is_refused_in_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(repack, "download", lambda requirement: b"not the published wheel")
    with pytest.raises(SystemExit) as refusal:
        repack.build_wheel(tmp_path)
    message = str(refusal.value)
    assert "refusing dsrl==0.1.0" in message
    assert hashlib.sha256(b"not the published wheel").hexdigest() in message
    assert repack.PUBLISHED_SHA256["dsrl==0.1.0"] in message
    assert "\n" not in message
    assert not list(tmp_path.iterdir())


def test_a_failed_download_is_reported_in_one_line(monkeypatch):
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(SystemExit) as failure:
        repack.download("dsrl==0.1.0")
    message = str(failure.value)
    assert "cannot download dsrl==0.1.0: No matching distribution found" in message
    assert "\n" not in message


@pytest.mark.parametrize("text", ["", "old old"])
def test_an_edit_that_does_not_fit_is_reported_in_one_line(text):
    with pytest.raises(SystemExit) as failure:
        repack.edited("package/file.py", text, "old", "new")
    assert "cannot edit package/file.py" in str(failure.value)
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize("version", [(3, 9, 18), (3, 12, 1), (3, 14, 0)])
def test_an_unsupported_python_is_reported_in_one_line(version):
    found = ".".join(map(str, version))
    with pytest.raises(SystemExit) as failure:
        repack.check_python(version)
    assert str(failure.value).endswith(f"requires a different Python: {found} not in '>=3.10,<3.12'")


def test_this_python_and_every_supported_one_are_accepted():
    assert repack.get_requires_for_build_wheel() == []
    repack.check_python((3, 10, 0))
    repack.check_python((3, 11, 99))


def test_metadata_says_which_python_and_which_dependencies(tmp_path):
    dist_info = repack.prepare_metadata_for_build_wheel(tmp_path)
    metadata = importlib.metadata.PathDistribution(tmp_path / dist_info).metadata
    assert metadata["Requires-Python"] == ">=3.10,<3.12"
    assert metadata["Version"] == repack.VERSION
    assert set(metadata.get_all("Requires-Dist")) == set(repack.REQUIRES_DIST)
    assert importlib.metadata.metadata("dsrl")["Requires-Python"] == metadata["Requires-Python"]
