"""SIGTERM and SIGUSR1 ask a run to save and stop: what a process does when one comes.

Slurm sends these before preemption and time limits; both may come, several times, and to some
processes only. train.py listens before torch is imported, so this file imports nothing heavy.

    from listen() on   leaves with EXIT_SAVED at once: nothing is trained yet, nothing is lost
    from hold() on     remembers it; the loop asks received() and saves
"""

import os
import signal
import threading
from types import FrameType

EXIT_REFUSED = 2
EXIT_SAVED = 75  # "saved, not finished": run the same command again (EX_TEMPFAIL)
EXIT_REPLACED = 76  # another process writes into the run directory now: do not run it again
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Signals:
    """What this process has received. A thread looks on, as handlers wait while C code runs."""

    def __init__(self) -> None:
        self.received, self.is_holding, self.grace_s = 0, False, 0
        self._watched_pid = 0

    def listen(self) -> None:
        """Handles SIGNALS from now on. From the main thread only."""
        self.received, self.is_holding = 0, False
        for number in SIGNALS:
            signal.signal(number, self._remember)
        if self._watched_pid != os.getpid():  # threads do not survive a fork
            self._watched_pid = os.getpid()
            reader, writer = os.pipe()
            os.set_blocking(writer, False)
            signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
            threading.Thread(target=self._watch, args=(reader,), daemon=True).start()

    def hold(self, grace_s: int) -> None:
        """Signals are remembered from now on; after `grace_s` seconds (0: never) it leaves."""
        self.grace_s, self.is_holding = grace_s, True

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = number

    def _watch(self, reader: int) -> None:
        """Reads the numbers of signals as they come, whatever the main thread is doing."""
        while True:
            number = os.read(reader, 1)[0]
            if number in SIGNALS and not self.is_holding:
                leave(f"signal {number} before the first step: run it again to start")
            if number in SIGNALS and self.grace_s:
                words = f"not saved within {self.grace_s} s: the last checkpoint is what counts"
                timer = threading.Timer(self.grace_s, leave, [f"signal {number}: {words}"])
                timer.daemon = True
                timer.start()


def leave(words: str) -> None:
    """Ends the process at once, from any thread; files are whole or not there at any moment."""
    os.write(2, f"{words}\n".encode())
    os._exit(EXIT_SAVED)


SIGNAL = Signals()  # signals are the process's, so there is one
