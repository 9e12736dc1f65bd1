"""Pictures in and out of stage two: decoding rules, grids, folders and tars."""

import io

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from tokenize_stage.pixels.decode import decode_image
from tokenize_stage.vq import VQModel
from tokenize_stage.vq.maskgit_vqgan import MaskGitVQGAN
from train_stage.pictures import (
    decode_codes,
    decode_pixels,
    encode_pictures,
    fit_mask,
    fit_picture,
    load_vq,
    read_pictures,
    save_grid,
    save_pictures,
)


def draw(count: int, size: int = 16, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, 3, size, size), generator=generator, dtype=torch.uint8)


@pytest.fixture(scope="module")
def vq(tmp_path_factory: pytest.TempPathFactory) -> VQModel:
    torch.manual_seed(0)
    model = MaskGitVQGAN(
        resolution=16,
        hidden_channels=32,
        channel_mult=(1, 2),
        num_res_blocks=1,
        z_channels=8,
        quantized_embed_dim=8,
        num_embeddings=32,
    )
    with torch.no_grad():  # so that pixels go beyond [0, 1] on both sides
        for parameter in model.decoder.conv_out.parameters():
            parameter.mul_(8)
    folder = tmp_path_factory.mktemp("vq") / "model"
    model.save_pretrained(folder)
    return load_vq(folder, "cpu")


def test_decoded_pictures_are_clipped_scaled_and_truncated(vq: VQModel) -> None:
    codes = torch.randint(32, (5, 64), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        pixels = vq.decode(codes)
    assert pixels.min() < 0 and pixels.max() > 1
    expected = (pixels.clamp(0, 1) * 255).to(torch.uint8)
    decoded = decode_codes(vq, codes, batch_size=2)
    assert decoded.dtype == torch.uint8 and decoded.shape == (5, 3, 16, 16)
    assert (decoded.int() - expected.int()).abs().max() <= 1  # batch size moves the last float bit
    assert (decoded == expected).float().mean() > 0.999


def test_codes_of_any_grid_are_decoded_in_8_bits_or_as_they_are(vq: VQModel) -> None:
    codes = torch.randint(32, (3, 4, 6), generator=torch.Generator().manual_seed(1))
    pixels = decode_pixels(vq, codes, batch_size=2)
    assert pixels.shape == (3, 3, 8, 12) and (pixels.min(), pixels.max()) == (0, 1)
    with torch.inference_mode():
        assert torch.allclose(pixels, vq.decode(codes).clamp(0, 1), atol=1e-3)
    assert torch.equal(decode_codes(vq, codes, batch_size=2), (pixels * 255).byte())


def test_codes_outside_the_codebook_are_refused(vq: VQModel) -> None:
    with pytest.raises(ValueError, match="reach from 0 to 32, but the tokenizer has 32"):
        decode_codes(vq, torch.tensor([[0, 1, 2, 32]]))


def test_encoding_pictures_is_the_tokenizers_encoding(vq: VQModel) -> None:
    pictures = draw(5)
    with torch.inference_mode():
        expected = vq.encode(pictures.float() / 255)
    codes = encode_pictures(vq, pictures, batch_size=2)
    assert codes.shape == (5, 64) and codes.dtype == torch.int64
    assert (codes == expected).float().mean() > 0.98
    assert not next(vq.parameters()).requires_grad


def test_a_folder_gives_back_what_was_saved_with_sorted_classes(tmp_path) -> None:
    pictures = draw(4)
    save_pictures(pictures, tmp_path, ["b/0.png", "b/1.png", "a/0.png", "c/x/0.png"])
    save_grid(pictures, tmp_path / "grid.png", 2)  # beside the class folders: not a picture
    (tmp_path / "a/notes.txt").write_text("not a picture")
    read, class_ids, names = read_pictures(tmp_path)
    assert names == ["a", "b", "c"]
    assert class_ids.tolist() == [0, 1, 1, 2] and class_ids.dtype == torch.int64
    assert torch.equal(read, pictures[[2, 0, 1, 3]])


def test_a_limit_is_spread_over_the_classes_of_a_folder(tmp_path) -> None:
    save_pictures(draw(12), tmp_path, [f"{index // 4}/{index}.png" for index in range(12)])
    _, class_ids, names = read_pictures(tmp_path, limit=6)
    assert class_ids.tolist() == [0, 0, 1, 1, 2, 2] and len(names) == 3


def test_tars_are_read_with_their_classes(tmp_path) -> None:
    pictures = draw(5)
    for index, rows in enumerate(([0, 1, 2], [3, 4])):
        with webdataset.TarWriter(str(tmp_path / f"t-{index:03d}.tar")) as tar:
            for row in rows:
                image = Image.fromarray(pictures[row].permute(1, 2, 0).numpy())
                buffer = io.BytesIO()
                image.save(buffer, "png")
                tar.write({"__key__": f"{row}", "png": buffer.getvalue(), "cls": row % 3})
    for path in (tmp_path, f"{tmp_path}/t-{{000..001}}.tar"):
        read, class_ids, names = read_pictures(path)
        assert torch.equal(read, pictures)
        assert class_ids.tolist() == [0, 1, 2, 0, 1] and names == ["0", "1", "2"]
    assert read_pictures(tmp_path, limit=4)[1].tolist() == [0, 1, 2, 0]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "P", "I;16", "CMYK", "EXIF"])
def test_pictures_are_decoded_as_they_were_for_the_codes(tmp_path, mode) -> None:
    pixels = np.random.default_rng(0).integers(256, size=(30, 47, 4), dtype=np.uint8)
    (tmp_path / "a").mkdir()
    file = tmp_path / "a" / ("0.jpg" if mode == "CMYK" else "0.png")
    if mode == "I;16":
        Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(file)
    elif mode == "EXIF":
        exif = Image.Exif()
        exif[0x0112] = 6  # lies on its side
        Image.fromarray(pixels[..., :3]).save(file, exif=exif)
    else:
        Image.fromarray(pixels, "RGBA").convert(mode).save(file)
    for resolution in (10, None):  # None: the shorter side
        (read,), _, _ = read_pictures(tmp_path, resolution)
        expected = decode_image(file.read_bytes(), resolution or 30).pixels[0]
        assert np.array_equal(read.numpy(), expected)


def test_a_picture_is_fitted_as_tokenizing_does(tmp_path) -> None:
    smooth = Image.radial_gradient("L").resize((90, 64))
    photo = Image.merge("RGB", [smooth, smooth.rotate(180), smooth.point(lambda gray: 255 - gray)])
    photo.save(tmp_path / "photo.png")
    expected = decode_image((tmp_path / "photo.png").read_bytes(), 16).pixels[0].astype(int)
    for given in (photo, tmp_path / "photo.png"):
        fitted = fit_picture(given, 16, 16)
        assert fitted.dtype == torch.uint8 and np.abs(fitted.numpy() - expected).max() <= 3
    assert torch.equal(fit_picture(photo, 64, 90).permute(1, 2, 0), torch.tensor(np.array(photo)))
    wide = fit_picture(photo, 8, 32)  # the middle 22 rows of 64
    middle = photo.crop((0, 21, 90, 43)).resize((32, 8), Image.Resampling.BILINEAR)
    assert np.abs(wide.permute(1, 2, 0).numpy() - np.array(middle).astype(int)).max() <= 8
    sideways, exif = photo.rotate(90, expand=True), Image.Exif()
    exif[0x0112] = 6
    sideways.save(tmp_path / "sideways.png", exif=exif)
    assert torch.equal(fit_picture(tmp_path / "sideways.png", 16, 16), fit_picture(photo, 16, 16))
    gray = Image.fromarray(np.full((16, 16), 128 * 257, dtype=np.uint16))
    assert fit_picture(gray, 16, 16).unique().tolist() == [128]
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="broken.png is not a picture that can be read"):
        fit_picture(tmp_path / "broken.png", 16, 16)


def test_a_mask_hides_whatever_it_touches() -> None:
    mask = Image.new("L", (64, 64), 40)  # below half: not hidden
    mask.putpixel((5, 63), 200)
    assert fit_mask(mask, 16, 16).nonzero().tolist() == [[15, 1]]
    cutout = Image.new("RGBA", (64, 64), (0, 0, 0, 255))
    cutout.paste((0, 0, 0, 0), (0, 0, 4, 4))  # what is transparent is hidden, too
    assert fit_mask(cutout, 16, 16).nonzero().tolist() == [[0, 0]]


def test_what_cannot_be_read_is_named(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no pictures"):
        read_pictures(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_pictures(tmp_path / "nowhere")
    save_pictures(draw(1), tmp_path, ["a/0.png"])
    save_pictures(draw(1, size=8), tmp_path, ["a/1.png"])
    with pytest.raises(ValueError, match="1.png is 8x8, those before it 16x16: all must"):
        read_pictures(tmp_path)
    (tmp_path / "a/0.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="0.png is not a picture"):
        read_pictures(tmp_path)


def test_a_grid_has_every_picture_in_its_place(tmp_path) -> None:
    pictures = draw(5, size=64)
    save_grid(pictures, tmp_path / "grid.png", columns=3)
    sheet = Image.open(tmp_path / "grid.png")
    assert sheet.size == (3 * 66 + 2, 2 * 66 + 2)
    fifth = sheet.crop((2 + 66, 2 + 66, 66 + 66, 66 + 66))
    assert fifth.tobytes() == Image.fromarray(pictures[4].permute(1, 2, 0).numpy()).tobytes()
    assert sheet.getpixel((2 + 2 * 66 + 5, 2 + 66 + 5)) == (255, 255, 255)  # no sixth picture
    save_grid(pictures, tmp_path / "labelled.png", 3, ["first", "a longer label"])
    assert Image.open(tmp_path / "labelled.png").width > sheet.width + 40
    save_grid(pictures, tmp_path / "wrapped.png", 3, ["a prompt of many words " * 30, "x"])
    wrapped = Image.open(tmp_path / "wrapped.png")  # the text stays within its row
    assert wrapped.height == sheet.height and wrapped.width < sheet.width + 300
    assert np.array(wrapped.crop((0, 68, wrapped.width - sheet.width, 80))).min() == 255
    with pytest.raises(ValueError, match="1 labels for 2 rows"):
        save_grid(pictures, tmp_path / "grid.png", 3, ["one"])
