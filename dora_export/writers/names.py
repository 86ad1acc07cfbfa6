"""Names of the hidden folders beside an output, from which and to which it is renamed."""

from __future__ import annotations

import hashlib
import os
from typing import Literal

Role = Literal["partial", "replaced"]

NAME_BYTES = 255  # the longest name that common file systems take


def hidden_name(name: str, role: Role) -> str:
    """Return the hidden name beside an output: the same for the same output, apart for others.

    An output's own name may be as long as the file system allows; then the end of it gives way to
    a digest of the whole.

    Args:
        name: The output's last path component, 1 to 255 bytes.
        role: "partial" while it is written; "replaced" for the one that it takes the place of.
    """
    ending = f".dora_export-{role}"
    plain = f".{name}{ending}"
    if len(os.fsencode(plain)) <= NAME_BYTES:
        return plain
    ending = f"~{hashlib.sha256(os.fsencode(name)).hexdigest()[:16]}{ending}"
    kept = name
    while len(os.fsencode(f".{kept}{ending}")) > NAME_BYTES:
        kept = kept[:-1]  # by characters, so that none is cut in two
    return f".{kept}{ending}"
