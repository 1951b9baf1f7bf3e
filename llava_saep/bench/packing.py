"""What padding costs, by the order and batching of conversations, and what attention over one long row costs.

Lengths are drawn after LLaVA-1.5's instruction data: how many conversations each of its sources gave is from the paper
(Liu et al., 2023, arXiv 2310.03744, table 7); how long their texts are is a rough estimate, not a count.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import AutoModel, LlamaConfig, PreTrainedModel

from llava_saep.bench.timing import synchronize
from llava_saep.data.packing import plan_rows
from llava_saep.data.sampler import LengthGroupedSampler, padding_share
from llava_saep.model.segment_attention import use_segment_attention

SHORTEST_TEXT, LONGEST_TEXT = 40, 2000


@dataclass(frozen=True)
class Source:
    """A source of conversations.

    Attributes:
        thousands: how many, in thousands.
        mean_text_tokens, spread: of a log-normal distribution; the spread is that of the logarithm.
    """

    thousands: int
    mean_text_tokens: int
    spread: float
    has_image: bool = True


LLAVA_MIX: Mapping[str, Source] = {
    "LLaVA-Instruct": Source(158, 255, 0.4),
    "ShareGPT": Source(40, 1100, 0.8, has_image=False),
    "VQAv2": Source(83, 145, 0.35),
    "GQA": Source(72, 265, 0.4),
    "OKVQA": Source(9, 90, 0.3),
    "OCR-VQA": Source(80, 185, 0.15),
    "A-OKVQA": Source(66, 135, 0.25),
    "TextCaps": Source(22, 125, 0.15),
    "RefCOCO": Source(48, 365, 0.6),
    "Visual Genome": Source(86, 515, 0.25),
}


def draw_lengths(count: int, *, num_image_tokens: int, max_length: int, seed: int) -> list[int]:
    """Draw conversations from the mix -> tokens of each, cut to max_length, negative for text alone."""
    generator = torch.Generator().manual_seed(seed)
    shares = torch.tensor([float(source.thousands) for source in LLAVA_MIX.values()])
    chosen = torch.multinomial(shares, count, replacement=True, generator=generator)
    means = torch.tensor([float(source.mean_text_tokens) for source in LLAVA_MIX.values()])[chosen]
    spreads = torch.tensor([source.spread for source in LLAVA_MIX.values()])[chosen]
    has_image = torch.tensor([source.has_image for source in LLAVA_MIX.values()])[chosen]
    logarithms = means.log() - spreads**2 / 2 + spreads * torch.randn(count, generator=generator)
    texts = logarithms.exp().clamp(SHORTEST_TEXT, LONGEST_TEXT).long()
    lengths = (texts + num_image_tokens * has_image).clamp(max=max_length)
    return torch.where(has_image, lengths, -lengths).tolist()


@dataclass(frozen=True)
class Batching:
    """One way to batch the same conversations.

    Attributes:
        padding: share of all positions that hold no token, in [0, 1).
        num_rows: rows that a batch is made of.
        unused: share of the rows' capacity that stays empty where rows are packed; None where they are not.
    """

    name: str
    padding: float
    num_rows: int
    unused: float | None = None


def compare_batchings(
    lengths: list[int], *, max_length: int, batch_size: int, world_size: int, seed: int
) -> list[Batching]:
    """Plan an epoch each way, as training does.

    Args:
        lengths: tokens of each conversation, negative for text alone.
        batch_size: rows per device and forward pass, padded to the longest of them.
        world_size: devices.
    """
    sizes = [abs(length) for length in lengths]
    in_random_order = _shuffled(sizes, seed)
    grouped = LengthGroupedSampler(lengths, batch_size=batch_size, world_size=world_size, seed=seed)
    plan = plan_rows(sizes, capacity=max_length, seed=seed)
    rows = _shuffled(plan.row_lengths, seed)
    return [
        Batching("padded, in random order", padding_share(in_random_order, batch_size), len(sizes)),
        Batching(
            "padded, --group_by_modality_length", padding_share([sizes[i] for i in grouped], batch_size), len(sizes)
        ),
        Batching("padded, --packing", padding_share(rows, batch_size), len(rows), plan.unused_share),
        Batching("segments", 0.0, len(sizes)),
        Batching("segments, --packing", 0.0, len(rows), plan.unused_share),
    ]


def _shuffled(values: list[int], seed: int) -> list[int]:
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(seed)).tolist()
    return [values[index] for index in order]


# Attention over one long row


@dataclass(frozen=True)
class RowTiming:
    """Seconds of a forward and backward pass over one row: the best of some; on CPU the processor's own time."""

    attention: str
    seconds: float


def time_row(
    *, num_segments: int, segment_tokens: int, device: torch.device, dtype: torch.dtype, repeats: int = 3
) -> list[RowTiming]:
    """Train a Llama of 512 channels and 6 layers on one row of conversations, with a dense mask and by segments."""
    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=6,
        num_attention_heads=8,
        vocab_size=8,
        max_position_embeddings=num_segments * segment_tokens,
        use_cache=False,
    )
    model = AutoModel.from_config(config).to(device, dtype).train()
    row = _row(num_segments, segment_tokens, device, dtype)
    dense = {name: row[name] for name in ("inputs_embeds", "position_ids")}
    model.set_attn_implementation("sdpa")
    dense_seconds = _best_seconds(model, dense, device, repeats)
    use_segment_attention(model)
    segment_seconds = _best_seconds(model, row, device, repeats)
    return [RowTiming("sdpa, a dense mask of the row", dense_seconds), RowTiming("segments", segment_seconds)]


def _row(num_segments: int, segment_tokens: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor | int]:
    boundaries = torch.arange(num_segments + 1, dtype=torch.int32, device=device) * segment_tokens
    return {
        "inputs_embeds": torch.randn(1, num_segments * segment_tokens, 512, device=device, dtype=dtype),
        "position_ids": torch.arange(segment_tokens, device=device).repeat(num_segments)[None],
        "cu_seq_lens_q": boundaries,
        "cu_seq_lens_k": boundaries,
        "max_length_q": segment_tokens,
        "max_length_k": segment_tokens,
    }


def _best_seconds(
    model: PreTrainedModel, inputs: Mapping[str, Tensor | int], device: torch.device, repeats: int
) -> float:
    def step() -> None:
        model(**inputs).last_hidden_state.sum().backward()

    step()
    return min(_seconds(step, device) for _ in range(repeats))


def _seconds(step: Callable[[], None], device: torch.device) -> float:
    read_clock = time.process_time if device.type == "cpu" else time.perf_counter
    synchronize(device)
    started = read_clock()
    step()
    synchronize(device)
    return read_clock() - started
