"""The adversarial overlays by torchrun: one generator and one discriminator, however many processes train them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from medsr import catalog
from PIL import Image

FMEN = {"features": 8, "mid_features": 7, "down_blocks": 1, "up_blocks": [1, 1]}
SE_GAN = {"features": 8, "blocks": 1}
GAN = "train_gan.json"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bundle", "overlays", "tiny"),
    [
        ("image_srgan_superres", [GAN], {"blocks": 1, "features": 8}),
        ("retina_segan_superres", [GAN], FMEN),
        ("retina_segan_superres", ["segan.json", GAN], SE_GAN),
    ],
    ids=["srgan", "fmen", "se_gan"],
)
def test_both_processes_end_with_the_same_weights(
    call: Callable[..., Any],
    tmp_path: Path,
    bundle: str,
    overlays: list[str],
    tiny: dict[str, object],
) -> None:
    (tmp_path / "sharp").mkdir()
    for name in ("one", "two", "three"):
        pixels = np.random.default_rng(len(name)).integers(0, 255, (40, 44, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "sharp" / f"{name}.png")
    root = catalog.bundle_root(bundle) / "configs"
    files = [str(root / file) for file in ("train.json", *overlays, "multi_gpu_train.json")]
    words = ["torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "monai.bundle", "run"]
    words += ["--config_file", str(files)]
    players = "[[*@network.parameters()], [*@discriminator.parameters()]]"
    settings = {
        **tiny,
        "dataset_dir": tmp_path / "sharp",
        "output_dir": tmp_path / "out",
        "crop_size": 32,
        "batch_size": 2,
        "iterations": 2,
        "amp": "float32",
        # In place of the end of the group: what each process has.
        "run#3": f"$torch.save({players}, '{tmp_path}/rank' + str(training.rank()) + '.pt')",
    }
    for key, value in settings.items():
        words += [f"--{key}", str(value)]
    process = call(words)
    assert process.returncode == 0, process.stderr
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    for player, first, second in zip(("generator", "discriminator"), *ranks, strict=True):
        assert first, player
        for one, other in zip(first, second, strict=True):
            assert torch.equal(one, other), player
