"""muse-tokenize seal STORE: closes a complete store, refuses an incomplete one unless told.

    muse-tokenize seal store/
    muse-tokenize seal store/ --partial

Writes the index of all shards, so that opening the store looks into none. A sealed store may grow:
seal it again. Exit status: 0 sealed, 1 incomplete and left as it is.
"""

import argparse
import sys
from pathlib import Path

from storage.progress import progress_bar
from storage.seal import seal
from tokenize_stage.work.status import describe, status


def main(argv: list[str] | None = None) -> int:
    """Seals a store when all its shards are there; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="muse-tokenize seal",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("store", type=Path)
    parser.add_argument("--partial", action="store_true", help="seal what is there")
    args = parser.parse_args(argv)
    try:
        now = status(args.store)
        if not now["complete"] and not args.partial:
            print(describe(now))
            left = len(now["missing"]) + len(now["failed"])
            print(
                f"error: {args.store} lacks {left} of {now['expected']} shards and is not sealed; "
                "encode them, or seal what is there with --partial",
                file=sys.stderr,
            )
            return 1
        index = seal(args.store, progress_bar("seal"))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"sealed {args.store}: {len(index.folders):,} shards, {int(index.rows.sum()):,} rows")
    print(f"next: muse-store verify {args.store}, then muse-tokenize audit store={args.store}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
