"""TrainConfig: every option of muse-train, with the seed project's section and key names.

What follows from the store (codebook size, codes per image, classes) is not typed here; a value
that contradicts the store is refused.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from omegaconf import MISSING

from configs.load import ConfigError, build_section, open_section
from storage.schema import StoreMeta, Tokenizer
from train_stage.loading.loader import check_divides
from train_stage.loading.store_stream import Preload, Shuffle, Views
from train_stage.models.attention import AttentionBackend
from train_stage.models.sizes import size_fields
from train_stage.models.transformer import MaskGitTransformerConfig


def check_range(name: str, value: float, low: float, high: float = float("inf")) -> None:
    """Raises ValueError, naming the key, for a value outside [low, high]."""
    if not low <= value <= high:
        legal = f"{low:g} or more" if high == float("inf") else f"{low:g} to {high:g}"
        raise ValueError(f"{name}={value}: legal are {legal}")


@dataclass
class WandbConfig:
    mode: Literal["disabled", "offline", "online"] = "disabled"
    """disabled: no wandb; offline needs no account (`wandb sync` uploads later)."""
    entity: str | None = None
    """The wandb entity (user or team); null is your default."""


@dataclass
class ExperimentConfig:
    output_dir: str = MISSING
    """The run directory: config.yaml, metrics.jsonl, samples/, checkpoint-*/, model/."""
    name: str | None = None
    """Name of the run in wandb; the directory's name when null."""
    project: str = "open-muse"
    """The wandb project."""
    max_train_examples: int | None = None
    """Train on only this many rows (of every store), chosen by training.seed."""
    save_every: int = 1000
    """Steps between checkpoints."""
    checkpoints_total_limit: int | None = 2
    """How many checkpoints to keep; null keeps all."""
    eval_every: int = 500
    """Steps between validation losses; needs dataset.eval_store."""
    generate_every: int = 0
    """Steps between grids of generated pictures (same seed each time); 0 for none."""
    log_every: int = 50
    """Steps between log lines."""
    resume_from_checkpoint: str | None = "latest"
    """"latest" (start when there is none), the path of a checkpoint, or null to start anew."""
    dry_run: bool = False
    """Say parameters, memory and FLOPs a step, and stop; --dry-run is the same."""

    def __post_init__(self) -> None:
        check_range("experiment.log_every", self.log_every, 1)
        for name in ("save_every", "eval_every", "generate_every"):
            check_range(f"experiment.{name}", getattr(self, name), 0)


@dataclass
class VQModelConfig:
    pretrained: str | None = None
    """Folder or hub name of the VQ model for pictures; null takes the one the store names."""


@dataclass
class ModelConfig:
    size: Literal["tiny", "small", "base", "large", "xl"] | None = None
    """Keywords of MaskGitTransformer by the name of a size; model.transformer goes before it."""
    transformer: dict[str, Any] = open_section(MaskGitTransformerConfig)
    """Keywords of MaskGitTransformer."""
    vq_model: VQModelConfig = field(default_factory=VQModelConfig)
    pretrained_model_path: str | None = None
    """Start from these weights (folder or hub name) instead of random ones."""
    gradient_checkpointing: bool = False
    """Recompute each layer's activations in the backward pass: less memory, a third more time."""
    attention: AttentionBackend = "sdpa"
    """sdpa is PyTorch's, xformers needs that package and a GPU, plain spells the equation."""

    def transformer_given(self) -> dict[str, Any]:
        """The size's keywords, and over them model.transformer's."""
        return {**(size_fields(self.size) if self.size else {}), **self.transformer}


@dataclass
class MixtureEntry:
    store: str = MISSING
    """A token store, made by the same tokenizer as the others."""
    weight: float | None = None
    """Its share of the rows, relative to the other stores' weights; null: rows x repeat."""
    repeat: float = 1.0
    """Without weights: how often its rows come, relative to the other stores'."""
    filter: str | None = None
    """As dataset.filter, for this store."""


@dataclass
class DatasetConfig:
    train_store: str | None = None
    """The token store to train on: a folder, or a URL (s3://, https://). Or give a mixture."""
    mixture: list[MixtureEntry] = field(default_factory=list)
    """Several token stores to train on, in place of train_store."""
    eval_store: str | None = None
    """A token store for the validation loss, made by the same tokenizer."""
    codes_column: str = "codes"
    """The array column of the store that holds the codes."""
    filter: str | None = None
    """Train on rows that pass, as "aesthetic >= 5 and watermark < 0.5"; any table column."""
    views: Views = "all"
    """all: every view of an image comes once an epoch; one: one of them, another every epoch."""
    shuffle: Shuffle = "full"
    """full: any row may follow any other; window: rows are mixed among window_chunks chunks, read
    one after the other, for stores larger than memory or far away."""
    window_chunks: int = 256
    """Chunks (of 1,024 rows, as a rule) in a window, three of which are held: 400 MB of 256 codes a
    row. More mix better; a store in random order needs few."""
    preload: Preload = "auto"
    """Where the codes are kept: ram, gpu, or none (mapped from a local arrow store, or through
    windows); auto: none where that is as fast, else ram. The order does not depend on it."""
    cache_gb: float = 10.0
    """How much of remote stores the local disk keeps ($MUSE_CACHE_DIR); 0 keeps nothing."""
    accept_changes: bool = False
    """Go on from a checkpoint though the stores have changed (rows dropped, shards added)."""

    def __post_init__(self) -> None:
        check_range("dataset.window_chunks", self.window_chunks, 1)
        check_range("dataset.cache_gb", self.cache_gb, 0)
        if self.train_store is not None and self.mixture:
            raise ValueError("dataset.train_store or dataset.mixture, not both")
        if self.mixture and self.filter is not None:
            raise ValueError("dataset.filter: in a mixture every store has a filter of its own")


@dataclass
class OptimizerParams:
    learning_rate: float = MISSING
    """Peak learning rate."""
    scale_lr: bool = False
    """Multiply the learning rate by global batch size / 256."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.999
    """Decay of the second moment."""
    weight_decay: float = 0.01
    """Decoupled weight decay; not on biases, norms and embeddings."""
    epsilon: float = 1e-8
    """Added to AdamW's denominator."""


@dataclass
class OptimizerConfig:
    name: Literal["adamw", "lion", "muon"] = "adamw"
    """adamw is torch's, fused; lion wants about a third of AdamW's learning rate; muon is torch's,
    for matrices, beside adamw for the rest."""
    params: OptimizerParams = field(default_factory=OptimizerParams)


@dataclass
class LRSchedulerParams:
    warmup_steps: int = 500
    """Steps of linear warm-up from 0."""
    num_cycles: int = 1
    """Cycles of cosine_with_restarts."""
    power: float = 1.0
    """Exponent of polynomial."""


@dataclass
class LRSchedulerConfig:
    scheduler: Literal[
        "constant",
        "constant_with_warmup",
        "linear",
        "cosine",
        "cosine_with_restarts",
        "polynomial",
    ] = "constant_with_warmup"
    """Shape after the warm-up; the end is training.max_train_steps."""
    params: LRSchedulerParams = field(default_factory=LRSchedulerParams)


@dataclass
class MaskScheduleConfig:
    schedule: str = "cosine"
    """cosine, linear, arccos, square, sqrt, sigmoid, or pow and a number (pow3)."""
    params: dict[str, float] = field(default_factory=dict)
    """For sigmoid: start, end, tau, clip_min."""


@dataclass
class EMAConfig:
    decay: float = 0.9999
    """Largest decay; reached after a warm-up."""
    min_decay: float = 0.0
    """Smallest decay."""
    update_after_step: int = 0
    """Steps before averaging starts."""
    update_every: int = 1
    """Steps between updates."""
    use_ema_warmup: bool = False
    """Warm up as 1 - (1 + s / inv_gamma) ** -power instead of (1 + s) / (10 + s)."""
    inv_gamma: float = 1.0
    """See use_ema_warmup."""
    power: float = 2 / 3
    """See use_ema_warmup."""


@dataclass
class TrainingConfig:
    max_train_steps: int = MISSING
    """Optimizer steps in all."""
    batch_size: int = 128
    """Rows per process and forward pass; with global_batch_size an upper bound."""
    global_batch_size: int | None = None
    """Rows per optimizer step over all processes; accumulation follows from it, and the run may
    go on with another number of processes. Null: batch_size x processes x accumulation steps."""
    gradient_accumulation_steps: int = 1
    """Forward passes per optimizer step; with global_batch_size a lower bound."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """Autocast; weights and optimizer stay in float32."""
    enable_tf32: bool = True
    """TF32 matrix products on GPUs that have them."""
    compile: bool = False
    """Compile layers and loss with torch.compile: faster steps after a slow first one; needs Triton
    on a GPU, a C++ compiler on a CPU."""
    use_ema: bool = False
    """Keep an exponential moving average; pictures and the final model use it."""
    ema: EMAConfig = field(default_factory=EMAConfig)
    seed: int = 42
    """Seeds weights, order, masks and dropout."""
    overfit_one_batch: bool = False
    """Train on the first batch only: a check that the loss goes to zero."""
    min_masking_rate: float = 0.0
    """Smallest mask ratio."""
    mask_contiguous_region_prob: float | None = None
    """Probability of hiding one rectangle instead of scattered codes."""
    label_smoothing: float = 0.0
    """Label smoothing of the cross-entropy."""
    cond_dropout_prob: float = 0.1
    """Probability of *dropping* the condition, so that guidance works when sampling."""
    max_grad_norm: float | None = 1.0
    """Clip the gradient's norm to this; null for no clipping."""

    def __post_init__(self) -> None:
        check_range("training.batch_size", self.batch_size, 1)
        check_range("training.gradient_accumulation_steps", self.gradient_accumulation_steps, 1)
        for name in ("label_smoothing", "cond_dropout_prob", "min_masking_rate"):
            check_range(f"training.{name}", getattr(self, name), 0, 1)


@dataclass
class GenerationConfig:
    images_per_class: int = 8
    """Columns of the grid; rows are the first classes."""
    classes: int = 10
    """Rows of the grid at most."""
    guidance_scale: float = 3.0
    """Strength of classifier-free guidance; 0 for none."""
    temperature: float = 1.0
    """Scale of the noise in the order of unmasking."""
    timesteps: int = 18
    """Decoding steps."""


@dataclass
class TrainConfig:
    experiment: ExperimentConfig = field(default_factory=ExperimentConfig)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    lr_scheduler: LRSchedulerConfig = field(default_factory=LRSchedulerConfig)
    mask_schedule: MaskScheduleConfig = field(default_factory=MaskScheduleConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)


def transformer_fields(
    given: dict[str, Any], meta: StoreMeta, column: str, largest_class_id: int
) -> dict[str, Any]:
    """The transformer's keywords: what was given, and codes, positions, classes from the store.

    largest_class_id: of the rows, -1 when they have none. Raises ConfigError for a value that
    contradicts the store.
    """
    if given.get("add_cross_attention"):
        raise ConfigError("model.transformer.add_cross_attention=true: stores hold no text states")
    tokenizer = tokenizer_of(meta, column)
    height, width = tokenizer.grid
    derived = {"codebook_size": tokenizer.codebook_size, "num_vq_tokens": height * width}
    names = meta.transform.get("class_names") or []
    if names:
        derived["num_classes"] = len(names)
    for name, value in derived.items():
        if given.get(name, value) != value:
            raise ConfigError(
                f"model.transformer.{name}={given[name]}, but the store (made by {tokenizer.name}) "
                f"has {value}: drop the override, it follows the store"
            )
    fields = {"num_classes": largest_class_id + 1 or None, **given, **derived}
    if (fields["num_classes"] or 0) <= largest_class_id:
        raise ConfigError(
            f"model.transformer.num_classes={fields['num_classes']}, but the store has class ids "
            f"up to {largest_class_id}: drop the override, it follows the store"
        )
    build_section(MaskGitTransformerConfig, fields, "model.transformer")
    return fields


def tokenizer_of(meta: StoreMeta, column: str) -> Tokenizer:
    """The tokenizer of a column of codes. Raises ConfigError naming the columns there are."""
    if column not in meta.tokenizers:
        raise ConfigError(f"dataset.codes_column={column}: the store has {list(meta.tokenizers)}")
    return meta.tokenizers[column]


def split_batch(config: TrainingConfig, processes: int) -> tuple[int, int]:
    """(rows per optimizer step over all processes, forward passes per step and process).

    Raises ValueError when global_batch_size does not divide, naming the nearest that do.
    """
    least = config.gradient_accumulation_steps
    if config.global_batch_size is None:
        return config.batch_size * processes * least, least
    check_divides(config.global_batch_size, processes * least)
    share = config.global_batch_size // processes
    passes = next(
        n for n in range(least, share + 1) if share % n == 0 and share // n <= config.batch_size
    )
    return config.global_batch_size, passes
