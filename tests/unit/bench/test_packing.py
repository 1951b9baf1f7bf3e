"""What the packing benchmark says: shares of padding as batches show them, on lengths like LLaVA-1.5's."""

import pytest
import torch

from llava_saep.bench.packing import LLAVA_MIX, compare_batchings, draw_lengths, time_row
from llava_saep.cli import main
from llava_saep.data.collator import ConversationCollator, count_padding
from llava_saep.data.packing import plan_rows

NUM = 20_000


@pytest.fixture(scope="module")
def lengths():
    return draw_lengths(NUM, num_image_tokens=576, max_length=2048, seed=0)


def test_draw_has_the_mixs_shares_and_limits(lengths):
    total = sum(source.thousands for source in LLAVA_MIX.values())
    num_text_only = sum(length < 0 for length in lengths)
    # Three standard deviations of a binomial draw.
    assert num_text_only / NUM == pytest.approx(LLAVA_MIX["ShareGPT"].thousands / total, abs=0.006)
    assert min(length for length in lengths if length > 0) >= 576 + 40
    assert max(map(abs, lengths)) <= 2048
    assert draw_lengths(NUM, num_image_tokens=576, max_length=2048, seed=0) == lengths


def test_shares_are_those_of_batches(lengths):
    """The first rows of a packed epoch, collated: at most 2 % of the tokens may be padding, and none is."""
    sizes = [abs(length) for length in lengths]
    plan = plan_rows(sizes, capacity=2048, seed=0)
    rows = [[{"input_ids": torch.ones(sizes[at]), "labels": torch.ones(sizes[at])} for at in row] for row in plan.rows]
    for padding_free in (True, False):
        collator = ConversationCollator(0, (8, 8), 2048, padding_free=padding_free)
        batches = [collator(rows[start : start + 16]) for start in range(0, 160, 16)]
        share = sum(map(count_padding, batches)) / sum(batch["input_ids"].numel() for batch in batches)
        assert share == 0 if padding_free else share > 0
    shares = compare_batchings(lengths, max_length=2048, batch_size=16, world_size=2, seed=0)
    by_name = {batching.name: batching.padding for batching in shares}
    assert by_name["segments, --packing"] == by_name["segments"] == 0
    assert by_name["padded, --packing"] < by_name["padded, --group_by_modality_length"]


@pytest.mark.parametrize(("num_image_tokens", "most"), [(144, 0.025), (64, 0.01)])
def test_rows_are_full_where_images_take_few_tokens(num_image_tokens, most):
    """576 tokens leave no choice: two or three conversations fill a row, or do not."""
    lengths = draw_lengths(NUM, num_image_tokens=num_image_tokens, max_length=2048, seed=0)
    assert plan_rows([abs(length) for length in lengths], capacity=2048, seed=0).unused_share <= most


def test_row_is_timed_with_a_dense_mask_and_by_segments():
    timings = time_row(num_segments=2, segment_tokens=4, device=torch.device("cpu"), dtype=torch.float32, repeats=1)
    assert [timing.attention for timing in timings] == ["sdpa, a dense mask of the row", "segments"]
    assert all(timing.seconds > 0 for timing in timings)


def test_command_prints_both_tables(capsys):
    assert main("bench packing --num_conversations 300 --segments 2 --segment_tokens 8".split()) == 0
    out = capsys.readouterr().out
    assert "300 conversations" in out
    assert "segments, --packing" in out and "0.0%" in out
    assert "one row of 2 conversations of 8 tokens" in out
