"""muse-tokenize status STORE: how far an encoding run is, who works on it, and what went wrong.

    muse-tokenize status store/
    muse-tokenize status store/ --watch 30
    muse-tokenize status store/ --json

Counts what is in the store, so it is right whatever became of the tasks. Exit status: 0 complete,
1 not yet.
"""

import argparse
import json
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

from storage.files import open_files
from storage.index import SEALED, listed_folders, read_index, read_sealed
from storage.progress import progress_bar
from storage.schema import read_meta
from storage.writer import expected_shards
from tokenize_stage.work.ledger import REPORT_S, failures, task_reports
from tokenize_stage.work.plan import read_plan

SILENCE_S = 8 * REPORT_S  # a running task that says nothing for so long is lost
NAMES = 5  # of shards that are written out


def main(argv: list[str] | None = None) -> int:
    """Prints the status of a store once, or again and again; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="muse-tokenize status",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("store", type=Path)
    parser.add_argument("--watch", type=float, metavar="SECONDS", help="print again until complete")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    args = parser.parse_args(argv)
    while True:
        try:
            now = status(args.store)
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        print(json.dumps(now) if args.json else describe(now), flush=True)
        if args.watch is None or now["complete"]:
            return 0 if now["complete"] else 1
        time.sleep(args.watch)


def status(store: Path) -> dict[str, Any]:
    """All that `describe` prints, as plain values. Raises FileNotFoundError without a store."""
    summaries, rows = _summaries(store)
    done = {summary["name"] for summary in summaries}
    reasons: Counter[str] = Counter()
    for summary in summaries:
        reasons.update(summary["skip_reasons"])
    failed = {name: r["reason"] for name, r in failures(store).items() if name not in done}
    missing = sorted(expected_shards(store) - done - set(failed))
    plan = read_plan(store)
    tasks = [_with_state(report, time.time()) for report in task_reports(store)]
    rate = sum(task["images_per_s"] for task in tasks if task["state"] == "running")
    left = len(missing) * rows / len(done) if done else None
    return {
        "store": str(store),
        "sealed": (store / SEALED).exists(),
        "complete": bool(done) and not missing and not failed,
        "done": len(done),
        "expected": len(done) + len(missing) + len(failed),
        "rows": rows,
        "skipped": dict(reasons.most_common()),
        "failed": failed,
        "missing": missing,
        "planned": plan is None or {*missing, *failed} <= set(plan.names),
        "tasks": tasks,
        "images_per_s": rate,
        "eta_s": left / rate if left is not None and rate else None,
    }


def _summaries(store: Path) -> tuple[list[dict[str, Any]], int]:
    """Of the shards that are there, and their rows; a sealed index spares reading manifests."""
    files, known = open_files(store), None
    if not (store / "store.json").exists() and expected_shards(store):
        return [], 0  # planned, and no task has begun
    read_meta(files)
    with suppress(FileNotFoundError):
        known = read_sealed(files)
    index = read_index(files, listed_folders(files), known, progress_bar("manifests"))
    return index.summaries, int(index.rows.sum())


def describe(now: dict[str, Any]) -> str:
    """A status in words: the shards, the tasks, what was left out, and the next command."""
    done, expected, store = now["done"], now["expected"], now["store"]
    filled = round(40 * done / expected) if expected else 0
    share = f"{done / expected:.1%}" if expected else "none expected"
    lines = [
        f"[{'#' * filled}{'.' * (40 - filled)}] {share}",
        f"{store}: {done:,} of {expected:,} shards, {now['rows']:,} rows",
        *_task_lines(now),
    ]
    if now["skipped"]:
        kinds = ", ".join(f"{kind} {count:,}" for kind, count in now["skipped"].items())
        lines.append(f"skipped {sum(now['skipped'].values()):,}: {kinds}")
    for name, reason in list(now["failed"].items())[:NAMES]:
        lines.append(f"failed: {name}: {reason}")
    if len(now["failed"]) > NAMES:
        lines.append(f"failed: {len(now['failed']) - NAMES} more, in {store}/work/failed/")
    if now["missing"]:
        some = ", ".join(now["missing"][:NAMES]) + (", …" if len(now["missing"]) > NAMES else "")
        lines.append(f"missing {len(now['missing']):,}: {some}")
    return "\n".join([*lines, *_next_commands(now)])


def _task_lines(now: dict[str, Any]) -> list[str]:
    states = Counter(task["state"] for task in now["tasks"])
    if not states:
        return []
    line = "tasks: " + ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
    if states["running"]:
        line += f"; {now['images_per_s']:,.0f} images/s"
        if now["eta_s"] is not None:
            line += f", {_duration(now['eta_s'])} left"
    lost = [task for task in now["tasks"] if task["state"] == "lost"]
    return [line] + [
        f"lost: task {task['task']} of {task['tasks']} on {task['host']}"
        + (f", job {task['job']}" if task["job"] else "")
        + f": no word for {_duration(time.time() - task['time'])}"
        for task in lost[:NAMES]
    ]


def _next_commands(now: dict[str, Any]) -> list[str]:
    store = now["store"]
    if now["complete"]:
        done = now["sealed"]
        return [f"next: muse-tokenize {f'audit store={store}' if done else f'seal {store}'}"]
    if any(task["state"] == "running" for task in now["tasks"]):
        return []
    command = f"muse-tokenize config={store}/work/config.yaml"
    again = f"muse-tokenize plan config={store}/work/config.yaml, then "
    return [f"next: {'' if now['planned'] else again}{command}"]


def _with_state(report: dict[str, Any], now: float) -> dict[str, Any]:
    """The report of a task that should be running and is silent says so: lost."""
    silent = report["state"] == "running" and now - report["time"] > SILENCE_S
    return {**report, "state": "lost"} if silent else report


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


if __name__ == "__main__":
    sys.exit(main())
