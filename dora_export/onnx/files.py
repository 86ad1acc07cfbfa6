"""The files of a graph: written with their weights beside them, hashed, measured."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from dora_export.errors import VerifyError, shown
from dora_export.onnx.model import DATA_BYTES, GraphError
from dora_export.writers.files import refusal

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

CHUNK = 1 << 20
SMALL_BYTES = 1024  # weights below this stay in the graph
# Operators that onnxruntime has under ONNX's own domain and onnx's checker does not know.
# Source: github.com/microsoft/onnxruntime, onnxruntime/core/graph/contrib_ops/contrib_defs.cc.
ONNXRUNTIMES = ("SimplifiedLayerNormalization",)
CHECKED_BYTES = 64 << 20  # of a graph file that onnx's checker may load
IN_MEMORY = "#"  # location of external data of no file. Source: onnx/checker.cc


def write(model: ir.Model, path: Path, data: str) -> None:
    """Write a graph; weights above ``DATA_BYTES`` in all go into the file ``data`` beside it.

    Weights are read one by one while they are written. The files are on the disk at the end, with
    the mode that the umask gives.

    Raises:
        OutputError: The disk is full, or writing fails.
    """
    import onnx_ir as ir  # noqa: PLC0415 - an extra

    tensors = [v.const_value for g in model.graphs() for v in g.initializers.values()
               if v.const_value is not None]  # fmt: skip
    own = {id(t): t for t in tensors if not isinstance(t, ir.ExternalTensor)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if sum(t.nbytes for t in own.values()) <= DATA_BYTES:
            ir.save(model, path)  # tensors that lie in other files stay there
        elif len(own) == len({id(t) for t in tensors}):
            ir.save(model, path, external_data=data, size_threshold_bytes=SMALL_BYTES)
        else:
            large = [t for t in own.values() if t.nbytes > SMALL_BYTES]
            moved = ir.external_data.convert_tensors_to_external(large, path.parent, data)
            places = {id(t): m for t, m in zip(large, moved, strict=True)}
            for graph in model.graphs():
                for value in graph.initializers.values():
                    value.const_value = places.get(id(value.const_value), value.const_value)
            ir.save(model, path)
        settle_all(path, data)
    except OSError as error:
        raise refusal(path, error) from error
    check(path)


def check(path: Path) -> None:
    """Let onnx's checker look at a graph by its path, as graphs above 2 GiB need.

    Raises:
        GraphError: It refuses the graph.
    """
    import onnx  # noqa: PLC0415 - takes a second

    model = onnx.load(str(path), load_external_data=False)
    unknown = [n for n in model.graph.node if not n.domain and n.op_type in ONNXRUNTIMES]
    seen = path
    if unknown:  # in a copy beside it, since external data is looked for there
        for node in unknown:
            node.domain = "com.microsoft"
        if all(one.domain != "com.microsoft" for one in model.opset_import):
            model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
        seen = path.with_name(f".{path.name}")
        onnx.save(model, str(seen))
    try:
        onnx.checker.check_model(str(seen))
    except onnx.checker.ValidationError as error:
        raise GraphError(
            f"{path.name}: onnx's checker refuses what was exported: {_told(error)}. Pass "
            "another --engine or --opset."
        ) from error
    finally:
        if seen is not path:
            seen.unlink()


def check_again(
    path: Path, made: onnx.ModelProto, origin: Path, before: onnx.ModelProto
) -> tuple[str, ...]:
    """Let onnx's checker look at a graph that was made from another one.

    By its path, where its weights lie beside it; a graph that holds many is checked without them,
    so that they are not all held in memory.

    Args:
        path: The graph, its external data beside it.
        made: It, larger values left out.
        origin: The one that it was made from.
        before: That one, larger values left out.

    Returns:
        Notes: what the checker refuses in both of them, if anything.

    Raises:
        VerifyError: It refuses the graph, and does not refuse the other.
    """
    problem = _refused(path, made)
    if problem is None:
        return ()
    if _refused(origin, before) is not None:
        return (f"onnx's checker refuses the graph, as it did before: {problem}",)
    raise VerifyError(
        f"{path.name}: onnx's checker refuses the written graph, though not the one that it was "
        f"made from: {problem}. Not published."
    )


def _refused(path: Path, model: onnx.ModelProto) -> str | None:
    """Return what onnx's checker finds wrong, or None."""
    import onnx  # noqa: PLC0415 - as above

    try:
        onnx.checker.check_model(str(path) if path.stat().st_size < CHECKED_BYTES else _bare(model))
    except onnx.checker.ValidationError as error:
        return _told(error)
    return None


def _told(error: Exception) -> str:
    """Return what the checker says, which takes several lines, as one."""
    return shown(" ".join(str(error).split()).rstrip("."), 300)


def _bare(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a graph whose external data is said to be in memory, which the checker believes."""
    import onnx  # noqa: PLC0415 - as above

    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    for tensor in _tensors(bare.graph):
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = IN_MEMORY
    return bare


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for inner in (attribute.g, *attribute.graphs):
                yield from _tensors(inner)


def settle_all(path: Path, data: str) -> None:
    """Settle a graph and, where there is one, its data file."""
    for file in (path, path.with_name(data)):
        if file.exists():
            settle(file)


def settle(path: Path) -> None:
    """Put a file that a library has written on the disk, with the mode that the umask gives."""
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(path, 0o666 & ~mask)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sizes(folder: Path) -> dict[str, int]:
    """Return the bytes of every file below a folder, by its path there, hidden ones left out."""
    found = sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))
    return {p.relative_to(folder).as_posix(): p.stat().st_size for p in found}


def digests(folder: Path, graphs: Iterable[str]) -> dict[str, str]:
    """Return the SHA-256 of graphs and of the files beside them that hold their weights."""
    found = {}
    for graph in graphs:
        path = folder / graph
        for file in sorted(path.parent.glob(f"{path.name}*")):
            found[file.relative_to(folder).as_posix()] = sha256(file)
    return found


def sha256(path: Path) -> str:
    """Return a file's SHA-256."""
    digest = hashlib.sha256()
    with path.open("rb") as opened:
        while chunk := opened.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
