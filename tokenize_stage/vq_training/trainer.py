"""One step of VQ training, and everything that a step changes.

B batch, R resolution, K codebook size, D latent channels. Whatever is random is drawn from
(seed, step), so the state of a run is its step, weights, optimizer and running counts.
"""

import math
from typing import Any

import numpy as np
import torch
from torch import nn

from tokenize_stage.vq.maskgit_vqgan import MaskGitVQGAN
from tokenize_stage.vq.quantizer import as_vectors
from tokenize_stage.vq_training.codebook import cluster, perplexity, revive
from tokenize_stage.vq_training.config import TrainVQConfig
from tokenize_stage.vq_training.images import (
    CLUSTER,
    DROPOUT,
    REVIVE,
    batch_rows,
    random_flip,
    to_pixels,
)
from tokenize_stage.vq_training.loss import vq_loss

TOTALS = ("reconstruction", "quantizer", "gradient_norm", "revived")
VECTORS_PER_CODE = 64  # what the first codebook is clustered from


class VQTrainer:
    """Trains a MaskGitVQGAN on uint8 images (n, 3, R, R) held in memory."""

    def __init__(self, config: TrainVQConfig, images: np.ndarray, device: torch.device):
        self.config, self.images, self.device = config, images, device
        torch.manual_seed(config.training.seed)  # torch initialises weights from the default one
        self.model = MaskGitVQGAN(**vars(config.model)).to(device).train()
        params = config.optimizer.params
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=params.learning_rate,
            betas=(params.beta1, params.beta2),
            weight_decay=params.weight_decay,
            eps=params.epsilon,
            fused=True,
        )
        self.step = 0
        size = self.model.codebook_size
        self.counts = torch.zeros(size, dtype=torch.int64, device=device)  # since the last log
        self.used = torch.zeros(size, dtype=torch.bool, device=device)  # since the last revival
        self.totals = torch.zeros(len(TOTALS), dtype=torch.float64, device=device)
        self.steps_in_totals = 0

    def state_dict(self) -> dict[str, Any]:
        """All that the next steps depend on, as torch.load(weights_only=True) takes it."""
        return {
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "counts": self.counts,
            "used": self.used,
            "totals": self.totals,
            "steps_in_totals": self.steps_in_totals,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.steps_in_totals = state["step"], state["steps_in_totals"]
        self.counts, self.used, self.totals = (
            state[name].to(self.device) for name in ("counts", "used", "totals")
        )

    def train_step(self) -> None:
        """One batch, one update of the weights."""
        training, codebook = self.config.training, self.config.codebook
        dropout_rng = np.random.default_rng((DROPOUT, training.seed, self.step))
        torch.manual_seed(int(dropout_rng.integers(2**63)))  # dropout knows no other generator
        if self.step == codebook.init_step:
            self._start_codebook()
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        pixels = self._batch(self.step)  # (B, 3, R, R)
        with self._autocast():
            latents = self.model.latents(pixels)  # (B, D, h, w)
            if self.step < codebook.init_step:
                quantized, codes, quantizer_loss = latents, None, latents.new_zeros(())
            else:
                quantized, codes, quantizer_loss = self.model.quantize(latents, return_loss=True)
            reconstruction = self.model.decode_latents(quantized)
        loss, terms = vq_loss(pixels, reconstruction, quantizer_loss, codebook.loss_weight)
        self.optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), training.max_grad_norm)
        self.optimizer.step()
        revived = 0 if codes is None else self._keep_alive(codes, latents.detach())
        self.step += 1
        values = [terms["reconstruction"].detach(), terms["quantizer"].detach(), norm]
        self.totals += torch.stack([v.double() for v in values] + [self.totals.new_tensor(revived)])
        self.steps_in_totals += 1

    def learning_rate(self) -> float:
        """Of the current step: a linear rise, then half a cosine down to final_ratio."""
        highest, schedule = self.config.optimizer.params.learning_rate, self.config.lr_scheduler
        warmup, final = schedule.params.warmup_steps, schedule.params.final_ratio
        if self.step < warmup:
            return highest * (self.step + 1) / warmup
        done = (self.step - warmup) / max(1, self.config.training.max_train_steps - warmup)
        return highest * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * done)))

    def check_finite(self, psnr: float = 0.0) -> None:
        """Raises FloatingPointError for a loss or gradient since the last log, a weight or an
        average of the optimizer that is not finite, or a PSNR that is NaN. Waits for the device.
        """
        moments = [t for state in self.optimizer.state.values() for t in state.values()]
        tensors = [self.totals, *self.model.state_dict().values(), *moments]
        if math.isnan(psnr) or not all(bool(t.isfinite().all()) for t in tensors):
            raise FloatingPointError(
                f"training has diverged at step {self.step}: the loss or a weight is not "
                "finite; lower optimizer.params.learning_rate (now "
                f"{self.config.optimizer.params.learning_rate:g}) and start again with another "
                "experiment.output_dir"
            )

    def pop_metrics(self) -> dict[str, float]:
        """Means over the steps since the last call. Waits for the device."""
        means = dict(zip(TOTALS, self.totals.tolist(), strict=True))
        revived = int(means.pop("revived"))
        means = {name: total / self.steps_in_totals for name, total in means.items()}
        means["psnr"] = -10 * math.log10(max(means["reconstruction"], 1e-10))
        used = int((self.counts > 0).sum())
        means |= {"codes_used": used, "revived": revived, "learning_rate": self.learning_rate()}
        means["perplexity"] = perplexity(self.counts) if used else 0.0
        self.counts.zero_()
        self.totals.zero_()
        self.steps_in_totals = 0
        return means

    def _batch(self, step: int) -> torch.Tensor:
        training = self.config.training
        rows = batch_rows(step, training.batch_size, len(self.images), training.seed)
        images = self.images[rows]
        if self.config.dataset.random_flip:
            images = random_flip(images, step, training.seed)
        return to_pixels(images, self.device)

    def _autocast(self) -> torch.autocast:
        is_on = self.config.training.mixed_precision == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=is_on)

    @torch.no_grad()
    def _start_codebook(self) -> None:
        """Clusters the encoder's outputs for the coming steps' images into the first codebook."""
        size, training = self.model.codebook_size, self.config.training
        codes_per_step = training.batch_size * math.prod(self.model.grid(self.images.shape[-1]))
        vectors = []
        for ahead in range(math.ceil(VECTORS_PER_CODE * size / codes_per_step)):
            with self._autocast():
                latents = self.model.latents(self._batch(self.step + ahead))
            vectors.append(as_vectors(latents).float())  # (B*N, D)
        rng = np.random.default_rng((CLUSTER, training.seed))
        centres = cluster(torch.cat(vectors), size, rng)
        self.model.quantize.embedding.weight.copy_(centres)

    @torch.no_grad()
    def _keep_alive(self, codes: torch.Tensor, latents: torch.Tensor) -> int:
        """Counts the codes (B, N) and, every revive_every steps, moves those that nobody used."""
        counts = torch.bincount(codes.flatten(), minlength=self.model.codebook_size)
        self.counts += counts
        self.used |= counts > 0
        if (self.step + 1) % self.config.codebook.revive_every:
            return 0
        rng = np.random.default_rng((REVIVE, self.config.training.seed, self.step))
        codebook = self.model.quantize.embedding.weight
        moved = revive(codebook, self.used, as_vectors(latents).float(), rng)
        for name in ("exp_avg", "exp_avg_sq"):  # their gradients so far were another code's
            self.optimizer.state[codebook][name][moved] = 0
        self.used.zero_()
        return len(moved)
