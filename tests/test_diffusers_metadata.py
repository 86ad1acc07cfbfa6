"""What the metadata of diffusers' files says, and PEFT's LoHa and LoKr, which it alone tells."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import dora_export
from dora_export.adapters import diffusers, diffusers_metadata
from dora_export.adapters.model import ReadOptions
from dora_export.errors import AdapterError
from tests import oracle, small


def entry(**settings):
    """The settings of components, as diffusers writes them."""
    return {"lora_adapter_metadata": json.dumps(
        {name.replace("__", "."): value for name, value in settings.items()})}  # fmt: skip


def test_settings_are_those_of_components_or_of_the_only_one(tmp_path):
    said = entry(unet__r=4, unet__rank_pattern={"a.b": 2}, text_encoder__r=2)
    assert diffusers_metadata.raw_configs(tmp_path, said) == {
        "unet": {"r": 4, "rank_pattern": {"a.b": 2}}, "text_encoder": {"r": 2}}  # fmt: skip
    assert diffusers_metadata.raw_configs(tmp_path, entry(r=4)) == {"": {"r": 4}}
    assert diffusers_metadata.raw_configs(tmp_path, {"other": "{}"}) == {}


@pytest.mark.parametrize("text", ["[1]", "{broken", "3"])
def test_entry_that_is_no_object_is_refused(text, tmp_path):
    with pytest.raises(AdapterError, match=r"[Ss]ave the adapter again"):
        diffusers_metadata.raw_configs(tmp_path / "a", {"lora_adapter_metadata": text})


@pytest.mark.parametrize(
    ("said", "other"),
    [(entry(unet__peft_type="LOHA"), True), (entry(unet__peft_type="LOKR"), True),
     (entry(a__peft_type="LORA", b__peft_type="LOHA"), True),
     (entry(unet__peft_type="LORA"), False), (entry(unet__r=4), False), ({}, False),
     ({"lora_adapter_metadata": "[1]"}, False)],
    ids=str,
)  # fmt: skip
def test_other_methods_are_told_by_the_metadata_alone(said, other, tmp_path):
    save_file({"unet.a.hada_w1_a": torch.ones(4, 2)}, tmp_path / "a.safetensors", said or None)
    assert diffusers_metadata.has_other_method(tmp_path / "a.safetensors") is other
    torch.save({"unet.a.hada_w1_a": torch.ones(4, 2)}, tmp_path / "a.bin")  # which has no metadata
    assert not diffusers_metadata.has_other_method(tmp_path / "a.bin")


@pytest.mark.parametrize(
    ("said", "theirs"),
    [({"global_step": "9", "modelspec.implementation": "diffusers"}, True),
     ({"global_step": "9"}, False), ({"modelspec.implementation": "diffusers"}, False),
     ({"global_step": "9", "modelspec.implementation": "kohya"}, False)],
    ids=str,
)  # fmt: skip
def test_simpletuner_is_told_by_two_entries(said, theirs):
    assert diffusers_metadata.by_simpletuner(said) is theirs


def test_folder_with_a_config_of_pefts_is_pefts(tmp_path):
    tensors = {f"unet.a.lora_{side}.weight": torch.ones(4, 4) for side in "AB"}
    save_file(tensors, tmp_path / "pytorch_lora_weights.safetensors")
    assert diffusers.matches(tmp_path, ReadOptions())
    small.write_json(tmp_path / "adapter_config.json", {"peft_type": "LORA"})
    assert not diffusers.matches(tmp_path, ReadOptions())


# --- LoHa and LoKr

SHAPES = {
    "LOHA": {f"hada_w{i}_{side}": s for i in "12" for side, s in (("a", (6, 2)), ("b", (2, 6)))},
    "LOKR": {"lokr_w1": (2, 2), "lokr_w2_a": (3, 2), "lokr_w2_b": (2, 3)},
}  # fmt: skip


def write(folder, method, metadata, component="unet"):
    """A square layer of a base and what an adapter adds to it unscaled."""
    rng = np.random.default_rng(4)
    W = rng.normal(size=(6, 6)).astype(np.float32)
    held = {n: rng.normal(size=s).astype(np.float32) for n, s in SHAPES[method].items()}
    small.write_base(folder / "base", {f"{component}.mid.to_q.weight": torch.from_numpy(W)},
                     config={"model_type": "net"})  # fmt: skip
    save_file({f"{component}.mid.to_q.{n}": torch.from_numpy(t) for n, t in held.items()},
              folder / "lora.safetensors", metadata)  # fmt: skip
    f = {n: t.astype(np.float64) for n, t in held.items()}
    if method == "LOHA":
        delta = (f["hada_w1_a"] @ f["hada_w1_b"]) * (f["hada_w2_a"] @ f["hada_w2_b"])
    else:
        delta = np.kron(f["lokr_w1"], f["lokr_w2_a"] @ f["lokr_w2_b"])
    return W.astype(np.float64), delta


@pytest.mark.parametrize("method", SHAPES)
def test_scaling_is_alpha_over_rank_of_the_components_own_settings(method, tmp_path):
    """A pattern is held against the path in the component."""
    said = entry(unet__peft_type=method, unet__r=4, unet__alpha=3, unet__peft_version="0.19.0",
                 unet__rank_pattern={"^mid.to_q": 2}, unet__alpha_pattern={"nothing": 7},
                 text_encoder__peft_type="LORA", text_encoder__r=9)  # fmt: skip
    W, delta = write(tmp_path, method, said)
    dora_export.merge(tmp_path / "base", tmp_path / "lora.safetensors", tmp_path / "out")
    got = small.load_file(tmp_path / "out/model.safetensors")["unet.mid.to_q.weight"]
    off = [np.abs(oracle.float64(got) - (W + s * delta)).max() / np.abs(W).max()
           for s in (3 / 2, 3 / 4, 1)]  # fmt: skip
    assert off[0] < 2e-6 < 0.1 < min(off[1:])
    found = dora_export.load_adapter(tmp_path / "lora.safetensors")
    (update,) = found.updates
    assert update.target == "unet.mid.to_q.weight"
    assert (update.layout, found.naming, found.facts["rank"]) == ("oi", "flat", [4])
    assert found.doubts == ("no layer takes its rank or alpha from alpha_pattern 'nothing'",)


def test_settings_that_diffusers_left_out_are_pefts_defaults(tmp_path):
    write(tmp_path, "LOKR", entry(unet__peft_type="LOKR", unet__rank_pattern={"to_q": 2},
                                  unet__peft_version="0.19.0"))  # fmt: skip
    found = dora_export.load_adapter(tmp_path / "lora.safetensors")
    assert (found.updates[0].scaling, found.facts["alpha"]) == (8 / 2, [8])


LOHA = {"unet__peft_type": "LOHA", "unet__r": 2, "unet__alpha": 3}


@pytest.mark.parametrize(
    ("said", "component", "options", "reason"),
    [(LOHA, "unet", {"alpha": 2.0}, r"alpha is in the file\. Leave --alpha out"),
     (LOHA, "prior", {}, r"unknown tensor 'prior\.mid\.to_q"),
     ({**LOHA, "prior__peft_type": "LORA"}, "prior", {}, "but the metadata says LORA"),
     ({**LOHA, "unet__bias": "all"}, "unet", {}, "bias all: trained biases"),
     ({**LOHA, "unet__r": 3}, "unet", {}, "rank 3 by the config, but its factors have 2")],
    ids=str,
)  # fmt: skip
def test_settings_that_do_not_fit_are_refused(said, component, options, reason, tmp_path):
    write(tmp_path, "LOHA", entry(**said), component)
    with pytest.raises(AdapterError, match=reason):
        dora_export.load_adapter(tmp_path / "lora.safetensors", **options)
