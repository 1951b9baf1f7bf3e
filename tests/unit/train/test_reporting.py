"""Reporters: what they throw costs no run."""

import logging
from types import SimpleNamespace

from transformers import TrainerCallback
from transformers.trainer_callback import CallbackHandler, TrainerControl, TrainerState

from llava_saep.train.reporting import GuardedReporter


class Reporter(TrainerCallback):
    """Fails at the second log entry."""

    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(logs)
        if len(self.seen) == 2:
            raise ConnectionError("no route to host")


def test_a_reporter_that_fails_is_named_once_and_not_asked_again(caplog):
    reporter = Reporter()
    handler = CallbackHandler([GuardedReporter(reporter)], None, None, None, None)
    args, state, control = SimpleNamespace(), TrainerState(), TrainerControl()
    with caplog.at_level(logging.WARNING):
        handler.on_train_begin(args, state, control)
        for step in range(4):
            assert handler.on_log(args, state, control, {"loss": step}) is control
    assert reporter.seen == [{"loss": 0}, {"loss": 1}]
    (record,) = [record for record in caplog.records if record.name.startswith("llava_saep")]
    assert "Reporter failed" in record.getMessage() and "no route to host" in record.getMessage()
