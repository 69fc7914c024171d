"""What a wheel installs is complete: every command answers, and those that read data find it, without the checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from reflectron.tools.cli import COMMANDS
from testkit.places import ROOT

ROOMS = ("engine", "kernels", "tools")

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Installed:
    """The wheel in an environment of its own, which has nothing else but the libraries of this one."""

    wheel: Path
    bin: Path
    folder: Path
    """An empty working directory."""

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        return subprocess.run(
            [str(self.bin / words[0]), *words[1:]], cwd=self.folder, env=environment, capture_output=True, text=True
        )

    def prints(self, *words: str) -> str:
        result = self.run(*words)
        assert result.returncode == 0, result.stderr[-2000:]
        return result.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    # Building writes beside setup.py.
    source = tmp_path_factory.mktemp("source")
    for name in subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", *ROOMS, "setup.py", "README.md", "LICENSE"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines():
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    wheels, offline = tmp_path_factory.mktemp("wheels"), ["--no-deps", "--no-index", "--quiet"]
    subprocess.run([*pip, "wheel", *offline, "--no-build-isolation", "-w", str(wheels), str(source)], check=True)
    (wheel,) = wheels.iterdir()
    home = tmp_path_factory.mktemp("home") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home)], check=True)
    (packages,) = home.glob("lib/python*/site-packages")
    # A folder named in a .pth file is searched; .pth files in it, such as that of an editable install, are not run.
    (packages / "libraries.pth").write_text(f"{sysconfig.get_path('purelib')}\n{sysconfig.get_path('platlib')}\n")
    subprocess.run([*pip, "--python", str(home / "bin/python"), "install", *offline, str(wheel)], check=True)
    return Installed(wheel, home / "bin", tmp_path_factory.mktemp("elsewhere"))


def test_what_is_imported_is_the_wheel(installed: Installed) -> None:
    code = "import reflectron.engine.config, sys; print(reflectron.engine.config.__file__)"
    assert installed.prints("python", "-c", code).startswith(str(installed.bin.parent))


def test_every_file_of_the_rooms_is_in_the_wheel(installed: Installed) -> None:
    listed = subprocess.run(["git", "ls-files", *ROOMS], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    wanted = {f"reflectron/{name}" for name in listed.splitlines() if (ROOT / name).is_file()}
    assert wanted - set(zipfile.ZipFile(installed.wheel).namelist()) == set()


def test_every_command_tells_its_arguments(installed: Installed) -> None:
    code = """
import contextlib, sys
from reflectron.tools import cli
for name in cli.COMMANDS:
    print("#", name, flush=True)
    with contextlib.suppress(SystemExit):
        cli.main([*name.split(), "--help"])
"""
    printed = installed.prints("python", "-c", code)
    for name in COMMANDS:
        assert f"# {name}\nusage: reflectron {name} " in printed


def test_the_doctor_examines_the_machine(installed: Installed) -> None:
    assert "backends: layers" in installed.prints("reflectron", "doctor")


def test_a_layout_is_planned(installed: Installed) -> None:
    shutil.copyfile(ROOT / "examples/recipes/models/codellama-7b.json", installed.folder / "config.json")
    printed = installed.prints("reflectron", "plan", "--model", "config.json", "--gpus", "8", "--gpu", "H100-80GB")
    assert "Not counted" in printed


def test_the_shapes_that_training_is_measured_on_are_there(installed: Installed) -> None:
    """They are read before any work begins, in order, so that the first which is not there is told."""
    shapes = "codellama-7b,codellama-34b,deepseek-coder-33b,missing.json"
    result = installed.run("reflectron", "bench", "train", "--device", "cpu", "--shapes", shapes, "--out", "rows")
    assert result.returncode == 2
    assert "missing.json" in result.stderr


def test_programs_are_judged_in_the_sandbox(installed: Installed, sandbox: str) -> None:
    """Its scripts are copied from where the package is installed."""
    problem = {
        "task_id": "own/0",
        "prompt": "def add(a, b):\n",
        "entry_point": "add",
        "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n",
        "canonical_solution": "    return a + b\n",
    }
    (installed.folder / "problems.jsonl").write_text(json.dumps(problem) + "\n")
    samples = [{"task_id": "own/0", "solution": f"def add(a, b):\n    return a {sign} b\n"} for sign in "+-"]
    (installed.folder / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    words = ("samples.jsonl", "--dataset", "problems.jsonl", "--sandbox", sandbox)
    assert "50.0" in installed.prints("reflectron", "eval", "score", *words)
