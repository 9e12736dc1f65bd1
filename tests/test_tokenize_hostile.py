"""Inputs that mean ill, or went wrong: one recorded reason each, in bounded memory and time."""

import gzip
import io
import os
import socket
import sys
import tarfile
import tracemalloc
from pathlib import Path

import pytest

from tokenize_stage.sources.config import DatasetConfig
from tokenize_stage.sources.input_shards import list_input_shards
from tokenize_stage.sources.read import ReadPatience, read_samples
from tokenize_stage.sources.sample import InputShard, Sample, Skipped

IMAGE = b"an image"
BLOCK = 512


def member(name: str, data: bytes = b"", size: int | None = None, kind: bytes = b"0") -> bytes:
    """A member of a tar; `size` is what it claims."""
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, len(data) if size is None else size
    return info.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % BLOCK)


def read(source: Path | str, **limits: int) -> list[Sample | Skipped]:
    shard = InputShard("x", str(source))
    return list(read_samples(shard, ReadPatience(timeout_s=20, attempts=1, **limits)))


def brief(outcomes: list[Sample | Skipped]) -> list[str]:
    """The key, and the kind of reason of what gives no row."""
    keys = [outcome.key for outcome in outcomes if isinstance(outcome, Sample)]
    assert len({*keys}) == len(keys)
    assert all(len(o.reason) <= 1000 for o in outcomes if isinstance(o, Skipped))
    return [
        f"{o.key}: {o.reason.split(':')[0]}" if isinstance(o, Skipped) else o.key for o in outcomes
    ]


A, GOOD = member("a.jpg", IMAGE), member("good.jpg", IMAGE)
END = bytes(2 * BLOCK)
DEVICES = [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE]
TARS = {
    "a name that leads out": (member("../../etc/a.jpg", IMAGE), "../../etc/a"),
    "an absolute name": (member("/etc/a.jpg", IMAGE), "/etc/a"),
    "ten gigabytes claimed": (member("a.jpg", b"", 10 * 2**30), "a: tar cut short or corrupt"),
    "exabytes claimed": (member("a.jpg", b"", 2**62), ": tar cut short or corrupt"),
    "a sparse member": (member("a.jpg", IMAGE, kind=tarfile.GNUTYPE_SPARSE), "a: member is sparse"),
    "unknown type": (member("a.jpg", IMAGE, kind=b"Z"), "a: member is no regular file"),
    "a large image": (member("a.jpg", bytes(9000)), "a: sample too large"),
    "a large caption": (A + member("a.txt", b"x" * 9000), "a: sample too large"),
    "a large json": (A + member("a.json", b" " * 9000), "a: sample too large"),
    "latin-1": (A + member("a.txt", b"caf\xe9"), "a: unreadable txt"),
    "json of a bomb": (A + member("a.json", b"[" * 8000), "a: unreadable json"),
    "huge number": (A + member("a.cls", b"9" * 8000), "a: unreadable cls"),
    "a key twice": (A + member("b.jpg", IMAGE) + A, "a b a: duplicate key"),
    "names without end": (b"".join(member(f"a.{i:090}") for i in range(99)), "a: sample too large"),
    "a name without end": (member("n" * 3000 + ".jpg", IMAGE), f"{'n' * 1024}: key too long"),
    "a reason without end": (member("a." + "n" * 3000), "a: no image"),
}
TARS |= {
    f"type {kind!r}": (member("a.jpg", kind=kind), "a: member is no regular file")
    for kind in DEVICES
}


@pytest.mark.parametrize("name", TARS)
def test_tars(tmp_path: Path, name: str) -> None:
    content, expected = TARS[name]
    path = tmp_path / "0.tar"
    path.write_bytes(content + GOOD + END)
    found = " ".join(brief(read(path, max_sample_bytes=8500)))
    assert found == (expected if "cut short" in expected else f"{expected} good")
    (tmp_path / "0.tgz").write_bytes(gzip.compress(path.read_bytes()))
    assert brief(read(tmp_path / "0.tgz", max_sample_bytes=8500)) == brief(
        read(path, max_sample_bytes=8500)
    )


def test_captions_with_nul_are_kept_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "0.tar"
    path.write_bytes(member("a.jpg", IMAGE) + member("a.txt", b"a\0b") + END)
    (sample,) = read(path)
    assert isinstance(sample, Sample) and sample.caption == "a\0b"  # pyarrow and DuckDB hold it


def test_captions_are_bounded(tmp_path: Path) -> None:
    path = tmp_path / "0.tar"
    path.write_bytes(member("a.jpg", IMAGE) + member("a.txt", b"x" * (2**20 + 1)) + END)
    assert brief(read(path)) == ["a: unreadable txt"]


@pytest.mark.parametrize(
    "content, expected",
    [
        (b"", ": tar cut short or corrupt"),
        (END, ": empty tar"),
        (bytes(10240), ": empty tar"),
        (gzip.compress(END, mtime=0), ": empty tar"),
        (gzip.compress(b"", mtime=0), ": tar cut short or corrupt"),
        (b"\x1f\x8b broken", ": tar cut short or corrupt"),
        (b"\xff\xd8\xff\xe0 a photograph" * 99, ": tar cut short or corrupt"),
    ],
)
def test_empty_and_wrong_files(tmp_path: Path, content: bytes, expected: str) -> None:
    (tmp_path / "0.tar").write_bytes(content)
    assert brief(read(tmp_path / "0.tar")) == [expected]


def endless(script: str) -> str:
    return f"pipe:{sys.executable} -c '{script}'"


@pytest.mark.parametrize(
    "script, expected",
    [
        ("import sys\nwhile 1: sys.stdout.buffer.write(bytes(99999))", ": empty tar"),
        ("import sys\nwhile 1: sys.stdout.buffer.write(b'x' * 99999)", ": tar cut short"),
        (
            "import sys, zlib\nz = zlib.compressobj(wbits=31)\n"
            "while 1: sys.stdout.buffer.write(z.compress(bytes(2**20)))",
            ": empty tar",
        ),
    ],
)
def test_endless_streams_without_samples(script: str, expected: str) -> None:
    (found,) = brief(read(endless(script.replace("'", '"'))))
    assert found.startswith(expected)


def test_endless_samples_and_members(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(member("a.jpg", IMAGE))
    (tmp_path / "b").write_bytes(member("b.jpg", size=2**60))
    *samples, last = read(f"pipe:yes {tmp_path}/a | xargs cat", max_shard_bytes=200_000)
    assert last.key == "a" and not samples  # one name over and over is one sample
    assert last.reason.startswith("tar cut short or corrupt")
    script = tmp_path / "many.py"
    script.write_text(
        "import sys, tarfile\nout = sys.stdout.buffer\nfor i in range(10**9):\n"
        "    out.write(tarfile.TarInfo(f'{i}.jpg').tobuf())\n"
    )
    *samples, last = read(f"pipe:{sys.executable} {script}", max_shard_bytes=200_000)
    assert len(samples) == 200_000 // BLOCK - 1
    assert last.reason.endswith("of more than 200000 bytes")
    found = brief(read(f"pipe:cat {tmp_path}/a {tmp_path}/b /dev/zero"))
    assert found == ["a: tar cut short or corrupt"]  # its claim is not waited for


def test_large_members_are_passed_over_in_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "0.tar"
    with path.open("wb") as file:
        for name in ("a.jpg", "b.mp4"):
            file.write(member(name, size=300 * 2**20))
            file.seek(300 * 2**20, os.SEEK_CUR)  # a hole: nothing is on the disk
        file.write(member("b.jpg", IMAGE) + member("c.jpg", IMAGE) + END)
    tracemalloc.start()
    try:
        assert brief(read(path)) == ["a: sample too large", "b", "c"]
        assert tracemalloc.get_traced_memory()[1] < 30 * 2**20
    finally:
        tracemalloc.stop()


def test_an_image_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "photos"
    for name in ("a/1.jpg", "a/large.jpg", "folder.jpg/inside.jpg"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(bytes(9000) if "large" in name else IMAGE)
    os.mkfifo(folder / "a/fifo.jpg")
    (folder / "a/self.jpg").symlink_to("self.jpg")
    (folder / "a/up").symlink_to("..")
    (folder / "b").mkdir()
    (folder / "a/to_b").symlink_to("../b")
    (folder / "b/to_a").symlink_to("../a")
    (folder / "b/2.jpg").write_bytes(IMAGE)
    (folder / "a/here.jpg").symlink_to(".")
    (folder / "a/null.jpg").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        monkeypatch.chdir(folder)  # the name of a socket is short
        server.bind("a/socket.jpg")
        (shard,) = list_input_shards(DatasetConfig(str(folder)))
        outcomes = list(read_samples(shard, ReadPatience(max_sample_bytes=8500, attempts=1)))
    found = {o.key: o.reason if isinstance(o, Skipped) else "" for o in outcomes}
    assert len(outcomes) == len(found)
    assert found.pop("a/to_b/2.jpg") == found.pop("b/2.jpg") == found.pop("b/to_a/1.jpg") == ""
    assert (
        found.pop("a/to_b/to_a")
        == found.pop("b/to_a/to_b")
        == "no regular file: a link to a folder"
    )
    found = {key: reason for key, reason in found.items() if not key.startswith("b/to_a")}
    assert found == {
        "a/1.jpg": "",
        "a/fifo.jpg": "no regular file: a FIFO",
        "a/here.jpg": "no regular file: a link to a folder",
        "a/large.jpg": "sample too large: 9000 bytes, at most 8500",
        "a/null.jpg": "no regular file: a device",
        "a/self.jpg": "unreadable file: Too many levels of symbolic links",
        "a/socket.jpg": "no regular file: a socket",
        "a/up": "no regular file: a link to a folder",
        "folder.jpg": "no regular file: a folder",
        "folder.jpg/inside.jpg": "",
    }


def test_a_table_runs_no_command_and_reads_no_foreign_protocol(tmp_path: Path) -> None:
    lines = [
        "image,caption",
        f"pipe:touch {tmp_path}/harm,x",
        "file:///etc/hostname,x",
        "memory://a.jpg,x",
        "/dev/zero,x",
        "gone.jpg,x",
        ",x",
        "one field",
        "good.jpg,caf\udce9",
        "good.jpg,fine",
    ]
    (tmp_path / "t.csv").write_bytes("\n".join(lines).encode("utf-8", "surrogateescape"))
    (tmp_path / "good.jpg").write_bytes(IMAGE)
    (shard,) = list_input_shards(DatasetConfig(f"{tmp_path}/t.csv"))
    assert brief(list(read_samples(shard))) == [
        "000000000: unreadable file",
        "000000001: refused URL",
        "000000002: refused URL",
        "000000003: no regular file",
        "000000004: unreadable file",
        "000000005: no image",
        "000000006: ragged row",
        "000000007: unreadable caption",
        "000000008",
    ]
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"image\n" + b"x" * 2**21, "a line of more than 1048576 bytes"),
        (b'image,caption\n"' + b"x\n" * 100_000, "field larger than field limit"),
        (b"", "the first line must name the columns"),
        (b"a,b\n1,2\n", r"has the columns a, b: say with dataset.columns.image="),
    ],
)
def test_a_csv_that_is_none_is_refused_at_once(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(ValueError, match=reason):
        list_input_shards(DatasetConfig(f"{tmp_path}/t.csv"))


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_a_table_that_is_none_is_refused_at_once(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"t.{suffix}").write_bytes(io.BytesIO(b"nothing of the kind" * 99).read())
    with pytest.raises((ValueError, OSError)):
        list_input_shards(DatasetConfig(f"{tmp_path}/t.{suffix}"))
