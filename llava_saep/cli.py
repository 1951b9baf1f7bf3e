"""The `llava-saep` command. Each subcommand is a module that is imported only when it is asked for."""

import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from llava_saep.program import EXIT_CALLERS_MISTAKE, run_program


@dataclass(frozen=True)
class Command:
    """A subcommand: `module` holds `main(argv) -> exit code`."""

    module: str
    summary: str


COMMANDS = {
    "train": Command("llava_saep.commands.train", "train a model with LLaVA's flags, through the deepspeed launcher"),
    "chat": Command("llava_saep.commands.chat", "talk in the terminal with any saved model about images"),
    "demo": Command("llava_saep.commands.demo", "the same in a web page: chats, pictures, several models"),
    "serve": Command("llava_saep.commands.serve", "answer programs over HTTP, in the protocol of OpenAI's clients"),
    "eval": Command("llava_saep.commands.evaluate", "answer benchmarks or a file of questions, and score the answers"),
    "compare": Command("llava_saep.commands.compare", "train projectors alike and compare them, or trained models"),
    "projectors": Command("llava_saep.commands.projectors", "list, show, check, measure and document the projectors"),
    "bench": Command(
        "llava_saep.commands.bench", "measure training, packing, generation and interruptions on this machine"
    ),
    "convert": Command(
        "llava_saep.commands.convert", "write a saved model in LLaVA's or llava-hf's format, or in ours; merge, extract"
    ),
    "doctor": Command("llava_saep.commands.doctor", "look for what is known to go wrong with machine and installation"),
}


def usage() -> str:
    """What `llava-saep --help` prints."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name.ljust(width)}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: llava-saep <command> [flags]",
            "",
            "LLaVA with exchangeable projectors: train, evaluate and talk to.",
            "",
            "commands:",
            *lines,
            "",
            "llava-saep <command> --help lists the flags of one of them.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit code: 2 for the caller's mistakes, 130 after Ctrl-C."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] in ("-h", "--help"):
        print(usage())
        return 0
    if arguments and arguments[0] == "--version":
        from llava_saep import __version__

        print(f"llava-saep {__version__}")
        return 0
    if not arguments or arguments[0] not in COMMANDS:
        given = f"unknown command {arguments[0]!r}" if arguments else "a command is missing"
        print(f"{usage()}\n\nllava-saep: {given}; expected one of {', '.join(COMMANDS)}", file=sys.stderr)
        return EXIT_CALLERS_MISTAKE
    return run_command(arguments[0], arguments[1:])


def run_command(name: str, arguments: Sequence[str]) -> int:
    """Import the module of a subcommand and run it, turning the caller's mistakes into one message."""
    return run_program(
        f"llava-saep {name}", lambda argv: importlib.import_module(COMMANDS[name].module).main(argv), arguments
    )


if __name__ == "__main__":
    sys.exit(main())
