# SPDX-License-Identifier: Apache-2.0
"""Durable writes: whole or not at all, also on a disk that is really full and in a process that is really killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from privacy import files
from privacy.errors import Equivocation, MachineError


def test_write_once_finds_the_same_bytes_and_refuses_others(tmp_path: Path) -> None:
    path = tmp_path / "promise"
    files.write_once(path, b"one")
    files.write_once(path, b"one")
    with pytest.raises(Equivocation, match="promise"):
        files.write_once(path, b"two")
    assert path.read_bytes() == b"one"
    assert [each.name for each in tmp_path.iterdir()] == ["promise"]


def test_write_atomic_replaces_and_sets_the_mode(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    files.write_atomic(path, b"a", mode=files.PRIVATE)
    files.write_atomic(path, b"b", mode=files.PRIVATE)
    assert path.read_bytes() == b"b"
    assert path.stat().st_mode & 0o777 == 0o600


FULL = """
import resource, signal, sys
from pathlib import Path
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))  # the kernel refuses every byte past 100: EFBIG, as ENOSPC would
from privacy import files
from privacy.errors import MachineError
path = Path(sys.argv[2])
try:
    how = {"atomic": files.write_atomic, "once": files.write_once, "append": files.append_line, "folder": files.write_folder}
    how[sys.argv[1]](path, {"small": b"x", "large": b"x" * 300} if sys.argv[1] == "folder" else b"x" * 300)
except MachineError as error:
    print(error.code)
"""


@pytest.mark.parametrize("how", ["atomic", "once", "append", "folder"])
def test_a_write_the_disk_refuses_leaves_the_old_content_whole(tmp_path: Path, how: str) -> None:
    path = tmp_path / "file"
    is_new = how in {"once", "folder"}
    if not is_new:
        path.write_bytes(b"old\n")
    done = subprocess.run([sys.executable, "-c", FULL, how, str(path)], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "cannot-write", done.stderr
    assert not path.exists() if is_new else path.read_bytes() == b"old\n"
    assert [each for each in tmp_path.iterdir() if each.name.startswith(".")] == []


def test_a_folder_appears_whole_and_never_over_what_is_there(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    files.write_folder(folder, {"a": b"one", "b": b"two"})
    assert {each.name: each.read_bytes() for each in folder.iterdir()} == {"a": b"one", "b": b"two"}
    for path in (folder, folder / "a"):
        with pytest.raises(MachineError, match="cannot write"):
            files.write_folder(path, {"c": b"three"})
    assert sorted(each.name for each in folder.iterdir()) == ["a", "b"]
    assert (folder / "a").read_bytes() == b"one"
    (tmp_path / "empty").mkdir()
    files.write_folder(tmp_path / "empty", {"a": b"one"})
    assert (tmp_path / "empty" / "a").read_bytes() == b"one"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["empty", "new"]


def test_append_line_adds_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    for line in (b"a", b"b"):
        files.append_line(path, line)
    assert path.read_bytes() == b"a\nb\n"
    assert path.stat().st_mode & 0o777 == 0o600


LOOP = """
import sys
from pathlib import Path
from privacy import files
n = 0
while True:
    n += 1
    files.write_atomic(Path(sys.argv[1]), (b"%d;" % n) * 20000)
"""


def test_a_process_killed_while_writing_leaves_one_whole_version(tmp_path: Path) -> None:
    path = tmp_path / "state"
    child = subprocess.Popen([sys.executable, "-c", LOOP, str(path)])
    deadline = time.monotonic() + 20
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    child.send_signal(signal.SIGKILL)
    child.wait()
    parts = path.read_bytes().split(b";")
    assert len(parts) == 20001
    assert len(set(parts[:-1])) == 1


def test_the_lock_is_exclusive_between_processes_and_freed_by_death(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    code = (
        "import sys,time; from pathlib import Path; from privacy import files\n"
        "with files.locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(lock)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "held\n"
    with pytest.raises(MachineError, match="another process"), files.locked(lock):
        pass
    child.kill()
    child.wait()
    with files.locked(lock):
        assert lock.exists()


def test_sweeping_takes_half_written_files_and_nothing_else(tmp_path: Path) -> None:
    files.write_atomic(tmp_path / "kept", b"whole")
    others = [tmp_path / name for name in (".hidden", ".kept.toml", ".kept.0123456789a", ".kept.0123456789AB", "kept.0123456789ab")]
    mine, neighbours = tmp_path / ".kept.0123456789ab", tmp_path / ".other.0123456789ab"
    for path in (*others, mine, neighbours):
        path.write_bytes(b"")
    files.sweep(tmp_path / "kept")
    assert (mine.exists(), neighbours.exists()) == (False, True)
    (tmp_path / ".folder.0123456789ab").mkdir()
    (tmp_path / ".folder.0123456789ab" / "half").write_bytes(b"")
    files.sweep(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([tmp_path / "kept", *others])


def test_a_shared_folder_is_swept_only_by_whoever_is_alone_in_it(tmp_path: Path) -> None:
    folder = tmp_path / "evidence"
    folder.mkdir()
    half = folder / ".document.0123456789ab"
    with files.shared(folder):
        half.write_bytes(b"another process is writing")
        with files.shared(folder):
            assert half.exists()
    with files.shared(folder):
        assert not half.exists()


def test_the_lock_of_a_shared_folder_needs_no_right_to_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, lock, flags = tmp_path / "evidence", tmp_path / "evidence.lock", []
    folder.mkdir()
    opened = os.open

    def watched(path: Path, how: int, *rest: int) -> int:
        flags.append((Path(path), how & os.O_ACCMODE))
        return opened(path, how, *rest)

    monkeypatch.setattr(os, "open", watched)
    before = os.umask(0o022)
    try:
        with files.shared(folder):
            assert lock.stat().st_mode & 0o777 == files.PUBLIC
    finally:
        os.umask(before)
    assert (lock, os.O_RDONLY) in flags
