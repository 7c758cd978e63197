"""Rank photographs by pyiqa metrics with weights from several folders or URIs, and compare the ranks.

    python docs/evidence/quality_sources.py PHOTOS weights s3://bucket/weights --metrics brisque niqe

Each metric is loaded from each source, as by a job. The exit code is 1 if two sources rank differently.
"""

import argparse
import sys
from pathlib import Path

import torch

from corun_ray.core.data.images import decode_image
from corun_ray.core.inference.restore import to_tensor
from corun_ray.core.scoring.quality import load_quality
from corun_ray.service.data.manifest import list_images
from corun_ray.service.weights.folder import WeightsFolder


def main() -> int:
    """Print one line a photograph and metric: rank and raw score."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photographs", metavar="PHOTOS", type=Path)
    parser.add_argument("sources", metavar="WEIGHTS", nargs="+")
    parser.add_argument("--metrics", nargs="+", default=["brisque", "niqe"])
    args = parser.parse_args()

    names = list_images(str(args.photographs), "PHOTOS")
    agree = True
    for metric in args.metrics:
        # The scores of all photographs by the weights of each source.
        scores = []
        for source in args.sources:
            quality = load_quality(metric, WeightsFolder(source))
            images = [to_tensor(decode_image((args.photographs / name).read_bytes())) for name in names]
            scores.append(torch.cat([quality.compute_raw(image) for image in images]))

        # The sources agree if all rank the photographs alike.
        orders = [score.argsort().tolist() for score in scores]
        same = all(order == orders[0] for order in orders)
        agree &= same
        largest = max(float((score - scores[0]).abs().max()) for score in scores)

        print(f"\n{metric}: {'the same' if same else 'ANOTHER'} order from {', '.join(args.sources)}")
        print(f"largest difference of a score: {largest:g}")
        for rank, index in enumerate(orders[0], 1):
            print(f"  {rank:3d}  {scores[0][index]:8.3f}  {names[index]}")

    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
