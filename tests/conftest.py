"""What holds for every test: no network, fixed seeds, one thread per worker, no windows."""

from __future__ import annotations

import ipaddress
import json
import os
import random
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Before numpy or torch start their thread pools: two workers with all cores each are slower than one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import numpy as np
import pytest
from hypothesis import settings

# Derandomised: a red test is red for everyone. No deadline: the first call may import torch. No database: the
# repository stays clean.
settings.register_profile("medsr", deadline=None, derandomize=True, database=None, max_examples=50)
settings.load_profile("medsr")


def _is_local(family: int, address: Any) -> bool:
    if family not in (socket.AF_INET, socket.AF_INET6):
        return True
    host = str(address[0])
    if host in ("", "localhost"):
        return True
    try:
        return ipaddress.ip_address(host.split("%")[0]).is_loopback
    except ValueError:
        return False


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse connections to other machines: nothing here may download."""

    def guard(name: str) -> None:
        connect = getattr(socket.socket, name)

        def guarded(self: socket.socket, address: Any) -> Any:
            if not _is_local(self.family, address):
                self.close()
                raise RuntimeError(f"a test tried to reach the network: {address}")
            return connect(self, address)

        monkeypatch.setattr(socket.socket, name, guarded)

    guard("connect")
    guard("connect_ex")


@pytest.fixture(autouse=True)
def seeds() -> None:
    """Start every test from the same random state, and leave torch alone where no test has imported it."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - MONAI and others draw from the global state
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden", action="store_true", help="write tests/golden/*.json anew; review the difference"
    )


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, dict[str, Any]], dict[str, Any]]:
    """Give what ``tests/golden/<name>.json`` remembers; with ``--update-golden``, remember what was found."""

    def remembered(name: str, found: dict[str, Any]) -> dict[str, Any]:
        path = GOLDEN / f"{name}.json"
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(found, indent=4, sort_keys=True) + "\n", encoding="utf-8")
        assert path.is_file(), f"{path.name} is missing: run pytest --update-golden"
        return dict(json.loads(path.read_text(encoding="utf-8")))

    return remembered
