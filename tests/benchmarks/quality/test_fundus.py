from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.quality import fundus


def test_other_networks_add_their_own_rows_under_the_protocols_of_the_bundle(
    tmp_path: Path,
) -> None:
    rows, columns = np.mgrid[:64, :80]
    disc = (rows - 32) ** 2 + (columns - 40) ** 2 < 30**2
    waves = np.stack([np.sin(rows / 3 + columns / k) for k in (4, 5, 6)], -1)
    Image.fromarray(np.uint8(disc[..., None] * (120 + 60 * waves))).save(tmp_path / "drive-1.png")
    found = fundus.others(tmp_path, 4)
    assert {(row["case"], row["group"], row["method"]) for row in found} == {
        ("drive-1", "drive", fundus.ENSEMBLE),
        ("drive-1", "drive", fundus.NATURAL),
        ("drive-1", "drive", fundus.GENERATOR),
        ("drive-1", "drive", fundus.GAN),
    }
    assert {row["protocol"].split(":")[3] for row in found} == {"fov", "full"}
    assert all(row["psnr_db"] > 10 for row in found)
    assert {row["method"] for row in fundus.others(tmp_path, 8)} == {fundus.ENSEMBLE, fundus.GENERATOR}
