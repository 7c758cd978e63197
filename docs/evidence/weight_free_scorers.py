"""Which weight-free scorers rank restorations of an image as PSNR against the truth does?

Prints the tables of `docs/coherence.md`. Takes any folder of clear photographs and any two folders of
hazy/clear pairs of the same stems; `--offers` adds what `network_offers.py` recorded:

    python docs/evidence/weight_free_scorers.py --clear CLEAR --pairs HAZY CLEAR --offers offers.npz
"""

import argparse
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from restorations import SIZES_PX, Image, restorations, scenes
from tried_scorers import SCORERS

from corun_ray.core.coherence import CLARITY, QUALITY, Coherence

PAIRS = (
    ("contrast", "clean"),
    ("contrast", "unclipped"),
    ("bare_contrast", "clean"),
    ("bare_contrast", "unclipped"),
    ("gradient", "clean"),
    ("entropy", "clean"),
    ("fade", "clean"),
    ("fade", "unclipped"),
    ("fade", "fog_free"),
    ("fog_free", "clean"),
    ("dark_channel", "clean"),
    ("dark_channel", "entropy"),
    ("saturation", "unclipped"),
    ("saturation", "little_noise"),
    ("any_offer", "any_offer"),
)
OFFERS = 30
SEQUENCES = 20
PLAUSIBLE = ("hazy", "inverted^0.3", "inverted^0.6", "inverted^0.8", "inverted^1.2", "constant 0.7")
TOO_MUCH = ("inverted^1.5", "inverted^2.0", "constant 0.5", "dark channel prior 0.95")
PROGRESS = (
    ("hazy", "network 0.4"),
    ("network 0.2", "network 0.6"),
    ("network 0.4", "network 0.8"),
    ("inverted^0.6", "inverted^1.0"),
    ("inverted^2.0", "network 0.8"),
    ("dark channel prior 0.95", "network 0.95"),
    ("network 0.8 + noise x2", "network 0.8"),
    ("network 0.8 + stretching x2", "network 0.8"),
    ("network 0.8 + darkening x2", "network 0.8"),
)
Scores = dict[str, NDArray[np.float64]]


@dataclass(frozen=True)
class Case:
    """The restorations of one scene: PSNR in dB and every score, `N` each. `names` is empty for a network's."""

    size_px: int
    names: list[str]
    psnr: NDArray[np.float64]
    scores: Scores

    def accepted(self, pair: tuple[str, str]) -> NDArray[np.bool_]:
        """`N N`: would the pool, holding row's restoration, take column's?"""
        clarity, quality = (self.scores[name] for name in pair)
        return (clarity[None] >= clarity[:, None]) & (quality[None] >= quality[:, None])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clear", type=Path, required=True)
    parser.add_argument("--pairs", type=Path, nargs=2, metavar=("HAZY", "CLEAR"))
    parser.add_argument("--photographs", type=int, default=24)
    parser.add_argument("--offers", type=Path)
    parser.add_argument("--seed", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    rng = np.random.default_rng(arguments.seed)
    photographs = sorted(path for path in arguments.clear.iterdir() if path.is_file())
    chosen = [photographs[i] for i in rng.choice(len(photographs), arguments.photographs, replace=False)]
    cases, trust = [], []
    for scene in scenes(chosen, match_pairs(arguments.pairs), rng):
        found = restorations(scene, rng)
        cases.append(rate(list(found), np.stack(list(found.values())), scene.truth))
        trust.append(trust_agreement(found, scene.truth))
    network = load_offers(arguments.offers) if arguments.offers else []
    print_ranks(cases, network)
    print_pairs(cases, network, rng)
    print_faults(cases)
    print_trust(trust)


def match_pairs(folders: list[Path] | None) -> list[tuple[Path, Path]]:
    """(hazy, clear) files of the same stem."""
    if folders is None:
        return []
    hazy, clear = ({path.stem: path for path in folder.iterdir()} for folder in folders)
    return [(hazy[stem], clear[stem]) for stem in sorted(hazy.keys() & clear.keys())]


def load_offers(path: Path) -> list[Case]:
    arrays = np.load(path)
    count = len(arrays.files) // 2
    return [rate([], arrays[f"offers_{index}"], arrays[f"truth_{index}"]) for index in range(count)]


def rate(names: list[str], images: Image, truth: Image) -> Case:
    error = ((images - truth) ** 2).mean((1, 2, 3))
    batch = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    scores = {name: scorer(batch).double().numpy() for name, scorer in SCORERS.items()}
    return Case(truth.shape[0], names, -10 * np.log10(error + 1e-10), scores)


def trust_agreement(found: dict[str, Image], truth: Image) -> Scores:
    """Over an image's 32 px blocks, the rank correlation of their trust with their PSNR, for each restoration."""
    images = np.stack([found[name] for name in plausible(list(found))])
    squares = ((images - truth) ** 2).mean(-1)
    side = truth.shape[0] // 32
    exactness = -squares.reshape(len(images), side, 32, side, 32).mean((2, 4)).reshape(len(images), -1)
    batch = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    agreement = {}
    for clarity, quality in product(CLARITY, QUALITY):
        blocks = Coherence(clarity, quality, block_px=32).block_scores(batch)
        trust = (blocks.clarity + blocks.quality).flatten(1).numpy()
        agreement[f"{clarity} + {quality}"] = np.array(list(map(spearman, trust, exactness)))
    return agreement


def plausible(names: list[str]) -> list[str]:
    """What a network on its way may offer."""
    return [name for name in names if name in PLAUSIBLE or name.startswith(("network", "closed", "dark channel prior 0.4"))]


def pool_gain(case: Case, pair: tuple[str, str], sequences: NDArray[np.int64]) -> float:
    """PSNR of the label a pool holds after each sequence of offers, above the mean offer's, in dB."""
    accepted = case.accepted(pair)
    held = sequences[:, 0]
    for offer in sequences[:, 1:].T:
        held = np.where(accepted[held, offer], offer, held)
    return float(case.psnr[held].mean() - case.psnr[sequences].mean())


def spearman(first: NDArray, second: NDArray) -> float:
    """Rank correlation, ties averaged; 0 where one side is constant."""
    first, second = average_ranks(first), average_ranks(second)
    if first.std() == 0 or second.std() == 0:
        return 0.0
    return float(np.corrcoef(first, second)[0, 1])


def average_ranks(values: NDArray) -> NDArray[np.float64]:
    _, where, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[where]


def print_ranks(cases: list[Case], network: list[Case]) -> None:
    print("| scorer | all | 64 px | 96 px | 288 px | worst tenth | network's offers |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    rows = []
    for name in list(SCORERS)[:-1]:
        found = np.array([spearman(case.scores[name], case.psnr) for case in cases])
        sizes = [found[[case.size_px == size for case in cases]].mean() for size in SIZES_PX]
        learnt = np.mean([spearman(case.scores[name], case.psnr) for case in network]) if network else np.nan
        rows.append((name, found.mean(), *sizes, np.quantile(found, 0.1), learnt))
    for name, *values in sorted(rows, key=lambda row: -row[1]):
        print(f"| {name} | " + " | ".join(f"{value:+.2f}" for value in values) + " |")


def print_pairs(cases: list[Case], network: list[Case], rng: np.random.Generator) -> None:
    names = cases[0].names
    any_of, likely = np.arange(len(names)), np.array([names.index(name) for name in plausible(names)])
    too_much = np.array([names.index(name) for name in TOO_MUCH])
    free = rng.choice(any_of, (SEQUENCES, OFFERS))
    learning = rng.choice(likely, (SEQUENCES, OFFERS))
    bad_start = np.concatenate([rng.choice(too_much, (SEQUENCES, 1)), learning[:, 1:]], 1)
    in_order = np.sort(rng.random((SEQUENCES, 400)).argsort(1)[:, : len(network[0].psnr) // 2] if network else [[0]], 1)
    print("\n| clarity + quality | precision | recall | any offers | plausible | too much first | scenes worse | network's |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for pair in PAIRS:
        right, taken, better = (np.array(column) for column in zip(*(decisions(case, pair) for case in cases), strict=True))
        gains = [[pool_gain(case, pair, order) for case in cases] for order in (free, learning, bad_start)]
        cells = [f"{np.mean(right / taken):.2f}", f"{np.mean(right / better):.2f}"]
        cells += [f"{np.mean(gain):+.1f}" for gain in gains] + [f"{np.mean(np.array(gains[1]) < 0):.0%}"]
        cells += [f"{np.mean([pool_gain(case, pair, in_order) for case in network]):+.2f}" if network else "-"]
        print(f"| {' + '.join(pair)} | " + " | ".join(cells) + " |")
