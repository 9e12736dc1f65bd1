"""Ten buckets of mask ratios, by which losses and entropies are told apart (steps 6 and 7)."""

import torch
from torch import Tensor

BUCKETS = 10  # of the share of masked codes: (0, .1], (.1, .2], … (.9, 1]


def bucket_of(share: Tensor) -> Tensor:
    """Shares in (0, 1] -> bucket index 0..9; a share on an edge belongs to the lower bucket."""
    edges = torch.arange(1, BUCKETS, device=share.device) / BUCKETS
    return torch.bucketize(share, edges)


def code_buckets(hidden: Tensor) -> Tensor:
    """hidden (b, N) bool -> (b, N): the bucket of a hidden code's row, BUCKETS for visible ones."""
    bucket = bucket_of(hidden.float().mean(-1, keepdim=True))
    return torch.where(hidden, bucket, BUCKETS)
