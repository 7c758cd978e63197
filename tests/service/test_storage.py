import pytest

from corun_ray.service.storage import StorageError, locate


def test_reads_back_what_it_wrote_and_lists_it(tmp_path):
    place = locate(str(tmp_path / "a"))
    place.child("b/c.txt").write(b"one")
    place.child("b/c.txt").write(b"two")
    assert place.child("b/c.txt").read() == b"two"
    assert place.list_files() == ["b/c.txt"]


def test_missing_places_are_one_clear_line(tmp_path):
    with pytest.raises(StorageError, match="cannot list .*nowhere") as error:
        locate(str(tmp_path / "nowhere")).list_files()
    assert "\n" not in str(error.value)
    with pytest.raises(StorageError, match="cannot read"):
        locate(str(tmp_path)).child("none.png").read()


def test_an_unknown_scheme_is_refused():
    with pytest.raises(StorageError, match="cannot open gopher://x"):
        locate("gopher://x/y")


def test_downloads_files_and_folders(tmp_path):
    source = locate(str(tmp_path / "source"))
    source.child("one.bin").write(b"1")
    source.child("deep/two.bin").write(b"2")
    (tmp_path / "target").mkdir()
    folder = source.download(tmp_path / "target")
    assert (folder / "one.bin").read_bytes() == b"1"
    assert (folder / "deep/two.bin").read_bytes() == b"2"
    assert source.child("one.bin").download(tmp_path / "target").read_bytes() == b"1"


@pytest.mark.parametrize("relative", ["../other", "a/../../other", "/etc/passwd", ".."])
def test_nothing_outside_a_place_is_its_child(tmp_path, relative):
    with pytest.raises(StorageError, match="does not lie below"):
        locate(str(tmp_path)).child(relative)


def test_names_with_dots_are_children(tmp_path):
    place = locate(str(tmp_path))
    assert place.child("..a/b..c").path == f"{tmp_path}/..a/b..c"
    assert place.child("a/../b").path == f"{tmp_path}/a/../b"


def test_credentials_in_a_uri_are_refused_and_not_repeated():
    with pytest.raises(StorageError) as caught:
        locate("s3://AKIA:word@bucket/runs")
    assert str(caught.value).startswith("s3://***@bucket/runs holds credentials") and "word" not in str(caught.value)
