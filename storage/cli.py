"""muse-store: look into token stores, check, mend and reshape them.

Reading commands take a folder or any fsspec URL; writing ones a folder. Rows are numbered through
the shards in name order; dropped ones do not count. Any command that was interrupted is finished
by running it again. (`python -m storage.cli` is the same.)
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from storage.cli_exchange import export, import_
from storage.cli_look import info, ls, seal, stats, verify
from storage.cli_new_store import convert, merge, split
from storage.cli_rewrite import append_column, compact, drop

Add = Callable[[Callable[[argparse.Namespace], int], str], argparse.ArgumentParser]


def main(argv: list[str] | None = None) -> int:
    """Runs one subcommand; returns the exit status (0 good, 1 damaged, 2 unusable)."""
    args = build_parser().parse_args(argv)
    try:
        return args.action(args)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def build_parser() -> argparse.ArgumentParser:
    """All subcommands; `action` is the function that runs one."""
    parser = argparse.ArgumentParser(
        prog="muse-store", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(action: Callable[[argparse.Namespace], int], examples: str) -> argparse.ArgumentParser:
        about = " ".join((action.__doc__ or "").split())
        lines = "\n".join(f"  muse-store {line}" for line in examples.splitlines())
        command = commands.add_parser(
            action.__name__.rstrip("_").replace("_", "-"),
            help=about.split(": ")[0].split(". ")[0],
            description=about,
            epilog=f"examples:\n{lines}",
            formatter_class=_Formatter,
        )
        command.set_defaults(action=action)
        return command

    _add_looking(add)
    _add_rewriting(add)
    _add_new_stores(add)
    _add_exchange(add)
    return parser


class _Formatter(argparse.HelpFormatter):
    """Wraps the description, keeps the lines of the examples."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if text.startswith("examples:"):
            return text
        return super()._fill_text(text, width, indent)


def _add_looking(add: Add) -> None:
    command = add(info, "info data/store\ninfo s3://bucket/store --json")
    _store(command)
    _json(command)

    command = add(
        ls, "ls data/store\nls data/store 00000 --columns key,caption\nls data/store --where "
        "'class_id == 3 and caption is not None' --rows 5 --json"
    )  # fmt: skip
    _store(command)
    _optional(command, "shard", help="list the rows of this shard")
    command.add_argument("--where", metavar="FILTER", help="list the rows for which it holds")
    command.add_argument("--rows", type=_positive, default=20, help="how many rows at most (20)")
    command.add_argument("--columns", metavar="A,B", help="which columns (those with values)")
    _json(command, "one JSON object a line")

    command = add(verify, "verify data/store\nverify data/store 00000")
    command.add_argument("store", type=_folder, help="the store's folder")
    _optional(command, "shard", help="check this shard only")
    _json(command)

    command = add(seal, "seal data/store")
    command.add_argument("store", type=_folder, help="the store's folder")

    command = add(stats, "stats data/store --png codes.png")
    _store(command)
    command.add_argument("--png", type=Path, help="where to draw (STORE/stats.png)")
    _json(command)


def _add_rewriting(add: Add) -> None:
    command = add(
        drop, "drop data/store 000000017 000000018 --reason 'asked to be removed'\n"
        "drop data/store --column url --file opted_out.txt --dry-run"
    )  # fmt: skip
    command.add_argument("store", type=_folder, help="the store's folder")
    _optional(command, "values", nargs="+", help="rows with one of these values are dropped")
    command.add_argument("--file", type=Path, help="more values, one a line")
    command.add_argument("--column", default="key", help="whose values they are (key)")
    command.add_argument("--reason", default="", help="noted with the tombstone")
    _dry_run(command)
    _json(command)

    command = add(compact, "compact data/store --dry-run\ncompact data/store")
    command.add_argument("store", type=_folder, help="the store's folder")
    _dry_run(command)

    command = add(
        append_column, "append-column data/store scores.parquet\n"
        "append-column data/store --shards-dir scores/ --replace --dry-run"
    )  # fmt: skip
    command.add_argument("store", type=_folder, help="the store's folder")
    _optional(command, "files", nargs="+", type=Path, metavar="FILE", help=".parquet .csv .arrow")
    command.add_argument(
        "--shards-dir",
        type=Path,
        metavar="DIR",
        help="instead: one file a shard, DIR/SHARD.parquet",
    )
    command.add_argument("--replace", action="store_true", help="columns that exist, wholly")
    _dry_run(command)


def _add_new_stores(add: Add) -> None:
    command = add(merge, "merge data/all data/part1 data/part2\nmerge data/all data/* --prefix")
    command.add_argument("out", type=_folder, help="the new store's folder")
    command.add_argument("stores", nargs="+", type=_folder, metavar="STORE")
    command.add_argument("--prefix", action="store_true", help="name shards STORE-SHARD")
    _dry_run(command)

    command = add(
        split, "split data/store data/train data/validation --fraction 0.95\n"
        "split data/store data/pretty data/rest --where 'aesthetic_score >= 6'"
    )  # fmt: skip
    _store(command)
    command.add_argument("out_a", type=_folder, help="new store of the samples that are chosen")
    command.add_argument("out_b", type=_folder, help="new store of the others")
    which = command.add_mutually_exclusive_group(required=True)
    which.add_argument("--fraction", type=float, help="choose so many, in (0, 1), by a hash")
    which.add_argument("--where", metavar="FILTER", help="choose the rows for which it holds")
    command.add_argument("--seed", type=int, default=0, help="of the hash (0)")
    _dry_run(command)

    command = add(
        convert, "convert data/store data/mapped --backend arrow\n"
        "convert s3://bucket/store data/store --rows-per-shard 50000"
    )  # fmt: skip
    _store(command)
    command.add_argument("out", type=_folder, help="the new store's folder")
    command.add_argument("--backend", choices=["zarr", "arrow"], help="(as it is)")
    command.add_argument("--chunk-rows", type=_positive, help="rows a chunk (as it is)")
    command.add_argument("--rows-per-shard", type=_positive, help="cuts and joins shards")
    _dry_run(command)


def _add_exchange(add: Add) -> None:
    command = add(
        export, "export data/store out/tars --format webdataset --where 'aesthetic_score >= 6'\n"
        "export data/store out/tables --format parquet --rows-per-file 100000"
    )  # fmt: skip
    _store(command)
    command.add_argument("out", type=_folder, help="the folder for the files")
    command.add_argument("--format", choices=["webdataset", "parquet"], required=True)
    command.add_argument("--where", metavar="FILTER", help="only the rows for which it holds")
    command.add_argument("--rows-per-file", type=_positive, help="(one file a shard)")
    _dry_run(command)

    model = "--tokenizer openMUSE/vqgan-f16-8192-laion --codebook-size 8192 --grid 16 16"
    command = add(
        import_, f"import data/store laion/*.tar --format webdataset {model} --resolution 256\n"
        "import data/store codes/imagenet256_codes --format llamagen --tokenizer vq-16 "
        "--codebook-size 16384 --grid 16 16 --resolution 256\n"
        "import data/store out/tables"
    )  # fmt: skip
    command.add_argument("store", type=_folder, help="the new store's folder")
    command.add_argument("inputs", nargs="+", type=_folder, metavar="INPUT", help="files, a folder")
    forms = ["webdataset", "llamagen", "jsonl", "parquet"]
    command.add_argument("--format", choices=forms, help="(an export's folder: as it says)")
    command.add_argument("--tokenizer", metavar="NAME", help="model directory or hub repository")
    command.add_argument("--codebook-size", type=_positive, metavar="K")
    command.add_argument("--grid", type=_positive, nargs=2, metavar=("H", "W"), help="of codes")
    command.add_argument("--resolution", type=_positive, help="of the pictures, in pixels")
    command.add_argument("--model-fingerprint", metavar="HEX", help="(sha256 of the name)")
    command.add_argument("--backend", choices=["zarr", "arrow"], default="zarr", help="(zarr)")
    command.add_argument("--member", metavar="SUFFIX", help="webdataset: which member is the codes")
    columns = "webdataset: labels to keep beside the usual columns"
    command.add_argument("--extra-columns", metavar="NAME:TYPE,…", help=columns)
    command.add_argument("--rows-per-shard", type=_positive, default=10_000, metavar="N",
                         help="llamagen: files, jsonl: lines (10000)")  # fmt: skip
    command.add_argument("--views", type=_positive, default=1, help="jsonl: lines an image (1)")
    command.add_argument("--workers", type=_positive, default=1, help="processes (1)")
    _dry_run(command)


def _store(command: argparse.ArgumentParser) -> None:
    command.add_argument("store", help="the store: a folder or a URL")


def _optional(command: argparse.ArgumentParser, name: str, **options: Any) -> None:
    """An argument that may stand after options (which nargs "?" and "*" do not allow), or not."""
    command.add_argument(name, **options).required = False


def _json(command: argparse.ArgumentParser, what: str = "one JSON object") -> None:
    command.add_argument("--json", action="store_true", help=f"print {what}")


def _dry_run(command: argparse.ArgumentParser) -> None:
    command.add_argument("--dry-run", action="store_true", help="say what would happen, no more")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not above 0")
    return value


def _folder(text: str) -> Path:
    if "://" in text:
        raise argparse.ArgumentTypeError(f"{text}: not a folder on this machine")
    return Path(text)


if __name__ == "__main__":
    sys.exit(main())
