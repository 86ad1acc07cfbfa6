"""One layer of a PEFT method, built and computed by PEFT itself: a weight as a function of W.

PEFT has methods that no low-rank product says: rotations, reflections, scaled rows, updates that
depend on W. For each adapted tensor a skeleton of that one layer is built at its place in the
model, given its weight and its adapter tensors through PEFT's own load, and merged by PEFT in
float64. The model as a whole is never built.
Source: github.com/huggingface/peft 0.21.2, src/peft/mapping_func.py (get_peft_model),
src/peft/utils/save_and_load.py (set_peft_model_state_dict), src/peft/tuners/*/layer.py.
"""

from __future__ import annotations

import dataclasses
import json
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from dora_export.errors import AdapterError, ArithmeticRefusal, shown
from dora_export.tensors import DType, TensorRef
from dora_export.update import Layout

if TYPE_CHECKING:
    import torch

Floats = NDArray[np.float64]
Part = Literal["weight", "bias"]
INSTALL = "pip install 'dora-export[transformers]'"
# Where an adapter's config says which layers there are: here there is one.
ONE_LAYER = frozenset(
    """exclude_modules layers_to_transform layers_pattern modules_to_save trainable_token_indices
    target_parameters auto_mapping task_type""".split()
)
COPIES, SQUARES = 10, 8  # float64 copies of W, and matrices of its larger side, that PEFT may hold
_ONE_AT_A_TIME = threading.Lock()  # building a layer sets torch's seed and Python's warnings


@dataclass(frozen=True)
class PeftLayer:
    """What one layer's weight, or its bias, becomes when PEFT merges its adapter.

    Attributes:
        config: adapter_config.json as canonical JSON.
        module: Path of the layer in the model that PEFT wrapped.
        tensors: (key in the file, tensor) of this layer, and those that all layers share.
        part: Which of the layer's parameters.
        embedding: The layer is an embedding.
        has_bias: The base's layer has a bias; the plan sets it.
        beside: For the bias: the layer's weight; for the weight: None.
        shape: Of the parameter as stored, once placed.
        layout: Of the layer's weight.
    """

    config: str
    module: str
    tensors: tuple[tuple[str, TensorRef], ...]
    part: Part = "weight"
    embedding: bool = False
    has_bias: bool = False
    beside: TensorRef | None = None
    shape: tuple[int, ...] = ()
    layout: Layout | None = None

    @property
    def method(self) -> str:
        """PEFT's name of the method."""
        return str(json.loads(self.config)["peft_type"])

    @property
    def what(self) -> str:
        """One line for people."""
        return f"PEFT's {self.method} makes a new {self.part}"

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """Adapter tensors it reads."""
        return tuple(ref for _, ref in self.tensors)

    def misfit(self, shape: tuple[int, ...], layout: Layout) -> str | None:
        """Return why PEFT's layer for such a weight does not take the adapter's tensors."""
        if self.part == "bias":
            return None if len(shape) == 1 else f"is {shape}, expected a bias"
        if not 2 <= len(shape) <= 5:
            return f"is {len(shape)}-D {shape}, expected a weight of 2 to 5 dimensions"
        return _misfit(replace(self, shape=shape, layout=layout))

    def placed(self, shape: tuple[int, ...], layout: Layout) -> PeftLayer:
        """Return it for a parameter of that shape; a bias knows its weight's layout already."""
        return replace(self, shape=shape, layout=self.layout or layout)

    def value(self, W: Floats, dtype: DType) -> Floats:
        """Return the merged parameter, float64, by PEFT's own merge.

        Raises:
            ArithmeticRefusal: PEFT refuses, or its result is not finite.
        """
        with _built(self, W) as model:
            try:
                layer = model.merge_and_unload().get_submodule(self.module)
            except Exception as error:
                # PEFT raises whatever it meets; all of it means that there is no merged weight.
                raise ArithmeticRefusal(f"PEFT does not merge it: {_words(error)}") from error
            result: Floats = getattr(layer, self.part).detach().double().numpy().reshape(W.shape)
        if not np.isfinite(result).all():
            raise ArithmeticRefusal("PEFT's merge gives inf or NaN. Check the adapter's training.")
        return np.ascontiguousarray(result)

    def unmerged(self, W: Floats) -> Floats:
        """Return the same by PEFT's forward, which merges nothing: its outputs for unit inputs."""
        import torch  # noqa: PLC0415 - only this method and the building of layers need it

        with _built(self, W) as model, torch.no_grad():
            layer = model.get_submodule(f"base_model.model.{self.module}")
            result = _probed(layer, self)
        return np.ascontiguousarray(result.double().numpy().reshape(W.shape))

    def working_bytes(self) -> int:
        """Return about what PEFT's layer takes beside the weight and the result."""
        shape = self.shape if self.beside is None else self.beside.shape
        size, side = int(np.prod(shape)), max(shape[0], int(np.prod(shape[1:])))
        adapter = sum(ref.size for ref in self.refs)
        return 8 * (COPIES * (size + adapter) + SQUARES * side * side)


def refuse_without_peft(where: object, method: str) -> None:
    """Refuse if PEFT is not installed.

    Raises:
        AdapterError: It is not.
    """
    if find_spec("peft") is None:
        raise AdapterError(
            f"{where}: {method} is merged through PEFT's own layers, and PEFT is not installed. "
            f"Run {INSTALL}, then merge again."
        )


def unknown_fields(raw: Mapping[str, Any]) -> list[str]:
    """Return the fields of an adapter_config.json that the installed PEFT does not know."""
    known = {field.name for field in dataclasses.fields(_config_class(str(raw["peft_type"])))}
    return sorted(name for name, value in raw.items() if value and name not in known)


def _config_class(method: str) -> Any:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING  # noqa: PLC0415 - an optional extra

    return next(cls for kind, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items() if kind.value == method)


def knows(method: str) -> bool:
    """Return whether the installed PEFT has a method of that name."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING  # noqa: PLC0415 - an optional extra

    return any(kind.value == method for kind in PEFT_TYPE_TO_CONFIG_MAPPING)


@contextmanager
def _built(layer: PeftLayer, W: Floats | None) -> Iterator[Any]:
    """Yield PEFT's model of one layer with its adapter loaded; without W only to see if it loads.

    Raises:
        AdapterError: PEFT does not take the adapter.
    """
    import torch  # noqa: PLC0415 - an import of a second that only these methods need

    with _ONE_AT_A_TIME, torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # the same bytes for any number of threads
        torch.manual_seed(0)
        try:
            yield _loaded(layer, W)
        finally:
            torch.set_num_threads(threads)


def _loaded(layer: PeftLayer, W: Floats | None) -> Any:
    import peft  # noqa: PLC0415 - an optional extra

    try:
        model = peft.get_peft_model(_skeleton(layer, W), _config(layer)).double().eval()
        state = {key: _cut(key, _tensor(ref), layer) for key, ref in layer.tensors}
        found = peft.set_peft_model_state_dict(model, state)
    except Exception as error:
        # PEFT raises whatever it meets; all of it means that this adapter is not this layer's.
        raise AdapterError(f"PEFT does not take it for this layer: {_words(error)}") from error
    own = f"base_model.model.{layer.module}."
    shared = {key.rpartition(".")[2] for key, _ in layer.tensors if not key.startswith(own)}
    left = [  # what all layers share is listed once per layer as well
        k for k in found.missing_keys
        if model.base_model.prefix in k and not shared.intersection(k.split("."))
    ]  # fmt: skip
    if left or found.unexpected_keys:
        raise AdapterError(
            f"PEFT does not take it for this layer: {len(left)} of its tensors are missing, "
            f"{len(found.unexpected_keys)} are unknown "
            f"({', '.join(map(shown, [*left, *found.unexpected_keys][:3]))})"
        )
    return model


def _cut(key: str, tensor: torch.Tensor, layer: PeftLayer) -> torch.Tensor:
    """Return VeRA's shared A and B as a layer takes them: cut to its inputs and outputs.

    Source: PEFT, src/peft/tuners/vera/layer.py (get_delta_weight).
    """
    name, shape = key.rpartition(".")[2], layer.beside.shape if layer.beside else layer.shape
    inputs, outputs = (shape[1], shape[0]) if layer.layout != "io" else (shape[0], shape[1])
    if name in ("vera_A", "pvera_A"):
        return tensor[:, :inputs]
    return tensor[:outputs] if name in ("vera_B", "pvera_B") else tensor


def _config(layer: PeftLayer) -> Any:
    raw = json.loads(layer.config)
    cls = _config_class(layer.method)
    known = {field.name for field in dataclasses.fields(cls) if field.init}
    values = {k: v for k, v in raw.items() if k in known and v is not None and k not in ONE_LAYER}
    values.pop("peft_type", None)
    config = cls(**values)
    config.target_modules = {layer.module}
    config.inference_mode = True
    return config


def _skeleton(layer: PeftLayer, W: Floats | None) -> Any:
    """Return a module that holds nothing but the one layer, at its place."""
    import torch  # noqa: PLC0415 - as above
    from torch import nn  # noqa: PLC0415 - as above

    own = _own_layer(layer)
    if W is not None:
        weight, bias = W, None
        if layer.part == "bias":
            assert layer.beside is not None, "Bug: the plan gives a bias its weight"
            weight, bias = _tensor(layer.beside).double().numpy(), W
        own.weight.data = torch.from_numpy(np.array(weight)).reshape(own.weight.shape)
        if bias is not None:
            own.bias.data = torch.from_numpy(np.array(bias)).reshape(-1)
    *parents, name = layer.module.split(".")
    root = place = nn.Module()
    for parent in parents:
        place.add_module(parent, nn.Module())
        place = getattr(place, parent)
    place.add_module(name, own)
    return root


def _own_layer(layer: PeftLayer) -> Any:
    """Return the plain layer with zeros, as the base's class has it."""
    import torch  # noqa: PLC0415 - as above
    from torch import nn  # noqa: PLC0415 - as above

    shape = layer.beside.shape if layer.beside is not None else layer.shape
    bias, zeros = layer.has_bias, torch.zeros(shape, dtype=torch.float64)
    own: Any
    with torch.device("meta"):
        if layer.embedding:
            own = nn.Embedding(shape[0], shape[1])
        elif len(shape) == 2 and layer.layout == "io":
            from transformers.pytorch_utils import Conv1D  # noqa: PLC0415 - an optional extra

            own = Conv1D(shape[1], shape[0])
        elif len(shape) == 2:
            own = nn.Linear(shape[1], shape[0], bias=bias)
        else:
            cls: Any = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}[len(shape)]
            own = cls(shape[1], shape[0], shape[2:], bias=bias)
    own.weight = nn.Parameter(zeros, requires_grad=False)
    if getattr(own, "bias", None) is not None:
        width = shape[1] if layer.layout == "io" else shape[0]
        own.bias = nn.Parameter(torch.zeros(width, dtype=torch.float64), requires_grad=False)
    return own


def _probed(module: Any, layer: PeftLayer) -> torch.Tensor:
    """Return what an adapted layer multiplies by, or adds, from its outputs for unit inputs."""
    import torch  # noqa: PLC0415 - as above

    shape = layer.beside.shape if layer.beside is not None else layer.shape
    if layer.embedding:
        looked_up: torch.Tensor = module(torch.arange(shape[0]))
        return looked_up
    inputs = shape[0] if layer.layout == "io" else int(np.prod(shape[1:]))
    like = shape[1:] if len(shape) > 2 else (inputs,)
    nothing = module(torch.zeros(1, *like, dtype=torch.float64)).reshape(1, -1)
    if layer.part == "bias":
        bias: torch.Tensor = nothing
        return bias
    block = max(1, (1 << 22) // inputs)
    rows = []
    for first in range(0, inputs, block):
        units = torch.zeros(min(block, inputs - first), inputs, dtype=torch.float64)
        units[torch.arange(len(units)), torch.arange(len(units)) + first] = 1
        rows.append(module(units.reshape(-1, *like)).reshape(len(units), -1) - nothing)
    columns = torch.cat(rows)
    return columns if layer.layout == "io" else columns.T


@lru_cache(maxsize=256)
def _misfit(layer: PeftLayer) -> str | None:
    """Return what PEFT says against the layer; zeros stand for W, no value is looked at."""
    try:
        with _built(layer, None):
            return None
    except AdapterError as error:
        return f"is {layer.shape}; {error}"


def _tensor(ref: TensorRef) -> torch.Tensor:
    import torch  # noqa: PLC0415 - as above

    return torch.from_numpy(ref.raw()).view(getattr(torch, ref.dtype.torch)).reshape(ref.shape)


def _words(error: Exception) -> str:
    return shown(f"{type(error).__name__}: {error}", 300)
