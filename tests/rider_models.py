"""Tiny random transformers models with trained PEFT adapters, run unmerged as the reference.

PEFT's own merge is no reference: it changes both ends of a tied pair, or adds an update twice.
"""

import json
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

import dora_export

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

# What PEFT and transformers say of settings that these tests choose on purpose.
WARNINGS = (
    "ignore:.*is_gradient_checkpointing.*:FutureWarning",  # PEFT reads a name transformers renamed
    "ignore:Model has `tie_word_embeddings=True`",  # tied ends are the subject here
    "ignore:Setting `save_embedding_layers` to `True`",
    "ignore:fan_in_fan_out is set to False",  # PEFT corrects it for Conv1D, and says so
    "ignore:Could not find a config file",  # models made from a config have no path
    "ignore:Model with `tie_word_embeddings=True`",  # the same, of its merge
    "ignore:.*ensure_weight_tying.*",
    "ignore:Adapter 'default'.*LoRA tensor.*invalid shape",  # of a bias of B, which has one axis
)
VOCABULARY = 97
# Two ways to compute one sum of about a hundred float32 products differ by some 1e-7 of it;
# two layers and a softmax multiply that by less than a hundred.
TOLERANCE = 1e-5
TOKENS = torch.randint(0, VOCABULARY, (2, 11), generator=torch.Generator().manual_seed(5))


@dataclass
class Case:
    """A base and an adapter on disk, and what the two compute together and the base alone."""

    base: Path
    adapter: Path
    tokens: torch.Tensor
    expected: torch.Tensor
    before: torch.Tensor
    model_class: type

    def merged(self, output, **options):
        """The logits of the merged folder as transformers loads it, and the report."""
        report = dora_export.merge(self.base, self.adapter, output, **options)
        return logits(self.model_class.from_pretrained(output), self.tokens), report

    def distance(self, found):
        """Largest difference from the unmerged forward, relative to the largest logit."""
        return float((found - self.expected).abs().max() / self.expected.abs().max())

    def check(self, output, **options):
        """Merge, and hold the result against the unmerged forward and against the base."""
        found, report = self.merged(output, **options)
        assert self.distance(found) < TOLERANCE
        if self.before.shape == self.expected.shape:
            assert self.distance(self.before) > 1000 * TOLERANCE, "the adapter does nothing"
        return report

    def config(self):
        return json.loads((self.base / "config.json").read_text())

    def edit_config(self, **values):
        """Set values of the base's config.json; None takes the key away."""
        edit_json(self.base / "config.json", **values)


def prepare(
    folder,
    model,
    *,
    resize=0,
    tokens=None,
    save=None,
    prefix="",
    seed=0,
    spread=0.5,
    by_path=False,
    after=None,
    **lora,
):
    """Save ``model`` as base, put a trained adapter on it, save that, compute both forwards.

    Args:
        folder: Where "base" and "adapter" are made.
        model: A transformers model.
        resize: Tokens to add to the vocabulary before training.
        tokens: Input; None: tokens of the old vocabulary.
        save: Arguments of PEFT's save_pretrained.
        prefix: Names the two folders apart from others in ``folder``.
        seed: Of the adapter's values.
        spread: Standard deviation of the update relative to what it is added to.
        by_path: Load the base from its folder first, so that PEFT can see the base's config.
        after: Called with the trained PEFT model before anything is computed.
        **lora: LoraConfig's.
    """
    base, adapter = folder / f"{prefix}base", folder / f"{prefix}adapter"
    model = model.eval()
    model.save_pretrained(base)
    tokens = TOKENS if tokens is None else tokens
    if by_path:
        model = type(model).from_pretrained(base).eval()
    before = logits(model, TOKENS if resize else tokens)
    if resize:
        torch.manual_seed(seed + 1)
        model.resize_token_embeddings(VOCABULARY + resize, mean_resizing=False)
        with torch.no_grad():
            model.get_input_embeddings().weight[VOCABULARY:].normal_(0, 0.5)
    wrapped = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 10, **lora})).eval()
    train(wrapped, seed, spread)
    if after is not None:
        after(wrapped)
    expected = logits(wrapped, tokens)
    wrapped.save_pretrained(adapter, **(save or {}))
    return Case(base, adapter, tokens, expected, before, type(model))


def train(wrapped, seed=0, spread=0.5):
    """Give every trainable parameter a value that training could have left there."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if not parameter.requires_grad:
                continue
            noise = torch.randn(parameter.shape, generator=generator)
            if "lora_magnitude_vector" in name:
                parameter.mul_(1 + 0.4 * torch.tanh(noise))
            elif "lora_" in name:
                parameter.copy_(spread * noise * 0.3)
            else:  # a trained copy: near where it was, and clearly not there
                parameter.add_(spread * noise * 0.3)


def logits(model, tokens):
    with torch.no_grad():
        return model.eval()(input_ids=tokens).logits.double()


def llama_config(**options):
    return LlamaConfig(
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "initializer_range": 0.2,  # so that every part has a say in the logits
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            "tie_word_embeddings": False,
            **options,
        }
    )


def llama(seed=0, **options):
    torch.manual_seed(seed)
    return LlamaForCausalLM(llama_config(**options))


def tied_llama(seed=0, **options):
    return llama(seed, tie_word_embeddings=True, **options)


def llama_classifier(seed=0, **options):
    torch.manual_seed(seed)
    return LlamaForSequenceClassification(llama_config(num_labels=3, **options))


def gpt2(seed=0, **options):
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(
        GPT2Config(
            **{
                "vocab_size": VOCABULARY,
                "n_embd": 32,
                "n_layer": 2,
                "n_head": 4,
                "n_inner": 48,
                "n_positions": 32,
                "initializer_range": 0.2,
                "bos_token_id": 1,
                "eos_token_id": 2,
                **options,
            }
        )
    )
    _random_biases(model)
    return model


def bert_classifier(seed=0):
    torch.manual_seed(seed)
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=32,
            num_labels=3,
            initializer_range=0.2,
        )
    )
    _random_biases(model)
    return model


def _random_biases(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.2)


def shapes(path):
    """Names and shapes of the tensors in a safetensors file, or in all of a folder."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    with ExitStack() as stack:
        opened = [stack.enter_context(safe_open(f, "pt")) for f in files]
        return {k: tuple(f.get_slice(k).get_shape()) for f in opened for k in f.keys()}  # noqa: SIM118 - not a dict


def tensors(folder):
    """All tensors of a folder."""
    return {k: v for f in sorted(folder.glob("*.safetensors")) for k, v in load_file(f).items()}


def rewrite(folder, change):
    """Replace a folder's one safetensors file by ``change`` of its tensors."""
    (path,) = folder.glob("*.safetensors")
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def rename(folder, old, new):
    """Rename the tensors of a folder that start with ``old``."""
    rewrite(
        folder,
        lambda held: {new + k[len(old) :] if k.startswith(old) else k: v for k, v in held.items()},
    )


def edit_json(path, **values):
    content = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}, indent=2))
