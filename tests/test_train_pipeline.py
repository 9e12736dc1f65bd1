"""MusePipeline: draws what diffusers draws, fills in and redraws pictures, saves as one folder."""

import fnmatch
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from pipeline_factory import (
    CODES,
    GRID,
    SIZE,
    SMALL_TRANSFORMER,
    draw_image,
    make_class_pipeline,
    make_encoder,
    make_pipeline,
    make_vq,
    randomized,
    seeded,
)

from tokenize_stage.vq.amused_vq import save_amused_vq
from train_stage import pictures
from train_stage.models.amused import save_amused_transformer
from train_stage.models.transformer import MaskGitTransformer
from train_stage.pipeline.muse_pipeline import MusePipeline
from train_stage.pipeline.pipeline_folder import PipelineSettings


@pytest.fixture(scope="module")
def pipe():
    return make_pipeline()


@pytest.fixture(scope="module")
def class_pipe():
    return make_class_pipeline()


@pytest.fixture(scope="module")
def amused(pipe, tmp_path_factory):
    """The folder of the same pipeline in diffusers' layout."""
    folder = tmp_path_factory.mktemp("amused")
    save_amused_vq(pipe.vae, folder / "vqvae")
    save_amused_transformer(pipe.transformer, folder / "transformer", sample_size=GRID[0])
    pipe.text_encoder.model.save_pretrained(folder / "text_encoder")
    pipe.text_encoder.tokenizer.save_pretrained(folder / "tokenizer")
    scheduler = {"_class_name": "AmusedScheduler", "mask_token_id": CODES + 3}
    (folder / "scheduler").mkdir()
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(scheduler))
    index = {
        "_class_name": "AmusedPipeline",
        "scheduler": ["diffusers", "AmusedScheduler"],
        "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "transformer": ["diffusers", "UVit2DModel"],
        "vqvae": ["diffusers", "VQModel"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def diffusers_pipeline(name, folder):
    diffusers = pytest.importorskip("diffusers")
    theirs = getattr(diffusers, name).from_pretrained(folder)
    theirs.set_progress_bar_config(disable=True)
    return theirs


@pytest.mark.parametrize("guidance_scale", [4.0, 1.0])
def test_pictures_are_those_of_diffusers(pipe, amused, guidance_scale):
    prompts = ["a cat", "a dog"]
    how = {"negative_prompt": ["blur", "noise"], "guidance_scale": guidance_scale}
    theirs = diffusers_pipeline("AmusedPipeline", amused)
    wanted = theirs(prompts, **how, generator=seeded(), output_type="latent").images
    opened = MusePipeline.from_pretrained(amused, device="cpu")
    for ours in (pipe, opened):
        codes = ours(prompts, **how, generator=seeded(), output_type="codes")
        assert torch.equal(codes, wanted)
    shown = theirs(prompts, **how, generator=seeded()).images  # rounded there, truncated here
    ours = opened(prompts, **how, generator=seeded())
    off = np.stack(ours).astype(int) - np.stack(shown)
    assert off.min() >= -1 and off.max() <= 1 and np.stack(shown).std() > 10


def test_sizes_and_micro_conditions_are_those_of_diffusers(pipe, amused):
    theirs = diffusers_pipeline("AmusedPipeline", amused)
    how = {"height": 12, "width": 20, "num_inference_steps": 5, "temperature": (3, 1)}
    wanted = theirs(
        "a cat",
        **how,
        micro_conditioning_crop_coord=(3, 200),
        micro_conditioning_aesthetic_score=9,
        generator=seeded(),
        output_type="latent",
    ).images
    told = {"crop_coords": (3, 200), "aesthetic_score": 9}
    made = pipe("a cat", **how, **told, generator=seeded(), output_type="codes")
    assert made.shape == (1, 6, 10) and torch.equal(made, wanted)
    assert pipe("a cat", **how, orig_size=(20, 12), **told, generator=seeded())[0].size == (20, 12)
    other = pipe("a cat", **how, orig_size=(400, 30), generator=seeded(), output_type="codes")
    assert not torch.equal(other, made)


@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_in_painting_draws_the_codes_of_diffusers(pipe, amused, strength):
    theirs = diffusers_pipeline("AmusedInpaintPipeline", amused)
    image, hidden = draw_image(), torch.zeros(GRID, dtype=torch.bool)
    hidden[2:7, 1:6] = True
    mask = np.kron(hidden.numpy(), np.ones((2, 2))) * 255
    mask = Image.fromarray(mask.astype(np.uint8))
    how = {"negative_prompt": "blur", "num_inference_steps": 8, "strength": strength}
    wanted = theirs("a cat", image, mask, **how, generator=seeded(), output_type="latent").images
    for masked in (mask, hidden, hidden.flatten(), torch.from_numpy(np.array(mask) > 0)):
        codes = pipe.inpaint(image, masked, "a cat", **how, generator=seeded(), output_type="codes")
        assert torch.equal(codes, wanted)
    known = pictures.encode_pictures(pipe.vae, pictures.fit_picture(image, 16, 16)[None])
    assert torch.equal(codes[0][~hidden], known.view(GRID)[~hidden])
    assert not torch.equal(codes[0][hidden], known.view(GRID)[hidden])


@pytest.mark.parametrize("strength", [0.5, 0.8, 0.3])
def test_image_to_image_draws_the_codes_of_diffusers(pipe, amused, strength):
    theirs = diffusers_pipeline("AmusedImg2ImgPipeline", amused)
    how = {"strength": strength, "num_inference_steps": 10, "guidance_scale": 3.0}
    wanted = theirs("a cat", draw_image(), **how, generator=seeded(), output_type="latent").images
    codes = pipe.image_to_image(
        draw_image(), "a cat", **how, generator=seeded(), output_type="codes"
    )
    assert torch.equal(codes, wanted)


def test_image_to_image_of_strength_1_draws_from_nothing(pipe):
    made = [
        pipe.image_to_image(
            draw_image(seed=seed), "a", strength=1.0, generator=seeded(), output_type="codes"
        )
        for seed in (1, 2)
    ]
    assert torch.equal(*made)
    with pytest.raises(ValueError, match="strength=0.05: .* leave one of 12 steps"):
        pipe.image_to_image(draw_image(), "a", strength=0.05)


def test_pictures_stand_in_the_order_of_their_prompts(pipe):
    prompts = ["a", "b", "c"]
    how = {"num_images_per_prompt": 2, "output_type": "codes", "num_inference_steps": 3}
    made = pipe(prompts, **how, batch_size=1, generator=seeded())
    generator = seeded()
    alone = [pipe(p, **how, batch_size=1, generator=generator) for p in prompts]
    assert made.shape == (6, *GRID) and torch.equal(made, torch.cat(alone))
    by_hand = pipe.text_encoder.encode(prompts)
    nothing = pipe.text_encoder.encode([""])
    again = pipe(
        prompt_embeds=by_hand, negative_embeds=nothing, **how, batch_size=1, generator=seeded()
    )
    assert (again == made).float().mean() > 0.99  # the encoder's last bit follows the batch
    four = pipe(prompts, **how, batch_size=4, generator=seeded())
    assert four.shape == made.shape and not torch.equal(four, made)


def test_every_kind_of_output_is_the_same_picture(pipe, class_pipe):
    for own, condition in ((pipe, {"prompt": "a cat"}), (class_pipe, {"class_ids": [2, 0]})):
        kinds = ("codes", "uint8", "pt", "np", "pil")
        made = {k: own(**condition, generator=seeded(), output_type=k) for k in kinds}
        codes, pt = made["codes"], made["pt"]
        assert torch.equal(pt, own.vae.decode(codes).clamp(0, 1))
        assert torch.equal(made["uint8"], (pt * 255).byte())  # truncated
        assert np.array_equal(made["np"], pt.permute(0, 2, 3, 1))
        assert np.array_equal(np.stack(made["pil"]), made["uint8"].permute(0, 2, 3, 1))
        assert made["pil"][0].size == (SIZE, SIZE) and len(made["pil"]) == len(codes)
    with pytest.raises(ValueError, match="output_type='latent': legal are"):
        pipe("a", output_type="latent")


def test_in_painting_keeps_every_pixel_outside_of_the_mask(pipe):
    image = draw_image((40, 32))  # is resized and cropped, the mask likewise
    mask = Image.new("L", image.size)
    mask.paste(255, (12, 4, 20, 12))
    original = pictures.fit_picture(image, SIZE, SIZE)
    drawn = pictures.fit_mask(mask, SIZE, SIZE)
    how = {"generator": seeded(), "output_type": "uint8"}
    (made,) = pipe.inpaint(image, mask, "a cat", **how)
    assert 9 <= drawn.sum() <= 25 and torch.equal(made[:, ~drawn], original[:, ~drawn])
    assert not torch.equal(made[:, drawn], original[:, drawn])
    how = {"generator": seeded(), "output_type": "pt"}
    (floats,) = pipe.inpaint(image, mask, "a cat", **how)
    assert torch.equal(floats[:, ~drawn], original[:, ~drawn].float() / 255)
    how = {"generator": seeded(), "output_type": "uint8"}
    (whole,) = pipe.inpaint(image, mask, "a cat", **how, paste=False)
    assert torch.equal(whole[:, drawn], made[:, drawn])
    assert not torch.equal(whole[:, ~drawn], original[:, ~drawn])


def test_a_code_is_drawn_if_any_of_its_pixels_is_hidden(pipe):
    one = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    one[5, 8] = True
    image = draw_image()
    known = pictures.encode_pictures(pipe.vae, pictures.fit_picture(image, SIZE, SIZE)[None])
    changed = torch.zeros(GRID, dtype=torch.bool)
    for seed in range(5):
        codes = pipe.inpaint(image, one, "a", generator=seeded(seed), output_type="codes")
        changed |= codes[0] != known.view(GRID)
    assert changed.nonzero().tolist() == [[2, 4]]


@pytest.mark.parametrize("kind", ["classes", "text", "nothing"])
def test_models_of_every_condition_draw_and_fill_in(class_pipe, kind):
    """The reference's pipelines look for keys that a MaskGitTransformer's config lacks."""
    own, condition = class_pipe, {"class_ids": 1}
    if kind != "classes":
        text = {"add_cross_attention": True, "encoder_hidden_size": 16} if kind == "text" else {}
        transformer = randomized(MaskGitTransformer(**SMALL_TRANSFORMER, **text, num_classes=None))
        own = MusePipeline(make_vq(), transformer, make_encoder("CLIPTextModel") if text else None)
        condition = {"prompt": "a cat"} if text else {}
    made = own(**condition, num_images_per_prompt=3, generator=seeded())
    assert len(made) == 3 and made[0].size == (SIZE, SIZE)
    mask = torch.zeros(GRID, dtype=torch.bool)
    mask[:3] = True
    (filled,) = own.inpaint(draw_image(), mask, **condition, generator=seeded())
    assert filled.crop((0, 6, 16, 16)).tobytes() == draw_image().crop((0, 6, 16, 16)).tobytes()
    assert filled.tobytes() != draw_image().tobytes()
    with pytest.raises(ValueError, match="height=32, width=16: this model makes 16 x 16 only"):
        own(**condition, height=32)


def test_what_cannot_be_drawn_is_refused(pipe, class_pipe):
    states = pipe.text_encoder.encode(["a"])
    deaf = MusePipeline(pipe.vae, pipe.transformer)
    mute = torch.zeros(GRID, dtype=torch.bool)
    for call, message in [
        (lambda: pipe(), "given no condition; this model takes prompt or prompt_embeds"),
        (lambda: pipe("a", class_ids=1), "given prompt and class_ids; this model takes prompt or"),
        (lambda: pipe("a", prompt_embeds=states), "given prompt and prompt_embeds"),
        (lambda: class_pipe("a"), "given prompt; this model takes class_ids"),
        (lambda: class_pipe(class_ids=3), r"class_ids \[3\]: the model has classes 0..2"),
        (lambda: class_pipe(class_ids=0, negative_prompt="a"), "for models that read text"),
        (lambda: pipe("a", negative_prompt=["b", "c"]), "2 negative prompts for 1 prompts"),
        (lambda: pipe("a", negative_prompt="b", negative_embeds=states), "give one of them"),
        (lambda: pipe(prompt_embeds=(states.states, None), guidance_scale=0), "pooled text"),
        (lambda: deaf("a"), "no text encoder: open it with text_encoder=…"),
        (lambda: deaf(prompt_embeds=states), "no text encoder"),
        (lambda: pipe([]), "nothing to draw: the list of prompts is empty"),
        (lambda: pipe("a", height=17), "height=17, width=16: both must be multiples of 2"),
        (lambda: pipe("a", num_inference_steps=0), "num_inference_steps=0: at least 1"),
        (lambda: pipe.inpaint(draw_image(), mute, "a"), "the mask hides nothing"),
        (lambda: pipe.inpaint(draw_image(), mute[:5], "a"), r"legal are pixels \(16, 16\), codes"),
        (lambda: pipe.inpaint(draw_image(), draw_image((8, 9)), "a"), "mask is 8x9 pixels, the im"),
        (lambda: MusePipeline(make_vq(), MaskGitTransformer()), "made for 1024 codes, the VQ mod"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


def test_prompts_that_are_cut_are_named(pipe):
    with pytest.warns(UserWarning, match="cut to 12 tokens: 'a very long prompt'"):
        pipe(["a", "a very long prompt"], num_inference_steps=1)


def test_lower_precision_leaves_the_vq_model_in_float32(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "pipe")
    half = MusePipeline.from_pretrained(tmp_path / "pipe", dtype=torch.bfloat16, device="cpu")
    parts = (half.vae, half.transformer, half.text_encoder.model)
    dtypes = [{weight.dtype for weight in part.parameters()} for part in parts]
    assert dtypes == [{torch.float32}, {torch.bfloat16}, {torch.bfloat16}]
    how = {"generator": seeded(), "output_type": "pt"}
    assert half("a cat", **how).dtype == torch.float32


def test_the_compiled_transformer_draws_the_same(class_pipe, tmp_path):
    class_pipe.save_pretrained(tmp_path / "pipe")
    compiled = MusePipeline.from_pretrained(tmp_path / "pipe", device="cpu")
    compiled.compile(backend="aot_eager")
    how = {"class_ids": [0, 1], "num_inference_steps": 4, "output_type": "codes"}
    assert torch.equal(compiled(**how, generator=seeded()), class_pipe(**how, generator=seeded()))


@pytest.mark.parametrize("safe", [True, False])
def test_a_saved_pipeline_draws_the_same(pipe, tmp_path, safe):
    folder = tmp_path / "pipe"
    pipe.save_pretrained(folder, safe_serialization=safe)
    pipe.save_pretrained(folder, safe_serialization=safe)  # replaces the first
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    weights = "model.safetensors" if safe else "pytorch_model.bin"
    ours = {
        f"{part}/{name}" for part in ("vae", "transformer") for name in ("config.json", weights)
    }
    text = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    assert files == ours | {"pipeline.json"} | {f"text_encoder/{name}" for name in text}
    loaded = MusePipeline.from_pretrained(folder, device="cpu")
    how = {"negative_prompt": "b", "output_type": "codes"}
    made = loaded("a cat", **how, generator=seeded())
    assert torch.equal(made, pipe("a cat", **how, generator=seeded()))


def test_what_the_parts_do_not_say_is_saved_with_them(class_pipe, pipe, tmp_path):
    folder = tmp_path / "pipe"
    pipe.save_pretrained(folder)
    own = MusePipeline(
        class_pipe.vae,
        class_pipe.transformer,
        settings=PipelineSettings(noise_schedule="linear", class_names=["a", "b", "c"]),
    )
    own.save_pretrained(folder)  # and its text encoder is no more
    loaded = MusePipeline.from_pretrained(folder, device="cpu")
    assert loaded.class_names == ["a", "b", "c"] and loaded.noise_schedule == "linear"
    assert loaded.grid == GRID and loaded.text_encoder is None
    made = [x(class_ids=1, output_type="codes", generator=seeded()) for x in (own, loaded)]
    assert torch.equal(*made)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/me.jpg").write_bytes(b"x")
    with pytest.raises(ValueError, match="photos holds other files"):
        own.save_pretrained(tmp_path / "photos")


def test_parts_that_do_not_belong_together_are_refused(pipe, amused, tmp_path):
    pipe.transformer.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="does not say which tokenizer it needs: give vq_model="):
        MusePipeline.from_pretrained(tmp_path / "model")
    with pytest.raises(FileNotFoundError, match="text_encoder holds no tokenizer"):
        MusePipeline.from_pretrained(tmp_path / "model", amused / "vqvae", amused / "text_encoder")
    pipe.text_encoder.save_pretrained(tmp_path / "encoder")
    whole = MusePipeline.from_pretrained(
        tmp_path / "model", amused / "vqvae", tmp_path / "encoder", device="cpu"
    )
    assert whole.grid == (16, 16) and whole("a cat", num_inference_steps=1)[0].size == (32, 32)
    with pytest.raises(FileNotFoundError, match="is no pipeline .* holds: encoder, model"):
        MusePipeline.from_pretrained(tmp_path)
    scheduler = amused / "scheduler/scheduler_config.json"
    content = scheduler.read_text()
    scheduler.write_text(json.dumps({"mask_token_id": 7}))
    with pytest.raises(ValueError, match="mask_token_id=7, the transformer's is 35"):
        MusePipeline.from_pretrained(amused)
    scheduler.write_text(json.dumps({"mask_token_id": 35, "masking_schedule": "linear"}))
    assert MusePipeline.from_pretrained(amused, device="cpu").noise_schedule == "linear"
    scheduler.write_text(content)


@pytest.mark.parametrize("layout", ["amused", "ours"])
def test_from_the_hub_what_is_needed_is_fetched(pipe, amused, tmp_path, monkeypatch, layout):
    hub, cache = amused, tmp_path / "cache"
    if layout == "ours":
        hub = tmp_path / "hub"
        pipe.save_pretrained(hub)
    unused = hub / "transformer/pytorch_model.bin"
    unused.write_bytes(b"the same weights again")

    def fetch(name, revision, allow_patterns):
        assert (name, revision) == ("someone/muse", "main")
        for path in (path for path in hub.rglob("*") if path.is_file()):
            place = path.relative_to(hub)
            if any(fnmatch.fnmatch(str(place), pattern) for pattern in allow_patterns):
                (cache / place).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, cache / place)
        return str(cache)

    for module in ("train_stage.pipeline.pipeline_folder", "storage.pretrained"):
        monkeypatch.setattr(f"{module}.snapshot_download", fetch)
    fetched = MusePipeline.from_pretrained("someone/muse", revision="main", device="cpu")
    made = [x("a cat", generator=seeded(), output_type="codes") for x in (fetched, pipe)]
    assert torch.equal(*made)
    files = {path.relative_to(hub) for path in hub.rglob("*") if path.is_file() and path != unused}
    assert {path.relative_to(cache) for path in cache.rglob("*") if path.is_file()} == files
    unused.unlink()
