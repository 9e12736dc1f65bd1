"""TrainConfig: every option of muse-train, with the seed project's section and key names.

What follows from the store (codebook size, codes per image, classes) is not typed here; a value
that contradicts the store is refused.
"""

from dataclasses import dataclass, field
from typing import Literal

from train_stage.loading.config import DatasetConfig
from train_stage.models.config import ModelConfig
from train_stage.models.sizes import SCALED_DOWN
from train_stage.objective.config import MaskScheduleConfig
from train_stage.training.config import (
    ExperimentConfig,
    GenerationConfig,
    LRSchedulerConfig,
    OptimizerConfig,
    TrainingConfig,
    WandbConfig,
)

TINY_ROWS = 8  # of a forward pass


@dataclass
class TrainConfig:
    scale: Literal["full", "tiny"] = "full"
    """tiny: the same run with a model of two layers 32 wide and 8 rows a pass (16 a step), random
    weights and no compiling: milliseconds a step on a CPU, to see whether all of it works. Goes
    before model.*; text encoders are those of the store."""
    experiment: ExperimentConfig = field(default_factory=ExperimentConfig)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    lr_scheduler: LRSchedulerConfig = field(default_factory=LRSchedulerConfig)
    mask_schedule: MaskScheduleConfig = field(default_factory=MaskScheduleConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)

    def __post_init__(self) -> None:
        if self.scale == "tiny":
            scale_down(self.model, self.training)


def scale_down(model: ModelConfig, training: TrainingConfig) -> None:
    """Changes what makes a step expensive, in place; again, it changes nothing more."""
    model.size, model.pretrained_model_path = None, None
    kept = {name: value for name, value in model.transformer.items() if name != "embedding_size"}
    model.transformer = kept | SCALED_DOWN[model.architecture]
    training.compile = False
    training.batch_size = min(training.batch_size, TINY_ROWS)
    if training.global_batch_size is not None:
        training.global_batch_size = min(training.global_batch_size, 2 * TINY_ROWS)
