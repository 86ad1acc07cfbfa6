"""The same merges on a CUDA device; skipped, with the reason, where there is none."""

import pytest
import torch
from safetensors.torch import load_file

import dora_export
from tests import oracle
from tests.test_engine import exact, write_case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason=f"torch {torch.__version__} sees no CUDA device"
    ),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_cuda_merge_is_within_one_ulp_of_float64(tmp_path, dtype, precision):
    base, adapter = write_case(tmp_path, layers=3, out=3000, inputs=1024, dtype=dtype)
    dora_export.merge(
        tmp_path / "base", tmp_path / "adapter", tmp_path / "out", device="cuda",
        precision=precision,
    )  # fmt: skip
    got = load_file(tmp_path / "out" / "model.safetensors")
    for name, expected in exact(base, adapter).items():
        assert oracle.ulps(got[name], expected) <= 1
        assert oracle.misrounded(got[name], expected) <= 1e-4


@pytest.mark.parametrize("options", [{"threads": 1}, {"threads": 7}, {"block_bytes": 1 << 20}])
def test_cuda_bytes_do_not_depend_on_threads_or_blocks(tmp_path, options):
    write_case(tmp_path, layers=2, out=5000, inputs=2048)
    paths = tmp_path / "base", tmp_path / "adapter"
    dora_export.merge(*paths, tmp_path / "one", device="cuda")
    dora_export.merge(*paths, tmp_path / "other", device="cuda", **options)
    one, other = (load_file(tmp_path / n / "model.safetensors") for n in ("one", "other"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_cuda_and_cpu_differ_by_the_last_bit_at_most(tmp_path):
    base, adapter = write_case(tmp_path, layers=2, out=3000, inputs=1024)
    for device in ("cpu", "cuda"):
        dora_export.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / device, device=device)
    cpu, cuda = (load_file(tmp_path / d / "model.safetensors") for d in ("cpu", "cuda"))
    for name in exact(base, adapter):
        assert oracle.ulps(cuda[name], oracle.float64(cpu[name])) <= 2
        assert (cuda[name] != cpu[name]).double().mean() <= 1e-3


def test_a_device_number_that_is_not_there_is_refused(tmp_path):
    write_case(tmp_path, layers=1, out=64, inputs=32)
    with pytest.raises(dora_export.DoraExportError, match=r"sees \d+ CUDA device"):
        dora_export.merge(
            tmp_path / "base", tmp_path / "adapter", tmp_path / "out", device="cuda:99"
        )
