"""storage/README.md suffices: a reader written from it alone reads what TokenStore reads."""

import hashlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow.ipc
import pyarrow.parquet
import pytest
from crc32c import crc32c
from filled_store import fill_store
from numcodecs import blosc

from storage.append_column import append_columns
from storage.reader import TokenStore
from storage.rewrite import compact_store
from storage.schema import ArrayColumn, StoreMeta, Tokenizer, read_meta
from storage.seal import seal
from storage.tombstones import drop
from storage.writer import ShardWriter, create_store

README = Path(__file__).parents[1] / "storage" / "README.md"


# The reader: nothing below, up to the tests, knows of this package.


def read_json(path):
    value = json.loads(path.read_bytes())
    digest = value.pop("digest")
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"))
    assert hashlib.sha256(canonical.encode()).hexdigest() == digest, path
    return value


def read_zarr_chunk(file, chunk, chunks, row_shape, chunk_rows, dtype):
    if not file.exists():
        return np.zeros((chunk_rows, *row_shape), dtype)
    content = file.read_bytes()
    index = content[len(content) - 16 * chunks - 4 :]
    start, length = np.frombuffer(index, "<u8", 2 * chunks).reshape(-1, 2)[chunk].tolist()
    assert crc32c(index[:-4]) == int.from_bytes(index[-4:], "little")
    if start == 2**64 - 1:
        return np.zeros((chunk_rows, *row_shape), dtype)
    frame = content[start : start + length - 4]
    assert crc32c(frame) == int.from_bytes(content[start + length - 4 :][:4], "little")
    return np.frombuffer(blosc.decompress(frame), dtype).reshape(chunk_rows, *row_shape)


def read_shard(store, folder, array):
    """(all rows of an array, all rows of the table) of one shard; dropped ones too."""
    meta, manifest = read_json(store / "store.json"), read_json(folder / "manifest.json")
    assert manifest["store"] == meta["fingerprint"]
    shape, dtype = meta["arrays"][array]["shape"], np.dtype(meta["arrays"][array]["dtype"])
    rows, size = manifest["rows"], meta["chunk_rows"]
    codes, chunks = np.zeros((rows, *shape), dtype), -(-rows // size)
    for chunk, checksum in enumerate(manifest["chunks"][array]):
        part = codes[chunk * size : (chunk + 1) * size]
        if meta["backend"] == "zarr":
            file = folder / f"{array}.zarr" / "/".join("c" + "0" * codes.ndim)
            part[:] = read_zarr_chunk(file, chunk, chunks, shape, size, dtype)[: len(part)]
        else:
            first = manifest["offsets"][array] + chunk * size * codes[0].nbytes
            data = (folder / f"{array}.arrow").read_bytes()[first : first + part.nbytes]
            part[:] = np.frombuffer(data, dtype).reshape(part.shape)
        assert crc32c(part.tobytes()) == checksum
    return codes, pyarrow.parquet.read_table(folder / "rows.parquet").to_pylist()


def read_store(store, array="codes"):
    """(rows of an array, rows of the table as dicts), without those that are dropped."""
    newest = {}
    for folder in (store / "shards").iterdir():
        if not folder.name.startswith("."):
            name, _, version = folder.name.partition("@v")
            newest[name] = max(newest.get(name, (0, None)), (int(version or 1), folder))
    tombstones = [read_json(path) for path in sorted(store.glob("tombstones/*.json"))]
    codes, rows = [], []
    for name in sorted(newest):
        for code, row in zip(*read_shard(store, newest[name][1], array), strict=True):
            if not any(row.get(found["column"]) in found["values"] for found in tombstones):
                codes.append(code)
                rows.append(row)
    return codes, rows


# The tests.


@pytest.fixture(params=["zarr", "arrow"])
def path(tmp_path, request):
    return fill_store(tmp_path / "store", request.param)


def assert_reads_alike(path):
    store, (codes, rows) = TokenStore(path), read_store(path)
    np.testing.assert_array_equal(store.read_codes(slice(None)), np.array(codes))
    assert [{name: row.get(name) for name in store.columns} for row in rows] == (
        store.table().to_pylist()
    )


def test_a_reader_of_the_text_reads_the_same(path):
    assert_reads_alike(path)
    drop(path, "key", ["0-0003", "2-0000"])
    drop(path, "class_id", [4])
    assert_reads_alike(path)
    values = pyarrow.table({"key": ["0-0001", "2-0009"], "nsfw": [0.5, 0.25]})
    append_columns(path, values)
    assert sorted(f.name for f in (path / "shards").iterdir())[0] == "00000@v2"
    assert_reads_alike(path)
    shutil.copytree(path / "shards" / "00000@v2", path / "shards" / ".staging" / "00000@v3.1")
    compact_store(path)
    assert_reads_alike(path)
    assert len(TokenStore(path)) < 130


def test_zeros_are_not_written(tmp_path):
    """And rows may be of two dimensions and 32 bits."""
    tokenizer = Tokenizer("vq", "X", 2**20, [2, 3], "f" * 64)
    arrays = {"codes": ArrayColumn("uint32", [2, 3])}
    create_store(tmp_path, StoreMeta(32, arrays, {"codes": tokenizer}, chunk_rows=32))
    codes = np.zeros((100, 2, 3), int)
    for name, last in (("one", 2**20 - 1), ("none", 0)):
        codes[-1] = last
        with ShardWriter(tmp_path, name, source=name) as writer:
            writer.add({"codes": codes, "key": [str(row) for row in range(100)]})
    assert not (tmp_path / "shards" / "none" / "codes.zarr" / "c").exists()
    assert_reads_alike(tmp_path)


def test_the_fingerprint_follows_the_recipe(path):
    meta = read_json(path / "store.json")
    recipe = {name: meta[name] for name in ("resolution", "arrays", "tokenizers", "transform")}
    for tokenizer in recipe["tokenizers"].values():
        del tokenizer["name"]
    canonical = json.dumps(recipe | {"schema_version": 1}, sort_keys=True, separators=(",", ":"))
    assert hashlib.sha256(canonical.encode()).hexdigest() == meta["fingerprint"]


def test_manifest_and_index_are_as_written(path):
    seal(path)
    drop(path, "key", ["0-0003"])
    sealed = read_json(path / "sealed.json")
    content = (path / sealed["index"]).read_bytes()
    assert hashlib.sha256(content).hexdigest() == sealed["sha256"] and sealed["rows"] == 130
    index = pyarrow.parquet.read_table(path / sealed["index"]).to_pylist()
    lines = "\n".join(row["folder"] for row in index).encode()
    for row in index:
        folder = path / "shards" / row["folder"]
        manifest = read_json(folder / "manifest.json")
        assert hashlib.sha256((folder / "manifest.json").read_bytes()).digest() == row["manifest"]
        lines += row["manifest"]
        summary = json.loads(row["summary"])
        assert row["rows"] == manifest["rows"]
        assert summary.pop("bytes") == {f: e["bytes"] for f, e in manifest["files"].items()}
        assert summary == {name: manifest[name] for name in summary}
        chunks = json.dumps(manifest["chunks"]["codes"], separators=(",", ":"))
        assert manifest["content"]["codes"] == hashlib.sha256(chunks.encode()).hexdigest()
        for file, spans in manifest["parquet"].items():
            data = (folder / file).read_bytes()
            assert sum(spans["footer"][:2]) == len(data)
            for start, length, checksum in [spans["footer"], *sum(spans["columns"].values(), [])]:
                assert crc32c(data[start : start + length]) == checksum
    (name,) = sealed["tombstones"]
    tombstone = read_json(path / "tombstones" / name)
    assert tombstone["resolved"] == hashlib.sha256(lines).hexdigest()[:16]
    assert tombstone["rows"] == {"00000": [6, 7]}
    identity = json.dumps([tombstone["column"], tombstone["values"]], separators=(",", ":"))
    assert name == hashlib.sha256(identity.encode()).hexdigest()[:16] + ".json"


def fields_in(heading):
    """The first column of the table below a heading of the README."""
    section = README.read_text().split(f"\n{heading}\n")[1].split("\n#")[0]
    table = re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
    return {name for line in table for name in re.findall(r"`(\w+)`", line)}


def test_every_field_is_in_the_text(path):
    drop(path, "key", ["0-0003"])
    assert fields_in("## store.json") == set(read_json(path / "store.json"))
    manifest = read_json(path / "shards" / "00000" / "manifest.json")
    missing = {"offsets"} if read_meta(path).backend == "zarr" else set()
    assert fields_in("### manifest.json") == set(manifest) | {"origin"} | missing
    (tombstone,) = path.glob("tombstones/*.json")
    assert fields_in("## tombstones") == set(read_json(tombstone))
    columns = set(pyarrow.parquet.read_schema(path / "shards" / "00001" / "rows.parquet").names)
    assert fields_in("### rows.parquet") == columns - {"score", "url"}


def test_the_examples_run(tmp_path):
    names = {f"stock_{b}": str(fill_store(tmp_path / b, b)) for b in ("zarr", "arrow")}
    for backend in ("zarr", "arrow"):
        scope = {**names, "STORE": str(tmp_path / backend)}
        for block in re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL):
            exec(block, scope)
        np.testing.assert_array_equal(scope["codes"][:3], scope["store"].read_codes([0, 1, 2]))
