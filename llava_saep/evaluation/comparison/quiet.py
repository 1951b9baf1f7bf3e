"""Quietens the server that a comparison's processes are forked from, when it imports this before anything else.

Only imports happen there, so that importing is all that can be asked of it. Ctrl-C reaches it too; what becomes of its
processes then is the comparison's to say, which ends them.
"""

import signal

from llava_saep.program import quieten_adapters

quieten_adapters()
signal.signal(signal.SIGINT, signal.SIG_IGN)
