"""fixmatch watch: VisualDL's server on the curves of runs, with the options that it needs."""

import contextlib
import locale
import pathlib
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

from fixmatch.cli import Parser, fail
from fixmatch.config import ConfigError

_USUAL = 8040  # VisualDL's own port, taken where it is free
_PATIENCE = 60.0  # seconds that the server may take to start


def main(argv: list[str]) -> int:
    parser = Parser("watch", description="Show the curves of runs in the browser, while they train and afterwards.")
    parser.add_argument("runs", metavar="RUNS", nargs="*", type=pathlib.Path, default=[pathlib.Path("runs")],
                        help="run folders, or folders that hold some; default: runs")
    parser.add_argument("--host", default="localhost", help="0.0.0.0 shows them to other machines, too")
    parser.add_argument("--port", type=int, help=f"default: {_USUAL}, or a free one")
    args = parser.parse_args(argv)
    for folder in args.runs:
        if next(folder.rglob("vdlrecords*"), None) is None:
            raise ConfigError(f"{folder}: holds no run, or none that has logged anything yet")
    port = free_port(args.host, args.port)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the server must not outlive this process
    with subprocess.Popen(server(args.runs, args.host, port), stdout=subprocess.DEVNULL,  # noqa: S603
                          stderr=subprocess.DEVNULL) as process:
        with contextlib.suppress(KeyboardInterrupt):
            return _serve(process, f"http://{args.host}:{port}")
        process.send_signal(signal.SIGTERM)
    return 0


def _serve(process: subprocess.Popen, address: str) -> int:
    """Prints the address once there is something to see, and waits for the server's end or Ctrl-C."""
    deadline = time.monotonic() + _PATIENCE
    while process.poll() is None and not _answers(address):
        if time.monotonic() > deadline:
            process.kill()
            return fail(f"VisualDL's server did not answer within {_PATIENCE:.0f} s", 1)
        time.sleep(0.2)
    if process.poll() is None:
        print(f"{address}/app/scalar shows the curves; Ctrl-C ends it", flush=True)
    code = process.wait()
    return fail(f"VisualDL's server ended with exit code {code}", 1) if code else 0


def _answers(address: str) -> bool:
    with contextlib.suppress(urllib.error.URLError, OSError):
        return urllib.request.urlopen(f"{address}/alive", timeout=1).status == 204  # noqa: S310, our own server
    return False


def server(runs: list[pathlib.Path], host: str, port: int) -> list[str]:
    """The command that starts the server: as a module, because its program may not be on PATH.

    Without a language it answers error 500 to browsers of any but English and Chinese.
    """
    language = "zh" if (locale.getlocale()[0] or "").lower().startswith(("zh", "chinese")) else "en"
    return [sys.executable, "-m", "visualdl.server.app", "--logdir", *map(str, runs), "--host", host, "--port",
            str(port), "--language", language, "--disable-telemetry"]


def free_port(host: str, wanted: int | None) -> int:
    """`wanted` or, without one, VisualDL's usual port or any free one. Raises ConfigError where it is taken."""
    for port in [wanted] if wanted is not None else [_USUAL, 0]:
        with contextlib.suppress(OSError, OverflowError), socket.socket() as trial:
            trial.bind((host, port))
            return trial.getsockname()[1]
    raise ConfigError(f"--host, --port: {host}:{wanted} cannot be used; it may be taken")
