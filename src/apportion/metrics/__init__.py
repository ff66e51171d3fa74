"""Metrics: what a map or an explainer is worth, by definitions with their source and every setting in the record."""

from apportion.metrics.complexity.sparseness import Sparseness
from apportion.metrics.metric import Found, Judges, Metric, MetricCard, Subject, metric, names, register
from apportion.metrics.scores import Curve, Direction, Scores, Summary

__all__ = [
    "Curve",
    "Direction",
    "Found",
    "Judges",
    "Metric",
    "MetricCard",
    "Scores",
    "Sparseness",
    "Subject",
    "Summary",
    "metric",
    "names",
    "register",
]
