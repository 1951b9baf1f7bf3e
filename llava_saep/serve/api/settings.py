"""What an application is told besides its engines."""

from dataclasses import dataclass

from llava_saep.serve.api.keys import ApiKeys
from llava_saep.serve.limits import Limits


@dataclass(frozen=True, kw_only=True)
class ApiSettings:
    """How an application treats its clients.

    Attributes:
        limits: of requests and answers.
        keys: bearer keys, one of which every request but /health must show; none: nobody is asked.
        local_names_only: answer only to requests for a loopback address or "localhost" in their Host header, so that a
            web page whose name was pointed at this machine (DNS rebinding) cannot use the model.
        allowed_image_hosts: names, in lower case, whose https images may be fetched; none: no address is.
        answers_at_once: questions that each engine answers at the same time; those beyond wait, up to `max_queue`.
    """

    limits: Limits = Limits()
    keys: ApiKeys = ApiKeys()
    local_names_only: bool = False
    allowed_image_hosts: frozenset[str] = frozenset()
    answers_at_once: int = 1
