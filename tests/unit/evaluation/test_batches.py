"""Which questions are answered together: every one once, similar lengths together, smaller ones after one too large."""

import random

import pytest

from llava_saep.evaluation.batches import BatchQueue, batches_of_rank, plan_batches


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 7])
@pytest.mark.parametrize("num_questions", [0, 1, 5, 64])
def test_every_question_is_in_one_batch_of_one_rank(num_questions, num_ranks):
    lengths = random.Random(num_questions).choices(range(5, 900), k=num_questions)
    batches = plan_batches(lengths, 8, num_ranks=num_ranks)
    shares = [batches_of_rank(batches, rank, num_ranks) for rank in range(num_ranks)]
    assert sorted(position for share in shares for batch in share for position in batch) == list(range(num_questions))
    if num_questions >= num_ranks:
        assert all(shares)  # no rank idles while others have several questions


def test_longest_prompts_come_first_and_equal_ones_keep_their_order():
    assert plan_batches([7, 9, 7, 30, 7], 2) == [(3, 1), (0, 2), (4,)]


def test_sorting_leaves_less_padding_than_the_order_of_the_file():
    lengths = random.Random(0).choices(range(5, 900), k=200)

    def padding(batches):
        return sum(max(lengths[i] for i in batch) * len(batch) - sum(lengths[i] for i in batch) for batch in batches)

    in_order = [tuple(range(start, start + 8)) for start in range(0, 200, 8)]
    assert padding(plan_batches(lengths, 8)) < padding(in_order) / 10


def test_batch_that_does_not_fit_is_halved_and_so_are_those_after_it():
    queue = BatchQueue([(0, 1, 2, 3), (4, 5, 6, 7)])
    queue.put_back_halved(queue.take())
    taken = []
    while batch := queue.take():
        taken.append(batch)
    assert taken == [(0, 1), (2, 3), (4, 5), (6, 7)]


def test_batch_with_a_refused_question_is_put_back_one_by_one_and_later_ones_stay_whole():
    queue = BatchQueue([(0, 1, 2), (3, 4, 5)])
    queue.put_back_singly(queue.take())
    assert queue.peek() == (0,)
    assert [queue.take() for _ in range(4)] == [(0,), (1,), (2,), (3, 4, 5)]
