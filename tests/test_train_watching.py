"""Watching a run: speed against the machine's, waiting for data, validation, trackers."""

import importlib.util
import json
import sys
import time

import pytest
import torch
from store_factory import make_store
from test_train_resume import SMALL, refused, run_to_end

from train_stage.models.sizes import flops_per_token, size_fields
from train_stage.models.transformer import MaskGitTransformer
from train_stage.models.uvit import MaskGiTUViT
from train_stage.objective.mask_schedule import get_mask_schedule
from train_stage.train import main as train_main
from train_stage.training.clock import Clock
from train_stage.training.metrics import forward_flops
from train_stage.training.peak_speed import kind_of, peak_tflops, timed_tflops
from train_stage.training.run_log import CONSOLE, RunLog
from train_stage.training.step_cost import Step, count_step

HAS_TENSORBOARD = importlib.util.find_spec("tensorboard") is not None


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("store"))


def train(store, run, *extra):
    argv = [f"dataset.train_store={store}", f"experiment.output_dir={run}", *SMALL, *extra]
    assert run_to_end(argv) == 0
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("gpu", "kind", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA H200", "tf32", 495),
        ("NVIDIA A100-SXM4-80GB", "fp16", 312),
        ("NVIDIA A10G", "bf16", 70),
        ("NVIDIA L40S", "bf16", 362),
        ("NVIDIA L4", "bf16", 121),
        ("NVIDIA GeForce RTX 4090", "bf16", 165),
        ("Tesla V100-SXM2-16GB", "tf32", 15.7),
        ("Tesla T4", "bf16", None),
        ("AMD Instinct MI300X", "bf16", 1307),
        ("NVIDIA H1000", "bf16", None),
    ],
)
def test_the_peak_of_a_gpu_is_found_by_its_name(gpu, kind, tflops):
    assert peak_tflops(gpu, kind) == tflops


def test_which_units_a_run_uses():
    assert [kind_of("no", True), kind_of("no", False)] == ["tf32", "no"]
    assert [kind_of("bf16", True), kind_of("fp16", False)] == ["bf16", "fp16"]


def test_a_machine_without_a_data_sheet_is_timed_once():
    cpu, started = torch.device("cpu"), time.perf_counter()
    tflops = timed_tflops(cpu, torch.float32)
    assert time.perf_counter() - started < 2 and 1e-4 < tflops < 100
    assert timed_tflops(cpu, torch.float32) is tflops


def test_waiting_is_counted_and_pauses_are_not():
    clock = Clock()
    with clock.waiting():
        time.sleep(0.05)
    with clock.paused():
        time.sleep(0.5)
    assert 0.04 < clock.stalled() <= clock.seconds() < 0.5
    clock.restart()
    assert clock.stalled() == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_busy_gpu_does_not_wait_for_data():
    """The host waits twice as long as the GPU has work: half of that is a stall."""
    cuda = torch.device("cuda")
    clock, before, after = Clock(cuda), *(torch.cuda.Event(enable_timing=True) for _ in "ab")
    torch.cuda._sleep(1000)
    before.record()
    torch.cuda._sleep(10**8)
    after.record()
    with clock.waiting():
        torch.cuda.synchronize()
    busy_s = before.elapsed_time(after) / 1000
    assert clock.waited > 0.5 * busy_s and clock.stalled() < 0.1 * busy_s
    with clock.waiting():
        time.sleep(0.1)
    torch.cuda.synchronize()
    assert clock.stalled() == pytest.approx(0.1, rel=0.3)


def test_mfu_counts_what_a_step_does_and_nothing_twice(store, tmp_path):
    """The same as counting the step itself, whatever is recomputed."""
    recompute = "model.gradient_checkpointing=true"
    line = train(store, tmp_path / "run", recompute)[-1]
    start = json.loads((tmp_path / "run" / "starts.jsonl").read_text())
    model = MaskGitTransformer.from_pretrained(tmp_path / "run" / "model")
    schedule = get_mask_schedule("cosine")((torch.arange(100_000) + 0.5) / 100_000)
    scored = round(16 * (16 * schedule).round().clamp(min=1).mean().item())
    cost = count_step(model, Step(16, 17, scored), "cpu")
    assert start["tflop_a_step"] * 1e12 == pytest.approx(cost.flops, rel=1e-3)
    peak = float(start["mfu_of"].split()[0])
    speed = line["images_per_s"] / 16 * start["tflop_a_step"]
    assert line["mfu"] == pytest.approx(speed / peak, rel=1e-3)
    assert line["tokens_per_s"] == pytest.approx(16 * line["images_per_s"])


def test_the_forward_pass_of_the_u_vit_is_a_third_of_a_step():
    """A third of them, but for attention, whose backward pass computes things again."""
    with torch.device("meta"):
        model = MaskGiTUViT(**size_fields("tiny", "uvit"))
    forward, both = (256 * flops for flops in flops_per_token(model, 256, 150 / 256))
    assert forward_flops(model, 256, 150) == pytest.approx(forward, rel=1e-6)
    assert 0.9 * both < 3 * forward <= both


def test_every_start_is_noted_and_the_first_step_is_logged(store, tmp_path):
    options = ["experiment.log_every=5", "training.max_train_steps=6"]
    lines = train(store, tmp_path / "run", *options)
    assert [line["step"] for line in lines] == [1, 5, 6]
    assert 0 <= lines[-1]["data_wait"] <= 1 and 0.01 < lines[-1]["peak_memory_gb"] < 100
    train(store, tmp_path / "run", *options[:1])
    starts = [json.loads(line) for line in (tmp_path / "run" / "starts.jsonl").open()]
    assert [start["step"] for start in starts] == [0, 6]
    assert starts[0]["outputs"] == 128 and starts[1]["max_train_steps"] == 12
    assert lines[-1]["time"] <= starts[1]["time"] <= time.time()


def test_the_console_says_the_main_numbers(tmp_path, capsys):
    class Nowhere:
        def log(self, values, step):
            pass

    log = RunLog(tmp_path, 0, 10, Nowhere())
    log.write(5, dict.fromkeys(CONSOLE, 0.25) | {"tokens_per_s": 1_234_567.0})
    log.close()
    said = capsys.readouterr().out
    for words in ("step 5/10", "loss 0.2500", "1.23 M tokens/s", "MFU 25.0%", "data wait 25.0%"):
        assert words in said


def test_validation_at_fixed_mask_ratios_and_by_averaged_weights(store, tmp_path):
    options = [f"dataset.eval_store={store}", "experiment.eval_every=4"]
    ratios = "training.eval_mask_ratios=[0.25,1.0]"
    lines = train(store, tmp_path / "still", *options, ratios, "optimizer.params.learning_rate=0.0")
    found = [line for line in lines if "eval_loss" in line]
    names = ("eval_loss", "eval_loss_ratio_0.25", "eval_loss_ratio_1", "eval_accuracy")
    for name in names:
        assert len({line[name] for line in found}) == 1 and len(found) == 3
    assert found[0]["eval_loss_ema"] == found[0]["eval_loss"]
    options = [options[0], "experiment.eval_every=60", "training.max_train_steps=60"]
    learned = train(store, tmp_path / "a", *options, ratios)
    last = [line for line in learned if "eval_loss" in line][-1]
    assert last["eval_loss_ratio_0.25"] < last["eval_loss"] < last["eval_loss_ratio_1"]
    assert last["eval_loss_ema"] != last["eval_loss"]


def test_validation_leaves_training_as_it_is(store, tmp_path):
    plain = train(store, tmp_path / "a")
    options = [f"dataset.eval_store={store}", "experiment.eval_every=4"]
    watched = train(store, tmp_path / "b", *options, "training.eval_mask_ratios=[0.5]")
    losses = [[line["loss"] for line in lines if "loss" in line] for lines in (plain, watched)]
    assert losses[0] == losses[1]


def test_a_mask_ratio_out_of_range_is_refused(store, tmp_path, capfd):
    argv = [f"dataset.train_store={store}", f"experiment.output_dir={tmp_path / 'run'}", *SMALL]
    with pytest.raises(SystemExit):
        train_main([*argv, "training.eval_mask_ratios=[0.5,2]"])
    assert "training.eval_mask_ratios=2.0: legal are 0 to 1" in capfd.readouterr().err


def test_mask_ratios_without_rows_to_validate_on_are_refused(store, tmp_path, capfd):
    argv = [f"dataset.train_store={store}", f"experiment.output_dir={tmp_path / 'run'}", *SMALL]
    assert train_main([*argv, "training.eval_mask_ratios=[0.5]"]) == 2
    assert "eval_mask_ratios need dataset.eval_store" in capfd.readouterr().err


def test_wandb_keeps_its_run_and_gets_the_pictures(store, tmp_path):
    options = ["wandb.mode=offline", "experiment.generate_every=6"]
    train(store, tmp_path / "run", *options, "training.max_train_steps=6")
    first = (tmp_path / "run" / "wandb_id").read_text()
    train(store, tmp_path / "run", *options)
    runs = list((tmp_path / "run" / "wandb").glob("offline-run-*"))
    assert {run.name.rsplit("-", 1)[1] for run in runs} == {first} and len(runs) == 2
    assert all(list(run.glob("files/media/images/samples_*.png")) for run in runs)


def test_tensorboard_that_is_missing_is_named(store, tmp_path, capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    argv = [f"dataset.train_store={store}", f"experiment.output_dir={tmp_path / 'run'}", *SMALL]
    assert "pip install tensorboard" in refused([*argv, "experiment.tensorboard=true"], capfd)


@pytest.mark.skipif(not HAS_TENSORBOARD, reason="needs tensorboard")
def test_tensorboard_goes_on_in_its_folder(store, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = ["experiment.tensorboard=true", "experiment.generate_every=6"]
    train(store, tmp_path / "run", *options, "training.max_train_steps=6")
    train(store, tmp_path / "run", *options)
    folder = tmp_path / "run" / "tensorboard"
    assert all(path.is_file() for path in folder.iterdir())
    events = EventAccumulator(str(folder)).Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(1, 13))
    assert [event.step for event in events.Images("samples")] == [6, 12]
    config = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0]
    assert b"learning_rate" in config
