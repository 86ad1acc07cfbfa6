"""What a path that was refused looks like: to say where the arguments are in another's place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from dora_export.adapters import FORMATS, ReadOptions
from dora_export.checkpoints import open_checkpoint
from dora_export.errors import AdapterError, InputError


@contextmanager
def roles_told(
    base: Path | None, adapters: Sequence[Path], options: ReadOptions, usage: str
) -> Iterator[None]:
    """Explain a refusal of the block by arguments that stand in each other's place, if they do.

    Args:
        base: What the block reads as the base.
        adapters: What it reads as adapters.
        options: How.
        usage: The command, for the message.

    Raises:
        InputError: The block raised it or an ``AdapterError``, and the base is an adapter, or an
            adapter is a model.
    """
    try:
        yield
    except (InputError, AdapterError) as error:
        if why := _misplaced(base, adapters, options):
            raise InputError(f"{why} Usage: {usage}.") from error
        raise


def _misplaced(base: Path | None, adapters: Sequence[Path], options: ReadOptions) -> str | None:
    unknown = next((path for path in adapters if not _is_adapter(path, options)), None)
    if base is not None and _is_adapter(base, options) and not _is_model(base, options):
        if unknown is not None and _opens(unknown, options):
            return (
                f"{base}: an adapter, in the base's place, and {unknown} is none: the arguments "
                "seem swapped."
            )
        return f"{base}: an adapter, in the base's place."
    if unknown is not None and _is_model(unknown, options):
        return f"{unknown}: a model, in an adapter's place."
    return None


def _is_adapter(path: Path, options: ReadOptions) -> bool:
    for form in FORMATS:
        try:
            if form.matches(path, options):
                return True
        except (InputError, AdapterError):  # not readable as that; it may be of another format
            continue
    return False


def _is_model(path: Path, options: ReadOptions) -> bool:
    """Whether this is a folder with weights and a model's config; a file does not tell."""
    configs = ("config.json", "model_index.json")
    return any((path / name).is_file() for name in configs) and _opens(path, options)


def _opens(path: Path, options: ReadOptions) -> bool:
    try:
        open_checkpoint(path, allow_pickle=options.allow_pickle)
    except InputError:
        return False
    return True
