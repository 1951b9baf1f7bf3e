"""The script that `deepspeed` and `torchrun` start on each rank; LLaVA's scripts know it by this name.

deepspeed llava_saep/train/train_mem.py --deepspeed deepspeed_configs/zero2.json --mm_projector_type saep ...
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):
    # Run as a file: look for packages beside llava_saep and where the user stands (a projector of their own), and not
    # among this folder's modules (config, trainer, ...).
    sys.path[:1] = [str(Path(__file__).resolve().parents[2]), os.getcwd()]

from llava_saep.errors import UserError
from llava_saep.train import distributed
from projectors import ProjectorError

MISTAKE_EXIT_CODE = 2
GRACE_SECONDS = 3.0
"""How long ranks that say nothing stay, since the launcher ends all others as soon as one of them has failed."""


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the command line says.

    Args:
        argv: the arguments without the program; None: those of this process.
    Returns:
        the exit code: 0; 143 if the run was told to stop and can go on; or 2 after a mistake that the user can correct,
        whose message is printed once on each machine, or by the rank that met it alone. Any other failure raises, so
        that the launcher sees this rank fail.
    """
    distributed.configure_logging()
    distributed.quieten_libraries()
    from llava_saep.arguments import parse_arguments
    from llava_saep.train.interruption import STOPPED_EXIT_CODE
    from llava_saep.train.run import RankError, train
    from llava_saep.train.stopping import RunStopped

    try:
        train(parse_arguments(argv))
    except RunStopped:
        return STOPPED_EXIT_CODE
    except (UserError, ProjectorError) as error:
        # Each machine has its launcher, which may end this rank before another machine's has spoken.
        if distributed.is_first_of_machine() or isinstance(error, RankError):
            print(f"error: {error}", file=sys.stderr, flush=True)
        else:
            time.sleep(GRACE_SECONDS)
        return MISTAKE_EXIT_CODE
    finally:
        distributed.leave_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
