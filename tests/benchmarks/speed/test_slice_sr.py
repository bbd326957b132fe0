from __future__ import annotations

import re

import pytest

from benchmarks.speed import slice_sr


@pytest.mark.slow
def test_the_whole_command_is_timed(capsys: pytest.CaptureFixture[str]) -> None:
    slice_sr.command([24, 24, 6])
    (line,) = capsys.readouterr().out.splitlines()
    found = re.fullmatch(r"24 x 24 x 6, tissue everywhere: (.+) s from the command to the files", line)
    assert found
    assert 1 < float(found[1]) < 600
