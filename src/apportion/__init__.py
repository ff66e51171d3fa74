"""apportion: feature attribution of neural networks, with every evaluation that says whether to trust it."""

from apportion import planted, testing
from apportion.core.attribution import Attribution, Cost, Domain, References
from apportion.core.card import Card, Claim, Family, Kind, Need, Paper, Principle, Total
from apportion.core.errors import ApportionError
from apportion.core.explainer import Explainer, Passes
from apportion.core.field import Field, Normalize, Shared
from apportion.core.game import Game
from apportion.core.progress import progress
from apportion.core.question import Question
from apportion.core.registry import method, register
from apportion.core.registry import methods as _list_methods
from apportion.core.score import (
    Contrast,
    Custom,
    Logit,
    LogOdds,
    LogProbability,
    Loss,
    Neuron,
    Probability,
    Region,
    Score,
    Sequence,
)
from apportion.core.site import At, AtOp, Input, Site, SiteInfo
from apportion.methods import (
    AGI,
    BIG,
    IDGI,
    IG2,
    LPI,
    SAMP,
    SPI,
    BlurIG,
    BoundarySaliency,
    CrediblePath,
    DeepLIFT,
    DeepSHAP,
    ExpectedGradients,
    GradCAM,
    Gradient,
    GradientTimesInput,
    GuidedBackprop,
    GuidedIG,
    IntegratedGradients,
    NeFLAG,
    SmoothGrad,
    SmoothGradSquared,
    SPIProbability,
    SplitIG,
    VarGrad,
)
from apportion.one_call import explain
from apportion.parts import accumulate, baselines, noise, paths, quadrature, rules
from apportion.parts.masks import fills, groups
from apportion.path_profile import PathProfile, path_profile
from apportion.regions import Regions, regions

__version__ = "0.1.0"

methods = _list_methods  # after the imports: the folder of the same name has been bound by now

__all__ = [
    "AGI",
    "BIG",
    "IDGI",
    "IG2",
    "LPI",
    "SAMP",
    "SPI",
    "ApportionError",
    "At",
    "AtOp",
    "Attribution",
    "BlurIG",
    "BoundarySaliency",
    "Card",
    "Claim",
    "Contrast",
    "Cost",
    "CrediblePath",
    "Custom",
    "DeepLIFT",
    "DeepSHAP",
    "Domain",
    "ExpectedGradients",
    "Explainer",
    "Family",
    "Field",
    "Game",
    "GradCAM",
    "Gradient",
    "GradientTimesInput",
    "GuidedBackprop",
    "GuidedIG",
    "Input",
    "IntegratedGradients",
    "Kind",
    "LogOdds",
    "LogProbability",
    "Logit",
    "Loss",
    "NeFLAG",
    "Need",
    "Neuron",
    "Normalize",
    "Paper",
    "Passes",
    "PathProfile",
    "Principle",
    "Probability",
    "Question",
    "References",
    "Region",
    "Regions",
    "SPIProbability",
    "Score",
    "Sequence",
    "Shared",
    "Site",
    "SiteInfo",
    "SmoothGrad",
    "SmoothGradSquared",
    "SplitIG",
    "Total",
    "VarGrad",
    "accumulate",
    "baselines",
    "explain",
    "fills",
    "groups",
    "method",
    "methods",
    "noise",
    "path_profile",
    "paths",
    "planted",
    "progress",
    "quadrature",
    "regions",
    "register",
    "rules",
    "testing",
]
