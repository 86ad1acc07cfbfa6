"""Shared by all tests: quiet libraries, no network, one thread per BLAS call."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
