"""Rank and alpha patterns: PEFT's meaning, in bounded time."""

import time

import pytest
from peft.utils.other import get_pattern_key

from dora_export import limits
from dora_export.adapters.patterns import first_matches
from dora_export.errors import AdapterError

MODULES = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.0.self_attn.k_proj",
    "model.layers.1.self_attn.q_proj",
    "model.layers.10.mlp.down_proj",
    "model.layers_1.q_proj",
    "q_proj",
    "my_q_proj",
    "model.visual.blocks.3.q_proj",
    "modèle.q_proj\n",
    "a b.q_proj",
]
PATTERNS = [
    ["q_proj"],
    ["layers.1.self_attn.q_proj", "q_proj"],
    ["^q_proj"],
    ["^model.layers.0.self_attn.q_proj$"],
    ["model.layers.0", "0.self_attn.k_proj"],
    ["proj", ".*q_proj"],
    [r"layers\.\d+\.self_attn\.(q|k)_proj"],
    [r"(?!.*visual).*q_proj", "q_proj"],  # looks ahead
    [r"layers.[01]", r"layers\.(0|10)\..*"],
    ["q_proj|k_proj", r"mod\wle\.q_proj"],
    [r"(.)b\.q_proj|([kq])_proj"],
    [r"(?P<a>l)ayers\.(\d)\d?\..*", ""],
    ["q_proj$", r".*\.q_proj\s"],
]


@pytest.mark.parametrize("patterns", PATTERNS, ids=repr)
def test_patterns_mean_what_they_mean_to_peft(patterns, tmp_path):
    found = first_matches(tmp_path, "rank_pattern", patterns, MODULES)
    assert {m: found.get(m, m) for m in MODULES} == {
        m: get_pattern_key(patterns, m) for m in MODULES
    }


ENDLESS = [
    r"(a+)+b",
    r"(a|a)*b",
    r"(?=(a+)+b)a",
    "(a|a)" * 40 + "b",
    r".*" * 60 + "b",
]


@pytest.mark.parametrize("pattern", ENDLESS)
def test_pattern_that_backtracks_for_ever_is_refused_in_time(pattern, tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "PATTERN_SECONDS", 0.5)
    started = time.monotonic()
    with pytest.raises(AdapterError, match=r"more than 0\.5 seconds to match.*Name the modules"):
        first_matches(tmp_path, "rank_pattern", ["q_proj", pattern], ["q_proj", "a" * 60])
    assert time.monotonic() - started < 15  # of a busy machine


def test_the_pattern_that_is_at_fault_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "PATTERN_SECONDS", 0.5)
    with pytest.raises(AdapterError, match=r"config: alpha_pattern: \(a\+\)\+b takes more"):
        first_matches("config", "alpha_pattern", ["q.*", "(a+)+b", "k.*"], ["a" * 60])


WRONG = ["(q", "a{2,1}", "(?P<a", "[z-a]", r"\8", "a{99999999999}", "(" * 900, "q*+*"]


@pytest.mark.parametrize("pattern", WRONG)
def test_what_is_no_expression_is_refused(pattern, tmp_path):
    with pytest.raises(AdapterError, match=r"is not a regular expression: .* Correct it"):
        first_matches(tmp_path, "rank_pattern", [pattern], MODULES)


def test_long_patterns_are_refused_before_they_are_tried(tmp_path):
    with pytest.raises(AdapterError, match=r"more than 1000 characters\. Name the modules instead"):
        first_matches(tmp_path, "rank_pattern", ["(a|b)*" * 1000], MODULES)


def test_a_pattern_for_every_layer_of_a_large_model_is_quick(tmp_path):
    """As EVA leaves them."""
    modules = [f"model.layers.{i}.mlp.{p}_proj" for i in range(126) for p in ("up", "down", "gate")]
    started = time.monotonic()
    found = first_matches(tmp_path, "rank_pattern", modules, modules)
    assert found == {m: m for m in modules}
    assert time.monotonic() - started < 5
