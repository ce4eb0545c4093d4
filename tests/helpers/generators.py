"""What tests/parity/test_second_process.py runs in a second process."""

import os
import pathlib
import time

from fixmatch.data import DataError


def counts(up_to: int, size: int, then: pathlib.Path):
    for number in range(up_to):
        yield number, bytes(size)
    then.touch()


def dies():
    yield 1
    os.abort()


def finds_a_damaged_file():
    yield 1
    raise DataError("a.npz: damaged")


def never_ends():
    yield os.getpid()
    time.sleep(600)
