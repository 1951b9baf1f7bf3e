"""`llava-saep demo`: a web page to chat with saved models about pictures."""

import getpass
import os
from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """Serve the page until Ctrl-C."""
    # gradio and huggingface_hub read them when they are imported.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    from llava_saep.serve.demo import program

    return program.main(list(argv), ask_password=getpass.getpass)
