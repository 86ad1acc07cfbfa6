"""Makes the seed corpus: ``python -m tests.fuzz.make_corpus``, with the modules of the tests.

One folder per format, with what a user would name in it: ``base``, ``adapter`` or
``adapter.safetensors``; the fixtures of MLX and torchtune are taken as they are.
"""

import shutil
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import external_data_helper, helper, numpy_helper
from safetensors.torch import load_file, save_file

import dora_export
from tests import lycoris_models, small
from tests import test_megatron as megatron
from tests import test_merged_dora as merged_dora
from tests import test_nvlabs as nvlabs
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


def main():
    torch.manual_seed(0)
    for make in (peft, shards, pickled, merged, single_files, lycoris, graph):
        make()
    for path in CORPUS.rglob("README.md"):
        path.unlink()


if __name__ == "__main__":
    main()
