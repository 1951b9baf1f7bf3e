"""TensorBoard, trackio, wandb and the like: what fails there is said once, and costs no run."""

from __future__ import annotations

import logging
from typing import Any

from transformers import Trainer, TrainerCallback
from transformers.integrations import get_reporting_integration_callbacks

logger = logging.getLogger(__name__)

_EVENTS = frozenset(name for name in vars(TrainerCallback) if name.startswith("on_"))


class GuardedReporter(TrainerCallback):
    """Passes events on to a reporter until one of them fails.

    Args:
        reporter: transformers' callback.
    """

    def __init__(self, reporter: TrainerCallback) -> None:
        self.reporter = reporter
        self._has_failed = False

    def __getattribute__(self, name: str) -> Any:
        if name not in _EVENTS:
            return super().__getattribute__(name)
        return lambda *args, **kwargs: self._pass_on(name, *args, **kwargs)

    def _pass_on(self, event: str, *args: Any, **kwargs: Any) -> None:
        if self._has_failed:
            return
        try:
            getattr(self.reporter, event)(*args, **kwargs)
        except Exception as error:  # whatever a package or its server throws, the run is worth more
            self._has_failed = True
            logger.warning(
                "%s failed and reports nothing from now on; training goes on, trainer_state.json keeps the log. %s: %s",
                type(self.reporter).__name__,
                type(error).__name__,
                error,
            )


def guard_reporters(trainer: Trainer) -> None:
    """Have the run outlive its reporters."""
    for kind in get_reporting_integration_callbacks(trainer.args.report_to):
        reporter = trainer.pop_callback(kind)
        if reporter is not None:
            trainer.add_callback(GuardedReporter(reporter))
