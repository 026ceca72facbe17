"""A transformer's layers: which of them have adapters, a pass that begins at the first of these, a pass that ends in
one position.

What enters the first layer with adapters does not depend on them: of a text that is encoded again and again the layers
below need to run once. All of this goes through the model's own forward, so that masks, rotary angles and the like are
the model's; single layers are stood in for while it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from talk_dist.config import EncoderConfig
from talk_dist.data.tag import TokenLists
from talk_dist.errors import ConfigError
from talk_dist.models.protocol import Lower

# What transformers calls query, key and value projections in the usual architectures.
ATTENTION_NAMES = {"query", "key", "value", "q_proj", "k_proj", "v_proj", "q_lin", "k_lin", "v_lin", "Wqkv", "c_attn"}
ATTENTION_NAMES |= {"q", "k", "v", "query_proj", "key_proj", "value_proj"}
SAME = 1e-4  # relative: how near the two halves of a split model must come to the whole


def find_layers(model: nn.Module, name: str) -> tuple[str, nn.ModuleList]:
    """The path and the list of the model's layers: the outermost list that is as long as its configuration says.

    Raises ConfigError if there is none (layers that share weights), or more than one (encoder and decoder).
    """
    count = getattr(model.config, "num_hidden_layers", 0)
    lists = {path: m for path, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count}
    outermost = [path for path in lists if not any(path.startswith(f"{other}.") for other in lists)]
    if len(outermost) != 1:
        found = f"{len(outermost)} lists" if outermost else "no list"
        raise ConfigError(f"encoder.adapted_layers: {name!r} has {found} of {count} layers; set it to 0 (all)")
    return outermost[0], lists[outermost[0]]


def frozen_layers(model: nn.Module, config: EncoderConfig) -> int:
    """How many layers are below the adapters. Raises ConfigError if there are fewer layers than are to be adapted."""
    if not config.adapters or not config.adapted_layers:
        return 0
    count = len(find_layers(model, config.name)[1])
    if config.adapted_layers > count:
        raise ConfigError(
            f"encoder.adapted_layers = {config.adapted_layers}: {config.name!r} has {count} layers; set that or fewer"
        )
    return count - config.adapted_layers


def add_adapters(model: nn.Module, config: EncoderConfig, frozen: int) -> None:
    """LoRA adapters in all but the first ``frozen`` layers. Raises ConfigError, see `adapter_targets`."""
    from peft import LoraConfig, inject_adapter_in_model

    targets = adapter_targets(model, config, frozen)
    lora = LoraConfig(r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=targets)
    inject_adapter_in_model(lora, model)


def adapter_targets(model: nn.Module, config: EncoderConfig, frozen: int) -> list[str]:
    """Names of the modules that get adapters: as PEFT knows them in all layers, or, where the first ``frozen`` layers
    get none, in full. Raises ConfigError if there are none, or not all that ``encoder.targets`` asks for."""
    whole = [name for name, module in model.named_modules() if not list(module.children())]
    leaves = {name.rsplit(".", 1)[-1] for name in whole}
    targets = set(config.targets) or leaves & ATTENTION_NAMES
    if not targets or not targets <= leaves:
        missing = str(sorted(targets - leaves)) if targets else "query, key and value projections"
        raise ConfigError(f"encoder.targets: {missing} not found in {config.name!r}; it has {sorted(leaves)}")
    if not frozen:
        return sorted(targets)
    path, layers = find_layers(model, config.name)
    upper = tuple(f"{path}.{index}." for index in range(frozen, len(layers)))
    chosen = [name for name in whole if name.startswith(upper) and name.rsplit(".", 1)[-1] in targets]
    if not chosen:
        raise ConfigError(f"encoder.targets: {sorted(targets)} not in the last {len(upper)} layers of {config.name!r}")
    return chosen


class Split:
    """A model in two: ``frozen`` layers and all before them, and the others.

    Raises ConfigError if more than hidden states goes from layer to layer, so that it cannot be split: a few tokens
    are passed through to see.
    """

    def __init__(self, model: nn.Module, name: str, frozen: int, device: torch.device):
        layers = find_layers(model, name)[1]
        self._below, self._above = list(layers[:frozen]), list(layers[frozen:])
        self._name, self._device = name, device
        self._others: int | None = None  # what a layer returns beside hidden states; None: it returns these alone
        ids = torch.arange(4, device=device)[None]

        def run() -> Tensor:
            states: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
            return states

        with torch.no_grad():
            whole = self._probe(run)
            with self.above(self.below(run)):
                again = run()
        if not torch.allclose(again, whole, rtol=0, atol=SAME * float(whole.abs().max())):
            raise self._refused("hand on more than hidden states")

    @contextmanager
    def kept(self, lower: Lower, tokens: TokenLists, rows: np.ndarray, run: Callable[[], object]) -> Iterator[None]:
        """Inside, ``run``, a pass of these ``rows`` of the token lists, begins with what ``lower`` holds of them; if
        that is nothing yet, it is put there first. Raises ConfigError for values beyond its number format."""
        mask = torch.from_numpy(tokens.padded(rows)[1]).bool()
        if not lower.filled:
            values, limit = self.below(run).float().cpu()[mask].numpy(), float(np.finfo(lower.values.dtype).max)
            if (largest := float(np.abs(values).max(initial=0.0))) > limit:
                raise ConfigError(
                    f"encoder.adapted_layers: layer {len(self._below)} of {self._name!r} returns the value "
                    f"{largest:.3g}, beyond half precision ({limit:.0f}); set it to 0 (all)"
                )
            lower.put(tokens, rows, values)
        states = torch.zeros(*mask.shape, lower.values.shape[1])
        states[mask] = torch.from_numpy(lower.of(tokens, rows)).float()
        with self.above(states.to(self._device)):
            yield

    def below(self, run: Callable[[], object]) -> Tensor:
        """What enters the first layer with adapters, (n, T, d), when ``run`` passes through the model: none of these
        layers runs."""
        seen: list[Tensor] = []
        with _stand_in(self._above, lambda hidden_states, *_, **__: self._returned(seen, hidden_states)):
            run()
        if not seen:
            raise self._refused("are not called one after the other")
        return seen[0]

    @contextmanager
    def above(self, states: Tensor) -> Iterator[None]:
        """Inside, a pass through the model takes ``states`` (n, T, d) for what enters the first layer with adapters:
        no layer below runs."""

        def enter(
            _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            return ((states, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": states})

        # what comes out of the layers below is replaced here, and not there: a model may work on it in between
        handle = self._above[0].register_forward_pre_hook(enter, with_kwargs=True)
        try:
            with _stand_in(self._below, lambda hidden_states, *_, **__: self._returned([], hidden_states)):
                yield
        finally:
            handle.remove()

    def _refused(self, why: str) -> ConfigError:
        return ConfigError(
            f"encoder.adapted_layers: the layers of {self._name!r} {why}, so that encodings cannot start between them; "
            "set it to 0 (all)"
        )

    def _returned(self, seen: list[Tensor], hidden_states: Tensor) -> Any:
        seen.append(hidden_states)
        return hidden_states if self._others is None else (hidden_states, *[None] * self._others)

    def _probe(self, run: Callable[[], Tensor]) -> Tensor:
        """A whole pass, which shows what a layer returns."""

        def look(_: nn.Module, __: object, output: object) -> None:
            self._others = len(output) - 1 if isinstance(output, tuple) else None

        handle = self._below[0].register_forward_hook(look)
        try:
            return run()
        finally:
            handle.remove()


def end_in_first_position(model: nn.Module) -> None:
    """For CLS pooling, which reads one position of the last layer: its query and feed-forward run for that one alone,
    its keys and values for all. The states of the model's last layer are (n, 1, d) afterwards.

    Only for BERT's own layer, whose parts it goes through; other models stay as they are.
    """
    from transformers.models.bert.modeling_bert import BertLayer, BertModel

    masked = getattr(model.config, "_attn_implementation", "") in ("sdpa", "eager")  # masks are (n, 1, T, T)
    if not isinstance(model, BertModel) or model.config.is_decoder or not masked:
        return
    last: Any = model.encoder.layer[-1]
    if type(last) is not BertLayer:
        return

    def forward(hidden_states: Tensor, attention_mask: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
        attention, first = last.attention.self, hidden_states[:, :1]
        heads = (attention.query(first), attention.key(hidden_states), attention.value(hidden_states))
        query, key, value = (x.unflatten(-1, (-1, attention.attention_head_size)).transpose(1, 2) for x in heads)
        mask = None if attention_mask is None else attention_mask[:, :, :1]
        context = scaled_dot_product_attention(query, key, value, mask)
        output: Tensor = last.feed_forward_chunk(last.attention.output(context.transpose(1, 2).flatten(2), first))
        return output

    last.forward = forward


@contextmanager
def _stand_in(layers: Sequence[nn.Module], forward: Callable[..., Any]) -> Iterator[None]:
    """Inside, ``forward`` is called for each of the layers; hooks and attributes of a layer stay."""
    own = [layer.__dict__.get("forward") for layer in layers]
    for layer in layers:
        layer.forward = forward
    try:
        yield
    finally:
        for layer, before in zip(layers, own, strict=True):
            if before is None:
                del layer.forward
            else:
                layer.forward = before
