"""Segments to token ids and labels, with placeholders where images go.

Text is split at "<image>" and each chunk is tokenised on its own, as LLaVA's tokenizer_image_token does: SentencePiece
vocabularies then put a dummy-prefix piece at the start of every chunk, and all released models were trained with it.
Within a chunk the text of all segments is tokenised as a whole, and character offsets tell which tokens are targets.
"""

import bisect
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from tokenizers.pre_tokenizers import Metaspace

from llava_saep.constants import DEFAULT_IMAGE_TOKEN, IGNORE_INDEX
from llava_saep.data.conversation import Segment
from llava_saep.errors import UserError

Tokenizer = Any  # a transformers PreTrainedTokenizerBase with a tokenizers back end


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
    segments: Sequence[Segment], tokenizer: Tokenizer, image_token_counts: Sequence[int], image_token_id: int
) -> Encoded:
    """Tokenise a rendered conversation and mark what the model learns to write.

    A token is a target when its first character belongs to a target segment. (A byte-level vocabulary may join the
    newline that ends a prompt with one that starts the answer; such a token is no target.)

    Args:
        segments: what a template rendered, with one "<image>" marker per image.
        tokenizer: a fast tokenizer (character offsets are needed).
        image_token_counts: tokens of each image, in the order of the markers.
        image_token_id: the id that stands for image positions.
    Raises:
        UserError: the number of markers is not the number of images, or the tokenizer has no offsets.
    """
    chunks = _split_at_images(segments)
    if len(chunks) - 1 != len(image_token_counts):
        raise UserError(
            f"the text has {len(chunks) - 1} {DEFAULT_IMAGE_TOKEN} markers but {len(image_token_counts)} images"
        )
    input_ids = leading_special_ids(tokenizer)
    labels = [IGNORE_INDEX] * len(input_ids)
    image_spans = []
    for position, chunk in enumerate(chunks):
        if position:
            count = image_token_counts[position - 1]
            image_spans.append((len(input_ids), len(input_ids) + count))
            input_ids += [image_token_id] * count
            labels += [IGNORE_INDEX] * count
        chunk_ids, chunk_labels = _encode_chunk(chunk, tokenizer)
        input_ids += chunk_ids
        labels += chunk_labels
    return Encoded(input_ids, labels, image_spans)


def encode_prompt(
    prompt: str | Sequence[Segment], tokenizer: Tokenizer, image_token_counts: Sequence[int], image_token_id: int
) -> list[int]:
    """Tokenise a prompt for generation exactly as training tokenises the same text.

    Args and errors as in encode_segments; a string is taken as one segment.
    """
    segments = [Segment(prompt, False)] if isinstance(prompt, str) else prompt
    return encode_segments(segments, tokenizer, image_token_counts, image_token_id).input_ids


def leading_special_ids(tokenizer: Tokenizer) -> list[int]:
    """Return what the tokenizer puts before any text: [bos] or nothing."""
    added = tokenizer("").input_ids
    return added[:1] if tokenizer.bos_token_id is not None and added[:1] == [tokenizer.bos_token_id] else []


def count_text_tokens(texts: Sequence[str], tokenizer: Tokenizer) -> list[int]:
    """Count the tokens of rendered conversations without those of their images, many at a time."""
    chunks_of = [text.split(DEFAULT_IMAGE_TOKEN) for text in texts]
    spaced = [_insert_dummy_prefixes(chunk, tokenizer)[0] for chunks in chunks_of for chunk in chunks]
    encodings = tokenizer(spaced, add_special_tokens=False, return_attention_mask=False, verbose=False).input_ids
    num_tokens = iter(len(ids) for ids in encodings)
    num_leading = len(leading_special_ids(tokenizer))
    return [num_leading + sum(next(num_tokens) for _ in chunks) for chunks in chunks_of]


def _split_at_images(segments: Sequence[Segment]) -> list[list[Segment]]:
    """Split the segments into the chunks between image markers; n markers give n + 1 chunks."""
    chunks: list[list[Segment]] = [[]]
    for text, is_target in segments:
        first, *others = text.split(DEFAULT_IMAGE_TOKEN)
        chunks[-1].append(Segment(first, is_target))
        chunks += [[Segment(other, is_target)] for other in others]
    return chunks


def _encode_chunk(chunk: list[Segment], tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Tokenise the text between two images as a whole -> (ids, labels)."""
    text = "".join(segment.text for segment in chunk)
    if not text:
        return [], []
    if not tokenizer.is_fast:
        raise UserError(
            f"the tokenizer {type(tokenizer).__name__} gives no character offsets, which labels are made from; "
            "use a checkpoint with a tokenizer.json, or convert its tokenizer to a fast one"
        )
    spaced, insertions = _insert_dummy_prefixes(text, tokenizer)
    encoding = tokenizer(spaced, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids = list(encoding.input_ids)
    bounds = _segment_ends(chunk)
    labels = []
    for token_id, (start, _) in zip(ids, encoding.offset_mapping, strict=True):
        start -= bisect.bisect_left(insertions, start)  # back to positions of the text without inserted spaces
        segment = chunk[min(bisect.bisect_right(bounds, start), len(chunk) - 1)]
        labels.append(token_id if segment.is_target else IGNORE_INDEX)
    return ids, labels


def _segment_ends(chunk: list[Segment]) -> list[int]:
    """Return the character position at which each segment of a chunk ends."""
    ends = []
    position = 0
    for segment in chunk:
        position += len(segment.text)
        ends.append(position)
    return ends


def _insert_dummy_prefixes(text: str, tokenizer: Tokenizer) -> tuple[str, list[int]]:
    """Give a text that starts with a space the dummy prefix that SentencePiece would give it.

    SentencePiece puts a space before every text. The Metaspace pre-tokenizer that transformers 5 builds from a
    tokenizer.model leaves it out when there is one already, so " a" loses a piece against what LLaVA's models saw.
    With scheme "first" (legacy=False) this concerns the start of a text, with "always" also the text after each
    special token.

    Returns:
        The text to tokenise, and the positions in it of the inserted spaces, ascending.
    """
    scheme = _dummy_prefix_scheme(tokenizer)
    if scheme == "never" or " " not in text:
        return text, []
    starts = [0]
    if scheme == "always":
        starts += [match.end() for match in _special_token_pattern(tokenizer).finditer(text)]
    starts = [start for start in starts if text.startswith(" ", start)]
    pieces = [text[start:end] for start, end in zip([0, *starts], [*starts, len(text)], strict=True)]
    return " ".join(pieces), [start + position for position, start in enumerate(starts)]


def _dummy_prefix_scheme(tokenizer: Tokenizer) -> str:
    """Return "first", "always" or "never": where the tokenizer's Metaspace pre-tokenizer adds a space."""
    backend = getattr(tokenizer, "backend_tokenizer", None)  # tokenizers in Python have none
    pre_tokenizer = None if backend is None else backend.pre_tokenizer
    return pre_tokenizer.prepend_scheme if isinstance(pre_tokenizer, Metaspace) else "never"


def _special_token_pattern(tokenizer: Tokenizer) -> re.Pattern[str]:
    """Match any token that the tokenizer cuts out of the text before it looks at the rest, longest first."""
    contents = sorted((token.content for token in tokenizer.added_tokens_decoder.values()), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, contents)) if contents else r"(?!)")
