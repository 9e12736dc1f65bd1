"""muse-tokenize estimate: its arithmetic by hand, its bounds beside published ones, a whole run."""

import dataclasses
import io
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from configs.load import _walk
from tokenize_stage import estimate
from tokenize_stage.cli import COMMANDS
from tokenize_stage.config import TokenizeConfig
from tokenize_stage.cost.config import EstimateConfig, EstimateOptions
from tokenize_stage.cost.forecast import Measured, forecast
from tokenize_stage.cost.measure import Input
from tokenize_stage.cost.roofline import GPUS, ROWS, encoder_operations, images_per_s
from tokenize_stage.quality.config import AuditConfig
from tokenize_stage.selection.config import DedupConfig, ScanConfig
from tokenize_stage.sources.sample import Sample
from tokenize_stage.vq.maskgit_vqgan import MaskGitVQGAN

ROOT = Path(__file__).parents[1]
SCHEMAS = {
    "encode": TokenizeConfig,
    "plan": TokenizeConfig,
    "estimate": EstimateConfig,
    "scan": ScanConfig,
    "dedup": DedupConfig,
    "audit": AuditConfig,
}
MEASURED = Measured(
    samples_per_s_read=8000,
    core_s_per_sample=0.002,
    rows_per_s_encoded=3000,
    rows_per_s_written=20000,
    texts_per_s=None,
    text_on_device=False,
    accepted=0.5,
    views=2,
    bytes_per_sample=100_000,
    cores=2,
)


def test_a_forecast_is_what_follows_from_the_slowest_stage() -> None:
    found = forecast(MEASURED, 3_600_000, gpus=4, row_bytes={"codes": 320}, price=2.5)
    # of two images one is accepted, in two views: a row an image
    assert found.rows == 3_600_000 and found.bytes == {"codes": 320 * 3_600_000}
    assert found.stages == {"read": 8000, "decode": 1000, "encode": 3000, "write": 20000}
    assert (found.images_per_s, found.bound_by) == (1000, "decode")
    assert (found.gpu_hours, found.wall_hours, found.money) == (1.0, 0.25, 2.5)
    assert found.cores_needed == 6 and found.read_bytes == 3.6e11
    more = forecast(MEASURED, 3_600_000, gpus=4, row_bytes={}, cores=16)
    assert more.stages["decode"] == 8000 and more.bound_by == "encode"
    assert more.gpu_hours == pytest.approx(1 / 3) and more.money is None


def test_text_encoders_share_the_device_and_tokenizers_do_not() -> None:
    words = dataclasses.replace(MEASURED, texts_per_s=3000.0)
    assert forecast(words, 1000, 1, {}).stages["text"] == 6000  # every other image has one
    states = dataclasses.replace(words, text_on_device=True)
    stages = forecast(states, 1000, 1, {}).stages
    assert "text" not in stages and stages["encode"] == pytest.approx(2000)


def test_bounds_of_the_imagenet_tokenizer_are_near_those_counted_elsewhere() -> None:
    """128.6 GFLOP an image, 3,370 images/s on an H100 with norms and activations fused."""
    with torch.device("meta"):
        model = MaskGitVQGAN()
    operations = encoder_operations(model, 256, torch.float16)
    flops = sum(operation.flops for operation in operations) / ROWS
    assert flops == pytest.approx(128.6e9 + 2 * 256 * 256 * 1024, rel=1e-3)  # and the search
    fused, alone = (images_per_s(operations, GPUS["H100"], True, way) for way in (True, False))
    assert fused == pytest.approx(3370, rel=0.05) and 2385 < alone < fused
    halves = sum(o.bytes for o in operations[:-1])
    floats = sum(o.bytes for o in encoder_operations(model, 256, torch.float32)[:-1])
    assert floats == 2 * halves
    assert images_per_s(operations, GPUS["H100"], False, True) < alone / 3


def test_images_are_counted_where_they_can_be() -> None:
    samples = [Sample(str(n), b"12345", None, None, "") for n in range(2)]
    read = Input(samples, seen=7, readable=6, samples_per_s=1.0)
    assert estimate.count_images(None, [10, 20], read) == (30, "counted")
    assert estimate.count_images(99, [None], read) == (99, "as given")
    count, basis = estimate.count_images(None, [None, 10, None], read)
    assert count == 24 and basis == "the first shard's 7 in each of 2"
    assert read.bytes_per_sample == 5


@pytest.mark.parametrize(
    "name, value, legal",
    [("gpus", 0, "at least 1"), ("gpu", "abacus", "here, H100"), ("reached", 0.0, "in 0..1")],
)
def test_options_that_make_no_sense_are_refused(name: str, value: object, legal: str) -> None:
    with pytest.raises(ValueError, match=f"estimate.{name}={value}: .*{legal}"):
        EstimateOptions(**{name: value})  # type: ignore[arg-type]


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    vq = MaskGitVQGAN(
        resolution=16,
        hidden_channels=32,
        channel_mult=(1, 1),
        num_res_blocks=1,
        z_channels=8,
        quantized_embed_dim=8,
        num_embeddings=64,
    )
    vq.save_pretrained(tmp_path / "vq")
    (tmp_path / "photos").mkdir()
    for number in range(12):
        noise = np.random.default_rng(number).integers(0, 256, (20, 20, 3), np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(noise).save(buffer, "PNG")
        bad = number == 5
        (tmp_path / f"photos/{number}.png").write_bytes(b"bad" if bad else buffer.getvalue())
    return [
        f"dataset.shards_path_or_url={tmp_path}/photos",
        "dataset.images_per_shard=12",
        "dataset.preprocessing.resolution=16",
        f"model.vq_model.pretrained={tmp_path}/vq",
        f"store.path={tmp_path}/to/be/made",
        "encode.device=cpu",
        "encode.batch_size=4",
        "estimate.seconds=0.05",
    ]


def test_a_run_measures_and_leaves_nothing_behind(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    before = sorted(tmp_path.rglob("*"))
    assert estimate.main([*arguments, "estimate.price=2", "estimate.variants=[bfloat16]"]) == 0
    assert sorted(tmp_path.rglob("*")) == before
    out = capsys.readouterr().out
    for words in ("read", "decode", "encode", "write", "<- the slowest", "bfloat16, instead"):
        assert words in out
    assert "12 (counted)" in out and "8.3% rejected" in out and "money" in out
    assert "codes                          48.0" in out  # 64 codes of 6 bits


def test_a_gpu_that_is_not_here_is_computed_and_said_to_be(
    arguments: list[str], capsys: pytest.CaptureFixture
) -> None:
    options = ["estimate.gpu=H100", "estimate.images=1000000", "estimate.gpus=8"]
    assert estimate.main([*arguments, *options]) == 0
    out = capsys.readouterr().out
    assert "H100 op by op, computed: 60% of" in out and "not measured" in out
    assert "1,000,000 (as given)" in out and "on 8 GPUs" in out


def test_what_cannot_be_measured_says_why(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert estimate.main([*arguments, "filters.min_size=99"]) == 2
    assert "becomes a row: see filters.*" in capsys.readouterr().err
    assert estimate.main([*arguments, f"dataset.shards_path_or_url={tmp_path}/none.tar"]) == 2
    assert "none.tar" in capsys.readouterr().err


def test_commands_of_the_map_have_options_that_exist() -> None:
    """Those of tokenize_stage/README.md."""
    text = (ROOT / "tokenize_stage/README.md").read_text()
    block = "".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL))
    found = []
    for line in block.replace("\\\n", " ").splitlines():
        words = [word for word in shlex.split(line, comments=True) if "$" not in word]
        if not words or words[0] != "muse-tokenize":
            continue
        command = words[1] if words[1:] and words[1] in COMMANDS else "encode"
        found.append(command)
        for key in (word.partition("=")[0] for word in words[1:] if "=" in word):
            legal = {name for name, *_ in _walk(SCHEMAS[command])} | {"config"}
            assert key in legal, f"muse-tokenize {command} has no option {key}"
    assert set(found) == set(COMMANDS)
