"""The encoder phi: a pretrained transformer, optional LoRA adapters, one pooled vector a node.

It encodes token ids (real texts) and token embeddings (synthetic nodes), and injects the gradient of the
kernel loss into token embeddings batch by batch (method, section 5).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from talk_dist.config import EncoderConfig, InnerConfig
from talk_dist.data.given import given_width
from talk_dist.data.tag import TokenLists
from talk_dist.data.tokenizer import Tokenizer, load_pretrained, load_tokenizer, quiet
from talk_dist.errors import ConfigError
from talk_dist.models.device import SingleAttention, bfloat16, give_back_memory, pick_device
from talk_dist.models.given import GivenEncoder
from talk_dist.models.gnn import Student
from talk_dist.models.inner import cut, fit_adapters, fit_encodings
from talk_dist.models.layers import Split, add_adapters, end_in_first_position, frozen_layers
from talk_dist.models.pooling import pooling_of
from talk_dist.models.protocol import Adapters, Encoder, FitResult, Lower, Progress, Select

TRIM_EVERY = 4  # batches


class TextEncoder:
    """Owns the language model. Raises ConfigError if the checkpoint, its targets or its length do not fit."""

    def __init__(self, config: EncoderConfig):
        from transformers import AutoModel

        self.config = config
        self.device = torch.device(pick_device(config.device))
        self.model: nn.Module = load_pretrained(AutoModel.from_pretrained, config.name, dtype=torch.float32)
        self.model.requires_grad_(False)
        self.pooling = pooling_of(config, self.model)
        self.width = int(self.model.config.hidden_size)
        self.frozen_layers = frozen_layers(self.model, config)
        if config.adapters:
            add_adapters(self.model, config, self.frozen_layers)
            self.reset_adapters(0)
        if self.pooling == "cls":
            end_in_first_position(self.model)
        self.model.to(self.device).eval()
        self._split = Split(self.model, config.name, self.frozen_layers, self.device) if self.frozen_layers else None
        self.autocast = bfloat16(config.precision, self.device)
        self._single_attention = self.autocast and self.device.type == "cpu"

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.config.name)

    @property
    def token_table(self) -> Tensor:
        """(vocabulary, d_tok) the embedding of every token."""
        return self.model.get_input_embeddings().weight.detach()  # type: ignore[operator]

    @property
    def max_positions(self) -> int:
        """Tokens that a synthetic node can have; RoBERTa's table starts after its padding index."""
        table = [m for name, m in self.model.named_modules() if name.endswith("position_embeddings")]
        padding = getattr(table[0], "padding_idx", None) if table else None
        limit = int(getattr(self.model.config, "max_position_embeddings", 1 << 30))
        return limit if padding is None else limit - padding - 1

    @cached_property
    def fingerprint(self) -> str:
        """sha256 hex of the frozen weights and of how they are used: what a cache of encodings depends on."""
        used = f"{self.pooling} {self.autocast} {self._single_attention} {self.device.type}"
        digest = hashlib.sha256(used.encode())
        for name, weight in sorted(self.model.state_dict().items()):
            if "lora_" not in name:
                digest.update(name.replace(".base_layer", "").encode())
                digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy())
        return digest.hexdigest()

    # -- adapters ---------------------------------------------------------------------------------------

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """Name -> parameter of every adapter; empty in the frozen mode."""
        return {name: p for name, p in self.model.named_parameters() if "lora_" in name}

    @property
    def adapted(self) -> bool:
        return bool(self.adapter_parameters())

    def adapters(self) -> Adapters:
        """A copy of the adapters as numpy, to be shipped to shards."""
        return {name: p.detach().cpu().numpy().copy() for name, p in self.adapter_parameters().items()}

    def load_adapters(self, adapters: Adapters) -> None:
        parameters = self.adapter_parameters()
        if adapters.keys() != parameters.keys():
            raise ConfigError(f"adapters of another encoder: {sorted(adapters.keys() ^ parameters.keys())[:4]}")
        with torch.no_grad():
            for name, value in adapters.items():
                parameters[name].copy_(torch.from_numpy(np.array(value)))

    def reset_adapters(self, seed: int) -> None:
        """Fresh adapters (their product is zero); the seed fixes them whatever was drawn before."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, p in sorted(self.adapter_parameters().items()):
                bound = p.shape[-1] ** -0.5  # LoRA's own start: A Kaiming-uniform with a = sqrt(5), B zero
                fresh = (torch.rand(p.shape, generator=generator) * 2 - 1) * bound
                p.copy_(fresh if "lora_A" in name else torch.zeros_like(p))

    # -- encoding ---------------------------------------------------------------------------------------

    def encode_tokens(
        self, tokens: TokenLists, progress: Progress | None = None, lower: Lower | None = None
    ) -> np.ndarray:
        """Encodings (n, d) float32 of n token lists, without gradient; exact duplicates are encoded once.

        With ``lower`` passes begin at the first layer with adapters, from what it holds of these texts; if that is
        nothing yet, it is computed here. Raises ConfigError for values beyond its number format.
        """
        source, batches = tokens.batches(self.config.batch_tokens)
        out, done, total = np.zeros((len(tokens), self.width), dtype=np.float32), 0, sum(map(len, batches))
        for index, batch in enumerate(batches):
            out[batch] = self.encode_batch(tokens, batch, lower)
            if index % TRIM_EVERY == 0:
                give_back_memory()
            done += len(batch)
            if progress is not None:
                progress(done, total)
        if lower is not None:
            lower.filled = True
        give_back_memory()
        return out[source]

    def encode_batch(self, tokens: TokenLists, rows: np.ndarray, lower: Lower | None = None) -> np.ndarray:
        """Encodings (len(rows), d) float32 of some of the token lists, in one pass."""
        ids, mask = map(torch.from_numpy, tokens.padded(rows))

        def run() -> Tensor:
            return self._forward(mask, input_ids=ids.to(self.device))

        with torch.no_grad():  # not inference_mode: weights that ZeRO-3 gathers here are used with gradient later
            begun = (
                nullcontext() if lower is None or self._split is None else self._split.kept(lower, tokens, rows, run)
            )
            with begun:
                return run().float().cpu().numpy()

    def encode_embeds(
        self, x: Tensor, mask: Tensor | None = None, batch: int = 32, dropout_seed: int | None = None
    ) -> Tensor:
        """Encodings (M, d), on the CPU, of token embeddings ``x`` (M, T, d_tok), without gradient, ``batch`` nodes at
        once."""
        with torch.no_grad():
            parts = [self.forward_embeds(x[s], cut(mask, s), _seed(dropout_seed, s)) for s in _slices(len(x), batch)]
        return torch.cat(parts).cpu()

    def inject(
        self, x: Tensor, d_hs: Tensor, mask: Tensor | None = None, batch: int = 32, dropout_seed: int | None = None
    ) -> Tensor:
        """Gradient (M, T, d_tok) of <phi(x), d_hs>: encode again with gradient, batch by batch.

        With ``dropout_seed`` the same dropout masks are drawn as in `encode_embeds` with that seed and batch.
        """
        grads = []
        for s in _slices(len(x), batch):
            leaf = x[s].detach().requires_grad_()
            pooled = self.forward_embeds(leaf, cut(mask, s), _seed(dropout_seed, s))
            grads.append(torch.autograd.grad(pooled, leaf, d_hs[s].to(pooled))[0])
        return torch.cat(grads)

    def residual(self, x: Tensor, target: Tensor, batch: int = 32) -> tuple[Tensor, Tensor]:
        """||phi(x) - target||^2 of each node (M,) and their gradients (M, T, d_tok): one pass, not two."""
        grads, losses = [], []
        for s in _slices(len(x), batch):
            leaf = x[s].detach().requires_grad_()
            loss = (self.forward_embeds(leaf) - target[s].to(self.device)).pow(2).sum(1)
            grads.append(torch.autograd.grad(loss.sum(), leaf)[0].cpu())
            losses.append(loss.detach().cpu())
        return torch.cat(losses), torch.cat(grads)

    def fit(
        self,
        student: Student,
        x_s: Tensor,
        y_s: Tensor,
        config: InnerConfig,
        *,
        mask: Tensor | None = None,
        seed: int = 0,
        batch: int = 32,
        select: Select | None = None,
        progress: Progress | None = None,
    ) -> FitResult:
        """Train on (x_s, y_s, I) with soft-label cross-entropy; ends with the best student and adapters loaded.

        A frozen encoder is run once.
        """
        if not self.adapted:
            h_s = self.encode_embeds(x_s, mask, batch)
            return fit_encodings(student, h_s, y_s, config, seed=seed, select=select, progress=progress)
        return fit_adapters(
            self, student, x_s, y_s, config, mask=mask, seed=seed, batch=batch, select=select, progress=progress
        )

    def states_below(self, x: Tensor, mask: Tensor | None = None, batch: int = 32) -> Tensor | None:
        """What enters the first layer with adapters, (M, T, d), of token embeddings ``x``; None if that is the first
        layer of all."""
        split = self._split
        if split is None:
            return None
        with torch.no_grad():
            return torch.cat(
                [
                    split.below(lambda s=s: self.forward_embeds(x[s], cut(mask, s)))  # type: ignore[misc]
                    for s in _slices(len(x), batch)
                ]
            )

    def forward_embeds(
        self, x: Tensor, mask: Tensor | None = None, dropout_seed: int | None = None, below: Tensor | None = None
    ) -> Tensor:
        """Pooled encodings (m, d) float32 of ``x`` (m, T, d_tok), differentiable; dropout only with a seed.

        With ``below``, their `states_below`, the pass begins at the first layer with adapters.
        """
        if x.shape[1] > self.max_positions:
            raise ConfigError(
                f"synthetic.tokens = {x.shape[1]}: {self.config.name!r} has {self.max_positions} positions"
            )
        mask = torch.ones(x.shape[:2], dtype=torch.long) if mask is None else mask.long()
        begun = nullcontext() if below is None or self._split is None else self._split.above(below)
        with self._dropout(dropout_seed), begun:
            return self._forward(mask, inputs_embeds=x.to(self.device)).float()

    def _forward(self, mask: Tensor, **inputs: Tensor) -> Tensor:
        mask = mask.to(self.device)
        attention = SingleAttention() if self._single_attention else nullcontext()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast), attention:
            states = self.model(attention_mask=mask, **inputs).last_hidden_state
        if self.pooling == "cls":
            return states[:, 0]
        weight = mask[:, :, None].float()
        return (states.float() * weight).sum(1) / weight.sum(1).clamp_min(1.0)

    @contextmanager
    def _dropout(self, seed: int | None) -> Iterator[None]:
        """Dropout of the *adapters* on, its random state fixed by ``seed``; the frozen model has none."""
        if seed is None:
            yield
            return
        drops = [m for name, m in self.model.named_modules() if "lora_dropout" in name and isinstance(m, nn.Dropout)]
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            for module in drops:
                module.train()
            try:
                yield
            finally:
                for module in drops:
                    module.eval()


def load_encoder(config: EncoderConfig) -> Encoder:
    """The encoder that the name means, loaded quietly."""
    if given_width(config.name) is not None:
        return GivenEncoder(config)
    quiet()
    load_tokenizer(config.name)  # says at once what is wrong with a name; the model's loader asks the hub for a minute
    return TextEncoder(config)


def _slices(total: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


def _seed(seed: int | None, rows: slice) -> int | None:
    return None if seed is None else seed + rows.start
