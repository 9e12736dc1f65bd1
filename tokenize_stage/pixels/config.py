"""Options of step 2 (dataset.preprocessing.*); each field's sentence is its --help."""

from dataclasses import dataclass


@dataclass
class PreprocessingConfig:
    resolution: int = 256
    """Side of the square, in pixels, that each image is resized and cropped to."""

    def __post_init__(self) -> None:
        if self.resolution < 1:
            key = "dataset.preprocessing.resolution"
            raise ValueError(f"{key}={self.resolution}: it must be at least 1")
