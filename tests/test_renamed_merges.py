"""Merged folders under another age's names: paired by the tables, compared byte for byte.

The other names are transformers' own: each merge is loaded and saved anew by the model's class.
"""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import dora_export
from dora_export.verification.base_names import under_base_names
from dora_export.verification.subject import open_subject
from tests import test_conventions
from tests.small import edit_tensors, write_adapter, write_base, write_shards
from tests.test_conventions import prepare
from tests.test_ledger import flip

pytestmark = test_conventions.pytestmark

KINDS = ["llava", *(pytest.param(k, marks=pytest.mark.nightly) for k in (
    "llava_next", "gemma3", "paligemma", "mistral3", "internvl", "got_ocr2", "qwen2_vl",
    "qwen2_5_vl", "gpt_neox", "nemotron_h"))]  # fmt: skip
LAYER = "language_model.model.layers.{}.q_proj.weight"
TOWER = "vision_tower.layers.{}.fc.weight"


def wrong(report):
    return sorted((f.code, f.where) for f in report.findings if f.severity == "wrong")


@pytest.mark.parametrize(
    "original",
    [True, pytest.param(False, marks=pytest.mark.nightly)],
    ids=["base of the checkpoint's names", "base of the class's names"],
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_merge_saved_under_the_other_names_is_right(kind, original, tmp_path):
    case = prepare(tmp_path, kind, original)
    merged = tmp_path / "merged"
    dora_export.merge(case.base, case.adapter, tmp_path / "ours", verify="none")
    # A model is saved under the checkpoint's names if it was loaded from them.
    model = case.model_class.from_pretrained(tmp_path / "names True")
    model.load_state_dict(case.model_class.from_pretrained(tmp_path / "ours").state_dict())
    model.save_pretrained(merged, save_original_format=not original)
    report = dora_export.verify(case.base, case.adapter, merged)
    notes = [f for f in report.findings if f.code == "names-renamed"]
    assert (report.exit_code, len(notes), wrong(report)) == (0, 1, [])
    ours = load_file(tmp_path / "ours" / "model.safetensors")
    theirs = load_file(merged / "model.safetensors")
    assert notes[0].what.startswith(f"{len(ours.keys() - theirs.keys())} tensors")
    assert {t.name for t in report.tensors} <= ours.keys()


def pair(folder, *, shards=False):
    """A base with old names of a multimodal model, an adapter, and a merge with new ones."""
    make = torch.Generator().manual_seed(5)

    def random(*shape):
        return torch.randn(shape, generator=make) * 0.2

    base = {LAYER.format(i): random(20, 12) for i in range(3)}
    base |= {TOWER.format(i): random(8, 8) for i in range(2)}
    base |= {"language_model.lm_head.weight": random(30, 12),
             "multi_modal_projector.linear_1.weight": random(12, 8)}  # fmt: skip
    adapter = {}
    for i in range(3):
        prefix = f"base_model.model.{LAYER.format(i).removesuffix('.weight')}"
        m = base[LAYER.format(i)].norm(dim=1) * (0.8 + 0.4 * torch.rand(20, generator=make))
        adapter |= {f"{prefix}.lora_A.weight": random(3, 12),
                    f"{prefix}.lora_B.weight": random(20, 3),
                    f"{prefix}.lora_magnitude_vector": m}  # fmt: skip
    config = {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava"}
    (write_shards if shards else write_base)(folder / "base", base, config=config)
    write_adapter(folder / "adapter", adapter, target_modules=["q_proj"])
    dora_export.merge(folder / "base", folder / "adapter", folder / "ours", verify="none")
    tensors = {}
    for file in sorted((folder / "ours").glob("*.safetensors")):
        tensors |= load_file(file)
    merged = folder / "merged"
    shutil.copytree(folder / "ours", merged, ignore=shutil.ignore_patterns("dora_export.json"))
    renamed = {new_name(n): t for n, t in tensors.items()}
    if shards:
        write_shards(merged, renamed, config=config)
    else:
        save_file(renamed, merged / "model.safetensors", {"format": "pt"})
    return merged


def new_name(name):
    if name.startswith("language_model.model."):
        return name.replace("language_model.model.", "model.language_model.")
    return name.removeprefix("language_model.") if "lm_head" in name else f"model.{name}"


@pytest.fixture(scope="module")
def renamed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("renamed")
    pair(folder)
    return folder


def verified(renamed, merged):
    return dora_export.verify(renamed / "base", renamed / "adapter", merged)


@pytest.fixture
def merged(renamed, tmp_path):
    return shutil.copytree(renamed / "merged", tmp_path / "merged")


def test_old_names_and_new_ones_are_paired(renamed, merged):
    report = verified(renamed, merged)
    assert (report.exit_code, wrong(report)) == (0, [])
    (note,) = (f for f in report.findings if f.code == "names-renamed")
    assert "7 tensors" in note.what
    assert {t.status for t in report.tensors} == {"exact"}


def test_a_flipped_bit_under_another_name_is_found(renamed, merged):
    flip(merged / "model.safetensors", new_name(TOWER.format(1)), 5)
    assert wrong(verified(renamed, merged)) == [("bytes-differ", TOWER.format(1))]


def test_a_layer_not_merged_under_another_name_is_found(renamed, merged):
    base = load_file(renamed / "base" / "model.safetensors")[LAYER.format(2)]
    edit_tensors(merged / "model.safetensors",
                 lambda ts: {**ts, new_name(LAYER.format(2)): base})  # fmt: skip
    assert wrong(verified(renamed, merged)) == [("not-applied", LAYER.format(2))]


def test_missing_and_extra_tensors_under_other_names_are_still_told(renamed, merged):
    def edit(ts):
        del ts[new_name(TOWER.format(0))]
        return {**ts, "model.language_model.layers.9.q_proj.weight": torch.ones(20, 12)}

    edit_tensors(merged / "model.safetensors", edit)
    assert wrong(verified(renamed, merged)) == [
        ("tensor-extra", LAYER.format(9)),
        ("tensor-missing", TOWER.format(0)),
    ]


def test_names_that_no_table_knows_are_missing_and_extra(renamed, merged):
    edit_tensors(merged / "model.safetensors", lambda ts: {
        n.replace("model.language_model.", "model.decoder."): t for n, t in ts.items()
    })  # fmt: skip
    codes = {code for code, _ in wrong(verified(renamed, merged))}
    assert {"tensor-missing", "tensor-extra"} <= codes


def test_a_tensor_under_both_names_is_not_right(renamed, merged):
    both = {LAYER.format(0): torch.ones(20, 12)}  # beside model.language_model.layers.0
    edit_tensors(merged / "model.safetensors", lambda ts: {**ts, **both})
    assert "tensor-extra" in {code for code, _ in wrong(verified(renamed, merged))}


def test_a_missing_shard_of_other_names_is_told_once(tmp_path):
    merged = pair(tmp_path, shards=True)
    assert verified(tmp_path, merged).exit_code == 0
    (merged / "model-00002-of-00002.safetensors").unlink()
    assert wrong(verified(tmp_path, merged)) == [
        ("file-missing", "model-00002-of-00002.safetensors")
    ]


def test_names_that_end_by_another_convention_are_paired(tmp_path):
    make = torch.Generator().manual_seed(5)
    base = {f"encoder.layer.{i}.output.LayerNorm.gamma": torch.rand(12, generator=make)
            for i in range(2)}  # fmt: skip
    base |= {f"encoder.layer.{i}.attn.q_proj.weight": torch.randn(20, 12, generator=make)
             for i in range(2)}  # fmt: skip
    names = {n.replace("gamma", "weight") for n in base}
    write_base(tmp_path / "merged", {n.replace("gamma", "weight"): t for n, t in base.items()})
    found = under_base_names(open_subject(tmp_path / "merged"), base, ("bert",))
    assert found.tensors.keys() == base.keys() != names
    assert found.renaming == "ends of names"
