"""The measurements of the docs run, in small: what they print is for the docs, not asserted here."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from corun_ray.core.data.images import encode_png
from corun_ray.demo.dataset import DemoSize, write_demo
from corun_ray.service.models.sources import SHIPPED_FOLDER
from corun_ray.service.weights.folder import index_folder
from tests import DATA, ROOT
from tests.conftest import photograph

pytestmark = pytest.mark.slow
TIMEOUT_S = 600


def ran(script: str, *arguments: object) -> str:
    command = [sys.executable, str(ROOT / "docs" / "evidence" / script), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=TIMEOUT_S, check=False)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    return result.stdout


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photographs")
    rng = np.random.default_rng(0)
    for number in range(8):
        (folder / f"{number}.png").write_bytes(encode_png(photograph(rng, 320, 400)))
    return folder


def test_what_an_encoding_costs(photographs: Path) -> None:
    said = ran("label_encodings.py", photographs)
    assert [line.split()[0] for line in said.splitlines()[2:]] == ["uint8", "float16", "float32"]


def test_offers_of_a_network_and_scorers_without_weights(photographs: Path, tmp_path: Path) -> None:
    common = ("--clear", photographs, "--pairs", photographs, photographs)
    ran("network_offers.py", *common, "--shown", photographs, "--steps", 20, tmp_path / "offers.npz")
    said = ran("weight_free_scorers.py", *common, "--photographs", 2, "--offers", tmp_path / "offers.npz")
    tables = said.split("**")[1::2]
    assert len(tables) == 8 and [table.startswith("Networks' offers") for table in tables].count(True) == 2, tables
    assert said.count("| reference") >= 6


def test_parts_of_colabator(tmp_path: Path) -> None:
    write_demo(tmp_path / "demo", seed=0, size=DemoSize(clear_images=3, hazy_images=2))
    ways = ("control", "rated by the truth", "no trust map")
    model = SHIPPED_FOLDER / "corun-small"
    said = ran("colabator_parts.py", tmp_path / "demo", model, tmp_path / "parts.json", "--steps", 2, "--ways", *ways)
    assert [line.split("|")[1].strip() for line in said.splitlines()] == ["start", *ways]
    assert "dB, p " in said.splitlines()[-1]


def test_the_data_pipeline_beside_the_published_formulae(photographs: Path) -> None:
    said = ran("as_published.py", photographs)
    shares = [[float(cell) for cell in line.split("|")[2:4]] for line in said.splitlines() if line.startswith("| blur")]
    assert [mine for _, mine in shares] == pytest.approx([theirs for theirs, _ in shares], abs=0.02)
    assert said.count("| --- |") >= 3


def test_both_orders_decide_alike() -> None:
    assert "saved" in ran("lazy_coherence.py", "--steps", 2)


def test_the_published_step_beside_ours() -> None:
    said = ran("lazy_coherence.py", "--steps", 3, "--warm", 2, "--size", 64, "--plain", "--precision", "bf16")
    assert "median of steps 3 to 3" in said and "| ours |" in said


def test_the_switches_for_gpus_beside_none() -> None:
    switches = ("copies", "copies+stream+graphs", "bf16")
    said = ran("gpu_switches.py", "--steps", 3, "--warm", 2, "--size", 64, "--switches", *switches)
    rows = {line.split("|")[1].strip(): line.split("|")[5:7] for line in said.splitlines()[2:]}
    moved = {name: max(float(cell) for cell in cells) for name, cells in rows.items()}
    # One stream and no GPU: the same numbers, except in another precision.
    assert moved.pop("bf16") > 0 and moved == dict.fromkeys(["no switch", *switches[:2]], 0.0)


def test_blocks_rated_together_beside_each_rank_its_own() -> None:
    said = ran("shared_ratings.py", "--steps", 3, "--size", 64)
    assert "| mean of all | 3 |" in said


def test_the_network_beside_its_plain_form() -> None:
    said = ran("network_speed.py", "--size", 64, "--repeats", 1, "--ways", "plain", "eager")
    rows = {line.split("|")[1].strip(): float(line.split("|")[4]) for line in said.splitlines() if "float" in line}
    assert rows["plain, eager, float32"] == 0 and 0 < rows["eager, float32"] < 1e-4 < rows["eager, bfloat16"] < 0.1


def test_photographs_as_a_whole_and_within_a_memory() -> None:
    said = ran("photographs.py", "--photographs", "128x96:4", "128x96:4:900")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in said.splitlines()[2:]]
    assert [row[:3] for row in rows] == [["128 x 96 px", "4", "as a whole"], ["128 x 96 px", "4", "in 900 MiB"]]
    assert all(float(speed) > 0 and float(memory_mib) > 100 for *_, speed, memory_mib in rows)


def test_the_pool_s_figures_as_a_table() -> None:
    said = ran("pool_scale.py", "--labels", 100, "--side", 32, "--shards", 1, "--workers", 2)
    rows = {line.split("|")[1].strip(): line.split("|")[2].strip() for line in said.splitlines()}
    assert rows["100 labels"] == "1 shard" and len(rows) == 15
    assert float(rows["offers of 2 processes, labels/s"].replace(",", "")) > 0
    assert rows["2 workers, all steps at once: a step waits, mean (share of the step) / p99"].endswith(" ms")


def test_scores_from_a_folder_and_from_a_bucket_are_the_same(photographs: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        shutil.copy(DATA / "iqa" / "niqe_modelparameters.mat", tmp_path / name)
        index_folder(str(tmp_path / name))
    said = ran("quality_sources.py", photographs, tmp_path / "one", tmp_path / "two", "--metrics", "niqe")
    assert "niqe: the same order" in said and "largest difference of a score: 0\n" in said


def test_the_straightforward_order_beside_ours(photographs: Path) -> None:
    said = ran("stream_speed.py", "--photographs", photographs, "--samples", 2)
    assert said.count("| straightforward |") == said.count("| ours |") == 2


def test_decoded_images_from_the_object_store() -> None:
    said = ran("decoded_cache.py", "--size", 480, 320, "--samples", 4)
    # A table of phases for each kind of sample, then the one of all kinds.
    assert said.count("\n| from the cache | ") == 6
    whole = said.rpartition("\n\n")[2].splitlines()
    assert len(whole) == 8 and all(float(row.split("|")[4]) > 0 for row in whole[2:])


def test_the_pixel_work_by_the_stream_and_by_the_worker(tmp_path: Path) -> None:
    small = ("--size", 64, "--batch", 1, "--samples", 2, "--steps", 1, "--json", tmp_path / "figures.json")
    said = ran("synthesis_place.py", *small)
    assert [line.split("|")[1].strip() for line in said.splitlines()[4:]] == ["stream", "worker"]
    assert len(json.loads((tmp_path / "figures.json").read_text())) == 8


def test_the_service_beside_torchrun() -> None:
    small = ("--size", 32, "--steps", 6, "--warm", 2, "--every", 2, "--turns", 1)
    said = ran("beside_torchrun.py", "--kind", "colabator", "--workers", 1, 2, *small)
    assert [line.split("|")[1].strip() for line in said.splitlines()[2:]] == ["1", "2"] and said.count(" % |") == 2


def test_the_first_step_beside_torchrun() -> None:
    said = ran("first_step.py", "--turns", 1)
    ways = [line.split("|")[1].strip() for line in said.splitlines() if line.startswith("| ")]
    assert ways[2:5] == ["torchrun, to the first step", "service, in a new storage folder", "service, again"]
    assert ways[5:] == [f"service: `{command}`, whole" for command in ("--help", "check JOB", "pool ls RUN")]
