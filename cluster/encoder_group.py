"""The language model on workers of its own: the `Encoder` protocol over Ray actors that DeepSpeed's ZeRO joins.

The workers share the synthetic nodes (and, if asked, the real texts) batch by batch. The batches are those of a
single TextEncoder, so that at stages 0 to 2 encodings and injected gradients are equal to its own to the bit. The
driver holds the adapters, not the model: a group that lost a worker is started again, brought back to the adapters
with which the call began, and asked again.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import ray
import torch
from ray import exceptions
from torch import Tensor

from cluster.borrowed import Lender, encode_over
from cluster.encoder_places import Place, check_devices, check_settings, engine_config, environments
from cluster.encoder_worker import Description, EncoderWorker
from cluster.failure import Event, classify
from cluster.placement import reserve
from talk_dist.config import EncoderConfig, InnerConfig
from talk_dist.data.tag import TokenLists
from talk_dist.data.tokenizer import load_tokenizer
from talk_dist.errors import CapacityError, ConfigError, ShardError, TalkDistError
from talk_dist.models.gnn import Student
from talk_dist.models.inner import fit_encodings
from talk_dist.models.protocol import Adapters, FitResult, Lower, Progress, Select
from talk_dist.resources import DeepSpeedConfig

GRACE_SECONDS = 10.0  # after one rank's error: how long the others have to end, or to be found dead


def bundles(settings: DeepSpeedConfig) -> list[dict[str, float]]:
    """What the workers reserve."""
    amounts = (("CPU", settings.cpus), ("GPU", settings.gpus))
    return [{name: amount for name, amount in amounts if amount} or {"CPU": 0.01}] * settings.workers


class WorkerDiedError(Exception):
    """Rank ``rank`` is gone."""

    def __init__(self, rank: int, reason: BaseException):
        super().__init__(f"encoder worker {rank} died: {reason}")
        self.rank, self.reason = rank, reason


class EncoderGroup:
    """The `Encoder` protocol over ``settings.workers`` actors. Ray must be initialised.

    Raises ConfigError for settings that cannot work here and CapacityError if the cluster has no room within
    ``wait_seconds``. A call in which workers die ``attempts`` times raises ShardError.
    """

    frozen_layers = 0  # whatever encoder.adapted_layers is: real texts go through all layers here

    def __init__(
        self,
        config: EncoderConfig,
        settings: DeepSpeedConfig,
        *,
        threads: int = 1,
        wait_seconds: float = 300,
        attempts: int = 3,
    ):
        check_settings(config, settings)
        self.config, self.settings, self.device = config, settings, torch.device("cpu")  # where results are
        self.tokenizer = load_tokenizer(config.name)
        self._threads, self._wait, self._attempts = threads, wait_seconds, attempts
        self._adapters: Adapters | None = None  # None until the first start
        self._workers: list[Any] = []
        remedy = "Take fewer deepspeed.workers, less deepspeed.cpus, or a larger cluster"
        self._room = reserve(bundles(settings), "PACK", wait_seconds, "the encoder workers", remedy)
        try:
            told: Description = self._call("describe")[0]
        except BaseException:
            self.close()
            raise
        self.width, self.pooling, self.max_positions = told.width, told.pooling, told.max_positions
        self.fingerprint, self.token_table = told.fingerprint, torch.from_numpy(told.token_table.copy())
        self._adapters = told.adapters

    @property
    def lender(self) -> Lender:
        """What the actors that borrow this encoder must know."""
        return Lender(self.config, self.fingerprint, self.width, self.settings.workers)

    @property
    def workers(self) -> list[Any]:
        """The workers as they are now, for those who ask them without this process; none of them is dead."""
        self._call("place")
        return self._workers

    def vitals(self) -> dict[str, dict[str, Any]]:
        """Peak memory of each worker, in bytes."""
        return {f"encoder-{rank}": told for rank, told in enumerate(self._call("vitals"))}

    def restart(self) -> None:
        """Start anew at the next call: whoever asked the workers died, perhaps having asked only some of them."""
        self._stop()

    def close(self) -> None:
        """Let go of workers and resources; the group is of no use afterwards."""
        self._stop()
        self._room.release()

    # -- adapters ---------------------------------------------------------------------------------------

    @property
    def adapted(self) -> bool:
        return bool(self._adapters)

    def adapters(self) -> Adapters:
        return {name: value.copy() for name, value in (self._adapters or {}).items()}

    def load_adapters(self, adapters: Adapters) -> None:
        mine = self.adapters()
        if adapters.keys() != mine.keys():
            raise ConfigError(f"adapters of another encoder: {sorted(adapters.keys() ^ mine.keys())[:4]}")
        fresh = {name: np.array(value, dtype=np.float32) for name, value in adapters.items()}
        self._call("load_adapters", fresh)
        self._adapters = fresh

    def reset_adapters(self, seed: int) -> None:
        self._adapters = self._call("reset_adapters", seed)[0]

    # -- encoding ---------------------------------------------------------------------------------------

    def encode_tokens(
        self, tokens: TokenLists, progress: Progress | None = None, lower: Lower | None = None
    ) -> np.ndarray:
        """Encodings (n, d) float32 of n token lists, in the batches of a single TextEncoder; all layers run."""

        def ask(texts: Any, batches: Sequence[np.ndarray]) -> list[np.ndarray]:
            return self._joined("encode_batches", texts, batches)

        return encode_over(ask, tokens, self.lender, progress)

    def encode_embeds(
        self, x: Tensor, mask: Tensor | None = None, batch: int = 32, dropout_seed: int | None = None
    ) -> Tensor:
        """Encodings (M, d) of token embeddings (M, T, d_tok), without gradient, on the CPU."""
        return torch.cat(self._joined("encode_embeds", _shared(x), _shared(mask), batch, dropout_seed))

    def inject(
        self, x: Tensor, d_hs: Tensor, mask: Tensor | None = None, batch: int = 32, dropout_seed: int | None = None
    ) -> Tensor:
        """Gradient (M, T, d_tok) of <phi(x), d_hs>, on the CPU."""
        return torch.cat(self._joined("inject", _shared(x), _shared(d_hs), _shared(mask), batch, dropout_seed))

    def residual(self, x: Tensor, target: Tensor, batch: int = 32) -> tuple[Tensor, Tensor]:
        """||phi(x) - target||^2 of each node (M,) and their gradients (M, T, d_tok)."""
        parts = self._joined("residual", _shared(x), _shared(target), batch)
        return torch.cat([loss for loss, _ in parts]), torch.cat([grad for _, grad in parts])

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
        """The inner loop: train student and adapters on the synthetic set; the best of both end up loaded.

        The workers share the batches of every pass. Dropout of the adapters is drawn by batch and does not depend on
        the number of workers; dropout of the student does. Raises ConfigError for ``select`` with adapters.
        """
        if not self.adapted:
            h_s = self.encode_embeds(x_s, mask, batch)
            return fit_encodings(student, h_s, y_s, config, seed=seed, select=select, progress=progress)
        if select is not None:
            raise ConfigError("workers that share the language model train adapters without `select`")
        arguments = ray.put(student), _shared(x_s), _shared(y_s), config, _shared(mask), seed, batch
        result, weights, self._adapters = self._call("fit", *arguments)[0]
        student.load_state_dict({name: torch.from_numpy(value.copy()) for name, value in weights.items()})
        student.eval()
        return result

    # -- workers ----------------------------------------------------------------------------------------

    def _joined(self, method: str, *arguments: Any) -> list[Any]:
        """What all workers return of a batched method, in the order of the batches."""
        parts = [part for worker in self._call(method, *arguments) for part in worker]
        return [value for _, value in sorted(parts, key=lambda part: part[0])]

    def _call(self, method: str, *arguments: Any) -> list[Any]:
        """``method`` on all workers at once; what they return, by rank. "describe" is the start itself."""
        for attempt in range(1, self._attempts + 1):
            try:
                told = [] if self._workers else self._start()
                return told if method == "describe" else self._results(method, [arguments] * len(self._workers))
            except WorkerDiedError as died:
                self._stop()
                if attempt == self._attempts:
                    raise ShardError(
                        f"encoder worker {died.rank} of {self.settings.workers} died in {method}, death {attempt} "
                        f"of this call; if memory ran out, take a higher deepspeed.stage or a smaller "
                        f"outer.inject_batch ({died.reason})"
                    ) from died
        raise AssertionError("unreachable")

    def _start(self) -> list[Any]:
        """Start the workers where the bundles are, with the adapters that are current."""
        for rank in range(self.settings.workers):
            variables = {
                "OMP_NUM_THREADS": str(self._threads),
                "DS_ACCELERATOR": "cuda" if self.settings.gpus else "cpu",
                "TOKENIZERS_PARALLELISM": "false",
            }
            actor = ray.remote(EncoderWorker).options(
                num_cpus=self.settings.cpus,
                num_gpus=self.settings.gpus,
                scheduling_strategy=self._room.strategy(rank),
                runtime_env={"env_vars": variables},
            )
            self._workers.append(actor.remote())
        everyone = len(self._workers)
        places: list[Place] = self._results("place", [()] * everyone, self._wait)
        check_devices(places, bool(self.settings.gpus))
        self._results("join", [(env, self._threads) for env in environments(places)])
        return self._results("load", [(self.config, engine_config(self.settings), self._adapters)] * everyone)

    def _results(self, method: str, arguments: Sequence[tuple], seconds: float | None = None) -> list[Any]:
        """Call ``method`` on every worker; raises WorkerDiedError, or the first error of our own code.

        A rank that fails or dies leaves the others in a collective that never ends: they are stopped.
        """
        calls = zip(self._workers, arguments, strict=True)
        pending = {getattr(worker, method).remote(*some): rank for rank, (worker, some) in enumerate(calls)}
        results: dict[int, Any] = {}
        error: exceptions.RayTaskError | None = None
        end = None if seconds is None else time.monotonic() + seconds
        while pending:
            left = None if end is None else max(0.0, end - time.monotonic())
            done, _ = ray.wait(list(pending), timeout=GRACE_SECONDS if error else left)
            if not done:
                break
            rank = pending.pop(done[0])
            try:
                results[rank] = ray.get(done[0])
            except exceptions.RayTaskError as failure:  # perhaps only because another rank died: wait and see
                error = error or failure
            except exceptions.RayError as failure:
                if classify(failure) in (Event.DIED, Event.UNREACHABLE, Event.OUT_OF_MEMORY):
                    raise WorkerDiedError(rank, failure) from failure
                raise
        if error is not None:
            if pending or not isinstance(error.cause, TalkDistError):
                self._stop()
            raise error.cause if isinstance(error.cause, TalkDistError) else error
        if pending:
            self._stop()
            raise CapacityError(f"encoder workers {sorted(pending.values())} did not start within {seconds:g} s")
        return [results[rank] for rank in range(len(self._workers))]

    def _stop(self) -> None:
        for worker in self._workers:
            ray.kill(worker)
        self._workers = []


def _shared(tensor: Tensor | None) -> Any:
    """Once in the object store, for all workers."""
    return None if tensor is None else ray.put(tensor.detach().cpu())
