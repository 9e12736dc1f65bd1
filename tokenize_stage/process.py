"""What muse-tokenize and muse-train-vq are as processes: device, stop signals, exit status."""

import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

EXIT_REFUSED, EXIT_FAILED = 2, 3  # before any work; some of it
EXIT_STOPPED = 75  # to be run again (EX_TEMPFAIL)
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Stopped(Exception):
    """A stop signal came; the work in hand is dropped, what was finished is kept."""


@contextmanager
def stop_on_signals() -> Iterator[threading.Event]:
    """Yields an event that STOP_SIGNALS set; a second Ctrl-C interrupts at once."""
    stop = threading.Event()

    def handle(number: int, _frame: object) -> None:
        stop.set()
        if number == signal.SIGINT:
            signal.signal(number, before[signal.SIGINT])

    before = {number: signal.signal(number, handle) for number in STOP_SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def refuse(error: Exception) -> int:
    """Prints the error as one line without a traceback; returns the exit status for it."""
    print(f"error: {error}", file=sys.stderr)
    return EXIT_REFUSED


def pick_device(option: str, name: str, environ: Mapping[str, str]) -> torch.device:
    """`auto` is the GPU of this process's place on its node (SLURM_LOCALID), else the CPU.

    Raises ValueError, naming the option that `name` came from, for a device that is not there.
    """
    gpus = torch.cuda.device_count()
    if name == "auto":
        place = int(environ.get("SLURM_LOCALID", 0))
        return torch.device("cuda", place % gpus) if gpus else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"{option}={name}: legal are auto, cpu, cuda, cuda:0, …") from None
    if device.type == "cuda" and (device.index or 0) >= gpus:
        raise ValueError(f"{option}={name}, but torch sees {gpus} CUDA devices here")
    return device
