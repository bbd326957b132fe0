"""A config of a bundle, run by the bundle's own command into a folder that has its name only once it is complete."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medsr import catalog
from medsr.io.writing import probe_folder, write_json


def run_config(
    bundle: str,
    configs: Sequence[str],
    settings: Mapping[str, Any],
    *,
    output: Path,
    environment: Mapping[str, str] | None = None,
) -> None:
    """Run configs of a bundle; what it prints stays beside ``output`` in a log.

    Args:
        bundle: folder name.
        configs: ``inference.json`` or another, and overlays.
        settings: what the command overrides; None leaves the config's value.
        output: folder of the results. An older one is replaced once the new one is complete.
        environment: of the process; default this one's.

    Raises:
        SystemExit: if the command fails; the line names the log.
    """
    part, record = output.with_name(f"{output.name}.part"), output.with_name(f"{output.name}.log")
    part.mkdir(parents=True, exist_ok=True)
    root = catalog.bundle_root(bundle)
    files = [str(root / "configs" / config) for config in configs]
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", str(files)]
    for key, value in {**settings, "output_dir": part}.items():
        if value is not None:
            command += [f"--{key}", str(value)]
    with record.open("w") as log:
        code = subprocess.run(
            command, env=environment, stdout=log, stderr=subprocess.STDOUT, check=False
        ).returncode
    if code:
        raise SystemExit(f"{output.name}: ended with status {code}; see {record}")
    if output.exists():
        shutil.rmtree(output)
    part.rename(output)


def run_once(bundle: str, configs: Sequence[str], settings: Mapping[str, Any], **options: Any) -> None:
    """Do what :func:`run_config` does, unless it was done: what was asked for stays beside its ``output``.

    Raises:
        SystemExit: if the command fails, or if the folder holds the results of other settings.
    """
    output: Path = options["output"]
    asked = json.loads(json.dumps({"bundle": bundle, "configs": list(configs), **settings}, default=str))
    record = output.with_name(f"{output.name}.settings.json")
    if output.exists():
        if not record.exists() or json.loads(record.read_text(encoding="utf-8")) != asked:
            raise SystemExit(f"{output}: was made with other settings; remove it or choose another folder")
        return
    probe_folder(output.parent)
    write_json(record, asked)
    run_config(bundle, configs, settings, **options)
