"""muse-evaluate captions: do generated pictures show what was asked for? Step 9, judged.

    muse-evaluate captions config=configs/evaluate/emoji.yaml text_encoder=FOLDER

A judge (evaluation/caption_judge.py) is trained on real pictures and their captions, then finds the
captions of generated pictures among all of train and test. Chance, and real pictures held out from
its training, say what the numbers mean. It is no CLIP score. Prompts that are captions of train are
"seen", those of test alone "held out". Captions like "subject, style" are judged by part, too.
Writes OUTPUT_DIR/captions.json and captions.png. (`python -m train_stage.evaluate_captions`.)
"""

import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import MISSING
from torch import Tensor

from configs.load import load_command_config
from storage.atomic import write_json
from storage.fingerprint import fingerprint
from train_stage.evaluation.caption_judge import (
    CaptionJudge,
    find_captions,
    sentence_vectors,
    train_judge,
)
from train_stage.pictures import read_captioned, read_pictures, save_grid
from train_stage.training.devices import pick_device

SHOWN = 12  # rows of captions.png


@dataclass
class CaptionsConfig:
    """Options of muse-evaluate captions."""

    generated: str = MISSING
    """Folder that muse-generate wrote, for prompts."""
    train: str = MISSING
    """Real pictures with captions (webdataset tars) that train the judge."""
    test: str = MISSING
    """Real pictures with captions held out from all training."""
    text_encoder: str = MISSING
    """A text encoder of transformers, folder or hub name, whose sentence vectors are compared."""
    output_dir: str = MISSING
    """Where captions.json, captions.png and the judge go."""
    epochs: int = 12
    """Passes over the judge's training pictures."""
    batch_size: int = 64
    """Pictures a step of the judge's training."""
    learning_rate: float = 3e-3
    """Highest learning rate of the judge's training."""
    width: int = 32
    """Channels of the judge's first convolution."""
    seed: int = 0
    """Seeds the judge's training."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, cuda:1."""


def main(argv: list[str] | None = None) -> int:
    """Runs muse-evaluate captions; returns the exit status (0 good, 2 unusable input)."""
    config = load_command_config(CaptionsConfig, argv, __doc__ or "")
    try:
        results = evaluate_captions(config)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(describe(results))
    print(f"written: {config.output_dir}/captions.json, captions.png")
    return 0


def evaluate_captions(config: CaptionsConfig) -> dict[str, Any]:
    """Measures what CaptionsConfig names, writes it into output_dir and returns it."""
    device, output = pick_device(config.device), Path(config.output_dir)
    generated, prompts = read_generated(Path(config.generated))
    resolution = generated.shape[-1]
    train, train_captions = read_captioned(config.train, resolution)
    test, test_captions = read_captioned(config.test, resolution)
    captions = list(dict.fromkeys([*train_captions, *test_captions, *prompts]))
    number = {caption: index for index, caption in enumerate(captions)}
    sentences = sentence_vectors(config.text_encoder, captions, device)
    known = len(set(train_captions))  # they come first
    targets = torch.tensor([number[caption] for caption in train_captions])
    judge = load_or_train(config, train, targets, sentences[:known], device)
    seen, held_out = set(train_captions), set(test_captions) - set(train_captions)
    groups = {
        "real, held out": (test, test_captions),
        "generated, seen": choose(generated, prompts, seen),
        "generated, held out": choose(generated, prompts, held_out),
        "generated, other": choose(generated, prompts, set(prompts) - seen - held_out),
    }
    results: dict[str, Any] = {"captions": len(captions), "chance": chance(captions)}
    for name, (pictures, asked) in groups.items():
        if asked:
            found = find_captions(judge, pictures, sentences)
            results[name] = score([[captions[i] for i in row] for row in found.tolist()], asked)
    draw_held_out(output / "captions.png", groups, (test, test_captions))
    write_json(output / "captions.json", results)
    return results


def read_generated(folder: Path) -> tuple[Tensor, list[str]]:
    """Pictures (n, 3, R, R) uint8 of muse-generate's folder, and the prompt of each."""
    settings = folder / "generate.json"
    prompts = json.loads(settings.read_text())["prompts"] if settings.is_file() else []
    if not prompts:
        raise ValueError(f"{folder} holds no pictures for prompts, as muse-generate writes them")
    pictures, positions, names = read_pictures(folder)
    return pictures, [prompts[int(names[position])] for position in positions]


def load_or_train(
    config: CaptionsConfig,
    pictures: Tensor,
    targets: Tensor,
    sentences: Tensor,
    device: torch.device,
) -> CaptionJudge:
    """The judge trained on exactly these pictures and captions in this way; output_dir keeps it."""
    digest = hashlib.sha256(pictures.numpy().data)
    digest.update(targets.numpy().data)
    digest.update(sentences.numpy().data)
    way = [config.epochs, config.batch_size, config.learning_rate, config.width, config.seed]
    name = f"judge-{fingerprint([digest.hexdigest(), *way])[:12]}"
    folder = Path(config.output_dir) / name
    if not folder.is_dir():
        train_judge(
            pictures,
            targets,
            sentences,
            torch.Generator().manual_seed(config.seed),
            config.epochs,
            config.batch_size,
            config.learning_rate,
            config.width,
            device,
        ).save_pretrained(folder)
    return CaptionJudge.from_pretrained(folder).to(device)


def choose(pictures: Tensor, captions: list[str], wanted: set[str]) -> tuple[Tensor, list[str]]:
    """Those whose caption is wanted."""
    rows = [row for row, caption in enumerate(captions) if caption in wanted]
    return pictures[rows], [captions[row] for row in rows]


def parts(caption: str) -> tuple[str, str]:
    """ "red apple, noto style" -> subject and style; without a comma all is subject."""
    subject, _, style = caption.rpartition(", ")
    return (subject, style) if subject else (caption, "")


def score(found: list[list[str]], asked: list[str]) -> dict[str, float]:
    """Shares of pictures whose caption comes first, or among the first five; and its parts."""
    count = len(asked)
    pairs = list(zip(found, asked, strict=True))
    firsts = [(parts(captions[0]), parts(wanted)) for captions, wanted in pairs]
    return {
        "pictures": count,
        "top1": sum(captions[0] == wanted for captions, wanted in pairs) / count,
        "top5": sum(wanted in captions[:5] for captions, wanted in pairs) / count,
        "subject": sum(one[0] == other[0] for one, other in firsts) / count,
        "style": sum(one[1] == other[1] for one, other in firsts) / count,
    }


def chance(captions: list[str]) -> dict[str, float]:
    """What picking a caption blindly would reach."""
    count = len(captions)
    subjects, styles = (
        {name: sum(part[side] == name for part in map(parts, captions)) for name in names}
        for side, names in enumerate(map(set, zip(*map(parts, captions), strict=True)))
    )
    return {
        "top1": 1 / count,
        "top5": min(1.0, 5 / count),
        "subject": sum((n / count) ** 2 for n in subjects.values()),
        "style": sum((n / count) ** 2 for n in styles.values()),
    }


def draw_held_out(path: Path, groups: dict[str, Any], test: tuple[Tensor, list[str]]) -> None:
    """A row for each of some prompts, held-out ones if any: the real picture, then generated."""
    pictures, asked = groups["generated, held out"]
    if not asked:
        pictures, asked = groups["generated, seen"]
    real = dict(zip(test[1], test[0], strict=True))
    prompts = list(dict.fromkeys(asked))[:SHOWN]
    each = min((asked.count(prompt) for prompt in prompts), default=0)
    rows = []
    for prompt in prompts:
        made = [pictures[row] for row, caption in enumerate(asked) if caption == prompt][:each]
        rows += [real.get(prompt, torch.full_like(made[0], 255)), *made]
    if rows:
        save_grid(torch.stack(rows), path, each + 1, prompts)


def describe(results: dict[str, Any]) -> str:
    """The results as a table."""
    columns = ("top1", "top5", "subject", "style")
    lines = [
        f"Which of {results['captions']:,} captions a judge of real pictures finds nearest "
        "(not CLIP):",
        f"{'':<22}{'pictures':>9}" + "".join(f"{name:>10}" for name in columns),
    ]
    for name, row in results.items():
        if isinstance(row, dict):
            shares = "".join(f"{row[column]:>10.2%}" for column in columns)
            lines.append(f"{name:<22}{row.get('pictures', ''):>9}{shares}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
