"""append-column: new columns for the rows of a store, joined by key, without touching the codes.

Values come as Parquet, CSV or Arrow files with a column `key`, and `source` where one key stands
for samples of several sources; every view of a sample gets the sample's value. A shard's next
version links the array files of the one before it, so that only tables are written.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from storage.progress import Progress, no_progress
from storage.reader import TokenStore
from storage.rewrite import link_files, new_version, settle, shard_header
from storage.schema import TABLE_SCHEMA
from storage.shard import ROWS, SKIPPED, finish_shard, read_rows, read_skipped

GROUP_ROWS = 1_000_000  # rows of the store looked up at once; more when more values are given
JOIN = ["source", "key"]
Values: TypeAlias = pa.Table | dict[str, Path]  # of the whole store, or a file for each shard


@dataclass
class Appended:
    """What append_columns did, or would do."""

    columns: list[str]
    rows: int  # of the store
    rewritten: list[str] = field(default_factory=list)  # folders that get a next version
    unchanged: int = 0  # shards that hold these very values already
    without: int = 0  # rows for which no value was given: null
    unused: list[str] = field(default_factory=list)  # keys, and files, of no row of the store


def append_columns(
    path: Path,
    values: Values,
    replace: bool = False,
    dry_run: bool = False,
    progress: Progress = no_progress,
) -> Appended:
    """Adds the columns of `values` to the rows of a store; safe to kill and to run again.

    replace: allows columns that exist. All is looked up before anything is written; a shard that
    holds the values already is left alone. Raises ValueError for a column that exists with other
    values, and for a key that stands twice or for samples of several sources.
    """
    store, schema = TokenStore(path), _new_schema(values)
    if taken := set(schema.names).intersection(store.meta.arrays):
        raise ValueError(f"{taken} of {path} are codes: choose another name")
    report = Appended(schema.names, len(store))
    work = []
    found = _look_up(store, values, schema, range(len(store.shards)), report)
    for shard, columns in progress(found, len(store.shards)):
        existing = set(schema.names).intersection(store.index.summary(shard)["columns"])
        table = _table_on_disk(store, shard, sorted(existing))
        if existing == set(schema.names) and all(_same(table[n], columns[n]) for n in existing):
            report.unchanged += 1
        elif existing and not replace:
            raise ValueError(
                f"{path} has {sorted(existing)} in shard {store.shards[shard]}, with other values: "
                "choose another name, or --replace"
            )
        else:
            work.append(shard)
    report.rewritten = [store.index.folders[shard] for shard in work]
    if not dry_run:
        again = _look_up(store, values, schema, work, Appended([], 0))
        for shard, columns in progress(again, len(work)):
            _write_version(store, shard, columns)
        settle(path)
    return report


def read_values(paths: list[Path]) -> pa.Table:
    """The tables in these files, one after the other; keys and sources as strings.

    Raises ValueError for another format, without `key`, or with nothing beside it.
    """
    tables = [_read_file(path) for path in paths]
    for path, table in zip(paths, tables, strict=True):
        if "key" not in table.column_names or not set(table.column_names).difference(JOIN):
            raise ValueError(f"{path} has columns {table.column_names}: wanted are key and others")
        if table.schema != tables[0].schema:
            raise ValueError(f"{path} has other columns, or other types, than {paths[0]}")
    return pa.concat_tables(tables)


class _Lookup:
    """A table of values by key, which remembers what was asked for."""

    def __init__(self, table: pa.Table, schema: pa.Schema):
        """Raises ValueError for a key given twice or a value that does not fit its column."""
        self.on = [name for name in JOIN if name in table.column_names]
        self.keys = _join_keys(table, self.on)
        counts = pc.value_counts(self.keys)
        twice = counts.field("values").filter(pc.greater(counts.field("counts"), 1)).to_pylist()
        if twice:
            raise ValueError(f"{len(twice)} keys are given twice, {twice[0]!r} first")
        try:
            self.columns = table.select(schema.names).cast(schema)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, KeyError, ValueError) as error:
            raise ValueError(f"values are not {schema.to_string()}: {error}") from None
        self._asked = np.full(len(table), -1)  # number of the source that asked for each value
        self._sources: dict[str | None, int] = {}

    def look_up(self, rows: pa.Table) -> tuple[pa.Table, np.ndarray]:
        """(columns, (n,) bool: whether a value was given) of rows with source and key."""
        places = pc.index_in(_join_keys(rows, self.on), value_set=self.keys)
        found = places.is_valid().to_numpy(zero_copy_only=False)
        asked, sources = places.drop_null().to_numpy(), self._number(rows["source"])[found]
        before = self._asked[asked]
        self._asked[asked] = sources
        clash = ((before >= 0) & (before != sources)) | (self._asked[asked] != sources)
        if clash.any():
            key = self.keys[int(asked[clash][0])].as_py()
            raise ValueError(
                f"key {key!r} is in several sources: add a column source to the values"
            )
        return self.columns.take(places), found

    def unused(self) -> list[str]:
        """The keys that no row asked for."""
        return self.keys.take(np.flatnonzero(self._asked < 0)).to_pylist()

    def _number(self, sources: pa.ChunkedArray) -> np.ndarray:
        encoded = pc.dictionary_encode(sources.combine_chunks(), null_encoding="encode")
        names = encoded.dictionary.to_pylist()
        numbers = [self._sources.setdefault(name, len(self._sources)) for name in names]
        return np.array(numbers, np.int64)[encoded.indices.to_numpy()]


def _look_up(
    store: TokenStore, values: Values, schema: pa.Schema, shards: Iterable[int], report: Appended
) -> Iterator[tuple[int, pa.Table]]:
    """(shard, the new columns of all its rows on disk); fills the report's counts."""
    if isinstance(values, pa.Table):
        lookup = _Lookup(values, schema)
        for group in _groups(store, shards, max(GROUP_ROWS, len(values))):
            yield from _look_up_shards(store, group, lookup, report)
        report.unused += lookup.unused()
        return
    for shard in shards:
        path = values.get(store.shards[shard])
        nothing = pa.schema([TABLE_SCHEMA.field("key"), *schema]).empty_table()
        lookup = _Lookup(read_values([path]) if path else nothing, schema)
        yield from _look_up_shards(store, [shard], lookup, report)
        report.unused += lookup.unused()
    report.unused += [str(values[name]) for name in sorted(set(values) - set(store.shards))]


def _look_up_shards(
    store: TokenStore, shards: list[int], lookup: _Lookup, report: Appended
) -> Iterator[tuple[int, pa.Table]]:
    tables = [_table_on_disk(store, shard, JOIN) for shard in shards]
    columns, found = lookup.look_up(pa.concat_tables(tables))
    first = 0
    for shard, table in zip(shards, tables, strict=True):
        here = found[first : first + len(table)]
        kept = store.numbers.kept_in(shard)
        report.without += int((~(here if kept is None else here[kept])).sum())
        yield shard, columns.slice(first, len(table))
        first += len(table)


def _groups(store: TokenStore, shards: Iterable[int], rows: int) -> Iterator[list[int]]:
    """Shards in groups of about so many rows."""
    group: list[int] = []
    for shard in shards:
        group.append(shard)
        if store.index.rows[group].sum() >= rows:
            yield group
            group = []
    if group:
        yield group


def _write_version(store: TokenStore, shard: int, columns: pa.Table) -> None:
    old, manifest = f"shards/{store.index.folders[shard]}", store.manifest(shard)
    table = read_rows(store.files, old, manifest)
    for new in columns.schema:
        if new.name in table.column_names:
            table = table.set_column(table.column_names.index(new.name), new, columns[new.name])
        else:
            table = table.append_column(new, columns[new.name])
    skipped = read_skipped(store.files, old, manifest)
    linked = {name: e for name, e in manifest["files"].items() if name not in (ROWS, SKIPPED)}
    with new_version(store, shard) as folder:
        link_files(Path(store.path) / old, folder, linked)
        header, chunks = shard_header(store, shard), manifest["chunks"]
        finish_shard(folder, store.meta, header, chunks, table, skipped, linked)


def _table_on_disk(store: TokenStore, shard: int, columns: list[str]) -> pa.Table:
    """Columns of all rows of a shard, dropped ones too."""
    folder = f"shards/{store.index.folders[shard]}"
    return read_rows(store.files, folder, store.manifest(shard), columns)


def _new_schema(values: Values) -> pa.Schema:
    """The columns to add: in a column that every store has, of its type."""
    if isinstance(values, dict):
        values = read_values([next(iter(values.values()))])
    return pa.schema(
        TABLE_SCHEMA.field(new.name) if new.name in TABLE_SCHEMA.names else new
        for new in values.schema
        if new.name not in JOIN
    )


def _read_file(path: Path) -> pa.Table:
    text = {name: pa.string() for name in JOIN}
    if path.suffix == ".parquet":
        table = pq.read_table(path)
    elif path.suffix == ".csv":
        options = pa.csv.ConvertOptions(column_types=text, strings_can_be_null=True)
        table = pa.csv.read_csv(path, convert_options=options)
    elif path.suffix in (".arrow", ".feather"):
        with pa.memory_map(str(path)) as source:
            table = pa.ipc.open_file(source).read_all()
    else:
        raise ValueError(f"{path}: wanted is .parquet, .csv, .arrow or .feather")
    types = [text.get(column.name, _plain_type(column.type)) for column in table.schema]
    names = table.column_names
    return table.cast(pa.schema(list(zip(names, types, strict=True))))


def _plain_type(type: pa.DataType) -> pa.DataType:
    """Without dictionaries and 64-bit offsets, so that every shard gets one type."""
    if pa.types.is_dictionary(type):
        return _plain_type(type.value_type)
    return pa.string() if type in (pa.large_string(), pa.string_view()) else type


def _join_keys(table: pa.Table, on: list[str]) -> pa.Array:
    """One string a row."""
    parts = [table[name].cast(pa.large_string()).combine_chunks().fill_null("") for name in on]
    return (
        parts[0]
        if len(parts) == 1
        else pc.binary_join_element_wise(*parts, pa.scalar("\n", pa.large_string()))
    )


def _same(a: pa.ChunkedArray, b: pa.ChunkedArray) -> bool:
    """Whether two columns hold the same, not-a-number being equal to itself."""
    if a.type == b.type and pa.types.is_floating(a.type):
        if not pc.is_nan(a).equals(pc.is_nan(b)):
            return False
        a, b = (pc.if_else(pc.is_nan(column), 0.0, column).cast(a.type) for column in (a, b))
    return a.equals(b)
