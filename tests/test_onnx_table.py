"""Architectures, traced and held against their unmerged models: few always, all nightly."""

import pytest
import torch

from tests.rider_models import WARNINGS
from tools import onnx_table

# Reasons stand beside the entries.
pytestmark = [pytest.mark.filterwarnings(w) for w in WARNINGS]
ALWAYS = ("vit",)  # a few seconds; decoders and encoders: other tests


def check(name):
    torch.set_num_threads(1)
    found = onnx_table.row(name, {}, lambda _: None)
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
