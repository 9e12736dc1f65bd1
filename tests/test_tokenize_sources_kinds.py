"""Every kind of source: ImageNet's, tables, saved datasets, lists, globs, buckets."""

import io
import json
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_tokenize_hostile import END, member

from configs.load import load_config
from tokenize_stage.config import TokenizeConfig
from tokenize_stage.sources.config import ColumnsConfig, DatasetConfig
from tokenize_stage.sources.input_shards import list_input_shards
from tokenize_stage.sources.read import ReadPatience, SourceFailed, read_samples
from tokenize_stage.sources.sample import InputShard, Sample, Skipped
from tokenize_stage.sources.tables import divide_rows

WNIDS = ("n01440764", "n01443537", "n02012849")
BIG = ReadPatience(attempts=1)


def listed(path: object, **options: object) -> list[InputShard]:
    shards = list_input_shards(DatasetConfig(path, **options))  # type: ignore[arg-type]
    assert [InputShard.from_json(json.loads(json.dumps(s.to_json()))) for s in shards] == shards
    return shards


def read(path: object, **options: object) -> list[Sample]:
    """The samples of all shards; none is skipped."""
    found = [sample for shard in listed(path, **options) for sample in read_samples(shard, BIG)]
    assert all(isinstance(sample, Sample) for sample in found), found
    return found  # type: ignore[return-value]


# ImageNet


INDEX_FILES = {
    "keras.json": json.dumps({"0": [WNIDS[2], "crane"], "1": [WNIDS[0], "tench"],
                              "2": [WNIDS[1], "crane"]}),
    "numbers.json": json.dumps({WNIDS[2]: 0, WNIDS[0]: 1, WNIDS[1]: 2}),
    "lines.txt": "\n".join((WNIDS[2], WNIDS[0], WNIDS[1])) + "\n",
    "synsets.txt": f"{WNIDS[2]} crane\n{WNIDS[0]} tench, Tinca\n{WNIDS[1]} crane\n",
}  # fmt: skip
INDEX_NAMES = {
    "keras.json": (f"crane ({WNIDS[2]})", "tench", f"crane ({WNIDS[1]})"),
    "synsets.txt": (f"crane ({WNIDS[2]})", "tench, Tinca", f"crane ({WNIDS[1]})"),
}


@pytest.fixture
def imagenet(tmp_path: Path) -> Path:
    for number, wnid in enumerate(WNIDS):
        (tmp_path / "train" / wnid).mkdir(parents=True)
        for image in range(2):
            name = f"{wnid}_{image}.JPEG"
            (tmp_path / "train" / wnid / name).write_bytes(b"%d %d" % (number, image))
    for name, content in INDEX_FILES.items():
        (tmp_path / name).write_text(content)
    return tmp_path


def class_tar(folder: Path) -> bytes:
    files = sorted(folder.iterdir())
    return b"".join(member(file.name, file.read_bytes()) for file in files) + END


@pytest.mark.parametrize("index", INDEX_FILES)
def test_an_image_folder_with_a_class_index(imagenet: Path, index: str) -> None:
    (shard,) = listed(f"{imagenet}/train", class_index=f"{imagenet}/{index}")
    assert shard.class_names == INDEX_NAMES.get(index, (WNIDS[2], WNIDS[0], WNIDS[1]))
    found = {sample.key: sample.class_id for sample in read_samples(shard)}
    expected = dict(zip(WNIDS, (1, 2, 0), strict=True))
    assert found == {f"{w}/{w}_{i}.JPEG": expected[w] for w in WNIDS for i in range(2)}


@pytest.mark.parametrize(
    "content, reason",
    [
        ('{"0": ["n01440764", "tench"]}', "class 'n01443537' is not in dataset.class_index"),
        ('{"n01440764": 0, "n01443537": 5}', "the numbers are not 0, 1, 2"),
        ('{"n01440764": 0, "n01443537": 0}', "the numbers are not 0, 1, 2"),
        ('{"0": ["n01440764", "a"], "1": ["n01440764", "b"]}', "'n01440764' is there twice"),
        ("[1, 2]", "is neither"),
        ("{", "is neither"),
    ],
)
def test_a_class_index_that_cannot_be_right(imagenet: Path, content: str, reason: str) -> None:
    (imagenet / "bad.json").write_text(content)
    with pytest.raises(ValueError, match=reason):
        listed(f"{imagenet}/train", class_index=f"{imagenet}/bad.json")


def test_imagenet_as_class_tars_and_as_the_tar_of_them(imagenet: Path) -> None:
    whole = b""
    for wnid in WNIDS:
        (imagenet / f"{wnid}.tar").write_bytes(content := class_tar(imagenet / "train" / wnid))
        whole += member(f"{wnid}.tar", content)
    (imagenet / "ILSVRC2012_img_train.tar").write_bytes(whole + END)
    for path in (f"{imagenet}/n*.tar", f"{imagenet}/ILSVRC2012_img_train.tar"):
        shards = listed(path)
        assert [shard.name for shard in shards] == [*WNIDS]
        assert {shard.class_names for shard in shards} == {WNIDS}
        expected = [(f"{w}_{i}", c, b"%d %d" % (c, i)) for c, w in enumerate(WNIDS) for i in (0, 1)]
        assert [(s.key, s.class_id, s.data) for s in read(path)] == expected
        ids = [s.class_id for s in read(path, class_index=f"{imagenet}/lines.txt")]
        assert ids == [1, 1, 2, 2, 0, 0]
    (imagenet / "ILSVRC2012_img_val.tar").write_bytes(class_tar(imagenet / "train" / WNIDS[0]))
    (shard,) = listed(f"{imagenet}/ILSVRC2012_img_val.tar")
    assert shard.name == "ILSVRC2012_img_val" and len(list(read_samples(shard))) == 2


# Tables


def image_table(rows: int, as_struct: bool = True) -> pa.Table:
    images = [b"image %d" % i for i in range(rows)]
    structs = [{"bytes": image, "path": f"{i}.jpg"} for i, image in enumerate(images)]
    features = {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"},
                "image": {"_type": "Image"}}  # fmt: skip
    noted = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    table = pa.table(
        {
            "image": structs if as_struct else images,
            "label": [(-1, 0, 1)[i % 3] for i in range(rows)],
            "text": [f"caption {i}" for i in range(rows)],
            "AESTHETIC_SCORE": [i / 2 for i in range(rows)],
            "boxes": [[1, 2]] * rows,
        }
    )
    return table.replace_schema_metadata(noted)


def save_to_disk(folder: Path, table: pa.Table, files: int = 2) -> None:
    """As datasets.Dataset.save_to_disk does."""
    folder.mkdir()
    names = [f"data-{i:05}-of-{files:05}.arrow" for i in range(files)]
    size = -(-len(table) // files)
    for i, name in enumerate(names):
        part = table.slice(i * size, size)
        with pa.ipc.new_stream(folder / name, table.schema) as writer:
            writer.write_table(part, max_chunksize=7)
    state = {"_data_files": [{"filename": name} for name in names]}
    (folder / "state.json").write_text(json.dumps(state))


def assert_table(found: list[Sample], rows: int) -> None:
    assert [sample.data for sample in found] == [b"image %d" % i for i in range(rows)]
    assert [sample.class_id for sample in found] == [(None, 0, 1)[i % 3] for i in range(rows)]
    assert [sample.caption for sample in found] == [f"caption {i}" for i in range(rows)]
    assert [sample.metadata for sample in found] == [
        {"AESTHETIC_SCORE": i / 2} for i in range(rows)
    ]


@pytest.mark.parametrize("as_struct", [True, False])
@pytest.mark.parametrize("row_group_size", [7, 1000])
def test_parquet(tmp_path: Path, as_struct: bool, row_group_size: int) -> None:
    path = tmp_path / "train-00000-of-00001.parquet"
    pq.write_table(image_table(100, as_struct), path, row_group_size=row_group_size)
    for limit in (10, 30, 1000):
        shards = listed(f"{path}", images_per_shard=limit)
        names = [f"train-00000-of-00001-{index:05}" for index in range(len(shards))]
        assert [shard.name for shard in shards] == names and shards[0].class_names == ("cat", "dog")
        assert sum(shard.sample_count or 0 for shard in shards) == 100
        assert max(shard.sample_count or 0 for shard in shards) <= limit
        found = read(f"{path}", images_per_shard=limit)
        assert_table(found, 100)
        assert [sample.key for sample in found] == [f"{i:09}" for i in range(100)]


@pytest.mark.parametrize("as_struct", [True, False])
def test_a_saved_dataset(tmp_path: Path, as_struct: bool) -> None:
    save_to_disk(tmp_path / "train", image_table(60, as_struct))
    for limit in (11, 1000):
        assert_table(read(f"{tmp_path}/train", images_per_shard=limit), 60)
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train"]}')
    with pytest.raises(ValueError, match=rf"has the splits .*; give one: {tmp_path}/train"):
        listed(str(tmp_path))


def test_an_arrow_file_of_the_file_format(tmp_path: Path) -> None:
    table = image_table(30)
    with pa.ipc.new_file(tmp_path / "t.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=8)
    assert_table(read(f"{tmp_path}/t.arrow", images_per_shard=10), 30)


def test_the_hubs_layout(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "README.md").write_text("a card")
    for name in ("train-00000-of-00002", "train-00001-of-00002"):
        pq.write_table(image_table(3), tmp_path / f"data/{name}.parquet")
    names = [shard.name for shard in listed(str(tmp_path))]
    assert names == ["train-00000-of-00002-00000", "train-00001-of-00002-00000"]


def test_columns_by_option_and_labels_by_class_index(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"an image")
    rows = ["id,photo,words,wnid,n", f"k1,a.jpg,x,{WNIDS[1]},1", f"k2,{tmp_path}/a.jpg,,,2"]
    (tmp_path / "t.csv").write_text("\ufeff" + "\r\n".join(rows))
    (tmp_path / "index.txt").write_text("\n".join(WNIDS))
    columns = ColumnsConfig("photo", "words", "wnid", "id")
    options = {"columns": columns, "class_index": f"{tmp_path}/index.txt"}
    source = f"{tmp_path}/t.csv:0..1"
    assert read(f"{tmp_path}/t.csv", **options) == [
        Sample("k1", b"an image", 1, "x", source, {"n": "1", "photo": "a.jpg"}),
        Sample("k2", b"an image", None, "", source, {"n": "2", "photo": f"{tmp_path}/a.jpg"}),
    ]
    with pytest.raises(ValueError, match=r"dataset.columns.key=no: .*t.csv has id, photo"):
        listed(f"{tmp_path}/t.csv", columns=ColumnsConfig("photo", key="no"))


def test_rows_that_give_no_sample(tmp_path: Path) -> None:
    image = pa.array([b"x", None, b"x" * 99, b"x", b"x", b"x"])
    caption = pa.array([b"x", b"x", b"x", b"caf\xe9", b"x", b"x"]).cast(pa.binary())
    table = pa.table(
        {
            "image": image,
            "label": [0, 0, 0, 0, -2, 2**40],
            "key": list("aaabcd"),
            "caption": pa.Array.from_buffers(pa.string(), 6, caption.buffers()),
        }
    )
    pq.write_table(table, tmp_path / "t.parquet")
    (shard,) = listed(f"{tmp_path}/t.parquet")
    found = list(read_samples(shard, ReadPatience(attempts=1, max_sample_bytes=50)))
    reasons = [o.reason.split(":")[0] if isinstance(o, Skipped) else "" for o in found]
    assert reasons == ["", "no image", "sample too large", "unreadable caption",
                       "unreadable class", "unreadable class"]  # fmt: skip


def test_rows_of_one_key_and_a_table_without_rows(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [b"x", b"y"], "key": ["a", "a"]}), tmp_path / "t.parquet")
    (shard,) = listed(f"{tmp_path}/t.parquet")
    first, second = read_samples(shard)
    assert isinstance(first, Sample) and second.reason.startswith("duplicate key: ")
    (tmp_path / "t.csv").write_text("path\n")
    (shard,) = listed(f"{tmp_path}/t.csv")
    (skipped,) = read_samples(shard)
    assert skipped.reason == "empty table: it has no rows"


def test_labels_of_every_type(tmp_path: Path) -> None:
    labels = pa.array([1.0, 1.5, float("inf"), float("nan"), None, -1.0])
    table = pa.table({"path": ["a.jpg"] * 6, "label": labels, "key": [*"abcde", None]})
    pq.write_table(table, tmp_path / "t.parquet")
    (tmp_path / "a.jpg").write_bytes(b"an image")
    (shard,) = listed(f"{tmp_path}/t.parquet")
    found = [o.class_id if isinstance(o, Sample) else o.reason for o in read_samples(shard)]
    no_number = "unreadable class: inf is no number, nor in dataset.class_index"
    whole = "unreadable class: 1.5 is no whole number"
    assert found == [1, whole, no_number, None, None, "no key: key is null"]


@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_a_table_with_fewer_rows_than_when_it_was_listed(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"t.{suffix}"

    def write(rows: int) -> None:
        if suffix == "csv":
            path.write_text("path\n" + "a.jpg\n" * rows)
        else:
            pq.write_table(image_table(rows), path)

    (tmp_path / "a.jpg").write_bytes(b"an image")
    write(5)
    (shard,) = listed(str(path))
    write(3)
    with pytest.raises(SourceFailed, match="3 rows where there were 5; make a new plan"):
        list(read_samples(shard))


def test_images_beside_a_table_are_an_image_folder(tmp_path: Path) -> None:
    pq.write_table(image_table(3), tmp_path / "notes.parquet")
    (tmp_path / "a.jpg").write_bytes(b"an image")
    (shard,) = listed(str(tmp_path))
    assert shard.files == (("a.jpg", None), ("notes.parquet", None))


def test_csv_shards_begin_at_their_rows(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"an image")
    rows = [f'a.jpg,"caption ""{i}""\nof two lines, é"' for i in range(50)]
    (tmp_path / "t.csv").write_text("path,caption\n\n" + "\n\n".join(rows))
    assert [shard.sample_count for shard in listed(f"{tmp_path}/t.csv", images_per_shard=7)] == [
        *[7] * 7, 1,
    ]  # fmt: skip
    found = read(f"{tmp_path}/t.csv", images_per_shard=7)
    assert [s.caption for s in found] == [f'caption "{i}"\nof two lines, é' for i in range(50)]
    assert [s.key for s in found] == [f"{i:09}" for i in range(50)]


@given(st.lists(st.integers(0, 50), max_size=20), st.integers(1, 30))
def test_rows_are_divided_without_a_gap(groups: list[int], limit: int) -> None:
    pieces = divide_rows(groups, limit)
    ends = [first + count for first, count in pieces]
    assert [first for first, _ in pieces] == [0, *ends[:-1]] and ends[-1] == sum(groups)
    assert all(0 < count <= limit for _, count in pieces) or pieces == [(0, 0)]
    if max(groups, default=0) <= limit:  # no row group is cut
        assert {*ends} <= {sum(groups[: i + 1]) for i in range(len(groups))} | {0}


# Lists, patterns and URLs


def test_lists_and_files_of_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in "abcd":
        (tmp_path / f"{name}.tar").write_bytes(member("1.jpg", b"x") + END)
    (tmp_path / "list.txt").write_text("# the shards\nd.tar\n\n{a,b}.tar\n  pipe:cat c.tar\n")
    (tmp_path / "c.yaml").write_text(
        "dataset: {shards_path_or_url: [b.tar, '[cd].tar']}\nstore: {path: x}\n"
        "model: {vq_model: {pretrained: x}}\n"
    )
    assert [shard.name for shard in listed("@list.txt")] == ["d", "a", "b", "c"]
    with pytest.raises(ValueError, match="would both become the shard 'd'"):
        listed("d.tar::@list.txt")
    dataset = load_config(TokenizeConfig, ["config=c.yaml"]).dataset
    assert [shard.name for shard in list_input_shards(dataset)] == ["b", "c", "d"]
    with pytest.raises(ValueError, match="shards_path_or_url=None: give a path or a list"):
        load_config(TokenizeConfig, ["config=c.yaml", "dataset.shards_path_or_url=null"])
    dataset = load_config(TokenizeConfig, ["config=c.yaml", "dataset.shards_path_or_url=7"]).dataset
    assert dataset.shards_path_or_url == "7"  # a folder of that name


def test_a_protocol_whose_package_is_missing_names_the_extra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    for path in ("gs://bucket/*.tar", "gs://bucket/0.tar", "unheard://of/0.tar"):
        with pytest.raises(ValueError, match=r"pip install \"open-muse\[remote\]\""):
            listed(path)


def test_globs_and_tables_behind_urls() -> None:
    files = fsspec.filesystem("memory")
    table = io.BytesIO()
    pq.write_table(image_table(5), table)
    files.pipe(
        {
            "/x/1.tar": member("1.jpg", b"1") + END,
            "/x/0.tar": member("0.jpg", b"0") + END,
            "/x/t.parquet": table.getvalue(),
            "/x/l.txt": b"memory://x/*.tar",
            "/x/t.csv": b"path,caption\n0.jpg,zero\n/etc/hostname,no\n",
            "/x/0.jpg": b"0",
        }
    )
    try:
        for path in ("memory://x/*.tar", "memory://x/{0,1}.tar", "@memory://x/l.txt"):
            assert [sample.key for sample in read(path)] == ["0", "1"]
        assert_table(read("memory://x/t.parquet", images_per_shard=2), 5)
        good, refused = [s for shard in listed("memory://x/t.csv") for s in read_samples(shard)]
        assert isinstance(good, Sample) and (good.data, good.caption) == (b"0", "zero")
        assert isinstance(refused, Skipped) and refused.reason.startswith("refused path: ")
        with pytest.raises(FileNotFoundError, match=r"no tar, table or folder at memory://x/no"):
            listed("memory://x/no*.tar")
    finally:
        files.rm("/x", recursive=True)


@pytest.fixture
def s3_endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    for _ in range(300):
        with socket.socket() as probe:
            if not probe.connect_ex(("127.0.0.1", port)):
                break
        time.sleep(0.1)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    endpoint = f"http://127.0.0.1:{port}"
    monkeypatch.setitem(fsspec.config.conf, "s3", {"endpoint_url": endpoint})
    yield endpoint
    server.terminate()
    server.wait()


def test_a_bucket(s3_endpoint: str, tmp_path: Path) -> None:
    files = fsspec.filesystem("s3", endpoint_url=s3_endpoint)
    files.mkdir("photos")
    for name in "10":
        files.pipe(f"photos/in/{name}.tar", member(f"{name}.jpg", name.encode() * 99_999) + END)
    pq.write_table(image_table(5), tmp_path / "t.parquet")
    files.put(str(tmp_path / "t.parquet"), "photos/t.parquet")
    assert [s.name for s in listed("s3://photos/in/*.tar")] == ["0", "1"]
    assert [s.data[:2] for s in read("s3://photos/in/*.tar")] == [b"00", b"11"]
    assert_table(read("s3://photos/t.parquet"), 5)
    (shard,) = listed("s3://photos/in/gone.tar")
    with pytest.raises(FileNotFoundError, match="photos/in/gone.tar does not exist"):
        list(read_samples(shard))


def test_img2dataset_tars_with_their_metadata(tmp_path: Path) -> None:
    noted = {"caption": "a", "url": "http://x/1", "width": 4, "AESTHETIC_SCORE": 5.5, "exif": "{}"}
    with tarfile.open(tmp_path / "00000.tar", "w") as tar:
        for suffix, data in (("jpg", b"x"), ("json", json.dumps(noted).encode()), ("txt", b"a")):
            info = tarfile.TarInfo(f"000000001.{suffix}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    (tmp_path / "00000.parquet").write_bytes(b"beside the tars, not read")
    source = f"{tmp_path}/00000.tar"
    assert read(str(tmp_path)) == [Sample("000000001", b"x", None, "a", source, noted)]
