"""`llava-saep demo`: its flags, and what they start."""

import argparse
import dataclasses
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image

from llava_saep.errors import UserError
from llava_saep.generation import GenerationOptions
from llava_saep.model.projector_selection import trusting_projector_code
from llava_saep.program import AbbreviatingParser
from llava_saep.serve.access import API_KEY_VARIABLE, add_access_flags, bind_socket, check_access
from llava_saep.serve.demo.accounts import hash_password, password_check, read_accounts
from llava_saep.serve.demo.catalog import ModelCatalog, ModelEntry, describe_folder, find_models
from llava_saep.serve.demo.settings import MAX_HISTORY_BYTES, MAX_UPLOADS_BYTES, DemoSettings
from llava_saep.serve.engine_flags import add_engine_flags, loading_arguments_from
from llava_saep.serve.limits import add_limit_flags, limits_from
from llava_saep.serve.remote import Endpoint, read_api_key, remote_engines

logger = logging.getLogger(__name__)

PORT = 7860
FEEDBACK_FILE = "demo_likes.jsonl"


def build_parser() -> argparse.ArgumentParser:
    """Return the parser."""
    parser = AbbreviatingParser(
        prog="llava-saep demo", description="Chat with saved models about pictures, in a browser."
    )
    models = parser.add_argument_group("models")
    for names, text in (
        (("--model-path", "--model_path"), "folder that training wrote (--output_dir), or hub name; loaded at start"),
        (("--models-dir", "--models_dir"), "folder whose checkpoints are offered; they are loaded when asked for"),
        (("--api",), "address of a server with OpenAI's protocol, such as llava-saep serve; its models are offered"),
        (("--api-key-file", "--api_key_file"), f"file with that server's key (or the variable {API_KEY_VARIABLE})"),
        (("--model-base", "--model_base"), "language model of a projector or adapter, where that is not known"),
        (("--conv-mode", "--conv_mode"), "conversation template (default: the one that a model was trained with)"),
        (("--device",), "cpu, cuda, cuda:1, ... (default: a GPU where there is one)"),
    ):
        models.add_argument(*names, help=text)
    parser.add_flag("load-8bit", action="store_true", help="round language models to 8 bits")
    parser.add_flag("load-4bit", action="store_true", help="round language models to 4 bits")
    parser.add_flag(
        "trust-projector-code",
        action="store_true",
        help="let checkpoints import a projector from outside this package",
    )
    parser.add_flag("temperature", type=float, default=0.2, help="where the slider stands (default: %(default)s)")
    parser.add_flag("top-p", type=float, default=1.0, help="likewise (default: %(default)s)")
    add_engine_flags(parser)
    _add_storage_flags(parser)
    add_access_flags(parser, port=PORT)
    parser.add_flag("auth-file", help="who may see the page: a file with lines of name:password or name:hash")
    parser.add_flag(
        "hash-password", action="store_true", help="ask for a password, print its line for --auth-file, end"
    )
    parser.add_flag("root-path", default="", help="path of the page behind a proxy that takes it off, such as /demo")
    parser.add_flag("open-browser", action="store_true", help="open the page in this machine's browser")
    add_limit_flags(parser)
    return parser


def _add_storage_flags(parser: AbbreviatingParser) -> None:
    parser.add_flag(
        "feedback-file",
        default=FEEDBACK_FILE,
        help="JSONL file that likes and dislikes are appended to (default: %(default)s in the current folder)",
    )
    parser.add_flag("no-feedback", action="store_true", help="ask nobody what they think of answers")
    parser.add_flag("feedback-image-folder", help="keep the pictures of judged chats here, named by their SHA-256")
    parser.add_flag("history-dir", help="keep chats here, across restarts (default: until the server ends)")
    parser.add_flag(
        "max-history-bytes",
        type=int,
        default=MAX_HISTORY_BYTES,
        help="of all chats and pictures; the visitors that have been away longest make room (default: %(default)s)",
    )
    parser.add_flag(
        "max-uploads-bytes",
        type=int,
        default=MAX_UPLOADS_BYTES,
        help="of pictures that have been sent and not been cleared away yet, which takes hours (default: %(default)s)",
    )


def main(argv: Sequence[str], *, ask_password: Callable[[str], str]) -> int:
    """Serve the page until Ctrl-C.

    Raises:
        UserError, ProjectorError: a flag or the model's folder is wrong.
    """
    args = build_parser().parse_args(argv)
    if args.hash_password:
        # Standard output is often redirected into the file of accounts, where a prompt would be part of the name.
        print("name: ", end="", file=sys.stderr, flush=True)
        name, password = input(), ask_password("password: ")
        print(f"{name}:{hash_password(password)}")
        return 0
    accounts = None if args.auth_file is None else read_accounts(args.auth_file)
    check_access(args, has_authentication=accounts is not None, how_to_authenticate="--auth-file FILE")
    limits_from(args)
    feedback_file_from(args)
    with bind_socket(args.host, args.port) as taken:  # a port in use is noticed before a model is loaded
        args.port = taken.getsockname()[1]
    catalog = build_catalog(args)
    serve(args, catalog, accounts)
    return 0


def feedback_file_from(args: argparse.Namespace) -> Path | None:
    """Where likes and dislikes go; None: nobody is asked.

    Raises:
        UserError: nothing can be written there.
    """
    if args.no_feedback:
        return None
    path = Path(args.feedback_file)
    present = next(place for place in (path, *path.absolute().parents) if place.exists())
    is_right_kind = present.is_file() if present == path else present.is_dir()
    if not (is_right_kind and os.access(present, os.W_OK)):
        raise UserError(f"--feedback-file {path}: cannot be written; name another one, or give --no-feedback")
    return path


def build_catalog(args: argparse.Namespace) -> ModelCatalog:
    """Find the models that the flags name, and load the one of --model-path.

    Raises:
        UserError, ProjectorError: there is none, or it cannot be loaded.
    """
    entries = _find_entries(args)
    engines = {}
    if args.api is not None:
        engines = remote_engines(Endpoint(url=args.api, api_key=read_api_key(args.api_key_file)))
    if not entries and not engines:
        found_none = f"--models-dir {args.models_dir} holds no checkpoint" if args.models_dir else "no model"
        raise UserError(
            f"{found_none}: give --model-path FOLDER, or --models-dir with a folder that holds checkpoints, or --api "
            "with the address of a server"
        )
    catalog = ModelCatalog(entries, engines=engines, load_options=loading_arguments_from(args))
    if args.model_path is not None:
        catalog.load_now(entries[0].model_id)
    return catalog


def _find_entries(args: argparse.Namespace) -> list[ModelEntry]:
    """The model of --model-path, then those of --models-dir."""
    entries: list[ModelEntry] = []
    with trusting_projector_code(args.trust_projector_code):
        if args.model_path is not None:
            name = Path(args.model_path).name or args.model_path
            entries.append(describe_folder(args.model_path, name, model_base=args.model_base))
        if args.models_dir is None:
            return entries
        skipped: list[str] = []
        found = find_models(args.models_dir, on_skipped=lambda path, reason: skipped.append(f"{path}: {reason}"))
    for line in skipped:
        logger.debug("not offered: %s", line)
    if skipped:
        print(f"{len(skipped)} folders in {args.models_dir} have a config.json and are no models that load here.")
    given = {entry.folder.resolve() for entry in entries}
    names = {entry.model_id for entry in entries}
    for entry in found:
        if entry.folder.resolve() not in given:
            if entry.model_id in names:
                entry = dataclasses.replace(entry, model_id=f"{Path(args.models_dir).name}/{entry.model_id}")
            entries.append(entry)
    return entries


def serve(args: argparse.Namespace, catalog: ModelCatalog, accounts: dict[str, str] | None) -> None:
    """Build the page and serve it until Ctrl-C."""
    from llava_saep.serve.demo.launching import launch, storage_secret, working_folder
    from llava_saep.serve.demo.page import build_page
    from llava_saep.serve.demo.services import DemoServices

    limits = limits_from(args)
    # Pillow refuses what has more than twice this. It guards what opens pictures besides this package's own code.
    Image.MAX_IMAGE_PIXELS = limits.max_image_pixels // 2
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
    history_folder = None if args.history_dir is None else Path(args.history_dir)
    with working_folder() as folder:
        settings = DemoSettings(
            working_folder=folder,
            limits=limits,
            options=GenerationOptions(temperature=args.temperature, top_p=args.top_p),
            history_folder=history_folder,
            max_history_bytes=args.max_history_bytes,
            max_uploads_bytes=args.max_uploads_bytes,
            feedback_file=feedback_file_from(args),
            feedback_image_folder=None if args.feedback_image_folder is None else Path(args.feedback_image_folder),
        )
        services = DemoServices(catalog, settings)
        page = build_page(services, storage_secret=storage_secret(history_folder))
        is_allowed = None if accounts is None else password_check(accounts)
        address = launch(
            page,
            services,
            host=args.host,
            port=args.port,
            root_path=args.root_path,
            is_allowed=is_allowed,
            opens_browser=args.open_browser,
        )
        if settings.feedback_file is not None:
            print(f"Likes and dislikes go to {settings.feedback_file}, with their chats (--no-feedback asks nobody).")
        print(f"The page is at {address} (Ctrl-C ends it).", flush=True)
        try:
            wait_for_the_end()
        finally:
            services.stop_all()
            page.close(verbose=False)
            catalog.close()


def wait_for_the_end() -> None:
    """Return after Ctrl-C or SIGTERM, so that what is temporary goes in both cases."""
    ended = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda number, frame: ended.set())
    try:
        ended.wait()
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGTERM, before)
