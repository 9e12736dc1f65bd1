"""The loop's parts against torch.multinomial and diffusers' scheduler; schedules planned ahead."""

import pytest
import torch

from train_stage.objective.mask_schedule import get_mask_schedule
from train_stage.sampling.generation import add_mask_noise
from train_stage.sampling.parallel_decoding import (
    decode,
    exponential_noise,
    hidden_counts,
    hidden_positions,
    settle_codes,
    step_temperatures,
    take,
)

MASK, K = 31, 30


def seeded(number=0):
    return torch.Generator().manual_seed(number)


def scheduler(steps, temperature, schedule="cosine"):
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.AmusedScheduler(mask_token_id=MASK, masking_schedule=schedule)
    theirs.set_timesteps(steps, temperature)
    return theirs


def logits_of(ids, step):
    """A model of its own kind: logits that depend on the codes and the step."""
    table = torch.randn(8, 32, 16, K, generator=seeded(1)) * 2
    return table[step, ids, torch.arange(16)] + table[step, ids.roll(1, 1), torch.arange(16)]


def test_a_draw_is_the_one_of_multinomial():
    probabilities = torch.randn(6 * 16, 50, generator=seeded(3)).mul(3).softmax(-1)
    theirs, ours = seeded(4), seeded(4)
    wanted = torch.multinomial(probabilities, 1, generator=theirs).view(6, 16)
    noise = exponential_noise((6, 16, 50), probabilities.device, ours)
    logits = probabilities.log().view(6, 16, 50)
    ids = torch.full((6, 16), MASK)
    hidden, everywhere = ids == MASK, torch.arange(16).expand(6, -1)
    codes, drawn, chosen = settle_codes(ids, hidden, everywhere, logits, noise)
    assert torch.equal(drawn, wanted) and torch.equal(codes, wanted)
    wanted_chosen = probabilities.view(6, 16, 50).gather(-1, wanted.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(chosen, wanted_chosen)
    assert torch.equal(ours.get_state(), theirs.get_state())


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("first_step", [0, 3])
def test_decoding_draws_as_the_scheduler_of_diffusers(schedule, first_step):
    """Rows with unlike numbers of masks, from any step on, temperatures and all."""
    theirs, steps, share = scheduler(8, (2, 0), schedule), 8, 0.8
    ids = torch.randint(0, K, (5, 16), generator=seeded(5))
    ids[torch.rand(5, 16, generator=seeded(6)) < torch.arange(1, 6).unsqueeze(1) / 5] = MASK
    wanted, generator = ids, seeded(7)
    for step in range(first_step, steps):
        output = theirs.step(
            logits_of(wanted, step), steps - 1 - step, wanted, share, generator=generator
        )
        wanted = output.prev_sample
    codes = decode(
        lambda ids, positions, step: take(logits_of(ids, step), positions),
        ids,
        MASK,
        hidden_counts(get_mask_schedule(schedule), steps, 16, share),
        step_temperatures((2, 0), steps, "linear"),
        first_step,
        seeded(7),
    )
    assert torch.equal(codes, wanted)


def test_mask_noise_is_the_one_of_diffusers():
    theirs = scheduler(8, 1.0)
    codes = torch.randint(0, K, (3, 4, 4), generator=seeded(1))
    for step in range(1, 8):  # at step 0 diffusers means the last one
        wanted = theirs.add_noise(codes, theirs.timesteps[step - 1], generator=seeded(step))
        ratio = get_mask_schedule("cosine")(torch.tensor(step / 8))
        assert torch.equal(add_mask_noise(codes, float(ratio), MASK, seeded(step)), wanted)


def test_positions_hold_all_that_is_hidden():
    hidden = torch.tensor([[0, 1, 1, 0, 1], [0, 0, 0, 1, 0], [0, 0, 0, 0, 0]]).bool()
    positions = hidden_positions(hidden, 3)
    assert positions[0].tolist() == [1, 2, 4] and positions[1, 0] == 3
    assert all(len(set(row)) == 3 for row in positions.tolist())


def test_counts_and_temperatures():
    cosine = get_mask_schedule("cosine")
    assert hidden_counts(cosine, 4, 16)[:3] == [14, 11, 6]
    assert hidden_counts(cosine, 4, 16, 0.5)[:3] == [7, 5, 3]
    assert step_temperatures(2.0, 4, "linear") == pytest.approx([1.5, 1.0, 0.5, 0.0])
    assert step_temperatures(2.0, 4, "cumulative") == pytest.approx([1.5, 0.75, 0.1875, 0.0])
    assert step_temperatures(2, 3, "linspace") == scheduler(3, 2).temperatures.tolist()
    assert step_temperatures((2, 0), 3, "linear") == pytest.approx([2, 1, 0])
