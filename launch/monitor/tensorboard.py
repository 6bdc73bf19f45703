"""Start TensorBoard for a run. It listens on localhost only: whoever reaches the port can read the run's events."""

from __future__ import annotations

import getpass
import os
import socket
import sys
from typing import NoReturn

from pneumo_dist.config import ConfigError
from pneumo_dist.run import RunFolder


def start_tensorboard(run: RunFolder, port: int) -> NoReturn:
    """Print the address and the ssh command for remote access, then replace this process with TensorBoard.

    Raises:
        ConfigError: there is no such run, or the port is in use.
    """
    if not run.folder.is_dir():
        raise ConfigError(f"{run.folder}: no such run: python launch/runs.py list shows all runs")
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", port)) == 0:
            raise ConfigError(f"port {port} is in use: choose another one with --port")
    names = (socket.getfqdn(), socket.gethostname())  # the full name, unless /etc/hosts makes it localhost
    host = next((name for name in names if not name.startswith("localhost")), names[1])
    print(f"http://localhost:{port}/")
    print(f"from another machine: ssh -L {port}:localhost:{port} {getpass.getuser()}@{host}", flush=True)
    options = ["--logdir", str(run.folder), "--host", "localhost", "--port", str(port)]
    os.execv(sys.executable, [sys.executable, "-m", "tensorboard.main", *options])
