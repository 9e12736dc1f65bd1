"""muse-tokenize audit: its numbers against independent ones, and what it does without images."""

import io
import json
import math
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.io import decode_image
from torchvision.transforms import v2

from storage.reader import TokenStore
from storage.verify import verify_store
from tokenize_stage import audit, encode
from tokenize_stage.quality.drawn_rows import draw_rows
from tokenize_stage.quality.likeness import psnr, ssim
from tokenize_stage.quality.sheet import SheetEntry, contact_sheet
from tokenize_stage.quality.ways import emulate_tf32
from tokenize_stage.vq import load_vq_model
from tokenize_stage.vq.maskgit_vqgan import MaskGitVQGAN

SIZE, IMAGES = 16, 24


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """photos/, two tokenizers a/ and b/, and store/ of both in four shards."""
    folder = tmp_path_factory.mktemp("audit")
    for name, seed in (("a", 0), ("b", 1)):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            vq = MaskGitVQGAN(
                resolution=SIZE,
                hidden_channels=32,
                channel_mult=(1, 1),
                num_res_blocks=1,
                z_channels=8,
                quantized_embed_dim=8,
                num_embeddings=64,
            )
        vq.quantize.embedding.weight.data *= 20  # spread out, so that many codes are used
        vq.save_pretrained(folder / name)
    (folder / "photos").mkdir()
    generator = np.random.default_rng(0)
    for number in range(IMAGES):
        noise = generator.integers(0, 256, (5, 6, 3), np.uint8)
        picture = Image.fromarray(noise).resize((20 + number % 3, 18))
        picture.save(folder / "photos" / f"{number:02}.png")
    return folder


@pytest.fixture
def store(made: Path, tmp_path: Path) -> Path:
    """The store, with its images and tokenizers beside it, to be spoilt."""
    for name in ("photos", "a", "b"):
        shutil.copytree(made / name, tmp_path / name)
    status = encode.main(
        [
            f"dataset.shards_path_or_url={tmp_path}/photos",
            "dataset.images_per_shard=6",
            f"dataset.preprocessing.resolution={SIZE}",
            f"model.vq_models.a.pretrained={tmp_path}/a",
            f"model.vq_models.b.pretrained={tmp_path}/b",
            f"model.vq_models.b.resolution={2 * SIZE}",
            f"store.path={tmp_path}/store",
            "encode.device=cpu",
        ]
    )
    assert status == 0
    return tmp_path / "store"


def torch_crop(path: Path, size: int) -> torch.Tensor:
    resize = v2.Resize(size, antialias=True)
    return v2.CenterCrop(size)(resize(decode_image(str(path), "RGB"))) / 255


def audited(store: Path, *more: str) -> dict:
    assert audit.main([f"store={store}", "device=cpu", *more]) == 0
    return json.loads((store / "audit/audit.json").read_text())


def pictures() -> tuple[torch.Tensor, torch.Tensor]:
    y, x = np.mgrid[0:24, 0:32] / 24
    waves = [
        [np.sin(5 * x * (k + 1) + i) * np.cos(3 * y + k) * 0.4 + 0.5 for k in range(3)]
        for i in range(2)
    ]
    one = np.stack(waves)  # (2, 3, 24, 32)
    other = np.clip(0.9 * one + 0.07 * np.sin(40 * x * y + 1), 0, 1)
    return torch.from_numpy(one), torch.from_numpy(other)


def test_psnr_and_ssim_are_those_of_scikit_image() -> None:
    """Recorded with scikit-image 0.26: peak_signal_noise_ratio and structural_similarity with
    gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1, the mean of both.
    """
    one, other = pictures()
    assert psnr(one, other) == pytest.approx(23.228758415556182, abs=1e-9)
    assert ssim(one, other) == pytest.approx(0.8489581983986451, abs=1e-9)
    assert psnr(one, one) == math.inf and ssim(one, one) == pytest.approx(1)
    with pytest.raises(ValueError, match="SSIM needs 11"):
        ssim(one[..., :10], other[..., :10])


def test_a_store_in_float32_is_what_encoding_gives_again(
    store: Path, capsys: pytest.CaptureFixture
) -> None:
    before = TokenStore(store).read_codes(slice(None), "codes_a")
    found = audited(store, "rows=10", "shards=3")
    out = capsys.readouterr().out
    assert "10 rows drawn with seed 0, 10 of them with their image" in out
    assert len(found["rows"]) == found["images"] == 10 and found["problems"] == []
    opened = TokenStore(store)
    keys = opened.table(["key"], found["rows"])["key"].to_pylist()
    for name, size in (("a", SIZE), ("b", 2 * SIZE)):
        about = found["columns"][f"codes_{name}"]
        assert about["same_again"] == 1.0
        used = len(np.unique(opened.read_codes(slice(None), f"codes_{name}")))
        assert (about["used"], about["dead"], about["rows"]) == (used, 64 - used, IMAGES)
        codes = torch.from_numpy(opened.read_codes(found["rows"], f"codes_{name}").astype(int))
        rebuilt = load_vq_model(store.parent / name).decode(codes).clamp(0, 1)
        crops = torch.stack([torch_crop(store.parent / "photos" / key, size) for key in keys])
        expected = float(-10 * (rebuilt - crops).square().mean().log10())
        assert about["psnr"] == pytest.approx(expected, abs=0.05)  # of rounding to 8 bits
        assert -1 < about["ssim"] < 1
    assert not verify_store(store)
    assert (TokenStore(store).read_codes(slice(None), "codes_a") == before).all()
    sheet = Image.open(store / "audit/sheet.png")
    assert sheet.width > 3 * 96 and np.asarray(sheet).std() > 10


def test_the_seed_decides_which_rows_are_drawn(store: Path) -> None:
    opened = TokenStore(store)
    drawn = [draw_rows(opened, 9, 2, seed) for seed in (3, 3, 4)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len({row.shard for row in drawn[0]}) == 2
    assert len({row.number for row in drawn[0]}) == 9
    everything = draw_rows(opened, 1000, 1000, 0)
    assert [row.number for row in everything] == list(range(IMAGES))
    assert [row.key for row in everything] == opened.table(["key"])["key"].to_pylist()


def test_without_its_images_a_store_still_shows_reconstructions(
    store: Path, capsys: pytest.CaptureFixture
) -> None:
    (store.parent / "photos").rename(store.parent / "elsewhere")
    found = audited(store)
    out = capsys.readouterr().out
    assert f"{store.parent}/photos" in out and "sources=… says where the images are now" in out
    assert found["images"] == 0 and "psnr" not in found["columns"]["codes_a"]
    assert found["columns"]["codes_a"]["used"] > 1 and (store / "audit/sheet.png").is_file()

    found = audited(store, f"sources={store.parent}/elsewhere")
    assert found["images"] == IMAGES and found["columns"]["codes_b"]["same_again"] == 1.0
    shutil.rmtree(store / "work")
    found = audited(store, f"sources={store.parent}/elsewhere")
    assert found["images"] == 0 and "config.yaml is not there" in found["problems"][0]


def test_an_image_that_is_not_what_was_encoded_is_named_and_left_out(store: Path) -> None:
    photos = store.parent / "photos"
    shutil.copy(photos / "03.png", photos / "04.png")
    (photos / "11.png").unlink()
    (photos / "12.png").rename(photos / "30.png")
    found = audited(store)
    assert found["images"] < IMAGES
    assert any("04.png" in problem and "has changed" in problem for problem in found["problems"])
    assert any("11.png" in problem for problem in found["problems"])
    assert found["columns"]["codes_a"]["same_again"] == 1.0


def test_crops_are_made_as_they_were_or_not_at_all(
    store: Path, capsys: pytest.CaptureFixture
) -> None:
    config = store / "work/config.yaml"
    text = config.read_text()
    config.write_text(text.replace("- centre\n", "- centre_flip\n"))
    assert config.read_text() != text and audit.main([f"store={store}"]) == 2
    assert "made with views None, its work/config.yaml gives ['centre_flip']" in (
        capsys.readouterr().err
    )


def test_a_tokenizer_that_has_moved_or_is_another_one(
    store: Path, capsys: pytest.CaptureFixture
) -> None:
    place = store.parent
    (place / "a").rename(place / "new")
    assert audit.main([f"store={store}"]) == 2
    assert "give tokenizers.codes_a=FOLDER" in capsys.readouterr().err
    assert audit.main([f"store={store}", f"tokenizers.codes_a={place}/b"]) == 2
    assert "other weights than the MaskGitVQGAN that made codes_a" in capsys.readouterr().err
    assert audit.main([f"store={store}", f"tokenizers.codes={place}/new"]) == 2
    assert "codes_a, codes_b" in capsys.readouterr().err
    assert not (store / "audit").exists()
    found = audited(store, f"tokenizers.codes_a={place}/new", "rows=3")
    assert found["columns"]["codes_a"]["same_again"] == 1.0


def test_ways_are_compared_with_the_exact_one(store: Path, capsys: pytest.CaptureFixture) -> None:
    found = audited(store, "compare=[bfloat16,tf32,full_decode,gpu_decode]")
    ways = found["compare"]
    assert list(ways) == ["exact", "stored", "bfloat16", "tf32", "full_decode", "gpu_decode"]
    for column in ("codes_a", "codes_b"):
        assert ways["exact"][column]["changed"] == 0
        assert ways["exact"][column]["psnr"] is None  # equal
        assert ways["full_decode"][column] == ways["stored"][column]
        assert ways["stored"][column]["changed"] < 0.02  # Pillow rounds twice, torchvision once
        assert 0 < ways["tf32"][column]["changed"] < ways["bfloat16"][column]["changed"] < 0.2
        assert ways["bfloat16"][column]["psnr"] > 10
        image = found["columns"][column]["psnr"]
        assert ways["stored"][column]["psnr_image"] == pytest.approx(image, abs=0.01)
    assert isinstance(ways["gpu_decode"], str) != torch.cuda.is_available()
    assert "codes changed" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        audit.main([f"store={store}", "compare=[int8]"])
    assert "legal are bfloat16, float16, tf32" in capsys.readouterr().err


def test_views_scaled_decoding_and_captions_that_were_cut(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    text_factory = pytest.importorskip("text_factory")
    clip = text_factory.make_clip(tmp_path / "clip")
    generator = np.random.default_rng(1)
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for number in range(4):
            jpeg = io.BytesIO()
            noise = generator.integers(0, 256, (9, 11, 3), np.uint8)
            Image.fromarray(noise).resize((110, 90 + number)).save(jpeg, "JPEG", quality=95)
            caption = "a cat " * (40 if number == 2 else 2)
            for suffix, data in (("jpg", jpeg.getvalue()), ("txt", caption.encode())):
                info = tarfile.TarInfo(f"{number}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    store = tmp_path / "store"
    views = "[centre,random_flip]"
    arguments = [
        f"dataset.shards_path_or_url={tmp_path}/0.tar",
        f"dataset.preprocessing.resolution={SIZE}",
        f"dataset.preprocessing.views={views}",
        "dataset.preprocessing.min_scale=0.6",
        "dataset.preprocessing.dct_scaling=1",
        f"model.vq_model.pretrained={made}/a",
        f"text.tokenizers.clip={clip}",
        f"store.path={store}",
        "encode.device=cpu",
    ]
    assert encode.main(arguments) == 0
    found = audited(store, "compare=[full_decode,dct_scaling]")
    assert found["images"] == 8 and found["columns"]["codes"]["same_again"] == 1.0
    ways = {name: columns["codes"] for name, columns in found["compare"].items()}
    assert ways["dct_scaling"] == ways["stored"] and ways["stored"]["changed"] > 0
    assert ways["full_decode"]["psnr_image"] == pytest.approx(ways["exact"]["psnr_image"], abs=0.3)
    assert found["text"] == {"text_ids_clip": {"captions": 8, "length": 16, "full": 2, "cut": 2}}
    assert "text_ids_clip: 2 of 8 captions" in capsys.readouterr().out
    shutil.rmtree(clip)
    assert audited(store)["text"]["text_ids_clip"]["cut"] is None
    assert "text_ids_clip: at most 2 of 8 captions" in capsys.readouterr().out


def test_tf32_keeps_ten_bits() -> None:
    layer = torch.nn.Linear(1, 1, bias=False)
    layer.weight.data[:] = 1 + 2.0**-12
    emulate_tf32(layer)
    assert layer.weight.item() == 1
    assert layer(torch.tensor([1 + 2.0**-11 + 2.0**-12])).item() == 1 + 2.0**-10
    assert layer(torch.tensor([1 + 2.0**-10])).item() == 1 + 2.0**-10


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["store={here}/none"], "is not a token store"),
        (["store={here}", "rows=0"], "rows=0: it must be at least 1"),
        (["store={here}", "device=cuda:99"], "device=cuda:99, but torch sees"),
    ],
)
def test_what_cannot_be_audited_says_why(
    store: Path, capsys: pytest.CaptureFixture, arguments: list[str], message: str
) -> None:
    try:
        status = audit.main([word.format(here=store) for word in arguments])
    except SystemExit as error:
        status = error.code
    assert status == 2 and message in capsys.readouterr().err


def test_a_sheet_shows_what_it_is_given() -> None:
    red = np.zeros((3, 8, 8), np.uint8)
    red[0] = 200
    entries = [SheetEntry([red, None], ["", "20.1 dB"], "a/0", "words " * 99)] * 5
    sheet = np.asarray(contact_sheet(entries, ["original", "codes"]))
    assert (sheet == (200, 0, 0)).all(-1).sum() == 5 * 96 * 96
    with pytest.raises(ValueError, match="no rows"):
        contact_sheet([], ["original"])
