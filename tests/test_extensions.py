"""Compiled modules are left out where they are switched off, missing or of other sources."""

import re
from types import SimpleNamespace

import pytest

from dora_export import extensions, fused
from dora_export.errors import MachineError
from dora_export.verification import compiled

OWNERS = pytest.mark.parametrize("owner", [fused, compiled], ids=["merge", "oracle"])


@pytest.fixture
def lying(monkeypatch):
    """Let a module be found in the place of the compiled one."""

    def put(**said):
        monkeypatch.setattr(extensions, "import_module", lambda _: SimpleNamespace(**said))
        monkeypatch.setattr(extensions, "find_spec", lambda _: said or None)
        extensions.loaded.cache_clear()

    yield put
    extensions.loaded.cache_clear()


@OWNERS
def test_the_environment_switches_it_off(owner, monkeypatch, lying):
    lying(name=owner.NAME, usable=True)
    assert owner.available()
    monkeypatch.setenv(extensions.SWITCH, "numpy")
    assert not owner.available()


@OWNERS
def test_it_is_left_out_where_it_was_not_built_or_the_processor_is_too_old(owner, lying):
    lying()
    assert not owner.available()
    lying(name=owner.NAME, usable=False)
    assert not owner.available()


@OWNERS
@pytest.mark.parametrize("said", [{}, {"name": "merge_rows 0"}], ids=["nothing", "other"])
def test_a_build_of_other_sources_is_refused(owner, said, lying):
    lying(__file__="dora_export/_some.so", usable=True, **said)
    with pytest.raises(MachineError, match=r"_some\.so: built from .*pip install"):
        owner.available()


@OWNERS
@pytest.mark.parametrize(
    ("why", "what"),
    [
        ("some.so: cannot open shared object file: Too many open files", "ulimit -n"),
        ("libm.so.6: version `GLIBC_2.40' not found", "DORA_EXPORT_KERNEL=numpy"),
    ],
)
def test_what_cannot_be_loaded_is_told_with_a_way_out(owner, why, what, lying, monkeypatch):
    def refuse(name):
        raise ImportError(why, path="/somewhere/_some.so")

    lying(name=owner.NAME, usable=True)
    monkeypatch.setattr(extensions, "import_module", refuse)
    with pytest.raises(MachineError, match=rf"^/somewhere/_some\.so: .*{re.escape(why)}.*{what}"):
        owner.available()
