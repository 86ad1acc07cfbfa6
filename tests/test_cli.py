"""The command line as people and scripts meet it."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch

import dora_export
from dora_export import api
from dora_export.cli import text
from dora_export.errors import VerifyError
from tests import small

SECONDS = 0.25  # on top of what Python itself takes to start
HEAVY = ("torch", "numpy", "transformers", "safetensors", "huggingface_hub", "onnx", "onnxruntime",
         "peft", "rich", "threadpoolctl")  # fmt: skip


@pytest.fixture
def at(tmp_path):
    small.write_pair(tmp_path)
    return tmp_path


def merge(at, *options):
    return small.run("merge", at / "base", at / "adapter", "-o", at / "out", *options)


def seconds(*command):
    """Processor time of the quickest of five runs, which other work on the machine leaves alone."""
    times = []
    for _ in range(5):
        with subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL) as process:
            _, status, used = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0
        times.append(used.ru_utime + used.ru_stime)
    return min(times)


COMMANDS = {
    "--help": ("-m", "dora_export", "--help"),
    "merge --help": ("-m", "dora_export", "merge", "--help"),
    "verify --help": ("-m", "dora_export", "verify", "--help"),
    "explain": ("-m", "dora_export", "explain", "not-applied"),
    "--version": ("-m", "dora_export", "--version"),
    "import dora_export": ("-c", "import dora_export"),
}


def test_help_and_import_are_quick():
    bare = seconds("-c", "pass")
    for name, command in COMMANDS.items():
        assert seconds(*command) <= bare + SECONDS, name


@pytest.mark.parametrize("command", COMMANDS)
def test_help_and_import_load_nothing_heavy(command):
    runs_module = COMMANDS[command][0] == "-m"
    code = (
        f"import runpy, sys; sys.argv[1:] = {COMMANDS[command][2:]!r}\n"
        "try: runpy.run_module('dora_export', run_name='__main__')\n"
        "except SystemExit: pass\n"
        if runs_module
        else COMMANDS[command][1] + "\nimport sys\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code + "print('loaded', *sys.modules)"],
        check=True, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    loaded = {m.partition(".")[0] for m in result.stdout.rpartition("loaded")[2].split()}
    assert "dora_export" in loaded
    assert not loaded & set(HEAVY)


def test_merge_on_the_cpu_loads_neither_torch_nor_transformers(at):
    code = (
        "import sys, dora_export\n"
        f"dora_export.merge({str(at / 'base')!r}, {str(at / 'adapter')!r}, {str(at / 'out')!r})\n"
        "print(*sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60
    )
    assert not {"torch", "transformers", "peft", "onnx"} & set(result.stdout.split())


def test_module_and_script_show_the_version():
    result = small.run_process("--version")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == f"dora-export {dora_export.__version__}\n"


@pytest.mark.parametrize("command", [(), ("merge",), ("verify",), ("inspect",), ("demo",)])
def test_help_names_what_it_is_about(command):
    result = small.run(*command, "--help")
    assert result.exit_code == 0
    assert "Usage:" in result.stdout
    expected = {
        (): ["merge", "verify", "explain", "inspect", "demo", "Exit codes: 0 done and right",
             "130 interrupted"],
        ("merge",): ["BASE", "ADAPTER", "--output", "--dry-run", "--json", "--allow-pickle",
                     "--zero-norm", "--max-shard-size", "[default: fast]"],
        ("verify",): ["BASE [ADAPTER]... MERGED", "--level", "--forward", "--prompt", "--html",
                      "[default: full]", "--json"],
        ("inspect",): ["ADAPTER", "--base", "--json"],
        ("demo",): ["--output"],
    }[command]  # fmt: skip
    for words in expected:
        assert words in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80


@pytest.mark.parametrize(
    "words", [("merge",), ("merge", "base"), ("inspect",), ("nonsense",), ("--nonsense",)]
)
def test_usage_errors_exit_with_2_on_stderr(words):
    for result in (small.run(*words), small.run_process(*words)):
        code = result.exit_code if hasattr(result, "exit_code") else result.returncode
        assert code == 2
        assert result.stdout == ""
        assert "Error:" in result.stderr
        assert "Usage:" in result.stderr
        assert "Traceback" not in result.stderr


def test_no_command_shows_help():
    result = small.run()
    assert "Usage:" in result.stdout + result.stderr
    assert "merge" in result.stdout + result.stderr


def test_failed_check_exits_with_1_and_publishes_nothing(at, monkeypatch):
    def fail(*_args, **_options):
        raise VerifyError("the output is not what was planned:\n  'w': 7 ulp\nNot published.")

    monkeypatch.setattr(api, "check", fail)
    result = merge(at)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: the output is not what was planned")
    assert result.stdout == ""
    assert {p.name for p in at.iterdir()} == {"base", "adapter"}


# --- merge ---


def test_merge_says_what_it_did(at):
    result = merge(at)
    assert result.exit_code == 0
    assert result.stderr == ""
    head, used, dtypes, sizes, where = result.stdout.splitlines()
    assert head == "merged 4 DoRA tensors (peft, magnitude one per output)"
    assert used == ("  adapter tensors used 12/12 · base tensors 4 unchanged · names as they are")
    assert dtypes.startswith("  BF16 -> BF16, math float32 or better · checked sampled rows: worst")
    assert " ulp in model.layers." in dtypes
    assert " in 1 weight file and " in sizes
    assert " side file" in sizes
    assert "peak memory " in sizes
    assert re.search(r"\(buffers at most \d[\d.]* MB\)", sizes)
    assert sizes.endswith(" s")
    assert where == f"-> {at / 'out'}/   manifest {at / 'out' / 'dora_export.json'}"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--verify", "none"), "not checked"),
        (("--verify", "full"), "checked every element: worst 0."),
        (("--dtype", "fp16"), "BF16 -> F16"),
        (("--dtype", "fp32"), "2 cast"),
        (("--precision", "float64"), "math float64"),
        (("--max-shard-size", "1kB"), " weight files and "),
    ],
)
def test_merge_says_what_the_options_did(at, options, words):
    result = merge(at, *options)
    assert result.exit_code == 0, result.stderr
    assert words in result.stdout


def test_one_of_a_thing_is_not_called_several(at):
    (at / "base" / "tokenizer.json").unlink()
    small.edit_tensors(
        at / "adapter/adapter_model.safetensors",
        lambda ts: {k: t for k, t in ts.items() if "layers.0.attn" in k},
    )
    small.edit_json(at / "adapter/adapter_config.json", layers_to_transform=[0])
    result = merge(at)
    assert "merged 1 DoRA tensor (peft" in result.stdout
    assert " in 1 weight file and 1 side file ·" in result.stdout


def test_doubts_go_to_stderr(at):
    small.edit_json(at / "adapter/adapter_config.json", base_model_name_or_path="org/other-model")
    result = merge(at)
    assert result.exit_code == 0
    assert result.stderr.startswith("warning: the adapter says its base is 'org/other-model'")
    assert "warning" not in result.stdout


def test_output_carries_no_colours_where_it_is_no_terminal(at):
    assert "\x1b" not in merge(at).stdout
    assert "\x1b" not in small.run("inspect", at / "adapter", "--base", at / "base").stdout
    assert "\x1b" not in small.run("merge", at / "x", at / "y", "-o", at / "z").stderr


@pytest.mark.parametrize("dry_run", [False, True])
def test_json_is_the_only_thing_on_stdout(at, dry_run):
    small.edit_json(at / "adapter/adapter_config.json", base_model_name_or_path="org/other-model")
    command = ["merge", at / "base", at / "adapter", "-o", at / "out", "--json"]
    result = small.run_process(*command, *["--dry-run"] * dry_run)
    assert result.returncode == 0
    assert result.stderr == ""
    report = json.loads(result.stdout)
    assert report["dry_run"] is dry_run
    assert report["output"] == str(at / "out")
    assert report["tensors"] == {"merged": 4, "unchanged": 4}
    assert (report["adapter_tensors_used"], report["adapter_tensors"]) == (12, 12)
    assert report["files"] == ["model.safetensors"]
    assert "org/other-model" in report["warnings"][0]
    assert (report["worst_ulp"] is None) is dry_run
    if not dry_run:
        written = sum(
            p.stat().st_size
            for p in (at / "out").iterdir()
            if p.name not in ("README.md", "dora_export.json")
        )
        assert abs(report["output_bytes"] - written) <= 100


def test_json_stays_silent_on_stdout_when_refused(at):
    result = small.run_process("merge", at / "nothing", at / "adapter", "-o", at / "out", "--json")
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")


def test_dry_run_writes_nothing_and_says_the_same_numbers(at):
    before = small.entries(at)
    result = merge(at, "--dry-run")
    assert result.exit_code == 0
    assert small.entries(at) == before
    lines = result.stdout.splitlines()
    assert lines[0] == "would merge 4 DoRA tensors (peft, magnitude one per output)"
    assert lines[-1] == "nothing written (--dry-run)"
    assert "not checked" in result.stdout
    assert "peak memory" not in result.stdout
    sizes = [line.partition(" in 1 weight file")[0] for line in lines if "weight file" in line]
    done = [line for line in merge(at).stdout.splitlines() if "weight file" in line]
    assert done[0].startswith(sizes[0])


def test_relative_paths_and_trailing_slashes_work(at):
    result = small.run_process("merge", "base/", "./adapter", "-o", "new/out/", cwd=at)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1].startswith("-> new/out/   manifest new/out/dora_export")
    tensors = small.base_tensors()
    small.check_merged(at / "new" / "out", tensors, small.adapter_tensors(tensors))


# --- progress ---


def test_progress_is_silent_for_short_runs_and_plain_lines_for_long_ones(at, monkeypatch):
    monkeypatch.setattr(text, "LINE_SECONDS", 0.0)
    result = merge(at)
    lines = result.stderr.splitlines()
    assert lines
    for line in lines:
        assert line.startswith(f"merging into {at / 'out'}: ")
        assert line.endswith("%)")
    assert any(line.endswith("(100%)") for line in lines)
    assert "\r" not in result.stderr
    assert "\x1b" not in result.stderr


@pytest.mark.parametrize("option", ["--json", "--dry-run"])
def test_scripts_and_dry_runs_get_no_progress(at, monkeypatch, option):
    monkeypatch.setattr(text, "LINE_SECONDS", 0.0)
    assert merge(at, option).stderr == ""


def test_progress_bar_is_for_terminals_only_and_leaves_nothing_behind(at):
    pty = pytest.importorskip("pty")
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "dora_export", "merge", "base", "adapter", "-o", "out"],
        cwd=at, stdout=subprocess.PIPE, stderr=follower, text=True,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "100"},
    )  # fmt: skip
    os.close(follower)
    out, _ = process.communicate(timeout=60)
    shown = os.read(leader, 100_000).decode()
    os.close(leader)
    assert process.returncode == 0
    assert "merging into out" in shown
    assert "\x1b[?25h" in shown  # the cursor is back
    assert out.startswith("merged 4 DoRA tensors")
    assert "\x1b" not in out


@pytest.mark.parametrize(
    ("nbytes", "words"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (123_456, "123 kB"), (5_000_000, "5.0 MB"),
     (2_500_000_000, "2.5 GB"), (141_200_000_000, "141 GB"), (5_100_000_000_000, "5100 GB")],
)  # fmt: skip
def test_sizes_are_written_as_people_do(nbytes, words):
    assert text.size(nbytes) == words


# --- inspect ---


def test_inspect_shows_the_adapter_alone(at):
    result = small.run("inspect", at / "adapter")
    assert result.exit_code == 0
    lines = [line.split(maxsplit=1) for line in result.stdout.splitlines()]
    rows = {line[0]: line[1] for line in lines if len(line) == 2}
    assert rows["format"] == "peft"
    assert rows["method"] == "DoRA, magnitude one per output"
    assert (rows["rank"], rows["alpha"]) == ("3", "5")
    assert rows["scaling"] == "1.66667"
    assert rows["size"].startswith("500 parameters, 2.0 kB") or "parameters" in rows["size"]
    assert rows["layers"] == "q_proj x2, down_proj x2"
    assert "trained on" in result.stdout
    assert "vLLM" in result.stdout
    assert "base  " not in result.stdout


def test_inspect_holds_the_adapter_against_a_base(at):
    result = small.run("inspect", at / "adapter", "--base", at / "base")
    assert result.exit_code == 0
    assert f"{at / 'base'}: fits, 4 tensors would change" in result.stdout
    assert "merged size" in result.stdout


def test_inspect_says_why_a_base_does_not_fit(at):
    small.edit_tensors(
        at / "base/model.safetensors", lambda ts: {f"other.{k}": t for k, t in list(ts.items())[:3]}
    )
    result = small.run("inspect", at / "adapter", "--base", at / "base")
    assert result.exit_code == 0
    assert "does not fit: 0 of 4 adapter targets match this base" in result.stdout
    assert "merged size" not in result.stdout


@pytest.mark.parametrize("base", [False, True])
def test_inspect_as_json(at, base):
    words = ["--base", at / "base"] * base
    result = small.run_process("inspect", at / "adapter", *words, "--json")
    assert (result.returncode, result.stderr) == (0, "")
    report = json.loads(result.stdout)
    assert report["path"] == str(at / "adapter")
    assert report["facts"]["rank"] == [3]
    assert report["fits"] is (True if base else None)
    assert report["merged"] == (4 if base else None)
    assert {e["takes"] for e in report["engines"]} <= {"yes", "no", "wrong"}


def test_inspect_refuses_what_merge_refuses(at):
    small.edit_json(at / "adapter/adapter_config.json", peft_type="LOHA")
    result = small.run("inspect", at / "adapter")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert result.stdout == ""


def test_inspect_of_plain_lora(at):
    tensors = small.base_tensors()
    lora = small.adapter_tensors(tensors, dora=False, dtype=torch.bfloat16)
    small.write_adapter(at / "lora", lora, use_dora=False, use_rslora=True)
    result = small.run("inspect", at / "lora")
    assert "LoRA, magnitude none" in result.stdout
    assert "5 (rslora)" in result.stdout
