"""The loaders of a run: the stores that its configuration names, as this process reads them."""

from collections.abc import Sequence

from accelerate import Accelerator

from configs.load import ConfigError
from storage.file_cache import CacheOptions
from storage.reader import TokenStore
from storage.schema import StoreMismatch
from train_stage.config import TrainConfig
from train_stage.loading.columns import check_columns
from train_stage.loading.loader import Source, TokenLoader
from train_stage.loading.store_stream import Reading
from train_stage.models.config import tokenizer_of
from train_stage.models.token_transformer import TokenTransformer


def open_sources(config: TrainConfig) -> list[Source]:
    """The stores to train on: the one of dataset.train_store, or the mixture's."""
    data = config.dataset
    if data.train_store is not None:
        return [Source(open_store(config, data.train_store), filter=data.filter)]
    if not data.mixture:
        raise ConfigError("dataset.train_store=… is missing: the store that muse-tokenize made")
    return [
        Source(open_store(config, entry.store), entry.weight, entry.repeat, entry.filter)
        for entry in data.mixture
    ]


def open_store(config: TrainConfig, location: str) -> TokenStore:
    """A store, with the configured cache if it is remote."""
    return TokenStore(location, CacheOptions(max_bytes=int(config.dataset.cache_gb * 2**30)))


def largest_class_id(sources: list[Source]) -> int:
    """Of all rows of the stores; -1 when none has a class."""
    found = []
    for source in sources:
        known = [summary["largest_class_id"] for summary in source.store.index.summaries]
        if None in known:  # schema version 1 did not note it
            known = [int(source.store.read_column("class_id").max(initial=-1))]
        found += known
    return max(found, default=-1)


def make_loader(
    config: TrainConfig,
    sources: list[Source],
    global_batch: int,
    accelerator: Accelerator,
    max_rows: int | None,
    columns: Sequence[str] = (),
) -> TokenLoader:
    """A loader over the stores for this process; codes travel narrow to a GPU.

    columns: what the conditioner wants of the rows.
    """
    data = config.dataset
    reading = Reading(
        data.codes_column,
        data.shuffle,
        data.window_chunks,
        data.views,
        data.preload,
        data.states_gb,
    )
    return TokenLoader(
        sources,
        global_batch,
        config.training.seed,
        accelerator.process_index,
        accelerator.num_processes,
        reading,
        max_rows=max_rows,
        narrow=accelerator.device.type == "cuda",
        device=accelerator.device,
        quiet=not accelerator.is_main_process,
        columns=columns,
    )


def make_eval_loader(
    config: TrainConfig,
    store: TokenStore,
    model: TokenTransformer,
    global_batch: int,
    accelerator: Accelerator,
    columns: Sequence[str] = (),
) -> TokenLoader | None:
    """A loader over the evaluation store: same tokenizer, same grid, same classes and columns."""
    if config.dataset.eval_store is None:
        if config.training.eval_mask_ratios:
            raise ConfigError("training.eval_mask_ratios need dataset.eval_store to validate on")
        return None
    other, column = open_store(config, config.dataset.eval_store), config.dataset.codes_column
    ours, theirs = tokenizer_of(store.meta, column), tokenizer_of(other.meta, column)
    for name in ("fingerprint", "grid"):
        if getattr(ours, name) != getattr(theirs, name):
            found = f"{getattr(theirs, name)}, {store.path} has {getattr(ours, name)}"
            raise StoreMismatch(f"{other.path}: the tokenizer's {name} is {found}")
    if other.meta.transform.get("class_names") != store.meta.transform.get("class_names"):
        raise StoreMismatch(f"{other.path} and {store.path} number other classes")
    check_columns([store, other], columns)
    loader = make_loader(config, [Source(other)], global_batch, accelerator, None, columns)
    known = known_classes(config, store, model)
    if known is not None and loader.largest_class_id >= known:
        found = f"class ids up to {loader.largest_class_id}"
        raise StoreMismatch(f"{other.path} has {found}, the model knows {known} classes")
    return loader


def known_classes(config: TrainConfig, store: TokenStore, model: TokenTransformer) -> int | None:
    """How many classes the model was told of; None where it reads captions, and no classes."""
    if config.model.class_prompt is not None:
        return len(store.meta.transform.get("class_names") or [])
    known = getattr(model.config, "num_classes", None)  # a U-ViT has none
    return None if known is None and config.model.text_encoders else known or 0
