"""A small model of every layer that LyCORIS adapts, LyCORIS' own modules on it, and their forward.

The weight that a trained module uses is read off its forward: inputs with a single one in them give
the weight's columns. In float64, with the eps that the trainer's type has (``finfo`` is asked by
dtype, so it is told which), it is exact.
"""

import contextlib
from unittest import mock

import torch
from lycoris.functional import general
from lycoris.modules import FullModule, LoConModule, LohaModule, LokrModule, NormModule
from safetensors.torch import save_file
from torch import nn

from tests import small

RANK, ALPHA = 2, 3.0


class Net(nn.Module):
    """Linear and convolutional layers, square and not, under names with underscores."""

    def __init__(self):
        super().__init__()
        self.down_blocks = nn.ModuleList([nn.Linear(48, 36), nn.Linear(36, 36)])
        self.mid_block = nn.ModuleDict(
            {
                "conv_3": nn.Conv2d(24, 36, 3),
                "square": nn.Conv2d(24, 24, 3, bias=False),
                "to_q": nn.Conv2d(36, 24, 1),
                "line": nn.Conv1d(16, 24, 3),
                "cube": nn.Conv3d(8, 12, 2),
                "grouped": nn.Conv2d(24, 24, 3, groups=2),
            }
        )
        self.norm_out = nn.LayerNorm(36)
        self.group_norm = nn.GroupNorm(2, 24)
        self.untouched = nn.Linear(5, 7)


LAYERS = ["down_blocks.0", "down_blocks.1", *(f"mid_block.{n}" for n in (
    "conv_3", "square", "to_q", "line", "cube", "grouped"))]  # fmt: skip
NORMS = ["norm_out", "group_norm"]
# Case -> LyCORIS module and arguments, parts that some layer must have.
CASES = {
    "locon": (LoConModule, {}, {"lora_up.weight", "lora_down.weight"}),
    "locon tucker": (LoConModule, {"use_tucker": True}, {"lora_mid.weight"}),
    "locon scalar": (LoConModule, {"use_scalar": True}, {"lora_up.weight"}),
    "locon rs": (LoConModule, {"rs_lora": True}, {"lora_up.weight"}),
    "loha": (LohaModule, {}, {"hada_w1_a", "hada_w2_b"}),
    "loha tucker": (LohaModule, {"use_tucker": True}, {"hada_t1", "hada_t2"}),
    "loha scalar rs": (LohaModule, {"use_scalar": True, "rs_lora": True}, {"hada_w1_a"}),
    "lokr": (LokrModule, {}, {"lokr_w1", "lokr_w2_a", "lokr_w2_b"}),
    "lokr both": (LokrModule, {"decompose_both": True}, {"lokr_w1_a", "lokr_w1_b", "lokr_w2_b"}),
    "lokr tucker": (LokrModule, {"use_tucker": True}, {"lokr_t2", "lokr_w2_a"}),
    "lokr whole": (LokrModule, {"full_matrix": True}, {"lokr_w1", "lokr_w2"}),
    "lokr scalar": (LokrModule, {"use_scalar": True, "factor": 4}, {"lokr_w1"}),
    "lokr rs": (LokrModule, {"rs_lora": True, "decompose_both": True}, {"lokr_w2_a", "lokr_w2"}),
    "lokr unbalanced": (LokrModule, {"unbalanced_factorization": True}, {"lokr_w1", "lokr_w2_a"}),
}


def net(dtype=torch.float32, seed=0):
    """The model, its weights rounded to ``dtype`` (and held in float32)."""
    torch.manual_seed(seed)
    made = Net()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1)
            parameter.copy_(parameter.to(dtype).float())
    return made


def attach(model, case, dora=None, seed=1, dtype=torch.float32):
    """LyCORIS' modules on every layer, as if trained, by layer."""
    kind, options, _ = CASES[case]
    torch.manual_seed(seed)
    modules = {}
    for name in LAYERS:
        options_of = {**options, "weight_decompose": dora is not None, "wd_on_out": dora != "in"}
        made = kind("m", model.get_submodule(name), 1.0, RANK, ALPHA, **options_of)
        modules[name] = train(made, dtype)
    return modules


def train(module, dtype=torch.float32):
    """Give a module's parameters values as after training, rounded to ``dtype``."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name == "dora_scale":
                parameter.mul_(0.6 + 0.8 * torch.rand_like(parameter))
            elif name == "scalar":
                parameter.fill_(0.7)
            else:
                parameter.copy_(torch.randn_like(parameter) * 0.4)
            parameter.copy_(parameter.to(dtype).float())
    return module.eval()


def attach_whole(model, seed=2):
    """LyCORIS' full differences on two layers and its norms, as if trained.

    A full module takes the layer's weight over (``apply_to``) and trains it.
    """
    torch.manual_seed(seed)
    modules = {}
    for name, kind in [("down_blocks.0", FullModule), ("mid_block.square", FullModule),
                       ("norm_out", NormModule), ("group_norm", NormModule)]:  # fmt: skip
        modules[name] = module = kind("m", model.get_submodule(name))
        if kind is FullModule:
            module.apply_to()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        module.eval()
    return modules


def state(modules, prefix="lora_unet", dtype=None):
    """The file's tensors, named as LyCORIS' networks name their modules."""
    return {
        f"{prefix}_{name.replace('.', '_')}.{key}": (v.to(dtype) if dtype else v).detach().clone()
        for name, module in modules.items()
        for key, v in module.state_dict().items()
    }


@contextlib.contextmanager
def eps_of(dtype):
    """Let the trainer's forward take the eps of the type that it was trained in."""
    with mock.patch.object(general.torch, "finfo", return_value=torch.finfo(dtype)):
        yield


def used_weight(module, dtype=torch.float64, eps=torch.float32):
    """The weight that a trained module's forward uses, shaped as the layer's own."""
    layer = module.org_module[0]
    shape = layer.weight.shape
    groups = getattr(layer, "groups", 1)
    count = shape[1:].numel()
    ones = torch.eye(count, dtype=dtype).reshape(count, *shape[1:])
    ones = ones.repeat(1, groups, *([1] * len(shape[2:])))  # the same input for every group
    layer.to(dtype)
    module.to(dtype)
    try:
        with torch.no_grad(), eps_of(eps) if dtype == torch.float64 else contextlib.nullcontext():
            y = module(ones)
            if layer.bias is not None:
                y = y - module.org_module[0](torch.zeros_like(ones))
        return y.reshape(count, shape[0]).T.reshape(shape)
    finally:
        layer.to(torch.float32)
        module.to(torch.float32)


def delta(module):
    """What a trained module adds to the weight before norms, float64; scaling included once."""
    module.double()
    try:
        with torch.no_grad():
            if isinstance(module, LoConModule):
                return (module.make_weight() * module.scale).reshape(module.shape)
            return module.get_weight(module.shape) * module.scalar
    finally:
        module.float()


def write(folder, model, tensors, dtype=torch.float32, prefix="", metadata=None, shards=False):
    """A base of ``dtype`` and the adapter's file; returns both paths."""
    tensors_of = model if isinstance(model, dict) else model.state_dict()
    base = {f"{prefix}{n}": t.detach().to(dtype) for n, t in tensors_of.items()}
    (small.write_shards if shards else small.write_base)(
        folder / "base", base, config={"model_type": "net"}
    )
    save_file(tensors, folder / "adapter.safetensors", metadata)
    return folder / "base", folder / "adapter.safetensors"
