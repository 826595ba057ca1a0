"""Files and folders are there whole or not at all, whatever goes wrong while they are written."""

import errno
import itertools
import os
import resource
import signal
import stat
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from polyak.files.writing import whole

NEW, OLD = b"new" * 10_000, b"old"


@pytest.fixture
def old(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(OLD)
    return path


def put(path, content=(NEW,)):
    with whole.replacing(path) as file:
        file.writelines(content)


def fail(path, error):
    with whole.replacing(path) as file:
        file.write(NEW)
        raise error


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


def assert_is_as_it_was(path):
    assert path.read_bytes() == OLD
    assert names(path.parent) == [path.name]


class TestReplacing:
    def test_new_and_old_files(self, old):
        put(old)
        put(old.with_name("other"))
        assert old.read_bytes() == NEW
        assert names(old.parent) == ["file", "other"]

    def test_the_file_is_flushed_before_it_takes_the_name_and_the_folder_after(self, old, monkeypatch):
        calls = []
        fsync, replace = os.fsync, os.replace

        def noted(descriptor):
            calls.append(stat.S_ISDIR(os.fstat(descriptor).st_mode))
            # Whatever is in Python's own buffer is not flushed by the system.
            assert calls[-1] or os.fstat(descriptor).st_size == len(NEW)
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", noted)
        monkeypatch.setattr(os, "replace", lambda *names: (calls.append("replace"), replace(*names)))
        put(old)
        assert calls == [False, "replace", True]

    @pytest.mark.protects
    @pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, SystemExit])
    def test_a_failure_leaves_the_old_file(self, old, error):
        with pytest.raises(error):
            fail(old, error)
        assert_is_as_it_was(old)

    def test_an_interrupt_while_it_writes(self, old):
        before = signal.signal(signal.SIGALRM, signal.default_int_handler)
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        try:
            with pytest.raises(KeyboardInterrupt):
                put(old, itertools.repeat(NEW))
        finally:
            signal.signal(signal.SIGALRM, before)
        assert_is_as_it_was(old)

    @pytest.mark.protects
    def test_a_file_that_may_not_grow(self, old):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        # Python ignores the signal that a write beyond the limit sends, and gets an error.
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
        try:
            with pytest.raises(OSError, match=rf"{old}' cannot be written, and is as it was: File too large") as caught:
                put(old)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert caught.value.errno == errno.EFBIG
        assert_is_as_it_was(old)

    def test_no_such_folder(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"x' cannot be written: there is no folder '.*nowhere'"):
            put(tmp_path / "nowhere" / "x")

    def test_a_folder_of_that_name(self, tmp_path):
        with pytest.raises(IsADirectoryError, match="it is a folder, and the name of a file is needed"):
            put(tmp_path)
        with pytest.raises(IsADirectoryError, match="new/' cannot be written: it is a folder, and the name of a file"):
            put(f"{tmp_path}/new/")
        assert not list(tmp_path.iterdir())

    def test_a_pipe_of_that_name_stays(self, tmp_path):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(OSError, match=r"pipe' cannot be written: it is a device or a pipe, not a file"):
            put(tmp_path / "pipe")
        assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)

    def test_relative_paths_and_text(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        put("file")
        assert (tmp_path / "file").read_bytes() == NEW


class TestLinks:
    @pytest.mark.protects
    @pytest.mark.parametrize("exists", [True, False])
    def test_a_link_stays_and_what_it_points_to_is_replaced(self, tmp_path, exists):
        (tmp_path / "there").mkdir()
        file, link = tmp_path / "there" / "file", tmp_path / "link"
        if exists:
            file.write_bytes(OLD)
        link.symlink_to(Path("there") / "file")
        put(link)
        assert os.readlink(link) == "there/file"
        assert file.read_bytes() == NEW
        assert names(tmp_path / "there") == ["file"]
        assert names(tmp_path) == ["link", "there"]

    def test_a_link_into_no_folder(self, tmp_path):
        (tmp_path / "link").symlink_to(tmp_path / "nowhere" / "file")
        with pytest.raises(FileNotFoundError, match=r"link' cannot be written: there is no folder '.*nowhere'"):
            put(tmp_path / "link")

    def test_a_link_that_leads_to_itself(self, tmp_path):
        (tmp_path / "link").symlink_to(tmp_path / "link")
        with pytest.raises(OSError, match=r"link' cannot be written: it is a link that leads to itself"):
            put(tmp_path / "link")


class TestPermissions:
    @pytest.mark.parametrize("umask", [0o022, 0o077])
    def test_a_new_file_has_those_of_any_new_file(self, tmp_path, umask):
        before = os.umask(umask)
        try:
            put(tmp_path / "ours")
        finally:
            os.umask(before)
        assert stat.S_IMODE((tmp_path / "ours").stat().st_mode) == 0o666 & ~umask

    @pytest.mark.protects
    @pytest.mark.parametrize("mode", [0o600, 0o640, 0o666, 0o755])
    def test_a_file_that_was_there_keeps_its_own(self, old, mode):
        old.chmod(mode)
        with whole.replacing(old) as file:
            # Nobody reads what is written who may not read what it replaces.
            assert stat.S_IMODE(os.fstat(file.fileno()).st_mode) == mode
            file.write(NEW)
        assert stat.S_IMODE(old.stat().st_mode) == mode

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
    def test_and_its_owner(self, old):
        os.chown(old, 1234, 5678)
        put(old)
        assert (old.stat().st_uid, old.stat().st_gid) == (1234, 5678)

    @pytest.mark.protects
    def test_a_read_only_file_is_not_replaced(self, old):
        with read_only(old), pytest.raises(PermissionError, match=r"file' cannot be written: it is read-only; choose"):
            put(old)
        assert_is_as_it_was(old)

    def test_a_read_only_folder(self, old):
        with read_only(old.parent), pytest.raises(PermissionError, match=r"'.*/new' cannot be written, and is as it"):
            put(old.with_name("new"))
        assert_is_as_it_was(old)


class read_only:  # noqa: N801  # reads as a word after `with`
    """A mode keeps everybody but root from writing; what is immutable, root too."""

    def __init__(self, path):
        self.path = path

    def __enter__(self):
        if os.geteuid() != 0:
            self.path.chmod(0o500 if self.path.is_dir() else 0o400)
        elif subprocess.run(["chattr", "+i", self.path], capture_output=True, check=False).returncode:
            pytest.skip("root may write everywhere, and chattr +i does not work on this file system")

    def __exit__(self, *_):
        if os.geteuid() != 0:
            self.path.chmod(0o700)
        else:
            subprocess.run(["chattr", "-i", self.path], check=True)


class TestNames:
    @pytest.mark.parametrize("name", ["x" * 255, "ä" * 127, "x" * 230, ".hidden", "with space", "new\nline", "[a]*?"])
    def test_every_name_that_the_disk_takes(self, tmp_path, name):
        put(tmp_path / name)
        whole._new_name(tmp_path / name).touch()
        put(tmp_path / name)
        assert names(tmp_path) == [name]

    def test_a_name_that_it_does_not_take(self, tmp_path):
        with pytest.raises(OSError, match=r"x' cannot be written: File name too long"):
            put(tmp_path / ("x" * 256))
        assert names(tmp_path) == []


def left_by_killed_writer(path, *, folder=False):
    """The name of what a writer in another process leaves behind, killed while it writes."""
    code = f"""
        import os, signal
        from polyak.files.writing import whole
        with whole.{"new_folder" if folder else "replacing"}({os.fspath(path)!r}) as made:
            {"(made / 'part').write_bytes(b'part')" if folder else "made.write(b'part'); made.flush()"}
            print({"made.name" if folder else "os.path.basename(made.name)"}, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    return done.stdout.rstrip("\n")


class TestLeftovers:
    def test_a_killed_writer_leaves_the_old_file_and_the_next_one_tidies_up(self, old):
        left = left_by_killed_writer(old)
        assert old.read_bytes() == OLD
        assert names(old.parent) == sorted([left, "file"])
        put(old)
        assert names(old.parent) == ["file"]

    def test_also_where_the_next_one_fails(self, old):
        left_by_killed_writer(old)
        with pytest.raises(KeyboardInterrupt):
            fail(old, KeyboardInterrupt)
        assert_is_as_it_was(old)

    @pytest.mark.protects
    def test_what_is_being_written_stays(self, old):
        with whole.replacing(old) as first:
            first.write(b"first")
            with whole.replacing(old) as second:
                second.write(b"second")
                whole.remove_leftovers(old)
                assert len(names(old.parent)) == 3
            assert old.read_bytes() == b"second"
        assert old.read_bytes() == b"first"
        assert names(old.parent) == ["file"]

    @pytest.mark.protects
    def test_files_of_others_stay(self, old):
        others = [".file.tmp", "file.tmp", ".file", ".file2.polyak-0123456789abcdef.tmp", ".file.polyak-x", "other"]
        for name in others:
            (old.parent / name).touch()
        put(old)
        assert names(old.parent) == sorted([*others, "file"])

    def test_what_no_writer_leaves_stays_and_hinders_nobody(self, old):
        (old.parent / ".file.polyak-0.tmp").symlink_to("nowhere")
        os.mkfifo(old.parent / ".file.polyak-1.tmp")
        put(old)
        assert old.read_bytes() == NEW
        assert len(names(old.parent)) == 3

    @pytest.mark.protects
    def test_a_file_that_is_taken_for_a_leftover_before_it_is_locked(self, old, monkeypatch):
        lock, removed = whole._lock, []

        def late(descriptor, *, wait):
            if wait and not removed:
                before = names(old.parent)
                whole.remove_leftovers(old)
                removed.extend(set(before) - set(names(old.parent)))
            return lock(descriptor, wait=wait)

        monkeypatch.setattr(whole, "_lock", late)
        put(old)
        assert len(removed) == 1
        assert old.read_bytes() == NEW
        assert names(old.parent) == ["file"]


@pytest.mark.protects
def test_two_writers_at_once_each_leave_a_whole_file(tmp_path):
    contents = [bytes([number]) * 300_000 for number in (1, 2)]
    failures = []

    def repeat(content):
        try:
            for _ in range(15):
                put(tmp_path / "file", [content])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=repeat, args=[content]) for content in contents]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        if (tmp_path / "file").exists():
            assert (tmp_path / "file").read_bytes() in contents
    assert failures == []
    assert names(tmp_path) == ["file"]


def fill(folder, files, *, meanwhile=lambda: None):
    with whole.new_folder(folder) as made:
        for name in files:
            (made / name).write_bytes(NEW)
        meanwhile()


def _interrupt():
    raise KeyboardInterrupt


class TestNewFolder:
    def test_it_is_not_there_before_the_end(self, tmp_path):
        with whole.new_folder(tmp_path / "folder") as made:
            (made / "a").write_bytes(NEW)
            assert not (tmp_path / "folder").exists()
        assert (tmp_path / "folder" / "a").read_bytes() == NEW
        assert names(tmp_path) == ["folder"]

    @pytest.mark.protects
    def test_a_failure_leaves_nothing(self, tmp_path):
        with pytest.raises(KeyboardInterrupt):
            fill(tmp_path / "folder", ["a"], meanwhile=_interrupt)
        assert names(tmp_path) == []

    def test_an_empty_folder_is_taken_with_its_mode(self, tmp_path):
        (tmp_path / "folder").mkdir(mode=0o700)
        (tmp_path / "link").symlink_to("folder")
        with whole.new_folder(tmp_path / "link") as made:
            (made / "a").touch()
        assert names(tmp_path / "folder") == ["a"]
        assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o700
        assert (tmp_path / "link").is_symlink()

    @pytest.mark.protects
    def test_a_folder_with_something_in_it_stays(self, tmp_path):
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder" / "a").write_bytes(OLD)
        with (
            pytest.raises(FileExistsError, match="there is a folder with 1 entry; choose another name, or remove it"),
            whole.new_folder(tmp_path / "folder"),
        ):
            raise AssertionError("it is refused before anything is written")
        assert (tmp_path / "folder" / "a").read_bytes() == OLD

    def test_a_folder_that_somebody_fills_meanwhile(self, tmp_path):
        folder = tmp_path / "folder"
        with pytest.raises(FileExistsError, match="there is a folder with 2 entries; choose another name"):
            fill(folder, ["a"], meanwhile=lambda: fill(folder, ["b", "c"]))
        assert names(tmp_path) == ["folder"]
        assert names(folder) == ["b", "c"]

    def test_a_file_of_that_name_stays(self, old):
        with pytest.raises(FileExistsError, match="there is a file; choose"), whole.new_folder(old):
            pass
        assert_is_as_it_was(old)

    def test_the_next_one_tidies_up_after_a_killed_one(self, tmp_path):
        left = left_by_killed_writer(tmp_path / "folder", folder=True)
        assert names(tmp_path / left) == ["part"]
        with whole.new_folder(tmp_path / "folder"):
            assert len(names(tmp_path)) == 1
        assert names(tmp_path) == ["folder"]
