"""`clstream ui`: MLflow's page, opened at the charts of the newest experiment."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterable
from contextlib import suppress

from clstream.cli.command_parser import CommandParser
from clstream.cli.errors import Failure, UsageError, as_failure


def ui_command(arguments: list[str]) -> int:
    """`clstream ui`: start MLflow's own UI on the store of this folder, until Ctrl-C."""
    parser = CommandParser("ui", description="Start the MLflow UI on what was run here.")
    parser.add_argument(
        "--tracking_uri", "--tracking-uri", help="the store; by default MLFLOW_TRACKING_URI, else sqlite:///mlflow.db"
    )
    parser.add_argument("--experiment", help="the one to open; by default that of the newest run")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=5000)
    options = parser.parse_args(arguments)
    if not 0 < options.port < 65536:
        raise UsageError(f"--port must be from 1 to 65535, not {options.port}")
    from clstream.tracking.mlflow_store import charts_page, tracking_uri, without_password
    from clstream.tracking.runs import PICTURE

    where = tracking_uri(options.tracking_uri)
    if where.startswith("sqlite:///") and not os.path.exists(where.removeprefix("sqlite:///")):
        raise Failure(f"there is nothing at {where} yet: `clstream run` makes it")
    with as_failure(OSError, LookupError):
        page = charts_page(where, PICTURE, options.experiment)
    if where.startswith("http"):
        print(f"the runs are on the tracking server: open {without_password(where).rstrip('/')}/{page}")
        return 0
    with socket.socket() as free:
        free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            free.bind((options.host, options.port))
        except OSError as error:
            raise Failure(
                f"the UI can't use port {options.port} of {options.host} ({error.strerror}): choose another with --port"
            ) from error
    return serve(where, options.host, options.port, page)


def serve(store: str, host: str, port: int, page: str) -> int:
    """Run MLflow's server until it ends or Ctrl-C comes; say what to open when it answers. Of its log only errors are shown."""
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", store, "--host", host, "--port", str(port)]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the server ends too
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    assert server.stdout is not None
    threading.Thread(target=relay_errors, args=(server.stdout,), daemon=True).start()
    url = f"http://{host}:{port}"
    print(f"starting the MLflow UI on {store}", file=sys.stderr, flush=True)
    try:
        while server.poll() is None and not _answers(f"{url}/health"):
            time.sleep(0.3)
        if server.poll() is None:
            print(f"it is ready, until Ctrl-C: open\n{url}/{page}", flush=True)
        status = server.wait()
    except KeyboardInterrupt:
        return 0
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):  # with all of its workers
            with suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(server.pid, number)
                server.wait(5)
    raise Failure(f"the MLflow UI ended by itself, with status {status}")


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=2).close()
    except OSError:
        return False
    return True


def relay_errors(log: Iterable[str]) -> None:
    """Print the errors of a server's log, with the lines that belong to them, to the standard error."""
    shown = False
    for line in log:
        if re.search(r"\b(ERROR|CRITICAL)\b|^(Traceback|Error\b|\w*Error:)", line):
            shown = True
        elif re.search(r"\b(INFO|WARNING|DEBUG)\b|Warning:", line):
            shown = False
        if shown:
            print(line, end="", file=sys.stderr, flush=True)
