"""``verify`` as a whole: what the tiers make of one another."""

import pytest
import torch

import dora_export
from dora_export import api
from tests import small


@pytest.mark.parametrize("level", ["fast", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_right_merge_is_right(tmp_path, dtype, level):
    base, adapter = small.write_pair(tmp_path, dtype=dtype)
    dora_export.merge(base, adapter, tmp_path / "out")
    report = api.verify(base, adapter, tmp_path / "out", level=level)
    assert (report.verdict, report.exit_code, report.findings) == ("right", 0, ())
    assert [t.tier for t in report.tiers] == ["ledger", "oracle"]
    assert report.maker == f"dora-export {dora_export.__version__}"
    assert report.to_dict()["verdict"] == "right"


def test_merge_of_an_adapter_that_changes_nothing_is_right(tmp_path):
    tensors = small.base_tensors(dtype=torch.float32)
    base = small.write_base(tmp_path / "base", tensors)
    parts = small.adapter_tensors(tensors, dora=False)
    parts = {n: torch.zeros_like(t) if "lora_B" in n else t for n, t in parts.items()}
    adapter = small.write_adapter(tmp_path / "adapter", parts, use_dora=False)
    dora_export.merge(base, adapter, tmp_path / "out", verify="full")
    assert api.verify(base, adapter, tmp_path / "out").verdict == "right"


def test_copy_of_the_base_is_wrong(tmp_path):
    base, adapter = small.write_pair(tmp_path)
    report = api.verify(base, adapter, base)
    assert (report.verdict, report.exit_code) == ("wrong", 1)
    codes = {f.code for f in report.findings if f.severity == "wrong"}
    assert codes == {"nothing-applied", "not-applied"}


@pytest.mark.parametrize(
    "options", [{"dtype": "fp16"}, {"strength": 0.5}, {"dtype": "fp32", "strength": 1.5}], ids=str
)
def test_settings_come_from_the_manifest_and_the_user_wins(tmp_path, options):
    base, adapter = small.write_pair(tmp_path)
    dora_export.merge(base, adapter, tmp_path / "out", **options)
    report = api.verify(base, adapter, tmp_path / "out")
    assert report.verdict == "right"
    (note,) = [n for n in report.notes if "dora_export.json says" in n]
    assert all(f"{key} " in note for key in options)
    assert api.verify(base, adapter, tmp_path / "out", **options).verdict == "right"
    assert api.verify(base, adapter, tmp_path / "out", strength=0.9).verdict == "wrong"


@pytest.mark.parametrize("dora", [True, False])
def test_scaling_beside_which_every_error_is_small_is_refused(tmp_path, dora):
    """Errors are judged by the size of the terms: beside 1e100 anything would be right."""
    base, adapter = small.write_pair(tmp_path, dora=dora)
    dora_export.merge(base, adapter, tmp_path / "out")
    for alpha in (1e9, 1e100, 1e308):
        small.edit_json(adapter / "adapter_config.json", lora_alpha=alpha)
        with pytest.raises(dora_export.DoraExportError, match=r"scaling \S+; at most 1,000,000"):
            api.verify(base, adapter, tmp_path / "out")
    small.edit_json(adapter / "adapter_config.json", lora_alpha=1e6)
    assert api.verify(base, adapter, tmp_path / "out").verdict == "wrong"


def test_manifest_with_nonsense_is_refused_or_found(tmp_path):
    base, adapter = small.write_pair(tmp_path)
    dora_export.merge(base, adapter, tmp_path / "out")
    for options in ({"strength": "much"}, {"dtype": 7}, {"zero_norm": []}, {"map_prefix": "a=b"},
                    {"strength": 1e308}, {"weights": [1e308]}):  # fmt: skip
        small.edit_json(tmp_path / "out" / "dora_export.json", options=options)
        with pytest.raises(dora_export.DoraExportError, match=r"dora_export\.json"):
            api.verify(base, adapter, tmp_path / "out")
