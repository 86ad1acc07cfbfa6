"""Checks that begin while a merge is written: of what is whole, once, with nothing left behind."""

import threading
from dataclasses import replace

import pytest

import dora_export
from dora_export import api
from dora_export.engine import Engine
from dora_export.errors import AdapterError, VerifyError
from dora_export.tensors import F16, FileRange, TensorRef
from dora_export.verification import ahead as module
from dora_export.verification.ahead import Ahead, bytes_beside
from dora_export.worker import Worker
from dora_export.writers.files import FileSink
from tests import small
from tests.test_engine import RANK, write_case


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ahead")
    write_case(folder, layers=3, out=96, inputs=64)
    return folder


@pytest.fixture
def plan(case):
    return api._plan(case / "base", case / "adapter", api.ReadOptions(), api.Settings())[0]


@pytest.fixture
def seen(monkeypatch):
    """What is checked, by whom; the checks themselves are done as ever."""
    looks, real_check, real_difference = [], module.tensor_check, module.difference

    def tensor_check(plan, level):
        check = real_check(plan, level)

        def one(step, ref):
            looks.append((step.name, 0, threading.current_thread().name))
            return check(step, ref)

        return one

    def difference(source, stored, start, stop):
        looks.append((source.name, start, threading.current_thread().name))
        return real_difference(source, stored, start, stop)

    monkeypatch.setattr(module, "tensor_check", tensor_check)
    monkeypatch.setattr(module, "difference", difference)
    return looks


def merge(case, out, **options):
    threads = set(threading.enumerate())
    try:
        return dora_export.merge(case / "base", case / "adapter", out, threads=2, **options)
    finally:
        assert set(threading.enumerate()) <= threads


@pytest.mark.parametrize("level", ["fast", "full"])
def test_every_tensor_of_a_merge_is_checked_once_and_beside_the_writing(
    case, tmp_path, monkeypatch, seen, level
):
    run, submit, begun = Engine.run, Ahead._submit, []

    def run_and_wait(engine):
        run(engine)
        for future in begun:
            future.exception(timeout=60)

    def submit_and_note(ahead, key, *work):
        submit(ahead, key, *work)
        begun.append(ahead._begun[key])

    monkeypatch.setattr(Engine, "run", run_and_wait)
    monkeypatch.setattr(Ahead, "_submit", submit_and_note)
    monkeypatch.setattr("dora_export.verification.tensor_ledger.SPAN_ELEMENTS", 50)
    report = merge(case, tmp_path / "out", verify=level)
    assert report.verified == level
    names = sorted((name, start) for name, start, _ in seen)
    # three layers with two weights, the embedding; and the norm's 64 elements in two spans
    assert len(names) == len(set(names)) == 3 * 2 + 1 + 2
    assert all(thread.startswith("check") for *_, thread in seen)


def test_what_an_interrupted_run_has_written_is_checked_from_the_start(
    case, tmp_path, monkeypatch, seen
):
    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(api, "check", stop)
        with pytest.raises(KeyboardInterrupt):
            merge(case, tmp_path / "out")
    seen.clear()
    before = []
    monkeypatch.setattr(FileSink, "write_header", lambda *_: before.append(len(told)))
    told, written = [], Ahead.written

    def note(ahead, *place):
        told.append(place)
        written(ahead, *place)

    monkeypatch.setattr(Ahead, "written", note)
    assert merge(case, tmp_path / "out").resumed_bytes > 0
    assert before == [1]
    assert len(seen) == 3 * 2 + 2


def first(plan, *, changed=True):
    return next((s, o) for s, o in plan.files[0].offsets() if bool(s.changes) == changed)


def place(plan, folder, step, offset):
    path = folder / plan.files[0].name
    return TensorRef(step.name, step.dtype, step.shape, FileRange(path, offset, step.nbytes))


def test_a_tensor_is_checked_when_its_last_bytes_have_come(case, plan, tmp_path, seen):
    merge(case, tmp_path / "out", verify="none")
    step, offset = first(plan)
    asked = []

    def is_there(*place):
        asked.append(place)
        return True

    with Ahead(plan, tmp_path / "out", "fast", 1) as ahead:
        half = offset + step.nbytes // 2
        ahead.written(0, offset, half, lambda *_: False)
        assert not ahead._begun
        ahead.written(0, half, offset + step.nbytes, is_there)
        assert asked == [(0, offset, step.nbytes)]  # its neighbours have nothing to do with it
        ahead.written(0, half, offset + step.nbytes, is_there)  # another worker was as late
        assert len(ahead._begun) == 1
        result, findings = ahead.check(step, place(plan, tmp_path / "out", step, offset))
    assert result.status in ("exact", "rounded")
    assert findings == ()
    assert [name for name, *_ in seen] == [step.name]


@pytest.mark.parametrize("changed", [True, False])
@pytest.mark.parametrize("other", ["place", "dtype", "shape"])
def test_what_is_read_elsewhere_or_as_another_type_is_looked_at_anew(
    plan, tmp_path, monkeypatch, changed, other
):
    monkeypatch.setattr(module, "tensor_check", lambda *_: lambda step, ref: ref)
    monkeypatch.setattr(module, "difference", lambda source, stored, start, stop: stored)
    step, offset = first(plan, changed=changed)
    ref = place(plan, tmp_path, step, offset)
    shape = (step.source.size, 1)
    odd = {
        "place": replace(ref, source=replace(ref.source, start=offset + 8)),
        "dtype": replace(ref, dtype=F16),
        "shape": replace(ref, shape=shape),
    }[other]
    with Ahead(plan, tmp_path, "fast", 1) as ahead:
        ahead.written(0, offset, offset + step.nbytes, lambda *_: True)
        for stored in (odd, ref):
            if changed:
                assert ahead.check(step, stored) == stored
            else:
                assert ahead.compare(step.source, stored, 0, step.source.size) == stored


def test_large_operands_wait_until_the_merge_has_let_go_of_its_own(
    case, plan, tmp_path, monkeypatch, seen
):
    sizes = [RANK * (rows + 64) + m for rows, m in ((64, 64), (96, 96), (4 * 96, 64))]  # A, B and m
    assert bytes_beside(plan, 3) == 3 * (2 * 8 * sizes[2] + module.BLOCK_BYTES)
    monkeypatch.setattr(module, "MOST_BYTES", 8 * sizes[0])
    assert bytes_beside(plan, 1) == 2 * 8 * sizes[0] + module.BLOCK_BYTES
    merge(case, tmp_path / "out", verify="fast")
    beside = {name for name, _, thread in seen if thread.startswith("check")}
    assert not any("up_proj" in name or "embed" in name for name in beside)
    assert {name for name, *_ in seen} >= {s.name for s in plan.steps}


def test_memory_of_the_checks_is_part_of_the_bound(case, plan, tmp_path):
    bounds = [
        merge(case, tmp_path / level, verify=level, dry_run=True).memory_bytes
        for level in ("none", "fast")
    ]
    assert bounds[1] - bounds[0] == bytes_beside(plan, 2)
    alone = [
        dora_export.merge(
            case / "base", case / "adapter", tmp_path / "x", threads=1, verify=level, dry_run=True
        ).memory_bytes
        for level in ("none", "fast")
    ]
    assert alone[0] == alone[1]  # one thread merges, and checks after that


@pytest.mark.parametrize("level", ["fast", "full"])
def test_wrong_weights_are_refused_as_ever(case, tmp_path, monkeypatch, level):
    real = Worker.merge

    def wrong(worker, piece, changes):
        if "layers.1.mlp" in piece.step.name:
            changes = [replace(c, magnitude=c.magnitude * 1.5) for c in changes]
        real(worker, piece, changes)

    monkeypatch.setattr(Worker, "merge", wrong)
    with pytest.raises(VerifyError, match=r"layers\.1\.mlp\.up_proj") as refused:
        merge(case, tmp_path / "out", verify=level)
    assert "layers.0" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_a_merge_that_fails_takes_its_checks_along(case, tmp_path, monkeypatch):
    real = Worker.merge

    def failing(worker, piece, changes):
        if "layers.2" in piece.step.name:
            raise AdapterError("w: broken. Use another.")
        real(worker, piece, changes)

    monkeypatch.setattr(Worker, "merge", failing)
    with pytest.raises(AdapterError, match="broken"):
        merge(case, tmp_path / "out")  # which looks for threads that are left


def test_errors_of_what_nobody_asks_for_are_nobodys(case, tmp_path, monkeypatch):
    real = Ahead._begin

    def begin(ahead, step, place):
        real(ahead, step, replace(place, path=place.path.with_name("gone")))

    monkeypatch.setattr(Ahead, "_begin", begin)
    assert merge(case, tmp_path / "out").verified == "fast"


def test_inputs_that_are_hashed_already_are_not_read_again_for_it(tmp_path, monkeypatch):
    def refuse(path, what):
        raise AssertionError(f"{path} read again")

    small.write_pair(tmp_path)
    monkeypatch.setattr("dora_export.verification.side_ledger._digest", refuse)
    dora_export.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    with pytest.raises(AssertionError, match="read again"):
        dora_export.verify(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
