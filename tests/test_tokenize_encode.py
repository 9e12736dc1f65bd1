"""muse-tokenize end to end with a tiny tokenizer: both backends, tasks, reruns, bad input."""

import io
import os
import shutil
import signal
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from configs.load import load_config
from storage.pretrained import find_model
from storage.reader import TokenStore
from storage.verify import verify_store
from storage.writer import expected_shards
from tokenize_stage import encode
from tokenize_stage.config import TokenizeConfig
from tokenize_stage.pixels.decode import decode_image
from tokenize_stage.process import STOP_SIGNALS
from tokenize_stage.vq import load_vq_model
from tokenize_stage.vq.maskgit_vqgan import MaskGitVQGAN

TINY = {"channel_mult": (1, 1), "num_res_blocks": 1, "z_channels": 8, "quantized_embed_dim": 8}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "vq"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vq = MaskGitVQGAN(resolution=32, hidden_channels=32, num_embeddings=64, **TINY)
    vq.quantize.embedding.weight.data *= 20  # spread out, so that many codes are used
    vq.save_pretrained(path)
    return path


def picture(seed: int, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(seed).integers(0, 256, (5, 5 + seed % 3, 3), np.uint8)
    Image.fromarray(noise).resize((40, 36 + seed % 9)).save(buffer, kind)
    return buffer.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def sample(seed: int) -> list[tuple[str, bytes]]:
    return [
        (f"{seed:03}.png", picture(seed)),
        (f"{seed:03}.cls", b"%d" % (seed % 10)),
        (f"{seed:03}.txt", f"picture {seed}".encode()),
    ]


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five tars of 7 good samples each."""
    folder = tmp_path_factory.mktemp("tars")
    for number in range(5):
        seeds = range(7 * number, 7 * number + 7)
        write_tar(folder / f"{number}.tar", [member for seed in seeds for member in sample(seed)])
    return folder


def arguments(source: Path | str, tokenizer: Path | str, store: Path, *more: str) -> list[str]:
    return [
        f"dataset.shards_path_or_url={source}",
        f"model.vq_model.pretrained={tokenizer}",
        f"store.path={store}",
        "dataset.preprocessing.resolution=32",
        "encode.batch_size=4",
        "encode.device=cpu",
        *more,
    ]


def files(store: Path) -> dict[str, bytes]:
    return {str(p.relative_to(store)): p.read_bytes() for p in store.rglob("*") if p.is_file()}


@pytest.mark.parametrize("backend", ["zarr", "arrow"])
def test_every_row_is_what_encoding_its_image_gives(
    tokenizer: Path, tars: Path, tmp_path: Path, backend: str, capsys: pytest.CaptureFixture
) -> None:
    argv = arguments(tars, tokenizer, tmp_path / "store", f"store.backend={backend}")
    assert encode.main(argv) == 0
    out = capsys.readouterr().out
    assert "task 0 of 1: 5 of 5 input shards, 0 finished before, 5 to do" in out
    assert "encoded 35 images" in out and f"muse-store verify {tmp_path}/store" in out

    store, vq = TokenStore(tmp_path / "store"), load_vq_model(tokenizer)
    assert store.shards == ["0", "1", "2", "3", "4"] and len(store) == 35
    assert store.meta.backend == backend and store.meta.resolution == 32
    assert store.meta.arrays["codes"].dtype == "uint16"
    made_by = store.meta.tokenizers["codes"]
    assert (made_by.codebook_size, made_by.grid) == (64, list(vq.grid(32)))
    expected = [decode_image(picture(seed), 32) for seed in range(35)]
    pixels = torch.from_numpy(np.stack([p.pixels for p in expected])) / 255
    codes = store.read_codes(slice(None))
    assert (codes == vq.encode(pixels).numpy()).all() and len(np.unique(codes)) > 5
    table = store.table().to_pylist()
    for seed, (row, want) in enumerate(zip(table, expected, strict=True)):
        assert (row["key"], row["class_id"]) == (f"{seed:03}", seed % 10)
        assert row["caption"] == f"picture {seed}" and row["view"] == 0
        assert (row["original_height"], row["original_width"]) == (36 + seed % 9, 40)
        box = [row[f"crop_{side}"] for side in ("top", "left", "height", "width")]
        assert box == pytest.approx(
            [want.crop_top, want.crop_left, want.crop_height, want.crop_width], abs=1e-5
        )
        assert row["source"] == f"{tars}/{seed // 7}.tar"


@pytest.mark.parametrize("backend", ["zarr", "arrow"])
def test_two_tasks_make_the_store_that_one_makes_and_a_rerun_changes_nothing(
    tokenizer: Path, tars: Path, tmp_path: Path, backend: str, capsys: pytest.CaptureFixture
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    options = (f"store.backend={backend}", "encode.decode_threads=3")
    assert encode.main(arguments(tars, tokenizer, one, *options)) == 0
    for task in (1, 0):
        argv = arguments(f"{tars}/*.tar", tokenizer, two, *options, f"task={task}", "tasks=2")
        capsys.readouterr()
        assert encode.main(argv) == 0
        left = "next: 3 of 5 input shards are still to be encoded" in capsys.readouterr().out
        assert left == (task == 1)
    assert files(one) == files(two)

    written = {path: path.stat().st_mtime_ns for path in one.rglob("*")}
    assert encode.main(arguments(tars, tokenizer, one, *options)) == 0
    assert "5 finished before, 0 to do" in capsys.readouterr().out
    assert written == {path: path.stat().st_mtime_ns for path in one.rglob("*")}


def test_slurm_numbers_split_the_work(
    tokenizer: Path, tars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environ = {"ARRAY_TASK_ID": 1, "ARRAY_TASK_COUNT": 2, "PROCID": 1, "NTASKS": 2}
    for name, value in environ.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    assert encode.main(arguments(tars, tokenizer, tmp_path / "store")) == 0
    assert TokenStore(tmp_path / "store").shards == ["3"]


def test_every_task_notes_all_shards_that_the_store_is_to_have(
    tokenizer: Path, tars: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    argv = arguments(f"{tars}/{{0..2}}.tar", tokenizer, store, "task=1", "tasks=2")
    assert encode.main(argv) == 0
    assert TokenStore(store).shards == ["1"] and expected_shards(store) == {"0", "1", "2"}
    assert encode.main(arguments(f"{tars}/4.tar", tokenizer, store)) == 0
    assert expected_shards(store) == {"0", "1", "2", "4"}
    assert encode.main(arguments(tars, tokenizer, store, "encode.dtype=bfloat16")) == 2
    assert expected_shards(store) == {"0", "1", "2", "4"}  # a refused run promises nothing


def test_a_tokenizer_given_relative_is_found_from_anywhere_and_may_move(
    tokenizer: Path, tars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "store"
    with monkeypatch.context() as patch:
        patch.chdir(tokenizer.parent)
        assert encode.main(arguments(f"{tars}/0.tar", tokenizer.name, store)) == 0
    name = TokenStore(store).meta.tokenizers["codes"].name
    assert name == str(tokenizer.resolve()) and find_model(name).samefile(tokenizer)
    shutil.copytree(tokenizer, tmp_path / "moved")
    assert encode.main(arguments(f"{tars}/1.tar", tmp_path / "moved", store)) == 0
    assert TokenStore(store).shards == ["0", "1"]


def test_what_cannot_be_encoded_is_counted_and_listed(
    tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    jpeg = picture(1, "JPEG")
    bad = [("cut.jpg", jpeg[: len(jpeg) // 2]), ("text.png", b"not an image"), ("lone.cls", b"1")]
    bad += [("label.png", picture(3)), ("label.cls", b"x")]
    write_tar(tmp_path / "in/mixed.tar", [*sample(1), *bad, *sample(2)])
    write_tar(tmp_path / "in/bad.tar", bad)
    write_tar(tmp_path / "in/empty.tar", [])
    write_tar(tmp_path / "in/short.tar", [*sample(5), *sample(6)])
    with tarfile.open(tmp_path / "in/short.tar") as tar:
        middle_of_006 = tar.getmember("006.png").offset_data + 100
    os.truncate(tmp_path / "in/short.tar", middle_of_006)
    assert encode.main(arguments(tmp_path / "in", tokenizer, tmp_path / "store")) == 0
    out = capsys.readouterr().out
    assert "encoded 3 images" in out
    assert "skipped 9: bad image 4, no image 2, unreadable cls 2, tar cut short or corrupt 1" in out

    store = TokenStore(tmp_path / "store")
    assert store.shards == ["bad", "empty", "mixed", "short"]
    assert store.index.rows.tolist() == [0, 0, 2, 1]
    assert store.table(["key"])["key"].to_pylist() == ["001", "002", "005"]
    skipped = store.skipped().to_pylist()
    assert [row["key"] for row in skipped] == ["cut", "text", "lone", "label"] * 2 + ["006"]
    assert skipped[0]["source"] == f"{tmp_path}/in/bad.tar"
    assert all("truncated" in skipped[row]["reason"].lower() for row in (0, 4))
    assert not verify_store(tmp_path / "store")


def test_an_image_folder_becomes_shards_of_mixed_classes(tokenizer: Path, tmp_path: Path) -> None:
    for seed in range(10):
        path = tmp_path / "in" / ("cat" if seed < 5 else "dog") / f"{seed}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(seed))
    argv = arguments(tmp_path / "in", tokenizer, tmp_path / "store", "dataset.images_per_shard=4")
    assert encode.main(argv) == 0
    store = TokenStore(tmp_path / "store")
    assert store.shards == ["images-00000", "images-00001", "images-00002"]
    assert store.meta.transform["class_names"] == ["cat", "dog"]
    rows = {row["key"]: row["class_id"] for row in store.table(["key", "class_id"]).to_pylist()}
    assert rows == {f"{'cat' if s < 5 else 'dog'}/{s}.png": int(s >= 5) for s in range(10)}


def test_a_finished_shard_made_from_other_input_is_not_taken_for_this_one(
    tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for place in ("a", "b"):
        write_tar(tmp_path / place / "0.tar", sample(1))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/1.png").write_bytes(picture(1))
    store = tmp_path / "store"
    assert encode.main(arguments(tmp_path / "a", tokenizer, store)) == 0
    assert encode.main(arguments(tmp_path / "b", tokenizer, store)) == 2
    assert f"was made from {tmp_path}/a/0.tar, not from {tmp_path}/b" in capsys.readouterr().err
    assert encode.main(arguments(tmp_path / "folder", tokenizer, store)) == 0
    (tmp_path / "folder/0.png").write_bytes(picture(2))
    assert encode.main(arguments(tmp_path / "folder", tokenizer, store)) == 2
    assert "1 files differ, 0.png first" in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"dataset.shards_path_or_url": "{here}/none/*.tar"}, "no tar or folder at {here}/none"),
        ({"dataset.shards_path_or_url": "{here}"}, "{here} holds neither tars nor jpg"),
        ({"model.vq_model.pretrained": "{here}/none"}, "{here}/none is neither a folder nor"),
        ({"store.path": "/dev/null/store"}, "store.path=/dev/null/store cannot be written"),
        (
            {"dataset.preprocessing.resolution": "33"},
            "dataset.preprocessing.resolution=33 is no multiple of 2",
        ),
        ({"encode.device": "cuda:99"}, "encode.device=cuda:99, but torch sees"),
        ({"encode.device": "abacus"}, "encode.device=abacus: legal are auto, cpu"),
        ({"task": "2"}, "task=2 tasks=None: give both or neither"),
    ],
)
def test_what_cannot_start_says_why_and_writes_nothing(
    tokenizer: Path,
    tars: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    changes: dict[str, str],
    message: str,
) -> None:
    argv = arguments(tars, tokenizer, tmp_path / "store")
    argv += [f"{key}={value.format(here=tmp_path)}" for key, value in changes.items()]
    assert encode.main(argv) == 2
    assert "error: " + message.format(here=tmp_path) in capsys.readouterr().err
    assert not (tmp_path / "store").exists()


def test_a_store_of_another_kind_is_refused(
    tokenizer: Path, tars: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    store = tmp_path / "store"
    assert encode.main(arguments(f"{tars}/0.tar", tokenizer, store)) == 0
    assert encode.main(arguments(tars, tokenizer, store, "encode.dtype=bfloat16")) == 2
    assert "dtype" in capsys.readouterr().err
    assert TokenStore(store).shards == ["0"]


def test_a_failure_that_is_not_the_datas_stops_and_leaves_no_half_shard(
    tokenizer: Path, tars: Path, tmp_path: Path
) -> None:
    source = f"{tars}/0.tar::pipe:cat {tars}/1.tar; exit 3 # 1.tar"
    with pytest.raises(OSError):
        encode.main(arguments(source, tokenizer, tmp_path / "store"))
    assert TokenStore(tmp_path / "store").shards == ["0"]
    assert encode.main(arguments(tars, tokenizer, tmp_path / "store")) == 0
    assert len(TokenStore(tmp_path / "store")) == 35


def test_reduced_precision_encodes_nearly_the_same(
    tokenizer: Path, tars: Path, tmp_path: Path
) -> None:
    codes = []
    for dtype in ("float32", "bfloat16"):
        assert (
            encode.main(arguments(tars, tokenizer, tmp_path / dtype, f"encode.dtype={dtype}")) == 0
        )
        codes.append(TokenStore(tmp_path / dtype).read_codes(slice(None)))
    assert 0.8 < (codes[0] == codes[1]).mean() < 1


def test_main_gives_the_signal_handlers_back(tokenizer: Path, tars: Path, tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    encode.main(arguments(tars, tokenizer, tmp_path / "store"))
    assert before == [signal.getsignal(number) for number in STOP_SIGNALS]


@pytest.mark.parametrize("path", sorted(Path("configs/tokenize").glob("*.yaml")), ids=str)
def test_shipped_configs_are_complete_but_for_what_they_leave_open(path: Path) -> None:
    given = ["dataset.shards_path_or_url=x", "store.path=y"]
    config = load_config(TokenizeConfig, [f"config={path}", *given])
    assert config.model.vq_model.pretrained and config.encode.dtype == "float32"
