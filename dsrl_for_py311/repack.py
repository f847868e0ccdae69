"""Build backend that makes DSRL and Safety-Gymnasium installable on Python 3.10 and 3.11 with plain pip.

Why this folder exists: DSRL 0.1.0 needs exactly Safety-Gymnasium 0.4.0, whose own pins cannot be met on
Python 3.11 (pygame 2.1.0, which it never imports, and mujoco 2.3.0 have no wheels for it), and whose tasks
Python 3.11 refuses to define (arrays as dataclass defaults). So `pip install ./dsrl_for_py311` downloads the
two published wheels, checks their sha256, applies TEXT_EDITS, leaves out DROPPED_PREFIX and packs the rest,
licences included, as one wheel with dependencies that exist. Its mujoco 2.3.3 gives the same trajectories as
2.3.0.
"""

import base64
import hashlib
import io
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

NAME = "dsrl"
VERSION = "0.1.0+py311"  # a version of its own, so that `pip list` shows that it is not the published one

PUBLISHED_SHA256 = {
    "dsrl==0.1.0": "1d2f4b019fb884b29a783e53eb03a765e4f080e809c9055a367beab9b875baea",
    "safety-gymnasium==0.4.0": "7a429483f0a6cd07d3a9bfad66364aa0d528195ef3353f4853399797da8e8f1c",
}

# pybullet and mujoco 2.3.3 have no wheels for Python 3.12 or later
FIRST_PYTHON, FIRST_UNSUPPORTED_PYTHON = (3, 10), (3, 12)
REQUIRES_PYTHON = ">={}.{},<{}.{}".format(*FIRST_PYTHON, *FIRST_UNSUPPORTED_PYTHON)
REQUIRES_DIST = (
    "bullet-safety-gym ==1.4.0",
    "gymnasium ==0.28.1",
    "mujoco ==2.3.3",
    "numpy <2",
    "h5py",
    "tqdm",
    "xmltodict >=0.13.0",
    "pyyaml >=6.0",
    "imageio >=2.27.0",
)

# file -> (text that occurs in it exactly once, its replacement)
TEXT_EDITS = {
    # Python 3.11 takes a dataclass default for mutable when it is not hashable.
    "safety_gymnasium/assets/color.py": (
        "\n}\n",
        """
}


class _HashableArray(np.ndarray):
    __hash__ = object.__hash__


COLOR = {name: rgba.view(_HashableArray) for name, rgba in COLOR.items()}
""",
    ),
    # Each reset of a navigation task decoded this picture of the sky (24 MB of PNGs): 2 s, now 10 ms.
    "safety_gymnasium/configs/assets.yaml": (
        """    '@fileright': star_hd.right.png
    '@fileleft': star_hd.left.png
    '@fileback': star_hd.back.png
    '@filefront': star_hd.front.png
    '@filedown': star_hd.bottom.png
    '@fileup': star_hd.top.png
""",
        """    '@builtin': gradient
    '@rgb1': 0.5 0.6 0.8
    '@rgb2': 0.1 0.1 0.2
    '@width': 64
    '@height': 384
""",
    ),
    # The MetaDrive tasks need the old gym package; without it every `import dsrl` printed a warning.
    "dsrl/__init__.py": ("    import dsrl.offline_metadrive\n", ""),
}
DROPPED_PREFIX = "safety_gymnasium/assets/textures/star_hd."

DIST_INFO = f"{NAME}-{VERSION}.dist-info"
METADATA = "\n".join(
    (
        "Metadata-Version: 2.1",
        f"Name: {NAME}",
        f"Version: {VERSION}",
        f"Summary: {' and '.join(PUBLISHED_SHA256)}, repacked with small edits for Python 3.11",
        "License: Apache-2.0",
        f"Requires-Python: {REQUIRES_PYTHON}",
        *(f"Requires-Dist: {requirement}" for requirement in REQUIRES_DIST),
        "",
    )
)
WHEEL = "Wheel-Version: 1.0\nGenerator: dsrl_for_py311\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


def get_requires_for_build_wheel(config_settings=None):
    """PEP 517 hook: the first one pip calls, and the one place to stop it early on an unsupported Python.

    pip checks Requires-Python only after it has collected, and partly downloaded, every other requirement.
    """
    check_python(sys.version_info)
    return []


def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    """PEP 517 hook: writes the metadata, for which nothing has to be downloaded."""
    folder = Path(metadata_directory, DIST_INFO)
    folder.mkdir()
    (folder / "METADATA").write_text(METADATA, encoding="utf-8")
    (folder / "WHEEL").write_text(WHEEL, encoding="utf-8")
    return DIST_INFO


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    """PEP 517 hook: writes the repacked wheel and returns its file name."""
    files = {f"{DIST_INFO}/METADATA": METADATA.encode(), f"{DIST_INFO}/WHEEL": WHEEL.encode()}
    for requirement, sha256 in PUBLISHED_SHA256.items():
        files.update(contents_to_keep(verified_wheel(requirement, sha256)))
    for name, (old, new) in TEXT_EDITS.items():
        files[name] = edited(name, files[name].decode(), old, new).encode()
    files[f"{DIST_INFO}/RECORD"] = record(files).encode()

    file_name = f"{NAME}-{VERSION}-py3-none-any.whl"
    with zipfile.ZipFile(Path(wheel_directory, file_name), "w", zipfile.ZIP_DEFLATED) as wheel:
        for name, data in files.items():
            entry = zipfile.ZipInfo(name)  # dated 1980, so that the same inputs give the same wheel
            entry.external_attr = 0o100644 << 16
            wheel.writestr(entry, data, zipfile.ZIP_DEFLATED)
    return file_name


def check_python(version):
    if not FIRST_PYTHON <= tuple(version[:2]) < FIRST_UNSUPPORTED_PYTHON:
        found = ".".join(map(str, version[:3]))
        fail(f"this project requires a different Python: {found} not in '{REQUIRES_PYTHON}'")


def download(requirement):
    """Return the bytes of the wheel that pip finds for `requirement`."""
    with tempfile.TemporaryDirectory() as folder:
        options = ["--quiet", "--no-input", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:"]
        run = subprocess.run(
            [sys.executable, "-m", "pip", "download", *options, "--dest", folder, requirement],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        wheels = list(Path(folder).glob("*.whl"))
        if run.returncode != 0 or len(wheels) != 1:
            errors = [line for line in run.stdout.splitlines() if line.startswith("ERROR: ")]
            reason = errors[-1][len("ERROR: ") :] if errors else f"pip exited with {run.returncode}"
            fail(
                f"cannot download {requirement}: {reason} (index options on pip's command line do not reach"
                " this step: set them as PIP_* variables or in pip.conf)"
            )
        return wheels[0].read_bytes()


def verified_wheel(requirement, sha256):
    data = download(requirement)
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        fail(f"refusing {requirement}: the wheel's sha256 is {found}, the published one's is {sha256}")
    return data


def contents_to_keep(wheel):
    """The packages' files, and the licences out of the metadata; the rest of the metadata is written anew."""
    files = {}
    with zipfile.ZipFile(io.BytesIO(wheel)) as archive:
        for item in archive.infolist():
            folder, _, rest = item.filename.partition("/")
            if item.is_dir() or item.filename.startswith(DROPPED_PREFIX):
                continue
            if not folder.endswith(".dist-info"):
                files[item.filename] = archive.read(item)
            elif rest == "LICENSE":
                files[f"{DIST_INFO}/licenses/{folder[: -len('.dist-info')]}/LICENSE"] = archive.read(item)
    return files


def edited(name, text, old, new):
    if text.count(old) != 1:
        fail(f"cannot edit {name}: the text to replace occurs {text.count(old)} times in it instead of once")
    return text.replace(old, new)


def record(files):
    lines = []
    for name, data in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        lines.append(f"{name},sha256={digest},{len(data)}\n")
    return "".join(lines) + f"{DIST_INFO}/RECORD,,\n"


def fail(message):
    """End the build with one line: pip shows a build backend's exceptions with their whole traceback."""
    raise SystemExit(f"dsrl_for_py311: {message}")
