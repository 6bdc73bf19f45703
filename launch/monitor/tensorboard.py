"""Start TensorBoard for a run. It answers only requests with a secret in their path, and listens on 127.0.0.1 only.

TensorBoard has no login, and every account of this host can reach its port.
"""

from __future__ import annotations

import getpass
import os
import secrets
import socket
import threading
from urllib.parse import urlsplit

from pneumo_dist.config import ConfigError
from pneumo_dist.run import RunFolder
from pneumo_dist.runtime.meeting.launcher import LOOPBACK


def start_tensorboard(run: RunFolder, port: int) -> None:
    """Print the address and the ssh command for remote access, and serve until Ctrl-C.

    The secret is on no command line, which other accounts could list. For the same reason TensorBoard reads the events
    itself: its faster data server would listen on a second port, without the secret.

    Raises:
        ConfigError: there is no such run, or the port is in use.
    """
    if not run.folder.is_dir():
        raise ConfigError(f"{run.folder}: no such run: python launch/runs.py list shows all runs")
    from tensorboard import default, program
    from tensorboard.program import TensorBoardServerException

    secret = secrets.token_urlsafe(16)
    server = program.TensorBoard(plugins=default.get_plugins())
    options = ["--logdir", str(run.folder), "--host", LOOPBACK, "--port", str(port), "--load_fast", "false"]
    server.configure(argv=["tensorboard", *options, "--path_prefix", f"/{secret}"])
    try:
        port = urlsplit(server.launch()).port or port  # --port 0: any free one
    except TensorBoardServerException as error:
        raise ConfigError(f"{error.msg}: choose another port with --port") from None
    names = (socket.getfqdn(), socket.gethostname())  # the full name, unless /etc/hosts makes it localhost
    host = next((name for name in names if not name.startswith("localhost")), names[1])
    jump = f"-J {getpass.getuser()}@{os.environ['SLURM_SUBMIT_HOST']} " if "SLURM_SUBMIT_HOST" in os.environ else ""
    print(f"http://{LOOPBACK}:{port}/{secret}/   (curves on one page: add #custom_scalars)")
    print(f"from another machine, first: ssh -N -L {port}:{LOOPBACK}:{port} {jump}{getpass.getuser()}@{host}")
    print("only this address answers: other accounts of this host cannot read the films without it", flush=True)
    threading.Event().wait()
