"""Array columns as Zarr v3: one sharded array, blosc lz4 of shuffled bits, crc32c on every chunk.

Bit-shuffle turns the always-zero high bits of codes into runs, so that lz4 keeps ceil(log2 K)
bits a code and decodes at memory speed. Text ids, which end in padding and repeat whole words,
take half as much without. Any Zarr v3 reader opens the folder. zarr writes it; we read it by byte
range (storage/README.md), because zarr-python costs more a chunk than decoding.
"""

from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import zarr
from crc32c import crc32c
from numcodecs import blosc
from zarr.codecs import BloscCodec, Crc32cCodec

from storage.files import REMEDY, StoreFiles

ABSENT = 2**64 - 1  # the offset of a chunk that is not written
SHUFFLES = {"bitshuffle": blosc.BITSHUFFLE, "noshuffle": blosc.NOSHUFFLE}


def write_array(path: Path, array: np.ndarray, chunk_rows: int) -> None:
    """Writes (rows, ...) to the folder `path`, `chunk_rows` rows a chunk, all in one shard file."""
    chunks = (chunk_rows, *array.shape[1:])
    shard_rows = max(1, -(-len(array) // chunk_rows)) * chunk_rows
    target = zarr.create_array(
        store=path,
        shape=array.shape,
        dtype=array.dtype,
        chunks=chunks,
        shards=(shard_rows, *array.shape[1:]),
        compressors=[
            BloscCodec(cname="lz4", clevel=5, shuffle=_choose_shuffle(array, chunk_rows)),
            Crc32cCodec(),
        ],
        fill_value=0,
    )
    target[:] = array


def _choose_shuffle(array: np.ndarray, chunk_rows: int) -> Any:
    """Of SHUFFLES the one that makes the first chunk smaller."""
    chunk = np.zeros((chunk_rows, *array.shape[1:]), array.dtype)  # whole, as zarr writes it
    chunk[: len(array)] = array[:chunk_rows]
    sizes = {name: len(blosc.compress(chunk, b"lz4", 5, kind)) for name, kind in SHUFFLES.items()}
    return min(sizes, key=sizes.__getitem__)


class ZarrChunks:
    """Where the chunks of one array column lie in its file, and how they decode."""

    def __init__(self, files: StoreFiles, folder: str, manifest: dict[str, Any], chunk: np.ndarray):
        """folder: of the array, in the store; chunk: an array of a whole chunk's shape and dtype.

        Raises ValueError when the index at the end of the file does not have its checksum.
        """
        self.chunk = chunk
        inner = "c" + "/0" * chunk.ndim
        self.name = f"{folder}/{inner}"
        entry = manifest["files"].get(f"{PurePosixPath(folder).name}/{inner}")
        chunks = -(-manifest["rows"] // len(chunk))
        self.places = np.full((chunks, 2), ABSENT, np.uint64)  # (start, length) of every chunk
        if chunks and entry is not None:
            self.places = self._read_index(files, entry["bytes"], 16 * chunks + 4)

    def _read_index(self, files: StoreFiles, size: int, length: int) -> np.ndarray:
        """(chunks, 2) uint64, from the end of a file of `size` bytes."""
        for fresh in (False, True):  # a cache may hold bytes of another file
            index = files.read_range(self.name, size - length, length, fresh=fresh)
            if crc32c(index[:-4]) == int.from_bytes(index[-4:], "little"):
                return np.frombuffer(index[:-4], "<u8").reshape(-1, 2)
        raise ValueError(f"{files.url}/{self.name} is damaged in its index of chunks: {REMEDY}")

    def byte_range(self, chunk: int) -> tuple[int, int] | None:
        """(start, length) of a chunk; None for one of zeros only, which Zarr does not write."""
        start, length = self.places[chunk].tolist()
        return None if start == ABSENT else (start, length)

    def decode(self, content: bytes | None, out: np.ndarray) -> None:
        """Fills `out`, the rows of one chunk. Raises ValueError for bytes that do not decode."""
        if content is None:
            out[:] = 0
            return
        whole = out if len(out) == len(self.chunk) else np.empty_like(self.chunk)
        try:
            blosc.decompress(memoryview(content)[:-4], whole)  # the last four are Zarr's crc32c
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"does not decode: {error}") from None
        if whole is not out:
            out[:] = whole[: len(out)]
