"""muse-tokenize audit: stored codes decoded beside their images, as a picture and in numbers.

    muse-tokenize audit store=stores/imagenet
    muse-tokenize audit store=stores/imagenet rows=256 compare=[bfloat16,float16] sources=new/place

Draws some rows, finds their images again, and measures how alike reconstructions and images are
(PSNR, SSIM), how much of each codebook is used, whether encoding the images again gives the stored
codes, and how many codes each way in `compare` changes against the exact one. Writes audit.json and
sheet.png into STORE/audit. Without the images there are reconstructions alone. Exit status: 0, or 2
where nothing can be looked at.
"""

import datetime
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from configs.load import load_command_config
from storage.atomic import write_json
from tokenize_stage.process import refuse
from tokenize_stage.quality.compare import Found, compare, encode_again, originals
from tokenize_stage.quality.config import AuditConfig
from tokenize_stage.quality.examine import captions_cut, mean_psnr, mean_ssim, psnr_of_rows, usage
from tokenize_stage.quality.report import describe, draw_sheet
from tokenize_stage.quality.subject import Subject, encoding_dataset, find_pictures, open_subject


def main(argv: list[str] | None = None) -> int:
    """Looks at a store, prints what it found; returns the exit status."""
    config = load_command_config(AuditConfig, argv, __doc__ or "")
    try:
        out = output_folder(config)
        subject = open_subject(config)
        out.mkdir(parents=True, exist_ok=True)
        findings = examine(subject, out)
        write_json(out / "audit.json", findings)
    except (ValueError, OSError) as error:
        return refuse(error)
    print(describe(findings))
    print(f"picture: {out}/sheet.png, numbers: {out}/audit.json")
    return 0


def output_folder(config: AuditConfig) -> Path:
    """Where to write. Raises ValueError when the store is no folder and there is no `out`."""
    if config.out is None and "://" in config.store:
        raise ValueError(f"store={config.store} is no folder: say with out=FOLDER where to write")
    return Path(config.out) if config.out else Path(config.store) / "audit"


def examine(subject: Subject, out: Path) -> dict[str, Any]:
    """What audit.json says; draws the sheet."""
    store, columns = subject.store, list(subject.models)
    stored = {column: subject.codes(column) for column in columns}
    rebuilt = {column: subject.rebuilt(column, codes) for column, codes in stored.items()}
    found, problems = find_images(subject)
    is_cuda = subject.device.type == "cuda"
    shards = sorted({store.shards.index(row.shard) for row in subject.rows})
    findings: dict[str, Any] = {
        "store": store.meta.fingerprint,
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name(subject.device) if is_cuda else "the CPU",
        "dtype": store.meta.transform.get("dtype", "float32"),
        "seed": subject.config.seed,
        "rows": [row.number for row in subject.rows],
        "images": len(found.pictures) if found else 0,
        "problems": problems,
        "columns": {column: usage(store, column) for column in columns},
        "text": captions_cut(store, shards),
        "compare": {},
    }
    crops: dict[int, np.ndarray] = {}
    if found:
        measure(subject, found, findings, stored, rebuilt)
        pixels = originals(subject, found.pictures, columns[0])
        crops = dict(zip(found.pictures, pixels, strict=True))
    psnr = {
        column: dict(zip(crops, findings["columns"][column].get("psnr_of_rows", ()), strict=True))
        for column in columns
    }
    draw_sheet(subject, crops, rebuilt, psnr, out / "sheet.png")
    return findings


def find_images(subject: Subject) -> tuple[Found | None, list[str]]:
    """The drawn rows' images, None when there is none, and why rows lack theirs."""
    dataset = encoding_dataset(subject.config)
    if dataset is None:
        place = f"{subject.config.store}/work/config.yaml"
        return None, [f"{place} is not there; it says where the images are and how they are cut"]
    images, pictures, problems = find_pictures(subject, dataset)
    return Found(images, pictures, dataset.preprocessing) if pictures else None, problems


def measure(
    subject: Subject,
    found: Found,
    findings: dict[str, Any],
    stored: Mapping[str, np.ndarray],
    rebuilt: Mapping[str, np.ndarray],
) -> None:
    """Adds to the findings what needs the images."""
    has_image = [row.number in found.pictures for row in subject.rows]
    known = {column: codes[has_image] for column, codes in stored.items()}
    again = encode_again(subject, found)
    for column, about in findings["columns"].items():
        crops, pictures = originals(subject, found.pictures, column), rebuilt[column][has_image]
        of_rows = psnr_of_rows(crops, pictures)
        about["psnr"] = mean_psnr(of_rows)
        about["psnr_of_rows"] = [value if math.isfinite(value) else None for value in of_rows]
        about["ssim"] = mean_ssim(crops, pictures)
        about["same_again"] = float((again[column] == known[column]).mean())
    if subject.config.compare:
        findings["compare"] = compare(subject, found, known)


if __name__ == "__main__":
    sys.exit(main())
