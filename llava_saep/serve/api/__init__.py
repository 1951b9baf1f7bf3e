"""The HTTP interface that OpenAI's clients speak: chat completions with images, models, health and metrics.

`create_app` makes the application from engines; how it is run, in one process or in many, is for others.
"""

from llava_saep.serve.api.app import create_app
from llava_saep.serve.api.keys import ApiKeys, read_api_keys
from llava_saep.serve.api.settings import ApiSettings

__all__ = ["ApiKeys", "ApiSettings", "create_app", "read_api_keys"]
