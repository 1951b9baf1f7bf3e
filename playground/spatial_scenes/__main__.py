"""Command line: `python -m playground.spatial_scenes --output DIR`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from playground.spatial_scenes.writing import DEFAULT_QUESTIONS_PER_CONVERSATION, DEFAULT_READING_SHARE, write_dataset


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of `python -m playground.spatial_scenes`."""
    parser = argparse.ArgumentParser(
        prog="python -m playground.spatial_scenes",
        description=(
            "Generate the embedded data set: images of digits and shapes, LLaVA conversations, held-out questions."
        ),
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to write train/ and held_out/ into")
    parser.add_argument(
        "--world",
        choices=("cells", "free"),
        default="cells",
        help="cells: objects in a 3x3 layout with jitter; free: anywhere without overlap (harder; default: cells)",
    )
    parser.add_argument("--num-train", type=int, default=8000, help="training images (default: %(default)s)")
    parser.add_argument("--num-held-out", type=int, default=100, help="held-out images (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--questions-per-conversation",
        type=int,
        default=DEFAULT_QUESTIONS_PER_CONVERSATION,
        help="turns of a stage 2 conversation (default: %(default)s)",
    )
    parser.add_argument(
        "--reading-share",
        type=float,
        default=DEFAULT_READING_SHARE,
        help="part of stage 2 that keeps reading and describing (default: %(default)s)",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Write one data set; returns the exit code."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.num_train < 1 or args.num_held_out < 1:
        parser.error(f"--num-train and --num-held-out must be at least 1, got {args.num_train} and {args.num_held_out}")
    if not 0 <= args.reading_share < 1:
        parser.error(f"--reading-share must be at least 0 and below 1, got {args.reading_share}")
    if not 1 <= args.questions_per_conversation <= 12:
        parser.error(f"--questions-per-conversation must be 1 to 12, got {args.questions_per_conversation}")
    if args.output.exists() and not args.output.is_dir():
        parser.error(f"--output {args.output} is a file; name a folder")
    write_dataset(
        args.output,
        world=args.world,
        num_train=args.num_train,
        num_held_out=args.num_held_out,
        seed=args.seed,
        questions_per_conversation=args.questions_per_conversation,
        reading_share=args.reading_share,
    )
    print(f"wrote {args.num_train} training and {args.num_held_out} held-out images to {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
