"""Step 1: what list_input_shards finds and what read_samples makes of good and broken inputs."""

import io
import json
import os
import tarfile
from pathlib import Path

import pytest
import webdataset

from tokenize_stage.sources.config import ColumnsConfig, DatasetConfig
from tokenize_stage.sources.input_shards import list_input_shards
from tokenize_stage.sources.read import ReadPatience, read_samples
from tokenize_stage.sources.sample import InputShard, Sample, Skipped

JPG = b"not decoded in step 1"


def write_tar(path: Path, members: dict[str, bytes] | list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items() if isinstance(members, dict) else members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def listed(path: str, images_per_shard: int = 10_000) -> list[InputShard]:
    return list_input_shards(DatasetConfig(path, images_per_shard))


def read_tar(path: Path | str) -> list[Sample | Skipped]:
    return list(read_samples(InputShard("x", str(path))))


def write_folder(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(os.fsencode(name))


def test_image_folder_classes_are_the_sorted_sub_folders(tmp_path: Path) -> None:
    write_folder(tmp_path, "dog/1.jpg", "cat/b/2.PNG", "cat/a.webp", "top.jpeg", "eel/x.gif")
    (tmp_path / "empty").mkdir()
    (shard,) = listed(str(tmp_path))
    assert shard.name == "images-00000"
    assert shard.class_names == ("cat", "dog", "eel", "empty")
    found = [(s.key, s.class_id) for s in read_samples(shard) if isinstance(s, Sample)]
    assert found == [
        ("cat/a.webp", 0),
        ("cat/b/2.PNG", 0),
        ("dog/1.jpg", 1),
        ("eel/x.gif", 2),
        ("top.jpeg", None),
    ]
    assert next(iter(read_samples(shard))).data == b"cat/a.webp"


def test_image_folder_shards_share_all_files_and_mix_classes(tmp_path: Path) -> None:
    write_folder(tmp_path, *(f"{c}/{i:02}.jpg" for c in "ab" for i in range(10)))
    shards = listed(str(tmp_path), 7)
    assert [shard.name for shard in shards] == ["images-00000", "images-00001", "images-00002"]
    assert shards == listed(str(tmp_path), 7)
    keys = [sample.key for shard in shards for sample in read_samples(shard)]
    assert sorted(keys) == sorted(f"{c}/{i:02}.jpg" for c in "ab" for i in range(10))
    for shard in shards:
        assert len(shard.files) <= 7 and {class_id for _, class_id in shard.files} == {0, 1}


def test_image_folder_reports_what_it_cannot_use(tmp_path: Path) -> None:
    write_folder(tmp_path, "a/1.jpg", "a/notes.txt", ".hidden/2.jpg", "a/.DS_Store")
    (tmp_path / "a" / "gone.jpg").symlink_to("nowhere.jpg")
    (shard,) = listed(str(tmp_path))
    skipped = {s.key: s.reason for s in read_samples(shard) if isinstance(s, Skipped)}
    assert skipped == {
        "a/notes.txt": "not an image file: .txt",
        "a/gone.jpg": "unreadable file: No such file or directory",
    }


def test_image_folder_that_vanishes_is_an_error_not_a_list_of_skipped_files(tmp_path: Path) -> None:
    write_folder(tmp_path, "data/1.jpg")
    (shard,) = listed(str(tmp_path / "data"))
    (tmp_path / "data").rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError):
        list(read_samples(shard))


def test_names_that_are_not_utf8_become_keys_that_can_be_stored(tmp_path: Path) -> None:
    write_folder(tmp_path, "caf\udce9.jpg")
    (shard,) = listed(str(tmp_path))
    assert [sample.key for sample in read_samples(shard)] == ["caf�.jpg"]


@pytest.mark.parametrize(
    "pattern, names",
    [
        ("t/{00..02}.tar", ["00", "01", "02"]),
        ("t/*.tar", ["00", "01", "02"]),
        ("t", ["00", "01", "02", "b"]),
        ("t/02.tar::t/b.tar.gz::t/00.tar", ["02", "b", "00"]),
        ("t/{00,02}.tar::t/?1.tar", ["00", "02", "01"]),
    ],
)
def test_tar_patterns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str, names: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path, "t/00.tar", "t/01.tar", "t/02.tar", "t/b.tar.gz", "t/readme.txt")
    assert [shard.name for shard in listed(pattern)] == names


def test_urls_and_commands_are_named_by_the_tar_in_them() -> None:
    path = "pipe:aws s3 cp s3://bucket/{7..8}.tar -::https://host/a/b-00.tar?key=x.y"
    assert [shard.name for shard in listed(path)] == ["7", "8", "b-00"]


@pytest.mark.parametrize("path", ["nothing", "no/*.tar", "no/{0..1}.tar", "."])
def test_nothing_to_read_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError):
        listed(path)


def test_a_file_that_is_no_tar_is_an_error(tmp_path: Path) -> None:
    write_folder(tmp_path, "photo.jpg")
    with pytest.raises(ValueError, match=r"photo.jpg is neither a folder nor a .tar"):
        listed(str(tmp_path / "photo.jpg"))


def test_two_inputs_of_one_name_are_an_error_naming_both(tmp_path: Path) -> None:
    write_folder(tmp_path, "a/0.tar", "b/0.tar")
    with pytest.raises(ValueError, match=r"a/0.tar and .*b/0.tar would both become the shard '0'"):
        listed(f"{tmp_path}/a::{tmp_path}/b")


def test_tar_samples_are_grouped_as_webdataset_groups_them(tmp_path: Path) -> None:
    members = {
        "d/1.jpg": JPG,
        "d/1.cls": b"7\n",
        "d/1.txt": "a cäptiön".encode(),
        "d/1.json": b'{"caption": "not this one", "url": "http://x/1.jpg"}',
        "d/2.PNG": JPG,
        "d/2.json": b'{"caption": "from json", "width": 5}',
        "e.f/3.seg.png": b"another file of the sample",
        "e.f/3.webp": JPG,
        "__meta__/x": b"",
        "._3.jpg": b"resource fork",
        "4.jpeg": JPG,
        "4.JSON": b"{}",
    }
    path = write_tar(tmp_path / "0.tar", members)
    samples = read_tar(path)
    metadata = [
        {"caption": "not this one", "url": "http://x/1.jpg"},
        {"caption": "from json", "width": 5},
    ]
    assert samples == [
        Sample("d/1", JPG, 7, "a cäptiön", str(path), metadata[0]),
        Sample("d/2", JPG, None, "from json", str(path), metadata[1]),
        Sample("e.f/3", JPG, None, None, str(path)),
        Sample("4", JPG, None, None, str(path)),
    ]
    theirs = webdataset.WebDataset(str(path), shardshuffle=False)
    assert [s.key for s in samples] == [s["__key__"] for s in theirs]


def test_captions_may_have_another_name_in_the_json(tmp_path: Path) -> None:
    members = {"1.jpg": JPG, "1.txt": b"not this", "1.json": b'{"top_caption": "this"}'}
    place = write_tar(tmp_path / "a.tar", {**members, "2.jpg": JPG, "2.txt": b"nor this"})
    columns = ColumnsConfig(caption="top_caption")
    (shard,) = list_input_shards(DatasetConfig(str(place), columns=columns))
    for one in (shard, InputShard.from_json(json.loads(json.dumps(shard.to_json())))):
        assert [s.caption for s in read_samples(one) if isinstance(s, Sample)] == ["this", None]


@pytest.mark.parametrize(
    "members, reason",
    [
        ([("a.cls", b"1"), ("a.txt", b"x")], "no image: members cls, txt"),
        ([("a", b"1")], "no image: members "),
        ([("a.jpg", JPG), ("a.png", JPG)], "several images: members jpg, png"),
        ([("a.jpg", JPG), ("a.JPG", JPG)], "duplicate member: a.JPG"),
        ([("a.jpg", JPG), ("a.cls", b"1"), ("a.cls", b"2")], "duplicate member: a.cls"),
        ([("a.jpg", JPG), ("a.cls", b"seven")], "unreadable cls: invalid literal"),
        ([("a.jpg", JPG), ("a.cls", b"")], "unreadable cls: invalid literal"),
        ([("a.jpg", JPG), ("a.cls", b"-1")], "unreadable cls: class -1 is not in 0..2147483647"),
        ([("a.jpg", JPG), ("a.cls", b"9" * 20)], "unreadable cls: class 99999999999999999999"),
        ([("a.jpg", JPG), ("a.json", b"{")], "unreadable json: Expecting"),
        ([("a.jpg", JPG), ("a.txt", b"x"), ("a.json", b"{")], "unreadable json: Expecting"),
        ([("a.jpg", JPG), ("a.json", rb'{"url": "\ud800"}')], "unreadable json: 'utf-8'"),
        ([("a.jpg", JPG), ("a.json", b"[" * 100_000)], "unreadable json: "),
        ([("a.jpg", JPG), ("a.json", b"[1]")], "unreadable json: not an object"),
        ([("a.jpg", JPG), ("a.json", b'{"caption": 3}')], "unreadable json: caption is a int"),
        ([("a.jpg", JPG), ("a.json", rb'{"caption": "\ud800"}')], "unreadable json: 'utf-8'"),
        ([("a.jpg", JPG), ("a.txt", b"\xff")], "unreadable txt: 'utf-8'"),
    ],
)
def test_a_bad_sample_is_skipped_with_its_reason_and_the_next_is_read(
    tmp_path: Path, members: list[tuple[str, bytes]], reason: str
) -> None:
    path = write_tar(tmp_path / "0.tar", [*members, ("b.jpg", JPG)])
    bad, good = read_tar(path)
    assert isinstance(bad, Skipped) and (bad.key, bad.source) == ("a", str(path))
    assert bad.reason.startswith(reason)
    assert good == Sample("b", JPG, None, None, str(path))


def test_a_member_that_is_a_link_is_skipped_with_its_reason(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        link = tarfile.TarInfo("a.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "other.jpg"
        tar.addfile(link)
    (bad,) = read_tar(tmp_path / "0.tar")
    assert isinstance(bad, Skipped) and bad.reason == "member is no regular file: a.jpg"


@pytest.mark.parametrize("compression", ["", "gz"])
def test_a_truncated_tar_gives_what_came_before_and_says_so(
    tmp_path: Path, compression: str
) -> None:
    path = tmp_path / "0.tar"
    with tarfile.open(path, f"w:{compression}") as tar:
        for i in range(5):
            for suffix, data in (("jpg", bytes(range(256)) * 5), ("cls", b"%d" % i)):
                info = tarfile.TarInfo(f"{i}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    whole_bytes, whole = path.read_bytes(), read_tar(path)
    assert [sample.class_id for sample in whole] == [0, 1, 2, 3, 4]
    counts = set()
    for size in range(0, len(whole_bytes), 97):
        path.write_bytes(whole_bytes[:size])
        found = read_tar(path)
        samples = [sample for sample in found if isinstance(sample, Sample)]
        assert samples == whole[: len(samples)], size  # never half a sample
        counts.add(len(samples))
        if len(samples) < 5:
            assert len(found) == len(samples) + 1
            assert found[-1].reason.startswith("tar cut short or corrupt: ")
    assert counts >= ({0} if compression else {0, 1, 2, 3, 4, 5})


def test_a_damaged_header_is_not_taken_for_the_end(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "0.tar", {f"{i}.jpg": JPG for i in range(4)})
    data = bytearray(path.read_bytes())
    data[2 * 1024 + 5] ^= 0xFF  # in the header of the third member
    path.write_bytes(data)
    *samples, last = read_tar(path)
    assert [sample.key for sample in samples] == ["0"]
    assert last.key == "1" and "after 1 samples, bad checksum" in last.reason


def test_an_empty_archive_and_an_empty_file_are_reported(tmp_path: Path) -> None:
    (last,) = read_tar(write_tar(tmp_path / "0.tar", {}))
    assert last.reason == "empty tar: it has no samples"
    (tmp_path / "1.tar").write_bytes(b"")
    (last,) = read_tar(tmp_path / "1.tar")
    assert last.reason == "tar cut short or corrupt: after 0 samples, empty file"


def test_a_command_is_read_and_its_failure_is_an_error(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "0.tar", {"a.jpg": JPG})
    assert [sample.key for sample in read_tar(f"pipe:cat {path}")] == ["a"]
    with pytest.raises(OSError):
        source = InputShard("x", f"pipe:head -c 600 {path}; exit 3")
        list(read_samples(source, ReadPatience(attempts=1)))


def test_a_missing_tar_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_tar(tmp_path / "gone.tar")
