"""Parts of a long demonstration: run in order, each once, over any number of interruptions.

FOLDER/progress.json keeps, for each part, a fingerprint of its commands and configs, its seconds
over all starts, and whether it is done. What a command had done of an unfinished part is its own
matter: ours go on where they stopped, but for those that start over. Used by demo.py and
demo_text.py.
"""

import fcntl
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import configs
from storage.atomic import atomic_file
from storage.fingerprint import fingerprint

TICK_S = 2.0  # seconds are saved so often; what a command does after our kill -9 is not counted


@dataclass(frozen=True)
class Part:
    """Commands that belong together and what they make, a path below the demo's folder."""

    name: str
    commands: list[list[str]]
    output: str | None = None
    starts_over: bool = False  # what an interrupted run of the same commands left is removed

    def recipe(self) -> str:
        """Fingerprint of the commands and of the config files they name."""
        files = [Path(word[7:]) for words in self.commands for word in words if is_config(word)]
        return fingerprint([self.commands, [path.read_text() for path in files]])


def is_config(word: str) -> bool:
    """Whether an argument names a config file."""
    return word.startswith("config=")


class Progress:
    """The parts' records, {name: {"recipe", "seconds", "done"}}, kept in FOLDER/progress.json."""

    def __init__(self, folder: Path):
        self.path = folder / "progress.json"
        self.parts: dict[str, dict[str, Any]] = {}
        if self.path.is_file():
            self.parts = json.loads(self.path.read_text())

    def save(self) -> None:
        """Writes the records, atomically."""
        with atomic_file(self.path) as temporary:
            temporary.write_text(json.dumps(self.parts, indent=1) + "\n")

    def is_done(self, part: Part, folder: Path) -> bool:
        """Done with these very commands, and what it made is still there."""
        record = self.parts.get(part.name, {})
        is_there = part.output is None or (folder / part.output).exists()
        return is_there and record.get("done", False) and record["recipe"] == part.recipe()


def run_parts(parts: list[Part], folder: Path) -> Progress:
    """Runs the parts that are not done, in order; returns the records of all.

    Raises ValueError where outputs of other settings are in the way, CalledProcessError when a
    command fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with only_one(folder) as lock:
        progress = Progress(folder)
        refuse_stale(parts, progress, folder)
        for part in parts:
            if progress.is_done(part, folder):
                print(f"{part.name}: done ({progress.parts[part.name]['seconds']:.0f} s)")
                continue
            run_part(part, progress, lock)
    return progress


def refuse_stale(parts: list[Part], progress: Progress, folder: Path) -> None:
    """Raises ValueError when what follows the first unfinished part is of something else."""
    todo = [index for index, part in enumerate(parts) if not progress.is_done(part, folder)]
    if not todo:
        return
    first, later = parts[todo[0]], parts[todo[0] + 1 :]
    is_resumed = progress.parts.get(first.name, {}).get("recipe") == first.recipe()
    suspects = [part.output for part in ([] if is_resumed else [first]) + later if part.output]
    stale = [str(folder / name) for name in suspects if (folder / name).exists()]
    if stale:
        raise ValueError(
            f"the settings of {first.name!r} have changed, or its output is gone, since {folder} "
            f"was made. To go on from there: rm -r {' '.join(stale)}"
        )


def run_part(part: Part, progress: Progress, lock: int) -> None:
    """Runs the commands of a part and records its seconds all along."""
    recipe = part.recipe()
    record = progress.parts.get(part.name, {})
    seconds = record["seconds"] if record.get("recipe") == recipe else 0.0
    start = time.monotonic()

    def save(done: bool = False) -> None:
        now = seconds + time.monotonic() - start
        progress.parts[part.name] = {"recipe": recipe, "seconds": now, "done": done}
        progress.save()

    save()
    if part.starts_over and part.output:  # refuse_stale: nothing but our own is there
        shutil.rmtree(progress.path.parent / part.output, ignore_errors=True)
    for words in part.commands:
        run_command(words, save, lock)
    save(done=True)
    print(f"{part.name}: {progress.parts[part.name]['seconds']:.0f} s", flush=True)


def run_command(words: list[str], tick: Callable[[], None], lock: int) -> None:
    """Prints and runs a command; when we are stopped, it is asked to stop and waited for."""
    print(f"\n$ {shlex.join(words)}", flush=True)
    program = sys.executable if words[0] == "python" else find_script(words[0])
    # Its own process group: Ctrl-C reaches us, and the command gets the SIGTERM that makes it save.
    child = subprocess.Popen([program, *words[1:]], process_group=0, pass_fds=[lock])
    try:
        while child.poll() is None:
            try:
                child.wait(TICK_S)
            except subprocess.TimeoutExpired:
                tick()
    except BaseException:
        child.terminate()
        child.wait()
        tick()
        raise
    if child.returncode != 0:
        raise subprocess.CalledProcessError(child.returncode, shlex.join(words))


def find_config(command: str, name: str) -> str:
    """config=… of a command: from the current folder (a clone), else from the installation."""
    path = Path("configs", command, f"{name}.yaml")
    if not path.is_file():
        path = Path(str(configs.__file__)).parent / command / f"{name}.yaml"
    return f"config={path}"


def show_pictures(paths: list[Path]) -> None:
    """Opens pictures with the desktop's viewer, where there is a desktop."""
    has_display = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if not has_display or not shutil.which("xdg-open"):
        return
    for path in paths:
        quiet = subprocess.DEVNULL
        subprocess.Popen(["xdg-open", str(path)], stdout=quiet, stderr=quiet)


def finish(run: Callable[[], None]) -> int:
    """Runs a demo; returns its exit status, with one line for what went wrong."""
    try:
        run()
    except subprocess.CalledProcessError as error:
        print(f"error: {error.cmd}: exit status {error.returncode}, see above", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, SystemExit):
        print("\nstopped: run the same command again, it goes on from here")
        return 130
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def find_script(name: str) -> str:
    """The console script installed beside this Python."""
    path = Path(sysconfig.get_path("scripts"), name)
    if not path.is_file():
        raise FileNotFoundError(f"{name} is not installed in {path.parent}: pip install -e .")
    return str(path)


@contextmanager
def only_one(folder: Path) -> Iterator[int]:
    """Holds FOLDER/lock; yields its descriptor, which commands inherit.

    A command that outlives a killed demo keeps the lock, and the next demo waits for it here.
    SIGTERM and SIGHUP become SystemExit within, so that the command is stopped before we go.
    """
    lock = os.open(folder / "lock", os.O_CREAT | os.O_RDWR)
    stopping = {s: signal.signal(s, _exit) for s in (signal.SIGTERM, signal.SIGHUP)}
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another demo, or a command of one, in {folder} …", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock
    finally:
        os.close(lock)
        for number, handler in stopping.items():
            signal.signal(number, handler)


def _exit(number: int, _frame: Any) -> None:
    raise SystemExit(128 + number)
