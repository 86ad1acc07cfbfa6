"""Arguments in each other's place: the refusal says so, and only then."""

import shutil

import pytest

import dora_export
from dora_export.api_convert import convert
from dora_export.errors import AdapterError, InputError
from tests import small
from tests.fuzz.targets import CORPUS


@pytest.fixture
def pair(tmp_path):
    small.write_pair(tmp_path)
    return tmp_path


SWAPPED = (
    "{base}: an adapter, in the base's place, and {adapter} is none: the arguments seem swapped."
)


@pytest.mark.parametrize("command", ["merge", "verify", "export_onnx", "inspect"])
def test_swapped_arguments_are_told(pair, command):
    base, adapter = pair / "adapter", pair / "base"
    given = {
        "merge": (base, adapter, pair / "out"),
        "verify": (base, adapter, pair / "base"),
        "export_onnx": (base, adapter, pair / "out"),
        "inspect": (adapter, base),
    }[command]
    with pytest.raises(InputError) as caught:
        getattr(dora_export, command)(*given)
    said = SWAPPED.format(base=base, adapter=adapter)
    word = command.removeprefix("export_")
    assert str(caught.value).startswith(f"{said} Usage: dora-export {word} ")
    assert not (pair / "out").exists()


@pytest.mark.parametrize("case", ["single-file", "qdora"])
def test_swapped_single_files_are_told(tmp_path, case):
    """As of image models: any weight file opens as a base."""
    base = "base.safetensors" if case == "single-file" else "base"
    with pytest.raises(InputError, match="the arguments seem swapped"):
        dora_export.merge(
            CORPUS / case / "adapter.safetensors", CORPUS / case / base, tmp_path / "out"
        )


def test_model_where_an_adapter_belongs_is_told(pair):
    for call in (
        lambda: dora_export.merge(pair / "base", pair / "base", pair / "out"),
        lambda: dora_export.inspect(pair / "base"),
        lambda: convert(pair / "base", "mlx", pair / "out"),
        lambda: dora_export.verify(pair / "base", pair / "base", pair / "adapter"),
    ):
        with pytest.raises(InputError, match=r"base: a model, in an adapter's place\. Usage: "):
            call()


def test_adapter_where_the_base_belongs_is_told(pair):
    with pytest.raises(InputError, match=r"adapter: an adapter, in the base's place\. Usage: "):
        dora_export.merge(pair / "adapter", pair / "adapter", pair / "out")


def test_damage_in_the_right_place_is_told_as_it_is(pair):
    small.edit_json(pair / "adapter/adapter_config.json", r="four")
    with pytest.raises((AdapterError, InputError), match="got four"):
        dora_export.merge(pair / "base", pair / "adapter", pair / "out")
    shutil.copytree(pair / "adapter", pair / "base", dirs_exist_ok=True)  # published in one folder
    with pytest.raises((AdapterError, InputError), match="got four"):
        dora_export.merge(pair / "base", pair / "adapter", pair / "out")
