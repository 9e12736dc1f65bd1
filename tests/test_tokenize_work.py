"""The ledger of an encoding run: plans, reports, failures, status and sealing."""

import json
import time
from pathlib import Path

import pytest
from PIL import Image
from store_factory import make_store

from storage.index import SEALED
from storage.reader import TokenStore
from storage.verify import verify_store
from storage.writer import expect_shards
from tokenize_stage.cli import main as muse_tokenize
from tokenize_stage.pipeline.progress import Progress
from tokenize_stage.sources.input_shards import InputShard
from tokenize_stage.work import ledger
from tokenize_stage.work.ledger import (
    TaskReport,
    clear_failure,
    failures,
    record_failure,
    task_reports,
)
from tokenize_stage.work.plan import read_plan, write_plan
from tokenize_stage.work.status import SILENCE_S, describe, status
from tokenize_stage.work.work_split import share_of


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Two of the three shards that it is to have."""
    path = make_store(tmp_path, rows=20)
    expect_shards(path, ["00000", "00001", "00002"])
    return path


def test_a_plan_comes_back_and_the_newest_counts(tmp_path: Path) -> None:
    assert read_plan(tmp_path) is None
    shards = [InputShard(f"{i:02}", f"in/{i:02}.tar") for i in range(13)]
    first = write_plan(tmp_path, shards)
    plan = read_plan(tmp_path)
    assert plan is not None and plan.names == [shard.name for shard in shards]
    assert list(plan) == shards
    shares = [share_of(plan, task, 5) for task in range(5)]
    assert sorted(s.name for share in shares for s in share) == plan.names
    second = write_plan(tmp_path, shards[3:5])
    assert first.exists() and second.name == "plan-0002.parquet"
    assert list(read_plan(tmp_path) or []) == shards[3:5]


def test_reports_tell_rate_and_rejections(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "REPORT_S", 0.0)
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "12")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    report, progress = TaskReport(tmp_path, 3, 64), Progress(1, None)
    progress.add_rows(500)
    progress.add_skipped("bad image: broken")
    report.update(progress, "00003")
    (told,) = task_reports(tmp_path)
    assert (told["task"], told["tasks"], told["job"], told["state"]) == (3, 64, "12_3", "running")
    assert told["rows"] == 500 and told["images_per_s"] > 0 and told["shard"] == "00003"
    assert told["skipped"] == {"bad image": 1}
    report.close("finished", progress)
    assert task_reports(tmp_path)[0]["state"] == "finished"


def test_failures_are_noted_and_forgotten(tmp_path: Path) -> None:
    record_failure(tmp_path, "00007", "timed out")
    assert failures(tmp_path)["00007"]["reason"] == "timed out"
    clear_failure(tmp_path, "00007")
    clear_failure(tmp_path, "00007")
    assert failures(tmp_path) == {}


def test_status_counts_what_is_there(store: Path) -> None:
    record_failure(store, "00000", "of before: it has been encoded since")
    now = status(store)
    assert (now["done"], now["expected"], now["rows"]) == (2, 3, 20)
    assert now["missing"] == ["00002"] and now["failed"] == {} and not now["complete"]
    record_failure(store, "00002", "timed out after 3 attempts")
    now = status(store)
    assert now["missing"] == [] and now["failed"] == {"00002": "timed out after 3 attempts"}
    words = describe(now)
    assert "2 of 3 shards" in words and "failed: 00002: timed out" in words
    assert words.endswith(f"muse-tokenize config={store}/work/config.yaml")


def test_status_tells_running_from_lost_tasks(store: Path) -> None:
    for task in range(2):
        TaskReport(store, task, 2)
    lost = sorted((store / "work" / "tasks").glob("*.json"))[1]
    told = json.loads(lost.read_text())
    told.pop("digest")
    ledger.write_json(lost, {**told, "time": time.time() - SILENCE_S - 60, "images_per_s": 9.0})
    now = status(store)
    assert [task["state"] for task in now["tasks"]] == ["running", "lost"]
    assert now["images_per_s"] == 0  # the lost one does not count
    assert "tasks: 1 lost, 1 running" in describe(now) and "no word for 0:03:00" in describe(now)


def test_seal_refuses_what_is_incomplete(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert muse_tokenize(["seal", str(store)]) == 1
    told = capsys.readouterr()
    assert "lacks 1 of 3 shards" in told.err and "missing 1: 00002" in told.out
    assert not (store / SEALED).exists()
    assert muse_tokenize(["seal", str(store), "--partial"]) == 0
    assert (store / SEALED).exists()
    complete = make_store(tmp_path / "complete", rows=20)
    TaskReport(complete, 0, 1).close("finished")
    assert describe(status(complete)).endswith(f"next: muse-tokenize seal {complete}")
    assert muse_tokenize(["seal", str(complete)]) == 0
    assert muse_tokenize(["status", str(complete)]) == 0
    assert capsys.readouterr().out.endswith(f"next: muse-tokenize audit store={complete}\n")
    assert len(TokenStore(complete)) == 20 and verify_store(complete) == []


def test_commands_explain_themselves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert muse_tokenize(["--help"]) == 0
    assert "status STORE" in capsys.readouterr().out
    assert muse_tokenize(["stauts", str(tmp_path)]) == 2
    assert "status" in capsys.readouterr().err
    assert muse_tokenize(["status", str(tmp_path)]) == 2
    assert "no store.json" in capsys.readouterr().err


def test_tasks_follow_the_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_store(tmp_path / "made", rows=20)  # for its tokenizer
    for number in range(4):
        (tmp_path / "in" / f"{number}").mkdir(parents=True)
        Image.new("RGB", (9, 9), (50 * number, 0, 0)).save(tmp_path / "in" / f"{number}/a.png")
    store = tmp_path / "store"
    options = [
        f"dataset.shards_path_or_url={tmp_path}/in",
        "dataset.images_per_shard=1",
        "dataset.preprocessing.resolution=8",
        f"model.vq_model.pretrained={tmp_path}/made/vq",
        f"store.path={store}",
    ]
    assert muse_tokenize(["plan", *options]) == 0
    assert "4 input shards, 4 of them to encode" in capsys.readouterr().out
    assert muse_tokenize(["status", str(store)]) == 1  # nobody has begun
    assert "0 of 4 shards" in capsys.readouterr().out
    again = [f"config={store}/work/config.yaml"]
    assert muse_tokenize([*again, "task=1", "tasks=3"]) == 0
    assert status(store)["missing"] == [f"images-0000{i}" for i in (0, 2, 3)]
    assert muse_tokenize(["plan", *again, "--only-missing"]) == 0
    assert read_plan(store).names == [f"images-0000{i}" for i in (0, 2, 3)]
    for task in range(3):
        assert muse_tokenize([*again, f"task={task}", "tasks=3"]) == 0
    assert status(store)["complete"] and muse_tokenize(["seal", str(store)]) == 0


def test_what_a_smaller_plan_leaves_out_is_not_forgotten(tmp_path: Path) -> None:
    make_store(tmp_path / "made", rows=20)  # for its tokenizer
    for number in range(2):
        (tmp_path / "in" / f"{number}").mkdir(parents=True)
        Image.new("RGB", (9, 9), (50 * number, 0, 0)).save(tmp_path / "in" / f"{number}/a.png")
    store = tmp_path / "store"
    options = [
        f"dataset.shards_path_or_url={tmp_path}/in",
        "dataset.images_per_shard=1",
        "dataset.preprocessing.resolution=8",
        f"model.vq_model.pretrained={tmp_path}/made/vq",
        f"store.path={store}",
    ]
    again = [f"config={store}/work/config.yaml"]
    assert muse_tokenize(["plan", *options]) == 0
    record_failure(store, "images-00000", "timed out")
    assert muse_tokenize(["plan", *again, "--only-missing"]) == 0
    assert muse_tokenize(again) == 0
    now = status(store)
    assert now["failed"] == {"images-00000": "timed out"} and not now["sealed"]
    assert f"next: muse-tokenize plan {again[0]}, then muse-tokenize {again[0]}" in describe(now)
    assert muse_tokenize(["plan", *again]) == 0 and muse_tokenize(again) == 0
    assert status(store)["complete"] and status(store)["sealed"]
