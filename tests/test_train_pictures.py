"""Pictures in and out of stage two: decoding rules, grids, folders and tars."""

import io

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from tokenize_stage.pixels import decode_image
from tokenize_stage.vq import VQModel
from tokenize_stage.vq.maskgit_vqgan import MaskGitVQGAN
from train_stage.pictures import (
    decode_codes,
    encode_pictures,
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
        expected = decode_image(file.read_bytes(), resolution or 30).pixels
        assert np.array_equal(read.numpy(), expected)


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
    with pytest.raises(ValueError, match="1 labels for 2 rows"):
        save_grid(pictures, tmp_path / "grid.png", 3, ["one"])
