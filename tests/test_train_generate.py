"""muse-generate: prompts from words and files, drawing on a picture; classes: test_end_to_end."""

import json

from PIL import Image
from pipeline_factory import SIZE, draw_image, make_class_pipeline, make_pipeline

from train_stage.generate import main as muse_generate


def test_prompts_from_the_command_line(tmp_path, capsys):
    make_pipeline().save_pretrained(tmp_path / "pipe")
    (tmp_path / "prompts.txt").write_text("one, two\n\n  a fourth \n")
    out = tmp_path / "out"
    words = [f"model={tmp_path / 'pipe'}", f"output_dir={out}", "device=cpu", "timesteps=3"]
    words += ["images_per_class=2", "batch_size=4"]
    given = ["prompts=[a cat, a dog]", f"prompts_file={tmp_path / 'prompts.txt'}"]
    assert muse_generate([*words, *given]) == 0
    assert sorted(str(path.relative_to(out)) for path in out.glob("*/*")) == [
        f"{number}/{index:05d}.png" for number in range(4) for index in range(2)
    ]
    used = json.loads((out / "generate.json").read_text())
    assert used["prompts"] == ["a cat", "a dog", "one, two", "a fourth"]
    assert used["guidance_scale"] == 10 and used["temperature"] == [2, 0]
    assert Image.open(out / "grid.png").size[1] == 4 * 66 + 2
    first = (out / "grid.png").read_bytes()
    assert muse_generate([*words, f"prompts={used['prompts']}"]) == 0
    assert (out / "grid.png").read_bytes() == first
    assert muse_generate([*words, *given, "seed=1"]) == 0
    assert (out / "grid.png").read_bytes() != first
    twice = ["prompts=[a cat, a cat]", "images_per_class=4", "guidance_scale=1"]
    assert muse_generate([*words, *given, *twice, "prompts_file=null"]) == 0
    assert (out / "0/00000.png").read_bytes() != (out / "1/00000.png").read_bytes()
    assert muse_generate(words) == 2 and "give prompts=" in capsys.readouterr().err
    assert muse_generate([*words, *given, f"mask={out / 'grid.png'}"]) == 2
    assert "give image=" in capsys.readouterr().err
    assert len(list(out.glob("*/*"))) == 8  # those of the run before


def test_drawing_on_a_picture_from_the_command_line(tmp_path):
    make_class_pipeline().save_pretrained(tmp_path / "pipe")
    image, mask = draw_image(), Image.new("L", (SIZE, SIZE))
    mask.paste(255, (0, 0, 8, 16))
    image.save(tmp_path / "image.png")
    mask.save(tmp_path / "mask.png")
    words = [f"model={tmp_path / 'pipe'}", f"output_dir={tmp_path / 'out'}", "images_per_class=1"]
    words += ["device=cpu", "class_ids=2", f"image={tmp_path / 'image.png'}"]
    assert muse_generate([*words, f"mask={tmp_path / 'mask.png'}"]) == 0
    made = Image.open(tmp_path / "out/2/00000.png")
    right = (8, 0, 16, 16)
    assert made.crop(right).tobytes() == image.crop(right).tobytes()
    assert made.tobytes() != image.tobytes()
    assert muse_generate([*words, "strength=0.5"]) == 0
    assert (
        Image.open(tmp_path / "out/2/00000.png").crop(right).tobytes() != made.crop(right).tobytes()
    )
