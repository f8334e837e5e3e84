"""Metrics as declared formulas, streamed accumulators, and intervals from resampled documents."""

from __future__ import annotations

from .accumulate import DENSE as DENSE
from .accumulate import DensityHistogram as DensityHistogram
from .accumulate import Fidelity as Fidelity
from .accumulate import Moments as Moments
from .accumulate import Reconstruction as Reconstruction
from .accumulate import Sparsity as Sparsity
from .accumulate import Sums as Sums
from .accumulate import fvu as fvu
from .bootstrap import N_GROUPS as N_GROUPS
from .bootstrap import DocumentBootstrap as DocumentBootstrap
from .bootstrap import Estimate as Estimate
from .bootstrap import basic_interval as basic_interval
from .bootstrap import bootstrap_mean as bootstrap_mean
from .bootstrap import row_groups as row_groups
from .interpret import AgainstChance as AgainstChance
from .interpret import Chance as Chance
from .interpret import Cohesion as Cohesion
from .interpret import TokenScores as TokenScores
from .interpret import TokenStats as TokenStats
from .interpret import against_chance as against_chance
from .interpret import labels_of as labels_of
from .interpret import shifted as shifted
from .interpret import token_detection as token_detection
from .mdl import DescriptionLength as DescriptionLength
from .metrics import METRICS as METRICS
from .metrics import Metric as Metric
from .pca import PCA as PCA
from .pca import Covariance as Covariance
from .redundancy import max_cosines as max_cosines
from .redundancy import random_max_cosine as random_max_cosine
from .redundancy import redundancy as redundancy
from .result import Measured as Measured
from .result import result_from_json as result_from_json
from .result import result_to_json as result_to_json
from .result import to_plain as to_plain
from .similarity import linear_cka as linear_cka
from .similarity import rsa as rsa
from .table import html_table as html_table
from .table import text_table as text_table
