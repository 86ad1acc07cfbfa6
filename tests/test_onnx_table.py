"""Architectures, traced and held against their unmerged models: few always, all nightly."""

import pytest
import torch

from tests.rider_models import WARNINGS
from tools import onnx_table

# Reasons stand beside the entries.
pytestmark = [pytest.mark.filterwarnings(w) for w in WARNINGS]
ALWAYS = ("vit",)  # a few seconds; decoders and encoders: other tests
UNRUNNABLE = ("gpt2",)  # fused by transformers 5.23


def check(name, **options):
    torch.set_num_threads(1)
    found = onnx_table.row(name, options, lambda _: None)
    assert found["verdict"] == "right", found["reason"]
    # As far from a known mistake as noise is: the adapter does something, and it is in the graph.
    assert found["share"] is None or abs(found["share"]) < 1e-2
    assert found["effect"] is None or found["effect"] > 1000 * found["error"]
    assert found["text"] is None or found["text"]["equal"] == found["text"]["tokens"]


@pytest.mark.parametrize("name", ALWAYS)
def test_graphs_of_an_architecture_equal_the_unmerged_model(name):
    check(name)


@pytest.mark.nightly
@pytest.mark.parametrize("name", sorted(set(onnx_table.ARCHITECTURES) - set(ALWAYS)))
def test_graphs_of_every_architecture_equal_the_unmerged_model(name):
    check(name)


@pytest.mark.nightly
@pytest.mark.parametrize("name", sorted(set(onnx_table.ARCHITECTURES) - set(UNRUNNABLE)))
def test_fused_graphs_of_every_architecture_do_so_too(name):
    check(name, fuse="cpu")


@pytest.mark.nightly
@pytest.mark.parametrize("name", UNRUNNABLE)
def test_fused_graphs_that_cannot_be_run_are_refused(name):
    found = onnx_table.row(name, {"fuse": "cpu"}, lambda _: None)
    assert found["verdict"] == "failed"
    assert "cannot be run" in found["reason"]
