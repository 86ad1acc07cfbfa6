"""How a PEFT adapter was begun: initialisations that left the base alone, and those that did not.

Source: github.com/huggingface/peft 0.21.2, src/peft/tuners/lora/layer.py (pissa_init, olora_init,
corda_init, loftq_init, lora_ga_init), src/peft/peft_model.py (save_pretrained).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, get_args

from dora_export.adapters.model import ReadOptions
from dora_export.errors import shown
from dora_export.residual import INITS, Init, Residual
from dora_export.update import Update

HARMLESS = ("gaussian", "eva", "orthogonal", "mica")
BASE_CHANGING = {
    "pissa": "W - s B0 A0 of its SVD",
    "olora": "W - s B0 A0 of its QR decomposition",
    "corda": "W less a data-dependent product",
    "lora_ga": "W less a gradient-dependent product",
    "loftq": "the quantised and dequantised W",
}
CONVERT = "convert it with PEFT's save_pretrained(path_initial_model_for_weight_conversion=...)"


def changed(raw: Mapping[str, Any]) -> str | None:
    """Return the initialisation that changed the base, in the config's words, or None."""
    init = raw.get("init_lora_weights", True)
    return init if isinstance(init, str) and init.startswith(tuple(BASE_CHANGING)) else None


def residual(module: str, init: str | None, rank: int, scaling: float) -> Update:
    """Return the change that makes a layer's weight what its adapter was trained on.

    Args:
        module: Path of the layer.
        init: One of ``INITS``.
        rank: Of the adapter's product there.
        scaling: Of that product, dimensionless.
    """
    known = next((i for i in INITS if i == init), None)
    assert known is not None, "Bug: no other one can be recomputed"
    return Update(f"{module}.weight", "function", (), function=Residual(known, rank, scaling))


def problems(raw: Mapping[str, Any], options: ReadOptions) -> Iterator[str]:
    """Yield what keeps an adapter from being merged because of how it was begun."""
    init, changing = raw.get("init_lora_weights", True), changed(raw)
    if changing is not None:
        yield from _base_problems(changing, raw, options)
    elif not isinstance(init, bool) and init not in HARMLESS and init is not None:
        yield f"init_lora_weights {shown(init)}: unknown, it may have changed the base"
    elif options.base_is_residual or options.recompute_init:
        option = "base-is-residual" if options.base_is_residual else "recompute-init"
        yield f"init_lora_weights {shown(init)}: left the base alone. Leave --{option} out"
    if raw.get("loftq_config") and init != "loftq":
        yield "loftq_config: set, though init_lora_weights is not loftq"


def _base_problems(init: str, raw: Mapping[str, Any], options: ReadOptions) -> Iterator[str]:
    if options.base_is_residual and options.recompute_init:
        yield "--base-is-residual and --recompute-init: the base is one or the other"
    elif options.recompute_init and init not in get_args(Init):
        why = "a randomised SVD" if init.startswith("pissa") else "data that is not in the adapter"
        yield (
            f"init_lora_weights {shown(init)}: what it left of the base depends on {why}, so "
            "--recompute-init cannot compute it. Merge onto the residual base that was saved, with "
            f"--base-is-residual, or {CONVERT}"
        )
    elif options.recompute_init and raw.get("target_parameters"):
        yield "target_parameters: --recompute-init computes it for linear layers only"
    elif not options.base_is_residual and not options.recompute_init:
        meant = next(words for name, words in BASE_CHANGING.items() if init.startswith(name))
        computed = "is the original, pass --recompute-init" if init in get_args(Init) else ""
        yield (
            f"init_lora_weights {shown(init)}: trained on {meant}, not on the original base. "
            "If BASE is that residual model, pass --base-is-residual; "
            f"{f'if it {computed}; ' if computed else ''}or {CONVERT}"
        )
