"""Reports made by hand: what a page or a summary may have to show, realistic and hostile."""

from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from dora_export.verification.catalog import FINDINGS
from dora_export.verification.model import Finding, TensorResult, TierResult, VerifyReport

KINDS = {
    "self_attn.q_proj": (576, 576),
    "self_attn.k_proj": (192, 576),
    "self_attn.v_proj": (192, 576),
    "self_attn.o_proj": (576, 576),
    "mlp.gate_proj": (1536, 576),
    "mlp.up_proj": (1536, 576),
    "mlp.down_proj": (576, 1536),
}
HOSTILE = (
    "model.<script>alert(1)</script>.weight",
    'model."onmouseover="alert(2)".weight',
    "model.</title></style><img src=x onerror=alert(3)>.weight",
    "model.layers.999999999999999999999999.weight",
    "model.\x1b[31mred\x00\u202egnp.weight",
    "model.\udcff.weight",
    "http://example.org/x.weight",
    "model.]]>&amp;&#60;script&#62;.weight",
    "model." + "long." * 5000 + "weight",
    "",
)


def tensors(layers=30, kinds=KINDS, seed=0):
    """An exact merge: every tensor at half an ulp, magnitudes that drift with the depth."""
    make = np.random.default_rng(seed)
    results = []
    for layer in range(layers):
        for k, (kind, shape) in enumerate(kinds.items()):
            depth = layer / max(1, layers - 1)
            middle = 1 + 0.02 * np.sin(3 * depth + k) + 0.01 * make.standard_normal()
            width = 0.01 * (1 + depth) * (1 + 0.3 * k)
            spread = np.sort(make.standard_normal(200)) * width + middle
            ratio = tuple(float(q) for q in np.quantile(spread, [0, 0.25, 0.5, 0.75, 1]))
            size = 0.03 * (1 + 2 * depth**2) * (1 + 0.25 * k) * make.uniform(0.8, 1.2)
            results.append(TensorResult(
                f"model.layers.{layer}.{kind}.weight", "exact", "BF16", shape, shape[0] * shape[1],
                0.5 + float(make.exponential(0.001)), float(make.uniform(0, 2e-5)),
                1.66e-3 + float(make.normal(0, 1e-5)), 1.0, float(size), ratio,
            ))  # fmt: skip
    return tuple(results)


def right(**changes):
    """A merge by this tool, all tiers passed."""
    close = {"max": 0.325, "mean": 0.0381, "rms": 0.0498, "scale": 42.3}
    noise = {"max": 1.29, "mean": 0.169, "rms": 0.224, "scale": 42.3}
    choices = {"positions": 42, "top1_agreement": 1.0, "kl_mean": 3.1e-6, "kl_max": 5.2e-4}
    forward = {
        "model": "LlamaForCausalLM",
        "storage": "bfloat16",
        "inputs": [{"name": "prompt 1", "shapes": {"input_ids": [1, 5]}}],
        "random": [],
        "outputs": {"logits": {"excess": 0.125, "error": close, "noise": noise, "effect": close,
                               "choices": choices, "choices_noise": choices}},
        "layers": [
            {"name": f"model.layers.{i % 30}.{list(KINDS)[i // 30]}.weight",
             "excess": 0.26 / (i + 1), "error": close, "noise": noise, "effect": close}
            for i in range(210)
        ],
        "text": {"tokens": 32, "equal": 32},
        "greedy": "The capital of France is\nParis.",
        "same_text": True,
        "said": "",
    }  # fmt: skip
    ledger = {"files": 1, "tensors": 272, "changed": 210, "untouched": 62,
              "untouched_bytes": 56_700_000, "side_files": 5}  # fmt: skip
    report = VerifyReport(
        Path("models/smollm2-135m"),
        (Path("adapters/smollm2-135m-dora"),),
        Path("merged"),
        "full",
        "dora-export 0.1.0",
        "DoRA",
        (
            TierResult("ledger", True, "272 tensors in 1 file, 62 untouched ones byte for byte the "
                       "base's, 5 side files", 0.31, ledger),
            TierResult("oracle", True, "210 changed tensors, every element", 6.24,
                       {"threads": 2, "elements": 106_168_320}),
            TierResult("forward", True, "210 layers and 3 prompts within the noise of BF16", 14.2,
                       forward),
        ),
        (),
        tensors(),
        ("strength 1 and zero-norm refuse, as the manifest says",),
        20.9,
        412_000_000,
    )  # fmt: skip
    return replace(report, **changes)


def rounded():
    """A merge by a tool that computes in bfloat16."""
    make = np.random.default_rng(3)
    results = tuple(
        replace(t, status="rounded", arithmetic="BF16",
                max_ulp=float(np.exp(make.normal(1.4, 0.5))),
                misrounded=float(make.normal(0.44, 0.02)), relative_error=2.9e-3,
                error_ratio=float(make.normal(1.75, 0.1)), diagnosis="rounded")
        for t in tensors()
    )  # fmt: skip
    found = tuple(Finding("rounded", t.name, f"worst {t.max_ulp:.3g} ulp") for t in results)
    return right(tensors=results, findings=found, maker="PEFT 0.21.2 (by its README)",
                 tiers=right().tiers[:2])  # fmt: skip


def wrong():
    """One layer not merged, one tensor of another, NaN in one, and a flipped byte."""
    results, found = list(tensors()), [
        Finding("bytes-differ", "model.norm.weight", "1 of 576 elements differs, the first at 17"),
        Finding("adapter-left", "adapter_config.json", "lies beside the weights"),
    ]  # fmt: skip
    for i, t in enumerate(results):
        code, ulp = None, 0.0
        if ".layers.29." in t.name:
            code, ulp = "not-applied", 900.0 + i
        elif t.name.endswith("layers.12.mlp.up_proj.weight"):
            code, ulp = "magnitude-of-another", 23.4
        elif t.name.endswith("layers.5.self_attn.k_proj.weight"):
            code, ulp = "not-finite", float("inf")
        if code:
            error = float("inf") if ulp == float("inf") else 0.12
            results[i] = replace(t, status="wrong", diagnosis=code, max_ulp=ulp, misrounded=0.97,
                                 relative_error=error, error_ratio=error / 1.66e-3)  # fmt: skip
            found.append(Finding(code, t.name, f"worst {ulp:.3g} ulp, relative error {error:.2g}"))
    return right(tensors=tuple(results), findings=tuple(found), tiers=right().tiers[:2])


def unchecked():
    """Right as far as it goes: the forward pass was asked for and could not be run."""
    tiers = (*right().tiers[:2], TierResult("forward", False, "transformers is not installed"))
    found = (Finding("forward-extra", "transformers", "not installed"),)
    return right(tiers=tiers, findings=found)


def tiny():
    """Three tensors outside of any layer, without magnitudes."""
    results = tuple(
        TensorResult(
            f"{n}_proj.weight", "exact", "F32", (4, 3), 12, 0.5, 0.0, 3e-8, 1.0, size, None
        )
        for n, size in zip("qkv", (0.1, 0.0, 0.3), strict=True)
    )
    return right(tensors=results, tiers=right().tiers[:2], method="LoRA")


@lru_cache
def experts(layers=26, each=256, *, wrong=0):
    """A mixture of experts: 20,000 changed tensors."""
    kinds = {
        f"mlp.experts.{e}.{part}": (64, 32)
        for e in range(each)
        for part in ("gate_proj", "up_proj", "down_proj")
    }
    results = list(tensors(layers, kinds))
    found = []
    for i in range(wrong):
        results[i] = replace(results[i], status="wrong", diagnosis="wrong-values", max_ulp=50.0)
        found.append(Finding("wrong-values", results[i].name, f"worst 50 ulp, row {i}"))
    return right(tensors=tuple(results), findings=tuple(found), tiers=right().tiers[:2])


def few_experts():
    """A small mixture of experts, which a browser draws at once."""
    return experts(layers=6, each=32)


def hostile():
    """Names from strangers everywhere."""
    results = tuple(replace(t, name=name) for t, name in zip(tensors(), HOSTILE, strict=False))
    found = tuple(Finding("wrong-values", name, f"seen: {name}") for name in HOSTILE)
    figures = {name: name for name in HOSTILE} | {
        "rows": [{name: name} for name in HOSTILE],
        "nested": {"text": "\n".join(HOSTILE)},
    }
    paths = [Path(name or ".") for name in HOSTILE]
    return right(
        base=paths[0], adapters=(paths[1],), merged=paths[2], maker=HOSTILE[0], method=HOSTILE[1],
        tiers=tuple(TierResult("ledger", True, name, 0.0, figures) for name in HOSTILE),
        findings=found, tensors=results, notes=HOSTILE,
    )  # fmt: skip


def every_finding():
    """Each finding of the catalogue, some of them many times."""
    found = [Finding(m.code, f"model.layers.{i}.{m.code}", f"what was found {i}")
             for m in FINDINGS for i in range(1 + 30 * (m.code == "tensor-missing"))]  # fmt: skip
    return right(findings=tuple(found))


ALL = {"right": right, "rounded": rounded, "wrong": wrong, "unchecked": unchecked, "tiny": tiny,
       "experts": few_experts, "hostile": hostile, "every_finding": every_finding}  # fmt: skip
