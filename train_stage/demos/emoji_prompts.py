"""Prompts for muse-demo-text, and the table of pictures that answers them.

    python -m train_stage.demos.emoji_prompts data=runs/demo_text/data output=prompts.txt

Emoji that are held out in one style, in all their styles: three captions that were trained on, and
one whose picture no part of the training has seen, though its emoji and its style it has.
"""

import io
import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import MISSING
from PIL import Image
from webdataset import WebDataset

from configs.load import load_command_config
from storage.atomic import atomic_file
from train_stage.pictures import save_grid

FRAME = (220, 30, 30)  # around what was held out
ROWS = 12


@dataclass
class EmojiPromptsConfig:
    """Options of train_stage.demos.emoji_prompts."""

    data: str = MISSING
    """What train_stage.demos.emoji_data wrote."""
    output: str = MISSING
    """The text file of prompts, one in every line."""
    emoji: int = 64
    """How many emoji."""
    seed: int = 0
    """Chooses them."""


def main(argv: list[str] | None = None) -> int:
    """Writes the prompts; returns the exit status."""
    config = load_command_config(EmojiPromptsConfig, argv, __doc__ or "")
    try:
        prompts = choose_prompts(Path(config.data), config.emoji, config.seed)
        with atomic_file(Path(config.output)) as temporary:
            temporary.write_text("".join(f"{prompt}\n" for prompt in prompts))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{len(prompts)} prompts: {config.output}")
    return 0


def read_facts(data: Path, part: str) -> list[dict[str, Any]]:
    """name, style, emoji, png of every sample of "train" or "held_out"."""
    tars = sorted(map(str, (data / part).glob("*.tar")))
    samples = WebDataset(tars, shardshuffle=False, empty_check=False)
    return [{**json.loads(sample["json"]), "png": sample["png"]} for sample in samples]


def choose_prompts(data: Path, count: int, seed: int) -> list[str]:
    """The captions of `count` emoji with a held-out picture, each in all its styles."""
    held_out, train = read_facts(data, "held_out"), read_facts(data, "train")
    found = held_out or train  # one style has nothing held out
    names = sorted({fact["name"] for fact in found})
    chosen = set(random.Random(seed).sample(names, min(count, len(names))))
    captions = {
        f"{fact['name']}, {fact['style']} style"
        for fact in held_out + train
        if fact["name"] in chosen
    }
    return sorted(captions)


def draw_table(data: Path, generated: Path, path: Path) -> None:
    """A row for each of the first emoji: in every style the real picture, then a generated one.

    What was held out from training has a red frame. generated: muse-generate's output folder.
    """
    held_out, train = read_facts(data, "held_out"), read_facts(data, "train")
    real = {(f["name"], f["style"]): f["png"] for f in train + held_out}
    kept = {(f["name"], f["style"]) for f in held_out}
    styles = sorted({style for _, style in real})
    prompts = json.loads((generated / "generate.json").read_text())["prompts"]
    folder = {prompt: generated / str(number) for number, prompt in enumerate(prompts)}
    names = dict.fromkeys(prompt.rpartition(", ")[0] for prompt in prompts)
    whole = [n for n in names if all(f"{n}, {style} style" in folder for style in styles)]
    rows = []
    for name in whole[:ROWS]:
        for style in styles:
            first = sorted(folder[f"{name}, {style} style"].glob("*.png"))[0]
            made = np.array(Image.open(first).convert("RGB"))
            shown = Image.open(io.BytesIO(real[name, style])).convert("RGB")
            pair = [np.array(shown.resize(made.shape[1::-1], Image.Resampling.BOX)), made]
            rows += [frame(pixels) if (name, style) in kept else pixels for pixels in pair]
    if not rows:
        raise ValueError(f"{generated} has no emoji in all of {', '.join(styles)}")
    pictures = torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2)
    save_grid(pictures, path, 2 * len(styles), whole[:ROWS])


def frame(pixels: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 with a red edge."""
    framed = np.full_like(pixels, FRAME)
    framed[1:-1, 1:-1] = pixels[1:-1, 1:-1]
    return framed


if __name__ == "__main__":
    sys.exit(main())
