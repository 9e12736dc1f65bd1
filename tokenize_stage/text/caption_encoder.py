"""Ids -> pooled vectors and states of float16, by a frozen text encoder: what a store can keep.

u captions, S ids of each, W width of a state, C width of a pooled vector.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from storage.pretrained import weights_fingerprint
from storage.text_states import states_array
from tokenize_stage.text.config import TextConfig
from tokenize_stage.text.text_encoder import TextEncoder


class CaptionEncoder:
    """A text encoder, and which of its outputs are stored."""

    def __init__(self, config: TextConfig, name: str, device: str | torch.device):
        """Loads text.tokenizers.<name>. Raises ValueError where it does not give what is asked."""
        self.name, self.place, self.dtype = name, config.tokenizers[name], config.dtype
        self.wants_pooled, self.wants_states = name in config.pooled, name in config.states
        self.batch_size, length = config.batch_size, config.lengths.get(name)
        dtype = getattr(torch, config.dtype)
        self.encoder = TextEncoder.from_pretrained(self.place, dtype=dtype, length=length)
        model = self.encoder.model
        if self.wants_pooled and not self.encoder.has_projection:
            kind = type(model).__name__
            raise ValueError(f"text.pooled={config.pooled}: {name} is a {kind}, which gives none")
        if length is not None and length > self.encoder.max_length:
            longest = self.encoder.max_length
            raise ValueError(f"text.lengths.{name}={length}: this encoder takes {longest} at most")
        self.width = model.config.hidden_size  # W
        self.pooled_width = model.text_projection.out_features if self.wants_pooled else 0  # C
        self.encoder.to(device)

    def columns(self, ids: np.ndarray, lengths: np.ndarray) -> dict[str, Any]:
        """Ids (u, S), of which lengths (u,) are no padding -> text_pooled_NAME (u, C), and
        text_states_NAME, an Arrow array of u lists. Raises ValueError for infinite values.

        Batches have one size, so that a caption's numbers depend on no other caption.
        """
        vectors = [np.empty((0, self.width), np.float16)]
        pooled = [np.empty((0, self.pooled_width), np.float16)]
        for first in range(0, len(ids), self.batch_size):
            part, count = ids[first : first + self.batch_size], lengths[first:][: self.batch_size]
            batch = np.repeat(part[:1].astype(np.int64), self.batch_size, axis=0)  # (B, S)
            batch[: len(part)] = part
            given = torch.from_numpy(batch).to(self.encoder.model.device)
            own_lengths = np.repeat(count[:1].astype(np.int64), self.batch_size)  # (B,)
            own_lengths[: len(part)] = count
            known = torch.from_numpy(own_lengths).to(given.device)
            made = self.encoder.encode_ids(given, pooled=self.wants_pooled, lengths=known)
            if self.wants_states:
                own = torch.from_numpy(np.arange(ids.shape[1]) < count[:, None]).to(given.device)
                vectors.append(self._to_float16(made.states[: len(part)][own]))
            if made.pooled is not None:
                pooled.append(self._to_float16(made.pooled[: len(part)]))
        columns: dict[str, Any] = {}
        if self.wants_pooled:
            columns[f"text_pooled_{self.name}"] = np.concatenate(pooled)
        if self.wants_states:
            states = states_array(np.concatenate(vectors), lengths)
            columns[f"text_states_{self.name}"] = states
        return columns

    def record(self) -> dict[str, Any]:
        """What the store says of it."""
        return {
            "class_name": type(self.encoder.model).__name__,
            "fingerprint": weights_fingerprint(self.encoder.model),
            "dtype": self.dtype,
            "layer": "before the last" if self.wants_pooled else "last, normalized",
        }

    def _to_float16(self, values: Tensor) -> np.ndarray:
        values = values.to(torch.float16)
        if not values.isfinite().all():  # a sync point
            raise ValueError(
                f"text.tokenizers.{self.name}={self.place} gives states that float16 cannot hold, "
                f"computed in text.dtype={self.dtype}: try bfloat16, then float32"
            )
        return values.cpu().numpy()
