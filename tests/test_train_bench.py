"""The bench: every way delivers every row once with its own label; what is missing is named."""

import json
import re
import shutil
from dataclasses import replace
from functools import partial
from itertools import repeat

import pytest

from train_stage import bench
from train_stage.benchmarks import bench_loader
from train_stage.benchmarks.limits import numpy_take
from train_stage.benchmarks.measure import Result, check_rows, measure_all, write_form, write_random
from train_stage.benchmarks.peers import PEERS, WRITERS
from train_stage.benchmarks.training_steps import import_reference

ROWS = 700  # no whole number of batches, shards or workers
WAYS = {way.name: way for way in bench_loader.LIMITS + bench_loader.OURS + PEERS}
TAKE = WAYS["np.take, int64"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench")
    write_random(path / "raw", ROWS)
    return path


@pytest.mark.parametrize("name", WAYS)
def test_every_row_once_with_its_own_label(folder, name):
    way = WAYS[name]
    pytest.importorskip(way.module)
    if "native" in name and not shutil.which("cc"):
        pytest.skip("no C compiler")
    if not (folder / way.form).exists():
        write_form({**WRITERS, **bench_loader.STORES}[way.form], folder, way)
    check_rows(way, folder)


def one_batch_for_ever(folder):
    yield from repeat(next(numpy_take(folder, narrow=False)))


def labels_of_others(folder):
    for codes, labels in numpy_take(folder, narrow=False):
        yield codes, labels.roll(1)


@pytest.mark.parametrize("batches", [one_batch_for_ever, labels_of_others])
def test_a_wrong_way_is_found(folder, batches):
    with pytest.raises(ValueError, match=f"of {ROWS} rows missing, repeated or wrongly labelled"):
        check_rows(replace(TAKE, batches=batches), folder)


def test_missing_and_failing_ways_keep_their_line(tmp_path):
    missing = replace(TAKE, name="missing", module="no_such_library")
    failing = replace(TAKE, name="failing", batches=partial(numpy_take, no_such_option=1))
    results = measure_all([missing, failing, TAKE], {}, tmp_path, ROWS, seconds=0.01)
    lines = bench_loader.table(results, {TAKE.name: 1e6})
    assert "| missing | not installed |" in lines[2]
    assert "| failing | failed: TypeError: " in lines[3] and "no_such_option" in lines[3]
    assert f"| {TAKE.name} | 1.00 M (" in lines[4] and len(results[2].rows_per_s) == 3


def test_targets_compare_like_with_like():
    results = [
        Result(bench_loader.OURS[0], [6e6], [0.1]),
        Result(bench_loader.LIMITS[0], [8e6], [0.1]),
    ]
    ours = {"zarr_decode_gb_s": 0.9, "memory_growth_mb": {"a": 0.5}}
    rates = {each.way.name: each.rows_per_s[0] for each in results}
    lines = bench_loader.loader_targets(results, {**rates, "litdata": 1.5e5}, ours)
    assert "| of a native gather, int64 | ≥ 0.7 | 0.75 | pass |" in lines
    assert "| of a native gather, uint16 | ≥ 0.7 | nan | FAIL |" in lines
    assert "| times litdata, int64 | ≥ 50 | 40.00 | FAIL |" in lines
    assert "| GB/s of uint16 decoded from zarr by a core | ≥ 1 | 0.90 | FAIL |" in lines
    assert "| MB more in epoch 5 than in epoch 1 | < 8 | 0.50 | pass |" in lines


def test_the_command_prints_the_table_and_writes_the_numbers(tmp_path, capsys):
    file = tmp_path / "bench.json"
    options = ["--rows", str(ROWS), "--seconds", "0.01", "--only", "np.take", "--json", str(file)]
    assert bench.main(["loader", *options]) == 0
    printed = capsys.readouterr().out
    assert "| np.take, uint16 | " in printed and "TokenLoader" not in printed
    record = json.loads(file.read_text())
    assert record["rows"] == ROWS and [way["way"] for way in record["ways"]][0] == TAKE.name


def test_the_training_part_compares_the_same_loss(tmp_path, capsys):
    """A reference that is our own model beneath another name: the losses are the same."""
    (tmp_path / "muse").mkdir()
    (tmp_path / "muse" / "modeling_transformer.py").write_text(
        "from train_stage.models.transformer import MaskGitTransformer\n"
    )
    options = "training --device cpu --size tiny --batch 1 --rounds 1 --only reference --reference"
    assert bench.main([*options.split(), str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    losses = re.search(r"loss of the first step: (\S+), (\S+)\n", printed)
    assert losses is not None and float(losses[1]) == pytest.approx(float(losses[2]), rel=1e-5)
    assert "| reference | " in printed and "| ours | " in printed
    assert "| times the reference's training step | ≥ 1.3 | " in printed


def test_what_cannot_be_measured_is_said(tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match="git clone"):
        import_reference(tmp_path)
    assert bench.main(["training", "--size", "huge", "--only", "store", "--device", "cpu"]) == 2
    assert "legal are tiny, small" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        bench.main(["load"])
    assert "no part 'load'; there are loader, models, loss, training" in capsys.readouterr().err
