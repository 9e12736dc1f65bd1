"""muse-store: every command on both backends; dry runs change nothing; errors are one line."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from filled_store import content, fill_store, stamps

from storage.cli import build_parser, main
from storage.reader import TokenStore


@pytest.fixture(params=["zarr", "arrow"])
def store(request, tmp_path, monkeypatch):
    """A store at the path "store" of the current folder."""
    monkeypatch.chdir(tmp_path)
    fill_store(Path("store"), request.param)
    return Path("store")


@pytest.fixture
def muse_store(capsys):
    """Runs a command line; returns what it printed. It must exit with `status`."""

    def run(line, status=0):
        assert main(shlex.split(line)) == status
        captured = capsys.readouterr()
        return captured.err if status == 2 else captured.out

    return run


def whole(folder="."):
    return content(Path(folder)), stamps(Path(folder))


def scores():
    keys = [f"{number}-{row:04d}" for number in (0, 2) for row in range(40)]
    return pa.table({"key": keys, "aesthetic": [float(row % 10) for row in range(80)]})


def examples():
    """Every example that some command's --help shows."""
    commands = build_parser()._subparsers._group_actions[0].choices
    for name, command in commands.items():
        lines = [line.strip() for line in command.epilog.splitlines()[1:]]
        assert lines and all(line.startswith(f"muse-store {name} ") for line in lines)
        yield from lines


@pytest.mark.parametrize("line", examples())
def test_examples_are_legal(line):
    args = build_parser().parse_args(shlex.split(line)[1:])
    assert callable(args.action)


def test_help_is_short_and_lists_every_command(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    printed = capsys.readouterr().out
    names = "info ls verify seal stats drop compact append-column merge split convert export import"
    assert stop.value.code == 0
    assert re.findall(r"^    ([a-z-]+)", printed, re.MULTILINE) == names.split()


def test_info(store, muse_store):
    muse_store("drop store 0-0001")
    facts = json.loads(muse_store("info store --json"))
    assert (facts["rows"], facts["dropped"], facts["shards"], facts["skipped"]) == (128, 2, 3, 3)
    assert facts["sealed"] is False and facts["missing"] == 0
    assert facts["entropy_rows"] == {"codes": 128} and 8 < facts["entropy_bits"]["codes"] < 10
    parquet = sum((path.stat().st_size for path in store.rglob("rows.parquet")), 0)
    assert 0 < sum(facts["column_bytes"].values()) < parquet == facts["bytes"]["rows"]
    printed = muse_store("info store")
    assert "128 rows in 3 shards" in printed and "not sealed" in printed
    assert "bits a code on disk; entropy" in printed and "from 128 rows" in printed
    assert re.search(r"url +[\d,]+ +[\d.]+", printed)
    muse_store("seal store")
    assert "chunks of 32 rows, sealed" in muse_store("info store")


def test_info_reads_a_url(store, muse_store):
    facts = json.loads(muse_store(f"info file://{store.resolve()} --json"))
    assert facts["rows"] == 130


def test_ls(store, muse_store):
    muse_store("drop store 0-0001")
    shards = [json.loads(line) for line in muse_store("ls store --json").splitlines()]
    sizes = [sum(p.stat().st_size for p in (store / "shards" / s["shard"]).rglob("*") if p.is_file()
                 and p.name != "manifest.json") for s in shards]  # fmt: skip
    assert [s["bytes"] for s in shards] == sizes
    assert shards[0] | {"bytes": 0} == {
        "shard": "00000", "folder": "00000", "rows": 78, "dropped": 2, "skipped": 1, "bytes": 0
    }  # fmt: skip
    assert muse_store("ls store").splitlines()[1].startswith("00000\t00000\t78\t2\t1\t")

    rows = muse_store("ls store 00002 --rows 2 --columns key,view,codes --json").splitlines()
    assert [json.loads(row)["row"] for row in rows] == [78, 79]
    assert json.loads(rows[1])["key"] == "2-0000" and len(json.loads(rows[1])["codes"]) == 16
    lines = muse_store("ls store 00002").splitlines()
    assert len(lines) == 21 and "crop_top" not in lines[0] and lines[0].startswith("row\tkey\t")
    found = muse_store("ls store --where 'class_id == 3' --rows 1000 --json").splitlines()
    assert len(found) == len(TokenStore(store).rows_where("class_id == 3")) > 5
    assert "no shard '9'" in muse_store("ls store 9", status=2)
    assert muse_store("ls store 00001") == ""


def test_verify(store, muse_store):
    assert "3 shards, 130 rows, whole" in muse_store("verify store")
    assert json.loads(muse_store("verify store --json")) == {"problems": []}
    (store / "shards/00002/rows.parquet").unlink()
    assert "rows.parquet is missing" in muse_store("verify store", status=1)
    assert "rows.parquet is missing" in muse_store("verify store 00002", status=1)
    assert "shard 00000, whole" in muse_store("verify store 00000")
    assert "no shard '9'" in muse_store("verify store 9", status=2)


def test_seal_and_stats(store, muse_store):
    assert "sealed 3 shards, 130 rows" in muse_store("seal store")
    before = whole()
    muse_store("seal store")
    assert whole() == before
    assert "perplexity" in muse_store("stats store --png codes.png")
    assert Path("codes.png").read_bytes().startswith(b"\x89PNG")
    facts = json.loads(muse_store("stats store --json"))
    assert facts["codebook"]["codes"]["rows"] == 130 and sum(facts["classes"].values()) == 130


def test_drop(store, muse_store):
    muse_store("seal store")
    Path("list.txt").write_text("https://example.org/0-0001\n\nhttps://example.org/nowhere\n")
    before = whole()
    line = "drop store --column url --file list.txt --reason asked"
    printed = muse_store(f"{line} --dry-run")
    assert "would drop 2 of 130 rows in 1 shards" in printed and "00000: 2 of 80 rows" in printed
    assert whole() == before
    printed = muse_store(line)
    assert "1 values stand in no row: https://example.org/nowhere; noted" in printed
    assert len(TokenStore(store)) == 128
    before = content(store)
    assert json.loads(muse_store(f"{line} --json"))["rows"] == 0
    assert content(store) == before
    facts = json.loads(muse_store("drop store 2-0000 2-0001 2-0001 --json"))
    assert facts == {"rows": 4, "shards": {"00002": 4}, "found_nowhere": []}
    assert json.loads(muse_store("drop store --column class_id 3 99 --json"))["found_nowhere"] == [
        99
    ]
    assert not len(TokenStore(store).rows_where("class_id == 3"))
    for line, words in {
        "drop store": "no values",
        "drop store x --column ulr": "no column 'ulr'",
        "drop store x --column class_id": "'x'",
    }.items():
        assert words in muse_store(line, status=2)


def test_compact(store, muse_store):
    muse_store("drop store 0-0001 2-0001 --reason asked")
    before = whole()
    printed = muse_store("compact store --dry-run")
    assert whole() == before
    size = json.loads(muse_store("ls store --json").splitlines()[0])["bytes"]
    words = f"rewrite 00000 as 00000@v2: 80 rows, 2 dropped, {size:,} bytes"
    assert f"would {words}" in printed and "would remove shards/00000: " in printed
    assert words in muse_store("compact store") and "rows/s" in muse_store("compact store")
    assert "dropped" not in muse_store("info store").replace("'dropped': 4", "")
    assert "whole" in muse_store("verify store")


def test_append_column(store, muse_store):
    pq.write_table(scores(), "scores.parquet")
    before = whole()
    printed = muse_store("append-column store scores.parquet --dry-run")
    assert whole() == before and "would write the next version of 00000" in printed
    printed = muse_store("append-column store scores.parquet")
    assert "15 values belong to no row: 2-0025, 2-0026" in printed
    assert TokenStore(store).table(["aesthetic"])["aesthetic"].null_count == 0
    assert "0 shards change, 3 have it" in muse_store("append-column store scores.parquet")
    assert "aesthetic" in muse_store("info store")
    table = scores()
    pq.write_table(table.set_column(1, "aesthetic", pa.array([1.0] * 80)), "scores.parquet")
    assert "--replace" in muse_store("append-column store scores.parquet", status=2)
    muse_store("append-column store scores.parquet --replace")
    assert set(TokenStore(store).read_column("aesthetic").tolist()) == {1.0}
    assert "either files or" in muse_store("append-column store", status=2)

    Path("parts").mkdir()
    pq.write_table(table.slice(0, 10).rename_columns(["key", "second"]), "parts/00000.parquet")
    printed = muse_store("append-column store --shards-dir parts")
    assert "110 rows get no value (null)" in printed and "whole" in muse_store("verify store")


def test_convert_split_merge(store, muse_store):
    muse_store("drop store 0-0001")
    other = "arrow" if TokenStore(store).meta.backend == "zarr" else "zarr"
    for line in (
        f"convert store new --backend {other} --rows-per-shard 100",
        "split store a b --fraction 0.8",
        "split store c d --where 'class_id < 2'",
        "merge all a b --prefix",
    ):
        before = whole()
        assert "would write" in muse_store(f"{line} --dry-run")
        assert whole() == before
        assert "rows/s" in muse_store(line)
        before = whole()
        muse_store(line)
        assert whole() == before
    for name in ("new", "a", "b", "c", "d", "all"):
        assert "whole" in muse_store(f"verify {name}")
        assert json.loads(muse_store(f"info {name} --json"))["dropped"] == 0
    rows = {name: len(TokenStore(name)) for name in ("new", "a", "b", "c", "d", "all")}
    assert rows["new"] == rows["a"] + rows["b"] == rows["c"] + rows["d"] == rows["all"] == 128
    assert "convert new NEW --backend" in muse_store("merge mixed store new", status=2)
    assert "both have a shard 00000" in muse_store("merge mixed a b", status=2)
    assert "--fraction 1.5" in muse_store("split store e f --fraction 1.5", status=2)
    assert not Path("mixed").exists() and not Path("e").exists()


def test_merge_says_which_tombstones_stay_behind(store, muse_store):
    fill_store(Path("other"), TokenStore(store).meta.backend, counts=(20,), first=5)
    muse_store("drop store --column class_id 3")
    assert "not taken along" in muse_store("merge all store other")


@pytest.mark.parametrize("form", ["webdataset", "parquet"])
def test_export_and_import(store, muse_store, form):
    pq.write_table(scores(), "scores.parquet")
    muse_store("append-column store scores.parquet")
    muse_store("drop store 0-0001")
    where = "--where 'aesthetic >= 5'"
    before = whole()
    assert "would write" in muse_store(f"export store out --format {form} {where} --dry-run")
    assert whole() == before
    assert "2 files" in muse_store(f"export store out --format {form} {where}")
    before = whole()
    assert "2 shards" in muse_store("import back out --dry-run")
    assert whole() == before
    muse_store("import back out")
    ours, back = TokenStore(store), TokenStore("back")
    rows = ours.rows_where("aesthetic >= 5")
    assert back.table(["key", "aesthetic"]).equals(ours.table(["key", "aesthetic"], rows))
    assert (back.read_codes(slice(None)) == ours.read_codes(rows)).all()


def test_import_of_json_lines(muse_store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = [json.dumps({"class_id": row, "tokens": [row] * 4}) for row in range(5)]
    Path("codes.jsonl").write_text("\n".join([*lines, "broken", ""]))
    model = "--tokenizer titok --codebook-size 16 --grid 2 2"
    line = f"import store codes.jsonl --format jsonl {model}"
    assert "give --resolution" in muse_store(line, status=2)
    printed = muse_store(f"{line} --resolution 256 --backend arrow")
    assert "5 rows" in printed and "rejected 1 samples" in printed
    assert TokenStore("store").read_codes([3]).tolist() == [[3] * 4]


def test_errors_are_one_line(store, muse_store, capsys):
    for line in ("info nowhere", "verify nowhere", "compact nowhere", "convert nowhere out"):
        error = muse_store(line, status=2)
        assert error.startswith("error: ") and error.count("\n") == 1
        assert "not a token store" in error
    for line in ("drop s3://bucket/store x", "ls store --rows 0", "split store a b"):
        with pytest.raises(SystemExit) as stop:
            main(shlex.split(line))
        assert stop.value.code == 2


def test_bars_stay_out_of_pipes(store):
    line = [sys.executable, "-m", "storage.cli", "verify", "store"]
    root = Path(__file__).parents[1]
    done = subprocess.run(line, capture_output=True, text=True, env={"PYTHONPATH": str(root)})
    assert (done.returncode, done.stderr) == (0, "") and "whole" in done.stdout
