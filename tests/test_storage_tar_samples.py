"""The tar walk: the same members and bytes as Python's tarfile; all damage is reported."""

import bz2
import gzip
import io
import lzma
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.tar_samples import BLOCK, TarSample, read_tar_samples, tar_members

FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
LETTERS = st.sampled_from("aBé0._- ☃\udce9")
PART = st.text(LETTERS, min_size=1, max_size=8)
NAMES = st.one_of(
    st.builds("{}.{}".format, st.sampled_from(["1", "2", "d/1", "../x", "/abs/y"]), PART),
    st.lists(PART, min_size=1, max_size=3).map("/".join),
    st.builds("{}/{}.jpg".format, st.sampled_from(["d" * 90, "d" * 170, "é" * 150]), PART),
)
TYPES = st.sampled_from(
    [tarfile.REGTYPE] * 6 + [tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.FIFOTYPE]
)
MEMBERS = st.lists(st.tuples(NAMES, TYPES, st.binary(max_size=1500)), max_size=8)


def write_tar(members, form=tarfile.PAX_FORMAT):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as tar:
        for name, kind, data in members:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "elsewhere" if kind == tarfile.SYMTYPE else ""
            info.size = len(data) if kind == tarfile.REGTYPE else 0
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def read(content, chunk=2**20, **limits):
    class Short(io.BytesIO):
        def read(self, size=-1):
            return super().read(min(size, chunk))

    return list(read_tar_samples(Short(content), lambda suffix: suffix != "left", **limits))


def as_text(name):
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def by_tarfile(content):
    """The samples as tarfile finds the members; faults as True or False."""
    samples = []
    last = None
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        for member in tar:
            folder, slash, name = member.name.rpartition("/")
            if member.isdir() or name.startswith("."):
                continue
            stem, _, suffix = name.partition(".")
            if last != (last := folder + slash + stem):
                samples.append((as_text(last), {}, []))
            _, parts, faults = samples[-1]
            suffix = suffix.lower()
            if suffix in parts or not member.isreg():
                faults.append(member.name)
            parts[suffix] = tar.extractfile(member).read() if member.isreg() else b""
    return [(key, parts, bool(faults)) for key, parts, faults in samples]


def comparable(samples):
    return [(sample.key, sample.parts, bool(sample.fault)) for sample in samples]


@settings(max_examples=150, deadline=None)
@given(MEMBERS, st.sampled_from(FORMATS), st.sampled_from([1, 7, 512, 700, 2**20]))
def test_the_same_as_tarfile(members, form, chunk):
    try:
        content = write_tar(members, form)
    except (ValueError, UnicodeEncodeError):  # ustar has no room for the name
        return
    assert comparable(read(content, chunk)) == by_tarfile(content)


WHOLE = [
    (f"{i}.{suffix}", tarfile.REGTYPE, bytes([i]) * size)
    for i in range(3)
    for suffix, size in (("jpg", 700), ("txt", 0), ("n" * 120, 512))
]
FULL = {form: write_tar(WHOLE, form) for form in FORMATS[1:]}


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(FORMATS[1:]), st.integers(0, 2**31))
def test_every_truncation_is_reported(form, place):
    content, whole = FULL[form], read(FULL[form])
    end = -(-len(content.rstrip(b"\0")) // BLOCK) * BLOCK  # the members end here
    found = read(content[: place % (end + BLOCK)])
    assert found[-1].fault.startswith("tar cut short or corrupt: after ")
    assert found[:-1] == whole[: len(found) - 1]


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(FORMATS[1:]), st.integers(0, 2**31), st.integers(0, 7))
def test_every_flipped_bit_of_a_header_is_reported_or_says_the_same(form, place, bit):
    content, whole = bytearray(FULL[form]), read(FULL[form])
    starts = [info.offset for info in tarfile.open(fileobj=io.BytesIO(content))]
    start, byte = starts[place % len(starts)], place // len(starts) % BLOCK
    content[start + byte] ^= 1 << bit
    found = read(bytes(content))
    if 148 <= byte < 156 and not found[-1].fault:  # the sum itself: a blank in place of a zero
        assert found == whole
    else:
        assert "bad checksum" in found[-1].fault or "invalid header" in found[-1].fault
        assert found[:-1] == whole[: len(found) - 1]


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
def test_compressed_tars_and_their_damage(compress):
    packed, whole = compress(FULL[tarfile.PAX_FORMAT]), read(FULL[tarfile.PAX_FORMAT])
    for chunk in (1, 100, 2**20):
        assert read(packed, chunk) == whole
    for size in range(len(packed) // 2):
        assert read(packed[:size])[-1].fault.startswith("tar cut short or corrupt")


def test_what_the_stream_raises_passes_through_compressed_or_not():
    class Failing(io.BytesIO):
        def read(self, size=-1):
            if self.tell() > 600:
                raise OSError("the disk")
            return super().read(600)

    noise = bytes((i * i) % 251 for i in range(9999))
    content = write_tar([("a.jpg", tarfile.REGTYPE, noise)])
    for data in (content, gzip.compress(content, 0)):
        with pytest.raises(OSError, match="the disk"):
            list(read_tar_samples(Failing(data), lambda suffix: True))


def test_pax_size_and_path_and_headers_for_all():
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", pax_headers={"comment": "of all"}) as tar:
        info = tarfile.TarInfo("short.jpg")
        info.size, info.pax_headers = 3, {"path": "p/long.jpg", "size": "3", "SCHILY.dev": "1"}
        tar.addfile(info, io.BytesIO(b"abc"))
    assert read(file.getvalue()) == [TarSample("p/long", {"jpg": b"abc"})]


def header(name, size, kind=b"0", size_field=None):
    block = bytearray(tarfile.TarInfo(name).tobuf(tarfile.GNU_FORMAT)[:BLOCK])
    binary = b"\x80" + size.to_bytes(11, "big")
    block[124:136] = size_field or (b"%011o\0" % size if size < 8**11 else binary)
    block[156:157] = kind
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


END = bytes(2 * BLOCK)


@pytest.mark.parametrize(
    "content, fault",
    [
        (header("a.jpg", 10 * 2**30), "tar cut short or corrupt: after 0 samples, unexpected end"),
        (header("a.jpg", 0, size_field=b"\x80" + b"\x7f" * 11), "it claims to be of more than"),
        (header("a.jpg", 0, size_field=b"\xff" * 12), "invalid header"),
        (header("a.jpg", 0, size_field=b"-0000000010\0"), "invalid header"),
        (header("x", 2**33, b"x"), "a header of 8589934592 bytes"),
        (header("x", 9, b"x") + b"99 path=a".ljust(BLOCK, b"\0"), "invalid pax header"),
        (header("x", 9, b"x") + b"0 path=a\n".ljust(BLOCK, b"\0"), "invalid pax header"),
        (header("x", 9, b"x") + b"no number".ljust(BLOCK, b"\0"), "invalid pax header"),
        (b"<html>" * 200, "invalid header"),
    ],
)
def test_headers_that_cannot_be_believed(content, fault):
    (sample,) = read(content + (END if "claims" not in fault and "unexp" not in fault else b""))
    assert fault in sample.fault


def test_sparse_members_and_links_are_refused_and_the_next_member_is_found():
    sparse = bytearray(header("a.jpg", 512, b"S"))
    sparse[482] = 1  # its map goes on in the next block, which says that it ends there
    sparse[148:156] = b" " * 8
    sparse[148:156] = b"%06o\0 " % sum(sparse)
    content = bytes(sparse) + bytes(BLOCK) + b"x" * BLOCK
    content += header("b.jpg", 10 * 2**30, b"1") + header("c.jpg", 3) + b"abc".ljust(BLOCK, b"\0")
    assert [(s.key, s.fault) for s in read(content + END)] == [
        ("a", "member is sparse: a.jpg"),
        ("b", "member is no regular file: b.jpg"),
        ("c", ""),
    ]
    records = b"22 GNU.sparse.major=1\n" + b"30 GNU.sparse.name=real/d.jpg\n"
    pax = header("x", len(records), b"x") + records.ljust(BLOCK, b"\0")
    content = pax + header("GNUSparseFile.0/d.jpg", 3) + b"abc".ljust(BLOCK, b"\0") + END
    assert read(content) == [TarSample("real/d", {"jpg": b""}, "member is sparse: real/d.jpg")]


def test_a_sample_is_bounded_by_its_bytes_and_by_its_names():
    tar = write_tar(
        [
            ("a.jpg", tarfile.REGTYPE, bytes(5000)),
            ("a.txt", tarfile.REGTYPE, b"x"),
            ("b.jpg", tarfile.REGTYPE, bytes(900)),
            ("b.txt", tarfile.REGTYPE, b"x"),
        ]
    )
    large, good = read(tar, max_sample_bytes=1000)
    assert large == TarSample("a", {}, "sample too large: 5005 bytes with a.jpg, at most 1000")
    assert good.parts == {"jpg": bytes(900), "txt": b"x"}
    many = write_tar([(f"a.{i:08}.left", tarfile.REGTYPE, b"") for i in range(100)])
    (sample,) = read(many, max_sample_bytes=1000)
    assert sample.fault.startswith("sample too large: 1005 bytes") and not sample.parts
    assert read(tar, max_tar_bytes=3000)[-1].fault.endswith("of more than 3000 bytes")


def test_members_without_their_bytes():
    content = FULL[tarfile.GNU_FORMAT]
    theirs = [(m.name, m.offset_data, m.size) for m in tarfile.open(fileobj=io.BytesIO(content))]
    assert list(tar_members(io.BytesIO(content))) == theirs
    with pytest.raises(ValueError, match="cut short"):
        list(tar_members(io.BytesIO(content[:9000])))
