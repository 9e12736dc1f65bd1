"""The contact sheet of an audit: originals beside what each tokenizer makes of them, with words."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

LEAST, MOST = 96, 256  # pixels along a side of a picture on the sheet
GAP, LINE, LINES, TEXT_SIZE = 8, 15, 2, 11
FONT = f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf"
INK, PALE, PAPER = (30, 30, 30), (110, 110, 110), (255, 255, 255)


@dataclass
class SheetEntry:
    """One row of the store on the sheet; pictures: (3, R, R) uint8, each under its column's title.

    An R may differ from picture to picture. None: there is nothing to show. notes: a word or two
    under each picture.
    """

    pictures: Sequence[np.ndarray | None]
    notes: Sequence[str]
    title: str
    caption: str


def contact_sheet(entries: Sequence[SheetEntry], titles: Sequence[str]) -> Image.Image:
    """Entries in as many columns as make the sheet about square. Raises ValueError without any."""
    if not entries:
        raise ValueError("a sheet of no rows")
    sides = [p.shape[1] for entry in entries for p in entry.pictures if p is not None]
    side = min(max(sides, default=LEAST), MOST)
    side *= max(1, math.ceil(LEAST / side))  # small pictures grow by whole numbers
    width = len(titles) * (side + GAP) + GAP
    height = side + (LINES + 2) * LINE + GAP
    across = max(1, round(math.sqrt(len(entries) * height / width)))
    down = math.ceil(len(entries) / across)
    sheet = Image.new("RGB", (across * width, down * height + LINE + GAP), PAPER)
    pen, font = ImageDraw.Draw(sheet), ImageFont.truetype(FONT, TEXT_SIZE)
    for column in range(across):
        for number, title in enumerate(titles):
            place = column * width + GAP + number * (side + GAP)
            pen.text((place, GAP // 2), _fitted(pen, font, title, side), INK, font)
    for number, entry in enumerate(entries):
        left, top = number % across * width + GAP, number // across * height + LINE + GAP
        _draw_entry(sheet, pen, font, entry, left, top, side)
    return sheet


def _draw_entry(
    sheet: Image.Image,
    pen: ImageDraw.ImageDraw,
    font: ImageFont.FreeTypeFont,
    entry: SheetEntry,
    left: int,
    top: int,
    side: int,
) -> None:
    for number, (pixels, note) in enumerate(zip(entry.pictures, entry.notes, strict=True)):
        place = left + number * (side + GAP)
        if pixels is None:
            pen.rectangle((place, top, place + side - 1, top + side - 1), outline=PALE)
        else:
            sheet.paste(_scaled(pixels, side), (place, top))
        pen.text((place, top + side + 1), _fitted(pen, font, note, side), PALE, font)
    width, below = len(entry.pictures) * (side + GAP) - GAP, top + side + LINE
    pen.text((left, below), _fitted(pen, font, entry.title, width), INK, font)
    rest = " ".join(entry.caption.split())
    for line in range(1, LINES + 1):
        shown = _fitted(pen, font, rest, width, "" if line < LINES else "…")
        pen.text((left, below + line * LINE), shown.strip(), INK, font)
        rest = rest[len(shown) :]


def _scaled(pixels: np.ndarray, side: int) -> Image.Image:
    picture = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    way = Image.Resampling.NEAREST if side % picture.width == 0 else Image.Resampling.LANCZOS
    return picture.resize((side, side), way)


def _fitted(
    pen: ImageDraw.ImageDraw,
    font: ImageFont.FreeTypeFont,
    text: str,
    width: int,
    end: str = "…",
) -> str:
    """As much of a text as a line has room for; with an `end` where it is cut, else at a space."""
    if pen.textlength(text, font) <= width:
        return text
    kept = next(
        n for n in range(len(text) - 1, -1, -1) if pen.textlength(text[:n] + end, font) <= width
    )
    space = text.rfind(" ", 0, kept + 1)
    return text[:kept] + end if end or space < 1 else text[: space + 1]
