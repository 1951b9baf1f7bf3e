"""`llava-saep eval`: benchmarks, or a question file of one's own; `llava-saep eval doctor` looks for what they need.

Several ranks share the questions when a launcher starts them:
torchrun --nproc_per_node 8 -m llava_saep.commands.evaluate --model-path DIR --task pope,gqa
deepspeed --num_gpus 8 --module llava_saep.commands.evaluate --model-path DIR --task pope,gqa
"""

import os
import sys
from collections.abc import Sequence

from llava_saep.commands.evaluate.question_files import print_evaluation

__all__ = ["main", "print_evaluation"]


def main(argv: Sequence[str]) -> int:
    """Run what the flags ask for; returns the exit code.

    Raises:
        UserError, ProjectorError: a flag, file or model is wrong.
    """
    if argv and argv[0] == "doctor":
        from llava_saep.commands.evaluate import doctor

        return doctor.main(argv[1:])
    from llava_saep.commands.evaluate.flags import check_flags, parser

    arguments = parser().parse_args(argv)
    if arguments.task == "list":
        from llava_saep.commands.evaluate import tasks

        return tasks.print_tasks()
    check_flags(arguments)
    return _on_ranks(lambda: _run(arguments))


def _run(arguments) -> int:
    if arguments.task is None:
        from llava_saep.commands.evaluate import question_files

        return question_files.run(arguments)
    from llava_saep.commands.evaluate import tasks

    return tasks.run(arguments) if arguments.answers is None else tasks.score_answers(arguments)


def _on_ranks(run) -> int:
    """Run on this rank; a mistake that all ranks meet is told by one of them."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return run()
    from llava_saep.errors import UserError
    from llava_saep.evaluation import ranks
    from llava_saep.program import EXIT_CALLERS_MISTAKE
    from llava_saep.train import distributed
    from projectors import ProjectorError

    distributed.quieten_libraries()
    try:
        with ranks.process_group():
            return run()
    except (UserError, ProjectorError) as error:
        if distributed.is_first_of_machine() or isinstance(error, ranks.RankError):
            raise
        ranks.let_others_speak()
        return EXIT_CALLERS_MISTAKE
    finally:
        sys.stdout.flush()
