"""TrainConfig: every option of muse-train, with the seed project's section and key names.

What follows from the store (codebook size, codes per image, classes) is not typed here; a value
that contradicts the store is refused.
"""

from dataclasses import dataclass, field

from train_stage.loading.config import DatasetConfig
from train_stage.models.config import ModelConfig
from train_stage.objective.config import MaskScheduleConfig
from train_stage.training.config import (
    ExperimentConfig,
    GenerationConfig,
    LRSchedulerConfig,
    OptimizerConfig,
    TrainingConfig,
    WandbConfig,
)


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
