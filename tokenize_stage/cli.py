"""muse-tokenize: images -> token store, and all that a large run needs around it.

    muse-tokenize [encode] key=value …   images to codes, one shard of the store per input shard
    muse-tokenize estimate key=value …   GPU-hours, time, bytes and money, from a short measurement
    muse-tokenize scan key=value …       hashes of all images, to find duplicates before encoding
    muse-tokenize dedup key=value …      which images are duplicates, from the scans
    muse-tokenize plan key=value …       the list of input shards, for the tasks of a job array
    muse-tokenize status STORE           done, running, failed, missing; rate and time left
    muse-tokenize seal STORE             closes a complete store
    muse-tokenize audit key=value …      stored codes decoded beside their images, in numbers too

`muse-tokenize COMMAND --help` says more. (`python -m tokenize_stage.cli` is the same.)
"""

import sys
from importlib import import_module

COMMANDS = {  # imported when called: status and seal need no torch
    "encode": "tokenize_stage.encode",
    "estimate": "tokenize_stage.estimate",
    "scan": "tokenize_stage.selection.scan",
    "dedup": "tokenize_stage.selection.dedup",
    "plan": "tokenize_stage.work.make_plan",
    "status": "tokenize_stage.work.status",
    "seal": "tokenize_stage.work.seal",
    "audit": "tokenize_stage.audit",
}
FLAGS = {"--only-missing": "only=missing", "--only-failed": "only=failed"}


def main(argv: list[str] | None = None) -> int:
    """Runs one command, `encode` when none is named; returns its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if argv in ([], ["-h"], ["--help"]):
        print((__doc__ or "").strip())
        return 0 if argv else 2
    command, rest = (argv[0], argv[1:]) if argv[0] in COMMANDS else ("encode", argv)
    if command == "encode" and "=" not in argv[0] and not argv[0].startswith("-") and rest is argv:
        print(f"error: no command {argv[0]!r}: there are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    return import_module(COMMANDS[command]).main([FLAGS.get(word, word) for word in rest])


if __name__ == "__main__":
    sys.exit(main())
