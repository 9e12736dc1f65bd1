"""experiment.*, optimizer.*, lr_scheduler.*, training.*, wandb.*, generation.* of muse-train."""

from dataclasses import dataclass, field
from typing import Literal

from omegaconf import MISSING

from configs.load import check_range
from train_stage.loading.loader import check_divides
from train_stage.objective.config import ObjectiveFields
from train_stage.training.lr_schedule import SchedulerName
from train_stage.training.optimizer import OptimizerName


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
    """Train on only this many rows (of every store), chosen by training.seed; they come again in
    every epoch. (open-muse took it for the length of an epoch alone: the number of rows that there
    are does the same here.) Rows seen in all are training.max_train_steps x the global batch."""
    save_every: int = 1000
    """Steps between checkpoints; 0: only at the end, on signals and by save_every_minutes."""
    save_every_minutes: float = 0.0
    """A checkpoint when the one before is so many minutes old, too; 0: by steps alone."""
    async_checkpoint: bool = True
    """Train on while a checkpoint is written. It is copied first: the main process needs host
    memory for the weights, averaged weights and optimizer once more (with AdamW and EMA 16 bytes a
    parameter)."""
    grace_s: int = 0
    """Leave at most so many seconds after SIGTERM or SIGUSR1, even if the checkpoint is not yet
    written or a step hangs; the one before counts then. 0: no limit."""
    checkpoints_total_limit: int | None = 2
    """How many checkpoints to keep; null keeps all."""
    eval_every: int = 500
    """Steps between validation losses; needs dataset.eval_store."""
    tensorboard: bool = False
    """Write what is logged for TensorBoard, too, into tensorboard/ of the run directory."""
    generate_every: int = 0
    """Steps between grids of generated pictures (same seed each time); 0 for none."""
    log_every: int = 50
    """Steps between log lines."""
    resume_from_checkpoint: str | None = "latest"
    """"latest" (start when there is none), the path of a checkpoint, or null to start anew."""
    resume_lr_scheduler: bool = True
    """false: the learning rate's schedule starts anew, warm-up too, at the step where a checkpoint
    is gone on from, and ends at training.max_train_steps. Once: going on again leaves it."""
    dont_resume_optimizer: bool = False
    """Take a checkpoint's weights and position, not its optimizer. Once, as above."""
    dry_run: bool = False
    """Say parameters, memory and FLOPs a step, and stop; --dry-run is the same."""

    def __post_init__(self) -> None:
        check_range("experiment.log_every", self.log_every, 1)
        for name in ("save_every", "save_every_minutes", "grace_s", "eval_every", "generate_every"):
            check_range(f"experiment.{name}", getattr(self, name), 0)
        for name in ("checkpoints_total_limit", "max_train_examples"):
            check_range(f"experiment.{name}", getattr(self, name), 1)


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

    def __post_init__(self) -> None:
        for name in ("learning_rate", "weight_decay", "epsilon"):
            check_range(f"optimizer.params.{name}", getattr(self, name), 0)
        for name in ("beta1", "beta2"):
            check_range(f"optimizer.params.{name}", getattr(self, name), 0, 1)


@dataclass
class OptimizerConfig:
    name: OptimizerName = "adamw"
    """adamw (or fused_adamw) is torch's, fused; 8bit_adamw keeps a quarter of its state, needs
    bitsandbytes; lion wants about a third of AdamW's learning rate; adafactor keeps nearly no
    state; muon is torch's, for matrices, beside adamw for the rest."""
    params: OptimizerParams = field(default_factory=OptimizerParams)


@dataclass
class LRSchedulerParams:
    warmup_steps: int = 500
    """Steps of linear warm-up from 0."""
    num_cycles: int = 1
    """Cycles of cosine_with_restarts."""
    power: float = 1.0
    """Exponent of polynomial."""
    decay_steps: int | None = None
    """Last steps of warmup_stable_decay, in which the rate falls to 0; null: a fifth of all."""

    def __post_init__(self) -> None:
        for name, least in {"warmup_steps": 0, "num_cycles": 1, "decay_steps": 0}.items():
            check_range(f"lr_scheduler.params.{name}", getattr(self, name), least)


@dataclass
class LRSchedulerConfig:
    scheduler: SchedulerName = "constant_with_warmup"
    """Shape after the warm-up; the end is training.max_train_steps."""
    params: LRSchedulerParams = field(default_factory=LRSchedulerParams)


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

    def __post_init__(self) -> None:
        check_range("training.ema.update_every", self.update_every, 1)
        for name in ("decay", "min_decay"):
            check_range(f"training.ema.{name}", getattr(self, name), 0, 1)


@dataclass
class FsdpConfig:
    reshard_after_forward: bool = True
    """Give the other shards back after a layer's forward pass and gather them again for its
    backward pass; false: less communication, every layer whole until then."""
    cpu_offload: bool = False
    """Keep shards and optimizer in host memory: the slow way to train what does not fit GPUs."""
    checkpoints: Literal["full", "sharded"] = "full"
    """full: the main process gathers and writes everything. sharded: every process writes what it
    holds, faster for large models. The run goes on from either with any number of processes; a
    model directory is in full ones only, and always at the end."""


@dataclass
class TrainingConfig(ObjectiveFields):
    max_train_steps: int = MISSING
    """Optimizer steps in all."""
    batch_size: int = 128
    """Rows per process and forward pass; with global_batch_size an upper bound."""
    global_batch_size: int | None = None
    """Rows per optimizer step over all processes; accumulation follows from it, and the run may
    go on with another number of processes. Null: batch_size x processes x accumulation steps."""
    gradient_accumulation_steps: int = 1
    """Forward passes per optimizer step; with global_batch_size a lower bound."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """With several processes: ddp, each holds the whole model; fsdp, each holds a shard of every
    weight, of the averages and of the optimizer. One process is neither."""
    fsdp: FsdpConfig = field(default_factory=FsdpConfig)
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
    max_grad_norm: float | None = 1.0
    """Clip the gradient's norm to this; null for no clipping."""
    eval_mask_ratios: list[float] = field(default_factory=list)
    """Validation losses at these mask ratios, each by itself, as in [0.2,0.5,0.8]."""

    def __post_init__(self) -> None:
        for name in ("max_train_steps", "batch_size", "global_batch_size"):
            check_range(f"training.{name}", getattr(self, name), 1)
        check_range("training.gradient_accumulation_steps", self.gradient_accumulation_steps, 1)
        check_range("training.max_grad_norm", self.max_grad_norm, 0)
        for ratio in self.eval_mask_ratios:
            check_range("training.eval_mask_ratios", ratio, 0, 1)
        super().__post_init__()


@dataclass
class GenerationConfig:
    prompts: list[str] = field(default_factory=list)
    """Rows of the grid, for models that read text; none: captions of the store."""
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

    def __post_init__(self) -> None:
        for name in ("images_per_class", "classes", "timesteps"):
            check_range(f"generation.{name}", getattr(self, name), 1)


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
