"""Key-value caches of earlier conversations, found again by what they hold.

Nobody names a conversation. A question comes with all that was said before, so the cache that shares its beginning,
token by token and image by image, is the one to go on from. That serves a follow-up as well as an edit, an undo,
another try, and another chat about the same image.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import Cache, DynamicCache, PretrainedConfig, StaticCache
from transformers.cache_utils import DynamicLayer, StaticLayer

from llava_saep.generation.predictor import Prompt

Symbol = int | str
"""One position of a conversation: a token's id, or what its image holds."""

_FEW_TOKENS = 8
"""A conversation that departs so little from a cache takes it; otherwise the shared part is copied and both are kept.
(An answer's last tokens often come back a little different, its closing white space stripped.)"""


def prompt_symbols(prompt: Prompt, image_keys: Sequence[str]) -> list[Symbol]:
    """What stands at each position of a prompt; two prompts with equal beginnings have equal keys and values there.

    Args:
        image_keys: one per image, the same for the same content.
    """
    symbols: list[Symbol] = list(prompt.input_ids)
    for key, (start, end) in zip(image_keys, prompt.image_spans, strict=True):
        symbols[start:end] = [key] * (end - start)
    return symbols


def shared_length(symbols: Sequence[Symbol], others: Sequence[Symbol]) -> int:
    """Length of the common beginning, in whole images of the first."""
    pairs = zip(symbols, others, strict=False)
    length = next((at for at, (own, other) in enumerate(pairs) if own != other), min(len(symbols), len(others)))
    while 0 < length < len(symbols) and isinstance(symbols[length], str) and symbols[length] == symbols[length - 1]:
        length -= 1
    return length


class ConversationCaches(ABC):
    """Hands out caches that already hold the beginning of a conversation, and takes them back when they hold more."""

    @abstractmethod
    def start(self, symbols: Sequence[Symbol]) -> tuple[Cache, int]:
        """Return a cache and how many of the symbols it holds; never all, since the last one's logits are needed."""

    @abstractmethod
    def keep(self, symbols: Sequence[Symbol], cache: Cache) -> None:
        """Remember a cache that `start` gave and that holds the beginning of the symbols, as far as it is long."""

    @abstractmethod
    def clear(self) -> bool:
        """Forget everything and give the memory back; returns whether there was anything."""


@dataclass(frozen=True)
class _Entry:
    symbols: list[Symbol]
    cache: DynamicCache

    @property
    def num_bytes(self) -> int:
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.cache.layers)


class DynamicCaches(ConversationCaches):
    """Several growing caches, those used last.

    Caches that forget positions (sliding windows) cannot be cut back to a shared beginning and are not kept.

    Args:
        config: the language model's.
        max_conversations, max_bytes: what is kept at most; 0 conversations: nothing.
    """

    def __init__(self, config: PretrainedConfig, *, max_conversations: int, max_bytes: int):
        self.config = config
        self.max_conversations = max_conversations
        self.max_bytes = max_bytes
        self._entries: list[_Entry] = []  # the one used last first

    def start(self, symbols: Sequence[Symbol]) -> tuple[Cache, int]:
        """See `ConversationCaches.start`."""
        lengths = [shared_length(symbols, entry.symbols[: len(symbols) - 1]) for entry in self._entries]
        length = max(lengths, default=0)
        if length == 0:
            return DynamicCache(config=self.config), 0
        entry = self._entries[lengths.index(length)]
        surplus = len(entry.symbols) - length
        if surplus > _FEW_TOKENS:
            return self._copy(entry.cache, length), length
        self._entries.remove(entry)
        entry.cache.crop(-surplus)
        return entry.cache, length

    def keep(self, symbols: Sequence[Symbol], cache: Cache) -> None:
        """See `ConversationCaches.keep`."""
        assert isinstance(cache, DynamicCache)
        if not all(type(layer) is DynamicLayer and layer.is_initialized for layer in cache.layers):
            return
        self._entries.insert(0, _Entry(list(symbols[: cache.get_seq_length()]), cache))
        while len(self._entries) > self.max_conversations or self.num_bytes > self.max_bytes:
            self._entries.pop()

    def clear(self) -> bool:
        """See `ConversationCaches.clear`."""
        had_any = bool(self._entries)
        self._entries = []
        return had_any

    @property
    def num_bytes(self) -> int:
        """What the kept caches take."""
        return sum(entry.num_bytes for entry in self._entries)

    def _copy(self, cache: DynamicCache, length: int) -> DynamicCache:
        copied = DynamicCache(config=self.config)
        for index, layer in enumerate(cache.layers):
            copied.update(layer.keys[:, :, :length], layer.values[:, :, :length], index)
        return copied


class StaticCaches(ConversationCaches):
    """One cache of a fixed length, as compiled code wants it; it holds the conversation that came last.

    Args:
        config: the language model's.
        max_length: of a conversation with its answer.
        keeps_last: go on from what it holds.
    """

    def __init__(self, config: PretrainedConfig, *, max_length: int, keeps_last: bool):
        self.config = config
        self.max_length = max_length
        self.keeps_last = keeps_last
        self._cache: StaticCache | None = None
        self._symbols: list[Symbol] = []

    def start(self, symbols: Sequence[Symbol]) -> tuple[Cache, int]:
        """See `ConversationCaches.start`."""
        if self._cache is None:
            self._cache = StaticCache(self.config, max_cache_len=self.max_length)
        length = shared_length(symbols, self._symbols[: len(symbols) - 1])
        self._symbols = []
        if length == 0:
            self._cache.reset()
            return self._cache, 0
        for layer in self._cache.layers:  # what lies behind is overwritten, and masked until then
            layer.cumulative_length.fill_(length)
        return self._cache, length

    def keep(self, symbols: Sequence[Symbol], cache: Cache) -> None:
        """See `ConversationCaches.keep`."""
        assert cache is self._cache
        if self.keeps_last and all(type(layer) is StaticLayer for layer in cache.layers):
            self._symbols = list(symbols[: int(cache.get_seq_length())])

    def clear(self) -> bool:
        """See `ConversationCaches.clear`."""
        had_any = self._cache is not None
        self._cache, self._symbols = None, []
        return had_any
