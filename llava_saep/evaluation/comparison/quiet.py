"""Quietens the server that a comparison's processes are forked from, when it imports this before anything else.

Only imports happen there, so that importing is all that can be asked of it.
"""

from llava_saep.program import quieten_adapters

quieten_adapters()
