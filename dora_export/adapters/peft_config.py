"""PEFT's adapter_config.json: every field applied, checked, or refused by name.

Source: github.com/huggingface/peft 0.21.2, src/peft/tuners/lora/config.py (LoraConfig),
src/peft/config.py (PeftConfigMixin), src/peft/utils/other.py (get_pattern_key).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dora_export.errors import AdapterError, listing, shown

# Fields that say nothing about the merged weights, or are checked against the tensors elsewhere.
NO_EFFECT = frozenset(
    """task_type peft_type auto_mapping peft_version base_model_name_or_path revision inference_mode
    target_modules exclude_modules layers_to_transform layers_pattern lora_dropout runtime_config
    megatron_core eva_config corda_config lora_ga_config velora_config monteclora_config
    qalora_group_size""".split()
)
APPLIED = frozenset(
    """r lora_alpha use_rslora rank_pattern alpha_pattern use_dora bias lora_bias modules_to_save
    trainable_token_indices ensure_weight_tying fan_in_fan_out init_lora_weights
    loftq_config target_parameters lora_B_layout unsloth_fused_expert_lora""".split()
)
REFUSED = {
    "megatron_config": "the layers were split over devices; gather them in Megatron first",
    "alora_invocation_tokens": "the adapter is switched on by tokens, which weights cannot do",
    "arrow_config": "the adapter is routed per token, which weights cannot do",
    "use_qalora": "QA-LoRA groups its inputs; PEFT itself cannot merge it",
    "use_bdlora": "block-diagonal LoRA is not supported",
    "kasa_config": "KaSA truncated the base by SVD before training",
    "layer_replication": "the model has layers that the base has not",
    "enable_lora": "fused layers with LoRA on some parts (PEFT before 0.3) are not supported",
    "invocation_string": "the adapter is switched on by tokens, which weights cannot do",
    "nvfp4_merge_aware": "the adapter belongs to a base quantised to NVFP4",
    "use_adalora": "AdaLoRA has a rank per layer; only peft_type LORA is supported",
}
HARMLESS_INITS = ("gaussian", "eva", "orthogonal", "mica")
BASE_CHANGING_INITS = {
    "pissa": "W - s B0 A0 of its SVD",
    "olora": "W - s B0 A0 of its QR decomposition",
    "corda": "W less a data-dependent product",
    "lora_ga": "W less a gradient-dependent product",
    "loftq": "the quantised and dequantised W",
}
# Source: src/peft/utils/peft_types.py (PeftType).
OTHER_METHODS = frozenset(
    """ADALORA LOHA LOKR GRALORA HIRA MISS BONE OFT BOFT HRA ROAD IA3 C3A SUPERTUNING DEFT GLORA
    DELORA VERA PVERA RANDLORA FOURIERFT WAVEFT VBLORA UNILORA SHIRA OSF PSOFT TINYLORA ADAMSS FROD
    LN_TUNING BEFT TRAINABLE_TOKENS PEANUT LILY XLORA POLY SHADOW CARTRIDGE ADAPTION_PROMPT
    PROMPT_TUNING P_TUNING PREFIX_TUNING MULTITASK_PROMPT_TUNING CPT""".split()
)
HEAD_TASKS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"),
              "QUESTION_ANS": ("qa_outputs",)}  # fmt: skip


@dataclass(frozen=True)
class PeftConfig:
    """The settings that decide the merged weights.

    Attributes:
        r: Rank where no pattern matches.
        alpha: lora_alpha where no pattern matches.
        rank_pattern: Regular expression -> rank, in file order.
        alpha_pattern: Regular expression -> alpha, in file order.
        rslora: Divide alpha by the root of the rank.
        dora: The adapter has magnitudes.
        bias: "none", "all" or "lora_only".
        lora_bias: B has a bias.
        saved_modules: Names of modules stored whole.
        token_indices: Module name (or None: the input embedding) -> replaced rows.
        ensure_weight_tying: Tied ends were trained as one.
        fan_in_fan_out: What the file says of layouts; a hint only, PEFT does not keep it true.
        base_name: Base model by the trainer's name for it.
        target_parameters: Ends of the paths of bare parameters with LoRA.
        target_modules: Ends of the paths of modules with LoRA, a regular expression for whole
            paths, or None.
    """

    r: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    rslora: bool
    dora: bool
    bias: str
    lora_bias: bool
    saved_modules: tuple[str, ...]
    token_indices: Mapping[str | None, tuple[int, ...]]
    ensure_weight_tying: bool
    fan_in_fan_out: bool
    base_name: str | None
    target_parameters: tuple[str, ...] = ()
    target_modules: tuple[str, ...] | str | None = None

    @property
    def all_linear(self) -> bool:
        """Whether every linear layer is targeted, whatever its name."""
        return isinstance(self.target_modules, str) and self.target_modules.lower() == "all-linear"

    def targets_module(self, module: str) -> bool:
        """Return whether the config names a module, by its path, as one with LoRA."""
        if self.target_modules is None or self.all_linear:
            return False
        if isinstance(self.target_modules, str):
            return re.fullmatch(self.target_modules, module) is not None
        return any(f".{module}".endswith(f".{target}") for target in self.target_modules)

    def rank(self, module: str) -> int:
        """Return the rank of a module, by its path in the wrapped model."""
        return self.rank_pattern.get(_pattern_key(self.rank_pattern, module), self.r)

    def module_alpha(self, module: str) -> float:
        """Return lora_alpha of a module."""
        return self.alpha_pattern.get(_pattern_key(self.alpha_pattern, module), self.alpha)

    def scaling(self, module: str) -> float:
        """Return the factor on B A: alpha / rank, or alpha / sqrt(rank) for rslora."""
        rank = self.rank(module)
        return self.module_alpha(module) / (math.sqrt(rank) if self.rslora else rank)


def parse(path: Path, raw: Mapping[str, Any]) -> PeftConfig:
    """Check an adapter_config.json and return what matters of it.

    Args:
        path: The file, for messages.
        raw: Its content.

    Raises:
        AdapterError: Another method than LoRA, a field that changes the weights in a way this tool
            does not reproduce, an unknown field, or a value of the wrong type; all are listed.
    """
    _check_method(path, raw)
    problems = [*_refusals(raw), *_type_problems(raw)]
    if problems:
        raise AdapterError(f"{path}: cannot be merged:{listing(problems)}")
    task_heads = HEAD_TASKS.get(str(raw.get("task_type")), ())
    return PeftConfig(
        r=raw["r"],
        alpha=float(raw["lora_alpha"]),
        rank_pattern=dict(raw.get("rank_pattern") or {}),
        alpha_pattern={k: float(v) for k, v in (raw.get("alpha_pattern") or {}).items()},
        rslora=bool(raw.get("use_rslora")),
        dora=bool(raw.get("use_dora")),
        bias=raw.get("bias") or "none",
        lora_bias=bool(raw.get("lora_bias")),
        saved_modules=(*(raw.get("modules_to_save") or ()), *task_heads),
        token_indices=_token_indices(raw.get("trainable_token_indices")),
        ensure_weight_tying=bool(raw.get("ensure_weight_tying")),
        fan_in_fan_out=bool(raw.get("fan_in_fan_out")),
        base_name=raw.get("base_model_name_or_path") or None,
        target_parameters=tuple(raw.get("target_parameters") or ()),
        target_modules=_target_modules(raw),
    )


def _target_modules(raw: Mapping[str, Any]) -> tuple[str, ...] | str | None:
    targets = raw.get("target_modules")
    return tuple(map(str, targets)) if isinstance(targets, list) else targets and str(targets)


def _check_method(path: Path, raw: Mapping[str, Any]) -> None:
    method = raw.get("peft_type", "LORA" if "r" in raw and "lora_alpha" in raw else None)
    if method == "LORA":
        return
    if isinstance(method, str) and method in OTHER_METHODS:
        raise AdapterError(
            f"{path}: peft_type {method} is not supported; LORA (with or without use_dora) is. "
            "Merge it with PEFT's own merge_and_unload()."
        )
    raise AdapterError(f"{path}: unknown peft_type {shown(method)}. Expected LORA.")


def _refusals(raw: Mapping[str, Any]) -> list[str]:
    problems = [f"{field}: {why}" for field, why in REFUSED.items() if raw.get(field)]
    problems += [
        f"{shown(field)}: unknown field, set to {shown(value, 40)}; it may change the weights. "
        "Set it to null if you know that it does not"
        for field, value in raw.items()
        if value and field not in NO_EFFECT | APPLIED | REFUSED.keys()
    ]
    init = raw.get("init_lora_weights", True)
    base_changed = [n for n in BASE_CHANGING_INITS if isinstance(init, str) and init.startswith(n)]
    if base_changed:
        problems.append(
            f"init_lora_weights {shown(init)}: trained on {BASE_CHANGING_INITS[base_changed[0]]}, "
            "not on the original base. Convert it with PEFT's "
            "save_pretrained(path_initial_model_for_weight_conversion=...)"
        )
    elif not isinstance(init, bool) and init not in HARMLESS_INITS and init is not None:
        problems.append(f"init_lora_weights {shown(init)}: unknown, it may have changed the base")
    if raw.get("loftq_config") and init != "loftq":
        problems.append("loftq_config: set, though init_lora_weights is not loftq")
    if raw.get("lora_bias") and raw.get("use_dora"):
        problems.append("lora_bias with use_dora: PEFT does not define it")
    return problems


def _type_problems(raw: Mapping[str, Any]) -> list[str]:
    problems = []
    problems += _rank_problems("r", raw.get("r"))
    problems += _alpha_problems("lora_alpha", raw.get("lora_alpha"))
    for name, check in (("rank_pattern", _rank_problems), ("alpha_pattern", _alpha_problems)):
        pattern = raw.get(name) or {}
        if not isinstance(pattern, dict):
            problems.append(f"{name}: expected a map, got {shown(pattern)}")
            continue
        for key, value in pattern.items():
            problems += check(f"{name}[{shown(key)}]", value)
            try:
                re.compile(key)
            except re.error as error:
                problems.append(f"{name}: {shown(key)} is not a regular expression: {error}")
    if (raw.get("bias") or "none") not in ("none", "all", "lora_only"):
        problems.append(f"bias: expected none, all or lora_only, got {shown(raw.get('bias'))}")
    saved = raw.get("modules_to_save") or []
    if not isinstance(saved, list) or not all(isinstance(s, str) for s in saved):
        problems.append(f"modules_to_save: expected a list of names, got {shown(saved)}")
    if raw.get("target_parameters"):
        problems += _parameter_problems(raw)
    if not isinstance(raw.get("base_model_name_or_path") or "", str):
        problems.append("base_model_name_or_path: expected a name")
    try:
        _token_indices(raw.get("trainable_token_indices"))
    except (TypeError, ValueError):
        problems.append("trainable_token_indices: expected token ids, or module names with ids")
    return problems


def _parameter_problems(raw: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with the fields that tell parameters from modules."""
    problems = []
    parameters, modules = raw["target_parameters"], raw.get("target_modules")
    if not isinstance(parameters, list) or not all(isinstance(p, str) for p in parameters):
        problems.append(f"target_parameters: expected a list of names, got {shown(parameters)}")
    if isinstance(modules, str):
        try:
            re.compile(modules)
        except re.error as error:
            problems.append(f"target_modules: {shown(modules)} is no regular expression: {error}")
    elif modules is not None and (
        not isinstance(modules, list) or not all(isinstance(m, str) for m in modules)
    ):
        problems.append(f"target_modules: expected names or a pattern, got {shown(modules)}")
    return problems


def _rank_problems(name: str, value: object) -> list[str]:
    if type(value) is int and value > 0:
        return []
    return [f"{name}: expected a positive integer, got {shown(value)}"]


def _alpha_problems(name: str, value: object) -> list[str]:
    if type(value) not in (int, float) or not math.isfinite(value):  # type: ignore[arg-type]
        return [f"{name}: expected a finite number other than 0, got {shown(value)}"]
    if value == 0:
        return [f"{name}: 0, so the adapter would have no effect. Check how it was saved"]
    return []


def _token_indices(value: Any) -> dict[str | None, tuple[int, ...]]:
    if not value:
        return {}
    by_module = value if isinstance(value, dict) else {None: value}
    found = {}
    for module, indices in by_module.items():
        if not isinstance(indices, list) or not all(type(i) is int and i >= 0 for i in indices):
            raise ValueError(indices)
        found[module] = tuple(indices)
    return found


def _pattern_key(patterns: Mapping[str, Any], module: str) -> str:
    """Return the first pattern that matches a module path, else the path itself, as PEFT does."""
    for pattern in patterns:
        if re.match(rf"(.*\.)?({pattern})$", module):
            return pattern
    return module
