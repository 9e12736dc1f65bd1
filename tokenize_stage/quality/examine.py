"""What an audit measures of codes: reconstructions, their likeness, codes changed, captions cut."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from storage.reader import TokenStore
from storage.stats import codebook_usage
from tokenize_stage.quality.likeness import WINDOW, psnr, ssim
from tokenize_stage.text.tokenizer import CaptionTokenizer, load_tokenizer
from tokenize_stage.vq.model import VQModel

USAGE_ROWS = 1_000_000  # about, read for the use of a codebook


@torch.no_grad()
def reconstruct(
    model: VQModel, codes: np.ndarray, grid: Sequence[int], batch_size: int
) -> np.ndarray:
    """Codes (n, N) -> pictures (n, 3, R, R) uint8, in the model's precision and on its device."""
    device = next(model.parameters()).device
    parts = []
    batches = torch.from_numpy(codes.astype(np.int64)).split(batch_size)
    for batch in tqdm(batches, "decode", disable=None, leave=False):
        with torch.backends.cudnn.flags(allow_tf32=False):
            pixels = model.decode(batch.view(-1, *grid).to(device)).clamp(0, 1)
        parts.append((pixels * 255).round().byte().cpu().numpy())
    return np.concatenate(parts)


def psnr_of_rows(images: np.ndarray, rebuilt: np.ndarray) -> list[float]:
    """Of every pair of pictures (n, 3, R, R) uint8, in dB; inf for equal ones."""
    return [psnr(_pixels(x), _pixels(y)) for x, y in zip(images, rebuilt, strict=True)]


def mean_psnr(of_rows: Sequence[float]) -> float | None:
    """The PSNR of all pixels of equally large pictures; None when all are equal."""
    error = math.fsum(10 ** (-value / 10) for value in of_rows) / len(of_rows)
    return -10 * math.log10(error) if error else None


def mean_ssim(images: np.ndarray, rebuilt: np.ndarray) -> float | None:
    """Over all pairs of pictures (n, 3, R, R) uint8; None where they are too small for SSIM."""
    if images.shape[-1] < WINDOW:
        return None
    pairs = zip(images, rebuilt, strict=True)
    return math.fsum(ssim(_pixels(x)[None], _pixels(y)[None]) for x, y in pairs) / len(images)


def usage(store: TokenStore, column: str) -> dict[str, Any]:
    """How the codebook is used by about USAGE_ROWS rows; dead codes are in none of them."""
    found = codebook_usage(store, column, USAGE_ROWS)
    size = len(found.pop("counts"))
    return {"codebook_size": size, "dead": size - found["used"], **found}


def captions_cut(store: TokenStore, shards: Sequence[int]) -> dict[str, dict[str, Any]]:
    """Of every column of text ids, in some shards: captions, those of full length, those cut.

    "cut" is None where the tokenizer is not to be had: at most those of full length are.
    """
    recorded: Mapping[str, Any] = store.meta.transform.get("text", {}).get("tokenizers", {})
    found: dict[str, dict[str, Any]] = {}
    for name, about in recorded.items():
        full: list[str] = []
        rows = 0
        for shard in shards:
            lengths = store.shard_column(shard, f"text_length_{name}")
            captions = store.shard_column(shard, "caption")[lengths == about["length"]]
            full += [caption or "" for caption in captions.tolist()]
            rows += len(lengths)
        try:
            tokenizer = CaptionTokenizer(load_tokenizer(about["name"]), about["length"], name)
            cut = int(tokenizer(full).cut.sum())
        except (OSError, ValueError):
            cut = None
        found[f"text_ids_{name}"] = {
            "captions": rows,
            "length": about["length"],
            "full": len(full),
            "cut": cut,
        }
    return found


def _pixels(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images).double() / 255
