"""An audit's findings (audit.json) in words and tables, and as a sheet of pictures."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from storage.atomic import atomic_file
from tokenize_stage.quality.sheet import SheetEntry, contact_sheet
from tokenize_stage.quality.subject import Subject

PROBLEMS = 5  # that are written out


def describe(findings: Mapping[str, Any]) -> str:
    """The tables to print."""
    rows, images, problems = len(findings["rows"]), findings["images"], findings["problems"]
    lines = [f"{rows} rows drawn with seed {findings['seed']}, {images} of them with their image"]
    lines += [f"  {problem}" for problem in problems[:PROBLEMS]]
    lines += [f"  … {len(problems) - PROBLEMS} more"] if len(problems) > PROBLEMS else []
    if not images:
        lines.append("  so reconstructions alone; sources=… says where the images are now")
    head = f"{'column':<14} {'PSNR dB':>8} {'SSIM':>7} {'same again':>11} "
    lines += ["", head + f"{'codes used':>17} {'dead':>6} {'perplexity':>11} {'bits':>6}"]
    lines += [_column_line(name, about) for name, about in findings["columns"].items()]
    read = next(iter(findings["columns"].values()))["rows"]
    again = f"encoded again in {findings['dtype']} on {findings['device']}; " if images else ""
    lines.append(f"({again}codes of {read:,} rows counted)")
    if findings["compare"]:
        lines += ["", *_compare_lines(findings["compare"], findings["device"])]
    for name, text in findings["text"].items():
        cut = f"at most {text['full']:,}" if text["cut"] is None else f"{text['cut']:,}"
        of = f"of {text['captions']:,} captions in the shards drawn"
        lines.append(f"{name}: {cut} {of} cut to {text['length']} ids")
    return "\n".join(lines)


def _column_line(name: str, about: Mapping[str, Any]) -> str:
    psnr = same = ssim = ""
    if "same_again" in about:
        psnr, same = _psnr(about["psnr"]), f"{about['same_again']:.3%}"
        ssim = "" if about["ssim"] is None else f"{about['ssim']:.4f}"
    used = f"{about['used']:,} of {about['codebook_size']:,}"
    return (
        f"{name:<14} {psnr:>8} {ssim:>7} {same:>11} {used:>17} {about['dead']:>6,} "
        f"{about['perplexity']:>11,.1f} {about['entropy_bits']:>6.2f}"
    )


def _compare_lines(ways: Mapping[str, Any], device: str) -> list[str]:
    lines = [
        f"against exact, which is float32 and pixels by Pillow, on {device}; tf32 is emulated",
        f"{'way':<12} {'column':<14} {'codes changed':>14} {'PSNR, exact':>12} {'PSNR, image':>12}",
    ]
    for way, columns in ways.items():
        if isinstance(columns, str):
            lines.append(f"{way:<12} not to be had: {columns}")
            continue
        for name, found in columns.items():
            lines.append(
                f"{way:<12} {name:<14} {found['changed']:>14.3%} {_psnr(found['psnr']):>12} "
                f"{_psnr(found['psnr_image']):>12}"
            )
    return lines


def _psnr(value: float | None) -> str:
    return "equal" if value is None else f"{value:.2f}"


def draw_sheet(
    subject: Subject,
    crops: Mapping[int, np.ndarray],
    rebuilt: Mapping[str, np.ndarray],
    psnr: Mapping[str, Mapping[int, float | None]],
    path: Path,
) -> None:
    """Writes a PNG of some rows, originals on the left. crops, psnr (of each column): by row."""
    shown = np.linspace(0, len(subject.rows) - 1, subject.config.sheet_rows).round().astype(int)
    entries = []
    for place in np.unique(shown).tolist():
        row = subject.rows[place]
        if row.number in crops:
            values = [of_rows[row.number] for of_rows in psnr.values()]
            notes = ["", *("equal" if value is None else f"{value:.2f} dB" for value in values)]
        else:
            notes = ["not to be had", *("" for _ in psnr)]
        title = f"{row.shard}/{row.key}" + f" view {row.view}" * (row.view > 0)
        pictures = [crops.get(row.number), *(pictures[place] for pictures in rebuilt.values())]
        entries.append(SheetEntry(pictures, notes, title, row.caption or ""))
    with atomic_file(path) as temporary:
        contact_sheet(entries, ["original", *rebuilt]).save(temporary, format="PNG")
