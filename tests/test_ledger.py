"""The ledger tier: every planted fault is found, named and placed; right merges pass.

Each fault is planted into a copy of a real merge output; what a fault is expected to give is all
that is found above a note, so that a check that cries wolf fails too.
"""

import json
import shutil
import struct

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import dora_export
from dora_export import api
from dora_export.adapters import ReadOptions
from dora_export.errors import InputError
from dora_export.plan import Settings
from dora_export.tensors import BF16, F16, F32, F64
from dora_export.verification import tensor_ledger
from dora_export.verification.catalog import MEANINGS
from dora_export.verification.config_ledger import compare
from dora_export.verification.ledger import Source, check_ledger
from dora_export.verification.rope import rope_changes
from dora_export.verification.subject import open_subject
from dora_export.writers import side_files
from tests import small
from tests.hub_configs import CONFIGS

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 12,
    "num_attention_heads": 3,
    "num_hidden_layers": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.0",
    "vocab_size": 40,
}
TOKENIZER = {
    "version": "1.0",
    "added_tokens": [{"id": 3, "content": "<end>"}],
    "pre_tokenizer": {"type": "Whitespace"},
    "model": {"type": "BPE", "unk_token": None, "vocab": {"a": 0, "b": 1, "ab": 2},
              "merges": ["a b"]},
}  # fmt: skip
TOKENIZER_CONFIG = {"bos_token": "<s>", "eos_token": "<end>", "model_max_length": 64,
                    "chat_template": "{{ messages }}"}  # fmt: skip
K, EMBED, HEAD = "model.layers.1.attn.k_proj.weight", "model.embed_tokens.weight", "lm_head.weight"
Q, INDEX = "model.layers.0.attn.q_proj.weight", "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def tensors(*, head=True, seed=0):
    made = small.base_tensors(seed=seed)
    make = torch.Generator().manual_seed(100 + seed)
    for layer in (0, 1):
        name = f"model.layers.{layer}.attn.k_proj.weight"
        made[name] = torch.randn(8, 12, generator=make).bfloat16()
    made["model.gain"] = torch.randn(3, generator=make).bfloat16()  # six bytes
    if head:
        made[HEAD] = torch.randn(40, 12, generator=make).bfloat16()
    return made


def write_sides(folder):
    small.write_json(folder / "tokenizer.json", TOKENIZER)
    small.write_json(folder / "tokenizer_config.json", TOKENIZER_CONFIG)
    small.write_json(folder / "generation_config.json", {"eos_token_id": 2})
    (folder / "LICENSE").write_text("Free to use.\n")


class Model:
    """A base, an adapter, and their merge by this package."""

    def __init__(self, folder, kind, **options):
        self.folder = folder
        config = CONFIG | {"tie_word_embeddings": kind == "tied"}
        write = small.write_shards if kind == "shards" else small.write_base
        base = tensors(head=kind != "tied")
        write(folder / "base", base, config=config)
        write_sides(folder / "base")
        small.write_adapter(folder / "adapter", small.adapter_tensors(base))
        dora_export.merge(folder / "base", folder / "adapter", folder / "merged", verify="none",
                          **options)  # fmt: skip

    def plan(self, **settings):
        plan, _ = api._plan(
            self.folder / "base", self.folder / "adapter", ReadOptions(), Settings(**settings)
        )
        return plan

    def check(self, merged, threads=2, **settings):
        plan = self.plan(**settings)
        sources = {f.name: Source(f.source, f.owner) for f in side_files.collect(plan)}
        return check_ledger(plan, open_subject(merged), sources, threads=threads)

    def found(self, merged, **settings):
        """(code, where) of everything above a note."""
        findings = self.check(merged, **settings)[1]
        return {(f.code, f.where) for f in findings if f.severity != "note"}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    kinds = ("single", "shards", "tied")
    return {k: Model(tmp_path_factory.mktemp(k), k) for k in kinds}


@pytest.fixture
def planted(models, tmp_path):
    """Return a model and a copy of its merge to plant faults in."""

    def copy(kind="single"):
        return models[kind], shutil.copytree(models[kind].folder / "merged", tmp_path / kind)

    return copy


def weights(folder):
    return folder / "model.safetensors"


def place_of(path, name):
    """File offset of a tensor's first byte, its number of bytes: by the format, not our reader."""
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    start, stop = json.loads(data[8 : 8 + length])[name]["data_offsets"]
    return 8 + length + start, stop - start


def flip(path, name, position):
    """Flip one bit of one byte of a tensor."""
    start, size = place_of(path, name)
    data = bytearray(path.read_bytes())
    data[start + (position % size)] ^= 1
    path.write_bytes(data)


def change(folder, edit):
    small.edit_tensors(weights(folder), edit)


def config(**fields):
    return lambda folder: small.edit_json(folder / "config.json", **fields)


def without_keys(name, *keys):
    def edit(folder):
        content = json.loads((folder / name).read_text())
        small.write_json(folder / name, {k: v for k, v in content.items() if k not in keys})

    return edit


def edit(name, **fields):
    return lambda folder: small.edit_json(folder / name, **fields)


def replaced(name, make):
    return lambda folder: change(folder, lambda t: {**t, name: make(t[name])})


def dropped(*names):
    return lambda folder: change(folder, lambda t: {n: v for n, v in t.items() if n not in names})


def added(name, tensor):
    return lambda folder: change(folder, lambda t: {**t, name: tensor})


def renamed(old, new):
    return lambda folder: change(
        folder, lambda t: {(new if n == old else n): v for n, v in t.items()}
    )


def removed(name):
    return lambda folder: (folder / name).unlink()


def written(name, text):
    return lambda folder: (folder / name).write_text(text)


def both(*steps):
    return lambda folder: [step(folder) for step in steps]


# --- controls


@pytest.mark.parametrize("kind", ["single", "shards", "tied"])
def test_an_untouched_merge_has_no_finding(models, kind):
    tier, findings = models[kind].check(models[kind].folder / "merged")
    assert findings == ()
    assert tier.tier == "ledger"
    assert tier.ran
    untouched = len(tensors(head=kind != "tied")) - len(small.LINEARS)
    files = {"single": 6, "shards": 7, "tied": 6}[kind]  # weights, config, tokenizer, settings
    assert tier.summary == (
        f"{untouched + 4} tensors and {files} files: {untouched} of {untouched} untouched tensors "
        "equal byte for byte"
    )
    assert json.loads(json.dumps(tier.figures)) == dict(tier.figures)


def test_every_untouched_byte_is_compared(models):
    tier, _ = models["single"].check(models["single"].folder / "merged")
    base = tensors()
    adapted = {f"{n}.weight" for n in small.LINEARS}
    assert tier.figures["bytes_compared"] == sum(
        t.nbytes for n, t in base.items() if n not in adapted
    )


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_a_merge_that_was_asked_to_cast_has_no_finding(models, tmp_path, dtype):
    model, out = models["single"], tmp_path / "out"
    dora_export.merge(model.folder / "base", model.folder / "adapter", out, verify="none",
                      dtype=dtype)  # fmt: skip
    assert model.check(out, dtype={"fp32": F32, "fp16": F16}[dtype])[1] == ()


def test_a_merge_cut_into_other_shards_has_no_finding(models, tmp_path):
    model, out = models["single"], tmp_path / "out"
    dora_export.merge(model.folder / "base", model.folder / "adapter", out, verify="none",
                      max_shard_size=2000)  # fmt: skip
    assert len(list(out.glob("*.safetensors"))) > 2
    assert model.check(out)[1] == ()
    assert model.check(out, max_shard_bytes=2000)[1] == ()


def test_a_head_written_apart_has_no_finding(tmp_path):
    base = tensors(head=False)
    small.write_base(tmp_path / "base", base, config=CONFIG | {"tie_word_embeddings": True})
    make = torch.Generator().manual_seed(5)
    adapter = small.adapter_tensors(base) | {
        f"{small.PREFIX}lm_head.lora_A.weight": torch.randn(3, 12, generator=make),
        f"{small.PREFIX}lm_head.lora_B.weight": torch.randn(40, 3, generator=make),
    }
    small.write_adapter(tmp_path / "adapter", adapter, use_dora=True,
                        target_modules=["q_proj", "down_proj", "lm_head"])  # fmt: skip
    adapter[f"{small.PREFIX}lm_head.lora_magnitude_vector"] = base[EMBED].float().norm(dim=1) * 1.3
    small.write_adapter(tmp_path / "adapter", adapter,
                        target_modules=["q_proj", "down_proj", "lm_head"])  # fmt: skip
    dora_export.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", verify="none")
    model = Model.__new__(Model)
    model.folder = tmp_path
    assert HEAD in load_file(tmp_path / "out" / "model.safetensors")
    assert model.check(tmp_path / "out")[1] == ()
    # The config must have been untied, and the head must be there.
    config(tie_word_embeddings=True)(tmp_path / "out")
    assert ("config-tied", "config.json: tie_word_embeddings") in model.found(tmp_path / "out")
    dropped(HEAD)(tmp_path / "out")  # tied again, but the head is another one than the embedding
    assert ("tensor-missing", HEAD) in model.found(tmp_path / "out")


def taller(tensor):
    return torch.cat([tensor, torch.zeros(3, tensor.shape[1], dtype=tensor.dtype)])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (taller, "the base's rows, and 3 more, as where a vocabulary was padded"),
        (lambda t: t[:-1].contiguous(), "the base's rows but for the last 1"),
        (lambda t: taller(t.flip(0)), None),  # other rows
        (lambda t: t[:, :-1].contiguous(), None),
    ],
)
def test_rows_that_were_added_or_left_out_are_told(planted, make, words):
    model, folder = planted()
    replaced(K, make)(folder)
    (finding,) = [f for f in model.check(folder)[1] if f.code == "shape-differs"]
    assert finding.severity == "wrong"
    assert finding.what.partition(": ")[2] == (words or "")


def test_findings_and_files_are_sorted(planted):
    model, folder = planted("shards")
    save_file({n: torch.ones(1) for n in ("z", "b", "k")}, folder / SHARDS[0])
    removed("tokenizer.json")(folder)
    tier, findings = model.check(folder)
    order = [(list(MEANINGS).index(f.code), f.where, f.what) for f in findings]
    assert len(order) > 10
    assert order == sorted(order)
    assert tier.figures["files"] == sorted(SHARDS)


# --- planted faults: what is done to a merge -> all that is found above a note

FAULTS = {
    "missing tensor": (dropped(K), {("tensor-missing", K)}),
    "missing changed tensor": (dropped(Q), {("tensor-missing", Q)}),
    "added tensor": (added("model.extra.weight", torch.ones(2, 3)),
                     {("tensor-extra", "model.extra.weight")}),
    "left-over adapter tensor": (added("model.layers.0.attn.q_proj.lora_A.weight",
                                       torch.ones(3, 12)),
                     {("tensor-extra", "model.layers.0.attn.q_proj.lora_A.weight")}),
    "renamed tensor": (renamed(K, "model.layers.1.attn.key.weight"),
                       {("tensor-missing", K), ("tensor-extra", "model.layers.1.attn.key.weight")}),
    "transposed tensor": (replaced(K, lambda t: t.T.contiguous()), {("transposed", K)}),
    "transposed changed tensor": (replaced(Q, lambda t: t.T.contiguous()), {("transposed", Q)}),
    "other shape": (replaced(K, lambda t: t[:7].contiguous()), {("shape-differs", K)}),
    "cast tensor": (replaced(K, lambda t: t.half()), {("dtype-differs", K)}),
    "cast changed tensor": (replaced(Q, lambda t: t.float()), {("dtype-differs", Q)}),
    "cast integers": (replaced("model.position_ids", lambda t: t.int()),
                      {("dtype-differs", "model.position_ids")}),
    "negative zeros": (replaced("model.norm.weight", lambda t: -t),
                       {("bytes-differ", "model.norm.weight")}),
    "buffer left out": (dropped("model.rotary.inv_freq"),
                        {("computed-buffer", "model.rotary.inv_freq")}),
    "buffer stored": (added("model.layers.0.attn.rotary_emb.inv_freq", torch.ones(6)),
                      {("computed-buffer", "model.layers.0.attn.rotary_emb.inv_freq")}),
    "packed untouched tensor": (replaced(K, lambda t: t.view(torch.uint8).contiguous()),
                                {("not-comparable", "single")}),
    "terminal escapes": (added("a\x1b[31mb", torch.ones(2)), {("tensor-extra", r"a\x1b[31mb")}),
    "truncated file": (lambda f: weights(f).write_bytes(weights(f).read_bytes()[:-5]),
                       {("file-unreadable", "model.safetensors")}),
    "empty file": (lambda f: weights(f).write_bytes(b""),
                   {("file-unreadable", "model.safetensors")}),
    "no weights": (removed("model.safetensors"), {("file-missing", "single")}),
    "adapter left": (both(written("adapter_config.json", "{}"),
                          lambda f: save_file({"x": torch.ones(1)},
                                              f / "adapter_model.safetensors")),
                     {("adapter-left", "adapter_config.json"),
                      ("adapter-left", "adapter_model.safetensors")}),
    "foreign weights": (lambda f: save_file({"x": torch.ones(1)}, f / "other.safetensors"),
                        {("file-extra", "other.safetensors")}),
    "no config": (removed("config.json"), {("config-missing", "config.json")}),
    "broken config": (written("config.json", "{"), {("config-missing", "config.json")}),
    "vocabulary": (config(vocab_size=41), {("config-vocab", "config.json: vocab_size")}),
    "no vocabulary": (without_keys("config.json", "vocab_size"),
                      {("config-vocab", "config.json: vocab_size")}),
    "tied": (config(tie_word_embeddings=True),
             {("config-tied", "config.json: tie_word_embeddings")}),
    "no word on tying": (without_keys("config.json", "tie_word_embeddings"),
                         {("config-tied", "config.json: tie_word_embeddings")}),
    "head lost": (dropped(HEAD), {("tensor-missing", HEAD),
                                  ("config-tied", "config.json: tie_word_embeddings")}),
    "dtype word": (config(torch_dtype="float32"), {("config-dtype", "config.json: dtype")}),
    "dtype in the new word": (both(without_keys("config.json", "torch_dtype"),
                                   config(dtype="float16")),
                              {("config-dtype", "config.json: dtype")}),
    "epsilon": (config(rms_norm_eps=1e-5), {("config-changed", "config.json: rms_norm_eps")}),
    "epsilon gone": (without_keys("config.json", "rms_norm_eps"),
                     {("config-changed", "config.json: rms_norm_eps")}),
    "theta": (config(rope_theta=500000.0), {("config-changed", "config.json: rope_theta")}),
    "theta in the new spelling": (
        both(without_keys("config.json", "rope_theta", "rope_scaling"),
             config(rope_parameters={"rope_theta": 500000.0, "rope_type": "default"})),
        {("config-changed", "config.json: rope_theta"), ("config-rewritten", "config.json")}),
    "scaled positions": (config(rope_scaling={"type": "linear", "factor": 2.0}),
                         {("config-changed", "config.json: factor"),
                          ("config-changed", "config.json: rope_type")}),
    "architecture": (config(architectures=["MistralForCausalLM"]),
                     {("config-changed", "config.json: architectures")}),
    "quantisation told": (config(quantization_config={"load_in_4bit": True}),
                          {("config-changed", "config.json: quantization_config")}),
    "foreign code": (config(auto_map={"AutoModel": "evil.Model"}),
                     {("config-changed", "config.json: auto_map")}),
    "config rewritten": (config(transformers_version="5.0.0", use_cache=True),
                         {("config-rewritten", "config.json")}),
    "tokenizer missing": (removed("tokenizer.json"), {("tokenizer-missing", "tokenizer.json")}),
    "tokenizer settings missing": (removed("tokenizer_config.json"),
                                   {("tokenizer-missing", "tokenizer_config.json"),
                                    ("tokenizer-missing", "chat_template")}),
    "tokenizer broken": (written("tokenizer.json", "{"), {("tokenizer-differs", "tokenizer.json")}),
    "vocabulary changed": (edit("tokenizer.json", model=TOKENIZER["model"] | {
        "vocab": {"a": 1, "b": 0, "ab": 2}}), {("tokenizer-differs", "tokenizer.json")}),
    "merges changed": (edit("tokenizer.json", model=TOKENIZER["model"] | {"merges": ["b a"]}),
                       {("tokenizer-differs", "tokenizer.json")}),
    "added token changed": (edit("tokenizer.json", added_tokens=[{"id": 4, "content": "<end>"}]),
                            {("tokenizer-differs", "tokenizer.json")}),
    "tokenizer spelled anew": (edit("tokenizer.json", model=TOKENIZER["model"] | {
        "merges": [["a", "b"]]}), {("tokenizer-rewritten", "tokenizer.json")}),
    "special token": (edit("tokenizer_config.json", bos_token="<x>"),
                      {("tokenizer-differs", "tokenizer_config.json")}),
    "special token spelled anew": (edit("tokenizer_config.json", bos_token={"content": "<s>"}),
                                   {("tokenizer-rewritten", "tokenizer_config.json")}),
    "template": (edit("tokenizer_config.json", chat_template="{{ other }}"),
                 {("tokenizer-differs", "chat_template"),
                  ("tokenizer-rewritten", "tokenizer_config.json")}),
    "template moved": (both(without_keys("tokenizer_config.json", "chat_template"),
                            written("chat_template.jinja", "{{ messages }}")),
                       {("tokenizer-rewritten", "tokenizer_config.json")}),
    "settings missing": (removed("generation_config.json"),
                         {("side-file-missing", "generation_config.json")}),
    "settings changed": (edit("generation_config.json", eos_token_id=3),
                         {("side-file-differs", "generation_config.json")}),
    "licence changed": (written("LICENSE", "Pay.\n"), {("side-file-differs", "LICENSE")}),
    "manifest broken": (written("dora_export.json", "[]"),
                        {("manifest-differs", "dora_export.json")}),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(planted, fault):
    model, merged = planted()
    plant, expected = FAULTS[fault]
    plant(merged)
    assert model.found(merged) == expected


SHARD_FAULTS = {
    "shard missing": (removed(SHARDS[1]), {("file-missing", SHARDS[1])}),
    "shard truncated": (lambda f: (f / SHARDS[0]).write_bytes((f / SHARDS[0]).read_bytes()[:-1]),
                        {("file-unreadable", SHARDS[0])}),
    "total size": (edit(INDEX, metadata={"total_size": 7}), {("total-size", INDEX)}),
    "index missing": (removed(INDEX), {("index-wrong", INDEX)}),
    "index broken": (written(INDEX, "{"), {("index-wrong", INDEX)}),
    "index without a map": (edit(INDEX, weight_map=None),
                            {("index-wrong", INDEX)}),
}  # fmt: skip


@pytest.mark.parametrize("fault", SHARD_FAULTS)
def test_a_planted_fault_in_shards_is_found(planted, fault):
    model, merged = planted("shards")
    plant, expected = SHARD_FAULTS[fault]
    plant(merged)
    assert model.found(merged) == expected


def test_tensors_lost_with_a_shard_are_listed_once(planted):
    model, merged = planted("shards")
    lost = set(load_file(merged / SHARDS[1]))
    (merged / SHARDS[1]).unlink()
    tier, findings = model.check(merged)
    assert [(f.code, f.what) for f in findings] == [
        ("file-missing", f"the index places {len(lost)} tensors in it")
    ]
    assert tier.figures["tensors_lost_with_files"] == sorted(lost)


def places(folder):
    return json.loads((folder / INDEX).read_text())["weight_map"]


def test_an_index_that_points_to_the_wrong_shard_is_found(planted):
    model, merged = planted("shards")
    wrong = {**places(merged), K: SHARDS[0]}
    assert places(merged)[K] == SHARDS[1]
    small.edit_json(merged / INDEX, weight_map=wrong)
    (finding,) = model.check(merged)[1]
    assert (finding.code, finding.where) == ("index-wrong", K)
    assert finding.what == f"{INDEX} places it in {SHARDS[0]}, found in {SHARDS[1]}"


def test_an_index_that_omits_or_makes_up_a_tensor_is_found(planted):
    model, merged = planted("shards")
    entries = {n: f for n, f in places(merged).items() if n != K} | {"made.up": SHARDS[0]}
    small.edit_json(merged / INDEX, weight_map=entries)
    assert model.found(merged) == {("index-wrong", K), ("index-wrong", "made.up")}


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/x.safetensors", "..", "a\\b"])
def test_an_index_that_leaves_the_folder_is_told_and_not_followed(planted, name):
    model, merged = planted("shards")
    save_file({K: torch.ones(1)}, merged.parent / "model.safetensors")
    small.edit_json(merged / INDEX, weight_map={**places(merged), K: name})
    found = model.found(merged)
    assert ("index-wrong", INDEX) in found
    assert ("shape-differs", K) not in found


def test_a_shard_of_the_base_left_over_is_found(planted):
    model, merged = planted("shards")
    shutil.copy(model.folder / "base" / SHARDS[0], merged / "model-00003-of-00003.safetensors")
    assert model.found(merged) == {("file-extra", "model-00003-of-00003.safetensors")}


def test_a_whole_file_that_loaders_take_before_the_index_is_wrong(planted):
    model, merged = planted("shards")
    save_file(tensors(), merged / "model.safetensors")
    (finding,) = model.check(merged)[1]
    assert (finding.code, finding.severity) == ("tensor-twice", "wrong")
    assert "loaders take this file instead" in finding.what


def test_a_tensor_in_two_shards_is_found(planted):
    model, merged = planted("shards")
    stored = load_file(merged / SHARDS[0])
    save_file(stored | {K: load_file(merged / SHARDS[1])[K]}, merged / SHARDS[0])
    assert ("tensor-twice", K) in model.found(merged)


# --- bytes


@pytest.mark.parametrize("position", [0, -1, 481], ids=["first", "last", "middle"])
@pytest.mark.parametrize("threads", [1, 3])
def test_one_flipped_byte_is_found_and_placed(planted, monkeypatch, position, threads):
    monkeypatch.setattr(tensor_ledger, "CHUNK_ELEMENTS", 50)
    monkeypatch.setattr(tensor_ledger, "SPAN_ELEMENTS", 130)
    model, merged = planted()
    flip(weights(merged), EMBED, position)
    (finding,) = model.check(merged, threads=threads)[1]
    element = (position % 960) // 2  # bfloat16, 40 rows of 12
    assert (finding.code, finding.where) == ("bytes-differ", EMBED)
    assert finding.what == (
        f"1 of 480 elements (1 byte), the first at [{element // 12}, {element % 12}]"
    )


@pytest.mark.parametrize("name", sorted(set(tensors()) - {f"{n}.weight" for n in small.LINEARS}))
def test_a_flipped_byte_is_found_in_every_untouched_tensor(planted, name):
    model, merged = planted()
    flip(weights(merged), name, 1)
    assert model.found(merged) == {("bytes-differ", name)}


def test_many_differences_are_counted(planted, monkeypatch):
    monkeypatch.setattr(tensor_ledger, "CHUNK_ELEMENTS", 50)
    model, merged = planted()
    for position in (200, 100, 900, 901):
        flip(weights(merged), EMBED, position)
    tier, _ = model.check(merged)
    assert tier.figures["different"] == {EMBED: {"elements": 3, "bytes": 4, "first": 50}}


def test_a_file_that_shrinks_while_it_is_read_is_a_finding(planted):
    model, merged = planted()
    subject, plan = open_subject(merged), model.plan()
    weights(merged).write_bytes(weights(merged).read_bytes()[:-1])
    last = max(load_file(weights(model.folder / "base")), key=lambda n: place_of(
        weights(model.folder / "merged"), n)[0])  # fmt: skip
    findings = check_ledger(plan, subject, {})[1]
    assert ("file-unreadable", f"model.safetensors: tensor '{last}'") in {
        (f.code, f.where) for f in findings
    }


# --- the whole model


def cast_all(folder, dtype):
    change(folder, lambda t: {n: v.to(dtype) if v.is_floating_point() else v
                              for n, v in t.items()})  # fmt: skip


WORDS = {torch.float32: "float32", torch.float16: "float16"}


@pytest.mark.parametrize("dtype", WORDS)
def test_a_cast_of_the_whole_model_is_a_note(planted, dtype):
    model, merged = planted()
    cast_all(merged, dtype)
    assert model.found(merged) - BUFFER_CAST == {("config-dtype", "config.json: dtype")}
    config(torch_dtype=WORDS[dtype])(merged)
    tier, findings = model.check(merged)
    assert {f.code for f in findings} - {"computed-buffer"} == {"model-cast"}
    assert MEANINGS["model-cast"].severity == "note"
    assert "after the cast to" in tier.summary


BUFFER_CAST = {("computed-buffer", "model.rotary.inv_freq")}


@pytest.mark.parametrize("dtype", WORDS)
@pytest.mark.parametrize("element", [0, 95])
def test_one_wrong_element_of_a_cast_model_is_found(planted, dtype, element):
    model, merged = planted()
    config(torch_dtype=WORDS[dtype])(merged)
    cast_all(merged, dtype)
    flip(weights(merged), K, element * dtype.itemsize)
    found = model.found(merged) - BUFFER_CAST
    assert found == {("bytes-differ", K)}


def test_the_sign_of_zero_is_compared_after_a_cast(planted):
    model, merged = planted()
    config(torch_dtype="float16")(merged)
    cast_all(merged, torch.float16)
    tiny = tensors()[K] * 1e-30  # zeros in float16, of either sign
    base = tensors() | {K: tiny}
    other = Model.__new__(Model)
    other.folder = merged.parent
    small.write_base(other.folder / "base", base, config=CONFIG)
    write_sides(other.folder / "base")
    shutil.copytree(model.folder / "adapter", other.folder / "adapter")
    change(merged, lambda t: {**t, K: tiny.half()})
    assert other.found(merged) == BUFFER_CAST
    change(merged, lambda t: {**t, K: tiny.half().abs()})
    assert ("bytes-differ", K) in other.found(merged)


def test_a_cast_that_cuts_off_instead_of_rounding_is_found(tmp_path):
    base = {n: v.float() * 1.003 if v.is_floating_point() else v for n, v in tensors().items()}
    model = Model.__new__(Model)
    model.folder = tmp_path
    small.write_base(tmp_path / "base", base, config=CONFIG | {"torch_dtype": "float32"})
    small.write_adapter(tmp_path / "adapter", small.adapter_tensors(base))
    merged = tmp_path / "merged"
    dora_export.merge(tmp_path / "base", tmp_path / "adapter", merged, verify="none", dtype="bf16")
    (merged / "dora_export.json").unlink()
    assert {f.code for f in model.check(merged)[1]} == {"model-cast", "computed-buffer"}
    cut = (base[K].view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)
    change(merged, lambda t: {**t, K: cut})
    assert model.found(merged) - BUFFER_CAST == {("bytes-differ", K)}
    # All of them cut: a rounding that is off by one is still the same base.
    change(merged, lambda t: {
        n: (base[n].view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)
        if v.is_floating_point() else v for n, v in t.items()})  # fmt: skip
    assert "another-base" not in {c for c, _ in model.found(merged)}


def test_another_base_is_one_finding(planted):
    model, merged = planted()
    other = tensors(seed=9)
    adapted = {f"{n}.weight" for n in small.LINEARS}
    change(merged, lambda t: {n: v if n in adapted else other[n] for n, v in t.items()})
    tier, findings = model.check(merged)
    assert [f.code for f in findings] == ["another-base"]
    assert findings[0].what.startswith("7 of 8 tensors")  # position ids are alike
    assert len(tier.figures["different"]) == 7


def test_one_retrained_tensor_is_not_another_base(planted):
    model, merged = planted()
    change(merged, lambda t: {**t, K: tensors(seed=9)[K], EMBED: tensors(seed=9)[EMBED]})
    assert model.found(merged) == {("bytes-differ", K), ("bytes-differ", EMBED)}


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_a_model_without_the_adapter_is_found(planted, dtype):
    model, merged = planted()
    save_file(tensors(), weights(merged), {"format": "pt"})
    if dtype:
        cast_all(merged, dtype)
        config(torch_dtype="float32")(merged)
    assert model.found(merged) - BUFFER_CAST == {("nothing-applied", "single")}


def test_a_model_with_one_layer_applied_is_not_called_the_base(planted):
    model, merged = planted()
    base = tensors()
    change(merged, lambda t: {n: v if n == Q else base[n] for n, v in t.items()})
    assert model.found(merged) == set()  # the other layers are the oracle's to find


def test_a_model_with_a_packed_layer_is_not_called_the_base(planted):
    model, merged = planted()
    save_file(tensors() | {Q: torch.zeros(120, 1, dtype=torch.uint8)}, weights(merged))
    assert model.found(merged) == set()  # packed or not at all applied: the oracle's to say


def merged_with(folder, config):
    """A model whose base has this config, and its merge."""
    base = tensors()
    small.write_base(folder / "base", base, config=config)
    small.write_adapter(folder / "adapter", small.adapter_tensors(base))
    dora_export.merge(folder / "base", folder / "adapter", folder / "merged", verify="none")
    model = Model.__new__(Model)
    model.folder = folder
    return model, folder / "merged"


def test_a_config_that_never_had_a_vocabulary_is_right(tmp_path):
    without = {k: v for k, v in CONFIG.items() if k != "vocab_size"}
    model, merged = merged_with(tmp_path, without)
    assert model.check(merged)[1] == ()


@pytest.mark.parametrize(("layers", "wrong"), [(2, False), (3, True)])
def test_a_value_under_another_name_is_the_same_only_if_it_is_equal(planted, layers, wrong):
    model, merged = planted()
    without_keys("config.json", "num_hidden_layers")(merged)
    config(n_layer=layers)(merged)
    assert ("config-changed" in {c for c, _ in model.found(merged)}) == wrong


# --- tied models


def test_a_tied_model_said_to_be_untied_is_wrong(planted):
    model, merged = planted("tied")
    config(tie_word_embeddings=False)(merged)
    assert model.found(merged) == {("config-tied", "config.json: tie_word_embeddings")}


def test_a_stored_head_equal_to_the_embedding_is_a_note(planted):
    model, merged = planted("tied")
    change(merged, lambda t: {**t, HEAD: t[EMBED].clone()})
    (finding,) = model.check(merged)[1]
    assert (finding.code, finding.where, finding.severity) == ("head-stored", HEAD, "note")


def test_a_stored_head_that_differs_from_a_tied_embedding_is_wrong(planted):
    model, merged = planted("tied")
    change(merged, lambda t: {**t, HEAD: t[EMBED] + 1})
    assert model.found(merged) == {
        ("tensor-extra", HEAD),
        ("config-tied", "config.json: tie_word_embeddings"),
    }


def with_both_ends(folder, flag):
    """A base that ties its ends and stores both."""
    base = tensors(head=False)
    base[HEAD] = base[EMBED].clone()
    small.write_base(folder / "base", base, config=CONFIG | {"tie_word_embeddings": flag})
    small.write_adapter(folder / "adapter", small.adapter_tensors(base))
    dora_export.merge(folder / "base", folder / "adapter", folder / "merged", verify="none")
    dropped(HEAD)(folder / "merged")
    model = Model.__new__(Model)
    model.folder = folder
    return model


def test_a_tied_head_left_out_is_a_note(tmp_path):
    model = with_both_ends(tmp_path, True)
    (finding,) = model.check(tmp_path / "merged")[1]
    assert (finding.code, finding.where, finding.severity) == ("head-left-out", HEAD, "note")


def test_an_untied_head_left_out_is_wrong_though_it_was_equal(tmp_path):
    model = with_both_ends(tmp_path, False)
    assert ("tensor-missing", HEAD) in model.found(tmp_path / "merged")


# --- names


def test_an_untouched_merge_has_all_side_files_equal_the_config_too(planted):
    model, merged = planted()
    figures = model.check(merged)[0].figures
    assert figures["side_files_equal"] == figures["side_files"] >= 4
    edit("config.json", note="mine")(merged)
    assert model.check(merged)[0].figures["side_files_equal"] == figures["side_files"] - 1


def test_one_prefix_before_all_names_is_a_warning(planted):
    model, merged = planted()
    change(merged, lambda t: {n if n == HEAD else f"llama.{n}": v for n, v in t.items()})
    assert model.found(merged) == {("names-prefixed", "single")}
    flip(weights(merged), f"llama.{K}", 3)
    assert ("bytes-differ", K) in model.found(merged)


def test_a_wrapper_before_all_names_is_wrong(planted):
    model, merged = planted()
    change(merged, lambda t: {f"base_model.{n}": v for n, v in t.items()})
    codes = {code for code, _ in model.found(merged)}
    assert {"tensor-missing", "tensor-extra"} <= codes


def test_a_quantised_model_is_not_called_wrong(planted):
    model, merged = planted()

    def pack(stored):
        packed = {}
        for name, tensor in stored.items():
            if name.endswith("_proj.weight"):
                packed[name] = torch.zeros(tensor.numel() // 2, 1, dtype=torch.uint8)
                packed[f"{name}.absmax"] = torch.ones(4)
                packed[f"{name}.quant_map"] = torch.ones(16)
            else:
                packed[name] = tensor
        return packed

    change(merged, pack)
    config(quantization_config={"load_in_4bit": True})(merged)
    assert model.found(merged) == {
        ("not-comparable", "single"),
        ("config-rewritten", "config.json"),
    }


# --- other things that are not wrong


def test_the_adapters_tokenizer_wins(tmp_path):
    base = tensors()
    small.write_base(tmp_path / "base", base, config=CONFIG)
    write_sides(tmp_path / "base")
    small.write_adapter(tmp_path / "adapter", small.adapter_tensors(base))
    own = TOKENIZER | {"added_tokens": [{"id": 3, "content": "<other>"}]}
    small.write_json(tmp_path / "adapter" / "tokenizer.json", own)
    small.write_json(tmp_path / "adapter" / "tokenizer_config.json", {"bos_token": "<s>"})
    merged = tmp_path / "merged"
    dora_export.merge(tmp_path / "base", tmp_path / "adapter", merged, verify="none")
    model = Model.__new__(Model)
    model.folder = tmp_path
    assert model.check(merged)[1] == ()
    shutil.copy(tmp_path / "base" / "tokenizer.json", merged / "tokenizer.json")
    assert model.found(merged) == {("tokenizer-differs", "tokenizer.json")}


def test_another_tools_settings_are_read_for_what_they_mean(planted):
    model, merged = planted()
    settings = {"transformers_version": "5.0.0", "eos_token_id": 2}
    small.write_json(merged / "generation_config.json", settings)
    assert model.found(merged) == {("side-file-differs", "generation_config.json")}
    (merged / "dora_export.json").unlink()
    assert model.found(merged) == set()


def test_a_single_file_is_compared_without_its_folder(planted):
    model, merged = planted()
    flip(weights(merged), K, 0)
    findings = model.check(weights(merged))[1]
    assert [(f.code, f.severity) for f in findings] == [
        ("bytes-differ", "wrong"),
        ("weights-only", "note"),
    ]


@pytest.mark.parametrize(
    ("base", "merged", "changes"),
    [
        ({"rope_theta": 5e3}, {"rope_parameters": {"rope_theta": 5000, "rope_type": "default"}}, 0),
        ({"rope_theta": 5e3}, {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}, 1),
        ({"rope_theta": 5e3, "rope_scaling": {"type": "linear", "factor": 2}},
         {"rope_parameters": {"rope_theta": 5e3, "rope_type": "linear", "factor": 2.0}}, 0),
        ({"rope_theta": 5e3, "rope_scaling": {"type": "linear", "factor": 2}},
         {"rope_parameters": {"rope_theta": 5e3, "rope_type": "linear", "factor": 4.0}}, 1),
        ({"rope_theta": 5e3, "rope_scaling": {"type": "linear", "factor": 2}},
         {"rope_theta": 5e3}, 2),
        ({"rotary_emb_base": 10000, "rotary_pct": 0.25},
         {"rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 0.25}}, 0),
        ({"rotary_emb_base": 10000, "rotary_pct": 0.25},
         {"rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 0.5}}, 1),
        ({"rope_theta": 1e6, "rope_local_base_freq": 1e4},
         {"rope_parameters": {"full_attention": {"rope_theta": 1e6, "rope_type": "default"},
                              "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"}}},
         0),
        ({"rope_theta": 1e6, "rope_local_base_freq": 1e4},
         {"rope_parameters": {"full_attention": {"rope_theta": 1e6, "rope_type": "default"},
                              "sliding_attention": {"rope_theta": 1e6, "rope_type": "default"}}},
         1),
        ({"rope_theta": 1e6, "rope_local_base_freq": 1e4}, {"rope_theta": 1e6}, 1),
        ({"max_position_embeddings": 64, "rope_scaling": {"rope_type": "yarn", "factor": 2}},
         {"max_position_embeddings": 64, "rope_parameters": {
             "rope_type": "yarn", "factor": 2, "original_max_position_embeddings": 64}}, 0),
        ({"max_position_embeddings": 64, "rope_scaling": {"rope_type": "yarn", "factor": 2}},
         {"max_position_embeddings": 64, "rope_parameters": {
             "rope_type": "yarn", "factor": 2, "original_max_position_embeddings": 32}}, 1),
        ({}, {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}, 0),
        ({"rope_theta": 5e5}, {}, 1),
        ({"rope_theta": 1e4}, {}, 0),
    ],
)  # fmt: skip
def test_rotary_positions_are_compared_across_spellings(base, merged, changes):
    assert len(rope_changes(base, merged)) == changes


@pytest.mark.parametrize("dtype", [F32, F16, BF16, F64])
def test_a_cast_is_compared_with_torchs_own(dtype):
    """Every float16 and every binade of float32 cast as torch casts it; odd values included."""
    make = np.random.default_rng(0)
    values = np.ldexp(make.standard_normal(20_000), make.integers(-150, 128, 20_000))
    special = [0.0, -0.0, np.inf, -np.inf, np.nan, 65519.9, 65520.0, 3.3961775e38, 1e-45]
    source = torch.from_numpy(np.concatenate([values, special]).astype(np.float32))
    stored = source.to(getattr(torch, dtype.torch))
    raw = [t.contiguous().view(torch.uint8).numpy() for t in (source, stored)]
    here, there = raw
    assert tensor_ledger._chunk(here, F32, there, dtype).elements == 0
    for i in np.flatnonzero(np.isfinite(values.astype(np.float32)))[::997]:
        off = there.copy()
        off[i * dtype.itemsize] ^= 1
        assert tensor_ledger._chunk(here, F32, off, dtype).first == i


# --- the manifest


def test_the_manifest_of_another_adapter_is_found(planted, tmp_path):
    model, merged = planted()
    other = Model.__new__(Model)
    other.folder = tmp_path / "other"
    shutil.copytree(model.folder / "base", other.folder / "base")
    small.write_adapter(other.folder / "adapter", small.adapter_tensors(tensors(), seed=77))
    findings = other.check(merged)[1]
    assert [(f.code, f.what) for f in findings] == [
        ("manifest-differs", "adapter: adapter_model.safetensors had another SHA-256")
    ]


@pytest.mark.parametrize(
    ("part", "content", "what"),
    [
        ("base", {"files": [{"name": "model.safetensors", "bytes": 3}]}, "had 3 bytes"),
        ("base", {"files": []}, "does not name model.safetensors"),
        ("tensors", {"merged": 1}, "1 merged, here 4 merged"),
        ("changed", {}, "4 tensors differ"),
    ],
)
def test_a_manifest_that_tells_otherwise_is_found(planted, part, content, what):
    model, merged = planted()
    small.edit_json(merged / "dora_export.json", **{part: content})
    (finding,) = model.check(merged)[1]
    assert finding.code == "manifest-differs"
    assert what in finding.what


# --- merges by PEFT, whose saving rewrites config and tokenizer


LLAMA = CONFIG | {"intermediate_size": 28, "num_key_value_heads": 1, "hidden_act": "silu",
                  "max_position_embeddings": 64}  # fmt: skip
GPT2 = {
    "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_embd": 12, "n_head": 3,
    "n_layer": 2, "n_positions": 16, "n_ctx": 16, "vocab_size": 40, "layer_norm_epsilon": 1e-5,
    "activation_function": "gelu_new", "torch_dtype": "float32",
}  # fmt: skip


def by_peft(folder, config, targets, dtype, *, without_prefix=None):
    """A base with an old-style config, a trained DoRA adapter, and PEFT's own merge of both."""
    import peft
    import tokenizers
    import transformers

    folder.mkdir(exist_ok=True)
    torch.manual_seed(3)
    kind = transformers.AutoConfig.for_model(**config)
    model = transformers.AutoModelForCausalLM.from_config(kind).to(dtype)
    for weight in model.parameters():  # no norms of ones, no biases of zeros
        weight.data.add_(torch.randn_like(weight) * 0.1)
    model.save_pretrained(folder / "base")
    small.write_json(folder / "base" / "config.json", config)
    words = tokenizers.models.WordLevel({f"w{i}": i for i in range(40)}, unk_token="w0")
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(words), unk_token="w0", eos_token="w2"
    )
    fast.chat_template = "{{ messages }}"
    fast.save_pretrained(folder / "base")

    def load():
        return transformers.AutoModelForCausalLM.from_pretrained(folder / "base", dtype=dtype)

    settings = peft.LoraConfig(r=3, lora_alpha=5, use_dora=True, target_modules=targets,
                               fan_in_fan_out=config["model_type"] == "gpt2")  # fmt: skip
    wrapped = peft.get_peft_model(load(), settings)
    for name, weight in wrapped.named_parameters():
        if "lora_" in name:
            weight.data.add_(torch.randn_like(weight) * 0.1)
    wrapped.save_pretrained(folder / "adapter")
    merged = peft.PeftModel.from_pretrained(load(), folder / "adapter").merge_and_unload()
    merged.save_pretrained(folder / "merged")
    transformers.AutoTokenizer.from_pretrained(folder / "base").save_pretrained(folder / "merged")
    if without_prefix:  # as the files on the hub are
        small.edit_tensors(folder / "base" / "model.safetensors", lambda t: {
            n.removeprefix(without_prefix): v for n, v in t.items()})  # fmt: skip
    made = Model.__new__(Model)
    made.folder = folder
    return made


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merge_by_peft_has_nothing_wrong(tmp_path, tied, dtype):
    word = str(dtype).removeprefix("torch.")
    config = LLAMA | {"tie_word_embeddings": tied, "torch_dtype": word}
    model = by_peft(tmp_path, config, ["q_proj", "down_proj"], dtype)
    tier, findings = model.check(tmp_path / "merged")
    assert {f.code for f in findings} == {"config-rewritten", "tokenizer-rewritten"}
    assert tier.figures["untouched_equal"] == tier.figures["untouched"]
    # What is wrong beside PEFT's own rewriting is still found.
    edit("config.json", rope_parameters={"rope_theta": 5e5, "rope_type": "default"})(
        tmp_path / "merged")  # fmt: skip
    flip(tmp_path / "merged" / "model.safetensors", "model.norm.weight", 7)
    wrong = {f.code for f in model.check(tmp_path / "merged")[1] if f.severity == "wrong"}
    assert wrong == {"bytes-differ", "config-changed"}


def test_a_merge_by_peft_in_another_type_is_compared_after_the_cast(tmp_path):
    model = by_peft(tmp_path, LLAMA, ["q_proj", "down_proj"], torch.bfloat16)
    merged = tmp_path / "merged"
    cast_all(merged, torch.float32)
    small.edit_json(merged / "config.json", dtype="float32")
    assert {f.code for f in model.check(merged)[1]} == {
        "config-rewritten", "tokenizer-rewritten", "model-cast",
    }  # fmt: skip


def test_a_merge_by_peft_that_adds_the_models_prefix_is_a_warning(tmp_path):
    model = by_peft(tmp_path, GPT2, ["c_attn", "c_proj"], torch.float32,
                    without_prefix="transformer.")  # fmt: skip
    codes = {f.code for f in model.check(tmp_path / "merged")[1]}
    assert codes == {"names-prefixed", "config-rewritten", "tokenizer-rewritten"}


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_a_config_saved_anew_by_transformers_has_nothing_wrong(tmp_path, family):
    import transformers

    stored = CONFIGS[family]
    small.write_json(tmp_path / "config.json", stored)
    transformers.AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path / "anew")
    written = json.loads((tmp_path / "anew" / "config.json").read_text())
    assert written != stored
    findings, rewritten = compare(stored, written, quantised=False)
    assert findings == ()
    assert rewritten != ()
    key = next(k for k in ("num_hidden_layers", "n_layer", "num_layers") if k in stored)
    other = {k: v for k, v in written.items() if k != "text_config"}
    other = {**written.get("text_config", {}), **other, key: 77}
    assert {f.code for f in compare(stored, other, quantised=False)[0]} == {"config-changed"}


# --- opening


def test_no_such_model_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="Check the path of the merged model"):
        open_subject(tmp_path / "none")


def test_pickled_weights_ask_for_leave(planted):
    model, merged = planted()
    torch.save(load_file(weights(merged)), merged / "pytorch_model.bin")
    weights(merged).unlink()
    with pytest.raises(InputError, match="--allow-pickle"):
        open_subject(merged)
    subject = open_subject(merged, allow_pickle=True)
    assert {f.severity for f in check_ledger(model.plan(), subject, {})[1]} <= {"note"}


@pytest.mark.parametrize(
    ("plant", "maker"),
    [
        (lambda f: None, "dora-export "),
        (both(removed("dora_export.json"), config(unsloth_version="2025.1")), "unsloth"),
        (removed("dora_export.json"), "another tool (transformers 4.40.0)"),
        (both(removed("dora_export.json"),
              lambda f: save_file(load_file(weights(f)), weights(f), {"format": "mlx"})), "mlx"),
    ],
)  # fmt: skip
def test_the_maker_is_told(planted, plant, maker):
    _, merged = planted()
    plant(merged)
    assert open_subject(merged).maker.startswith(maker)
