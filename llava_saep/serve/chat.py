"""Chat with a saved model in the terminal: streaming, several turns, several images."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from llava_saep.data.images import load_image
from llava_saep.errors import UserError
from llava_saep.generation import GenerationOptions, Message, Predictor
from llava_saep.model.quantization import QuantizationConfig

HELP = """\
Type a question and press Enter. Commands:
  /image PATH [PATH ...]  show the model more images with your next question
  /system TEXT            replace the system prompt and start over
  /undo                   take back the last question and its answer
  /clear                  forget the conversation and its images
  /help                   print this
  /exit                   leave (so does Ctrl-D; Ctrl-C stops an answer)"""


@dataclass
class ChatSession:
    """One conversation: its messages, and the images that wait for the next question."""

    predictor: Predictor
    options: GenerationOptions
    messages: list[Message] = field(default_factory=list)
    waiting_images: list[Path] = field(default_factory=list)

    def add_image(self, path: str | Path) -> None:
        """Queue an image for the next question.

        Raises:
            UserError: the file is missing or is not a readable image.
        """
        load_image(path)
        self.waiting_images.append(Path(path))

    def set_system(self, text: str) -> None:
        """Start over with another system prompt.

        Raises:
            UserError: the model's conversation template has no place for one.
        """
        template = self.predictor.template
        if not template.takes_system:
            raise UserError(f"the model's conversation template {template.name!r} has no place for a system prompt")
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

    def ask(self, question: str, output: TextIO) -> str:
        """Put a question with the waiting images and write the answer as it comes.

        An interrupted answer stays in the conversation as far as it came; a failed one leaves everything as it was.
        """
        parts = [{"type": "image", "image": path} for path in self.waiting_images]
        parts.append({"type": "text", "text": question})
        messages = [*self.messages, {"role": "user", "content": parts}]
        answer = ""
        stream = self.predictor.stream(messages, self.options)
        try:
            for piece in stream:
                answer += piece
                output.write(piece)
                output.flush()
        except KeyboardInterrupt:
            stream.close()
            output.write(" [stopped]")
        output.write("\n")
        self.messages = [*messages, {"role": "assistant", "content": answer.strip() or "..."}]
        self.waiting_images = []
        return answer


def run_command(session: ChatSession, line: str, output: TextIO) -> bool:
    """Carry out a line that begins with a slash; False ends the chat.

    Raises:
        UserError: unknown command or missing argument.
    """
    name, _, rest = line.partition(" ")
    if name in ("/exit", "/quit"):
        return False
    if name == "/help":
        output.write(HELP + "\n")
    elif name == "/image":
        for path in _split_paths(rest):
            session.add_image(path)
            output.write(f"{path} goes with your next question.\n")
    elif name == "/system" and rest.strip():
        session.set_system(rest.strip())
        output.write("New system prompt; the conversation starts over.\n")
    elif name == "/undo":
        output.write("Taken back.\n" if session.undo() else "There is nothing to take back.\n")
    elif name == "/clear":
        session.clear()
        output.write("Cleared.\n")
    else:
        raise UserError(f"unknown or incomplete command {line!r}\n{HELP}")
    return True


def _split_paths(text: str) -> list[str]:
    try:
        paths = shlex.split(text)
    except ValueError as error:
        raise UserError(f"/image {text}: {error}; quote paths that contain blanks") from error
    if not paths:
        raise UserError("/image needs a path, such as /image photo.jpg")
    return paths


def chat_loop(session: ChatSession, source: TextIO, output: TextIO, interactive: bool) -> None:
    """Read questions and commands line by line until the end of input or /exit."""
    while True:
        if interactive:
            output.write("USER: ")
            output.flush()
        try:
            line = source.readline()
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


def build_parser(prog: str = "llava-saep chat") -> argparse.ArgumentParser:
    """Return the parser; its flags carry LLaVA's names."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    parser.add_argument("--model-path", "--model_path", required=True, help="folder that training wrote (--output_dir)")
    parser.add_argument("--image-file", "--image_file", nargs="+", default=[], help="images for the first question")
    parser.add_argument("--query", help="ask this one question and exit")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a GPU where there is one)")
    parser.add_argument("--load-8bit", "--load_8bit", action="store_true", help="round the language model to 8 bits")
    parser.add_argument("--load-4bit", "--load_4bit", action="store_true", help="round the language model to 4 bits")
    parser.add_argument("--temperature", type=float, default=0.2, help="0 decodes greedily (default: %(default)s)")
    parser.add_argument("--top-p", "--top_p", type=float, default=1.0)
    parser.add_argument("--max-new-tokens", "--max_new_tokens", type=int, default=512)
    parser.add_argument(
        "--trust-projector-code",
        "--trust_projector_code",
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
    options = GenerationOptions(max_new_tokens=args.max_new_tokens, temperature=args.temperature, top_p=args.top_p)
    for path in args.image_file:
        load_image(path)  # before the model is loaded, which may take long
    predictor = Predictor.from_pretrained(
        args.model_path,
        device=args.device,
        trust_projector_code=args.trust_projector_code,
        quantization=QuantizationConfig.for_loading(load_4bit=args.load_4bit, load_8bit=args.load_8bit),
    )
    options = _fit_to_context(options, predictor)
    session = ChatSession(predictor, options)
    for path in args.image_file:
        session.add_image(path)
    if args.query is not None:
        session.ask(args.query, sys.stdout)
        return 0
    interactive = sys.stdin.isatty()
    if interactive:
        projector = predictor.model.config.projector["name"]
        print(f"{args.model_path}: {projector} projector, {predictor.num_image_tokens} tokens per image. Try /help.")
    chat_loop(session, sys.stdin, sys.stdout, interactive)
    return 0


def _fit_to_context(options: GenerationOptions, predictor: Predictor) -> GenerationOptions:
    """Halve the answer's limit until it leaves room for a prompt, for models with a short context."""
    context = getattr(predictor.model.config.text_config, "max_position_embeddings", None)
    limit = options.max_new_tokens
    while context is not None and limit > context // 2:
        limit //= 2
    return GenerationOptions(max_new_tokens=max(limit, 1), temperature=options.temperature, top_p=options.top_p)
