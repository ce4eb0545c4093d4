"""What tests/parity/test_second_process.py runs in a second process."""

import gc
import os
import pathlib
import struct
import subprocess
import sys
import time
from multiprocessing.connection import Connection

from fixmatch.data import DataError


def counts(up_to: int, size: int, then: pathlib.Path):
    for number in range(up_to):
        yield number, bytes(size)
    then.touch()


def takes(turns, count: int):
    yield from turns.from_front(count)


def keeps(lock):
    lock.acquire()
    yield "kept"
    time.sleep(600)


def dies():
    yield 1
    os.abort()


def finds_a_damaged_file():
    yield 1
    raise DataError("a.npz: damaged")


def never_ends():
    yield os.getpid()
    time.sleep(600)


def endless(size: int):
    yield os.getpid()
    while True:
        yield bytes(size)


def cut_off():
    """A message of which the second half never comes."""
    yield 1
    connection = next(each for each in gc.get_objects() if isinstance(each, Connection) and each.writable)
    os.write(connection.fileno(), struct.pack("!i", 1000) + bytes(10))
    os.abort()


def starts_another():
    """The number of a process that this one has started."""
    yield subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"]).pid
    time.sleep(600)
