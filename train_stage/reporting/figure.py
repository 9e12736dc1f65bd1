"""The report's picture: panels.py in a grid, the findings beside them, the samples below."""

from datetime import date
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from PIL import Image

from train_stage.reporting import panels
from train_stage.reporting.checks import Finding, short_verdict
from train_stage.reporting.history import History
from train_stage.reporting.style import ACCENT, COLORS, FAINT, INK, LEVELS, STYLE, count, stamp

STRIP = 6  # grids of pictures in a row
WIDTH = 17.0  # inches
LEARNING = (panels.loss_by_mask_ratio, panels.shape, panels.accuracy, panels.gradient)
RUNNING = (panels.learning_rate, panels.speed, panels.utilisation, panels.stall)


def draw_report(histories: list[History], findings: list[list[Finding]], output: Path) -> None:
    """Writes a PNG: one run with its findings, or several on top of each other."""
    grids = chosen_pictures(histories[-1]) if len(histories) == 1 else []
    strip = strip_height(grids)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 12.6 + strip))
        heights = [0.95, 4.3, 3.4, 3.4] + ([strip] if grids else [])
        rows: Any = figure.subfigures(len(heights), 1, height_ratios=heights)
        write_title(rows[0], histories, findings)
        top = split(rows[1], [2.1, 1.3])
        panels.loss(top[0], histories)
        if len(histories) == 1:
            write_findings(top[1], findings[0])
        else:
            write_table(top[1], histories, findings)
        for row, drawn in ((rows[2], LEARNING), (rows[3], RUNNING)):
            for axes, draw in zip(split(row, [1, 1, 1, 1]), drawn, strict=True):
                draw(axes, histories)
        if grids:
            draw_pictures(rows[4], grids)
        output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(output, dpi=110, metadata={"Software": "Open-MUSE"})


def split(row: SubFigure, widths: list[float]) -> list[Axes]:
    """Axes side by side, with the same margins in every row."""
    height = row.bbox.height / row.figure.dpi
    margins = {"left": 0.042, "right": 0.985, "top": 1 - 0.62 / height, "bottom": 0.34 / height}
    axes = row.subplots(1, len(widths), width_ratios=widths, squeeze=False)
    row.subplots_adjust(wspace=0.2, **margins)
    return list(axes[0])


def write_title(row: SubFigure, histories: list[History], findings: list[list[Finding]]) -> None:
    """What was trained, and how that is going."""
    names = "  vs  ".join(history.name for history in histories)
    size = 22 if len(names) < 60 else 14
    row.text(0.042, 0.58, names, fontsize=size, fontweight="bold", color=INK)
    row.text(0.985, 0.66, "Open-MUSE", fontsize=13, fontweight="bold", color=ACCENT, ha="right")
    row.text(0.985, 0.24, f"{date.today():%d %B %Y}", fontsize=10, color=FAINT, ha="right")
    if len(histories) == 1:
        row.text(0.042, 0.24, describe(histories[0]), fontsize=11, color=FAINT)
        level, words = short_verdict(findings[0])
        box = {"boxstyle": "round,pad=0.5", "facecolor": LEVELS[level], "edgecolor": "none"}
        look: Any = {"fontsize": 12, "fontweight": "bold", "color": "white", "bbox": box}
        row.text(0.885, 0.6, words, ha="right", **look)


def describe(history: History) -> str:
    """A line of numbers about a run."""
    words = [f"step {history.step:,}" + (f" of {history.total:,}" if history.total else "")]
    if history.starts:
        start = history.starts[-1]
        words = [
            f"{count(start['parameters'])} parameters",
            f"{start['tokens']} codes an image, {start['outputs']:,} outputs",
            f"{start['rows']:,} images",
            *words,
            f"batch {start['global_batch_size']:,}",
            f"{start['processes']} x {start['device']}, {start['precision']} mixed precision",
        ]
    if len(epochs := history.series("epoch")):
        words.insert(-2, f"{epochs.values[-1]:,.2f} epochs")
    return "   ·   ".join(words)


def write_findings(axes: Axes, findings: list[Finding]) -> None:
    """The checks, a mark and two lines each."""
    axes.axis("off")
    axes.set_title("Is it normal?", loc="left")
    step = 1.04 / max(1, len(findings))
    for index, finding in enumerate(findings):
        y = 0.985 - index * step
        axes.plot(0.012, y, "o", color=LEVELS[finding.level], markersize=8, clip_on=False)
        at: Any = {"transform": axes.transData, "va": "center"}
        axes.text(0.045, y, finding.topic, fontweight="bold", fontsize=9.5, color=INK, **at)
        text = finding.found
        if finding.level in ("look", "bad"):
            text += f" → {finding.advice}"
        axes.text(0.225, y, wrap(text, 64), fontsize=8.6, color=INK, linespacing=1.25, **at)
    axes.set(xlim=(0, 1), ylim=(0, 1.02))


def write_table(axes: Axes, histories: list[History], findings: list[list[Finding]]) -> None:
    """The runs beside each other, their newest numbers."""
    axes.axis("off")
    axes.set_title("Side by side", loc="left")
    columns = {"loss": "loss", "eval_loss": "eval loss", "accuracy": "accuracy"}
    columns |= {"images_per_s": "images/s", "mfu": "MFU"}
    heads = ["parameters", "step", *columns.values(), "verdict"]
    for line, head in enumerate(heads):
        axes.text(0, 0.86 - 0.1 * line, head, fontsize=10, color=FAINT, va="center")
    for index, (history, mine) in enumerate(zip(histories, findings, strict=True)):
        x = 0.22 + 0.78 * (index + 0.5) / len(histories)
        start = history.starts[-1] if history.starts else {}
        cells = [count(start["parameters"]) if start else "", f"{history.step:,}"]
        for key in columns:
            series = history.series(key)
            value = float(np.median(series.last(0.05))) if len(series) else None
            cells.append("" if value is None else stamp(key, value))
        cells.append(short_verdict(mine)[1])
        color = COLORS[index % len(COLORS)]
        name = wrap(history.name, 16)
        axes.text(x, 0.97, name, color=color, fontweight="bold", ha="center", va="center")
        for line, cell in enumerate(cells):
            axes.text(x, 0.86 - 0.1 * line, cell, fontsize=10.5, ha="center", va="center")
    axes.set(xlim=(0, 1), ylim=(0, 1.02))


def chosen_pictures(history: History) -> list[tuple[int, np.ndarray]]:
    """STRIP of a run's grids, the first and the newest among them, and their steps."""
    found = history.pictures
    picks = np.unique(np.linspace(0, len(found) - 1, min(STRIP, len(found))).round().astype(int))
    return [(found[i][0], np.asarray(Image.open(found[i][1]).convert("RGB"))) for i in picks]


def strip_height(grids: list[tuple[int, np.ndarray]]) -> float:
    """Inches for the grids side by side, their title included."""
    if not grids:
        return 0.0
    tallest = max(picture.shape[0] / picture.shape[1] for _, picture in grids)
    return min(7.0, 0.94 * WIDTH / STRIP * tallest) + 0.9


def draw_pictures(row: SubFigure, grids: list[tuple[int, np.ndarray]]) -> None:
    """The same prompts and seeds again and again."""
    columns = STRIP
    height = row.bbox.height / row.figure.dpi
    axes = row.subplots(1, columns, squeeze=False)[0]
    row.subplots_adjust(0.042, 0.02, 0.985, 1 - 0.75 / height, wspace=0.06)
    row.text(0.042, 1 - 0.28 / height, "Samples", fontsize=12, fontweight="bold", color=INK)
    row.text(0.095, 1 - 0.28 / height, "same seeds every time", fontsize=9, color=FAINT)
    for panel in axes:
        panel.axis("off")
    for panel, (step, picture) in zip(axes, grids, strict=False):
        panel.imshow(picture, interpolation="lanczos")
        panel.set_anchor("N")
        panel.set_title(f"step {step:,}", fontsize=9.5, fontweight="normal", color=FAINT, pad=4)


def wrap(text: str, width: int) -> str:
    """Two lines at most, the second one cut."""
    if len(text) <= width:
        return text
    cut = text.rfind(" ", 0, width)
    cut = width if cut < width // 2 else cut
    rest = text[cut:].strip()
    return f"{text[:cut]}\n{rest if len(rest) <= width else rest[: width - 1] + '…'}"
