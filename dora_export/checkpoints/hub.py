"""Finding a model by path or by Hugging Face hub id."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

from dora_export.checkpoints import pipeline
from dora_export.checkpoints.folder import read_json
from dora_export.errors import InputError, shown
from dora_export.machine import advice

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
# A cached snapshot without any of these was left by something that wanted the config only.
WEIGHTS = ("model.safetensors.index.json", "model.safetensors", "adapter_model.safetensors",
           "pytorch_model.bin.index.json", "pytorch_model.bin", "adapter_model.bin",
           "model_index.json", "pytorch_lora_weights.safetensors")  # fmt: skip
NOT_NEEDED = ["*.gguf", "*.onnx", "*.h5", "*.msgpack", "original/*"]


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
    if _exists(name):
        return Path(name)
    if not HUB_ID.fullmatch(str(name)):
        raise InputError(f"{shown(name)}: no such file or folder. Check the path of the {what}.")
    return _snapshot(str(name), what)


def _exists(name: str | os.PathLike[str]) -> bool:
    """Return whether there is such a path; one that is there but not to be had is no hub id.

    Raises:
        InputError: The path is a link to nothing, or may not be looked at.
    """
    try:
        os.stat(name)
    except OSError as error:
        if os.path.islink(name):
            raise InputError(
                f"{shown(name)}: a link that leads nowhere: {error.strerror}. Repair it."
            ) from error
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.EINVAL):
            return False
        raise InputError(f"{shown(name)}: {error.strerror}. {advice(error)}") from error
    except ValueError:  # a NUL character
        return False
    return True


def _snapshot(name: str, what: str) -> Path:
    from huggingface_hub import constants, snapshot_download  # noqa: PLC0415 - slow, rarely needed
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError  # noqa: PLC0415

    repo, _, revision = name.partition("@")
    try:
        cached = _cached(repo, revision or None)
        if cached is not None and (constants.HF_HUB_OFFLINE or _is_whole(cached)):
            return cached
        return Path(snapshot_download(repo, revision=revision or None, ignore_patterns=NOT_NEEDED))
    except HFValidationError as error:
        raise InputError(
            f"{shown(name)}: no such file or folder. Check the path of the {what}."
        ) from error
    except (OSError, HfHubHTTPError) as error:
        if constants.HF_HUB_OFFLINE:
            raise InputError(
                f"{name}: no such folder here, and not in the local Hugging Face cache "
                f"({constants.HF_HUB_CACHE}); HF_HUB_OFFLINE forbids a download. "
                f"Check the path of the {what}, or unset HF_HUB_OFFLINE."
            ) from error
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"{name}: no such folder here, and the hub did not give it: "
            f"{shown(reason.rstrip('.'), 200)}. "
            f"Check the path of the {what}, the network, or your access to the model."
        ) from error


def _cached(repo: str, revision: str | None) -> Path | None:
    """Return the cached snapshot that holds weights, or None."""
    from huggingface_hub import try_to_load_from_cache  # noqa: PLC0415

    for file in WEIGHTS:
        found = try_to_load_from_cache(repo, file, revision=revision)
        if isinstance(found, str):
            return Path(found).parent
    return None


def _is_whole(folder: Path) -> bool:
    """Return whether all is there that the folder's index names, if it has one."""
    if pipeline.is_pipeline(folder):
        return _is_whole_pipeline(folder)
    indexes = [i for i in WEIGHTS if i.endswith(".index.json") and (folder / i).is_file()]
    if not indexes:
        return True
    places = read_json(folder / indexes[0]).get("weight_map")
    return isinstance(places, dict) and all((folder / str(s)).is_file() for s in places.values())


def _is_whole_pipeline(folder: Path) -> bool:
    """Return whether the folders of all parts are there, and weights in those of models."""
    return all(
        (folder / name).is_dir()
        and (not pipeline.is_model(folder / name, cls) or pipeline.weights_in(folder / name).files)
        for name, cls in pipeline.parts(folder).items()
    )
