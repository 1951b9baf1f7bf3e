"""Answers from replicas, with a replica that answers as the test says: Ray itself is tried in tests/serving."""

import pytest
from PIL import Image

from llava_saep.errors import OverloadedError, UserError
from llava_saep.generation import AnswerStatistics
from llava_saep.serve.replicated import ReplicatedAnswerStream, conversation_key

ray = pytest.importorskip("ray", reason="needs the extra serve")

STATISTICS = AnswerStatistics(
    prompt_tokens=5,
    image_tokens=0,
    cached_tokens=0,
    completion_tokens=2,
    finish_reason="stop",
    waiting_seconds=0.5,
    first_token_seconds=0.1,
    seconds=0.2,
)


class Responses:
    """What a replica sends: exceptions among it are raised."""

    def __init__(self, *items):
        self.items = iter(items)
        self.cancelled = False

    def __iter__(self):
        return self

    def __next__(self):
        item = next(self.items)
        if isinstance(item, Exception):
            raise item
        return item

    def cancel(self):
        self.cancelled = True


@pytest.fixture
def accepted():
    from llava_saep.serve.replica import Accepted

    return Accepted()


def stream_of(*attempts):
    remaining = iter(attempts)
    return ReplicatedAnswerStream(lambda: next(remaining))


def died():
    return ray.exceptions.RayActorError()


def test_pieces_and_statistics_come_from_the_replica(accepted):
    stream = stream_of(Responses(accepted, "hel", "lo", STATISTICS))
    assert list(stream) == ["hel", "lo"]
    assert stream.statistics.prompt_tokens == 5
    assert stream.statistics.waiting_seconds >= 0.5


def test_question_is_put_to_another_replica_where_the_first_died_before_a_word(accepted):
    assert list(stream_of(Responses(died()), Responses(accepted, "hello", STATISTICS))) == ["hello"]
    assert list(stream_of(Responses(accepted, died()), Responses(accepted, "hello", STATISTICS))) == ["hello"]


def test_answer_that_has_begun_is_not_begun_again(accepted):
    stream = stream_of(Responses(accepted, "hel", died()), Responses(accepted, "hello"))
    assert next(stream) == "hel"
    with pytest.raises(RuntimeError, match="is gone"):
        next(stream)
    assert list(stream) == []


def test_answer_that_comes_without_its_end_ends(accepted):
    stream = stream_of(Responses(accepted, "hel"))
    assert list(stream) == ["hel"] and stream.statistics.finish_reason == "cancelled"


def test_question_that_ends_every_replica_is_given_up():
    with pytest.raises(RuntimeError, match="is gone"):
        stream_of(*(Responses(died()) for _ in range(4)))


def test_refusal_is_the_callers_mistake(accepted):
    from llava_saep.serve.replica import Refusal

    with pytest.raises(UserError, match="^too long$"):
        stream_of(Responses(Refusal("too long")))


def test_too_many_questions_are_told_when_to_come_again():
    from ray.serve.exceptions import BackPressureError

    with pytest.raises(OverloadedError) as refusal:
        stream_of(Responses(BackPressureError(num_queued_requests=2, max_queued_requests=2)))
    assert refusal.value.retry_after_seconds > 0


def test_closing_cancels_the_replica_once(accepted):
    responses = Responses(accepted, "hel", "lo")
    stream = stream_of(responses)
    next(stream)
    stream.close()
    stream.close()
    assert responses.cancelled
    assert list(stream) == []
    assert (stream.statistics.finish_reason, stream.statistics.completion_tokens) == ("cancelled", 1)


def test_all_turns_of_a_conversation_have_one_key_and_other_images_another():
    def question(text, colour):
        image = {"type": "image", "image": Image.new("RGB", (4, 4), colour)}
        return {"role": "user", "content": [image, {"type": "text", "text": text}]}

    first = [{"role": "system", "content": "Be brief."}, question("What?", "red")]
    follow_up = [*first, {"role": "assistant", "content": "A."}, {"role": "user", "content": "Why?"}]
    assert conversation_key(first) == conversation_key(follow_up)
    others = [first[1:], [first[0], question("What?", "blue")], [first[0], question("Where?", "red")]]
    assert len({conversation_key(messages) for messages in [first, *others]}) == 4
