"""muse-evaluate captions: colours are the subjects, the half that has them is the style."""

import io
import json
import tarfile
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from text_factory import make_bert

from train_stage.evaluate import main as muse_evaluate
from train_stage.evaluate_captions import chance, parts, score
from train_stage.pictures import read_captioned

SUBJECTS = {"cat": (220, 20, 20), "moon": (20, 200, 20), "house": (20, 20, 230), "sea": (200,) * 3}
STYLES = {"red": slice(0, 8), "old": slice(8, 16)}
PAIRS = list(product(SUBJECTS, STYLES))
HELD_OUT = [("cat", "old"), ("sea", "red")]
TRAINED = [pair for pair in PAIRS if pair not in HELD_OUT]


def caption(pair):
    return "{}, {}".format(*pair)


def picture(pair, rng):
    """(16, 16, 3) uint8: half of it in the subject's colour, some noise."""
    pixels = np.zeros((16, 16, 3))
    pixels[:, STYLES[pair[1]]] = SUBJECTS[pair[0]]
    return (pixels + rng.normal(0, 8, pixels.shape)).clip(0, 255).astype(np.uint8)


def encode(pixels):
    png = io.BytesIO()
    Image.fromarray(pixels).save(png, "PNG")
    return png.getvalue()


def write_tar(path, pairs, each):
    rng = np.random.default_rng(len(pairs))
    path.parent.mkdir(parents=True)
    with tarfile.open(path, "w") as tar:
        for number, pair in enumerate(pair for pair in pairs for _ in range(each)):
            for suffix, data in (
                ("png", encode(picture(pair, rng))),
                ("txt", caption(pair).encode()),
            ):
                member = tarfile.TarInfo(f"{number:05d}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return str(path.parent)


def write_generated(folder, shown, each=6):
    """As muse-generate does: asked for PAIRS and "two people", given `shown` of each."""
    rng = np.random.default_rng(1)
    for number, pair in enumerate([*map(shown, PAIRS), ("cat", "red")]):
        (folder / str(number)).mkdir(parents=True)
        for copy in range(each):
            (folder / f"{number}/{copy:05d}.png").write_bytes(encode(picture(pair, rng)))
    prompts = [*map(caption, PAIRS), "two people"]
    (folder / "generate.json").write_text(json.dumps({"prompts": prompts}))
    return str(folder)


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """The command's words but for the generated pictures."""
    root = tmp_path_factory.mktemp("captions")
    torch.manual_seed(0)  # of the encoder's weights
    return [
        "captions",
        f"train={write_tar(root / 'train/0.tar', TRAINED, 40)}",
        f"test={write_tar(root / 'test/0.tar', HELD_OUT, 10)}",
        f"text_encoder={make_bert(root / 'bert')}",
        f"output_dir={root / 'out'}",
        *["epochs=30", "width=8", "batch_size=16", "device=cpu"],
    ]


def run(words, folder):
    assert muse_evaluate([*words, f"generated={folder}"]) == 0
    out = Path(next(word[11:] for word in words if word.startswith("output_dir=")))
    return json.loads((out / "captions.json").read_text()), out


def test_the_right_pictures_are_found_and_others_not(words, tmp_path, capsys):
    right, out = run(words, write_generated(tmp_path / "right", lambda pair: pair))
    assert right["captions"] == len(PAIRS) + 1 and right["chance"]["top1"] == 1 / 9
    seen, held_out, other = (right[f"generated, {x}"] for x in ("seen", "held out", "other"))
    assert (seen["pictures"], held_out["pictures"], other["pictures"]) == (36, 12, 6)
    # captions it was not trained on may lie nearer than the right one
    assert seen["top5"] > 0.95 and seen["top1"] > 0.6 and seen["subject"] > 0.6
    assert other["top1"] == 0  # a red cat is not two people
    assert right["real, held out"]["pictures"] == 20
    assert abs(held_out["style"] - right["real, held out"]["style"]) < 0.2  # alike, good or not
    assert Image.open(out / "captions.png").width > 0
    judges = list(out.glob("judge-*"))

    def turned(pair):
        return pair[0], "old" if pair[1] == "red" else "red"

    wrong, _ = run(words, write_generated(tmp_path / "wrong", turned))
    assert wrong["generated, seen"]["top1"] < 0.05 and wrong["generated, seen"]["style"] < 0.3
    assert wrong["real, held out"] == right["real, held out"]  # by the same judge
    assert list(out.glob("judge-*")) == judges
    text = capsys.readouterr().out
    assert "chance" in text and "generated, held out" in text and "11.11%" in text


def test_a_judge_is_of_its_pictures_and_its_training(words, tmp_path):
    folder = write_generated(tmp_path / "right", lambda pair: pair)
    _, out = run(words, folder)
    before = set(out.glob("judge-*"))
    run([*words, "epochs=1"], folder)
    assert len(set(out.glob("judge-*")) - before) == 1


def test_what_cannot_be_judged_is_said(words, tmp_path, capsys):
    assert muse_evaluate([*words, f"generated={tmp_path}"]) == 2
    assert "holds no pictures for prompts" in capsys.readouterr().err
    folder = write_generated(tmp_path / "made", lambda pair: pair)
    assert muse_evaluate([*words, f"generated={folder}", f"train={tmp_path / 'none'}"]) == 2
    assert "none" in capsys.readouterr().err
    assert muse_evaluate([*words, f"generated={folder}", "batch_size=1000"]) == 2
    assert "240 pictures are less than one batch of 1000" in capsys.readouterr().err


def test_pictures_come_with_their_captions(words):
    pictures, captions = read_captioned(words[2].removeprefix("test="), 16)
    assert pictures.shape == (20, 3, 16, 16) and captions == [
        caption(pair) for pair in HELD_OUT for _ in range(10)
    ]


def test_parts_of_a_caption():
    assert parts("red apple, noto style") == ("red apple", "noto style")
    assert parts("an apple, red, noto style") == ("an apple, red", "noto style")
    assert parts("apple") == ("apple", "")


def test_scores_are_shares():
    found = [["a, x", "b, x"], ["b, x", "a, y"], ["b, y", "b, x"]]
    result = score(found, ["a, x", "a, y", "a, x"])
    shares = {"top1": 1 / 3, "top5": 2 / 3, "subject": 1 / 3, "style": 1 / 3}
    assert result == pytest.approx({"pictures": 3, **shares})


def test_chance_is_that_of_a_blind_draw():
    captions = ["a, x", "b, x", "c, x", "a, y", "b, y", "d", "e", "f"]
    pairs = list(product(map(parts, captions), repeat=2))
    right = [sum(one[side] == other[side] for one, other in pairs) / len(pairs) for side in (0, 1)]
    result = chance(captions)
    assert (result["subject"], result["style"]) == pytest.approx(right)
    assert (result["top1"], result["top5"]) == (1 / 8, 5 / 8)
