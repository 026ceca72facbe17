"""Distil a text-attributed graph into a synthetic one a hundredth of its size (TaLK, arXiv 2606.22975)."""

from talk_dist.config import DistillConfig as DistillConfig
from talk_dist.data.prepare import prepare as prepare
from talk_dist.data.pyg import from_pyg as from_pyg
from talk_dist.data.tables import from_arrow as from_arrow
from talk_dist.data.tables import from_ogb as from_ogb
from talk_dist.data.tables import open_tables as open_tables
from talk_dist.data.tag import PreparedTag as PreparedTag
from talk_dist.distill import distill as distill
from talk_dist.evaluate import EvaluateConfig as EvaluateConfig
from talk_dist.evaluate import evaluate as evaluate
from talk_dist.models.encoder import TextEncoder as TextEncoder
from talk_dist.models.given import GivenEncoder as GivenEncoder
from talk_dist.presets import preset as preset
from talk_dist.runtime.pool import LocalPool as LocalPool
from talk_dist.synthetic.artifact import SyntheticTAG as SyntheticTAG

__version__ = "0.1.0"
