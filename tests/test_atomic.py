"""Tests of atomic file replacement: the new or the old file, whatever happens between writing and renaming."""

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ebjdat_serve.atomic import replacing
from ebjdat_serve.errors import EbjdatError
from ebjdat_serve.signing import write_signature

ROOT = Path(__file__).parent.parent
KILLED = """
import os, signal, sys
from pathlib import Path
from ebjdat_serve.atomic import replacing
with replacing(Path(sys.argv[1])) as aside:
    aside.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
RIVAL = """
import sys
from pathlib import Path
from ebjdat_serve.atomic import replacing
with replacing(Path(sys.argv[1]), shared=True) as aside:
    aside.write_text("theirs")
"""


@pytest.fixture
def file(tmp_path) -> Path:
    file = tmp_path / "kept.json"
    file.write_text("old")
    return file


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_a_kill_before_the_rename_leaves_the_old_file_and_the_next_write_tidies_up(file):
    killed = subprocess.run([sys.executable, "-c", KILLED, str(file)], check=False)
    assert killed.returncode == -9
    assert file.read_text() == "old"
    assert names(file.parent) == [".kept.json.part", "kept.json"]
    with replacing(file) as aside:
        assert not aside.exists()
        aside.write_text("new")
    assert file.read_text() == "new"
    assert names(file.parent) == ["kept.json"]


def test_an_interrupt_while_writing_leaves_nothing_behind(file):
    with pytest.raises(KeyboardInterrupt), replacing(file) as aside:
        aside.write_text("half")
        raise KeyboardInterrupt
    assert file.read_text() == "old"
    assert names(file.parent) == ["kept.json"]


def test_a_full_disk_is_said_and_leaves_the_old_file(file):
    with pytest.raises(OSError, match="No space left") as error, replacing(file) as aside:
        aside.symlink_to("/dev/full")
        aside.write_text("new")
    assert error.value.errno == errno.ENOSPC
    assert file.read_text() == "old"
    assert names(file.parent) == ["kept.json"]


def test_a_read_only_folder_is_said():
    with pytest.raises(OSError, match="kept") as error, replacing(Path("/sys/kept")) as aside:  # where root may not write either
        aside.write_text("new")
    assert error.value.errno in (errno.EACCES, errno.EPERM, errno.EROFS)


def test_what_cannot_be_renamed_is_removed(tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(IsADirectoryError), replacing(tmp_path / "taken") as aside:
        aside.write_text("new")
    assert names(tmp_path) == ["taken"]


def test_a_link_is_replaced_and_what_it_points_at_stays(file):
    link = file.with_name("link")
    link.symlink_to(file.name)
    with replacing(link) as aside:
        aside.write_text("new")
    assert (link.read_text(), file.read_text()) == ("new", "old")
    assert not link.is_symlink()
    with replacing(link) as aside:  # and a link may take the place of a file
        aside.symlink_to(file.name)
    assert link.read_text() == "old"


def test_a_link_planted_aside_is_not_followed(file, tmp_path):
    (tmp_path / ".kept.json.part").symlink_to(tmp_path / "victim")
    with replacing(file) as aside:
        aside.write_text("new")
    assert names(tmp_path) == ["kept.json"]


def test_the_new_file_has_the_mode_of_any_other(file):
    before = os.umask(0o027)
    try:
        with replacing(file) as aside:
            aside.write_text("new")
    finally:
        os.umask(before)
    assert file.stat().st_mode & 0o777 == 0o640


def test_rivals_write_under_names_of_their_own(file):
    with replacing(file, shared=True) as aside:
        subprocess.run([sys.executable, "-c", RIVAL, str(file)], check=True)
        aside.write_text("ours")
        assert file.read_text() == "theirs"
    assert file.read_text() == "ours"
    assert names(file.parent) == ["kept.json"]


def test_a_signature_that_cannot_be_put_in_place_leaves_nothing_behind(tmp_path):
    bundle = tmp_path / "bundle"
    (bundle / "bundle.json.sig").mkdir(parents=True)
    (bundle / "bundle.json").write_text("{}")
    with pytest.raises(EbjdatError, match="cannot be written: Is a directory"):
        write_signature(bundle, bytes(64))
    assert names(bundle) == ["bundle.json", "bundle.json.sig"]


def test_there_is_one_way_to_replace_a_file():
    files = [file for folder in ("ebjdat_serve", "training", "export", "benchmarks") for file in (ROOT / folder).rglob("*.py")]
    found = [file.name for file in files if re.search(r"\bos\.(replace|rename)\(|\.part\"", file.read_text(encoding="utf-8"))]
    assert found == ["atomic.py"]
