"""What every test starts from: no network, one thread per process, no accelerator looked for in vain."""

import os

# Before torch and transformers are imported, which read them once.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
