"""Segments to token ids and labels, with placeholders where images go.

Text is split at "<image>" and each chunk is tokenised on its own, as LLaVA's tokenizer_image_token does: SentencePiece
vocabularies then put a dummy-prefix piece at the start of every chunk, and all released models were trained with it.
Within a chunk the text of all segments is tokenised as a whole, and character offsets tell which tokens are targets.
"""

import bisect
import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from tokenizers import Tokenizer as BackendTokenizer
from tokenizers.pre_tokenizers import Metaspace

from llava_saep.constants import DEFAULT_IMAGE_TOKEN, IGNORE_INDEX
from llava_saep.data.conversation import Segment, segments_text
from llava_saep.data.spelling import is_spelled_out, mark_controls, marked_backend, marked_control_pattern
from llava_saep.errors import UserError

Tokenizer = Any  # a transformers PreTrainedTokenizerBase with a tokenizers back end

_BACKENDS_WITHOUT_MARKER: WeakKeyDictionary[Tokenizer, BackendTokenizer] = WeakKeyDictionary()
"""Made when a text-only conversation mentions "<image>", which takes a moment for a large vocabulary."""


class Encoded(NamedTuple):
    """A tokenised conversation.

    Attributes:
        input_ids: token ids; an image is a run of `image_token_id` as long as its number of tokens.
        labels: `input_ids` at target positions, IGNORE_INDEX elsewhere and at every image position.
        image_spans: [start, end) of each image's run, in order.
    """

    input_ids: list[int]
    labels: list[int]
    image_spans: list[tuple[int, int]]


def encode_segments(
    segments: Sequence[Segment],
    tokenizer: Tokenizer,
    image_token_counts: Sequence[int] | None,
    image_token_id: int,
    *,
    adds_bos: bool = True,
    labels_by_sentence: bool = False,
) -> Encoded:
    """Tokenise a rendered conversation and mark what the model learns to write.

    A token is a target when its first character belongs to a target segment. (A byte-level vocabulary may join the
    newline that ends a prompt with one that starts the answer; such a token is no target.)

    Args:
        segments: what a template rendered, with one "<image>" marker per image. Text may be spelled out
            (`spelling.spell_out`).
        tokenizer: a fast tokenizer (character offsets are needed).
        image_token_counts: tokens of each image, in the order of the markers. None: there are no images, and
            "<image>" is text like any other, also where it is a token of the vocabulary.
        image_token_id: the id that stands for image positions.
        adds_bos: put the tokenizer's bos in front, if it has one.
        labels_by_sentence: mark targets as `sentence_targets` says.
    Raises:
        UserError: the number of markers is not the number of images, or the tokenizer has no offsets.
    """
    chunks = [list(segments)] if image_token_counts is None else _split_at_images(segments)
    counts = image_token_counts or []
    if len(chunks) - 1 != len(counts):
        raise UserError(f"the text has {len(chunks) - 1} {DEFAULT_IMAGE_TOKEN} markers but {len(counts)} images")
    ids: list[int | None] = [*leading_special_ids(tokenizer)] if adds_bos else []
    is_target = [False] * len(ids)
    for position, chunk in enumerate(chunks):
        if position:
            ids.append(None)  # an image
            is_target.append(False)
        chunk_ids, chunk_targets = _encode_chunk(chunk, tokenizer, has_markers=image_token_counts is not None)
        ids += chunk_ids
        is_target += chunk_targets
    if labels_by_sentence:
        lengths = [_length_alone(segment, tokenizer, image_token_counts is not None) for segment in segments[:-1]]
        is_target = sentence_targets(lengths, [segment.is_target for segment in segments[:-1]], len(ids))
    return _expanded(ids, is_target, counts, image_token_id)


def sentence_targets(lengths: Sequence[int], is_answer: Sequence[bool], num_tokens: int) -> list[bool]:
    """Return which tokens LLaVA's v0 procedure trains on (train.py, preprocess_v0 with _mask_targets).

    It counts the tokens of each sentence alone, where every one starts with a bos that the conversation does not have,
    so that its spans come a little later with each sentence; a question's first two tokens and the closing "### " are
    targets as well. Released v0 models were trained this way, and nothing else should be.

    Args:
        lengths: tokens of the header and of each sentence alone, an image counting as one.
        is_answer: for each of them, whether it is the assistant's.
        num_tokens: of the whole conversation.
    """
    is_target = [True] * num_tokens
    start, end = 0, lengths[0]
    is_target[:end] = [False] * len(is_target[:end])
    for length, answer in zip(lengths[1:], is_answer[1:], strict=True):
        start, end = end, end + length
        if not answer:
            is_target[start + 2 : end] = [False] * len(is_target[start + 2 : end])
    return is_target


def encode_prompt(
    prompt: str | Sequence[Segment],
    tokenizer: Tokenizer,
    image_token_counts: Sequence[int] | None,
    image_token_id: int,
    *,
    adds_bos: bool = True,
) -> list[int]:
    """Tokenise a prompt for generation exactly as training tokenises the same text.

    Args and errors as in encode_segments; a string is taken as one segment.
    """
    segments = [Segment(prompt, False)] if isinstance(prompt, str) else prompt
    return encode_segments(segments, tokenizer, image_token_counts, image_token_id, adds_bos=adds_bos).input_ids


def leading_special_ids(tokenizer: Tokenizer) -> list[int]:
    """Return what the tokenizer puts before any text: [bos] or nothing."""
    added = tokenizer("").input_ids
    return added[:1] if tokenizer.bos_token_id is not None and added[:1] == [tokenizer.bos_token_id] else []


def count_text_tokens(texts: Sequence[str], tokenizer: Tokenizer, *, adds_bos: bool = True) -> list[int]:
    """Count the tokens of rendered conversations without those of their images, many at a time.

    Every "<image>" in them is an image; `adds_bos` as in encode_segments.
    """
    chunks_of = [text.split(DEFAULT_IMAGE_TOKEN) for text in texts]
    spaced = [_insert_dummy_prefixes(chunk, tokenizer)[0] for chunks in chunks_of for chunk in chunks]
    encodings = tokenizer(spaced, add_special_tokens=False, return_attention_mask=False, verbose=False).input_ids
    num_tokens = iter(len(ids) for ids in encodings)
    num_leading = len(leading_special_ids(tokenizer)) if adds_bos else 0
    return [num_leading + sum(next(num_tokens) for _ in chunks) for chunks in chunks_of]


def _split_at_images(segments: Sequence[Segment]) -> list[list[Segment]]:
    """Split the segments into the chunks between image markers; n markers give n + 1 chunks."""
    chunks: list[list[Segment]] = [[]]
    for text, is_target in segments:
        first, *others = text.split(DEFAULT_IMAGE_TOKEN)
        chunks[-1].append(Segment(first, is_target))
        chunks += [[Segment(other, is_target)] for other in others]
    return chunks


def _length_alone(segment: Segment, tokenizer: Tokenizer, has_markers: bool) -> int:
    """Count the tokens of one segment alone, its bos included and an image as one."""
    counts = [1] * segment.text.count(DEFAULT_IMAGE_TOKEN) if has_markers else None
    return len(encode_segments([segment], tokenizer, counts, 0).input_ids)


def _expanded(
    ids: Sequence[int | None], is_target: Sequence[bool], counts: Sequence[int], image_token_id: int
) -> Encoded:
    """Put each image's run of placeholders where `ids` has None."""
    encoded = Encoded([], [], [])
    remaining = iter(counts)
    for token_id, target in zip(ids, is_target, strict=True):
        if token_id is not None:
            encoded.input_ids.append(token_id)
            encoded.labels.append(token_id if target else IGNORE_INDEX)
            continue
        start, count = len(encoded.input_ids), next(remaining)
        encoded.input_ids.extend([image_token_id] * count)
        encoded.labels.extend([IGNORE_INDEX] * count)
        encoded.image_spans.append((start, start + count))
    return encoded


def _encode_chunk(chunk: list[Segment], tokenizer: Tokenizer, *, has_markers: bool) -> tuple[list[int], list[bool]]:
    """Tokenise the text between two images as a whole -> (ids, whether each is a target)."""
    text = "".join(segment.text for segment in chunk)
    if not text:
        return [], []
    if not tokenizer.is_fast:
        raise UserError(
            f"the tokenizer {type(tokenizer).__name__} gives no character offsets, which labels are made from; "
            "use a checkpoint with a tokenizer.json, or convert its tokenizer to a fast one"
        )
    backend = None if has_markers or DEFAULT_IMAGE_TOKEN not in text else _backend_without_marker(tokenizer)
    special_tokens = None
    if is_spelled_out(text):
        chunk = [segment._replace(text=mark_controls(segment.text, tokenizer)) for segment in chunk]
        text, special_tokens = segments_text(chunk), marked_control_pattern(tokenizer)
        backend = marked_backend(tokenizer)
    spaced, insertions = _insert_dummy_prefixes(text, tokenizer, has_markers, special_tokens)
    if backend is None:
        encoding = tokenizer(spaced, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, offsets = list(encoding.input_ids), encoding.offset_mapping
    else:
        backend_encoding = backend.encode(spaced, add_special_tokens=False)
        ids, offsets = list(backend_encoding.ids), backend_encoding.offsets
    bounds = _segment_ends(chunk)
    is_target = []
    for start, _ in offsets:
        start -= bisect.bisect_left(insertions, start)  # back to positions of the text without inserted spaces
        segment = chunk[min(bisect.bisect_right(bounds, start), len(chunk) - 1)]
        is_target.append(segment.is_target)
    return ids, is_target


def _backend_without_marker(tokenizer: Tokenizer) -> BackendTokenizer:
    """Return the tokenizer's back end with "<image>" not being a token, so that it is spelled out as text.

    The token keeps its id and gets a content that no text has; leaving it out would renumber those after it.
    """
    backend = _BACKENDS_WITHOUT_MARKER.get(tokenizer)
    if backend is None:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        for token in state["added_tokens"]:
            if token["content"] == DEFAULT_IMAGE_TOKEN:
                token["content"] = "\0" + DEFAULT_IMAGE_TOKEN + "\0"
        state["truncation"] = state["padding"] = None  # a tokenizer remembers what it was last called with
        backend = _BACKENDS_WITHOUT_MARKER[tokenizer] = BackendTokenizer.from_str(json.dumps(state))
    return backend


def _segment_ends(chunk: list[Segment]) -> list[int]:
    """Return the character position at which each segment of a chunk ends."""
    ends = []
    position = 0
    for segment in chunk:
        position += len(segment.text)
        ends.append(position)
    return ends


def _insert_dummy_prefixes(
    text: str, tokenizer: Tokenizer, has_markers: bool = True, special_tokens: re.Pattern[str] | None = None
) -> tuple[str, list[int]]:
    """Give a text that starts with a space the dummy prefix that SentencePiece would give it.

    SentencePiece puts a space before every text. The Metaspace pre-tokenizer that transformers 5 builds from a
    tokenizer.model leaves it out when there is one already, so " a" loses a piece against what LLaVA's models saw.
    With scheme "first" (legacy=False) this concerns the start of a text, with "always" also the text after each
    special token.

    Args:
        special_tokens: matches those; None: all added ones, "<image>" if `has_markers`.
    Returns:
        The text to tokenise, and the positions in it of the inserted spaces, ascending.
    """
    scheme = _dummy_prefix_scheme(tokenizer)
    if scheme == "never" or " " not in text:
        return text, []
    starts = [0]
    if scheme == "always":
        special_tokens = special_tokens or _special_token_pattern(tokenizer, has_markers)
        starts += [match.end() for match in special_tokens.finditer(text)]
    starts = [start for start in starts if text.startswith(" ", start)]
    pieces = [text[start:end] for start, end in zip([0, *starts], [*starts, len(text)], strict=True)]
    return " ".join(pieces), [start + position for position, start in enumerate(starts)]


def _dummy_prefix_scheme(tokenizer: Tokenizer) -> str:
    """Return "first", "always" or "never": where the tokenizer's Metaspace pre-tokenizer adds a space."""
    backend = getattr(tokenizer, "backend_tokenizer", None)  # tokenizers in Python have none
    pre_tokenizer = None if backend is None else backend.pre_tokenizer
    return pre_tokenizer.prepend_scheme if isinstance(pre_tokenizer, Metaspace) else "never"


def _special_token_pattern(tokenizer: Tokenizer, has_markers: bool) -> re.Pattern[str]:
    """Match any token that the tokenizer cuts out of the text before it looks at the rest, longest first."""
    contents = {token.content for token in tokenizer.added_tokens_decoder.values()}
    contents -= set() if has_markers else {DEFAULT_IMAGE_TOKEN}
    alternatives = map(re.escape, sorted(contents, key=len, reverse=True))
    return re.compile("|".join(alternatives) if contents else r"(?!)")
