"""Stage two beside other ways and the machine's limits, in tables: loader, models, loss, training.

    python -m train_stage.bench [loader] [models] [loss] [training] [--device cuda] [--compile]
    python -m train_stage.bench training --reference open-muse     # a checkout of that repository

Without names all parts are run. Ways are timed in turns in one process or, where memory is told,
in processes of their own. loader: rows a second beside other loaders (pip install -e '.[bench]').
models: forward, training step and sampling beside diffusers. loss: logits of all codes, or of those
that count. training: from the store beside encoding in the loop, beside the reference's step, MFU.
"""

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from train_stage.benchmarks.bench_loader import bench_loader
from train_stage.benchmarks.bench_loss import bench_loss
from train_stage.benchmarks.bench_models import bench_models
from train_stage.benchmarks.bench_training import bench_training
from train_stage.training.devices import pick_device

PARTS: Mapping[str, Callable[[argparse.Namespace], None]] = {
    "loader": bench_loader,
    "models": bench_models,
    "loss": bench_loss,
    "training": bench_training,
}


def main(arguments: list[str] | None = None) -> int:
    """Runs the parts, each printing its tables; returns 2 for options that cannot be followed."""
    options = parse(arguments)
    try:
        for name in options.parts or PARTS:
            PARTS[name](options)
            print(flush=True)
    except (ValueError, FileNotFoundError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m train_stage.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    add("--only", nargs="+", default=[], metavar="WORD", help="ways or tables so named")
    add("--device", default="auto", help="of all parts but loader: auto, cpu, cuda")
    add(
        "--dtype",
        default="float32",
        choices=["float32", "bfloat16", "float16"],
        help="of products; in training by autocast",
    )
    add("--compile", action="store_true", help="time torch.compile, too")
    add("--batch", type=int, help="images of a training step; 4, loss: 8, training on a GPU: 64")
    add("--images", type=int, default=1, help="models: images of a forward or sampling call")
    add("--rounds", type=int, default=3, help="timed, after one that is not")
    add("--size", help="training: of the models, instead of each table's own; models/sizes.py")
    add("--reference", type=Path, metavar="FOLDER", help="training: a checkout of open-muse")
    add("--rows", type=int, default=500_000, help="loader: of the set")
    add("--seconds", type=float, default=1.0, help="loader: of each of 3 repetitions")
    add("--json", type=Path, metavar="FILE", help="loader: write every number there too")
    options = parser.parse_args(arguments)
    for name in options.parts:
        if name not in PARTS:
            parser.error(f"no part {name!r}; there are {', '.join(PARTS)}")
    try:
        pick_device(options.device)
    except ValueError as error:
        parser.error(str(error))
    options.torch_dtype = getattr(torch, options.dtype)
    return options


if __name__ == "__main__":
    sys.exit(main())
