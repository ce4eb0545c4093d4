"""What the processes of one training say to each other beside their tensors: a connection from each rank to rank 0.

A collective of gloo gives up on a rank that is 30 s late, one of NCCL after half an hour, and neither says who was
missing and why. So ranks meet here before a collective, where waiting has no limit. A rank that fails says why, and a
rank that dies is noticed by its closed connection. A line of JSON is one message, and nothing in it is executed.
"""

import contextlib
import ctypes
import json
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Callable

TO_JOIN = 300.0  # seconds, until all ranks have connected to rank 0; they have found each other already
PATIENCE = 10.0  # seconds that a rank has to end by itself after another one failed, before it is ended
TO_TELL = 3.0  # seconds that a rank whose collective failed waits to be told why
_TO_ANSWER = 5.0  # seconds that a failing rank waits until rank 0 knows
# A machine that vanishes closes nothing: its kernel is asked after 5 s of silence, and is given up after 20 s in all.
_KEEPALIVE = (("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3), ("TCP_USER_TIMEOUT", 20_000))
_handlers = []  # of `on_terminate`, which C++ may call for as long as the process lives


class RankLost(RuntimeError):
    """Another rank failed or died, so that the training cannot go on; the message is one line that names it."""


class Channel:
    """The connections of one rank: of rank 0 to all others, of another rank to rank 0.

    Args:
        rank: of this process.
        peers: {rank: connected socket}.
        on_stuck: called in a thread of its own with the failure, {"rank", "kind", "message"}, when another rank has
            failed PATIENCE seconds ago and this one has neither met the others nor closed the channel since: it hangs.

    Attributes:
        failure: what another rank said when it failed, or None.
    """

    def __init__(self, rank: int, peers: dict[int, socket.socket], on_stuck: Callable[[dict], None] | None = None):
        self.rank, self.peers, self.on_stuck = rank, peers, on_stuck
        self.failure: dict | None = None
        self._sending, self._news = threading.Lock(), threading.Condition()
        self._said: dict[int, object] = {}  # by rank, in this round; elsewhere than on rank 0 the answer stands under 0
        self._left: set[int] = set()  # ranks that have said goodbye, and all others once this one has
        self._noticed = threading.Event()  # this rank knows of the failure, or is done
        for peer, connection in peers.items():
            _keep_alive(connection)
            arguments = peer, connection, _place(connection)
            threading.Thread(target=self._listen, args=arguments, daemon=True, name=f"rank {peer}").start()

    def exchange(self, value) -> list:
        """What all ranks said, in their order: each calls this with a value that JSON can hold, and waits for all.

        Raises RankLost when another rank has failed.
        """
        if self.rank > 0:
            self._send(0, {"value": value})
        with self._news:
            self._news.wait_for(lambda: self.failure or len(self._said) == len(self.peers))
            if len(self._said) < len(self.peers):
                self._noticed.set()
                raise RankLost(self.failure["message"])
            said, self._said = self._said, {}
        if self.rank > 0:
            return said[0]
        everything = [json.loads(json.dumps(value)), *(said[rank] for rank in sorted(said))]  # alike on all ranks
        for peer in self.peers:
            self._send(peer, {"value": everything})
        return everything

    def report(self, kind: str, message: str) -> None:
        """Tells the others that this rank fails. Returns when rank 0 knows."""
        self._noticed.set()
        failure = {"rank": self.rank, "kind": kind, "message": message}
        if self.rank == 0:
            self._fail(failure)
        else:
            self._send(0, {"failure": failure})
            self.wait_for_failure(_TO_ANSWER)

    def wait_for_failure(self, seconds: float) -> dict | None:
        """What another rank said when it failed; None if there is nothing within `seconds`."""
        with self._news:
            self._news.wait_for(lambda: self.failure, timeout=seconds)
            return self.failure

    def close(self) -> None:
        """Says goodbye, so that the others do not take this rank for dead."""
        self._noticed.set()
        self._left |= self.peers.keys()
        for peer, connection in self.peers.items():
            self._send(peer, {"goodbye": True})
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_WR)

    def _send(self, peer: int, message: dict) -> None:
        with contextlib.suppress(OSError), self._sending:  # if it is gone, the thread that listens to it will say so
            self.peers[peer].sendall(json.dumps(message).encode() + b"\n")

    def _listen(self, peer: int, connection: socket.socket, where: str) -> None:
        with contextlib.suppress(OSError, ValueError), connection, connection.makefile("rb") as lines:
            for line in lines:
                self._take(peer, json.loads(line))
        if peer not in self._left:
            self._fail({"rank": peer, "kind": RankLost.__name__, "message":
                        f"rank {peer}{where} has died: killed, out of memory, or its machine is gone; --resume "
                        "goes on from the last checkpoint"})

    def _take(self, peer: int, message: dict) -> None:
        if "failure" in message:
            self._fail(message["failure"])
        with self._news:
            if "value" in message:
                self._said[peer] = message["value"]
            if "goodbye" in message:
                self._left.add(peer)
            self._news.notify_all()

    def _fail(self, failure: dict) -> None:
        """Takes the first failure for that of the run; rank 0 passes it on to all, to its sender as an answer."""
        with self._news:
            if self.failure:
                return
            self.failure = failure
            self._news.notify_all()
        for peer in self.peers if self.rank == 0 else ():
            self._send(peer, {"failure": failure})
        if not self._noticed.wait(PATIENCE) and self.on_stuck:
            self.on_stuck(failure)


def _place(connection: socket.socket) -> str:
    """Where the other end is, in words; nothing where it has already gone."""
    try:
        return f" on {connection.getpeername()[0]}"
    except OSError:
        return ""


def host(address: str, ranks: int, publish: Callable[[str], None], **options) -> Channel:
    """The channel of rank 0, once all ranks have connected.

    Args:
        address: of this machine, where the others reach it.
        publish: is given the string that the others `connect` to. It holds a secret, so that no stranger is let in.
    """
    secret, peers, deadline = secrets.token_hex(16), {}, time.monotonic() + TO_JOIN
    with socket.create_server((address, 0), backlog=ranks) as server:
        publish(json.dumps([address, server.getsockname()[1], secret]))
        while len(peers) < ranks - 1:
            server.settimeout(max(0.0, deadline - time.monotonic()))
            try:
                connection = server.accept()[0]
            except OSError:
                missing = min(set(range(1, ranks)) - peers.keys())
                raise RankLost(f"rank {missing} has not connected to rank 0 on {address} in {TO_JOIN:g} s") from None
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                peers[_admitted(connection, secret, ranks)] = connection
    return Channel(0, peers, **options)


def connect(rank: int, published: str, **options) -> Channel:
    """The channel of another rank, to what rank 0 has published."""
    address, port, secret = json.loads(published)
    try:
        connection = socket.create_connection((address, port), timeout=TO_JOIN)
    except OSError as error:
        raise RankLost(f"rank {rank} cannot reach rank 0 on {address}:{port}: {error.strerror or error}") from None
    connection.settimeout(None)
    connection.sendall(json.dumps({"rank": rank, "secret": secret}).encode() + b"\n")
    return Channel(rank, {0: connection}, **options)


def end_process(message: str, code: int) -> None:
    """Ends this process with one line that says why, from another thread than the main one, which hangs.

    A main thread that is in Python, such as one that reads data or waits for a self-check, is interrupted and may tidy
    up. One inside a collective of NCCL never returns from it.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        if hasattr(signal, "pthread_kill"):
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)  # ends its sleep, too
        else:
            signal.raise_signal(signal.SIGINT)
        time.sleep(PATIENCE / 2)
    os.write(2, f"error: {message}\n".encode())
    os._exit(code)


def on_terminate(call: Callable[[], None]) -> None:
    """Has `call` called where C++ gives up; if it returns, the process aborts as it would have without it.

    Paddle lets an error of gloo within a backward pass go there, so that Python never hears of it. Linux alone.
    """
    try:
        set_terminate = ctypes.CDLL("libstdc++.so.6")._ZSt13set_terminatePFvvE
    except (OSError, AttributeError):
        return
    handler = ctypes.CFUNCTYPE(None)(call)
    _handlers.append(handler)
    set_terminate(handler)


def _admitted(connection: socket.socket, secret: str, ranks: int) -> int:
    """The rank that has connected. A stranger is not let in, but raises an error that reading brings."""
    try:
        connection.settimeout(10.0)
        line = b""
        while not line.endswith(b"\n") and len(line) < 1000:  # byte for byte, so that nothing of what follows is taken
            line += connection.recv(1) or b"\n"
        said = json.loads(line)
        if said["secret"] != secret or said["rank"] not in range(1, ranks):
            raise ValueError("not one of ours")
        connection.settimeout(None)
        return said["rank"]
    except BaseException:
        connection.close()
        raise


def _keep_alive(connection: socket.socket) -> None:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE:
        if hasattr(socket, name):  # not every system has all of them
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
