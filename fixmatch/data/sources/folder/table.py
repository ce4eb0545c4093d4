"""CSV files that name images and their classes, read into a listing.

Reading a file of a million lines takes 250 MB.
"""

import csv
import itertools
import os
import pathlib
import stat
from collections.abc import Iterable, Iterator

from fixmatch.data.dataset import DataError, shown
from fixmatch.data.sources.folder.listing import Files, Listing

_LONGEST_LINE = 2**20  # bytes
_Row = tuple[str, str, int]  # path, label ("" where the class is not known), line


def scan_tables(train: pathlib.Path) -> Listing:
    """Lists the images of the CSV file `train` and, if there is one, of the test.csv beside it.

    Raises:
        DataError: see load.load_csv; the message names file and line.
    """
    root, test = train.parent, train.with_name("test.csv")
    rows = sorted(_rows(train), key=lambda row: (not row[1], row))
    _refuse_two_labels(train, rows)
    classes = tuple(sorted({label for _, label, _ in rows} - {""}))
    if not classes:
        raise DataError(f"{train}: no line has a label; at least one image of each class needs one")
    files, label_of = Files(), {"": -1} | {name: label for label, name in enumerate(classes)}
    for path, label, line in rows:
        files.add(path, label_of[label], _status(train, path, line))
    tests = sorted(_rows(test)) if test.exists() else []
    _refuse_learned_by_heart(train, rows, test, tests)
    for path, label, line in tests:
        if not label or label not in label_of:
            said = f"no image in {train.name} has the label {shown(label)}" if label else "the label is empty"
            raise DataError(f"{test}: line {line}: {said}; a test image needs the label of a class that is trained")
        files.add(path, label_of[label], _status(test, path, line))
    return Listing(root, files, len(rows), classes, (str(train), str(test)), test.exists())


def _refuse_two_labels(train: pathlib.Path, rows: list[_Row]) -> None:
    """Raises DataError if a path has two labels, where `rows` are sorted with the labeled ones first."""
    for before, row in itertools.pairwise(rows):
        if before[0] == row[0] and before[1] and row[1] not in ("", before[1]):
            raise DataError(f"{train}: line {row[2]}: {shown(row[0])} has the label {shown(row[1])}, but "
                            f"{shown(before[1])} in line {before[2]}")


def _refuse_learned_by_heart(train: pathlib.Path, rows: list[_Row], test: pathlib.Path, tests: list[_Row]) -> None:
    """Raises DataError if a test image is a labeled training image, too."""
    line_of = {path: line for path, _, line in tests}
    for path, label, line in rows:
        if label and path in line_of:
            raise DataError(f"{test}: line {line_of[path]}: {shown(path)} is a labeled training image, too, in line "
                            f"{line} of {train.name}; an image that was learned by heart measures nothing")


def _status(file: pathlib.Path, path: str, line: int) -> os.stat_result:
    """The status of the image that a line names. Raises DataError if it is not a file."""
    try:
        status = os.stat(os.path.join(file.parent, path))
        if stat.S_ISREG(status.st_mode):
            return status
        reason = "not a file"
    except OSError as error:
        reason = error.strerror
    raise DataError(f"{file}: line {line}: {shown(path)}: {reason}; paths start from {file.parent}")


def _rows(file: pathlib.Path) -> Iterator[_Row]:
    """Gives every row of a CSV file, in its order. Raises DataError."""
    try:
        with open(file, "rb") as lines:
            pieces = iter(lambda: lines.readline(_LONGEST_LINE + 1), b"")
            yield from _parse(file, csv.reader(_decoded(file, pieces), strict=True))
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}; data.root needs train.csv, and may have test.csv, "
                        "each with the columns path,label") from None


def _parse(file: pathlib.Path, reader) -> Iterator[_Row]:
    """Gives the rows that `reader`, a csv.reader of the file, makes of it. Raises DataError."""
    try:
        header = [name.strip() for name in next(reader, [])]
        if missing := {"path", "label"} - set(header):
            raise DataError(f"{file}: line 1: no column {' and no column '.join(sorted(missing))}; it must name the "
                            "columns: path,label")
        path_at, label_at, labels = header.index("path"), header.index("label"), {}
        for row in reader:
            if not row:
                continue
            if len(row) != len(header):
                raise DataError(f"{file}: line {reader.line_num}: {len(row)} fields, but the first line names "
                                f"{len(header)}; put a text with a comma in it between quotes")
            path, label = row[path_at], row[label_at].strip()
            if not path or "\0" in path:
                raise DataError(f"{file}: line {reader.line_num}: {'no file has such a name' if path else 'no path'}")
            yield path, labels.setdefault(label, label), reader.line_num  # one string for a class, not one for a row
    except csv.Error as error:
        raise DataError(f"{file}: line {reader.line_num}: not CSV: {error}") from None


def _decoded(file: pathlib.Path, lines: Iterable[bytes]) -> Iterator[str]:
    """Gives the lines as text, without the mark that Excel puts in front. Raises DataError if they are not UTF-8."""
    for number, line in enumerate(lines, 1):
        if len(line) > _LONGEST_LINE:
            raise DataError(f"{file}: line {number}: longer than {_LONGEST_LINE:,} bytes; a line names one image")
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError:
            raise DataError(f"{file}: line {number}: not UTF-8; save the file as UTF-8") from None
