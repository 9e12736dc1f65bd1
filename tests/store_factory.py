"""A small store with a learnable pattern, for tests of stage two: code // 6 is the class."""

import numpy as np
import torch

from storage.pretrained import model_fingerprint
from storage.schema import ArrayColumn, StoreMeta, Tokenizer
from storage.writer import ShardWriter, create_store
from tokenize_stage.vq.maskgit_vqgan import MaskGitVQGAN

SIZES = {
    "resolution": 8,
    "hidden_channels": 32,
    "channel_mult": (1, 1),
    "num_res_blocks": 1,
    "z_channels": 8,
    "quantized_embed_dim": 8,
    "num_embeddings": 60,
}


def make_store(folder, rows=300, classes=10, backend="arrow"):
    """Writes folder/vq and folder/store (two shards, 4x4 codes); returns the store's path."""
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    vq = MaskGitVQGAN(**SIZES)
    vq.save_pretrained(folder / "vq")
    tokenizer = Tokenizer(str(folder / "vq"), "MaskGitVQGAN", 60, [4, 4], model_fingerprint(vq))
    arrays = {"codes": ArrayColumn("uint16", [16])}
    create_store(folder / "store", StoreMeta(8, arrays, {"codes": tokenizer}, backend=backend))
    rng = np.random.default_rng(0)
    for shard in range(2):
        with ShardWriter(folder / "store", f"{shard:05d}", source=f"{shard}.tar") as writer:
            class_ids = rng.integers(0, classes, rows // 2)
            codes = class_ids[:, None] * 6 + rng.integers(0, 6, (rows // 2, 16))
            keys = [f"{shard}-{index}" for index in range(rows // 2)]
            writer.add({"codes": codes, "key": keys, "class_id": class_ids})
    return folder / "store"
