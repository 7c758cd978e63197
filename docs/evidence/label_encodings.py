"""Measure the size and the error of each `pool.encoding`.

The labels are those of real photographs at 288 px, made by an untrained CORUN:

    python docs/evidence/label_encodings.py PHOTOS
"""

import argparse
import tempfile
from pathlib import Path
from typing import get_args

import numpy as np
import torch

from corun_ray.core.choices import Encoding
from corun_ray.core.data.images import decode_image
from corun_ray.core.data.samples import make_real_views
from corun_ray.core.networks.corun import CORUN
from corun_ray.core.training.labels import Label, Scores, decode, encode
from corun_ray.service.pool import segments
from corun_ray.service.storage import locate

PATCH_PX = 288


@torch.no_grad()
def restored(path: Path, network: CORUN) -> np.ndarray:
    """Restore a photograph; return scene and transmission, `4 H W` float32 in [0, 1]."""
    image = decode_image(path.read_bytes())
    weak = make_real_views(image, np.random.default_rng(0), patch_px=PATCH_PX, jpeg_quality=None).weak
    scene, transmission = network(torch.from_numpy(weak).permute(2, 0, 1)[None].float() / 255)[:2]
    return torch.cat([scene.clamp(0, 1), transmission], 1)[0].numpy()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path, help="folder of hazy photographs")

    # The images of the labels, before they are encoded.
    network = CORUN(2, 4).eval()
    images = [restored(path, network) for path in sorted(parser.parse_args().photos.iterdir())]
    blocks = np.zeros((9, 9), np.float32)

    print(f"{len(images)} photographs at {PATCH_PX} px")
    print("encoding   largest error  mean error  PSNR dB  kB in memory  kB on storage")
    for encoding in get_args(Encoding):
        # The error of a label after its round trip.
        stored = [encode(image, encoding) for image in images]
        errors = np.stack([np.abs(decode(s) - image) for s, image in zip(stored, images, strict=True)])
        psnr = -10 * np.log10(np.square(errors).mean()) if errors.any() else np.inf

        # The size of a label in a segment, as the pool saves labels.
        labels = [Label(str(i), Scores(0, 0), 0, s[:3], s[3:], blocks, blocks) for i, s in enumerate(stored)]
        with tempfile.TemporaryDirectory() as folder:
            place = locate(folder)
            segments.write(place, "one", labels)
            size = Path(segments.locate_images(place, "one").path).stat().st_size / len(labels)

        print(
            f"{encoding:<10} {errors.max():13.2e} {errors.mean():11.2e} {psnr:8.1f} "
            f"{labels[0].size_bytes / 1e3:13.0f} {size / 1e3:14.0f}"
        )


if __name__ == "__main__":
    main()
