"""What a caller gives pipeline.py -> what sampling.generate takes: a condition, and a start.

B images at once, P prompts, N codes an image on a grid of h x w, H x W pixels, S text positions,
W, C widths of the text states and of the pooled text.
"""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from tokenize_stage.text.text_encoder import TextEncoder, TextStates
from train_stage import pictures
from train_stage.conditioning.prompt_encoder import PromptEncoder
from train_stage.objective.mask_schedule import get_mask_schedule
from train_stage.sampling.generation import add_mask_noise

Picture = Image.Image | str | Path
Embeddings = TextStates | tuple[Tensor, Tensor | None]  # states (P, S, W), pooled (P, C)
Texts = list[str] | Embeddings
Temperature = float | tuple[float, float]
Conditions = Callable[[Tensor], dict[str, Any]]  # numbers (B,) of prompts -> keywords of generate


# of the fields of TextStates, as generate calls them
NAMES = ("encoder_hidden_states", "cond_embeds", "encoder_attention_mask")
NEGATIVE_NAMES = ("negative_embeds", "negative_cond_embeds", "negative_attention_mask")


class Defaults(NamedTuple):
    """What is taken where nothing is asked for."""

    num_inference_steps: int
    guidance_scale: float
    temperature: Temperature

    def unless(
        self, steps: int | None, scale: float | None, temperature: Temperature | None
    ) -> Self:
        """The same, but for what was asked for. Raises ValueError for less than a step."""
        if steps is not None and steps < 1:
            raise ValueError(f"num_inference_steps={steps}: at least 1")
        return self._replace(
            num_inference_steps=self.num_inference_steps if steps is None else steps,
            guidance_scale=self.guidance_scale if scale is None else scale,
            temperature=self.temperature if temperature is None else temperature,
        )


TEXT_DEFAULTS = Defaults(12, 10.0, (2.0, 0.0))  # aMUSEd's
CLASS_DEFAULTS = Defaults(18, 3.0, 1.0)


class Canvas(NamedTuple):
    """A picture to draw on. See MusePipeline.inpaint and image_to_image."""

    image: Picture
    mask: Picture | Tensor | None = None
    strength: float | None = None
    paste: bool = True


class Start(NamedTuple):
    """What decoding begins with."""

    grid: tuple[int, int]
    codes: Tensor  # (1, N), the mask id where the mask says so, or everywhere
    picture: Tensor | None = None  # (3, H, W) uint8, to be kept where the mask is not
    mask: Tensor | None = None  # (H, W) bool: the pixels to draw
    mask_ratio: float = 1.0  # share of the codes that it hides
    first_step: int = 0
    noise_ratio: float = 0.0  # probability that a code is hidden at random

    def input_ids(self, images: int, mask_id: int, generator: torch.Generator | None) -> Tensor:
        """The codes (B, N) that decoding begins with, each image hidden in its own way."""
        codes = self.codes.expand(images, -1)
        if self.noise_ratio == 0:
            return codes
        return add_mask_noise(codes, self.noise_ratio, mask_id, generator)


def text_conditions(
    encoder: TextEncoder | PromptEncoder | None,
    texts: Texts,
    negative: Texts | None,
    has_pooled: bool,
    clip_skip: int | None,
    like: Tensor,
) -> Conditions:
    """The keywords for any of the texts, which are encoded when they are asked for.

    negative: one, or one for each text; None without guidance, and for the model's learned text.
    Tensors get the device and dtype of `like`. A TextEncoder's padding is not hidden, as published.
    Raises ValueError as check_texts does, and where a pooled text is missing.
    """
    check_texts(encoder, texts, negative)

    def embed(texts: Texts, which: Tensor) -> TextStates:
        mask = None
        if isinstance(texts, list):
            wanted, which = which.unique(return_inverse=True)
            texts = encoder.encode([texts[i] for i in wanted], has_pooled, clip_skip)  # type: ignore[union-attr]
            mask = texts.attention_mask if isinstance(encoder, PromptEncoder) else None
        states, pooled = texts[0], texts[1]
        if has_pooled and pooled is None:
            raise ValueError("this model reads pooled text, too: give (states, pooled)")
        return TextStates(
            states.to(like)[which],
            pooled.to(like)[which] if has_pooled else None,  # type: ignore[union-attr]
            None if mask is None else mask.to(like.device)[which],
        )

    def keywords(which: Tensor) -> dict[str, Any]:
        given = dict(zip(NAMES, embed(texts, which), strict=True))
        if negative is not None:
            other = embed(negative, which if count_texts(negative) > 1 else which * 0)
            given |= dict(zip(NEGATIVE_NAMES, other, strict=True))
        return given

    return keywords


def check_texts(
    encoder: TextEncoder | PromptEncoder | None, texts: Texts, negative: Texts | None
) -> None:
    """Raises ValueError for texts without an encoder and for counts that do not fit.

    Warns of prompts that are too long to be read to their end.
    """
    count, others = count_texts(texts), 1 if negative is None else count_texts(negative)
    if not count:
        raise ValueError("nothing to draw: the list of prompts is empty")
    if others not in (1, count):
        raise ValueError(f"{others} negative prompts for {count} prompts: give 1 or {count}")
    if encoder is None and (isinstance(texts, list) or isinstance(negative, list)):
        raise ValueError(
            "this pipeline has no text encoder: open it with text_encoder=…, or give prompt_embeds "
            "and, unless guidance_scale=0, negative_embeds"
        )
    if encoder is not None and isinstance(texts, list) and (cut := encoder.cut_prompts(texts)):
        words = f"{len(cut)} of {count} prompts are cut to {encoder.max_length} tokens: {cut[0]!r}"
        warnings.warn(words, stacklevel=6)  # whoever called the pipeline


def check_condition(given: Sequence[str], legal: Sequence[str]) -> None:
    """Raises ValueError for anything but one legal condition, or none where none is legal."""
    if len(given) != min(len(legal), 1) or not set(given) <= set(legal):
        raise ValueError(
            f"given {' and '.join(given) or 'no condition'}; this model takes "
            f"{' or '.join(legal) or 'none'}"
        )


def as_texts(prompts: str | Sequence[str] | None, embeddings: Embeddings | None) -> Texts:
    """Prompts as a list, or the embeddings. Raises ValueError for both."""
    if embeddings is not None and prompts:
        raise ValueError(f"{prompts!r} and its embeddings: give one of them")
    if embeddings is not None:
        return embeddings
    return [prompts or ""] if prompts is None or isinstance(prompts, str) else list(prompts)


def count_texts(texts: Texts) -> int:
    """P."""
    return len(texts) if isinstance(texts, list) else len(texts[0])


def start_from(
    vae: pictures.VQModel,
    canvas: Canvas,
    steps: int,
    noise_schedule: str,
    grid: tuple[int, int],
    mask_id: int,
) -> Start:
    """A start from a picture's codes, hidden by its mask, or without one to be hidden at random.

    Raises ValueError for a strength that leaves no step of decoding, and for masks that hide
    nothing or are of another shape than the picture.
    """
    strength = canvas.strength
    if strength is None:
        strength = 0.5 if canvas.mask is None else 1.0
    first_step = steps - int(steps * strength)
    if not 0 <= first_step < steps:
        raise ValueError(
            f"strength={strength}: it must be above 0, at most 1, and leave one of {steps} steps"
        )
    height, width = (side * vae.reduction for side in grid)
    image = pictures.open_picture(canvas.image)
    picture = pictures.fit_picture(image, height, width)
    codes = pictures.encode_pictures(vae, picture.unsqueeze(0))  # (1, N)
    if canvas.mask is None:
        ratio = get_mask_schedule(noise_schedule)(torch.tensor(first_step / steps)).item()
        return Start(grid, codes, first_step=first_step, noise_ratio=ratio)
    mask = mask_pixels(canvas.mask, image.size, grid, vae.reduction)
    hidden = F.max_pool2d(mask.float().unsqueeze(0), vae.reduction).flatten().bool()  # (N,)
    if not hidden.any():
        raise ValueError("the mask hides nothing: it is white, or true, where to draw")
    codes, share = torch.where(hidden, mask_id, codes), hidden.float().mean().item()
    return Start(grid, codes, picture if canvas.paste else None, mask, share, first_step)


def mask_pixels(
    mask: Picture | Tensor, image_size: tuple[int, int], grid: tuple[int, int], reduction: int
) -> Tensor:
    """A mask as (H, W) bool: from a picture, cropped as the image is; from pixels; or from codes.

    image_size: width and height of the uncropped image. Raises ValueError for another shape.
    """
    height, width = grid[0] * reduction, grid[1] * reduction
    if not isinstance(mask, Tensor):
        opened = pictures.open_picture(mask)
        if opened.width * image_size[1] != opened.height * image_size[0]:
            raise ValueError(
                f"the mask is {opened.width}x{opened.height} pixels, the image "
                f"{image_size[0]}x{image_size[1]}: make them of one shape"
            )
        return pictures.fit_mask(opened, height, width)
    mask = mask.bool().cpu()
    if mask.shape in ((grid[0] * grid[1],), grid):
        cells = mask.reshape(grid).repeat_interleave(reduction, 0)
        return cells.repeat_interleave(reduction, 1)
    if mask.shape != (height, width):
        raise ValueError(
            f"the mask has the shape {tuple(mask.shape)}: legal are pixels ({height}, {width}), "
            f"codes {grid} or ({grid[0] * grid[1]},), and pictures"
        )
    return mask


def choose_grid(
    size: tuple[int | None, int | None], own: tuple[int, int], reduction: int, step: int | None
) -> tuple[int, int]:
    """The grid of a picture of `size`, height and width; its `own` sides where those are None.

    step: pixels that both sides must be multiples of; None for a model that has one size only.
    Raises ValueError for a size that cannot be made.
    """
    default = own[0] * reduction, own[1] * reduction
    height, width = size[0] or default[0], size[1] or default[1]
    if step is None and (height, width) != default:
        raise ValueError(
            f"height={height}, width={width}: this model makes {default[0]} x {default[1]} only"
        )
    if step is not None and (min(height, width) < step or height % step or width % step):
        raise ValueError(f"height={height}, width={width}: both must be multiples of {step} pixels")
    return height // reduction, width // reduction
