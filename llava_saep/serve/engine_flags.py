"""Flags on what an engine keeps between answers and how its model runs, the same for chat, demo and server."""

import argparse
from typing import TYPE_CHECKING, Any

from llava_saep.program import AbbreviatingParser

if TYPE_CHECKING:
    from llava_saep.generation import EngineSettings


def add_engine_flags(parser: AbbreviatingParser) -> None:
    """Add them; what is not given stays as `EngineSettings` has it."""
    parser.add_flag(
        "kv-cache",
        choices=("dynamic", "static"),
        default="dynamic",
        help="keys and values grow with a chat, or have a fixed length for compiled code (default: %(default)s)",
    )
    parser.add_flag("kv-cache-tokens", type=int, help="length of the static one (default: the model's context)")
    parser.add_flag("compile", action="store_true", help="compile decoding at the start; needs --kv-cache static")
    parser.add_flag("cached-chats", type=int, help="go on from so many chats' keys and values; 0: none (default: 4)")
    parser.add_flag("cached-bytes", type=int, help="most memory of these, in bytes (default: 2 GiB)")


def engine_settings_from(args: argparse.Namespace) -> "EngineSettings":
    """Read the flags.

    Raises:
        UserError: a number is out of range, or they do not go together.
    """
    from llava_saep.generation import EngineSettings  # with PyTorch, for which `--help` need not wait

    given = {"max_length": args.kv_cache_tokens, "max_conversations": args.cached_chats}
    given["max_cache_bytes"] = args.cached_bytes
    given = {name: value for name, value in given.items() if value is not None}
    return EngineSettings(cache=args.kv_cache, compile=args.compile, **given)


def loading_arguments_from(args: argparse.Namespace) -> dict[str, Any]:
    """Read these flags and those on how a model is loaded, as arguments of `LocalEngine.from_pretrained`.

    Raises:
        UserError: as `engine_settings_from`, or two ways of rounding are asked for.
    """
    from llava_saep.model.quantization import QuantizationConfig

    return {
        "device": args.device,
        "trust_projector_code": args.trust_projector_code,
        "quantization": QuantizationConfig.for_loading(load_4bit=args.load_4bit, load_8bit=args.load_8bit),
        "model_base": args.model_base,
        "template": args.conv_mode,
        "settings": engine_settings_from(args),
    }
