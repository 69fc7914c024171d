"""The command line: quick help, one-line errors, and the exit codes."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

from reflectron.engine.files import write_text
from reflectron.tools import cli
from reflectron.tools.commands import doctor
from reflectron.tools.load_config import add_config_arguments

HEAVY = ("torch", "megatron", "transformers", "datasets", "pandas")


def raises(error: BaseException) -> int:
    raise error


@pytest.mark.parametrize(
    "words",
    [["--help"], ["bench", "--help"], *([*command.split(), "--help"] for command in cli.COMMANDS)],
    ids=" ".join,
)
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    script = (
        "import sys\n"
        "from reflectron.tools.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as end: assert end.code == 0, end.code\n"
        f"print('heavy:', *(name for name in {HEAVY} if name in sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, check=True)
    assert "usage: reflectron" in done.stdout
    assert done.stdout.splitlines()[-1] == "heavy:"


def test_every_subcommand_has_a_description_and_every_description_a_subcommand() -> None:
    groups = dict.fromkeys(name.partition(" ")[0] for name in cli.COMMANDS)
    found = [
        f"{group} {word}".strip()
        for group in groups
        for word in importlib.import_module(f"reflectron.tools.commands.{group}").SUBCOMMANDS
    ]
    assert sorted(found) == sorted(cli.COMMANDS)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"reflectron {importlib.metadata.version('reflectron')}\n"


@pytest.mark.parametrize("words", [[], ["trian"], ["bench"], ["bench", "haed"], ["doctor", "--frobnicate"]])
def test_wrong_words_end_with_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(words)
    assert end.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_options_may_stand_between_config_and_overrides() -> None:
    parser = argparse.ArgumentParser()
    add_config_arguments(parser)
    parser.add_argument("--show-config", action="store_true")
    for words in (["run.yaml", "--show-config", "seed=1", "seed=2"], ["run.yaml", "seed=1", "seed=2", "--show-config"]):
        args = parser.parse_intermixed_args(words)
        assert (args.config, args.overrides, args.show_config) == ("run.yaml", ["seed=1", "seed=2"], True)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("seed is 'x', expected integer"), "seed is 'x', expected integer"),
        (FileNotFoundError(2, "No such file or directory", "a.yaml"), "a.yaml: No such file or directory"),
        (OSError(28, "No space left on device"), "No space left on device"),
    ],
)
def test_a_mistake_of_the_user_is_one_line(error: Exception, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.guarded("reflectron train", lambda: raises(error), debug=False) == 2
    assert capsys.readouterr().err == f"reflectron train: error: {line}\n"


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.guarded("reflectron train", lambda: raises(ValueError("no")), debug=True) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("Traceback")
    assert shown.endswith("reflectron train: error: no\n")


def test_the_unexpected_keeps_its_traceback() -> None:
    with pytest.raises(AssertionError):
        cli.guarded("reflectron train", lambda: raises(AssertionError()), debug=False)


def test_a_rename_that_fails_names_what_it_was_to_replace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "target").mkdir()
    assert cli.guarded("x", lambda: write_text(tmp_path / "target", "text"), debug=False) == 2  # type: ignore[arg-type,func-returns-value]
    assert capsys.readouterr().err == f"x: error: {tmp_path / 'target'}: Is a directory\n"


def test_interrupt_while_a_command_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(name: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("importlib.import_module", interrupted)
    assert cli.main(["train", "x.yaml"]) == 130


def test_interrupt_ends_with_130() -> None:
    assert cli.guarded("reflectron train", lambda: raises(KeyboardInterrupt()), debug=False) == 130


def test_a_reader_that_has_gone_is_no_error(tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "from reflectron.tools.cli import guarded\n"
        "def run():\n"
        "    while True: print('row')\n"
        "sys.exit(guarded('reflectron inspect', run, debug=False))\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == b"row\n"
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_doctor_knows_every_required_package() -> None:
    assert set(doctor.requirements()) <= {package.distribution for package in doctor.PACKAGES}


@pytest.mark.parametrize(
    ("package", "accepted", "fault"),
    [
        (doctor.Package("pytest", "pytest", ""), ">=1", None),
        (doctor.Package("pytest", "pytest", ""), "<1", "expected <1"),
        (doctor.Package("no-such-distribution", "no_such", ""), ">=1", "missing"),
        (doctor.Package("no-such-distribution", "no_such", ""), None, "not installed"),
        (
            doctor.Package("pytest", "pytest_broken", ""),
            None,
            "broken: ModuleNotFoundError: No module named 'pytest_broken'",
        ),
    ],
)
def test_doctor_finds_faults(package: doctor.Package, accepted: str | None, fault: str | None) -> None:
    assert doctor.examine(package, accepted)[1] == fault


@pytest.mark.slow
def test_doctor_prints_every_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert all(package.distribution in shown for package in doctor.PACKAGES)
