"""What the processes of a comparison are forked from: a server imports this once, and they have it from the start."""

from llava_saep.program import quieten_adapters

quieten_adapters()

import llava_saep.arguments  # noqa: E402
import llava_saep.evaluation.evaluate  # noqa: E402
import llava_saep.generation  # noqa: E402
import llava_saep.train.run  # noqa: E402, F401
