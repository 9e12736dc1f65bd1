"""The model of a run: what its configuration says, and the store and text encoders decide."""

import torch

from storage.pretrained import find_model, load_strictly
from storage.reader import TokenStore
from train_stage.conditioning.prompt_encoder import PromptEncoder
from train_stage.config import TrainConfig
from train_stage.models.config import model_fields
from train_stage.models.load_transformer import load_transformer
from train_stage.models.sizes import MODELS
from train_stage.models.token_transformer import TokenTransformer


def make_model(
    config: TrainConfig,
    store: TokenStore,
    largest_class_id: int,
    encoder: PromptEncoder | None,
    device: torch.device | None = None,
) -> TokenTransformer:
    """The transformer that fits the store, with random or given weights.

    device: where it is made; "meta" makes its shape alone.
    """
    options = config.model
    widths = None if encoder is None else encoder.widths
    fields = model_fields(
        options, store.meta, config.dataset.codes_column, largest_class_id, widths
    )
    if options.null_condition == "learned" and encoder is not None:
        fields["null_text_length"] = fields.get("null_text_length") or encoder.length
    torch.manual_seed(config.training.seed)
    with device or torch.device("cpu"):
        model = MODELS[options.architecture](**fields)
    if options.pretrained_model_path is not None and device is None:
        folder = find_model(options.pretrained_model_path)
        load_strictly(model, load_transformer(folder).state_dict(), str(folder))
    model.gradient_checkpointing = options.gradient_checkpointing
    model.set_attention(options.attention)
    return model
