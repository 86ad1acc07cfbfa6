"""What is believed of files from strangers, at most: every limit of this package, in one place.

Each is far above what real models and adapters hold (the largest known is given), and low enough
that what stays below it takes little time and memory. ``SECURITY.md`` lists them for people.
"""

from __future__ import annotations

# --- safetensors headers, and the index of a sharded model ---

HEADER_BYTES = 100_000_000  # as in the reference implementation (safetensors/src/tensor.rs)
HEADER_TENSORS = 300_000  # of one file; LoRA on every expert of a 1T-parameter model has 210,000
HEADER_ENTRY_CHARS = 20_000  # of one tensor's dtype, shape and offsets; written out they take 200
METADATA_ENTRIES = 50_000  # training scripts store dozens
METADATA_CHARS = 10_000_000  # of one entry; training scripts store lists of captions in one
DIMENSIONS = 16

INDEX_BYTES = 100_000_000  # a model with a million tensors has 80 MB
INDEX_TENSORS = 1_000_000

# --- other JSON: configs, manifests, tokenizers ---

JSON_BYTES = 32_000_000  # a manifest that names 70,000 changed tensors has 21 MB
JSON_VALUES = 1_000_000  # values in one file, counted by what separates them
TOKENIZER_BYTES = 64_000_000  # the largest tokenizer.json known has 35 MB
TOKENIZER_VALUES = 4_000_000  # and 2,000,000 values
JSON_DEPTH = 64  # configs go down to 6

# --- numbers and patterns in configs ---

RANK = 1_000_000  # no layer has as many rows
FACTOR = 1_000_000.0  # of a product (alpha by rank), a strength, the weight of an adapter

PATTERN_CHARS = 1_000  # of one regular expression
PATTERN_SECONDS = 5.0  # for all patterns of one config on all modules

# --- pickled weights ---

PICKLE_BYTES = 16_000_000  # of code; a tensor takes about 250
PICKLE_OPCODES = 1_000_000  # a tensor takes about 40
ZIP_DIRECTORY_BYTES = 16_000_000  # a tensor takes about 70

# --- ONNX graphs, whose weights are left where they are ---

GRAPH_FIELDS = 500_000  # of nodes and all else; a decoder of 30 layers has 25,000
GRAPH_TENSORS = 100_000  # a mixture of 256 experts in 61 layers has 47,000
GRAPH_BYTES = 100_000_000  # without weights; a decoder of 30 layers has 400,000

# --- side files ---

SIDE_FILE_BYTES = 256 << 20
CARD_BYTES = 1 << 20  # of a model card, read for its licence or for who made the adapter
TEMPLATE_BYTES = 16 << 20  # of a chat template

# --- staged work ---

JOURNAL_BYTES = 64 << 20  # a merge of 400 GB writes less than 1 MB
