"""Adapters whose initialisation changed the base, against PEFT's forward after PEFT's own load.

PEFT's load repeats the initialisation on the original base, so its adapted layers compute with
``W_res + s B A``; what they multiply by is asked of their forward (tests/probe.py).
"""

import json
import re

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import dora_export
from dora_export.errors import AdapterError, ArithmeticRefusal, PlanError
from tests import oracle, probe, small
from tests import peft_models as models
from tests.test_peft_variants import assert_right, fresh, is_wrong

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TARGETS = ["wide", "tall", "square", "c_attn", "table"]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.wide, self.tall = nn.Linear(48, 32), nn.Linear(20, 40, bias=False)
        self.square, self.c_attn = nn.Linear(32, 32), Conv1D(48, 32)
        self.table = nn.Embedding(40, 24)


class Linears(nn.Module):
    """Without a Conv1D, which OLoRA gives factors of the wrong shapes."""

    def __init__(self):
        super().__init__()
        self.wide, self.tall = nn.Linear(48, 32), nn.Linear(20, 40, bias=False)
        self.square = nn.Linear(32, 32)


def spread(model):
    """Give weights singular values that float32 tells apart, as those of trained models do.

    Where two are alike, PEFT's own decomposition is off by more than the tolerance: by its rounding
    error times the largest singular value over the difference.
    """
    for parameter in model.parameters():
        if parameter.ndim == 2:
            outputs, sizes, inputs = torch.linalg.svd(parameter.data.double(), full_matrices=False)
            apart = torch.logspace(0.3, -1, len(sizes)).double()
            parameter.data = (outputs * apart @ inputs).to(parameter.dtype)
    return model


def made(folder, init, dtype=torch.float32, **settings):
    """Begin as PEFT does, train a little, save; return the original base, adapter, residual."""
    cls = Linears if init == "olora" else Net
    model = spread(fresh(cls(), dtype))
    models.save_base(folder / "base", model)
    targets = [t for t in TARGETS if hasattr(model, t)]
    config = peft.LoraConfig(
        r=4, lora_alpha=6, init_lora_weights=init, target_modules=targets, **settings
    )
    wrapped = peft.get_peft_model(model, config)
    wrapped.save_pretrained(folder / "begun")
    torch.manual_seed(3)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            parameter.data += torch.randn_like(parameter) * 0.1 * (parameter.std() + 0.1)
        elif "magnitude" in name:
            parameter.data *= torch.empty_like(parameter).uniform_(0.8, 1.2)
    models.save_base(folder / "residual", wrapped.base_model.model)
    wrapped.save_pretrained(folder / "adapter")
    loaded = peft.PeftModel.from_pretrained(
        models.load_base(cls(), folder / "base", dtype), folder / "adapter"
    )
    return wrapped, loaded


def weights(wrapped):
    """Module path -> the weight that PEFT's forward multiplies by, float64."""
    wrapped = wrapped.double().eval()
    return {
        path: probe.weight(module, module.get_base_layer()).numpy()
        for path, module in wrapped.base_model.model.named_modules()
        if hasattr(module, "base_layer")
    }


def assert_nearly_right(got, exact):
    """As ``assert_right``, but for elements of a 16-bit residual that float32 rounds elsewhere.

    PEFT decomposes in float32, and rounds the residual to the base's type: of an element in a
    thousand its error decides which neighbour that is.
    """
    if got.dtype is torch.float32:
        assert_right(got, exact)
        return
    distance = np.abs(oracle.float64(got) - exact) / oracle.ulp(exact, got.dtype)
    assert (distance > 1).mean() <= 4e-3


@pytest.mark.parametrize(("dora", "base"), [(False, "bf16"), (False, "fp32"), (True, "fp16")])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_recomputed_base_gives_what_pefts_forward_computes_after_its_load(
    tmp_path, init, dora, base
):
    _, loaded = made(tmp_path, init, DTYPES[base], use_dora=dora)
    inputs = (tmp_path / "base", tmp_path / "adapter")
    dora_export.merge(*inputs, tmp_path / "out", verify="full", recompute_init=True)
    report = dora_export.verify(*inputs, tmp_path / "out", recompute_init=True)
    assert report.exit_code == 0
    got, stored = (load_file(tmp_path / f / "model.safetensors") for f in ("out", "base"))
    exact = weights(loaded)
    assert exact.keys() == {t for t in TARGETS if f"{t}.weight" in got}
    for path, weight in exact.items():
        assert_nearly_right(got[f"{path}.weight"], weight)
        if dora or path == "table":
            continue
        other = oracle.float64(stored[f"{path}.weight"])  # plain LoRA on the original base
        change = weight - other
        assert is_wrong(got[f"{path}.weight"], other)
        A, B = (load_file(tmp_path / "adapter/adapter_model.safetensors")[
            f"{models.PREFIX}{path}.lora_{x}.weight"] for x in "AB")  # fmt: skip
        product = 1.5 * oracle.float64(B) @ oracle.float64(A)
        onto_original = other + (product.T if path == "c_attn" else product)
        assert is_wrong(got[f"{path}.weight"], onto_original)
        assert np.linalg.norm(change) < np.linalg.norm(product)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_8", "olora"])
def test_residual_base_is_merged_as_plain_lora(tmp_path, init):
    wrapped, _ = made(tmp_path, init, torch.bfloat16)
    inputs = (tmp_path / "residual", tmp_path / "adapter")
    dora_export.merge(*inputs, tmp_path / "out", verify="full", base_is_residual=True)
    got = load_file(tmp_path / "out/model.safetensors")
    for path, weight in weights(wrapped).items():
        assert_right(got[f"{path}.weight"], weight)


@pytest.mark.parametrize("init", ["corda", "lora_ga", "loftq"])
def test_any_residual_base_is_taken_at_the_users_word(tmp_path, init):
    """What made the base has no part in the merge: the tensors and the scaling have."""
    wrapped, _ = made(tmp_path, True)
    small.edit_json(tmp_path / "adapter/adapter_config.json", init_lora_weights=init)
    inputs = (tmp_path / "base", tmp_path / "adapter")
    dora_export.merge(*inputs, tmp_path / "out", base_is_residual=True)
    got = load_file(tmp_path / "out/model.safetensors")
    for path, weight in weights(wrapped).items():
        assert_right(got[f"{path}.weight"], weight)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_adapter_that_peft_converted_merges_onto_the_original_base(tmp_path, init):
    """save_pretrained(path_initial_model_for_weight_conversion): rank doubled, plain LoRA."""
    cls = Linears
    model = spread(fresh(cls(), torch.float32))
    models.save_base(tmp_path / "base", model)
    config = peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights=init,
                             target_modules=["wide", "tall", "square"])  # fmt: skip
    wrapped = peft.get_peft_model(model, config)
    wrapped.peft_config["default"].init_lora_weights = True  # as PEFT's guide to conversion says
    wrapped.save_pretrained(tmp_path / "begun")
    wrapped.peft_config["default"].init_lora_weights = init
    torch.manual_seed(3)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data += torch.randn_like(parameter) * 0.1
    exact = weights(wrapped)
    with pytest.warns(UserWarning, match="changes the base weights"):
        wrapped.float().save_pretrained(
            tmp_path / "adapter", path_initial_model_for_weight_conversion=str(tmp_path / "begun")
        )
    dora_export.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", verify="full")
    got = load_file(tmp_path / "out/model.safetensors")
    for path, weight in exact.items():
        assert_right(got[f"{path}.weight"], weight)


def test_memory_bound_counts_the_decomposition_and_bytes_do_not_depend_on_threads(tmp_path):
    made(tmp_path, "pissa", torch.bfloat16)
    inputs = (tmp_path / "base", tmp_path / "adapter")
    one = dora_export.merge(*inputs, tmp_path / "one", threads=1, recompute_init=True)
    dora_export.merge(*inputs, tmp_path / "four", threads=4, block_bytes=256, recompute_init=True)
    assert (tmp_path / "one/model.safetensors").read_bytes() == (
        tmp_path / "four/model.safetensors"
    ).read_bytes()
    models.edit_config(tmp_path / "adapter", init_lora_weights=True)
    plain = dora_export.merge(*inputs, tmp_path / "plain", threads=1, dry_run=True)
    assert one.memory_bytes > plain.memory_bytes + 8 * 3 * 48 * 32


# Refusals


@pytest.mark.parametrize(
    ("init", "remedies"),
    [
        ("pissa", "--base-is-residual; if it is the original, pass --recompute-init; or convert"),
        ("olora", "--base-is-residual; if it is the original, pass --recompute-init; or convert"),
        ("pissa_niter_4", "--base-is-residual; or convert"),
        ("corda", "--base-is-residual; or convert"),
    ],
)
def test_base_that_was_changed_is_asked_for(tmp_path, init, remedies):
    made(tmp_path, True)
    models.edit_config(tmp_path / "adapter", init_lora_weights=init)
    with pytest.raises(AdapterError, match=re.escape(remedies)):
        dora_export.load_adapter(tmp_path / "adapter")


@pytest.mark.parametrize("init", ["pissa_niter_4", "corda", "lora_ga", "loftq"])
def test_initialisation_that_is_no_function_of_the_base_is_not_recomputed(tmp_path, init):
    made(tmp_path, True)
    models.edit_config(tmp_path / "adapter", init_lora_weights=init)
    with pytest.raises(AdapterError, match=r"--recompute-init cannot compute it.*-is-residual"):
        dora_export.load_adapter(tmp_path / "adapter", recompute_init=True)


@pytest.mark.parametrize("option", ["base_is_residual", "recompute_init"])
def test_option_without_an_initialisation_that_needs_it_is_refused(tmp_path, option):
    made(tmp_path, True)
    name = option.replace("_", "-")
    with pytest.raises(AdapterError, match=f"left the base alone. Leave --{name} out"):
        dora_export.load_adapter(tmp_path / "adapter", **{option: True})


def test_both_options_at_once_are_refused(tmp_path):
    made(tmp_path, "pissa")
    both = {"base_is_residual": True, "recompute_init": True}
    with pytest.raises(AdapterError, match="the base is one or the other"):
        dora_export.load_adapter(tmp_path / "adapter", **both)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_original_and_residual_base_are_told_apart(tmp_path, init):
    made(tmp_path, init)
    adapter, out = tmp_path / "adapter", tmp_path / "out"
    with pytest.raises(PlanError, match=r"looks like the original one.*--recompute-init"):
        dora_export.merge(tmp_path / "base", adapter, out, base_is_residual=True)
    with pytest.raises(PlanError, match=r"too little for the original.*--base-is-residual"):
        dora_export.merge(tmp_path / "residual", adapter, out, recompute_init=True)
    assert not out.exists()


def test_decomposition_that_float32_does_not_determine_is_refused(tmp_path):
    made(tmp_path, "pissa")
    weight = torch.eye(32)  # all singular values alike
    small.edit_tensors(
        tmp_path / "base/model.safetensors", lambda t: {**t, "square.weight": weight}
    )
    with pytest.raises(ArithmeticRefusal, match=r"square.weight: .*undetermined.*base-is-residual"):
        dora_export.merge(
            tmp_path / "base", tmp_path / "adapter", tmp_path / "out", recompute_init=True
        )


def test_command_line_takes_both_options(tmp_path):
    made(tmp_path, "pissa")
    args = [tmp_path / "base", tmp_path / "adapter", "-o", tmp_path / "out"]
    refused = small.run("merge", *args)
    assert refused.exit_code == 2
    assert "--recompute-init" in refused.output
    assert small.run("merge", *args, "--recompute-init").exit_code == 0
    shown = small.run("inspect", tmp_path / "adapter", "--recompute-init")
    assert "pissa; computed from the base" in shown.output


def in_diffusers_layout(folder, name, base):
    """PEFT's folder as a file of diffusers, beside a plain LoRA on another component."""
    config = json.loads((folder / "adapter/adapter_config.json").read_text())
    plain = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q"]}
    said = {f"transformer.{k}": v for k, v in config.items()}
    said |= {f"text_encoder.{k}": v for k, v in plain.items()}
    stored = load_file(folder / "adapter/adapter_model.safetensors")
    tensors = {n.replace("base_model.model.", "transformer."): t for n, t in stored.items()}
    A, B, W = torch.randn(2, 6), torch.randn(8, 2), torch.randn(8, 6)
    tensors |= {"text_encoder.q.lora_A.weight": A, "text_encoder.q.lora_B.weight": B}
    file = folder / f"{name}.safetensors"
    save_file(tensors, file, {"lora_adapter_metadata": json.dumps(said)})
    weights_of = {f"transformer.{n}": t for n, t in load_file(base / "model.safetensors").items()}
    small.write_base(folder / name, weights_of | {"text_encoder.q.weight": W},
                     config={"model_type": "net"})  # fmt: skip
    return folder / name, file, oracle.lora(*map(oracle.float64, (W, A, B)), 1.0)


@pytest.mark.parametrize("option", ["recompute_init", "base_is_residual"])
def test_files_of_diffusers_are_begun_alike(option, tmp_path):
    wrapped, loaded = made(tmp_path, "olora", use_dora=True)
    right = weights(loaded if option == "recompute_init" else wrapped)
    folder = tmp_path / ("base" if option == "recompute_init" else "residual")
    base, file, plain = in_diffusers_layout(tmp_path, option, folder)
    with pytest.raises(AdapterError, match="If BASE is that residual model, pass"):
        dora_export.merge(base, file, tmp_path / "out")
    dora_export.merge(base, file, tmp_path / "out", verify="full", **{option: True})
    got = load_file(tmp_path / "out/model.safetensors")
    for path, exact in right.items():
        assert_right(got[f"transformer.{path}.weight"], exact)
    assert_right(got["text_encoder.q.weight"], plain)
    bare = tmp_path / "bare.safetensors"
    save_file(load_file(file), bare)
    with pytest.raises(AdapterError, match=r"no metadata of an initialisation.* Leave --"):
        dora_export.merge(base, bare, tmp_path / "x", **{option: True})
    if option == "recompute_init":
        for to in ("diffusers", "peft"):
            with pytest.raises(AdapterError, match="the base is made olora's residual"):
                dora_export.convert(file, to, tmp_path / "x", base=base, recompute_init=True)
