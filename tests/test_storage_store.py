"""One contract for both backends: what goes in comes out, damage is found, stock tools read it."""

import json
import multiprocessing
import shutil
from pathlib import Path

import numpy as np
import pytest

from storage.atomic import atomic_directory, atomic_file, read_json
from storage.reader import TokenStore
from storage.schema import ArrayColumn, StoreMeta, StoreMismatch, Tokenizer
from storage.stats import codebook_usage, store_sizes
from storage.writer import ShardWriter, create_store, finished_shards

K, GRID = 1024, [4, 4]


@pytest.fixture(params=["zarr", "arrow"])
def backend(request):
    return request.param


def make_meta(backend, **changes):
    tokenizer = Tokenizer("vq", "MaskGitVQGAN", K, GRID, "f" * 64)
    options = {"transform": {"resize": "bilinear"}, "backend": backend, "chunk_rows": 64} | changes
    return StoreMeta(32, {"codes": ArrayColumn("uint16", [16])}, {"codes": tokenizer}, **options)


def make_rows(count, seed):
    rng = np.random.default_rng(seed)
    return {
        "codes": rng.integers(0, K, (count, 16)),
        "key": [f"{seed}-{index:06d}" for index in range(count)],
        "class_id": rng.integers(0, 10, count),
        "caption": [
            None if index % 3 == 0 else f"a picture, no. {index} — ünï" for index in range(count)
        ],
        "crop_top": rng.random(count),
    }


def write_store(path, backend, counts=(200, 0, 130)):
    create_store(path, make_meta(backend))
    rows = []
    for index, count in enumerate(counts):
        with ShardWriter(path, f"{index:05d}", source=f"in/{index:05d}.tar") as writer:
            rows.append(make_rows(count, index))
            half = count // 2
            for part in (slice(0, half), slice(half, count)):
                writer.add({name: values[part] for name, values in rows[-1].items()})
            writer.skip(f"bad-{index}", "not an image: no header")
    return rows


def test_rows_come_back(tmp_path, backend):
    rows = write_store(tmp_path, backend)
    store = TokenStore(tmp_path)
    codes = np.concatenate([part["codes"] for part in rows])
    assert len(store) == 330 and store.shards == ["00000", "00001", "00002"]
    assert store.read_codes(slice(None)).dtype == np.uint16
    np.testing.assert_array_equal(store.read_codes(slice(None)), codes)
    picks = [329, 0, 200, 199, 0]
    np.testing.assert_array_equal(store.read_codes(picks), codes[picks])
    assert (
        store.read_column("class_id").tolist()
        == np.concatenate([r["class_id"] for r in rows]).tolist()
    )
    table = store.table(["key", "caption", "source", "crop_top"])
    assert table["key"].to_pylist() == sum((part["key"] for part in rows), [])
    assert table["caption"].to_pylist() == sum((part["caption"] for part in rows), [])
    assert table["source"][250].as_py() == "in/00002.tar"
    assert store.skipped().to_pylist()[1] == {
        "key": "bad-1",
        "source": "in/00001.tar",
        "reason": "not an image: no header",
    }
    with pytest.raises(IndexError, match="330"):
        store.read_codes([330])


def test_compact(tmp_path, backend):
    """At most 1.02 x log2 K bits a code in zarr even for small shards; 16 bits in arrow."""
    create_store(tmp_path, make_meta(backend, chunk_rows=1024))
    with ShardWriter(tmp_path, "a", source="a") as writer:
        writer.add(make_rows(20_000, 0))
    bits = store_sizes(TokenStore(tmp_path))["bits_per_code"]["codes"]
    assert bits < (10.2 if backend == "zarr" else 16.1)


def test_fingerprint_ignores_the_backend(tmp_path):
    assert make_meta("zarr").fingerprint == make_meta("arrow").fingerprint
    assert (
        make_meta("zarr").fingerprint != make_meta("zarr", transform={"resize": "box"}).fingerprint
    )


def test_another_store_is_refused_by_field(tmp_path, backend):
    create_store(tmp_path, make_meta(backend))
    create_store(tmp_path, make_meta(backend))
    with pytest.raises(StoreMismatch, match="transform.resize: 'bilinear' != 'box'"):
        create_store(tmp_path, make_meta(backend, transform={"resize": "box"}))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"codes": np.full((5, 16), K)}, "codebook has"),
        ({"codes": np.full((5, 16), -1)}, "codebook has"),
        ({"codes": np.zeros((5, 15), int)}, r"\[15\]"),
        ({"class_id": [1, 2]}, "5 keys"),
        ({"clas_id": [1] * 5}, "clas_id"),
    ],
)
def test_bad_rows_are_refused(tmp_path, backend, change, words):
    create_store(tmp_path, make_meta(backend))
    writer = ShardWriter(tmp_path, "a", source="a")
    with pytest.raises(ValueError, match=words):
        writer.add(make_rows(5, 0) | change)


def test_an_exception_leaves_nothing(tmp_path, backend):
    create_store(tmp_path, make_meta(backend))
    with pytest.raises(RuntimeError):
        with ShardWriter(tmp_path, "a", source="a") as writer:
            writer.add(make_rows(5, 0))
            raise RuntimeError
    assert finished_shards(tmp_path) == {} and list((tmp_path / "shards").iterdir()) == []


def commit_one(path, index):
    with ShardWriter(path, "a", source="a") as writer:
        writer.add(make_rows(50, index))


def test_two_writers_of_one_shard(tmp_path, backend):
    """Whoever is first stays; the store is whole whichever it was."""
    create_store(tmp_path, make_meta(backend))
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=commit_one, args=(tmp_path, i)) for i in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert all(process.exitcode == 0 for process in processes)
    codes = TokenStore(tmp_path).read_codes(slice(None))
    assert any(np.array_equal(codes, make_rows(50, i)["codes"]) for i in range(4))
    assert [entry.name for entry in (tmp_path / "shards").iterdir()] == ["a"]


def all_files(path):
    return sorted(p for p in path.rglob("*") if p.is_file())


def test_every_flipped_byte_is_found(tmp_path, backend):
    """Verify names the file, and reading the damaged part is refused."""
    from storage.cli import main

    write_store(tmp_path, backend)
    assert main(["verify", str(tmp_path)]) == 0
    rng = np.random.default_rng(0)
    for path in all_files(tmp_path):
        before = path.read_bytes()
        for _ in range(3):
            place, bit = int(rng.integers(len(before))), 1 << int(rng.integers(8))
            path.write_bytes(before[:place] + bytes([before[place] ^ bit]) + before[place + 1 :])
            assert main(["verify", str(tmp_path)]) != 0, f"{path} at {place}"
        path.write_bytes(before)
    assert main(["verify", str(tmp_path)]) == 0


def test_reader_refuses_damaged_codes(tmp_path, backend):
    write_store(tmp_path, backend)
    folder = tmp_path / "shards" / "00002"
    data = max((p for p in all_files(folder) if "codes" in str(p)), key=lambda p: p.stat().st_size)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 4
    data.write_bytes(content)
    store = TokenStore(tmp_path)
    store.read_codes([0])
    with pytest.raises(ValueError, match="damaged"):
        store.read_codes(slice(None))


def test_reader_refuses_a_damaged_table(tmp_path, backend):
    write_store(tmp_path, backend)
    path = tmp_path / "shards" / "00000" / "rows.parquet"
    content = bytearray(path.read_bytes())
    content[40] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="rows.parquet is damaged"):
        TokenStore(tmp_path).table(["key"])


def test_missing_and_extra_files_are_found(tmp_path, backend, capsys):
    from storage.cli import main

    write_store(tmp_path, backend)
    (tmp_path / "shards" / "00000" / "rows.parquet").unlink()
    (tmp_path / "shards" / "00002" / "note.txt").write_text("x")
    assert main(["verify", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert "rows.parquet is missing" in printed and "note.txt is not in the manifest" in printed


def test_a_shard_of_another_store_is_refused(tmp_path, backend):
    write_store(tmp_path / "a", backend)
    create_store(tmp_path / "b", make_meta(backend, transform={"resize": "box"}))
    (tmp_path / "a" / "shards" / "00000").rename(tmp_path / "b" / "shards" / "00000")
    with pytest.raises(StoreMismatch, match="another store"):
        TokenStore(tmp_path / "b")


def test_same_rows_same_bytes(tmp_path, backend):
    write_store(tmp_path / "a", backend)
    write_store(tmp_path / "b", backend)
    a, b = all_files(tmp_path / "a"), all_files(tmp_path / "b")
    assert [p.relative_to(tmp_path / "a") for p in a] == [p.relative_to(tmp_path / "b") for p in b]
    assert [p.read_bytes() for p in a] == [p.read_bytes() for p in b]


def test_codebook_usage_by_hand(tmp_path, backend):
    create_store(tmp_path, make_meta(backend))
    codes = np.zeros((4, 16), int)
    codes[:, 8:] = 7
    with ShardWriter(tmp_path, "a", source="a") as writer:
        writer.add({"codes": codes, "key": list("abcd")})
    usage = codebook_usage(TokenStore(tmp_path))
    assert usage["used"] == 2 and usage["perplexity"] == pytest.approx(2.0)
    assert usage["entropy_bits"] == pytest.approx(1.0)


def test_command_line(tmp_path, backend, capsys):
    from storage.cli import main

    write_store(tmp_path, backend)
    assert main(["info", str(tmp_path), "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert info["rows"] == 330 and info["skipped"] == 3 and info["backend"] == backend
    assert info["skip_reasons"] == {"not an image": 3}
    assert main(["stats", str(tmp_path)]) == 0
    assert "perplexity" in capsys.readouterr().out
    assert (tmp_path / "stats.png").read_bytes().startswith(b"\x89PNG")
    assert main(["info", str(tmp_path / "nowhere")]) == 2
    assert "not a token store" in capsys.readouterr().err


# Stock tools, without one import of ours from here on (the store is written above).


def test_stock_zarr(tmp_path):
    import zarr

    rows = write_store(tmp_path, "zarr")
    array = zarr.open_array(tmp_path / "shards" / "00000" / "codes.zarr", mode="r")
    np.testing.assert_array_equal(array[10:20], rows[0]["codes"][10:20])
    assert array.metadata.zarr_format == 3 and array.dtype == np.uint16


def test_stock_pyarrow_and_polars_on_codes(tmp_path):
    import polars
    import pyarrow as pa

    rows = write_store(tmp_path, "arrow")
    path = tmp_path / "shards" / "00000" / "codes.arrow"
    with pa.memory_map(str(path)) as source:
        table = pa.ipc.open_file(source).read_all()
        assert table["codes"][3].as_py() == rows[0]["codes"][3].tolist()
    frame = polars.read_ipc(path)
    np.testing.assert_array_equal(frame["codes"].to_numpy(), rows[0]["codes"])


def test_stock_duckdb_polars_pyarrow_on_rows(tmp_path, backend):
    import duckdb
    import polars
    import pyarrow.dataset

    rows = write_store(tmp_path, backend)
    wanted = int(sum((part["class_id"] == 3).sum() for part in rows))
    pattern = str(Path(tmp_path) / "shards" / "*" / "rows.parquet")
    query = f"select count(*) from '{pattern}' where class_id = 3"
    assert duckdb.sql(query).fetchall()[0][0] == wanted
    frame = polars.scan_parquet(pattern).filter(polars.col("class_id") == 3).collect()
    assert len(frame) == wanted
    files = [str(p) for p in tmp_path.glob("shards/*/rows.parquet")]
    dataset = pyarrow.dataset.dataset(files)
    assert dataset.count_rows(filter=pyarrow.dataset.field("class_id") == 3) == wanted


def test_damaged_json_is_named(tmp_path, backend):
    write_store(tmp_path, backend)
    path = tmp_path / "store.json"
    path.write_text(path.read_text().replace('"resolution": 32', '"resolution": 64'))
    with pytest.raises(ValueError, match="store.json is damaged"):
        read_json(path)


def test_a_deleted_shard_is_found(tmp_path, backend, capsys):
    from storage.cli import main
    from storage.writer import expect_shards

    write_store(tmp_path, backend)
    expect_shards(tmp_path, ["00000", "00001"])
    expect_shards(tmp_path, ["00002"])
    assert main(["verify", str(tmp_path)]) == 0
    shutil.rmtree(tmp_path / "shards" / "00001")
    assert main(["verify", str(tmp_path)]) == 1
    assert "00001" in capsys.readouterr().out
    assert TokenStore(tmp_path).missing_shards() == ["00001"]


def test_an_empty_store(tmp_path, backend):
    create_store(tmp_path, make_meta(backend))
    store = TokenStore(tmp_path)
    assert len(store) == 0 and len(store.skipped()) == 0 and len(store.table()) == 0
    assert store.read_codes(slice(None)).shape == (0, 16)


def test_the_place_of_the_tokenizer_does_not_matter(tmp_path):
    meta, moved = make_meta("zarr"), make_meta("zarr")
    moved.tokenizers["codes"].name = "elsewhere/vq"
    assert meta.fingerprint == moved.fingerprint
    create_store(tmp_path, meta)
    assert create_store(tmp_path, moved).tokenizers["codes"].name == "vq"


def test_a_failing_writer_leaves_the_others_alone(tmp_path):
    with atomic_directory(tmp_path / "a") as live:
        (live / "file").write_text("x")
        with pytest.raises(RuntimeError):
            with atomic_directory(tmp_path / "a"):
                raise RuntimeError
    assert (tmp_path / "a" / "file").read_text() == "x"


def test_a_missing_file_inside_atomic_file_is_an_error(tmp_path):
    (tmp_path / "a").write_text("old")
    with pytest.raises(FileNotFoundError):
        with atomic_file(tmp_path / "a"):
            open(tmp_path / "nowhere")
    assert (tmp_path / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
