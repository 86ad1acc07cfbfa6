"""Finding a model by path or by Hugging Face hub id."""

from __future__ import annotations

import os
import re
from pathlib import Path

from dora_export.errors import InputError, shown

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")


def locate(name: str | os.PathLike[str], what: str) -> Path:
    """Return the local path of a file, folder or hub id (``org/model`` or ``org/model@revision``).

    An existing path wins. A hub id is looked up in the local cache, and downloaded through
    huggingface_hub if it is not there and ``HF_HUB_OFFLINE`` is not set.

    Args:
        name: What the user typed.
        what: "base" or "adapter", for messages.

    Raises:
        InputError: There is neither such a path nor such a model.
    """
    path = Path(name)
    if path.exists():
        return path
    if not HUB_ID.fullmatch(str(name)):
        raise InputError(f"{shown(name)}: no such file or folder. Check the path of the {what}.")
    return _snapshot(str(name), what)


def _snapshot(name: str, what: str) -> Path:
    from huggingface_hub import constants, snapshot_download  # noqa: PLC0415 - slow, rarely needed
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError  # noqa: PLC0415

    repo, _, revision = name.partition("@")
    try:
        return Path(snapshot_download(repo, revision=revision or None, local_files_only=True))
    except LocalEntryNotFoundError as missing:
        if constants.HF_HUB_OFFLINE:
            raise InputError(
                f"{name}: no such folder here, and not in the local Hugging Face cache "
                f"({constants.HF_HUB_CACHE}); HF_HUB_OFFLINE forbids a download. "
                f"Check the path of the {what}, or unset HF_HUB_OFFLINE."
            ) from missing
    try:
        return Path(
            snapshot_download(
                repo,
                revision=revision or None,
                ignore_patterns=["*.gguf", "*.onnx", "*.h5", "*.msgpack", "original/*"],
            )
        )
    except (OSError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"{name}: no such folder here, and the hub did not give it: {shown(reason, 200)} "
            f"Check the path of the {what}, the network, or your access to the model."
        ) from error
