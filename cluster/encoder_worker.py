"""One worker of an `EncoderGroup`: a TextEncoder in a process of its own, under DeepSpeed's ZeRO.

The only module that imports deepspeed, and only inside functions: the environment must be set before, and importing
it in other processes has crashed them.
"""

from __future__ import annotations

import math
import os
import socket
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import ray
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from cluster.encoder_places import Place
from talk_dist.config import EncoderConfig, InnerConfig
from talk_dist.data.tag import TokenLists
from talk_dist.data.tokenizer import quiet
from talk_dist.errors import ConfigError
from talk_dist.models.device import bfloat16
from talk_dist.models.encoder import TextEncoder
from talk_dist.models.gnn import Student
from talk_dist.models.inner import cut, diverged, soft_labels
from talk_dist.models.protocol import Adapters, FitResult
from talk_dist.runtime.pool import peak_gpu_memory, peak_memory

T = TypeVar("T")
Fit = tuple[FitResult, dict[str, np.ndarray], Adapters]
COLLECTIVE_SECONDS = 1800  # how long a rank waits for the others: longer than any of them loads a model or encodes
STUCK = (
    "DeepSpeed left the adapters where they were, though their gradient is not zero; take another deepspeed.stage, or "
    "another version of deepspeed or peft"
)


@dataclass(frozen=True)
class Description:
    """What the driver tells of the language model without holding it."""

    width: int
    pooling: str
    max_positions: int
    fingerprint: str
    token_table: np.ndarray  # (vocabulary, d_tok)
    adapters: Adapters


class _Root(nn.Module):
    """What the engine wraps: ZeRO-3 starts its bookkeeping where a pass enters here."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, work: Callable[[], Tensor]) -> Tensor:
        return work()


class _Encoder(TextEncoder):
    """A TextEncoder whose passes go through an engine, or its root. Autocast is entered inside: the engine would
    switch off one that is already on."""

    through: Callable[[Callable[[], Tensor]], Tensor] | None = None

    def _forward(self, mask: Tensor, **inputs: Tensor) -> Tensor:
        work = super()._forward
        return self.through(lambda: work(mask, **inputs)) if self.through else work(mask, **inputs)


class EncoderWorker:
    """Rank ``rank`` of ``world`` workers. Every method that says "together" must be called on all of them at once."""

    def place(self) -> Place:
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
        context = ray.get_runtime_context()
        gpus = tuple(map(str, context.get_accelerator_ids().get("GPU", [])))
        return Place(context.get_node_id(), ray.util.get_node_ip_address(), port, gpus)

    def vitals(self) -> dict[str, int]:
        """Its process, and its peak memory in bytes."""
        return {"pid": os.getpid(), "host_bytes": peak_memory(), "gpu_bytes": peak_gpu_memory()}

    def join(self, environment: dict[str, str], threads: int) -> None:
        """Together: become one process group."""
        os.environ.update(environment)
        torch.set_num_threads(threads)
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
        import deepspeed

        deepspeed.utils.logger.setLevel("WARNING")
        self.rank, self.world = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        operations = getattr(deepspeed.ops, "__compatible_ops__", None)
        if isinstance(operations, dict):  # else DeepSpeed compiles a faster all-reduce for a minute and more
            operations["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(timeout=timedelta(seconds=COLLECTIVE_SECONDS), verbose=False)

    def load(self, config: EncoderConfig, engine: dict[str, Any], adapters: Adapters | None) -> Description | None:
        """Together: load the language model, and split it if the stage in ``engine`` (DeepSpeed's configuration) says
        so. Rank 0 describes the model, unless ``adapters`` to begin with say that the driver knows it already."""
        quiet()
        cuda = os.environ["DS_ACCELERATOR"] == "cuda"
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(device)
        self.split = engine["zero_optimization"]["stage"] == 3
        # A model that is to be split may not fit a device: it is loaded in host memory.
        self.encoder = _Encoder(replace(config, device="cpu" if self.split else device.type))
        self.encoder.device, self.encoder.autocast = device, bfloat16(config.precision, device)
        if adapters:
            self.encoder.load_adapters(adapters)
        e, told = self.encoder, None
        if adapters is None and self.rank == 0:
            table = e.token_table.cpu().numpy()
            told = Description(e.width, e.pooling, e.max_positions, e.fingerprint, table, e.adapters())
        self.engine: Any = None
        if self.encoder.adapted or self.split:
            self._start_engine(engine)
        return told

    def _start_engine(self, config: dict[str, Any]) -> None:
        """One engine for the worker's life. The student is not in it: it is small, and every fit brings another."""
        import deepspeed

        trained = list(self.encoder.adapter_parameters().values())
        self.optimizer = torch.optim.AdamW(trained, weight_decay=0.0) if trained else None
        for p in trained:
            p.requires_grad_(True)
        root = _Root(self.encoder.model)
        if self.split:  # weight by weight; `initialize` would move the whole model to the device first
            deepspeed.zero.Init(module=root, config_dict_or_path=config)
            for buffer in root.buffers():
                buffer.data = buffer.data.to(self.encoder.device)
        self.engine = deepspeed.initialize(
            model=root, optimizer=self.optimizer, config=config, dist_init_required=False
        )[0]
        self.encoder.through = self.engine.module if self.split else None

    # -- adapters ---------------------------------------------------------------------------------------

    def _whole(self, writing: bool = False) -> AbstractContextManager[Any]:
        """Together: inside, the adapters are whole tensors on every rank; what is written must be written by all."""
        if not self.split or not self.encoder.adapted:
            return nullcontext()
        import deepspeed

        parameters = list(self.encoder.adapter_parameters().values())
        return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0 if writing else None)

    def adapters(self) -> Adapters:
        with self._whole():
            return self.encoder.adapters()

    def load_adapters(self, adapters: Adapters) -> None:
        with self._whole(writing=True):
            self.encoder.load_adapters(adapters)

    def reset_adapters(self, seed: int) -> Adapters:
        with self._whole(writing=True):
            self.encoder.reset_adapters(seed)
        return self.adapters()

    # -- encoding: (batch index, result) of every batch of this rank --------------------------------------

    def encode_batches(self, tokens: TokenLists, batches: Sequence[np.ndarray]) -> list[tuple[int, np.ndarray]]:
        return self._share(len(batches), lambda k: self.encoder.encode_batch(tokens, batches[k]))

    def encode_embeds(self, x: Tensor, mask: Tensor | None, batch: int, seed: int | None) -> list[tuple[int, Tensor]]:
        def one(k: int) -> Tensor:
            s = _rows(k, batch)
            rows = cut(mask, s)
            return self.encoder.encode_embeds(x[s], rows, batch, None if seed is None else seed + s.start)

        return self._share(math.ceil(len(x) / batch), one)

    def inject(
        self, x: Tensor, d_hs: Tensor, mask: Tensor | None, batch: int, seed: int | None
    ) -> list[tuple[int, Tensor]]:
        def one(k: int) -> Tensor:
            s = _rows(k, batch)
            rows = cut(mask, s)
            return self.encoder.inject(x[s], d_hs[s], rows, batch, None if seed is None else seed + s.start).cpu()

        return self._share(math.ceil(len(x) / batch), one)

    def residual(self, x: Tensor, target: Tensor, batch: int) -> list[tuple[int, tuple[Tensor, Tensor]]]:
        def one(k: int) -> tuple[Tensor, Tensor]:
            s = _rows(k, batch)
            return self.encoder.residual(x[s], target[s], batch)

        return self._share(math.ceil(len(x) / batch), one)

    def _share(self, count: int, one: Callable[[int], T]) -> list[tuple[int, T]]:
        """Batches rank, rank + world, ... of ``count``. With split weights every pass is collective: ranks that have
        a batch less do the first one again."""
        mine = [(k, one(k)) for k in range(self.rank, count, self.world)]
        if self.split and len(mine) < math.ceil(count / self.world):
            one(0)
        return mine

    # -- training ---------------------------------------------------------------------------------------

    def fit(
        self, student: Student, x: Tensor, y: Tensor, config: InnerConfig, mask: Tensor | None, seed: int, batch: int
    ) -> Fit:
        """Together: `talk_dist.models.inner.train`, the batches of a pass shared by the ranks.

        Returns the result, the best student and the best adapters, which end up loaded. Raises ConfigError if the
        loss is not finite, or if DeepSpeed loses the adapters' gradient; the adapters are then as before.
        """
        device, start = self.encoder.device, self.adapters()
        student, targets = student.to(device), soft_labels(y).to(device)
        own = torch.optim.AdamW(student.parameters(), lr=config.gnn_lr, weight_decay=config.weight_decay)
        self._fresh_optimizer(start, config.adapter_lr)
        best: tuple[dict[str, np.ndarray], Adapters] = ({}, start)
        best_loss, stale, index = float("inf"), 0, 0
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed + self.rank)
            for index in range(1, config.joint_passes + 1):
                student.train()
                own.zero_grad()
                loss, flows = self._one_pass(student, x, targets, mask, seed + index * len(x), batch)
                if math.isfinite(loss):
                    stale = 0 if loss < best_loss else stale + 1
                    best_loss = min(best_loss, loss)
                    if loss <= best_loss:
                        best = {k: v.cpu().numpy().copy() for k, v in student.state_dict().items()}, self.adapters()
                own.step()
                self.engine.step()  # a bad gradient is used up too: the next fit loads weights and clears moments
                stuck = index == 1 and flows and not _moved(start, self.adapters())
                if stuck or not math.isfinite(loss):
                    self.load_adapters(start)
                    raise ConfigError(STUCK) if stuck else diverged(loss, index)
                if stale >= config.patience or loss < config.target_loss:
                    break
        self.load_adapters(best[1])
        return FitResult(index, best_loss, -best_loss), *best

    def _fresh_optimizer(self, adapters: Adapters, lr: float) -> None:
        """As if the engine had just been made with these adapters."""
        from deepspeed.utils import safe_set_full_fp32_param

        assert self.optimizer is not None
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        for state in self.optimizer.state.values():
            for value in state.values():
                value.zero_()
        for name, p in self.encoder.adapter_parameters().items():
            safe_set_full_fp32_param(p, torch.from_numpy(adapters[name].copy()).to(self.encoder.device))

    def _one_pass(
        self, student: Student, x: Tensor, targets: Tensor, mask: Tensor | None, seed: int, batch: int
    ) -> tuple[float, bool]:
        """Leaves the gradient of the mean loss over all nodes; returns that loss, and whether any gradient reaches
        the encoder."""
        count, flows = math.ceil(len(x) / batch), [False]
        share = math.ceil(count / self.world)
        total = torch.zeros(2, device=self.encoder.device)  # the loss, and on how many ranks gradient flows
        for turn in range(share):
            k = turn * self.world + self.rank
            weight = float(k < count)  # a rank with a batch less does the first again, for nothing
            s = _rows(k if weight else 0, batch)
            self.engine.set_gradient_accumulation_boundary(turn == share - 1)
            self.encoder.through = self.engine
            h = self.encoder.forward_embeds(x[s], cut(mask, s), seed + s.start)
            self.encoder.through = self.engine.module if self.split else None
            h.register_hook(lambda grad: flows.append(bool(grad.any())))
            loss = cross_entropy(student(h), targets[s].to(h), reduction="sum") / len(x)
            total[0] += weight * loss.detach()
            # DeepSpeed takes the mean over the ranks, where the sum is wanted
            self.engine.backward(loss * (weight * self.world), scale_wrt_gas=False)
        total[1] = any(flows)
        torch.distributed.all_reduce(total)
        for p in student.parameters():
            if p.grad is not None and self.world > 1:
                torch.distributed.all_reduce(p.grad)
                p.grad /= self.world
        return float(total[0]), bool(total[1])


def _rows(k: int, batch: int) -> slice:
    return slice(k * batch, (k + 1) * batch)


def _moved(before: Adapters, after: Adapters) -> bool:
    return any(not np.array_equal(before[name], after[name]) for name in before)
