"""Export: what other tools read of a store is what the store holds, and comes back by import."""

import tarfile
from functools import partial

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from filled_store import K, content, fill_store, kill_at_every_step

from storage.export_rows import export_rows, read_export
from storage.filters import parse_filter
from storage.foreign_codes import parquet_parts, webdataset_parts
from storage.import_codes import import_parts
from storage.reader import TokenStore
from storage.schema import ArrayColumn, StoreMeta, Tokenizer
from storage.tombstones import drop
from storage.writer import ShardWriter, create_store

FORMS = pytest.mark.parametrize("form", ["webdataset", "parquet"])
WHERE = "class_id != 2 and score > 0.3"


@pytest.fixture
def store(tmp_path):
    path = fill_store(tmp_path / "store", "zarr")
    drop(path, "key", ["0-0003", "2-0001"])
    return TokenStore(path)


def import_back(folder, path):
    """The store that the files of an export make."""
    meta, extra = read_export(folder)
    files = sorted(file for file in folder.iterdir() if file.suffix != ".json")
    if files[0].suffix == ".tar":
        parts = webdataset_parts([str(file) for file in files], None, extra)
    else:
        parts = parquet_parts(files, meta)
    assert import_parts(path, meta, parts).rejected == 0
    return TokenStore(path)


@FORMS
@pytest.mark.parametrize("where", [None, WHERE])
@pytest.mark.parametrize("rows_per_file", [None, 7])
def test_what_goes_out_comes_back(store, tmp_path, form, where, rows_per_file):
    condition = parse_filter(where) if where else None
    summary = export_rows(store, tmp_path / "out", form, condition, rows_per_file)
    back = import_back(tmp_path / "out", tmp_path / "back")
    rows = store.rows_where(where) if where else np.arange(len(store))
    assert (summary.rows, summary.files) == (len(rows), len(back.shards))
    assert len(back.shards) == (2 if rows_per_file is None else -(-len(rows) // 7))
    assert back.meta == store.meta
    np.testing.assert_array_equal(back.read_codes(slice(None)), store.read_codes(rows))
    assert back.table().equals(store.table(rows=rows))


def make_wide_store(path):
    """Two columns of codes, one of them uint32, and one of text ids that has two dimensions."""
    arrays = {
        "codes": ArrayColumn("uint16", [16]),
        "codes_F8": ArrayColumn("uint32", [64]),
        "text_ids": ArrayColumn("int32", [2, 3]),
    }
    tokenizers = {
        "codes": Tokenizer("vq", "VQ", K, [4, 4], "f" * 64),
        "codes_F8": Tokenizer("vq8", "VQ", 2**18, [8, 8], "8" * 64),
    }
    create_store(path, StoreMeta(32, arrays, tokenizers, chunk_rows=8))
    rng = np.random.default_rng(0)
    with ShardWriter(path, "00000", "a.tar") as writer:
        writer.add(
            {
                "codes": rng.integers(0, K, (20, 16)),
                "codes_F8": rng.integers(0, 2**18, (20, 64)),
                "text_ids": rng.integers(-1, 9, (20, 2, 3)),
                "key": [f"a/b.{index}" for index in range(20)],
            }
        )
    return TokenStore(path)


@FORMS
def test_several_columns_of_any_shape_and_keys_with_dots_come_back(tmp_path, form):
    store = make_wide_store(tmp_path / "store")
    export_rows(store, tmp_path / "out", form)
    back = import_back(tmp_path / "out", tmp_path / "back")
    for column in store.meta.arrays:
        np.testing.assert_array_equal(
            back.read_codes(slice(None), column), store.read_codes(slice(None), column)
        )
    assert back.table().equals(store.table())


def test_webdataset_reads_the_tars(store, tmp_path):
    export_rows(store, tmp_path / "out", "webdataset", rows_per_file=50)
    urls = [str(path) for path in sorted(tmp_path.glob("out/*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    assert len(samples) == len(store) and len(urls) == 3
    codes, table = store.read_codes(slice(None)), store.table().to_pylist()
    for row, sample in enumerate(samples):
        assert sample["__key__"] == f"{row:09d}"
        assert sample["codes.npy"].dtype == np.uint16
        np.testing.assert_array_equal(sample["codes.npy"], codes[row])
        assert sample["cls"] == table[row]["class_id"]
        assert sample.get("txt") == table[row]["caption"]
        assert sample["json"] == {k: v for k, v in table[row].items() if v is not None}


def test_duckdb_reads_the_parquet(store, tmp_path):
    export_rows(store, tmp_path / "out", "parquet")
    query = f"from '{tmp_path}/out/*.parquet' where class_id = 3 order by key, view"
    found = duckdb.sql(f"select key, view, codes {query}").fetchall()
    rows = store.rows_where("class_id == 3")
    codes = store.read_codes(rows).tolist()
    table = store.table(["key", "view"], rows).to_pylist()
    expected = [(r["key"], r["view"], c) for r, c in zip(table, codes, strict=True)]
    assert found == sorted(expected)
    schema = pq.read_schema(tmp_path / "out/00000.parquet")
    assert schema.field("codes").type == pa.list_(pa.uint16(), 16)


def test_the_bytes_of_a_tar_depend_on_the_rows_only(tmp_path):
    for backend in ("zarr", "arrow"):
        store = TokenStore(fill_store(tmp_path / backend, backend))
        export_rows(store, tmp_path / f"{backend}-out", "webdataset", rows_per_file=1000)
    tars = [tmp_path / f"{backend}-out" / "000000.tar" for backend in ("zarr", "arrow")]
    assert tars[0].read_bytes() == tars[1].read_bytes()
    with tarfile.open(tars[0]) as tar:
        owners = {(m.mtime, m.mode, m.uid, m.gid, m.uname, m.gname) for m in tar}
    assert owners == {(0, 0o444, 0, 0, "", "")}


@FORMS
def test_killed_anywhere_it_goes_on(store, tmp_path, form):
    export = partial(export_rows, store, tmp_path / "out", form, rows_per_file=40)
    assert kill_at_every_step(export, None, tmp_path / "out") > 4


def test_a_second_run_writes_what_is_missing(store, tmp_path):
    out = tmp_path / "out"
    assert export_rows(store, out, "parquet", dry_run=True).files == 2 and not out.exists()
    export_rows(store, out, "parquet")
    before = content(out)
    (out / "00002.parquet").unlink()
    stamp = (out / "00000.parquet").stat().st_mtime_ns
    assert export_rows(store, out, "parquet").finished_before == 1
    assert content(out) == before and (out / "00000.parquet").stat().st_mtime_ns == stamp


def test_files_of_another_export_are_never_mixed_in(store, tmp_path):
    out = tmp_path / "out"
    export_rows(store, out, "webdataset", parse_filter(WHERE), 20)
    for form, where, rows_per_file, field in [
        ("parquet", WHERE, 20, "form"),
        ("webdataset", None, 20, "filter"),
        ("webdataset", WHERE, 30, "rows_per_file"),
    ]:
        condition = parse_filter(where) if where else None
        with pytest.raises(ValueError, match=f"another export's files .{field} differs"):
            export_rows(store, out, form, condition, rows_per_file)
    drop(store.path, "key", ["0-0005"])
    with pytest.raises(ValueError, match="content differs"):
        export_rows(TokenStore(store.path), out, "webdataset", parse_filter(WHERE), 20)
    (out / "export.json").unlink()
    with pytest.raises(ValueError, match="another export's files"):
        export_rows(store, out, "webdataset", parse_filter(WHERE), 20)


def make_odd_store(path, meta, values, types):
    create_store(path, meta)
    with ShardWriter(path, "a", "a", extra_columns=pa.schema([*types.items()])) as writer:
        writer.add({"codes": np.zeros((3, 16), int), "key": ["a", "b", "c"], **values})
    return TokenStore(path)


@FORMS
def test_columns_of_other_types_come_back(store, tmp_path, form):
    values = {
        "ids": [[1, 2], None, []],
        "rated": [float("nan"), 0.1, None],
        "ok": [True, None, False],
    }
    types = {"ids": pa.list_(pa.int16()), "rated": pa.float32(), "ok": pa.bool_()}
    odd = make_odd_store(tmp_path / "odd", store.meta, values, types)
    export_rows(odd, tmp_path / "out", form)
    back = import_back(tmp_path / "out", tmp_path / "back").table()
    assert back.schema.equals(odd.table().schema)
    assert str(back.to_pylist()) == str(odd.table().to_pylist())  # NaN is not equal to itself


def test_bytes_go_to_parquet_only(store, tmp_path):
    hashes = {"hash": [b"\0", b"\xff", None]}
    odd = make_odd_store(tmp_path / "odd", store.meta, hashes, {"hash": pa.binary()})
    with pytest.raises(ValueError, match="export to parquet"):
        export_rows(odd, tmp_path / "out", "webdataset")
    export_rows(odd, tmp_path / "parquet", "parquet")
    back = import_back(tmp_path / "parquet", tmp_path / "back")
    assert back.table(["hash"]).to_pydict() == hashes
