"""Files of kohya, LyCORIS, OneTrainer and ComfyUI: names, spellings, axes, metadata, refusals.

OneTrainer's and ComfyUI's files are written from their definitions: github.com/Nerogar/OneTrainer,
modules/module/LoRAModule.py (DoRAModule.forward); github.com/comfyanonymous/ComfyUI,
comfy/weight_adapter/lora.py (load) and comfy/lora.py (load_lora).
"""

import json
import re

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lycoris import LycorisNetwork, create_lycoris
from safetensors.torch import save_file
from torch import nn

import dora_export
from dora_export.adapters import ReadOptions, read_adapter
from dora_export.checkpoints import open_checkpoint
from dora_export.errors import AdapterError, DoraExportError, InputError
from dora_export.plan import Settings, plan_merge
from tests import lycoris_models as models
from tests import oracle, small
from tests.trainers import RELATIVE, distance, inspected, merged, refused

SHAPES = {"to_q": (16, 16), "ff.net_0": (24, 16), "proj_in": (16, 24)}
PATHS = {name: f"blocks.0.{name}" for name in SHAPES}
R, ALPHA = 2, 3.0


def layers(dora=None, seed=0, dtype=torch.float32, shapes=SHAPES):
    """Base weights, and per layer trained factors and magnitudes (2-D, as LyCORIS saves them)."""
    torch.manual_seed(seed)
    base, made = {}, {}
    for name, (out, inner) in shapes.items():
        W = (torch.randn(out, inner) * 0.2).to(dtype)
        base[f"{PATHS.get(name, name)}.weight"] = W
        made[name] = {"up": torch.randn(out, R) * 0.3, "down": torch.randn(R, inner) * 0.3}
        if dora is not None:
            m = W.float().norm(dim=1 if dora == "out" else 0, keepdim=True)
            made[name]["dora_scale"] = m * (0.6 + 0.8 * torch.rand_like(m))
    return base, made


def wanted(base, made, dora=None, eps=2.0**-23, scaling=ALPHA / R):
    """By the definition, in float64."""
    found = {}
    for name, t in made.items():
        key = f"{PATHS.get(name, name)}.weight"
        W, A, B = (oracle.float64(x) for x in (base[key], t["down"], t["up"]))
        if dora is None:
            found[key] = oracle.lora(W, A, B, scaling)
        else:
            m = oracle.float64(t["dora_scale"]).ravel()
            axis = 1 if dora == "out" else 0
            found[key] = oracle.dora(W, A, B, m, scaling, axis=axis, eps=eps)
    return found


def named(made, prefix="lora_unet_", flat=True, up=".lora_up.weight", down=".lora_down.weight",
          alpha=ALPHA):  # fmt: skip
    """The file's tensors in some spelling."""
    found = {}
    for name, t in made.items():
        path = PATHS.get(name, name)
        key = prefix + (path.replace(".", "_") if flat else path)
        found |= {f"{key}{up}": t["up"], f"{key}{down}": t["down"]}
        if alpha is not None:
            found[f"{key}.alpha"] = torch.tensor(alpha)
        if "dora_scale" in t:
            found[f"{key}.dora_scale"] = t["dora_scale"]
    return found


def write(folder, base, tensors, metadata=None, component=""):
    small.write_base(folder / "base", {f"{component}{n}": t for n, t in base.items()},
                     config={"model_type": "net"})  # fmt: skip
    save_file(tensors, folder / "adapter.safetensors", metadata)
    return folder / "base", folder / "adapter.safetensors", folder / "out"


def _named(base_and_layers):
    return base_and_layers[0], named(base_and_layers[1])


def assert_near(got, want, component=""):
    for key, exact in want.items():
        assert distance(got[component + key], exact) <= RELATIVE, key


# --- names ---


def test_names_of_lycoris_own_wrapper_are_found(tmp_path):
    model = models.net()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    LycorisNetwork.apply_preset({"target_name": [".*"]})
    network = create_lycoris(model, 1.0, linear_dim=2, linear_alpha=3, algo="lokr",
                             weight_decompose=True, train_norm=True)  # fmt: skip
    network.apply_to()
    torch.manual_seed(3)
    for lora in network.loras:
        models.train(lora) if lora.name == "kron" else nn.init.normal_(lora.w_norm)
    base, adapter = models.write(tmp_path, before, dict(network.state_dict()))
    got = merged(base, adapter, tmp_path / "out")
    kinds = [lora for lora in network.loras if lora.name == "kron"]
    assert len(kinds) == 9
    for lora in kinds:
        name = next(n for n, m in model.named_modules() if m is lora.org_module[0])
        lora.org_forward = type(lora.org_module[0]).forward.__get__(lora.org_module[0])
        used = oracle.float64(models.used_weight(lora))
        weight = got[f"{name}.weight"]
        assert distance(weight.flatten(1), used.reshape(len(used), -1)) <= RELATIVE, name
    assert not torch.equal(got["norm_out.weight"], before["norm_out.weight"])


@pytest.mark.parametrize(
    ("prefix", "component"),
    [
        ("lora_unet_", "unet."), ("lora_unet_", ""), ("lora_unet_", "transformer."),
        ("lora_transformer_", "transformer."), ("lycoris_", "transformer."), ("lycoris_", ""),
        ("lora_te_", "text_encoder."), ("lora_te1_", "text_encoder."),
        ("lora_te2_", "text_encoder_2."), ("lora_te3_", "text_encoder_3."),
        ("lora_te3_", "text_encoder_2."),
    ],
)  # fmt: skip
def test_prefixes_stand_for_components(prefix, component, tmp_path):
    base, made = layers("out")
    paths = write(tmp_path, base, named(made, prefix), component=component)
    assert_near(merged(*paths), wanted(base, made, "out"), component)


def test_several_components_in_one_file(tmp_path):
    base, made = layers("in")
    other, changed = layers(seed=1)
    both = {f"unet.{n}": t for n, t in base.items()}
    both |= {f"text_encoder.{n}": t for n, t in other.items()}
    tensors = named(made, "lora_unet_") | named(changed, "lora_te1_")
    paths = write(tmp_path, both, tensors)
    got = merged(*paths)
    assert_near(got, wanted(base, made, "in"), "unet.")
    assert_near(got, wanted(other, changed), "text_encoder.")
    shown = inspected(paths[1], "--base", paths[0])
    assert "fits, 6 tensors would change" in shown


def test_missing_component_is_refused_with_what_the_prefix_means(tmp_path):
    base, made = layers()
    paths = write(tmp_path, base, named(made) | named(layers(seed=1)[1], "lora_te2_x_y_"))
    message = refused(*paths)
    assert "3 of 6 adapter layers match this base" in message
    assert "'lora_te2_' is the text_encoder_2" in message


def test_names_of_two_components_for_one_layer_are_refused(tmp_path):
    base, made = layers()
    tensors = named(made, "lora_te1_") | named(layers(seed=1)[1], "lora_te2_")
    assert "several of the adapter's names mean one layer" in refused(
        *write(tmp_path, base, tensors)
    )


def test_underscore_names_that_two_layers_share_are_refused(tmp_path):
    base, made = layers(shapes={"a.b_c": (8, 8)})
    base["a_b.c.weight"] = base["a.b_c.weight"].clone()
    paths = write(tmp_path, base, named(made))
    message = refused(*paths)
    assert "a.b_c or a_b.c" in message
    assert "--map-prefix lora_unet_a_b_c=a.b_c" in message
    got = merged(*paths, "--map-prefix", "lora_unet_a_b_c=a.b_c")
    assert_near(got, wanted({"a.b_c.weight": base["a.b_c.weight"]}, made))
    assert torch.equal(got["a_b.c.weight"], base["a_b.c.weight"])


# --- spellings ---

SPELLINGS = {
    "kohya": ("lora_unet_", True, ".lora_up.weight", ".lora_down.weight"),
    "dotted": ("diffusion_model.", False, ".lora_up.weight", ".lora_down.weight"),
    "PEFT's": ("diffusion_model.", False, ".lora_B.weight", ".lora_A.weight"),
    "PEFT's with the adapter": (
        "diffusion_model.", False, ".lora_B.default.weight", ".lora_A.default.weight"),
    "bare": ("diffusion_model.", False, ".lora_B", ".lora_A"),
    "old diffusers": ("lora_unet_", True, "_lora.up.weight", "_lora.down.weight"),
    "diffusers": ("lora_unet_", True, ".lora.up.weight", ".lora.down.weight"),
    "transformers": (
        "lora_unet_", True, ".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight"),
    "no prefix": ("", False, ".lora_B.weight", ".lora_A.weight"),
}  # fmt: skip


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_is_read(spelling, tmp_path):
    prefix, flat, up, down = SPELLINGS[spelling]
    base, made = layers("out")
    paths = write(tmp_path, base, named(made, prefix, flat, up, down))
    assert_near(merged(*paths), wanted(base, made, "out"))


@pytest.mark.parametrize(
    ("up", "down"),
    [(".lora_up.weight", ".lora_down.weight"), (".lora_B.weight", ".lora_A.weight")],
)
def test_missing_alpha_means_the_rank_unless_told(up, down, tmp_path):
    base, made = layers()
    tensors = named(made, "diffusion_model.", False, up, down, alpha=None)
    paths = write(tmp_path, base, tensors)
    assert_near(merged(*paths), wanted(base, made, scaling=1.0))
    got = merged(*paths[:2], tmp_path / "told", "--alpha", "3")
    assert_near(got, wanted(base, made))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64])
def test_alpha_of_every_type_is_read(dtype, tmp_path):
    base, made = layers()
    tensors = named(made)
    tensors = {k: t.to(dtype) if k.endswith("alpha") else t for k, t in tensors.items()}
    assert_near(merged(*write(tmp_path, base, tensors)), wanted(base, made))


def test_pickled_file_needs_to_be_allowed(tmp_path):
    base, made = layers("in")
    paths = write(tmp_path, base, named(made))
    pickled = tmp_path / "adapter.pt"
    torch.save(named(made), pickled)
    assert "--allow-pickle" in refused(paths[0], pickled, paths[2])
    got = merged(paths[0], pickled, paths[2], "--allow-pickle")
    assert_near(got, wanted(base, made, "in"))


def test_folder_of_no_file_or_of_two_is_none(tmp_path):
    base, made = layers("in")
    paths = write(tmp_path, base, named(made))
    (tmp_path / "lora").mkdir()
    asked = ("--adapter-format", "lycoris")
    assert "not a weight file. Pass the" in refused(paths[0], tmp_path / "lora", paths[2], *asked)
    for name in "xy":
        save_file(named(made), tmp_path / f"lora/{name}.safetensors")
    assert "not a weight file. Pass the" in refused(paths[0], tmp_path / "lora", paths[2], *asked)


def test_folder_of_one_file_is_that_file(tmp_path):
    base, made = layers("in")
    paths = write(tmp_path, base, named(made))
    (tmp_path / "lora").mkdir()
    moved = paths[1].rename(tmp_path / "lora" / "x.safetensors")
    assert_near(merged(paths[0], moved.parent, paths[2]), wanted(base, made, "in"))


# --- the axis (traps 1 and 4) ---


@pytest.mark.parametrize("dora", ["out", "in"])
def test_shape_of_dora_scale_tells_the_axis_even_of_square_layers(dora, tmp_path):
    base, made = layers(dora)
    paths = write(tmp_path, base, named(made))
    got, want = merged(*paths), wanted(base, made, dora)
    assert_near(got, want)
    square = "blocks.0.to_q.weight"
    other = wanted(base, {"to_q": made["to_q"]}, "in" if dora == "out" else "out")
    assert distance(got[square], other[square]) > 0.05
    shown = inspected(paths[1])
    assert f"{dora}, by the shape of dora_scale (3 layers)" in shown
    assert f"one per {dora}put" in shown
    for words in ("lycoris", "kohya, LyCORIS or OneTrainer", "scaling      1.5"):
        assert words in shown


def test_inspection_tells_who_serves_such_files(tmp_path):
    expected = {None: ("✓ ComfyUI", "✓ diffusers"), "in": ("✓ ComfyUI", "! diffusers"),
                "out": ("! ComfyUI", "! diffusers")}  # fmt: skip
    for dora, words in expected.items():
        base, made = layers(dora)
        shown = inspected(write(tmp_path / str(dora), base, named(made))[1])
        assert all(word in shown for word in words), shown
    tensors = models.state(models.attach(models.net(), "lokr both", "in"))
    path = write(tmp_path / "lokr", base, tensors)[1]
    shown = inspected(path)
    assert "✗ diffusers" in shown
    assert "algorithm    LoKr (8)" in shown


def test_flat_magnitudes_are_told_by_their_length_but_for_square_layers(tmp_path):
    base, made = layers("in")
    tensors = named(made)
    tensors = {k: t.flatten() if k.endswith("dora_scale") else t for k, t in tensors.items()}
    paths = write(tmp_path, base, tensors)
    message = refused(*paths)
    assert "blocks_0_to_q: dora_scale is (16,), which for a layer of 16 outputs and 16" in message
    assert "Pass --axis out or --axis in" in message
    assert "ff_net_0" not in message
    assert_near(merged(*paths, "--axis", "in"), wanted(base, made, "in"))
    assert "in, as given with --axis (1 layers)" in inspected(paths[1], "--axis", "in")
    out = refused(*paths[:2], tmp_path / "other", "--axis", "out")
    assert "--axis out: dora_scale is (16,), so it counts inputs. Leave it out" in out


@pytest.mark.parametrize("axis", ["out", "in"])
def test_flat_magnitudes_of_a_square_layer_count_what_is_said(axis, tmp_path):
    base, made = layers(axis, shapes={"x": (16, 16)})
    made["x"]["dora_scale"] = made["x"]["dora_scale"].flatten()
    other = wanted(base, made, "in" if axis == "out" else "out")["x.weight"]
    got = merged(*write(tmp_path, base, named(made)), "--axis", axis)
    assert_near(got, wanted(base, made, axis))
    assert distance(got["x.weight"], other) > 0.01


def test_axis_that_contradicts_the_shape_is_refused(tmp_path):
    base, made = layers("out")
    paths = write(tmp_path, base, named(made))
    assert "counts outputs. Leave it out" in refused(*paths, "--axis", "in")


@pytest.mark.parametrize(
    ("shape", "dora", "scale"),
    [((1, 12), "out", (1, 1)), ((1, 12), "in", (1, 12)),
     ((12, 1), "out", (12, 1)), ((12, 1), "in", (1, 1))],
)  # fmt: skip
def test_one_output_or_input_is_told_apart_where_it_can_be(shape, dora, scale, tmp_path):
    """ComfyUI takes (1, in) for outputs where there is one."""
    base, made = layers(dora, shapes={"x": shape})
    assert made["x"]["dora_scale"].shape == scale
    paths = write(tmp_path, base, named(made))
    assert_near(merged(*paths), wanted(base, made, dora))


def test_one_output_and_one_input_is_ambiguous(tmp_path):
    base, made = layers("out", shapes={"x": (1, 1)})
    paths = write(tmp_path, base, named(made))
    message = refused(*paths)
    assert "can count outputs" in message
    assert "--axis out or --axis in" in message
    assert_near(merged(*paths, "--axis", "out"), wanted(base, made, "out"))


@pytest.mark.usefixtures("either_kernel")
def test_norm_is_that_of_the_updated_weight_as_comfyui_does_not_have_it(tmp_path):
    base, made = layers("out")
    got, want = merged(*write(tmp_path, base, named(made))), wanted(base, made, "out")
    for name, t in made.items():
        key = f"{PATHS[name]}.weight"
        W = oracle.float64(base[key])
        V = oracle.lora(W, oracle.float64(t["down"]), oracle.float64(t["up"]), ALPHA / R)
        comfy = oracle.float64(t["dora_scale"]) * V / np.linalg.norm(W, axis=1, keepdims=True)
        assert distance(got[key], comfy) > 0.05
        assert distance(got[key], want[key]) <= RELATIVE


def test_dora_scale_is_never_dropped(tmp_path):
    """diffusers merges such a file as plain LoRA (trap 5); here every tensor must be used."""
    base, made = layers("out")
    paths = write(tmp_path, base, named(made))
    got, plain = merged(*paths), wanted(base, made)
    assert all(distance(got[key], exact) > 0.05 for key, exact in plain.items())
    report = json.loads(small.run("merge", *paths[:2], "-o", tmp_path / "json", "--json").stdout)
    assert report["adapter_tensors_used"] == report["adapter_tensors"] == 12


@pytest.mark.parametrize("alpha", [1.0, 7.0])
def test_scaling_is_alpha_over_rank_and_nothing_else(alpha, tmp_path):
    """Trap 2: not alpha, not alpha over the root of the rank, not 1."""
    base, made = layers()
    got = merged(*write(tmp_path, base, named(made, alpha=alpha)))
    assert_near(got, wanted(base, made, scaling=alpha / R))
    for wrong in {alpha, alpha / R**0.5, 1.0} - {alpha / R}:
        other = wanted(base, made, scaling=wrong)
        assert all(distance(got[key], exact) > 0.01 for key, exact in other.items())


# --- OneTrainer ---


class OneTrainerDoRA(nn.Module):
    """DoRAModule.forward: float32 throughout, in axis unless told, eps of float32."""

    def __init__(self, layer, t, out_axis):
        super().__init__()
        self.layer, self.t, self.out_axis = layer, t, out_axis

    def forward(self, x):
        W, A, B = (a.float() for a in (self.layer.weight, self.t["down"], self.t["up"]))
        WP = W + (B @ A) * (ALPHA / R)
        eps = torch.finfo(WP.dtype).eps
        if self.out_axis:
            norm = WP.reshape(len(WP), -1).norm(dim=1, keepdim=True) + eps
        else:
            norm = WP.transpose(0, 1).norm(dim=1, keepdim=True).transpose(0, 1) + eps
        return nn.functional.linear(x, self.t["dora_scale"].float() * (WP / norm))


@pytest.mark.parametrize("config", [True, False])
@pytest.mark.parametrize("dora", ["in", "out"])
@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16], ids=str)
def test_onetrainer_normalises_in_float32_whatever_it_saves_in(saved, dora, config, tmp_path):
    base, made = layers(dora)
    made = {n: {k: v.to(saved) for k, v in t.items()} for n, t in made.items()}
    metadata = {"ot_branch": "master", "ot_revision": "abc"}
    if config:
        metadata["ot_config"] = json.dumps(
            {"peft_type": "LORA", "lora_decompose": True, "lora_decompose_norm_epsilon": True,
             "lora_decompose_output_axis": dora == "out"})  # fmt: skip
    paths = write(tmp_path, base, named(made, "lora_transformer_"), metadata, "transformer.")
    got = merged(*paths)
    for name, t in made.items():
        key = f"{PATHS[name]}.weight"
        layer = nn.Linear(*SHAPES[name][::-1], bias=False)
        layer.weight.data = base[key]
        forward = OneTrainerDoRA(layer, t, dora == "out")
        with torch.no_grad():
            used = forward(torch.eye(SHAPES[name][1])).T
        assert distance(got[f"transformer.{key}"], oracle.float64(used)) <= RELATIVE
    shown = inspected(paths[1])
    assert "OneTrainer" in shown
    assert f"{dora}, by the shape" in shown


def onetrainers_weight(W, delta, m, out_axis):
    """WP of DoRAModule.forward and LoKrModule.forward, for matrices and kernels, in float64."""
    WP, eps = W + delta, torch.finfo(torch.float32).eps
    kept = WP if out_axis else WP.transpose(0, 1)
    norm = kept.flatten(1).norm(dim=1).reshape(-1, *[1] * (WP.dim() - 1))
    return m * (WP / ((norm if out_axis else norm.transpose(0, 1)) + eps))


def onetrainers(kind, shape):
    """A layer's trained factors as OneTrainer names them, and what they add."""
    out, into, *kernel = shape
    size = into * int(np.prod(kernel))
    if kind == "LORA":
        t = {"lora_down.weight": torch.randn(R, into, *kernel),
             "lora_up.weight": torch.randn(out, R, *[1] * len(kernel))}  # fmt: skip
        delta = t["lora_up.weight"].flatten(1).double() @ t["lora_down.weight"].flatten(1).double()
    elif kind == "LOHA":
        t = {f"hada_w{i}_{x}": torch.randn(*((out, R) if x == "a" else (R, size)))
             for i in "12" for x in "ab"}  # fmt: skip
        one, two = (t[f"hada_w{i}_a"].double() @ t[f"hada_w{i}_b"].double() for i in "12")
        delta = one * two
    else:
        return onetrainers_lokr(kind.removeprefix("LOKR").strip(), shape)
    return t | {"alpha": torch.tensor(ALPHA)}, ALPHA / R * delta.reshape(shape)


def onetrainers_lokr(setting, shape):
    """LoKrModule's factors under its settings, and ``get_weight() * alpha / dim``.

    ``lokr_decompose_both`` takes w1 apart as well, ``lokr_full_matrix`` leaves w2 whole, and alpha
    is the rank where both are; ``lokr_use_tucker`` puts a core between w2's factors of a kernel.
    """
    out, into, *kernel = shape
    ones = [1] * len(kernel)
    t = {"lokr_w1": torch.randn(4, 2)}
    w1, alpha = t["lokr_w1"].double(), ALPHA
    if setting == "both":
        t = {"lokr_w1_a": torch.randn(4, R), "lokr_w1_b": torch.randn(R, 2)}
        w1 = t["lokr_w1_a"].double() @ t["lokr_w1_b"].double()
    if setting == "full":
        t["lokr_w2"], alpha = torch.randn(out // 4, into // 2, *kernel), float(R)
        w2 = t["lokr_w2"].double()
    elif setting == "tucker" and kernel:
        t |= {"lokr_t2": torch.randn(R, R, *kernel), "lokr_w2_a": torch.randn(R, out // 4),
              "lokr_w2_b": torch.randn(R, into // 2)}  # fmt: skip
        core, *factors = (t[f"lokr_{n}"].double() for n in ("t2", "w2_a", "w2_b"))
        w2 = torch.einsum("ijkl,ip,jr->prkl", core, *factors).contiguous()
    else:
        t |= {"lokr_w2_a": torch.randn(out // 4, R),
              "lokr_w2_b": torch.randn(R, into // 2 * int(np.prod(kernel)))}  # fmt: skip
        w2 = (t["lokr_w2_a"].double() @ t["lokr_w2_b"].double()).reshape(out // 4, -1, *kernel)
    delta = torch.kron(w1.reshape(4, 2, *ones), w2)
    return t | {"alpha": torch.tensor(alpha)}, alpha / R * delta.reshape(shape)


# LoHa has no DoRA there; LoKr's counts outputs unless told, LoRA's inputs.
ONETRAINER = [("LORA", "in"), ("LORA", "out"), ("LOKR", "out"), ("LOKR", "in"), ("LOKR", None),
              ("LOKR both", "out"), ("LOKR full", "in"), ("LOKR full", None),
              ("LOKR tucker", "out"), ("LOHA", None)]  # fmt: skip
# Its savers: kohya's names, or diffusers', under which LoKr and LoHa keep alpha and dora_scale.
SAVERS = {"LOKR both": "transformer.blocks.", "LOKR full": "transformer.blocks.",
          "LOHA": "transformer.blocks."}  # fmt: skip


def onetrainers_settings(kind, dora):
    """A file's metadata: settings of all algorithms, of which those of its own are true of it."""
    said = {"peft_type": kind.split()[0], "lora_decompose_norm_epsilon": kind == "LORA"}
    for word, (decompose, output) in {"LORA": ("lora_decompose", "lora_decompose_output_axis"),
                                      "LOKR": ("lokr_weight_decompose", "lokr_dora_on_output")
                                      }.items():  # fmt: skip
        own = said["peft_type"] == word
        said |= {decompose: (dora is not None) == own, output: (dora == "out") == own}
    return {"ot_branch": "master", "ot_config": json.dumps(said)}


@pytest.mark.parametrize(("kind", "dora"), ONETRAINER, ids=str)
def test_onetrainers_algorithms_on_matrices_and_kernels(kind, dora, tmp_path):
    torch.manual_seed(7)
    shapes = {"to_q": (16, 16), "up": (24, 16), "conv": (16, 8, 3, 3), "square": (16, 16, 3, 3)}
    base, tensors, want, plain = {}, {}, {}, {}
    saver = SAVERS.get(kind, "lora_transformer_blocks_")
    for name, shape in shapes.items():
        W = torch.randn(shape) * 0.2
        factors, delta = onetrainers(kind, shape)
        base[f"blocks.{name}.weight"], exact = W, W.double() + delta
        other = R / ALPHA if factors["alpha"] == ALPHA else ALPHA / R  # times, another scaling
        if dora:
            line = W if dora == "out" else W.transpose(0, 1)
            m = line.flatten(1).norm(dim=1) * (0.6 + 0.8 * torch.rand(len(line)))
            m = m.reshape(-1, *[1] * (len(shape) - 1))
            factors["dora_scale"] = m if dora == "out" else m.transpose(0, 1).contiguous()
            m, by_outputs = factors["dora_scale"].double(), dora == "out"
            exact = onetrainers_weight(W.double(), delta, m, by_outputs)
            wrong = onetrainers_weight(W.double(), other * delta, m, by_outputs)
        else:
            wrong = W.double() + other * delta
        plain[f"blocks.{name}.weight"] = wrong
        tensors |= {f"{saver}{name}.{n}": t for n, t in factors.items()}
        want[f"blocks.{name}.weight"] = exact.flatten(1).numpy()
    paths = write(tmp_path, base, tensors, onetrainers_settings(kind, dora), "transformer.")
    got = merged(*paths)
    for name, exact in want.items():
        stored = got[f"transformer.{name}"].flatten(1)
        assert distance(stored, exact) <= RELATIVE, name
        assert distance(stored, plain[name].flatten(1).numpy()) > 100 * RELATIVE
        assert distance(stored, oracle.float64(base[name].flatten(1))) > 100 * RELATIVE
    assert "trainer      OneTrainer" in inspected(paths[1])


@pytest.mark.parametrize(
    ("dora", "said", "reason"),
    [("out", "in", "says magnitudes count inputs, their shapes say outputs"),
     ("in", "out", "says magnitudes count outputs, their shapes say inputs"),
     (None, "out", "decomposed (DoRA), but there is no dora_scale"),
     ("out", None, "not decomposed, but there is dora_scale")],
)  # fmt: skip
def test_onetrainers_settings_of_lokr_are_held_against_its_magnitudes(dora, said, reason, tmp_path):
    W = torch.randn(16, 16) * 0.2
    tensors, _ = onetrainers("LOKR", W.shape)
    if dora:
        tensors["dora_scale"] = W.norm(dim=1 if dora == "out" else 0, keepdim=True)
    tensors = {f"lora_transformer_to_q.{n}": t for n, t in tensors.items()}
    paths = write(tmp_path, {"to_q.weight": W}, tensors, onetrainers_settings("LOKR", said))
    assert reason in refused(*paths)


def test_whole_kronecker_factors_of_onetrainer_are_never_scaled_by_a_root(tmp_path):
    """Their alpha is the rank. Of others' files 8 could be 4 with rs_lora, if a layer shows 4."""
    torch.manual_seed(8)
    base = {"a.weight": torch.randn(16, 16) * 0.2, "b.weight": torch.randn(16, 16) * 0.2}
    whole = {"lokr_w1": torch.randn(4, 2), "lokr_w2": torch.randn(4, 8),
             "alpha": torch.tensor(8.0)}  # fmt: skip
    shown = {"lokr_w1": torch.randn(4, 2), "lokr_w2_a": torch.randn(4, 4),
             "lokr_w2_b": torch.randn(4, 8), "alpha": torch.tensor(4.0)}  # fmt: skip
    tensors = {f"lora_transformer_{n}.{p}": t for n, ts in (("a", whole), ("b", shown))
               for p, t in ts.items()}  # fmt: skip
    delta = torch.kron(whole["lokr_w1"].double(), whole["lokr_w2"].double())
    exact = (base["a.weight"].double() + delta).numpy()
    said = onetrainers_settings("LOKR", None)
    got = merged(*write(tmp_path / "ot", base, tensors, said))["a.weight"]
    assert distance(got, exact) <= RELATIVE
    got = merged(*write(tmp_path / "other", base, tensors))["a.weight"]
    assert distance(got, exact) > 0.01


def test_onetrainer_without_eps_says_so(tmp_path):
    base, made = layers("in")
    base = {n: t * 1e-6 for n, t in base.items()}
    made = {n: {k: v * 1e-3 for k, v in t.items()} for n, t in made.items()}
    config = {"peft_type": "LORA", "lora_decompose": True, "lora_decompose_norm_epsilon": False}
    metadata = {"ot_revision": "abc", "ot_config": json.dumps(config)}
    got = merged(*write(tmp_path, base, named(made), metadata))
    assert_near(got, wanted(base, made, "in", eps=0.0))
    with_eps = wanted(base, made, "in")
    assert all(distance(got[key], exact) > 10 * RELATIVE for key, exact in with_eps.items())


@pytest.mark.parametrize("flat", [True, False], ids=["kohya's names", "paths"])
def test_fused_layers_that_onetrainer_may_have_left_undecomposed_are_told(flat, tmp_path):
    """Which version it was only ot_revision says, and a hash has no order."""
    shapes = {"double_blocks.0.img_attn.qkv": (24, 8), "double_blocks.0.img_attn.proj": (8, 8)}

    def doubts(dora, metadata, only=""):
        base, made = layers(dora, shapes=shapes)
        made = {n: t for n, t in made.items() if n.endswith(only)}
        prefix = "lora_unet_" if flat else "diffusion_model."
        paths = write(tmp_path / str(len(list(tmp_path.iterdir()))), base,
                      named(made, prefix, flat), metadata)  # fmt: skip
        if only != "proj":
            assert_near(merged(*paths), wanted(base, made, dora))
        return dora_export.load_adapter(paths[1]).doubts

    said = {"ot_revision": "c20e62e"}
    (told,) = doubts("in", said)
    assert re.search(r"fuses \(1 here, first .*img_attn.qkv\) as plain LoRA .*dora_scale out", told)
    assert doubts(None, said) == ()
    assert doubts("in", None) == ()
    assert doubts("in", said, only="proj") == ()


def test_lokr_of_onetrainer_has_its_eps_whatever_loras_settings_say(tmp_path):
    torch.manual_seed(9)
    W = torch.randn(16, 16) * 1e-7
    factors, delta = onetrainers("LOKR", W.shape)
    factors["lokr_w1"], delta = factors["lokr_w1"] * 1e-7, delta * 1e-7
    m = factors["dora_scale"] = W.norm(dim=1, keepdim=True) * 1.3
    tensors = {f"lora_transformer_to_q.{n}": t for n, t in factors.items()}
    said = onetrainers_settings("LOKR", "out")  # of LoRA: without an eps
    got = merged(*write(tmp_path, {"to_q.weight": W}, tensors, said))["to_q.weight"]
    V = W.double() + delta
    assert distance(got, onetrainers_weight(W.double(), delta, m.double(), True)) <= RELATIVE
    assert distance(got, m.double() * V / V.norm(dim=1, keepdim=True)) > 0.01


# --- metadata ---


def kohya(**arguments):
    return {"ss_network_module": "lycoris.kohya", "ss_network_args": json.dumps(arguments)}


CONTRADICTIONS = {
    "other algorithm": (kohya(algo="loha"), "says algo=loha, the tensors are LoRA"),
    "dylora": (kohya(algo="dylora"), "algo=dylora"),
    "unknown": (kohya(algo="ortho"), "algo=ortho, which is not supported"),
    "not decomposed": (kohya(dora_wd="False"), "not decomposed, but there is dora_scale"),
    "other axis": (kohya(dora_wd="True", wd_on_output="True"),
                   "says magnitudes count outputs, their shapes say inputs"),
    "OneTrainer's axis": (
        {"ot_revision": "x", "ot_config": json.dumps(
            {"peft_type": "LORA", "lora_decompose": True, "lora_decompose_output_axis": True})},
        "count outputs, their shapes say inputs"),
    "OneTrainer's LoRA": (
        {"ot_branch": "x", "ot_config": json.dumps({"peft_type": "LORA", "lora_decompose": False})},
        "not decomposed, but there is dora_scale"),
}  # fmt: skip


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_metadata_that_contradicts_the_tensors_is_refused(case, tmp_path):
    metadata, reason = CONTRADICTIONS[case]
    base, made = layers("in")
    message = refused(*write(tmp_path, base, named(made), metadata))
    assert reason in message
    assert "save them without metadata" in message


def test_lost_magnitudes_are_noticed_by_the_metadata(tmp_path):
    base, made = layers()
    message = refused(*write(tmp_path, base, named(made), kohya(algo="locon", dora_wd="True")))
    assert "decomposed (DoRA), but there is no dora_scale" in message
    said = kohya(algo="locon", dora_wd="True", bypass_mode="True")
    assert_near(merged(*write(tmp_path / "bypass", base, named(made), said)), wanted(base, made))


# Factors of a convolution with 24 outputs, 8 inputs and 3 x 3 kernels: 24 magnitudes may count
# outputs, or inputs of a layer with 1 x 3 kernels, unless the factors show the inputs apart.
KERNELS = {
    "LoKr, w2 whole": ({"lokr_w1": (2, 2), "lokr_w2": (12, 4, 3, 3)}, True),
    "LoKr, w1 in factors": (
        {"lokr_w1_a": (2, R), "lokr_w1_b": (R, 2), "lokr_w2": (12, 4, 3, 3)}, True),
    "LoKr, a core": ({"lokr_w1": (2, 2), "lokr_t2": (R, R, 3, 3), "lokr_w2_a": (R, 12),
                      "lokr_w2_b": (R, 4)}, True),
    "LoKr, flattened": ({"lokr_w1": (2, 2), "lokr_w2_a": (12, R), "lokr_w2_b": (R, 36)}, False),
    "LoHa, a core": ({f"hada_{n}": s for i in "12" for n, s in (
        (f"t{i}", (R, R, 3, 3)), (f"w{i}_a", (R, 24)), (f"w{i}_b", (R, 8)))}, True),
    "LoHa, flattened": ({f"hada_{n}": s for i in "12" for n, s in (
        (f"w{i}_a", (24, R)), (f"w{i}_b", (R, 72)))}, False),
}  # fmt: skip


@pytest.mark.parametrize("case", KERNELS)
def test_flat_magnitudes_of_a_kernel_are_told_by_factors_that_show_the_inputs(case, tmp_path):
    shapes, shown = KERNELS[case]
    tensors = {f"lora_unet_c.{n}": torch.ones(s) for n, s in shapes.items()}
    file = tmp_path / "adapter.safetensors"
    save_file(tensors | {"lora_unet_c.dora_scale": torch.ones(24)}, file)
    if shown:
        assert "out, by the length of dora_scale" in inspected(file)
    else:
        said = small.run("inspect", file)
        assert (said.exit_code, "Pass --axis out or --axis in" in said.stderr) == (2, True)


def test_alpha_of_two_whole_kronecker_factors_may_have_overflowed(tmp_path):
    """It is the rank that was asked for, and a huge one is how whole factors are asked for."""
    torch.manual_seed(4)
    W, one, two = torch.randn(16, 16) * 0.2, torch.randn(4, 2), torch.randn(4, 8)
    tensors = {"lora_unet_q.lokr_w1": one, "lora_unet_q.lokr_w2": two,
               "lora_unet_q.alpha": torch.tensor(1e10).half()}  # fmt: skip
    paths = write(tmp_path, {"q.weight": W}, tensors)
    assert_near(merged(*paths), {"q.weight": oracle.float64(W + torch.kron(one, two))})
    assert "'lora_unet_q.alpha' ignored: two whole factors are not scaled" in inspected(paths[1])


def test_metadata_that_agrees_or_cannot_be_read_changes_nothing(tmp_path):
    base, made = layers("in")
    agreeing = kohya(algo="lora", dora_wd="True", wd_on_output="False", rs_lora="False")
    for i, said in enumerate([agreeing, {"ss_network_args": "{broken"}, {"ss_network_args": "[]"}]):
        paths = write(tmp_path / str(i), base, named(made), said)
        assert_near(merged(*paths), wanted(base, made, "in"))
    assert "LyCORIS in kohya sd-scripts" in inspected(tmp_path / "0/adapter.safetensors")


@pytest.mark.parametrize(
    ("said", "eps"),
    [({"ss_full_bf16": "True", "ss_full_fp16": "False"}, 2.0**-7),
     ({"ss_full_bf16": "False", "ss_full_fp16": "False"}, 2.0**-23),
     ({"ss_mixed_precision": "fp16", "ss_full_fp16": "False"}, 2.0**-23),
     ({"ss_mixed_precision": "no", "ss_full_fp16": "False"}, 2.0**-23)],
)  # fmt: skip
def test_metadata_tells_the_type_trained_in(said, eps, tmp_path):
    base, made = layers("out")
    made = {n: {k: v.bfloat16() for k, v in t.items()} for n, t in made.items()}
    got = merged(*write(tmp_path, base, named(made), kohya(algo="lora") | said))
    assert_near(got, wanted(base, made, "out", eps=eps))
    other = wanted(base, made, "out", eps=2.0**-30 if eps > 1e-3 else 2.0**-7)
    assert all(distance(got[key], exact) > 10 * RELATIVE for key, exact in other.items())


def test_metadata_that_leaves_the_type_open_is_no_answer(tmp_path):
    """sd-scripts does not write full_bf16 down, which goes with mixed precision in bf16."""
    base, made = layers("out")
    made = {n: {k: v.bfloat16() for k, v in t.items()} for n, t in made.items()}
    for i, said in enumerate([{"ss_mixed_precision": "bf16", "ss_full_fp16": "False"}, {}]):
        paths = write(tmp_path / str(i), base, named(made), kohya(algo="lora") | said)
        message = refused(*paths)
        assert "0.0078 if that was BF16, 1.2e-07 if it was F32" in message
        assert "Pass --trained-in bf16" in message
        assert_near(merged(*paths, "--trained-in", "fp32"), wanted(base, made, "out"))


def test_what_all_layers_lack_is_no_doubt_and_what_is_left_out_is_named(tmp_path):
    _, made = layers()
    file = tmp_path / "lora.safetensors"
    for alpha in (ALPHA, None):
        save_file(named(made, alpha=alpha), file)
        assert dora_export.load_adapter(file).doubts == ()
    save_file(named(made) | {"bundle_emb.a.clip_l": torch.ones(2, 4)}, file)
    adapter = dora_export.load_adapter(file)
    assert adapter.doubts == ("1 embeddings are saved along; they are not merged",)
    assert adapter.files == (file,)


SPLIT = {"ss_network_module": "networks.lora_flux",
         "ss_network_args": json.dumps({"split_qkv": "True"})}  # fmt: skip
# Flux' fused layers -> rows of what is trained apart.
FUSED = {"double_blocks.0.img_attn.qkv": (8, 8, 8), "double_blocks.1.txt_attn.qkv": (8, 8, 8),
         "single_blocks.0.linear1": (8, 8, 8, 32)}  # fmt: skip


def split_layers():
    """Per layer the factors as sd-scripts saves them, and the merged weight by its forward."""
    torch.manual_seed(0)
    base, made, exact = {}, {}, {}
    for name, rows in {**FUSED, "single_blocks.0.linear2": (8,)}.items():
        W = torch.randn(sum(rows), 8) * 0.2
        pairs = [(torch.randn(R, 8) * 0.3, torch.randn(n, R) * 0.3) for n in rows]
        base[f"{name}.weight"] = W
        made[name] = {"down": torch.cat([A for A, _ in pairs]),
                      "up": torch.block_diag(*(B for _, B in pairs))}  # fmt: skip
        parts = W.split(rows)
        exact[f"{name}.weight"] = np.concatenate([
            oracle.lora(*map(oracle.float64, (part, A, B)), ALPHA / R)
            for part, (A, B) in zip(parts, pairs, strict=True)
        ])  # fmt: skip
    return base, made, exact


def test_fused_layers_trained_as_several_have_the_rank_of_one(tmp_path):
    base, made, exact = split_layers()
    assert_near(merged(*write(tmp_path, base, named(made), SPLIT)), exact)
    by_all = wanted(base, made, scaling=ALPHA / (3 * R))
    assert all(np.abs(by_all[f"{n}.weight"] - exact[f"{n}.weight"]).max() > 0.1 for n in FUSED)


@pytest.mark.parametrize("module", ["lycoris.kohya", None])
def test_fused_layers_that_no_trainer_split_have_their_own_rank(module, tmp_path):
    base, made, _ = split_layers()
    said = {**SPLIT, "ss_network_module": module} if module else None
    got = merged(*write(tmp_path, base, named(made), said))
    for name, t in made.items():
        alone = wanted({f"{name}.weight": base[f"{name}.weight"]}, {name: t},
                       scaling=ALPHA / t["down"].shape[0])  # fmt: skip
        assert_near(got, alone)


@pytest.mark.parametrize("name", FUSED)
def test_fused_layers_that_were_trained_on_as_one_are_refused(name, tmp_path):
    base, made, _ = split_layers()
    n = len(FUSED[name])
    for row, column in ((0, R), (-1, 0)):  # of the first part in the second's, the last's
        mixed = {k: {p: x.clone() for p, x in t.items()} for k, t in made.items()}
        mixed[name]["up"][row, column] = 1e-30
        message = refused(*write(tmp_path, base, named(mixed), SPLIT))
        assert f"lora_up mixes the {n} layers" in message
        assert f"with alpha times {n} for the second" in message


@pytest.mark.parametrize("change", ["rank", "rows", "dora_scale", "mid"])
def test_fused_layers_that_cannot_be_several_are_refused(change, tmp_path):
    base, made, _ = split_layers()
    name = "double_blocks.0.img_attn.qkv"
    up, down = made[name]["up"], made[name]["down"]
    made[name] |= {
        "rank": {"up": up[:, :-1].contiguous(), "down": down[:-1]},
        "rows": {"up": up[:-1]},
        "dora_scale": {"dora_scale": torch.ones(24, 1)},
        "mid": {},
    }[change]
    tensors = named(made)
    if change == "mid":
        tensors["lora_unet_double_blocks_0_img_attn_qkv.lora_mid.weight"] = torch.ones(6, 6, 1)
    message = refused(*write(tmp_path, base, tensors, SPLIT))
    assert "is not that of 3 layers of one rank" in message


@pytest.mark.parametrize("part", ["diff", "w_norm", "set_weight", "diff_b"])
def test_alpha_beside_what_is_not_scaled_is_named_and_left(part, tmp_path):
    held = {f"lora_unet_n.{part}": torch.ones(4), "lora_unet_n.alpha": torch.tensor(3.0)}
    save_file(held, tmp_path / "lora.safetensors")
    found = dora_export.load_adapter(tmp_path / "lora.safetensors", adapter_format="lycoris")
    assert set(found.ignored) == {"lora_unet_n.alpha"}
    (update,) = found.updates
    assert (update.scaling, update.source_keys) == (1.0, (f"lora_unet_n.{part}",))


W1, W2 = {"lokr_w1_a": (2, 3), "lokr_w1_b": (3, 2)}, {"lokr_w2_a": (8, 5), "lokr_w2_b": (5, 4)}


@pytest.mark.parametrize(
    ("shapes", "rank"),
    [({**W1, **W2}, 5), ({"lokr_w1": (2, 2), **W2}, 5), ({**W1, "lokr_w2": (8, 4)}, 3)],
    ids=["both", "second", "first"],
)
def test_rank_of_kronecker_factors_is_the_seconds_where_it_has_one(shapes, rank, tmp_path):
    save_file({**{f"lora_unet_n.{n}": torch.ones(s) for n, s in shapes.items()},
               "lora_unet_n.alpha": torch.tensor(3.0)}, tmp_path / "lora.safetensors")  # fmt: skip
    (update,) = dora_export.load_adapter(tmp_path / "lora.safetensors").updates
    assert update.scaling == 3 / rank


@pytest.mark.parametrize(
    ("alpha", "scaling"),
    [(torch.tensor(3**1.5), 3**0.5), (torch.tensor(3**1.5, dtype=torch.bfloat16), 3**0.5),
     (torch.tensor(5.9), None), (torch.tensor(-5.2), None), (torch.tensor(-1.0), None)],
    ids=str,
)  # fmt: skip
def test_root_of_the_rank_is_taken_from_an_alpha_that_is_one_times_its_root(
    alpha, scaling, tmp_path
):
    """Of rs_lora, on LoKr with whole factors; alpha may be rounded to 16 bits."""
    held = {"lora_unet_n.lokr_w1": torch.ones(2, 2), "lora_unet_n.lokr_w2": torch.ones(3, 3)}
    file = tmp_path / "lora.safetensors"
    save_file({**held, "lora_unet_n.alpha": alpha}, file, kohya(algo="lokr", rs_lora="True"))
    if scaling is None:
        with pytest.raises(AdapterError, match=r"is neither a rank nor, as with rs_lora, a rank"):
            dora_export.load_adapter(file)
    else:
        (update,) = dora_export.load_adapter(file).updates
        assert update.scaling == pytest.approx(scaling, rel=1e-12)


# --- refusals ---


Q = "lora_unet_blocks_0_to_q"
BROKEN = {
    "up missing": (lambda t: t.pop(f"{Q}.lora_up.weight"), "lora_up missing"),
    "ranks differ": (lambda t: t.update({f"{Q}.lora_up.weight": torch.ones(16, 5)}),
                     "expected lora_up (out, rank)"),
    "no rank": (lambda t: t.update({f"{Q}.lora_up.weight": torch.ones(16, 0),
                                    f"{Q}.lora_down.weight": torch.ones(0, 16)}), "(16, 0)"),
    "alpha of two": (lambda t: t.update({f"{Q}.alpha": torch.ones(2)}), "expected one number"),
    "alpha infinite": (lambda t: t.update({f"{Q}.alpha": torch.tensor(float("inf"))}),
                       "alpha is inf"),
    "scale of neither": (lambda t: t.update({f"{Q}.dora_scale": torch.ones(5, 1)}),
                         "the file does not belong together"),
    "scale of both": (lambda t: t.update({f"{Q}.dora_scale": torch.ones(16, 16)}),
                      "the file does not belong together"),
    "scale without a weight": (
        lambda t: [t.pop(f"{Q}.lora_{p}.weight") for p in ("up", "down")] and t.pop(f"{Q}.alpha"),
        "dora_scale without anything that it belongs to"),
    "two algorithms": (lambda t: t.update({f"{Q}.diff": torch.ones(16, 16)}),
                       "holds LoRA and full"),
    "two spellings": (lambda t: t.update({f"{Q}.lora_B.weight": torch.ones(16, R)}), "there twice"),
    "norm with magnitudes": (
        lambda t: t.update({"lora_unet_n.w_norm": torch.ones(4), "lora_unet_n.dora_scale":
                            torch.ones(4)}), "dora_scale beside w_norm has no meaning"),
    "magnitudes beside a bias alone": (
        lambda t: t.update({"lora_unet_n.diff_b": torch.ones(4), "lora_unet_n.dora_scale":
                            torch.ones(4, 1)}), "n: dora_scale without a weight"),
    "a whole weight with magnitudes": (
        lambda t: t.update({"lora_unet_n.set_weight": torch.ones(4, 4), "lora_unet_n.dora_scale":
                            torch.ones(4, 1)}), "dora_scale beside set_weight has no meaning"),
    "a difference of one dimension with magnitudes": (
        lambda t: t.update({"lora_unet_n.diff": torch.ones(4), "lora_unet_n.dora_scale":
                            torch.ones(4, 1)}), "dora_scale beside diff has no meaning"),
    "two biases": (lambda t: t.update({f"{Q}.diff_b": torch.ones(16), f"{Q}.b_norm":
                                       torch.ones(16)}), "holds diff_b and b_norm"),
    "alpha of bytes": (lambda t: t.update({f"{Q}.alpha": torch.ones((), dtype=torch.uint8)}),
                       "expected one number"),
    "magnitudes of nothing": (lambda t: t.update({f"{Q}.dora_scale": torch.ones(())}),
                              "the file does not belong together"),
    "unknown": (lambda t: t.update({f"{Q}.shift": torch.ones(3)}), "tensors of unknown meaning"),
    "half of LoHa": (lambda t: t.update({"lora_unet_h.hada_w1_a": torch.ones(4, 2)}),
                     "hada_w1_b, hada_w2_a, hada_w2_b missing"),
    "half of LoKr": (lambda t: t.update({"lora_unet_h.lokr_w1": torch.ones(4, 2)}),
                     "lokr_w2_a, lokr_w2_b missing"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_broken_file_is_refused(case, tmp_path):
    change, reason = BROKEN[case]
    base, made = layers("out")
    tensors = named(made)
    change(tensors)
    assert reason in refused(*write(tmp_path, base, tensors))


NAMED = {
    "GLoRA": "a1.weight", "IA3": "on_input", "OFT or BOFT": "oft_blocks", "OFT": "oft_diag",
    "T-LoRA": "lambda_layer", "LoKr with a core on its first factor": "lokr_t1",
    "a resized layer": "reshape_weight",
}  # fmt: skip


@pytest.mark.parametrize("algorithm", NAMED)
def test_other_algorithms_are_refused_by_name(algorithm, tmp_path):
    base, made = layers()
    tensors = named(made) | {f"{Q}.{NAMED[algorithm]}": torch.ones(4, 4)}
    message = refused(*write(tmp_path, base, tensors))
    assert f"{algorithm}: " in message
    assert "trainer's own tool" in message


@pytest.mark.parametrize("ending", ["oft_R.weight", "oft_R.scaled_oft", "oft_blocks", "oft_diag",
                                    "lokr_t1", "lambda_layer", "on_input"])  # fmt: skip
def test_file_of_such_an_algorithm_alone_is_refused_by_name_too(ending, tmp_path):
    """Under paths, which no prefix of kohya's tells."""
    save_file({f"transformer.b.0.{ending}": torch.ones(4, 4)}, tmp_path / "a.safetensors")
    said = small.run("inspect", tmp_path / "a.safetensors")
    assert said.exit_code == 2
    assert "not supported:" in said.stderr
    assert "trainer's own tool" in said.stderr


def test_options_that_the_file_answers_are_refused(tmp_path):
    base, made = layers("out")
    paths = write(tmp_path, base, named(made))
    assert "alpha is in the file. Leave --alpha out" in refused(*paths, "--alpha", "2")
    with pytest.raises(AdapterError, match="--trained-in int8: unknown"):
        dora_export.load_adapter(paths[1], trained_in="int8")


@pytest.mark.parametrize("alpha", [0.0, float("inf"), float("nan")])
def test_alpha_of_the_user_that_is_no_factor_is_refused(alpha, tmp_path):
    _, made = layers()
    save_file(named(made, alpha=None), tmp_path / "lora.safetensors")
    with pytest.raises(AdapterError, match="expected a finite number other than 0"):
        dora_export.load_adapter(tmp_path / "lora.safetensors", alpha=alpha)


def test_embeddings_saved_along_are_named_and_left(tmp_path):
    base, made = layers("in")
    tensors = named(made) | {"bundle_emb.mine.string_to_param": torch.ones(2, 8)}
    paths = write(tmp_path, base, tensors)
    assert_near(merged(*paths), wanted(base, made, "in"))
    assert "'bundle_emb.mine.string_to_param' ignored: an embedding" in inspected(paths[1])


def test_layers_that_lack_what_others_have_are_counted(tmp_path):
    base, made = layers("in")
    del made["to_q"]["dora_scale"]
    tensors = named(made)
    del tensors["lora_unet_blocks_0_proj_in.alpha"]
    report = dora_export.merge(*write(tmp_path, base, tensors), dry_run=True)
    assert any("1 of 3 layers have no dora_scale" in w for w in report.warnings)
    assert any("1 of 3 layers have no alpha" in w for w in report.warnings)
    whole = dora_export.merge(*write(tmp_path / "whole", *_named(layers("in"))), dry_run=True)
    assert whole.warnings == ()


def test_layer_without_a_bias_refuses_one(tmp_path):
    base, made = layers()
    tensors = named(made) | {f"{Q}.diff_b": torch.ones(16)}
    message = refused(*write(tmp_path, base, tensors))
    assert "blocks.0.to_q.bias: not in the base; the layer has no bias to add to" in message


@pytest.fixture(scope="module")
def good_files():
    cases = [("locon tucker", "in"), ("loha", "out"), ("loha tucker", None), ("lokr both", "in"),
             ("lokr tucker", "out"), ("lokr whole", None)]  # fmt: skip
    return [models.state(models.attach(models.net(), *case)) for case in cases]


DIMENSIONS = st.lists(st.sampled_from([0, 1, 2, 3, 36]), max_size=5)
CORRUPTIONS = {
    "removed": lambda t, shape: None,
    "shape": lambda t, shape: torch.ones(shape),
    "flat": lambda t, shape: t.flatten(),
    "type": lambda t, shape: t.to(torch.int64),
    "turned": lambda t, shape: t.transpose(0, -1).contiguous() if t.ndim else t,
    "empty": lambda t, shape: t[:0] if t.ndim else t,
}


@settings(max_examples=80, deadline=None, derandomize=True,
          suppress_health_check=[HealthCheck.function_scoped_fixture])  # fmt: skip
@given(data=st.data())
def test_corrupted_files_are_refused_or_fit_but_raise_nothing_else(good_files, tmp_path, data):
    tensors = dict(data.draw(st.sampled_from(good_files)))
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(sorted(tensors)))
        kind = data.draw(st.sampled_from(sorted(CORRUPTIONS)))
        changed = CORRUPTIONS[kind](tensors.pop(name), data.draw(DIMENSIONS))
        if changed is not None:
            tensors[name] = changed.clone()
    save_file(tensors, tmp_path / "adapter.safetensors")
    if not (tmp_path / "base").exists():
        models.write(tmp_path, models.net(), tensors)
    base = open_checkpoint(tmp_path / "base")
    try:
        adapter = read_adapter(tmp_path / "adapter.safetensors", ReadOptions())
        plan = plan_merge(base, adapter, Settings())
    except DoraExportError:
        return
    used = {key for step in plan.steps for key in step.consumes}
    assert used == set(tensors) - set(adapter.ignored)


def test_a_damaged_file_is_an_input_error(tmp_path):
    _, made = layers()
    path = tmp_path / "x.safetensors"
    save_file(named(made), path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(InputError):
        read_adapter(path, ReadOptions())
