"""One writer a run directory: the newest process that trains there holds its token.

After a lost node the old processes may still train when the requeued job starts. The newest one
writes its name into RUN/token; who finds another name there before saving stops. (On a network
disk the name may take some seconds to be seen; two checkpoints of a step are the same anyway.)
"""

import os
import socket
import uuid
from pathlib import Path

from storage.atomic import atomic_file

TOKEN = "token"


class Replaced(Exception):
    """A newer process writes into the run directory."""


def take_token(run: Path) -> str:
    """Writes a name of its own into RUN/token and returns it."""
    environment = os.environ
    job = environment.get("SLURM_JOB_ID")
    where = f"job {job}, restart {environment.get('SLURM_RESTART_COUNT', 0)}, " if job else ""
    token = f"{where}process {os.getpid()} on {socket.gethostname()}, {uuid.uuid4().hex}"
    with atomic_file(run / TOKEN) as temporary:
        temporary.write_text(token)
    return token


def check_token(run: Path, token: str) -> None:
    """Raises Replaced when another process has taken the run directory."""
    holder = (run / TOKEN).read_text()
    if holder != token:
        raise Replaced(f"{run} is written by {holder.rpartition(', ')[0]} now: this one stops")
