"""Evaluation by Ray Data: values of the pictures that a user gets, tables, comparisons, and what has no value."""

import contextlib
import csv
import io
import shutil

import numpy as np
import pyarrow.parquet
import pytest
import ray
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio

from corun_ray.config.loading import build_job
from corun_ray.config.tasks import EvaluateSection
from corun_ray.core.data.images import decode_image
from corun_ray.core.inference import dark_channel
from corun_ray.core.inference.restore import restore, to_image, to_tensor
from corun_ray.core.inference.self_ensemble import restore_by_self_ensemble
from corun_ray.core.metrics.fade import fade
from corun_ray.core.metrics.measure import ssim
from corun_ray.core.networks.corun import CORUN
from corun_ray.core.networks.spec import NetworkSpec
from corun_ray.core.training.checkpoints import save_network
from corun_ray.service.inference.evaluate import ImageEvaluator, run_evaluation
from corun_ray.service.jobs import run_jobs
from corun_ray.service.models.sources import Model
from corun_ray.service.storage import StorageError
from corun_ray.service.telemetry.console import Console
from tests.conftest import write_image
from tests.naming import make_its, make_nh_haze, make_sots_indoor
from tests.service.jobs import small_job


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """Two networks as published files, and the first one to look into."""
    folder = tmp_path_factory.mktemp("networks")
    made = {}
    for seed, name in enumerate(("first", "second")):
        torch.manual_seed(seed)
        made[name] = CORUN(2, 4).eval()
        for parameter in made[name].parameters():
            torch.nn.init.normal_(parameter, std=0.05)
        save_network(folder / f"{name}.pth", made[name], made[name])
    return folder, made["first"]


@pytest.fixture(scope="module")
def photographs(dataset, tmp_path_factory):
    """The dataset's hazy images, a small grey image that has no VIF, and a file that is no image."""
    folder = tmp_path_factory.mktemp("photographs")
    for part in ("hazy", "hazy_truth"):
        shutil.copytree(dataset / part, folder / part)
    for part in ("hazy", "hazy_truth"):
        write_image(folder / part / "small.png", np.full((20, 24, 3), 90, np.uint8))
    write_image(folder / "hazy_truth" / "broken.png", np.full((20, 24, 3), 90, np.uint8))
    (folder / "hazy" / "broken.png").write_text("no picture")
    write_image(folder / "hazy" / "cut.png", np.full((20, 24, 3), 90, np.uint8))
    (folder / "hazy_truth" / "cut.png").write_bytes((dataset / "hazy_truth" / "photo_0.png").read_bytes()[:500])

    # Another method's results: the first equals its truth, the second is no image, the third of another size.
    theirs = shutil.copytree(folder / "hazy", folder / "theirs")
    shutil.copy(folder / "hazy_truth" / "photo_0.png", theirs)
    (theirs / "photo_1.png").write_text("no picture")
    write_image(theirs / "photo_2.png", np.full((20, 24, 3), 90, np.uint8))
    return folder


@pytest.fixture(scope="module")
def evaluated(local_ray, photographs, networks, tmp_path_factory):
    folder, _ = networks
    storage = tmp_path_factory.mktemp("storage")
    section = {
        "hazy": str(photographs / "hazy"),
        "clear": str(photographs / "hazy_truth"),
        "models": {name: str(folder / f"{name}.pth") for name in ("first", "second")}
        | {"theirs": str(photographs / "theirs")},
        "metrics": ("psnr", "ssim", "fade", "gmsd", "vif"),
    }
    job = build_job({"kind": "evaluate", "name": "e", "storage": str(storage), "evaluate": section})
    with contextlib.redirect_stdout(io.StringIO()) as output:
        run_jobs([job], Console())
    (storage / "output").write_text(output.getvalue())
    (run,) = storage.glob("e-*")
    return run


NOT_COMPARED = ("photo_0.png", "photo_1.png", "photo_2.png", "small.png")
"""Images without a finite PSNR in some row; the small image equals its truth."""
WITHOUT_FADE = ("photo_1.png", "photo_2.png", "small.png")
"""Images without FADE in some row."""


def rows_of(run):
    return list(csv.DictReader(io.StringIO((run / "metrics.csv").read_text())))


def test_every_value_is_that_of_the_picture_a_user_gets(evaluated, photographs, networks):
    rows = {(row["image"], row["model"]): row for row in rows_of(evaluated)}
    assert len(rows) == 7 * 6
    for image in sorted(path.name for path in (photographs / "hazy").glob("photo_*")):
        hazy, truth = (decode_image((photographs / part / image).read_bytes()) for part in ("hazy", "hazy_truth"))
        outputs = {
            "hazy": hazy,
            "dark_channel": (dark_channel.dehaze(hazy.astype(np.float32) / 255) * 255).round().astype(np.uint8),
            "untrained": to_image(restore(CORUN(2, 4).eval(), to_tensor(hazy)).scene),
            "first": to_image(restore(networks[1], to_tensor(hazy)).scene),
        }
        for model, output in outputs.items():
            row = rows[image, model]
            assert float(row["psnr"]) == pytest.approx(peak_signal_noise_ratio(truth, output), abs=2e-3)
            assert float(row["ssim"]) == pytest.approx(ssim(to_tensor(output), to_tensor(truth)).item(), abs=1e-4)
            assert float(row["fade"]) == pytest.approx(fade(to_tensor(output)).item(), rel=1e-3)


def test_self_ensemble_is_measured_of_models_alone(local_ray, photographs, networks):
    model = Model(NetworkSpec("corun", {"stages": 2, "width": 4}), networks[1].state_dict(), {})
    section = EvaluateSection(hazy="h", models={"first": "x"}, baselines=("hazy",), self_ensemble=True)
    hazy = to_tensor(decode_image((photographs / "hazy" / "photo_0.png").read_bytes()))
    pictures, _ = ImageEvaluator({"first": ray.put(model)}, 1, section, {}, None)._restore("photo_0.png", hazy)

    mean = restore_by_self_ensemble(lambda view: restore(networks[1], view), hazy).scene
    assert torch.equal(pictures["hazy"], hazy)
    torch.testing.assert_close(pictures["first"], mean, rtol=0, atol=0.6 / 255)


def test_a_model_whose_picture_is_not_finite_is_named_and_takes_nothing_from_the_others(
    local_ray, photographs, networks
):
    spec, weights = NetworkSpec("corun", {"stages": 2, "width": 4}), networks[1].state_dict()
    broken = {name: torch.full_like(tensor, torch.nan) for name, tensor in weights.items()}
    models = {"first": ray.put(Model(spec, weights, {})), "broken": ray.put(Model(spec, broken, {}))}
    section = EvaluateSection(hazy="h", models={"first": "x", "broken": "y"}, baselines=())
    hazy = to_tensor(decode_image((photographs / "hazy" / "photo_0.png").read_bytes()))
    pictures, missing = ImageEvaluator(models, 1, section, {}, None)._restore("photo_0.png", hazy)

    assert list(pictures) == ["first"]
    assert len(missing) == 1 and missing[0].startswith("photo_0.png broken: the restored image is nan at ")


def test_the_tables_agree_and_parquet_has_the_same_rows(evaluated):
    rows = rows_of(evaluated)
    table = pyarrow.parquet.read_table(evaluated / "metrics.parquet").to_pylist()
    assert [(r["image"], r["model"]) for r in table] == [(r["image"], r["model"]) for r in rows]
    assert [r["fade"] for r in table if r["fade"]] == pytest.approx([float(r["fade"]) for r in rows if r["fade"]])
    summary = {
        (r["model"], r["metric"]): r for r in csv.DictReader(io.StringIO((evaluated / "summary.csv").read_text()))
    }
    psnr = [float(r["psnr"]) for r in rows if r["model"] == "first" and r["image"] not in NOT_COMPARED]
    first = summary["first", "psnr"]
    assert float(first["mean"]) == pytest.approx(np.mean(psnr))
    assert float(first["low"]) < float(first["mean"]) < float(first["high"]) and first["images"] == "3"
    assert {r["images"] for (_, metric), r in summary.items() if metric == "psnr"} == {"3"}
    compared = list(csv.DictReader(io.StringIO((evaluated / "comparison.csv").read_text())))
    assert {row["model"] for row in compared} == {"hazy", "untrained", "dark_channel", "second", "theirs"}
    (hazy,) = [row for row in compared if (row["model"], row["metric"]) == ("hazy", "fade")]
    differences = [
        float(a["fade"]) - float(b["fade"])
        for a in rows
        if a["model"] == "hazy"
        for b in rows
        if (b["model"], b["image"]) == ("first", a["image"]) and a["image"] not in WITHOUT_FADE
    ]
    assert hazy["against"] == "first" and float(hazy["difference"]) == pytest.approx(np.mean(differences))


def test_what_has_no_value_is_empty_and_told(evaluated):
    output = (evaluated.parent / "output").read_text()
    assert "broken.png: not an image" in output and "no value: small.png hazy vif: " in output
    (small,) = [row for row in rows_of(evaluated) if (row["image"], row["model"]) == ("small.png", "hazy")]
    assert small["vif"] == ""
    assert "means over 7 images" in output and "vif ↑" in output


def test_other_methods_results_stand_beside_the_models(evaluated, photographs):
    rows = {row["image"]: row for row in rows_of(evaluated) if row["model"] == "theirs"}
    assert rows["photo_0.png"]["psnr"] == "inf" and float(rows["photo_0.png"]["ssim"]) == pytest.approx(1)
    assert rows["photo_1.png"]["psnr"] == rows["photo_2.png"]["fade"] == ""
    hazy = {row["image"]: row for row in rows_of(evaluated) if row["model"] == "hazy"}
    assert rows["photo_3.png"]["psnr"] == hazy["photo_3.png"]["psnr"]
    output = (evaluated.parent / "output").read_text()
    left_out = "photo_0.png (theirs: infinite), photo_1.png (theirs: no value), photo_2.png (theirs: no value)"
    assert f"psnr: 4 of 7 images left out of every mean: {left_out}, small.png (hazy: infinite, " in output
    theirs = photographs / "theirs"
    assert f"no value: photo_1.png theirs: {theirs}/photo_1.png: not an image" in output
    assert "photo_2.png: of another size than the hazy image (24 x 20 px, not 80 x 68 px)" in output


def test_a_damaged_truth_is_told_under_its_own_name(evaluated, photographs):
    output = (evaluated.parent / "output").read_text()
    assert f"skipped: {photographs}/hazy_truth/cut.png: truncated" in output
    assert f"{photographs}/hazy/cut.png" not in output


def test_a_missing_folder_is_told_before_anything_is_started(tmp_path, capsys):
    section = {"hazy": str(tmp_path / "none"), "metrics": ("fade",)}
    job = build_job({"kind": "evaluate", "name": "e", "storage": str(tmp_path / "runs"), "evaluate": section})
    with pytest.raises(StorageError, match=f"cannot list {tmp_path}/none"):
        run_evaluation(job, Console())
    assert capsys.readouterr().out == "" and not (tmp_path / "runs").exists()


def test_the_contact_sheet_shows_every_model_and_the_truth(evaluated):
    with Image.open(evaluated / "contact_sheet.png") as sheet:
        assert sheet.width > 6 * 240
        assert np.asarray(sheet).std() > 20


def test_named_sets_train_validate_and_evaluate_as_they_are(local_ray, dataset, tmp_path):
    """RESIDE's training set, NH-HAZE and SOTS by their own names: the model of one is measured on another."""
    its, nh_haze, sots = (make(tmp_path / make.__name__).keys for make in (make_its, make_nh_haze, make_sots_indoor))
    data = {"paired": its, "validation": nh_haze, "validation_sets": {"sots": sots}}
    train = {"steps": 2, "validate_every": 2, "checkpoint_every": 2}
    training = small_job("pretrain", dataset, tmp_path, data=data, train=train, tracking={"register": "named"})
    evaluate = {**sots, "models": {"named": "models:/named@candidate"}, "baselines": ("hazy",), "metrics": ("psnr",)}
    evaluation = build_job({"kind": "evaluate", "name": "e", "storage": training.storage, "evaluate": evaluate})
    with contextlib.redirect_stdout(io.StringIO()):
        run_jobs([training, evaluation], Console())

    # Every image of both validation sets has its values.
    (trained,) = (tmp_path / "runs").glob("test-pretrain-*")
    measured = csv.DictReader(io.StringIO((trained / "validation.csv").read_text()))
    images = [(row["set"], row["image"]) for row in measured if row["metric"] == "psnr"]
    assert sorted(images) == [
        *(("val", f"{scene}_hazy.png") for scene in ("01", "02", "33")),
        *(("val/sots", f"140{scene}_{haze}.png") for scene in (0, 1, 2) for haze in (1, 10)),
    ]

    # The unchanged input is compared with the truth's centre.
    (run,) = (tmp_path / "runs").glob("e-*")
    rows = rows_of(run)
    assert len(rows) == 6 * 2 and {row["image"] for row in rows} >= {"1400_1.png", "1400_10.png"}
    for row in rows:
        if row["model"] == "hazy":
            hazy, truth = (
                decode_image((tmp_path / "make_sots_indoor" / path).read_bytes())
                for path in (f"hazy/{row['image']}", f"gt/{row['image'].split('_')[0]}.png")
            )
            assert float(row["psnr"]) == pytest.approx(peak_signal_noise_ratio(truth[2:-3, 2:-3], hazy), abs=2e-3)
