from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from medsr.engines import runner
from medsr.engines.runner import check_settings, one_line_errors
from medsr.errors import DataError, GeometryError, MedsrError, OutputError, SettingError, WeightsError


@pytest.mark.parametrize(
    "kind", [MedsrError, DataError, GeometryError, WeightsError, SettingError, OutputError]
)
def test_errors_of_ours_become_one_line_and_a_status(kind, failure):
    @one_line_errors
    def fails() -> None:
        raise kind("first\n   second")

    assert failure(fails) == (kind.exit_code, "medsr: error: first second")


def test_other_errors_pass_and_results_come_back(capsys):
    @one_line_errors
    def divide(a: float, *, by: float) -> float:
        """Divides."""
        return a / by

    assert divide(1, by=2) == 0.5
    assert divide.__doc__ == "Divides."
    with pytest.raises(ZeroDivisionError):
        divide(1, by=0)
    assert capsys.readouterr().err == ""


def test_a_misspelt_setting_ends_the_run(tmp_path, monkeypatch, failure):
    config = tmp_path / "inference.json"
    config.write_text('{"output_dir": "out", "run": []}')
    monkeypatch.setattr(runner.sys, "excepthook", runner.sys.excepthook)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr(runner.sys, "unraisablehook", runner.sys.unraisablehook)
    command = ["-m", "run", "--config_file", str(config), "--output_dri", "x"]
    monkeypatch.setattr("sys.argv", ["monai.bundle", *command[1:]])
    monkeypatch.setattr("sys.orig_argv", ["python", "-m", "monai.bundle", *command[1:]])
    code, line = failure(check_settings)
    assert code == SettingError.exit_code
    assert "output_dri" in line


SWALLOWED = """
import os, signal, sys, time
sys.argv = ["medsr"]
# Whoever runs these tests may ignore them: nohup does, and a shell for what it puts behind.
signal.signal(signal.SIGHUP, signal.{hang_up})
signal.signal(signal.SIGINT, signal.default_int_handler)
from medsr.engines import runner
runner.check_settings()

class Released:
    def __del__(self):
        os.kill(os.getpid(), signal.{signal})
        time.sleep(0.2)

Released()
try:
    time.sleep({seconds})
    print("went on")
finally:
    print("cleaned up")
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has neither these signals nor a timer")
@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGHUP", 129), ("SIGINT", -2)])
def test_a_stop_that_python_drops_is_not_lost(name, code):
    ended = swallowed(name, hang_up="SIG_DFL", seconds=20)
    assert (ended.returncode, ended.stdout) == (code, "cleaned up\n"), ended.stderr


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signal")
def test_under_nohup_a_closed_terminal_stops_nothing():
    ended = swallowed("SIGHUP", hang_up="SIG_IGN", seconds=0.1)
    assert (ended.returncode, ended.stdout) == (0, "went on\ncleaned up\n"), ended.stderr


def swallowed(name, *, hang_up, seconds):
    program = SWALLOWED
    for key, value in (("signal", name), ("hang_up", hang_up), ("seconds", seconds)):
        program = program.replace(f"{{{key}}}", str(value))
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )


def test_a_process_without_a_config_has_nothing_to_check():
    check_settings()
    check_settings("cpu")
    check_settings(torch.device("cpu"))


@pytest.mark.parametrize(
    ("device", "line"),
    [
        ("gpu", "device must be cpu, cuda or cuda:<number>, got 'gpu'"),
        (["cpu"], "device must be cpu, cuda or cuda:<number>, got ['cpu']"),
        ("cuda:99", "device cuda:99 cannot be used here ("),
        ("meta", "device meta cannot be used here ("),
    ],
)
def test_a_device_that_is_not_here_is_refused(device, line, failure):
    code, text = failure(check_settings, device)
    assert code == SettingError.exit_code
    assert line in text
