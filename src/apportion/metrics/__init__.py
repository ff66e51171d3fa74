"""Metrics: what a map or an explainer is worth, by definitions with their source and every setting in the record."""

from apportion.metrics.ablation.deletion import DeletionAUC, InsertionAUC, InsertionDeletion
from apportion.metrics.ablation.drops import AverageDrop, AverageDropInDeletion, AverageGain, IncreaseInConfidence
from apportion.metrics.ablation.information import PNG, Information, MultiScaleSSIM, WebP, Zlib
from apportion.metrics.ablation.pic import AIC, SIC
from apportion.metrics.ablation.regions import ABPC, AOPC, Degradation, LeRF, MoRF, rescaled
from apportion.metrics.ablation.retraining import KAR, ROAR, accuracy_table
from apportion.metrics.ablation.road import ROAD
from apportion.metrics.ablation.single_deletion import InDomainSingleDeletion, SingleDeletion
from apportion.metrics.agreement.agreement import Agreement
from apportion.metrics.axioms.allocation import (
    AllocationCompleteness,
    AllocationCorrectness,
    EffectCompleteness,
    WeakDependence,
)
from apportion.metrics.axioms.completeness import Completeness
from apportion.metrics.axioms.consistency import Consistency, Continuity, LocalAccuracy, Missingness
from apportion.metrics.axioms.effects import HarsanyiEffects, TaylorEffects
from apportion.metrics.axioms.invariances import ImplementationInvariance, InputInvariance, Linearity, Symmetry
from apportion.metrics.axioms.sensitivity import Dummy, Sensitivity
from apportion.metrics.complexity.complexity import Complexity
from apportion.metrics.complexity.effective_complexity import EffectiveComplexity
from apportion.metrics.complexity.sparseness import Sparseness
from apportion.metrics.fidelity.faithfulness_correlation import FaithfulnessCorrelation
from apportion.metrics.fidelity.infidelity import Infidelity
from apportion.metrics.fidelity.local_lipschitz import LocalLipschitz
from apportion.metrics.fidelity.perturbations import GaussianPerturbation, NoisyBaseline, SquareRemoval
from apportion.metrics.fidelity.prediction_gap import PredictionGapImportant, PredictionGapUnimportant
from apportion.metrics.fidelity.relative_stability import (
    InputChange,
    OutputChange,
    RelativeStability,
    RepresentationChange,
)
from apportion.metrics.fidelity.sensitivity import AverageSensitivity, MaxSensitivity
from apportion.metrics.fidelity.sensitivity_n import SensitivityN
from apportion.metrics.localization.boxes import FineGrainedRecognition, WeaklySupervisedLocalization
from apportion.metrics.localization.contrast import InputDependence, InputIndependence, ModelContrast
from apportion.metrics.localization.energy import EnergyPointingGame, GridPointingGame, RelevanceRank, TopKIntersection
from apportion.metrics.localization.pointing import ExtendedPointingGame, PointingGame
from apportion.metrics.localization.region import Region
from apportion.metrics.localization.transport import EarthMoverSimilarity
from apportion.metrics.metric import Found, Judges, Metric, MetricCard, Subject, metric, names, register
from apportion.metrics.noise.map_noise import MapNoise
from apportion.metrics.noise.mass_outside import MassOutside
from apportion.metrics.randomization.labels import LabelRandomization
from apportion.metrics.randomization.parameters import EffectiveRandomization, ParameterRandomization, RandomLogit
from apportion.metrics.randomization.similarities import (
    GradientHistograms,
    RankSimilarity,
    Similarity,
    StructuralSimilarity,
)
from apportion.metrics.ranks import Ranks, rank_methods
from apportion.metrics.reliability import (
    Reliability,
    inter_method,
    inter_rater,
    internal_consistency,
    krippendorff,
    test_retest,
)
from apportion.metrics.scores import Curve, Direction, Scores, Summary, by_category
from apportion.metrics.statistics import Correlation, Pearson, Spearman
from apportion.metrics.training import FromScratch, InDomain, SmallNetwork, TrainingSet

__all__ = [
    "ABPC",
    "AIC",
    "AOPC",
    "KAR",
    "PNG",
    "ROAD",
    "ROAR",
    "SIC",
    "Agreement",
    "AllocationCompleteness",
    "AllocationCorrectness",
    "AverageDrop",
    "AverageDropInDeletion",
    "AverageGain",
    "AverageSensitivity",
    "Completeness",
    "Complexity",
    "Consistency",
    "Continuity",
    "Correlation",
    "Curve",
    "Degradation",
    "DeletionAUC",
    "Direction",
    "Dummy",
    "EarthMoverSimilarity",
    "EffectCompleteness",
    "EffectiveComplexity",
    "EffectiveRandomization",
    "EnergyPointingGame",
    "ExtendedPointingGame",
    "FaithfulnessCorrelation",
    "FineGrainedRecognition",
    "Found",
    "FromScratch",
    "GaussianPerturbation",
    "GradientHistograms",
    "GridPointingGame",
    "HarsanyiEffects",
    "ImplementationInvariance",
    "InDomain",
    "InDomainSingleDeletion",
    "IncreaseInConfidence",
    "Infidelity",
    "Information",
    "InputChange",
    "InputDependence",
    "InputIndependence",
    "InputInvariance",
    "InsertionAUC",
    "InsertionDeletion",
    "Judges",
    "LabelRandomization",
    "LeRF",
    "Linearity",
    "LocalAccuracy",
    "LocalLipschitz",
    "MapNoise",
    "MassOutside",
    "MaxSensitivity",
    "Metric",
    "MetricCard",
    "Missingness",
    "MoRF",
    "ModelContrast",
    "MultiScaleSSIM",
    "NoisyBaseline",
    "OutputChange",
    "ParameterRandomization",
    "Pearson",
    "PointingGame",
    "PredictionGapImportant",
    "PredictionGapUnimportant",
    "RandomLogit",
    "RankSimilarity",
    "Ranks",
    "Region",
    "RelativeStability",
    "RelevanceRank",
    "Reliability",
    "RepresentationChange",
    "Scores",
    "Sensitivity",
    "SensitivityN",
    "Similarity",
    "SingleDeletion",
    "SmallNetwork",
    "Sparseness",
    "Spearman",
    "SquareRemoval",
    "StructuralSimilarity",
    "Subject",
    "Summary",
    "Symmetry",
    "TaylorEffects",
    "TopKIntersection",
    "TrainingSet",
    "WeakDependence",
    "WeaklySupervisedLocalization",
    "WebP",
    "Zlib",
    "accuracy_table",
    "by_category",
    "inter_method",
    "inter_rater",
    "internal_consistency",
    "krippendorff",
    "metric",
    "names",
    "rank_methods",
    "register",
    "rescaled",
    "test_retest",
]
