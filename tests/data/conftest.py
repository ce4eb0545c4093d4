"""Fixtures of the tests of data sources."""

import hashlib
import logging
import threading

import numpy as np
import pytest
from file_server import Server
from image_folders import make_root

from fixmatch.data.sources import download


@pytest.fixture
def logged(caplog):
    """logged() gives what data sources have logged since it was last called, as lines of text."""
    caplog.set_level(logging.INFO, "fixmatch")

    def take() -> str:
        records = caplog.records[:]
        del caplog.records[:len(records)]  # and not what another thread logs in the meantime
        return "".join(f"{record.getMessage()}\n" for record in records if record.name.startswith("fixmatch.data."))
    return take


@pytest.fixture
def root(tmp_path):
    """A folder of images as make_root makes it."""
    return make_root(tmp_path / "data")


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(download, "_CHUNK", 1 << 14)
    server = Server()
    server.content = np.random.default_rng(0).bytes(300_000)
    server.md5 = hashlib.md5(server.content).hexdigest()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()
