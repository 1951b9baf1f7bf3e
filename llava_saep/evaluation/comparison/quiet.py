"""Imported by the server that a comparison's processes are forked from, before it imports what they need."""

from llava_saep.program import quieten_adapters

quieten_adapters()
