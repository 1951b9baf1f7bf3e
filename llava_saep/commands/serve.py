"""`llava-saep serve`: an HTTP interface to saved models that OpenAI's clients speak."""

import argparse
import ipaddress
import re
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from llava_saep.errors import UserError
from llava_saep.program import AbbreviatingParser
from llava_saep.serve.access import API_KEY_VARIABLE, add_access_flags, bind_socket, check_access, is_loopback
from llava_saep.serve.engine_flags import add_engine_flags, loading_arguments_from
from llava_saep.serve.limits import Limits, add_limit_flags, limits_from
from llava_saep.serve.replica_settings import ReplicaSettings, add_replica_flags, replica_settings_from

if TYPE_CHECKING:
    from llava_saep.generation import Engine
    from llava_saep.serve.api import ApiSettings

DEFAULT_PORT = 8000


def build_parser() -> AbbreviatingParser:
    """Return the parser of `llava-saep serve`."""
    parser = AbbreviatingParser(prog="llava-saep serve", description=__doc__)
    parser.add_flag(
        "model-path", nargs="+", required=True, help="folders that training wrote (--output_dir), or hub names"
    )
    parser.add_flag(
        "model-base", help="language model of a projector or adapter, where that is not known, or has moved"
    )
    parser.add_flag("conv-mode", help="conversation template (default: the one that the model was trained with)")
    parser.add_flag("device", help="cpu, cuda, cuda:1, ... (default: a GPU where there is one)")
    parser.add_flag("load-8bit", action="store_true", help="round the language model to 8 bits")
    parser.add_flag("load-4bit", action="store_true", help="round the language model to 4 bits")
    parser.add_flag(
        "trust-projector-code",
        action="store_true",
        help="let the checkpoint import a projector from outside this package",
    )
    add_engine_flags(parser)
    add_access_flags(parser, port=DEFAULT_PORT)
    _add_api_flags(parser)
    add_limit_flags(parser)
    add_replica_flags(parser)
    return parser


def _add_api_flags(parser: AbbreviatingParser) -> None:
    parser.add_flag(
        "api-key-file",
        help=f"file of keys, one a line; requests must show one (so does the variable {API_KEY_VARIABLE})",
    )
    parser.add_flag(
        "allowed-image-hosts",
        default="",
        help="hosts, separated by commas, whose https images may be fetched (default: images come with the request)",
    )
    parser.add_flag(
        "trusted-proxies",
        default="",
        help="addresses of proxies, separated by commas, whose X-Forwarded-For header says who the client is",
    )


def _names(text: str) -> list[str]:
    return [name.strip().lower().rstrip(".") for name in text.split(",") if name.strip()]


def parse_image_hosts(text: str) -> frozenset[str]:
    """Read --allowed-image-hosts.

    Raises:
        UserError: something that is no bare host name.
    """
    for name in _names(text):
        if not re.fullmatch(r"[a-z0-9.-]+", name):
            raise UserError(f"--allowed-image-hosts: {name!r} is no host name; expected such as images.example.org")
    return frozenset(_names(text))


def parse_proxies(text: str) -> tuple[str, ...]:
    """Read --trusted-proxies.

    Raises:
        UserError: something that is no address or network.
    """
    for name in _names(text):
        try:
            ipaddress.ip_network(name)
        except ValueError as error:
            raise UserError(f"--trusted-proxies: {name!r} is no address such as 127.0.0.1 or 10.0.0.0/8") from error
    return tuple(_names(text))


def main(argv: Sequence[str]) -> int:
    """Check everything that can be checked at once, load the models, serve them until SIGTERM or Ctrl-C.

    Raises:
        UserError, ProjectorError: a flag or a model's folder is wrong, or the port is in use.
    """
    args = build_parser().parse_args(argv)
    paths = name_models(args.model_path)
    limits = limits_from(args)
    replicas = replica_settings_from(args, max_queue=limits.max_queue)
    settings = _settings(args, limits, replicas)
    proxies = parse_proxies(args.trusted_proxies)
    with bind_socket(args.host, args.port) as bound:
        _serve(args, paths, settings, replicas, proxies, bound)
    return 0


def name_models(folders: Sequence[str]) -> dict[str, str]:
    """Give each model the name that clients ask for: the last part of its folder's or hub's name.

    Raises:
        UserError: two have the same.
    """
    paths: dict[str, str] = {}
    for folder in folders:
        name = Path(folder).resolve().name if Path(folder).is_dir() else folder.rstrip("/").rpartition("/")[2]
        if name in paths:
            raise UserError(f"--model-path {paths[name]} and {folder}: both would be called {name!r}; rename a folder")
        paths[name] = folder
    return paths


def _settings(args: argparse.Namespace, limits: Limits, replicas: ReplicaSettings | None) -> "ApiSettings":
    from llava_saep.serve.api import ApiSettings, read_api_keys

    keys = read_api_keys(args.api_key_file)
    check_access(args, has_authentication=bool(keys), how_to_authenticate="--api-key-file FILE")
    return ApiSettings(
        limits=limits,
        keys=keys,
        local_names_only=not keys and is_loopback(args.host),
        allowed_image_hosts=parse_image_hosts(args.allowed_image_hosts),
        answers_at_once=1 if replicas is None else replicas.most_replicas,
    )


def _serve(
    args: argparse.Namespace,
    paths: Mapping[str, str],
    settings: "ApiSettings",
    replicas: ReplicaSettings | None,
    proxies: Sequence[str],
    bound: socket.socket,
) -> None:
    from llava_saep.serve.api import create_app
    from llava_saep.serve.api.server import build_server, run_server

    _check_folders(args)
    with _loaded(args, paths, replicas) as engines:
        host, port = bound.getsockname()[:2]
        text = introduction(engines, host, port, needs_key=bool(settings.keys))
        app = create_app(engines, settings)
        run_server(build_server(app, trusted_proxies=proxies, on_ready=lambda: print(text, flush=True)), bound)


@contextmanager
def _loaded(
    args: argparse.Namespace, paths: Mapping[str, str], replicas: ReplicaSettings | None
) -> "Iterator[Mapping[str, Engine]]":
    """Load the models by their names, in this process or in replicas."""
    from llava_saep.generation import LocalEngine
    from llava_saep.serve.deployment import deployed

    arguments = loading_arguments_from(args)
    with ExitStack() as loaded:
        if replicas is not None:
            yield loaded.enter_context(deployed(paths, replicas, **arguments))
            return
        engines: dict[str, Engine] = {}
        for name, path in paths.items():
            engines[name] = LocalEngine.from_pretrained(path, model_id=name, **arguments)
            loaded.callback(engines[name].close)
        yield engines


def _check_folders(args: argparse.Namespace) -> None:
    """Refuse what is no model before the first one is loaded, which may take minutes."""
    from llava_saep.model.hub import local_folder
    from llava_saep.model.loading import inspect_folder

    for path in args.model_path:
        inspect_folder(local_folder(path), model_base=args.model_base)


def introduction(engines: "Mapping[str, Engine]", host: str, port: int, *, needs_key: bool) -> str:
    """What is printed when a server is ready: where it is, what answers there, and a question to try."""
    host = {"0.0.0.0": "localhost", "::": "localhost"}.get(host, f"[{host}]" if ":" in host else host)
    address = f"http://{host}:{port}/v1"
    lines = [f"Serving at {address}"]
    for name, engine in engines.items():
        model = engine.description
        lines.append(
            f"  {name}: {model.projector} projector, {model.tokens_per_image} tokens per image, "
            f"context {model.context_length or 'unlimited'}, {model.device}, {model.dtype}"
        )
    key = f' -H "Authorization: Bearer ${API_KEY_VARIABLE}"' if needs_key else ""
    return "\n".join(
        [
            *lines,
            "Try:",
            f"  curl {address}/chat/completions -H 'Content-Type: application/json'{key} -d @- <<END",
            f'  {{"model": "{next(iter(engines))}", "max_tokens": 100, "messages": [{{"role": "user", "content": [',
            '    {"type": "image_url", "image_url": {"url": "data:image/jpeg;base64,$(base64 -w0 photo.jpg)"}},',
            '    {"type": "text", "text": "What is shown in the image?"}]}]}',
            "END",
        ]
    )
