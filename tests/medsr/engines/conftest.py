"""What the tests of several engines need: a weight file, and the line with which a process ends."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from medsr.handlers.training import save_weights
from torch import nn


@pytest.fixture
def failure(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Exit status of a call that ends the process, and its one line on stderr."""

    def ended(function: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[int, str]:
        with pytest.raises(SystemExit) as stop:
            function(*args, **kwargs)
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        assert lines[0].startswith("medsr: error: ")
        return stop.value.code, lines[0]

    return ended


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A weight file of ``nn.Linear(2, 3)`` in the layout of a bundle, with its listed digest."""
    path = tmp_path / "bundle" / "models" / "model.pt"
    path.parent.mkdir(parents=True)
    save_weights(nn.Linear(2, 3).state_dict(), path)
    return path
