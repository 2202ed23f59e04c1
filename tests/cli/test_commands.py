"""The ``geossl`` command: which program runs, and how errors and interruptions end."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import geossl
from geossl import cli
from geossl.errors import ConfigError

ROOT = Path(__file__).parents[2]
SCRIPTS = {"extract": "extract_features", "convert": "convert_checkpoint", "prepare-data": "prepare_data", "fit-gaussians": "fit_gaussians"}


def replace_program(monkeypatch: pytest.MonkeyPatch, main) -> None:
    monkeypatch.setitem(sys.modules, "geossl.cli.doctor", SimpleNamespace(main=main))


def test_arguments_and_exit_code_are_passed_on(monkeypatch):
    seen = []
    replace_program(monkeypatch, lambda argv: seen.append(argv) or 7)
    assert cli.main(["doctor", "--json", "file"]) == 7
    assert seen == [["--json", "file"]]


@pytest.mark.parametrize(("before", "after"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_waiting_threads_sleep_unless_told_otherwise(monkeypatch, before, after):
    monkeypatch.setenv("OMP_WAIT_POLICY", "restored after the test")
    if before is None:
        monkeypatch.delenv("OMP_WAIT_POLICY")
    else:
        monkeypatch.setenv("OMP_WAIT_POLICY", before)
    seen = []
    replace_program(monkeypatch, lambda argv: seen.append(os.environ["OMP_WAIT_POLICY"]) or 0)
    cli.main(["doctor"])
    assert seen == [after]


def test_error_of_the_users_is_one_line(monkeypatch, capsys):
    def fail(argv):
        raise ConfigError("train.steps: expected an integer above 0, got -1")

    replace_program(monkeypatch, fail)
    monkeypatch.delenv("GEOSSL_DEBUG", raising=False)
    assert cli.main(["doctor"]) == 2
    assert capsys.readouterr().err == "geossl doctor: error: train.steps: expected an integer above 0, got -1\n"
    monkeypatch.setenv("GEOSSL_DEBUG", "1")
    assert cli.main(["doctor"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_other_errors_are_not_hidden(monkeypatch):
    def fail(argv):
        raise ZeroDivisionError

    replace_program(monkeypatch, fail)
    with pytest.raises(ZeroDivisionError):
        cli.main(["doctor"])


def test_interruption_ends_without_a_traceback(monkeypatch, capsys):
    def interrupt(argv):
        raise KeyboardInterrupt

    replace_program(monkeypatch, interrupt)
    monkeypatch.delenv("GEOSSL_DEBUG", raising=False)
    assert cli.main(["doctor"]) == 130
    assert capsys.readouterr().err == "geossl doctor: interrupted\n"


def test_unknown_command_gets_a_suggestion(capsys):
    assert cli.main(["pretran"]) == 2
    assert "unknown command 'pretran'; did you mean 'pretrain'?" in capsys.readouterr().err


def test_help_and_version(capsys, monkeypatch):
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {command} " in text for command in cli.COMMANDS)
    monkeypatch.setattr(sys, "argv", ["geossl"])
    assert cli.main() == 2
    capsys.readouterr()
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"geossl {geossl.__version__}\n"


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_a_program_and_a_script(command):
    module = importlib.import_module(f"geossl.cli.{command.replace('-', '_')}")
    assert callable(module.main)
    script = (ROOT / "tools" / f"{SCRIPTS.get(command, command)}.py").read_text(encoding="utf-8")
    assert f'sys.exit(run("{command}", sys.argv[1:]))' in script


@pytest.mark.slow
@pytest.mark.parametrize("command", cli.COMMANDS)
def test_scripts_print_their_help(command):
    script = ROOT / "tools" / f"{SCRIPTS.get(command, command)}.py"
    env = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    ran = subprocess.run([sys.executable, str(script), "--help"], env=env, capture_output=True, text=True, check=True)
    assert len(ran.stdout.splitlines()) > 3
    assert ran.stderr == ""


@pytest.mark.skipif(shutil.which("sh") is None, reason="needs a shell")
def test_reader_that_leaves_early_is_no_error():
    command = f"'{sys.executable}' -m geossl.cli doctor --help; echo $? >&2"
    ran = subprocess.run(["sh", "-c", f"({command}) | true"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "Traceback" not in ran.stderr
    assert "Exception" not in ran.stderr
