"""The load pipeline: from a source's ranges to finished tensors."""

from tensorserve.loading.pipeline import LoadOptions, TensorStream, report_every
from tensorserve.loading.progress import LoadProgress

__all__ = ["LoadOptions", "LoadProgress", "TensorStream", "report_every"]
