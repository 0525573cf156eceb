"""The key file: what it takes and refuses, that it never holds a key, that it is read again, and that edits of several do not get lost."""

import argparse
import asyncio
import json
import logging
import os
import stat
import subprocess
import sys
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebjdat_serve import key_commands, keys
from ebjdat_serve.errors import EbjdatError
from ebjdat_serve.keys import KEY_VARIABLE, LONGEST, MOST_KEYS, KeyRing, digest, environment_key
from ebjdat_serve.server.read import auth
from ebjdat_serve.server.read.client_address import ClientAddress
from ebjdat_serve.server.read.client_limits import ClientLimits

SECRET = "ebjdat_" + "s" * 43
ROW = {"name": "shop", "sha256": digest(SECRET), "scopes": ["classify"], "created": "2026-11-26T08:00:00Z"}


def document(*rows: dict) -> bytes:
    return json.dumps({"schema": 1, "keys": rows}).encode()


def key_of(name: str = "shop", **more) -> keys.Key:
    return keys.Key(name=name, sha256="0" * 64, scopes=frozenset(["classify"]), created=datetime.now(UTC), **more)


@pytest.fixture
def file(tmp_path) -> Path:
    file = tmp_path / "keys.json"
    file.write_bytes(document(ROW))
    file.chmod(0o600)
    return file


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    for name in (KEY_VARIABLE, key_commands.FILE_VARIABLE):
        monkeypatch.delenv(name, raising=False)


# the format ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"scpoes": ["classify"]}, "keys.0.scpoes: unknown field; known are name, sha256, scopes"),
        ({"scopes": []}, "keys.0.scopes"),
        ({"scopes": ["classify", "admin"]}, "keys.0.scopes.1: Input should be 'classify', 'generate', 'explain' or 'operate'"),
        ({"scopes": "classify"}, "keys.0.scopes"),
        ({"name": "a b"}, "keys.0.name"),
        ({"name": "line\nend"}, "keys.0.name"),
        ({"name": ""}, "keys.0.name"),
        ({"name": KEY_VARIABLE}, f"the name of key {KEY_VARIABLE} is taken"),
        ({"sha256": SECRET}, "keys.0.sha256"),
        ({"sha256": digest(SECRET).upper()}, "keys.0.sha256"),
        ({"rate": 0}, "keys.0.rate"),
        ({"rate": "10"}, "keys.0.rate"),
        ({"rate": True}, "keys.0.rate"),
        ({"rate": float("nan")}, "keys.json"),
        ({"rate": float("inf")}, "keys.json"),
        ({"burst": 0}, "keys.0.burst"),
        ({"burst": 1.5}, "keys.0.burst"),
        ({"concurrency": -1}, "keys.0.concurrency"),
        ({"created": "yesterday"}, "keys.0.created"),
        ({"created": "2026-11-26T08:00:00"}, "keys.0.created"),
        ({"expires": 5}, "keys.0.expires"),
    ],
)
def test_a_field_that_is_wrong_is_named_with_its_file_and_not_repeated(file, row, said):
    file.write_bytes(document({**ROW, **row}))
    with pytest.raises(EbjdatError) as refused:
        KeyRing(file)
    text = str(refused.value)
    assert text.startswith(f"{file}")
    assert said in text
    assert SECRET not in text


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is not a key file"),
        (b"[]", "Input should be an object"),
        (b"\xff", "is not a key file"),
        (b"[" * 100_000, "is not a key file"),
        (b'{"keys": []}', "schema"),
        (b'{"schema": 2, "keys": []}', "schema"),
        (b'{"schema": 1, "keys": [], "more": 1}', "more: unknown field"),
        (b'{"schema": 1, "keys": [], "keys": []}', "a field is given twice"),
        (document(ROW, ROW), "the name of key shop is taken"),
        (document(ROW, {**ROW, "name": "other"}), "the sha256 of key other is taken"),
        (b" " * (keys.LARGEST_FILE + 1), "is larger than"),
        (document(*[{**ROW, "name": f"k{i}", "sha256": f"{i:064x}"} for i in range(MOST_KEYS + 1)]), "keys"),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{len(value)} bytes",
)
def test_a_file_that_is_none_is_refused(file, content, said):
    file.write_bytes(content)
    with pytest.raises(EbjdatError, match=said) as refused:
        KeyRing(file)
    assert str(file) in str(refused.value)


def test_a_missing_file_is_refused_at_the_start(tmp_path):
    with pytest.raises(EbjdatError, match=r"none\.json cannot be read: No such file"):
        KeyRing(tmp_path / "none.json")


@given(st.binary(max_size=200))
def test_whatever_lies_there_ends_in_keys_or_in_an_error_of_ours(content):
    try:
        found = keys.parse(content, Path("keys.json"))
    except EbjdatError as error:
        assert "keys.json" in str(error)
    else:
        assert all(len(key.sha256) == 64 for key in found)


def test_who_may_read_and_write_the_file_matters(file, caplog):
    file.chmod(0o602)
    with pytest.raises(EbjdatError, match="may be written by anybody"):
        KeyRing(file)
    file.chmod(0o644)  # as secrets are mounted in a container
    assert KeyRing(file).find(SECRET.encode())
    assert "may be read by others" in caplog.text
    caplog.clear()
    file.chmod(0o600)
    KeyRing(file)
    assert not caplog.text


# finding a key ---------------------------------------------------------------------------------------------------------------


def test_a_key_is_found_by_itself_alone(file):
    ring = KeyRing(file)
    found = ring.find(SECRET.encode())
    assert (found.name, found.scopes) == ("shop", {"classify"})
    for wrong in (b"", b"x", SECRET[:-1].encode(), (SECRET + "s").encode(), digest(SECRET).encode(), b"\xff\x00", b"s" * (LONGEST + 1)):
        assert ring.find(wrong) is None


def test_every_key_is_compared_whichever_is_found(file, monkeypatch):
    """In constant time: a comparison of hmac for each, whether the first fits or none."""
    file.write_bytes(document(ROW, *[{**ROW, "name": f"k{i}", "sha256": f"{i:064x}"} for i in range(9)]))
    ring, compared = KeyRing(file), []
    real = keys.hmac.compare_digest
    monkeypatch.setattr(keys.hmac, "compare_digest", lambda a, b: compared.append(b) or real(a, b))
    for sent in (SECRET.encode(), b"wrong"):
        compared.clear()
        ring.find(sent)
        assert len(compared) == 10


def test_a_key_expires_while_the_server_runs(file):
    file.write_bytes(document({**ROW, "expires": "2027-01-01T00:00:00Z"}))
    now = [datetime(2026, 12, 31, 23, 59, 59, tzinfo=UTC)]
    ring = KeyRing(file, now=lambda: now[0])
    assert ring.find(SECRET.encode())
    now[0] += timedelta(seconds=1)
    assert ring.find(SECRET.encode()) is None
    assert ring.closed


# the environment's key -------------------------------------------------------------------------------------------------------


def test_the_environments_key_has_all_scopes_and_white_space_at_its_ends_is_no_part_of_it(monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, f" \t{SECRET}\r\n")
    ring = KeyRing(None, environment_key())
    assert ring.closed
    found = ring.find(SECRET.encode())
    assert (found.name, found.scopes) == (KEY_VARIABLE, set(keys.SCOPES))
    assert ring.find(b"") is None


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("", "holds no key"),
        (" \n", "holds no key"),
        ("schlüssel" * 5, "characters that are not printable ASCII"),
        ("a\tb" * 10, "characters that are not printable ASCII"),
        ("a\x7fb" * 10, "characters that are not printable ASCII"),
        ("line\nend", "characters that are not printable ASCII"),
        (os.fsdecode(b"\xff\xfe" * 20), "characters that are not printable ASCII"),
        ("k" * (LONGEST + 1), "more than the 4096 that fit"),
    ],
)
def test_a_key_that_cannot_be_one_stops_the_start(monkeypatch, value, said):
    monkeypatch.setenv(KEY_VARIABLE, value)
    with pytest.raises(EbjdatError, match=said) as refused:
        environment_key()
    assert KEY_VARIABLE in str(refused.value)
    assert not value.strip() or value.strip() not in str(refused.value)


def test_without_file_and_variable_the_server_is_open():
    assert environment_key() is None
    ring = KeyRing(None)
    assert not ring.closed
    assert ring.find(SECRET.encode()) is None


def test_a_short_key_is_warned_of_without_being_written_to_the_log(monkeypatch, caplog):
    monkeypatch.setenv(KEY_VARIABLE, "hunter2")
    assert environment_key()
    assert "can be guessed" in caplog.text
    assert "hunter2" not in caplog.text


def test_file_and_environment_both_count(file, monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, "e" * 32)
    ring = KeyRing(file, environment_key())
    assert [ring.find(sent).name for sent in (SECRET.encode(), b"e" * 32)] == ["shop", KEY_VARIABLE]


# reading again ---------------------------------------------------------------------------------------------------------------


class Ring(KeyRing):
    """A ring for which the test says what time it is."""

    def __init__(self, file):
        self.seconds = 0.0
        super().__init__(file, now=lambda: datetime.now(UTC) + timedelta(seconds=self.seconds))

    def later(self, seconds=1.1):
        self.seconds += seconds
        self.take(self.read_again())


def test_a_changed_file_is_read_again_and_an_unchanged_one_is_not(file, monkeypatch):
    ring, opened = Ring(file), []
    real = keys.read
    monkeypatch.setattr(keys, "read", lambda path: opened.append(path) or real(path))
    ring.later(10)
    for _ in range(5):
        ring.later()
    assert len(opened) == 1  # once more after the start, for a clock of files that ticks slowly
    secret = keys.new(file, key_of("second"))
    ring.later()
    assert ring.find(secret.encode()).name == "second"
    keys.revoke(file, "shop")
    ring.later()
    assert ring.find(SECRET.encode()) is None
    assert ring.find(secret.encode())


def test_a_change_that_leaves_size_and_times_as_they_were_is_seen_while_the_file_is_new(file):
    ring, status = Ring(file), file.stat()
    file.write_bytes(document({**ROW, "name": "shap"}))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    ring.later()
    assert ring.find(SECRET.encode()).name == "shap"


@pytest.mark.parametrize("harm", ["torn", "gone", "folder", "writable"])
def test_a_broken_file_keeps_the_old_keys_and_is_said_once(file, caplog, harm):
    caplog.set_level(logging.INFO, "ebjdat_serve")
    ring = Ring(file)
    ring.later(10)
    caplog.clear()
    good = file.read_bytes()
    if harm == "torn":
        file.write_bytes(good[:-5])
    elif harm == "writable":
        file.chmod(0o666)
    else:
        file.unlink()
        if harm == "folder":
            file.mkdir()
    for seconds in (1.1, 1.1, 10, 1.1):
        ring.later(seconds)
        assert ring.find(SECRET.encode())
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert str(file) in caplog.text
    assert "the keys that were read before remain" in caplog.text
    assert SECRET not in caplog.text
    if harm == "folder":
        file.rmdir()
    file.write_bytes(good)
    file.chmod(0o600)
    for _ in range(3):
        ring.later()
    assert [record.levelname for record in caplog.records] == ["ERROR", "INFO"]
    assert ring.find(SECRET.encode())


def test_a_mounted_secret_that_is_swapped_by_its_link_is_followed(tmp_path):
    """As Kubernetes updates a secret: a link to a link to a folder, which is replaced."""
    for name, row in (("one", ROW), ("two", {**ROW, "name": "other"})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "keys.json").write_bytes(document(row))
        os.utime(tmp_path / name / "keys.json", (1e9, 1e9))
    (tmp_path / "data").symlink_to("one")
    (tmp_path / "keys.json").symlink_to("data/keys.json")
    ring = Ring(tmp_path / "keys.json")
    (tmp_path / "next").symlink_to("two")
    (tmp_path / "next").rename(tmp_path / "data")
    ring.later()
    assert ring.find(SECRET.encode()).name == "other"


def test_a_file_system_that_hangs_keeps_the_old_keys_is_said_at_first_and_at_last_and_takes_few_threads(file, caplog, monkeypatch):
    caplog.set_level(logging.INFO, "ebjdat_serve")
    monkeypatch.setattr(auth, "LOOK_SECONDS", 0.005)
    monkeypatch.setattr(auth, "READ_SECONDS", 0.02)
    access = auth.Access(KeyRing(file), ClientAddress(), ClientLimits())
    back, reads, real = threading.Event(), [], keys.read

    def hanging(path):
        reads.append(path)
        back.wait(30)
        return real(path)

    async def scenario():
        monkeypatch.setattr(keys, "read", hanging)
        following = asyncio.create_task(access.follow())
        while "keys are followed no more" not in caplog.text:
            await asyncio.sleep(0.005)
        await asyncio.sleep(0.2)  # in which others would begin: each read that hangs is a thread
        assert len(reads) == auth.MAX_HUNG_READS
        assert access.keys.find(SECRET.encode())
        assert [record.levelname for record in caplog.records] == ["ERROR", "ERROR"]
        assert f"{file} cannot be read within" in caplog.records[0].message
        file.write_bytes(document({**ROW, "name": "later"}))
        monkeypatch.setattr(auth, "READ_SECONDS", 30.0)  # or a busy machine would be said to hang, too
        back.set()
        while access.keys.find(SECRET.encode()).name != "later":
            await asyncio.sleep(0.005)
        assert [record.levelname for record in caplog.records] == ["ERROR", "ERROR", "INFO"]
        following.cancel()

    asyncio.run(asyncio.wait_for(scenario(), 20))


def test_where_no_thread_can_start_the_old_keys_remain_and_following_goes_on(file, caplog, monkeypatch):
    monkeypatch.setattr(auth, "LOOK_SECONDS", 0.005)
    access = auth.Access(KeyRing(file), ClientAddress(), ClientLimits())

    def start(thread):
        raise RuntimeError("can't start new thread")

    async def scenario():
        following = asyncio.create_task(access.follow())
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", start)
            while "can't start new thread" not in caplog.text:
                await asyncio.sleep(0.005)
        assert access.keys.find(SECRET.encode())
        file.write_bytes(document({**ROW, "name": "later"}))
        while access.keys.find(SECRET.encode()).name != "later":
            await asyncio.sleep(0.005)
        following.cancel()

    asyncio.run(asyncio.wait_for(scenario(), 20))


def test_a_stop_waits_for_no_file_system_that_hangs(file):
    """asyncio's own executor is joined as the process ends."""
    script = (
        "import asyncio, sys, threading, time\n"
        "from pathlib import Path\n"
        "from ebjdat_serve import keys\n"
        "from ebjdat_serve.server.read import auth\n"
        "from ebjdat_serve.server.settings import Settings\n"
        "access = auth.Access.of(Settings(keys=Path(sys.argv[1])))\n"
        "auth.LOOK_SECONDS = 0.01\n"
        "Path(sys.argv[1]).touch()\n"  # or, had this process started slowly, the file would be old enough not to be read again
        "hangs = threading.Event()\n"
        "keys.read = lambda file: hangs.set() or time.sleep(600)\n"
        "async def scenario():\n"
        "    following = asyncio.create_task(access.follow())\n"
        "    while not hangs.is_set():\n"
        "        await asyncio.sleep(0.01)\n"
        "    following.cancel()\n"
        "asyncio.run(scenario())\n"
        "print('stopped', flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(file)], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "stopped\n"


# writing ---------------------------------------------------------------------------------------------------------------------


def test_a_pipe_in_place_of_a_key_file_is_refused_and_keeps_nobody_waiting(tmp_path):
    os.mkfifo(file := tmp_path / "keys.json")
    with pytest.raises(EbjdatError, match="is not a file"):
        KeyRing(file)


def test_whoever_could_read_a_key_file_can_after_an_edit(tmp_path):
    """A server of another user, or of a group, reads what root has edited."""
    file = tmp_path / "keys.json"
    keys.new(file, key_of())
    file.chmod(0o640)
    mine = os.geteuid()
    if mine == 0:
        os.chown(file, 1234, 1235)
    keys.new(file, key_of(name="other"))
    status = file.stat()
    assert stat.S_IMODE(status.st_mode) == 0o640
    assert (status.st_uid, status.st_gid) == ((1234, 1235) if mine == 0 else (mine, os.getegid()))


def test_a_key_file_that_cannot_be_given_back_is_left_as_it_is(tmp_path, monkeypatch):
    file = tmp_path / "keys.json"
    keys.new(file, key_of())
    before = file.read_bytes()

    def refuse(*_):
        raise PermissionError

    monkeypatch.setattr(os, "fchown", refuse)
    with pytest.raises(EbjdatError, match=f"belongs to user {os.geteuid()}, .*; edit it as that user"):
        keys.new(file, key_of(name="other"))
    assert file.read_bytes() == before


def test_a_new_key_is_in_no_file_and_only_the_owner_reads_its_hash(tmp_path):
    file = tmp_path / "keys.json"
    old = os.umask(0)
    try:
        secret = keys.new(file, key_of(rate=5, burst=7, concurrency=3))
    finally:
        os.umask(old)
    assert secret.startswith(keys.PREFIX)
    assert len(secret) == len(keys.PREFIX) + 43
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    for path in tmp_path.iterdir():
        assert secret.encode() not in path.read_bytes()
    found = KeyRing(file).find(secret.encode())
    assert (found.name, found.rate, found.burst, found.concurrency) == ("shop", 5, 7, 3)
    assert keys.new(tmp_path / "more.json", key_of()) != secret


def test_a_file_that_is_wrong_is_not_written_over(file):
    file.write_bytes(b"{")
    for edit in (lambda: keys.new(file, key_of("other")), lambda: keys.revoke(file, "shop")):
        with pytest.raises(EbjdatError, match="is not a key file"):
            edit()
    assert file.read_bytes() == b"{"


def test_a_write_that_fails_leaves_the_file_as_it_was(file, monkeypatch):
    before = file.read_bytes()
    monkeypatch.setattr(keys.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        keys.new(file, key_of("other"))
    assert file.read_bytes() == before
    assert sorted(path.name for path in file.parent.iterdir() if path.suffix != ".lock") == ["keys.json"]


def test_a_link_stays_one(file):
    link = file.with_name("link.json")
    link.symlink_to(file.name)
    keys.new(link, key_of("other"))
    assert link.is_symlink()
    assert len(KeyRing(file)._keys) == 2


def test_edits_at_the_same_time_all_count(tmp_path):
    file = tmp_path / "keys.json"
    code = (
        "import argparse, sys\nfrom ebjdat_serve import key_commands\nparser = argparse.ArgumentParser()\n"
        "key_commands.add(parser.add_subparsers())\noptions = parser.parse_args(sys.argv[1:])\noptions.command(options)"
    )
    running = [
        subprocess.Popen([sys.executable, "-c", code, "key", "new", f"k{i}", "--file", str(file)], stdout=subprocess.PIPE, encoding="utf-8")
        for i in range(3)
    ]
    secrets = [process.communicate()[0].strip() for process in running]
    ring = KeyRing(file)
    assert [ring.find(secret.encode()).name for secret in secrets] == ["k0", "k1", "k2"]


# the commands ----------------------------------------------------------------------------------------------------------------


def run(*words: str | Path) -> None:
    parser = argparse.ArgumentParser()
    key_commands.add(parser.add_subparsers(required=True))
    options = parser.parse_args(["key", *map(str, words)])
    options.command(options)


def test_new_list_and_revoke(tmp_path, capsys, monkeypatch):
    file = tmp_path / "keys.json"
    run("new", "shop", "--rate", "5", "--days", "90", "--file", file)
    secret = capsys.readouterr().out.strip()  # alone on standard output: KEY=$(ebjdat-serve key new shop)
    monkeypatch.setenv(key_commands.FILE_VARIABLE, str(file))
    run("new", "ops", "--scope", "operate", "--concurrency", "2")
    other = capsys.readouterr().out.strip()
    ring = KeyRing(file)
    assert ring.find(secret.encode()).scopes == {"classify", "generate"}
    assert ring.find(other.encode()).scopes == {"operate"}
    run("list")
    shown = capsys.readouterr().out
    assert secret not in shown
    assert other not in shown
    header, *rows = [line.split() for line in shown.splitlines()]
    assert header[:5] == ["name", "scopes", "rate", "burst", "concurrency"]
    assert [row[:5] for row in rows] == [["shop", "classify,generate", "5", "-", "-"], ["ops", "operate", "-", "-", "2"]]
    run("revoke", "shop")
    assert [key.name for key in KeyRing(file)._keys] == ["ops"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["new", "shop"], "has a key shop already"),
        (["new", KEY_VARIABLE], "has a key LIT_SERVER_API_KEY already"),
        (["new", "a b"], "name 'a b'"),
        (["new", "other", "--rate", "nan"], "rate nan"),
        (["new", "other", "--concurrency", "0"], "concurrency 0"),
        (["new", "other", "--days", "inf"], "days inf"),
        (["revoke", "other"], "has no key other; it has shop"),
    ],
)
def test_what_cannot_be_done_is_said(file, words, said):
    before = file.read_bytes()
    with pytest.raises(EbjdatError, match=said):
        run(*words, "--file", file)
    assert file.read_bytes() == before


def test_a_missing_file_is_made_by_new_alone(tmp_path):
    for words in (["list"], ["revoke", "shop"]):
        with pytest.raises(EbjdatError, match=r"none\.json"):
            run(*words, "--file", tmp_path / "none.json")
    with pytest.raises(OSError, match="nowhere"):
        run("new", "shop", "--file", tmp_path / "nowhere" / "keys.json")


def test_without_a_file_the_command_says_which_option_is_missing(capsys):
    with pytest.raises(SystemExit):
        run("list")
    assert "--file" in capsys.readouterr().err
