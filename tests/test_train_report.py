"""muse-train report: what it finds in runs that are normal, and in runs with one thing wrong."""

import json
import math

import numpy as np
import pytest
from PIL import Image

from train_stage.report import main as report_main
from train_stage.reporting.checks import check_run, verdict
from train_stage.reporting.history import read_history, smooth
from train_stage.train import main as train_main

LINES, K = 60, 1024
GUESS = math.log(K)


def good_lines():
    """Log lines as a healthy run writes them: one at step 1, then one every 50 steps."""
    rng = np.random.default_rng(0)
    for index in range(LINES):
        step = max(1, 50 * index)
        level = 3.5 + (GUESS - 3.5) * math.exp(-index / 8) + 0.02 * rng.standard_normal()
        buckets = {
            f"loss_masked_{10 * n}_{10 * n + 10}": level + 0.1 * (n - 4.5) * (index > 0)
            for n in range(10)
        }
        yield {"step": step, "time": 1e9 + step, "loss": level, "cross_entropy": level, **buckets,
               "accuracy": 0.1, "learning_rate": 1e-4, "grad_norm": 0.5 + 0.1 * rng.random(),
               "images_per_s": 100 + rng.random(), "tokens_per_s": 25_600.0, "data_wait": 0.001,
               "peak_memory_gb": 1.5, "mfu": 0.5, "epoch": 0.01 * step}  # fmt: skip
        if index % 10 == 9:
            yield {"step": step, "eval_loss": level + 0.05, "eval_loss_ema": level}


def start(step=0):
    return {"step": step, "time": 1e9 + step, "outputs": K, "parameters": 10**7, "tokens": 256,
            "rows": 5000, "global_batch_size": 32, "processes": 1, "device": "NVIDIA H100",
            "precision": "bf16", "tflop_a_step": 1.0, "max_train_steps": 2950,
            "mfu_of": "989 TFLOP/s, the peak of NVIDIA H100 in bf16"}  # fmt: skip


def write_run(folder, change=None, starts=(0,), options="training: {max_train_steps: 2950}"):
    """change(line, index of its step) makes something of each line."""
    folder.mkdir(parents=True)
    lines = list(good_lines())
    for line in lines if change else []:
        change(line, line["step"] // 50)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "starts.jsonl").write_text("".join(json.dumps(start(s)) + "\n" for s in starts))
    (folder / "config.yaml").write_text(options)
    return folder


def findings_of(folder):
    return {finding.topic: finding for finding in check_run(read_history(folder))}


def test_a_healthy_run_is_normal(tmp_path):
    found = findings_of(write_run(tmp_path / "run"))
    assert {finding.level for finding in found.values()} == {"ok", "-"}
    assert verdict(list(found.values())) == "normal"
    assert "ln 1,024 = 6.93" in found["start"].expected and "finished" in found["progress"].found


def scaled(key, factor, first=0, last=LINES):
    def change(line, index):
        if key in line and first <= index < last:
            line[key] *= factor

    return change


def shifted(first, by):
    def change(line, index):
        for key in line:
            if index >= first and (key == "cross_entropy" or key.startswith("loss")):
                line[key] += by * (index - first + 1)

    return change


def set_to(key, value, *indices):
    def change(line, index):
        if key in line and index in indices:
            line[key] = value

    return change


WRONG = {
    "numbers": ("bad", set_to("grad_norm", float("nan"), 30)),
    "start": ("bad", scaled("cross_entropy", 2.0, 0, 1)),
    "fall": ("bad", shifted(45, 0.02)),
    "mask ratios": ("look", scaled("loss_masked_90_100", 0.5)),
    "validation": ("bad", lambda line, index: scaled("eval_loss", 1 + 0.005 * index)(line, index)),
    "averaged": ("look", scaled("eval_loss_ema", 1.1)),
    "gradient": ("look", set_to("grad_norm", 40.0, 20, 30, 40)),
    "data wait": ("bad", scaled("data_wait", 100)),
    "speed": ("look", scaled("images_per_s", 0.5, 40)),
    "MFU": ("bad", scaled("mfu", 0.2)),
}


@pytest.mark.parametrize("topic", WRONG)
def test_what_is_wrong_is_found_and_nothing_else(topic, tmp_path):
    level, change = WRONG[topic]
    found = findings_of(write_run(tmp_path / "run", change))
    assert found.pop(topic).level == level
    assert {finding.level for finding in found.values()} <= {"ok", "-"}


def test_a_start_below_guessing_gives_the_codes_away(tmp_path):
    change = set_to("cross_entropy", 4.0, 0)
    found = findings_of(write_run(tmp_path / "run", change))
    assert found["start"].level == "bad" and "give the codes away" in found["start"].advice
    pretrained = "model: {pretrained_model_path: x}"
    found = findings_of(write_run(tmp_path / "b", change, options=pretrained))
    assert found["start"].level == "-"


def test_a_restart_is_smooth_or_not(tmp_path):
    smooth_run = findings_of(write_run(tmp_path / "a", starts=(0, 1500, 2000)))
    assert smooth_run["restarts"].level == "ok" and "1,500, 2,000" in smooth_run["restarts"].found
    jump = lambda line, index: index > 30 and shifted(index, 0.5)(line, index)  # noqa: E731
    assert findings_of(write_run(tmp_path / "b", jump, (0, 1500)))["restarts"].level == "bad"
    assert "restarts" not in findings_of(write_run(tmp_path / "c"))


def test_speed_is_that_of_the_machine_it_runs_on_now(tmp_path):
    """Before the restart it was another one."""
    slower = scaled("images_per_s", 0.3, 31)
    assert findings_of(write_run(tmp_path / "run", slower, (0, 1500)))["speed"].level == "ok"


def test_a_run_that_has_only_begun_is_not_judged_yet(tmp_path):
    folder = write_run(tmp_path / "run", options="training: {max_train_steps: 90000}")
    lines = (folder / "metrics.jsonl").read_text().splitlines()[:3]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 200, "lo')
    found = findings_of(folder)
    assert found["fall"].level == found["mask ratios"].level == found["validation"].level == "-"
    assert "running, about 24:58 h left" in found["progress"].found
    assert report_main([str(folder)]) == 0
    first = json.dumps(json.loads(lines[0]) | {"data_wait": 0.2})  # which waits for the first batch
    (folder / "metrics.jsonl").write_text(first + "\n")
    assert findings_of(folder)["data wait"].level == "-"


def test_the_picture_the_verdict_and_the_exit_status(tmp_path, capsys):
    good, bad = write_run(tmp_path / "good"), write_run(tmp_path / "bad", WRONG["fall"][1])
    (good / "samples").mkdir()
    for step in (500, 1000):
        Image.new("RGB", (64, 96), (step // 4, 90, 200)).save(good / f"samples/step-{step:08d}.png")
    assert train_main(["report", str(good)]) == 0
    said = capsys.readouterr().out
    assert "verdict: normal" in said and f"picture: {good / 'report.png'}" in said
    with Image.open(good / "report.png") as image:
        width, height = image.size
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    assert width > 1500 and height > 1500
    assert (pixels == (250, 90, 200)).all(1).sum() > 1000  # the second grid is there
    assert report_main([str(bad), str(good), f"output={tmp_path / 'both.png'}"]) == 1
    assert "not normal: fall" in capsys.readouterr().out and (tmp_path / "both.png").is_file()


def test_what_is_no_run_is_refused(tmp_path, capsys):
    assert report_main([str(tmp_path)]) == 2 and "metrics.jsonl" in capsys.readouterr().err
    assert report_main([]) == 2 and "muse-train report RUN" in capsys.readouterr().err


def test_a_run_without_starts_is_still_drawn(tmp_path):
    folder = write_run(tmp_path / "run")
    (folder / "starts.jsonl").unlink()
    (folder / "config.yaml").unlink()
    assert "start" not in findings_of(folder) and report_main([str(folder)]) == 0


def test_smoothing_keeps_ends_and_level():
    assert smooth(np.full(200, 3.0)) == pytest.approx(np.full(200, 3.0))
    line = np.linspace(0, 1, 200)
    assert np.abs(smooth(line) - line).max() < 0.03
    assert smooth(np.arange(5.0)).tolist() == [0, 1, 2, 3, 4]
