"""Everything that can be found wrong before a text is encoded, all of it in one error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeVar

from talk_dist.commands.folder import ARTIFACT, RunFolder
from talk_dist.config import BITS, DistillConfig
from talk_dist.data import storage
from talk_dist.data.given import given_name, given_width
from talk_dist.data.tag import PreparedTag
from talk_dist.data.tokenizer import load_pretrained
from talk_dist.errors import CapacityError, ConfigError, DataError, TalkDistError
from talk_dist.evaluate import EvaluateConfig
from talk_dist.models.device import pick_device
from talk_dist.models.protocol import Encoder
from talk_dist.models.shape import ModelShape
from talk_dist.resources import ClusterConfig, DeepSpeedConfig, RuntimeConfig
from talk_dist.runtime import estimate, memory
from talk_dist.runtime.fields import available_disk
from talk_dist.runtime.memory import gib
from talk_dist.synthetic.artifact import CONFIG, SyntheticTAG
from talk_dist.synthetic.init import class_counts, num_synthetic

T = TypeVar("T")


class Problems:
    """Collects what is wrong; `done` raises it as one error."""

    def __init__(self) -> None:
        self.errors: list[TalkDistError] = []

    def attempt(self, action: Callable[[], T]) -> T | None:
        """The result of ``action``, or None if it raised an error of ours, which is kept."""
        try:
            return action()
        except TalkDistError as error:
            self.errors.append(error)
            return None

    def done(self) -> None:
        """Raises ConfigError, or the error itself if it is the only one."""
        if len(self.errors) == 1:
            raise self.errors[0]
        if self.errors:
            raise ConfigError(listed([str(error) for error in self.errors]))


def listed(problems: Sequence[str]) -> str:
    """One problem as it is, more of them numbered."""
    if len(problems) == 1:
        return problems[0]
    return f"{len(problems)} problems" + "".join(f"\n  {i}. {p}" for i, p in enumerate(problems, 1))


def check_tag(tag: PreparedTag, config: DistillConfig, splits: Sequence[str], problems: Problems) -> None:
    """What ``config`` and a prepared graph must have in common, encoder apart."""
    meta, hops = tag.meta, config.kernel.rounds
    problems.attempt(lambda: class_counts(tag, config))
    halo_hops = meta["partition"]["halo_hops"]
    if hops > halo_hops + 1:
        need = f"set --kernel.hops {halo_hops + 1} or prepare it again with --halo_hops {hops - 1}"
        problems.errors.append(ConfigError(f"kernel.hops = {hops}: {tag.path} has halos for {halo_hops + 1}; {need}"))
    for split in splits:
        problems.attempt(partial(tag.check_split, split))
    problems.attempt(lambda: check_given(tag, config))


def check_given(tag: PreparedTag, config: DistillConfig) -> None:
    """Raises one ConfigError that lists every setting with which a graph of encodings cannot be distilled."""
    if tag.encoding_width is None:
        return
    encoder, synthetic, name = config.encoder, config.synthetic, given_name(tag.encoding_width)
    wrong = {
        "encoder.name": (encoder.name, name, encoder.name != name),
        "encoder.adapters": (encoder.adapters, False, encoder.adapters),
        "deepspeed.workers": (config.deepspeed.workers, 0, config.deepspeed.workers > 0),
        "synthetic.tokens": (synthetic.tokens, 1, synthetic.tokens != 1),
        "synthetic.discrete": (synthetic.discrete, False, synthetic.discrete),
        # nothing to settle: an encoding has no numbers to spare that could make good what rounding takes
        "synthetic.storage": (synthetic.storage, "int8", synthetic.storage in BITS),
    }
    found = {key: (value, wanted) for key, (value, wanted, bad) in wrong.items() if bad}
    if found:
        there = ", ".join(f"{key} = {value!r}" for key, (value, _) in found.items())
        remedy = " ".join(f"--{key} {str(wanted).lower()}" for key, (_, wanted) in found.items())
        raise ConfigError(
            f"{tag.path} brings encodings {tag.encoding_width} wide in place of texts, so that {there} cannot work; "
            f"set {remedy}"
        )


def check_encoder(encoder: Encoder, tokens: int, tag: PreparedTag | None, problems: Problems) -> None:
    """Synthetic nodes must fit the encoder's positions, and its tokenizer must have made the graph's tokens; of a graph
    that brings encodings, `check_given` says all."""
    if tag is not None and tag.encoding_width is not None:
        return
    positions, name = min(encoder.max_positions, encoder.tokenizer.max_length), encoder.config.name
    if tokens > positions:
        problems.errors.append(
            ConfigError(f"synthetic.tokens = {tokens}: encoder {name!r} has {positions} positions; set that or fewer")
        )
    if tag is not None:
        problems.attempt(lambda: tag.check_tokenizer(name, encoder.tokenizer.fingerprint))
        longest = int(tag.meta["tokenizer"]["max_tokens"])  # a tokenizer may not know how many there are
        if longest > positions:
            wrong = f"{tag.path} has texts of up to {longest} tokens, but encoder {name!r} has {positions} positions"
            problems.errors.append(ConfigError(f"{wrong}; prepare it again with --max_tokens {positions} or fewer"))


def planned(tag: PreparedTag, config: DistillConfig, evaluation: EvaluateConfig | None) -> estimate.Plan:
    """What the run will hold and compute."""
    shape = _shape(config.encoder.name)
    size = num_synthetic(config.synthetic.size, tag.num_nodes)
    on_gpu = config.cluster.gpus > 0 if config.runtime.kind == "ray" else pick_device(config.encoder.device) != "cpu"
    return estimate.plan(tag.meta, config, shape, size, evaluation, on_gpu)


def _shape(encoder: str) -> ModelShape:
    width = given_width(encoder)
    if width is not None:
        return ModelShape.given(width)
    from transformers import AutoConfig

    return ModelShape.of(load_pretrained(AutoConfig.from_pretrained, encoder))


def check_memory(tag: PreparedTag, config: DistillConfig, evaluation: EvaluateConfig | None) -> estimate.Plan:
    """The plan of a run. Raises CapacityError if this machine's free memory is not enough, with what to change."""
    plan = planned(tag, config, evaluation)
    refuse_if_too_large(plan, config)
    return plan


def refuse_if_too_large(plan: estimate.Plan, config: DistillConfig) -> None:
    """Raises CapacityError if what runs in this process needs more memory, or room in `runtime.scratch`, than is free.

    What the actors of a cluster need, the cluster is asked for.
    """
    available = memory.available()
    here = plan.whole() if config.runtime.kind == "local" else plan.driver(config.deepspeed.workers > 0)
    if available is not None and here.host > available:
        raise CapacityError(here.refusal("this" if config.runtime.kind == "local" else "the driver", available))
    if plan.disk and config.runtime.kind == "local":
        room = available_disk(config.runtime.scratch)
        if plan.disk > room:
            raise CapacityError(
                f"this needs {gib(plan.disk)} on disk and {gib(room)} are free in "
                f"{config.runtime.scratch or 'the folder for temporary files'}; set --runtime.scratch to a folder with "
                "more room, or --kernel.fields memory"
            )


def check(
    config: DistillConfig,
    evaluation: EvaluateConfig | None,
    folder: RunFolder,
    load: Callable[[], Encoder],
    open_data: Callable[[Encoder | None], PreparedTag | None],
) -> tuple[PreparedTag, Encoder, estimate.Plan]:
    """The graph and the encoder of a run that can work. Raises one error that lists every problem.

    ``open_data`` may need the encoder (to prepare the embedded graph), and gives None without it then.
    """
    problems = Problems()
    problems.attempt(folder.check)
    encoder = problems.attempt(load)
    tag = problems.attempt(lambda: open_data(encoder))
    if tag is not None:
        check_tag(tag, config, ("val",) if evaluation is None else ("val", "test"), problems)
    if encoder is not None:
        check_encoder(encoder, config.synthetic.tokens, tag, problems)
    problems.done()
    assert tag is not None
    assert encoder is not None
    return tag, encoder, check_memory(tag, config, evaluation)


def check_evaluation(
    artifact: SyntheticTAG,
    path: str,
    tag: PreparedTag,
    config: DistillConfig,
    evaluation: EvaluateConfig,
    force: bool,
    load: Callable[[], Encoder],
) -> tuple[Encoder, estimate.Plan]:
    """The encoder, if ``artifact`` can be evaluated on ``tag``. Raises one error that lists every problem.

    ``force`` lets another graph pass if its classes are the same.
    """
    problems = Problems()
    problems.attempt(lambda: check_origin(artifact, path, tag, force))
    config = replace(config, synthetic=replace(config.synthetic, size=len(artifact)))  # whatever share of this graph
    check_tag(tag, config, ("val", "test"), problems)
    encoder = problems.attempt(load)
    if encoder is not None:
        check_encoder(encoder, artifact.token_embeds.shape[1], tag, problems)
        table = encoder.token_table
        width, what = (encoder.width, "encodings") if artifact.encoded else (table.shape[1], "token embeddings")
        whole = problems.attempt(lambda: artifact.embedded(table))
        if whole is not None and whole.token_embeds.shape[2] != width:
            wide = f"holds {what} {whole.token_embeds.shape[2]} wide, but the encoder's are {width}"
            problems.errors.append(DataError(path, wide))
        if artifact.encoded and encoder.adapted:
            problems.errors.append(DataError(path, "holds encodings, which train no adapters: pass --adapters false"))
    problems.done()
    assert encoder is not None
    return encoder, check_memory(tag, config, evaluation)


def check_origin(artifact: SyntheticTAG, path: str, tag: PreparedTag, force: bool | None = None) -> None:
    """Raises DataError unless ``artifact`` was made from ``tag``, or, with ``force``, from one of its classes."""
    made, here = str(artifact.config.get("dataset_hash")), str(tag.meta["hash"])
    if artifact.classes != tag.classes:
        raise DataError(path, f"has the classes {artifact.classes}, but {tag.path} has {tag.classes}")
    if made != here and not force:
        name = artifact.config.get("dataset")
        different = f"was made from {name!r} with hash {made[:16]}, but {tag.path} has hash {here[:16]}"
        choice = "" if force is None else ", or --force true to use this one"
        raise DataError(path, f"{different}; give that graph{choice}")


def distilled_with(artifact: SyntheticTAG, path: str) -> DistillConfig:
    """The configuration that ``artifact`` was distilled with, but for what it says of the machine where that was.
    Raises DataError if it does not say."""
    if "distill" not in artifact.config:
        raise DataError(path, "does not say how it was distilled (config.json has no `distill`); distil it again")
    config = DistillConfig.from_dict(artifact.config["distill"])
    then = config.runtime
    threads = then.threads or int(artifact.config.get("threads", 0))  # what was left open then is known now
    runtime = RuntimeConfig(threads=threads, cache=then.cache, cache_folder=_if_there(then.cache_folder))
    encoder = replace(config.encoder, device="auto")
    return replace(config, encoder=encoder, runtime=runtime, cluster=ClusterConfig(), deepspeed=DeepSpeedConfig())


def _if_there(folder: str) -> str:
    try:
        return folder if folder and storage.exists(folder) else ""
    except (TalkDistError, OSError):  # on a file system that cannot be reached from here
        return ""


def artifact_path(path: str) -> str:
    """The artifact at ``path``, or inside it if that is the folder of a run."""
    inside = storage.join(path, ARTIFACT)
    return inside if storage.exists(storage.join(inside, CONFIG)) else path
