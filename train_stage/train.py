"""muse-train: trains the transformer on the codes of a token store (steps 5 to 7).

    muse-train config=configs/train/fashion_mnist.yaml dataset.train_store=runs/demo/store
    accelerate launch -m train_stage.train config=…      (several GPUs or nodes)
    muse-train … --dry-run      (parameters, memory and FLOPs a step, without running it)
    muse-train report RUN       (its curves as a picture, and whether they are normal)
    muse-train average run=RUN  (one model from several checkpoints)

The same command starts a run and goes on with it. Exit status: 0 finished; 2 refused, with one
line; 75 stopped by SIGTERM or SIGUSR1, to be run again: a checkpoint is written, unless the first
step had not begun; 76 replaced by a newer process that trains in the same run directory.
"""

import sys
from importlib import import_module

from train_stage.training.preemption import EXIT_REFUSED, EXIT_REPLACED, EXIT_SAVED, SIGNAL

COMMANDS = {"report": "train_stage.report", "average": "train_stage.average"}


def main(argv: list[str] | None = None) -> int:
    """Trains; returns the exit status."""
    words = sys.argv[1:] if argv is None else argv
    if words and words[0] in COMMANDS:
        return import_module(COMMANDS[words[0]]).main(words[1:])
    SIGNAL.listen()  # before the imports, which take seconds
    from configs.load import load_command_config
    from train_stage.config import TrainConfig
    from train_stage.training.dry_run import describe
    from train_stage.training.loop import train
    from train_stage.training.run_token import Replaced
    from train_stage.training.setup_run import set_up

    words = ["experiment.dry_run=true" if word == "--dry-run" else word for word in words]
    config = load_command_config(TrainConfig, words, __doc__ or "")
    try:
        if config.experiment.dry_run:
            print(describe(config))
            return 0
        run = set_up(config)
        finished = train(run)
    except (ValueError, OSError, MemoryError, FloatingPointError, Replaced) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_REPLACED if isinstance(error, Replaced) else EXIT_REFUSED
    except RuntimeError as error:
        if not SIGNAL.received:
            raise
        print(f"signal, and then: {error}", file=sys.stderr)  # other processes have left already
        return EXIT_SAVED
    run.accelerator.end_training()
    return 0 if finished else EXIT_SAVED


if __name__ == "__main__":
    sys.exit(main())
