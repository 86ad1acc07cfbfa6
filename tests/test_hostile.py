"""Files made to do harm: each is refused in little time and little memory."""

import os
import shutil
import struct
from pathlib import Path

import onnxruntime
import pytest
import torch

import dora_export
from dora_export import limits
from dora_export.errors import AdapterError, InputError, VerifyError
from dora_export.onnx import wire
from dora_export.onnx.graph_file import open_graph
from dora_export.storage.safetensors import read_header
from tests import small
from tests.fuzz.targets import interrupted, session, swappable
from tests.measured import measured

MB = 1 << 20
MOST_MEMORY = 300 * MB
MOST_SECONDS = 30  # of CPU; the slowest takes 5
EMPTY = '"dtype":"U8","shape":[0],"data_offsets":[0,0]'
SOME = 3 * 10**6  # more than any entry may have: what follows is not read
ALL = limits.HEADER_BYTES - 100


def tensors(count):
    return ",".join(f'"{i:x}":{{{EMPTY}}}' for i in range(count))


def metadata(text):
    return f'{{"__metadata__":{{"a":"{text}"}}}}'


HEADERS = {
    "blanks": (lambda: "{" + " " * ALL, "not JSON"),
    "blanks behind it": (lambda: "{}" + " " * ALL + "x", "something follows"),
    "a long name": (lambda: f'{{"{"n" * SOME}":0}}', "more than 20000 characters"),
    "a long number": (lambda: f'{{"w":{"1" * SOME}}}', "more than 20000 characters"),
    "a long shape": (lambda: f'{{"w":{{"shape":[{"0," * SOME}0]}}}}', "more than 20000 characters"),
    "lists": (lambda: f'{{"w":[{"[]," * SOME}0]}}', "more than 20000 characters"),
    "objects": (lambda: f'{{"w":[{"{}," * SOME}0]}}', "more than 20000 characters"),
    "depth": (lambda: '{"w":' + "[" * SOME, "nested too deeply"),
    "depth of objects": (lambda: '{"w":' + '{"a":' * SOME, "nested too deeply"),
    "wide characters": (lambda: f'{{"w":"{"🦜" * SOME}"}}', "more than 20000"),
    "metadata": (lambda: metadata("x" * ALL), "more than 10000000 characters"),
    "wide metadata": (lambda: metadata("🦜" * (ALL // 4)), "more than 10000000 characters"),
    "entries of metadata": (
        lambda: '{"__metadata__":{' + ",".join(f'"{i}":""' for i in range(60_000)) + "}}",
        "more than 50000 entries",
    ),
}
TENSORS = {
    "more tensors than may be": (lambda: f"{{{tensors(500_000)}}}", "more than 300000 tensors"),
    "as many tensors as may be": (lambda: f"{{{tensors(limits.HEADER_TENSORS)}}}", ""),
}


@pytest.mark.parametrize("case", HEADERS)
def test_hostile_header_takes_little_memory_and_time(case, tmp_path):
    check_header(tmp_path, *HEADERS[case])


@pytest.mark.nightly
@pytest.mark.parametrize("case", TENSORS)
def test_header_of_many_tensors_takes_little_memory_and_time(case, tmp_path):
    check_header(tmp_path, *TENSORS[case])


def check_header(tmp_path, make, reason):
    text = make().encode()[: limits.HEADER_BYTES]
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
    found = measured(
        f"read_header(Path({str(path)!r}))",
        imports="from dora_export.storage.safetensors import read_header",
    )
    assert reason in found.said, found.said[:500]
    assert bool(found.said) == bool(reason)
    assert found.peak <= MOST_MEMORY
    assert found.seconds <= MOST_SECONDS
    print(f"\n{found.peak / MB:.0f} MB, {found.seconds:.2f} s")


def listed(entry, count):
    return f'{{"a":[{",".join([entry] * count)}]}}'


CONFIGS = {
    "objects": lambda: listed('{"a":0}', 490_000),
    "lists": lambda: listed("[]", 490_000),
    "wide text": lambda: listed(f'"{"x" * 300}"', 100_000).replace('"a"', '"🦜"'),
    "numbers": lambda: listed("1e5", 990_000),
}


@pytest.mark.nightly
@pytest.mark.parametrize("case", CONFIGS)
def test_hostile_config_takes_little_memory(case, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(CONFIGS[case]())
    found = measured(
        f"read_json(Path({str(path)!r}))",
        imports="from dora_export.checkpoints.folder import read_json",
    )
    assert found.said == ""
    assert found.peak <= MOST_MEMORY
    print(f"\n{case}: {found.peak / MB:.0f} MB, {found.seconds:.2f} s")


def delimited(number, data):
    return wire.varint(number << 3 | wire.DELIMITED) + wire.varint(len(data)) + data


RELU = delimited(4, b"Relu")
MANY = limits.GRAPH_FIELDS - 100
GRAPHS = {  # each as many fields as may be, or twice as many
    "nodes": lambda n: delimited(1, RELU) + delimited(1, b"") * n,
    "inputs": lambda n: delimited(1, RELU + delimited(1, b"") * n),
    "ints": lambda n: delimited(1, RELU + delimited(5, delimited(8, b"\1" * n))),
    "dimensions": lambda n: delimited(1, RELU) + delimited(5, delimited(1, b"\1" * n)),
    "tensors": lambda n: (
        delimited(1, RELU)
        + delimited(5, delimited(8, b"a")) * (n * limits.GRAPH_TENSORS // limits.GRAPH_FIELDS)
    ),
    "text": lambda n: delimited(1, RELU) + delimited(10, b"n" * (n * (limits.GRAPH_BYTES // MANY))),
}


@pytest.mark.parametrize(
    ("case", "times"),
    [pytest.param(case, times, marks=[] if (case, times) == ("text", 2) else pytest.mark.nightly)
     for case in GRAPHS for times in (1, 2)],
)  # fmt: skip
def test_hostile_graph_takes_little_memory_and_time(case, times, tmp_path):
    path = tmp_path / "x.onnx"
    opset = delimited(8, wire.varint(2 << 3) + wire.varint(18))
    path.write_bytes(opset + delimited(7, GRAPHS[case](MANY * times)))
    found = measured(
        f"open_graph(Path({str(path)!r}))",
        imports="import onnx\nfrom dora_export.onnx.graph_file import open_graph",
    )
    assert ("No graph is known that has as much" in found.said) == (times > 1), found.said
    assert found.peak <= MOST_MEMORY
    assert found.seconds <= MOST_SECONDS
    print(f"\n{found.peak / MB:.0f} MB, {found.seconds:.2f} s")


# --- what fuzzing found ---


@pytest.mark.parametrize("name", ["x.safetensors", "x.onnx"])
def test_pipe_is_not_waited_for(name, tmp_path):
    os.mkfifo(tmp_path / name)
    read = read_header if name.endswith("safetensors") else open_graph
    # With a writer and some bytes in it, so that a reader would not wait, and the test neither.
    with (tmp_path / name).open("r+b", buffering=0) as pipe:
        pipe.write(bytes(1 << 16))
        with pytest.raises(InputError, match="not a regular file"):
            read(tmp_path / name)


TOKENIZER = {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, "added_tokens": []}
FORGED = {
    "merges of numbers": ("tokenizer.json", {**TOKENIZER, "model": {"merges": [["a", 1.5]]}}),
    "a token whose number is a list": (
        "tokenizer.json", {**TOKENIZER, "added_tokens": [{"id": [1], "content": "a"}]},
    ),
    "a file whose name is a list": ("dora_export.json", {"base": {"files": [{"name": []}]}}),
}  # fmt: skip


@pytest.mark.parametrize("case", FORGED)
def test_forged_files_of_a_merged_model_are_findings(case, tmp_path):
    small.write_pair(tmp_path)
    small.write_json(tmp_path / "base/tokenizer.json", TOKENIZER)
    dora_export.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    name, content = FORGED[case]
    small.write_json(tmp_path / "out" / name, content)
    report = dora_export.verify(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert report.verdict == "wrong" or report.findings
    assert any(name in f.where for f in report.findings)


def test_names_from_files_reach_no_terminal_as_they_are(tmp_path):
    """Neither colours nor titles, neither other directions of text nor lines of their own."""
    evil = "\x1b]0;owned\x07\x1b[5m\u202e\nerror: all your base"
    small.write_pair(tmp_path)
    small.edit_json(tmp_path / "adapter/adapter_config.json", base_model_name_or_path=evil,
                    modules_to_save=[evil])  # fmt: skip
    small.edit_tensors(
        tmp_path / "adapter/adapter_model.safetensors",
        lambda tensors: tensors | {f"base_model.model.a.lora_velora_embed{evil}": torch.ones(1)},
    )
    (tmp_path / "base" / f"notes{evil.replace('/', '')}.txt").write_text("x")
    outputs = [
        small.run("inspect", tmp_path / "adapter", "--base", tmp_path / "base"),
        small.run("merge", tmp_path / "base", tmp_path / "adapter", "-o", tmp_path / "out"),
        small.run("verify", tmp_path / "base", tmp_path / "adapter", tmp_path / "out"),
        small.run("inspect", tmp_path / "adapter", "--json"),
        small.run("merge", tmp_path / "base", tmp_path / "adapter", "-o", tmp_path / "o", "--json"),
        small.run("merge", tmp_path / "base", tmp_path / "adapter", "-o", tmp_path / "out"),
    ]
    assert [r.exit_code for r in outputs] == [0, 0, 0, 0, 0, 2]
    for result in outputs:
        text = result.output
        assert all(c.isprintable() or c == "\n" for c in text), f"{text!a}"
        assert not any(line.startswith("error: all") for line in text.splitlines())


CORPUS = Path(__file__).parent / "fuzz/corpus"
WRONG = [
    ("nvlabs", {"base_model_name_or_path": 3}, "base_model_name_or_path: expected a name, got 3"),
    ("method-lokr", {"base_model_name_or_path": 1e308}, "base_model_name_or_path: expected a name"),
    ("method-lokr", {"modules_to_save": 2**31}, "modules_to_save: expected a list of names"),
    ("method-lokr", {"token_indices": [1.5]}, "token_indices: expected a list of token ids"),
    ("method-lokr", {"r": 10**400}, "rank_pattern gives 1000.*expected a rank"),
    ("method-lokr", {"alpha": float("nan")}, "alpha_pattern gives nan, expected a number"),
    ("method-lokr", {"alpha": 10**400}, "alpha_pattern gives 1000.*expected a number"),
    ("method-lokr", {"alpha_pattern": {"square": 0}}, "gives 0, expected a number other than 0"),
]


@pytest.mark.parametrize(("seed", "fields", "reason"), WRONG)
def test_fields_of_a_config_that_are_of_another_type_are_refused(seed, fields, reason, tmp_path):
    shutil.copytree(CORPUS / seed, tmp_path / "x")
    assert dora_export.inspect(tmp_path / "x/adapter", tmp_path / "x/base")
    small.edit_json(tmp_path / "x/adapter/adapter_config.json", **fields)
    with pytest.raises(AdapterError, match=rf"(?s){reason}.*\.$"):
        dora_export.inspect(tmp_path / "x/adapter", tmp_path / "x/base")


@pytest.mark.parametrize("name", ["model.onnx", "*.onnx_adapter"])
def test_files_that_onnxruntime_does_not_take_are_refused(name, tmp_path, capsys):
    """Although the manifest that a stranger wrote to them has their digests."""
    swappable(tmp_path)
    capsys.readouterr()
    (path,) = (tmp_path / "out").rglob(name)
    path.write_bytes(b"x" + path.read_bytes())
    with pytest.raises(InputError, match="onnxruntime does not take it"):
        session(tmp_path)
    assert capsys.readouterr() == ("", "")


def test_a_session_prints_nothing_of_a_graph(tmp_path, monkeypatch, capsys):
    """onnxruntime prints what it met before it tries again, as it is, for a terminal to obey."""

    def refuse(*_):
        raise ValueError("\x1b]0;owned\x07")

    swappable(tmp_path)
    monkeypatch.setattr(onnxruntime.InferenceSession, "_create_inference_session", refuse)
    capsys.readouterr()
    with pytest.raises(InputError, match=r"onnxruntime does not take it: \\x1b"):
        session(tmp_path)
    assert capsys.readouterr() == ("", "")


def test_a_session_warns_of_no_input_for_adapters(tmp_path, capfd):
    """onnxruntime would of each, by its name as it is; from below Python."""
    swappable(tmp_path)
    capfd.readouterr()
    session(tmp_path)
    assert capfd.readouterr() == ("", "")


def test_words_about_many_long_names_stay_short(tmp_path):
    small.write_pair(tmp_path)
    dora_export.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    names = {f"{'n' * 4000}{i}": "v" * 4000 for i in range(40)}
    small.edit_json(tmp_path / "out/config.json", **names)
    for folder, content in (("out", names), ("base", {"q": 1})):
        small.write_json(tmp_path / folder / "tokenizer_config.json", content)
        small.write_json(tmp_path / folder / "generation_config.json", content)
    report = dora_export.verify(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    told = [finding.what for finding in report.findings]
    assert any("40 values: " in what and " more" in what for what in told)
    assert max(map(len, (*told, *report.notes))) < 1000


def test_values_that_are_no_number_are_what_they_were(tmp_path):
    """As in configs of experiments: NaN is not equal to itself, but is the same value."""
    small.write_pair(tmp_path)
    nan = {"router_jitter": float("nan"), "inner": [{"a": float("nan")}]}
    small.edit_json(tmp_path / "base/config.json", **nan)
    small.write_json(tmp_path / "base/generation_config.json", nan)
    dora_export.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", dtype="fp16")
    small.edit_json(tmp_path / "out/config.json", inner=[{"a": 1.0}])
    small.write_json(tmp_path / "out/generation_config.json", nan | {"more": 1})
    report = dora_export.verify(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    told = [finding.what for finding in report.findings]
    assert any("inner" in finding.where + finding.what for finding in report.findings)
    assert not any("router_jitter" in what for what in told)


@pytest.mark.parametrize("embedding", [True, False])
@pytest.mark.parametrize(
    "said",
    [
        {"vocab_size": float("nan")},
        {"rope_theta": float("nan")},
        {"rope_scaling": {"rope_type": "linear", "factor": float("nan")}},
        {"tie_word_embeddings": float("nan")},
    ],
    ids=lambda said: next(iter(said)),
)
def test_keys_with_checks_of_their_own_are_what_they_were_as_well(tmp_path, said, embedding):
    base = small.base_tensors()
    adapter = small.adapter_tensors(base)
    if not embedding:
        del base["model.embed_tokens.weight"]
    small.write_base(tmp_path / "base", base, config=small.CONFIG | said)
    small.write_adapter(tmp_path / "adapter", adapter)
    # a cast edits the config, so that its bytes do not settle it
    dora_export.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", dtype="fp16")
    report = dora_export.verify(
        tmp_path / "base", tmp_path / "adapter", tmp_path / "out", dtype="fp16"
    )
    assert report.findings == ()


def test_staged_header_that_changed_on_the_disk_is_found_and_dropped(tmp_path):
    """Although what it renames, buffers that models compute anew, may have any name in a merge."""
    interrupted(tmp_path)
    staged = tmp_path / ".out.dora_export-partial/model.safetensors"
    staged.write_bytes(staged.read_bytes().replace(b"rotary.inv_freq", b"rotery.inv_freq"))
    with pytest.raises(VerifyError, match="begins otherwise than an earlier run"):
        dora_export.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", threads=1)
    report = dora_export.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", threads=1)
    assert report.resumed_bytes == 0
    tensors = small.base_tensors()
    small.check_merged(tmp_path / "out", tensors, small.adapter_tensors(tensors))
