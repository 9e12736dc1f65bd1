"""Step 3 on its device: batches of uint8 pixels in, codes of all tokenizers out, asynchronously.

    encoder = Encoder({"codes": vq}, {"codes": 256}, device, torch.float16, batch_size=128)
    pending = encoder.submit({256: pixels})     # returns at once on a GPU
    codes = pending.result()["codes"]           # waits; with soft codes, topk_codes, … beside it

Codes of an image depend on nothing but its pixels: not on what else is in its batch, how much, or
where it is. So a model sees one shape only, what is missing is padded, and the nearest code is
sought in float32 among float32 vectors, whatever the dtype of the convolutions (half precision in
the search would change 1 to 7 % of the codes). R x R pixels, P images of a piece, N codes an image.
"""

import ctypes
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from tokenize_stage.vq.model import VQModel
from tokenize_stage.vq.quantizer import SoftCodes, as_vectors, nearest_codes, soft_codes

IN_FLIGHT = 4  # batches on a GPU; `submit` waits for the oldest when there are more
CPU_PIXELS = 2**16  # of a piece on a CPU: more at once gains nothing, and takes memory
CPU_IMAGES = 8  # of a piece on a CPU at most, where images are small

Made = tuple[torch.Tensor, ...]  # whether latents are finite (P,), then an array a column (P, N…)


class OutOfRange(ValueError):
    """Latents are infinite or no numbers; the message says what to do."""


def soft_columns(column: str) -> tuple[str, str]:
    """The columns of the nearest codes and of their weights, beside one of codes."""
    suffix = column.removeprefix("codes")
    return f"topk_codes{suffix}", f"topk_weights{suffix}"


class Pending:
    """Codes on their way from the device."""

    def __init__(
        self,
        made: Mapping[str, Sequence[Made]],
        rows: int,
        dtype: torch.dtype,
        done: torch.cuda.Event | None,
    ):
        self._made, self._rows, self._dtype, self._done = made, rows, dtype, done

    def result(self) -> dict[str, np.ndarray]:
        """Column -> codes (rows, N), in the smallest unsigned dtype; waits for the device.

        Of soft codes also soft_columns: (rows, N, k) of the codes' dtype and float16.
        Raises OutOfRange when an encoder's numbers have left the range of its dtype.
        """
        if self._done is not None:
            self._done.synchronize()
        codes: dict[str, np.ndarray] = {}
        for column, pieces in self._made.items():
            finite, *arrays = (
                np.concatenate([piece.numpy() for piece in of_all])[: self._rows]
                for of_all in zip(*pieces, strict=True)
            )
            if not finite.all():
                raise OutOfRange(f"{column}: {_not_finite(self._dtype)}")
            codes |= zip((column, *soft_columns(column)), arrays, strict=False)
        return codes


def _not_finite(dtype: torch.dtype) -> str:
    if dtype == torch.float16:
        return (
            f"latents beyond the range of {dtype}; start again with encode.dtype=bfloat16 or "
            "float32, into another store"
        )
    return f"latents that are not finite in {dtype}: the tokenizer's weights are broken"


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
        soft: Mapping[str, SoftCodes] | None = None,
    ):
        """models, resolutions: by column of codes. Takes the models over: moves and converts them.

        soft: what is kept beside the codes, of the columns that it names.
        compile: by torch.compile with `backend`; the shapes are fixed, so it happens once a model.
        """
        if device.type == "cpu":
            keep_heap()
        self.device, self.dtype, self.batch_size = device, dtype, batch_size
        self.resolutions = dict(resolutions)
        self._encode = {
            column: _encode_by(model, device, dtype, (soft or {}).get(column))
            for column, model in models.items()
        }
        if compile:
            self._encode = {
                column: torch.compile(encode, dynamic=False, backend=backend)
                for column, encode in self._encode.items()
            }
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._in_flight: deque[torch.cuda.Event] = deque()

    def piece(self, resolution: int) -> int:
        """P: images that a model sees at once. On a CPU it follows from the resolution alone.

        On a GPU it is batch_size, and for another one kernels may be chosen that round otherwise.
        """
        if self._copies is not None:
            return self.batch_size
        return max(1, min(CPU_IMAGES, CPU_PIXELS // resolution**2))

    @torch.inference_mode()
    def submit(self, pixels: Mapping[int, np.ndarray]) -> Pending:
        """Pixels by resolution, (n, 3, R, R) uint8 with n <= batch_size -> their codes, soon.

        On a CPU they are encoded here and now.
        """
        rows = len(next(iter(pixels.values())))
        if self._copies is not None and len(self._in_flight) == IN_FLIGHT:
            self._in_flight.popleft().synchronize()
        batches = {size: self._to_device(images) for size, images in pixels.items()}
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            made = {
                column: [encode(piece) for piece in batches[self.resolutions[column]]]
                for column, encode in self._encode.items()
            }
        if self._copies is None:
            return Pending(made, rows, self.dtype, None)
        made = {
            column: [tuple(_to_host(array) for array in piece) for piece in pieces]
            for column, pieces in made.items()
        }
        done = torch.cuda.Event(blocking=True)  # who waits leaves the core to decoding
        done.record(torch.cuda.current_stream(self.device))
        self._in_flight.append(done)
        return Pending(made, rows, self.dtype, done)

    def _to_device(self, pixels: np.ndarray) -> list[torch.Tensor]:
        """(n, 3, R, R) -> pieces (P, 3, R, R), the last one's rest zeros."""
        size = self.piece(pixels.shape[2])
        return [self._piece(pixels[row : row + size], size) for row in range(0, len(pixels), size)]

    def _piece(self, pixels: np.ndarray, size: int) -> torch.Tensor:
        """Copied by a stream of its own, so that the copy overlaps the work on the piece before.

        From pinned memory, which torch keeps until it is copied, and then uses again.
        """
        host = torch.empty(
            (size, *pixels.shape[1:]), dtype=torch.uint8, pin_memory=self._copies is not None
        )
        host[: len(pixels)] = torch.from_numpy(pixels)
        host[len(pixels) :] = 0
        if self._copies is None:
            return host
        with torch.cuda.stream(self._copies):
            piece = host.to(self.device, non_blocking=True)
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self._copies)
        piece.record_stream(current)
        return piece


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def _encode_by(
    model: VQModel, device: torch.device, dtype: torch.dtype, soft: SoftCodes | None
) -> Callable[[torch.Tensor], Made]:
    """A function from pixels (P, 3, R, R) uint8 to what is made of them."""
    codebook = model.quantizer.vectors.detach().to(device, torch.float32, copy=True)  # (K, D)
    model = model.to(device, dtype).to(memory_format=torch.channels_last)
    narrow = torch.uint16 if len(codebook) <= 2**16 else torch.uint32

    def encode(pixels: torch.Tensor) -> Made:
        batch = pixels.to(torch.float32, memory_format=torch.channels_last) / 255
        latents = model.latents(batch.to(dtype))  # (P, D, h, w)
        is_finite, vectors = latents.isfinite().flatten(1).all(1), as_vectors(latents)
        if soft is None:
            codes = nearest_codes(vectors, codebook).view(len(latents), -1)
            return is_finite, codes.to(narrow)
        codes, weights = (
            x.unflatten(0, (len(latents), -1)) for x in soft_codes(vectors, codebook, soft)
        )
        return is_finite, codes[..., 0].to(narrow), codes.to(narrow), weights.half()

    return encode


def keep_heap() -> None:
    """Lets glibc keep freed memory: by default every activation is mapped and faulted in anew.

    Encodes 1.5 times as fast on a CPU. Of no effect where there is no glibc.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-3, 192 * 2**20)  # M_MMAP_THRESHOLD: what is larger, as huge images, goes back
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: nothing of the heap does
