"""The training data set: records to token ids, labels and pixel values.

Everything that can be wrong with a record and seen without opening its image is found when the data set is made;
damaged images are found when they are read. Lengths need no image, since every image has the same token count; where
images are cut into crops, its size, which the head of the file tells.
"""

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import torch
from torch import Tensor
from torch.utils.data import Dataset

from llava_saep.constants import DEFAULT_IMAGE_TOKEN, IGNORE_INDEX
from llava_saep.data.conversation import Segment, count_image_markers, segments_text
from llava_saep.data.feature_cache import FeatureStore, Lookup
from llava_saep.data.images import (
    GridPinpoints,
    ImageProcessor,
    ImageSize,
    check_aspect_ratio,
    load_image,
    preprocess_image,
    processed_image_size,
    read_image_size,
    smallest_decoded_size,
)
from llava_saep.data.ledger import NUM_EXAMPLES, DataAccount, SampleLedger
from llava_saep.data.progress import show_progress
from llava_saep.data.records import (
    IMAGE_CUT,
    MISSING_IMAGE,
    NO_SUPERVISED_TOKEN,
    NOT_A_CAPTION,
    REFUSED_BY_TEMPLATE,
    TOO_LONG,
    UNKNOWN_TOKEN,
    UNREADABLE_IMAGE,
    BadSampleError,
    Record,
    bad_sample,
    read_records,
)
from llava_saep.data.templates import AnyTemplate
from llava_saep.data.tokenization import Encoded, Tokenizer, count_text_tokens, encode_segments
from llava_saep.errors import UserError
from projectors import PatchGrid

__all__ = ["BadSampleError", "ConversationDataset", "DataReport", "check_data", "read_records"]

logger = logging.getLogger(__name__)

OnBadSample = Literal["error", "skip"]
OnTooLong = Literal["truncate", "skip", "error"]

MAX_BAD_IN_A_ROW = 100
"""So many samples that cannot be read, one after the other, are no damaged files but a folder that is gone."""

FILES_WORTH_LISTING = 100
"""From this many images in one folder on, listing the folder is cheaper than asking for each file."""

T = TypeVar("T")


class _PreparedImage(NamedTuple):
    """An image of a sample: its size before preprocessing, and its pixel values or what is stored in place of them."""

    original_size: ImageSize
    pixel_values: Tensor
    lookup: Lookup | None = None


class ConversationDataset(Dataset[dict[str, Tensor]]):
    """LLaVA-format conversations as samples for training.

    With on_bad_sample "skip", samples that are known to be unusable when the data set is made are left out (they do
    not count in len). With on_bad_image "skip", one whose image turns out to be damaged is replaced by the next usable
    one, so that the same index gives the same sample, and is not opened again. `skipped` counts both.
    """

    def __init__(
        self,
        data_path: str | os.PathLike[str],
        image_folder: str | os.PathLike[str] | None,
        *,
        tokenizer: Tokenizer,
        image_processor: ImageProcessor,
        image_aspect_ratio: str,
        template: AnyTemplate,
        num_image_tokens: Callable[[PatchGrid], int],
        patch_size: int,
        image_token_id: int,
        max_length: int,
        image_grid_pinpoints: GridPinpoints = (),
        num_anyres_tokens: Callable[[ImageSize, ImageSize], int] | None = None,
        apply_exif_orientation: bool = False,
        jpeg_draft: bool = False,
        on_bad_sample: OnBadSample = "error",
        on_bad_image: OnBadSample | None = None,
        on_too_long: OnTooLong = "truncate",
        use_im_start_end: bool = False,
        vocab_size: int | None = None,
    ) -> None:
        """
        Args:
            data_path: LLaVA's JSON list, or .jsonl.
            image_folder: what the records' image paths are relative to; None means the working directory.
            num_image_tokens: tokens that the projector makes of a grid of patches.
            patch_size: side of the tower's patches in pixels.
            max_length: longest sample in tokens, images included.
            image_grid_pinpoints: with aspect ratio "anyres", what an image may be brought to before it is cut.
            num_anyres_tokens: with "anyres", tokens of an image by its size and that of one crop.
            apply_exif_orientation: turn images as their EXIF tags say. LLaVA does not.
            jpeg_draft: decode JPEGs at a reduced scale where the resize that follows allows it ("square" and "pad").
            use_im_start_end: images stand between "<im_start>" and "<im_end>".
            vocab_size: rows of the language model's embedding; a sample with another token cannot be used. None: any.
            on_bad_sample: "error" raises at the first sample that cannot be used, "skip" goes on without it.
            on_bad_image: the same for an image that shows its damage when it is read; None: as on_bad_sample.
            on_too_long: "truncate" cuts what is beyond max_length off on the right; the others find such samples when
                the data set is made, for which those that could be too long are tokenised.
        Raises:
            UserError: the file cannot be read, an option is unknown, no sample can be used, or (with "error") a
                sample cannot be used.
        """
        on_bad_image = on_bad_sample if on_bad_image is None else on_bad_image
        _check_choice("on_bad_sample", on_bad_sample, get_args(OnBadSample))
        _check_choice("on_bad_image", on_bad_image, get_args(OnBadSample))
        _check_choice("on_too_long", on_too_long, get_args(OnTooLong))
        if max_length < 1:
            raise UserError(f"max_length is {max_length}; it must be at least 1 token")
        check_aspect_ratio(image_aspect_ratio)
        self.data_path = os.fspath(data_path)
        self.image_folder = os.fspath(image_folder) if image_folder is not None else ""
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.image_aspect_ratio = image_aspect_ratio
        self.image_grid_pinpoints = image_grid_pinpoints
        self.apply_exif_orientation = apply_exif_orientation
        self.jpeg_draft = jpeg_draft
        self._feature_store: FeatureStore | None = None
        self.template = template
        self.image_token_id = image_token_id
        self.max_length = max_length
        self.on_bad_sample = on_bad_sample
        self.vocab_size = vocab_size
        self.on_bad_image = on_bad_image
        self.on_too_long = on_too_long
        self.image_size = processed_image_size(image_processor)
        height, width = self.image_size
        self.num_tokens_per_image = num_image_tokens(PatchGrid(height // patch_size, width // patch_size))
        self._num_anyres_tokens = num_anyres_tokens if image_aspect_ratio == "anyres" else None
        self.max_tokens_per_image = self._max_tokens_per_image()
        self._left_out: Counter[str] = Counter()
        self._examples: dict[str, list[str]] = {}
        self._records = self._read_usable_records(use_im_start_end)
        self.ledger = SampleLedger(len(self._records))
        self._num_bad_in_a_row = 0
        _warn_about_foreign_end(template, tokenizer)

    def use_feature_store(self, store: FeatureStore) -> None:
        """From now on, give what is stored of an image in place of its pixels."""
        self._feature_store = store

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return input_ids (T,), labels (T,) and, unless the sample is text only, pixel_values (images, 3, H, W).

        sample_index () tells which sample it is, also where another takes the place of one that cannot be used.

        With "anyres", pixel_values is a list with one (crops, 3, H, W) tensor per image, and image_sizes (images, 2)
        tells their heights and widths. With a feature store it is so for any aspect ratio, the tensor being empty where
        vision_features, a list with one tuple per image, has one tensor per layer; image_lookups, a list of (key,
        is_damaged), says where the features belong.

        Raises:
            IndexError: `index` is outside the data set.
            BadSampleError: the sample cannot be used and on_bad_image is "error".
            UserError: with "skip", no sample can be used, or MAX_BAD_IN_A_ROW in a row cannot.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} of a data set with {len(self)} samples")
        for offset in range(len(self)):
            sample = self.load_or_skip((index + offset) % len(self))
            if sample is not None:
                return sample
        raise self.nothing_usable()

    def load_or_skip(self, index: int) -> dict[str, Tensor] | None:
        """Return the sample at `index`; None where it cannot be used and shall be skipped, which counts it.

        Raises:
            BadSampleError: it cannot be used and on_bad_image, or what else it is a matter of, is "error".
            UserError: it is the last of MAX_BAD_IN_A_ROW.
        """
        if self.ledger.is_bad(index):
            return None
        try:
            sample = self.load_sample(index)
        except BadSampleError as error:
            policy = self.on_bad_image if error.cause == UNREADABLE_IMAGE else self.on_bad_sample
            if policy == "error":
                raise
            self._note_bad(index, error)
            return None
        self._num_bad_in_a_row = 0
        return sample

    def nothing_usable(self) -> UserError:
        """Say that no sample can be used, and why, by cause."""
        return UserError(f"{self.data_path}: no sample can be used; {_describe_counts(self.skipped)}")

    def load_sample(self, index: int) -> dict[str, Tensor]:
        """Return the sample at `index` itself, whatever on_bad_image says.

        Raises:
            BadSampleError: it cannot be used.
        """
        record = self._records[index]
        if self._num_anyres_tokens is None:
            encoded, num_images, is_cut = self._encode(record)
            images = [self._prepare_image(record, name) for name in record.images[:num_images]]
        else:  # the images first, whose sizes say how many tokens they have, so that each file is opened once
            images = [self._prepare_image(record, name) for name in record.images]
            encoded, num_images, is_cut = self._encode(record, [image.original_size for image in images])
        if is_cut:
            self.ledger.note_cut(index)
        sample = {
            "input_ids": torch.tensor(encoded.input_ids),
            "labels": torch.tensor(encoded.labels),
            "sample_index": torch.tensor(index),
        }
        return sample | (self._image_inputs(images[:num_images]) if num_images else {})

    def _image_inputs(self, images: Sequence[_PreparedImage]) -> dict[str, Any]:
        """Put a sample's images in the form that `__getitem__` describes."""
        pixels = [image.pixel_values for image in images]
        sizes = torch.tensor([image.original_size for image in images])
        if self._feature_store is not None:
            lookups = [image.lookup for image in images]
            return {
                "pixel_values": pixels,
                "image_sizes": sizes,
                "vision_features": [() if known.features is None else known.features.layers for known in lookups],
                "image_lookups": [(known.key, known.is_damaged) for known in lookups],
            }
        if self._num_anyres_tokens is not None:
            return {"pixel_values": pixels, "image_sizes": sizes}
        return {"pixel_values": torch.stack(pixels)}

    @property
    def num_images(self) -> int:
        """How many image files the records name; one that several name counts once."""
        return len({name for record in self._records for name in record.images})

    @property
    def skipped(self) -> dict[str, int]:
        """How many samples were left out or replaced so far, in all worker processes, by cause."""
        replaced = {cause: len(indices) for cause, indices in self.ledger.bad_indices().items()}
        return dict(self._left_out + Counter(replaced))

    def describe_sample(self, index: int) -> str:
        """Name a sample by file, index, id and images."""
        record = self._records[index]
        images = f", images {', '.join(record.images)}" if record.images else ""
        return f"{record.source}{images}"

    def account(self) -> DataAccount:
        """Tell how the data set was used so far; samples that were replaced are read again, to say what is wrong."""
        bad, cut = self.ledger.bad_indices(), self.ledger.cut_indices()
        examples: dict[str, list[str]] = {cause: list(messages) for cause, messages in self._examples.items()}
        for cause, indices in bad.items():
            messages = [self._why_bad(index) for index in indices[:NUM_EXAMPLES]]
            examples[cause] = [*examples.get(cause, ()), *messages][:NUM_EXAMPLES]
        if cut:
            examples["cut"] = [self.describe_sample(index) for index in cut[:NUM_EXAMPLES]]
        return DataAccount(
            path=self.data_path,
            num_records=len(self) + self._left_out.total(),
            num_used=len(self) - sum(map(len, bad.values())),
            left_out=dict(self._left_out),
            replaced={cause: len(indices) for cause, indices in bad.items()},
            num_cut=len(cut),
            examples=examples,
        )

    def _why_bad(self, index: int) -> str:
        try:
            self.load_sample(index)
        except BadSampleError as error:
            return str(error)
        return f"{self.describe_sample(index)}: could not be read then, and can be now"

    def find_damaged_image(self, index: int) -> BadSampleError | None:
        """Decode the images of a sample and return what is wrong with one of them."""
        record = self._records[index]
        try:
            for name in record.images:
                self._prepare_image(record, name)
        except BadSampleError as error:
            return error
        return None

    def leave_out(self, errors: Mapping[int, BadSampleError]) -> None:
        """Do with samples that were found to be unusable before training what on_bad_sample says.

        Args:
            errors: what is wrong, by index.
        Raises:
            BadSampleError: there is one, and on_bad_sample is "error".
            UserError: none is left.
        """
        self._report_bad_records([errors[index] for index in sorted(errors)])
        self._records = [record for index, record in enumerate(self._records) if index not in errors]
        self._refuse_empty(self._records)
        self.ledger = SampleLedger(len(self._records))
        self.__dict__.pop("lengths", None)

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each sample, cut to max_length. First use tokenises all texts; no image is decoded."""
        lengths = []
        batches = list(_batches(self._records, 1_000))
        for batch in show_progress(batches, "Tokenising for lengths", "thousand samples"):
            texts = [segments_text(self._render(record)) for record in batch]
            counts = count_text_tokens(texts, self.tokenizer, adds_bos=self.template.adds_bos)
            for record, text, num_text_tokens in zip(batch, texts, counts, strict=True):
                if DEFAULT_IMAGE_TOKEN in text and not record.images:
                    num_text_tokens = len(self._encode_whole(record).input_ids)  # there it is text
                num_tokens = num_text_tokens + self._num_image_tokens_for_length(record)
                lengths.append(min(num_tokens, self.max_length))
        return lengths

    @property
    def modality_lengths(self) -> list[int]:
        """`lengths`, negative for text-only samples (LLaVA's convention for grouping by modality)."""
        pairs = zip(self._records, self.lengths, strict=True)
        return [length if record.images else -length for record, length in pairs]

    def _read_usable_records(self, use_im_start_end: bool) -> list[Record]:
        """Read the file and find every problem that shows without opening an image."""
        errors: list[BadSampleError] = []
        records = read_records(
            self.data_path,
            use_im_start_end=use_im_start_end,
            image_marker=self.template.image_marker,
            any_order=self.template.any_order,
            on_bad_record=errors.append,
        )
        if any(record.images for record in records) and not os.path.isdir(self.image_folder or "."):
            raise UserError(f"image folder {self.image_folder} does not exist; {self.data_path} names images in it")
        missing_images = self._find_missing_images(records)
        usable = []
        for record in show_progress(records, "Checking records", "records"):
            error = self._find_problem(record, missing_images)
            if error is None:
                usable.append(record)
            else:
                errors.append(error)
        self._report_bad_records(errors)
        self._refuse_empty(usable)
        return usable

    def _refuse_empty(self, usable: Sequence[Record]) -> None:
        if not usable:
            raise UserError(f"{self.data_path}: no sample can be used; {_describe_counts(self._left_out)}")

    def _report_bad_records(self, errors: list[BadSampleError]) -> None:
        """Raise the first problem, or count all and sum them in one warning."""
        if not errors:
            return
        errors = sorted(errors, key=lambda error: error.source.index)
        self._raise_fatal([error for error in errors if self._policy(error.cause) == "error"])
        counts = Counter(error.cause for error in errors)
        self._left_out += counts
        for error in errors:
            logger.debug("left out: %s", error)
            named = self._examples.setdefault(error.cause, [])
            if len(named) < NUM_EXAMPLES:
                named.append(str(error))
        logger.warning(
            "%s: %d samples left out (%s); the first: %s",
            self.data_path,
            len(errors),
            _describe_counts(counts),
            errors[0],
        )

    def _policy(self, cause: str) -> str:
        return self.on_too_long if cause == TOO_LONG else self.on_bad_sample

    def _raise_fatal(self, errors: Sequence[BadSampleError]) -> None:
        """Raise the first of the errors that shall end the run, with the count of all."""
        if not errors:
            return
        first, rest = errors[0], ""
        if len(errors) > 1:
            counts = Counter(error.cause for error in errors)
            rest = f" In all {len(errors)} samples cannot be used: {_describe_counts(counts)}."
        flag = "--on_too_long skip" if first.cause == TOO_LONG else "--on_bad_sample skip"
        problem = str(first).removeprefix(f"{first.source}: ")
        advice = f"Correct the data, or leave such samples out with {flag}."
        raise bad_sample(first.source, first.cause, f"{problem}.{rest} {advice}")

    def _find_problem(self, record: Record, missing_images: set[str]) -> BadSampleError | None:
        """Return what is wrong with a record as far as that can be known without its images."""
        for name in record.images:
            if name in missing_images:
                path = os.path.join(self.image_folder, name)
                return bad_sample(record.source, MISSING_IMAGE, f"its image {path} does not exist")
        num_markers = count_image_markers(record.turns[:1]) if record.images else 0
        if self.template.single_exchange and (len(record.turns) != 2 or num_markers == 0):
            return bad_sample(
                record.source,
                NOT_A_CAPTION,
                f"template {self.template.name!r} needs one turn with {DEFAULT_IMAGE_TOKEN} and one answer, it has "
                f"{len(record.turns)} turns and {num_markers} images in the first",
            )
        try:
            if self.on_too_long != "truncate":
                self._refuse_too_long(record)
            elif self._may_lose_what_matters(record):
                self._encode(record)
        except BadSampleError as error:
            return error
        return None

    def _refuse_too_long(self, record: Record) -> None:
        """Raise a BadSampleError for a record that max_length would cut; only one that could be is tokenised."""
        text = segments_text(self._render(record))
        bound = 2 + len(text.encode()) + len(record.images) * (self.max_tokens_per_image + 2)
        if bound <= self.max_length:
            return
        num_tokens = len(self._encode_whole(record).input_ids)
        if num_tokens > self.max_length:
            raise bad_sample(
                record.source,
                TOO_LONG,
                f"has {num_tokens} tokens, more than {self.max_length}; raise --model_max_length, or have it cut "
                "(--on_too_long truncate)",
            )

    def _may_lose_what_matters(self, record: Record) -> bool:
        """Whether cutting to max_length could reach an image or the first answer, by an upper bound on token counts.

        Tokenizers make no more tokens than UTF-8 bytes, but for a dummy prefix or two per chunk; tokenising everything
        here would take minutes on large data sets. Should a normaliser break the bound, reading the sample notices.
        """
        text = ""
        bound = 2
        for segment in self._render(record):
            text += segment.text
            if segment.is_target or DEFAULT_IMAGE_TOKEN in segment.text:
                bound = 2 + len(text.encode()) + len(record.images) * (self.max_tokens_per_image + 2)
            if segment.is_target and text.count(DEFAULT_IMAGE_TOKEN) >= len(record.images):
                break
        return bound > self.max_length

    def _encode(self, record: Record, image_sizes: Sequence[ImageSize] | None = None) -> tuple[Encoded, int, bool]:
        """Tokenise and cut to max_length -> (encoded, how many of the record's images are left, whether it was cut).

        Args:
            image_sizes: of the record's images; None: read from their files, where the tokens depend on them.
        Raises:
            BadSampleError: the cut goes through an image, or leaves nothing to learn; or a token has no embedding.
        """
        encoded = self._encode_whole(record, image_sizes)
        self._check_vocabulary(record, encoded)
        num_tokens = len(encoded.input_ids)
        for start, end in encoded.image_spans:
            if start < self.max_length < end:
                raise bad_sample(
                    record.source,
                    IMAGE_CUT,
                    f"has {num_tokens} tokens and would be cut at {self.max_length} inside an image that takes "
                    f"positions {start} to {end}; raise --model_max_length",
                )
        encoded = Encoded(*(part[: self.max_length] for part in encoded[:2]), encoded.image_spans)
        if all(label == IGNORE_INDEX for label in encoded.labels):
            raise bad_sample(
                record.source,
                NO_SUPERVISED_TOKEN,
                f"has no token to learn among its first {self.max_length} of {num_tokens}; raise --model_max_length",
            )
        num_images = sum(end <= self.max_length for _, end in encoded.image_spans)
        return encoded, num_images, num_tokens > self.max_length

    def _check_vocabulary(self, record: Record, encoded: Encoded) -> None:
        """Raise a BadSampleError where the text holds a token that the tokenizer has beyond the embedding's rows."""
        if self.vocab_size is None:
            return
        for token_id in encoded.input_ids:
            if token_id >= self.vocab_size and token_id != self.image_token_id:
                raise bad_sample(
                    record.source,
                    UNKNOWN_TOKEN,
                    f"holds the token {self.tokenizer.convert_ids_to_tokens(token_id)!r} with id {token_id}, but the "
                    f"language model's embedding has {self.vocab_size} rows; the tokenizer is not this model's",
                )

    def _encode_whole(self, record: Record, image_sizes: Sequence[ImageSize] | None = None) -> Encoded:
        return encode_segments(
            self._render(record),
            self.tokenizer,
            self._image_token_counts(record, image_sizes) if record.images else None,
            self.image_token_id,
            adds_bos=self.template.adds_bos,
            labels_by_sentence=self.template.labels_by_sentence,
        )

    def _render(self, record: Record) -> list[Segment]:
        """Render a record as training sees it; a template that refuses it makes it a bad sample."""
        try:
            return self.template.render_training(record.turns, record.system)
        except UserError as error:
            raise bad_sample(record.source, REFUSED_BY_TEMPLATE, str(error)) from error

    def _prepare_image(self, record: Record, name: str) -> _PreparedImage:
        """Read an image file, unless what a tower sees in it is stored.

        Raises:
            BadSampleError: it cannot be read.
        """
        path = os.path.join(self.image_folder, name)
        try:
            lookup = None if self._feature_store is None else self._feature_store.look_up(path)
            if lookup is not None and lookup.features is not None:
                return _PreparedImage(lookup.features.original_size, torch.empty(0), lookup)
            size, pixels = self._load_pixels(path)
        except (UserError, OSError) as error:
            raise bad_sample(record.source, UNREADABLE_IMAGE, str(error)) from error
        # Beside stored ones each image is a stack of crops.
        is_stack = lookup is None or self._num_anyres_tokens is not None
        return _PreparedImage(size, pixels if is_stack else pixels[None], lookup)

    def _load_pixels(self, path: str) -> tuple[ImageSize, Tensor]:
        """Decode an image -> (its size, its pixel values); errors as `load_image` and `preprocess_image`."""
        image = load_image(
            path,
            apply_exif_orientation=self.apply_exif_orientation,
            smallest_size=self._smallest_decoded_size if self.jpeg_draft else None,
        )
        pixels = preprocess_image(image, self.image_processor, self.image_aspect_ratio, self.image_grid_pinpoints)
        return ImageSize(image.height, image.width), pixels

    def _smallest_decoded_size(self, original: ImageSize) -> ImageSize:
        return smallest_decoded_size(original, self.image_processor, self.image_aspect_ratio)

    def _read_size(self, record: Record, name: str) -> ImageSize:
        try:
            path = os.path.join(self.image_folder, name)
            return read_image_size(path, apply_exif_orientation=self.apply_exif_orientation)
        except UserError as error:
            raise bad_sample(record.source, UNREADABLE_IMAGE, str(error)) from error

    def _max_tokens_per_image(self) -> int:
        """Return the most tokens of any image: one that fills a pinpoint leaves no margin to be cut off."""
        if self._num_anyres_tokens is None:
            return self.num_tokens_per_image
        full = [ImageSize(height, width) for width, height in self.image_grid_pinpoints]
        return max(self._num_anyres_tokens(size, self.image_size) for size in full)

    def _num_image_tokens_for_length(self, record: Record) -> int:
        """Count a record's image tokens; where an image is damaged, which reading the sample will report, as the most.

        With "anyres" this reads the head of each image file.
        """
        try:
            return sum(self._image_token_counts(record))
        except BadSampleError:
            return len(record.images) * self.max_tokens_per_image

    def _image_token_counts(self, record: Record, sizes: Sequence[ImageSize] | None = None) -> list[int]:
        """Count the tokens of a record's images, reading their sizes where they matter and are not given.

        Raises:
            BadSampleError: the size of one cannot be read, where it matters.
        """
        if self._num_anyres_tokens is None:
            return [self.num_tokens_per_image] * len(record.images)
        sizes = [self._read_size(record, name) for name in record.images] if sizes is None else sizes
        return [self._num_anyres_tokens(size, self.image_size) for size in sizes]

    def _find_missing_images(self, records: Sequence[Record]) -> set[str]:
        """Return the image names of all records for which there is no file."""
        names_by_folder: dict[str, set[str]] = {}
        for record in records:
            for name in record.images:
                names_by_folder.setdefault(os.path.dirname(name), set()).add(name)
        missing = set()
        for folder, names in show_progress(names_by_folder.items(), "Looking for images", "folders"):
            names -= self._listed_files(folder) if len(names) >= FILES_WORTH_LISTING else set()
            missing |= {name for name in names if not os.path.isfile(os.path.join(self.image_folder, name))}
        return missing

    def _listed_files(self, folder: str) -> set[str]:
        """Return what a folder holds, named relative to the image folder; nothing when it cannot be read."""
        try:
            return {os.path.join(folder, name) for name in os.listdir(os.path.join(self.image_folder, folder) or ".")}
        except OSError:
            return set()

    def _note_bad(self, index: int, error: BadSampleError) -> None:
        is_first = self.ledger.note_bad(index, error.cause)
        log = logger.warning if is_first else logger.debug
        log("skipped, the next usable sample takes its place (later ones are counted): %s", error)
        self._num_bad_in_a_row += 1
        if self._num_bad_in_a_row == MAX_BAD_IN_A_ROW:
            raise UserError(
                f"{MAX_BAD_IN_A_ROW} samples in a row cannot be read; is the image folder still there? The last: "
                f"{error}"
            ) from error


@dataclass(frozen=True)
class DataReport:
    """What check_data found.

    Attributes:
        num_usable: samples that load.
        counts: unusable samples by cause.
        examples: the first message of each cause.
    """

    num_usable: int
    counts: Counter[str]
    examples: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{self.num_usable} samples can be used, {self.counts.total()} cannot"]
        lines += [f"  {count} x {cause}, e.g. {self.examples[cause]}" for cause, count in self.counts.most_common()]
        return "\n".join(lines)


def check_data(dataset: ConversationDataset) -> DataReport:
    """Load every sample of a data set once, images included, and report what cannot be used.

    Make the data set with on_bad_sample "skip"; what it left out when it was made is counted as well.
    """
    counts = Counter(dataset.account().left_out)
    examples = dict.fromkeys(counts, "left out when the data set was made")
    num_usable = 0
    for index in show_progress(range(len(dataset)), "Checking samples", "samples"):
        try:
            dataset.load_sample(index)
            num_usable += 1
        except BadSampleError as error:
            counts[error.cause] += 1
            examples.setdefault(error.cause, str(error))
    return DataReport(num_usable, counts, examples)


def _warn_about_foreign_end(template: AnyTemplate, tokenizer: Tokenizer) -> None:
    """Warn when the end of an answer is no token of the vocabulary: the model then spells it out piece by piece."""
    if template.labels_by_sentence:
        return  # LLaVA's v0 ends an answer with "###" in any vocabulary
    for end in template.stop_strings:
        if end.strip() and len(tokenizer(end, add_special_tokens=False).input_ids) != 1:
            logger.warning(
                "template %r ends answers with %r, which is not a token of this tokenizer (its eos token is %r); "
                "a template made for this language model may fit better",
                template.name,
                end,
                tokenizer.eos_token,
            )


def _check_choice(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise UserError(f"unknown {name} {value!r}; known: {', '.join(known)}")


def _describe_counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} x {cause}" for cause, count in counts.items())


def _batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
