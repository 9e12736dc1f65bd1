"""How a judge of pictures is trained: AdamW, one cycle of the learning rate (step 9, judged)."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from tqdm import tqdm


def fit(
    model: nn.Module,
    loss_of: Callable[[Tensor], Tensor],
    count: int,
    generator: torch.Generator,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    device: str | torch.device,
) -> None:
    """Trains the model in place, on the device; in eval mode afterwards.

    loss_of: numbers (batch_size,) of examples in 0 … count - 1 -> their mean loss. generator (CPU)
    gives the first weights and the order. An incomplete last batch is left out.
    """
    for name, weight in model.named_parameters():
        if weight.ndim > 1:
            nn.init.kaiming_normal_(weight, generator=generator)
        elif name.endswith("bias"):
            nn.init.zeros_(weight)
    model.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    steps_per_epoch = count // batch_size
    if not steps_per_epoch:
        raise ValueError(f"{count} pictures are less than one batch of {batch_size}")
    steps = epochs * steps_per_epoch
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, steps, pct_start=0.2)
    kind = type(model).__name__
    with tqdm(total=steps * batch_size, desc=kind, unit=" pictures", disable=None) as bar:
        for _ in range(epochs):
            order = torch.randperm(count, generator=generator)
            for rows in order[: steps_per_epoch * batch_size].split(batch_size):
                loss = loss_of(rows)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update(batch_size)
    model.eval()
