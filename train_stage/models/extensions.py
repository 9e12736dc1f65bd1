"""What a model may have beyond the published ones: self-conditioning, a critic, a learned null.

Step 7. All are off by default; a model without them has their parameters neither in memory nor in
its files. B batch, T positions, W width of an embedding or of the text, S text positions.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def embed_codes(
    table: nn.Embedding, mapping: nn.Linear | None, input_ids: Tensor, previous: Tensor | None
) -> Tensor:
    """Embeddings (B, T, W) of input_ids (B, T), plus those of an earlier prediction, mapped.

    previous (B, T): mask ids, the table's last, where nothing was predicted; None: nowhere.
    """
    x = table(input_ids)
    if mapping is None:
        if previous is not None:
            raise ValueError("previous given, but the model has self_conditioning=false")
        return x
    if previous is None:  # so that every parameter is used, whatever a batch holds
        previous = torch.full_like(input_ids, table.num_embeddings - 1)
    return x + mapping(table(previous))


def previous_mapping(width: int, wanted: bool) -> nn.Linear | None:
    """The linear map of embed_codes; add_extensions fills it with zeros."""
    return nn.Linear(width, width, bias=False) if wanted else None


def null_parameters(shape: tuple[int, ...]) -> nn.Parameter:
    """A learned condition of that shape, small at first."""
    return nn.Parameter(nn.init.normal_(torch.empty(shape), std=0.02))


def replace_text(
    text: Tensor, mask: Tensor | None, null_text: Tensor, dropped: Tensor
) -> tuple[Tensor, Tensor | None]:
    """text (B, S, W) and its mask (B, S), with null_text (S', W) in the rows of dropped (B,) bool.

    As long as the longer of the two; without a mask, and if they are equally long, there is none.
    """
    own, length = text.shape[1], max(text.shape[1], len(null_text))
    if mask is not None or own != len(null_text):
        mask = text.new_ones(len(text), own) if mask is None else mask
        attended = torch.arange(length, device=text.device) < len(null_text)
        mask = torch.where(dropped[:, None], attended, F.pad(mask.bool(), (0, length - own)))
    null_text = F.pad(null_text.to(text.dtype), (0, 0, 0, length - len(null_text)))
    text = F.pad(text, (0, 0, 0, length - own))
    return torch.where(dropped[:, None, None], null_text, text), mask
