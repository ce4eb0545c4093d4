"""A generator that runs in a second process of this program, beside what the first one does."""

import contextlib
import multiprocessing
import queue
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection

from fixmatch import process
from parity.stages import NOTHING_PROVEN

_PATIENCE = 5  # seconds, for what takes microseconds


class Turns:
    """Places in a row that two processes share: the second goes through it from the front, and the first, whenever it
    has time, from the back, until they meet.

    Where the system has no semaphores (in a container without /dev/shm, say) the second takes all of them.
    """

    def __init__(self):
        self._taken = None  # from the front, from the back
        with contextlib.suppress(ImportError, OSError):
            self._taken = _context().Array("q", [0, 0])

    def from_front(self, count: int) -> Iterator[int]:
        """The places 0, 1, ... of `count`, as far as this process gets."""
        return self._take(count, 0) if self._taken else iter(range(count))

    def from_back(self, count: int) -> Iterator[int]:
        """The places count - 1, count - 2, ..."""
        return (count - 1 - place for place in (self._take(count, 1) if self._taken else ()))

    def _take(self, count: int, end: int) -> Iterator[int]:
        lock = self._taken.get_lock()
        while lock.acquire(timeout=_PATIENCE):  # a process that was killed in here keeps it
            try:
                place, left = self._taken[end], count - sum(self._taken)
                self._taken[end] += left > 0
            finally:
                lock.release()
            if left <= 0:
                return
            yield place


class Died(RuntimeError):
    """The second process ended before its generator did; the message is one line."""


@contextlib.contextmanager
def in_second_process(generator: Callable[..., Iterator], *arguments) -> Iterator[Iterator]:
    """Runs `generator(*arguments)` in a second process from now on, and ends it when the block is left.

    Yields an iterator over what the generator yields. It raises Died where the process ends too soon, and as the
    generator does where that raises one of stages.NOTHING_PROVEN.
    """
    context = _context()
    receiver, sender = context.Pipe(duplex=False)
    second = context.Process(target=_send, args=(sender, receiver, generator, arguments))
    second.start()
    sender.close()
    sent = queue.SimpleQueue()
    threading.Thread(target=_keep, args=(receiver, sent), daemon=True).start()  # a full pipe would stop the generator
    try:
        yield _received(sent, second)
    finally:
        process.kill(second.pid)
        second.join()


def _context() -> multiprocessing.context.BaseContext:
    return multiprocessing.get_context("fork" if process.can_fork() else "spawn")


def _send(sender: Connection, receiver: Connection, generator: Callable[..., Iterator], arguments: tuple) -> None:
    process.end_with_parent()
    receiver.close()  # else the pipe would stay open, and this process wait for a reader, when the first one has died
    with contextlib.suppress(BrokenPipeError):  # the first one has died
        try:
            for value in generator(*arguments):
                sender.send(("value", value))
            sender.send(("end", None))
        except NOTHING_PROVEN as error:
            sender.send(("error", error))


def _keep(receiver: Connection, sent: queue.SimpleQueue) -> None:
    try:
        with contextlib.suppress(EOFError, OSError):  # between two messages, and within one
            while True:
                sent.put(receiver.recv())
    finally:
        sent.put(("died", None))


def _received(sent: queue.SimpleQueue, second: multiprocessing.Process) -> Iterator:
    while True:
        kind, value = sent.get()
        if kind == "value":
            yield value
        elif kind == "error":
            raise value
        elif kind == "end":
            return
        else:
            second.join()
            raise Died(f"its second process ended with {process.cause(second.exitcode)}")
