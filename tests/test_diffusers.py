"""diffusers' LoRA files against diffusers itself: the unmerged pipeline's own forward."""

import json
import re

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import dora_export
from tests import oracle, pipelines, small
from tests.trainers import RELATIVE, distance, inspected, merged, refused

dm = pytest.importorskip("tests.diffusion_models", reason="diffusers is not installed")
SCALING = dm.ALPHA / dm.RANK
CLOSE = 1e-6  # of the largest output; the merge rounds once to float32


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return dm.Pair(tmp_path_factory.mktemp("diffusers"))


def terms(pair, component, module):
    """W, A, B, m of a layer in float64, W and A as matrices."""
    base = pair.stored[component]
    parts = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
    found = [pair.tensors[f"{component}.{module}.{part}"] for part in parts]
    W, A, B, m = (oracle.float64(t) for t in (base[f"{module}.weight"], *found))
    return W.reshape(W.shape[0], -1), A.reshape(dm.RANK, -1), B.reshape(-1, dm.RANK), m.ravel()


def modules(pair):
    names = [n.removesuffix(".lora_A.weight") for n in pair.tensors if "lora_A" in n]
    return [tuple(n.split(".", 1)) for n in names]


def worst(pair, out, formula):
    """Largest distance of all merged tensors from a formula."""
    found, stored = 0.0, {c: load_file(pair.weights(c, out)) for c in ("unet", "text_encoder")}
    for component, module in modules(pair):
        exact = formula(*terms(pair, component, module))
        got = stored[component][f"{module}.weight"]
        got = oracle.float64(got).reshape(exact.shape)
        size = np.abs(exact).max(axis=1, keepdims=True)
        found = max(found, float((np.abs(got - exact) / size).max()))
    return found


def test_every_merged_tensor_is_the_oracles(pair):
    shapes = [terms(pair, *module)[0].shape for module in modules(pair)]
    assert any(a == b for a, b in shapes)
    assert any(a < b for a, b in shapes)
    assert worst(pair, pair.merged, lambda W, A, B, m: oracle.dora(W, A, B, m, SCALING)) < RELATIVE
    for wrong in (
        lambda W, A, B, m: oracle.lora(W, A, B, SCALING),
        lambda W, A, B, m: oracle.dora(W, A, B, m, 1.0),
        lambda W, A, B, m: W,
    ):
        assert worst(pair, pair.merged, wrong) > 100 * RELATIVE


def test_merged_pipeline_computes_what_the_unmerged_one_does(pair):
    pipe = dm.load(pair.merged)
    assert dm.distance(pair.outputs, dm.outputs(pipe.unet, pair.inputs)) < CLOSE
    assert dm.distance(pair.text_outputs, dm.text_outputs(pipe.text_encoder)) < CLOSE
    plain = dm.load(pair.base)
    assert dm.distance(pair.outputs, dm.outputs(plain.unet, pair.inputs)) > 0.01
    assert dm.distance(pair.text_outputs, dm.text_outputs(plain.text_encoder)) > 0.01


def test_verification_passes_and_inspection_gives_the_evidence(pair):
    report = dora_export.verify(pair.base, pair.adapter, pair.merged)
    assert report.exit_code == 0
    assert not report.findings
    said = inspected(pair.adapter, "--base", pair.base)
    assert "diffusers, with metadata" in said
    assert "out, by the name lora_magnitude_vector" in said
    assert "fits" in said


def of_unet(pair):
    return {n: t for n, t in pair.tensors.items() if n.startswith("unet.")}


def test_model_of_a_pipeline_runs_beside_the_unmerged_one(pair, tmp_path):
    adapter = save(tmp_path / "lora", of_unet(pair))
    dora_export.merge(pair.base / "unet", adapter, tmp_path / "out")
    report = dora_export.verify(pair.base / "unet", adapter, tmp_path / "out", forward=True)
    assert report.exit_code == 0
    assert [tier.tier for tier in report.tiers] == ["ledger", "oracle", "forward"]
    assert all(tier.ran for tier in report.tiers)


def test_pipeline_that_diffusers_fused_and_saved_is_found_right(pair, tmp_path):
    adapter = save(tmp_path / "lora", of_unet(pair))
    pipe = dm.load(pair.base)
    pipe.load_lora_weights(adapter)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path / "theirs")
    report = dora_export.verify(pair.base, adapter, tmp_path / "theirs")
    assert report.exit_code == 0
    assert {f.code for f in report.findings} == {"config-rewritten", "rounded"}
    assert "diffusers" in report.maker
    pipe = dm.load(pair.base)
    pipe.save_pretrained(tmp_path / "unmerged")
    report = dora_export.verify(pair.base, adapter, tmp_path / "unmerged")
    assert report.exit_code == 1
    assert "nothing-applied" in {f.code for f in report.findings}


def save(folder, tensors, metadata=None):
    """An adapter's folder."""
    folder.mkdir()
    save_file(tensors, folder / "pytorch_lora_weights.safetensors", metadata)
    return folder


def same_as_diffusers(pair, adapter, out):
    """Assert that a merge computes what diffusers does with the unmerged file; return that."""
    merged(pair.base, adapter, out)
    pipe = dm.load(pair.base)
    pipe.load_lora_weights(adapter)
    loaded = dm.load(out)
    expected = dm.outputs(pipe.unet, pair.inputs)
    assert dm.distance(expected, dm.outputs(loaded.unet, pair.inputs)) < CLOSE
    text = dm.text_outputs(pipe.text_encoder)
    assert dm.distance(text, dm.text_outputs(loaded.text_encoder)) < CLOSE
    return expected, text


def plain_lora(tensors):
    return {n: t for n, t in tensors.items() if "magnitude" not in n}


def test_file_without_metadata_has_scaling_one(pair, tmp_path):
    # Of the UNet alone with magnitudes: diffusers 0.42 loses a text encoder's under transformers 5.
    tensors = of_unet(pair) | plain_lora(pair.tensors)
    expected, text = same_as_diffusers(pair, save(tmp_path / "lora", tensors), tmp_path / "out")
    assert dm.distance(expected, pair.outputs) > 1e-3
    assert dm.distance(text, pair.text_outputs) > 1e-3
    said = inspected(tmp_path / "lora")
    assert "1, by diffusers' rule: without metadata or alpha, alpha is the rank" in said


def old_names(name):
    """A name in the layouts before PEFT's: attention processors, ``lora_linear_layer``."""
    for new, old in (("lora_A", "down"), ("lora_B", "up")):
        for leaf, path in (("to_out.0", "to_out"), ("to_q", "to_q"), ("to_k", "to_k"),
                           ("to_v", "to_v")):  # fmt: skip
            if name.startswith("unet.") and f".{leaf}.{new}" in name:
                return name.replace(f".{leaf}.{new}", f".processor.{path}_lora.{old}")
        if name.startswith("unet."):
            name = name.replace(f".{new}.", f".lora.{old}.")
        else:
            name = name.replace(f".{new}.", f".lora_linear_layer.{old}.")
    return name


def test_old_layouts_mean_what_diffusers_makes_of_them(pair, tmp_path):
    old = {old_names(n): t for n, t in plain_lora(pair.tensors).items()}
    assert any(".processor.to_out_lora.down.weight" in n for n in old)
    assert any(".lora_linear_layer.up.weight" in n for n in old)
    assert any(".conv1.lora.down.weight" in n for n in old)
    same_as_diffusers(pair, save(tmp_path / "lora", old), tmp_path / "out")
    assert "an old layout" in inspected(tmp_path / "lora")


def test_oldest_text_encoder_names_mean_its_projections(pair, tmp_path):
    renamed = {}
    for name, tensor in pair.tensors.items():
        if "magnitude" in name or not name.startswith("text_encoder.") or ".fc1." in name:
            continue
        for new, old in (("lora_A", "down"), ("lora_B", "up")):
            for leaf, path in (("out_proj", "to_out"), ("q_proj", "to_q"), ("k_proj", "to_k"),
                               ("v_proj", "to_v")):  # fmt: skip
                name = name.replace(f".{leaf}.{new}.", f".{path}_lora.{old}.")
        renamed[name] = tensor
    assert all("_lora." in n for n in renamed)
    same_as_diffusers(pair, save(tmp_path / "lora", renamed), tmp_path / "out")


def test_bare_unet_names_fit_the_unets_folder(pair, tmp_path):
    own = {n.removeprefix("unet."): t for n, t in pair.tensors.items() if n.startswith("unet.")}
    processors = {old_names(f"unet.{n}").removeprefix("unet."): t for n, t in own.items()
                  if "magnitude" not in n}  # fmt: skip
    out = merged(pair.base / "unet", save(tmp_path / "lora", processors), tmp_path / "out")
    W, A, B, _ = terms(pair, "unet", "down_blocks.0.resnets.0.conv1")
    got = oracle.float64(out["down_blocks.0.resnets.0.conv1.weight"]).reshape(W.shape)
    assert np.abs(got - oracle.lora(W, A, B, 1.0)).max() < RELATIVE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_weights_of_16_bits_are_within_one_ulp(dtype, tmp_path):
    base = pipelines.write(tmp_path / "base", dtype)
    stored = pipelines.tensors(dtype)["unet"]
    tensors = {n.replace(small.PREFIX, "unet."): t for n, t in pipelines.adapter(stored).items()}
    adapter = save(tmp_path / "lora", tensors)
    merged(base, adapter, tmp_path / "out")
    got = load_file(tmp_path / "out/unet/diffusion_pytorch_model.safetensors")
    modules = {n.partition(".lora_")[0].removeprefix("unet.") for n in tensors}
    kinds = set()
    for module in modules:
        W = oracle.float64(stored[f"{module}.weight"])
        A, B, m = (oracle.float64(tensors[f"unet.{module}.lora_{p}"]) for p in (
            "A.weight", "B.weight", "magnitude_vector"))  # fmt: skip
        flat = (W.reshape(len(W), -1), A.reshape(len(A), -1), B.reshape(-1, len(A)))
        exact = oracle.dora(*flat, m.ravel(), 1.0).reshape(W.shape)
        assert got[f"{module}.weight"].dtype is dtype
        assert oracle.ulps(got[f"{module}.weight"], exact) <= 1, module
        assert oracle.ulps(got[f"{module}.weight"], oracle.lora(*flat, 1.0).reshape(W.shape)) > 10
        kinds.add((W.ndim, W.shape[0] == W.shape[1]))
    assert kinds == {(2, True), (2, False), (4, True)}


# --- magnitudes per input, as OneTrainer's diffusers saver leaves them


def onetrainer(pair, change=lambda name, m: m):
    """The UNet's adapter with magnitudes per input."""
    base, made = load_file(pair.weights("unet")), {}
    make = torch.Generator().manual_seed(11)
    for name, tensor in pair.tensors.items():
        if not name.startswith("unet."):
            continue
        if "magnitude" not in name:
            made[name] = tensor
            continue
        module = name.removeprefix("unet.").removesuffix(".lora_magnitude_vector")
        W = base[f"{module}.weight"]
        norm = W.transpose(0, 1).flatten(1).norm(dim=1)
        m = norm * (0.6 + 0.8 * torch.rand(norm.shape, generator=make))
        shape = (1, len(m), *([1] * (W.ndim - 2)))
        made[f"unet.{module}.dora_scale"] = change(module, m.reshape(shape))
    return made


def test_magnitudes_per_input_keep_their_axis(pair, tmp_path):
    made = onetrainer(pair)
    save_file(made, tmp_path / "adapter.safetensors", {"ot_revision": "1"})
    out = merged(pair.base / "unet", tmp_path / "adapter.safetensors", tmp_path / "out")
    base = load_file(pair.weights("unet"))
    checked = 0
    for name, m in made.items():
        if not name.endswith("dora_scale"):
            continue
        module = name.removeprefix("unet.").removesuffix(".dora_scale")
        W = oracle.float64(base[f"{module}.weight"])
        A, B = (oracle.float64(made[f"unet.{module}.lora_{p}.weight"]) for p in "AB")
        V = W + (B.reshape(-1, dm.RANK) @ A.reshape(dm.RANK, -1)).reshape(W.shape)
        norm = np.sqrt((V * V).sum(axis=(0, *range(2, V.ndim)), keepdims=True)) + 2.0**-23
        exact = oracle.float64(m) * V / norm
        got = oracle.float64(out[f"{module}.weight"])
        assert np.abs(got - exact).max() / np.abs(exact).max() < RELATIVE, module
        over_rows = m.ravel().numpy() if W.ndim == 2 and W.shape[0] == W.shape[1] else None
        if over_rows is not None:
            other = oracle.dora(W, A, B, over_rows, 1.0)
            assert np.abs(got - other).max() / np.abs(exact).max() > 100 * RELATIVE
        checked += 1
    assert checked > 50
    said = inspected(tmp_path / "adapter.safetensors")
    assert "OneTrainer" in said
    assert "in, by the shape of dora_scale" in said
    assert re.search(r"! diffusers +drops dora_scale and applies plain LoRA", said)
    assert re.search(r"✓ ComfyUI +where the file has its names", said)
    assert dora_export.verify(pair.base / "unet", tmp_path / "adapter.safetensors",
                              tmp_path / "out").exit_code == 0  # fmt: skip


def test_flat_magnitudes_of_a_square_layer_are_ambiguous(pair, tmp_path):
    made = onetrainer(pair, lambda _, m: m.flatten())
    square = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q."
    file = tmp_path / "adapter.safetensors"
    save_file({n: t for n, t in made.items() if n.startswith(square)}, file)
    said = refused(pair.base / "unet", file, tmp_path / "out")
    assert "can count outputs (PEFT, LyCORIS since 3.2) or inputs" in said
    assert "Pass --axis out or --axis in" in said
    one, other = (
        merged(pair.base / "unet", file, tmp_path / axis, "--axis", axis) for axis in ("in", "out")
    )
    name = f"{square.removeprefix('unet.')}weight"
    assert not torch.allclose(one[name], other[name], rtol=1e-2)


# --- OneTrainer's eps, on layers with small norms

SHAPES = {"blocks.0.to_q": (16, 16), "blocks.0.to_out.0": (24, 16), "blocks.0.conv": (12, 8, 3, 3)}


def small_norms(dora, seed=3):
    """Base weights with norms of about 1e-5, and a trained adapter in diffusers' layout."""
    make = torch.Generator().manual_seed(seed)
    base, tensors = {}, {}
    for name, (out, *inner) in SHAPES.items():
        ones = [1] * (len(inner) - 1)
        W = torch.randn(out, *inner, generator=make) * 2e-6
        A = torch.randn(3, *inner, generator=make) * 1e-3
        B = torch.randn(out, 3, *ones, generator=make) * 1e-3
        norm = (W if dora == "out" else W.transpose(0, 1)).flatten(1).norm(dim=1)
        m = norm * (0.6 + 0.8 * torch.rand(norm.shape, generator=make))
        key = f"transformer.{name}"
        base[f"{key}.weight"] = W
        tensors |= {f"{key}.lora_A.weight": A, f"{key}.lora_B.weight": B}
        if dora == "out":
            tensors[f"{key}.lora_magnitude_vector.weight"] = m.reshape(1, -1, *ones) if ones else m
        else:
            tensors[f"{key}.dora_scale"] = m.reshape(1, -1, *ones)
    return base, tensors


def trained_weight(base, tensors, name, dora, eps):
    """By the definition of OneTrainer's DoRAModule.forward, float64."""
    key = f"transformer.{name}"
    W, A, B = (oracle.float64(t) for t in (base[f"{key}.weight"], tensors[f"{key}.lora_A.weight"],
                                           tensors[f"{key}.lora_B.weight"]))  # fmt: skip
    V = W + (B.reshape(len(B), -1) @ A.reshape(len(A), -1)).reshape(W.shape)
    kept = 0 if dora == "out" else 1
    over = tuple(i for i in range(V.ndim) if i != kept)
    norm = np.sqrt((V * V).sum(axis=over, keepdims=True)) + eps
    ending = "lora_magnitude_vector.weight" if dora == "out" else "dora_scale"
    return oracle.float64(tensors[f"{key}.{ending}"]).reshape(norm.shape) * V / norm


def settings(**config):
    config = {"peft_type": "LORA", "lora_decompose": True} | config
    return {"ot_branch": "master", "ot_config": json.dumps(config)}


# Metadata, what was added to norms: OneTrainer tells, else the name of the magnitudes does.
EPS = {"said": (settings(lora_decompose_norm_epsilon=True), 2.0**-23),
       "its default": ({"ot_revision": "abc"}, 2.0**-23),
       "none": (settings(lora_decompose_norm_epsilon=False), 0.0),
       "nobody's": ({}, None)}  # fmt: skip


def test_engines_go_by_the_name_that_magnitudes_have(tmp_path):
    """diffusers reads lora_magnitude_vector, ComfyUI dora_scale, and outputs' wrongly."""
    _, tensors = small_norms("out")
    save_file(tensors, tmp_path / "a.safetensors")
    said = inspected(tmp_path / "a.safetensors")
    assert re.search(r"✓ diffusers +slow", said)
    assert re.search(r"! ComfyUI +ignores the magnitudes", said)
    end = "lora_magnitude_vector.weight"
    scales = {n.replace(end, "dora_scale"): t.reshape(-1, *[1] * max(t.ndim - 1, 1))
              for n, t in tensors.items() if n.endswith(end)}  # fmt: skip
    factors = {n: t for n, t in tensors.items() if not n.endswith(end)}
    save_file(factors | scales, tmp_path / "a.safetensors")
    said = inspected(tmp_path / "a.safetensors")
    assert "out, by the shape of dora_scale" in said
    assert re.search(r"! diffusers +drops dora_scale", said)
    assert re.search(r"! ComfyUI +divides by the norm of the base's rows", said)


@pytest.mark.parametrize("dora", ["out", "in"])
@pytest.mark.parametrize("case", EPS)
def test_onetrainer_adds_its_eps_to_the_norms_of_either_axis(case, dora, tmp_path):
    metadata, eps = EPS[case]
    base, tensors = small_norms(dora)
    small.write_base(tmp_path / "base", base, config={"model_type": "net"})
    save_file(tensors, tmp_path / "adapter.safetensors", metadata or None)
    got = merged(tmp_path / "base", tmp_path / "adapter.safetensors", tmp_path / "out")
    if eps is None:
        eps = 0.0 if dora == "out" else 2.0**-23
    for name in SHAPES:
        weight = got[f"transformer.{name}.weight"].flatten(1)
        for added in (0.0, 2.0**-23):
            exact = trained_weight(base, tensors, name, dora, added)
            far = distance(weight, exact.reshape(len(exact), -1))
            assert far <= RELATIVE if added == eps else far > 100 * RELATIVE, (name, added)


def test_onetrainers_settings_are_held_against_the_magnitudes(tmp_path):
    base, tensors = small_norms("out")
    small.write_base(tmp_path / "base", base, config={"model_type": "net"})
    file = tmp_path / "adapter.safetensors"
    lost = {n: t for n, t in tensors.items() if "magnitude" not in n}
    for own, said, reason in (
        (tensors, settings(lora_decompose_output_axis=False), "count inputs, their shapes say out"),
        (lost, settings(), "decomposed (DoRA), but there is no dora_scale"),
        (tensors, settings(lora_decompose=False), "not decomposed, but there is dora_scale"),
    ):
        save_file(own, file, said)
        message = refused(tmp_path / "base", file, tmp_path / "out")
        assert reason in message
        assert "save them without metadata" in message


# --- refusals


def without(part):
    return lambda ts: {n: t for n, t in ts.items() if part not in n}


def with_alpha(ts):
    first = next(n for n in ts if "lora_A" in n).removesuffix(".lora_A.weight")
    return ts | {f"{first}.alpha": torch.tensor(2.0)}


def with_scale(ts):
    first = next(n for n in ts if n.endswith("lora_magnitude_vector"))
    name = first.replace("lora_magnitude_vector", "dora_scale")
    return ts | {name: ts[first].reshape(-1, 1)}


# One whose number tells layers apart, and one of which a number is part of the name.
LOST = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
KEPT = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0"
CASES = {
    "no magnitude": (without("conv1.lora_magnitude"), "no magnitude, but the metadata says", ()),
    "a factor": (without("conv1.lora_B"), "lora_B missing", ()),
    "alpha twice": (with_alpha, "alpha is in the file twice", ()),
    "both magnitudes": (with_scale, "lora_magnitude_vector and dora_scale both", ()),
    "unknown": (lambda ts: ts | {"unet.x.what": torch.ones(1)}, "unknown tensor 'unet.x.what'", ()),
    "--alpha": (dict, "alpha is in the file. Leave --alpha out", ("--alpha", "2")),
    "--axis": (dict, "lora_magnitude_vector counts outputs. Leave --axis out", ("--axis", "in")),
    "rank": (
        lambda ts: {n: torch.cat([t, t], 0 if "lora_A" in n else 1) if ".conv1.lora_" in n
                    and "magnitude" not in n else t for n, t in ts.items()},
        "rank 3 by the metadata, but its factors have 6", (),
    ),
    "a layer": (
        lambda ts: {n: t for n, t in ts.items()
                    if not n.startswith(f"unet.{LOST}.") and not n.startswith(f"unet.{KEPT}.")},
        f"2 layers like those adapted have no adapter tensors: unet.{KEPT}.weight unet.{LOST}.", (),
    ),
    "magnitude length": (
        lambda ts: {n: t[:, :-1] if n.endswith("conv1.lora_magnitude_vector") else t
                    for n, t in ts.items()},
        "expected one for each of", (),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_file_that_does_not_add_up_is_refused(case, pair, tmp_path):
    change, message, options = CASES[case]
    tensors = {n: t.clone().contiguous() for n, t in change(pair.tensors).items()}
    adapter = save(tmp_path / "lora", tensors, pair.metadata)
    assert message in refused(pair.base, adapter, tmp_path / "out", *options)


def test_alpha_of_some_layers_only_is_refused(pair, tmp_path):
    adapter = save(tmp_path / "lora", with_alpha(pair.tensors))
    said = refused(pair.base, adapter, tmp_path / "out")
    assert "has no alpha, though other layers have" in said


@pytest.mark.parametrize(
    ("alpha", "reason"),
    [(0.0, "alpha is 0, so it would have no effect"), (float("inf"), "alpha is inf"),
     (float("nan"), "alpha is nan")],
)  # fmt: skip
def test_stored_alpha_that_scales_nothing_is_refused(alpha, reason, tmp_path):
    base, tensors = small_norms("out")
    small.write_base(tmp_path / "base", base, config={"model_type": "net"})
    alphas = {f"transformer.{name}.alpha": torch.tensor(alpha) for name in SHAPES}
    save_file(tensors | alphas, tmp_path / "adapter.safetensors")
    assert reason in refused(tmp_path / "base", tmp_path / "adapter.safetensors", tmp_path / "out")


def test_targets_without_tensors_and_tensors_that_are_no_targets_are_told(tmp_path):
    base, tensors = small_norms("out")
    base["transformer.blocks.0.to_out.2.weight"] = torch.ones(4, 4)  # no layer of to_out.0's kind
    small.write_base(tmp_path / "base", base, config={"model_type": "net"})
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 3, "use_dora": True,
              "target_modules": ["to_q", "to_out.0", "proj_in"],
              "alpha_pattern": {"nothing": 2}}  # fmt: skip
    said = {f"transformer.{k}": v for k, v in config.items()}
    save_file(tensors, tmp_path / "a.safetensors", {"lora_adapter_metadata": json.dumps(said)})
    report = dora_export.merge(
        tmp_path / "base", tmp_path / "a.safetensors", tmp_path / "x", dry_run=True
    )
    first, second, third = report.warnings
    assert "no layer takes its rank or alpha from alpha_pattern 'nothing' of transformer" in first
    assert "target_modules names proj_in, of which the file has no tensors" in second
    assert "the file has layers that target_modules does not name: blocks.0.conv" in third
    assert third.endswith("(of transformer)")


VARIANTS = {
    "layer_replication": [[0, 2], [1, 3]], "use_bdlora": {"nblocks": 2}, "use_qalora": True,
    "target_parameters": ["w"], "peft_type": "ADALORA",
}  # fmt: skip


def said_of(**fields):
    """The metadata of an adapter of ``small_norms``."""
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 3, "use_dora": True,
              "target_modules": ["to_q", "to_out.0", "conv"]} | fields  # fmt: skip
    return {"lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in config.items()})}


@pytest.mark.parametrize("field", VARIANTS)
def test_settings_that_mean_other_tensors_are_refused_by_name(field, tmp_path):
    base, tensors = small_norms("out")
    small.write_base(tmp_path / "base", base, config={"model_type": "net"})
    said = said_of(**{field: VARIANTS[field]})
    save_file(tensors, tmp_path / "a.safetensors", said)
    message = refused(tmp_path / "base", tmp_path / "a.safetensors", tmp_path / "out")
    assert field in message
    assert "not known in this layout. Save the adapter with PEFT" in message


Q = "transformer.blocks.0.to_q"
ODD = {
    "ranks differ": (lambda ts: ts | {f"{Q}.lora_B.weight": torch.ones(16, 4)}, {},
                     "lora_A is (3, 16) and lora_B (16, 4); their ranks differ"),
    "kernel of B": (lambda ts: ts | {f"{Q}.lora_B.weight": torch.ones(16, 3, 1, 3)}, {},
                    "lora_B is (16, 3, 1, 3), expected a kernel of 1"),
    "vectors": (lambda ts: ts | {f"{Q}.lora_A.weight": torch.ones(3)}, {}, "their ranks differ"),
    "both missing": (
        lambda ts: {n: t for n, t in ts.items() if not n.startswith(f"{Q}.lora_A")
                    and not n.startswith(f"{Q}.lora_B")}, {}, "lora_A and lora_B missing"),
    "twice": (lambda ts: ts | {f"{Q}.lora_A.default.weight": torch.ones(3, 16)}, {},
              "are the same part of one layer"),
    "alpha of two": (lambda ts: ts | {f"{Q}.alpha": torch.ones(2)}, {}, "(2,) F32, expected one"),
    "no use_dora": (dict, said_of(use_dora=False),
                    "a magnitude, but the metadata says that use_dora is false"),
    "no JSON": (dict, {"lora_adapter_metadata": "{"}, "lora_adapter_metadata: not JSON"),
    "two things": (dict, {"lora_adapter_metadata": '{"r": 3, "r": 4}'}, "two things of one name"),
    "no object": (dict, {"lora_adapter_metadata": "[]"}, "is not a JSON object"),
    "another part": (dict, said_of(r=4), "rank 4 by the metadata, but its factors have 3"),
}  # fmt: skip


@pytest.mark.parametrize("case", ODD)
def test_small_file_that_does_not_add_up_is_refused(case, tmp_path):
    change, metadata, reason = ODD[case]
    base, tensors = small_norms("out")
    small.write_base(tmp_path / "base", base, config={"model_type": "net"})
    save_file(change(tensors), tmp_path / "a.safetensors", metadata or None)
    message = refused(tmp_path / "base", tmp_path / "a.safetensors", tmp_path / "out")
    assert reason in message


def test_folders_hold_one_file_of_the_known_names(tmp_path):
    base, tensors = small_norms("out")
    small.write_base(tmp_path / "base", base, config={"model_type": "net"})
    (tmp_path / "lora").mkdir()
    paths = tmp_path / "base", tmp_path / "lora", tmp_path / "out"
    asked = ("--adapter-format", "diffusers")
    assert "no pytorch_lora_weights.safetensors here" in refused(*paths, *asked)
    torch.save(tensors, tmp_path / "lora/pytorch_lora_weights.bin")
    assert "--allow-pickle" in refused(*paths)
    got = merged(*paths, "--allow-pickle")
    for name in SHAPES:
        exact = trained_weight(base, tensors, name, "out", 0.0)
        assert distance(got[f"transformer.{name}.weight"], exact) <= RELATIVE
    save_file({}, tmp_path / "lora/pytorch_lora_weights.safetensors")
    message = refused(*paths[:2], tmp_path / "other", "--allow-pickle")
    assert "holds no LoRA tensors" in message


def test_bias_of_b_is_there_where_the_metadata_says_so(tmp_path):
    base, tensors = small_norms("out")
    small.write_base(tmp_path / "base", base, config={"model_type": "net"})
    plain = {n: t for n, t in tensors.items() if "magnitude" not in n}
    biases = {f"transformer.{n}.lora_B.bias": torch.ones(s[0]) for n, s in SHAPES.items()}
    for own, said, reason in (
        (plain, True, "lora_bias is true by the metadata, but its B has none"),
        (plain | biases, False, "lora_bias is false by the metadata, but its B has one"),
    ):
        file = tmp_path / "a.safetensors"
        save_file(own, file, said_of(use_dora=False, lora_bias=said))
        assert reason in refused(tmp_path / "base", file, tmp_path / "out")


@pytest.mark.parametrize("said", ["by the user", "by the metadata"])
def test_bias_of_b_is_scaled_and_added(said, tmp_path):
    """As PEFT's forward does: the product and the bias of B under one factor."""
    base, tensors = small_norms("out")
    biases = {f"transformer.{n}.bias": torch.randn(s[0]) for n, s in SHAPES.items()}
    small.write_base(tmp_path / "base", base | biases, config={"model_type": "net"})
    plain = {n: t for n, t in tensors.items() if "magnitude" not in n}
    of_b = {f"transformer.{n}.lora_B.bias": torch.randn(s[0]) for n, s in SHAPES.items()}
    by_user = said == "by the user"
    metadata = None if by_user else said_of(use_dora=False, lora_bias=True, lora_alpha=7)
    save_file(plain | of_b, tmp_path / "a.safetensors", metadata)
    options = ("--alpha", "7") if by_user else ()
    got = merged(tmp_path / "base", tmp_path / "a.safetensors", tmp_path / "out", *options)
    for name in SHAPES:
        key = f"transformer.{name}"
        W, A, B = (
            oracle.float64(t).reshape(len(t), -1)
            for t in (
                base[f"{key}.weight"],
                plain[f"{key}.lora_A.weight"],
                plain[f"{key}.lora_B.weight"],
            )
        )
        assert distance(got[f"{key}.weight"].flatten(1), oracle.lora(W, A, B, 7 / 3)) <= RELATIVE
        bias = oracle.float64(biases[f"{key}.bias"]) + 7 / 3 * oracle.float64(
            of_b[f"{key}.lora_B.bias"]
        )
        assert np.abs(oracle.float64(got[f"{key}.bias"]) - bias).max() < 1e-6


def test_scaling_by_the_user_is_alpha_over_rank(tmp_path):
    base, tensors = small_norms("out")
    small.write_base(tmp_path / "base", base, config={"model_type": "net"})
    save_file(tensors, tmp_path / "a.safetensors")
    scaled = {n: t * 7 / 3 if "lora_B" in n else t for n, t in tensors.items()}
    got = merged(tmp_path / "base", tmp_path / "a.safetensors", tmp_path / "out", "--alpha", "7")
    for name in SHAPES:
        exact = trained_weight(base, scaled, name, "out", 0.0)
        weight, size = got[f"transformer.{name}.weight"].flatten(1), len(exact)
        assert distance(weight, exact.reshape(size, -1)) <= RELATIVE
        other = trained_weight(base, tensors, name, "out", 0.0)
        assert distance(weight, other.reshape(size, -1)) > 1e-3
    adapter = dora_export.load_adapter(tmp_path / "a.safetensors", alpha=7.0)
    assert adapter.files == (tmp_path / "a.safetensors",)
    assert {u.kind for u in adapter.updates} == {"dora"}
    assert adapter.facts["scaling from"] == "--alpha"
    assert (adapter.facts["alpha"], adapter.facts["rank"]) == ([7.0], [3])


def test_settings_say_nothing_of_how_weights_lie(tmp_path):
    """PEFT does not keep fan_in_fan_out true; diffusers' layers are (out, in), square ones too."""
    base, tensors = small_norms("out")
    small.write_base(tmp_path / "base", base, config={"model_type": "net"})
    for flag in (True, False):
        file = tmp_path / f"{flag}.safetensors"
        save_file(tensors, file, said_of(fan_in_fan_out=flag))
        got = merged(tmp_path / "base", file, tmp_path / str(flag))
        for name in SHAPES:
            exact = trained_weight(base, tensors, name, "out", 0.0)
            weight = got[f"transformer.{name}.weight"].flatten(1)
            assert distance(weight, exact.reshape(len(exact), -1)) <= RELATIVE


def test_metadata_of_one_component_says_nothing_of_another(pair, tmp_path):
    content = json.loads(pair.metadata["lora_adapter_metadata"])
    only = {k: v for k, v in content.items() if k.startswith("unet.")}
    metadata = {"lora_adapter_metadata": json.dumps(only)}
    adapter = save(tmp_path / "lora", pair.tensors, metadata)
    said = refused(pair.base, adapter, tmp_path / "out")
    assert "the metadata says nothing of text_encoder" in said


def test_adapter_of_two_models_does_not_fit_one_of_them(pair, tmp_path):
    said = refused(pair.base / "unet", pair.adapter, tmp_path / "out")
    assert "'text_encoder_' is the text_encoder" in said
    assert "pass the folder or file that holds all components" in said


def test_stored_alpha_counts_where_there_is_no_metadata(pair, tmp_path):
    alphas = {n.replace("lora_A.weight", "alpha"): torch.tensor(2.5, dtype=torch.bfloat16)
              for n in pair.tensors if "lora_A" in n}  # fmt: skip
    adapter, out = save(tmp_path / "lora", pair.tensors | alphas), tmp_path / "out"
    dora_export.merge(pair.base, adapter, out)
    scaling = 2.5 / dm.RANK
    assert worst(pair, out, lambda W, A, B, m: oracle.dora(W, A, B, m, scaling)) < RELATIVE


def test_saved_file_is_what_diffusers_writes(pair):
    """The fixture is diffusers' own: its metadata, its names."""
    with safe_open(pair.adapter / "pytorch_lora_weights.safetensors", "pt") as file:
        content = json.loads(file.metadata()["lora_adapter_metadata"])
    assert content["unet.use_dora"] is True
    assert content["text_encoder.lora_alpha"] == dm.ALPHA
    assert any(t.ndim == 4 for n, t in pair.tensors.items() if n.endswith("magnitude_vector"))
