"""Whether two spellings name one place."""

import os

import pytest

from corun_ray.service.places import find_below, find_overwritten
from corun_ray.service.storage import locate


@pytest.fixture
def folders(tmp_path):
    """Photographs in `x`, a link `link` to it, and a folder `xy` whose name begins alike."""
    for name in ("x/deep", "xy"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "link").symlink_to("x")
    (tmp_path / "x/a.jpg").touch()
    return tmp_path


@pytest.mark.parametrize("spelling", ["x", "x/", "./x", "x/../x", "xy/../x", "link", "link/deep/..", "file://"])
def test_spellings_of_one_folder(folders, spelling):
    uri = f"file://{folders}/x" if spelling == "file://" else f"{folders}/{spelling}"
    folder = locate(str(folders / "x"))
    assert find_below(locate(uri), folder) == "" and find_below(locate(f"{uri}/new/out"), folder) == "new/out"
    for other in ("xy", "."):
        assert find_below(locate(f"{folders}/{other}"), locate(uri)) is None


def test_a_folder_whose_names_differ_is_known_by_what_it_is(folders, monkeypatch):
    """As where the file system folds case: two names, one folder, and no link."""
    real = os.path.realpath
    monkeypatch.setattr(os.path, "realpath", lambda path, **options: real(path).replace(f"{folders}/x", f"{folders}/X"))
    (folders / "X").symlink_to("x")
    assert find_below(locate(str(folders / "X/new")), locate(str(folders / "x"))) == "new"


def test_places_in_a_store(s3_server):
    place = locate("s3://haze/raw")
    port = s3_server.rpartition(":")[2]
    spellings = ["s3://haze/raw/", "s3://haze/raw?region=us-east-1"]
    spellings.append(f"s3://haze/raw?endpoint_override=http%3A%2F%2Flocalhost%3A{port}")
    for spelling in spellings:
        assert find_below(locate(spelling), place) == "", spelling
    assert find_below(locate("s3://haze/raw/out?region=us-east-1"), place) == "out"
    for other in ("s3://haze/raw2", "s3://dust/raw", "/haze/raw", "s3://haze/raw?endpoint_override=http://127.0.0.1:9"):
        assert find_below(locate(other), place) is None, other


def test_files_that_would_be_replaced_through_links(folders):
    source = locate(str(folders / "x"))
    (folders / "out").mkdir()
    (folders / "out/deep").symlink_to("../x/deep")
    out = locate(str(folders / "out"))
    assert find_overwritten(source, ["a.jpg", "deep/b.jpg"], out, ["a.jpg", "deep/b.jpg"]) == ["deep/b.jpg"]

    # A selection of links: what they lead to are the photographs.
    (folders / "some").mkdir()
    (folders / "some/a.jpg").symlink_to("../x/a.jpg")
    assert find_overwritten(locate(str(folders / "some")), ["a.jpg"], source, ["a.jpg"]) == ["a.jpg"]
    assert find_overwritten(locate(str(folders / "some")), ["a.jpg"], out, ["a.jpg"]) == []
