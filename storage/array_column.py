"""One array column of one shard, read a chunk at a time; no row leaves here unchecked.

The manifest holds the crc32c of every chunk of decoded rows, so that a bit that changed anywhere
between the writer's memory and ours is found, whatever the backend.
"""

from typing import Any

import numpy as np
from crc32c import crc32c

from storage.arrow_array import ArrowChunks
from storage.files import REMEDY, StoreFiles
from storage.schema import StoreMeta
from storage.zarr_array import ZarrChunks

Chunks = ZarrChunks | ArrowChunks
CHUNKS: dict[str, type[Chunks]] = {"zarr": ZarrChunks, "arrow": ArrowChunks}


class ArrayColumnReader:
    """Reads checked chunks; for arrow on a local disk also hands out the rows in place."""

    def __init__(
        self, files: StoreFiles, meta: StoreMeta, folder: str, manifest: dict[str, Any], column: str
    ):
        """folder: of the shard, in the store. Raises ValueError, naming a file, for damage."""
        spec = meta.arrays[column]
        chunk = np.empty((meta.chunk_rows, *spec.shape), spec.dtype)
        name = f"{folder}/{column}.{meta.backend}"
        self.files, self.rows, self.chunk_rows = files, manifest["rows"], meta.chunk_rows
        self.checksums = manifest["chunks"][column]
        self.chunks = CHUNKS[meta.backend](files, name, manifest, chunk)
        self._checked = np.zeros(len(self.checksums), bool)  # of the mapped rows

    def chunk_size(self, chunk: int) -> int:
        """Rows of a chunk; only a shard's last one is smaller than the store's chunk_rows."""
        return min(self.chunk_rows, self.rows - chunk * self.chunk_rows)

    def read(self, chunks: list[int], outs: list[np.ndarray]) -> None:
        """Fills outs[i], (rows, ...), with chunk number chunks[i].

        Raises ValueError, naming file and rows, for a chunk that is not what was written,
        FileNotFoundError when the shard was rewritten meanwhile.
        """
        mapped = getattr(self.chunks, "mapped", None)
        if mapped is not None:
            for chunk, out in zip(chunks, outs, strict=True):
                first = chunk * self.chunk_rows
                out[:] = mapped[first : first + len(out)]
                self._compare(chunk, out)
            return
        places = [self.chunks.byte_range(chunk) for chunk in chunks]
        ranges = [place for place in places if place]  # of zeros only: not on disk
        try:
            contents = iter(self.files.read_ranges(self.chunks.name, ranges) if ranges else [])
        except FileNotFoundError:
            gone = f"{self.files.url}/{self.chunks.name} is gone"
            raise FileNotFoundError(f"{gone}: the store was rewritten; open it again") from None
        for chunk, place, out in zip(chunks, places, outs, strict=True):
            self._decode(chunk, place, next(contents) if place else None, out)

    def in_place(self, chunks: np.ndarray) -> np.ndarray | None:
        """All rows (rows, ...) as a read-only view of the file, the given chunks checked.

        None where that cannot be: compressed or remote.
        """
        mapped = getattr(self.chunks, "mapped", None)
        if mapped is not None:
            for chunk in chunks[~self._checked[chunks]].tolist():
                first = chunk * self.chunk_rows
                self._compare(chunk, mapped[first : first + self.chunk_rows])
                self._checked[chunk] = True
        return mapped

    def _decode(
        self,
        chunk: int,
        place: tuple[int, int] | None,
        content: bytes | None,
        out: np.ndarray,
        fresh: bool = False,
    ) -> None:
        try:
            self.chunks.decode(content, out)
            self._compare(chunk, out)
        except ValueError:
            if place is None or fresh or self.files.local_path(self.chunks.name) is not None:
                raise self._damaged(chunk) from None
            # what the cache held was damaged, perhaps
            content = self.files.read_range(self.chunks.name, *place, fresh=True)
            self._decode(chunk, place, content, out, fresh=True)

    def _compare(self, chunk: int, rows: np.ndarray) -> None:
        if crc32c(rows.data) != self.checksums[chunk]:
            raise self._damaged(chunk)

    def _damaged(self, chunk: int) -> ValueError:
        first = chunk * self.chunk_rows
        last = first + self.chunk_size(chunk) - 1
        return ValueError(
            f"{self.files.url}/{self.chunks.name} is damaged in rows {first}..{last}: {REMEDY}"
        )
