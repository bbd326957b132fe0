"""Numbers that judge a volume or a mask: how close it is, and whether its uncertainty may be believed.

Plain functions on whole volumes, because a reported number needs a mask, an explicit data range and float64
sums; MONAI's metric classes (batched, float32, no mask) stay the choice for curves during training. What is here is
of volumes; images and frames have protocols of their own, in :mod:`medsr.metrics.image`, :mod:`medsr.metrics.stereo`
and :mod:`medsr.metrics.frames`.
"""

from __future__ import annotations

from medsr.metrics.calibration import ause, coverage, reliability, spearman
from medsr.metrics.segmentation import (
    average_surface_distance,
    boundary_dice,
    dice,
    hausdorff_95,
    segmentation_scores,
    volume_error_ml,
)
from medsr.metrics.volume import (
    data_consistency,
    edge_band,
    edge_psnr,
    head_columns,
    head_mask,
    percentile_range,
    ssim_3d,
)
from medsr.metrics.volume import psnr as psnr_3d

__all__ = [
    "ause",
    "average_surface_distance",
    "boundary_dice",
    "coverage",
    "data_consistency",
    "dice",
    "edge_band",
    "edge_psnr",
    "hausdorff_95",
    "head_columns",
    "head_mask",
    "percentile_range",
    "psnr_3d",
    "reliability",
    "segmentation_scores",
    "spearman",
    "ssim_3d",
    "volume_error_ml",
]
