"""The one path from messages and images to text: used by chat, demo, HTTP interface, evaluation and benchmarks.

`Predictor` answers whole batches. `Engine` answers one question at a time, piece by piece, for whoever asks.
"""

from llava_saep.generation.engine import Engine, LocalEngine, ModelDescription
from llava_saep.generation.messages import Message, content_with_placeholders, parse_messages
from llava_saep.generation.options import EngineSettings, GenerationOptions
from llava_saep.generation.predictor import Predictor, Prompt
from llava_saep.generation.streams import AnswerStatistics, AnswerStream

__all__ = [
    "AnswerStatistics",
    "AnswerStream",
    "Engine",
    "EngineSettings",
    "GenerationOptions",
    "LocalEngine",
    "Message",
    "ModelDescription",
    "Predictor",
    "Prompt",
    "content_with_placeholders",
    "parse_messages",
]
