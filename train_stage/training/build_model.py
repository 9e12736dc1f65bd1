"""The model of a run: what its configuration says, and the store decides."""

import torch

from storage.pretrained import find_model, load_strictly, read_weights
from storage.reader import TokenStore
from train_stage.config import TrainConfig
from train_stage.loading.loader import TokenLoader
from train_stage.models.config import transformer_fields
from train_stage.models.transformer import MaskGitTransformer


def make_model(config: TrainConfig, store: TokenStore, loader: TokenLoader) -> MaskGitTransformer:
    """The transformer that fits the store, with random or given weights."""
    fields = transformer_fields(
        config.model.transformer_given(),
        store.meta,
        config.dataset.codes_column,
        loader.largest_class_id,
    )
    torch.manual_seed(config.training.seed)
    model = MaskGitTransformer(**fields)
    if config.model.pretrained_model_path is not None:
        folder = find_model(config.model.pretrained_model_path)
        load_strictly(model, read_weights(folder), str(folder))
    model.gradient_checkpointing = config.model.gradient_checkpointing
    model.set_attention(config.model.attention)
    return model
