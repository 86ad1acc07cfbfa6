"""Bad input: exit code 2, one error that says what to do, and not a byte of output."""

import json
import os
import pickle
import re
import shutil
import types
import zipfile
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

import dora_export
from dora_export.checkpoints import open_checkpoint
from dora_export.errors import DoraExportError, InputError, PlanError, VerifyError
from dora_export.plan import Settings, plan_merge
from tests import small
from tests.small import PREFIX

Q_PROJ = "model.layers.0.attn.q_proj"
KEY = PREFIX + Q_PROJ
WEIGHTS = "adapter/adapter_model.safetensors"
CONFIG = "adapter/adapter_config.json"
BASE = "base/model.safetensors"


BEYOND_A_DRY_RUN = (  # it reads no weight and makes no folder
    "NaN in the adapter",
    "inf in the adapter",
    "NaN in the base",
    "a result larger than float16 holds",
    "a row without direction",
    "an output under a file",
    "an output name longer than names may be",
)


def merge(at, *options, base="base", adapters=("adapter",), out="out"):
    return ["merge", at / base, *(at / a for a in adapters), "-o", at / out, *options]


def edit_adapter(at, change):
    small.edit_tensors(at / WEIGHTS, change)


def truncate(path, nbytes):
    path.write_bytes(path.read_bytes()[:nbytes])


class Payload:
    """Pickles to a call of os.system that leaves a file behind."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.system, (f"touch '{self.trace}'",)


# --- what goes wrong, one function each: (folder with base/ and adapter/) -> command line ---


def missing_base(at):
    return merge(at, base="nowhere")


def missing_adapter(at):
    return merge(at, adapters=("nowhere",))


def other_model(at):
    edit_adapter(
        at, lambda ts: {k.replace("model.layers", "transformer.blocks"): t for k, t in ts.items()}
    )


def one_layer_of_another_model(at):
    edit_adapter(
        at, lambda ts: {k.replace("layers.1.mlp", "layers.7.mlp"): t for k, t in ts.items()}
    )


def other_width(at):
    edit_adapter(at, lambda ts: ts | {f"{KEY}.lora_A.weight": torch.ones(3, 16)})


def magnitude_of_other_length(at):
    edit_adapter(at, lambda ts: ts | {f"{KEY}.lora_magnitude_vector": torch.ones(12)})


def magnitudes_missing(at):
    edit_adapter(at, lambda ts: {k: t for k, t in ts.items() if "magnitude" not in k})


def one_magnitude_missing(at):
    edit_adapter(at, lambda ts: ts.pop(f"{KEY}.lora_magnitude_vector") is None)


def magnitudes_without_use_dora(at):
    small.edit_json(at / CONFIG, use_dora=False)


def alpha_0(at):
    small.edit_json(at / CONFIG, lora_alpha=0)


def alpha_of_a_pattern_0(at):
    small.edit_json(at / CONFIG, alpha_pattern={"q_proj": 0})


def other_rank(at):
    small.edit_json(at / CONFIG, r=8)


def b_missing(at):
    edit_adapter(at, lambda ts: ts.pop(f"{KEY}.lora_B.weight") is None)


def one_layer_missing(at):
    edit_adapter(at, lambda ts: {k: t for k, t in ts.items() if not k.startswith(KEY)})


def base_truncated(at):
    truncate(at / BASE, -10)


def base_truncated_in_its_header(at):
    truncate(at / BASE, 40)


def base_empty(at):
    truncate(at / BASE, 0)


def adapter_truncated(at):
    truncate(at / WEIGHTS, -10)


def adapter_without_weights(at):
    (at / WEIGHTS).unlink()


def unknown_tensor(at):
    edit_adapter(at, lambda ts: ts | {f"{KEY}.lora_C.weight": torch.ones(3)})


def other_peft_type(at):
    small.edit_json(at / CONFIG, peft_type="XLORA")


def unknown_peft_type(at):
    small.edit_json(at / CONFIG, peft_type="NEWRA")


def unknown_field(at):
    small.edit_json(at / CONFIG, use_secret_sauce=True)


def pissa(at):
    small.edit_json(at / CONFIG, init_lora_weights="pissa_niter_4")


def foreign_output(at):
    (at / "out").mkdir()
    (at / "out" / "thesis.txt").write_text("mine")


def output_is_a_file(at):
    (at / "out").write_text("mine")


def own_output_without_force(at):
    assert small.run(*merge(at)).exit_code == 0


def foreign_output_with_force(at):
    foreign_output(at)
    return merge(at, "--force")


def output_in_base(at):
    return merge(at, out="base/merged")


def output_is_base(at):
    return merge(at, "--force", out="base")


def output_is_base_by_another_name(at):
    (at / "link").symlink_to(at / "base", target_is_directory=True)
    return merge(at, "--force", out="link")


def output_is_adapter(at):
    return merge(at, "--force", out="adapter")


def output_holds_base(at):
    (at / "models").mkdir()
    (at / "base").rename(at / "models" / "base")
    return merge(at, "--force", base="models/base", out="models")


def output_under_a_file(at):
    (at / "file").write_text("")
    return merge(at, out="file/out")


def nan_in_adapter(at):
    edit_adapter(at, lambda ts: ts[f"{KEY}.lora_A.weight"][1].fill_(torch.nan) is None)


def inf_in_adapter(at):
    edit_adapter(at, lambda ts: ts[f"{KEY}.lora_magnitude_vector"][:1].fill_(-torch.inf) is None)


def fp16_overflow(at):
    edit_adapter(at, lambda ts: ts[f"{KEY}.lora_magnitude_vector"].fill_(1e6) is None)
    return merge(at, "--dtype", "fp16")


def nan_in_base_target(at):
    small.edit_tensors(at / BASE, lambda ts: ts[f"{Q_PROJ}.weight"][2].fill_(torch.nan) is None)


def zero_row(at):
    small.edit_tensors(at / BASE, lambda ts: ts[f"{Q_PROJ}.weight"][2].zero_() is None)
    edit_adapter(at, lambda ts: ts[f"{KEY}.lora_B.weight"][2].zero_() is None)


def as_dtype(dtype):
    def quantised(at):
        small.edit_tensors(
            at / BASE,
            lambda ts: (
                ts | {f"{Q_PROJ}.weight": ts[f"{Q_PROJ}.weight"].to(torch.float32).to(dtype)}
            ),
        )

    return quantised


def all_quantised(at):
    small.edit_tensors(
        at / BASE, lambda ts: {k: torch.zeros(t.shape, dtype=torch.uint8) for k, t in ts.items()}
    )


def square_layer_with_open_axis(at):
    layer = {"fc.linear.weight": torch.randn(6, 6), "fc.lora.A": torch.randn(6, 2),
             "fc.lora.B": torch.randn(2, 6), "fc.m": torch.rand(6) + 0.5}  # fmt: skip
    save_file(layer, at / "state.safetensors")
    return merge(at, "--alpha", "4", base="state.safetensors", adapters=())


def an_adapter_twice(at):
    return merge(at, adapters=("adapter", "adapter"))


def no_adapter(at):
    return merge(at, adapters=())


def adapter_alone(at):
    return merge(at, base="adapter", adapters=())


def bases_swapped(at):
    return merge(at, base="adapter", adapters=("base",))


def pickled_adapter(at):
    torch.save({f"{KEY}.lora_A.weight": torch.ones(3, 12)}, at / "adapter/adapter_model.bin")
    (at / WEIGHTS).unlink()


def pickled_base(at):
    torch.save(small.base_tensors(), at / "base/pytorch_model.bin")
    (at / BASE).unlink()


def pickle_of_another_kind(at):
    torch.save({"epoch": 3, "weights": [1, 2]}, at / "adapter/adapter_model.bin")
    (at / WEIGHTS).unlink()
    return merge(at, "--allow-pickle")


def malicious_pickle(at):
    with (at / "adapter/adapter_model.bin").open("wb") as file:
        pickle.dump({"x": Payload(at / "pwned")}, file, protocol=2)
    (at / WEIGHTS).unlink()
    return merge(at, "--allow-pickle")


def malicious_pickle_in_torch_format(at):
    # torch.save's own zip, with another pickle inside.
    torch.save({"x": torch.ones(1)}, at / "harmless.bin")
    with (
        zipfile.ZipFile(at / "harmless.bin") as source,
        zipfile.ZipFile(at / "base/pytorch_model.bin", "w") as target,
    ):
        for name in source.namelist():
            evil = name.endswith("data.pkl")
            data = pickle.dumps({"x": Payload(at / "pwned")}, 2) if evil else source.read(name)
            target.writestr(name, data)
    (at / BASE).unlink()
    return merge(at, "--allow-pickle")


def unknown_device(at):
    return merge(at, "--device", "quantum")


def unsupported_device(at):
    return merge(at, "--device", "meta")


def cuda(at):
    return merge(at, "--device", "cuda:97")


def adapter_config_not_json(at):
    (at / CONFIG).write_text('{"peft_type": "LORA",')


def adapter_config_a_list(at):
    (at / CONFIG).write_text("[]")


def base_config_not_json(at):
    (at / "base/config.json").write_text("{'single': 'quotes'}")


def shards(at):
    shutil.rmtree(at / "base")
    small.write_shards(at / "base", small.base_tensors())
    return at / "base/model.safetensors.index.json"


def shard_missing(at):
    shards(at)
    (at / "base/model-00002-of-00002.safetensors").unlink()


def edit_places(at, place):
    index = shards(at)
    places = json.loads(index.read_text())["weight_map"]
    small.edit_json(index, weight_map=places | {f"{Q_PROJ}.weight": place})


def shard_outside(at):
    save_file({f"{Q_PROJ}.weight": torch.zeros(20, 12)}, at / "secret.safetensors")
    edit_places(at, "../secret.safetensors")


def shard_by_absolute_path(at):
    edit_places(at, str(at / "base/model-00001-of-00002.safetensors"))


def tensor_in_another_shard(at):
    index = shards(at)
    places = json.loads(index.read_text())["weight_map"]
    other = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}
    edit_places(at, (other - {places[f"{Q_PROJ}.weight"]}).pop())


def index_without_map(at):
    index = shards(at)
    small.write_json(index, {"metadata": {}})


def tensor_in_two_shards(at):
    shards(at)
    for file in (at / "base").glob("model-*.safetensors"):
        small.edit_tensors(file, lambda ts: ts | {"model.extra.weight": torch.ones(2)})


def hub_base(at):
    command = merge(at)
    return [command[0], "nobody/no-such-model", *command[2:]]


def hub_id_that_is_none(at):
    command = merge(at)
    return [command[0], "no--body/model", *command[2:]]


def name_too_long(at):
    command = merge(at)
    return [command[0], "x" * 5000, *command[2:]]


def output_name_too_long(at):
    return merge(at, out="x" * 256)


def merged_base(at):
    assert small.run(*merge(at, out="first")).exit_code == 0
    return merge(at, base="first")


def options(*words):
    return lambda at: merge(at, *words)


CASES = {
    "a base that is not there": (missing_base, "Check the path of the base"),
    "an adapter that is not there": (missing_adapter, "Check the path of the adapter"),
    "an adapter of another model": (other_model, "0 of 4 .* pass --map-prefix"),
    "an adapter with one layer more": (one_layer_of_another_model, "3 of 4 .* is the base it was"),
    "an adapter of another width": (other_width, r"\(3, 16\).*\n.*is the base it was trained on"),
    "a magnitude of another length": (magnitude_of_other_length, "12 elements, expected 20"),
    "missing magnitudes": (magnitudes_missing, "use_dora: true.*Save the adapter again"),
    "one missing magnitude": (one_magnitude_missing, "missing for 1 of 4.*Save the adapter again"),
    "magnitudes without use_dora": (magnitudes_without_use_dora, "Set use_dora to true"),
    "alpha 0": (alpha_0, "lora_alpha: 0.*Check how it was saved"),
    "alpha 0 for one layer": (alpha_of_a_pattern_0, r"alpha_pattern\[q_proj\]: 0.*Check how it"),
    "another rank than the config says": (other_rank, r"rank 8 by the config, but lora_A is \(3"),
    "A without B": (b_missing, "q_proj.*lora_B"),
    "a layer without its adapter": (one_layer_missing, "incomplete.*layers_to_transform"),
    "a truncated base": (base_truncated, "truncated; download it again"),
    "a base truncated in its header": (base_truncated_in_its_header, "download it again"),
    "an empty base file": (base_empty, "download it again"),
    "a truncated adapter": (adapter_truncated, "truncated; download it again"),
    "an adapter without weights": (adapter_without_weights, "Copy the whole adapter folder"),
    "an unknown adapter tensor": (unknown_tensor, "unknown tensor.*lora_C"),
    "another method than LoRA": (other_peft_type, "XLORA.*weighs adapters anew for every token"),
    "an unknown method": (unknown_peft_type, "NEWRA.*Expected LORA"),
    "an unknown config field": (unknown_field, "use_secret_sauce: unknown field"),
    "an init that changed the base": (pissa, "path_initial_model_for_weight_conversion"),
    "a folder of someone else": (foreign_output, "not this tool's output.*pass another -o"),
    "a file in the output's place": (output_is_a_file, "not this tool's output.*pass another -o"),
    "an earlier output": (own_output_without_force, "pass --force to replace it"),
    "someone else's folder even with --force": (foreign_output_with_force, "pass another -o"),
    "an output in the base": (output_in_base, "Pass an -o outside"),
    "the base as output": (output_is_base, "Pass an -o outside"),
    "a link to the base as output": (output_is_base_by_another_name, "Pass an -o outside"),
    "the adapter as output": (output_is_adapter, "Pass an -o outside"),
    "an output around the base": (output_holds_base, "Pass an -o outside"),
    "an output under a file": (output_under_a_file, "Pass another -o"),
    "NaN in the adapter": (nan_in_adapter, "NaN or inf in .*lora_A.*use an earlier checkpoint"),
    "inf in the adapter": (inf_in_adapter, "magnitude.*use an earlier checkpoint"),
    "a result larger than float16 holds": (fp16_overflow, "65504.*Pass --dtype bf16"),
    "NaN in the base": (nan_in_base_target, "row 2 .*the base has inf or NaN"),
    "a row without direction": (zero_row, r"zero in 1 rows \(2\).*--zero-norm"),
    "a base in uint8": (as_dtype(torch.uint8), "U8.*dequantise the base first"),
    "a base in float8": (as_dtype(torch.float8_e4m3fn), "F8_E4M3.*dequantise the base first"),
    "a base of integers only": (all_quantised, "dequantise the base first"),
    "a square layer with an open axis": (square_layer_with_open_axis, "--axis in or --axis out"),
    "an adapter twice": (an_adapter_twice, "Leave it out once.*--weight"),
    "no adapter": (no_adapter, "merge BASE ADAPTER -o OUT"),
    "an adapter without a base": (adapter_alone, "merge BASE ADAPTER -o OUT"),
    "base and adapter swapped": (bases_swapped, "the arguments seem swapped"),
    "a pickled adapter": (pickled_adapter, "Pass --allow-pickle"),
    "a pickled base": (pickled_base, "Pass --allow-pickle"),
    "a pickle that is no state dict": (pickle_of_another_kind, "model.state_dict()"),
    "a malicious pickle": (malicious_pickle, "not a file saved by torch.*get it as safetensors"),
    "a malicious torch file": (malicious_pickle_in_torch_format, "system.*get it as safetensors"),
    "an unknown device": (unknown_device, "Use cpu, cuda or cuda:N"),
    "an unsupported device": (unsupported_device, "Use cpu, cuda or cuda:N"),
    "a GPU that is not there": (cuda, "Use --device cpu"),
    "an adapter config that is not JSON": (adapter_config_not_json, "Download it again"),
    "an adapter config that is a list": (adapter_config_a_list, "expected a JSON object"),
    "a base config that is not JSON": (base_config_not_json, "Download it again"),
    "a missing shard": (shard_missing, r"1 of 2 shards(.|\n)*Download them again"),
    "a shard outside the folder": (shard_outside, "Do not use this model"),
    "a shard by absolute path": (shard_by_absolute_path, "Do not use this model"),
    "a tensor in another shard": (tensor_in_another_shard, r"is said to be(.|\n)*Download it"),
    "an index without a map": (index_without_map, "no weight_map.*Download it again"),
    "a tensor in two shards": (tensor_in_two_shards, "stored twice"),
    "a hub id that is not cached": (hub_base, "unset HF_HUB_OFFLINE"),
    "a name that is no hub id": (hub_id_that_is_none, "Check the path of the base"),
    "a name longer than paths may be": (name_too_long, "Check the path of the base"),
    "an output name longer than names may be": (output_name_too_long, "Use a shorter path"),
    "a base with an adapter in it": (merged_base, "--allow-merged-base"),
    "an unknown dtype": (options("--dtype", "int4"), "Expected one of fp32"),
    "an unknown adapter format": (options("--adapter-format", "x"), "Known: peft"),
    "a shard size without a number": (options("--max-shard-size", "big"), "e.g. 5GB"),
    "a shard size of nothing": (options("--max-shard-size", "0"), "at least one byte"),
    "no threads": (options("--threads", "0"), "at least 1"),
    "a negative block": (options("--block", "-5"), "at least 1"),
    "an infinite strength": (options("--strength", "inf"), "finite number"),
    "a strength that is no number": (options("--strength", "nan"), "finite number"),
    "a mapping without =": (options("--map-prefix", "model"), "expected OLD=NEW"),
    "a mapping that fits nothing": (options("--map-prefix", "model=x"), "0 of 4"),
    "an alpha that the config has": (options("--alpha", "2"), "Leave --alpha out"),
    "an axis that PEFT does not have": (options("--axis", "in"), "Leave --axis out"),
}


@pytest.mark.parametrize("case", CASES)
def test_merge_refuses(case, tmp_path):
    arrange, remedy = CASES[case]
    small.write_pair(tmp_path)
    command = arrange(tmp_path) or merge(tmp_path)
    before = small.entries(tmp_path)
    result = small.run(*command)
    check_refusal(result.exit_code, result.stdout, result.stderr, remedy)
    assert isinstance(result.exception, SystemExit), result.exception
    assert small.entries(tmp_path) == before


def check_refusal(code, out, err, remedy):
    assert code == 2, err
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("error: ") == 1
    assert "Traceback" not in err
    assert re.search(remedy, err), err


@pytest.mark.parametrize(
    "case", ["a base that is not there", "an adapter of another width", "an earlier output"]
)
def test_process_refuses(case, tmp_path):
    arrange, remedy = CASES[case]
    small.write_pair(tmp_path)
    command = arrange(tmp_path) or merge(tmp_path)
    before = small.entries(tmp_path)
    result = small.run_process(*command)
    check_refusal(result.returncode, result.stdout, result.stderr, remedy)
    assert small.entries(tmp_path) == before


@pytest.mark.parametrize("case", CASES)
def test_dry_run_refuses_the_same_as_far_as_headers_tell(case, tmp_path):
    arrange, remedy = CASES[case]
    small.write_pair(tmp_path)
    command = [*(arrange(tmp_path) or merge(tmp_path)), "--dry-run"]
    before = small.entries(tmp_path)
    result = small.run(*command)
    if case not in BEYOND_A_DRY_RUN:
        check_refusal(result.exit_code, result.stdout, result.stderr, remedy)
    assert small.entries(tmp_path) == before


def test_merge_refuses_a_disk_that_is_too_small_before_any_work(tmp_path, monkeypatch):
    small.write_pair(tmp_path)
    before = small.entries(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=1000))
    result = small.run(*merge(tmp_path))
    check_refusal(result.exit_code, result.stdout, result.stderr, "has 0.0 GB free.*another disk")
    assert small.entries(tmp_path) == before


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        (("--axis", "sideways"), "'out', 'in'"),
        (("--precision", "float8"), "'float32', 'float64'"),
        (("--zero-norm", "ignore"), "'refuse', 'zero', 'keep-base'"),
        (("--verify", "maybe"), "'none', 'fast', 'full'"),
        (("--strength", "much"), "not a valid float"),
        (("--threads", "all"), "not a valid int"),
        (("--no-such-option",), "No such option"),
    ],
)
def test_usage_errors_exit_with_2_and_name_the_choices(words, remedy, tmp_path):
    small.write_pair(tmp_path)
    before = small.entries(tmp_path)
    result = small.run(*merge(tmp_path, *words))
    assert result.exit_code == 2
    assert remedy in result.stderr
    assert small.entries(tmp_path) == before


def test_force_replaces_an_earlier_output_and_leaves_nothing_beside_it(tmp_path):
    small.write_pair(tmp_path)
    assert small.run(*merge(tmp_path)).exit_code == 0
    first = small.entries(tmp_path / "out")
    other = small.adapter_tensors(small.base_tensors(), seed=9)
    small.write_adapter(tmp_path / "adapter", other)
    assert small.run(*merge(tmp_path, "--force")).exit_code == 0
    assert small.entries(tmp_path / "out") != first
    small.check_merged(tmp_path / "out", small.base_tensors(), other)
    assert {p.name for p in tmp_path.iterdir()} == {"base", "adapter", "out"}


def test_empty_folder_is_accepted_as_output(tmp_path):
    small.write_pair(tmp_path)
    (tmp_path / "out").mkdir()
    assert small.run(*merge(tmp_path)).exit_code == 0
    tensors = small.base_tensors()
    small.check_merged(tmp_path / "out", tensors, small.adapter_tensors(tensors))


@pytest.mark.parametrize("case", ["a malicious pickle", "a malicious torch file"])
@pytest.mark.parametrize("allow", [True, False])
def test_pickled_code_is_never_executed(case, allow, tmp_path):
    small.write_pair(tmp_path)
    command = CASES[case][0](tmp_path)
    if not allow:
        command.remove("--allow-pickle")
    pair = (tmp_path / "adapter", "--base", tmp_path / "base")
    for command_line in (command, ["inspect", *pair, *["--allow-pickle"] * allow]):
        small.run(*command_line)
        assert not (tmp_path / "pwned").exists()


def test_payload_of_the_test_above_works_where_pickles_are_executed(tmp_path):
    pickle.loads(pickle.dumps(Payload(tmp_path / "pwned")))
    assert (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    "kind", [DoraExportError, InputError, VerifyError], ids=lambda k: k.__name__
)
def test_a_message_is_fit_for_a_terminal_whatever_goes_into_it(kind):
    error = kind("out/\x1b[31m\u202e\r: gone.\nCopy ü again.")
    assert str(error) == "out/\\x1b[31m\\u202e\\r: gone.\nCopy ü again."
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_names_from_files_are_escaped_and_shortened_in_messages(tmp_path):
    small.write_pair(tmp_path)
    name = f"{KEY}.\x1b[31mred\x07{'x' * 500}"
    edit_adapter(tmp_path, lambda ts: ts | {name: torch.ones(1)})
    result = small.run(*merge(tmp_path))
    assert result.exit_code == 2
    assert "\x1b[31m" not in result.stderr
    assert r"\x1b[31mred" in result.stderr
    assert "x" * 200 not in result.stderr


def test_many_problems_of_one_kind_are_listed_once_and_counted(tmp_path):
    small.write_pair(tmp_path)
    edit_adapter(
        tmp_path, lambda ts: ts | {f"{KEY}.part{i}.weight": torch.ones(1) for i in range(20)}
    )
    result = small.run(*merge(tmp_path))
    assert result.exit_code == 2
    assert result.stderr.count("unknown tensor") == 12
    assert "... and 8 more" in result.stderr


def test_tensor_that_a_reader_forgot_is_refused_by_the_plan(tmp_path):
    """What goes into no step, and is not ignored by name, stops the merge, whatever the reader."""
    base, adapter = small.write_pair(tmp_path)
    checkpoint, read = open_checkpoint(base), dora_export.load_adapter(adapter)
    assert plan_merge(checkpoint, read, Settings())
    extra = next(iter(read.tensors.values()))
    more = replace(read, tensors={**read.tensors, "forgotten.lora_A.weight": extra})
    with pytest.raises(PlanError, match=r"(?s)1 adapter tensors go nowhere:\s+forgotten\.lora_A"):
        plan_merge(checkpoint, more, Settings())
    named = replace(more, ignored={"forgotten.lora_A.weight": "why"})
    assert plan_merge(checkpoint, named, Settings()).ignored == {"forgotten.lora_A.weight": "why"}
    fewer = replace(read, updates=tuple(u for u in read.updates if "q_proj" not in u.target))
    with pytest.raises(PlanError, match=r"(?s)6 adapter tensors go nowhere:.*Nothing is merged"):
        plan_merge(checkpoint, fewer, Settings())
