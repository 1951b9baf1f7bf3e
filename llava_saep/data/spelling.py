"""Text that stays text: who types "</s>" or "<image>" neither ends a turn nor shows an image.

A template joins what users write with control tokens of its own, and a tokenizer cannot tell them apart afterwards. So
control tokens in a user's text are disguised before the template sees them, in a form that nobody can guess; afterwards
the template's own are the only ones left, and get a form that the text cannot have. Text without control tokens takes
none of these ways.
"""

import functools
import json
import re
import secrets
from typing import Any
from weakref import WeakKeyDictionary

from tokenizers import Tokenizer as BackendTokenizer

from llava_saep.constants import DEFAULT_IMAGE_TOKEN

Tokenizer = Any  # a transformers PreTrainedTokenizerBase with a tokenizers back end

_MARKED_BACKENDS: WeakKeyDictionary[Tokenizer, tuple[frozenset[str], BackendTokenizer]] = WeakKeyDictionary()
"""Made when a text first mentions a control token, which takes a moment for a large vocabulary."""


@functools.cache
def _secret() -> str:
    return secrets.token_hex(8)


def control_tokens(tokenizer: Tokenizer) -> frozenset[str]:
    """What ends turns, starts them or stands for an image: the special tokens, and "<image>" in any case."""
    added = tokenizer.added_tokens_decoder.values()
    return frozenset(token.content for token in added if token.special) | {DEFAULT_IMAGE_TOKEN}


def spell_out(text: str, tokenizer: Tokenizer) -> str:
    """Disguise the control tokens in a text; `tokenization.encode_segments` and `as_typed` know it again.

    A text in which the tokenizer's normalisation makes one (of full-width characters) is disguised as a whole.
    """
    controls = control_tokens(tokenizer)
    normalizer = tokenizer.backend_tokenizer.normalizer
    if normalizer is not None and _count(normalizer.normalize_str(text), controls) > _count(text, controls):
        return _disguise(text)
    return _pattern(controls).sub(lambda match: _disguise(match[0]), text)


def is_spelled_out(text: str) -> bool:
    """Whether something in the text is disguised."""
    return _disguised().search(text) is not None


def as_typed(text: str) -> str:
    """The text with nothing disguised."""
    return _disguised().sub(lambda match: bytes.fromhex(match[1]).decode("utf-8", "surrogatepass"), text)


def mark_controls(text: str, tokenizer: Tokenizer) -> str:
    """Give the control tokens of a rendered text their marked form, and the user's text its own."""
    marked = _pattern(control_tokens(tokenizer)).sub(lambda match: _marked(match[0]), text)
    return as_typed(marked)


def marked_control_pattern(tokenizer: Tokenizer) -> re.Pattern[str]:
    """Match each token that `marked_backend` cuts out of a text before it looks at the rest."""
    controls = control_tokens(tokenizer)
    others = {token.content for token in tokenizer.added_tokens_decoder.values()} - controls
    return _pattern(frozenset(map(_marked, controls)) | others)


def marked_backend(tokenizer: Tokenizer) -> BackendTokenizer:
    """Return the tokenizer's back end in which control tokens have their marked form alone, with the ids they had.

    Their plain form becomes text like any other, also where the vocabulary itself holds it.
    """
    controls = control_tokens(tokenizer)
    known, backend = _MARKED_BACKENDS.get(tokenizer, (None, None))
    if backend is None or known != controls:
        backend = _rename_tokens(tokenizer.backend_tokenizer, {content: _marked(content) for content in controls})
        _MARKED_BACKENDS[tokenizer] = (controls, backend)
    return backend


def _rename_tokens(backend: BackendTokenizer, names: dict[str, str]) -> BackendTokenizer:
    """Return a copy of a back end with other contents for some tokens."""
    state = json.loads(backend.to_str())
    state["truncation"] = state["padding"] = state["post_processor"] = None
    for token in state["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = state["model"]
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        model["vocab"] = {names.get(piece, piece): index for piece, index in vocabulary.items()}
    else:  # Unigram: pieces with their scores
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocabulary]
    if model.get("unk_token") is not None:
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    if "merges" in model:  # BPE; a merge needs its result in the vocabulary
        model["merges"] = [merge for merge in model["merges"] if _merged(merge) not in names]
    return BackendTokenizer.from_str(json.dumps(state))


def _merged(merge: str | list[str]) -> str:
    return "".join(merge.split(" ") if isinstance(merge, str) else merge)


def _count(text: str, controls: frozenset[str]) -> int:
    return sum(text.count(content) for content in controls)


def _pattern(contents: frozenset[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(contents, key=len, reverse=True))))


def _disguise(text: str) -> str:
    return f"[[{_secret()}:{text.encode('utf-8', 'surrogatepass').hex()}]]"


@functools.cache
def _disguised() -> re.Pattern[str]:
    return re.compile(rf"\[\[{_secret()}:([0-9a-f]*)\]\]")


def _marked(content: str) -> str:
    return f"[[{_secret()}]]{content}"
