"""LyCORIS' algorithms against the forward of LyCORIS' own modules, trained, on every kind of layer.

Each fixture is made by LyCORIS here and now; the reference is what its forward multiplies inputs
by, in float64. alpha is not the rank; layers are square and not.
"""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import dora_export
from dora_export.errors import AdapterError
from tests import lycoris_models as models
from tests import oracle
from tests.trainers import RELATIVE, distance, merged

DORA = [None, "out", "in"]
EPS = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


def far(got, want):
    """Whether a stored weight is outside of the tolerance around a formula's result."""
    if got.dtype is torch.float32:
        return distance(got.flatten(1), want.reshape(len(want), -1)) > 10 * RELATIVE
    return oracle.ulps(got, want) > 2


def near(got, want):
    if got.dtype is torch.float32:
        size = np.abs(want).max() * 1e-9  # for rows of zeros
        got, want = oracle.float64(got.flatten(1)), want.reshape(len(want), -1)
        row = np.maximum(np.abs(want).max(axis=1, keepdims=True), size)
        return bool((np.abs(got - want) <= RELATIVE * row).all())
    return oracle.ulps(got, want) <= 1


def norm(V, axis):
    """Norms over all dimensions but outputs, or all but inputs; kept for broadcasting."""
    kept = 0 if axis == "out" else 1
    over = tuple(i for i in range(V.ndim) if i != kept)
    return np.sqrt((V * V).sum(axis=over, keepdims=True))


def wrong_formulas(module, dora):
    """Results of formulas that others use or that a mistake would give; all must be far."""
    W, D = oracle.float64(module.org_module[0].weight), oracle.float64(models.delta(module))
    found = {"not applied": W, "scaled twice": W + module.scale * D}
    if dora is None:
        return found
    m = oracle.float64(module.dora_scale)
    V, V2 = W + D, W + module.scale * D
    found = {"not applied": W, "plain LoRA": V, "scaled twice": m * V2 / norm(V2, dora)}
    found["norm of the base alone (ComfyUI)"] = m * V / norm(W, dora)
    if W.shape[0] == W.shape[1]:
        other = "in" if dora == "out" else "out"
        found["other axis"] = np.swapaxes(m, 0, 1) * V / norm(V, other)
    if W[0, 0].size > 1 and dora == "in":
        found["norm without the kernel"] = m * V / np.sqrt((V * V).sum(axis=0, keepdims=True))
    return found


def merge(folder, modules, model, dtype=torch.float32, **options):
    saved = options.pop("saved", None)
    base, adapter = models.write(folder, model, models.state(modules, dtype=saved), dtype)
    report = dora_export.merge(base, adapter, folder / "out", threads=1, verify="full", **options)
    return report, load_file(folder / "out/model.safetensors")


# What scalars and rs_lora change is the scaling alone: one type of base does for them.
BASES = [(case, dtype) for dtype in (torch.float32, torch.bfloat16) for case in models.CASES
         if dtype is torch.float32 or not case.endswith(("scalar", "rs"))]  # fmt: skip


@pytest.mark.parametrize("dora", DORA)
@pytest.mark.parametrize(("case", "dtype"), BASES, ids=str)
def test_merged_weight_is_the_one_that_the_forward_uses(case, dora, dtype, tmp_path):
    model = models.net(dtype)
    modules = models.attach(model, case, dora)
    keys = {key for m in modules.values() for key in m.state_dict()}
    assert models.CASES[case][2] <= keys
    _, got = merge(tmp_path, modules, model, dtype)
    for name, module in modules.items():
        weight = got[f"{name}.weight"]
        assert weight.dtype is dtype
        assert near(weight, oracle.float64(models.used_weight(module))), name
        for wrong, formula in wrong_formulas(module, dora).items():
            same = wrong == "scaled twice" and module.scale == 1
            assert same or far(weight, formula), (name, wrong)


@pytest.mark.parametrize("dora", DORA)
@pytest.mark.parametrize("case", ["locon", "loha", "lokr both"])
def test_float16_bases_and_the_forward_in_the_trainers_own_precision(case, dora, tmp_path):
    model = models.net(torch.float16)
    modules = models.attach(model, case, dora)
    _, got = merge(tmp_path, modules, model, torch.float16)
    for name, module in modules.items():
        assert near(got[f"{name}.weight"], oracle.float64(models.used_weight(module))), name
    _, got = merge(tmp_path / "fp32", modules, model)
    for name, module in modules.items():
        used = oracle.float64(models.used_weight(module, torch.float32))
        assert distance(got[f"{name}.weight"].flatten(1), used.reshape(len(used), -1)) <= 5e-6


@pytest.mark.parametrize("dora", ["out", "in"])
@pytest.mark.parametrize("trained", [torch.bfloat16, torch.float16], ids=str)
def test_eps_is_that_of_the_type_trained_in(trained, dora, tmp_path):
    model = models.net()
    modules = models.attach(model, "locon", dora, dtype=trained)
    word = "bf16" if trained is torch.bfloat16 else "fp16"
    with pytest.raises(AdapterError, match=rf"--trained-in {word} .*or --trained-in fp32"):
        merge(tmp_path / "asked", modules, model, saved=trained)
    _, got = merge(tmp_path, modules, model, saved=trained, trained_in=word)
    for name, module in modules.items():
        exact = oracle.float64(models.used_weight(module, eps=trained))
        without = oracle.float64(models.used_weight(module, eps=torch.float32))
        assert near(got[f"{name}.weight"], exact), name
        assert far(got[f"{name}.weight"], without), name
    _, got = merge(tmp_path / "told", modules, model, saved=trained, trained_in="fp32")
    for name, module in modules.items():
        assert near(got[f"{name}.weight"], oracle.float64(models.used_weight(module))), name


def test_eps_is_added_to_the_norm_and_matters_for_small_ones(tmp_path):
    """With norms of 1e-5, float32's eps is a hundredth: neither left out nor under the root."""
    model = models.net()
    with torch.no_grad():
        for layer in (model.get_submodule(n) for n in models.LAYERS):
            layer.weight.mul_(1e-5 / layer.weight.flatten(1).norm(dim=1).max())
    modules = models.attach(model, "locon", "out")
    with torch.no_grad():
        for module in modules.values():
            module.lora_up.weight.mul_(1e-6)
    _, got = merge(tmp_path, modules, model)
    for name, module in modules.items():
        weight, used = got[f"{name}.weight"], oracle.float64(models.used_weight(module))
        V = oracle.float64(module.org_module[0].weight) + oracle.float64(models.delta(module))
        m = oracle.float64(module.dora_scale)
        assert near(weight, used)
        assert far(weight, m * V / norm(V, "out"))
        assert far(weight, m * V / np.sqrt(norm(V, "out") ** 2 + EPS[torch.float32]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dora", ["out", "in"])
def test_lines_of_zeros_stay_zero_since_eps_defines_them(dora, dtype, tmp_path):
    model = models.net(dtype)
    dead = {}
    for name in models.LAYERS:
        weight = model.get_submodule(name).weight.detach()
        dead[name] = (weight if dora == "out" else weight.transpose(0, 1))[3]
        dead[name].zero_()
    modules = models.attach(model, "locon", dora)
    with torch.no_grad():
        for module in modules.values():
            (module.lora_up.weight if dora == "out" else module.lora_down.weight[:, 3])[
                3 if dora == "out" else ...
            ] = 0
            module.dora_scale.add_(0.1)
    _, got = merge(tmp_path, modules, model, dtype)
    for name, module in modules.items():
        weight = got[f"{name}.weight"]
        line = (weight if dora == "out" else weight.transpose(0, 1))[3]
        assert not line.any()
        used = oracle.float64(models.used_weight(module))
        assert near(weight, used), name


def test_whole_differences_biases_and_norms(tmp_path):
    model = models.net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules = models.attach_whole(model)
    base, adapter = models.write(tmp_path, before, models.state(modules))
    got = merged(base, adapter, tmp_path / "out")
    changed = set()
    for name, module in modules.items():
        for part, trained in zip(("weight", "bias"), module.make_weight(), strict=True):
            if trained is not None:
                changed.add(f"{name}.{part}")
                value = got[f"{name}.{part}"]
                assert distance(value.flatten(), oracle.float64(trained).ravel()) <= RELATIVE
                assert (
                    distance(value.flatten(), oracle.float64(before[f"{name}.{part}"]).ravel())
                    > 0.1
                )
    assert len(changed) == 7  # one of the two convolutions has no bias
    for name, tensor in before.items():
        assert name in changed or torch.equal(got[name], tensor), name


@pytest.mark.parametrize("dora", ["out", "in"])
def test_whole_differences_can_have_magnitudes_as_every_update(dora, tmp_path):
    model = models.net()
    modules = models.attach(model, "locon", dora)
    tensors = models.state(modules)
    for name, module in modules.items():
        flat = f"lora_unet_{name.replace('.', '_')}"
        for key in ("lora_up.weight", "lora_down.weight", "alpha"):
            del tensors[f"{flat}.{key}"]
        tensors[f"{flat}.diff"] = models.delta(module).float()
    base, adapter = models.write(tmp_path, model, tensors)
    got = merged(base, adapter, tmp_path / "out")
    for name, module in modules.items():
        used = oracle.float64(models.used_weight(module))
        assert distance(got[f"{name}.weight"].flatten(1), used.reshape(len(used), -1)) <= RELATIVE


def test_weights_set_whole_replace_the_base(tmp_path):
    model = models.net()
    value = torch.randn(36, 36)
    base, adapter = models.write(tmp_path, model, {"lora_unet_down_blocks_1.set_weight": value})
    got = merged(base, adapter, tmp_path / "out")
    assert torch.equal(got["down_blocks.1.weight"], value)
    assert torch.equal(got["down_blocks.0.weight"], model.down_blocks[0].weight)


@pytest.mark.parametrize("metadata", [None, "said"])
def test_whole_kronecker_factors_are_scaled_by_one_or_by_the_root_of_rs_lora(metadata, tmp_path):
    """alpha of such a layer is the rank, or the rank times its root; 4 ** 1.5 is a whole number."""
    model = models.net()
    layer = model.get_submodule("down_blocks.0")
    for rank, rs in [(3, False), (3, True), (4, False), (4, True)]:
        module = models.train(models.LokrModule(
            "m", layer, 1.0, rank, 9.0, full_matrix=True, rs_lora=rs))  # fmt: skip
        said = {"ss_network_args": f'{{"algo": "lokr", "rs_lora": "{rs}"}}'} if metadata else None
        if rank == 4 and rs and not metadata:
            continue  # alpha 8: as good a rank as any
        folder = tmp_path / f"{rank}{rs}"
        tensors = models.state({"down_blocks.0": module})
        base, adapter = models.write(folder, model, tensors, metadata=said)
        got = merged(base, adapter, folder / "out")["down_blocks.0.weight"]
        assert distance(got, oracle.float64(models.used_weight(module))) <= RELATIVE
        assert module.scale == pytest.approx(rank**0.5 if rs else 1)


def test_other_layers_tell_the_rank_of_whole_kronecker_factors(tmp_path):
    model = models.net()
    modules = {
        name: models.train(models.LokrModule(
            "m", model.get_submodule(name), 1.0, 4, 9.0, rs_lora=True, factor=factor))
        for name, factor in [("down_blocks.0", 2), ("down_blocks.1", -1)]
    }  # fmt: skip
    keys = [set(m.state_dict()) for m in modules.values()]
    assert "lokr_w2_a" in keys[0]
    assert "lokr_w2" in keys[1]
    _, got = merge(tmp_path, modules, model)
    for name, module in modules.items():
        used = oracle.float64(models.used_weight(module))
        assert distance(got[f"{name}.weight"], used) <= RELATIVE


@pytest.mark.parametrize("case", ["locon tucker", "loha", "lokr"])
def test_alpha_that_is_missing_or_zero_is_the_rank(case, tmp_path):
    model = models.net()
    modules = models.attach(model, case, "out")
    tensors = models.state(modules)
    with torch.no_grad():
        for module in modules.values():
            module.scale = 1.0
    for kind in ("missing", "zero"):
        changed = {
            k: torch.zeros(()) if k.endswith(".alpha") else t
            for k, t in tensors.items() if kind == "zero" or not k.endswith(".alpha")
        }  # fmt: skip
        base, adapter = models.write(tmp_path / kind, model, changed)
        got = merged(base, adapter, tmp_path / kind / "out")
        for name, module in modules.items():
            used = oracle.float64(models.used_weight(module)).reshape(
                len(got[f"{name}.weight"]), -1
            )
            assert distance(got[f"{name}.weight"].flatten(1), used) <= RELATIVE, name


def test_verify_knows_the_merge_right_and_a_wrong_one_wrong(tmp_path):
    model = models.net(torch.bfloat16)
    modules = models.attach(model, "lokr tucker", "in")
    merge(tmp_path, modules, model, torch.bfloat16)
    paths = tmp_path / "base", tmp_path / "adapter.safetensors", tmp_path / "out"
    assert dora_export.verify(*paths, threads=1).exit_code == 0
    stored = load_file(paths[2] / "model.safetensors")
    module = modules["mid_block.conv_3"]
    plain = module.org_module[0].weight + models.delta(module)  # LoRA for DoRA
    stored["mid_block.conv_3.weight"] = plain.detach().to(torch.bfloat16)
    save_file(stored, paths[2] / "model.safetensors", {"format": "pt"})
    report = dora_export.verify(*paths, threads=1)
    assert report.exit_code == 1
    assert [t.name for t in report.tensors if t.status == "wrong"] == ["mid_block.conv_3.weight"]
