"""muse-tokenize end to end with a tiny tokenizer: both backends, tasks, reruns, bad input."""

import hashlib
import io
import json
import os
import re
import shutil
import signal
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pipeline_factory import make_tokenizer

from configs.load import ConfigError, load_config
from storage.pretrained import find_model
from storage.reader import TokenStore
from storage.verify import verify_store
from storage.writer import expected_shards
from tokenize_stage import encode
from tokenize_stage.config import TokenizeConfig
from tokenize_stage.pipeline.encoder import Encoder
from tokenize_stage.pixels.config import PreprocessingConfig
from tokenize_stage.pixels.decode import decode_image
from tokenize_stage.pixels.views import Decoder
from tokenize_stage.process import STOP_SIGNALS
from tokenize_stage.sources.sample import InputShard
from tokenize_stage.text.tokenizer import CaptionTokenizer, load_tokenizer
from tokenize_stage.vq import load_vq_model
from tokenize_stage.vq.maskgit_vqgan import MaskGitVQGAN
from tokenize_stage.work.ledger import failures, record_failure, task_reports
from tokenize_stage.work.plan import write_plan

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


@pytest.fixture(scope="module")
def fine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another tokenizer, of other codes."""
    path = tmp_path_factory.mktemp("models") / "fine"
    with torch.random.fork_rng():
        torch.manual_seed(1)
        MaskGitVQGAN(resolution=16, hidden_channels=32, num_embeddings=32, **TINY).save_pretrained(
            path
        )
    return path


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "clip"
    make_tokenizer().save_pretrained(path)
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


def parts(store: Path) -> list[Path]:
    """All that belongs to a store: what work/ says of its making does not."""
    return [path for path in store.rglob("*") if path.relative_to(store).parts[0] != "work"]


def files(store: Path) -> dict[str, bytes]:
    return {str(p.relative_to(store)): p.read_bytes() for p in parts(store) if p.is_file()}


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
    pixels = torch.from_numpy(np.stack([p.pixels[0] for p in expected])) / 255
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

    written = {path: path.stat().st_mtime_ns for path in parts(one)}
    assert encode.main(arguments(tars, tokenizer, one, *options)) == 0
    assert "5 finished before, 0 to do" in capsys.readouterr().out
    assert written == {path: path.stat().st_mtime_ns for path in parts(one)}


def test_what_killed_runs_left_of_finished_shards_is_removed(
    tokenizer: Path, tars: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    assert encode.main(arguments(f"{tars}/0.tar", tokenizer, store)) == 0
    left = [store / f"shards/.staging/{number}.{'0' * 32}" for number in (0, 1)]
    for folder in left:  # of a finished shard; of one that another task may be writing
        folder.mkdir(parents=True)
    assert encode.main(arguments(f"{tars}/0.tar", tokenizer, store)) == 0
    assert [folder.exists() for folder in left] == [False, True]


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
    assert "skipped 10: bad image 4, no image 2, unreadable cls 2, empty tar 1, tar cut" in out

    store = TokenStore(tmp_path / "store")
    assert store.shards == ["bad", "empty", "mixed", "short"]
    assert store.index.rows.tolist() == [0, 0, 2, 1]
    assert store.table(["key"])["key"].to_pylist() == ["001", "002", "005"]
    skipped = store.skipped().to_pylist()
    assert [row["key"] for row in skipped] == [
        *["cut", "text", "lone", "label"],
        "",
        *["cut", "text", "lone", "label"],
        "006",
    ]
    assert skipped[0]["source"] == f"{tmp_path}/in/bad.tar"
    assert all("truncated" in skipped[row]["reason"].lower() for row in (0, 5))
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
        (
            {"dataset.shards_path_or_url": "{here}/none/*.tar"},
            "no tar, table or folder at {here}/none",
        ),
        ({"dataset.shards_path_or_url": "{here}"}, "{here} holds neither tars nor jpg"),
        ({"model.vq_model.pretrained": "{here}/none"}, "{here}/none is neither a folder nor"),
        ({"model.vq_model.pretrained": "null"}, "model.vq_model.pretrained must be given, or"),
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


def test_an_input_that_cannot_be_read_is_noted_and_the_others_go_on(
    tokenizer: Path, tars: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    store = tmp_path / "store"
    broken = f"pipe:head -c 9000 {tars}/1.tar; exit 3 # 1.tar"
    argv = arguments(f"{tars}/0.tar::{tars}/2.tar::{broken}", tokenizer, store)
    assert encode.main([*argv, "dataset.read_attempts=1"]) == 3
    out = capsys.readouterr().out
    assert "failed: input shard 1: " in out and "status 3" in out
    assert "next: 1 of 3 input shards are still to be encoded" in out
    assert TokenStore(store).shards == ["0", "2"] and len(TokenStore(store)) == 14
    assert [*failures(store)] == ["1"] and "status 3" in failures(store)["1"]["reason"]
    assert task_reports(store)[0]["state"] == "failed"

    whole = f"dataset.shards_path_or_url={tars}/{{0..4}}.tar"
    for only, todo in (("failed", 1), ("missing", 2)):
        assert encode.main([*argv, whole, f"only={only}"]) == 0
        assert f"{todo} to do" in capsys.readouterr().out
    assert failures(store) == {} and len(TokenStore(store)) == 35


def test_only_missing_leaves_alone_what_failed_before(
    tokenizer: Path, tars: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    record_failure(tmp_path / "store", "2", "timed out")
    assert encode.main(arguments(tars, tokenizer, tmp_path / "store", "only=missing")) == 0
    assert TokenStore(tmp_path / "store").shards == ["0", "1", "3", "4"]
    assert "next: 1 of 5 input shards" in capsys.readouterr().out


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


def test_a_tokenizer_beyond_the_range_of_float16_is_refused_with_the_remedy(
    tokenizer: Path, tars: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vq = MaskGitVQGAN.from_pretrained(tokenizer)
    vq.encoder.conv_in.weight.mul_(1e6)
    vq.save_pretrained(tmp_path / "vq")
    argv = arguments(tars, tmp_path / "vq", tmp_path / "store", "encode.dtype=float16")
    assert encode.main(argv) == 2
    assert "start again with encode.dtype=bfloat16" in capsys.readouterr().err
    assert task_reports(tmp_path / "store")[0]["state"] == "failed"


def test_main_gives_the_signal_handlers_back(tokenizer: Path, tars: Path, tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    encode.main(arguments(tars, tokenizer, tmp_path / "store"))
    assert before == [signal.getsignal(number) for number in STOP_SIGNALS]


def test_one_pass_of_two_tokenizers_views_and_text_is_what_each_alone_gives(
    tokenizer: Path, fine: Path, clip: Path, tars: Path, tmp_path: Path
) -> None:
    argv = arguments(tars, tokenizer, tmp_path / "store", f"text.tokenizers.clip={clip}")
    argv = [word for word in argv if not word.startswith("model.")]
    argv += [f"model.vq_models.f2.pretrained={tokenizer}"]
    argv += [f"model.vq_models.small.pretrained={fine}", "model.vq_models.small.resolution=16"]
    views = ["centre", "random_flip", "random"]
    assert encode.main([*argv, f"dataset.preprocessing.views=[{','.join(views)}]"]) == 0

    store = TokenStore(tmp_path / "store")
    assert len(store) == 3 * 35 and store.meta.resolution == 32
    assert store.meta.transform["resolutions"] == {"codes_f2": 32, "codes_small": 16}
    assert [*store.meta.arrays] == ["codes_f2", "codes_small", "text_ids_clip"]
    decoder = Decoder(PreprocessingConfig(resolution=32, views=views), [32, 16])
    models = {"codes_f2": load_vq_model(tokenizer), "codes_small": load_vq_model(fine)}
    sides = {"codes_f2": 32, "codes_small": 16}
    encoder = Encoder(models, sides, torch.device("cpu"), torch.float32, batch_size=4)
    rows = store.table().to_pylist()
    for number, row in enumerate(rows):
        seed, view = divmod(number, 3)
        image_hash = hashlib.sha256(picture(seed)).hexdigest()
        want = decoder.decode(picture(seed), image_hash)[view]
        assert (row["key"], row["view"], row["flipped"]) == (f"{seed:03}", want.view, want.flipped)
        assert row["image_hash"] == image_hash
        assert row["crop_left"] == pytest.approx(want.crop_left, abs=1e-5)
        alone = encoder.submit({len(p[0]): p[None] for p in want.pixels}).result()
        for column, codes in alone.items():
            assert (store.read_codes([number], column) == codes).all()
    ids = CaptionTokenizer(load_tokenizer(clip), None, "clip")([row["caption"] for row in rows])
    assert (store.read_codes(slice(None), "text_ids_clip") == ids.ids).all()
    assert [row["text_length_clip"] for row in rows] == ids.lengths.tolist()
    assert not verify_store(tmp_path / "store")


def test_what_is_rejected_before_decoding_is_listed_and_metadata_is_stored(
    tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    members = []
    for seed, about in enumerate([{"url": "http://good/0"}, {"url": "http://bad/1"}, {}]):
        members += [(f"{seed}.jpg", picture(seed, "JPEG") if seed != 1 else b"never decoded")]
        members += [(f"{seed}.json", json.dumps({**about, "punsafe": 0.25}).encode())]
    write_tar(tmp_path / "in.tar", members)
    (tmp_path / "denied.txt").write_text("bad\n")
    denied = f"filters.deny_domains=[{tmp_path}/denied.txt]"
    argv = arguments(tmp_path / "in.tar", tokenizer, tmp_path / "store", denied)
    assert encode.main(argv) == 0
    assert "skipped 1: denied domain 1" in capsys.readouterr().out
    store = TokenStore(tmp_path / "store")
    assert store.skipped()["key"].to_pylist() == ["1"]
    rows = store.table(["key", "url", "nsfw_score", "flipped"]).to_pylist()
    assert [row["url"] for row in rows] == ["http://good/0", None]
    assert [row["nsfw_score"] for row in rows] == [0.25, 0.25]
    assert [row["flipped"] for row in rows] == [False, False]


def test_a_plan_is_followed_and_the_written_configuration_goes_on(
    tokenizer: Path, tars: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    store = tmp_path / "store"
    write_plan(store, [InputShard(name, f"{tars}/{name}.tar") for name in "0123"])
    argv = arguments("not/looked/at", tokenizer, store, "task=1", "tasks=3")
    assert encode.main(argv) == 0
    assert TokenStore(store).shards == ["1"] and expected_shards(store) == set("0123")
    assert encode.main([f"config={store}/work/config.yaml"]) == 0  # as one task
    assert "4 of 4 input shards, 1 finished before, 3 to do" in capsys.readouterr().out
    assert TokenStore(store).shards == ["0", "1", "2", "3"]
    assert (store / "sealed.json").exists()


@pytest.mark.parametrize(
    "given, message",
    [
        (["model.vq_models.f8.pretrained=x"], "model.vq_models: give one of them"),
        (
            ["model.vq_model.pretrained=null", "model.vq_models.F-8.pretrained=x"],
            "model.vq_models.F-8: names are of a-z",
        ),
        (["encode.batch_size=0"], "encode.batch_size=0: it must be at least 1"),
    ],
)
def test_options_that_contradict_each_other_are_refused(given: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_config(TokenizeConfig, [*arguments("in", "model", Path("store")), *given])


@pytest.mark.parametrize("path", sorted(Path("configs/tokenize").glob("*.yaml")), ids=str)
def test_shipped_configs_are_complete_but_for_what_they_leave_open(path: Path) -> None:
    given = ["dataset.shards_path_or_url=x", "store.path=y"]
    config = load_config(TokenizeConfig, [f"config={path}", *given])
    assert (config.model.vq_model.pretrained is None) != (not config.model.vq_models)
