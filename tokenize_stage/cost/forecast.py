"""Measured stages -> what a data set will take: rate, GPU-hours, cores, bytes, money."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Measured:
    """Rates of the stages, each alone on this machine; a sample is an image of the input."""

    samples_per_s_read: float  # one reading thread
    core_s_per_sample: float  # of the CPU, to decode and to select
    rows_per_s_encoded: float  # one device, all tokenizers
    rows_per_s_written: float  # shards made, flushed and committed
    texts_per_s: float | None  # captions to ids and states; None: no text
    text_on_device: bool  # whether text encoders share the device with the tokenizers
    accepted: float  # share of the samples that become rows
    views: int  # rows of a sample that is accepted
    bytes_per_sample: float  # undecoded
    cores: int  # of this machine, for decoding threads


@dataclass(frozen=True)
class Forecast:
    """For a whole data set. Rates are of input images, for one GPU."""

    images: int
    rows: int
    stages: dict[str, float]  # stage -> images/s that it could do alone
    images_per_s: float  # of one GPU
    bound_by: str  # the slowest stage
    cores: int  # beside each GPU
    cores_needed: float  # to keep a GPU busy
    gpu_hours: float
    wall_hours: float
    bytes: dict[str, float]  # column -> on disk
    read_bytes: float
    money: float | None


def forecast(
    measured: Measured,
    images: int,
    gpus: int,
    row_bytes: Mapping[str, float],
    cores: int | None = None,
    price: float | None = None,
) -> Forecast:
    """What follows for `images` input images on `gpus` GPUs, each with `cores` CPU cores.

    The stages run at the same time, so the slowest counts. cores None: as many as were measured.
    """
    cores = cores or measured.cores
    rows_per_image = measured.accepted * measured.views
    stages = {
        "read": measured.samples_per_s_read,
        "decode": cores / measured.core_s_per_sample,
        "encode": _per_image(measured.rows_per_s_encoded, rows_per_image),
        "write": _per_image(measured.rows_per_s_written, rows_per_image),
    }
    if measured.texts_per_s is not None:
        text = _per_image(measured.texts_per_s, measured.accepted)
        if measured.text_on_device:
            stages["encode"] = 1 / (1 / stages["encode"] + 1 / text)
        else:
            stages["text"] = text
    bound_by = min(stages, key=lambda name: stages[name])
    rate = stages[bound_by]
    gpu_hours = images / rate / 3600
    rows = round(images * rows_per_image)
    return Forecast(
        images=images,
        rows=rows,
        stages=stages,
        images_per_s=rate,
        bound_by=bound_by,
        cores=cores,
        cores_needed=stages["encode"] * measured.core_s_per_sample,
        gpu_hours=gpu_hours,
        wall_hours=gpu_hours / gpus,
        bytes={name: size * rows for name, size in row_bytes.items()},
        read_bytes=images * measured.bytes_per_sample,
        money=None if price is None else gpu_hours * price,
    )


def _per_image(rate: float, share: float) -> float:
    """A rate in rows as one in input images, of which `share` rows come."""
    return rate / share if share else float("inf")
