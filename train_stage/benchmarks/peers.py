"""Other ways to the same batches, for train_stage.bench: what users of other libraries would write.

Each has a reader (files -> endless shuffled epochs of int64 batches with labels) in the form that
its documentation advises for speed, with the number of workers that suited it best, and a writer of
its files. A library is imported where it is used: each is optional.
"""

import io
import tarfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler

from train_stage.benchmarks.limits import BATCH, Pair, load_raw
from train_stage.benchmarks.measure import Way

SHARDS = 5  # files a set is cut into, where a format has such
TARS = 10


def pieces(codes: np.ndarray, labels: np.ndarray, shards: int) -> Iterator[tuple[np.ndarray, ...]]:
    """The rows in `shards` parts, in order."""
    return zip(np.array_split(codes, shards), np.array_split(labels, shards), strict=True)


def write_datasets(folder: Path, codes: np.ndarray, labels: np.ndarray) -> None:
    """Arrow files of a Hugging Face dataset."""
    import datasets

    lists = pa.FixedSizeListArray.from_arrays(codes.reshape(-1), codes.shape[1])
    rows = datasets.Dataset(pa.table({"codes": lists, "label": labels}))
    rows.save_to_disk(folder, num_shards=SHARDS)


def write_webdataset(folder: Path, codes: np.ndarray, labels: np.ndarray) -> None:
    """Tars with a .npy and a .cls a row."""
    row = count()
    for shard, part in enumerate(pieces(codes, labels, TARS)):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for row_codes, label in zip(*part, strict=True):
                key, file = f"{next(row):09d}", io.BytesIO()
                np.save(file, row_codes)
                for name, data in (("npy", file.getvalue()), ("cls", str(label).encode())):
                    member = tarfile.TarInfo(f"{key}.{name}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


def write_streaming(folder: Path, codes: np.ndarray, labels: np.ndarray) -> None:
    """MosaicML's MDS shards of at most 64 MiB."""
    from streaming import MDSWriter

    columns = {"codes": f"ndarray:uint16:{codes.shape[1]}", "label": "int32"}
    size = min(1 << 26, codes.nbytes // SHARDS)
    with MDSWriter(out=str(folder), columns=columns, size_limit=size) as writer:
        for row_codes, label in zip(codes, labels, strict=True):
            writer.write({"codes": row_codes, "label": label})


def write_litdata(folder: Path, codes: np.ndarray, labels: np.ndarray) -> None:
    """litdata's chunks of at most 64 MB."""
    import litdata

    parts = list(zip(np.array_split(np.arange(len(codes)), SHARDS), strict=True))
    size = min(64_000_000, codes.nbytes // SHARDS)
    make = partial(litdata_rows, codes=codes, labels=labels)
    litdata.optimize(make, parts, str(folder), chunk_bytes=size, num_workers=1)


def litdata_rows(
    part: tuple[np.ndarray], codes: np.ndarray, labels: np.ndarray
) -> Iterator[dict[str, object]]:
    """Rows as litdata takes them."""
    for row in part[0]:
        yield {"codes": codes[row], "label": int(labels[row])}


class Rows(Dataset):
    """Memory-mapped rows as a map-style dataset: one by one, or (batched) a batch a call."""

    def __init__(self, folder: Path):
        self.codes, self.labels = load_raw(folder)

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
        return torch.from_numpy(self.codes[row].astype(np.int64)), int(self.labels[row])


class BatchedRows(Rows):
    """Rows whose batches come by one gather."""

    def __getitems__(self, rows: list[int]) -> Pair:
        return gather(self.codes, self.labels, np.array(rows))


def gather(codes: np.ndarray, labels: np.ndarray, rows: np.ndarray) -> Pair:
    """A batch by numpy's own indexing."""
    picked = torch.from_numpy(codes[rows].astype(np.int64))
    return picked, torch.from_numpy(labels[rows].astype(np.int64))


def row_by_row(codes: np.ndarray, labels: np.ndarray, rows: np.ndarray) -> Pair:
    """A batch as nanoGPT makes it: one copy a row, then a stack."""
    picked = torch.stack([torch.from_numpy(codes[row].astype(np.int64)) for row in rows])
    return picked, torch.from_numpy(labels[rows].astype(np.int64))


def memmap(folder: Path, make: Callable[..., Pair], reopen: bool) -> Iterator[Pair]:
    """Batches of a permutation; `reopen`: map the file anew for each, as nanoGPT does."""
    codes, labels = load_raw(folder)
    generator = np.random.default_rng(0)
    while True:
        rows = generator.permutation(len(codes))
        for first in range(0, len(rows), BATCH):
            if reopen:
                codes, labels = load_raw(folder)
            yield make(codes, labels, rows[first : first + BATCH])


def endless(loader: Iterable[Any]) -> Iterator[Pair]:
    """Epoch after epoch of a loader, as int64."""
    while True:
        for batch in loader:
            named = isinstance(batch, dict)
            codes, labels = (batch["codes"], batch["label"]) if named else batch
            yield torch.as_tensor(codes).long(), torch.as_tensor(labels).long()


def torch_collate(folder: Path) -> Iterator[Pair]:
    """torch's DataLoader and its default collate."""
    return endless(DataLoader(Rows(folder), BATCH, shuffle=True))


def torchdata_batched(folder: Path) -> Iterator[Pair]:
    """torchdata's StatefulDataLoader over __getitems__: one gather a batch."""
    from torchdata.stateful_dataloader import StatefulDataLoader

    loader = StatefulDataLoader(BatchedRows(folder), BATCH, shuffle=True, collate_fn=lambda x: x)
    return endless(loader)


def datasets_map(folder: Path) -> Iterator[Pair]:
    """A Hugging Face dataset, one `take` a batch, as numpy."""
    import datasets

    rows = datasets.load_from_disk(folder).with_format("numpy")
    sampler = BatchSampler(RandomSampler(rows), BATCH, drop_last=False)
    loader = DataLoader(rows, sampler=sampler, batch_size=None)  # type: ignore[arg-type]
    return endless(loader)


def datasets_iterable(folder: Path) -> Iterator[Pair]:
    """The same as an iterable of 64 shards with a shuffle buffer of 10,000 rows, 2 workers."""
    import datasets

    rows = datasets.load_from_disk(folder).to_iterable_dataset(num_shards=64)
    shuffled = rows.shuffle(seed=0, buffer_size=10_000).with_format("numpy")
    loader = DataLoader(shuffled, BATCH, num_workers=2)
    return endless(loader)


def webdataset_npy(folder: Path) -> Iterator[Pair]:
    """Shuffled tars and a shuffle buffer of 1,000 rows, batched in 2 workers."""
    import webdataset

    tars = sorted(map(str, folder.glob("*.tar")))
    rows = webdataset.WebDataset(tars, shardshuffle=len(tars), seed=0).shuffle(1000).decode()
    batched = rows.to_tuple("npy", "cls").batched(BATCH)
    return endless(webdataset.WebLoader(batched, batch_size=None, num_workers=2))


def streaming_mds(folder: Path) -> Iterator[Pair]:
    """MosaicML streaming, its default shuffle (py1e), 2 workers."""
    from streaming import StreamingDataLoader, StreamingDataset

    rows = StreamingDataset(local=str(folder), shuffle=True, batch_size=BATCH)
    loader = StreamingDataLoader(rows, batch_size=BATCH, num_workers=2)
    return endless(loader)


def litdata_chunks(folder: Path) -> Iterator[Pair]:
    """litdata in this process, which is where it is fastest."""
    import litdata

    rows = litdata.StreamingDataset(str(folder), shuffle=True)
    loader = litdata.StreamingDataLoader(rows, batch_size=BATCH, num_workers=0)
    return endless(loader)


WRITERS = {
    "datasets": write_datasets,
    "webdataset": write_webdataset,
    "streaming": write_streaming,
    "litdata": write_litdata,
}
nanogpt = partial(memmap, make=row_by_row, reopen=True)
batched_memmap = partial(memmap, make=gather, reopen=False)
PEERS = [
    Way("numpy memmap, batched `mm[rows].astype`", "raw", batched_memmap, "by offset"),
    Way("numpy memmap, row by row (nanoGPT)", "raw", nanogpt, "by offset"),
    Way("torch DataLoader, a row a call", "raw", torch_collate, "by offset"),
    Way("torchdata StatefulDataLoader, batched", "raw", torchdata_batched, "yes", "torchdata"),
    Way("HF datasets, map-style, batched", "datasets", datasets_map, "by offset", "datasets"),
    Way("HF datasets, iterable, 2 workers", "datasets", datasets_iterable, "no", "datasets"),
    Way(
        "webdataset .npy, 2 workers",
        "webdataset",
        webdataset_npy,
        "no",
        "webdataset",
        most_rows=100_000,
    ),
    Way("MosaicML streaming, 2 workers", "streaming", streaming_mds, "yes", "streaming"),
    Way("litdata", "litdata", litdata_chunks, "yes", "litdata"),
]
