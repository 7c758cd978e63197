import pytest

from corun_ray.service.storage import StorageError, locate


def test_reads_back_what_it_wrote_and_lists_it(tmp_path):
    place = locate(str(tmp_path / "a"))
    place.child("b/c.txt").write(b"one")
    place.child("b/c.txt").write(b"two")
    assert place.child("b/c.txt").read() == b"two"
    assert place.files() == ["b/c.txt"]


def test_missing_places_are_one_clear_line(tmp_path):
    with pytest.raises(StorageError, match="cannot list .*nowhere") as error:
        locate(str(tmp_path / "nowhere")).files()
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
