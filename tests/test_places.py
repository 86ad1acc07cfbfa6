"""Outputs and inputs under names and in places that nobody thinks of."""

import json
import os
import unicodedata
from pathlib import Path

import pytest

import dora_export
from dora_export.errors import InputError, OutputError
from dora_export.writers.names import NAME_BYTES, hidden_name
from tests import faults, small
from tests.faults import attempt


@pytest.fixture
def at(tmp_path):
    small.write_pair(tmp_path)
    return tmp_path


def published(folder):
    """Check an output, through a link since the safetensors library wants paths that are text."""
    tensors, link = small.base_tensors(), folder.parent / "looked-at"
    link.symlink_to(folder)
    small.check_merged(link, tensors, small.adapter_tensors(tensors))
    link.unlink()


NAMES = {
    "spaces": "a b  c ",
    "composed": unicodedata.normalize("NFC", "modèle-ü"),
    "decomposed": unicodedata.normalize("NFD", "modèle-ü"),
    "emoji": "🦜👩‍🔬",
    "leading dash": "-o",
    "option": "--force",
    "newline": "a\nb",
    "escape": "\x1b[31mred\x1b[0m",
    "quotes": "a'b\"c`d$e",
    "percent": "100%s{}{0}",
    "not text": os.fsdecode(b"out-\xff\xfe"),
    "right to left": "نموذج",
    "dots": "...",
    "hidden": ".hidden",
    "reserved on Windows": "CON",
    "255 bytes": "x" * 255,
    "255 bytes, wide": "é" * 127 + "x",
    "254 bytes, emoji": "🦜" * 63 + "xy",
    "hidden name of 255": "y" * (255 - len("..dora_export-partial")),
    "hidden name of 256": "y" * (256 - len("..dora_export-partial")),
}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_output_of_any_name_is_published_and_replaced(at, name):
    folder = at / "place"
    folder.mkdir()
    for force in (False, True):
        dora_export.merge(at / "base", at / "adapter", folder / name, force=force)
        assert os.listdir(folder) == [name]
        published(folder / name)
    with pytest.raises(OutputError, match="exists already"):
        dora_export.merge(at / "base", at / "adapter", folder / name)


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_inputs_of_any_name_are_read(at, name):
    for folder in ("base", "adapter"):
        (at / folder / f"n{name[:40]}.txt").write_text("beside")
        (at / f"{folder}-").mkdir()
        (at / folder).rename(at / f"{folder}-" / name)
    inputs = at / "base-" / name, at / "adapter-" / name
    before = small.entries(at)
    dora_export.merge(*inputs, at / "out")
    assert (at / "out" / f"n{name[:40]}.txt").read_text() == "beside"
    published(at / "out")
    assert {k: v for k, v in small.entries(at).items() if not k.startswith("out")} == before
    manifest = json.loads((at / "out" / "dora_export.json").read_text(encoding="utf-8"))
    assert (manifest["base"]["path"], manifest["adapters"][0]["path"]) == (name, name)
    report = dora_export.inspect(inputs[1], inputs[0])
    assert report.fits
    json.dumps(report.to_dict())


# What is printed is one thing for all names; these are the hard ones.
PRINTED = ("newline", "escape", "leading dash", "not text", "right to left", "255 bytes, wide")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, id=what, marks=[] if what in PRINTED else pytest.mark.nightly)
     for what, name in NAMES.items()],
)  # fmt: skip
def test_commands_print_any_name(at, name):
    """With nothing in it that a terminal would obey, and no character that is an error."""
    result = faults.command("merge", "base", "adapter", f"-o{name}", cwd=at)
    assert result.returncode == 0, result.stderr
    published(at / name)
    lost = faults.command("inspect", "--", f"{name}-", cwd=at)
    faults.check_refused(lost, "no such file or folder")
    for text in (result.stdout + result.stderr, lost.stderr):
        assert b"\x1b" not in text
        text.decode()


@pytest.mark.parametrize("name", ["x" * 255, "é" * 127, "🦜" * 63, os.fsdecode(b"\xff" * 255), "x"])
def test_hidden_names_fit_are_apart_and_hidden(name):
    found = {hidden_name(name, role) for role in ("partial", "replaced")}
    assert len(found) == 2
    for hidden in found:
        assert len(os.fsencode(hidden)) <= NAME_BYTES
        assert hidden.startswith("." + name[:40])
        assert ".dora_export-" in hidden
    other = name[:-1] + ("y" if name[-1] != "y" else "z")
    assert hidden_name(other, "partial") not in found
    assert hidden_name(name, "partial") == hidden_name(name, "partial")


def test_hidden_name_is_the_plain_one_where_it_fits():
    assert hidden_name("out", "partial") == ".out.dora_export-partial"
    assert hidden_name("out", "replaced") == ".out.dora_export-replaced"


def test_name_that_is_too_long_is_one_clear_refusal(at):
    (at / "place").mkdir()
    with pytest.raises(dora_export.DoraExportError, match="too long") as caught:
        dora_export.merge(at / "base", at / "adapter", at / "place" / ("x" * 256))
    faults.check_clear(caught.value)
    assert os.listdir(at / "place") == []


@pytest.mark.parametrize("spare", [0, 10, 20, 23, 24, 30, 45, 60, 80])
def test_path_near_the_longest_is_published_or_one_clear_refusal(at, spare):
    """Some of these leave room for the output's folder, but not for the files in it."""
    deepest = 4095 - spare
    folder = at / "deep"
    folder.mkdir()
    here = os.getcwd()
    names, length = [], len(os.fsencode(folder))
    while length + 1 + 200 < deepest - 10:
        names.append("d" * 200)
        length += 201
    try:
        os.chdir(folder)  # made step by step: the whole path could not be named at once
        for name in names:
            os.mkdir(name)
            os.chdir(name)
    finally:
        os.chdir(here)
    output = folder.joinpath(*names, "o" * (deepest - length - 1))
    assert len(os.fsencode(output)) == deepest
    if spare > len("/dora_export.json") + len("..dora_export-partial"):
        dora_export.merge(at / "base", at / "adapter", output)
        published(output)
        return
    with pytest.raises(dora_export.DoraExportError, match=r"too long\. Use a shorter path"):
        dora_export.merge(at / "base", at / "adapter", output)
    assert os.listdir(output.parent) == []


# --- what -o may be ---


def test_file_in_place_of_the_output_is_refused_and_kept(at):
    (at / "out").write_text("mine")
    assert "exists already (not this tool's output)" in attempt_file(at)
    assert (at / "out").read_text() == "mine"


def attempt_file(at, **options):
    with pytest.raises(OutputError) as caught:
        dora_export.merge(at / "base", at / "adapter", at / "out", **options)
    faults.check_clear(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("leads_to", ["nothing", "folder", "full", "file", "itself"])
def test_link_in_place_of_the_output_is_refused_and_kept(at, leads_to, force):
    (at / "folder").mkdir()
    (at / "full").mkdir()
    (at / "full" / "thesis.txt").write_text("mine")
    (at / "file").write_text("mine")
    (at / "out").symlink_to("out" if leads_to == "itself" else leads_to)
    before = small.entries(at / "full")
    attempt_file(at, force=force)
    assert os.readlink(at / "out") == ("out" if leads_to == "itself" else leads_to)
    assert small.entries(at / "full") == before
    assert os.listdir(at / "folder") == []
    assert (at / "file").read_text() == "mine"


def test_output_below_a_file_is_refused(at):
    (at / "parent").write_text("mine")
    assert "Not a directory" in attempt(at, "parent/out")
    assert (at / "parent").read_text() == "mine"


def test_output_below_a_link_to_nothing_is_refused(at):
    (at / "parent").symlink_to("gone")
    assert "parent: a link to nothing" in attempt(at, "parent/out")
    assert not (at / "gone").exists()


def test_output_below_a_link_to_a_folder_goes_there(at):
    (at / "elsewhere").mkdir()
    (at / "parent").symlink_to("elsewhere")
    dora_export.merge(at / "base", at / "adapter", at / "parent" / "out")
    assert os.listdir(at / "elsewhere") == ["out"]
    published(at / "elsewhere" / "out")


@pytest.mark.parametrize(
    ("output", "place"),
    [("new/a/b", "new/a/b"), ("out/", "out"), ("./out", "out"), (".//out/.", "out"),
     ("inner/../out", "out"), ("inner/..//deeper/../out/", "out"), ("inner/../../place/out", "out"),
     ("link/../out", "far/out"), ("out/../out", "out")],
)  # fmt: skip
def test_relative_outputs_go_where_the_system_says(at, monkeypatch, output, place):
    (at / "place" / "inner").mkdir(parents=True)
    (at / "place" / "far" / "away").mkdir(parents=True)
    (at / "place" / "link").symlink_to("far/away")
    monkeypatch.chdir(at / "place")
    result = faults.command("merge", "../base", "../adapter", "-o", output, cwd=at / "place")
    assert result.returncode == 0, result.stderr
    published(at / "place" / place)


@pytest.mark.parametrize("output", ["..", "inner/..", ".", "", "/", "inner/../inner/../.."])
def test_outputs_without_a_name_of_their_own_are_refused(at, monkeypatch, output):
    (at / "place" / "inner").mkdir(parents=True)
    monkeypatch.chdir(at / "place")
    before = small.entries(at)
    with pytest.raises(OutputError) as caught:
        dora_export.merge("../base", "../adapter", output)
    faults.check_clear(caught.value)
    assert small.entries(at) == before


def test_folder_that_one_stands_in_is_refused_even_if_it_is_empty(at, monkeypatch):
    (at / "out").mkdir()
    monkeypatch.chdir(at / "out")
    for output in (".", at / "out"):
        with pytest.raises(OutputError, match="leave you in a folder that is gone"):
            dora_export.merge(at / "base", at / "adapter", output)
    assert os.path.samefile(".", at / "out")


def test_output_in_a_folder_that_is_gone_is_refused(at, monkeypatch):
    (at / "gone").mkdir()
    monkeypatch.chdir(at / "gone")
    (at / "gone").rmdir()
    with pytest.raises(dora_export.DoraExportError) as caught:
        dora_export.merge(at / "base", at / "adapter", "out")
    faults.check_clear(caught.value)


def test_name_with_a_nul_character_is_refused(at):
    for output in ("a\0b", "c/\0"):
        with pytest.raises(OutputError, match="NUL character") as caught:
            dora_export.merge(at / "base", at / "adapter", at / output)
        faults.check_clear(caught.value)
    with pytest.raises(InputError, match="no such file or folder"):
        dora_export.merge("a\0b", at / "adapter", at / "out")


# --- names of files in a base ---


def with_shard(at, name):
    """A base whose second shard has this name."""
    base = at / "named"
    small.write_shards(base, small.base_tensors())
    index = base / "model.safetensors.index.json"
    (base / "model-00002-of-00002.safetensors").rename(base / name)
    index.write_text(index.read_text().replace("model-00002-of-00002.safetensors", name))
    return base


@pytest.mark.parametrize("name", ["CON.safetensors", "aux.safetensors", "a b.safetensors",
                                  "🦜.safetensors"])  # fmt: skip
def test_shard_of_a_name_that_is_harmless_here_keeps_it(at, name):
    """On Windows no file has the first two, so that their shard is missing there."""
    if os.name == "nt":
        # These names stand for devices there, so that the case cannot be made.
        pytest.skip("Windows has no such files")
    assert attempt(at, base=with_shard(at, name).name) is None
    assert (at / "out" / name).is_file()


def test_shard_that_would_be_elsewhere_on_windows_is_refused(at):
    refusal = attempt(at, base=with_shard(at, "a:b.safetensors").name)
    assert "names a file outside its folder: 'a:b.safetensors'" in refusal


@pytest.mark.parametrize("name", ["model.safetensors.", "model.safetensors ", "CON", "model"])
def test_shard_of_a_name_that_says_no_kind_is_refused(at, name):
    refusal = attempt(at, base=with_shard(at, name).name)
    assert "names files that hold no weights" in refusal


def test_config_with_other_line_ends_keeps_them(at):
    text = json.dumps(small.CONFIG | {"torch_dtype": "bfloat16"}, indent=2)
    raw = b"\xef\xbb\xbf" * 0 + text.replace("\n", "\r\n").encode() + b"\r\n"
    (at / "base" / "config.json").write_bytes(raw)
    (at / "base" / "generation_config.json").write_bytes(b"{\r\n}\r\n")
    assert attempt(at) is None
    assert (at / "out" / "config.json").read_bytes() == raw
    assert (at / "out" / "generation_config.json").read_bytes() == b"{\r\n}\r\n"
    dora_export.merge(at / "base", at / "adapter", at / "wide", dtype="fp32")
    edited = raw.replace(b'"bfloat16"', b'"float32"')
    assert (at / "wide" / "config.json").read_bytes() == edited


def test_side_file_whose_name_is_no_text_is_taken_over(at):
    name = os.fsdecode(b"notes-\xff.txt")
    (at / "base" / name).write_text("x")
    assert attempt(at) is None
    assert (at / "out" / name).read_text() == "x"


def test_place_is_path_like(at):
    class Place:
        def __fspath__(self):
            return str(at / "out")

    dora_export.merge(at / "base", at / "adapter", Place())
    assert Path(Place()).is_dir()
