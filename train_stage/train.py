"""muse-train: trains the transformer on the codes of a token store (steps 5 to 7).

    muse-train config=configs/train/fashion_mnist.yaml dataset.train_store=runs/demo/store
    accelerate launch -m train_stage.train config=…      (several GPUs or nodes)
    muse-train … --dry-run      (parameters, memory and FLOPs a step, without running it)

The same command starts a run and goes on with it. SIGTERM or SIGUSR1 saves and exits with 75;
what cannot be done is refused with one line and 2.
"""

import sys

from configs.load import load_command_config
from train_stage.config import TrainConfig
from train_stage.training.dry_run import describe
from train_stage.training.loop import train
from train_stage.training.preemption import EXIT_REFUSED, EXIT_SAVED
from train_stage.training.setup_run import set_up


def main(argv: list[str] | None = None) -> int:
    """Trains; returns 0 when finished, 2 when refused, 75 when stopped by a signal after saving."""
    words = sys.argv[1:] if argv is None else argv
    words = ["experiment.dry_run=true" if word == "--dry-run" else word for word in words]
    config = load_command_config(TrainConfig, words, __doc__ or "")
    try:
        if config.experiment.dry_run:
            print(describe(config))
            return 0
        run = set_up(config)
        finished = train(run)
    except (ValueError, FileNotFoundError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_REFUSED
    run.accelerator.end_training()
    return 0 if finished else EXIT_SAVED


if __name__ == "__main__":
    sys.exit(main())
