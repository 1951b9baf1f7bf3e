"""What a log entry says about tokens: all ranks', since the last one, without the time that saving takes."""

import pytest
import torch

from llava_saep.constants import IGNORE_INDEX
from llava_saep.data.collator import ConversationCollator
from llava_saep.train.throughput import Throughput

IMAGE = 99


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def throughput(clock):
    return Throughput(IMAGE, clock)


def sample(num_tokens, num_supervised, num_images=0):
    ids = torch.arange(num_tokens)
    labels = torch.where(ids < num_tokens - num_supervised, IGNORE_INDEX, ids)
    if num_images:
        ids[1 : 1 + num_images] = IMAGE
    return {"input_ids": ids, "labels": labels} | (
        {"pixel_values": torch.zeros(num_images, 3, 8, 8)} if num_images else {}
    )


SAMPLES = [sample(6, 2, num_images=2), sample(4, 3)]


def alone(counts):
    return counts


def test_step_is_counted_by_kind(throughput, clock):
    throughput.start()
    throughput.add([ConversationCollator(0, (8, 8), 10)(SAMPLES), ConversationCollator(0, (8, 8), 10)(SAMPLES[1:])])
    clock.now += 7
    assert throughput.report(alone) == {
        "tokens": 6 + 4 + 4,
        "supervised": 2 + 3 + 3,
        "conversations": 3,
        "images": 2,  # the zero image of the text-only batch is none
        "padding": pytest.approx(2 / 16),
        "tokens_per_second": pytest.approx(14 / 7),
    }


def test_batch_without_padding_has_none(throughput, clock):
    throughput.start()
    throughput.add([ConversationCollator(0, (8, 8), 10, padding_free=True)([SAMPLES])])
    clock.now += 1
    report = throughput.report(alone)
    assert (report["padding"], report["tokens"], report["conversations"]) == (0, 10, 2)


def test_entry_counts_what_came_since_the_last(throughput, clock):
    throughput.start()
    batch = ConversationCollator(0, (8, 8), 10)(SAMPLES)
    for num_steps, seconds in ((3, 5), (1, 2)):
        for _ in range(num_steps):
            throughput.start()
            throughput.add([batch])
        clock.now += seconds
        report = throughput.report(alone)
        assert report["tokens"] == 10 * num_steps
        assert report["tokens_per_second"] == pytest.approx(10 * num_steps / seconds)


def test_ranks_are_added_up(throughput, clock):
    throughput.start()
    throughput.add([ConversationCollator(0, (8, 8), 10)(SAMPLES)])
    clock.now += 1
    report = throughput.report(lambda counts: 4 * counts)
    assert (report["tokens"], report["padding"]) == (40, pytest.approx(2 / 12))


def test_saving_and_evaluating_take_no_time(throughput, clock):
    throughput.start()
    throughput.add([ConversationCollator(0, (8, 8), 10)(SAMPLES)])
    clock.now += 2
    with throughput.paused():
        clock.now += 1000
    assert throughput.report(alone)["tokens_per_second"] == pytest.approx(10 / 2)


def test_nothing_done_is_nothing_reported(throughput):
    assert throughput.report(alone) == {}
    throughput.start()
    assert throughput.report(alone) == {}
