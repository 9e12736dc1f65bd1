"""A small store with captions and their text columns; the caption tells the codes."""

import dataclasses

import numpy as np
import pyarrow as pa
import torch
from store_factory import SIZES

from storage.pretrained import model_fingerprint
from storage.schema import ArrayColumn, StoreMeta, Tokenizer
from storage.writer import ShardWriter, create_store
from tokenize_stage.text.config import TextConfig
from tokenize_stage.text.text_columns import TextColumns
from tokenize_stage.vq.maskgit_vqgan import MaskGitVQGAN

SUBJECTS = ["cat", "dog", "house", "bird", "moon"]
CAPTION = "a photo of the {}"


def make_text_store(
    folder, encoders, states=(), pooled=(), rows=200, class_names=False, scores=True
):
    """Writes folder/vq and folder/store: 4 x 4 codes, text columns by `encoders` (NAME: folder).

    Every tenth row has no caption, every eighth no aesthetic score, without `scores` none has.
    Returns the store's path.
    """
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    vq = MaskGitVQGAN(**SIZES)
    vq.save_pretrained(folder / "vq")
    options = {"states": list(states), "pooled": list(pooled), "dtype": "float32"}
    text = TextColumns(TextConfig(tokenizers=dict(encoders), **options))
    tokenizer = Tokenizer(str(folder / "vq"), "MaskGitVQGAN", 60, [4, 4], model_fingerprint(vq))
    transform = {"text": text.record()} | ({"class_names": SUBJECTS} if class_names else {})
    arrays = {"codes": ArrayColumn("uint16", [16]), **text.arrays}
    meta = StoreMeta(8, arrays, {"codes": tokenizer}, backend="arrow")
    create_store(folder / "store", dataclasses.replace(meta, transform=transform))
    rng = np.random.default_rng(0)
    score = {"aesthetic_score": [None if n % 8 == 0 else 4 + n / rows for n in range(rows)]}
    fields = [pa.field(name, pa.float32()) for name in score] if scores else []
    extra = pa.schema([*text.fields, *fields])
    with ShardWriter(folder / "store", "00000", "0.tar", extra_columns=extra) as writer:
        subjects = rng.integers(0, len(SUBJECTS), rows)
        captions = [CAPTION.format(SUBJECTS[s]) if i % 10 else None for i, s in enumerate(subjects)]
        numbers = np.arange(rows)
        writer.add(
            {
                "codes": subjects[:, None] * 12 + rng.integers(0, 4, (rows, 16)),
                "key": [str(number) for number in numbers],
                "class_id": subjects,
                "caption": captions,
                "original_height": 100 + numbers,
                "original_width": 300 + numbers,
                "crop_top": numbers / 2,
                "crop_left": numbers / 4,
                "crop_height": np.full(rows, 16.0),
                "crop_width": np.full(rows, 16.0),
                **(score if scores else {}),
                **text.columns(captions),
            }
        )
    return folder / "store"
