"""Any ``nn.Module`` as a graph, from example inputs: for models that no library has a class for."""

from __future__ import annotations

import copy
import os
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dora_export._version import __version__
from dora_export.errors import listing
from dora_export.machine import faults_told
from dora_export.onnx.model import DATA, GRAPH, GraphError, GraphReport, ParityError
from dora_export.verification.model import Finding, TierResult, VerifyReport
from dora_export.verification.parity import Distance, distance, tolerance
from dora_export.writers import manifest, place
from dora_export.writers.files import write_small
from dora_export.writers.journal import FORMAT, FORMAT_LABEL, Job
from dora_export.writers.staging import MANIFEST, staged

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dora_export.onnx.wrappers import Part

# Roundings that a result may have been through at least: the noise of a handful of numbers, all
# that a small module gives, may by chance be next to none.
ROUNDINGS = 4


@faults_told()
def export_module(
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    output: str | os.PathLike[str],
    *,
    axes: Mapping[str, Mapping[int, str]] | None = None,
    outputs: Sequence[str] | None = None,
    opset: int | None = None,
    engine: Literal["auto", "torch", "transformers"] = "auto",
    verify: bool = True,
    force: bool = False,
) -> GraphReport:
    """Publish a module as a folder with an ONNX graph, held against the module itself.

    The graph is run on the example inputs and, where axes vary, on inputs one longer in each of
    them, and must agree with the module in float64 to twice the noise that the module has itself
    (never taken to be less than a few roundings).

    Args:
        module: In eval mode afterwards; gives a tensor, a sequence or a mapping of tensors.
        inputs: Example inputs by the names of its forward.
        output: Folder to publish; must not exist, be empty, or with ``force`` be an earlier output.
        axes: Input -> axis -> name of the axis, for those that vary; sizes in ``inputs`` must then
            be above 1.
        outputs: Names of the outputs; None: "output", the mapping's keys, or "0", "1", ...
        opset: Version of ONNX's operators; None: the exporter's own.
        engine: What traces, see ``GraphOptions``.
        verify: Hold the graph against the module.
        force: Replace an earlier output of this tool.

    Returns:
        What was made.

    Raises:
        ParityError: The graph computes something else.
        GraphError: It cannot be traced.
        OutputError: The output exists, or cannot be written.
    """
    from dora_export.onnx import engines, files, tidy  # noqa: PLC0415 - torch takes a second

    started = time.monotonic()
    target = place.target_of(output)
    place.check_place(target, {}, force=force, leftover=None)
    module.eval()
    part = _part(module, dict(inputs), axes or {}, outputs)
    job = Job({FORMAT_LABEL: FORMAT, "dora-export": __version__, "run": uuid.uuid4().hex}, {})
    with staged(target, job, force=force) as stage:
        model, used, failures = engines.traced(part, opset, engine)
        tidy.tidy(model)
        path = stage.folder / GRAPH
        files.write(model, path, DATA)
        report = _verified(part, path, target, started) if verify else None
        facts = {"class": type(module).__name__, "engine": used,
                 "opset": model.opset_imports.get("", 0), "inputs": list(inputs),
                 "outputs": list(part.outputs)}  # fmt: skip
        content = {"schema": manifest.SCHEMA,
                   "tool": {"name": "dora-export", "version": __version__},
                   "onnx": {"way": "trace", **facts, "files": files.digests(stage.folder, [GRAPH]),
                            "parity": report and report.verdict}}  # fmt: skip
        write_small(stage.folder / MANIFEST, manifest.as_json(content))
        found = GraphReport(
            output=target, way="trace", graphs=(GRAPH,), files=files.sizes(stage.folder),
            facts=facts, verified=report, seconds=time.monotonic() - started,
            peak_rss_bytes=None, notes=tuple(failures),
        )  # fmt: skip
        if found.verdict == "wrong":
            assert report is not None, "Bug: a mismatch that nothing found"
            error = ParityError(
                "the graph does not compute what the module does:"
                f"{listing(f'{f.where}: {f.what}' for f in report.findings)}\nNot published. Pass "
                "another engine, or verify=False to publish all the same."
            )
            error.report = found
            raise error
    return found


def _part(
    module: nn.Module,
    inputs: dict[str, Tensor],
    axes: Mapping[str, Mapping[int, str]],
    outputs: Sequence[str] | None,
) -> Part:
    import torch  # noqa: PLC0415 - as above

    from dora_export.onnx.wrappers import Flat, Part, tensors  # noqa: PLC0415

    if strange := sorted(set(axes) - set(inputs)):
        raise GraphError(f"axes: '{strange[0]}' is no input. Inputs are {', '.join(inputs)}.")
    for name, named in axes.items():
        if small := [a for a in named if inputs[name].shape[a] < 2]:
            raise GraphError(
                f"inputs: axis {small[0]} of '{name}' has size {inputs[name].shape[small[0]]}, and "
                "tracing takes 0 and 1 for constants. Pass an example with 2 or more."
            )
    with torch.no_grad():
        given = list(tensors(module(**inputs)))
    names = given if outputs is None else list(outputs)
    if len(names) != len(given):
        raise GraphError(f"outputs: {len(names)} names for {len(given)} outputs ({given}).")

    def run(model: nn.Module, values: dict[str, Tensor]) -> Sequence[Tensor]:
        found = tensors(model(**values))
        return [found[name] for name in given]

    return Part(Flat(module, list(inputs), run, names), inputs, axes, names, compared=names)


def _verified(part: Part, path: Path, target: Path, started: float) -> VerifyReport:
    import torch  # noqa: PLC0415 - as above

    from dora_export.verification.runner import GraphUnusable, OnnxRuntime  # noqa: PLC0415

    findings: list[Finding] = []
    figures: dict[str, Any] = {}
    exact = copy.deepcopy(part.module).double()
    try:
        runner = OnnxRuntime(path)
        for size, values in _sizes(part):
            with torch.no_grad():
                noisy = part.module(*values.values())
                right = exact(*(v.double() if v.is_floating_point() else v
                                for v in values.values()))  # fmt: skip
            found = runner.run({n: v.numpy() for n, v in values.items()})
            for name, ours, rough in zip(part.outputs, right, noisy, strict=True):
                noise = _apart(rough.numpy(), ours.numpy())
                error = _apart(found[name], ours.numpy())
                unit = float(torch.finfo(rough.dtype).eps) / 2
                excess = tolerance(noise, ROUNDINGS * unit).excess(error)
                figures[f"{name}, {size}"] = {**error.to_dict(), "excess": excess}
                if excess > 1:
                    what = f"max |difference| {error.largest:.3g} of {error.scale:.3g} on {size}"
                    findings.append(Finding("graph-differs", f"output '{name}'", what))
    except GraphUnusable as why:
        findings.append(Finding(why.code, path.name, str(why)))
    worst = max((f["excess"] for f in figures.values()), default=0.0)
    summary = f"{len(figures)} outputs, at most {worst:.0%} of what the module's noise allows"
    tier = TierResult("onnx", bool(figures), summary, time.monotonic() - started, figures)
    return VerifyReport(target, (), target, "full", f"dora-export {__version__}", "none", (tier,),
                        tuple(findings), ())  # fmt: skip


def _apart(found: Any, expected: Any) -> Distance:
    if found.shape != expected.shape:
        return Distance(1, float("inf"))
    return distance(found, expected)


def _sizes(part: Part) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield the example inputs, and ones with every varying axis one longer."""
    import torch  # noqa: PLC0415 - as above

    values = dict(part.inputs)
    yield "the example inputs", values
    if not any(part.axes.values()):
        return
    longer = {}
    for name, tensor in values.items():
        grown = tensor
        for axis in part.axes.get(name, {}):
            grown = torch.cat([grown, grown.narrow(axis, 0, 1)], dim=axis)
        longer[name] = grown
    yield "longer ones", longer
