"""Compare how scorers without a download rank restorations with PSNR against the truth.

Prints the tables of `docs/coherence.md`. Takes any folder of clear photographs, and any two folders of hazy/clear pairs
of the same stems. `--offers` adds the restorations that `network_offers.py` recorded, a file for each network:

    python docs/evidence/weight_free_scorers.py --clear CLEAR --pairs HAZY CLEAR --offers offers.npz
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rating import Case, Pair, rate, trust_agreement
from restorations import Image, match_pairs, restorations, scenes

PAIRS: tuple[Pair, ...] = (
    ("reference", "reference"),
    ("reference", "clean"),
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
    ("saturation", "little_noise"),
    ("any_offer", "any_offer"),
)
SHOWN = (PAIRS[0], ("contrast", "clean"))
"""The pairs of the tables on single offers."""
SPOILT = "network 0.8 + "
"""Begins the names of the damaged restorations of these tables."""
NUM_OFFERS, NUM_SEQUENCES = 30, 200
PLAUSIBLE = (
    "hazy",
    "inverted^0",
    "inverted^1.2",
    "constant 0.7",
    "closed",
    "network",
    "dark channel prior 0.4",
)
"""Beginnings of the names of plausible restorations."""
TOO_MUCH = ("inverted^1.5", "inverted^2.0", "constant 0.5", "dark channel prior 0.95")
"""Restorations with too much haze removed."""
PROGRESS = (
    ("hazy", "network 0.4"),
    ("network 0.4", "network 0.8"),
    ("inverted^0.6", "inverted^1.0"),
    ("inverted^2.0", "network 0.8"),
    ("dark channel prior 0.95", "network 0.95"),
    ("network 0.8 + noise x2", "network 0.8"),
    ("network 0.8 + stretching x2", "network 0.8"),
    ("network 0.8 + darkening x2", "network 0.8"),
)
"""A stored label and an offer that is better."""


@dataclass(frozen=True)
class Trial:
    """Sequences of offers to a pool, for each of some cases."""

    offers: str
    """Heading of the column."""
    cases: list[Case]
    sequences: NDArray[np.int64]
    """One sequence a row, as indices into each case's restorations."""


def main() -> None:
    """Rate made restorations, networks' offers, or both; print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clear", type=Path, help="photographs; without them, only offers are rated")
    parser.add_argument("--pairs", type=Path, nargs=2, metavar=("HAZY", "CLEAR"))
    parser.add_argument("--photographs", type=int, default=16)
    parser.add_argument("--offers", type=Path, nargs="+", default=[], help="a file for each network")
    parser.add_argument("--seed", type=int, default=7)
    arguments = parser.parse_args()

    torch.set_grad_enabled(False)
    rng = np.random.default_rng(arguments.seed)
    if arguments.clear is not None:
        photographs = sorted(path for path in arguments.clear.iterdir() if path.is_file())
        chosen = [photographs[i] for i in rng.choice(len(photographs), arguments.photographs, replace=False)]
        compare_made(chosen, match_pairs(arguments.pairs), rng)
    if arguments.offers:
        compare_offers(arguments.offers, rng)


def compare_made(photographs: list[Path], pairs: list[tuple[Path, Path]], rng: np.random.Generator) -> None:
    """Make and rate the restorations of all scenes; print their tables."""
    cases, trust = [], []
    for scene in scenes(photographs, pairs, rng):
        found = restorations(scene, rng)
        images = np.stack(list(found.values()))
        cases.append(rate(list(found), images, scene.truth, scene.hazy))

        # An image of 64 px has too few blocks for a rank.
        if scene.size_px > 64:
            plausible = images[indices(cases[0], PLAUSIBLE)]
            trust.append((f"{scene.size_px} px", trust_agreement(plausible, scene.truth, scene.hazy)))

    sizes = [f"{case.size_px} px" for case in cases]
    print_ranks("Made restorations", cases, sizes)
    print_pairs(cases, draw_trials(cases, rng))
    print_moves(cases)
    print_trust(trust)


def compare_offers(files: list[Path], rng: np.random.Generator) -> None:
    """Rate the offers of networks, one file each; print their tables."""
    cases, origins, trust = [], [], []
    for file in files:
        for origin, truth, hazy, images in load_offers(file):
            cases.append(rate([], images, truth, hazy))
            origins.append(origin)
            if len(truth) == 96:
                trust.append((origin, trust_agreement(images, truth, hazy)))

    print_ranks("Networks' offers", cases, origins)
    print_offers(cases, origins, rng)
    print_trust(trust)


def load_offers(path: Path) -> Iterator[tuple[str, Image, Image, Image]]:
    """Yield origin, truth, hazy image and the restorations of a network, for every scene."""
    arrays = np.load(path)
    for index, origin in enumerate(arrays["origins"]):
        yield str(origin), *(arrays[f"{name}_{index}"] for name in ("truth", "hazy", "offers"))


def indices(case: Case, starts: tuple[str, ...]) -> list[int]:
    """Return the indices of the restorations whose names begin with one of `starts`.

    Of the damaged restorations, only those of a network count.
    """
    found = []
    for index, name in enumerate(case.names):
        is_counted = "+" not in name or name.startswith("network")
        if name.startswith(starts) and is_counted:
            found.append(index)
    return found


def print_table(title: str, head: list[str], rows: list[list[str]]) -> None:
    """Print a Markdown table."""
    print(f"\n**{title}**\n")
    for row in (head, ["---"] * len(head), *rows):
        print("| " + " | ".join(row) + " |")


def print_ranks(subject: str, cases: list[Case], kinds: list[str]) -> None:
    """Print how each score ranks restorations, over all cases and by kind, the best scorer first."""
    rows = []
    for name in [name for name in cases[0].scores if name != "any_offer"]:
        found = np.array([case.rank_correlation(name) for case in cases])
        by_kind = [found[np.array(kinds) == kind].mean() for kind in dict.fromkeys(kinds)]
        rows.append((name, found.mean(), *by_kind, np.quantile(found, 0.1)))

    rows.sort(key=lambda row: -row[1])
    table = [[name, *(f"{value:+.2f}" for value in values)] for name, *values in rows]
    head = ["scorer", "all", *dict.fromkeys(kinds), "worst tenth"]
    print_table(f"{subject}: rank correlation of one score with PSNR", head, table)


def draw_trials(cases: list[Case], rng: np.random.Generator) -> list[Trial]:
    """Draw sequences of offers from the restorations that have names."""
    # The bad start is a label with too much haze removed.
    shape = (NUM_SEQUENCES, NUM_OFFERS)
    plausible = rng.choice(indices(cases[0], PLAUSIBLE), shape)
    bad_start = plausible.copy()
    bad_start[:, 0] = rng.choice(indices(cases[0], TOO_MUCH), NUM_SEQUENCES)
    return [
        Trial("any", cases, rng.integers(len(cases[0].names), size=shape)),
        Trial("plausible", cases, plausible),
        Trial("too much first", cases, bad_start),
    ]


def print_offers(network: list[Case], origins: list[str], rng: np.random.Generator) -> None:
    """Print what a pool makes of networks' offers, in the order of training, by pair and origin."""
    steps = len(network[0].psnr)
    drawn = rng.random((NUM_SEQUENCES, steps)).argsort(1)[:, :NUM_OFFERS]
    trials = [Trial("all", network, np.sort(drawn, 1))]
    for origin in dict.fromkeys(origins):
        cases = [case for case, its in zip(network, origins, strict=True) if its == origin]
        trials.append(Trial(origin, cases, trials[0].sequences))

    rows = [[" + ".join(pair), *format_gains(pair, trials)] for pair in PAIRS]
    best = [np.mean([case.best_gain(trial.sequences) for case in trial.cases]) for trial in trials]
    rows.append(["(the best offer)", *(f"{gain:+.2f}" for gain in best)])
    head = ["clarity + quality", *(trial.offers for trial in trials)]
    print_table("Networks' offers: the last label, dB above the mean offer (share of scenes below it)", head, rows)


def format_gains(pair: Pair, trials: list[Trial]) -> list[str]:
    """Format the pool's gain in each trial, and the share of scenes that lose."""
    gains = [np.array([case.pool_gain(pair, trial.sequences) for case in trial.cases]) for trial in trials]
    return [f"{gain.mean():+.2f} ({np.mean(gain < 0):.0%})" for gain in gains]


def print_pairs(cases: list[Case], trials: list[Trial]) -> None:
    """Print what a pool makes of the offers, by pair of scorers."""
    rows = []
    for pair in PAIRS:
        precision, recall = np.mean([case.precision_and_recall(pair) for case in cases], 0)
        rows.append([" + ".join(pair), f"{precision:.2f}", f"{recall:.2f}", *format_gains(pair, trials)])

    # The last row: a choice by PSNR itself.
    best = [np.mean([case.best_gain(trial.sequences) for case in trial.cases]) for trial in trials]
    rows.append(["(the best offer)", "1", "1", *(f"{gain:+.2f}" for gain in best)])

    head = ["clarity + quality", "precision", "recall", *(trial.offers for trial in trials)]
    print_table("The pool's last label, dB above the mean offer (share of scenes below it)", head, rows)


def print_moves(cases: list[Case]) -> None:
    """Print how often a pool accepts one restoration after another, by the pairs of `SHOWN`."""
    names = cases[0].names

    def cells(held: str, offer: str) -> list[str]:
        """Format the change in dB and the share accepted by each pair."""
        row, column = names.index(held), names.index(offer)
        change = np.mean([case.psnr[column] - case.psnr[row] for case in cases])
        shares = [np.mean([case.accepted(pair)[row, column] for case in cases]) for pair in SHOWN]
        return [f"{change:+.1f}", *(f"{share:.0%}" for share in shares)]

    # Better offers, and offers with too much haze removed.
    head = [" + ".join(pair) for pair in SHOWN]
    moves = [*PROGRESS, *(("inverted^1.0", name) for name in ("inverted^1.2", *TOO_MUCH))]
    rows = [[*move, *cells(*move)] for move in moves]
    print_table("How often an offer is accepted", ["held", "offered", "dB", *head], rows)

    # Damaged offers, a row for each fault and a column for each strength.
    strengths = ("0.5", "1", "2")
    rows = []
    for name in names:
        if not (name.startswith(SPOILT) and name.endswith(" x1")):
            continue
        fault = name.removesuffix(" x1")
        row = [fault.removeprefix(SPOILT)]
        for strength in strengths:
            row.append(" / ".join(cells(SPOILT[:-3], f"{fault} x{strength}")))
        rows.append(row)

    title = f"Damaged offers: dB / accepted by {head[0]} / by {head[1]}"
    print_table(title, ["fault", *(f"x{strength}" for strength in strengths)], rows)


def print_trust(trust: list[tuple[str, dict[str, float]]]) -> None:
    """Print the mean agreement of trust and PSNR, by pair of scorers and kind of restoration."""
    kinds = list(dict.fromkeys(kind for kind, _ in trust))
    rows = []
    for pair in trust[0][1]:
        agreements = [[found[pair] for other, found in trust if other == kind] for kind in kinds]
        rows.append([pair, *(f"{np.mean(values):+.2f}" for values in agreements)])
    print_table("Rank correlation of trust and PSNR over the blocks of an image", ["pair", *kinds], rows)


if __name__ == "__main__":
    main()
