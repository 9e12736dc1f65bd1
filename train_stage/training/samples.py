"""Grids of generated pictures during training: the same prompts or classes and seeds every time.

Prompts are encoded once.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from storage.reader import TokenStore
from storage.schema import Tokenizer
from train_stage import pictures
from train_stage.conditioning.conditioner import Conditioner
from train_stage.config import TrainConfig
from train_stage.models.token_transformer import TokenTransformer
from train_stage.sampling.generation import generate

LOOKED_AT = 256  # rows among which prompts are looked for


class SampleWriter:
    """Holds the VQ model that decodes; one grid a call."""

    def __init__(
        self,
        config: TrainConfig,
        store: TokenStore,
        device: torch.device,
        conditioner: Conditioner | None,
    ):
        """Without generation.prompts, those of a model for text are captions of the store."""
        tokenizer: Tokenizer = store.meta.tokenizers[config.dataset.codes_column]
        self.options, self.seed = config.generation, config.training.seed
        self.grid, self.encoded = tuple(tokenizer.grid), None
        self.vq = pictures.load_vq(config.model.vq_model.pretrained or tokenizer.name, device)
        pictures.check_tokenizer(self.vq, tokenizer)
        self.names = list(store.meta.transform.get("class_names") or [])
        if conditioner is not None:
            prompts = self.options.prompts or first_prompts(config, store)
            self.prompts = prompts[: self.options.classes]
            self.encoded = conditioner.for_prompts(self.prompts)
            conditioner.release_encoders()

    def write(self, model: TokenTransformer, run: Path, step: int) -> Path:
        """Writes RUN/samples/step-….png by `model`, in eval mode."""
        options, path = self.options, run / "samples" / f"step-{step:08d}.png"
        columns, device = options.images_per_class, next(model.parameters()).device
        condition, labels = self._condition(model, columns, device)
        codes = generate(
            model,
            **condition,
            temperature=options.temperature,
            timesteps=options.timesteps,
            guidance_scale=options.guidance_scale,
            seq_len=self.grid[0] * self.grid[1],
            generator=torch.Generator(device).manual_seed(self.seed),
        )
        made = pictures.decode_codes(self.vq, codes.unflatten(1, self.grid))
        pictures.save_grid(made, path, columns, labels)
        return path

    def _condition(
        self, model: TokenTransformer, columns: int, device: torch.device
    ) -> tuple[dict[str, Any], Sequence[str]]:
        """The keywords of generate, `columns` pictures of each, and what stands beside them."""
        if self.encoded is not None:
            rows = {  # one row of what is negative, or of micro-conditions, stands for all
                name: x.repeat_interleave(columns, 0) if len(x) == len(self.prompts) else x
                for name, x in self.encoded.items()
            }
            return rows | {"rows": len(self.prompts) * columns}, self.prompts
        known = getattr(model.config, "num_classes", None) or 0
        classes = min(self.options.classes, known) or 1
        class_ids = torch.arange(classes, device=device).repeat_interleave(columns)
        labels = self.names[:classes] or [str(index) for index in range(classes)]
        return {"class_ids": class_ids if known else None, "rows": len(class_ids)}, labels


def first_prompts(config: TrainConfig, store: TokenStore) -> list[str]:
    """Different captions of the first rows; of a model for class names, those."""
    if config.model.class_prompt is not None:
        return [config.model.class_prompt.format(n) for n in store.meta.transform["class_names"]]
    captions = store.table(["caption"], range(min(LOOKED_AT, len(store)))).column(0).to_pylist()
    return list(dict.fromkeys(caption for caption in captions if caption)) or [""]
