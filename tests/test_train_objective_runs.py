"""Objectives in whole runs: muse-train with each of them, and two processes that share a step."""

import json
import multiprocessing
import os
import socket
from itertools import product

import numpy as np
import pytest
import torch
import torch.distributed as dist
from store_factory import SIZES, make_store
from test_train_noise import OPTIONS, extensions, gradients, mask, tiny_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import train_stage.train
from storage.reader import TokenStore
from storage.schema import ArrayColumn, StoreMeta
from storage.writer import ShardWriter, create_store
from tokenize_stage.vq.maskgit_vqgan import MaskGitVQGAN
from train_stage.models.transformer import MaskGitTransformer
from train_stage.objective.loss import MaskedLoss
from train_stage.objective.soft_targets import codebook_targets

SMALL = {
    "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 64,
}  # fmt: skip
RUN = [
    "training.max_train_steps=3", "training.batch_size=8", "experiment.log_every=1",
    "experiment.save_every=0", "optimizer.params.learning_rate=1e-3", "experiment.eval_every=3",
    "training.eval_mask_ratios=[0.25]", "training.gradient_accumulation_steps=2",
    *(f"model.transformer.{name}={value}" for name, value in SMALL.items()),
]  # fmt: skip
CRITIC = "model.transformer.critic_head=true"
RUNS = {
    "stored": ["training.soft_targets=stored", "training.label_smoothing=0.1"],
    "recomputed": ["training.soft_targets=recomputed", "training.soft_target_codes=5"],
    "all": ["training.predict_all_tokens=true", "training.log_entropy_every=1"],
    "random": ["training.noise_type=random_replace", "training.stratified_mask_ratios=true"],
    "self": ["training.critic=self", CRITIC, "model.transformer.self_conditioning=true"],
    "token": ["training.critic=token", "training.critic_generator=GENERATOR", CRITIC],
}
SHARED = ["random, stored", "self-critic", "token-critic", "self-conditioning"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A store whose codes have their nearest codes beside them, its VQ model, and a generator."""
    folder = tmp_path_factory.mktemp("objective")
    plain = TokenStore(make_store(folder))
    vq = MaskGitVQGAN.from_pretrained(folder / "vq")
    ids, weights = codebook_targets(vq.quantizer.vectors, 1.0, 4)
    codes = np.random.default_rng(0).integers(0, SIZES["num_embeddings"], (100, 16))
    arrays = {
        "codes": ArrayColumn("uint16", [16]),
        "topk_codes": ArrayColumn("uint16", [16, 4]),
        "topk_weights": ArrayColumn("float16", [16, 4]),
    }
    create_store(folder / "soft", StoreMeta(8, arrays, plain.meta.tokenizers, backend="arrow"))
    with ShardWriter(folder / "soft", "00000", source="0.tar") as writer:
        keys = [str(row) for row in range(len(codes))]
        soft = {"topk_codes": ids[codes].numpy(), "topk_weights": weights[codes].numpy()}
        soft = {name: values.astype(arrays[name].dtype) for name, values in soft.items()}
        writer.add({"codes": codes, "key": keys, "class_id": codes[:, 0] % 10, **soft})
    generator = MaskGitTransformer(
        **SMALL, codebook_size=SIZES["num_embeddings"], num_vq_tokens=16, num_classes=10
    )
    generator.save_pretrained(folder / "generator")
    return folder


def train(folder, run, *words):
    words = [word.replace("GENERATOR", str(folder / "generator")) for word in words]
    store = f"dataset.train_store={folder / 'soft'}"
    places = [store, f"dataset.eval_store={folder / 'soft'}", f"experiment.output_dir={run}"]
    code = train_stage.train.main([*places, *RUN, *words])
    log = run / "metrics.jsonl"
    return code, [json.loads(x) for x in log.read_text().splitlines()] if log.exists() else []


@pytest.mark.parametrize("name", RUNS)
def test_muse_train(folder, tmp_path, name):
    code, lines = train(folder, tmp_path / "run", *RUNS[name])
    assert code == 0
    logged = {key: value for line in lines for key, value in line.items()}
    assert np.isfinite([line["loss"] for line in lines if "loss" in line]).all()
    assert logged["eval_loss"] > 0 and "eval_loss_ratio_0.25" in logged
    wanted = {"all": "loss_visible", "self": "critic_accuracy", "token": "critic_loss"}
    assert name not in wanted or wanted[name] in logged
    entropies = [key for key in logged if key.startswith("entropy_image_masked")]
    assert bool(entropies) == (name == "all")
    assert (tmp_path / "run" / "model" / "config.json").exists()


def test_what_does_not_fit_is_refused(folder, tmp_path, capsys):
    for words, message in [
        (["training.critic=self"], "critic_head=false"),
        ([*RUNS["random"], "model.transformer.self_conditioning=true"], "would tell which"),
        ([CRITIC], "training.critic=null"),
        ([CRITIC, "training.critic=token"], "a generator go together"),
    ]:
        try:
            assert train(folder, tmp_path / "run", *words)[0] == 2
        except SystemExit as stopped:
            assert stopped.code == 2
        assert message in capsys.readouterr().err
    other = MaskGitTransformer(**SMALL, codebook_size=30, num_vq_tokens=16, num_classes=10)
    other.save_pretrained(tmp_path / "other")
    words = [CRITIC, "training.critic=token", f"training.critic_generator={tmp_path / 'other'}"]
    assert train(folder, tmp_path / "run", *words)[0] == 2
    assert "its codebook_size is 30, the critic's 60" in capsys.readouterr().err
    other = MaskGitTransformer(**SMALL, codebook_size=60, num_vq_tokens=16, num_classes=9)
    other.save_pretrained(tmp_path / "other")
    assert train(folder, tmp_path / "run", *words)[0] == 2
    assert "its num_classes is 9, the critic's 10" in capsys.readouterr().err


def make_module(name):
    model = tiny_model(**extensions(name))
    generator = tiny_model().requires_grad_(False) if "token" in name else None
    return model, MaskedLoss(model, generator=generator)


def share_steps(rank, port, results):
    """One gradient of each objective, by two processes that hold the model whole, or its shards."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    for name, is_sharded in product(SHARED, (False, True)):
        model, module = make_module(name)
        if is_sharded:
            for layer in model.layers():
                fully_shard(layer, mesh=mesh)
        wrapped = fully_shard(module, mesh=mesh) if is_sharded else DistributedDataParallel(module)
        for step in range(2):  # a second step: the first one left no gradient out
            model.zero_grad()
            masked = mask(model, rank, 2, step, **OPTIONS[name])
            (part,) = masked.split(1)
            (wrapped(**part)["total"] * 2 / masked.denominator).backward()
        found = gradients(model)
        if is_sharded:
            found = {key: value.full_tensor() for key, value in found.items()}
        results.put((rank, name, is_sharded, {key: g.numpy() for key, g in found.items()}))
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_make_the_gradient_of_one():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    results = fork.Queue()
    processes = [fork.Process(target=share_steps, args=(rank, port, results)) for rank in (0, 1)]
    for process in processes:
        process.start()
    found = [results.get(timeout=60) for _ in range(4 * len(SHARED))]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    for name in SHARED:
        model, module = make_module(name)
        masked = mask(model, step=1, **OPTIONS[name])
        (part,) = masked.split(1)
        (module(**part)["total"] / masked.denominator).backward()
        wanted = gradients(model)
        for *_, shared in (values for values in found if values[1] == name):
            assert shared.keys() == wanted.keys()
            for key, gradient in wanted.items():
                np.testing.assert_allclose(shared[key], gradient, rtol=1e-4, atol=1e-6)
