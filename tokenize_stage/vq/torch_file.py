"""The tensors of a torch.save file, without ever running what its pickle says.

A Lightning checkpoint holds more than weights: callbacks, optimizers, objects of any class. Here a
name in the pickle that is not one of the four that rebuild tensors becomes a stub that takes
everything and does nothing. For converters (see taming.py).
"""

import io
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch

DTYPES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}  # fmt: skip
FAULTS = (  # of a file that is no zip, of a pickle that is not what torch writes
    zipfile.BadZipFile, pickle.UnpicklingError, EOFError, LookupError, TypeError, AttributeError,
    ValueError, RuntimeError, OverflowError,
)  # fmt: skip


class Inert(dict):
    """Stands for whatever else a file names: takes every argument and state, does nothing."""

    __hash__ = object.__hash__  # type: ignore[assignment]

    def __init__(self, *_: Any, **__: Any):
        super().__init__()

    def __call__(self, *_: Any, **__: Any) -> "Inert":
        return self

    def __setstate__(self, _: Any) -> None:
        pass

    append = extend = add = __setitem__ = __call__  # type: ignore[assignment]


def read_torch_file(path: Path) -> Any:
    """What torch.save wrote, on the CPU: tensors, plain containers and numbers; the rest Inert.

    Raises ValueError for a file that torch.save did not write.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError):
        pass  # it holds more than weights, or is damaged
    try:
        with zipfile.ZipFile(path) as archive:
            (name,) = (n for n in archive.namelist() if n.endswith("/data.pkl"))
            return _InertUnpickler(archive, name.removesuffix("data.pkl")).load()
    except FAULTS as error:
        raise ValueError(
            f"{path} cannot be read as weights ({error}): it is damaged, or older than PyTorch 1.6 "
            "and holds more than weights"
        ) from None


class _InertUnpickler(pickle.Unpickler):
    def __init__(self, archive: zipfile.ZipFile, folder: str):
        super().__init__(io.BytesIO(archive.read(f"{folder}data.pkl")))
        self.archive, self.folder = archive, folder

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        known = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch", "Size"): torch.Size,
            ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
            ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
        }
        return known.get((module, name)) or type(name, (Inert,), {})

    def persistent_load(self, pid: Any) -> torch.Tensor:
        _, dtype, key, _, _ = pid
        content = bytearray(self.archive.read(f"{self.folder}data/{key}"))
        return torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)


def _rebuild_tensor(
    storage: torch.Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any
) -> torch.Tensor:
    return storage.as_strided(size, stride, offset)  # refuses what is out of bounds


def _rebuild_parameter(data: torch.Tensor, *_: Any) -> torch.Tensor:
    return data
