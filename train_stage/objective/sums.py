"""Running sums of the losses: what the log says of many steps and of all processes."""

from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from train_stage.objective.buckets import BUCKETS

SIZES = {"bucket": BUCKETS + 1, "entropy": BUCKETS}  # by the first word of a field; others are ()


@dataclass
class Sums:
    """Running sums for the log, kept on the device until a log line needs them.

    Buckets are of the share of hidden codes of a row; one more is for visible codes that are
    scored. A new sum is added at the end: checkpoints hold all as one vector.
    """

    loss: Tensor  # () what is minimised of the codes: smoothed, weighted
    weight: Tensor  # () of those codes
    bucket_loss: Tensor  # (11,) cross-entropy in nats
    bucket_correct: Tensor  # (11,)
    bucket_count: Tensor  # (11,)
    entropy_token: Tensor  # (10,) nats, of images
    entropy_image: Tensor  # (10,)
    entropy_count: Tensor  # (10,) images
    critic_loss: Tensor  # ()
    critic_correct: Tensor  # ()
    critic_count: Tensor  # ()

    @classmethod
    def zeros(cls, device: torch.device) -> "Sums":
        shapes = [shape_of(field.name) for field in fields(cls)]
        return cls(*(torch.zeros(s, dtype=torch.float64, device=device) for s in shapes))

    def add(self, out: dict[str, Tensor]) -> None:
        """Adds what MaskedLoss gave of one forward pass."""
        if "losses" in out:
            weight, bucket = out["weight"].double(), out["bucket"]  # (M,)
            self.loss += (out["losses"] * weight).sum()
            self.weight += weight.sum()
            self.bucket_loss.index_add_(0, bucket, out["plain"].double())
            self.bucket_correct.index_add_(0, bucket, out["correct"].double())
            self.bucket_count.index_add_(0, bucket, torch.ones_like(weight))
        if "entropy_token" in out:
            bucket = out["entropy_bucket"]  # (b,)
            self.entropy_token.index_add_(0, bucket, out["entropy_token"].double())
            self.entropy_image.index_add_(0, bucket, out["entropy_image"].double())
            self.entropy_count.index_add_(0, bucket, torch.ones_like(bucket, dtype=torch.float64))
        if "critic_losses" in out:
            self.critic_loss += out["critic_losses"].sum()
            self.critic_correct += out["critic_correct"].sum()
            self.critic_count += out["critic_losses"].numel()

    def merge(self, other: "Sums") -> None:
        """Adds another's sums."""
        for name, value in vars(other).items():
            getattr(self, name).add_(value)

    @classmethod
    def from_flat(cls, flat: Tensor) -> "Sums":
        """flat() backwards; sums that an earlier version did not have are zeros."""
        shapes = [shape_of(field.name) for field in fields(cls)]
        sizes = [shape.numel() for shape in shapes]
        parts = F.pad(flat, (0, sum(sizes) - len(flat))).split(sizes)
        return cls(*(part.view(shape) for part, shape in zip(parts, shapes, strict=True)))

    def flat(self) -> Tensor:
        """All sums as one vector, for one all-reduce and one copy to the host."""
        return torch.cat([value.reshape(-1) for value in vars(self).values()])


def shape_of(field: str) -> torch.Size:
    """The shape of one of the sums."""
    return torch.Size([SIZES[kind]] if (kind := field.split("_")[0]) in SIZES else [])


def describe_sums(flat: list[float]) -> dict[str, float]:
    """Metrics from Sums.flat(), summed over processes; losses and entropies in nats.

    loss is what is minimised; cross_entropy, accuracy and those by bucket are of hidden codes, or
    of the critic where nothing else is learned.
    """
    sums = Sums.from_flat(torch.tensor(flat, dtype=torch.float64))
    critic = [x / sums.critic_count.clamp(min=1) for x in (sums.critic_loss, sums.critic_correct)]
    count = sums.bucket_count[:-1].sum().clamp(min=1)
    hidden = [x[:-1].sum() / count for x in (sums.bucket_loss, sums.bucket_correct)]
    of_codes = [sums.loss / sums.weight, *hidden] if sums.weight else [critic[0], *critic]
    names = ("loss", "cross_entropy", "accuracy")
    metrics = {name: value.item() for name, value in zip(names, of_codes, strict=True)}
    if sums.critic_count:
        metrics |= {"critic_loss": critic[0].item(), "critic_accuracy": critic[1].item()}
    metrics |= by_bucket("loss", sums.bucket_loss, sums.bucket_count)
    for name in ("entropy_token", "entropy_image"):
        metrics |= by_bucket(name, getattr(sums, name), sums.entropy_count)
    return metrics


def by_bucket(name: str, total: Tensor, count: Tensor) -> dict[str, float]:
    """Means of the buckets that hold something, as name_masked_0_10, …, and name_visible."""
    names = [f"{name}_masked_{10 * n}_{10 * (n + 1)}" for n in range(BUCKETS)]
    return {
        label: (total[index] / count[index]).item()
        for index, label in enumerate([*names, f"{name}_visible"][: len(total)])
        if count[index]
    }
