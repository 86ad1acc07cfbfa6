"""PEFT's adapter_config.json: every field applied, checked, or refused by name.

Source: github.com/huggingface/peft 0.21.2, src/peft/tuners/lora/config.py (LoraConfig),
src/peft/config.py (PeftConfigMixin), src/peft/utils/other.py (get_pattern_key).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dora_export.adapters import peft_init, peft_patterns, peft_variants
from dora_export.adapters.model import ReadOptions
from dora_export.adapters.peft_variants import Blocks
from dora_export.errors import AdapterError, listing, shown
from dora_export.storage.json_file import is_number, is_rank

# Fields that say nothing about the merged weights, or are checked against the tensors elsewhere.
NO_EFFECT = frozenset(
    """task_type peft_type auto_mapping peft_version base_model_name_or_path revision inference_mode
    target_modules exclude_modules layers_to_transform layers_pattern lora_dropout runtime_config
    megatron_core eva_config corda_config lora_ga_config velora_config monteclora_config""".split()
)
# Of AdaLoRA's training alone. Source: src/peft/tuners/adalora/config.py (AdaLoraConfig).
ADALORA_TRAINING = frozenset(
    "target_r tinit tfinal deltaT beta1 beta2 orth_reg_weight total_step".split()
)
APPLIED = frozenset(
    """r lora_alpha use_rslora rank_pattern alpha_pattern use_dora bias lora_bias modules_to_save
    trainable_token_indices ensure_weight_tying fan_in_fan_out init_lora_weights loftq_config
    layer_replication use_bdlora use_qalora qalora_group_size
    target_parameters lora_B_layout unsloth_fused_expert_lora""".split()
)
REFUSED = {
    "megatron_config": "the layers were split over devices; gather them in Megatron first",
    "alora_invocation_tokens": "the adapter is switched on by tokens, which weights cannot do",
    "arrow_config": "the adapter is routed per token, which weights cannot do",
    "kasa_config": "KaSA truncated the base by SVD before training",
    "enable_lora": "fused layers with LoRA on some parts (PEFT before 0.3) are not supported",
    "invocation_string": "the adapter is switched on by tokens, which weights cannot do",
    "nvfp4_merge_aware": "the adapter belongs to a base quantised to NVFP4",
    "use_adalora": "not a setting of PEFT's; its AdaLoRA says peft_type ADALORA",
}
READ_AS_IT_IS = ReadOptions()
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
        masks: AdaLoRA: module path -> ranks kept, of its ``r``; None: another method.
        block_diagonal: BD-LoRA's blocks, or None.
        group_size: QA-LoRA: inputs that A sees the mean of; None: another method.
        layer_replication: Ranges ``[start, stop)`` of the base's layers that make up the model's.
        changed_base: Initialisation that changed the base before training, or None.
        recomputed: What it left of the base is computed, instead of given as the base.
        ranks: Module path -> rank, once ``for_modules`` has held the patterns against the modules.
        alphas: Module path -> alpha, likewise.
        idle_patterns: Patterns that give no module its rank or alpha, for people.
        rules: By which of PEFT's rules the patterns may have been held against the modules.
        doubts: Where such a rule is not that of PEFT now, for people.
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

    masks: Mapping[str, int] | None = None
    block_diagonal: Blocks | None = None
    group_size: int | None = None
    layer_replication: tuple[tuple[int, int], ...] = ()
    changed_base: str | None = None
    recomputed: bool = False
    ranks: Mapping[str, int] | None = None
    alphas: Mapping[str, float] | None = None
    idle_patterns: tuple[str, ...] = ()
    rules: tuple[str, ...] = peft_patterns.RULES[:1]
    doubts: tuple[str, ...] = ()

    def for_modules(self, path: Path, modules: Collection[str]) -> PeftConfig:
        """Return the config with the rank and alpha of each of these modules.

        Args:
            path: The file, for messages.
            modules: Their paths in the wrapped model.

        Raises:
            AdapterError: A pattern is no regular expression, or takes too much time; or versions of
                PEFT would take it differently, and the file does not say which wrote it.
        """
        found = peft_patterns.held_against(
            path, self.rank_pattern, self.alpha_pattern, modules, self.rules, (self.r, self.alpha)
        )
        return replace(
            self,
            idle_patterns=found.idle,
            doubts=found.doubts,
            # PEFT looks the module itself up where no pattern matches it.
            ranks={m: self.rank_pattern.get(found.ranks.get(m, m), self.r) for m in modules},
            alphas={m: self.alpha_pattern.get(found.alphas.get(m, m), self.alpha) for m in modules},
        )

    @property
    def all_linear(self) -> bool:
        """Whether every linear layer is targeted, whatever its name."""
        return isinstance(self.target_modules, str) and self.target_modules.lower() == "all-linear"

    @property
    def method(self) -> str:
        """Name of the method, for people."""
        if self.masks is not None:
            return "AdaLoRA"
        plain = "DoRA" if self.dora else "LoRA"
        if self.block_diagonal is not None:
            return f"{plain} in {self.block_diagonal.count} diagonal blocks"
        return f"QA-LoRA, groups of {self.group_size} inputs" if self.group_size else plain

    def blocks(self, module: str) -> tuple[int, int]:
        """Return the diagonal blocks of A and of B of a module; 1 where a factor is whole."""
        blocks = self.block_diagonal
        if blocks is None:
            return 1, 1
        if any(part in module for part in blocks.in_a):
            return blocks.count, 1
        return 1, blocks.count if any(part in module for part in blocks.in_b) else 1

    def rank(self, module: str) -> int:
        """Return the rank of a module, by its path in the wrapped model."""
        if self.masks is not None:
            return self.masks.get(module, self.r)
        assert self.ranks is not None, "Bug: for_modules() comes first"
        return self.ranks[module]

    def module_alpha(self, module: str) -> float:
        """Return lora_alpha of a module."""
        if self.masks is not None:
            return self.alpha
        assert self.alphas is not None, "Bug: for_modules() comes first"
        return self.alphas[module]

    def scaling(self, module: str) -> float:
        """Return the factor on B A: alpha / rank, or alpha / sqrt(rank) for rslora.

        AdaLoRA divides by the rank it began with, whatever it has pruned since, and by 1e-5 more.
        """
        if self.masks is not None:
            return self.alpha / (self.r + 1e-5)
        rank = self.rank(module)
        return self.module_alpha(module) / (math.sqrt(rank) if self.rslora else rank)


def parse(path: Path, raw: Mapping[str, Any], options: ReadOptions = READ_AS_IT_IS) -> PeftConfig:
    """Check an adapter_config.json and return what matters of it.

    Args:
        path: The file, for messages.
        raw: Its content.
        options: What the user says of the base, where the initialisation changed it.

    Raises:
        AdapterError: Another method than LoRA, a field that changes the weights in a way this tool
            does not reproduce, an unknown field, or a value of the wrong type; all are listed.
    """
    adalora = _method(path, raw) == "ADALORA"
    if adalora:  # rank and patterns have other meanings there, and "r" has none
        masks, started_with = raw.get("rank_pattern") or {}, raw.get("init_r", 12)
        raw = {k: v for k, v in raw.items() if k not in {"init_r", *ADALORA_TRAINING}}
        raw |= {"r": started_with, "rank_pattern": None, "alpha_pattern": None}
        raw |= {"init_lora_weights": bool(raw.get("init_lora_weights", True))}
    problems = [
        *_refusals(raw),
        *peft_init.problems(raw, options),
        *_type_problems(raw),
        *peft_variants.problems(raw),
    ]
    problems += peft_variants.adalora_problems(masks, raw.get("lora_alpha")) if adalora else []
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
        masks=peft_variants.kept_ranks(masks) if adalora else None,
        block_diagonal=peft_variants.blocks(raw),
        group_size=raw.get("qalora_group_size", 16) if raw.get("use_qalora") else None,
        layer_replication=peft_variants.ranges(raw),
        changed_base=peft_init.changed(raw),
        recomputed=options.recompute_init,
        rules=peft_patterns.rules_of(raw),
    )


def _target_modules(raw: Mapping[str, Any]) -> tuple[str, ...] | str | None:
    targets = raw.get("target_modules")
    return tuple(map(str, targets)) if isinstance(targets, list) else targets and str(targets)


def _method(path: Path, raw: Mapping[str, Any]) -> str:
    method = raw.get("peft_type", "LORA" if "r" in raw and "lora_alpha" in raw else None)
    if method in ("LORA", "ADALORA"):
        return str(method)
    raise AdapterError(f"{path}: unknown peft_type {shown(method)}. Expected LORA.")


def _refusals(raw: Mapping[str, Any]) -> list[str]:
    problems = [f"{field}: {why}" for field, why in REFUSED.items() if raw.get(field)]
    problems += [
        f"{shown(field)}: unknown field, set to {shown(value, 40)}; it may change the weights. "
        "Set it to null if you know that it does not"
        for field, value in raw.items()
        if value and field not in NO_EFFECT | APPLIED | REFUSED.keys()
    ]
    together = [f for f in ("use_dora", "use_bdlora", "use_qalora") if raw.get(f)]
    if len(together) > 1:
        problems.append(f"{' with '.join(together)}: PEFT does not define it")
    if raw.get("lora_bias") and (raw.get("use_dora") or raw.get("use_qalora")):
        problems.append("lora_bias with use_dora or use_qalora: PEFT does not define it")
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
    if not (modules is None or isinstance(modules, str)) and (
        not isinstance(modules, list) or not all(isinstance(m, str) for m in modules)
    ):
        problems.append(f"target_modules: expected names or a pattern, got {shown(modules)}")
    return problems


def _rank_problems(name: str, value: object) -> list[str]:
    if is_rank(value):
        return []
    return [f"{name}: expected a positive integer, got {shown(value)}"]


def _alpha_problems(name: str, value: object) -> list[str]:
    if not is_number(value):
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
