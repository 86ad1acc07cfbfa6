"""Publish whole or not at all: write into a hidden folder beside the output, then rename it.

The folder holds a journal (``writers/journal.py``) that marks it as this tool's, carries the lock
of the run at work, and says what is finished. So a run that was killed can be gone on with, and
nothing else of that name is ever taken for staged work.

For an output ``OUT`` these names beside it belong to this tool:

``.OUT.dora_export-partial``
    Staged work, or, for an instant after ``OUT`` was replaced, what it was before.
``.OUT.dora_export-replaced``
    What ``OUT`` was before, while it is being replaced on a file system that cannot swap folders.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import stat
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from dora_export.errors import DoraExportError, InputError, MachineError, OutputError, listing
from dora_export.words import size
from dora_export.writers.files import sync_folder, sync_folders, sync_tree
from dora_export.writers.journal import Contents, Job, Journal, decode, differences, stored
from dora_export.writers.names import hidden_name
from dora_export.writers.ranges import Ranges

MARK = ".dora_export-staging"  # the journal: whoever finds it in a folder knows whose that is
MANIFEST = "dora_export.json"
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


@dataclass
class Stage:
    """A folder to write an output into.

    Attributes:
        folder: The folder.
        published: It is the output already, whole, by a run that was killed right after: there is
            nothing left to write.
        held: File name -> bytes that a run before has put on the disk.
    """

    folder: Path
    held: Mapping[str, Ranges]
    published: bool = False
    _journal: Journal | None = None
    _recorded: dict[str, Ranges] = field(default_factory=dict)

    @property
    def held_bytes(self) -> int:
        """Bytes of weight files that a run before has put on the disk."""
        return _nbytes(self.held)

    @property
    def done_bytes(self) -> int:
        """Bytes of weight files that a run after this one would not have to write again."""
        return _nbytes({**self.held, **self._recorded})

    def record(self, synced: Mapping[str, Ranges]) -> None:
        """Note in the journal that bytes are on the disk, as they must be, by file name.

        Raises:
            OutputError: The journal cannot be written.
        """
        assert self._journal is not None, "Bug: nothing is written into a published folder"
        self._journal.done(synced)
        if not self._recorded:
            sync_folder(self.folder.parent)  # the folder's own name
        for name, ranges in synced.items():
            done = self._recorded.setdefault(name, Ranges(self.held.get(name, ())))
            done.update(ranges)


@dataclass(frozen=True)
class Leftover:
    """What a run that did not end has left.

    Attributes:
        folder: Where.
        published: It is the output itself, whole: only the journal was not removed any more.
        contents: What its journal says, or None if that is not readable.
        disk_bytes: Disk space of its files.
    """

    folder: Path
    published: bool
    contents: Contents | None = field(repr=False)
    disk_bytes: int

    @property
    def done_bytes(self) -> int:
        """Bytes of weight files that need not be written again."""
        return self.contents.done_bytes if self.contents else 0

    def is_of(self, job: Job) -> bool:
        """Return whether it is the work of this job."""
        return self.contents is not None and self.contents.identity == job.identity

    def held(self, job: Job) -> dict[str, Ranges]:
        """Return what a run of ``job`` takes over: file name -> bytes that are on the disk.

        Files that are not of their planned size are not trusted.

        Raises:
            OutputError: It was made from other inputs or with other options.
        """
        if self.contents is None:
            return {}
        changed = differences(self.contents.identity, job.identity)
        if changed and (self.contents.done or not self.contents.readable):
            raise OutputError(
                f"{self.folder}: holds {size(self.done_bytes)} of an interrupted run, which was "
                f"started from other inputs or with other options (then → now):{listing(changed)}\n"
                "Start it as it was then to go on with it, or pass --restart to drop it."
            )
        if changed:
            return {}
        return {
            name: ranges
            for name, ranges in self.contents.done.items()
            if name in job.files and _is_file_of(self.folder, name, job.files[name])
        }


def find_leftover(target: Path) -> Leftover | None:
    """Return what a run that did not end has left of an output; changes nothing.

    Raises:
        OutputError: It cannot be read.
    """
    for folder, published in ((target, True), (_partial(target), False)):
        try:
            if not _is_staged(folder) or (published and not _is_own(folder)):
                continue
            contents = decode(stored(folder / MARK))
            return Leftover(folder, published, contents, _disk_bytes(folder))
        except OSError as error:
            raise OutputError(
                f"{folder}: cannot be read: {error.strerror}. Remove it, or pass another -o."
            ) from error
    return None


@contextmanager
def staged(
    target: Path, job: Job, *, force: bool = False, restart: bool = False, sync: bool = True
) -> Iterator[Stage]:
    """Yield a folder to write into; rename it to ``target`` if the block succeeds.

    At any instant ``target`` is absent, what it was before, or whole. (Where the file system cannot
    swap two folders, a kill while an output is being replaced leaves it absent, until the next run
    puts back what it was.)

    If the block fails, what is staged is kept where another run can go on with it: after an
    interruption, after a failure of a disk or of the machine, and after an error nobody foresaw. It
    is removed after a refusal or a failed check, which say that something is wrong with the work or
    with what it is made from, and if none of it is on the disk yet. A ``DoraExportError`` names the
    folder that was kept.

    What a run before has left is gone on with if it is of the same job; else it is refused, and
    dropped only with ``restart``. What it left without a readable journal is dropped.

    Args:
        target: Folder to publish.
        job: What is to be written.
        force: Replace ``target`` if it is an earlier output of this tool.
        restart: Drop what an interrupted run left.
        sync: Put folders on the disk before and after the rename. Without it a kill still finds
            ``target`` absent or whole, but after a power failure its files may hold anything.

    Raises:
        OutputError: ``target`` exists and may not be replaced, another run is writing it, staged
            work of another job is in the way, or the folder cannot be made.
    """
    journal = _claim_published(target, job, restart=restart)
    if journal is not None:
        try:
            if sync:
                sync_tree(target)  # the run that published it may not have
            yield Stage(target, _whole(job), published=True)
            _settle(target, sync=sync)
        finally:
            journal.close()
        return
    check_target(target, force=force)
    partial = _partial(target)
    made = [parent for parent in target.parents if not parent.exists()]
    journal = _claim(partial)
    try:
        stage = _taken_over(partial, job, journal, restart=restart)
        try:
            _put_back(target)
            check_target(target, force=force)  # again: the run before may just have ended
            if not stage.held:
                journal.begin(job.identity)
            yield stage
            if sync:
                sync_folders(partial)
            if os.name == "nt":  # where open files keep their folder from being renamed
                journal.close()
            _publish(partial, target, force=force, sync=sync)
        except BaseException as error:  # Ctrl-C too: half a model must never look like a whole one
            if _is_staged(partial) and not _keep(stage, error):
                with suppress(OSError):  # of less interest than why there is nothing to keep
                    _remove(partial, last=MARK)
                    for parent in made:
                        parent.rmdir()
            raise
    finally:
        journal.close()


def preview(target: Path, job: Job, *, force: bool = False, restart: bool = False) -> int:
    """Return the bytes of weight files that ``staged`` would find written; changes nothing.

    Raises:
        OutputError: ``target`` exists and may not be replaced, or staged work of another job is in
            the way.
    """
    found = None if restart else find_leftover(target)
    if found is not None and found.published and found.is_of(job):
        return job.nbytes
    check_target(target, force=force)
    return 0 if found is None or found.published else _nbytes(found.held(job))


def check_target(target: Path, *, force: bool) -> None:
    """Refuse a target that exists, unless it is this tool's and ``force`` is set.

    Raises:
        OutputError: It exists and may not be replaced.
    """
    if not (target.exists() or target.is_symlink()):
        return
    own = _is_own(target)
    if own and force:
        return
    if _is_empty(target):
        return
    way = "pass --force to replace it, or another -o" if own else "pass another -o"
    kind = "an earlier output of this tool" if own else "not this tool's output"
    raise OutputError(f"{target}: exists already ({kind}). Remove it, or {way}.")


def _partial(target: Path) -> Path:
    return target.with_name(hidden_name(target.name, "partial"))


def _replaced(target: Path) -> Path:
    return target.with_name(hidden_name(target.name, "replaced"))


def _is_own(folder: Path) -> bool:
    return folder.is_dir() and not folder.is_symlink() and (folder / MANIFEST).is_file()


def _is_empty(folder: Path) -> bool:
    return folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir())


def _is_staged(folder: Path) -> bool:
    """Return whether a folder has the mark of staged work."""
    mark = folder / MARK
    return not folder.is_symlink() and mark.is_file() and not mark.is_symlink()


def _nbytes(files: Mapping[str, Ranges]) -> int:
    return sum(ranges.nbytes for ranges in files.values())


def _whole(job: Job) -> dict[str, Ranges]:
    return {name: Ranges([(0, nbytes)]) for name, nbytes in job.files.items()}


def _is_file_of(folder: Path, name: str, nbytes: int) -> bool:
    """Return whether there is a file of that size, reached over no link."""
    path = folder / name
    try:
        status = path.lstat()
        between = [p.lstat() for p in path.parents if folder in p.parents]
    except (FileNotFoundError, NotADirectoryError):
        return False
    real = all(stat.S_ISDIR(s.st_mode) for s in between) and stat.S_ISREG(status.st_mode)
    # One with a second name may be anyone's: going on with it would write into that too.
    return real and status.st_size == nbytes and status.st_nlink == 1


def _disk_bytes(folder: Path) -> int:
    """Return the disk space of a folder's files; 0 where the system does not tell."""
    found = [f.lstat() for f in _files_below(folder)]
    return sum(getattr(s, "st_blocks", 0) * 512 for s in found if stat.S_ISREG(s.st_mode))


def _files_below(folder: Path) -> Iterator[Path]:
    """Yield all that is no folder, in a folder and in those below it.

    Raises:
        OSError: One of them cannot be listed.
    """
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            yield from _files_below(path)
        else:
            yield path


# --- beginning ---


def _claim_published(target: Path, job: Job, *, restart: bool) -> Journal | None:
    """Return the journal of an output that was published by a run killed before it removed that.

    The run had only to clear away. If it was of this job, there is nothing else left to do; if not,
    that is done here, and the output is one like any other.
    """
    found = find_leftover(target)
    if found is None or not found.published:
        return None
    journal = _open_journal(target)
    if found.is_of(job) and not restart:
        return journal
    try:
        _settle(target, sync=True)
    finally:
        journal.close()
    return None


def _put_back(target: Path) -> None:
    """Put back an output that a run had set aside when it was killed."""
    replaced = _replaced(target)
    if _is_own(replaced) and not target.exists():
        with _refused(f"{target}: cannot be put back"):
            os.rename(replaced, target)


def _claim(partial: Path) -> Journal:
    """Make the staging folder, or find what an interrupted run left; return its journal, locked.

    The journal stays in the folder until that has its final name: whoever finds the folder under
    this name finds the journal, locked if a run is at work.
    """
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            os.mkdir(partial)
        foreign = any(partial.iterdir()) and not _is_staged(partial)
    except OSError as error:
        raise OutputError(
            f"{partial.parent}: cannot make a folder there: {error.strerror}. Pass another -o."
        ) from error
    if foreign or partial.is_symlink():
        raise OutputError(f"{partial}: in the way, and not this tool's. Remove it.")
    return _open_journal(partial)


def _open_journal(folder: Path) -> Journal:
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND
    flags |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(folder / MARK, flags, 0o666)
    except OSError as error:
        raise OutputError(
            f"{folder}: cannot make a file there: {error.strerror}. Pass another -o."
        ) from error
    if not (_lock(descriptor) and _is_at(descriptor, folder / MARK)):
        os.close(descriptor)
        raise OutputError(
            f"{folder}: another run is writing this output. Wait, or pass another -o."
        )
    return Journal(folder / MARK, descriptor)


def _lock(descriptor: int) -> bool:
    """Return whether no other run holds the lock."""
    try:
        import fcntl  # noqa: PLC0415 - absent on Windows, where two runs are not kept apart
    except ImportError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True  # a file system without locks
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    """Return whether an open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError:
        return False


def _taken_over(partial: Path, job: Job, journal: Journal, *, restart: bool) -> Stage:
    """Return the stage with what can be used of a run before; all else is removed.

    The journal is put right first, on the disk: it must never name bytes of a file that has been
    removed and is written anew.

    Raises:
        OutputError: What is there is of another job.
    """
    contents = None if restart else journal.read()
    held: dict[str, Ranges] = {}
    if contents is not None:
        held = Leftover(partial, False, contents, 0).held(job)
    if held and contents is not None:
        journal.truncate(contents.nbytes)
        if lost := contents.done.keys() - held.keys():
            journal.lost(sorted(lost))
    else:
        journal.truncate(0)
    with _refused(f"{partial}: what an interrupted run left there cannot be removed"):
        for path in list(_files_below(partial)):
            if path.relative_to(partial).as_posix() not in (MARK, *held):
                os.unlink(path)
        used = {partial / name for name in held}
        for path in partial.iterdir():
            if path.is_dir() and not any(path in file.parents for file in used):
                shutil.rmtree(path)
    return Stage(partial, held, _journal=journal)


# --- ending ---


def _keep(stage: Stage, error: BaseException) -> bool:
    """Return whether to keep what is staged, and say so in the error's message if it has one."""
    refused = isinstance(error, DoraExportError) and not isinstance(
        error, OutputError | MachineError
    )
    if isinstance(error, InputError) and isinstance(error.__cause__, OSError):
        refused = False  # a disk that gives an error now may give the bytes tomorrow
    if refused or not stage.done_bytes:
        return False
    if isinstance(error, DoraExportError):
        error.args = (f"{error}\n{kept(stage.folder, stage.done_bytes)}",)
    return True


def kept(folder: Path, nbytes: int) -> str:
    """Return the sentence that says what is kept of a run that did not end."""
    return (
        f"{size(nbytes)} of staged work are kept in {folder}: the same command goes on from there; "
        "--restart, or removing that folder, gives it up."
    )


def _publish(partial: Path, target: Path, *, force: bool, sync: bool) -> None:
    """Rename the staged folder into place, put that on the disk, and clear away.

    The name is on the disk before the journal goes: after a power failure the folder has its final
    name, or it is staged work still.
    """
    check_target(target, force=force)  # again: a merge takes long enough for a folder to appear
    with _refused(f"{target}: cannot be put in place"):
        if not _is_own(target):
            if target.exists():
                os.rmdir(target)
            os.rename(partial, target)
        elif not _swap(partial, target):
            _replace(partial, target)
    if sync:
        with _confirmed(target):
            sync_folder(target.parent)
    _settle(target, sync=sync)


def _swap(partial: Path, target: Path) -> bool:
    """Let the staged folder and the old output change names at one instant; False: not possible."""
    if not _exchange(partial, target):
        return False
    if not _is_own(partial):  # someone has put something else there since it was looked at
        _exchange(partial, target)
        raise OutputError(f"{target}: was changed meanwhile. Pass another -o.")
    return True


def _exchange(one: Path, other: Path) -> bool:
    """Let two paths change names, atomically; return False where that is not possible.

    ``renameat2`` through libc: Python has no function for it.
    """
    if sys.platform != "linux":
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    names = os.fsencode(one), os.fsencode(other)
    if libc.renameat2(AT_FDCWD, names[0], AT_FDCWD, names[1], RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code))


def _replace(partial: Path, target: Path) -> None:
    """Set the old output aside and put the staged folder into its place."""
    replaced = _replaced(target)
    if _is_own(replaced):
        _remove(replaced, last=MANIFEST)  # left by a run killed while it cleared away
    os.rename(target, replaced)
    try:
        os.rename(partial, target)
    except BaseException:
        if not target.exists():
            os.rename(replaced, target)
        raise


def _settle(target: Path, *, sync: bool) -> None:
    """Clear away, once ``target`` has its name: what it has replaced, then the journal."""
    with _refused(f"{target}: is whole and in place, but what it replaced cannot be removed", ""):
        for old in (_partial(target), _replaced(target)):
            if (_is_own(old) and not _is_staged(old)) or _is_empty(old):
                _remove(old, last=MANIFEST)
        with suppress(FileNotFoundError):
            os.unlink(target / MARK)
    if sync:
        with _confirmed(target):
            sync_folder(target)


def _remove(folder: Path, *, last: str) -> None:
    """Remove a folder of ours, the file that tells whose it is at the end."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != last:
            os.unlink(path)
    with suppress(FileNotFoundError):
        os.unlink(folder / last)
    os.rmdir(folder)


@contextmanager
def _confirmed(target: Path) -> Iterator[None]:
    """Say of a sync that fails after the rename that the output is there all the same."""
    try:
        yield
    except OutputError as error:
        why = getattr(error.__cause__, "strerror", None) or error
        raise OutputError(
            f"{target}: whole and in place, but the disk does not confirm it: {why}. Check the "
            "disk, then run again with --force."
        ) from error


@contextmanager
def _refused(what: str, then: str = "Nothing was published. ") -> Iterator[None]:
    """Turn an error of the file system into a refusal that says what it is about."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"{what}: {error.strerror}. {then}Check the folder, or pass another -o."
        ) from error
