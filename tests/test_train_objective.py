"""The masked batch of a step: the same for any number of processes, and from (seed, step) alone."""

import numpy as np
import pytest
import torch

from train_stage.loading.loader import Batch
from train_stage.models.transformer import MaskGitTransformer
from train_stage.objective.loss import MaskedLoss
from train_stage.objective.mask_schedule import get_mask_schedule
from train_stage.objective.masked_batch import mask_batch
from train_stage.objective.sums import Sums, describe_sums
from train_stage.training.config import TrainingConfig, split_batch

COSINE = get_mask_schedule("cosine")


def tiny_model():
    return MaskGitTransformer(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        codebook_size=60, num_vq_tokens=16, num_classes=10,
    )  # fmt: skip


def make_batch(rows, step=0, part=slice(None)):
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 60, (rows, 16), generator=generator)
    class_ids = torch.randint(0, 10, (rows,), generator=generator)
    numbers = np.arange(rows)[part]
    return Batch(step, numbers, codes[part], class_ids[part], np.zeros_like(numbers))


def mask(batch, rank=0, world=1, device="cpu", **options):
    config = TrainingConfig(max_train_steps=1, **options)
    where = torch.device(device)
    return mask_batch(batch, tiny_model(), config, config.seed, COSINE, rank, world, where)


def masked_classes(cond_dropout_prob, rows):
    """Share of rows whose class token is their class."""
    masked = mask(make_batch(rows), cond_dropout_prob=cond_dropout_prob)
    return (masked.input_ids[:, 0] < 70).float().mean().item()


def test_same_masks_for_any_world_size():
    whole = mask(make_batch(48))
    for world in (2, 3, 4):
        share = 48 // world
        parts = [
            mask(make_batch(48, part=slice(rank * share, (rank + 1) * share)), rank, world)
            for rank in range(world)
        ]
        assert torch.equal(torch.cat([part.input_ids for part in parts]), whole.input_ids)
        assert torch.equal(torch.cat([part.labels for part in parts]), whole.labels)
        assert {part.denominator for part in parts} == {whole.denominator}
    assert whole.denominator == int((whole.labels != -100).sum())


def test_positions_are_where_labels_are():
    masked = mask(make_batch(48))
    for part in masked.split(3):
        labels = part["labels"]
        assert part["input_ids"].shape == labels.shape == (16, 17)  # the class is never scored
        assert torch.equal(part["positions"], (labels.flatten() != -100).nonzero().squeeze(-1))
    assert sum(len(part["positions"]) for part in masked.split(3)) == masked.denominator


def test_the_draws_of_old_runs():
    """Pinned: a change would make resumed runs go on with other masks than they began with."""
    masked = mask(make_batch(48))
    assert (masked.denominator, int(masked.input_ids.sum())) == (557, 80334)


def test_a_step_asks_the_device_for_nothing():
    """On the meta device there are no values: what a GPU would have to be waited for raises."""
    device = torch.device("meta")
    masked, sums = mask(make_batch(48), device="meta"), Sums.zeros(device)
    loss_module = MaskedLoss(tiny_model().to(device), label_smoothing=0.1)
    for part in masked.split(2):
        out = loss_module(**part)
        (out["total"] / masked.denominator).backward()
        sums.add(out)
    assert masked.labels.is_meta and isinstance(masked.denominator, float)
    with pytest.raises((NotImplementedError, RuntimeError)):
        masked.labels.nonzero()


def test_steps_and_seeds_differ_and_repeat():
    first = mask(make_batch(48)).labels
    assert torch.equal(mask(make_batch(48)).labels, first)
    assert not torch.equal(mask(make_batch(48, step=1)).labels, first)
    assert not torch.equal(mask(make_batch(48), seed=43).labels, first)


def test_sums_by_hand():
    out = {
        "bucket": torch.tensor([0, *[9] * 10]),
        "weight": torch.ones(11),
        "losses": torch.arange(11.0),
        "plain": torch.arange(11.0),
        "correct": torch.arange(11) == 0,
    }
    sums = Sums.zeros(torch.device("cpu"))
    sums.add(out)
    metrics = describe_sums(sums.flat().tolist())
    assert metrics["loss"] == 5.0 and metrics["accuracy"] == pytest.approx(1 / 11)
    assert metrics["loss_masked_0_10"] == 0.0 and metrics["loss_masked_90_100"] == 5.5


def test_sums_of_an_earlier_version_are_read():
    """Those that came later count nothing yet."""
    flat = torch.arange(1.0, 1 + len(Sums.zeros(torch.device("cpu")).flat()))
    sums = Sums.from_flat(flat[:-3])
    assert torch.equal(sums.flat(), torch.cat([flat[:-3], torch.zeros(3)]))
    assert not sums.critic_count and sums.loss == 1


@pytest.mark.parametrize(
    ("options", "processes", "wanted"),
    [
        ({"batch_size": 64}, 4, (256, 1)),
        ({"batch_size": 64, "gradient_accumulation_steps": 2}, 2, (256, 2)),
        ({"batch_size": 64, "global_batch_size": 256}, 1, (256, 4)),
        ({"batch_size": 64, "global_batch_size": 256}, 4, (256, 1)),
        ({"batch_size": 50, "global_batch_size": 256}, 1, (256, 8)),
    ],
)
def test_split_batch(options, processes, wanted):
    assert split_batch(TrainingConfig(max_train_steps=1, **options), processes) == wanted


def test_split_batch_refuses():
    config = TrainingConfig(max_train_steps=1, global_batch_size=1000)
    with pytest.raises(ValueError, match="nearest are 999 and 1002"):
        split_batch(config, 3)
