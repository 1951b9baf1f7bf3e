"""The measurements of `llava-saep bench training` as tables of at most 100 columns, where the names allow it."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llava_saep.commands.projectors.report_lines import Table, report_lines
from llava_saep.machine import GIB, machine_line

_TERA = 10**12
_ROUNDING = {"fp32": 1e-4, "bf16": 2e-2}
"""Relative difference of two sides' first losses from which they are taken to do different work."""

Row = Mapping[str, Any]


def training_lines(document: Mapping[str, Any], width: int) -> Iterator[str]:
    """Heading, tables, failures and how it was measured.

    Args:
        document: what `training_document` makes.
    """
    rows = document["sides"]
    tables = [Table(_speed_rows(rows)), Table(_need_rows(rows))]
    compared = [row for row in rows if row["times_better_than_baseline"] and row["name"] != document["baseline"]]
    if compared:
        title = f"against {document['baseline']}: how many times faster, and how many times less is needed"
        tables.append(Table(_comparison_rows(compared), title))
    return report_lines(
        heading=heading_lines(document), tables=tables, measured=rows, notes=_notes(document), width=width
    )


def heading_lines(document: Mapping[str, Any]) -> list[str]:
    """What was measured, and on what."""
    settings, machine, texts = document["settings"], document["machine"], document["settings"]["texts"]
    extras = [
        f"training {settings['train']}",
        settings["dtype"],
        *([f"{settings['num_micro_batches']} micro-batches a step"] if settings["num_micro_batches"] > 1 else []),
        f"{settings['num_rounds']} rounds of {settings['steps_per_round']} after {settings['num_warmup']} of warm-up",
        *(["INTERRUPTED"] if document["interrupted"] else []),
    ]
    return [
        f"shape {settings['preset']}: {_shape_words(settings['shape'])}",
        f"batch of {settings['batch_size']}, texts of {texts['shortest']} to {texts['longest']} tokens, "
        f"{texts['supervised_share']:.0%} of them learned; {', '.join(extras)}",
        machine_line(machine),
    ]


def _shape_words(shape: Row) -> str:
    return (
        f"tower {shape['vision_hidden_size']} wide, {shape['num_vision_layers']} blocks, {shape['image_size']} px / "
        f"{shape['patch_size']}; language model {shape['text_hidden_size']} wide, {shape['num_text_layers']} blocks, "
        f"vocabulary {shape['vocab_size']:,}"
    )


def _speed_rows(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    header = [
        ("", "", "seconds", "", "samples", "learned", "CPU-s", ""),
        ("side", "batch", "per step", "spread", "per s", "tokens/s", "per step", "MFU"),
    ]
    return header + [
        (
            row["name"],
            str(row["batch_size"]),
            _number(row["seconds"]["median"]),
            _share(row["seconds"]["spread"], "±"),
            _number(row["samples_per_second"]),
            _number(row["supervised_tokens_per_second"]),
            _number(row["cpu_seconds"]["median"]),
            _share(row["utilisation"]),
        )
        for row in rows
    ]


def _need_rows(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    header = [
        ("", "GiB", "tokens", "tokens", "", "TFLOP", "first"),
        ("side", "peak", "per image", "per step", "padding", "needed", "loss"),
    ]
    return header + [
        (
            row["name"],
            _number(row["peak_memory_bytes"] and row["peak_memory_bytes"] / GIB),
            str(row["num_image_tokens"]),
            f"{row['num_tokens']:,}",
            _share(row["padding_waste"]),
            _number(row["flops"]["total"] / _TERA),
            "-" if row["first_loss"] is None else f"{row['first_loss']:.4f}",
        )
        for row in rows
    ]


def _comparison_rows(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    kinds = ("samples_per_second", "cpu_seconds", "peak_memory_bytes")
    header = [("side", "samples/s", "CPU-s/sample", "peak memory")]
    return header + [
        (row["name"], *(_times(row["times_better_than_baseline"].get(kind)) for kind in kinds)) for row in rows
    ]


def _notes(document: Mapping[str, Any]) -> list[str]:
    method, settings = document["method"], document["settings"]
    kind = "cuda" if settings["device"] == "cuda" else "cpu"
    notes = [
        "seconds and CPU-s: median of the steps; spread: half the distance between the quartiles, as a share of it.",
        f"peak: {method[f'peak_memory_{kind}']}.",
        f"MFU: {method['utilisation']}.",
    ]
    disagreement = document["first_loss_disagreement"]
    if disagreement is not None and disagreement > _ROUNDING[settings["dtype"]]:
        notes.insert(
            0,
            f"WARNING: first losses of sides with the same projector differ by {disagreement:.1e}, more than rounding "
            "explains: they do not do the same work, and should not be compared.",
        )
    return notes


def _number(value: float | None) -> str:
    """Three digits or so, never an exponent."""
    if value is None:
        return "-"
    digits = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3
    return f"{value:,.{digits}f}"


def _share(value: float | None, sign: str = "") -> str:
    return "-" if value is None else f"{sign}{100 * value:.1f}%"


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"
