"""config.json of a merged model against the base's: what it says, not how it is written.

Libraries write configs anew: they rename keys, spell defaults out, leave nulls away. That is told;
only what makes the model compute something else, or not load, is wrong.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from dora_export.checkpoints.model import prefix_of
from dora_export.errors import in_line, shown
from dora_export.plan import Plan
from dora_export.storage.json_file import same
from dora_export.tensors import BY_TORCH, DType, TensorRef
from dora_export.tying import EMBEDDINGS, HEADS, WITH_VOCABULARY
from dora_export.verification.model import Finding
from dora_export.verification.rope import ROPE_KEYS, rope_changes
from dora_export.verification.subject import Subject
from dora_export.verification.tensor_ledger import equal

Config = Mapping[str, Any]
# Keys with checks of their own: on every level, and where the language model's config stands.
OWN_CHECK = {"dtype", "torch_dtype", "id2label", "label2id", "num_labels", *ROPE_KEYS}
OF_THE_TEXT = {"vocab_size", "tie_word_embeddings"}
TEXT_PATHS = ("", "text_config.")
# Keys that decide nothing of what a trained model computes from given inputs.
INDIFFERENT = re.compile(
    r"transformers_version|_diffusers_version|_name_or_path|_commit_hash|_attn_implementation(_\w+)?|use_cache"
    r"|attn_implementation|use_flash_attn|_flash_attn_2_enabled|torchscript|return_dict|gradient_\w+"
    r"|use_return_dict|output_(attentions|hidden_states|router_logits|scores|past)"
    r"|keys_to_ignore_at_inference|pretraining_tp|tp_plan|initializer_\w+|init_std"
    r"|embedding_initializer_range|\w*dropout\w*|\w+_pdrop|\w*aux_loss\w*|z_loss_coefficient"
    r"|unsloth_\w+|transformers\.js_config|finetuning_task|problem_type|task_specific_params"
    r"|(bos|eos|pad|sep|cls|mask|unk|decoder_start)_token_id|tokenizer_class|prefix"
    r"|temperature|top_[kp]|typical_p|do_sample|num_(beams|return_sequences|beam_groups)"
    r"|(repetition|length|diversity|encoder_repetition)_penalty|(min|max)_length|max_new_tokens"
    r"|no_repeat_ngram_size|forced_\w+_token_id|early_stopping|is_local|_from_model_config"
)
# Keys that no class sets on its own, and keys that a null switches off.
OFF_WHEN_ABSENT = {"quantization_config", "quantization", "auto_map", "pruned_heads"}
OFF_WHEN_NULL = {"sliding_window", "attn_logit_softcapping", "final_logit_softcapping"}
DERIVED = ("head_dim", "num_key_value_heads")
HEAD_WIDTHS = ("qk_rope_head_dim", "kv_channels", "d_kv")  # other names for a head's width
# One setting under two names. Source: transformers, ``attribute_map`` of the config classes.
ALIASES = (
    {"hidden_size", "d_model", "n_embd", "dim", "embed_dim"},
    {"num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth", "encoder_layers"},
    {"num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"},
    {"num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"},
    {"max_position_embeddings", "n_positions", "n_ctx"},
    {"intermediate_size", "ffn_dim", "d_ff", "n_inner", "hidden_dim"},
    {"hidden_act", "hidden_activation", "activation_function", "activation"},
    {"image_token_id", "image_token_index"},
    {"video_token_id", "video_token_index"},
    {"layer_types", "layers_block_type"},
    {"quantization_config", "quantization"},
)
# Sequence classifiers look for the last token that is not padding.
READS_PADDING = "ForSequenceClassification"


@dataclass
class _Book:
    """What was found in one config, and what was only written in another way."""

    file: str = "config.json"
    findings: list[Finding] = field(default_factory=list)
    rewritten: list[str] = field(default_factory=list)

    def wrong(self, code: str, key: str, what: str) -> None:
        self.findings.append(Finding(code, f"{self.file}: {shown(key)}", what))


@dataclass(frozen=True)
class ConfigLedger:
    """What the comparison gave.

    Attributes:
        findings: In no order.
        rewritten: Values that differ in form, or decide nothing.
        checked: Whether there was a config to check.
    """

    findings: tuple[Finding, ...]
    rewritten: tuple[str, ...] = ()
    checked: bool = True


def check_config(plan: Plan, subject: Subject, *, quantised: bool) -> ConfigLedger:
    """Compare config.json with the base's and with the tensors it describes; of a pipeline all.

    Args:
        plan: What the merged model should be; ``config_edits`` are expected.
        subject: The merged model under the base's names.
        quantised: Whether it is stored packed, so that its config may say so.

    Raises:
        InputError: An embedding or a head cannot be read.
    """
    if not plan.base.components:
        return _check(plan, subject, "config.json", quantised)
    ledgers = [
        _check(_of_plan(plan, part), _of_subject(subject, part), f"{part}/config.json", quantised)
        for part in plan.base.components
    ]
    return ConfigLedger(
        tuple(f for ledger in ledgers for f in ledger.findings),
        tuple(r for ledger in ledgers for r in ledger.rewritten),
        any(ledger.checked for ledger in ledgers),
    )


def _of_plan(plan: Plan, part: str) -> Plan:
    """Return the plan of one model of a pipeline."""
    files = tuple(f for f in plan.files if prefix_of(f.name) == f"{part}.")
    return replace(plan, base=plan.base.component(part), files=files)


def _of_subject(subject: Subject, part: str) -> Subject:
    """Return one model of a merged pipeline, its tensors under their names in the pipeline."""
    model = subject.parts.get(part)
    if model is None:
        return replace(subject, tensors={}, config=None, problems=(), parts={})
    return replace(model, tensors={f"{part}.{n}": t for n, t in model.tensors.items()})


def _check(plan: Plan, subject: Subject, file: str, quantised: bool) -> ConfigLedger:
    if subject.folder is None or not plan.base.config:
        return ConfigLedger((), checked=False)
    if subject.config is None:
        told = any(f.code == "config-missing" for f in subject.problems)
        missing = Finding("config-missing", file, "not there")
        return ConfigLedger(() if told else (missing,), checked=False)
    book, expected, found = _Book(file), _expected(plan), subject.config
    _compare_all(book, expected, found, quantised)
    _vocabulary(book, plan, subject, expected, found)
    _tie(book, plan, subject, expected, found)
    _dtype(book, plan, subject, expected, found)
    if book.rewritten:
        what = f"{len(book.rewritten)} values: {in_line(book.rewritten)}"
        book.findings.append(Finding("config-rewritten", file, what))
    return ConfigLedger(tuple(book.findings), tuple(book.rewritten))


def compare(
    expected: Config, found: Config, *, quantised: bool
) -> tuple[tuple[Finding, ...], tuple[str, ...]]:
    """Return what two configs say differently, and what they only write differently.

    Not what the config says of tensors: vocabulary, tie and dtype.

    Args:
        expected: The base's.
        found: The merged model's.
        quantised: Whether it is stored packed, so that its config may say so.
    """
    book = _Book()
    _compare_all(book, expected, found, quantised)
    return tuple(book.findings), tuple(book.rewritten)


def _expected(plan: Plan) -> dict[str, Any]:
    """Return the base's config with the plan's edits wherever it has those keys, else on top."""
    config = copy.deepcopy(dict(plan.base.config))
    text = config.get("text_config")
    for key, value in plan.config_edits.items():
        if key == "dtype":
            continue  # has a check of its own
        places = [c for c in (config, text) if isinstance(c, dict) and key in c]
        for place in places or [config]:
            place[key] = value
    return config


# --- values


def _compare_all(book: _Book, expected: Config, found: Config, quantised: bool) -> None:
    if ("text_config" in expected) == ("text_config" in found):
        _compare(book, expected, found, "", quantised)
    else:  # transformers 5 moves the language model's values of some families there
        book.rewritten.append("text_config (moved)")
        _compare(book, _flat(expected), _flat(found), "", quantised)


def _compare(book: _Book, expected: Config, found: Config, path: str, quantised: bool) -> None:
    """Compare two objects, and those nested in them that are configs themselves."""
    renamed = _renamed(expected, found)
    reads_padding = any(READS_PADDING in str(a) for a in _list(expected.get("architectures")))
    for key in dict.fromkeys((*expected, *found)):
        here, there = expected.get(key), found.get(key)
        label = f"{path}{key}"
        apart = key in OWN_CHECK or (key in OF_THE_TEXT and path in TEXT_PATHS)
        if apart or key in renamed or same(here, there):
            if here is None and there is None and (key in expected) != (key in found):
                book.rewritten.append(f"{shown(label)} (null)")
            elif key in renamed:
                book.rewritten.append(f"{shown(label)} (renamed)")
        elif isinstance(here, dict) and isinstance(there, dict) and key.endswith("_config"):
            _compare(book, here, there, f"{label}.", quantised)
        elif _decides(key, here, there, expected, quantised) or (
            key == "pad_token_id" and reads_padding and here is not None
        ):
            book.wrong("config-changed", label, _values(here, there))
        else:
            book.rewritten.append(f"{shown(label)} ({_values(here, there)})")
    _rope(book, expected, found, path)
    _labels(book, expected, found, path)


def _decides(key: str, here: Any, there: Any, expected: Config, quantised: bool) -> bool:
    """Return whether a difference makes the model compute something else, or not load."""
    if INDIFFERENT.fullmatch(key):
        return False
    if key == "sliding_window" and expected.get("use_sliding_window") is False:
        return False
    if key in ("quantization_config", "quantization") and here is None:
        return not quantised
    if here is None:
        switched_on = key in OFF_WHEN_ABSENT or (key in OFF_WHEN_NULL and key in expected)
        return (switched_on and bool(there)) or not _as_derived(key, there, expected)
    if there is None:
        # What is off, empty or zero is what a class takes on its own; so is what it derives.
        return bool(here) and not (key in DERIVED and _as_derived(key, here, expected))
    return True


def _as_derived(key: str, value: Any, expected: Config) -> bool:
    """Return whether a value that only one side spells out is the one that classes derive."""
    heads, width = expected.get("num_attention_heads"), expected.get("hidden_size")
    if key not in DERIVED or not (isinstance(heads, int) and isinstance(width, int) and heads):
        return True
    if key == "num_key_value_heads":
        return bool(value == heads)
    return value == width // heads or value in [expected.get(k) for k in HEAD_WIDTHS]


def _renamed(expected: Config, found: Config) -> set[str]:
    """Return keys that one side has under another name, with the same value."""
    keys: set[str] = set()
    for names in ALIASES:
        for one, other in ((expected, found), (found, expected)):
            values = [other[n] for n in names if other.get(n) is not None]
            keys |= {n for n in names if other.get(n) is None and one.get(n) in values}
    return keys


def _rope(book: _Book, expected: Config, found: Config, path: str) -> None:
    if not ROPE_KEYS & (expected.keys() | found.keys()):
        return
    changes = rope_changes(expected, found)
    for change in changes:
        key, _, what = change.partition(": ")
        book.wrong("config-changed", path + key, shown(what))
    spelled = [{k: c[k] for k in ROPE_KEYS if c.get(k) is not None} for c in (expected, found)]
    if not changes and not same(*spelled):
        book.rewritten.append(f"{path}rope_parameters (same meaning)")


def _labels(book: _Book, expected: Config, found: Config, path: str) -> None:
    """Compare how many labels there are, and what they are called."""
    here, there = _label_names(expected), _label_names(found)
    if here is None or there is None:
        if here != there and there is None:
            book.rewritten.append(f"{path}id2label (left out)")
        return
    if len(here) != len(there):
        book.wrong(
            "config-changed", f"{path}id2label", f"{len(there)} labels, expected {len(here)}"
        )
    elif here != there:
        book.rewritten.append(f"{path}id2label (other names)")


def _label_names(config: Config) -> list[str] | None:
    """Return the labels in order, or None; ``num_labels`` stands for names that say nothing."""
    names, count = config.get("id2label"), config.get("num_labels")
    if isinstance(names, dict) and names:
        return [str(names[k]) for k in sorted(names, key=lambda k: (len(str(k)), str(k)))]
    return [f"LABEL_{i}" for i in range(count)] if isinstance(count, int) else None


# --- what the config says of tensors


def _vocabulary(book: _Book, plan: Plan, subject: Subject, expected: Config, found: Config) -> None:
    """Hold vocab_size against the rows of embedding and head.

    An embedding padded beyond the vocabulary is usual: then both must be what they should be.
    """
    should, is_now = _value(expected, "vocab_size"), _value(found, "vocab_size")
    rows = {}
    for step in plan.steps:
        stored = subject.tensors.get(step.name)
        if _leaf(step.name) in (*EMBEDDINGS, *HEADS) and len(step.shape) == 2 and stored:
            rows[step.name] = (step.shape[0], stored.shape[0] if stored.shape else 0)
    for name, (planned, stored_rows) in rows.items():
        if is_now is None or stored_rows == is_now:
            continue
        if stored_rows != planned or not same(is_now, should):
            book.wrong("config-vocab", "vocab_size",
                       f"{shown(is_now)}, {shown(name)} has {stored_rows} rows")  # fmt: skip
            return
    if should is not None and is_now is None:
        book.wrong("config-vocab", "vocab_size", f"missing, expected {shown(should)}")
    elif not rows and not same(should, is_now):
        book.wrong("config-changed", "vocab_size", _values(should, is_now))


def _tie(book: _Book, plan: Plan, subject: Subject, expected: Config, found: Config) -> None:
    """Hold tie_word_embeddings against the tensors.

    Where both leave the key to the model's class, or both say the same of the same tensors, the
    base's own state is kept, whatever it is.
    """
    if subject.broken:
        return  # an end may be in a file that cannot be read; that is told
    should, is_now = (_value(c, "tie_word_embeddings") for c in (expected, found))
    ends = _ends(subject.tensors)
    planned = _ends({s.name: s for s in plan.steps})
    stored = ends is not None and ends[1] is not None
    equal = stored and _equal(subject.tensors, ends)
    meant_apart = planned is not None and planned[1] is not None
    if same(should, is_now) and stored == meant_apart:
        return  # as planned; what the tensors hold is compared tensor by tensor
    has_head = any(str(a).endswith(WITH_VOCABULARY) for a in _list(expected.get("architectures")))
    key = "tie_word_embeddings"
    if stored and not equal and is_now is not False and (should is False or is_now is True):
        said = "true" if is_now else "missing"
        book.wrong("config-tied", key, f"{said}, but {shown(ends[1] if ends else '')} differs from "
                   "the embedding: loaders overwrite it")  # fmt: skip
    elif is_now is False and not stored and (meant_apart or (should is not False and has_head)):
        book.wrong("config-tied", key, "false, but no head is stored")
    elif not same(should, is_now):
        book.rewritten.append(f"{key} ({_values(should, is_now)})")


def _ends(tensors: Mapping[str, Any]) -> tuple[str, str | None] | None:
    """Return the names of the embedding and of the stored head, None if there is no one pair."""
    embeddings = [n for n in tensors if _leaf(n) in EMBEDDINGS and n.endswith(".weight")]
    heads = [n for n in tensors if _leaf(n) in HEADS and n.endswith(".weight")]
    if len(embeddings) != 1 or len(heads) > 1:
        return None
    return embeddings[0], heads[0] if heads else None


def _equal(tensors: Mapping[str, TensorRef], ends: tuple[str, str | None] | None) -> bool:
    if ends is None or ends[1] is None:
        return False
    return equal(tensors[ends[0]], tensors[ends[1]])


def _dtype(book: _Book, plan: Plan, subject: Subject, expected: Config, found: Config) -> None:
    """Hold the type that the config names against the one that most bytes are stored in.

    A base whose config names another type than its tensors' is common; then the merged model may
    say and store the same.
    """
    word, base_word = _dtype_word(found), _dtype_word(expected)
    stored = _main_dtype(subject.tensors)
    planned = plan.settings.dtype or _main_dtype(plan.base.tensors)
    if word is not None and stored is not None and word != stored.torch:
        as_in_base = word == base_word and stored is planned and plan.settings.dtype is None
        if not as_in_base:
            book.wrong(
                "config-dtype", "dtype", f"{shown(word)}, but the tensors are {stored.torch}"
            )
            return
    keys = [k for k in ("dtype", "torch_dtype") if expected.get(k) is not None]
    now = [k for k in ("dtype", "torch_dtype") if found.get(k) is not None]
    if keys != now:
        book.rewritten.append(f"{' and '.join(now) or 'no dtype'} (for "
                              f"{' and '.join(keys) or 'none'})")  # fmt: skip


def _dtype_word(config: Config) -> str | None:
    word = _value(config, "dtype") or _value(config, "torch_dtype")
    word = word.removeprefix("torch.") if isinstance(word, str) else None
    return word if word in BY_TORCH else None  # "auto" names none


def _main_dtype(tensors: Mapping[str, TensorRef]) -> DType | None:
    nbytes: dict[DType, int] = {}
    for ref in tensors.values():
        if ref.dtype.mergeable:
            nbytes[ref.dtype] = nbytes.get(ref.dtype, 0) + ref.nbytes
    return max(nbytes, key=lambda d: nbytes[d], default=None)


# --- words


def _flat(config: Config) -> Config:
    text = config.get("text_config")
    inner = text if isinstance(text, dict) else {}
    return {**inner, **{k: v for k, v in config.items() if k != "text_config"}}


def _value(config: Config, key: str) -> Any:
    """Return a value of the top level, else of ``text_config``."""
    text = config.get("text_config")
    inner = text.get(key) if isinstance(text, dict) else None
    top = config.get(key)
    return inner if top is None else top


def _values(here: Any, there: Any) -> str:
    if there is None:
        return f"missing, expected {shown(here, 60)}"
    return f"{shown(there, 60)}, expected {'none' if here is None else shown(here, 60)}"


def _list(value: Any) -> Iterator[Any]:
    yield from value if isinstance(value, list) else ()


def _leaf(name: str) -> str:
    return name.rpartition(".")[0].rpartition(".")[2]
