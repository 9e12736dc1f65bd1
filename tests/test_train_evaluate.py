"""The judge of generated pictures: classifier, Frechet distance, and muse-evaluate on drawings."""

import json
from pathlib import Path

import pytest
import torch

from tokenize_stage.vq.maskgit_vqgan import MaskGitVQGAN
from train_stage.evaluate import EvaluateConfig, compare, disjoint_rows, evaluate, main
from train_stage.evaluation.classifier import (
    PictureClassifier,
    classify,
    frechet_distance,
    gaussian_frechet_distance,
    mean_pairwise_distance,
    train_classifier,
)
from train_stage.pictures import save_pictures

CLASSES = ["corner", "bar", "blank"]
SETS = [("train", 100, 1), ("test", 60, 2)]  # name, pictures of each class, seed


def draw(class_id: int, count: int, generator: torch.Generator) -> torch.Tensor:
    """Noisy 16x16 pictures: a bright corner, a bright bar, or nothing but noise."""
    pictures = torch.randint(120, (count, 3, 16, 16), generator=generator, dtype=torch.uint8)
    if class_id == 0:
        pictures[:, :, :8, :8] += 120
    if class_id == 1:
        pictures[:, :, 6:10] += 120
    return pictures


def draw_set(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    pictures = torch.cat([draw(class_id, count, generator) for class_id in range(3)])
    return pictures, torch.arange(3).repeat_interleave(count)


def save_set(folder: Path, pictures: torch.Tensor, class_ids: torch.Tensor, names) -> str:
    files = [f"{names[class_id]}/{index:04d}.png" for index, class_id in enumerate(class_ids)]
    save_pictures(pictures, folder, files)
    return str(folder)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("real")
    names = [f"{index}-{name}" for index, name in enumerate(CLASSES)]
    paths = {name: save_set(folder / name, *draw_set(n, s), names) for name, n, s in SETS}
    return paths | {"output_dir": str(folder / "evaluation")}


def run(real: dict[str, str], generated: str, **options) -> dict:
    options = {"epochs": 3, "batch_size": 20, "device": "cpu", **options}
    config = EvaluateConfig(generated=generated, **real, **options)
    return evaluate(config)


def random_covariance(dims: int, rank: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(dims, rank, generator=generator, dtype=torch.float64)
    return factor @ factor.T


def test_frechet_distance_of_independent_dimensions_is_the_textbook_sum() -> None:
    mean_a, mean_b = torch.tensor([[1.0, 2.0, 3.0], [0.0, 2.0, 5.0]], dtype=torch.float64)
    var_a, var_b = torch.tensor([[1.0, 4.0, 0.0], [9.0, 4.0, 0.25]], dtype=torch.float64)
    expected = (1 + 4) + (2**2 + 0 + 0.5**2)
    found = gaussian_frechet_distance(mean_a, var_a.diag(), mean_b, var_b.diag())
    assert found == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("rank", [12, 5])  # 5: covariances of fewer pictures than features
def test_frechet_distance_agrees_with_eigenvalues_of_the_plain_product(rank: int) -> None:
    cov_a, cov_b = random_covariance(12, rank, 1), random_covariance(12, rank, 2)
    roots = torch.linalg.eigvals(cov_a @ cov_b).real.clamp(min=0).sqrt().sum()
    expected = float(cov_a.trace() + cov_b.trace() - 2 * roots)
    mean = torch.zeros(12, dtype=torch.float64)
    found = gaussian_frechet_distance(mean, cov_a, mean, cov_b)
    assert found == pytest.approx(expected, rel=1e-4)
    assert gaussian_frechet_distance(mean, cov_a, mean, cov_a) == pytest.approx(0, abs=1e-5)


def test_frechet_distance_of_samples_sees_a_shift_and_lost_variety() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 4000, 6, generator=generator, dtype=torch.float64)
    assert frechet_distance(a, b) < 0.02
    assert frechet_distance(a, b + 1) == pytest.approx(6, rel=0.05)
    assert frechet_distance(a, b / 2) == pytest.approx(6 / 4, rel=0.05)


def test_mean_pairwise_distance_counts_pairs_of_different_rows_only() -> None:
    features = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 0.0]], dtype=torch.float64)
    assert mean_pairwise_distance(features) == pytest.approx(10 / 3)


def test_the_classifier_learns_and_depends_on_its_generator_alone(tmp_path: Path) -> None:
    pictures, class_ids = draw_set(100, seed=1)
    models = []
    for global_seed in (0, 1):
        torch.manual_seed(global_seed)
        generator = torch.Generator().manual_seed(7)
        models.append(train_classifier(pictures, class_ids, 3, generator, 3, 20))
    test_pictures, test_ids = draw_set(40, seed=2)
    guessed, features = classify(models[0], test_pictures, batch_size=50)
    assert (guessed == test_ids).double().mean() > 0.95
    assert features.shape == (120, 64) and features.dtype == torch.float64
    for first, second in zip(*(model.state_dict().values() for model in models), strict=True):
        assert torch.equal(first, second)
    models[0].save_pretrained(tmp_path / "classifier")
    loaded = PictureClassifier.from_pretrained(tmp_path / "classifier")
    assert torch.equal(classify(loaded, test_pictures)[0], guessed)


def test_evaluate_tells_good_wrong_and_monotonous_pictures_apart(real, tmp_path: Path) -> None:
    pictures, class_ids = draw_set(30, seed=3)
    first_of_class = pictures[[0, 30, 60]].repeat_interleave(30, 0)
    good = run(real, save_set(tmp_path / "good", pictures, class_ids, "012"))
    wrong = run(real, save_set(tmp_path / "wrong", pictures, class_ids, "120"))
    same = run(real, save_set(tmp_path / "same", first_of_class, class_ids, "012"))
    assert good["real_accuracy"] > 0.95 and good["generated_accuracy"] > 0.95
    assert wrong["generated_accuracy"] < 0.05 and same["generated_accuracy"] > 0.95
    assert good["feature_distance"] < 3 * good["feature_distance_real"]
    assert same["feature_distance"] > 5 * good["feature_distance"]
    assert good["diversity"] == pytest.approx(good["diversity_real"], rel=0.2)
    assert same["diversity"] == pytest.approx(0, abs=1e-6)
    assert list(good["classes"]) == ["0-corner", "1-bar", "2-blank"]
    assert good["pictures_generated"] == good["pictures_compared"] == 90


def test_sets_of_rows_have_each_class_in_number_and_no_row_twice() -> None:
    class_ids = torch.tensor([2, 0, 2, 2, 0, 1, 2, 0, 0, 2])
    counts, generator = torch.tensor([2, 0, 1]), torch.Generator().manual_seed(0)
    sets = disjoint_rows(class_ids, counts, 2, generator)
    assert [class_ids[rows].tolist() for rows in sets] == [[0, 0, 2]] * 2
    assert len(set(torch.cat(sets).tolist())) == 6


def test_real_pictures_are_compared_with_other_real_ones_of_the_same_number() -> None:
    """Generated pictures drawn as the real ones are have the distance that real ones have."""
    classifier = train_classifier(*draw_set(60, 1), 3, torch.Generator().manual_seed(0), 2, 20)
    generated, test = draw_set(80, 5), draw_set(160, 2)
    ratios = []
    for seed in range(8):
        results = compare(classifier, generated, test, CLASSES, torch.Generator().manual_seed(seed))
        ratios.append(results["feature_distance"] / results["feature_distance_real"])
    assert results["pictures_compared"] == 240
    assert sum(ratios) / len(ratios) == pytest.approx(1, abs=0.25)
    few = draw_set(30, 2)  # half of 30 are 15 a class
    results = compare(classifier, generated, few, CLASSES, torch.Generator().manual_seed(0))
    assert results["pictures_compared"] == 45


def test_the_command_writes_its_results_and_keeps_the_classifier(real, tmp_path, capsys) -> None:
    pictures, class_ids = draw_set(10, seed=4)
    generated = save_set(tmp_path / "generated", pictures, class_ids, "012")
    output = tmp_path / "out"
    words = [f"generated={generated}", f"train={real['train']}", f"test={real['test']}"]
    words += [f"output_dir={output}", "epochs=1", "batch_size=20"]
    assert main(words) == 0
    (classifier,) = output.glob("classifier-*/model.safetensors")
    written, results = (
        classifier.stat().st_mtime_ns,
        json.loads((output / "evaluation.json").read_text()),
    )
    assert "30 generated, " in (out := capsys.readouterr().out) and "30 other test pictures" in out
    assert results["psnr"] is None and (output / "generated_vs_real.png").is_file()
    assert main(words) == 0
    assert classifier.stat().st_mtime_ns == written
    assert json.loads((output / "evaluation.json").read_text()) == results
    assert main([*words, "seed=1"]) == 0
    assert len(list(output.glob("classifier-*"))) == 2


def test_what_cannot_be_compared_is_refused(real, tmp_path: Path, capsys) -> None:
    pictures, class_ids = draw_set(4, seed=5)
    named = save_set(tmp_path / "named", pictures, class_ids, ["cat", "dog", "owl"])
    with pytest.raises(ValueError, match="cat, dog, owl: generated pictures lie in folders"):
        run(real, named)
    beyond = save_set(tmp_path / "beyond", pictures, class_ids, "019")
    with pytest.raises(ValueError, match="generated has class 9, the real pictures only 0 to 2"):
        run(real, beyond)
    single = save_set(tmp_path / "single", pictures[[0, 1, 4]], class_ids[[0, 1, 4]], "01")
    with pytest.raises(ValueError, match="class 1 has 1 generated and 60 test pictures"):
        run(real, single)
    with pytest.raises(ValueError, match="device=gpu: legal are auto"):
        run(real, single, device="gpu")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        run(real, str(tmp_path / "nowhere"))
    words = [f"{key}={path}" for key, path in real.items()]
    assert main([*words, f"generated={tmp_path}/nowhere"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")


def test_tokenizer_quality_is_measured_on_the_test_pictures(real, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_channels": 32, "channel_mult": (1, 2), "num_res_blocks": 1, "z_channels": 4}
    vq = MaskGitVQGAN(resolution=16, quantized_embed_dim=4, num_embeddings=16, **sizes)
    with torch.no_grad():  # a decoder whose every picture is black
        vq.decoder.conv_out.weight.zero_()
        vq.decoder.conv_out.bias.fill_(-1)
    vq.save_pretrained(tmp_path / "vq")
    pictures, class_ids = draw_set(4, seed=6)
    generated = save_set(tmp_path / "generated", pictures, class_ids, "012")
    psnr = run(real, generated, vq_model=str(tmp_path / "vq"))["psnr"]
    test_pictures, _ = draw_set(60, seed=2)
    expected = 10 * torch.log10(255**2 / test_pictures.double().square().mean())
    assert psnr == pytest.approx(float(expected), abs=1e-6)
    assert (Path(real["output_dir"]) / "reconstructions.png").is_file()
