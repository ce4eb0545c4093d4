"""Official files: where they are, and their verified download.

A download goes over TLS, is resumed where it broke off, and is moved into place only when its MD5 is right.
"""

import hashlib
import http.client
import logging
import lzma
import os
import pathlib
import tarfile
import urllib.error
import urllib.request
import zlib

from tqdm import tqdm

from fixmatch.data.dataset import DataError

# What a damaged archive may raise.
TAR_ERRORS = (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, ValueError, OSError)
_CHUNK = 1 << 20  # bytes
_TIMEOUT = 30  # seconds without an answer

_log = logging.getLogger(__name__)


def md5_of(path: pathlib.Path) -> str:
    """The MD5 of a file, in hexadecimal digits. Raises OSError if it cannot be read."""
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def locate(root: pathlib.Path, name: str, archive: str, folder: str, member: str, host: str, md5: str,
           allow_download: bool) -> pathlib.Path:
    """Where the data set `name` is: root/folder, root/archive, or `root` itself. Otherwise root/archive is downloaded.

    Args:
        root: the folder that has the archive or the unpacked folder, or one of the two.
        name: of the data set, for messages.
        archive: the name of the official archive.
        folder: the name of the folder that the archive unpacks to.
        member: the name of a file in it, by which the unpacked folder is known.
        host: the address that the archive's name follows.
        md5: of the archive.
        allow_download: whether to download the archive if nothing is there.

    Raises:
        DataError: nothing is there, and it is not to be downloaded or cannot be.
    """
    target = root / archive
    for place in (root / folder, target, root):
        if place.is_file() or (place / member).is_file():
            return place
    if not allow_download:
        raise DataError(f"{target}: not found, and data.download is false; put the official archive there, "
                        "or set data.root to the folder that has it")
    return fetch(host + archive, target, md5, name)


def fetch(url: str, target: pathlib.Path, md5: str, name: str) -> pathlib.Path:
    """Gives `target` after its `download`. If that fails, the DataError also says how to do without it."""
    try:
        download(url, target, md5)
    except DataError as error:
        raise DataError(f"{error}; {name} can also be put there by hand, or data.root set to where it is") from None
    return target


def download(url: str, target: pathlib.Path, md5: str) -> None:
    """Fetches `url` into `target` through `target`.part, which is kept when the connection breaks, and resumed.

    Raises:
        DataError: there is no connection, the request is refused, the disk is full, or the content is not what `md5`
            says; `target` is then left as it was.
    """
    part = target.with_name(target.name + ".part")
    try:
        _fetch(url, part)
    except (urllib.error.URLError, OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        kept = f"; {part} is kept and will be resumed" if part.exists() else ""
        raise DataError(f"{target}: download of {url} failed: {reason}{kept}") from None
    found = md5_of(part)
    if found != md5:
        part.unlink()
        raise DataError(f"{target}: download of {url} has MD5 {found}, expected {md5}; it was discarded, try again")
    os.replace(part, target)


def _fetch(url: str, part: pathlib.Path) -> None:
    """Adds to `part` what it lacks of the file at `url`. Raises OSError and what the http package raises."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})  # noqa: S310, our own URL
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT)  # noqa: S310
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416 and have:  # nothing is left to send; the MD5 tells whether the part is complete
            return
        raise
    with response:
        if response.url.split(":")[0] != url.split(":")[0]:
            raise OSError(f"redirected to {response.url}, which is not the same protocol")
        resumed = response.status == 206
        length = response.headers.get("Content-Length")
        done = have if resumed else 0
        total = int(length) + done if length else None
        part.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "ab" if resumed else "wb") as file, tqdm(  # shown on a terminal, and _say_tenths elsewhere
                total=total, initial=done, unit="B", unit_scale=True, desc=part.stem, disable=None) as bar:
            while chunk := response.read(_CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
                if bar.disable:
                    _say_tenths(part.stem, done, done + len(chunk), total)
                done += len(chunk)
        if total is not None and done < total:
            raise OSError(f"the connection closed after {done:,} of {total:,} bytes")


def _say_tenths(name: str, before: int, done: int, total: int | None) -> None:
    """Logs one line for each tenth of `total` bytes, or for each 10 MB if the total is not known."""
    tenth = total / 10 if total else 10e6
    if done // tenth > before // tenth:
        _log.info("%s: %.1f%s MB", name, done / 1e6, f" of {total / 1e6:.1f}" if total else "")
