"""MusePipeline: prompts or class ids -> pictures, in one call (steps 8 and 9).

    pipe = MusePipeline.from_pretrained("amused/amused-256")
    pipe("a dog on the moon", generator=torch.Generator().manual_seed(0))[0].save("dog.png")

B images at once, P prompts, N codes an image on a grid of h x w, H x W pixels, S text positions,
W, C widths of the text states and of the pooled text.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self, get_args

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from tokenize_stage.text.text_encoder import TextEncoder
from train_stage import pictures
from train_stage.conditioning.prompt_encoder import PromptEncoder
from train_stage.models.load_transformer import Transformer
from train_stage.models.uvit import MaskGiTUViT
from train_stage.pipeline.pipeline_folder import (
    Parts,
    PipelineSettings,
    default_grid,
    open_parts,
    save_parts,
)
from train_stage.pipeline.pipeline_inputs import (
    CLASS_DEFAULTS,
    TEXT_DEFAULTS,
    Canvas,
    Conditions,
    Embeddings,
    Picture,
    Start,
    Temperature,
    Texts,
    as_texts,
    check_condition,
    choose_grid,
    count_texts,
    start_from,
    text_conditions,
)
from train_stage.sampling.generation import generate
from train_stage.sampling.guidance import GuidanceSchedule, guidance_scales
from train_stage.sampling.parallel_decoding import TemperatureDecay
from train_stage.training.devices import pick_device

OutputType = Literal["pil", "uint8", "pt", "np", "codes"]


class MusePipeline:
    """A VQ model (`vae`), a `transformer` and, where that reads text, a `text_encoder`.

    Calling it takes what the model is conditioned on, one of:
        prompt, or prompt_embeds=(states (P, S, W), pooled (P, C) or None) as TextEncoder.encode
            makes them; negative_prompt, "" if not given, or negative_embeds: what to lead away from
        class_ids
    How it is drawn (if not given: TEXT_DEFAULTS, CLASS_DEFAULTS; see sampling.generate):
        num_inference_steps, guidance_scale (0 and 1: none), guidance_schedule, temperature,
        temperature_decay, noise_schedule, critic; clip_skip: see TextEncoder.encode; generator, on
        the CPU or the model's device
    What comes out, num_images_per_prompt pictures side by side for every prompt:
        height, width: in pixels, where the model can make other sizes than it was trained on
        orig_size (width, height), crop_coords (top, left), aesthetic_score: what the model is told
            about the picture (micro-conditions); if not given, its own size and the score that the
            model was trained with where none was known
        output_type: a list of "pil" images; "uint8" (B, 3, H, W); in [0, 1] "pt" (B, 3, H, W) or
            "np" (B, H, W, 3); "codes" (B, h, w). batch_size: pictures drawn at once
    To draw on a picture: inpaint, image_to_image.
    """

    def __init__(
        self,
        vae: pictures.VQModel,
        transformer: Transformer,
        text_encoder: Any = None,
        tokenizer: Any = None,
        settings: PipelineSettings | None = None,
    ):
        """text_encoder: a TextEncoder, or a model of transformers with its `tokenizer`."""
        if transformer.config.codebook_size != vae.codebook_size:
            raise ValueError(
                f"the transformer was made for {transformer.config.codebook_size} codes, the VQ "
                f"model has {vae.codebook_size}: they do not belong together"
            )
        self.vae, self.transformer = vae.float().eval(), transformer.eval()
        if tokenizer is not None:
            text_encoder = TextEncoder(text_encoder, tokenizer)
        self.text_encoder: TextEncoder | PromptEncoder | None = text_encoder
        settings = settings or PipelineSettings()
        self.grid = settings.grid or default_grid(transformer)  # (h, w) when no size is given
        self.noise_schedule, self.class_names = settings.noise_schedule, settings.class_names
        self.class_prompt, self.aesthetic_score = settings.class_prompt, settings.aesthetic_score
        self.has_pooled = isinstance(transformer, MaskGiTUViT)  # and micro-conditions
        self.reads_text = self.has_pooled or transformer.config.add_cross_attention
        self.defaults = TEXT_DEFAULTS if self.reads_text else CLASS_DEFAULTS
        self.progress: bool | None = None  # show a bar; None: on a terminal
        self._compiler: Any = None

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        vq_model: str | Path | None = None,
        text_encoder: str | Path | None = None,
        revision: str | None = None,
        dtype: torch.dtype | None = None,
        device: str = "auto",
    ) -> Self:
        """Opens a pipeline's folder or hub repository, or a model directory, for inference.

        Of open-muse, of aMUSEd (diffusers), or of a training run: see pipeline_folder.py. vq_model,
        text_encoder: taken instead of its own. dtype: of transformer and text encoder, the VQ model
        stays in float32. device: auto is a GPU where there is one.
        Raises FileNotFoundError, or ValueError for parts that do not fit, listing what is wrong.
        """
        parts = open_parts(name_or_path, vq_model, text_encoder, revision)
        pipe = cls(parts.vae, parts.transformer, parts.text_encoder, settings=parts.settings)
        return pipe.to(pick_device(device), dtype)

    def save_pretrained(self, folder: str | Path, safe_serialization: bool = True) -> None:
        """Writes all parts into one folder, for from_pretrained and open-muse's PipelineMuse.

        The latter reads safe_serialization=False only (pytorch_model.bin). Raises ValueError for a
        folder that holds anything but a pipeline saved before.
        """
        settings = PipelineSettings(
            self.grid,
            self.noise_schedule,
            self.class_names,
            self.class_prompt,
            self.aesthetic_score,
        )
        parts = Parts(self.vae, self.transformer, self.text_encoder, settings)
        save_parts(parts, Path(folder), safe_serialization)

    def to(self, device: str | torch.device, dtype: torch.dtype | None = None) -> Self:
        """Moves all parts; `dtype` is for transformer and text encoder."""
        self.vae.to(device)
        self.transformer.to(device=device, dtype=dtype)
        if self.text_encoder is not None:
            self.text_encoder.to(device, dtype)
        return self

    @property
    def device(self) -> torch.device:
        """Where the transformer is."""
        return next(self.transformer.parameters()).device

    def compile(self, mode: str | None = None, backend: str = "inductor") -> Self:
        """Has torch.compile compile the transformer; the first picture then takes its time.

        mode: if None, torch.compile's own on a CPU, "reduce-overhead" (CUDA graphs) on a GPU.
        """
        if mode is None and self.device.type == "cuda" and backend == "inductor":
            mode = "reduce-overhead"
        trunk = torch.compile(self.transformer.hidden_states, mode=mode, backend=backend)
        self.transformer.hidden_states = trunk  # type: ignore[method-assign]
        self._compiler = partial(torch.compile, backend=backend)  # ends of steps: many shapes
        return self

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        class_ids: int | Sequence[int] | Tensor | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        guidance_scale: float | None = None,
        num_inference_steps: int | None = None,
        temperature: Temperature | None = None,
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        generator: torch.Generator | None = None,
        noise_schedule: str | None = None,
        guidance_schedule: GuidanceSchedule | None = None,
        temperature_decay: TemperatureDecay | None = None,
        orig_size: tuple[float, float] | None = None,
        crop_coords: tuple[float, float] = (0, 0),
        aesthetic_score: float | None = None,
        prompt_embeds: Embeddings | None = None,
        negative_embeds: Embeddings | None = None,
        clip_skip: int | None = None,
        canvas: Canvas | None = None,
        critic: Literal["self"] | None = None,
        batch_size: int = 16,
        output_type: OutputType = "pil",
    ) -> Any:
        """Pictures; the arguments are described with the class."""
        if output_type not in get_args(OutputType):
            raise ValueError(f"output_type={output_type!r}: legal are {get_args(OutputType)}")
        steps, scale, heat = self.defaults.unless(num_inference_steps, guidance_scale, temperature)
        is_filled = canvas is not None and canvas.mask is not None
        schedule = noise_schedule or ("linear" if is_filled else self.noise_schedule)
        start = self._start(canvas, (height, width), steps, schedule)
        is_guided = guidance_scales(scale, steps, guidance_schedule) is not None
        learned = self.transformer.config.null_text_length and not negative_prompt
        if not is_guided or (learned and negative_embeds is None):
            negative = None
        else:
            negative = as_texts(negative_prompt or "", negative_embeds)
        count, conditions = self._conditions(prompt, class_ids, prompt_embeds, negative, clip_skip)
        how = {
            "micro_conds": self._micro_conds(start.grid, orig_size, crop_coords, aesthetic_score),
            "temperature": heat,
            "timesteps": steps,
            "guidance_scale": scale,
            "guidance_schedule": guidance_schedule,
            "noise_schedule": schedule,
            "temperature_decay": temperature_decay,
            "generator": generator,
            "critic": critic,
        }
        rows = torch.arange(count).repeat_interleave(num_images_per_prompt)
        parts = [
            self._output(codes, start, output_type)
            for codes in self._draw(rows.split(batch_size), conditions, start, how)
        ]
        return join(parts, output_type)

    def inpaint(
        self,
        image: Picture,
        mask: Picture | Tensor,
        prompt: Any = None,
        strength: float = 1.0,
        paste: bool = True,
        **arguments: Any,
    ) -> Any:
        """Draws what the mask hides anew; takes whatever calling the pipeline takes.

        image: resized and cropped to the size that is made. mask: a picture of the same shape,
        white (or transparent) where to draw; or bool, (H, W) pixels or (h, w) or (N,) codes. A code
        is drawn if any of its pixels is hidden. With paste all other pixels are the image's own,
        else what the VQ model makes of their codes, as in diffusers. noise_schedule is linear if
        not given. strength below 1 leaves out the first steps of decoding.
        """
        return self(prompt, canvas=Canvas(image, mask, strength, paste), **arguments)

    def image_to_image(
        self, image: Picture, prompt: Any = None, strength: float = 0.5, **arguments: Any
    ) -> Any:
        """Draws after an image, some of whose codes are hidden; takes what calling takes.

        strength in (0, 1]: the share of the decoding steps that are done. The more, the more codes
        are hidden before; at 1, all of them. image is resized and cropped as in inpaint.
        """
        return self(prompt, canvas=Canvas(image, strength=strength), **arguments)

    def _start(
        self,
        canvas: Canvas | None,
        size: tuple[int | None, int | None],
        steps: int,
        noise_schedule: str,
    ) -> Start:
        """What decoding begins with; size: height and width, None for the model's own."""
        mask_id, config = self.transformer.mask_token_id, self.transformer.config
        step = None
        if self.has_pooled:
            step = self.vae.reduction * (2 if config.force_down_up_sample else 1)
        grid = choose_grid(size, self.grid, self.vae.reduction, step)
        if canvas is None:
            start = Start(grid, torch.full((1, grid[0] * grid[1]), mask_id))
        else:
            start = start_from(self.vae, canvas, steps, noise_schedule, grid, mask_id)
        return start._replace(codes=start.codes.to(self.device))

    def _conditions(
        self,
        prompt: str | Sequence[str] | None,
        class_ids: int | Sequence[int] | Tensor | None,
        prompt_embeds: Embeddings | None,
        negative: Texts | None,
        clip_skip: int | None,
    ) -> tuple[int, Conditions]:
        """How many prompts, and the keywords of generate for any of them.

        Raises ValueError for anything but the one condition that the model takes.
        """
        if self.reads_text:
            legal = ["prompt", "prompt_embeds"]
        else:
            legal = ["class_ids"] if self.transformer.config.num_classes else []
        given = {"prompt": prompt, "prompt_embeds": prompt_embeds, "class_ids": class_ids}
        check_condition([name for name, value in given.items() if value is not None], legal)
        if not self.reads_text and negative not in (None, [""]):
            raise ValueError("negative prompts are for models that read text")
        if class_ids is not None:
            ids = torch.as_tensor(class_ids, device=self.device).reshape(-1)
            return len(ids), lambda which: {"class_ids": ids[which]}
        if not legal:
            return 1, lambda which: {}
        texts = as_texts(prompt, prompt_embeds)
        like = next(self.transformer.parameters())
        return count_texts(texts), text_conditions(
            self.text_encoder, texts, negative, self.has_pooled, clip_skip, like
        )

    def _draw(
        self,
        batches: Sequence[Tensor],
        conditions: Conditions,
        start: Start,
        how: dict[str, Any],
    ) -> Iterator[Tensor]:
        """Codes (B, h, w) of every batch; how: more keywords of generate."""
        steps = len(batches) * (how["timesteps"] - start.first_step)
        quiet = None if self.progress is None else not self.progress
        with tqdm(total=steps, desc="draw", unit=" steps", disable=quiet) as bar:
            for which in batches:
                ids = start.input_ids(len(which), self.transformer.mask_token_id, how["generator"])
                codes = generate(
                    self.transformer,
                    **conditions(which),
                    **how,
                    input_ids=ids,
                    starting_mask_ratio=start.mask_ratio,
                    first_step=start.first_step,
                    grid=start.grid if self.has_pooled else None,
                    callback=lambda *_: bar.update(),
                    compiler=self._compiler,
                )
                yield codes.unflatten(1, start.grid)

    def _micro_conds(
        self,
        grid: tuple[int, int],
        orig_size: tuple[float, float] | None,
        crop_coords: tuple[float, float],
        aesthetic_score: float | None,
    ) -> Tensor | None:
        """(1, 5) float32: width, height, crop top, crop left, aesthetic score; None if not read."""
        if not self.has_pooled:
            return None
        size = orig_size or (grid[1] * self.vae.reduction, grid[0] * self.vae.reduction)
        score = self.aesthetic_score if aesthetic_score is None else aesthetic_score
        told = [[*size, *crop_coords, score]]
        return torch.tensor(told, dtype=torch.float32, device=self.device)

    def _output(self, codes: Tensor, start: Start, output_type: OutputType) -> Any:
        """Codes (B, h, w) as what was asked for."""
        if output_type == "codes":
            return codes
        in_bytes = output_type in ("pil", "uint8")
        decode = pictures.decode_codes if in_bytes else pictures.decode_pixels
        made = decode(self.vae, codes, len(codes))  # (B, 3, H, W)
        if start.picture is not None:
            known = start.picture if in_bytes else start.picture.float() / 255
            made = torch.where(start.mask, made, known)  # type: ignore[arg-type]
        if output_type == "pil":
            return pictures.to_images(made)
        return made.permute(0, 2, 3, 1).numpy() if output_type == "np" else made


def join(parts: list[Any], output_type: OutputType) -> Any:
    """The batches as one."""
    if output_type == "pil":
        return [image for part in parts for image in part]
    return np.concatenate(parts) if output_type == "np" else torch.cat(parts)
