"""Prompts -> text states, by a frozen encoder of `transformers`: CLIP, T5, or any other.

What conditions steps 7 and 8 on words. `pip install 'open-muse[text]'` brings transformers.
B prompts, S positions (as many as the encoder has, always), W width, C width of the pooled vector.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from storage.pretrained import find_model, read_config
from tokenize_stage.text.tokenizer import CaptionTokenizer, import_transformers, load_tokenizer

# architectures of a config.json: the class of transformers that is its text encoder; for all others
# AutoModel finds it
ENCODERS = {
    "CLIPTextModelWithProjection": "CLIPTextModelWithProjection",
    "CLIPModel": "CLIPTextModelWithProjection",
    "CLIPTextModel": "CLIPTextModel",
    "T5EncoderModel": "T5EncoderModel",
    "T5ForConditionalGeneration": "T5EncoderModel",
    "T5WithLMHeadModel": "T5EncoderModel",
    "MT5EncoderModel": "MT5EncoderModel",
    "MT5ForConditionalGeneration": "MT5EncoderModel",
    "UMT5EncoderModel": "UMT5EncoderModel",
    "UMT5ForConditionalGeneration": "UMT5EncoderModel",
    "SiglipModel": "SiglipTextModel",
    "SiglipTextModel": "SiglipTextModel",
}
# padding is not hidden from these: so open-muse trained on them, and so SigLIP was trained itself
SEE_PADDING = ("CLIPTextModelWithProjection", "CLIPTextModel", "T5EncoderModel", "SiglipTextModel")
T5_POSITIONS = 512  # T5's positions are relative; it was trained with so many


class TextStates(NamedTuple):
    """What an encoder makes of prompts."""

    states: Tensor  # (B, S, W)
    pooled: Tensor | None = None  # (B, C)
    attention_mask: Tensor | None = None  # (B, S) int64, 0 where there is padding


def read_widths(name_or_path: str | Path) -> tuple[int, int | None]:
    """Widths (W, C) of an encoder, from its configuration alone; C None: it gives no pooled vector.

    Raises FileNotFoundError when nothing is there, and ValueError without transformers.
    """
    try:
        config = import_transformers().AutoConfig.from_pretrained(name_or_path)
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise FileNotFoundError(f"{name_or_path} holds no text encoder: {reason}") from None
    names = [ENCODERS.get(name) for name in config.architectures or []]
    text = getattr(config, "text_config", config)
    if "CLIPTextModelWithProjection" in names:
        return text.hidden_size, config.projection_dim
    return text.hidden_size, None


class TextEncoder:
    """A frozen text encoder with its tokenizer, both as transformers makes them."""

    def __init__(self, model: Any, tokenizer: Any):
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        positions = getattr(model.config, "max_position_embeddings", T5_POSITIONS)
        self.max_length = min(tokenizer.model_max_length, positions)  # S

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        subfolder: str | None = None,
        tokenizer_subfolder: str | None = None,
        revision: str | None = None,
        dtype: torch.dtype = torch.float32,
        length: int | None = None,
    ) -> Self:
        """Loads a folder or hub repository, in eval mode, on the CPU.

        The class is read from the "architectures" of config.json. tokenizer_subfolder: where the
        tokenizer lies, if not with the encoder. length: S, if less than it can have. Raises
        ValueError for an encoder of another kind, one that lacks weights, and without transformers;
        FileNotFoundError when nothing is there.
        """
        transformers = import_transformers()
        folder = find_model(name_or_path, subfolder, revision)
        config = read_config(folder)
        names = config.get("architectures") or []
        kind = next((ENCODERS[name] for name in names if name in ENCODERS), "AutoModel")
        if config.get("is_encoder_decoder") and kind == "AutoModel":
            legal = ", ".join(ENCODERS)
            raise ValueError(
                f"{folder} has architectures={names}, which decodes, too; text encoders here: "
                f"{legal}, and models without a decoder"
            )
        model, report = getattr(transformers, kind).from_pretrained(
            folder, dtype=dtype, output_loading_info=True
        )
        missing = sorted(report["missing_keys"])
        missing = [name for name in missing if not name.startswith("pooler.")]  # never read
        if missing:  # which transformers would leave at random
            kind = type(model).__name__
            raise ValueError(f"{folder} lacks weights of a {kind}:\n  " + "\n  ".join(missing))
        place = tokenizer_subfolder or subfolder or ""
        tokenizer = load_tokenizer(name_or_path, place, revision)
        tokenizer.model_max_length = length or tokenizer.model_max_length
        tokenizer.padding_side = "right"  # as in a store, whose lengths say where texts end
        return cls(model, tokenizer)

    @property
    def hides_padding(self) -> bool:
        """Whether what it makes of a text depends on how far that is padded, unless told."""
        return type(self.model).__name__ not in SEE_PADDING

    @property
    def has_projection(self) -> bool:
        """Whether it gives a pooled vector."""
        return hasattr(self.model, "text_projection")

    @torch.no_grad()
    def encode(
        self,
        prompts: Sequence[str],
        pooled: bool | None = None,
        clip_skip: int | None = None,
    ) -> TextStates:
        """Prompts -> states (B, S, W), with `pooled` also pooled (B, C), and their mask (B, S).

        As encode_ids does; longer prompts are cut, see cut_prompts.
        """
        tokens = self.tokenizer(
            list(prompts),
            return_tensors="pt",
            padding="max_length",
            truncation=True,
            max_length=self.max_length,
            return_attention_mask=True,
        ).to(self.model.device)
        lengths = tokens.attention_mask.sum(-1)
        made = self.encode_ids(tokens.input_ids, pooled, clip_skip, lengths)
        return made._replace(attention_mask=tokens.attention_mask)

    @torch.no_grad()
    def encode_ids(
        self,
        input_ids: Tensor,
        pooled: bool | None = None,
        clip_skip: int | None = None,
        lengths: Tensor | None = None,
    ) -> TextStates:
        """Ids (B, S), padded, on the encoder's device -> states (B, S, W), pooled (B, C) or None.

        lengths (B,): how many ids of each row are no padding; needed where hides_padding.

        With pooled (None: where the encoder has a projection) the states are those before the last
        layer, as muse-512 and aMUSEd were trained; else the last ones, normalized. clip_skip n
        takes those of n layers before the last instead.
        """
        pooled = self.has_projection if pooled is None else pooled
        if pooled and not self.has_projection:
            kind = type(self.model).__name__
            raise ValueError(f"a {kind} gives no pooled vector: a CLIPTextModelWithProjection does")
        if clip_skip is not None:
            layers = self.model.config.num_hidden_layers
            if not 0 <= clip_skip <= layers:
                raise ValueError(f"clip_skip={clip_skip}: the text encoder has layers 0..{layers}")
        given = {}
        if self.hides_padding:
            if lengths is None:
                raise ValueError(f"a {type(self.model).__name__} is to know the lengths of texts")
            places = torch.arange(input_ids.shape[1], device=input_ids.device)
            given["attention_mask"] = (places < lengths[:, None]).long()  # (B, S)
        made = self.model(input_ids, output_hidden_states=True, **given)
        if clip_skip is None and not pooled:
            states = made.last_hidden_state
        else:
            states = made.hidden_states[-1 - (1 if clip_skip is None else clip_skip)]
        return TextStates(states, made.text_embeds if pooled else None)

    def cut_prompts(self, prompts: Sequence[str]) -> list[str]:
        """Those of the prompts that are too long to be read to their end."""
        lengths = [len(ids) for ids in self.tokenizer(list(prompts), verbose=False).input_ids]
        return [p for p, n in zip(prompts, lengths, strict=True) if n > self.max_length]

    def check_tokenizer(self, record: Mapping[str, Any]) -> None:
        """Whether ids in a store are for this encoder; record: store.json's, of that column.

        Raises ValueError that names the first field in which its own tokenizer differs.
        """
        own = CaptionTokenizer(self.tokenizer, self.max_length, "own").record()
        for key in ("fingerprint", "vocabulary_size", "length", "pad_id"):
            if own[key] != record[key]:
                raise ValueError(
                    f"the store's text ids are by {record['name']}, of {key} {record[key]!r}; this "
                    f"text encoder has {own[key]!r}: open the one that the store was made with"
                )

    def to(self, device: str | torch.device, dtype: torch.dtype | None = None) -> Self:
        """Moves the encoder; dtype None leaves it in its own."""
        self.model.to(device=device, dtype=dtype)  # a T5 in float16 has layers in float32
        return self

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes encoder and tokenizer into one folder, as transformers and open-muse read them."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
