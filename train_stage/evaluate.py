"""muse-evaluate: how good generated pictures are, and how good the tokenizer is. Step 9, judged.

    muse-evaluate config=configs/evaluate/fashion_mnist.yaml generated=FOLDER output_dir=FOLDER
    muse-evaluate captions …      (pictures for prompts: see evaluate_captions.py)

A classifier trained on real pictures (evaluation/classifier.py) is asked about generated ones
(sub-folders named by class id, as muse-generate writes them). n of these and n real test pictures
are each held against the same n other test pictures: what real pictures reach is the best value.
Writes OUTPUT_DIR/evaluation.json, generated_vs_real.png and, given a tokenizer,
reconstructions.png.
(`python -m train_stage.evaluate` is the same.) n pictures, C classes, D features.
"""

import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import MISSING

from configs.load import load_command_config
from storage.atomic import atomic_file
from storage.fingerprint import fingerprint
from train_stage.evaluate_captions import main as evaluate_captions
from train_stage.evaluation.classifier import (
    PictureClassifier,
    classify,
    frechet_distance,
    mean_pairwise_distance,
    train_classifier,
)
from train_stage.pictures import (
    VQModel,
    decode_codes,
    encode_pictures,
    load_vq,
    read_pictures,
    save_grid,
)
from train_stage.training.devices import pick_device

Pictures = tuple[torch.Tensor, torch.Tensor]  # (n, 3, R, R) uint8, class ids (n,) int64


@dataclass
class EvaluateConfig:
    """Options of muse-evaluate."""

    generated: str = MISSING
    """Folder of generated pictures, in sub-folders named by class id, as muse-generate writes."""
    train: str = MISSING
    """Real pictures that train the classifier: class folders or webdataset tars."""
    test: str = MISSING
    """Real pictures held out from all training: class folders or webdataset tars."""
    output_dir: str = MISSING
    """Where evaluation.json, the pictures and the trained classifier go."""
    vq_model: str | None = None
    """Tokenizer whose PSNR on the test pictures is measured; none: not measured."""
    train_limit: int = 40_000
    """At most so many real pictures train the classifier."""
    test_limit: int | None = None
    """At most so many test pictures are looked at; none: all."""
    epochs: int = 4
    """Passes over the classifier's training pictures."""
    batch_size: int = 64
    """Pictures a step of the classifier's training."""
    learning_rate: float = 3e-3
    """Highest learning rate of the classifier's training."""
    seed: int = 0
    """Seeds the classifier's training and the choice of real pictures compared."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, cuda:1."""


def main(argv: list[str] | None = None) -> int:
    """Runs muse-evaluate; returns the exit status (0 good, 2 unusable input)."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["captions"]:
        return evaluate_captions(argv[1:])
    config = load_command_config(EvaluateConfig, argv, __doc__ or "")
    try:
        results = evaluate(config)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(describe(results))
    print(f"written: {config.output_dir}/evaluation.json and the pictures beside it")
    return 0


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Measures what EvaluateConfig names, writes it into output_dir and returns it."""
    device = pick_device(config.device)
    vq = load_vq(config.vq_model, device) if config.vq_model is not None else None
    output = Path(config.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    generated = read_generated(config.generated)
    resolution = generated[0].shape[-1]
    train = read_pictures(config.train, resolution, config.train_limit)[:2]
    test_pictures, test_ids, names = read_pictures(config.test, resolution, config.test_limit)
    test = test_pictures, test_ids
    _check_classes(train[1], test[1], generated[1], names)
    classifier = load_or_train(config, *train, len(names), device)
    generator = torch.Generator().manual_seed(config.seed)
    results = compare(classifier, generated, test, names, generator)
    draw_comparison(output / "generated_vs_real.png", generated, test, names)
    drawing = output / "reconstructions.png"
    results["psnr"] = tokenizer_psnr(vq, test[0], drawing) if vq is not None else None
    with atomic_file(output / "evaluation.json") as temporary:
        temporary.write_text(json.dumps(results, indent=1) + "\n")
    return results


def read_generated(path: str) -> Pictures:
    """Pictures in sub-folders named by class id, whatever classes are there."""
    pictures, positions, names = read_pictures(path)
    if not all(name.isdecimal() for name in names):
        raise ValueError(
            f"{path} has the folders {', '.join(names)}: generated pictures lie in folders "
            "named by class id (0, 1, …), as muse-generate writes them"
        )
    return pictures, torch.tensor([int(name) for name in names])[positions]


def load_or_train(
    config: EvaluateConfig,
    pictures: torch.Tensor,
    class_ids: torch.Tensor,
    num_classes: int,
    device: torch.device,
) -> PictureClassifier:
    """The classifier trained on exactly these pictures in this way; output_dir keeps it."""
    digest = hashlib.sha256(pictures.numpy().data)
    digest.update(class_ids.numpy().data)
    way = [config.epochs, config.batch_size, config.learning_rate, config.seed, num_classes]
    name = f"classifier-{fingerprint([digest.hexdigest(), *way])[:12]}"
    folder = Path(config.output_dir) / name
    if not folder.is_dir():
        train_classifier(
            pictures,
            class_ids,
            num_classes,
            torch.Generator().manual_seed(config.seed),
            config.epochs,
            config.batch_size,
            config.learning_rate,
            device,
        ).save_pretrained(folder)
    return PictureClassifier.from_pretrained(folder).to(device)


def compare(
    classifier: PictureClassifier,
    generated: Pictures,
    test: Pictures,
    names: list[str],
    generator: torch.Generator,
) -> dict[str, Any]:
    """Accuracies, feature distances and diversity, over all and by class.

    Distances and diversity: of every class the same number of generated pictures, of test
    pictures, and of other test pictures to which both are compared. feature_distance_real is
    thus what as many real pictures reach.
    """
    counts = _common_counts(generated[1], test[1], len(names))
    (made_rows,) = disjoint_rows(generated[1], counts, 1, generator)
    reference_rows, real_rows = disjoint_rows(test[1], counts, 2, generator)
    guessed, features = classify(classifier, generated[0])
    test_guessed, test_features = classify(classifier, test[0])
    reference = test_features[reference_rows]
    by_class = {}
    for class_id in generated[1].unique().tolist():
        made, real = generated[1] == class_id, test[1] == class_id
        by_class[names[class_id]] = {
            "generated_accuracy": _share(guessed[made] == class_id),
            "real_accuracy": _share(test_guessed[real] == class_id),
            "diversity": mean_pairwise_distance(features[made_rows][made[made_rows]]),
            "diversity_real": mean_pairwise_distance(test_features[real_rows][real[real_rows]]),
        }
    return {
        "generated_accuracy": _share(guessed == generated[1]),
        "real_accuracy": _share(test_guessed == test[1]),
        "feature_distance": frechet_distance(features[made_rows], reference),
        "feature_distance_real": frechet_distance(test_features[real_rows], reference),
        "diversity": _mean(by_class, "diversity"),
        "diversity_real": _mean(by_class, "diversity_real"),
        "pictures_generated": len(guessed),
        "pictures_compared": int(counts.sum()),
        "classes": by_class,
    }


def disjoint_rows(
    class_ids: torch.Tensor, counts: torch.Tensor, sets: int, generator: torch.Generator
) -> list[torch.Tensor]:
    """Random rows for `sets` sets without a common row, each with counts[c] of class c."""
    order = torch.randperm(len(class_ids), generator=generator)
    parts = [
        order[class_ids[order] == class_id][: sets * count].view(sets, count)
        for class_id, count in enumerate(counts.tolist())
    ]
    return list(torch.cat(parts, 1))  # each (sum of counts,)


def tokenizer_psnr(vq: VQModel, pictures: torch.Tensor, drawing: Path, limit: int = 2000) -> float:
    """PSNR in dB of decode(encode(pictures)) as written to files: 10 log10(255^2 / mean error^2).

    Draws 20 pictures, each above its reconstruction. Evenly spaced pictures, at most `limit`.
    """
    pictures = pictures[:: -(-len(pictures) // limit)]
    decoded = decode_codes(vq, encode_pictures(vq, pictures))
    error = (decoded.double() - pictures.double()).square().mean()
    shown = torch.linspace(0, len(pictures) - 1, min(20, len(pictures))).long()
    rows = [half for part in shown.split(10) for half in (pictures[part], decoded[part])]
    save_grid(torch.cat(rows), drawing, min(10, len(shown)))
    return float(10 * torch.log10(255**2 / error))


def draw_comparison(
    path: Path, generated: Pictures, test: Pictures, names: list[str], each: int = 8
) -> None:
    """A row for each class (the first 20): `each` real pictures, then `each` generated ones."""
    class_ids = generated[1].unique()[:20].tolist()
    each = min(each, *(int((ids == c).sum()) for _, ids in (generated, test) for c in class_ids))
    rows = [pictures[ids == c][:each] for c in class_ids for pictures, ids in (test, generated)]
    save_grid(torch.cat(rows), path, 2 * each, [names[class_id] for class_id in class_ids])


def describe(results: dict[str, Any]) -> str:
    """The results as a table: one line a class, then the totals and what they mean."""
    width = max(len(name) for name in [*results["classes"], "all"])
    head = f"{'class':<{width}}  accuracy generated / real   diversity generated / real"
    lines = [head]
    for name, row in [*results["classes"].items(), ("all", results)]:
        accuracy = f"{row['generated_accuracy']:>18.1%} /{row['real_accuracy']:6.1%}"
        diversity = f"{row['diversity']:>18.2f} / {row['diversity_real']:.2f}"
        lines.append(f"{name:<{width}}  {accuracy}  {diversity}")
    count = results["pictures_compared"]
    lines.append(
        f"feature distance to {count:,} test pictures: {results['feature_distance']:.3f} of "
        f"{count:,} generated, {results['feature_distance_real']:.3f} of {count:,} other test "
        "pictures (Frechet, of this classifier's features; not FID)"
    )
    if results["psnr"] is not None:
        lines.append(f"tokenizer: PSNR {results['psnr']:.2f} dB on test pictures")
    return "\n".join(lines)


def _check_classes(
    train: torch.Tensor, test: torch.Tensor, generated: torch.Tensor, names: list[str]
) -> None:
    missing = sorted(set(test.tolist()) - set(train.tolist()))
    if missing or int(train.max()) >= len(names):
        raise ValueError(
            f"train and test have different classes: test has {len(names)}, train ids up to "
            f"{int(train.max())} and none of {missing}; raise train_limit or check the paths"
        )
    if int(generated.max()) >= len(names):
        raise ValueError(
            f"generated has class {int(generated.max())}, the real pictures only 0 to "
            f"{len(names) - 1} ({', '.join(names[:10])})"
        )


def _common_counts(generated: torch.Tensor, test: torch.Tensor, num_classes: int) -> torch.Tensor:
    """How many of every class, (C,): generated ones, and twice as many test pictures."""
    made, real = (torch.bincount(ids, minlength=num_classes) for ids in (generated, test))
    counts = torch.minimum(made, real // 2)
    for class_id in generated.unique().tolist():
        if counts[class_id] < 2:
            raise ValueError(
                f"class {class_id} has {int(made[class_id])} generated and {int(real[class_id])} "
                "test pictures; at least 2 and 4 are needed"
            )
    return counts


def _share(hits: torch.Tensor) -> float:
    return float(hits.double().mean())


def _mean(by_class: dict[str, dict[str, float]], key: str) -> float:
    return sum(row[key] for row in by_class.values()) / len(by_class)


if __name__ == "__main__":
    sys.exit(main())
