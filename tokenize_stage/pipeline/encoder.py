"""Step 3 on its device: batches of uint8 pixels in, codes of all tokenizers out, asynchronously.

    encoder = Encoder({"codes": vq}, {"codes": 256}, device, torch.float16, batch_size=128)
    pending = encoder.submit({256: pixels})     # returns at once on a GPU
    codes = pending.result()["codes"]           # waits

Codes of an image depend on nothing but its pixels: not on the batch it is in, its size, or where.
So every batch has one shape, short ones are padded, and the nearest code is sought in float32 with
the codebook in float32, whatever the dtype of the convolutions (half precision in the search would
change 1 to 7 % of the codes). B images a batch, R x R pixels, N codes an image.
"""

import ctypes
import sys
from collections.abc import Callable, Mapping

import numpy as np
import torch

from tokenize_stage.vq.model import VQModel
from tokenize_stage.vq.quantizer import as_vectors, nearest_codes

Made = tuple[torch.Tensor, torch.Tensor]  # codes (B, N), and whether all of an image is finite (B,)


class Pending:
    """Codes on their way from the device."""

    def __init__(
        self,
        made: Mapping[str, Made],
        rows: int,
        dtype: torch.dtype,
        done: torch.cuda.Event | None,
    ):
        self._made, self._rows, self._dtype, self._done = made, rows, dtype, done

    def result(self) -> dict[str, np.ndarray]:
        """Column -> codes (rows, N), in the smallest unsigned dtype; waits for the device.

        Raises ValueError when an encoder's numbers have left the range of its dtype.
        """
        if self._done is not None:
            self._done.synchronize()
        for column, (_, is_finite) in self._made.items():
            if not is_finite[: self._rows].all():
                raise ValueError(
                    f"{column}: latents beyond the range of {self._dtype}; start again with "
                    "encode.dtype=bfloat16 or float32, into another store"
                )
        return {column: codes[: self._rows].numpy() for column, (codes, _) in self._made.items()}


class Encoder:
    """VQ models on a device, fed with batches of at most `batch_size` images."""

    def __init__(
        self,
        models: Mapping[str, VQModel],
        resolutions: Mapping[str, int],
        device: torch.device,
        dtype: torch.dtype,
        batch_size: int,
        compile: bool = False,
        backend: str = "inductor",
    ):
        """models, resolutions: by column of codes. Takes the models over: moves and converts them.

        compile: by torch.compile with `backend`; the shapes are fixed, so it happens once a model.
        """
        if device.type == "cpu":
            keep_heap()
        self.device, self.dtype, self.batch_size = device, dtype, batch_size
        self.resolutions = dict(resolutions)
        self._encode = {
            column: _encode_by(model, device, dtype) for column, model in models.items()
        }
        if compile:
            self._encode = {
                column: torch.compile(encode, dynamic=False, backend=backend)
                for column, encode in self._encode.items()
            }
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    @torch.inference_mode()
    def submit(self, pixels: Mapping[int, np.ndarray]) -> Pending:
        """Pixels by resolution, (n, 3, R, R) uint8 with n <= batch_size -> their codes, soon.

        On a CPU they are encoded here and now.
        """
        rows = len(next(iter(pixels.values())))
        batches = {resolution: self._to_device(images) for resolution, images in pixels.items()}
        with torch.backends.cudnn.flags(deterministic=True, allow_tf32=False):
            made = {
                column: encode(batches[self.resolutions[column]])
                for column, encode in self._encode.items()
            }
        if self._copies is None:
            return Pending(made, rows, self.dtype, None)
        made = {column: (_to_host(codes), _to_host(ok)) for column, (codes, ok) in made.items()}
        done = torch.cuda.current_stream(self.device).record_event()
        return Pending(made, rows, self.dtype, done)

    def _to_device(self, pixels: np.ndarray) -> torch.Tensor:
        """(n, 3, R, R) -> (B, 3, R, R), the rest zeros.

        Copied by a stream of its own, so that the copy overlaps the work on the batch before.
        """
        shape = (self.batch_size, *pixels.shape[1:])
        host = torch.empty(shape, dtype=torch.uint8, pin_memory=self._copies is not None)
        host[: len(pixels)] = torch.from_numpy(pixels)
        host[len(pixels) :] = 0
        if self._copies is None:
            return host
        with torch.cuda.stream(self._copies):  # the allocator keeps `host` until it is copied
            batch = host.to(self.device, non_blocking=True)
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self._copies)
        batch.record_stream(current)
        return batch


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def _encode_by(
    model: VQModel, device: torch.device, dtype: torch.dtype
) -> Callable[[torch.Tensor], Made]:
    """A function from pixels (B, 3, R, R) uint8 to what is made of them."""
    codebook = model.quantizer.vectors.detach().to(device, torch.float32, copy=True)  # (K, D)
    model = model.to(device, dtype).to(memory_format=torch.channels_last)
    narrow = torch.uint16 if len(codebook) <= 2**16 else torch.uint32

    def encode(pixels: torch.Tensor) -> Made:
        batch = pixels.to(torch.float32, memory_format=torch.channels_last) / 255
        latents = model.latents(batch.to(dtype))  # (B, D, h, w)
        codes = nearest_codes(as_vectors(latents), codebook).view(len(latents), -1)
        return codes.to(narrow), latents.isfinite().flatten(1).all(1)

    return encode


def keep_heap() -> None:
    """Lets glibc keep freed memory: by default every activation is mapped and faulted in anew.

    Encodes 1.5 times as fast on a CPU. Of no effect where there is no glibc.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-3, 2**31 - 1)  # M_MMAP_THRESHOLD: nothing is too large for the heap
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: nor given back
