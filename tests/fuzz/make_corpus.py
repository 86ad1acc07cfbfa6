"""Makes the seed corpus: ``python -m tests.fuzz.make_corpus``, with the modules of the tests.

One folder per format, with what a user would name in it: ``base``, ``adapter`` or
``adapter.safetensors``; the fixtures of MLX and torchtune are taken as they are.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import external_data_helper, helper, numpy_helper
from safetensors.torch import load_file, save_file

import dora_export
from tests import lycoris_models, moe_models, pipelines, small, test_aitoolkit, test_peft_methods
from tests import rider_models as riders
from tests import test_lycoris_files as lycoris_files
from tests import test_megatron as megatron
from tests import test_merged_dora as merged_dora
from tests import test_nvlabs as nvlabs
from tests import test_onnx_into as onnx_into
from tests import test_peft_variants as variants_of_lora
from tests import test_small_trainers as trainers

CORPUS = Path(__file__).parent / "corpus"
FIXTURES = Path(__file__).parents[1] / "fixtures"


def fresh(name):
    folder = CORPUS / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def peft():
    folder = small.write_pair(fresh("peft"))
    small.edit_json(
        CORPUS / "peft/adapter/adapter_config.json", use_rslora=True, target_modules=["q_proj"],
        rank_pattern={"q_proj": small.RANK, "model.layers.0.mlp": 3}, modules_to_save=["norm"],
        alpha_pattern={"^model.layers.1.attn.q_proj": 9}, base_model_name_or_path="org/base",
    )  # fmt: skip
    return folder


def shards():
    folder = fresh("shards")
    small.write_pair(folder)
    (folder / "base/model.safetensors").unlink()
    small.write_shards(folder / "base", small.base_tensors())


def pickled():
    folder = fresh("pickled")
    small.write_pair(folder)
    for place in ("base/model", "adapter/adapter_model"):
        state = load_file(folder / f"{place}.safetensors")
        (folder / f"{place}.safetensors").unlink()
        torch.save(state, folder / f"{place.replace('base/', 'base/pytorch_')}.bin")
    torch.save(state, folder / "adapter/adapter_model.bin", _use_new_zipfile_serialization=False)


def merged():
    folder = fresh("merged")
    small.write_pair(folder)
    dora_export.merge(folder / "base", folder / "adapter", folder / "merged")
    (folder / "base/tokenizer.json").write_text(
        '{"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": [["a", "b"]]}, '
        '"added_tokens": [{"id": 2, "content": "<s>"}]}'
    )
    (folder / "base/tokenizer_config.json").write_text('{"bos_token": {"content": "<s>"}}')
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (folder / "base" / name).read_text()
        (folder / "merged" / name).write_text(text.replace(" ", "  "))


def single_files():
    megatron.write(fresh("megatron"))
    nvlabs.write(fresh("nvlabs"))
    trainers.write_qdora(fresh("qdora"))
    folder = fresh("catid")
    save_file(trainers.model().state_dict(), folder / "adapter.safetensors")
    folder = fresh("linear-with-dora-merged")
    state = merged_dora.with_dora(merged_dora.plain()).state_dict()
    merged_dora.save(state, folder / "adapter.safetensors")


def lycoris():
    for case in ("loha", "lokr", "locon"):
        found = next((c for c in lycoris_models.CASES if c.startswith(case)), None)
        if found is None:
            continue
        model = lycoris_models.net()
        modules = lycoris_models.attach(model, found, "out")
        lycoris_models.write(fresh(f"lycoris-{case}"), model, lycoris_models.state(modules))


def graph():
    """One initializer in the graph, one beside it, one as a list of numbers, one in a Constant."""
    folder = fresh("graph")
    make = np.random.default_rng(0)
    held = [helper.make_tensor("list", 1, [2, 2], [1.0, 2.0, 3.0, 4.0])]
    held += [numpy_helper.from_array(make.random((6, 6), np.float32), n) for n in ("in", "out")]
    constant = helper.make_node("Constant", [], ["c"], value=held[1])
    nodes = [constant, helper.make_node("MatMul", ["x", "in"], ["y"]),
             helper.make_node("MatMul", ["y", "out"], ["z"])]  # fmt: skip
    values = [helper.make_tensor_value_info(n, 1, [None, 6]) for n in ("x", "z")]
    model = helper.make_model(helper.make_graph(nodes, "g", values[:1], values[1:], held))
    external_data_helper.set_external_data(held[2], "model.onnx.data")
    model.graph.initializer[2].CopyFrom(held[2])
    onnx.save(model, folder / "model.onnx", save_as_external_data=True, size_threshold=100,
              location="model.onnx.data")  # fmt: skip


def image_models():
    """A pipeline with each kind of adapter on it, and a single file with the kind it is given."""
    folder = fresh("pipeline")
    base, _ = pipelines.write_pair(folder)
    pipelines.write_shards(base, "vae")
    folder = fresh("diffusers")
    pipelines.write(folder / "base", variant="fp16")
    own = pipelines.adapter(pipelines.tensors()["unet"])
    own = {name.replace(small.PREFIX, "unet."): tensor for name, tensor in own.items()}
    (folder / "adapter").mkdir()
    said = {"unet.r": small.RANK, "unet.lora_alpha": small.ALPHA, "unet.use_dora": True}
    save_file(own, folder / "adapter/pytorch_lora_weights.safetensors",
              {"format": "pt", "lora_adapter_metadata": json.dumps(said)})  # fmt: skip
    folder = fresh("ai-toolkit")
    pipelines.write(folder / "base")
    save_file(test_aitoolkit.adapter(), folder / "adapter.safetensors")
    single_image_file(fresh("single-file"))


def single_image_file(folder):
    """Names as in Stable Diffusion's first code, and an adapter under diffusers' names."""
    random = torch.Generator().manual_seed(0)
    blocks, made = "transformer_blocks.0.attn1", {}
    model = {
        "model.diffusion_model.input_blocks.0.0.weight": (8, 4, 3, 3),
        "model.diffusion_model.input_blocks.1.0.in_layers.2.weight": (8, 8, 3, 3),
        f"model.diffusion_model.input_blocks.1.1.{blocks}.to_q.weight": (8, 8),
        f"model.diffusion_model.input_blocks.1.1.{blocks}.to_k.weight": (8, 12),
        "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight": (20, 12),
        "first_stage_model.encoder.conv_in.weight": (4, 3, 3, 3),
    }
    model = {n: torch.randn(shape, generator=random).half() for n, shape in model.items()}
    save_file(model, folder / "base.safetensors", {"format": "pt"})
    layers = {"down_blocks_0_resnets_0_conv1": (8, 8, 3, 3)}
    layers |= {
        f"down_blocks_0_attentions_0_{blocks.replace('.', '_')}_{n}": (8, k)
        for n, k in (("to_q", 8), ("to_k", 12))
    }
    for name, (out, *inner) in layers.items():
        key, ones = f"lora_unet_{name}", [1] * (len(inner) - 1)
        made[f"{key}.lora_down.weight"] = torch.randn(2, *inner, generator=random)
        made[f"{key}.lora_up.weight"] = torch.randn(out, 2, *ones, generator=random)
        made[f"{key}.alpha"] = torch.tensor(3.0)
        made[f"{key}.dora_scale"] = torch.rand(out, 1, *ones, generator=random) + 0.5
    save_file(made, folder / "adapter.safetensors", {"ss_network_module": "lycoris.kohya"})


def several():
    folder = fresh("several")
    small.write_pair(folder)
    base = small.base_tensors()
    second = small.adapter_tensors(base, seed=2, dora=False)
    small.write_adapter(folder / "adapter2", second, use_dora=False)


def methods():
    """What only PEFT's own layers compute, and LoRA on the parameters of experts."""
    for name in ("IA3", "OFT exact", "LOKR both"):
        folder = fresh(f"method-{name.split()[0].lower()}")
        test_peft_methods.made(folder, name)
    moe_models.prepare(fresh("experts"), "mixtral")


def variants():
    """What rides along in PEFT's folders, its variants of LoRA, and files of other trainers."""
    riders.prepare(
        fresh("riders-tokens"), riders.llama(), target_modules=["q_proj"], use_dora=True,
        trainable_token_indices=[1, 50, 7], modules_to_save=["norm"],
    )  # fmt: skip
    riders.prepare(
        fresh("riders-head"), riders.bert_classifier(), target_modules=["query"], bias="all",
        task_type="SEQ_CLS",
    )  # fmt: skip
    variants_of_lora.made_replicated(fresh("replicated"), torch.bfloat16, dora=True)
    variants_of_lora.made_adalora(fresh("adalora"), torch.bfloat16)
    folder = fresh("bdlora")
    variants_of_lora.save(folder, variants_of_lora.made_bdlora(folder, torch.bfloat16))
    base, made = lycoris_files.layers("in")
    said = {"peft_type": "LORA", "lora_decompose": True, "lora_decompose_norm_epsilon": True}
    metadata = {"ot_branch": "master", "ot_revision": "abc", "ot_config": json.dumps(said)}
    named = lycoris_files.named(made, "lora_transformer_")
    lycoris_files.write(fresh("onetrainer"), base, named, metadata, "transformer.")
    for path in CORPUS.rglob("training_args.bin"):
        path.unlink()


def graphs():
    """A graph of the base for ``--into`` and ``--adapters``: weights turned, some beside it."""
    folder = fresh("graphs")
    small.write_pair(folder, dtype=torch.float32)
    stored = onnx_into.transposed(small.base_tensors(dtype=torch.float32))
    onnx_into.save_graph(folder / "graph/model.onnx", stored, data="weights.bin")


def main():
    torch.manual_seed(0)
    for make in (peft, shards, pickled, merged, single_files, lycoris, graph, image_models, several,
                 methods, variants, graphs):  # fmt: skip
        make()
    for path in CORPUS.rglob("README.md"):
        path.unlink()


if __name__ == "__main__":
    main()
