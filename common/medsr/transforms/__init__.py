"""Transforms that MONAI lacks: thick-slice acquisition, slice-axis order, invertible intensity, geometry update."""
