"""Networks, transforms, inferers and I/O shared by the super-resolution and segmentation bundles."""

from __future__ import annotations

__version__ = "0.1.0"
