"""What a distillation computes, in FLOP and training steps, and how fast this machine does that: rough, within two."""

from __future__ import annotations

import time
from typing import Any

import torch

from talk_dist.config import DistillConfig
from talk_dist.models.shape import ModelShape
from talk_dist.runtime.teacher import BATCH
from talk_dist.training import EvaluateConfig

ENCODER_SHARE = 0.6  # of the matrix product's rate that an encoder pass reaches, all else included
BFLOAT16_GAIN = 1.3  # on a CPU, of a whole encoder pass
SMALL_SHARE = 0.4  # the same for students: narrow matrices, sparse products
ELEMENT_FLOP = 250  # what an element of a kernel block costs a hop and layer beside the product: arc cosine, roots
SOLVE_FLOP = 6000  # what an element of K_ss costs in double precision: its arc cosine, Cholesky's share, the gradient
SEARCH_PASSES = 43  # of a step of the discrete inversion: candidates, the best together, a gradient
LESSON = 2  # a teacher's passes, its candidates together, relative to those of a student of a small set
EVALUATED_PASSES = 250  # of a student that is evaluated, before validation no longer rises
STEP_SECONDS = 2e-3  # a training step cannot be shorter


def adapted_layers(config: DistillConfig, model: ModelShape) -> int:
    """How many layers have adapters."""
    encoder = config.encoder
    return min(encoder.adapted_layers or model.layers, model.layers) if encoder.adapters else 0


def layers_again(config: DistillConfig, model: ModelShape) -> int:
    """How many layers a real text goes through when it is encoded again: workers that encode for others keep nothing
    of what is below the adapters."""
    lent = config.runtime.kind == "ray" and config.deepspeed.encode_texts
    return model.layers if lent else adapted_layers(config, model) or model.layers


def work(
    meta: dict[str, Any], config: DistillConfig, model: ModelShape, m: int, evaluation: EvaluateConfig | None
) -> tuple[dict[str, float], dict[str, int]]:
    """FLOP by phase as a matrix product would count them: slower kinds of work count more."""
    nodes, entries = meta["num_nodes"], 2 * meta["num_edges"] + meta["num_nodes"]
    split, classes = meta["split_sizes"], len(meta["classes"])
    train = split["train"]
    text_tokens, t = meta["text"]["tokens"], config.synthetic.tokens
    outer, inner, adapters = config.outer, config.inner, config.encoder.adapters
    encoding = text_tokens * model.token_flop(text_tokens / max(1, nodes)) / ENCODER_SHARE
    again = encoding * layers_again(config, model) / max(1, model.layers)
    forward = m * t * model.token_flop(t) / ENCODER_SHARE
    inject = 3 * forward  # once without gradient, once with, and back
    taught = outer.targets == "teacher"
    reach = max(1.0, entries / nodes) ** (config.kernel.rounds - 1)  # rows of the receptive field of one
    row = m * (2.0 * model.width + config.kernel.rounds * config.kernel.layers * ELEMENT_FLOP)
    blocks = config.kernel.blocks(m)
    wanted = (nodes if taught else train) / blocks  # rows of one block
    step = 3 * row * min(nodes, min(wanted, outer.rows or wanted) * reach) + SOLVE_FLOP * m * m / blocks
    predicted = row * min(nodes, split["val"] / blocks * reach) + SOLVE_FLOP / 2 * m * m / blocks
    scores = (2.0 * nodes * model.width * config.student.hidden + 2.0 * entries * config.student.hidden) / SMALL_SHARE
    student = 6.0 * m * config.student.hidden * (model.width + classes) / SMALL_SHARE
    upper = 3 * forward * adapted_layers(config, model) / max(1, model.layers)  # of a pass, with gradient
    fit = inner.passes * (upper + student)
    epochs = config.outer_epochs + 1
    lessons = (1 + epochs if adapters else 1) if taught else 0
    heard = min(train, BATCH) + min(split["val"], BATCH) / (3 * inner.select_every)
    lesson = LESSON * inner.passes * 6.0 * heard * config.student.hidden * (model.width + classes) / SMALL_SHARE
    flop = {"encode": encoding + (again * epochs if adapters else 0.0), "initialise": lessons * lesson}
    steps = {"outer epochs": epochs * inner.passes, "initialise": lessons * LESSON * inner.passes}
    if config.synthetic.init == "two-stage":
        two, discrete = config.two_stage, config.synthetic.discrete
        checks = two.feature_steps // two.validate_every + 1
        flop["initialise"] += two.feature_steps * step + checks * (inner.passes * student + scores + predicted)
        passes = two.discrete_steps * SEARCH_PASSES if discrete else two.token_steps * 2
        flop["initialise"] += passes * forward
        steps["initialise"] += two.feature_steps + checks * inner.passes + two.token_steps
        if two.student_steps:
            checks = two.judges * (two.student_steps // two.validate_every + 1)
            unrolled = two.student_steps * 0.75 * two.student_passes  # passes, gone through once and, dearer, again
            real = min(wanted, outer.rows or wanted) / m * student  # the gradient on real rows, relative to a pass
            flop["initialise"] += 4 * unrolled * student + two.student_steps * blocks * real
            flop["initialise"] += checks * (inner.passes * student + scores) + checks / two.judges * predicted
            steps["initialise"] += 2 * int(unrolled) * blocks + checks * inner.passes
    flop["outer epochs"] = epochs * (fit + scores + predicted) + config.outer_epochs * outer.steps * (inject + step)
    if config.settles:
        flop["settle"] = 2 * config.synthetic.settle_passes * forward
    if evaluation is not None:
        small = 1 + sum(name != "full" for name in evaluation.against)
        recipe = evaluation.recipe
        passes = min(recipe.passes, EVALUATED_PASSES if recipe.select_patience else recipe.passes)
        one = passes * student + (passes // recipe.select_every + 1) * scores
        choices = len(evaluation.full_lr) * len(evaluation.full_label_smoothing)
        whole = choices * (3 + 1 / recipe.select_every) * passes * scores
        if adapters:  # after the student on the encodings as they are
            joint = recipe.joint_passes
            one += joint * (upper + student) + (joint // recipe.adapter_select_every + 3) * again
            whole += evaluation.full_epochs * (3 * train / nodes * encoding + again) + 2 * again
        full = "full" in evaluation.against
        flop["evaluate"] = evaluation.seeds * (small * one + full * whole)
        steps["evaluate"] = evaluation.seeds * (small + full * choices) * passes
    return flop, steps


def measured_rate(device: torch.device, bfloat16: bool, seconds: float = 1.0) -> float:
    """FLOP/s of a matrix product on ``device``, measured for about so many seconds.

    On a CPU bfloat16 multiplies many times faster, but what stands between the products does not.
    """
    gpu = device.type != "cpu"
    size = 8192 if gpu else 1024
    a = torch.randn(size, size, dtype=torch.bfloat16 if bfloat16 and gpu else torch.float32, device=device)
    with torch.inference_mode():
        float((a @ a)[0, 0])
        started, count = time.perf_counter(), 0
        while time.perf_counter() - started < seconds:
            float((a @ a)[0, 0])  # waits for the device
            count += 1
        rate = 2.0 * size**3 * count / (time.perf_counter() - started)
    return rate * BFLOAT16_GAIN if bfloat16 and not gpu else rate
