"""The folder of a comparison: one owner at a time, one comparison, and files that are whole."""

from __future__ import annotations

import errno
import hashlib
import inspect
import json
import os
import platform
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lightning_mtl.compare import CompareError
from lightning_mtl.compare.texts import complain, shortened

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

FORMAT = 1
_LOCK = ".lock"
_BEYOND = 1 << 20  # the byte that is locked on Windows, where a locked one cannot be read
_TAKEN = (errno.EACCES, errno.EDEADLK) if sys.platform == "win32" else (errno.EWOULDBLOCK,)
_locks: dict[int, Path] = {}  # open locks of this process, and their files


# ------------------------------------------------------------------------------------- files


def write(path: Path, content: str | bytes) -> None:
    """Replace a file in one step, on the disk when this returns: a crash leaves the old or the new.

    Raises:
        OSError: it could not be written; the old one is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            _write_all(handle, as_bytes(content), temporary)
        finally:
            os.close(handle)
        temporary.replace(path)
        sync_folder(path.parent)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()  # half a file would only help to fill the disk
        raise


def append(path: Path, content: str) -> None:
    """Add to a file, on the disk when this returns: all of it, or nothing.

    Raises:
        OSError: it could not be written; the file is as it was.
    """
    new = not path.exists()
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        before = os.fstat(handle).st_size
        try:
            _write_all(handle, as_bytes(content), path)
        except BaseException:
            with suppress(OSError):  # then a line is cut short, which is dropped when it is read
                os.ftruncate(handle, before)
            raise
    finally:
        os.close(handle)
    if new:
        sync_folder(path.parent)


def _write_all(handle: int, content: bytes, path: Path) -> None:
    """Write and sync; on a disk nearly full ``os.write`` writes a part only, without an error."""
    try:
        while content:
            content = content[os.write(handle, content) :]
        os.fsync(handle)
    except OSError as error:
        raise OSError(error.errno, os.strerror(error.errno or 0), str(path)) from error


def sync_folder(folder: Path) -> None:
    """Put the names of new files on the disk, where a folder can be synced."""
    if sys.platform != "win32":
        handle = os.open(folder, os.O_RDONLY)
        try:
            with suppress(OSError):
                os.fsync(handle)
        finally:
            os.close(handle)


def as_bytes(content: str | bytes) -> bytes:
    """UTF-8; a lone surrogate becomes the escape that JSON has for it."""
    return content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content


# ------------------------------------------------------------------------- owner and comparison


@contextmanager
def claimed(folder: Path, comparison: Mapping[str, Any]) -> Iterator[None]:
    """Hold ``folder`` for this process and this comparison until the end of the block.

    Args:
        folder: made when it is not there.
        comparison: what identifies it: all but the number of seeds, of workers, and ``--only``.

    Raises:
        CompareError: another process has the folder, it holds another comparison or files that are
            none, or it cannot be written. Then nothing in it has changed.
    """
    text = json.dumps({"format": FORMAT, **comparison}, default=str, ensure_ascii=False, indent=1)
    now = json.loads(text)
    with refused(folder):
        _same(folder, now)
        _make(folder)
        handle = _lock(folder)
    try:
        with refused(folder):
            if not _same(folder, now):  # once more: nobody else writes here from now on
                write(folder / "comparison.json", text + "\n")
            for inner in ("logs", "curves"):
                (folder / inner).mkdir(exist_ok=True)
        yield
    finally:
        _release(handle)


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Hold ``folder`` for this process, whatever it holds, until the end of the block.

    Raises:
        CompareError: another process has it, or it cannot be written.
    """
    with refused(folder):
        _make(folder)
        handle = _lock(folder)
    try:
        yield
    finally:
        _release(handle)


@contextmanager
def refused(folder: Path) -> Iterator[None]:
    """Turn what the file system says against ``folder`` into a refusal."""
    try:
        yield
    except (OSError, ValueError) as error:  # a NUL in a path is a ValueError
        raise CompareError(
            f"Expected --out to be a folder that can be read and written, but found "
            f"{shortened(str(folder), 200)}: {shortened(str(error), 400)}. Mend that, or give "
            f"another folder with --out."
        ) from error


def _make(folder: Path) -> None:
    """Make the folder, or leave nothing of the way to it."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        for path in missing:
            with suppress(OSError):
                path.rmdir()
        raise
    for path in missing:
        sync_folder(path.parent)


def _lock(folder: Path) -> int:
    """Lock the folder; the system takes the lock away when the process ends, however it ends."""
    path = folder / _LOCK
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if sys.platform == "win32":
            os.lseek(handle, _BEYOND, os.SEEK_SET)
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _TAKEN:
            owner = _owner(handle)
            os.close(handle)
            raise CompareError(
                f"Expected {folder} to be free but another `lightning-mtl compare`{owner} works on "
                f"it. Wait until that has ended, or give this one another folder with --out."
            ) from error
        # Some network file systems have no locks: better unguarded, and said, than not at all.
        complain(
            f"note: {path} cannot be locked ({os.strerror(error.errno or 0)}), so nothing keeps "
            f"another comparison away from this folder. Start only one."
        )
    _locks[handle] = path.absolute()
    with suppress(OSError):  # the lock holds without the name of its owner
        os.ftruncate(handle, 0)
        os.lseek(handle, 0, os.SEEK_SET)
        os.write(handle, as_bytes(f"{os.getpid()} {platform.node()}\n"))
    return handle


def _owner(handle: int) -> str:
    """Who has the lock, if it says so."""
    with suppress(OSError, ValueError):
        os.lseek(handle, 0, os.SEEK_SET)
        number, node = os.read(handle, 1000).decode("utf-8").split(maxsplit=1)
        where = "" if node.strip() == platform.node() else f" on {node.strip()}"
        return f" (process {int(number)}{where})"
    return ""


def _release(handle: int) -> None:
    _locks.pop(handle, None)
    with suppress(OSError):
        os.ftruncate(handle, 0)
    os.close(handle)


def check_lock(folder: Path) -> None:
    """Write no more once the file of our lock is gone: another comparison may have made its own.

    Somebody took it for one that a dead process left behind, or removed the whole folder.

    Raises:
        OSError: ``folder`` is locked by this process, by a file that is there no more.
    """
    path = (folder / _LOCK).absolute()
    for handle, locked in _locks.items():
        if locked != path:
            continue
        try:
            there = os.path.samestat(os.fstat(handle), path.stat())
        except FileNotFoundError:
            there = False
        if not there:
            raise OSError(
                errno.ENOENT,
                "the file of the lock was removed while the comparison ran, so another one may "
                "have begun in this folder, and this one writes nothing more",
                str(path),
            )


def leave_locks() -> None:
    """In a forked process: close the locks, so that they end with their owner and not with this."""
    while _locks:
        os.close(_locks.popitem()[0])


def _same(folder: Path, now: dict[str, Any]) -> bool:
    """Whether the folder holds this comparison; False when it holds none yet."""
    path = folder / "comparison.json"
    cure = f"Give this comparison another folder with --out, or remove {folder} first."
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    if not path.exists():
        if (folder / "results.jsonl").exists():
            raise CompareError(f"Expected {path} beside results.jsonl but found none. {cure}")
        return False
    try:
        before = flatten(json.loads(path.read_bytes().decode("utf-8")))
    except (ValueError, RecursionError) as error:
        where = f"line {error.lineno}" if isinstance(error, json.JSONDecodeError) else "line 1"
        raise CompareError(
            f"Expected {path} to be the JSON that an earlier start wrote, but found at {where}: "
            f"{error}. It says what the results beside it belong to: put it back, or start "
            f"afresh. {cure}"
        ) from error
    flat = flatten(now)
    differences = [
        f"  {key}: {_show(before, key)} in the folder, {_show(flat, key)} now"
        for key in sorted({*before, *flat})
        # by their text too: NaN is not equal to itself
        if before.get(key, ...) != flat.get(key, ...) and _show(before, key) != _show(flat, key)
    ]
    if differences:
        shown = differences[:10] + [f"  and {len(differences) - 10} more"] * (len(differences) > 10)
        raise CompareError(
            f"Expected {folder} to be empty or to hold this comparison, but it holds another one:\n"
            + "\n".join(shown)
            + f"\n{cure}"
        )
    return True


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dicts and lists as ``{"a.b.0": leaf}``."""
    if isinstance(value, Mapping) and value:
        items: Iterable[tuple[Any, Any]] = value.items()
    elif isinstance(value, list) and value:
        items = enumerate(value)
    else:
        return {prefix: value}
    found: dict[str, Any] = {}
    for key, inner in items:
        found.update(flatten(inner, f"{prefix}.{key}" if prefix else str(key)))
    return found


def _show(flat: Mapping[str, Any], key: str) -> str:
    return shortened(repr(flat[key]), 300) if key in flat else "nothing"


def source_hash(cls: type) -> str:
    """Hash of the file that defines a class: results of older code must not mix with new ones."""
    try:
        return file_hash(inspect.getfile(cls))
    except TypeError:
        return "unknown"


def file_hash(path: str) -> str:
    """Hash of a file's content, ``"unknown"`` where it cannot be read."""
    try:
        return content_hash(Path(path).read_bytes())
    except OSError:
        return "unknown"


def content_hash(content: bytes) -> str:
    """Hash of bytes, short enough to be read."""
    return hashlib.sha256(content).hexdigest()[:16]
