"""A .npy file of images that is written piece by piece, with the mean and the standard deviation of its pixels."""

import contextlib
import errno
import math
import os
import pathlib
import shutil
import tempfile
import typing

import numpy as np


class Writer:
    """Takes the images of a cache in their order, and counts the grey levels that mean and std are taken from.

    `file` is a file open for writing in binary, and still empty.
    """

    def __init__(self, file):
        self._file, self._levels = file, np.zeros((3, 256), np.int64)
        self.shape = [0, 0, 0, 3]  # of the images so far

    def begin(self, height: int, width: int, most: int) -> None:
        """Fixes the size of the images, before the first of them. Raises OSError if `most` of them would not fit."""
        self.shape[1:3] = height, width
        needed, free = most * height * width * 3, shutil.disk_usage(self._file.name).free
        if needed > free:
            raise OSError(errno.ENOSPC, f"{needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free")
        self._write_header()

    def append(self, images: np.ndarray, counted: bool) -> None:
        """Adds uint8 [n, H, W, 3]; `counted` says whether mean and std are taken from these images, too."""
        self._file.write(np.ascontiguousarray(images))
        self.shape[0] += len(images)
        if counted:
            for channel, levels in enumerate(self._levels):
                levels += np.bincount(images[..., channel].ravel(), minlength=256)

    def room_beside(self) -> contextlib.AbstractContextManager[typing.BinaryIO]:
        """A file on the same disk for images that wait; it is gone once it is closed, or this process is killed."""
        return tempfile.TemporaryFile(dir=pathlib.Path(self._file.name).parent)

    def append_from(self, waiting: typing.BinaryIO, rows: np.ndarray, counted: bool) -> None:
        """Adds of the images that lie in a file, one after the other, those with the numbers `rows`, int64 [n]."""
        image = self.shape[1:]
        for row in rows.tolist():
            waiting.seek(row * math.prod(image))
            self.append(np.frombuffer(waiting.read(math.prod(image)), np.uint8).reshape(1, *image), counted)

    def statistics(self) -> dict[str, list[float]]:
        """"mean" and "std" of each channel of the counted pixels, in [0, 1], exact but for their last rounding.

        A std is at least 1/255, one grey level, so that a channel that is the same everywhere can be divided by it.
        """
        mean, std = [], []
        for channel in self._levels.tolist():  # Python's integers, which do not overflow
            n = max(sum(channel), 1)
            total, squares = (sum(count * level**power for level, count in enumerate(channel)) for power in (1, 2))
            mean.append(total / n / 255)
            std.append(max((n * squares - total**2) ** 0.5 / n, 1) / 255)
        return {"mean": mean, "std": std}

    def finish(self) -> None:
        """Writes the number of images into the header, and everything to the disk."""
        self._file.seek(0)
        self._write_header()
        self._file.flush()
        os.fsync(self._file.fileno())

    def _write_header(self) -> None:
        """Writes 128 bytes, whatever the number of images, as NumPy fills headers up to a multiple of 64."""
        np.lib.format.write_array_header_1_0(
            self._file, {"descr": "|u1", "fortran_order": False, "shape": tuple(self.shape)})
