"""Labels as picture files, whatever their keys are."""

import csv

import cv2
import numpy as np
import pytest

from corun_ray.core.data.images import encode_png
from corun_ray.core.training.labels import decode
from corun_ray.service.pool.export import (
    compute_trust_map,
    draw_label,
    explain_unsafe_key,
    export_labels,
    load_hazy_image,
    plan_files,
    write_below,
)
from corun_ray.service.pool.source import find_saved_pool
from corun_ray.service.storage import StorageError, locate
from tests.service.labels import label, photo_label
from tests.service.pool.test_summary import save_pool


def listed(root):
    with (root / "labels.csv").open(newline="") as file:
        return {row["key"]: row for row in csv.DictReader(file)}


def files_below(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())


def read(path):
    return cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)


@pytest.fixture
def pool(tmp_path):
    return locate(str(tmp_path / "pool"))


def test_labels_keep_their_folders_and_pixels(pool, tmp_path):
    labels = [photo_label("town/a.jpg"), photo_label("b.png", "float16"), photo_label("c", transmission=False)]
    save_pool(pool, 9, labels)
    seen = []
    out = tmp_path / "new" / "out"
    done = export_labels(find_saved_pool(pool.uri), out, True, "multiplication", lambda *numbers: seen.append(numbers))
    assert done.refused == {} and seen == [(1, 3), (2, 3), (3, 3)]
    assert files_below(out) == [
        *("b.png", "b.transmission.png", "b.trust.png", "c.png", "c.trust.png", "labels.csv"),
        *("town/a.png", "town/a.transmission.png", "town/a.trust.png"),
    ]
    for one in labels:
        row = listed(out)[one.key]
        assert row["file"] == done.files[one.key]
        assert [float(row[name]) for name in ("clarity", "quality", "step")] == [0.25, 0.75, 7]
        assert (row["height_px"], row["width_px"]) == ("16", "24")
        pixels = (decode(one.scene) * 255).round().astype(np.uint8)
        assert np.array_equal(read(out / row["file"]).transpose(2, 0, 1), pixels)
    grey = cv2.imread(str(out / "town/a.transmission.png"), cv2.IMREAD_UNCHANGED)
    assert np.array_equal(grey, labels[0].transmission[0])
    trust = cv2.imread(str(out / "town/a.trust.png"), cv2.IMREAD_UNCHANGED)
    assert np.abs(trust / 255 - compute_trust_map(labels[0], "multiplication")).max() <= 0.5 / 255 + 1e-6


HOSTILE = {
    "/etc/passwd.png": "absolute",
    "../up.png": "leads out",
    "a/../../up.png": "leads out",
    "a/..": "leads out",
    "..": "leads out",
    "..\\up.png": "backslash",
    "C:up.png": "absolute",
    "c:/up.png": "absolute",
    "nul\0.png": "control",
    "line\nbreak.png": "control",
    "bell\x1b[2J.png": "control",
    "": "no plain path",
    "a//b.png": "no plain path",
    "a/./b.png": "no plain path",
    "a/": "no plain path",
    f"{300 * 'x'}.png": "too long",
    "labels.csv/x.png": "a folder that is a file",
}


def test_no_key_leaves_the_folder(pool, tmp_path):
    good = ["fine.png", "..hidden.png", "a b/ü.jpg", "..."]
    save_pool(pool, 1, [photo_label(key) for key in [*HOSTILE, *good]])
    around = files_below(tmp_path)
    out = tmp_path / "deep" / "out"
    done = export_labels(find_saved_pool(pool.uri), out, combine="addition")
    assert done.refused.keys() == HOSTILE.keys()
    assert {key: reason in done.refused[key] for key, reason in HOSTILE.items()} == dict.fromkeys(HOSTILE, True)
    assert listed(out).keys() == set(good) == done.files.keys()
    below = [f"deep/out/{file}" for file in files_below(out)]
    assert sorted(set(files_below(tmp_path)) - set(around)) == sorted(below) and len(below) == 2 * len(good) + 1


def test_keys_of_one_file(pool, tmp_path):
    keys = ["a.jpg", "a.png", "b.png", "b.trust.jpg", "d.png", "d.png/e.png"]
    save_pool(pool, 1, [label(key, step=number) for number, key in enumerate(keys)])
    done = export_labels(find_saved_pool(pool.uri), tmp_path / "out", combine="addition")
    assert done.refused == {
        "a.png": "would have the same file as a.jpg",
        "b.trust.jpg": "would have the same file as b.png",
        "d.png/e.png": "would lie in a folder that is a file",
    }
    assert read(tmp_path / "out/a.png").max() == 0 and read(tmp_path / "out/b.png").max() == 2
    assert listed(tmp_path / "out").keys() == {"a.jpg", "b.png", "d.png"}


def test_the_plan_does_not_depend_on_the_order():
    assert plan_files(["a.png", "a.jpg"]) == plan_files(["a.jpg", "a.png"])
    assert plan_files(["a.tar.gz"]).files == {"a.tar.gz": "a.tar.png"} and explain_unsafe_key("x/y.z") is None


def test_links_do_not_lead_out(tmp_path):
    root, outside = tmp_path / "root", tmp_path / "outside"
    root.mkdir(), outside.mkdir()
    (root / "out").symlink_to(outside)
    (root / "file.png").symlink_to(outside / "made.png")
    (root / "loop").symlink_to(root / "loop")
    (root / "in").symlink_to(root / "inner")
    assert write_below(root, {"out/x.png": b"x"}) == "leads out of the folder through a link"
    assert write_below(root, {"out/new/x.png": b"x"}) == "leads out of the folder through a link"
    assert write_below(root, {"file.png": b"x"}) == "would have the same file as another label"
    assert write_below(root, {"loop/x.png": b"x"}) is not None
    assert list(outside.iterdir()) == []


def test_nothing_is_written_where_one_of_the_files_is_taken(tmp_path):
    (tmp_path / "a.trust.png").write_bytes(b"mine")
    assert write_below(tmp_path, {"a.png": b"x", "a.trust.png": b"y"}) == "would have the same file as another label"
    long = 250 * "n"
    assert write_below(tmp_path, {f"{long}.png": b"x", f"{long}.trust.png": b"y"}) == "is too long a name"
    assert files_below(tmp_path) == ["a.trust.png"] and (tmp_path / "a.trust.png").read_bytes() == b"mine"


def test_only_an_empty_folder_is_filled(pool, tmp_path):
    save_pool(pool, 1, [label("a.png")])
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.tex").write_text("mine")
    with pytest.raises(StorageError, match="used: not empty"):
        export_labels(find_saved_pool(pool.uri), tmp_path / "used")
    with pytest.raises(StorageError, match="cannot write .*thesis.tex: File exists"):
        export_labels(find_saved_pool(pool.uri), tmp_path / "used" / "thesis.tex")
    assert files_below(tmp_path / "used") == ["thesis.tex"]


def test_segments_that_hold_other_labels_than_their_index(pool, tmp_path):
    save_pool(pool, 1, [label("a.png")])
    save_pool(pool, 2, [label("b.png")])
    pool.child("segments/00000000-1.parquet").write(pool.child("segments/00000000-2.parquet").read())
    source = find_saved_pool(f"{pool.uri}/step_00000001.json")
    with pytest.raises(StorageError, match="other labels than its index"):
        export_labels(source, tmp_path / "out")
    with pytest.raises(StorageError, match="not the labels that its index names"):
        source.read_label(*[(key, place) for key, (_, place) in source.read_index().items()][0])


def test_the_picture_of_a_label(tmp_path):
    locate(str(tmp_path)).child("a.png").write(encode_png(np.full((48, 72, 3), 200, np.uint8)))
    for transmission in (True, False):
        one = photo_label("a.png", transmission=transmission)
        hazy = load_hazy_image(str(tmp_path), "a.png", 16, 24)
        assert hazy.shape == (16, 24, 3) and (hazy == 200).all()
        shown = cv2.imdecode(np.frombuffer(draw_label(one, hazy, "addition"), np.uint8), cv2.IMREAD_COLOR)
        # A title of 22 px, 4 cells of 192 px.
        assert shown.shape == (22 + 128 + 4, 4 + 4 * 196, 3)
        assert (shown[60, 100] == 200).all()
        assert (shown[60, 492] == 250).all() != transmission


def test_a_hazy_image_that_cannot_be_had(tmp_path):
    root = tmp_path / "hazy"
    root.mkdir()
    (root / "text.png").write_text("no image")
    (tmp_path / "secret.png").write_bytes(encode_png(np.zeros((16, 16, 3), np.uint8)))
    with pytest.raises(StorageError, match="cannot read .*/none.png"):
        load_hazy_image(str(root), "none.png", 16, 24)
    with pytest.raises(StorageError, match="text.png: not an image"):
        load_hazy_image(str(root), "text.png", 16, 24)
    with pytest.raises(StorageError, match="leads out of its folder"):
        load_hazy_image(str(root), "../secret.png", 16, 24)
