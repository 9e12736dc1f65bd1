"""Options of muse-tokenize estimate beside the run's own; each field's sentence is its --help."""

from dataclasses import dataclass, field

from tokenize_stage.config import StoreConfig, TokenizeConfig
from tokenize_stage.cost.roofline import GPUS

VARIANTS = ("float32", "bfloat16", "float16", "compile")


@dataclass
class EstimateOptions:
    images: int | None = None
    """Images in the data set; None: counted, where a folder or table tells, else the first tar's
    times the number of tars."""
    gpus: int = 1
    """GPUs that will work at the same time."""
    cores: int | None = None
    """CPU cores that will be beside each GPU; None: as many as decode here."""
    price: float | None = None
    """Of a GPU for an hour, with the CPUs beside it."""
    seconds: float = 10.0
    """About how long each stage is measured."""
    gpu: str = "here"
    """here: what is measured; H100, A100: a bound computed from the encoder's operations."""
    reached: float = 0.6
    """Share of a computed bound that is taken to be reached."""
    variants: list[str] = field(default_factory=list)
    """Ways to encode that are timed beside the configured one: float32, bfloat16, float16,
    compile."""

    def __post_init__(self) -> None:
        least = {"images": self.images, "gpus": self.gpus, "cores": self.cores}
        for name, value in least.items():
            if value is not None and value < 1:
                raise ValueError(f"estimate.{name}={value}: it must be at least 1")
        if self.price is not None and not self.price >= 0:
            raise ValueError(f"estimate.price={self.price}: it must not be negative")
        if not self.seconds > 0:
            raise ValueError(f"estimate.seconds={self.seconds}: it must be above 0")
        if not 0 < self.reached <= 1:
            raise ValueError(f"estimate.reached={self.reached}: it must be in 0..1, above 0")
        if self.gpu not in ("here", *GPUS):
            raise ValueError(f"estimate.gpu={self.gpu}: legal are here, {', '.join(GPUS)}")
        unknown = sorted(set(self.variants) - set(VARIANTS))
        if unknown:
            raise ValueError(f"estimate.variants={unknown}: legal are {', '.join(VARIANTS)}")


@dataclass
class EstimateConfig(TokenizeConfig):
    store: StoreConfig = field(default_factory=lambda: StoreConfig("."))
    estimate: EstimateOptions = field(default_factory=EstimateOptions)
