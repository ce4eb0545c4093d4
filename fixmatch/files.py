"""Writing a file so that a reader finds the old content or the new, never half of either; reading no more than fits."""

import contextlib
import errno
import os
import pathlib
import shutil
import typing
from collections.abc import Iterator


def write_atomic(path: str | pathlib.Path, content: bytes | str) -> None:
    """Writes beside `path`, in folders made as needed, flushes to disk, then replaces it.

    On an error `path` stays as it was.
    """
    with replacing(pathlib.Path(path)) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[typing.BinaryIO]:
    """The same for what is written piece by piece, to the file of a with block."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _flush_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):  # of a disk that nothing can be removed from, which would hide `error`
            temporary.unlink()
        if isinstance(error, OSError):
            error.filename = str(path)  # a failed write does not say where
        raise


def linked(file: pathlib.Path, name: pathlib.Path) -> bool:
    """Whether `name` is, or could be made, a hard link to `file`, which takes no room; some disks have none."""
    try:
        os.link(file, name)
    except FileExistsError:
        return os.path.samefile(file, name)
    except OSError:
        return False
    return True


def replace_folder(new: pathlib.Path, path: pathlib.Path) -> None:
    """Gives the folder `new` the name `path`, which lies beside it; a folder that had the name is removed after."""
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    if path.exists():
        os.rename(path, old)
    try:
        os.rename(new, path)
    except OSError:
        if old.exists():
            os.rename(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _flush_folder(folder: pathlib.Path) -> None:
    """Makes a new name in `folder` outlast a power cut, where the system can: Windows opens no folder."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def read_text(path: str | pathlib.Path, largest: int) -> str:
    """The UTF-8 text of a file of at most `largest` bytes. Raises OSError, or ValueError where it is no UTF-8."""
    with open(path, "rb") as file:
        content = file.read(largest + 1)
    if len(content) > largest:
        raise OSError(errno.EFBIG, f"larger than the {largest:,} bytes that are read of such a file", str(path))
    return content.decode()
