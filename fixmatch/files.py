"""Writing a file so that a reader finds the old content or the new, never half of either."""

import os
import pathlib
import shutil


def write_atomic(path: str | pathlib.Path, content: bytes | str) -> None:
    """Writes beside `path`, in folders made as needed, flushes to disk, then replaces it.

    On an error `path` stays as it was.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(path)  # a failed write does not say where
        raise


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
