"""Small models and adapters made by hand: non-square layers, alpha != r, trained values.

Nothing here comes from the package: files are written by the safetensors library, and ``expected``
is the float64 oracle.
"""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from dora_export.cli.main import cli
from tests import oracle

RANK, ALPHA = 3, 5.0
PREFIX = "base_model.model."
# Name -> (out, in); all of them adapted, none of them square.
LINEARS = {
    "model.layers.0.attn.q_proj": (20, 12),
    "model.layers.0.mlp.down_proj": (12, 28),
    "model.layers.1.attn.q_proj": (20, 12),
    "model.layers.1.mlp.down_proj": (12, 28),
}
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 12}


def base_tensors(seed=0, dtype=torch.bfloat16):
    """Weights of a model whose linears are adapted and whose other tensors are not."""
    make = torch.Generator().manual_seed(seed)
    tensors = {
        "model.embed_tokens.weight": torch.randn(40, 12, generator=make).to(dtype),
        "model.norm.weight": torch.rand(12, generator=make).to(dtype),
        "model.rotary.inv_freq": torch.rand(6, generator=make),
        "model.position_ids": torch.arange(9).reshape(1, 9),
    }
    for name, shape in LINEARS.items():
        tensors[f"{name}.weight"] = (torch.randn(shape, generator=make) * 0.1).to(dtype)
    return tensors


def adapter_tensors(base, seed=1, *, dora=True, dtype=torch.float32):
    """A trained adapter: B is not zero, magnitudes are not the norms of W."""
    make = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (out, inputs) in LINEARS.items():
        key = PREFIX + name
        tensors[f"{key}.lora_A.weight"] = torch.randn(RANK, inputs, generator=make) * 0.3
        tensors[f"{key}.lora_B.weight"] = torch.randn(out, RANK, generator=make) * 0.2
        if dora:
            norm = base[f"{name}.weight"].float().norm(dim=1)
            m = norm * (0.6 + 0.8 * torch.rand(out, generator=make))
            tensors[f"{key}.lora_magnitude_vector"] = m
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def adapter_config(**fields):
    """adapter_config.json as PEFT writes it, less the fields that are null."""
    return {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": ALPHA,
        "use_dora": True,
        "use_rslora": False,
        "bias": "none",
        "target_modules": ["q_proj", "down_proj"],
        "base_model_name_or_path": "base",
        **fields,
    }


def write_base(folder, tensors, *, config=CONFIG, metadata=None):
    """A model folder with one weight file."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata or {"format": "pt"})
    write_json(folder / "config.json", config)
    (folder / "tokenizer.json").write_text('{"version": "1.0"}\n')
    return folder


def write_shards(folder, tensors, *, config=CONFIG):
    """A model folder with an index and two shards."""
    folder.mkdir(parents=True, exist_ok=True)
    names = list(tensors)
    parts = (names[: len(names) // 2], names[len(names) // 2 :])
    places = {}
    for i, part in enumerate(parts, 1):
        file = f"model-{i:05}-of-00002.safetensors"
        save_file({n: tensors[n] for n in part}, folder / file, {"format": "pt"})
        places |= dict.fromkeys(part, file)
    size = sum(t.nbytes for t in tensors.values())
    write_json(
        folder / "model.safetensors.index.json",
        {"metadata": {"total_size": size}, "weight_map": places},
    )
    write_json(folder / "config.json", config)
    return folder


def write_adapter(folder, tensors, **fields):
    """A PEFT adapter folder."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    write_json(folder / "adapter_config.json", adapter_config(**fields))
    return folder


def write_pair(folder, *, dtype=torch.bfloat16, dora=True):
    """A base and an adapter that fit each other, as ``folder/base`` and ``folder/adapter``."""
    tensors = base_tensors(dtype=dtype)
    base = write_base(folder / "base", tensors)
    adapter = write_adapter(folder / "adapter", adapter_tensors(tensors, dora=dora), use_dora=dora)
    return base, adapter


def write_json(path, content):
    path.write_text(json.dumps(content, indent=2))


def edit_json(path, **fields):
    """Change fields of a JSON object in a file."""
    write_json(path, json.loads(path.read_text()) | fields)


def edit_tensors(path, change):
    """Rewrite a safetensors file with what ``change`` makes of its tensors, in place or new."""
    tensors = load_file(path)
    save_file(change(tensors) or tensors, path, {"format": "pt"})


def expected(base, adapter, scaling=ALPHA / RANK):
    """The merged linears by the oracle, in float64: name -> array."""
    merged = {}
    for name in LINEARS:
        W = oracle.float64(base[f"{name}.weight"])
        A, B, m = (
            oracle.float64(adapter[f"{PREFIX}{name}.{part}"])
            for part in ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
        )
        merged[f"{name}.weight"] = oracle.dora(W, A, B, m, scaling)
    return merged


def check_merged(folder, base, adapter):
    """Assert that a folder holds the base's tensors with the adapter merged, and nothing else."""
    written = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        written |= load_file(file)
    assert written.keys() == base.keys()
    merged = expected(base, adapter)
    for name, tensor in written.items():
        assert (tensor.dtype, tensor.shape) == (base[name].dtype, base[name].shape)
        if name in merged:
            assert oracle.ulps(tensor, merged[name]) <= 1, name
        else:
            assert torch.equal(tensor, base[name]), name


def run(*args):
    """Run the command line in this process."""
    return CliRunner().invoke(cli, [str(a) for a in args])


def run_process(*args, env=None, **options):
    """Run ``python -m dora_export`` as a user does."""
    command = [sys.executable, "-m", "dora_export", *map(str, args)]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=60, env=env, **options
    )


def entries(folder):
    """Every path below a folder with a digest of what it holds, hidden ones included."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else None
        for path in sorted(Path(folder).rglob("*"))
    }


def bits(tensor):
    """A tensor's bytes."""
    return np.asarray(tensor.contiguous().reshape(-1).view(torch.uint8)).tobytes()
