"""The command line as its users meet it: real processes, exit statuses, one-line errors."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import esper
from esper.cli.main import main

COMMANDS = ("demo", "evaluate", "serve", "status")


def run(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "esper", *arguments], capture_output=True, text=True, cwd=cwd
    )


def test_version_and_help() -> None:
    version = run("--version")
    assert (version.returncode, version.stdout.strip()) == (
        0,
        f"esper, version {esper.__version__}",
    )
    top = run("--help")
    assert top.returncode == 0
    for command in COMMANDS:
        assert f"\n  {command} " in top.stdout


def test_installed_script_is_the_same_command() -> None:
    script = Path(sys.executable).with_name("esper")
    done = subprocess.run([script, "--version"], capture_output=True, text=True)
    assert done.stdout == run("--version").stdout


@pytest.fixture
def run_here(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int | str | None, str, str]]:
    """Runs the command in this process; returns exit status, stdout and stderr."""

    def call(*arguments: str) -> tuple[int | str | None, str, str]:
        monkeypatch.setattr(sys, "argv", ["esper", *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        return (stop.value.code, *capsys.readouterr())

    return call


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(
    command: str, run_here: Callable[..., tuple[int, str, str]]
) -> None:
    status, said, errors = run_here(command, "-h")
    assert (status, errors) == (0, "")
    assert said.startswith(f"Usage: esper {command} ")


def test_help_and_version_load_no_command() -> None:
    """A group that imported its commands would take seconds to say its version."""
    program = (
        "import sys; from esper.cli.main import main\n"
        "try: main()\nfinally: print([m for m in sys.modules if m.startswith(('esper.tolaria',"
        " 'esper.plane', 'grpc', 'sklearn', 'matplotlib', 'esper.cli.demo'))])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "--help"], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("bogus",), "No such command 'bogus'"),
        (("evaluate",), "Missing argument 'FOLDER'"),
        (("demo", "--epochs", "0"), "0 is not in the range x>=1"),
        (("demo", "--mode", "lazy"), "'lazy' is not one of"),
    ],
)
def test_wrong_use_exits_with_two(
    arguments: tuple[str, ...], words: str, run_here: Callable[..., tuple[int, str, str]]
) -> None:
    status, said, errors = run_here(*arguments)
    assert (status, said) == (2, "")
    assert words in errors


def test_failure_is_one_line_and_exits_with_one(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for arguments in (("evaluate", tmp_path / "none"), ("demo", "--out", tmp_path / "file" / "x")):
        done = run(*arguments)
        assert done.returncode == 1
        assert done.stdout == ""
        assert done.stderr.startswith("esper: ")
        assert done.stderr.count("\n") == 1
