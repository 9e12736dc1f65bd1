"""What MaskGitTransformer and MaskGiTUViT have in common: step 7, input_ids -> logits -> loss.

A model is a trunk (`hidden_states`), a pointwise `head` and one last linear map (`output_layer`),
kept apart so that training and sampling run the last two on the positions that matter only.
B batch, T positions, E width of what the head reads, V outputs. Vocabulary: codes [0, K), whatever
else the model has, and the mask as the last id. Masking happens outside (masking.py).
"""

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from storage.pretrained import PretrainedModel
from train_stage.models.attention import AttentionBackend, check_backend
from train_stage.models.extensions import null_parameters, replace_text
from train_stage.models.layers import Attention
from train_stage.models.model_fields import ExtensionFields
from train_stage.objective.loss import masked_loss, token_loss
from train_stage.sampling.generation import generate


class TokenTransformer(PretrainedModel):
    """A masked transformer over codes. Subclasses build the parts and say what conditions it."""

    hidden_states: Callable[..., Tensor]  # (input_ids, condition keywords, context) -> (B, T, E)
    output_size: int  # V, how many logits a position gets
    gradient_checkpointing: bool = False  # recompute each layer in the backward pass; not in eval

    @property
    def mask_token_id(self) -> int:
        """The id of a hidden code: the last of the vocabulary."""
        return self.config.vocab_size - 1

    def head(self, hidden: Tensor) -> Tensor:
        """hidden (..., E) -> (..., E'), position by position: what the output layer reads."""
        raise NotImplementedError

    def output_layer(self) -> tuple[Tensor, Tensor | None]:
        """The last linear map: weight (V, E') and bias (V,)."""
        raise NotImplementedError

    def layers(self) -> list[nn.Module]:
        """The repeated blocks of the trunk: what torch.compile compiles one by one."""
        raise NotImplementedError

    def critic(self, hidden: Tensor) -> Tensor:
        """hidden (..., E) -> (...): the logit that a code is the image's own, and was not drawn."""
        if not self.config.critic_head:
            raise ValueError("the model has no critic: its config says critic_head=false")
        return self.critic_head(hidden).squeeze(-1)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (..., E) -> (..., V)."""
        return F.linear(self.head(hidden), *self.output_layer())

    def logits_and_loss(
        self,
        hidden: Tensor,
        labels: Tensor | None,
        label_smoothing: float,
        loss_weight: Tensor | None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """What forward returns: all logits (B, T, V), with labels also their mean loss."""
        logits = self.logits(hidden)
        if labels is None:
            return logits
        return logits, token_loss(logits, labels, label_smoothing, loss_weight)

    def loss(
        self,
        input_ids: Tensor,
        labels: Tensor,
        label_smoothing: float = 0.0,
        loss_weight: Tensor | None = None,
        **condition: Tensor,
    ) -> Tensor:
        """The loss that forward returns, without the logits that it does not need.

        labels (B, T), -100 = not scored; loss_weight (B, T); condition: the keywords of forward.
        """
        hidden = self.hidden_states(input_ids, **condition)
        return masked_loss(self, hidden, labels, label_smoothing, loss_weight)

    def generate(self, **arguments: Any) -> Tensor:
        """Codes (B, N) by parallel decoding; see train_stage.sampling.generation."""
        return generate(self, **arguments)

    def set_attention(self, backend: AttentionBackend) -> None:
        """Which kernels compute attention: "sdpa" (default), "xformers" or "plain"."""
        check_backend(backend)
        for module in self.modules():
            if isinstance(module, Attention):
                module.backend = backend

    def add_extensions(
        self, hidden_width: int, text_width: int, pooled_width: int | None = None
    ) -> None:
        """Makes what the config asks for beyond the published models, once all else is drawn.

        hidden_width: E; text_width, pooled_width: of the conditions that hidden_states is given.
        """
        c: ExtensionFields = self.config
        if c.self_conditioning:  # zeros: at first it computes the same with and without
            nn.init.zeros_(self.get_parameter("embed.previous.weight"))
        if c.critic_head:
            self.critic_head = nn.Linear(hidden_width, 1)
        if c.null_text_length is not None:
            self.null_text = null_parameters((c.null_text_length, text_width))
            self.null_pooled = None if pooled_width is None else null_parameters((pooled_width,))

    def with_null(
        self, text: Tensor, mask: Tensor | None, pooled: Any, dropped: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Any]:
        """Text, its mask and pooled text (or None), learned ones in the rows of dropped (B,)."""
        if self.config.null_text_length is None:
            if dropped is not None:
                raise ValueError(
                    "dropped given, but the model learns no null text: its config "
                    "says null_text_length=null"
                )
            return text, mask, pooled
        if dropped is None:  # so that every parameter is used, whatever a batch holds
            dropped = torch.zeros(len(text), dtype=torch.bool, device=text.device)
        text, mask = replace_text(text, mask, self.null_text, dropped)
        if pooled is not None and self.null_pooled is not None:
            pooled = torch.where(dropped[:, None], self.null_pooled.to(pooled.dtype), pooled)
        return text, mask, pooled

    def run(self, block: Callable[..., Tensor], *inputs: Any) -> Tensor:
        """A block of the trunk, its activations recomputed in the backward pass if asked for."""
        if self.gradient_checkpointing and self.training:
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    def config_dict(self) -> dict[str, Any]:
        """The content of config.json; a plain model's has only the keys that open-muse knows."""
        config = super().config_dict() | {"mask_token_id": self.mask_token_id}
        off = {field.name for field in fields(ExtensionFields) if not config[field.name]}
        return {name: config[name] for name in sorted(config.keys() - off)}
