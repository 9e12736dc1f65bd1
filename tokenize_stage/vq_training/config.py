"""The options of `muse-train-vq`, one dataclass a section of its YAML."""

from dataclasses import dataclass, field
from typing import Literal

from omegaconf import MISSING

from tokenize_stage.vq.maskgit_vqgan import MaskGitVQGANConfig


@dataclass
class ExperimentConfig:
    output_dir: str = MISSING
    """Run directory: model/, reconstructions.png, metrics.jsonl, checkpoint.pt, config.yaml."""
    log_every: int = 20
    """Steps between two lines of training metrics."""
    eval_every: int = 200
    """Steps between two measurements on the held-out images."""
    save_every: int = 200
    """Steps between two checkpoints; a run that is started again goes on from the last one."""


@dataclass
class DatasetConfig:
    shards_path_or_url: str = MISSING
    """Image folders, webdataset tars or both, as muse-tokenize takes them."""
    max_images: int = 100_000
    """Read no more than this many images; they are kept in memory, decoded."""
    held_out_images: int = 1_000
    """Images kept away from training, to measure on."""
    random_flip: bool = False
    """Mirror half of the training images."""


@dataclass
class OptimizerParams:
    learning_rate: float = 2e-3
    """Highest learning rate."""
    beta1: float = 0.9
    """Decay of AdamW's mean of gradients."""
    beta2: float = 0.99
    """Decay of AdamW's mean of squared gradients."""
    weight_decay: float = 0.0
    """AdamW's weight decay."""
    epsilon: float = 1e-8
    """AdamW's epsilon."""


@dataclass
class OptimizerConfig:
    params: OptimizerParams = field(default_factory=OptimizerParams)


@dataclass
class LrSchedulerParams:
    warmup_steps: int = 50
    """Steps in which the learning rate rises linearly; from there it falls along a cosine."""
    final_ratio: float = 0.02
    """Learning rate at the last step, as a share of the highest."""


@dataclass
class LrSchedulerConfig:
    params: LrSchedulerParams = field(default_factory=LrSchedulerParams)


@dataclass
class CodebookConfig:
    init_step: int = 100
    """Steps of plain autoencoding; then the codebook is clustered from the encoder's outputs."""
    revive_every: int = 20
    """Steps after which codes not used in them are moved onto badly served encoder outputs."""
    loss_weight: float = 0.25
    """Weight of the quantizer's loss (codebook + commitment) beside the reconstruction's."""


@dataclass
class TrainingConfig:
    batch_size: int = 64
    """Images of one step."""
    max_train_steps: int = 10_000
    """Steps in all."""
    max_grad_norm: float = 1.0
    """Longer gradients are shortened to this norm."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """bf16 runs the convolutions in bfloat16; codes are always searched in float32."""
    device: str = "auto"
    """auto (a GPU where there is one), cpu, cuda, cuda:1, …"""
    seed: int = 0
    """Decides weights, order, flips and revived codes."""


@dataclass
class TrainVQConfig:
    experiment: ExperimentConfig = field(default_factory=ExperimentConfig)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    model: MaskGitVQGANConfig = field(default_factory=MaskGitVQGANConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    lr_scheduler: LrSchedulerConfig = field(default_factory=LrSchedulerConfig)
    codebook: CodebookConfig = field(default_factory=CodebookConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def __post_init__(self) -> None:
        experiment, codebook, training = self.experiment, self.codebook, self.training
        counts = {
            "experiment.log_every": experiment.log_every,
            "experiment.eval_every": experiment.eval_every,
            "experiment.save_every": experiment.save_every,
            "dataset.max_images": self.dataset.max_images,
            "dataset.held_out_images": self.dataset.held_out_images,
            "codebook.revive_every": codebook.revive_every,
            "training.batch_size": training.batch_size,
            "training.max_train_steps": training.max_train_steps,
        }
        for key, count in counts.items():
            if count < 1:
                raise ValueError(f"{key}={count}: it must be at least 1")
        if not 0 <= codebook.init_step < training.max_train_steps:
            raise ValueError(
                f"codebook.init_step={codebook.init_step}: it must be in "
                f"[0, {training.max_train_steps}), training.max_train_steps"
            )
