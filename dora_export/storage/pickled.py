"""torch's ``.bin``/``.pt`` files, through torch's own restricted unpickler, mapped where possible.

``torch.load(weights_only=True)`` executes no code from the file: it accepts tensors, containers
and numbers only. It is behind ``--allow-pickle`` all the same, since the format was not made for
strangers. Source: torch/_weights_only_unpickler.py.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

from dora_export.errors import InputError, shown
from dora_export.storage.pickle_limits import check_pickled, check_views
from dora_export.storage.safetensors import is_text
from dora_export.tensors import BY_TORCH, HeldBytes, TensorRef


def read_pickled(path: Path, *, allow_pickle: bool) -> dict[str, TensorRef]:
    """Return the tensors of a state dict saved by torch, by name.

    Files in torch's zip format (all since torch 1.6) are mapped, not read.

    Raises:
        InputError: ``allow_pickle`` is false, or the file is not a state dict of plain tensors.
    """
    if not allow_pickle:
        raise InputError(
            f"{path}: a pickled file. Pass --allow-pickle to read it through torch's restricted "
            "loader, or convert it to safetensors."
        )
    zipped = check_pickled(path)
    import torch  # noqa: PLC0415 - a second of import that only pickled files need

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols; what matters is raised
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # the unpickler raises many kinds; each means a file we cannot use
        raise InputError(
            f"{path}: torch's restricted loader refuses it ({_reason(error)}). The file holds more "
            "than tensors, or is damaged; get it as safetensors, or download it again."
        ) from error
    state = _state_dict(loaded)
    if not state:
        raise InputError(f"{path}: not a state dict (name -> tensor). Save model.state_dict().")
    for name, tensor in state.items():
        _check_kind(path, name, tensor)
    check_views(path, state, path.stat().st_size)
    return {name: _ref(path, name, tensor) for name, tensor in state.items()}


def _reason(error: Exception) -> str:
    """Return what the unpickler met, without torch's advice to load it unrestricted."""
    text = str(error).strip() or repr(error)
    if wanted := re.search(r"GLOBAL (\S+)", text):
        return f"it asks for {shown(wanted[1])}, which is no tensor"
    _, said, detail = text.partition("WeightsUnpickler error: ")
    return shown((detail if said else text).strip().splitlines()[0].rstrip("."), 120)


def _state_dict(loaded: Any) -> dict[str, Any]:
    import torch  # noqa: PLC0415

    for candidate in (loaded, loaded.get("state_dict") if isinstance(loaded, dict) else None):
        if (
            isinstance(candidate, dict)
            and candidate
            and all(isinstance(k, str) for k in candidate)
            and all(isinstance(v, torch.Tensor) for v in candidate.values())
        ):
            return candidate
    return {}


def _check_kind(path: Path, name: str, tensor: Any) -> None:
    import torch  # noqa: PLC0415

    word = str(tensor.dtype).removeprefix("torch.")
    if name == "__metadata__" or not is_text([name]):
        raise InputError(f"{path}: '{shown(name)}' cannot be a tensor's name in safetensors.")
    if word not in BY_TORCH or tensor.layout is not torch.strided or tensor.is_meta:
        raise InputError(
            f"{path}: tensor '{shown(name)}' is {word}, {tensor.layout}. "
            "Only dense tensors of the usual dtypes can be stored in safetensors."
        )


def _ref(path: Path, name: str, tensor: Any) -> TensorRef:
    import torch  # noqa: PLC0415

    word = str(tensor.dtype).removeprefix("torch.")
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return TensorRef(name, BY_TORCH[word], tuple(tensor.shape), HeldBytes(path, data))
