"""Many examples: the one runner over batches, methods and metrics, its folder of results, and what it gives."""

from apportion.bulk.comparison import Comparison
from apportion.bulk.evaluation import Evaluation
from apportion.bulk.runner import Estimate

__all__ = ["Comparison", "Estimate", "Evaluation"]
