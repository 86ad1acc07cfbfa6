"""What a layer multiplies by, asked of its own forward: the reference that needs no formula.

A linear layer is its weight times the input, so unit inputs give the weight back column by column,
exactly in float64; the output for nothing is the bias. Nothing here comes from the package.
"""

import torch
from torch import nn


def weight(layer, base):
    """The weight that ``layer`` (adapted or not) multiplies by, stored as ``base`` stores its own.

    Args:
        layer: A module in float64, in eval mode.
        base: The plain layer inside.
    """
    if isinstance(base, nn.Embedding):
        return layer(torch.arange(base.num_embeddings)).detach()
    if isinstance(base, nn.Linear):
        return (layer(torch.eye(base.in_features).double()) - bias(layer, base)).T.detach()
    if not hasattr(base, "kernel_size"):  # transformers' Conv1D, stored (in, out)
        return (layer(torch.eye(base.weight.shape[0]).double()) - bias(layer, base)).detach()
    shape = base.weight.shape[1:]  # unit inputs of one kernel's size: one output each
    assert (base.groups, set(base.padding)) == (1, {0})
    x = torch.eye(shape.numel()).double().reshape(-1, *shape)
    y = (layer(x) - layer(torch.zeros_like(x))).flatten(1)
    return y.T.reshape(base.weight.shape).detach()


def bias(layer, base):
    """What ``layer`` gives for an input of nothing."""
    shape = base.weight.shape[1:]  # of one kernel, or a linear layer's inputs
    if not isinstance(base, nn.Linear) and not hasattr(base, "kernel_size"):
        shape = base.weight.shape[:1]
    return layer(torch.zeros(1, *shape).double()).detach()
