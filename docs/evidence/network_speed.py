"""Compare the forward and backward pass of CORUN with its plain form: eager, compiled, in float32 and in bfloat16.

All ways run by turns from the same weights on the same images. Prints a Markdown table of medians, ratios and the
largest difference of the outputs. Compiling takes some minutes at first:

    python docs/evidence/network_speed.py --size 288 --batch 1 --stages 2

The plain form is `tests/core/networks/plain_corun.py`: the network as the paper writes it, eager, in float32.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from corun_ray.core.networks.corun import CORUN
from corun_ray.core.training.acceleration import compile_network

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.core.networks.plain_corun import PlainCORUN

Way = Callable[[Tensor], tuple[Tensor, Tensor]]


def pair(stages: int, device: str) -> tuple[CORUN, PlainCORUN]:
    """Build both forms with the same weights, none of them zero."""
    torch.manual_seed(0)
    network, plain = CORUN(stages), PlainCORUN(stages)
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and not module.weight.any():
            nn.init.normal_(module.weight, std=0.02)
    plain.load_state_dict(network.state_dict())
    return network.to(device), plain.to(device)


def ways(network: CORUN, plain: PlainCORUN, device: str, chosen: list[str], precisions: list[str]) -> dict[str, Way]:
    """Return the chosen ways to restore a batch, in the chosen precisions, by name."""
    whole = compile_network(network)

    def half(restore: nn.Module) -> Way:
        """Run a network in bfloat16."""

        def restored(hazy: Tensor) -> tuple[Tensor, Tensor]:
            with torch.autocast(device, torch.bfloat16):
                return restore(hazy)

        return restored

    every: dict[str, Way] = {
        "plain, eager, float32": lambda hazy: plain(hazy)[-1],
        "eager, float32": network,
        "compiled, float32": whole,
        "eager, bfloat16": half(network),
        "compiled, bfloat16": half(whole),
    }
    kept = {}
    for name, way in every.items():
        form, *_, precision = name.split(", ")
        if form in chosen and precision in precisions:
            kept[name] = way
    return kept


def step(way: Way, networks: list[nn.Module], hazy: Tensor) -> float:
    """Measure the seconds of one forward and backward pass."""
    for network in networks:
        network.zero_grad()

    # A GPU works asynchronously: wait for it before both readings of the clock.
    if hazy.is_cuda:
        torch.cuda.synchronize()

    started_s = time.perf_counter()
    scene, transmission = way(hazy)
    (scene.float().clamp(0, 1).mean() + transmission.mean()).backward()
    if hazy.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started_s


def main() -> None:
    """Compare the outputs, time all ways by turns and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=288, help="side of an image in pixels")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--ways", nargs="+", default=["plain", "eager", "compiled"])
    parser.add_argument("--precisions", nargs="+", default=["float32", "bfloat16"])
    args = parser.parse_args()

    network, plain = pair(args.stages, args.device)
    hazy = torch.rand(args.batch, 3, args.size, args.size, device=args.device)
    every = ways(network, plain, args.device, args.ways, args.precisions)

    # Compare the outputs with the plain form's. The extra step compiles, which is not measured.
    with torch.no_grad():
        truth = plain(hazy)[-1]
    differences = {}
    for name, way in every.items():
        found = way(hazy)
        differences[name] = max(float((a.detach() - b).abs().max()) for a, b in zip(found, truth, strict=True))
        step(way, [network, plain], hazy)

    # Time all ways by turns.
    times: dict[str, list[float]] = {name: [] for name in every}
    for _ in range(args.repeats):
        for name, way in every.items():
            times[name].append(step(way, [network, plain], hazy))

    # Print the table; ratios are relative to the first way.
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    first = next(iter(medians.values()))
    threads = torch.get_num_threads()
    print(f"{args.stages} stages, batch {args.batch}, {args.size} px, {args.device}, {threads} threads\n")
    print("| form | forward + backward, s | times as fast | largest difference |\n| --- | --- | --- | --- |")
    for name, seconds in medians.items():
        print(f"| {name} | {seconds:.3f} | {first / seconds:.2f} | {differences[name]:.1e} |")


if __name__ == "__main__":
    main()
