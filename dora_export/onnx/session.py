"""Runs a graph whose adapters are swapped at run time, with the checks that onnxruntime leaves out.

onnxruntime runs without complaint with an adapter that lacks tensors, that belongs to another
graph, or with two adapters at once (it then computes something else). Here each of these is an
error before anything runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from dora_export.checkpoints.folder import read_json
from dora_export.errors import DoraExportError, InputError, shown
from dora_export.onnx.files import sha256
from dora_export.storage.paths import inside
from dora_export.writers.staging import MANIFEST

R = TypeVar("R")


class AdapterSession:
    """An onnxruntime session with swappable adapters, one or none of them active in each run.

    Safe to use from several threads at once, each run with an adapter of its own.

    Attributes:
        adapters: Names of the adapters.
        session: The ``onnxruntime.InferenceSession``.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        providers: Sequence[str] = ("CPUExecutionProvider",),
        options: Any = None,
    ) -> None:
        """Open what ``dora-export onnx --adapters`` has written.

        Every file that a run depends on is held to its SHA-256 in the manifest. The graph's weights
        are hashed while onnxruntime loads them, which takes it longer.

        Args:
            folder: The published folder.
            providers: Execution providers of onnxruntime, in order of preference.
            options: An ``onnxruntime.SessionOptions``; None: the library's own, which then
                warns of nothing; it would of every input for adapters, by a stranger's name.

        Raises:
            InputError: The folder is no such output, its files are not those that were published
                together, or onnxruntime does not take them.
        """
        import onnxruntime  # noqa: PLC0415 - a second to import

        root = Path(folder)
        try:
            graph, weights, pinned, adapters = _published(root)
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{root / MANIFEST}: not of an output of dora-export onnx --adapters, or damaged. "
                "Pass that folder, as it was published."
            ) from error
        self._ort = onnxruntime
        if options is None:
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 3  # errors
        self.session = _while_checked(
            weights,
            lambda: _loaded(
                graph,
                # Falling back, it would print names of a stranger's, and run elsewhere than asked.
                lambda: onnxruntime.InferenceSession(
                    str(graph), options, list(providers), enable_fallback=0
                ),
            ),
        )
        found = {i.name for i in self.session.get_overridable_initializers()}
        if missing := sorted(pinned - found):
            raise InputError(
                f"{graph}: has no input '{shown(missing[0])}' for adapters ({len(missing)} are "
                "missing): it was changed after it was published. Export it again."
            )
        self._loaded = {}
        for name, path in adapters.items():
            adapter = self._loaded[name] = onnxruntime.LoraAdapter()
            _loaded(path, lambda: adapter.Load(str(path)))  # noqa: B023 - called at once

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters."""
        return tuple(self._loaded)

    def run(
        self,
        inputs: Mapping[str, NDArray[Any]],
        adapter: str | None = None,
        outputs: Sequence[str] | None = None,
    ) -> dict[str, NDArray[Any]]:
        """Run the graph with one adapter, or as the base.

        Args:
            inputs: The graph's inputs by name.
            adapter: Which adapter; None: none.
            outputs: Names of the outputs wanted; None: all.

        Returns:
            Outputs by name.

        Raises:
            DoraExportError: There is no such adapter.
        """
        options = self._ort.RunOptions()
        if adapter is not None:
            if adapter not in self._loaded:
                raise DoraExportError(
                    f"adapter '{shown(adapter)}': not in this folder. It has: "
                    f"{', '.join(self._loaded)}."
                )
            options.add_active_adapter(self._loaded[adapter])
        names = list(outputs or (o.name for o in self.session.get_outputs()))
        found = self.session.run(names, dict(inputs), options)
        return {n: np.asarray(v) for n, v in zip(names, found, strict=True)}


def _published(root: Path) -> tuple[Path, dict[Path, Any], set[str], dict[str, Path]]:
    """Return what the manifest says was published together; graph and adapters are checked.

    Returns:
        The graph; the files with its weights, with their bytes and digests, not checked yet; the
        inputs that its adapters have; the adapters' files.
    """
    facts = read_json(root / MANIFEST)["onnx"]
    if facts["way"] != "adapters":
        raise KeyError(facts["way"])
    files = {name: inside(root, name, root / MANIFEST) for name in facts["files"]}
    graph = files.pop(facts["graph"])
    pins = {name: (facts["bytes"][name], digest) for name, digest in facts["files"].items()}
    _same(graph, *pins[facts["graph"]])
    adapters = {}
    for name, said in facts["adapters"].items():
        adapters[name] = inside(root, said["file"], root / MANIFEST)
        _same(adapters[name], said["bytes"], said["sha256"])
    weights = {path: pins[name] for name, path in files.items()}
    return graph, weights, {n for s in facts["slots"].values() for n in s["inputs"]}, adapters


def _while_checked(files: Mapping[Path, tuple[Any, Any]], load: Callable[[], R]) -> R:
    """Return what ``load`` does; the files are hashed meanwhile, in threads.

    Raises:
        InputError: A file is not the one that was published, whatever ``load`` makes of it.
    """
    with ThreadPoolExecutor() as pool:
        checks = [pool.submit(_same, path, *pin) for path, pin in files.items()]
        try:
            return load()
        finally:
            for check in checks:
                check.result()  # an error of a file's is the reason for one of load's


def _loaded(path: Path, load: Callable[[], R]) -> R:
    """Return what ``load`` does with a file of onnxruntime's.

    Raises:
        InputError: onnxruntime does not take it.
    """
    try:
        return load()
    except Exception as error:
        # onnxruntime has a class for every one of its states and a common base for none.
        raise InputError(
            f"{path}: onnxruntime does not take it: {shown(error, 300)}. Export it again, or pass "
            "providers and options that this machine has."
        ) from error


def _same(path: Path, nbytes: Any, digest: Any) -> None:
    """Refuse a file that is not the one that was published: of another size before it is read."""
    try:
        found = sha256(path) if path.stat().st_size == nbytes else None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}. Copy it again.") from error
    if found != digest:
        raise InputError(
            f"{path}: not the file that was published with this folder (its size or SHA-256 is "
            "another). Copy the whole folder again."
        )
