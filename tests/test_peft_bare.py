"""PEFT's weight files without their config: what PEFT trained, given alpha."""

import math

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import dora_export
from dora_export import DoraExportError
from tests import oracle
from tests import peft_models as models
from tests.trainers import inspected, merged, refused

ALPHA = 20
DTYPES = [torch.float32, torch.bfloat16]


class Layers(nn.Module):
    """Every kind of layer, square and not."""

    def __init__(self):
        super().__init__()
        self.wide, self.square = nn.Linear(40, 24), nn.Linear(32, 32)
        self.c_attn, self.table = Conv1D(36, 24), nn.Embedding(30, 16)
        self.conv = nn.Conv2d(12, 20, (3, 2))


def bare(folder, dtype=torch.float32, dora=True, **settings):
    """A base, and the weight file of an adapter that PEFT saved, alone; ranks differ."""
    config = peft.LoraConfig(
        r=4, lora_alpha=ALPHA, use_dora=dora, rank_pattern={"square": 6, "conv": 2},
        target_modules=["wide", "square", "c_attn", "table", "conv"], **settings,
    )  # fmt: skip
    with pytest.warns(UserWarning, match="fan_in_fan_out"):
        made = models.make(folder, Layers(), config, dtype)
    (made.adapter / "adapter_config.json").unlink()
    return made


@pytest.mark.parametrize("dora", [True, False], ids=["dora", "lora"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_alone_merge_as_peft_trained_them(dtype, dora, tmp_path):
    made = bare(tmp_path, dtype, dora)
    got = merged(made.base, made.adapter, tmp_path / "out", "--alpha", ALPHA)
    assert {layer.scaling for layer in made.layers} == {ALPHA / 4, ALPHA / 6, ALPHA / 2}
    for layer in made.layers:
        assert oracle.ulps(got[layer.tensor], models.merged_weight(made, layer)) <= 1
        for wrong in (4.0, 0.5):
            other = models.merged_weight(
                made, layer, lambda W, A, B, m, s, w=wrong: oracle.lora(W, A, B, s * w)
                if m is None else oracle.dora(W, A, B, m, s * w))  # fmt: skip
            assert oracle.ulps(got[layer.tensor], other) > 4
    report = dora_export.verify(made.base, made.adapter, tmp_path / "out", alpha=ALPHA)
    assert report.exit_code == 0


def test_alpha_of_rslora_goes_in_times_the_root(tmp_path):
    made = bare(tmp_path, use_rslora=True)
    path = made.adapter / "adapter_model.safetensors"
    keep = {n: t for n, t in load_file(path).items() if ".wide." in n}
    save_file(keep, path)
    got = merged(made.base, path, tmp_path / "out", "--alpha", ALPHA * math.sqrt(4))
    layer = made.layer("wide")
    assert layer.scaling == ALPHA / 2
    assert oracle.ulps(got[layer.tensor], models.merged_weight(made, layer)) <= 1


def test_file_of_any_name_is_known_and_says_what_is_missing(tmp_path):
    made = bare(tmp_path)
    file = (made.adapter / "adapter_model.safetensors").rename(tmp_path / "mine.safetensors")
    assert "Pass" not in refused(made.base, made.adapter, tmp_path / "out")  # nothing left in it
    said = refused(made.base, file, tmp_path / "out")
    assert "no adapter_config.json lies beside it, so alpha is not known" in said
    assert "or pass --alpha: the factor on B A is alpha / rank" in said
    assert "times the root of the rank" in said
    said = inspected(file, "--alpha", ALPHA, "--base", made.base)
    for words in ("PEFT; its adapter_config.json is missing", "out, by the format", "fits",
                  "changed before training"):  # fmt: skip
        assert words in said
    said = refused(made.base, file, tmp_path / "out", "--alpha", ALPHA, "--axis", "in")
    assert "Leave --axis out" in said


def test_what_only_the_config_explains_is_refused(tmp_path):
    made = bare(tmp_path)
    path = made.adapter / "adapter_model.safetensors"
    held = load_file(path)
    key = next(n for n in held if n.endswith("wide.lora_A.weight"))
    for name, reason in (
        (key.replace(".lora_A.weight", ".weight"), "unknown tensor"),
        (key.replace(".lora_A.weight", ".lora_E"), "lora_E belongs to peft_type ADALORA"),
        (key.replace(".lora_A.", ".base_layer.lora_A."), "that adapter_config.json names no"),
    ):
        save_file(held | {name: torch.ones(4, 1)}, path)
        assert reason in refused(made.base, path, tmp_path / "out", "--alpha", ALPHA)
    lacking = {n: t for n, t in held.items() if n != key.replace("lora_A.weight",
               "lora_magnitude_vector")}  # fmt: skip
    save_file(lacking, path)
    said = refused(made.base, path, tmp_path / "out", "--alpha", ALPHA)
    assert "lora_magnitude_vector is missing for 1 of 5 layers" in said


def test_pickled_file_needs_to_be_allowed(tmp_path):
    made = bare(tmp_path)
    models.pickle_weights(made.adapter)
    assert "--allow-pickle" in refused(made.base, made.adapter, tmp_path / "out", "--alpha", "20")
    got = merged(made.base, made.adapter, tmp_path / "out", "--alpha", ALPHA, "--allow-pickle")
    base = load_file(made.base / "model.safetensors")
    assert not torch.equal(got["wide.weight"], base["wide.weight"])


def test_an_embedding_alone_is_known_and_an_a_without_dimensions_refused(tmp_path):
    file, key = tmp_path / "mine.safetensors", "base_model.model.table.lora_"
    A, B = torch.randn(2, 9), torch.randn(5, 2)
    save_file({f"{key}embedding_A": A, f"{key}embedding_B": B}, file)
    (update,) = dora_export.load_adapter(file, alpha=4).updates
    assert (update.target, update.layout, update.scaling) == ("table.weight", "io", 2)
    save_file({f"{key}A.weight": torch.tensor(1.0), f"{key}B.weight": B}, file)
    with pytest.raises(DoraExportError, match=r"lora_A is \(\) and lora_B \(5, 2\)"):
        dora_export.load_adapter(file, alpha=4)


@pytest.mark.parametrize("method", ["LoHa", "LoKr", "AdaLora", "Vera"])
def test_other_methods_without_their_config_are_not_taken_for_another_format(method, tmp_path):
    """LoHa's and LoKr's tensors have LyCORIS' names, and another scaling."""
    settings = {"total_step": 9} if method == "AdaLora" else {}
    config = getattr(peft, f"{method}Config")(target_modules=["a"], **settings)
    model = peft.get_peft_model(nn.ModuleDict({"a": nn.Linear(6, 8)}), config)
    model.save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    for path in (tmp_path, tmp_path / "adapter_model.safetensors"):
        with pytest.raises(DoraExportError, match=r"no known format. Its adapter_config.json is"):
            dora_export.load_adapter(path, alpha=4)
