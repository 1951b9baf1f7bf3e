"""What going on from earlier turns saves, and how fast an answer is written, in one run on one model.

Each turn of a conversation is answered twice: by an engine that has answered the turns before it, and by one that keeps
nothing and reads the whole conversation anew, images included. Both must write the same.
"""

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from PIL import Image

from llava_saep.generation import AnswerStatistics, Engine, EngineSettings, GenerationOptions, LocalEngine, Predictor
from llava_saep.generation.messages import Message


@dataclass(frozen=True, kw_only=True)
class ChatWorkload:
    """The conversation that is held.

    Args:
        images: shown with the first question.
        questions: one per turn.
        answer_tokens: of each answer, unless the model ends it before.
        num_repeats: how often all is measured.
    """

    images: Sequence[Image.Image]
    questions: Sequence[str]
    answer_tokens: int
    num_repeats: int

    @property
    def options(self) -> GenerationOptions:
        """Greedy decoding."""
        return GenerationOptions(max_new_tokens=self.answer_tokens)


@dataclass
class TurnMeasurement:
    """One turn, as often as it was measured.

    Attributes:
        reused, anew: with and without what earlier turns left.
        tower_runs_reused, tower_runs_anew: of the vision tower, in each repeat.
        num_different: repeats in which the two wrote different answers.
    """

    reused: list[AnswerStatistics] = field(default_factory=list)
    anew: list[AnswerStatistics] = field(default_factory=list)
    tower_runs_reused: list[int] = field(default_factory=list)
    tower_runs_anew: list[int] = field(default_factory=list)
    num_different: int = 0

    @property
    def ratio(self) -> float:
        """Time to the first token with reuse, as a share of that without; of the medians."""
        return median_first_token(self.reused) / median_first_token(self.anew)


@dataclass(frozen=True)
class DecodingMeasurement:
    """How fast answers to the last question are written in one way.

    Attributes:
        is_equal: the answer is that of the first way.
        preparing_seconds: until the engine was ready; compiling is part of it.
    """

    name: str
    answers: tuple[AnswerStatistics, ...]
    is_equal: bool
    preparing_seconds: float

    @property
    def tokens_per_second(self) -> float:
        """The median rate after the first token."""
        return statistics.median(answer.tokens_per_second for answer in self.answers)


def median_first_token(answers: Sequence[AnswerStatistics]) -> float:
    """The median time to the first token, in seconds."""
    return statistics.median(answer.first_token_seconds for answer in answers)


def measure_turns(predictor: Predictor, workload: ChatWorkload) -> list[TurnMeasurement]:
    """Hold the conversation going on from earlier turns, then the same one without, and that again and again."""
    turns = [TurnMeasurement() for _ in workload.questions]
    with count_runs(predictor) as runs:
        for _ in range(workload.num_repeats):
            _hold_conversation(predictor, workload, turns, runs)
    return turns


def measure_decoding(
    predictor: Predictor, workload: ChatWorkload, ways: dict[str, EngineSettings]
) -> Iterator[DecodingMeasurement]:
    """Answer the last question of the conversation in each way; the answers before it are written once."""
    messages = _whole_conversation(predictor, workload)
    expected = None
    for name, settings in ways.items():
        with _timed_engine(predictor, settings) as (engine, seconds):
            _ask(engine, messages, workload.options)  # so that the rates are those of a running engine
            answers = [_ask(engine, messages, workload.options) for _ in range(workload.num_repeats)]
        expected = expected or answers[0][0]
        is_equal = all(text == expected for text, _ in answers)
        yield DecodingMeasurement(name, tuple(answer for _, answer in answers), is_equal, seconds)


@contextmanager
def count_runs(predictor: Predictor) -> Iterator[list[int]]:
    """Count runs of the vision tower in the first element of the list."""
    runs = [0]

    def count(module: object, inputs: object) -> None:
        runs[0] += 1

    hook = predictor.model.model.vision_tower.register_forward_pre_hook(count)
    try:
        yield runs
    finally:
        hook.remove()


def _hold_conversation(
    predictor: Predictor, workload: ChatWorkload, turns: Sequence[TurnMeasurement], runs: list[int]
) -> None:
    # One engine after the other: each has a thread, and each thread OpenMP helpers that spin after their work, on the
    # processors that the other engine would need.
    prompts: list[list[Message]] = []
    texts: list[str] = []
    with _warm_engine(predictor, workload, EngineSettings()) as engine:
        messages: list[Message] = []
        for index, (question, turn) in enumerate(zip(workload.questions, turns, strict=True)):
            messages = [*messages, _question(question, workload.images if index == 0 else [])]
            before = runs[0]
            text, answer = _ask(engine, messages, workload.options)
            turn.reused.append(answer)
            turn.tower_runs_reused.append(runs[0] - before)
            prompts.append(messages)
            texts.append(text)
            messages = [*messages, {"role": "assistant", "content": text}]
    with _warm_engine(predictor, workload, _KEEPING_NOTHING) as forgetful:
        for turn, messages, text in zip(turns, prompts, texts, strict=True):
            before = runs[0]
            text_anew, answer = _ask(forgetful, messages, workload.options)
            turn.anew.append(answer)
            turn.tower_runs_anew.append(runs[0] - before)
            turn.num_different += text != text_anew


@contextmanager
def _warm_engine(predictor: Predictor, workload: ChatWorkload, settings: EngineSettings) -> Iterator[LocalEngine]:
    """An engine whose thread has worked before, since its first work pays for PyTorch's start there."""
    engine = _engine(predictor, settings)
    try:
        engine.use_model(lambda predictor: _read(predictor, workload))
        yield engine
    finally:
        engine.close()


_KEEPING_NOTHING = EngineSettings(max_conversations=0, max_image_bytes=0)


def _engine(predictor: Predictor, settings: EngineSettings) -> LocalEngine:
    return LocalEngine(predictor, model_id="measured", settings=settings)


@contextmanager
def _timed_engine(predictor: Predictor, settings: EngineSettings) -> Iterator[tuple[LocalEngine, float]]:
    start = time.monotonic()
    engine = _engine(predictor, settings)
    try:
        yield engine, time.monotonic() - start
    finally:
        engine.close()


def _question(text: str, images: Sequence[Image.Image]) -> Message:
    parts = [{"type": "image", "image": image} for image in images]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def _ask(engine: Engine, messages: Sequence[Message], options: GenerationOptions) -> tuple[str, AnswerStatistics]:
    answer = engine.stream(messages, options)
    return "".join(answer), answer.statistics


def _read(predictor: Predictor, workload: ChatWorkload) -> None:
    """Answer the first question past all caches."""
    predictor.generate([[_question(workload.questions[0], workload.images)]], GenerationOptions(max_new_tokens=2))


def _whole_conversation(predictor: Predictor, workload: ChatWorkload) -> list[Message]:
    """All turns but the last one's answer."""
    engine = _engine(predictor, EngineSettings())
    messages = [_question(workload.questions[0], workload.images)]
    for question in workload.questions[1:]:
        text, _ = _ask(engine, messages, workload.options)
        messages += [{"role": "assistant", "content": text}, _question(question, [])]
    engine.close()
    return messages
