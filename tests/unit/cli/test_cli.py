"""The command itself: help, exit codes, and what an error looks like."""

import os
import subprocess
import sys
import types

import pytest

from llava_saep import cli
from llava_saep.errors import UserError
from projectors import ProjectorError


@pytest.fixture
def command(monkeypatch):
    """Puts a subcommand `probe` in place, whose behaviour the test sets."""

    def install(main):
        module = types.ModuleType("probe_command")
        module.main = main
        monkeypatch.setitem(sys.modules, "probe_command", module)
        monkeypatch.setitem(cli.COMMANDS, "probe", cli.Command("probe_command", "for tests"))

    return install


def raising(error):
    def main(argv):
        raise error

    return main


def test_help_lists_every_command_without_importing_any(monkeypatch, capsys):
    for command in cli.COMMANDS.values():
        monkeypatch.delitem(sys.modules, command.module, raising=False)
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(name in out and command.summary in out for name, command in cli.COMMANDS.items())
    assert not any(command.module in sys.modules for command in cli.COMMANDS.values())


@pytest.mark.parametrize(
    ("argv", "message"),
    [([], "a command is missing"), (["trian"], "unknown command 'trian'; expected one of train, chat")],
)
def test_missing_or_unknown_command_exits_with_2(argv, message, capsys):
    assert cli.main(argv) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("error", [UserError("--seed x is no number"), ProjectorError("--seed x is no number")])
def test_callers_mistake_is_one_line_and_exit_code_2(command, error, capsys):
    command(raising(error))
    assert cli.main(["probe"]) == 2
    assert capsys.readouterr().err == "llava-saep probe: --seed x is no number\n"


def test_interruption_exits_with_130(command, capsys):
    command(raising(KeyboardInterrupt()))
    assert cli.main(["probe"]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_a_reader_that_has_seen_enough_ends_the_command_quietly():
    # As `llava-saep projectors show saep | true`: the reading end is closed before anything is written.
    reading_end, writing_end = os.pipe()
    os.close(reading_end)
    try:
        command = [sys.executable, "-m", "llava_saep.cli", "projectors", "show", "linear"]
        result = subprocess.run(command, stdout=writing_end, stderr=subprocess.PIPE, text=True)
    finally:
        os.close(writing_end)
    assert result.returncode == 141
    assert "Traceback" not in result.stderr and "BrokenPipe" not in result.stderr


def test_own_mistakes_keep_their_traceback(command):
    command(raising(AssertionError("ours")))
    with pytest.raises(AssertionError, match="ours"):
        cli.main(["probe"])


def test_flags_reach_the_command_and_its_exit_code_comes_back(command):
    seen = []
    command(lambda argv: seen.extend(argv) or 7)
    assert cli.main(["probe", "--a", "b"]) == 7
    assert seen == ["--a", "b"]


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_every_command_explains_its_flags(name, capsys):
    try:
        code = cli.main([name, "--help"])
    except SystemExit as exit_:
        code = exit_.code
    assert code in (0, None)
    assert "usage: llava-saep" in capsys.readouterr().out
