"""The bench of stage one: its sections run on small sizes, and a wrong way would be seen."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from tokenize_stage import bench, bench_encode
from tokenize_stage.bench_decode import REFERENCE, decode_ways, psnr
from tokenize_stage.bench_encode import CPU_WAYS, encode_for, limit, make_model
from tokenize_stage.bench_pipeline import (
    PipelineRun,
    changed_codes,
    encode_as_ours,
    encode_as_reference,
    write_tar,
)
from tokenize_stage.vq.paella_vq import PaellaVQModel

PAELLA = "PaellaVQModel f8-8192"
SMALL = {"levels": 2, "bottleneck_blocks": 1, "c_hidden": 32, "codebook_size": 64}


def photograph(seed: int, size: tuple[int, int] = (80, 60)) -> bytes:
    """A smooth JPEG."""
    rough = np.random.default_rng(seed).integers(256, size=(6, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(rough).resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "photographs"
    path.mkdir()
    for seed in range(3):
        (path / f"{seed}.jpg").write_bytes(photograph(seed))
    return path


@pytest.fixture(autouse=True)
def small_models(monkeypatch):
    monkeypatch.setattr(bench_encode, "MODELS", {PAELLA: lambda: PaellaVQModel(**SMALL)})


@pytest.mark.parametrize("name", decode_ways(32))
def test_every_decoder_gives_nearly_the_same_square(name):
    data, ways = photograph(0), decode_ways(32)
    assert ways[name](data).shape == (3, 32, 32) and ways[name](data).dtype == np.uint8
    near = psnr([data], 32)
    assert near[REFERENCE] == "∞" and (name == REFERENCE or float(near[name]) > 40)


def test_the_command_prints_a_table_of_decoders(folder, capsys):
    options = ["decode", "--images", str(folder), "--resolution", "32", "--turns", "1"]
    assert bench.main([*options, "--seconds", "0.01"]) == 0
    printed = capsys.readouterr().out
    assert "3 photographs, 32 px" in printed
    assert all(f"| {name} | " in printed for name in decode_ways(32))
    assert "| times the fastest library | ≥ 1 | " in printed


def test_without_photographs_it_says_where_to_get_some(tmp_path, capsys, monkeypatch):
    assert bench.main(["decode", "--images", str(tmp_path)]) == 2
    assert "has no *.jpg: give a folder by --images" in capsys.readouterr().err
    monkeypatch.setattr(bench, "find_spec", lambda module: None)
    with pytest.raises(ValueError, match="no photographs are installed.*scikit-learn"):
        bench.find_photographs(None)


def test_unknown_sections_and_models_are_refused(capsys):
    for wrong in (["decoder"], ["decode", "--model", "none"]):
        with pytest.raises(SystemExit):
            bench.parse(wrong)
    assert "no section 'decoder'; there are decode, encode" in capsys.readouterr().err


@pytest.mark.parametrize("name", CPU_WAYS)
def test_every_encoder_is_timed(name):
    assert encode_for(PAELLA, CPU_WAYS[name], 16, 2, "cpu", 0.01) > 0


def test_a_limit_counts_the_operations(monkeypatch):
    """Half the operations a second, half the images; a GPU's is the roofline."""
    way = CPU_WAYS["float32"]
    monkeypatch.setattr(bench_encode, "convolution_flops", lambda dtype: 1e9)
    whole = limit(PAELLA, 32, "cpu", way)
    monkeypatch.setattr(bench_encode, "convolution_flops", lambda dtype: 5e8)
    assert limit(PAELLA, 32, "cpu", way) == pytest.approx(whole / 2)
    assert limit(PAELLA, 32, "cuda", way) > 100 * whole


def test_both_pipelines_give_the_same_codes(folder, tmp_path):
    run = PipelineRun(tmp_path / "run", PAELLA, 32, "cpu", 2)
    run.folder.mkdir()
    run.prepare(sorted(folder.glob("*.jpg")), 5)
    assert encode_as_reference(run) > 0
    assert encode_as_ours(run, "float32") > 0 and encode_as_ours(run, "bfloat16") > 0
    changed = changed_codes(run)
    assert changed["ours, float32"] < 0.1 and changed["ours, bfloat16"] < 0.5
    write_tar(run.folder / "images.tar", sorted(folder.glob("*.jpg")), 4)
    encode_as_ours(run, "float32")
    with pytest.raises(ValueError, match="ours, float32: 4 rows of 5 images"):
        changed_codes(run)


def test_models_use_many_codes():
    codes = make_model(PAELLA).encode(torch.rand(2, 3, 32, 32))
    assert len(codes.unique()) > 5


def test_targets_and_rates_in_words():
    lines = bench.targets(("a", 2.5, 3.0), ("b", 1.0, 1.0))
    assert lines[2:] == ["| a | ≥ 3 | 2.50 | FAIL |", "| b | ≥ 1 | 1.00 | pass |"]
    assert bench.spread([1.234, 250.4, 5.0]) == "5 (1.23-250)"
