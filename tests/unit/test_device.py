"""Number formats: attention stays in float32 under bfloat16 autocast on a CPU, forward and backward."""

import pytest
import torch
from torch.nn.functional import linear, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from talk_dist.errors import ConfigError
from talk_dist.models.device import SingleAttention, pick_device


@pytest.fixture
def heads():
    """Query, key, value (2, 3, 5, 8) in bfloat16 and a mask of each kind, the last key hidden."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 2, 3, 5, 8, generator=generator).bfloat16()
    seen = (torch.arange(5) < 4).expand(2, 1, 5, 5)
    return (query, key, value), {"bool": seen, "float": torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)}


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_attention_is_that_of_float32_and_its_gradient_too(heads, kind):
    """To the bit, rounded to the format of the query; so the kernel is not autocast's."""
    parts, masks = heads
    formats = torch.bfloat16, torch.float32
    rounded, exact = ([x.detach().to(number).requires_grad_() for x in parts] for number in formats)
    with torch.autocast("cpu", torch.bfloat16), SingleAttention():
        mine = scaled_dot_product_attention(*rounded, attn_mask=masks[kind])
    truth = scaled_dot_product_attention(*exact, attn_mask=masks[kind])
    assert mine.dtype == torch.bfloat16
    assert torch.equal(mine, truth.bfloat16())
    up = torch.linspace(-1, 1, mine.numel()).view(mine.shape).bfloat16()
    gradients = torch.autograd.grad(mine, rounded, up), torch.autograd.grad(truth, exact, up.float())
    for of_mine, of_truth in zip(*gradients, strict=True):
        assert torch.equal(of_mine, of_truth.bfloat16())


def test_products_around_it_are_autocast(heads):
    (query, *_), _ = heads
    with torch.autocast("cpu", torch.bfloat16), SingleAttention():
        assert linear(query.float(), torch.eye(8)).dtype == torch.bfloat16
        by_name = scaled_dot_product_attention(query=query.float(), key=query.float(), value=query.float())
    assert torch.equal(by_name, scaled_dot_product_attention(query.float(), query.float(), query.float()))


class Formats(TorchFunctionMode):
    """The number formats of all queries that reach attention."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is scaled_dot_product_attention:
            self.seen.add((args[0].dtype, torch.is_autocast_enabled("cpu")))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_an_encoder_in_bfloat16_attends_in_float32(make_encoder, pooling):
    """In every layer, that which ends in one position too."""
    with Formats() as formats:
        make_encoder(precision="bfloat16", pooling=pooling).encode_embeds(torch.randn(2, 5, 32))
    assert formats.seen == {(torch.float32, False)}


@pytest.mark.parametrize("name", ["gpu", "CPU", "cuda:x", "meta"])
def test_a_device_that_is_none(name):
    with pytest.raises(ConfigError, match=f"encoder.device = '{name}': must be auto, cpu or cuda"):
        pick_device(name)
