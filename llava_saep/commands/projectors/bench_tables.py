"""The measurements of `llava-saep projectors bench` as tables of at most 80 columns, where the names allow it."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llava_saep.bench.profiling import Copies, StepProfile
from llava_saep.commands.projectors.report_lines import Table, report_lines
from llava_saep.commands.projectors.text import columns, wrapped
from llava_saep.machine import machine_line

_MIB = 1024**2
_GIGA, _MEGA = 10**9, 10**6
_NUM_OPERATORS = 15

Row = Mapping[str, Any]


def bench_lines(document: Mapping[str, Any], width: int) -> Iterator[str]:
    """Heading, three tables, failures and how it was measured.

    Args:
        document: what `bench_document` makes.
    """
    rows = document["projectors"]
    tables = [Table(_work_rows(rows))]
    timed = [row for row in rows if row["forward_backward"]["seconds"]]
    if timed:
        tables.append(Table(_time_rows(timed)))
    compared = [row for row in timed if row["relative_to_baseline"] and row["name"] != document["baseline"]]
    if compared:
        title = f"divided by {document['baseline']}'s; below 1 is less work or faster:"
        tables.append(Table(_comparison_rows(compared), title))
    return report_lines(
        heading=heading_lines(document), tables=tables, measured=rows, notes=_notes(document), width=width
    )


def heading_lines(document: Mapping[str, Any]) -> list[str]:
    """What was measured, and on what."""
    settings, machine = document["settings"], document["machine"]
    height, grid_width = settings["grid"]
    extras = [
        "trained tower" if settings["train_tower"] else "frozen tower",
        *(["torch.compile"] if settings["compile"] else []),
        f"{settings['num_repeats']} rounds after {settings['num_warmup']} of warm-up",
        *(["INTERRUPTED"] if document["interrupted"] else []),
    ]
    return [
        f"batch of {settings['batch_size']}, {settings['dtype']}, {height} x {grid_width} patches of "
        f"{settings['vision_hidden_size']} channels into {settings['text_hidden_size']}, {', '.join(extras)}",
        machine_line(machine),
    ]


def _work_rows(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    header = [
        ("", "", "million", "GFLOP", "GFLOP", "MiB", "MiB"),
        ("projector", "tokens", "params", "forward", "backward", "weights", "peak"),
    ]
    return header + [
        (
            row["name"],
            "-" if row["num_tokens"] is None else str(row["num_tokens"]),
            _in_units(row["num_parameters"], _MEGA),
            _in_units(row["flops"] and row["flops"]["forward"], _GIGA),
            _in_units(row["flops"] and row["flops"]["backward"], _GIGA),
            _in_units(row["weight_bytes"], _MIB),
            _in_units(row["peak_memory_bytes"] and row["peak_memory_bytes"]["forward_backward"], _MIB),
        )
        for row in rows
    ]


def _time_rows(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    header = [
        ("", "forward", "", "forward", "fwd+bwd", "", "fwd+bwd"),
        ("projector", "ms", "spread", "ms/GFLOP", "ms", "spread", "ms/GFLOP"),
    ]
    return header + [(row["name"], *_times(row["forward"]), *_times(row["forward_backward"])) for row in rows]


def _times(timing: Row) -> tuple[str, str, str]:
    return (
        _milliseconds(timing["median_seconds"]),
        "-" if timing["spread"] is None else f"±{100 * timing['spread']:.1f}%",
        _milliseconds(timing["seconds_per_gflop"]),
    )


def _comparison_rows(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    header = [
        ("", "forward", "forward", "time at", "fwd+bwd", "fwd+bwd", "time at"),
        ("projector", "FLOPs", "time", "equal FLOPs", "FLOPs", "time", "equal FLOPs"),
    ]
    return header + [
        (
            row["name"],
            *(
                f"{row['relative_to_baseline'][f'{kind}_{quantity}']:.3f}"
                for kind in ("forward", "forward_backward")
                for quantity in ("flops", "seconds", "seconds_per_flop")
            ),
        )
        for row in rows
    ]


def _notes(document: Mapping[str, Any]) -> list[str]:
    method = document["method"]
    return [
        "ms: median of the rounds; spread: half the distance between the quartiles, as a share of it. All projectors "
        "run once per round. forward: no graph, evaluation mode; fwd+bwd: training mode.",
        "FLOPs: matrix products and convolutions alone, two per multiply-add, of the whole batch.",
        f"peak: bytes of forward with backward {method['peak_memory_bytes']}.",
    ]


def profile_lines(profile: StepProfile, width: int) -> Iterator[str]:
    """Operators by self time, then copies, as tables."""
    total = sum(operator.self_seconds for operator in profile.operators)
    yield f"one forward and backward under torch.profiler: {1000 * total:.2f} ms in operators, by self time:"
    top = profile.operators[:_NUM_OPERATORS]
    rows = [("ms", "share", "calls", "operator")] + [
        (_milliseconds(each.self_seconds), f"{100 * each.share:.1f}%", str(each.num_calls), each.operator)
        for each in top
    ]
    yield from (f"  {line}"[:width] for line in columns(rows, left=(3,)))
    if len(profile.operators) > len(top):
        rest = sum(each.self_seconds for each in profile.operators[len(top) :])
        yield f"  {1000 * rest:.3f} ms in {len(profile.operators) - len(top)} more"
    yield f"\noperators that move data and compute nothing: {profile.num_copied_bytes / _MIB:.2f} MiB written"
    rows = [("MiB", "ms", "calls", "operator", "what", "inside")] + [_copy_row(each) for each in profile.copies]
    yield from (f"  {line}"[:width] for line in columns(rows, left=(3, 4, 5)))
    yield from wrapped(
        "broadcast: a small tensor such as a bias written into the output of a product. An operator in brackets calls "
        "one of the others, where its bytes are counted. What a library rearranges inside one kernel is not seen.",
        width,
    )


def _copy_row(copies: Copies) -> tuple[str, ...]:
    site = copies.site
    operator = site.operator.removeprefix("aten::")
    shape = "x".join(map(str, site.shape))
    return (
        _in_units(copies.num_bytes, _MIB),
        _milliseconds(copies.seconds),
        str(copies.num_calls),
        f"({operator})" if copies.is_wrapper else operator,
        " ".join(filter(None, [shape, site.kind])),
        f"{site.phase}: {site.inside}" if site.inside else site.phase,
    )


def _milliseconds(seconds: float | None) -> str:
    return _in_units(seconds, 1e-3)


def _in_units(value: float | None, unit: float) -> str:
    """About four digits, never an exponent."""
    if value is None:
        return "-"
    scaled = value / unit
    digits = 1 if scaled >= 100 else 2 if scaled >= 10 else 3
    return f"{scaled:,.{digits}f}"
