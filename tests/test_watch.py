"""VisualDL's server, as `fixmatch watch` starts it."""

import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request

import pytest
from running import ROOT, tool_environment

from fixmatch import cli
from fixmatch.commands import watch
from fixmatch.config import ConfigError


@pytest.fixture
def runs(tmp_path):
    from visualdl import LogWriter

    with LogWriter(logdir=str(tmp_path / "runs/a/vdl")) as writer:
        writer.add_scalar("1_overview/ema_top1", 50.0, 1)
    return tmp_path / "runs"


def test_the_printed_address_shows_the_curves_to_a_browser_of_any_language(runs):
    with subprocess.Popen([sys.executable, ROOT / "tools/watch.py", runs], stdout=subprocess.PIPE, text=True,
                          env=tool_environment() | {"PATH": os.defpath}) as process:  # visualdl is not on the path
        address = process.stdout.readline().split()[0]
        request = urllib.request.Request(address, headers={"Accept-Language": "de"})
        with urllib.request.urlopen(request, timeout=20) as answer:
            assert answer.status == 200
        api = address.replace("/app/scalar", "/app/api/scalar/tags")
        with urllib.request.urlopen(api, timeout=20) as answer:
            assert b"1_overview/ema_top1" in answer.read()
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 0
    with pytest.raises(urllib.error.URLError):  # the server has ended, too
        urllib.request.urlopen(address, timeout=5)


def test_no_run_and_no_port_are_one_line(tmp_path, runs, capsys):
    assert cli.main(["watch", str(tmp_path / "nothing")]) == 2
    assert "holds no run" in capsys.readouterr().err
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        with pytest.raises(ConfigError, match="taken"):
            watch.free_port("localhost", taken.getsockname()[1])


@pytest.mark.parametrize(("name", "language"), [("zh_CN", "zh"), ("de_DE", "en"), (None, "en")])
def test_the_page_speaks_chinese_or_english(monkeypatch, name, language):
    monkeypatch.setattr(watch.locale, "getlocale", lambda: (name, "UTF-8"))
    command = watch.server(["runs"], "localhost", 1)
    assert command[command.index("--language") + 1] == language
    assert "--disable-telemetry" in command
