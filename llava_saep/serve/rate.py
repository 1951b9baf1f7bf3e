"""How many questions one client may ask within a minute."""

import ipaddress
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable

_WINDOW_SECONDS = 60.0
_MAX_CLIENTS = 10_000
"""Clients that are remembered; with more, the one that has been quiet longest is forgotten: memory is bounded."""


class RequestRate:
    """Counts requests of each client over the last minute. Thread-safe.

    Args:
        max_per_minute: requests of one client that are let through.
        clock: seconds that only ever grow.
    """

    def __init__(self, max_per_minute: int, *, clock: Callable[[], float] = time.monotonic):
        self.max_per_minute = max_per_minute
        self._clock = clock
        self._lock = threading.Lock()
        self._times: OrderedDict[str, deque[float]] = OrderedDict()

    def seconds_to_wait(self, client: str) -> float:
        """Count a request and return 0; or do not count it, and return after how many seconds one is let through."""
        now = self._clock()
        with self._lock:
            times = self._times.setdefault(client, deque())
            self._times.move_to_end(client)
            while len(self._times) > _MAX_CLIENTS:
                self._times.popitem(last=False)
            while times and times[0] <= now - _WINDOW_SECONDS:
                times.popleft()
            if len(times) >= self.max_per_minute:
                return times[0] + _WINDOW_SECONDS - now
            times.append(now)
            return 0.0


def client_name(address: str) -> str:
    """Return what one client's addresses share: of IPv6 the first half; the second is the client's to choose."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv4Address):
        return str(parsed)
    return str(parsed.ipv4_mapped or ipaddress.ip_network((int(parsed) >> 64 << 64, 64)))
