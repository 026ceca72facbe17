"""Which optimiser finds tokens for given encodings in the fewest encoder passes: Adam, one L-BFGS over all synthetic
nodes together (torch's, with its strong Wolfe search), or the product's, which gives each node a history of its own.

Every optimiser starts from the same medoid texts, T = 16. A pass is one evaluation of the encoder with its gradient,
line searches included. Adam's learning rate falls by a cosine; it is the best of `--rates` on the first graph. The
error is ||enc(x) - h||^2 / ||h||^2 over all nodes, and with `--errors` where the product's leaves a node alone, within
120 passes. No test node is read.

    python benchmarks/inversion.py PREPARED... --out benchmarks/results/inversion.md
"""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from cases import Case, report, spread
from torch import Tensor

from talk_dist.synthetic.invert import invert


def adam(case: Case, x: Tensor, passes: int, rate: float) -> Tensor:
    leaf = x.clone().requires_grad_()
    optimizer = torch.optim.Adam([leaf], lr=rate)
    for step in range(passes):
        optimizer.param_groups[0]["lr"] = rate * max(0.05, 0.5 * (1 + math.cos(math.pi * step / passes)))
        leaf.grad = case.residual(leaf.detach())[1] / len(x)
        optimizer.step()
    return leaf.detach()


def jointly(case: Case, x: Tensor, marks: tuple[int, ...]) -> list[Tensor]:
    """torch.optim.LBFGS on the sum over all nodes; the best point evaluated until each mark."""
    leaf, scale, seen = x.clone().requires_grad_(), float(case.residual(x)[0].sum()), []
    optimizer = torch.optim.LBFGS(
        [leaf], max_iter=marks[-1], max_eval=marks[-1], line_search_fn="strong_wolfe", tolerance_change=0.0
    )

    def closure() -> Tensor:
        distances, gradient = case.residual(leaf.detach())
        leaf.grad = gradient / scale
        seen.append((float(distances.sum()), leaf.detach().clone()))
        return torch.tensor(seen[-1][0] / scale)

    optimizer.step(closure)
    return [min(seen[:mark], key=lambda at: at[0])[1] for mark in marks]


def ours(case: Case, x: Tensor, passes: int, error: float = -1.0) -> tuple[Tensor, float]:
    """The tokens, each node's until its relative error is ``error``, and the passes that a node took on average."""
    asked = []

    def residual(flat: Tensor, nodes: Tensor) -> tuple[Tensor, Tensor]:
        asked.append(len(nodes))
        distances, gradient = case.residual(flat.view(-1, *x.shape[1:]), nodes)
        return distances, gradient.flatten(1)

    goal = error * case.h_s.square().sum(1)
    return invert(residual, x.flatten(1), passes, goal, lambda *_: None).view_as(x), sum(asked) / len(x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", nargs="+")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.01, 0.02, 0.03])
    parser.add_argument("--errors", type=float, nargs="+", default=[0.003, 0.006, 0.012])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rate, found = arguments.rates[0], defaultdict(list)
    for seed, path in enumerate(arguments.data):
        case = Case(path, int(path[-1]) if path[-1].isdigit() else seed)
        x, name = case.medoids(16), case.tag.meta["name"]
        if seed == 0 and len(arguments.rates) > 1:
            rate = min(arguments.rates, key=lambda r: case.error(adam(case, x, 240, r)))
        tokens = {f"Adam, rate {rate:g}": (adam(case, x, 240, rate), 240.0)}
        for mark, there in zip((80, 120), jointly(case, x, (80, 120)), strict=True):
            tokens[f"torch L-BFGS, all nodes together, {mark} passes"] = there, float(mark)
        tokens |= {f"ours, each node by itself, {mark} passes": ours(case, x, mark) for mark in (80, 120)}
        tokens |= {f"ours, until a node's error is {error:g}": ours(case, x, 120, error) for error in arguments.errors}
        found[name, "stage one itself"].append((0.0, 0.0, case.scores(case.h_s)))
        for method, (there, passes) in tokens.items():
            found[name, method].append((case.error(there), passes, case.scores(case.encoder.encode_embeds(there))))
            print(path, method, found[name, method][-1], flush=True)
    lines = ["| graph | tokens by | passes a node | relative error | validation accuracy |"]
    lines.append("| --- | --- | ---: | ---: | ---: |")
    for (name, method), runs in found.items():
        errors, counts, scores = zip(*runs, strict=True)
        together = spread([score for some in scores for score in some])
        lines.append(f"| {name} | {method} | {np.mean(counts):.0f} | {spread(errors)} | {together} |")
    report("Tokens for given encodings: three optimisers", lines, arguments.out)


if __name__ == "__main__":
    main()
