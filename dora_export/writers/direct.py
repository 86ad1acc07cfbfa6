"""Writes past the page cache, on file systems that are known to take them well.

Output that must be on the disk before it is published gains nothing from the page cache: each byte
is copied into it, page by page at the cost of more system time than the merge itself takes, and
still has to be written from there. Past it, the disk takes the bytes from where they were computed.
What is in the cache already (the base) stays there.

Where a file system lets files share blocks, a range that is only copied takes no write at all.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import sys
from contextlib import suppress
from pathlib import Path

from dora_export.paged import PAGE
from dora_export.tensors import FileRange

# statfs(2): ext2 to ext4, XFS, and what containers lay over them. Others (network file systems, and
# those that compress or keep checksums) take such writes one round trip at a time, or not at all.
FILE_SYSTEMS = {0xEF53: "ext4", 0x58465342: "xfs", 0x794C7630: "overlayfs"}

# What is best handed over at once: the disk has more to do in one go, and no cache to stay within.
BLOCK_BYTES = 8 << 20
# Workers beyond one for each CPU: whoever writes past the cache waits for the disk meanwhile.
WAITING = 2
FICLONERANGE = 0x4020940D  # linux/fs.h, as on all processors but MIPS, PowerPC and SPARC


def pays(folder: Path) -> bool:
    """Return whether files in a folder are written past the page cache with a gain.

    Args:
        folder: One that exists, or that will be made in the nearest one above it that does.
    """
    if sys.platform != "linux" or not hasattr(os, "O_DIRECT"):
        return False
    folder = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    status = (ctypes.c_long * 64)()  # struct statfs begins with f_type, and is smaller
    if ctypes.CDLL(None, use_errno=True).statfs(os.fsencode(folder), status) != 0:
        return False  # the first file that is made there will tell why
    return status[0] in FILE_SYSTEMS


def opened(path: Path) -> int | None:
    """Return a descriptor for writes past the page cache, or None where the system has none.

    Args:
        path: An existing file.

    Raises:
        OSError: It cannot be opened at all.
    """
    try:
        return os.open(path, os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        if error.errno == errno.EINVAL:
            return None
        raise


def share(source: FileRange, descriptor: int, offset: int) -> range:
    """Let an output file share a source's whole pages, where the file system has that.

    Args:
        source: What is copied.
        descriptor: The output file.
        offset: Where in it the source's bytes go.

    Returns:
        Which of the source's bytes are in the output now: none, or its whole pages.
    """
    first = -offset % PAGE
    nbytes = max(0, source.nbytes - first) // PAGE * PAGE
    if nbytes == 0 or (source.start + first) % PAGE:
        return range(0)
    # An error says nothing of which file it is about: the caller copies, and meets it there.
    with suppress(OSError), open(source.path, "rb", buffering=0) as file:
        import fcntl  # noqa: PLC0415 - absent on Windows, where nothing is written past the cache

        request = struct.pack("=qQQQ", file.fileno(), source.start + first, nbytes, offset + first)
        fcntl.ioctl(descriptor, FICLONERANGE, request)
        return range(first, first + nbytes)
    return range(0)
