"""What is recorded beside a result: figures and reports that let a reader judge it without rerunning it.

Handlers receive arrays and instances; they know no concrete network.
"""

from __future__ import annotations

from medsr.handlers.qc_figure import draw_qc

__all__ = ["draw_qc"]
