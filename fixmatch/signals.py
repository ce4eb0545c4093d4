"""What SIGINT, SIGTERM and SIGHUP do: a run that trains is stopped after a step, and before that it is ended at once.

A signal that is ignored when the run starts, as SIGHUP is under nohup, stays ignored.
"""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

from fixmatch.log import LOGGER

# That a signal has come before the training. Python loses an exception that is raised while C calls back into it, as
# numba's compiler does.
_ended = threading.Event()
_SENT_BY_LAUNCHERS = ("SIGTERM", "SIGHUP")  # SIGHUP, which Windows lacks, also comes from a terminal that is closed


class StopSignal:
    """Set by the first signal; a SIGINT after that interrupts at once. Launchers repeat their SIGTERM."""

    def __init__(self):
        self.requested = self.interrupted = False

    def __call__(self, number, frame):
        if self.requested:
            if number == signal.SIGINT:
                self.interrupted = True
                raise KeyboardInterrupt
            return
        self.requested = True
        with contextlib.suppress(RuntimeError):  # the signal came in the middle of another line
            LOGGER.info("\nstopping after this step; press Ctrl-C again to stop at once, without a checkpoint")


@contextlib.contextmanager
def stop_signal() -> Iterator[StopSignal]:
    """For the length of a with block, signals set the StopSignal that it gets.

    Raises KeyboardInterrupt at once where a signal has come since `ended_by_signals` and its exception was lost.
    """
    if _ended.is_set():
        raise KeyboardInterrupt
    stop = StopSignal()
    with _handling(stop, "SIGINT", *_SENT_BY_LAUNCHERS):
        try:
            yield stop
        except Exception:
            if stop.interrupted:  # in a backward pass, from which Paddle raises an OSError of its own
                raise KeyboardInterrupt from None
            raise


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """For the length of a with block, SIGTERM and SIGHUP do what Ctrl-C does, so that what was begun is cleaned up."""
    def end(number, frame):
        first = not _ended.is_set()
        _ended.set()
        if first or number == signal.SIGINT:  # launchers repeat theirs, which must not disturb the cleaning up
            raise KeyboardInterrupt

    with _handling(end, "SIGINT", *_SENT_BY_LAUNCHERS):
        try:
            yield
        finally:
            _ended.clear()


@contextlib.contextmanager
def _handling(handler: Callable, *names: str) -> Iterator[None]:
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    if threading.current_thread() is not threading.main_thread():  # which alone may set handlers
        numbers = []
    before = {number: signal.signal(number, handler) for number in numbers
              if signal.getsignal(number) != signal.SIG_IGN}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
