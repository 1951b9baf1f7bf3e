"""The values that conversations are made of, and LLaVA's rule for where an image marker stands in a turn.

A template renders turns to segments; labels follow from the segments (tokenization.py), never from counting tokens.
"""

from typing import Literal, NamedTuple

from llava_saep.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_TOKEN

Role = Literal["user", "assistant"]

MMTAG_IMAGE_MARKER = f"<Image>{DEFAULT_IMAGE_TOKEN}</Image>"
"""What LLaVA's mmtag templates write for an image."""


class Turn(NamedTuple):
    """One message. `text` holds one "<image>" marker per image that it shows."""

    role: Role
    text: str


class Segment(NamedTuple):
    """A stretch of the rendered conversation; `is_target` text is what the model learns to write."""

    text: str
    is_target: bool


def segments_text(segments: list[Segment]) -> str:
    """Return the rendered conversation as one string."""
    return "".join(segment.text for segment in segments)


def count_image_markers(turns: list[Turn] | tuple[Turn, ...]) -> int:
    """Return how many "<image>" markers the turns hold."""
    return sum(turn.text.count(DEFAULT_IMAGE_TOKEN) for turn in turns)


def between_start_and_end(image_marker: str) -> str:
    """Return an image marker with "<im_start>" and "<im_end>" around its "<image>" (--mm_use_im_start_end)."""
    return image_marker.replace(
        DEFAULT_IMAGE_TOKEN, DEFAULT_IM_START_TOKEN + DEFAULT_IMAGE_TOKEN + DEFAULT_IM_END_TOKEN
    )


def place_image_markers(text: str, use_im_start_end: bool = False, image_marker: str = DEFAULT_IMAGE_TOKEN) -> str:
    """Move a turn's single image marker to its front, as LLaVA does for training data.

    A lone marker becomes a leading "<image>\\n" and the rest is stripped (LLaVA, train.py preprocess_multimodal).
    LLaVA also collapses several markers of one turn into one, which loses images; here they stay where they are.

    Args:
        text: the text of one turn.
        use_im_start_end: wrap each marker as "<im_start><image><im_end>" (--mm_use_im_start_end).
        image_marker: what the template writes for an image; holds "<image>".
    """
    num_markers = text.count(DEFAULT_IMAGE_TOKEN)
    if num_markers == 0:
        return text
    if num_markers == 1:
        rest = text.replace(DEFAULT_IMAGE_TOKEN, "").strip()
        text = f"{DEFAULT_IMAGE_TOKEN}\n{rest}"
    if use_im_start_end:
        image_marker = between_start_and_end(image_marker)
    return text.strip().replace(DEFAULT_IMAGE_TOKEN, image_marker)
