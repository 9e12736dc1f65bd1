"""A small classifier of real pictures, the judge of generated ones (step 9, after generation).

Its accuracy on generated pictures tells whether they show their class; the Frechet distance
between its features of generated and of real pictures tells whether they are as varied.
This distance is NOT FID: the network is another one, so numbers compare only with one another,
under the same classifier and the same number of pictures.
B batch, n pictures, D features, C classes.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from storage.pretrained import PretrainedModel
from train_stage.evaluation.fit import fit


@dataclass
class PictureClassifierConfig:
    """Constructor keywords of PictureClassifier, its config.json."""

    num_classes: int = 10
    width: int = 16


class PictureClassifier(PretrainedModel):
    """Five convolutions and a linear layer; pictures are uint8 RGB of 16 pixels a side or more."""

    config_class = PictureClassifierConfig

    def __init__(self, **fields: int):
        super().__init__(**fields)
        width = self.config.width
        self.body = nn.Sequential(
            *_convolution(3, width, kernel=4, stride=2),
            *_convolution(width, 2 * width),
            nn.MaxPool2d(2),
            *_convolution(2 * width, 2 * width),
            *_convolution(2 * width, 4 * width),
            nn.MaxPool2d(2),
            *_convolution(4 * width, 4 * width),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.head = nn.Linear(4 * width, self.config.num_classes)

    def features(self, pictures: torch.Tensor) -> torch.Tensor:
        """Pictures (B, 3, H, W) uint8 -> what the last layer sees (B, D)."""
        return self.body(pictures.float().div(255).sub(0.5))

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        """Pictures (B, 3, H, W) uint8 -> logits (B, C)."""
        return self.head(self.features(pictures))


def _convolution(channels_in: int, channels_out: int, kernel: int = 3, stride: int = 1) -> list:
    convolution = nn.Conv2d(channels_in, channels_out, kernel, stride, padding=1, bias=False)
    return [convolution, nn.BatchNorm2d(channels_out), nn.ReLU()]


def train_classifier(
    pictures: torch.Tensor,
    class_ids: torch.Tensor,
    num_classes: int,
    generator: torch.Generator,
    epochs: int = 4,
    batch_size: int = 64,
    learning_rate: float = 3e-3,
    device: str | torch.device = "cpu",
) -> PictureClassifier:
    """Trains on pictures (n, 3, H, W) uint8 and their class ids (n,); returns it in eval mode.

    generator (CPU) gives the first weights and the order.
    """
    model = PictureClassifier(num_classes=num_classes)

    def loss_of(rows: torch.Tensor) -> torch.Tensor:
        logits = model(pictures[rows].to(device))
        return F.cross_entropy(logits, class_ids[rows].to(device), label_smoothing=0.05)

    fit(model, loss_of, len(pictures), generator, epochs, batch_size, learning_rate, device)
    return model


@torch.inference_mode()
def classify(
    model: PictureClassifier, pictures: torch.Tensor, batch_size: int = 500
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures (n, 3, H, W) uint8 -> predicted class ids (n,) and features (n, D) float64, CPU."""
    device = next(model.parameters()).device
    features = torch.cat([model.features(p.to(device)) for p in pictures.split(batch_size)])
    return model.head(features).argmax(1).cpu(), features.double().cpu()


def frechet_distance(features_a: torch.Tensor, features_b: torch.Tensor) -> float:
    """Frechet distance (squared) of the Gaussians fitted to two sets of features (n, D) float64.

    Small samples raise it, and so do pictures the network was trained on: read it beside that of
    two sets of real pictures, of the same n and held out from training.
    """
    fits = [(f.mean(0), torch.cov(f.T)) for f in (features_a, features_b)]
    return gaussian_frechet_distance(*fits[0], *fits[1])


def gaussian_frechet_distance(
    mean_a: torch.Tensor, cov_a: torch.Tensor, mean_b: torch.Tensor, cov_b: torch.Tensor
) -> float:
    """|mean_a - mean_b|^2 + tr(A + B - 2 (A^½ B A^½)^½), covariances (D, D), float64.

    The symmetric product has the eigenvalues of A B but stays real and stable when A is singular.
    """
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T  # (D, D), A^½
    product = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0)  # (D,)
    distance = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace()
    return float((distance - 2 * product.sqrt().sum()).clamp(min=0))


def mean_pairwise_distance(features: torch.Tensor) -> float:
    """Mean Euclidean distance between two different rows of features (n, D): how varied they are.

    0 when all are the same; n must be 2 or more.
    """
    return float(torch.pdist(features).mean())
