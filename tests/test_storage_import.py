"""Import: codes as open-muse, LlamaGen and 1d-tokenizer wrote them become rows; nothing is lost."""

import io
import json
import os
import pickle
import tarfile
import zipfile

import numpy as np
import pyarrow as pa
import pytest
import torch
import webdataset
from filled_store import content, kill_at_every_step
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.fingerprint import fingerprint
from storage.foreign_codes import json_lines_parts, llamagen_parts, webdataset_parts
from storage.import_codes import import_parts, imported_meta, imported_tokenizer
from storage.pth_tensor import read_pth
from storage.reader import TokenStore
from storage.tombstones import drop
from storage.verify import verify_store

K, N = 50, 16
TOKENIZER = imported_tokenizer("openMUSE/vqgan-f16-8192-laion", K, [4, 4])
META = imported_meta(64, TOKENIZER)
F16 = "openMUSE.vqgan-f16-8192-laion.pth"


def codes_of(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, K, shape)


def npy(array):
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def pth(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


def write_pre_encoded(path, count=5, seed=0):
    """A tar as open-muse's scripts/pre_encode.py writes it; returns the f16 codes."""
    codes = torch.from_numpy(codes_of(count, N, seed=seed))
    with webdataset.TarWriter(str(path)) as writer:
        for index in range(count):
            metadata = {"key": f"{index:09d}", "caption": f"no. {index}", "original_width": 640}
            metadata |= {"aesthetic": index / 2, "attention_mask_length": 7, "exif": {"a": 1}}
            sample = {"__key__": f"{index:09d}", "json": metadata, F16: codes[index].clone()}
            sample["openMUSE.paellavq-f8-8192-laion.pth"] = torch.zeros(64, dtype=torch.int64)
            sample["openMUSE.CLIP.pth"] = torch.zeros(7, 8, dtype=torch.float16)
            writer.write(sample)
    return codes.numpy()


def test_open_muse_tars(tmp_path):
    codes = [write_pre_encoded(tmp_path / f"{i:05d}.tar", seed=i) for i in range(2)]
    extra = pa.schema([("aesthetic", pa.float32())])
    tars = [str(tmp_path / f"{i:05d}.tar") for i in range(2)]
    parts = webdataset_parts(tars, {"codes": F16}, extra)
    summary = import_parts(tmp_path / "store", META, parts)
    assert (summary.parts, summary.rows, summary.rejected) == (2, 10, 0)
    store = TokenStore(tmp_path / "store")
    np.testing.assert_array_equal(store.read_codes(slice(None)), np.concatenate(codes))
    assert store.shards == ["00000", "00001"] and not verify_store(tmp_path / "store")
    assert store.table(rows=[6]).to_pylist()[0] | {"crop_top": 0} == {
        **dict.fromkeys(store.columns), "key": "000000001", "caption": "no. 1", "crop_top": 0,
        "original_width": 640, "aesthetic": 0.5, "source": tars[1],
    }  # fmt: skip
    assert store.meta.tokenizers["codes"].fingerprint == fingerprint(["imported", TOKENIZER.name])
    assert len(store.rows_where("aesthetic >= 1")) == 6


def test_npy_tars_with_labels(tmp_path):
    codes = codes_of(3, 4, 4)
    members = []
    for index in range(3):
        members += [(f"in/{index}.npy", npy(codes[index])), (f"in/{index}.cls", b"7")]
    tar = write_tar(tmp_path / "a.tar", [*members, ("in/2.txt", "ünï".encode())])
    import_parts(tmp_path / "store", META, webdataset_parts([tar]))
    store = TokenStore(tmp_path / "store")
    np.testing.assert_array_equal(store.read_codes([2, 0]), codes.reshape(3, N)[[2, 0]])
    assert store.read_column("class_id").tolist() == [7, 7, 7]
    assert store.table(["key", "caption"]).to_pylist()[2] == {"key": "in/2", "caption": "ünï"}


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


GOOD = npy(codes_of(N))
BAD = {
    "no codes.npy": [("a.npy", GOOD), ("b.npy", GOOD)],
    "no a.npy": [("cls", b"1")],
    "wrong size": [("npy", npy(codes_of(N - 1)))],
    "wrong size: codes is [0]": [("npy", npy(codes_of(0)))],
    "code out of range: 50..50": [("npy", npy(np.full(N, K)))],
    "code out of range: -1..0": [("npy", npy(np.arange(N) // -N))],
    "no integers: codes is float64": [("npy", npy(np.zeros(N)))],
    "unreadable npy": [("npy", GOOD[:100])],
    "unreadable npy: Object arrays": [("npy", npy(np.array([Evil()])))],
    "unreadable x.pth: not a tensor": [("x.pth", b"PK")],
    "unreadable x.pth: a dict": [("x.pth", pth({"codes": 1}))],
    "unreadable cls": [("npy", GOOD), ("cls", b"cat")],
    "unreadable json: Expecting": [("npy", GOOD), ("json", b"{")],
    "unreadable json: not an object": [("npy", GOOD), ("json", b"[]")],
    "unreadable txt": [("npy", GOOD), ("txt", b"\xff")],
    "duplicate member: bad.npy": [("npy", GOOD), ("npy", GOOD)],
    "negative class": [("npy", GOOD), ("cls", b"-3")],
    "unfit label: Value 3000000000": [("npy", GOOD), ("cls", b"3000000000")],
    "unfit label: Could not convert": [("npy", GOOD), ("json", b'{"original_width": "wide"}')],
    "unfit label: 'utf-8'": [("npy", GOOD), ("json", b'{"caption": "\\ud800"}')],
}


@pytest.mark.parametrize("reason", BAD)
def test_what_is_no_row_is_listed_with_its_reason(tmp_path, reason):
    members = {"codes": "a.npy"} if reason == "no a.npy" else None
    good = "a.npy" if members else "npy"
    names = [("1", good, GOOD), *(("bad", *part) for part in BAD[reason]), ("2", good, GOOD)]
    tar = write_tar(tmp_path / "a.tar", [(f"{key}.{suffix}", data) for key, suffix, data in names])
    summary = import_parts(tmp_path / "store", META, webdataset_parts([tar], members))
    store = TokenStore(tmp_path / "store")
    assert (summary.rows, summary.rejected) == (2, 1)
    assert store.read_column("key").tolist() == ["1", "2"]
    (skipped,) = store.skipped().to_pylist()
    assert (skipped["key"], skipped["source"]) == ("bad", tar)
    assert skipped["reason"].startswith(reason)


def test_a_tar_cut_short_keeps_what_came_before(tmp_path):
    tar = tmp_path / "a.tar"
    write_tar(tar, [(f"{index}.npy", GOOD) for index in range(4)])
    tar.write_bytes(tar.read_bytes()[: 3 * 1024 + 600])
    summary = import_parts(tmp_path / "store", META, webdataset_parts([str(tar)]))
    assert (summary.rows, summary.rejected) == (3, 1)
    assert "cut short" in TokenStore(tmp_path / "store").skipped()["reason"][0].as_py()


def test_a_part_without_any_row_is_an_error_and_leaves_no_shard(tmp_path):
    members = [(f"{index}.npy", npy(np.full(N, K))) for index in range(3)]
    tar = write_tar(tmp_path / "a.tar", members)
    with pytest.raises(ValueError, match="all of its 3 samples .* code out of range: 50..50"):
        import_parts(tmp_path / "store", META, webdataset_parts([tar]))
    assert len(TokenStore(tmp_path / "store").shards) == 0


def write_llamagen(folder, images, views):
    codes = codes_of(images, views, N)
    for part in ("codes", "labels"):
        (folder / f"imagenet64_{part}").mkdir(parents=True)
    for index in range(images):
        np.save(folder / f"imagenet64_codes/{index}.npy", codes[index : index + 1])
        np.save(folder / f"imagenet64_labels/{index}.npy", np.array([index % 3]))
    return codes


@pytest.mark.parametrize(("views", "order"), [(2, [0, 1]), (10, [2, 3, 4, 5, 0, 6, 7, 8, 9, 1])])
def test_llamagen_folders(tmp_path, views, order):
    codes = write_llamagen(tmp_path / "in", 12, views)
    import_parts(tmp_path / "store", META, llamagen_parts(tmp_path / "in", 5))
    store = TokenStore(tmp_path / "store")
    assert store.shards == [f"imagenet64_codes-{index:05d}" for index in range(3)]
    np.testing.assert_array_equal(store.read_codes(slice(None)), codes.reshape(-1, N))
    assert store.read_column("view").tolist() == order * 12
    assert store.read_column("key")[::views].tolist() == [str(index) for index in range(12)]
    assert store.read_column("class_id")[::views].tolist() == [0, 1, 2] * 4


def test_llamagen_files_without_their_twin_are_rejected(tmp_path):
    write_llamagen(tmp_path / "in", 4, 2)
    (tmp_path / "in/imagenet64_labels/1.npy").unlink()
    (tmp_path / "in/imagenet64_codes/2.npy").unlink()
    (tmp_path / "in/imagenet64_codes/3.npy").write_bytes(b"")
    assert import_parts(tmp_path / "store", META, llamagen_parts(tmp_path / "in")).rejected == 3
    reasons = TokenStore(tmp_path / "store").skipped()["reason"].to_pylist()
    kinds = [reason.split(":")[0] for reason in reasons]
    assert kinds == ["no imagenet64_labels", "no imagenet64_codes", "unreadable imagenet64_codes"]
    with pytest.raises(FileNotFoundError, match="0 folders"):
        llamagen_parts(tmp_path)


def write_lines(path, count, views, seed=0):
    codes = codes_of(count, N, seed=seed)
    lines = [
        json.dumps({"class_id": index // views % 7, "tokens": row.tolist()}) + "\n"
        for index, row in enumerate(codes)
    ]
    path.write_text("".join(lines))
    return codes


@pytest.mark.parametrize("views", [1, 10])
def test_1d_tokenizer_json_lines(tmp_path, views):
    codes = write_lines(tmp_path / "maskgitvq.jsonl", 50, views)
    parts = json_lines_parts(tmp_path / "maskgitvq.jsonl", 20, views)
    import_parts(tmp_path / "store", META, parts)
    store = TokenStore(tmp_path / "store")
    assert store.shards == [f"maskgitvq-{index:05d}" for index in range(3)]
    np.testing.assert_array_equal(store.read_codes(slice(None)), codes)
    assert store.read_column("class_id").tolist() == [index // views % 7 for index in range(50)]
    assert store.read_column("key").tolist() == [str(index // views) for index in range(50)]
    found = store.table(["view"])["view"].to_pylist()
    assert found == ([None] * 50 if views == 1 else [2, 3, 4, 5, 0, 6, 7, 8, 9, 1] * 5)


def test_json_lines_that_are_none(tmp_path):
    path = tmp_path / "a.jsonl"
    write_lines(path, 30, 10)
    lines = path.read_text().splitlines()
    lines[3], lines[14] = lines[3][:40], json.dumps({"class_id": 1, "tokens": "none"})
    path.write_text("\n".join([*lines, ""]))
    summary = import_parts(tmp_path / "store", META, json_lines_parts(path, views=10))
    assert (summary.rows, summary.rejected) == (28, 2)
    assert TokenStore(tmp_path / "store").skipped()["key"].to_pylist() == ["0", "1"]
    with pytest.raises(ValueError, match="line 10 is of class 1.*try views=1"):
        import_parts(tmp_path / "other", META, json_lines_parts(path, 9_000, views=30))
    path.write_text("[" + ",".join(lines) + "]")
    with pytest.raises(ValueError, match="jq -c"):
        json_lines_parts(path)
    with pytest.raises(ValueError, match="no multiple of views=7"):
        json_lines_parts(path, views=7)


def test_killed_anywhere_it_goes_on(tmp_path):
    write_lines(tmp_path / "a.jsonl", 20, 1)
    parts = json_lines_parts(tmp_path / "a.jsonl", 10)

    def action():
        import_parts(tmp_path / "store", META, parts)

    assert kill_at_every_step(action, None, tmp_path / "store", stride=2) > 20
    assert (tmp_path / "store/sealed.json").is_file()


def test_processes_write_the_same_store(tmp_path):
    write_lines(tmp_path / "a.jsonl", 40, 1)
    parts = json_lines_parts(tmp_path / "a.jsonl", 10)
    first = import_parts(tmp_path / "one", META, parts)
    second = import_parts(tmp_path / "two", META, parts, workers=2)
    assert first == second and content(tmp_path / "one") == content(tmp_path / "two")


def test_a_second_run_does_what_is_left_and_refuses_what_is_not_the_same(tmp_path):
    store, path = tmp_path / "store", tmp_path / "a.jsonl"
    write_lines(path, 30, 1)
    parts = json_lines_parts(path, 10)
    assert import_parts(store, META, parts, dry_run=True).finished_before == 0
    assert not store.exists()
    import_parts(store, META, parts[:2])
    assert TokenStore(store).missing_shards() == []
    drop(store, "key", ["3"])
    summary = import_parts(store, META, parts)
    assert (summary.parts, summary.finished_before, summary.rows) == (3, 2, 10)
    assert len(TokenStore(store)) == 29
    with pytest.raises(ValueError, match="was made from .*:0..9, not .*:0..14"):
        import_parts(store, META, json_lines_parts(path, 15))
    with pytest.raises(ValueError, match="codebook_size"):
        other = imported_meta(64, imported_tokenizer(TOKENIZER.name, K + 1, [4, 4]))
        import_parts(store, other, parts)
    with pytest.raises(ValueError, match="several parts would become the shard 'a'"):
        import_parts(store, META, webdataset_parts(["x/a.tar", "y/a.tar.gz"]))


INTEGERS = st.sampled_from([torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])


@settings(max_examples=50, deadline=None)
@given(INTEGERS, st.lists(st.integers(0, 4), max_size=3), st.booleans(), st.integers(0, 2))
def test_pth_files_are_read_as_torch_reads_them(dtype, shape, transposed, first):
    tensor = torch.arange(int(np.prod(shape)) + first).to(dtype)[first:].reshape(shape)
    tensor = tensor.mT if transposed and tensor.ndim > 1 else tensor
    found = read_pth(pth(tensor))
    assert found.dtype == tensor.numpy().dtype
    np.testing.assert_array_equal(found, tensor.numpy())


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_damaged_pth_is_refused_or_still_the_same(data):
    whole = pth(torch.arange(5))
    damaged = bytearray(whole)
    damaged[data.draw(st.integers(0, len(whole) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        assert read_pth(bytes(damaged)).tolist() == [0, 1, 2, 3, 4]
    except ValueError:
        pass


@pytest.mark.parametrize("value", [Evil(), torch.zeros(3), torch.nn.Linear(1, 1), [1, 2]])
def test_a_pth_runs_nothing(tmp_path, monkeypatch, value):
    monkeypatch.chdir(tmp_path)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(value))
    for damaged in (file.getvalue(), pth(value)):
        with pytest.raises(ValueError, match="tensor"):
            read_pth(damaged)
    assert not list(tmp_path.iterdir())
