"""Files are written as a whole, or not at all."""

import os
import threading
from pathlib import Path

import pytest

from lycheedecode.errors import OutputError
from lycheedecode.files import write_whole


def test_a_file_and_the_folders_above_it(tmp_path):
    write_whole(tmp_path / "a" / "b.json", "é\n")
    write_whole(tmp_path / "a" / "b.json", "new")
    assert (tmp_path / "a" / "b.json").read_text(encoding="utf-8") == "new"
    assert [one.name for one in (tmp_path / "a").iterdir()] == ["b.json"]


def test_what_cannot_be_written_is_one_sentence_and_leaves_nothing(tmp_path):
    (tmp_path / "file").write_text("kept")
    for path in (tmp_path, tmp_path / "file" / "below.json"):
        with pytest.raises(OutputError, match="cannot be written"):
            write_whole(path, "text")
    assert [one.name for one in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "Ctrl-C"])
def test_an_interrupted_write_leaves_what_was_there(tmp_path, monkeypatch, error):
    (tmp_path / "a.json").write_text("old")

    def stop(path: Path, *_, **__) -> None:
        path.touch()
        raise error

    monkeypatch.setattr(Path, "write_text", stop)
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else OutputError):
        write_whole(tmp_path / "a.json", "new")
    assert [one.name for one in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_text() == "old"


def test_links_and_pipes_stay_what_they_are(tmp_path):
    (tmp_path / "link.json").symlink_to(tmp_path / "real.json")
    write_whole(tmp_path / "link.json", "text")
    assert (tmp_path / "link.json").is_symlink()
    assert (tmp_path / "real.json").read_text() == "text"
    os.mkfifo(tmp_path / "pipe")
    read = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_text()))
    reader.start()
    write_whole(tmp_path / "pipe", "through")
    reader.join()
    assert read == ["through"]
    assert (tmp_path / "pipe").is_fifo()
