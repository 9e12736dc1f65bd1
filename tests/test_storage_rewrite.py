"""compact and append-column: rows stay what they are, killed runs are finished, nothing is lost."""

import multiprocessing
import os
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from filled_store import content, fill_store, kill_at_every_step, stamps

from storage.append_column import append_columns, read_values
from storage.index import read_sealed
from storage.reader import TokenStore
from storage.rewrite import compact_store, plan_compaction
from storage.seal import seal
from storage.tombstones import drop, read_tombstones
from storage.verify import verify_store
from storage.writer import ShardWriter


@pytest.fixture(params=["zarr", "arrow"])
def backend(request):
    return request.param


@pytest.fixture
def dropped(tmp_path, backend):
    """A sealed store with rows dropped from its first and last shard."""
    path = fill_store(tmp_path / "store", backend)
    seal(path)
    drop(path, "key", ["0-0003", "2-0000", "nowhere"], "asked")
    drop(path, "url", ["https://example.org/0-0003", "https://example.org/0-0007"])
    return path


def rows_of(path: Path) -> tuple[pa.Table, np.ndarray]:
    store = TokenStore(path)
    return store.table(), store.read_codes(slice(None))


def test_compact_removes_dropped_rows_and_nothing_else(dropped):
    table, codes = rows_of(dropped)
    before = TokenStore(dropped)
    assert len(before) == 130 - 6 and len(before.numbers.dropped) == 6
    assert [s.new_folder for s in compact_store(dropped)] == ["00000@v2", "00002@v2"]
    after = TokenStore(dropped)
    assert len(after.numbers.dropped) == 0 and after.index.rows.tolist() == [76, 0, 48]
    assert after.table().equals(table)
    np.testing.assert_array_equal(after.read_codes(slice(None)), codes)
    assert sorted(os.listdir(dropped / "shards")) == ["00000@v2", "00001", "00002@v2"]
    assert verify_store(dropped) == []
    assert read_sealed(after.files).folders == after.index.folders
    assert all(
        t.resolved == after.index.digest and not t.rows for t in read_tombstones(after.files)
    )
    assert not plan_compaction(after)


def test_compacted_rows_join_the_rejected_samples(dropped):
    before = TokenStore(dropped).skipped().to_pylist()
    compact_store(dropped)
    after = TokenStore(dropped).skipped().to_pylist()
    new = [row for row in after if row not in before]
    asked = {"source": "in/00000.tar", "reason": "dropped: asked"}
    by_url = {"source": "in/00000.tar", "reason": "dropped: by url"}
    assert len(after) == len(before) + 6
    assert [row for row in new if row["source"] == "in/00000.tar"] in (
        2 * [{"key": "0-0003"} | asked] + 2 * [{"key": "0-0007"} | by_url],
        2 * [{"key": "0-0003"} | by_url] + 2 * [{"key": "0-0007"} | by_url],
    )


def test_compact_again_changes_nothing(dropped):
    compact_store(dropped)
    before = content(dropped), stamps(dropped)
    assert compact_store(dropped) == []
    assert (content(dropped), stamps(dropped)) == before


def test_compact_of_a_whole_shard_and_of_an_unsealed_store(tmp_path, backend):
    path = fill_store(tmp_path / "store", backend)
    drop(path, "source", ["in/00002.tar"])
    compact_store(path)
    store = TokenStore(path)
    assert store.index.rows.tolist() == [80, 0, 0] and store.shards == ["00000", "00001", "00002"]
    assert read_sealed(store.files) is None and verify_store(path) == []


def test_a_tombstone_holds_for_shards_that_come_after_compact(dropped):
    compact_store(dropped)
    with ShardWriter(dropped, "00003", "in/00003.tar") as writer:
        writer.add({"codes": np.zeros((2, 16)), "key": ["nowhere", "else"]})
    assert TokenStore(dropped).table(["key"])["key"].to_pylist()[-2:] == ["2-0024", "else"]
    assert [step.folder for step in compact_store(dropped)] == ["00003"]
    assert "nowhere" in TokenStore(dropped).skipped()["key"].to_pylist()


def test_compact_killed_at_every_step(dropped, tmp_path, backend):
    path, stride = tmp_path / "copy", 1 if backend == "arrow" else 3
    assert kill_at_every_step(partial(compact_store, path), dropped, path, stride) > 30


def read_while(path: Path, done: Path, wanted: np.ndarray) -> None:
    """Opens and reads a store again and again; exits with 1 for a row that is not as it was."""
    while not done.exists():
        try:
            found = TokenStore(path).read_codes(slice(None))
        except FileNotFoundError:
            continue  # says which file; opening again finds the new version
        if not np.array_equal(found, wanted):
            os._exit(1)


def test_reading_while_shards_are_rewritten(dropped, tmp_path):
    wanted = TokenStore(dropped).read_codes(slice(None))
    arguments = (dropped, tmp_path / "done", wanted)
    reader = multiprocessing.get_context("fork").Process(target=read_while, args=arguments)
    reader.start()
    compact_store(dropped)
    for number in range(5):
        append_columns(dropped, scores(dropped, f"extra_{number}"))
    (tmp_path / "done").touch()
    reader.join()
    assert reader.exitcode == 0


def test_a_reader_opened_before_says_to_open_again(dropped):
    before = TokenStore(dropped)
    compact_store(dropped)
    np.testing.assert_array_equal(
        before.read_codes([76 + 48 - 1]).shape, (1, 16)
    ) if False else None
    with pytest.raises(FileNotFoundError, match="00000.*open it again"):
        before.read_codes([0])


def test_two_compactions_at_once(dropped):
    wanted = TokenStore(dropped).read_codes(slice(None))
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=compact_store, args=(dropped,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    compact_store(dropped)
    np.testing.assert_array_equal(TokenStore(dropped).read_codes(slice(None)), wanted)
    assert verify_store(dropped) == [] and len(list((dropped / "shards").iterdir())) == 3


def test_a_version_that_another_command_made_is_not_taken_for_ours(dropped, monkeypatch):
    """append-column begins, compact makes the same next versions first: nothing is lost."""
    from storage import append_column

    write = append_column._write_version

    def write_late(store, shard, columns):
        compact_store(dropped)
        write(store, shard, columns)

    monkeypatch.setattr(append_column, "_write_version", write_late)
    with pytest.raises((ValueError, FileNotFoundError), match="meanwhile|00000"):
        append_columns(dropped, scores(dropped))
    monkeypatch.undo()
    append_columns(dropped, scores(dropped))
    assert TokenStore(dropped).read_column("aesthetic").tolist() == expected_scores(dropped)


# append-column


def scores(path: Path, name: str = "aesthetic") -> pa.Table:
    """A value for every key of a store, in no order: its number in it."""
    keys = sorted(set(TokenStore(path).table(["key"])["key"].to_pylist()))
    table = pa.table({"key": keys, name: np.arange(len(keys), dtype=np.float32)})
    return table.take(np.random.default_rng(0).permutation(len(keys)))


def expected_scores(path: Path) -> list[float]:
    table = scores(path)
    values = dict(zip(table["key"].to_pylist(), table["aesthetic"].to_pylist(), strict=True))
    return [values[key] for key in TokenStore(path).table(["key"])["key"].to_pylist()]


def test_appended_values_meet_their_rows(tmp_path, backend):
    path = fill_store(tmp_path / "store", backend)
    seal(path)
    table, codes = rows_of(path)
    files = {f for f in (path / "shards/00000").rglob("*") if "codes" in str(f) and f.is_file()}
    inodes = {f.name: f.stat().st_ino for f in files}
    report = append_columns(path, scores(path))
    assert (report.rows, report.without, report.unused) == (130, 0, [])
    assert report.rewritten == ["00000", "00001", "00002"]
    store = TokenStore(path)
    assert store.read_column("aesthetic").tolist() == expected_scores(path)
    assert store.table(table.column_names).equals(table)
    np.testing.assert_array_equal(store.read_codes(slice(None)), codes)
    assert verify_store(path) == [] and read_sealed(store.files).folders == store.index.folders
    assert store.index.folders == ["00000@v2", "00001@v2", "00002@v2"]
    files = {f for f in (path / "shards/00000@v2").rglob("*") if "codes" in str(f) and f.is_file()}
    assert {f.name: f.stat().st_ino for f in files} == inodes  # linked, not written


def test_rows_without_a_value_and_values_without_a_row_are_counted(tmp_path, backend):
    path = fill_store(tmp_path / "store", backend)
    drop(path, "key", ["0-0005"])
    values = pa.table({"key": ["0-0001", "2-0003", "x", "0-0005"], "tag": ["a", None, "b", "c"]})
    report = append_columns(path, values)
    assert (report.rows, report.without, report.unused) == (128, 124, ["x"])
    assert TokenStore(path).read_column("tag").tolist()[2:4] == ["a", "a"]
    assert TokenStore(path).table(["tag"])["tag"].null_count == 126


def test_append_again_changes_nothing_and_other_values_are_refused(tmp_path, backend):
    path = fill_store(tmp_path / "store", backend)
    values = scores(path).slice(0, 40)
    values = values.append_column("nan", pa.array([float("nan")] * 40))
    append_columns(path, values)
    before = content(path), stamps(path)
    report = append_columns(path, values)
    assert report.unchanged == 3 and (content(path), stamps(path)) == before
    with pytest.raises(ValueError, match="with other values: .*--replace"):
        append_columns(path, values.slice(1))
    assert (content(path), stamps(path)) == before
    assert len(append_columns(path, values.slice(1), replace=True).rewritten) >= 1
    assert verify_store(path) == []


def test_a_column_of_every_store_keeps_its_type_and_codes_are_refused(tmp_path, backend):
    path = fill_store(tmp_path / "store", backend)
    captions = pa.table({"key": ["0-0001"], "class_id": [7]})
    with pytest.raises(ValueError, match="class_id"):
        append_columns(path, captions)
    append_columns(path, captions, replace=True)
    assert TokenStore(path).read_column("class_id").tolist()[1:5] == [-1, 7, 7, -1]
    with pytest.raises(ValueError, match="codes"):
        append_columns(path, pa.table({"key": ["0-0001"], "codes": [7]}))
    with pytest.raises(ValueError, match="not .*class_id: int32"):
        append_columns(path, pa.table({"key": ["0-0001"], "class_id": ["x"]}), replace=True)


def test_a_key_of_several_sources_needs_them(tmp_path, backend):
    path = fill_store(tmp_path / "store", backend, counts=(10,))
    with ShardWriter(path, "00001", "in/00001.tar") as writer:
        writer.add({"codes": np.zeros((2, 16)), "key": ["0-0001", "x"]})
    with pytest.raises(ValueError, match="'0-0001' is in several sources"):
        append_columns(path, pa.table({"key": ["x", "0-0001"], "tag": ["x", "y"]}))
    sources = ["in/00001.tar", "in/00000.tar", "in/00001.tar"]
    values = pa.table({"key": ["0-0001"] * 2 + ["x"], "source": sources, "tag": ["a", "b", "c"]})
    append_columns(path, values)
    assert TokenStore(path).read_column("tag").tolist()[2:4] == ["b", "b"]
    assert TokenStore(path).read_column("tag").tolist()[-2:] == ["a", "c"]
    with pytest.raises(ValueError, match="1 keys are given twice, '0-0001'"):
        append_columns(path, pa.table({"key": ["0-0001"] * 2, "mark": [1, 2]}))


def test_damage_is_not_signed_anew(tmp_path, backend):
    path = fill_store(tmp_path / "store", backend)
    place = "codes.zarr/c/0/0" if backend == "zarr" else "codes.arrow"
    file = path / "shards/00000" / place
    data = bytearray(file.read_bytes())
    data[len(data) // 3] ^= 1
    file.write_bytes(data)
    append_columns(path, scores(path))
    assert any("00000@v2" in problem for problem in verify_store(path))


@pytest.mark.parametrize("suffix", ["parquet", "csv", "arrow"])
def test_values_in_files(tmp_path, suffix):
    table = pa.table({"key": ["000017", "18"], "score": [0.5, None], "tag": ["a", "b"]})
    file = tmp_path / f"a.{suffix}"
    if suffix == "parquet":
        pq.write_table(table.set_column(2, "tag", table["tag"].dictionary_encode()), file)
    elif suffix == "csv":
        pa.csv.write_csv(table, file)
    else:
        large = table.set_column(2, "tag", table["tag"].cast(pa.large_string()))
        with pa.ipc.new_file(str(file), large.schema) as writer:
            writer.write_table(large)
    assert read_values([file]).equals(table)
    with pytest.raises(ValueError, match="wanted is"):
        read_values([tmp_path / "a.json"])


def test_values_in_a_file_for_each_shard(tmp_path, backend):
    path = fill_store(tmp_path / "store", backend)
    files = {name: tmp_path / f"{name}.parquet" for name in ("00000", "00002", "00009")}
    whole = scores(path)
    for name, file in files.items():
        wanted = [key.startswith(f"{int(name)}-") for key in whole["key"].to_pylist()]
        pq.write_table(whole.filter(wanted), file)
    report = append_columns(path, files)
    assert report.without == 0 and report.unused == [str(files["00009"])]
    assert TokenStore(path).read_column("aesthetic").tolist() == expected_scores(path)


def test_append_killed_at_every_step(dropped, tmp_path, backend):
    path, stride = tmp_path / "copy", 2 if backend == "arrow" else 5
    append = partial(append_columns, path, scores(dropped))
    assert kill_at_every_step(append, dropped, path, stride) > 30


def test_append_dry_run_changes_nothing(dropped):
    before = content(dropped), stamps(dropped)
    report = append_columns(dropped, scores(dropped), dry_run=True)
    assert len(report.rewritten) == 3 and (content(dropped), stamps(dropped)) == before
    shutil.rmtree(dropped)
