"""One tensor of integers out of a .pth file, without torch and without running what it says.

torch.save writes a zip: a pickle that builds the tensor, and its numbers as raw bytes. Of the
pickle only the words that build a plain tensor are understood; anything else is refused.
"""

import io
import pickle
import zipfile
from collections import OrderedDict
from typing import Any

import numpy as np

DTYPES = {
    "ByteStorage": "u1", "CharStorage": "i1", "ShortStorage": "<i2", "IntStorage": "<i4",
    "LongStorage": "<i8",
}  # fmt: skip
FAULTS = (  # of a file that is no zip, of a pickle that is not what torch writes
    zipfile.BadZipFile, pickle.UnpicklingError, EOFError, LookupError, TypeError, AttributeError,
    RuntimeError, OverflowError,
)  # fmt: skip


def read_pth(content: bytes) -> np.ndarray:
    """The tensor that torch.save wrote, as numpy. Raises ValueError for anything else."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            (name,) = (n for n in archive.namelist() if n.endswith("/data.pkl"))
            tensor = _TensorUnpickler(archive, name.removesuffix("data.pkl")).load()
    except FAULTS as error:
        raise ValueError(f"not a tensor as torch.save writes it: {error}") from None
    if not isinstance(tensor, np.ndarray):
        raise ValueError(f"a {type(tensor).__name__}, not a tensor")
    return tensor


class _TensorUnpickler(pickle.Unpickler):
    def __init__(self, archive: zipfile.ZipFile, folder: str):
        super().__init__(io.BytesIO(archive.read(f"{folder}data.pkl")))
        self.archive, self.folder = archive, folder

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        raise pickle.UnpicklingError(f"it holds {module}.{name}")

    def persistent_load(self, pid: Any) -> np.ndarray:
        _, dtype, key, _, _ = pid
        return np.frombuffer(self.archive.read(f"{self.folder}data/{key}"), dtype)


def _rebuild(
    storage: np.ndarray, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any
) -> np.ndarray:
    """Element (i, j, …) stands at offset + i·stride[0] + j·stride[1] + …; never out of bounds."""
    places = np.array(offset)
    for count, step in zip(size, stride, strict=True):
        places = places[..., None] + np.arange(count) * step
    return np.asarray(storage[places])
