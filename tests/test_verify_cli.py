"""``dora-export verify`` and ``explain`` as people and scripts meet them."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

from dora_export import api
from dora_export.cli import text
from dora_export.verification.catalog import FINDINGS
from tests import reports, small


@pytest.fixture
def given(monkeypatch):
    """Let ``api.verify`` return a report made by hand; keeps what it was called with."""
    calls = []

    def use(report):
        def verify(*args, progress, **options):
            calls.append((args, options))
            if progress is not None:
                progress(5, 10)
            return report

        monkeypatch.setattr(api, "verify", verify)
        return calls

    return use


@pytest.fixture
def merged(tmp_path):
    small.write_pair(tmp_path)
    result = small.run("merge", tmp_path / "base", tmp_path / "adapter", "-o", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    return tmp_path


def verify(at, *options):
    return small.run("verify", at / "base", at / "adapter", at / "out", *options)


# --- exit codes


@pytest.mark.parametrize(
    ("name", "code"),
    [("right", 0), ("rounded", 0), ("tiny", 0), ("wrong", 1), ("hostile", 1), ("unchecked", 3)],
)
def test_exit_code_is_the_verdicts(given, name, code):
    given(reports.ALL[name]())
    for options in ((), ("--json",)):
        assert small.run("verify", "base", "adapter", "merged", *options).exit_code == code


def test_verdicts_of_real_models_by_exit_code(merged):
    result = verify(merged)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.startswith("✓ The merged model is right and exact\n")
    small.edit_tensors(
        merged / "out/model.safetensors",
        lambda ts: ts | {"model.norm.weight": ts["model.norm.weight"] * 2},
    )
    result = verify(merged)
    assert result.exit_code == 1
    assert "wrong: bytes-differ, " in result.stdout
    assert "    model.norm.weight: " in result.stdout
    (merged / "adapter/adapter_config.json").unlink()
    result = verify(merged)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert result.stdout == ""


def test_exit_codes_reach_the_shell(merged):
    args = [merged / name for name in ("base", "adapter", "out")]
    assert small.run_process("verify", *args).returncode == 0
    small.edit_json(merged / "out/config.json", hidden_size=13)
    process = small.run_process("verify", *args)
    assert process.returncode == 1
    assert process.stdout.startswith("✗ The merged model is wrong\n")
    assert "Traceback" not in process.stderr


# --- what reaches the API


def test_options_reach_the_api(given):
    calls = given(reports.right())
    result = small.run(
        "verify", "b", "a", "m", "--level", "fast", "--forward", "--prompt", "one", "--prompt",
        "two", "--dtype", "bf16", "--strength", "0.5", "--zero-norm", "zero", "--alpha", "4",
        "--no-fan-in-fan-out", "--threads", "3", "--axis", "in", "--map-prefix", "x=y",
        "--adapter-format", "peft", "--allow-pickle", "--weight", "0.25",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    ((args, options),) = calls
    assert args == ("b", ("a",), "m")
    assert options.pop("fan_in_fan_out") is False
    assert {name: value for name, value in options.items() if value} == {
        "level": "fast", "forward": True, "prompts": ("one", "two"), "dtype": "bf16",
        "strength": 0.5, "zero_norm": "zero", "alpha": 4.0, "threads": 3, "weights": (0.25,),
        "axis": "in", "map_prefix": ("x=y",), "adapter_format": "peft", "allow_pickle": True,
    }  # fmt: skip


def test_a_base_with_its_own_adapter_needs_no_other(given):
    calls = given(reports.right())
    small.run("verify", "state.safetensors", "merged")
    assert calls[0][0] == ("state.safetensors", None, "merged")
    defaults = calls[0][1]
    assert (defaults["level"], defaults["forward"], defaults["dtype"]) == ("full", False, None)
    assert defaults["strength"] is defaults["zero_norm"] is defaults["fan_in_fan_out"] is None


def test_a_forgotten_merged_model_is_told_by_this_commands_usage(merged):
    result = small.run("verify", merged / "base", merged / "adapter")
    assert result.exit_code == 2
    assert result.stderr.endswith("Usage: dora-export verify BASE ADAPTER MERGED.\n")


def test_a_prompt_asks_for_the_forward_tier(given):
    calls = given(reports.right())
    small.run("verify", "b", "a", "m", "--prompt", "Hello")
    assert calls[0][1]["forward"] is True


# --- the summary


def test_summary_tells_verdict_tiers_and_precision(given):
    given(reports.right())
    result = small.run("verify", "b", "a", "m")
    lines = result.stdout.splitlines()
    assert lines[0] == "✓ The merged model is right and exact"
    assert lines[1].startswith("  ✓ ledger   272 tensors in 1 file")
    assert lines[3].startswith("  ✓ forward  210 layers and 3 prompts")
    assert lines[4].startswith(
        "    exact: 210 tensors, 106,168,320 BF16 values, worst 0.506 ulp, 9.9e-6 not correctly"
    )
    assert "explain" not in result.stdout
    assert "worst tensors" not in result.stdout


def test_summary_sets_other_tools_rounding_beside_the_best(given):
    given(reports.rounded())
    text_ = small.run("verify", "b", "a", "m").stdout
    assert re.search(r"as computed in BF16: 210 tensors, .* 44% not correctly rounded "
                     r"\(best: 0.5 ulp, none\)", text_)  # fmt: skip
    assert "note: rounded, right, with more rounding than necessary (210 times)" in text_
    assert "    model.layers.{0-29}.self_attn.q_proj.weight" in text_
    assert "dora-export explain rounded" in text_


def test_summary_lists_all_findings_the_gravest_first(given):
    given(reports.wrong())
    text_ = small.run("verify", "b", "a", "m").stdout
    heads = [
        line.partition(":")[0] for line in text_.splitlines() if re.match(r"\w+: [\w-]+,", line)
    ]
    assert heads == ["wrong"] * 4 + ["warning"]
    assert text_.splitlines()[0] == "✗ The merged model is wrong"
    assert "wrong: not-applied, the adapter was not applied (7 times)" in text_
    assert len(re.findall(r"^    model\.layers\.29\.", text_, re.M)) == 7
    worst = text_[text_.index("worst tensors") :].splitlines()
    assert worst[1].split()[:2] == ["model.layers.5.self_attn.k_proj.weight", "inf"]
    assert text_.endswith(
        "dora-export explain bytes-differ (and not-applied, magnitude-of-another, not-finite)\n"
    )


def test_summary_of_what_was_not_checked_says_so_first(given):
    given(reports.unchecked())
    lines = small.run("verify", "b", "a", "m").stdout.splitlines()
    assert lines[0] == "? The merged model could not be checked"
    assert "  ? forward  not run: transformers is not installed" in lines


def test_a_tier_that_was_not_asked_for_is_not_called_right():
    tiers = (*reports.right().tiers[:2],
             reports.TierResult("forward", False, "not asked for"))  # fmt: skip
    summary = click.unstyle(text.verify_summary(reports.right(tiers=tiers)))
    assert "  – forward  not run: not asked for" in summary.splitlines()


def test_summary_escapes_names_from_strangers(given):
    given(reports.hostile())
    result = small.run("verify", "b", "a", "m")
    for character in ("\x1b", "\x00", "\u202e"):
        assert character not in result.stdout
    assert r"\x1b[31mred" in result.stdout
    notes = [line for line in result.stdout.splitlines() if line.startswith("  note: ")]
    others = [line for line in result.stdout.splitlines() if line not in notes]
    assert max(map(len, others)) < 600
    assert max(map(len, notes)) < 2100  # some list layers


@pytest.mark.parametrize("size", [(6, 32), pytest.param((26, 256), marks=pytest.mark.nightly)])
def test_summary_of_many_findings_stays_readable(given, size):
    layers, each = size
    given(reports.experts(layers, each, wrong=3 * layers * each))
    lines = small.run("verify", "b", "a", "m").stdout.splitlines()
    assert len(lines) < 40
    names = f"model.layers.{{0-{layers - 1}}}.mlp.experts.{{0-{each - 1}}}.gate_proj.weight"
    assert f"    {names}" in lines


def test_colours_are_for_terminals():
    pty = pytest.importorskip("pty")
    colours = {"right": 32, "wrong": 31, "unchecked": 33}
    code = (
        "import click; from tests import reports; from dora_export.cli import text;"
        f"[click.echo(text.verify_summary(reports.ALL[n]()) + '\\f') for n in {list(colours)}]"
    )
    command = [sys.executable, "-c", code]
    plain = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
    assert "\x1b" not in plain
    leader, follower = pty.openpty()
    process = subprocess.Popen(command, stdout=follower)
    os.close(follower)
    shown = ""
    while (part := _read(leader)) != b"":
        shown += part.decode()
    os.close(leader)
    assert process.wait(60) == 0
    for summary, colour in zip(shown.split("\f"), colours.values(), strict=False):
        assert summary.lstrip().startswith(f"\x1b[{colour}m\x1b[1m")
    assert re.sub(r"\x1b\[\d+m", "", shown).splitlines() == plain.splitlines()


def _read(terminal):
    """Read from a terminal; nothing once its last writer has gone."""
    try:
        return os.read(terminal, 100_000)
    except OSError:
        return b""


@pytest.mark.parametrize("name", ["rounded", "wrong", "unchecked", "experts"])
def test_lines_break_between_words_on_a_terminal(monkeypatch, name):
    monkeypatch.setattr(text.shutil, "get_terminal_size", lambda: os.terminal_size((60, 24)))
    summary = text.verify_summary(reports.ALL[name]())
    assert text.fitted(summary) == summary  # no terminal
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    fitted = text.fitted(summary)
    assert fitted.split() == summary.split()
    lines = [click.unstyle(line) for line in fitted.split("\n")]
    assert [line for line in lines if len(line) > 60 and len(line.split()) > 1] == []
    assert len(lines) > len(summary.split("\n"))


# --- JSON and progress


@pytest.mark.parametrize("name", reports.ALL)
def test_json_is_the_only_thing_on_stdout_and_strict(given, monkeypatch, tmp_path, name):
    monkeypatch.setattr(text, "LINE_SECONDS", 0.0)
    report = reports.ALL[name]()
    given(report)
    target = tmp_path / "r.html"
    result = small.run("verify", "b", "a", "m", "--json", "--html", target)
    assert result.stderr == ""

    def never(word):
        raise AssertionError(word)

    read = json.loads(result.stdout, parse_constant=never)
    assert read["verdict"] == report.verdict
    assert len(read["tensors"]) == len(report.tensors)
    assert [f["code"] for f in read["findings"]] == [f.code for f in report.findings]
    assert {"tier", "severity", "where", "what"} <= set((read["findings"] or [dict.fromkeys(
        ("tier", "severity", "where", "what"))])[0])  # fmt: skip
    assert target.exists()


def test_json_of_a_real_verification(merged):
    result = verify(merged, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    read = json.loads(result.stdout)
    assert read["verdict"] == "right"
    assert [t["name"] for t in read["tensors"]] == [f"{n}.weight" for n in sorted(small.LINEARS)]
    assert all(t["max_ulp"] <= 1 for t in read["tensors"])


def test_progress_goes_to_stderr(given, monkeypatch):
    monkeypatch.setattr(text, "LINE_SECONDS", 0.0)
    given(reports.right())
    assert small.run("verify", "b", "a", "m").stderr == "verifying m: 5 of 10 (50%)\n"


# --- the page


def test_html_writes_the_page_and_says_where(merged):
    target = merged / "report.html"
    result = verify(merged, "--html", target)
    assert result.exit_code == 0
    assert result.stdout.splitlines()[-1] == f"-> {target}"
    assert "<h1>The merged model is right and exact</h1>" in target.read_text(encoding="utf-8")
    assert verify(merged, "--html", target).exit_code == 0  # its own may be replaced


def test_html_is_written_for_wrong_models_too(given, tmp_path):
    given(reports.wrong())
    result = small.run("verify", "b", "a", "m", "--html", tmp_path / "r.html")
    assert result.exit_code == 1
    assert "The merged model is wrong" in (tmp_path / "r.html").read_text(encoding="utf-8")


def test_html_refuses_foreign_files_before_any_work(given, tmp_path):
    calls = given(reports.right())
    target = tmp_path / "thesis.html"
    target.write_text("my thesis")
    result = small.run("verify", "b", "a", "m", "--html", target)
    assert result.exit_code == 2
    assert "no report of this tool" in result.stderr
    assert "--force" in result.stderr
    assert (target.read_text(), calls) == ("my thesis", [])
    assert small.run("verify", "b", "a", "m", "--html", target, "--force").exit_code == 0
    assert "thesis" not in target.read_text(encoding="utf-8")


# --- explain


@pytest.mark.parametrize("meaning", FINDINGS, ids=lambda m: m.code)
def test_explain_says_what_a_finding_means_and_what_to_do(meaning):
    result = small.run("explain", meaning.code)
    assert (result.exit_code, result.stderr) == (0, "")
    words = " ".join(result.stdout.split())
    assert words.startswith(f"{meaning.code}: {meaning.title} {meaning.severity} (")
    assert f"{meaning.tier} tier" in words
    assert f"What it means {meaning.means} What to do {meaning.do}" in words
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_explain_without_a_code_lists_all_by_tier():
    result = small.run("explain")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    listed = [line.split()[0] for line in lines if line.startswith(" ")]
    assert listed == [m.code for m in FINDINGS]
    tiers = [line.partition(":")[0] for line in lines if re.match(r"\w+: ", line)]
    assert tiers == ["ledger", "oracle", "forward", "onnx"]
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize(
    ("code", "words"),
    [("norm-of-bse", "Did you mean norm-of-base"), ("NOT-APPLIED", "Did you mean not-applied"),
     ("xyzzy", "lists them all"), ("\x1b[31m", r"\x1b")],
)  # fmt: skip
def test_explain_helps_with_unknown_codes(code, words):
    result = small.run("explain", code)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert words in result.stderr
    assert code != "xyzzy" or "Did you mean" not in result.stderr


# What makes a finding, and which of its arguments is the code.
MAKERS = {"Finding": 0, "Diagnosis": 0, "Candidate": 0, "Mistake": 0, "GraphUnusable": 0,
          "found": 0, "wrong": 0, "json_file": 1}  # fmt: skip


def test_every_finding_that_is_reported_can_be_explained():
    package = Path(text.__file__).parents[1]
    catalog = package / "verification" / "catalog.py"
    paths = [p for p in package.rglob("*.py") if p != catalog]
    nodes = [n for p in paths for n in ast.walk(ast.parse(p.read_text(encoding="utf-8")))]
    made = {code for n in nodes if isinstance(n, ast.Call) for code in codes_of(n)}
    said = {n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    known = {m.code for m in FINDINGS}
    assert len(made) > 60
    assert made <= known
    assert known <= said  # and nothing is explained that is never reported


def codes_of(call):
    """Codes written out in the call of a maker."""
    function = call.func
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    if len(call.args) <= MAKERS.get(name, len(call.args)):
        return []
    argument = call.args[MAKERS[name]]
    options = [argument.body, argument.orelse] if isinstance(argument, ast.IfExp) else [argument]
    return [o.value for o in options if isinstance(o, ast.Constant)]
