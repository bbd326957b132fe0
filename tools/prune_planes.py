"""Take the channels that hardly ever answer out of the plane prior of trained weights.

    python tools/prune_planes.py WEIGHTS OUT --data FOLDER

WEIGHTS are those of ``mri_rehrseg_superres``: the whole network, joined planes, or the prior alone. What the channels
answer is measured on planes drawn as for training (``train_planes.json`` over the data of ``train_shipped.json``).
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from medsr import catalog
from medsr.engines.runner import one_line_errors
from medsr.handlers.training import save_weights
from medsr.networks.checkpoints import load_checkpoint
from medsr.networks.plane_prior import HIDDEN, PlanePrior
from monai.bundle import ConfigParser
from torch import Tensor


def main() -> None:
    """Write the smaller weights."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("weights", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--batches", type=int, default=100)
    one_line_errors(prune)(**vars(parser.parse_args()))


def prune(weights: Path, out: Path, *, data: Path, batches: int) -> None:
    """Prune the prior of a weight file; all other tensors stay as they are."""
    state = load_checkpoint(weights, kind="weights of mri_rehrseg_superres")
    prefix = "prior." if "prior.head.weight" in state else ""
    own = {name.removeprefix(prefix): state.pop(name) for name in list(state) if name.startswith(prefix)}
    inside = [len(tensor) for name, tensor in own.items() if re.fullmatch(r"blocks\.\d+\.0\.weight", name)]
    prior = PlanePrior(hidden=inside)
    prior.load_state_dict(own)
    smaller = prior.eval().pruned(HIDDEN, examples(data, batches))
    save_weights({**state, **{f"{prefix}{k}": v for k, v in smaller.state_dict().items()}}, out)
    sizes = [sum(one.numel() for one in network.parameters()) for network in (prior, smaller)]
    print(f"{out}: {sizes[0]:,} parameters of the prior became {sizes[1]:,}")


def examples(data: Path, count: int) -> Iterator[tuple[Tensor, float, float]]:
    """Planes as the prior is trained on, with their scale and thickness."""
    configs = catalog.bundle_root("mri_rehrseg_superres") / "configs"
    parser = ConfigParser()
    parser.read_config([configs / f"{name}.json" for name in ("train", "train_planes", "train_shipped")])
    parser["dataset_dir"], parser["iterations"] = str(data), count
    torch.manual_seed(0)
    prepare = parser.get_parsed_content("train#prepare_batch")
    for batch in parser.get_parsed_content("train#dataloader"):
        planes, _, _, facts = prepare(batch)
        yield planes, facts["scale"], facts["thickness"]


if __name__ == "__main__":
    main()
