"""A judge of whether pictures show what their captions say (step 9, after generation).

An image tower and a linear map of a frozen text encoder's sentence vectors, trained to find each
picture's caption among all captions of the training pictures. It is no CLIP: it knows these
pictures and captions only, so numbers compare only under the same judge.
n pictures, C captions, D width of a sentence vector, E of the common space.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from storage.pretrained import PretrainedModel
from tokenize_stage.text.text_encoder import TextEncoder
from train_stage.evaluation.classifier import PictureClassifier
from train_stage.evaluation.fit import fit

SHIFT = 2  # pixels that a training picture is moved at most


@dataclass
class CaptionJudgeConfig:
    """Constructor keywords of CaptionJudge, its config.json."""

    text_width: int = 384
    """D."""
    width: int = 32
    """Channels of the first convolution."""
    common_width: int = 128
    """E."""


class CaptionJudge(PretrainedModel):
    """Cosine similarities of pictures and captions, scaled."""

    config_class = CaptionJudgeConfig

    def __init__(self, **fields: int):
        super().__init__(**fields)
        c: CaptionJudgeConfig = self.config
        self.tower = PictureClassifier(num_classes=c.common_width, width=c.width)
        self.text = nn.Linear(c.text_width, c.common_width, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(3.0))

    def forward(self, pictures: Tensor, sentences: Tensor) -> Tensor:
        """Pictures (n, 3, H, W) uint8, sentence vectors (C, D) -> logits (n, C)."""
        seen = F.normalize(self.tower(pictures), dim=-1)
        read = F.normalize(self.text(sentences), dim=-1)
        return self.log_scale.exp() * seen @ read.T


@torch.no_grad()
def sentence_vectors(
    text_encoder: str, captions: Sequence[str], device: torch.device, batch_size: int = 256
) -> Tensor:
    """The mean of each caption's states, of length 1: (C, D) on the CPU.

    text_encoder: a folder or hub name, see TextEncoder.
    """
    encoder = TextEncoder.from_pretrained(text_encoder).to(device)
    longest = max(map(len, encoder.tokenizer(list(captions), verbose=False).input_ids))
    encoder.max_length = min(encoder.max_length, longest)  # padding costs as much as words
    parts = []
    for first in range(0, len(captions), batch_size):
        made = encoder.encode(captions[first : first + batch_size], pooled=False)
        own = made.attention_mask.unsqueeze(-1)  # type: ignore[union-attr]
        parts.append(((made.states * own).sum(1) / own.sum(1)).float().cpu())
    return F.normalize(torch.cat(parts), dim=-1)


def train_judge(
    pictures: Tensor,
    targets: Tensor,
    sentences: Tensor,
    generator: torch.Generator,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    width: int,
    device: torch.device,
) -> CaptionJudge:
    """Trains on pictures (n, 3, R, R) uint8 and the numbers (n,) of their captions among (C, D).

    generator (CPU) gives the first weights, the order and the shifts.
    """
    judge = CaptionJudge(text_width=sentences.shape[1], width=width)
    sentences = sentences.to(device)

    def loss_of(rows: Tensor) -> Tensor:
        shift = torch.randint(-SHIFT, SHIFT + 1, (2,), generator=generator).tolist()
        moved = pictures[rows].roll(shift, (2, 3)).to(device)
        return F.cross_entropy(judge(moved, sentences), targets[rows].to(device))

    fit(judge, loss_of, len(pictures), generator, epochs, batch_size, learning_rate, device)
    return judge


@torch.inference_mode()
def find_captions(
    judge: CaptionJudge, pictures: Tensor, sentences: Tensor, best: int = 5, batch_size: int = 500
) -> Tensor:
    """The `best` captions of each picture, nearest first: (n, best) int64, on the CPU."""
    device = next(judge.parameters()).device
    sentences = sentences.to(device)
    found = [
        judge(part.to(device), sentences).topk(min(best, len(sentences)), dim=-1).indices.cpu()
        for part in pictures.split(batch_size)
    ]
    return torch.cat(found)
