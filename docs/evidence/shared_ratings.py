"""Compare two ways to rate winners' blocks: each rank its own, and all together (`coherence.share_blocks`).

Processes joined by gloo, with one thread each, rate the blocks of their winners by DA-CLIP of the true size with random
weights. Both ways run by turns, and the processes wait for each other as at the end of a step. Each candidate wins with
the same chance. Prints a Markdown table by the number of winners:

    python docs/evidence/shared_ratings.py --ranks 2 --steps 12 --wins 0.5
"""

import argparse
import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from lazy_coherence import write_weights

from corun_ray.core.scoring.coherence import Coherence
from corun_ray.core.scoring.daclip import DACLIP_FILE, load_daclip
from corun_ray.service.train.coherence import SharedCoherence

ROOT = Path(__file__).parents[2]
KEYS = ROOT / "tests/data/daclip/daclip_keys.json"


def rate(rank: int, folder: Path, args: argparse.Namespace) -> None:
    """Rate as one process; rank 0 writes the seconds of every step, both ways."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=args.ranks)
    alone = Coherence(load_daclip(folder / DACLIP_FILE))
    ways = {"alone": alone, "together": SharedCoherence(alone)}

    # Draw the number of winners of every step and rank. All processes draw the same numbers. Step 0 warms up.
    winners = np.random.default_rng(0).binomial(args.batch, args.wins, (args.steps, args.ranks))
    winners[0] = 1

    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for step, counts in enumerate(winners):
        scene = torch.rand(int(counts[rank]), 3, args.size, args.size)
        found = {}

        # All processes start together, and wait for the slowest.
        for name, coherence in ways.items():
            dist.barrier()
            started_s = time.perf_counter()
            found[name] = coherence.score_blocks(scene, scene)
            dist.barrier()
            seconds[name].append(time.perf_counter() - started_s)

        # Both ways must give the same scores.
        difference = (found["alone"].clarity - found["together"].clarity).abs()
        assert difference.numel() == 0 or difference.max() < 1e-4, f"step {step}: {difference.max()}"

    if rank == 0:
        (folder / "seconds.json").write_text(json.dumps({"winners": winners[1:].tolist(), **seconds}))
    dist.destroy_process_group()


def main() -> None:
    """Start the processes and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=12, help="steps that count; one more warms up")
    parser.add_argument("--batch", type=int, default=1, help="candidates of a rank and step")
    parser.add_argument("--wins", type=float, default=0.5, help="chance of each candidate to win")
    parser.add_argument("--size", type=int, default=288, help="side of an image in pixels, a multiple of 32")
    args = parser.parse_args()
    args.steps += 1

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        write_weights(Path(name), json.loads(KEYS.read_text()))
        mp.spawn(rate, (Path(name), args), nprocs=args.ranks)
        kept = json.loads((Path(name) / "seconds.json").read_text())

    # Group the steps by their numbers of winners.
    rows: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for counts, alone, together in zip(kept["winners"], kept["alone"][1:], kept["together"][1:], strict=True):
        rows[" and ".join(str(count) for count in sorted(counts))].append((alone, together))

    print("| winners by rank | steps | each its own, s | together, s | times as fast |")
    print("| --- | --- | --- | --- | --- |")
    for counts, times in sorted(rows.items()):
        print_row(counts, times, statistics.median)
    print_row("mean of all", sum(rows.values(), []), statistics.mean)


def print_row(name: str, times: list[tuple[float, float]], middle: Callable[[Sequence[float]], float]) -> None:
    """Print a row: the median or mean of both ways, and their ratio."""
    alone, together = (middle(way) for way in zip(*times, strict=True))
    print(f"| {name} | {len(times)} | {alone:.3f} | {together:.3f} | {alone / together:.2f} |")


if __name__ == "__main__":
    main()
