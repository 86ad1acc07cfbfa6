"""The names that users may import."""

import dataclasses
import inspect

import dora_export
from dora_export import api
from dora_export.adapters import Reading, ReadOptions
from dora_export.cli.main import cli


def test_all_is_sorted_and_resolves():
    assert dora_export.__all__ == sorted(dora_export.__all__)
    assert all(getattr(dora_export, name) is not None for name in dora_export.__all__)


def test_dir_and_home_modules_agree_with_all():
    assert dir(dora_export) == dora_export.__all__
    assert set(dora_export._HOMES) | {"__version__"} == set(dora_export.__all__)


def test_public_functions_document_every_parameter_and_error():
    for function in (api.merge, api.verify, api.inspect, api.load_adapter):
        text = inspect.getdoc(function)
        parameters = inspect.signature(function).parameters
        assert [p for p in parameters if f"{p}:" not in text] == []
        assert "Raises:" in text


def test_every_reading_option_is_a_keyword_a_field_and_a_command_line_option():
    fields = {f.name for f in dataclasses.fields(ReadOptions)}
    assert fields == set(Reading.__annotations__)
    assert all(f"{name}:" in inspect.getdoc(Reading) for name in fields)
    for command in ("merge", "verify", "inspect"):
        assert fields - {option.name for option in cli.commands[command].params} == set()
