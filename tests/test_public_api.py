"""The names that users may import."""

import inspect

import dora_export
from dora_export import api


def test_all_is_sorted_and_resolves():
    assert dora_export.__all__ == sorted(dora_export.__all__)
    assert all(getattr(dora_export, name) is not None for name in dora_export.__all__)


def test_dir_and_home_modules_agree_with_all():
    assert dir(dora_export) == dora_export.__all__
    assert set(dora_export._HOMES) | {"__version__"} == set(dora_export.__all__)


def test_public_functions_document_every_parameter_and_error():
    for function in (api.merge, api.inspect, api.load_adapter):
        text = inspect.getdoc(function)
        parameters = inspect.signature(function).parameters
        assert [p for p in parameters if f"{p}:" not in text] == []
        assert "Raises:" in text
