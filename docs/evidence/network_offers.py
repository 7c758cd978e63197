"""Record the restorations of a small CORUN while it learns: the offers that a label pool would get.

The network learns from synthetic haze over the photographs of `--clear`. It restores scenes that it does not learn
from: the photographs of `--shown` under synthetic haze, and hazy/clear pairs. Writes truth, hazy image and restorations
of these scenes, in the order of training, to an `.npz`:

    python docs/evidence/network_offers.py --clear CLEAR --shown SHOWN --pairs HAZY CLEAR --steps 300 offers.npz
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from rating import to_tensor
from restorations import match_pairs, paired_scene, quantise, read, synthetic_scene

from corun_ray.core.networks.corun import CORUN

SIZES_PX = (64, 96)
RECORD_EVERY = 10
"""Steps."""


def main() -> None:
    """Train the network and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clear", type=Path, required=True)
    parser.add_argument("--shown", type=Path, required=True)
    parser.add_argument("--pairs", type=Path, nargs=2, metavar=("HAZY", "CLEAR"), action="append", default=[])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()

    rng = np.random.default_rng(1 + arguments.seed)
    torch.manual_seed(arguments.seed)
    photographs = [read(path) for path in sorted(arguments.clear.iterdir())]

    # The scenes whose restorations are recorded, and where each comes from.
    shown, origins = [], []
    for path in sorted(arguments.shown.iterdir()):
        for size in SIZES_PX:
            shown.append(synthetic_scene(read(path), size, rng))
            origins.append(arguments.shown.name)
    for folders in arguments.pairs:
        for hazy, clear in match_pairs(folders):
            shown += [paired_scene(read(clear), read(hazy), size) for size in SIZES_PX]
            origins += [folders[0].parent.name] * len(SIZES_PX)

    network = CORUN(stages=2, width=16)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-4, weight_decay=0)
    offers: list[list[np.ndarray]] = [[] for _ in shown]
    for step in range(arguments.steps + 1):
        if step % RECORD_EVERY == 0:
            for scene, restored in zip(shown, offers, strict=True):
                restored.append(restore(network, scene.hazy))
            print(f"step {step}", flush=True)

        # One step on two synthetic images: the restoration must match the truth, and the truth under the estimated
        # transmission must match the input.
        batch = [synthetic_scene(photographs[index], 64, rng) for index in rng.integers(len(photographs), size=2)]
        inputs = to_tensor(np.stack([scene.hazy for scene in batch]))
        truth = to_tensor(np.stack([scene.truth for scene in batch]))
        estimate, transmission = network(inputs)
        rehazed = truth * transmission + 1 - transmission
        loss = (estimate - truth).abs().mean() + 0.01 * (rehazed - inputs).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    arrays = {f"truth_{index}": scene.truth for index, scene in enumerate(shown)}
    arrays |= {f"hazy_{index}": scene.hazy for index, scene in enumerate(shown)}
    arrays |= {f"offers_{index}": np.stack(restored) for index, restored in enumerate(offers)}
    np.savez_compressed(arguments.output, allow_pickle=False, origins=np.array(origins), **arrays)


@torch.no_grad()
def restore(network: CORUN, hazy: np.ndarray) -> np.ndarray:
    """Restore an image, `H W 3` in [0, 1], with 8-bit values."""
    return quantise(network(to_tensor(hazy[None])).scene[0].permute(1, 2, 0).numpy())


if __name__ == "__main__":
    main()
