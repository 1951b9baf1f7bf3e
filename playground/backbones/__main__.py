"""Command line: `python -m playground.backbones` trains the stand-ins again and replaces the shipped weights.

Tower and language model share nothing, so each trains in a process of its own, one thread each.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

PARTS = ("language_model", "vision_tower")
DEFAULT_LANGUAGE_MODEL_STEPS = 2500
DEFAULT_VISION_TOWER_STEPS = 6000
_BOTH_WORLDS = "scenes of the worlds `cells` and `free` from playground/spatial_scenes, drawn anew in every step"


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of `python -m playground.backbones`."""
    parser = argparse.ArgumentParser(
        prog="python -m playground.backbones",
        description=("Train the stand-ins for CLIP and Vicuna: a small vision tower and a small language model."),
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(__file__).parent,
        help="folder that gets language_model/ and vision_tower/ (default: the shipped ones)",
    )
    parser.add_argument("--only", choices=PARTS, help="train one of the two")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--language-model-steps",
        type=int,
        default=DEFAULT_LANGUAGE_MODEL_STEPS,
        help="steps of 32 documents after the induction steps (default: %(default)s)",
    )
    parser.add_argument(
        "--vision-tower-steps",
        type=int,
        default=DEFAULT_VISION_TOWER_STEPS,
        help="steps of 64 images (default: %(default)s)",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Train the stand-ins that were asked for, each in a process of its own; returns the exit code."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if min(args.language_model_steps, args.vision_tower_steps) < 1:
        parser.error("the numbers of steps must be at least 1")
    command = shlex.join(["python", "-m", "playground.backbones", *(sys.argv[1:] if argv is None else argv)])
    parts = [args.only] if args.only else list(PARTS)
    # A fresh interpreter each: torch's thread count and random state belong to one training.
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_train, args=(_TRAINERS[part], args, command), name=part) for part in parts]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    failed = [worker.name for worker in workers if worker.exitcode != 0]
    if failed:
        print(f"training failed: {', '.join(failed)}; the reason stands above", file=sys.stderr)
    return 1 if failed else 0


def _train(trainer: Callable[[argparse.Namespace, str], None], args: argparse.Namespace, command: str) -> None:
    import torch

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)
    trainer(args, command)


def _train_language_model(args: argparse.Namespace, command: str) -> None:
    from playground.backbones.language_model import train_language_model
    from playground.backbones.tokenizer import train_tokenizer

    folder = args.output / "language_model"
    tokenizer = train_tokenizer(folder, args.seed)
    figures = train_language_model(folder, tokenizer, num_steps=args.language_model_steps, seed=args.seed)
    write_language_model_card(folder, figures, num_steps=args.language_model_steps, seed=args.seed, command=command)


def write_language_model_card(
    folder: Path, figures: Mapping[str, float], *, num_steps: int, seed: int, command: str, remark: str = ""
) -> None:
    """Write the card; `remark` says what was special about this run."""
    from transformers import LlamaForCausalLM

    from playground.backbones.cards import write_card
    from playground.backbones.language_model import BATCH_SIZE, INDUCTION_STEPS, REASONING_STEPS

    write_card(
        folder,
        title="A small chat language model: the stand-in for Vicuna",
        summary="A Llama trained from nothing on text alone. It speaks the vicuna_v1 template, reads descriptions of "
        "small scenes and answers questions about them. It has never met an image.",
        data=f"descriptions of and conversations about {_BOTH_WORLDS}; before that, random lists with repeated spans",
        steps=f"{INDUCTION_STEPS} of induction, {num_steps} of scenes in words, {REASONING_STEPS} with drills on the "
        f"verdicts of relations; {BATCH_SIZE} texts each",
        seed=seed,
        num_parameters=LlamaForCausalLM.from_pretrained(folder).num_parameters(),
        command=command,
        figures=figures,
        notes="\n\n".join(filter(None, [remark, _LANGUAGE_MODEL_NOTES])),
    )


def _train_vision_tower(args: argparse.Namespace, command: str) -> None:
    from playground.backbones.vision_tower import train_vision_tower

    folder = args.output / "vision_tower"
    figures = train_vision_tower(folder, num_steps=args.vision_tower_steps, seed=args.seed)
    write_vision_tower_card(folder, figures, num_steps=args.vision_tower_steps, seed=args.seed, command=command)


def write_vision_tower_card(
    folder: Path, figures: Mapping[str, float], *, num_steps: int, seed: int, command: str, remark: str = ""
) -> None:
    """Write the card; `remark` says what was special about this run."""
    from transformers import CLIPVisionModel

    from playground.backbones.cards import write_card
    from playground.backbones.vision_tower import BATCH_SIZE

    write_card(
        folder,
        title="A small vision tower: the stand-in for CLIP",
        summary="A CLIPVisionModel for 48x48 images in 8x8 patches, trained from nothing contrastively and by "
        "captioning.",
        data=_BOTH_WORLDS + "; digits are the training scans alone",
        steps=f"{num_steps} of {BATCH_SIZE} images",
        seed=seed,
        num_parameters=CLIPVisionModel.from_pretrained(folder).num_parameters(),
        command=command,
        figures=figures,
        notes="\n\n".join(filter(None, [remark, _VISION_TOWER_NOTES])),
    )


_TRAINERS = {"language_model": _train_language_model, "vision_tower": _train_vision_tower}

_LANGUAGE_MODEL_NOTES = """`exact_answers_*` is the share of answers whose every word is the most likely one, by how \
the scene was described: a listing of phrases, a raster of words, or condensed, one position per cell (3x3) or per \
patch (6x6), each the weighted sum of the embeddings of its words. Condensed descriptions prepare the model for dense \
visual tokens; they are made from words, not from images.

The model knows the words of this small world and nothing else: it is there so that the quick start can play \
LLaVA's two stages on two CPU cores in minutes, and no measure of any projector."""

_VISION_TOWER_NOTES = """`what_*`: occupied positions whose object is named rightly; `where_*`: present objects that \
are located rightly; `scene_exact_*`: images with all nine positions right; by world, on scans that training never \
saw, read from the layer before the last. The text encoder and the captioning head were only for training and are \
not kept."""


if __name__ == "__main__":
    sys.exit(main())
