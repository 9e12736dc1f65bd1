"""Running sums of the losses: what the log says of many steps and of all processes."""

from dataclasses import dataclass

import torch
from torch import Tensor

from train_stage.objective.loss import BUCKETS, IGNORE, bucket_of


@dataclass
class Sums:
    """Running sums for the log, kept on the device until a log line needs them."""

    loss: Tensor  # () what is minimised (smoothed)
    plain: Tensor  # () cross-entropy in nats
    correct: Tensor  # ()
    bucket_loss: Tensor  # (10,) cross-entropy by share of masked codes
    bucket_count: Tensor  # (10,)

    @classmethod
    def zeros(cls, device: torch.device) -> "Sums":
        zero = torch.zeros((), dtype=torch.float64, device=device)
        tens = torch.zeros(BUCKETS, dtype=torch.float64, device=device)
        return cls(zero, zero.clone(), zero.clone(), tens, tens.clone())

    def add(self, out: dict[str, Tensor], labels: Tensor) -> None:
        """Adds one forward pass: MaskedLoss's output and the labels (b, T) it scored."""
        count = (labels != IGNORE).sum(-1)  # (b,)
        plain = out["plain"].double()  # (M,)
        bucket = bucket_of(count / labels.shape[-1])
        bucket = bucket.repeat_interleave(count, output_size=len(plain))  # (M,)
        self.loss += out["losses"].sum()
        self.plain += plain.sum()
        self.correct += out["correct"].sum()
        self.bucket_loss.index_add_(0, bucket, plain)
        self.bucket_count.index_add_(0, bucket, torch.ones_like(plain))

    def merge(self, other: "Sums") -> None:
        """Adds another's sums."""
        for name, value in vars(other).items():
            getattr(self, name).add_(value)

    @classmethod
    def from_flat(cls, flat: Tensor) -> "Sums":
        """flat() backwards."""
        parts = flat.split([1, 1, 1, BUCKETS, BUCKETS])
        return cls(*(part.squeeze() if len(part) == 1 else part for part in parts))

    def flat(self) -> Tensor:
        """All sums as one vector, for one all-reduce and one copy to the host."""
        return torch.cat([value.reshape(-1) for value in vars(self).values()])


def describe_sums(flat: list[float]) -> dict[str, float]:
    """Metrics from Sums.flat(), summed over processes: loss, accuracy, loss by bucket (nats)."""
    loss, plain, correct = flat[:3]
    bucket_loss, bucket_count = flat[3 : 3 + BUCKETS], flat[3 + BUCKETS :]
    count = max(1.0, sum(bucket_count))
    metrics = {"loss": loss / count, "cross_entropy": plain / count, "accuracy": correct / count}
    for index, (total, number) in enumerate(zip(bucket_loss, bucket_count, strict=True)):
        if number:
            metrics[f"loss_masked_{10 * index}_{10 * (index + 1)}"] = total / number
    return metrics
