"""What lies beside the weights: config, tokenizer, index, manifest, card; and what does not."""

import json
import os
import shutil
import stat

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import dora_export
from dora_export import DoraExportError, limits
from dora_export.adapters import peft_parameters
from dora_export.errors import InputError
from dora_export.writers import side_files
from dora_export.writers.config import edited
from tests.rider_models import WARNINGS, edit_json, llama, logits, prepare, shapes, tensors
from tests.small import run

# Reasons stand beside the entries.
pytestmark = [pytest.mark.filterwarnings(w) for w in WARNINGS]

DORA = {"target_modules": ["q_proj", "down_proj"], "use_dora": True}
WRITTEN = {"README.md", "dora_export.json", "model.safetensors"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """One base and adapter for all; PEFT's warnings are not this module's subject."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return prepare(tmp_path_factory.mktemp("made"), llama(), **DORA)


@pytest.fixture
def case(made, tmp_path):
    """A copy to change."""
    for name in ("base", "adapter"):
        shutil.copytree(getattr(made, name), tmp_path / name)
    return type(made)(
        tmp_path / "base",
        tmp_path / "adapter",
        made.tokens,
        made.expected,
        made.before,
        made.model_class,
    )


def files(folder):
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def put(folder, *names, content=None):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if content is not None else f"{folder.name}: {name}")


# --- config.json ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "edits", "expected"),
    [
        (
            '{\n\t"a" : 1,\r\n\t"vocab_size"  :97 ,\n\t"b": [1, {"vocab_size": 3}]}',
            {"vocab_size": 100},
            '{\n\t"a" : 1,\r\n\t"vocab_size"  :100 ,\n\t"b": [1, {"vocab_size": 3}]}',
        ),
        (
            '{"tie_word_embeddings":true}',
            {"tie_word_embeddings": False},
            '{"tie_word_embeddings":false}',
        ),
        (
            '{"x": "vocab_size", "text_config": {"vocab_size": 97, "v": {"vocab_size": 1}}}\n',
            {"vocab_size": 100},
            '{"x": "vocab_size", "text_config": {"vocab_size": 100, "v": {"vocab_size": 1}}}\n',
        ),
        (
            '{"vocab_size": 97, "text_config": {"vocab_size": 97}}',
            {"vocab_size": 100},
            '{"vocab_size": 100, "text_config": {"vocab_size": 100}}',
        ),
        (
            '{\r\n\t"a": 1,\r\n\t"b": {"c": "}"}\r\n}',
            {"tie_word_embeddings": False},
            '{\r\n\t"a": 1,\r\n\t"b": {"c": "}"},\r\n\t"tie_word_embeddings": false\r\n}',
        ),
        ('{"a": "é\\u00e9 \\"{", "b": 1e-05}', {"b": 2}, '{"a": "é\\u00e9 \\"{", "b": 2}'),
        ('{"a":1}', {"b": 2}, '{"a":1, "b": 2}'),
        ("{}", {"b": 2}, '{"b": 2}'),
        (
            '{"torch_dtype": "float32", "dtype": "float32"}',
            {"dtype": "bfloat16"},
            '{"torch_dtype": "bfloat16", "dtype": "bfloat16"}',
        ),
        ('{"a": 1}', {"dtype": "bfloat16"}, '{"a": 1}'),
        ('{"text_config": null, "a": 1}', {"a": 2}, '{"text_config": null, "a": 2}'),
    ],
)
def test_a_config_is_changed_in_the_edited_values_only(text, edits, expected):
    assert edited(text, edits) == expected
    json.loads(expected)


def test_a_config_that_stays_true_is_copied_byte_for_byte(case):
    odd = (case.base / "config.json").read_text().replace("\n", "\r\n").replace("  ", "\t")
    (case.base / "config.json").write_bytes(odd.rstrip().encode())
    case.check(case.base.parent / "out")
    assert (case.base.parent / "out/config.json").read_bytes() == odd.rstrip().encode()


@pytest.mark.parametrize("key", ["torch_dtype", "dtype"])
def test_another_dtype_is_said_in_the_config_and_loaded(case, tmp_path, key):
    case.edit_config(**{"dtype": None, key: "float32"})
    dora_export.merge(case.base, case.adapter, tmp_path / "out", dtype="bf16")
    text = (case.base / "config.json").read_bytes()
    expected = text.replace(f'"{key}": "float32"'.encode(), f'"{key}": "bfloat16"'.encode())
    assert expected != text
    assert (tmp_path / "out/config.json").read_bytes() == expected
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    # bfloat16 keeps 8 bits: a few parts in a thousand per layer.
    assert case.distance(logits(model.float(), case.tokens)) < 0.1
    assert case.distance(case.before) > 0.2


# --- which files ------------------------------------------------------------------------------


def test_files_that_make_the_model_whole_are_copied(case, tmp_path):
    kept = [
        "generation_config.json",
        "preprocessor_config.json",
        "processor_config.json",
        "video_preprocessor_config.json",
        "modeling_custom.py",
        "configuration_custom.py",
        "LICENSE",
        "USE_POLICY.md",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "additional_chat_templates/tools.jinja",
        "sentencepiece.bpe.model",
        "custom_code/block.py",
    ]
    put(case.base, *kept)
    put(case.base, "tokenizer_config.json", content="{}")
    report = dora_export.merge(case.base, case.adapter, tmp_path / "out")
    assert files(tmp_path / "out") == {*kept, "config.json", *WRITTEN}
    assert set(report.side_files) == {*kept, "config.json"}
    for name in kept:
        assert (tmp_path / "out" / name).read_bytes() == (case.base / name).read_bytes()


def test_other_weights_and_leftovers_are_not_copied(case, tmp_path):
    put(
        case.base,
        "consolidated.safetensors",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "tf_model.h5",
        "flax_model.msgpack",
        "model.gguf",
        "model.onnx",
        "model.onnx_data",
        "onnx/model.onnx",
        "onnx/config.json",
        "openvino/openvino_model.xml",
        "original/params.json",
        "original/consolidated.00.pth",
        "optimizer.pt",
        "optimizer.bin",
        "scheduler.pt",
        "rng_state.pth",
        "training_args.bin",
        ".gitattributes",
        ".git/config",
        ".cache/huggingface/x.json",
        "adapter_config.json",
        "adapter_model.safetensors",
        "__pycache__/modeling.cpython-311.pyc",
    )
    put(case.base, "README.md", content="# the base's card")
    put(case.adapter, "README.md", "optimizer.pt", "trainer_state.json", "training_args.bin")
    dora_export.merge(case.base, case.adapter, tmp_path / "out")
    assert files(tmp_path / "out") == {"config.json", "generation_config.json", *WRITTEN}
    assert "the base's card" not in (tmp_path / "out/README.md").read_text()


def test_modules_of_sentence_transformers_are_copied_with_their_weights(case, tmp_path):
    modules = [{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}, {"path": "3_Dense"}]
    put(case.base, "modules.json", content=json.dumps(modules))
    put(
        case.base,
        "config_sentence_transformers.json",
        "sentence_bert_config.json",
        "1_Pooling/config.json",
        "2_Dense/config.json",
        "2_Dense/model.safetensors",
        "2_Dense/pytorch_model.bin",
        "3_Dense/config.json",
        "3_Dense/pytorch_model.bin",
        "other/model.safetensors",
        "pytorch_model.bin",
    )
    dora_export.merge(case.base, case.adapter, tmp_path / "out")
    assert files(tmp_path / "out") == {
        "config.json",
        "generation_config.json",
        "modules.json",
        "config_sentence_transformers.json",
        "sentence_bert_config.json",
        "1_Pooling/config.json",
        "2_Dense/config.json",
        "2_Dense/model.safetensors",
        "3_Dense/config.json",
        "3_Dense/pytorch_model.bin",
        *WRITTEN,
    }


def origins(case, output):
    """Name -> whose file it is, of the files that ``put`` made."""
    found = {}
    for name in files(output) - WRITTEN - {"config.json", "generation_config.json"}:
        owners = [
            folder.name
            for folder in (case.base, case.adapter)
            if (folder / name).is_file()
            and (folder / name).read_bytes() == (output / name).read_bytes()
        ]
        (found[name],) = owners
    return found


def test_an_adapters_tokenizer_wins_as_a_set(case, tmp_path):
    put(case.base, "tokenizer.json", "vocab.json", "merges.txt", "special_tokens_map.json")
    put(case.base, "added_tokens.json", "chat_template.jinja", "preprocessor_config.json")
    put(case.base, "tokenizer_config.json", content='{"of": "base"}')
    put(case.adapter, "tokenizer.json", "special_tokens_map.json", "chat_template.jinja")
    put(case.adapter, "tokenizer_config.json", content='{"of": "adapter"}')
    dora_export.merge(case.base, case.adapter, tmp_path / "out")
    assert origins(case, tmp_path / "out") == {
        "tokenizer.json": "adapter",
        "tokenizer_config.json": "adapter",
        "special_tokens_map.json": "adapter",
        "chat_template.jinja": "adapter",
        "preprocessor_config.json": "base",
    }
    listed = json.loads((tmp_path / "out/dora_export.json").read_text())["from_adapter"]
    assert set(listed) == {
        n for n, owner in origins(case, tmp_path / "out").items() if owner == "adapter"
    }


def test_an_adapters_chat_template_alone_wins_beside_the_bases_tokenizer(case, tmp_path):
    put(case.base, "tokenizer.json", "chat_template.jinja")
    put(case.base, "additional_chat_templates/old.jinja")
    put(case.base, "tokenizer_config.json", content='{"of": "base"}')
    put(case.adapter, "chat_template.jinja", "additional_chat_templates/new.jinja")
    dora_export.merge(case.base, case.adapter, tmp_path / "out")
    assert origins(case, tmp_path / "out") == {
        "tokenizer.json": "base",
        "tokenizer_config.json": "base",
        "chat_template.jinja": "adapter",
        "additional_chat_templates/new.jinja": "adapter",
    }


def test_a_template_inside_the_adapters_tokenizer_config_is_not_shadowed(case, tmp_path):
    """A chat_template.jinja of the base would win over it in transformers."""
    put(case.base, "tokenizer.json", "chat_template.jinja")
    put(case.base, "tokenizer_config.json", content='{"of": "base"}')
    put(case.adapter, "tokenizer.json")
    put(case.adapter, "tokenizer_config.json", content='{"chat_template": "{{ adapter }}"}')
    dora_export.merge(case.base, case.adapter, tmp_path / "out")
    assert origins(case, tmp_path / "out") == {
        "tokenizer.json": "adapter",
        "tokenizer_config.json": "adapter",
    }


def test_the_bases_template_stays_where_the_adapter_has_none(case, tmp_path):
    put(case.base, "tokenizer.json", "chat_template.jinja")
    put(case.adapter, "tokenizer.json")
    dora_export.merge(case.base, case.adapter, tmp_path / "out")
    assert origins(case, tmp_path / "out") == {
        "tokenizer.json": "adapter",
        "chat_template.jinja": "base",
    }


def test_a_tokenizer_config_without_a_tokenizer_is_not_mixed_in(case, tmp_path):
    put(case.base, "tokenizer.json")
    put(case.base, "tokenizer_config.json", content='{"of": "base"}')
    put(case.adapter, "tokenizer_config.json", content='{"of": "adapter"}')
    dora_export.merge(case.base, case.adapter, tmp_path / "out")
    assert set(origins(case, tmp_path / "out").values()) == {"base"}


@pytest.mark.skipif(os.name == "nt", reason="file modes are POSIX's")
@pytest.mark.parametrize("mask", [0o022, 0o027])
def test_modes_follow_the_umask(case, tmp_path, mask):
    put(case.base, "custom_code/block.py", "tokenizer.json")
    (case.base / "tokenizer.json").chmod(0o600)
    before = os.umask(mask)
    try:
        dora_export.merge(case.base, case.adapter, tmp_path / "out")
    finally:
        os.umask(before)
    for path in (tmp_path / "out").rglob("*"):
        expected = (0o777 if path.is_dir() else 0o666) & ~mask
        assert stat.S_IMODE(path.stat().st_mode) == expected, path
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o777 & ~mask


# --- shards and index -------------------------------------------------------------------------


def assert_index_true(folder):
    """Hold the index against what the shards hold, read by safetensors; return the shards."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    held, nbytes = {}, 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                held[name] = path.name
                tensor = file.get_tensor(name)
                nbytes += tensor.numel() * tensor.element_size()
    assert index["weight_map"] == held
    assert index["metadata"]["total_size"] == nbytes
    return set(held.values())


@pytest.mark.parametrize("dtype", [None, "bf16"])
def test_shards_keep_their_names_and_a_true_index(case, tmp_path, dtype):
    sharded = tmp_path / "sharded"
    case.model_class.from_pretrained(case.base).save_pretrained(sharded, max_shard_size="20KB")
    index = sharded / "model.safetensors.index.json"
    edit_json(index, metadata={"total_size": 1, "total_parameters": 2, "kept": "yes"})
    case.base = sharded
    dora_export.merge(case.base, case.adapter, tmp_path / "out", dtype=dtype)
    shards = assert_index_true(tmp_path / "out")
    assert shards == {p.name for p in sharded.glob("*.safetensors")}
    metadata = json.loads((tmp_path / "out" / index.name).read_text())["metadata"]
    assert metadata["kept"] == "yes"
    assert metadata["total_parameters"] == sum(t.numel() for t in tensors(sharded).values())
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out").float(), case.tokens)
    assert case.distance(found) < (0.1 if dtype else 1e-5)


@pytest.mark.parametrize("size", ["20KB", 5_000, "20KiB"])
def test_resharded_output_loads_and_keeps_the_bound(case, tmp_path, size):
    found, report = case.merged(tmp_path / "out", max_shard_size=size)
    assert case.distance(found) < 1e-5
    shards = assert_index_true(tmp_path / "out")
    assert len(shards) > 3
    assert shards == set(report.files)
    bound = {"20KB": 20_000, "20KiB": 20_480}.get(size, size)
    for shard in shards:
        with safe_open(tmp_path / "out" / shard, "pt") as file:
            sizes = [file.get_tensor(k).nbytes for k in file.keys()]  # noqa: SIM118
        assert sum(sizes) <= bound or len(sizes) == 1


def test_shards_are_put_together_where_they_fit(case, tmp_path):
    sharded = tmp_path / "sharded"
    case.model_class.from_pretrained(case.base).save_pretrained(sharded, max_shard_size="20KB")
    case.base = sharded
    found, report = case.merged(tmp_path / "out", max_shard_size="1GB")
    assert case.distance(found) < 1e-5
    assert report.files == ("model.safetensors",)
    assert set(shapes(tmp_path / "out")) == set(shapes(sharded))


def test_a_base_of_two_hundred_shards_is_merged(tmp_path):
    case = prepare(tmp_path, llama(num_hidden_layers=22), **DORA)
    held = tensors(case.base)
    (case.base / "model.safetensors").unlink()
    weight_map = {}
    for i, (name, tensor) in enumerate(held.items()):
        shard = f"model-{i + 1:05}-of-{len(held):05}.safetensors"
        save_file({name: tensor}, case.base / shard, metadata={"format": "pt"})
        weight_map[name] = shard
    assert len(weight_map) > 200
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (case.base / "model.safetensors.index.json").write_text(json.dumps(index))
    # 22 layers add their rounding up.
    found, _ = case.merged(tmp_path / "out")
    assert case.distance(found) < 1e-4
    assert case.distance(case.before) > 1e-1
    assert assert_index_true(tmp_path / "out") == set(weight_map.values())


# --- manifest and card ------------------------------------------------------------------------


def test_the_manifest_lists_every_changed_tensor_with_its_adapter_tensors(case, tmp_path):
    dora_export.merge(case.base, case.adapter, tmp_path / "out")
    content = json.loads((tmp_path / "out/dora_export.json").read_text())
    before, after = tensors(case.base), tensors(tmp_path / "out")
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert set(content["changed"]) == changed
    assert len(changed) == 4
    used = [key for entry in content["changed"].values() for key in entry["adapter_tensors"]]
    assert sorted(used) == sorted(shapes(case.adapter))
    assert content["tool"]["version"] == dora_export.__version__


def test_the_manifest_says_what_was_edited_in_the_config(tmp_path):
    case = prepare(
        tmp_path, llama(tie_word_embeddings=True), target_modules=["lm_head"], use_dora=True
    )
    dora_export.merge(case.base, case.adapter, tmp_path / "out")
    content = json.loads((tmp_path / "out/dora_export.json").read_text())
    assert content["config_edits"] == {"tie_word_embeddings": False}
    assert content["changed"]["lm_head.weight"]["status"] == "added"


def test_a_merged_base_is_refused_unless_it_is_allowed(case, tmp_path):
    first, _ = case.merged(tmp_path / "first")
    with pytest.raises(DoraExportError, match="--allow-merged-base"):
        dora_export.merge(tmp_path / "first", case.adapter, tmp_path / "second")
    assert not (tmp_path / "second").exists()
    dora_export.merge(tmp_path / "first", case.adapter, tmp_path / "second", allow_merged_base=True)
    second = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "second"), case.tokens)
    assert case.distance(first) < 1e-5
    assert case.distance(second) > 1e-2


def test_the_model_card_keeps_the_bases_licence(case, tmp_path):
    card = "---\nlanguage: en\nlicense: 'llama3.1'\ntags:\n- x\n---\n\n# Base\nlicense: no\n"
    (case.base / "README.md").write_text(card)
    dora_export.merge(case.base, case.adapter, tmp_path / "out")
    lines = (tmp_path / "out/README.md").read_text().splitlines()
    front = lines[1 : lines.index("---", 1)]
    assert lines[0] == "---"
    assert "license: llama3.1" in front
    other = "---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE\n---\n"
    (case.base / "README.md").write_text(other)
    dora_export.merge(case.base, case.adapter, tmp_path / "other")
    written = (tmp_path / "other/README.md").read_text()
    assert written.startswith(other.removesuffix("---\n"))
    (case.base / "README.md").write_text("# Base\nlicense: no\n")
    dora_export.merge(case.base, case.adapter, tmp_path / "without")
    assert "license:" not in (tmp_path / "without/README.md").read_text()


INJECTED = {
    "a tag that a YAML reader obeys": "!!python/object/apply:os.system ['touch x']",
    "an anchor": "&a [*a, *a]",
    "a map": "{license: mit}",
    "a comment": "mit # not",
    "a number": "1e3",
    "no text": "null",
    "quotes": 'own "licence": of ours',
    "an escape": "\x1b[31mred\u202e",
}


@pytest.mark.parametrize("value", INJECTED.values(), ids=INJECTED)
def test_the_model_card_says_of_strangers_what_they_said_and_nothing_else(case, value, tmp_path):
    import yaml

    (case.base / "README.md").write_text(f"---\nlicense: {value}\n---\n")
    edit_json(case.adapter / "adapter_config.json",
                    base_model_name_or_path=f"org/base\n---\nlicense: mit\n{value}")  # fmt: skip
    dora_export.merge(case.base, case.adapter, tmp_path / "out")
    text = (tmp_path / "out/README.md").read_text()
    front = yaml.safe_load(text.split("\n---\n")[0].removeprefix("---\n"))
    assert front == {
        "license": value.strip("'\""),
        "base_model": f"org/base\n---\nlicense: mit\n{value}",
        "tags": ["merged", "dora"],
    }
    assert text.count("\n---\n") == 1
    assert text.isascii()


@pytest.mark.parametrize("mark", list("`<>[]\\"))
def test_names_are_no_marks_in_a_line_of_the_model_card(case, mark):
    name = f"a{mark}b\n\x1b[5mc"
    adapter = case.adapter.rename(case.adapter.with_name(name))
    dora_export.merge(case.base, adapter, case.base.parent / "out")
    card = (case.base.parent / "out/README.md").read_text()
    assert "\x1b" not in card
    (heading,) = [line for line in card.splitlines() if line.startswith("# ")]
    assert heading.endswith("with a?b?n?x1b?5mc")


def test_no_more_of_a_model_card_is_read_than_its_front(case, tmp_path):
    with (case.base / "README.md").open("wb") as file:
        file.write(b"---\nlicense: mit\n---\n")
        file.truncate(1 << 40)  # a hole
    dora_export.merge(case.base, case.adapter, tmp_path / "out")
    assert "license: mit" in (tmp_path / "out/README.md").read_text()


def test_a_model_card_and_modules_that_are_links_to_elsewhere_are_not_read(case, tmp_path):
    """Neither the base's card nor the adapter's, which are read for a licence and for a trainer."""
    (tmp_path / "card").write_text("---\nlicense: of-another\n---\nUnsloth")
    (tmp_path / "modules").write_text('[{"path": "2_Dense"}]')
    for folder in (case.base, case.adapter):
        (folder / "README.md").unlink(missing_ok=True)
        (folder / "README.md").symlink_to(tmp_path / "card")
    dora_export.merge(case.base, case.adapter, tmp_path / "out")
    assert "of-another" not in (tmp_path / "out/README.md").read_text()
    assert not peft_parameters._card(case.adapter)
    (case.base / "modules.json").symlink_to(tmp_path / "modules")
    assert side_files._modules(case.base) == set()


def test_links_beside_the_weights_that_lead_elsewhere_are_refused(case, tmp_path):
    """A key or a password file of the user's must not be published with the model."""
    (tmp_path / "id_rsa").write_text("private")
    link = case.base / "notes.txt"
    link.symlink_to(tmp_path / "id_rsa")
    with pytest.raises(InputError, match=r"notes\.txt: a link that leads out of its folder"):
        dora_export.merge(case.base, case.adapter, tmp_path / "out")
    link.unlink()
    (case.base / "code").symlink_to(tmp_path)
    with pytest.raises(InputError, match=r"code: a link to a folder. Put a copy of the folder"):
        dora_export.merge(case.base, case.adapter, tmp_path / "out")
    (case.base / "code").unlink()
    (case.base / "README.md").symlink_to(tmp_path / "id_rsa")  # read for its licence only
    dora_export.merge(case.base, case.adapter, tmp_path / "out")
    assert not any("private" in p.read_text() for p in (tmp_path / "out").glob("*.md"))


def test_what_stays_behind_is_named_with_the_reason(case, tmp_path):
    os.mkfifo(case.base / "pipe.txt")
    (case.base / "device.txt").symlink_to("/dev/zero")
    with (case.base / "huge.txt").open("wb") as file:
        file.truncate(1 << 40)  # a hole
    put(case.base, "other.gguf", "README.md", ".hidden")  # what no merge takes over is not named
    ran = run("merge", case.base, case.adapter, "-o", tmp_path / "out", "--dry-run", "--json")
    told = json.loads(ran.output)["left_behind"]
    assert told == {
        "device.txt": "not a regular file",
        "huge.txt": "1100 GB, and a side file has at most 268 MB",
        "pipe.txt": "not a regular file",
    }
    ran = run("merge", case.base, case.adapter, "-o", tmp_path / "out")
    assert "left behind: device.txt (not a regular file), huge.txt (1100 GB, and" in ran.output
    assert "copy what the model needs" in ran.output
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names & told.keys() == set()
    for name in told:
        (case.base / name).unlink()
    ran = run("merge", case.base, case.adapter, "-o", tmp_path / "other")
    assert "left behind" not in ran.output


def test_tokenizer_of_an_adapter_is_bounded_as_other_side_files_are(case):
    with (case.adapter / "tokenizer.json").open("wb") as file:
        file.truncate(limits.SIDE_FILE_BYTES + 1)
    with pytest.raises(InputError, match=r"tokenizer\.json: .* a side file has at most"):
        dora_export.merge(case.base, case.adapter, case.base.parent / "out")


def test_side_files_are_copied_in_little_memory(case, monkeypatch):
    """Weights of a module of sentence-transformers are among them, of any size."""
    taken, base = [], case.base
    (base / "2_Dense").mkdir()
    content = os.urandom(3 * side_files.CHUNK + 5)
    (base / "2_Dense/model.safetensors").write_bytes(content)
    (base / "modules.json").write_text('[{"path": "2_Dense", "type": "Dense"}]')
    real = side_files.write_chunks

    def write(path, chunks, *, sync):
        def told():
            for chunk in chunks:
                taken.append(len(chunk))
                yield chunk

        real(path, told(), sync=sync)

    monkeypatch.setattr(side_files, "write_chunks", write)
    dora_export.merge(base, case.adapter, base.parent / "out")
    assert (base.parent / "out/2_Dense/model.safetensors").read_bytes() == content
    assert max(taken) == side_files.CHUNK
