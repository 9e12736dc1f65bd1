"""muse-store export, import: to and from the files of other tools (storage/cli.py runs them)."""

import argparse
import time

import pyarrow as pa

from storage.cli_rewrite import rate
from storage.export_rows import ABOUT, export_rows, read_export
from storage.filters import parse_filter
from storage.foreign_codes import (
    InputPart,
    json_lines_parts,
    llamagen_parts,
    parquet_parts,
    webdataset_parts,
)
from storage.import_codes import import_parts, imported_meta, imported_tokenizer
from storage.progress import progress_bar
from storage.reader import TokenStore
from storage.schema import StoreMeta


def export(args: argparse.Namespace) -> int:
    """Writes the rows of a store, or those for which a filter holds, as files of other tools:
    webdataset tars (codes as .npy, .cls, .txt, .json) or Parquet. One file a shard, unless
    --rows-per-file says otherwise."""
    store, started = TokenStore(args.store), time.monotonic()
    condition = parse_filter(args.where) if args.where else None
    found = export_rows(
        store, args.out, args.format, condition, args.rows_per_file, progress_bar("export", "file"),
        args.dry_run,
    )  # fmt: skip
    word = "would write" if args.dry_run else "wrote"
    speed = "" if args.dry_run else rate(found.rows, 0, started)
    print(
        f"{word} {args.out}: {found.files} files ({found.finished_before} were there), "
        f"{found.rows:,} of {len(store):,} rows{speed}"
    )
    return 0


def import_(args: argparse.Namespace) -> int:
    """Makes a store of codes that other projects computed: webdataset tars of .npy or .pth as
    open-muse wrote them, folders of .npy as LlamaGen wrote them, JSON lines as 1d-tokenizer wrote
    them, and what export wrote. Which tokenizer made them the files do not say: give its name,
    codebook size and grid, but for an export's folder. What cannot be a row is listed with a
    reason in the store."""
    started = time.monotonic()
    meta, parts = _read_arguments(args)
    bar = progress_bar("import")
    found = import_parts(args.store, meta, parts, args.workers, bar, args.dry_run)
    if args.dry_run:
        print(f"would write {args.store}: {found.parts} shards, {found.finished_before} are there")
        return 0
    print(
        f"wrote {args.store}: {found.parts} shards ({found.finished_before} were there), "
        f"{found.rows:,} rows{rate(found.rows, 0, started)}"
    )
    if found.rejected:
        print(f"rejected {found.rejected:,} samples: why, in {args.store}/shards/*/skipped.parquet")
    return 0


def _read_arguments(args: argparse.Namespace) -> tuple[StoreMeta, list[InputPart]]:
    first, files = args.inputs[0], [str(path) for path in args.inputs]
    if (first / ABOUT).is_file():
        meta, extra = read_export(first)
        paths = sorted(path for path in first.iterdir() if path.suffix in (".tar", ".parquet"))
        if paths and paths[0].suffix == ".parquet":
            return meta, parquet_parts(paths, meta)
        return meta, webdataset_parts([str(path) for path in paths], None, extra)
    wanted = {"--tokenizer": args.tokenizer, "--grid": args.grid, "--resolution": args.resolution}
    wanted |= {"--codebook-size": args.codebook_size, "--format": args.format}
    missing = [name for name, value in wanted.items() if value is None]
    if missing:
        raise ValueError(f"{first} is no folder of muse-store export: give {', '.join(missing)}")
    tokenizer = imported_tokenizer(
        args.tokenizer, args.codebook_size, args.grid, args.model_fingerprint
    )
    meta = imported_meta(args.resolution, tokenizer, args.backend)
    if args.format == "parquet":
        return meta, parquet_parts(args.inputs, meta)
    if args.format == "webdataset":
        members = {"codes": args.member} if args.member else None
        return meta, webdataset_parts(files, members, _extra_columns(args.extra_columns))
    if len(args.inputs) > 1:
        raise ValueError(f"{args.format} takes one input, not {len(args.inputs)}")
    if args.format == "llamagen":
        return meta, llamagen_parts(first, args.rows_per_shard)
    return meta, json_lines_parts(first, args.rows_per_shard, args.views)


def _extra_columns(text: str | None) -> pa.Schema | None:
    """ "score:float32,url:string" as a schema."""
    if text is None:
        return None
    try:
        pairs = (field.split(":") for field in text.split(","))
        return pa.schema([(name, pa.type_for_alias(kind)) for name, kind in pairs])
    except ValueError as error:
        raise ValueError(f"--extra-columns {text!r}: wanted is NAME:TYPE,…: {error}") from None
