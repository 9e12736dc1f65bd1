"""Hostile inputs through muse-tokenize: one reason each in the store, bounded memory."""

import gzip
import io
import json
import struct
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image
from store_factory import make_store

from storage.reader import TokenStore
from storage.shard import read_manifest, read_skipped
from storage.verify import verify_store

# Not ru_maxrss: a child begins with that of the process that started it, here pytest's own.
MAIN = """
import json, pathlib, sys
from tokenize_stage.cli import main
status = main(sys.argv[1:])
peak = pathlib.Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]
print(json.dumps([status, int(peak)]))
"""


def encoded(kind: str = "JPEG", mode: str = "RGB", side: int = 64) -> bytes:
    noise = np.random.default_rng(side).integers(0, 256, (side, side, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).convert(mode).save(buffer, kind)
    return buffer.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few kilobytes that claims, and nearly holds, width x height gray pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    rows = zlib.compress(bytes((width + 1) * min(height, 2000)), 9)
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    return start + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def text_bomb() -> bytes:
    """A PNG with a compressed comment of 200 MB."""
    good = encoded("PNG")
    comment = b"comment\0\0" + zlib.compress(bytes(200_000_000), 9)
    chunk = struct.pack(">I", len(comment)) + b"zTXt" + comment
    return good[:33] + chunk + struct.pack(">I", zlib.crc32(b"zTXt" + comment)) + good[33:]


SAMPLES = {  # key: members by suffix; and the kind of reason, or "" for a row
    "good": ({"jpg": encoded(), "txt": b"fine", "json": b'{"url": "http://a/b"}'}, ""),
    "cmyk": ({"jpg": encoded(mode="CMYK")}, ""),
    "palette": ({"png": encoded("PNG", "P")}, ""),
    "gray16": ({"png": encoded("PNG", "I;16")}, ""),
    "one pixel": ({"png": encoded("PNG", side=1)}, ""),
    "../../up": ({"jpg": encoded()}, ""),
    "/absolute": ({"jpg": encoded()}, ""),
    "nul caption": ({"jpg": encoded(), "txt": b"a\0b"}, ""),
    "latin caption": ({"jpg": encoded(), "txt": b"caf\xe9"}, "unreadable txt"),
    "no json": ({"jpg": encoded(), "json": b"{"}, "unreadable json"),
    "cut": ({"jpg": encoded()[:2000]}, "bad image"),
    "garbage": ({"jpg": b"\xff\xd8\xff\xe0" + bytes(range(256)) * 9}, "bad image"),
    "nothing": ({"jpg": b""}, "bad image"),
    "bomb": ({"png": bomb(60_000, 60_000)}, "bad image"),
    "half a bomb": (
        {"png": bomb(9_400, 9_400)},
        "",
    ),  # below the limit of pixels; rows that lack are black
    "another half": ({"png": bomb(9_401, 9_400)}, ""),  # large ones are decoded one by one
    "and another": ({"png": bomb(9_402, 9_400)}, ""),
    "text bomb": ({"png": text_bomb()}, "bad image"),
    "video": ({"mp4": b"moov"}, "no image"),
    "two": ({"jpg": encoded(), "png": encoded("PNG")}, "several images"),
    "svg": ({"jpg": b"<svg xmlns='http://www.w3.org/2000/svg'/>"}, "bad image"),
    "postscript": ({"jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"}, "bad image"),
}


def write_hostile_tars(folder: Path) -> None:
    folder.mkdir()
    with tarfile.open(folder / "samples.tar", "w") as tar:
        for key, (members, _) in SAMPLES.items():
            for suffix, data in members.items():
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        for kind in (tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
            info = tarfile.TarInfo(f"type{kind.decode()}.jpg")
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    claim = tarfile.TarInfo("claim.jpg")
    claim.size = 10 * 2**30
    (folder / "claim.tar").write_bytes(claim.tobuf(tarfile.GNU_FORMAT) + encoded())
    (folder / "empty.tar").write_bytes(b"")
    (folder / "zeros.tar").write_bytes(bytes(10_240))
    (folder / "inflating.tgz").write_bytes(gzip.compress(bytes(300_000_000)))


def test_hostile_tars_give_one_reason_each_in_bounded_memory(tmp_path: Path) -> None:
    made = make_store(tmp_path / "made", rows=2)  # for its tokenizer
    write_hostile_tars(tmp_path / "in")
    command = [
        *(sys.executable, "-c", MAIN),
        f"dataset.shards_path_or_url={tmp_path}/in",
        "dataset.preprocessing.resolution=8",
        f"model.vq_model.pretrained={made.parent}/vq",
        f"store.path={tmp_path}/store",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    status, peak_kib = json.loads(done.stdout.splitlines()[-1])
    assert status == 0 and peak_kib < 2 * 2**20
    assert verify_store(tmp_path / "store") == []
    store = TokenStore(tmp_path / "store")
    table = store.table(["key", "source"])
    rows = {key for key, source in zip(*table.to_pydict().values(), strict=True)}
    skipped: dict[str, str] = {}
    for folder in store.index.folders:
        place = f"shards/{folder}"
        for one in read_skipped(store.files, place, read_manifest(store.files, place)).to_pylist():
            assert one["key"] not in skipped or not one["key"]
            skipped[f"{folder}:{one['key']}"] = one["reason"].split(":")[0]
    expected = {f"samples:{key}": reason for key, (_, reason) in SAMPLES.items() if reason}
    expected |= {f"samples:type{kind}": "member is no regular file" for kind in "236"}
    expected |= {"claim:claim": "tar cut short or corrupt", "empty:": "tar cut short or corrupt"}
    expected |= {"zeros:": "empty tar", "inflating:": "empty tar"}
    assert skipped == expected
    assert rows == {key for key, (_, reason) in SAMPLES.items() if not reason}
