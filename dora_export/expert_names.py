"""How models and checkpoints name the experts of a mixture, and in what order they hold them.

One matrix of one expert has many names. Its own: ``P.experts.3.gate_proj.weight`` (Mixtral's are
w1, w3, w2). A slice of a stack of all experts: ``P.switch_mlp.gate_proj.weight`` (MLX). Rows of a
slice of gate and up fused: ``P.experts.gate_up_proj`` (transformers 5), ``P.experts.fc1.weight``
(Aria), ``P.input_linear.weight`` (Granite). ``address`` takes such names apart.

Source: github.com/huggingface/transformers 5.23, src/transformers/conversion_mapping.py,
src/transformers/integrations/moe.py (is_transposed, is_concatenated) and modeling_*.py;
github.com/ml-explore/mlx-lm, mlx_lm/models/*.py (sanitize).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Part = Literal["gate", "up", "down", "gate_up"]

LEAVES: Mapping[str, Part] = {
    "gate_proj": "gate", "up_proj": "up", "down_proj": "down",
    "w1": "gate", "w3": "up", "w2": "down",
}  # fmt: skip
STACKED_LEAVES: Mapping[str, Part] = {
    "gate_proj": "gate", "up_proj": "up", "down_proj": "down", "gate_up_proj": "gate_up",
    "fc1": "gate_up", "fc2": "down", "input_linear": "gate_up", "output_linear": "down",
}  # fmt: skip
SINGLE = re.compile(
    rf"(?P<block>.+)\.experts\.(?P<expert>\d+)\.(?P<leaf>{'|'.join(LEAVES)})\.weight"
)
STACKED = re.compile(
    r"(?P<block>.+)\.(?:(?:experts|switch_mlp)\.(?P<leaf>gate_up_proj|gate_proj|up_proj|down_proj)"
    r"(?:\.weight)?|experts\.(?P<aria>fc1|fc2)\.weight"
    r"|(?P<granite>input_linear|output_linear)\.weight)"
)
# Parameters of one experts module, in the order in which every class registers them.
REGISTERED = ("gate_up_proj", "gate_up_proj_bias", "gate_proj", "up_proj", "down_proj",
              "down_proj_bias")  # fmt: skip


@dataclass(frozen=True)
class Address:
    """What a name is about.

    Attributes:
        block: Path of the module that holds the experts.
        part: Which of an expert's matrices.
        expert: Which expert; None: all of them, stacked.
    """

    block: str
    part: Part
    expert: int | None = None

    @property
    def parts(self) -> tuple[Part, ...]:
        """The single matrices behind it."""
        return ("gate", "up") if self.part == "gate_up" else (self.part,)


def address(name: str, *, stacked: bool) -> Address | None:
    """Return what a tensor's name is about, or None if it is not about an expert.

    Args:
        name: Of a checkpoint's tensor, or an update's target.
        stacked: Whether the tensor holds all experts (has three dimensions).
    """
    if not stacked:
        match = SINGLE.fullmatch(name)
        return match and Address(match["block"], LEAVES[match["leaf"]], int(match["expert"]))
    match = STACKED.fullmatch(name)
    if match is None:
        return None
    leaf = match["leaf"] or match["aria"] or match["granite"]
    return Address(match["block"], STACKED_LEAVES[leaf])


@dataclass(frozen=True)
class ExpertModel:
    """How a model holds its stacked experts.

    Attributes:
        layout: A slice of the class's parameter is "oi" ``(out, in)`` or "io" ``(in, out)``, as the
            expert computes; the checkpoint's is the same but for ``either``.
        alternate: Rows of gate and up alternate; else all of gate come before all of up.
        is_transposed: The attribute of that name of transformers' class, which PEFT looks at.
        either: Checkpoints hold slices as the class does or transposed; their shapes tell.
    """

    layout: Literal["oi", "io"] = "oi"
    alternate: bool = False
    is_transposed: bool = False
    either: bool = False


_PLAIN = ExpertModel()
EXPERT_MODELS: Mapping[str, ExpertModel] = {
    **dict.fromkeys(
        """afmoe axk1 axk2 bailing_hybrid beam cohere2_moe deepseek_v2 deepseek_v3 deepseek_v32
        deepseek_v4 dots1 ernie4_5_moe exaone_moe flex_olmo flint gemma4 gemma4_text glm4_moe
        glm4_moe_lite glm4v_moe glm4v_moe_text glm_moe_dsa granitemoe granitemoe_swa
        granitemoehybrid granitemoeshared hunyuan_v1_moe hy_v3 jamba kimi_linear laguna lfm2_moe
        longcat_flash mellum mimo_v2_flash minimax minimax_m2 minimax_m3_vl minimax_m3_vl_text
        mistral4 mixtral nemotron_h olmoe phimoe qwen2_moe qwen3_5_moe qwen3_5_moe_text qwen3_moe
        qwen3_next qwen3_omni_moe qwen3_omni_moe_text qwen3_omni_moe_thinker solar_open""".split(),
        _PLAIN,
    ),
    "aria": ExpertModel("io", is_transposed=True),
    "aria_text": ExpertModel("io", is_transposed=True),
    "gpt_oss": ExpertModel("io", alternate=True, is_transposed=True),
    "llama4": ExpertModel("io"),
    "llama4_text": ExpertModel("io"),
    "openai_privacy_filter": ExpertModel("io", is_transposed=True),
    "qwen3_vl_moe": ExpertModel(either=True),
    "qwen3_vl_moe_text": ExpertModel(either=True),
}
