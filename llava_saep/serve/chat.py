"""Chat with a saved model in the terminal: streaming, several turns, several images."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from PIL import Image

from llava_saep.data.remote_images import find_image
from llava_saep.errors import UserError
from llava_saep.generation import AnswerStatistics, GenerationOptions, LocalEngine, Message
from llava_saep.program import AbbreviatingParser
from llava_saep.serve.access import API_KEY_VARIABLE
from llava_saep.serve.engine_flags import add_engine_flags, loading_arguments_from
from llava_saep.serve.remote import Endpoint, RemoteEngine, read_api_key, remote_engines
from llava_saep.serve.saved_chat import load_chat, save_chat

HELP = """\
Type a question and press Enter. Commands:
  /image PATH [PATH ...]  show the model more images with your next question (http addresses too)
  /again                  answer the last question once more (also /regenerate)
  /undo                   take back the last question and its answer
  /system TEXT            replace the system prompt and start over
  /clear                  forget the conversation and its images
  /history                show the conversation
  /stats                  tokens and times of the last answer
  /save FILE, /load FILE  write the conversation to a file; go on from one
  /help                   print this
  /exit                   leave (so does Ctrl-D; Ctrl-C stops an answer)"""

_PROMPT = "USER: "
_ENDINGS = {
    "stop": "the model ended it",
    "length": "its length is limited (--max-new-tokens)",
    "cancelled": "you stopped it",
    "time_limit": "its time was over",
}


@dataclass
class ChatSession:
    """One conversation: its messages, and the images that wait for the next question.

    Attributes:
        statistics: of the last answer, if there was one.
    """

    engine: LocalEngine | RemoteEngine
    options: GenerationOptions
    messages: list[Message] = field(default_factory=list)
    waiting_images: list[Path | Image.Image] = field(default_factory=list)
    shows_prompts: bool = False
    statistics: AnswerStatistics | None = None

    def add_image(self, path_or_url: str | Path) -> None:
        """Queue an image for the next question.

        Raises:
            UserError: the file is missing, nothing can be fetched from the address, or it is no readable image.
        """
        self.waiting_images.append(find_image(path_or_url))

    def set_system(self, text: str) -> None:
        """Start over with another system prompt.

        Raises:
            UserError: the model's conversation template has no place for one.
        """
        model = self.engine.description
        if not model.takes_system:
            raise UserError(f"the model's conversation template {model.template!r} has no place for a system prompt")
        self.messages = [{"role": "system", "content": text}]

    def undo(self) -> bool:
        """Forget the last question and its answer; False when there is none."""
        if len(self.messages) < 2 or self.messages[-1]["role"] != "assistant":
            return False
        del self.messages[-2:]
        return True

    def clear(self) -> None:
        """Forget all turns and images; the system prompt stays."""
        self.messages = [message for message in self.messages if message["role"] == "system"]
        self.waiting_images = []

    def load(self, path: str) -> None:
        """Go on from a saved chat, which takes the place of this one; errors as `load_chat`."""
        self.messages, self.waiting_images = load_chat(path), []

    def ask(self, question: str, output: TextIO) -> str:
        """Put a question with the waiting images and write the answer as it comes.

        An interrupted answer stays in the conversation as far as it came; a failed one leaves everything as it was.
        """
        parts = [{"type": "image", "image": path} for path in self.waiting_images]
        parts.append({"type": "text", "text": question})
        answer = self._answer([*self.messages, {"role": "user", "content": parts}], output)
        self.waiting_images = []
        return answer

    def ask_again(self, output: TextIO) -> str:
        """Answer the last question once more.

        Raises:
            UserError: there is none.
        """
        if not self.messages or self.messages[-1]["role"] != "assistant":
            raise UserError("there is no question to answer again")
        output.write("ASSISTANT: ")
        return self._answer(self.messages[:-1], output)

    def _answer(self, messages: list[Message], output: TextIO) -> str:
        answer = ""
        stream = self.engine.stream(messages, self.options)
        try:
            for piece in stream:
                answer += piece
                output.write(_printable(piece))
                output.flush()
        except KeyboardInterrupt:
            stream.close()
            output.write(" [stopped]")
        output.write("\n")
        if self.shows_prompts:
            output.write(f"{ {'prompt': self.engine.predictor.prompt_text(messages), 'outputs': answer} }\n")
        self.messages = [*messages, {"role": "assistant", "content": answer.strip() or "..."}]
        self.statistics = stream.statistics
        return answer


def run_command(session: ChatSession, line: str, output: TextIO) -> bool:
    """Carry out a line that begins with a slash; False ends the chat.

    Raises:
        UserError: unknown command or missing argument.
    """
    name, _, rest = line.partition(" ")
    rest = rest.strip()
    if name in ("/exit", "/quit"):
        return False
    if name in _ACTIONS and not rest:
        _ACTIONS[name](session, output)
    elif name in _ACTIONS_WITH_TEXT and rest:
        _ACTIONS_WITH_TEXT[name](session, rest, output)
    else:
        raise UserError(f"unknown or incomplete command {line!r}\n{HELP}")
    return True


def _help(session: ChatSession, output: TextIO) -> None:
    output.write(HELP + "\n")


def _again(session: ChatSession, output: TextIO) -> None:
    session.ask_again(output)


def _undo(session: ChatSession, output: TextIO) -> None:
    output.write("Taken back.\n" if session.undo() else "There is nothing to take back.\n")


def _clear(session: ChatSession, output: TextIO) -> None:
    session.clear()
    output.write("Cleared.\n")


def _history(session: ChatSession, output: TextIO) -> None:
    for message in session.messages:
        output.write(f"{message['role'].upper()}: {_shown(message['content'])}\n")
    for image in session.waiting_images:
        output.write(f"waiting: {_shown([{'type': 'image', 'image': image}])}\n")


def _shown(content: str | Sequence[dict]) -> str:
    """A message's content in one piece of text, images by their names."""
    if isinstance(content, str):
        return _printable(content)
    names = [
        f"[{part['image']}] " if isinstance(part["image"], (str, Path)) else "[an image] "
        for part in content
        if part["type"] == "image"
    ]
    return "".join(names) + _printable("".join(part["text"] for part in content if part["type"] == "text"))


def _printable(text: str) -> str:
    """Leave out what a terminal would obey: a model or a server could have it write into the clipboard."""
    return text.translate(_CONTROL_CHARACTERS)


_CONTROL_CHARACTERS = dict.fromkeys({*range(0x20), *range(0x7F, 0xA0)} - {ord("\n"), ord("\t")})


def _stats(session: ChatSession, output: TextIO) -> None:
    answer = session.statistics
    if answer is None:
        output.write("There is no answer yet.\n")
        return
    output.write(
        f"prompt: {answer.prompt_tokens} tokens, {answer.image_tokens} of images; "
        f"{answer.cached_tokens} were known from earlier turns\n"
        f"answer: {answer.completion_tokens} tokens; {_ENDINGS[answer.finish_reason]}\n"
        f"first token after {answer.first_token_seconds:.2f} s, then {answer.tokens_per_second:.1f} tokens per second\n"
    )


def _image(session: ChatSession, rest: str, output: TextIO) -> None:
    for path in _split_paths(rest):
        session.add_image(path)
        output.write(f"{path} goes with your next question.\n")


def _system(session: ChatSession, rest: str, output: TextIO) -> None:
    session.set_system(rest)
    output.write("New system prompt; the conversation starts over.\n")


def _save(session: ChatSession, rest: str, output: TextIO) -> None:
    save_chat(rest, session.messages)
    output.write(f"Saved as {rest}.\n")


def _load(session: ChatSession, rest: str, output: TextIO) -> None:
    session.load(rest)
    output.write(f"Going on from {rest}.\n")
    _history(session, output)


_ACTIONS = {
    "/help": _help,
    "/again": _again,
    "/regenerate": _again,
    "/undo": _undo,
    "/clear": _clear,
    "/history": _history,
    "/stats": _stats,
}
_ACTIONS_WITH_TEXT = {"/image": _image, "/system": _system, "/save": _save, "/load": _load}


def _split_paths(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UserError(f"/image {text}: {error}; quote paths that contain blanks") from error


def chat_loop(session: ChatSession, source: TextIO, output: TextIO, interactive: bool) -> None:
    """Read questions and commands line by line until the end of input or /exit."""
    while True:
        try:
            line = _read_line(source, output, interactive)
        except KeyboardInterrupt:
            output.write("\n")
            return
        if not line:
            output.write("\n" if interactive else "")
            return
        line = line.strip()
        if not line:
            continue
        try:
            if line.startswith("/"):
                if not run_command(session, line, output):
                    return
            else:
                output.write("ASSISTANT: ")
                session.ask(line, output)
        except UserError as error:
            output.write(f"{error}\n")


def _read_line(source: TextIO, output: TextIO, interactive: bool) -> str:
    """One line with its line break; "" at the end of input."""
    if interactive and source is sys.stdin:
        try:
            return input(_PROMPT) + "\n"  # with the editing and the history of readline, once that is imported
        except EOFError:
            return ""
    if interactive:
        output.write(_PROMPT)
        output.flush()
    return source.readline()


def _edit_lines() -> None:
    """Let arrow keys edit a line and bring earlier ones back, where Python has readline."""
    try:
        import readline  # noqa: F401 - input() uses it once it is imported
    except ImportError:
        return


def build_parser(prog: str = "llava-saep chat") -> argparse.ArgumentParser:
    """Return the parser; its flags carry LLaVA's names."""
    parser = AbbreviatingParser(prog=prog, description=__doc__)
    parser.add_flag(
        "model-path", help="folder that training wrote (--output_dir), or hub name; with --api the model's name there"
    )
    parser.add_flag("api", metavar="URL", help="ask a server with OpenAI's protocol, such as llava-saep serve")
    parser.add_flag("api-key-file", help=f"file with that server's key (or the variable {API_KEY_VARIABLE})")
    parser.add_flag(
        "model-base", help="language model of a projector or adapter, where that is not known, or has moved"
    )
    parser.add_flag("image-file", nargs="+", default=[], help="images for the first question: paths or addresses")
    parser.add_flag("query", help="ask this one question and exit")
    parser.add_flag("conv-mode", help="conversation template (default: the one that the model was trained with)")
    parser.add_flag("device", help="cpu, cuda, cuda:1, ... (default: a GPU where there is one)")
    parser.add_flag("load-8bit", action="store_true", help="round the language model to 8 bits")
    parser.add_flag("load-4bit", action="store_true", help="round the language model to 4 bits")
    parser.add_flag("temperature", type=float, default=0.2, help="0 decodes greedily (default: %(default)s)")
    parser.add_flag(
        "top-p", type=float, default=1.0, help="sample from the likeliest tokens of this mass (default: %(default)s)"
    )
    parser.add_flag("max-new-tokens", type=int, default=512, help="longest answer, in tokens (default: %(default)s)")
    add_engine_flags(parser)
    parser.add_flag("seed", type=int, help="makes sampled answers repeat themselves")
    parser.add_flag("debug", action="store_true", help="print each prompt as the model sees it, and its answer")
    parser.add_flag(
        "trust-projector-code",
        action="store_true",
        help="let the checkpoint import a projector from outside this package",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the chat; returns the exit code.

    Raises:
        UserError, ProjectorError: a flag, the model's folder or an image is wrong.
    """
    args = build_parser().parse_args(argv)
    options = GenerationOptions(
        max_new_tokens=args.max_new_tokens, temperature=args.temperature, top_p=args.top_p, seed=args.seed
    )
    images = [find_image(path) for path in args.image_file]  # before the model is loaded, which may take long
    engine = _load(args) if args.api is None else _connect(args)
    options = options.fitting(engine.description.context_length)
    session = ChatSession(engine, options, waiting_images=images, shows_prompts=args.debug)
    if args.query is not None:
        session.ask(args.query, sys.stdout)
        return 0
    interactive = sys.stdin.isatty()
    if interactive:
        model = engine.description
        print(f"{model.model_id}: {model.projector} projector, {model.tokens_per_image} tokens per image. Try /help.")
        _edit_lines()
    chat_loop(session, sys.stdin, sys.stdout, interactive)
    return 0


def _load(args: argparse.Namespace) -> LocalEngine:
    if args.model_path is None:
        raise UserError("no model: give --model-path FOLDER, or --api with the address of a server")
    return LocalEngine.from_pretrained(args.model_path, **loading_arguments_from(args))


def _connect(args: argparse.Namespace) -> RemoteEngine:
    """The model of a server that --model-path names; without it, the only one there.

    Raises:
        UserError: there is no such model, there are several, or the server cannot be reached.
    """
    if args.debug:
        raise UserError("--debug shows prompts as the model sees them, which a server (--api) does not tell")
    engines = remote_engines(Endpoint(url=args.api, api_key=read_api_key(args.api_key_file)))
    names = ", ".join(engines)
    if args.model_path is None and len(engines) > 1:
        raise UserError(f"the server has several models; say which with --model-path NAME: {names}")
    name = args.model_path or next(iter(engines))
    if name not in engines:
        raise UserError(f"the server has no model {name!r}; there is {names}")
    return engines[name]
