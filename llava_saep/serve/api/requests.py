"""Chat completion requests: which fields there are, what they may hold, and what of OpenAI's is refused.

A field that would change the answer and is not supported is refused unless it asks for nothing; fields that no one here
knows are ignored, as OpenAI's own servers of older versions do.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator

from llava_saep.errors import UserError
from llava_saep.generation import GenerationOptions
from llava_saep.serve.api.errors import ApiError
from llava_saep.serve.limits import Limits, check_conversation

DEFAULT_MAX_TOKENS = 512
_LOWEST_TEMPERATURE = 0.01
"""Below, logits divided by it overflow; sampling is then greedy in all but name."""

_NEUTRAL_VALUES: dict[str, tuple] = {
    "n": (1,),
    "best_of": (1,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "top_k": (0, -1),
    "min_p": (0,),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
}
"""Fields that are not supported, and what they may hold all the same (null always)."""


def _refuse_surrogates(text: str) -> str:
    """JSON can escape halves of characters, which no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError("the text holds half of a surrogate pair, which is no unicode character") from error
    return text


Text = Annotated[str, AfterValidator(_refuse_surrogates)]


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="ignore", hide_input_in_errors=True)


class TextPart(_Part):
    """A piece of a message's text."""

    type: Literal["text"]
    text: Text


class ImageUrl(_Part):
    """Where an image is: a data: URL, or an https address where those are allowed. `detail` is ignored."""

    url: str


class ImagePart(_Part):
    """An image of a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


class SystemMessage(_Part):
    """Instructions."""

    role: Literal["system", "developer"]
    content: Text | list[TextPart]


class UserMessage(_Part):
    """A question with its images."""

    role: Literal["user"]
    content: Text | list[Annotated[TextPart | ImagePart, Field(discriminator="type")]]


class AssistantMessage(_Part):
    """An earlier answer."""

    role: Literal["assistant"]
    content: Text | list[TextPart]


class StreamOptions(_Part):
    """How an answer is streamed."""

    include_usage: bool | None = None


class ChatRequest(_Part):
    """A chat completion request of which everything has been checked but its images."""

    model: Text
    messages: list[Annotated[SystemMessage | UserMessage | AssistantMessage, Field(discriminator="role")]] = Field(
        min_length=1
    )
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    seed: int | None = Field(None, ge=0, lt=2**63)
    stop: Text | list[Text] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @field_validator("stop")
    @classmethod
    def _few_short_stops(cls, value: str | list[str] | None) -> str | list[str] | None:
        stops = [value] if isinstance(value, str) else value or []
        if len(stops) > 4 or not all(0 < len(stop) <= 200 for stop in stops):
            raise ValueError("expected up to 4 texts of 1 to 200 characters")
        return value

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """Texts before which the answer ends."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def to_options(self, limits: Limits, context_length: int | None) -> GenerationOptions:
        """Return how the answer is decoded; without a length, half of a short context is left to the prompt."""
        room = limits.max_new_tokens if context_length is None else max(1, context_length // 2)
        default = min(DEFAULT_MAX_TOKENS, limits.max_new_tokens, room)
        temperature = 1.0 if self.temperature is None else self.temperature
        return GenerationOptions(
            max_new_tokens=self.max_completion_tokens or self.max_tokens or default,
            temperature=temperature if temperature >= _LOWEST_TEMPERATURE else 0.0,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=self.seed,
        )

    def to_messages(self) -> list[dict[str, Any]]:
        """Return messages as an engine has them, but each image's address in place of the image."""
        return [
            {
                "role": "system" if message.role == "developer" else message.role,
                "content": message.content
                if isinstance(message.content, str)
                else [_to_part(part) for part in message.content],
            }
            for message in self.messages
        ]


def _to_part(part: TextPart | ImagePart) -> dict[str, Any]:
    if isinstance(part, TextPart):
        return {"type": "text", "text": part.text}
    return {"type": "image", "image": part.image_url.url}


def parse_chat_request(fields: dict[str, Any], limits: Limits) -> ChatRequest:
    """Check the fields of a chat completion request.

    Raises:
        ApiError: 400, with the field that is wrong.
    """
    for name, neutral in _NEUTRAL_VALUES.items():
        if fields.get(name) is not None and not _is_neutral(fields[name], neutral):
            allowed = " or ".join(map(repr, neutral)) or "null"
            message = f"{name} is not supported here; leave it out (or at {allowed})"
            raise ApiError(400, message, param=name, code="unsupported_parameter")
    try:
        request = ChatRequest.model_validate(fields)
    except ValidationError as error:
        raise _first_mistake(error) from error
    _check_limits(request, limits)
    return request


def _is_neutral(value: Any, neutral: Sequence[Any]) -> bool:
    return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in neutral)


def _check_limits(request: ChatRequest, limits: Limits) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        wanted = getattr(request, name)
        if wanted is not None and wanted > limits.max_new_tokens:
            raise ApiError(400, f"{name} is {wanted}, at most {limits.max_new_tokens} is allowed", param=name)
    try:
        check_conversation(request.to_messages(), limits)
    except UserError as error:
        raise ApiError(400, str(error), param="messages", code="limit_exceeded") from error


def _first_mistake(error: ValidationError) -> ApiError:
    """Of pydantic's findings the one that lies deepest: of "text or list of parts", what is wrong in the list."""
    mistakes = error.errors(include_url=False, include_context=False, include_input=False)
    mistake = max(mistakes, key=lambda found: len(found["loc"]))
    param = _field_path(mistake["loc"]) or None
    code = "missing_required_parameter" if mistake["type"] == "missing" else "invalid_value"
    return ApiError(400, f"{param or 'request'}: {mistake['msg'][:300]}", param=param, code=code)


def _field_path(path: Sequence[str | int]) -> str:
    """Leave out of pydantic's path what names alternatives of a union: types, and the tag after a list's index."""
    steps = [
        str(step)
        for index, step in enumerate(path)
        if isinstance(step, int)
        or (step in _FIELD_NAMES and (index in (0, len(path) - 1) or not isinstance(path[index - 1], int)))
    ]
    return ".".join(steps)


_FIELD_NAMES = frozenset(
    name
    for model in (
        ChatRequest,
        SystemMessage,
        UserMessage,
        AssistantMessage,
        TextPart,
        ImagePart,
        ImageUrl,
        StreamOptions,
    )
    for name in model.model_fields
)
"""Steps of pydantic's paths that a client knows."""
