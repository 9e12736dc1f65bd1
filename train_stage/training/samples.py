"""Grids of generated pictures during training: the same classes and seeds every time."""

from pathlib import Path

import torch

from storage.reader import TokenStore
from storage.schema import Tokenizer
from train_stage import pictures
from train_stage.config import TrainConfig
from train_stage.models.token_transformer import TokenTransformer
from train_stage.sampling.generation import generate
from train_stage.training.ema import EMA


class SampleWriter:
    """Holds the VQ model that decodes; one grid a call."""

    def __init__(self, config: TrainConfig, store: TokenStore, device: torch.device):
        tokenizer: Tokenizer = store.meta.tokenizers[config.dataset.codes_column]
        self.options, self.seed = config.generation, config.training.seed
        self.vq = pictures.load_vq(config.model.vq_model.pretrained or tokenizer.name, device)
        pictures.check_tokenizer(self.vq, tokenizer)
        self.class_names = store.meta.transform.get("class_names") or []

    def write(self, model: TokenTransformer, ema: EMA | None, run: Path, step: int) -> Path:
        """Writes RUN/samples/step-….png, from the averaged weights where there are any."""
        path = run / "samples" / f"step-{step:08d}.png"
        options, device = self.options, next(model.parameters()).device
        known = model.config.num_classes or 0
        classes = min(options.classes, known) or 1
        class_ids = torch.arange(classes, device=device).repeat_interleave(options.images_per_class)
        was_training = model.training
        model.eval()
        if ema is not None:
            ema.swap_in(model)
        try:
            codes = generate(
                model,
                class_ids=class_ids if known else None,
                rows=len(class_ids),
                temperature=options.temperature,
                timesteps=options.timesteps,
                guidance_scale=options.guidance_scale,
                generator=torch.Generator(device).manual_seed(self.seed),
            )
        finally:
            if ema is not None:
                ema.swap_out(model)
            model.train(was_training)
        labels = self.class_names[:classes] or [str(index) for index in range(classes)]
        grid = pictures.decode_codes(self.vq, codes)
        pictures.save_grid(grid, path, options.images_per_class, labels)
        return path
