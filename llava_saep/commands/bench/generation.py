"""`llava-saep bench generation`: time to the first token with and without earlier turns, and the rate of decoding."""

import dataclasses
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from llava_saep.bench.generation import (
    ChatWorkload,
    DecodingMeasurement,
    TurnMeasurement,
    measure_decoding,
    measure_turns,
    median_first_token,
)
from llava_saep.bench.random_chat_model import build_chat_model, word
from llava_saep.bench.training.shapes import PRESETS
from llava_saep.commands.projectors.bench import check_json_path
from llava_saep.commands.projectors.flags import positive
from llava_saep.errors import UserError
from llava_saep.generation import EngineSettings, Predictor
from llava_saep.machine import describe_machine, machine_line
from llava_saep.program import AbbreviatingParser
from projectors import select_projector

EXIT_DIFFERENT = 1
_IMAGE_SIZE = (640, 480)


def main(argv: Sequence[str]) -> int:
    """Measure and print; exit code 1 if an answer changed with the way it was computed.

    Raises:
        UserError: a flag is wrong, the model cannot be loaded, or the conversation is too long for it.
    """
    flags = parser().parse_args(argv)
    json_path = check_json_path(flags.json) if flags.json else None
    if flags.threads is not None:
        torch.set_num_threads(flags.threads)
    predictor = load(flags)
    workload = make_workload(flags, predictor)
    document: dict[str, Any] = {
        "command": ["llava-saep", "bench", "generation", *argv],
        "machine": describe_machine(predictor.model.device),
        "model": describe_model(flags, predictor),
    }
    print("\n".join(heading_lines(document)))
    turns = measure_turns(predictor, workload)
    print("\n".join(turn_lines(turns)), flush=True)
    document["turns"] = [turn_document(turn) for turn in turns]
    document["decoding"] = []
    print(f"\n{'decoding':<22} {'tokens/s':>9} {'prepared in':>12}  answer")
    for way in measure_decoding(predictor, workload, ways(flags)):
        document["decoding"].append(dataclasses.asdict(way) | {"tokens_per_second": way.tokens_per_second})
        print(decoding_line(way), flush=True)
    if json_path is not None:
        write_json(json_path, document)
    is_same = not any(turn.num_different for turn in turns) and all(way["is_equal"] for way in document["decoding"])
    print(f"\nanswers: {'the same in every way' if is_same else 'NOT the same; see above'}")
    return 0 if is_same else EXIT_DIFFERENT


def parser() -> AbbreviatingParser:
    """The flags."""
    flags = AbbreviatingParser(prog="llava-saep bench generation", description=__doc__.split(": ", 1)[1])
    flags.add_flag("model-path", help="folder that training wrote, or hub name (default: random weights)")
    flags.add_argument(
        "--preset", choices=PRESETS, default="small", help="shape of a model of random weights (default: %(default)s)"
    )
    flags.add_argument("--mm_projector_type", default="mlp2x_gelu", help="of that model (default: %(default)s)")
    flags.add_argument("--images", type=int, default=1, metavar="N", help="shown first (default: %(default)s)")
    flags.add_argument("--turns", type=positive, default=3, help="questions of the conversation (default: %(default)s)")
    flags.add_argument("--prompt_tokens", type=positive, default=40, help="words of a question (default: %(default)s)")
    flags.add_argument("--answer_tokens", type=positive, default=40, help="of an answer (default: %(default)s)")
    flags.add_argument("--repeats", type=positive, default=5, help="of everything (default: %(default)s)")
    flags.add_argument("--no_static", action="store_true", help="leave out the static cache")
    flags.add_argument("--compile", action="store_true", help="compiled decoding as well")
    flags.add_flag("device", help="cpu, cuda, cuda:1 (default: a GPU where there is one)")
    flags.add_argument("--threads", type=positive, help="of a processor (default: PyTorch's)")
    flags.add_argument("--seed", type=int, default=0, help="of weights, images and words (default: %(default)s)")
    flags.add_argument("--json", metavar="FILE", help="write everything that was measured")
    return flags


def load(flags: Any) -> Predictor:
    """The model that the flags name; errors as `main`."""
    if flags.model_path is not None:
        return Predictor.from_pretrained(flags.model_path, device=flags.device)
    device = torch.device(flags.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    selection = select_projector(flags.mm_projector_type)
    return build_chat_model(PRESETS[flags.preset], selection, dtype, device, flags.seed)


def make_workload(flags: Any, predictor: Predictor) -> ChatWorkload:
    """Random images and words; errors as `main`."""
    if flags.images < 0:
        raise UserError(f"--images must be at least 0, got {flags.images}")
    draw = random.Random(flags.seed)
    width, height = _IMAGE_SIZE
    images = [Image.frombytes("RGB", _IMAGE_SIZE, draw.randbytes(3 * width * height)) for _ in range(flags.images)]
    vocabulary = ("what", "where", "colour", "left", "how", "many", "cat", "dog", "near", "why", "red", "it")

    def one_word() -> str:
        number = draw.randrange(10**6)
        is_random = flags.model_path is None
        return word(number, PRESETS[flags.preset]) if is_random else vocabulary[number % len(vocabulary)]

    questions = [" ".join(one_word() for _ in range(flags.prompt_tokens)) for _ in range(flags.turns)]
    return ChatWorkload(
        images=images, questions=questions, answer_tokens=flags.answer_tokens, num_repeats=flags.repeats
    )


def ways(flags: Any) -> dict[str, EngineSettings]:
    """The ways of decoding to compare."""
    chosen = {"dynamic cache": EngineSettings()}
    if not flags.no_static:
        chosen["static cache"] = EngineSettings(cache="static")
    if flags.compile:
        chosen["static, compiled"] = EngineSettings(cache="static", compile=True)
    return chosen


def describe_model(flags: Any, predictor: Predictor) -> dict[str, Any]:
    """What was measured, for the file and the heading."""
    return {
        "name": flags.model_path or f"random weights, preset {flags.preset}",
        "projector": predictor.model.config.projector["name"],
        "tokens_per_image": predictor.num_image_tokens,
        "images": flags.images,
        "question_words": flags.prompt_tokens,
        "answer_tokens": flags.answer_tokens,
        "repeats": flags.repeats,
        "dtype": str(predictor.model.dtype).removeprefix("torch."),
    }


def heading_lines(document: dict[str, Any]) -> list[str]:
    """What stands above the tables."""
    model = document["model"]
    return [
        f"{model['name']}: {model['projector']}, {model['images']} image(s) of {model['tokens_per_image']} tokens, "
        f"{model['dtype']}; medians of {model['repeats']}",
        machine_line(document["machine"]),
        "",
    ]


def turn_lines(turns: Sequence[TurnMeasurement]) -> list[str]:
    """The table of turns."""
    lines = [
        f"{'':>4} {'prompt':>7} {'cached':>7}  {'first token, seconds':^27}  {'tower runs':^13}",
        f"{'turn':>4} {'tokens':>7} {'tokens':>7}  {'going on':>9} {'anew':>9} {'share':>7}  {'going on':>8} "
        f"{'anew':>4}  answer",
    ]
    for index, turn in enumerate(turns, start=1):
        first = turn.reused[0]
        lines.append(
            f"{index:>4} {first.prompt_tokens:>7} {first.cached_tokens:>7}  {median_first_token(turn.reused):>9.4f} "
            f"{median_first_token(turn.anew):>9.4f} {turn.ratio:>7.1%}  {max(turn.tower_runs_reused):>8} "
            f"{max(turn.tower_runs_anew):>4}  {'DIFFERENT' if turn.num_different else 'the same'}"
        )
    return lines


def decoding_line(way: DecodingMeasurement) -> str:
    """One line of the table of rates."""
    answer = "the same" if way.is_equal else "DIFFERENT"
    return f"{way.name:<22} {way.tokens_per_second:>9.1f} {way.preparing_seconds:>10.1f} s  {answer}"


def turn_document(turn: TurnMeasurement) -> dict[str, Any]:
    """One turn as JSON, with the sums that the table shows."""
    sums = {"going_on": median_first_token(turn.reused), "anew": median_first_token(turn.anew), "share": turn.ratio}
    return {"first_token_seconds": sums, **dataclasses.asdict(turn)}


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Write what was measured."""
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(f"\nevery answer, settings and machine: {path}")
