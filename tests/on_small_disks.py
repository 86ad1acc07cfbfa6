"""Merges on disks that fill up or die, in a process that may mount; test_faults runs it.

    unshare --mount python -m tests.on_small_disks FOLDER CASE ...

prints what happened as JSON: case -> refusals and what else the test asks for, or the failure.
"""

import json
import os
import shutil
import subprocess
import sys
import traceback
from pathlib import Path

import torch

import dora_export
from dora_export import DoraExportError
from dora_export.writers import files, place
from tests import faults, small

PAGE = 4096


def system(*words):
    subprocess.run([str(w) for w in words], check=True, capture_output=True)


def tmpfs(at, nbytes):
    at.mkdir(exist_ok=True)
    system("mount", "-t", "tmpfs", "-o", f"size={nbytes}", "tmpfs", at)
    return at


def image(path, mount, nbytes, *options):
    """An ext4 file system in a file; what it cannot hold shows late, as on a thin volume."""
    with path.open("wb") as file:
        file.truncate(nbytes)
    system("mkfs.ext4", "-q", "-F", "-O", "^has_journal", *options, path)
    mount.mkdir(exist_ok=True)
    system("mount", "-o", "loop", path, mount)
    return mount


def wide_pair(at):
    """A pair whose output has some 60 pages of weights."""
    tensors = {"model.embed_tokens.weight": torch.randn(2048, 12).bfloat16()}
    tensors |= {f"model.layers.{i}.proj.weight": torch.randn(256, 96).bfloat16() for i in range(4)}
    adapter = {}
    for name in list(tensors)[1:]:
        key = small.PREFIX + name.removesuffix(".weight")
        adapter[f"{key}.lora_A.weight"] = torch.randn(small.RANK, 96)
        adapter[f"{key}.lora_B.weight"] = torch.randn(256, small.RANK)
        adapter[f"{key}.lora_magnitude_vector"] = 30 * (torch.rand(256) + 0.5)  # about the norms
    small.write_base(at / "base", tensors)
    small.write_adapter(at / "adapter", adapter, target_modules=["proj"])


def outcome(at, output, reference=None, **options):
    """Merge; return the refusal, or None after a look at what was published."""
    before = small.entries(at / "base"), small.entries(at / "adapter")
    handles = faults.descriptors()
    try:
        dora_export.merge(at / "base", at / "adapter", output, **options)
        refusal = None
    except DoraExportError as error:
        faults.check_clear(error)
        refusal = str(error)
        assert not output.exists()
    assert faults.descriptors() == handles
    assert (small.entries(at / "base"), small.entries(at / "adapter")) == before
    if refusal is None and reference is not None:
        assert small.entries(output) == reference
    return refusal


def fills(at, *, reserving):
    """Disks of every size from one page on."""
    dora_export.merge(at / "base", at / "adapter", at / "reference")
    reference = small.entries(at / "reference")
    reserve, refusals, published = files._reserve, [], 0
    if not reserving:
        files._reserve = os.ftruncate  # as on a file system without fallocate
    try:
        for pages in (*range(1, 56, 6), *range(56, 84)):
            disk = tmpfs(at / "disk", pages * PAGE)
            refusal = outcome(at, disk / "out", reference)
            refusals += [refusal] if refusal else []
            published += refusal is None
            system("umount", disk)
    finally:
        files._reserve = reserve
    return {"refusals": refusals, "published": published}


def fills_meanwhile(at):
    """Someone else takes what is left, after each of the bytes of the weights."""
    dora_export.merge(at / "base", at / "adapter", at / "reference")
    refusals = []
    for part in (0.0, 0.5, 1.0):
        disk = tmpfs(at / "disk", 512 << 10)

        def take(done, total, disk=disk, part=part):
            if done < part * total:
                return
            with (disk / "ballast").open("ab", buffering=0) as file:
                try:
                    while file.write(bytes(PAGE)):
                        pass
                except OSError:
                    pass

        refusals.append(outcome(at, disk / "out", progress=take))
        system("umount", disk)
    return {"refusals": refusals}


def no_fallocate(at):
    """A file system of the time before fallocate: the fallback, for good and when it is full."""
    dora_export.merge(at / "base", at / "adapter", at / "reference")
    reference = small.entries(at / "reference")
    disk = image(at / "image", at / "disk", 1 << 20, "-t", "ext2", "-m", "0")
    descriptor = os.open(disk / "probe", os.O_RDWR | os.O_CREAT)
    code = files.ctypes.CDLL(None, use_errno=True).fallocate64(
        descriptor, 0, files.ctypes.c_int64(0), files.ctypes.c_int64(10)
    )
    os.close(descriptor)
    good = outcome(at, disk / "out", reference)
    shutil.rmtree(disk / "out")
    free = shutil.disk_usage(disk).free
    with (disk / "ballast").open("wb") as file:
        file.write(bytes(free - 200_000))
    full = outcome(at, disk / "out", reference)
    return {"refusals": [full], "good": good, "fallocate": code}


def dies_at_sync(at):
    """A disk that takes everything and has room for little of it: seen when it is synced."""
    pool = tmpfs(at / "pool", 640 << 10)
    disk = image(pool / "image", at / "disk", 64 << 20)
    with (pool / "ballast").open("wb", buffering=0) as file:
        try:
            while file.write(bytes(PAGE)):
                pass
        except OSError:
            pass
    return {"refusals": [outcome(at, disk / "out")]}


def dies_while_read(at):
    """The base's disk loses its second half while it is read."""
    pool = tmpfs(at / "pool", 64 << 20)
    disk = image(pool / "image", at / "disk", 32 << 20)
    tensors = {f"model.layers.{i}.proj.weight": torch.randn(1024, 512) for i in range(8)}
    small.write_base(disk / "base", tensors)
    system("umount", disk)  # nothing of it is in memory any more
    system("mount", "-o", "loop", pool / "image", disk)
    adapter = {}
    for name in tensors:
        key = small.PREFIX + name.removesuffix(".weight")
        adapter[f"{key}.lora_A.weight"] = torch.randn(small.RANK, 512)
        adapter[f"{key}.lora_B.weight"] = torch.randn(1024, small.RANK)
        adapter[f"{key}.lora_magnitude_vector"] = 70 * (torch.rand(1024) + 0.5)
    small.write_adapter(at / "dying", adapter, target_modules=["proj"])

    def die(_done, _total):
        os.truncate(pool / "image", 1 << 20)

    try:
        dora_export.merge(
            disk / "base", at / "dying", at / "out", threads=1, block_bytes=1 << 16, progress=die
        )
    except DoraExportError as error:
        faults.check_clear(error)
        assert not (at / "out").exists()
        return {"refusals": [str(error)]}
    return {"refusals": []}


def read_only(at):
    """An output, then an input, on a file system that is mounted read-only."""
    disk = tmpfs(at / "disk", 1 << 20)
    for name in ("base", "adapter"):
        shutil.copytree(at / name, disk / name)
    system("mount", "-o", "remount,ro", disk)
    refused = outcome(at, disk / "out")
    dora_export.merge(disk / "base", disk / "adapter", at / "out")
    dora_export.merge(at / "base", at / "adapter", at / "out2")
    return {"refusals": [refused], "same": small.entries(at / "out") == small.entries(at / "out2")}


def other_disk(at):
    """Base and output on different file systems, so that the kernel cannot copy between them."""
    disk = tmpfs(at / "disk", 4 << 20)
    dora_export.merge(at / "base", at / "adapter", at / "here")
    refused = outcome(at, disk / "out", small.entries(at / "here"))
    return {"refusals": [refused], "apart": disk.stat().st_dev != at.stat().st_dev}


def mount_point(at):
    """An output that is an empty mount point, as containers have them."""
    disk = tmpfs(at / "disk", 1 << 20)
    try:
        dora_export.merge(at / "base", at / "adapter", disk)
    except DoraExportError as error:
        faults.check_clear(error)
        return {"refusals": [str(error)], "left": sorted(os.listdir(at)) + os.listdir(disk)}
    return {"refusals": []}


CASES = {
    "fills": lambda at: fills(at, reserving=True),
    "fills without fallocate": lambda at: fills(at, reserving=False),
    "fills meanwhile": fills_meanwhile,
    "read-only": read_only,
    "other disk": other_disk,
    "mount point": mount_point,
}
ON_LOOPS = {
    "no fallocate": no_fallocate,
    "dies at sync": dies_at_sync,
    "dies while read": dies_while_read,
}


def main(folder, names):
    place.SPARE_BYTES = -(1 << 40)  # the check beforehand is not what is tested here
    results = {}
    for i, name in enumerate(names):
        at = folder / str(i)
        wide_pair(at)
        try:
            results[name] = (CASES | ON_LOOPS)[name](at)
        except Exception:
            results[name] = {"failure": traceback.format_exc()}
    print(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
