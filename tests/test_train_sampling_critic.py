"""Decoding with a critic, with self-conditioning, with a learned null text: planted and real."""

from functools import partial

import pytest
import torch
from small_models import (
    SIZES,
    Recorder,
    class_model,
    partly_masked,
    plain_decoding,
    seeded,
    text_condition,
    text_model,
    uvit_condition,
    uvit_model,
)
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

from train_stage.objective.mask_schedule import get_mask_schedule
from train_stage.sampling.generation import generate
from train_stage.sampling.parallel_decoding import decode, hidden_counts, step_temperatures, take

MASK, K, N = 31, 30, 16
COSINE = get_mask_schedule("cosine")


def planned(steps, temperature=0.0, length=N):
    return hidden_counts(COSINE, steps, length), [temperature] * steps


def coin(ids, positions, step, previous=None):
    """Every code is 3 or 7, as likely."""
    logits = torch.full((*positions.shape, K), -torch.inf)
    logits[..., [3, 7]] = 0.0
    return logits


def changed(model, **fields):
    """A small model with extensions, their parameters moved from where they start."""
    other = type(model).from_config(model.config_dict() | fields).eval()
    known = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            drawn = 0.5 * torch.randn(parameter.shape, generator=seeded(11))
            parameter.copy_(known.get(name, drawn))
    return other


def test_a_critic_that_knows_mends_what_was_drawn_wrong():
    """Half of all draws are right; a perfect critic leaves hardly any wrong one."""
    right = torch.where(torch.arange(256) % 2 == 0, 3, 7).expand(4, -1)
    ids, steps = torch.full((4, 256), MASK), planned(16, length=256)
    plain = decode(coin, ids, MASK, *steps, generator=seeded())
    mended = decode(
        coin, ids, MASK, *steps, generator=seeded(),
        judge=lambda codes: torch.where(codes == right, 9.0, 0.1),
    )  # fmt: skip
    shares = [(codes == right).float().mean().item() for codes in (plain, mended)]
    assert shares[0] == pytest.approx(0.5, abs=0.05) and shares[1] > 0.9


def test_the_worst_by_the_critic_are_hidden_and_known_codes_never():
    ids = torch.full((3, N), MASK)
    ids[:, :6] = 5  # known, and the critic likes them least
    odds = torch.arange(1.0, N + 1).expand(3, -1)
    left = []
    counts, cooled = planned(6)
    decode(
        coin, ids, MASK, counts, cooled, generator=seeded(), judge=lambda codes: odds,
        callback=lambda step, codes: left.append(codes),
    )  # fmt: skip
    for codes, count in zip(left[:-1], counts, strict=False):
        assert (codes[:, :6] == 5).all()
        hidden = (codes == MASK)[0].nonzero().squeeze(-1).tolist()
        assert hidden == list(range(6, 6 + max(1, len(hidden)))) and len(hidden) <= max(count, 1)
    assert not (left[-1] == MASK).any()


def test_what_is_settled_may_be_hidden_again():
    hidden = []
    turning = iter([torch.arange(1.0, N + 1), torch.arange(N, 0.0, -1)] * 3)
    decode(
        coin, torch.full((2, N), MASK), MASK, *planned(6), generator=seeded(),
        judge=lambda codes: next(turning).expand(2, -1),
        callback=lambda step, codes: hidden.append(codes == MASK),
    )  # fmt: skip
    again = [
        bool((after & ~before).any()) for before, after in zip(hidden, hidden[1:], strict=False)
    ]
    assert any(again)
    counts = [int(x[0].sum()) for x in hidden]
    assert counts == sorted(counts, reverse=True) and counts[-1] == 0


def test_noise_of_the_temperature_makes_the_critic_less_certain():
    odds, rows = torch.arange(1.0, N + 1), 200
    chosen = []
    for temperature in (0.0, 1e6):
        left = []
        decode(
            coin, torch.full((rows, N), MASK), MASK, *planned(4, temperature), generator=seeded(),
            judge=lambda codes: odds.expand(rows, -1),
            callback=lambda step, codes, left=left: left.append(codes == MASK),
        )  # fmt: skip
        chosen.append(left[1].float().mean(0))  # how often each place is hidden
    assert set(chosen[0].tolist()) == {0.0, 1.0}
    assert (chosen[1] - 11 / 16).abs().max() < 0.15


def test_a_step_is_given_the_prediction_of_the_one_before():
    table = torch.randn(8, N, K, generator=seeded(1)) * 3
    seen, left, calls = [], [], []

    def predict(ids, positions, step, previous):
        calls.append(step)
        seen.append(previous)
        return take(table[step].expand(len(ids), -1, -1), positions)

    decode(
        predict, torch.full((3, N), MASK), MASK, *planned(8, 1.0), generator=seeded(),
        callback=lambda step, codes: left.append(codes), is_self_conditioned=True,
    )  # fmt: skip
    assert calls == list(range(8)) and (seen[0] == MASK).all()
    for step in range(1, 8):
        hidden, best = left[step - 1] == MASK, table[step - 1].argmax(-1).expand(3, -1)
        assert torch.equal(seen[step], torch.where(hidden, best, MASK))


@pytest.mark.parametrize("steps", [4, 12])
def test_nothing_in_the_loop_waits_for_the_device(steps):
    model = changed(class_model(), self_conditioning=True, critic_head=True)
    waits = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero"):
                waits.append(function)
            return function(*args, **(kwargs or {}))

    def count(**options):
        waits.clear()
        with Watch():
            generate(
                model, class_ids=torch.tensor([1, 1, 2]), guidance_scale=2.0, timesteps=steps,
                generator=seeded(), **options,
            )  # fmt: skip
        return len(waits) - steps  # the counts of the steps, planned on the host

    assert count() == 5 and count(critic="self") == 5


@pytest.mark.parametrize("kind", ["class", "uvit"])
@pytest.mark.parametrize("scale", [0.0, 2.5])
@pytest.mark.parametrize("critic", [None, "self", "other"])
def test_generate_is_decoding_spelled_out(kind, scale, critic):
    """In-painting with self-conditioning, with each critic, of classes and of texts."""
    plain = class_model() if kind == "class" else uvit_model()
    null = {"null_text_length": 3} if kind == "uvit" else {}
    model = changed(plain, self_conditioning=True, critic_head=True, **null)
    other = changed(plain, critic_head=True)
    other.critic_head.weight.data.neg_()
    ids, asked = partly_masked(model, 3), other if critic == "other" else critic
    judging = model if critic == "self" else asked
    given = {"class_ids": torch.tensor([4, 4, 7])} if kind == "class" else uvit_condition(3)
    rows = {name: x.expand(3, *x.shape[1:]) for name, x in given.items() if kind == "uvit"}

    def hidden(model, ids, conditional=True, **more):
        if kind == "uvit":
            drop = {} if conditional else {"dropped": torch.ones(3, dtype=torch.bool)}
            return model.hidden_states(ids, **rows, **drop, **more)
        nothing = torch.full((3, 1), model.mask_token_id)
        first = given["class_ids"][:, None] + 60 if conditional else nothing
        more = {name: torch.cat([nothing, x], 1) for name, x in more.items()}
        return model.hidden_states(torch.cat([first, ids], 1), **more)[:, 1:]

    def predict(ids, previous):
        conditional = model.logits(hidden(model, ids, previous=previous))
        if not scale:
            return conditional
        unconditional = model.logits(hidden(model, ids, False, previous=previous))
        return unconditional + scale * (conditional - unconditional)

    with torch.no_grad():
        wanted = plain_decoding(
            predict, ids, model.mask_token_id, step_temperatures(1.0, 6, "linear"), seeded(),
            judge=judging and (lambda codes: judging.critic(hidden(judging, codes)).exp()),
        )  # fmt: skip
    codes = generate(
        model, **given, input_ids=ids, timesteps=6, guidance_scale=scale,
        temperature_decay="linear", generator=seeded(), critic=asked,
    )  # fmt: skip
    assert torch.equal(codes, wanted)


def test_self_conditioning_needs_no_more_forwards_and_a_critic_one_a_step():
    model = changed(class_model(), self_conditioning=True, critic_head=True)
    options = dict(class_ids=torch.tensor([1, 2]), timesteps=5, guidance_scale=2.0)
    recorder = Recorder(model)
    generate(recorder, **options)
    assert [len(ids) for ids in recorder.inputs] == [3, 4, 4, 4, 4]
    judging = Recorder(model)
    generate(recorder, **options, critic=judging)
    assert [len(ids) for ids in judging.inputs] == [2] * 4  # classes, without their absence
    assert not any((ids == model.mask_token_id).any() for ids in judging.inputs)


def test_a_learned_null_text_is_one_row_of_the_first_step_and_gives_way_to_a_negative():
    model = changed(text_model(), null_text_length=5)
    options = dict(**text_condition(2), guidance_scale=3.0, timesteps=4)
    recorder = Recorder(model)
    learned = generate(recorder, **options, generator=seeded())
    assert [len(ids) for ids in recorder.inputs] == [3, 4, 4, 4]
    null = {"negative_embeds": model.null_text.detach()[None]}
    assert torch.equal(learned, generate(model, **options, **null, generator=seeded()))
    zeros = {"negative_embeds": torch.zeros(1, 5, 24)}
    assert not torch.equal(learned, generate(model, **options, **zeros, generator=seeded()))


@pytest.mark.parametrize("critic", [None, "self"])
def test_the_trunk_compiles_once_and_once_for_the_critic(critic):
    model = changed(class_model(), self_conditioning=True, critic_head=True)
    trunk, ends = CompileCounter(), CompileCounter()
    batches = [torch.tensor([c, c, 3]) for c in range(3)]
    options = dict(guidance_scale=2.0, timesteps=3, critic=critic)
    wanted = [generate(model, class_ids=ids, **options, generator=seeded()) for ids in batches]
    model.hidden_states = torch.compile(model.hidden_states, backend=trunk, fullgraph=True)
    options["compiler"] = partial(torch.compile, backend=ends, fullgraph=True)
    for ids, codes in zip(batches, wanted, strict=True):
        assert torch.equal(generate(model, class_ids=ids, **options, generator=seeded()), codes)
    assert trunk.frame_count == (1 if critic is None else 2)
    torch._dynamo.reset()


def test_critics_that_cannot_judge_are_refused():
    model = changed(class_model(), critic_head=True)
    with pytest.raises(ValueError, match="MaskGitTransformer has no critic_head"):
        generate(class_model(), class_ids=torch.tensor([1]), critic="self")
    with pytest.raises(ValueError, match="legal are null, 'self'.*this str has no critic_head"):
        generate(model, class_ids=torch.tensor([1]), critic="selv")
    other = type(model)(**SIZES, codebook_size=50, critic_head=True)
    with pytest.raises(ValueError, match="knows 50 codes, the model 60"):
        generate(model, class_ids=torch.tensor([1]), critic=other)
