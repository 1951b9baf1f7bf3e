"""What every command line here shares: flags in LLaVA's spellings, and how a program ends."""

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence

from llava_saep.errors import UserError
from projectors import ProjectorError

EXIT_CALLERS_MISTAKE = 2
EXIT_INTERRUPTED = 130
"""128 + SIGINT, what a shell reports for a program that Ctrl-C ended."""
EXIT_BROKEN_PIPE = 141
"""128 + SIGPIPE: whoever read the output (`| head`) has seen enough."""


class AbbreviatingParser(argparse.ArgumentParser):
    """Takes an abbreviation that fits several spellings of one flag (--conv: --conv-mode and --conv_mode)."""

    def _get_option_tuples(self, option_string: str) -> list[tuple]:
        return list({id(match[0]): match for match in super()._get_option_tuples(option_string)}.values())

    def add_flag(self, name: str, **kwargs) -> None:
        """Add a flag, with hyphens and with underscores between its words."""
        self.add_argument(*dict.fromkeys((f"--{name}", f"--{name.replace('-', '_')}")), **kwargs)


def quieten_adapters() -> None:
    """Leave out what peft's loading says to no use here; call it before peft is imported."""
    # It asks transformers by an old name.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing. is deprecated", category=FutureWarning)
    # It imports bitsandbytes, which recommends a kernel on some processors that nothing here would use.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def run_program(name: str, main: Callable[[Sequence[str]], int], argv: Sequence[str]) -> int:
    """Run a program, turning the caller's mistakes into one message.

    Returns:
        the exit code: what `main` returns, 2 for the caller's mistakes, 130 after Ctrl-C.
    """
    quieten_adapters()
    # A projector named as package.module:Class is looked for in the working folder too, as `python -m` would.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        exit_code = main(argv)
        sys.stdout.flush()
        return exit_code
    except (UserError, ProjectorError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return EXIT_CALLERS_MISTAKE
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Python flushes standard output once more at exit, which would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
