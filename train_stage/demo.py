"""muse-demo: the whole project on 70,000 real pictures, in minutes on two CPU cores. Steps 1 to 9.

    muse-demo [guidance_scale=3] [data=FOLDER]         (`make demo` installs first, then runs this)

Runs the public commands one after another, as a user would, and prints each. Everything goes to
runs/demo below the current folder. Interrupted and started again it goes on where it stopped.
(`python -m train_stage.demo` is the same.)
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import harmonic_mean
from typing import Any

from configs.load import load_command_config
from storage.atomic import atomic_file
from storage.reader import TokenStore
from storage.stats import store_sizes
from train_stage.demos.demo_parts import (
    Part,
    Progress,
    find_config,
    finish,
    run_parts,
    show_pictures,
)

RUN = Path("runs/demo")


@dataclass
class DemoConfig:
    """Options of muse-demo."""

    data: str | None = None
    """Folder with Fashion-MNIST's four .gz files; none: Debian's package, else torchvision's."""
    guidance_scale: float | None = None
    """Strength of classifier-free guidance for the generated pictures; none: as in the config."""
    images_per_class: int | None = None
    """Pictures generated for each of the 10 classes; none: as in the config."""
    train_vq: str = ""
    """More arguments for muse-train-vq, such as "training.max_train_steps=100"."""
    tokenize: str = ""
    """More arguments for muse-tokenize."""
    train: str = ""
    """More arguments for muse-train."""
    generate: str = ""
    """More arguments for muse-generate."""
    evaluate: str = ""
    """More arguments for muse-evaluate."""
    open_pictures: bool = True
    """Open the pictures at the end where there is a display."""


def main(argv: list[str] | None = None) -> int:
    """Runs what is not yet done of the demo; returns the exit status."""
    config = load_command_config(DemoConfig, argv, __doc__ or "")
    return finish(lambda: run_demo(config))


def run_demo(config: DemoConfig) -> None:
    """All parts, then what they came to."""
    summary = summarize(run_parts(plan_parts(config), RUN))
    with atomic_file(RUN / "summary.json") as temporary:
        temporary.write_text(json.dumps(summary, indent=1) + "\n")
    print(describe(summary))
    if config.open_pictures:
        show_pictures([RUN / "generated/grid.png", RUN / "evaluation/generated_vs_real.png"])


def plan_parts(config: DemoConfig) -> list[Part]:
    """The commands of the demo, in order, with what each part makes in runs/demo."""
    data = [f"data={config.data}"] if config.data is not None else []
    prepare = ["python", "-m", "train_stage.demos.demo_data", "output_dir=runs/demo/data", *data]
    train_vq = ["muse-train-vq", yaml("train_vq"), *config.train_vq.split()]
    tokenize = ["muse-tokenize", yaml("tokenize"), *config.tokenize.split(), "tasks=2"]
    store = "runs/demo/store"
    given = {"guidance_scale": config.guidance_scale, "images_per_class": config.images_per_class}
    overrides = [f"{key}={value}" for key, value in given.items() if value is not None]
    generate = ["muse-generate", yaml("generate"), *overrides, *config.generate.split()]
    evaluate = ["muse-evaluate", yaml("evaluate"), *config.evaluate.split()]
    return [
        Part("data", [prepare], "data"),
        Part("train_vq", [train_vq], "tokenizer"),
        Part("tokenize", [[*tokenize, "task=0"], [*tokenize, "task=1"]], "store"),
        Part("check", [["muse-store", word, store] for word in ("info", "verify", "stats")]),
        Part("train", [["muse-train", yaml("train"), *config.train.split()]], "train"),
        Part("generate", [generate], "generated", starts_over=True),
        Part("evaluate", [evaluate], "evaluation"),
    ]


def yaml(command: str) -> str:
    """config=… of a command."""
    return find_config(command, "fashion_mnist")


def summarize(progress: Progress) -> dict[str, Any]:
    """What runs/demo/summary.json holds, from what the commands wrote."""
    seconds = {name: round(part["seconds"], 1) for name, part in progress.parts.items()}
    seconds["total"] = round(sum(part["seconds"] for part in progress.parts.values()), 1)
    results = json.loads((RUN / "evaluation/evaluation.json").read_text())
    generated = json.loads((RUN / "generated/generate.json").read_text())
    return {
        "seconds": seconds,
        "generated_accuracy": results["generated_accuracy"],
        "real_accuracy": results["real_accuracy"],
        "guidance_scale": generated["guidance_scale"],
        "feature_distance": results["feature_distance"],
        "feature_distance_real": results["feature_distance_real"],
        "psnr": results["psnr"],
        "images_per_s": images_per_s(progress),
        "bits_per_code": store_sizes(TokenStore(RUN / "store"))["bits_per_code"]["codes"],
    }


def images_per_s(progress: Progress) -> dict[str, float]:
    """Images a second of every stage.

    Training: as its steps were timed. Tokenizing and generating: all images over all seconds of
    the part, the start of the commands counted.
    """
    pictures = len(list((RUN / "generated").glob("*/*.png")))
    done = {"tokenize": len(TokenStore(RUN / "store")), "generate": pictures}
    rates = {name: count / progress.parts[name]["seconds"] for name, count in done.items()}
    for name, run in (("train_vq", RUN / "tokenizer"), ("train", RUN / "train")):
        lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        rates[name] = harmonic_mean(
            line["images_per_s"] for line in lines if "images_per_s" in line
        )
    return {name: round(rates[name], 1) for name in progress.parts if name in rates}


def describe(summary: dict[str, Any]) -> str:
    """The closing words: how good, how fast, where the pictures are."""
    seconds, rates = summary["seconds"], summary["images_per_s"]
    lines = ["", "part         seconds   images/s"]
    for name, value in seconds.items():
        rate = f"{rates[name]:10,.0f}" if name in rates else ""
        lines.append(f"{name:<10} {value:9.1f} {rate}")
    lines += [
        "",
        f"A classifier of real pictures names {summary['generated_accuracy']:.1%} of the generated "
        f"ones rightly (guidance {summary['guidance_scale']}), {summary['real_accuracy']:.1%} of "
        "real test pictures.",
        f"Feature distance to real test pictures: {summary['feature_distance']:.2f}; of as many "
        f"other test pictures: {summary['feature_distance_real']:.2f}.",
        f"Tokenizer: PSNR {summary['psnr']:.1f} dB on test pictures, "
        f"{summary['bits_per_code']:.2f} bits a code on disk.",
        "",
        "Look at:",
        "  runs/demo/generated/grid.png                   a row for each class",
        "  runs/demo/evaluation/generated_vs_real.png     real left, generated right",
        "  runs/demo/evaluation/reconstructions.png       test pictures above their reconstruction",
        "  runs/demo/store/stats.png                      use of the codebook",
        "All numbers: runs/demo/summary.json",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
