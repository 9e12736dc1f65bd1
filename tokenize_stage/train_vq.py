"""muse-train-vq: trains a VQ model on images, for where no published tokenizer fits.

    muse-train-vq config=configs/train_vq/fashion_mnist.yaml
    muse-train-vq dataset.shards_path_or_url=photos/ experiment.output_dir=runs/vq ...

Comes before the nine steps: OUTPUT_DIR/model is what muse-tokenize encodes with. Interrupted at
any instant and started again with the same words, it goes on from its last checkpoint and, on a
CPU, ends with the same weights bit for bit. Exit status: 0 done, 2 refused before any work or
diverged, 75 stopped by SIGTERM, SIGUSR1 or Ctrl-C and to be run again.
"""

import json
import os
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from configs.load import dump_config, load_command_config
from storage.atomic import atomic_file
from tokenize_stage.process import EXIT_STOPPED, pick_device, refuse, stop_on_signals
from tokenize_stage.vq_training.config import TrainVQConfig
from tokenize_stage.vq_training.evaluate import evaluate, save_reconstructions
from tokenize_stage.vq_training.images import ImageSet, load_images
from tokenize_stage.vq_training.trainer import VQTrainer

CHECKPOINT, METRICS = "checkpoint.pt", "metrics.jsonl"
PICTURE, MODEL = "reconstructions.png", "model"


def main(argv: list[str] | None = None) -> int:
    """Trains to the last step and writes the model; returns the exit status."""
    config = load_command_config(TrainVQConfig, argv, __doc__ or "")
    run = Path(config.experiment.output_dir)
    with stop_on_signals() as stop:
        try:
            trainer, images, identity = prepare(run, config)
        except (ValueError, OSError) as error:
            return refuse(error)
        try:
            train(run, trainer, images, identity, stop)
        except FloatingPointError as error:
            return refuse(error)
    if trainer.step < config.training.max_train_steps:
        print(f"stopped by a signal after step {trainer.step:,}: run the same command again")
        return EXIT_STOPPED
    trainer.model.save_pretrained(run / MODEL)
    measured = evaluate(trainer.model, images.held_out, config.training.batch_size, trainer.device)
    print(
        f"wrote {run / MODEL}: {quality(measured, trainer)}. Look at {run / PICTURE}, then run\n"
        f"muse-tokenize model.vq_model.pretrained={run / MODEL} ..."
    )
    return 0


def prepare(run: Path, config: TrainVQConfig) -> tuple[VQTrainer, ImageSet, dict[str, Any]]:
    """Reads the images, builds the trainer and puts it where the last checkpoint was.

    Returns, third, the run's identity. Raises ValueError or OSError for what must be refused.
    """
    training, dataset, resolution = config.training, config.dataset, config.model.resolution
    device = pick_device("training.device", training.device, os.environ)
    images = load_images(
        dataset.shards_path_or_url,
        resolution,
        dataset.max_images,
        dataset.held_out_images,
        training.seed,
    )
    print(f"{len(images.train):,} images to train on, {len(images.held_out):,} held out")
    for reason, count in images.left_out.most_common():
        print(f"left out {count:,}: {reason}")
    trainer = VQTrainer(config, images.train, device)
    identity = run_identity(config, images)
    run.mkdir(parents=True, exist_ok=True)
    resume(run, trainer, identity)
    with atomic_file(run / "config.yaml") as temporary:
        temporary.write_text(dump_config(config))
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    print(
        f"steps {trainer.step:,} to {training.max_train_steps:,} of {training.batch_size} images "
        f"on {device}: {parameters / 1e6:.2f} M parameters, {trainer.model.codebook_size} codes, "
        f"grid {trainer.model.grid(resolution)}; writing to {run}"
    )
    return trainer, images, identity


def run_identity(config: TrainVQConfig, images: ImageSet) -> dict[str, Any]:
    """What decides the result: a checkpoint is gone on from only where all of it is the same."""
    sections = asdict(config)
    sections.pop("experiment")
    sections["training"].pop("device")
    sections["dataset"]["shards_path_or_url"] = images.fingerprint  # the images, wherever they lie
    return {f"{name}.{key}": value for name in sections for key, value in sections[name].items()}


def resume(run: Path, trainer: VQTrainer, identity: dict[str, Any]) -> None:
    """Puts the trainer where the run's checkpoint is, and drops the metrics of later steps.

    Raises ValueError, naming the keys, for a checkpoint of another configuration or other images.
    """
    if (run / CHECKPOINT).is_file():
        saved = torch.load(run / CHECKPOINT, map_location="cpu", weights_only=True)
        before = saved["identity"]
        differing = [key for key in identity if before.get(key) != identity[key]]
        if differing:
            changes = ", ".join(f"{k} {before.get(k)} -> {identity[k]}" for k in differing)
            raise ValueError(
                f"{run / CHECKPOINT} is of another run: {changes}; "
                "change it back, or choose another experiment.output_dir"
            )
        trainer.load_state_dict(saved["trainer"])
    kept = []
    if (run / METRICS).is_file():
        lines = (run / METRICS).read_text().splitlines(keepends=True)
        whole = [line for line in lines if line.endswith("\n")]
        kept = [line for line in whole if json.loads(line)["step"] <= trainer.step]
    with atomic_file(run / METRICS) as temporary:
        temporary.write_text("".join(kept))


def train(
    run: Path,
    trainer: VQTrainer,
    images: ImageSet,
    identity: dict[str, Any],
    stop: threading.Event,
) -> None:
    """Runs to the last step or until `stop` is set, and leaves a checkpoint of where it ended.

    Raises FloatingPointError, and writes nothing more, once training has diverged.
    """
    every, training = trainer.config.experiment, trainer.config.training
    last, batch_size = training.max_train_steps, training.batch_size
    seconds = 0.0
    with progress_bar(trainer) as bar, open(run / METRICS, "a", buffering=1) as metrics:
        while trainer.step < last:
            started = time.perf_counter()
            trainer.train_step()
            step, is_last, is_stopping = trainer.step, trainer.step == last, stop.is_set()
            is_log = step % every.log_every == 0 or is_last
            is_eval = step % every.eval_every == 0 or is_last
            is_save = step % every.save_every == 0 or is_last or is_stopping
            if is_log or is_eval or is_save:
                trainer.check_finite()
            seconds += time.perf_counter() - started
            if is_log:
                rate = trainer.steps_in_totals * batch_size / seconds
                values = trainer.pop_metrics() | {"images_per_s": rate}
                metrics.write(json.dumps({"step": step, "split": "train", **values}) + "\n")
                bar.set_postfix(psnr=f"{values['psnr']:.2f}", refresh=False)
                seconds = 0.0
            if is_eval:
                values = evaluate(trainer.model, images.held_out, batch_size, trainer.device)
                trainer.check_finite(values["psnr"])
                metrics.write(json.dumps({"step": step, "split": "held_out", **values}) + "\n")
                save_reconstructions(trainer.model, images.held_out, run / PICTURE, trainer.device)
                bar.write(f"step {step:,} of {last:,}: {quality(values, trainer)}")
            bar.update(batch_size)
            if is_save:
                with atomic_file(run / CHECKPOINT) as temporary:
                    torch.save({"trainer": trainer.state_dict(), "identity": identity}, temporary)
            if is_stopping:
                return


def progress_bar(trainer: VQTrainer) -> tqdm:
    """Counts images from where the trainer is; a log file gets a line every 30 s."""
    training = trainer.config.training
    return tqdm(
        total=training.max_train_steps * training.batch_size,
        initial=trainer.step * training.batch_size,
        desc="train",
        unit=" images",
        mininterval=0.1 if sys.stderr.isatty() else 30,
    )


def quality(measured: dict[str, float], trainer: VQTrainer) -> str:
    """What `evaluate` found, in words."""
    return (
        f"PSNR {measured['psnr']:.2f} dB on held-out images, {measured['codes_used']} of "
        f"{trainer.model.codebook_size} codes used (perplexity {measured['perplexity']:.0f})"
    )


if __name__ == "__main__":
    sys.exit(main())
