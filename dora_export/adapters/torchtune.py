"""torchtune's own adapter files: ``adapter_model.pt`` and the like, LoRA and DoRA.

Per layer ``X``: ``X.lora_a.weight`` (r, in), ``X.lora_b.weight`` (out, r) and with DoRA
``X.magnitude`` (out): ``W' = m N / ||N||`` with ``N = W + alpha / r * B A``, a norm per row, no
eps. torchtune scales a layer's bias by ``m / ||N||`` as well (``scaled_bias``), which its own merge
forgets. Names are torchtune's, and in q_proj and k_proj of some models so is
the order of the rows (``row_orders.py``). The rank and alpha stand in an adapter_config.json that
torchtune writes beside the file.

Llama 4 (torchtune after 0.6.1) has names of its own behind ``decoder.``, and LoRA on the stacked
experts of a mixture, without DoRA: ``experts.lora_gate_a`` (experts, in, r) and ``..._b``
(experts, r, out), for gate, up and down: ``N[e] = W[e] + alpha / r * (a[e] b[e]).T``. The shared
expert beside them has plain LoRA even where attention has DoRA.

The export to PEFT that lies beside is read by ``peft``; ``export_order`` says how its rows lie.

Source: github.com/pytorch/torchtune 0.6.1, torchtune/modules/peft/{lora,dora}.py,
torchtune/models/convert_weights.py, torchtune/training/checkpointing/_checkpointer.py; main at
bd2a0fc, torchtune/modules/moe/experts.py (LoRAGroupedExperts), torchtune/models/llama4/
_component_builders.py (lora_llama4_moe) and _convert_weights.py.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dora_export.adapters.config_files import CONFIG, made_by
from dora_export.adapters.model import Adapter, ReadOptions
from dora_export.checkpoints.folder import read_json
from dora_export.errors import AdapterError, listing, shown
from dora_export.storage import PICKLED, read_tensors
from dora_export.storage.json_file import is_number
from dora_export.storage.paths import contained
from dora_export.tensors import Operand, TensorRef
from dora_export.update import RowOrder, Update

PART = re.compile(r"(?P<module>.+)\.(?P<part>lora_a\.weight|lora_b\.weight|magnitude)")
SIGN = re.compile(r"(.+\.)?lora_[ab]\.weight")
EXPERTS = re.compile(r"(?P<module>.+)\.lora_(?P<part>gate|up|down)_(?P<side>[ab])")
LAYER = re.compile(r"layers\.(?P<number>\d+)\.(?P<module>.+)")
# Source: torchtune/models/convert_weights.py, _FROM_HF.
MODULES = {
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj",
    "mlp.w1": "mlp.gate_proj",
    "mlp.w2": "mlp.down_proj",
    "mlp.w3": "mlp.up_proj",
}
# Llama 4's. Source: torchtune/models/llama4/_convert_weights.py, _FROM_HF.
LLAMA4 = "decoder."
LLAMA4_MODULES = {
    **{theirs: ours for theirs, ours in MODULES.items() if theirs.startswith("attn.")},
    **{f"mlp.{between}{w}": f"feed_forward.{between}{ours.removeprefix('mlp.')}"
       for between in ("", "shared_expert.")
       for w, ours in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj"))},
}  # fmt: skip
LLAMA4_EXPERTS = "mlp.experts"
LLAMA4_PROJECTION = {
    "encoders.vision.projection.output.0": "vision_model.vision_adapter.mlp.fc1",
    "encoders.vision.projection.output.2": "vision_model.vision_adapter.mlp.fc2",
    "encoders.vision.projection.output.4": "multi_modal_projector.linear_1",
}
ALWAYS_PLAIN = (".feed_forward.experts.", ".feed_forward.shared_expert.")
# All that torchtune's export to PEFT puts into a config (PEFT itself writes many more), with the
# use_dora that has to be added by hand before PEFT loads it.
EXPORTED = frozenset(
    "r lora_alpha target_modules peft_type base_model_name_or_path use_dora".split()
)
EXPORT_NEEDS = frozenset("r lora_alpha target_modules".split())


def is_export(config: Mapping[str, Any]) -> bool:
    """Return whether a PEFT config is as bare as torchtune's export writes it."""
    return config.keys() <= EXPORTED and config.keys() >= EXPORT_NEEDS


def export_order(folder: Path, config: Mapping[str, Any], options: ReadOptions) -> RowOrder | None:
    """Return the row order of a PEFT adapter: torchtune's export's, perhaps that, or PEFT's (None).

    It is torchtune's for sure where the user says so, or where the file lies beside that only
    torchtune writes; a config as bare as torchtune's alone leaves it open.
    """
    if options.torchtune_dora_fix is not None:
        return "torchtune-peft" if options.torchtune_dora_fix else None
    if not is_export(config):
        return None
    return "torchtune-peft" if (folder / "adapter_model.pt").is_file() else "torchtune-peft?"


def matches(path: Path, options: ReadOptions) -> bool:
    """Return whether ``path`` is a file with torchtune's LoRA tensors, or a folder of one such."""
    file = _file(path)
    if file is None:
        return False
    names = read_tensors(file, allow_pickle=options.allow_pickle)
    return any(SIGN.fullmatch(n) or EXPERTS.fullmatch(n) for n in names)


def read(path: Path, options: ReadOptions) -> Adapter:
    """Read a torchtune adapter.

    Raises:
        InputError: The file is malformed, or pickled without ``allow_pickle``.
        AdapterError: Layers are incomplete or unknown, or alpha is not known.
    """
    file = _file(path)
    if file is None:
        raise AdapterError(f"{path}: holds no adapter_*.pt of torchtune. Name the file itself.")
    if options.axis == "in":
        raise AdapterError(f"{path}: torchtune has one magnitude per output. Leave --axis out.")
    tensors = read_tensors(file, allow_pickle=options.allow_pickle)
    problems: list[str] = []
    layers = _layers(tensors, problems)
    rank = _rank(layers, problems)
    updates = [] if problems else list(_updates(layers, _alpha(file, rank, options)))
    dora = [u for u in updates if u.magnitude is not None]
    able = [u for u in updates if not any(part in u.target for part in ALWAYS_PLAIN)]
    plain = [u for u in able if u.magnitude is None]
    if dora and plain:
        problems.append(
            f"magnitude is missing for {len(plain)} of {len(able)} layers "
            f"(first: {shown(plain[0].target)}); refusing to merge them as plain LoRA"
        )
    if problems:
        raise AdapterError(
            f"{file}: does not add up:{listing(sorted(problems))}\n"
            "Check that the file is a whole adapter of a text model."
        )
    return Adapter(
        path=path,
        format="torchtune",
        files=(file,),
        tensors=tensors,
        updates=tuple(updates),
        folder=file.parent,
        facts={
            "method": "DoRA" if dora else "LoRA",
            "trainer": "torchtune",
            "rank": [rank],
            "alpha": sorted({u.scaling * rank for u in updates}),
            "scaling": sorted({round(u.scaling, 6) for u in updates}),
            "magnitude": "one per output" if dora else "none",
        }
        | ({"axis": "out, by the format: torchtune takes the norm over dim 1"} if dora else {}),
    )


def _file(path: Path) -> Path | None:
    """Return the file that ``path`` stands for; of a folder the only adapter_*.pt in it."""
    if path.is_file():
        return path if path.suffix in (".safetensors", *PICKLED) else None
    if not path.is_dir() or (path / CONFIG).is_file():
        return None  # a folder with a config is PEFT's or MLX's
    found = sorted(path.glob("adapter_*.pt"))
    return contained(found[0], path) if len(found) == 1 else None


def _layers(
    tensors: Mapping[str, TensorRef], problems: list[str]
) -> dict[str, dict[str, TensorRef]]:
    """Return the layers by the target's name in Hugging Face's terms."""
    layers: dict[str, dict[str, TensorRef]] = defaultdict(dict)
    for key, ref in tensors.items():
        place = _place(key)
        if place is None:
            problems.append(
                f"unknown tensor '{shown(key)}'; only adapters of attention, MLP, expert and "
                "output layers of text models and Llama 4 are supported"
            )
        else:
            target, part = place
            layers[target][part] = ref
    return layers


def _place(key: str) -> tuple[str, str] | None:
    """Return the target of a tensor and its part there, or None."""
    if match := PART.fullmatch(key):
        target, part = _target(match["module"]), match["part"]
    elif match := EXPERTS.fullmatch(key):
        target, part = _experts(match["module"], match["part"]), f"lora_{match['side']}.weight"
    else:
        return None
    return None if target is None else (target, part)


def _target(module: str) -> str | None:
    """Return the checkpoint's name of a layer's weight, or None."""
    if module in LLAMA4_PROJECTION:
        return f"{LLAMA4_PROJECTION[module]}.weight"
    llama4 = module.startswith(LLAMA4)
    start, modules = ("language_model.", LLAMA4_MODULES) if llama4 else ("", MODULES)
    module = module.removeprefix(LLAMA4)
    if module == "output":
        return f"{start}lm_head.weight"
    match = LAYER.fullmatch(module)
    if match is None or match["module"] not in modules:
        return None
    return f"{start}model.layers.{match['number']}.{modules[match['module']]}.weight"


def _experts(module: str, part: str) -> str | None:
    """Return the name of all experts' gate, up or down, stacked, or None."""
    match = LAYER.fullmatch(module.removeprefix(LLAMA4)) if module.startswith(LLAMA4) else None
    if match is None or match["module"] != LLAMA4_EXPERTS:
        return None
    return f"language_model.model.layers.{match['number']}.feed_forward.experts.{part}_proj"


def _rank(layers: Mapping[str, Mapping[str, TensorRef]], problems: list[str]) -> int:
    """Return the rank that all layers share, and note what is missing or misshapen."""
    ranks: set[int] = set()
    for target, parts in layers.items():
        missing = [p for p in ("lora_a.weight", "lora_b.weight") if p not in parts]
        if missing:
            problems.append(f"{shown(target)}: {', '.join(missing)} missing")
            continue
        a, b, m = parts["lora_a.weight"], parts["lora_b.weight"], parts.get("magnitude")
        if not target.endswith(".weight"):
            if len(a.shape) != 3 or len(b.shape) != 3 or a.shape[::2] != b.shape[:2]:
                problems.append(
                    f"{shown(target)}: expected lora_a (experts, in, rank) and lora_b (experts, "
                    f"rank, out), got {a.shape} and {b.shape}"
                )
            else:
                ranks.add(a.shape[2])
            continue
        if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
            problems.append(
                f"{shown(target)}: expected lora_a (rank, in) and lora_b (out, rank), got "
                f"{a.shape} and {b.shape}"
            )
            continue
        if m is not None and m.shape != (b.shape[0],):
            problems.append(f"{shown(target)}: magnitude is {m.shape}, expected ({b.shape[0]},)")
        ranks.add(a.shape[0])
    if len(ranks) > 1:
        problems.append(f"ranks {sorted(ranks)}; torchtune gives all layers one rank")
    return max(ranks, default=1)


def _alpha(file: Path, rank: int, options: ReadOptions) -> float:
    """Return alpha, from the config that torchtune writes beside the file, or as given."""
    config = file.parent / CONFIG
    raw = read_json(config) if config.is_file() else {}
    alpha = raw.get("lora_alpha") if raw and made_by(raw) == "peft" else None
    if isinstance(alpha, int | float) and not isinstance(alpha, bool):
        if options.alpha is not None:
            raise AdapterError(f"{config}: lora_alpha is in this file. Leave --alpha out.")
        if raw.get("r") != rank:
            raise AdapterError(
                f"{config}: r is {shown(raw.get('r'))}, the tensors of {file.name} have rank "
                f"{rank}. Put the config of this adapter beside it, or take it away and pass "
                "--alpha."
            )
    else:
        alpha = options.alpha
    if alpha is None:
        raise AdapterError(
            f"{file}: alpha is not in this file, and no {CONFIG} lies beside it. "
            "Pass --alpha with lora_alpha of the training."
        )
    if not is_number(alpha) or alpha == 0:
        raise AdapterError(f"{file}: alpha {shown(alpha)}: expected a finite number other than 0.")
    return float(alpha)


def _updates(layers: Mapping[str, Mapping[str, TensorRef]], alpha: float) -> Iterator[Update]:
    for target, parts in layers.items():
        a, b, m = parts["lora_a.weight"], parts["lora_b.weight"], parts.get("magnitude")
        if not target.endswith(".weight"):
            yield from _of_experts(target, a, b, alpha)
            continue
        llama4 = not target.startswith(("model.", "lm_head."))
        yield Update(
            target=target,
            kind="lora" if m is None else "dora",
            source_keys=tuple(ref.name for ref in (a, b, m) if ref is not None),
            down=Operand.plain(a),
            up=Operand.plain(b),
            scaling=alpha / a.shape[0],
            magnitude=None if m is None else Operand.plain(m),
            layout="oi",
            row_order="torchtune-llama4" if llama4 else "torchtune",
            scales_bias=m is not None,
        )


def _of_experts(target: str, a: TensorRef, b: TensorRef, alpha: float) -> Iterator[Update]:
    count, _, rank = a.shape
    for expert in range(count):
        first, second = (Operand.plain(t.rows(expert, expert + 1).reshaped(*t.shape[1:]))
                         for t in (a, b))  # fmt: skip
        yield Update(
            target=target,
            kind="lora",
            source_keys=(a.name, b.name),
            down=first.T,
            up=second.T,
            scaling=alpha / rank,
            layout="io",  # as Llama 4's checkpoints hold experts, too
            index=expert,
            row_order="torchtune-llama4",
        )
