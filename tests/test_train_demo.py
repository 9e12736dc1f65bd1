"""muse-demo: its data on disk, and its parts over interruptions (with stand-ins for commands)."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from configs.load import load_config
from tokenize_stage.config import TokenizeConfig
from tokenize_stage.vq_training.config import TrainVQConfig
from train_stage.config import TrainConfig
from train_stage.demo import DemoConfig, plan_parts
from train_stage.demos.demo_data import CLASS_NAMES, FETCHED, FILES, INSTALLED, main, write_tars
from train_stage.demos.demo_parts import Part, run_parts
from train_stage.evaluate import EvaluateConfig
from train_stage.generate import GenerateConfig
from train_stage.pictures import read_pictures

# Three parts: write a file; work for a while, saving on SIGTERM; write a file from the second's.
# (A shell's background job ignores SIGINT, and its children do: not this one.)
DEMO = """
import signal, sys
from pathlib import Path
from train_stage.demos.demo_parts import Part, run_parts
signal.signal(signal.SIGINT, signal.default_int_handler)
folder, work = Path(sys.argv[1]), sys.argv[2]
first = ["python", "-c", f"open('{folder}/log', 'a').write('first\\\\n'); open('{folder}/a', 'w')"]
last = ["python", "-c", f"open('{folder}/log', 'a').write('last\\\\n'); open('{folder}/c', 'w')"]
slow = ["python", work, str(folder)]
run_parts([Part("one", [first], "a"), Part("two", [slow], "b"), Part("three", [last], "c")], folder)
"""
SLOW = """
import os, signal, sys, time
from pathlib import Path
folder, state = Path(sys.argv[1]), Path(sys.argv[1], "b")
step = int(state.read_text()) if state.exists() else 0
def log(word):
    with open(folder / "log", "a") as file:
        file.write(f"{word} {step}\\n")
def stop(*_):
    log("stopped")
    state.write_text(str(step))
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
log("started")
while step < 30:
    time.sleep(0.1)
    step += 1
log("finished")
state.write_text(str(step))
"""


def start_demo(folder: Path) -> subprocess.Popen:
    """Starts the three parts as a program, in a process group of its own."""
    (folder / "demo.py").write_text(DEMO)
    (folder / "slow.py").write_text(SLOW)
    words = [sys.executable, folder / "demo.py", folder / "run", folder / "slow.py"]
    environ = os.environ | {"PYTHONPATH": os.getcwd()}
    return subprocess.Popen(words, env=environ, stdout=subprocess.PIPE, text=True)


def wait_for(path: Path, word: str) -> None:
    deadline = time.monotonic() + 30
    while not (path.exists() and word in path.read_text()):
        assert time.monotonic() < deadline, f"{path} never said {word}"
        time.sleep(0.02)


def parts_of(*names: str, folder: Path, text: str = "made") -> list[Part]:
    def write(name: str) -> list[str]:
        code = f"open('{folder}/log', 'a').write('{name} '); open('{folder}/{name}', 'w')"
        return ["python", "-c", f"{code}.write('{text}')"]

    return [Part(name, [write(name)], name) for name in names]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_demo_lets_its_command_save_and_goes_on_from_there(tmp_path, number) -> None:
    run = tmp_path / "run"
    demo = start_demo(tmp_path)
    wait_for(run / "log", "started 0")
    time.sleep(0.5)
    demo.send_signal(number)
    demo.communicate(timeout=30)
    assert demo.returncode != 0
    seconds = json.loads((run / "progress.json").read_text())["two"]["seconds"]
    again = start_demo(tmp_path)
    output, _ = again.communicate(timeout=30)
    assert again.returncode == 0, output
    log = (run / "log").read_text().splitlines()
    saved = int(log[2].split()[1])
    assert 0 < saved < 30
    wanted = ["first", "started 0", f"stopped {saved}", f"started {saved}", "finished 30", "last"]
    assert log == wanted
    records = json.loads((run / "progress.json").read_text())
    assert all(record["done"] for record in records.values())
    assert seconds > 0.4 and records["two"]["seconds"] > seconds + (30 - saved) * 0.1


def test_after_kill_9_the_next_demo_waits_for_the_command_left_behind(tmp_path) -> None:
    demo = start_demo(tmp_path)
    wait_for(tmp_path / "run/log", "started 0")
    demo.kill()
    again = start_demo(tmp_path)
    output, _ = again.communicate(timeout=30)
    assert "waiting for another demo" in output and again.returncode == 0
    log = (tmp_path / "run/log").read_text().splitlines()
    assert log == ["first", "started 0", "finished 30", "started 30", "finished 30", "last"]


def test_finished_parts_are_not_run_again_and_failed_ones_are(tmp_path) -> None:
    parts = parts_of("a", "b", folder=tmp_path)
    failing = Part("c", [["python", "-c", "raise SystemExit(3)"]])
    with pytest.raises(subprocess.CalledProcessError) as error:
        run_parts([*parts, failing], tmp_path)
    assert error.value.returncode == 3
    progress = run_parts([*parts, *parts_of("c", folder=tmp_path)], tmp_path)
    assert (tmp_path / "log").read_text() == "a b c "
    assert [record["done"] for record in progress.parts.values()] == [True] * 3


def test_outputs_of_other_settings_are_never_mixed_in(tmp_path) -> None:
    run_parts(parts_of("a", "b", "c", folder=tmp_path), tmp_path)
    changed = parts_of("a", folder=tmp_path) + parts_of("b", "c", folder=tmp_path, text="other")
    with pytest.raises(ValueError, match=f"settings of 'b' .* rm -r {tmp_path}/b {tmp_path}/c"):
        run_parts(changed, tmp_path)
    assert (tmp_path / "b").read_text() == (tmp_path / "c").read_text() == "made"
    (tmp_path / "b").unlink()
    with pytest.raises(ValueError, match=f"rm -r {tmp_path}/c"):  # c was made from the old b
        run_parts(changed, tmp_path)
    (tmp_path / "c").unlink()
    run_parts(changed, tmp_path)
    assert (tmp_path / "b").read_text() == (tmp_path / "c").read_text() == "other"
    assert (tmp_path / "log").read_text() == "a b c b c "


def test_what_an_interrupted_part_left_is_removed_where_it_starts_over(tmp_path) -> None:
    code = f"from pathlib import Path as P; P('{tmp_path}/out').mkdir(); "
    code += f"P('{tmp_path}/out/picture').touch(); P('{tmp_path}/go').rename('{tmp_path}/gone')"
    part = Part("a", [["python", "-c", code]], "out", starts_over=True)
    with pytest.raises(subprocess.CalledProcessError):  # stops after a picture: no file "go"
        run_parts([part], tmp_path)
    assert (tmp_path / "out/picture").exists()
    (tmp_path / "go").touch()
    assert run_parts([part], tmp_path).parts["a"]["done"]
    (tmp_path / "progress.json").unlink()
    with pytest.raises(ValueError, match=f"rm -r {tmp_path}/out"):  # not known to be ours
        run_parts([part], tmp_path)
    assert (tmp_path / "out/picture").exists()


def test_a_changed_config_file_changes_the_part(tmp_path) -> None:
    config = tmp_path / "some.yaml"
    config.write_text("steps: 1")
    part = Part("a", [["muse-train", f"config={config}"]])
    before = part.recipe()
    assert part.recipe() == before
    config.write_text("steps: 2")
    assert part.recipe() != before


def test_each_command_reads_what_the_one_before_it_wrote() -> None:
    words = {part.name: part.commands[-1] for part in plan_parts(DemoConfig())}
    schemas = {"train_vq": TrainVQConfig, "tokenize": TokenizeConfig, "train": TrainConfig}
    schemas |= {"generate": GenerateConfig, "evaluate": EvaluateConfig}
    c = {name: load_config(schema, words[name][1:]) for name, schema in schemas.items()}
    data, tokenizer = "runs/demo/data", f"{c['train_vq'].experiment.output_dir}/model"
    assert f"output_dir={data}" in words["data"]
    assert c["train_vq"].dataset.shards_path_or_url.startswith(f"{data}/train")
    assert c["tokenize"].dataset.shards_path_or_url.startswith(f"{data}/train")
    assert c["tokenize"].model.vq_model.pretrained == tokenizer
    assert c["train"].dataset.train_store == c["tokenize"].store.path == words["check"][-1]
    assert c["generate"].model == f"{c['train'].experiment.output_dir}/model"
    assert c["generate"].vq_model is None  # the one that the store names
    assert c["evaluate"].vq_model == tokenizer
    assert c["evaluate"].generated == c["generate"].output_dir
    assert (c["evaluate"].train, c["evaluate"].test) == (f"{data}/train", f"{data}/test")


def test_a_command_of_the_demo_takes_its_config_and_what_the_user_overrides() -> None:
    def words(**options) -> list[str]:
        return next(p for p in plan_parts(DemoConfig(**options)) if p.name == "generate").commands[
            0
        ]

    assert words() == ["muse-generate", "config=configs/generate/fashion_mnist.yaml"]
    given = words(guidance_scale=0.0, images_per_class=5, generate="seed=3")[2:]
    assert given == ["guidance_scale=0.0", "images_per_class=5", "seed=3"]


def write_idx(folder: Path, part: str, images: np.ndarray, labels: np.ndarray) -> None:
    for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
        sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
        magic = bytes([0, 0, 8, array.ndim])
        file = folder / f"{part}-{kind}-ubyte.gz"
        file.write_bytes(gzip.compress(magic + sizes + array.tobytes()))


def test_fashion_mnist_becomes_tars_and_class_folders(tmp_path, capsys) -> None:
    random = np.random.default_rng(0)
    images = random.integers(256, size=(40, 28, 28), dtype=np.uint8)
    labels = np.arange(40, dtype=np.uint8) % 10
    write_idx(tmp_path, "train", images, labels)
    assert main([f"data={tmp_path}", f"output_dir={tmp_path}/out"]) == 2
    assert "lacks t10k-images-idx3-ubyte.gz, t10k-labels" in capsys.readouterr().err
    write_idx(tmp_path, "t10k", images[:20], labels[:20])
    words = [f"data={tmp_path}", f"output_dir={tmp_path}/out", "images_per_tar=15"]
    assert main(words) == 0
    names = [path.name for path in sorted((tmp_path / "out/train").iterdir())]
    assert names == ["train-00000.tar", "train-00001.tar", "train-00002.tar"]
    train, train_ids, _ = read_pictures(tmp_path / "out/train")
    assert train_ids.tolist() == labels.tolist()
    assert all(np.array_equal(train[:, channel].numpy(), images) for channel in range(3))
    test, test_ids, classes = read_pictures(tmp_path / "out/test")
    assert classes == [f"{index}-{name}" for index, name in enumerate(CLASS_NAMES)]
    order = np.argsort(labels[:20], kind="stable")
    assert test_ids.tolist() == labels[order].tolist()
    assert np.array_equal(test[:, 0].numpy(), images[order])


def write_splits(folder: Path) -> None:
    images, labels = np.zeros((20, 28, 28), np.uint8), np.arange(20, dtype=np.uint8) % 10
    folder.mkdir(parents=True, exist_ok=True)
    for part in ("train", "t10k"):
        write_idx(folder, part, images, labels)


@pytest.mark.parametrize("name", FILES)
def test_a_file_cut_off_is_refused_by_name(tmp_path, capsys, name) -> None:
    write_splits(tmp_path)
    words, whole = (
        [f"data={tmp_path}", f"output_dir={tmp_path}/out"],
        (tmp_path / name).read_bytes(),
    )
    (tmp_path / name).write_bytes(whole[:-9])  # what a killed dpkg-deb leaves
    assert main(words) == 2
    assert f"{tmp_path / name} is damaged: " in capsys.readouterr().err
    (tmp_path / name).write_bytes(gzip.compress(gzip.decompress(whole)[:-1]))
    assert main(words) == 2
    assert f"{tmp_path / name} is damaged: " in capsys.readouterr().err
    (tmp_path / name).write_bytes(whole)
    assert main(words) == 0


def test_a_download_is_whole_or_fetched_again(tmp_path, monkeypatch, capsys) -> None:
    fetched = []

    def killed(folder: Path) -> None:
        fetched.append("killed")
        write_splits(folder / INSTALLED)
        (folder / INSTALLED / FILES[0]).write_bytes(b"")
        raise KeyboardInterrupt

    def cut(folder: Path) -> None:
        fetched.append("cut")
        write_splits(folder / INSTALLED)
        (folder / INSTALLED / FILES[0]).write_bytes(b"")

    def whole(folder: Path) -> None:
        fetched.append("whole")
        write_splits(folder / INSTALLED)

    monkeypatch.setattr("train_stage.demos.demo_data.INSTALLED", Path(f"{tmp_path}/not-installed"))
    monkeypatch.delitem(FETCHED, "torchvision")
    words = [f"output_dir={tmp_path}/out"]
    monkeypatch.setitem(FETCHED, "debian", (killed, INSTALLED))
    with pytest.raises(KeyboardInterrupt):
        main(words)
    monkeypatch.setitem(FETCHED, "debian", (cut, INSTALLED))
    assert main(words) == 2
    assert f"{FILES[0]} is damaged" in capsys.readouterr().err
    monkeypatch.setitem(FETCHED, "debian", (whole, INSTALLED))
    assert main(words) == main(words) == 0
    assert fetched == ["killed", "cut", "whole"]
    (tmp_path / "out/download/debian" / INSTALLED / FILES[0]).write_bytes(b"")
    assert main(words) == 0
    assert fetched[3:] == ["whole"] and "not used: " in capsys.readouterr().out


def test_tars_are_the_same_bytes_every_time(tmp_path) -> None:
    images, labels = np.zeros((3, 28, 28), np.uint8), np.array([1, 2, 3], np.uint8)
    for name in ("first", "second"):
        write_tars(images, labels, tmp_path / name, per_tar=3)
    first, second = (tmp_path / n / "train-00000.tar" for n in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()
