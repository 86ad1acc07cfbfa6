"""Models of a library (transformers, diffusers), loaded from folders and taken by tensor names.

No code from a model's folder is ever executed: the class is one of the library's own, or the model
cannot be run here. Libraries rename tensors while they load them, so where a tensor of the
checkpoint has gone is found by name, by the end of its name, or by its very values, and the
values are compared in any case.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dora_export.checkpoints.folder import read_json
from dora_export.checkpoints.pipeline import weights_in
from dora_export.errors import shown
from dora_export.expert_names import Address, address
from dora_export.plan import Plan
from dora_export.tensors import TensorRef
from dora_export.verification.measured import LoadFailure, Unsupported, library_of
from dora_export.verification.terms import stored

# Problems with keys that transformers and diffusers report of loading.
PROBLEMS = {"missing_keys": "missing", "unexpected_keys": "not part of the model",
            "mismatched_keys": "of another shape"}  # fmt: skip
NUMBERS = re.compile(r"(?<=\.)\d+(?=\.|$)")
# PEFT's task -> transformers' class with such a head, for heads that the base's class has not.
# Source: github.com/huggingface/peft, src/peft/peft_model.py.
TASK_CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}


@dataclass(frozen=True, eq=False)
class Loaded:
    """A model in memory, in eval mode, without gradients.

    Attributes:
        model: The model.
        folder: Where it came from.
        problems: Kind of problem (see ``PROBLEMS``) -> names of parameters or tensors, sorted.
    """

    model: nn.Module
    folder: Path
    problems: Mapping[str, frozenset[str]]

    def parameters(self) -> dict[str, Tensor]:
        """Return every parameter and buffer by its path, tied ones under each of theirs."""
        return {
            f"{path}.{name}" if path else name: tensor
            for path, module in self.model.named_modules(remove_duplicate=False)
            for name, tensor in (*module._parameters.items(), *module._buffers.items())
            if tensor is not None
        }


def is_installed(library: str) -> bool:
    """Return whether a library can be imported."""
    return importlib.util.find_spec(library) is not None


@dataclass(frozen=True)
class ModelClass:
    """A class of the library, and what it has to be told beside the config.

    Attributes:
        library: Name of the library.
        name: Name of the class.
        options: Values that override the config's.
    """

    library: str
    name: str
    options: Mapping[str, Any] = field(default_factory=dict)


def model_class(config: Mapping[str, Any]) -> ModelClass:
    """Return the class that a config asks for, ``AutoModel`` where it names none.

    Raises:
        Unsupported: It asks for code of its own.
    """
    names = config.get("architectures")
    named = names[0] if isinstance(names, list) and names else None
    name = str(config.get("_class_name") or named or "")
    library = library_of(config)
    if name and hasattr(importlib.import_module(library), name):
        return ModelClass(library, name)
    if name or "model_type" not in config:
        why = f"{library} has no class '{shown(name)}'" if name else "names no model class"
        raise Unsupported("config.json", f"{why}, and code of the model's own is never executed")
    return ModelClass(library, "AutoModel")


def class_of(plan: Plan) -> ModelClass:
    """Return the class to run a plan's model with.

    That is the base's, but for an adapter that brings a head which the base's class has not: the
    merged config still names the base's class, and users load it with the one that was trained.

    Raises:
        Unsupported: As ``model_class``.
    """
    if plan.base.components:
        why = ("a pipeline of several models is not run as one; for an adapter of one model, name "
               "that model's folder in base and merged pipeline")  # fmt: skip
        raise Unsupported("model_index.json", why)
    config = plan.base.config
    base = model_class(config)
    added = [s for s in plan.steps if s.status == "added" and len(s.shape) == 2]
    heads = [s for s in added if s.source not in plan.base.tensors.values()]
    task = TASK_CLASSES.get(str(_task(plan)))
    if not heads or task is None or base.library != "transformers":
        return base
    auto = getattr(importlib.import_module("transformers"), task)
    known = {cls.__name__ for cls in auto._model_mapping.values()}
    if base.name in known:
        return base
    return ModelClass(base.library, task, {"num_labels": heads[0].shape[0]})


def _task(plan: Plan) -> Any:
    """Return the task that a PEFT adapter was trained for, or None."""
    configs = [a.folder / "adapter_config.json" for a in plan.adapters if a.folder]
    tasks = (read_json(config).get("task_type") for config in configs if config.is_file())
    return next((task for task in tasks if task), None)


def load(folder: Path, cls: ModelClass, dtype: torch.dtype, variant: str | None = None) -> Loaded:
    """Load a model from a folder, without network, pickled code, or code of its own.

    What the files lack starts at random values; the same ones in every call. Of weights in several
    variants, ``variant`` is loaded if it is there, else those without one, else the first.

    Raises:
        LoadFailure: The library refuses, or finds an adapter in the folder and applies it.
    """
    options: dict[str, Any] = {
        "local_files_only": True,
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,  # they are reported by name instead
    }
    options["dtype" if cls.library == "transformers" else "torch_dtype"] = dtype
    if cls.library == "transformers":
        options["trust_remote_code"] = False  # left out, it asks whoever sits at the terminal
    if any(folder.glob("*.safetensors")):
        options["use_safetensors"] = True
    held = weights_in(folder).files
    if held and (variant in held or None not in held):
        options["variant"] = variant if variant in held else next(iter(held))
    library = importlib.import_module(cls.library)
    with quiet(cls.library), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            model, info = getattr(library, cls.name).from_pretrained(
                folder, **options, **cls.options
            )
        except Exception as error:
            # Libraries raise whatever they meet; all of it means that this model does not load.
            raise LoadFailure(f"{type(error).__name__}: {shown(error, 400)}") from error
    if getattr(model, "_hf_peft_config_loaded", False):
        raise LoadFailure("the library applies an adapter that it finds in the same folder")
    problems = {kind: _names(info.get(kind)) for kind in PROBLEMS}
    if getattr(model.config, "_experts_implementation", None) not in (None, "eager"):
        model.set_experts_implementation("eager")  # one expert after the other, to be watched
    return Loaded(model.eval().requires_grad_(False), folder, problems)


def _names(found: Any) -> frozenset[str]:
    """Return names of a loading report; mismatched ones come with their shapes."""
    return frozenset(str(n if isinstance(n, str) else n[0]) for n in found or ())


@contextmanager
def quiet(library: str = "transformers") -> Iterator[list[warnings.WarningMessage]]:
    """Keep a library's log, progress bars and warnings off the terminal; yield the warnings."""
    logging = importlib.import_module(f"{library}.utils.logging")
    verbosity = logging.get_verbosity()
    bar = getattr(logging, "is_progress_bar_enabled", lambda: True)()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield caught
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


# --- tensors of a checkpoint -> parameters of a model


@dataclass(frozen=True)
class Place:
    """Where a checkpoint's tensor is in a model.

    Attributes:
        path: Path of its parameter.
        how: "name", "end of name", "content" or "part of a stack".
        index: Slice of the parameter, where the tensor is one of an expert.
        outputs: Which outputs of that slice; None: all.
        turned: The tensor is the transpose of the parameter, or of its part.
    """

    path: str
    how: str
    index: int | None = None
    outputs: slice | None = None
    turned: bool = False

    def part(self, parameter: Tensor) -> Tensor:
        """Return the tensor's part of its parameter, as the checkpoint holds it."""
        found = parameter if self.index is None else parameter[self.index]
        found = found.mT if self.turned else found
        return found if self.outputs is None else found[self.outputs]


def places(loaded: Loaded, names: Sequence[str], refs: Mapping[str, TensorRef]) -> dict[str, Place]:
    """Return where tensors of the checkpoint are in the model.

    Args:
        loaded: The model, loaded from that checkpoint.
        names: Tensors to find.
        refs: Their stored values, where they must be found in the model unchanged.

    Raises:
        Unsupported: A tensor is nowhere, in several places, or has other values there.
    """
    parameters = loaded.parameters()
    found = {name: _by_name(name, parameters) for name in names}
    taken = {place.path for place in found.values() if place}
    by_shape: dict[tuple[int, ...], list[str]] = defaultdict(list)
    for path, tensor in parameters.items():
        if path not in taken:
            by_shape[tuple(tensor.shape)].append(path)
    result = {}
    for name, place in found.items():
        ref = refs.get(name)
        if place is None or (ref is not None and not _holds(parameters[place.path], ref)):
            place = _by_content(name, ref, parameters, by_shape)
        result[name] = place
    _refuse_shared(result)
    return result


def _by_name(name: str, parameters: Mapping[str, Tensor]) -> Place | None:
    if name in parameters:
        return Place(name, "name")
    ends = [p for p in parameters if p.endswith(f".{name}") or name.endswith(f".{p}")]
    return Place(ends[0], "end of name") if len(ends) == 1 else None


def _by_content(
    name: str,
    ref: TensorRef | None,
    parameters: Mapping[str, Tensor],
    by_shape: Mapping[tuple[int, ...], Sequence[str]],
) -> Place:
    if ref is None:
        raise Unsupported(shown(name), "the model has no parameter of that name")
    paths = [p for p in by_shape.get(ref.shape, ()) if _holds(parameters[p], ref)]
    if not paths:
        parts = _in_stacks(name, ref, parameters)
        if len(parts) == 1:
            return parts[0]
    if len({id(parameters[p]) for p in paths}) != 1:
        why = "in several places" if paths else "nowhere"
        raise Unsupported(shown(name), f"the library renames it, and its values are {why}")
    return Place(paths[0], "content")


def _in_stacks(name: str, ref: TensorRef, parameters: Mapping[str, Tensor]) -> list[Place]:
    """Return where stacked parameters hold an expert's tensor, or the transpose of a whole stack.

    Only parameters of the same layer are looked at: the numbers in their paths are the same ones.
    """
    stacked = len(ref.shape) == 3
    wanted = address(name, stacked=stacked)
    if wanted is None:
        return []
    places = []
    for path, parameter in parameters.items():
        held = address(path, stacked=True) if parameter.ndim == 3 else None
        if held is None or NUMBERS.findall(held.block) != NUMBERS.findall(wanted.block):
            continue
        if stacked:
            tried = [Place(path, "part of a stack", turned=True)]
        elif wanted.expert is None or wanted.expert >= len(parameter):
            continue
        else:
            tried = _arrangements(path, wanted, held, parameter)
        places += [p for p in tried if _holds(p.part(parameter), ref)]
    return places


def _arrangements(path: str, wanted: Address, held: Address, parameter: Tensor) -> list[Place]:
    """Return the ways in which a slice may hold one matrix of an expert."""
    outputs: list[slice | None] = []
    if held.part == wanted.part:
        outputs = [None]
    elif held.part == "gate_up" and wanted.part in ("gate", "up"):
        second = wanted.part == "up"
        for count in {parameter.shape[1] // 2, parameter.shape[2] // 2}:
            outputs.append(slice(count, 2 * count) if second else slice(0, count))
        outputs.append(slice(int(second), None, 2))
    return [
        Place(path, "part of a stack", wanted.expert, output, turned)
        for output in outputs
        for turned in (False, True)
    ]


def _holds(parameter: Tensor, ref: TensorRef) -> bool:
    """Return whether a parameter has the stored values (in its own precision)."""
    if tuple(parameter.shape) != ref.shape:
        return False
    values = stored(ref).to(parameter.dtype).reshape(ref.shape)
    return bool(torch.equal(values, parameter))


def _refuse_shared(found: Mapping[str, Place]) -> None:
    """Two tensors in one place would hide each other."""
    owners: dict[str, str] = {}
    for name, place in found.items():
        where = f"{place.path} {place.index} {place.outputs}"
        if where in owners:
            raise Unsupported(shown(name), f"the model holds it where it holds {owners[where]}")
        owners[where] = name


def put(model: nn.Module, path: str, tensor: Tensor) -> None:
    """Put a tensor in a parameter's place; it takes no further part in ``parameters()``."""
    parent, _, name = path.rpartition(".")
    module = model.get_submodule(parent)
    for own in (module._parameters, module._buffers):
        own.pop(name, None)
    setattr(module, name, tensor)


def get(model: nn.Module, path: str) -> Tensor:
    """Return what is at a path."""
    parent, _, name = path.rpartition(".")
    found: Tensor = getattr(model.get_submodule(parent), name)
    return found
