"""The cache of compiled kernels: what is loaded from it and what is not, damage, killed builds, missing homes."""

from __future__ import annotations

import contextlib
import os
import pwd
import random
import signal
import socket
import stat
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from fx_passes.ops.cpu import bind, build, cache
from tests.ops.test_cpu_build import result, start

pytestmark = pytest.mark.skipif(bind.library() is None, reason="no C++ compiler")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="gives files to other users")

NAME = build.name(build.arch())
OTHER = 54321  # another user
NONE = "no-such-compiler"


@pytest.fixture(scope="session")
def library() -> bytes:
    """A good library, as the cache keeps it."""
    directory = cache.cache_directory()
    assert directory is not None
    return (directory / NAME).read_bytes()  # where it is, since there is a native kernel


@pytest.fixture(autouse=True)
def quick_compiler(library: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that has the result at hand."""
    (tmp_path / "good.so").write_bytes(library[: -cache._SEALED])
    script = tmp_path / "compiler"
    script.write_text(f'#!/bin/sh\nfor target; do :; done\ncp {tmp_path}/good.so "$target"\n')
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))


@pytest.fixture
def filled(library: bytes, tmp_path: Path) -> Path:
    """A cache that holds it."""
    place = tmp_path / "cache"
    place.mkdir(mode=0o700)
    (place / NAME).write_bytes(library)
    (place / NAME).chmod(0o600)
    return place


@pytest.fixture(scope="session")
def planted(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """What an attacker would leave in its place: sealed, and it says so when it is loaded."""
    place = tmp_path_factory.mktemp("planted")
    (place / "planted.cpp").write_text(
        "#include <unistd.h>\n"
        '__attribute__((constructor)) static void run() { (void)!write(2, "PLANTED", 7); }\n'
        + "".join(f'extern "C" void {name}() {{}}\n' for name in cache.SYMBOLS)
    )
    command = [*build.find_compiler(), "-shared", "-fPIC", str(place / "planted.cpp"), "-o", str(place / "planted.so")]
    subprocess.run(command, check=True)
    return cache._seal((place / "planted.so").read_bytes(), NAME)


class Used:
    """Loads the library from a cache; says what there was to say, among it what planted code writes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capfd = monkeypatch, capfd

    def __call__(self, place: Path | str, **environment: str) -> str:
        with self.monkeypatch.context() as patch, warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for name, value in {"SUS_CACHE_DIR": str(place), **environment}.items():
                patch.setenv(name, value)
            failed = ""
            try:
                assert cache.load(build.arch()).sus_release_memory() >= 0
            except build.BuildError as error:
                failed = f"no native CPU kernel: {error}"
        return "".join(str(x.message) for x in said) + failed + self.capfd.readouterr().err


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Used:
    return Used(monkeypatch, capfd)


def test_that_planted_code_would_be_seen(planted: bytes, tmp_path: Path) -> None:
    (tmp_path / "planted.so").write_bytes(planted)
    load = f"import ctypes; ctypes.CDLL({str(tmp_path / 'planted.so')!r})"
    assert subprocess.run([sys.executable, "-c", load], capture_output=True, check=True).stderr == b"PLANTED"


def test_processes_that_build_at_once(tmp_path: Path) -> None:
    place = tmp_path / "new" / "cache"
    found = [result(p) for p in [start(SUS_CACHE_DIR=str(place)) for _ in range(3)]]
    assert len({norm for norm, _ in found}) == 1
    assert not any(err for _, err in found)
    assert [x.name for x in place.iterdir()] == [NAME]  # one library, no left-overs


def test_directories_and_files_are_private_under_any_umask(used: Used, tmp_path: Path) -> None:
    place = tmp_path / "a" / "b"
    before = os.umask(0)
    try:
        assert used(place) == ""
    finally:
        os.umask(before)
    for path, mode in ((place.parent, 0o700), (place, 0o700), (place / NAME, 0o600)):
        assert stat.S_IMODE(path.stat().st_mode) == mode


def test_a_library_needs_no_compiler(used: Used, filled: Path) -> None:
    assert used(filled, CXX=NONE) == ""
    assert used(filled, CXX="", PATH="/nowhere") == ""
    assert result(start(SUS_CACHE_DIR=str(filled), CXX=NONE))[1] == ""  # a new process


def damage(name: str, library: bytes) -> bytes:
    half = len(library) // 2
    return {
        "empty": b"",
        "truncated": library[:half],
        "cut by a byte": library[:-1],
        "zeroed pages": library[:8192] + bytes(8192) + library[16384:],
        "a bit": library[:half] + bytes([library[half] ^ 1]) + library[half + 1 :],
        "longer": library + b"more",
        "text": b"no library\n" * 100,
        "an older seal": library[: -cache._SEALED],
    }[name]


@pytest.mark.parametrize(
    "kind", ["empty", "truncated", "cut by a byte", "zeroed pages", "a bit", "longer", "text", "an older seal"]
)
def test_a_damaged_library(used: Used, kind: str, filled: Path, library: bytes) -> None:
    (filled / NAME).write_bytes(damage(kind, library))
    err = used(filled, CXX=NONE)
    assert f"{NAME} is damaged" in err
    assert "no native CPU kernel" in err  # and no crash
    if kind in ("truncated", "text"):  # built again
        err = used(filled)
        assert "builds its native CPU kernel again" in err
        assert used(filled, CXX=NONE) == ""


def test_a_whole_library_without_our_functions(
    used: Used, filled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.delenv("CXX")
        compiler = build.find_compiler()
    subprocess.run([*compiler, "-shared", "-x", "c++", "/dev/null", "-o", tmp_path / "x.so"], check=True)
    (filled / NAME).write_bytes(cache._seal((tmp_path / "x.so").read_bytes(), NAME))
    assert "undefined symbol: sus_forward" in used(filled)
    assert used(filled, CXX=NONE) == ""


@pytest.mark.parametrize("other", ["another instruction set", "other sources"])
def test_libraries_that_took_each_others_names(used: Used, other: str, filled: Path, planted: bytes) -> None:
    """Each is whole and this user's, and the wrong one for this machine or this version."""
    arch = next(name for name in build._ARCHES if name != build.arch())
    found = build.name(arch) if other == "another instruction set" else f"{NAME[:-19]}{'0' * 16}.so"
    assert found != NAME
    (filled / found).write_bytes(cache._seal(planted[: -cache._SEALED], found))
    (filled / found).chmod(0o600)
    for old, new in ((NAME, "x"), (found, NAME), ("x", found)):
        (filled / old).rename(filled / new)
    err = used(filled, CXX=NONE)
    assert "PLANTED" not in err
    assert f"{NAME} is damaged" in err
    assert "no native CPU kernel" in err
    err = used(filled)
    assert "PLANTED" not in err
    assert "builds its native CPU kernel again" in err
    assert used(filled, CXX=NONE) == ""


def plant(place: Path, contents: bytes, mode: int = 0o600, owner: int = -1) -> None:
    path = place / NAME
    path.unlink()
    path.write_bytes(contents)
    path.chmod(mode)
    os.chown(path, owner, -1)


@needs_root
def test_a_library_of_another_user(used: Used, filled: Path, planted: bytes) -> None:
    plant(filled, planted, 0o755, OTHER)
    err = used(filled)
    assert "PLANTED" not in err
    assert f"{NAME} belongs to another user ({OTHER})" in err
    assert used(filled, CXX=NONE) == ""  # was built again, ours now
    assert (filled / NAME).stat().st_uid == os.geteuid()


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_library_that_others_can_write_to(used: Used, mode: int, filled: Path, planted: bytes) -> None:
    plant(filled, planted, mode)
    err = used(filled, CXX=NONE)
    assert "PLANTED" not in err
    assert f"others can write to {NAME} (mode 0{mode:o})" in err


def test_a_link_to_a_library(used: Used, filled: Path, planted: bytes, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_bytes(planted)
    (filled / NAME).unlink()
    (filled / NAME).symlink_to(tmp_path / "elsewhere")
    err = used(filled, CXX=NONE)
    assert "PLANTED" not in err
    assert "symbolic links" in err
    used(filled)
    assert not (filled / NAME).is_symlink()
    assert (tmp_path / "elsewhere").read_bytes() == planted  # nothing was written through it


@pytest.mark.parametrize("kind", ["pipe", "directory", "socket"])
def test_what_is_no_file(used: Used, kind: str, filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (filled / NAME).unlink()
    if kind == "pipe":
        os.mkfifo(filled / NAME)
    elif kind == "directory":
        (filled / NAME).mkdir()
        (filled / NAME / "something").touch()
    else:
        monkeypatch.chdir(filled)  # the names of sockets are short
        socket.socket(socket.AF_UNIX).bind(NAME)
    err = used(filled)
    assert "no native CPU kernel" not in err
    if kind == "directory":
        assert "for this process only" in err


@pytest.mark.parametrize("mode", [0o1777, 0o777, 0o770, 0o703])
def test_a_directory_that_others_can_write_to(used: Used, mode: int, filled: Path, planted: bytes) -> None:
    plant(filled, planted)
    filled.chmod(mode)
    err = used(filled)
    assert "PLANTED" not in err
    assert f"others can write to {filled} (mode {mode:04o})" in err
    assert "for this process only" in err  # native, and nothing is left behind
    assert [x.name for x in filled.iterdir()] == [NAME]


@needs_root
def test_a_directory_of_another_user(used: Used, filled: Path, planted: bytes) -> None:
    plant(filled, planted)
    os.chown(filled, OTHER, -1)
    err = used(filled)
    assert "PLANTED" not in err
    assert f"{filled} belongs to another user ({OTHER})" in err


@pytest.mark.parametrize("sticky", [False, True])
def test_a_directory_in_one_that_others_can_write_to(used: Used, sticky: bool, filled: Path) -> None:
    """Without the sticky bit, others can put a directory of theirs in its place."""
    filled.parent.chmod(0o1777 if sticky else 0o777)
    err = used(filled, CXX=NONE)
    assert (err == "") == sticky
    if not sticky:
        assert f"others can write to {filled.parent} (mode 0777)" in err


@needs_root
def test_another_users_link_to_a_directory(used: Used, filled: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(filled)
    assert used(link, CXX=NONE) == ""  # our own
    os.lchown(link, OTHER, -1)
    assert f"{link} is another user's link" in used(link, CXX=NONE)


@needs_root
def test_a_cache_that_a_group_shares(used: Used, filled: Path, library: bytes) -> None:
    plant(filled, library, 0o640, OTHER)
    os.chown(filled / NAME, OTHER, 4321)
    os.chown(filled, 0, 4321)
    filled.chmod(0o2770)
    assert "others can write" in used(filled, CXX=NONE)
    assert "others can write" in used(filled, CXX=NONE, SUS_CACHE_GROUP="4322")
    assert used(filled, CXX=NONE, SUS_CACHE_GROUP="4321") == ""
    filled.chmod(0o2777)
    assert "others can write" in used(filled, CXX=NONE, SUS_CACHE_GROUP="4321")
    filled.chmod(0o2770)
    (filled / NAME).unlink()
    assert used(filled, SUS_CACHE_GROUP="4321") == ""
    built = (filled / NAME).stat()
    assert (built.st_gid, stat.S_IMODE(built.st_mode)) == (4321, 0o640)


def test_a_group_that_does_not_exist(used: Used, filled: Path) -> None:
    with pytest.raises(ValueError, match="SUS_CACHE_GROUP must be a group of this machine"):
        used(filled, SUS_CACHE_GROUP="no such group")


def test_a_file_that_is_exchanged_while_it_is_checked(
    filled: Path, planted: bytes, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    whole = cache._is_whole

    def exchange(sealed: bytes, name: str) -> bool:
        plant(filled, planted)
        return whole(sealed, name)

    monkeypatch.setattr(cache, "_is_whole", exchange)
    directory = os.open(filled, os.O_RDONLY)
    loaded = cache._load_file(directory, NAME)
    os.close(directory)
    assert "PLANTED" not in capfd.readouterr().err
    assert loaded.sus_release_memory() >= 0


def test_a_cache_that_cannot_be_written(used: Used, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    err = used(tmp_path / "file" / "below")
    assert "the cache cannot be used" in err
    assert "SUS_CACHE_DIR" in err
    assert "no native CPU kernel" not in err


def test_no_home(used: Used, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> None:
        raise KeyError("no such user")

    monkeypatch.setattr(pwd, "getpwuid", missing)
    monkeypatch.delenv("HOME")
    err = used("", XDG_CACHE_HOME="")
    assert "no home directory" in err
    assert "no native CPU kernel" not in err
    assert used("", XDG_CACHE_HOME="relative", CXX=NONE).count("no native CPU kernel") == 1
    assert used("", XDG_CACHE_HOME=str(tmp_path / "xdg")) == ""
    assert (tmp_path / "xdg" / "sus-lightning" / NAME).exists()


def test_a_home_of_an_earlier_version_is_made_private(used: Used, tmp_path: Path) -> None:
    place = tmp_path / "sus-lightning"
    place.mkdir()
    place.chmod(0o775)
    assert used("", XDG_CACHE_HOME=str(tmp_path)) == ""
    assert stat.S_IMODE(place.stat().st_mode) == 0o700


def test_what_builds_leave(used: Used, tmp_path: Path, filled: Path) -> None:
    """Of this machine as soon as they are gone, of others after an hour; builds that go on are let alone."""
    (filled / NAME).unlink()
    old = time.time() - 2 * cache._LEFT
    own = f"{cache._BUILDS}{cache._host()}-"
    for name, age in ((f"{own}dead", 0), (f"{own}alive", 0), (".build-other-1", 0), (".build-other-2", old)):
        (filled / name).mkdir()
        (filled / name / "sus.so").touch()
        if age:
            os.utime(filled / name, (age, age))
    for name in ("sus_cpu_avx2_1.tmp", "sus_cpu_avx2_2.tmp"):
        (filled / name).touch()
    os.utime(filled / "sus_cpu_avx2_2.tmp", (old, old))
    with cache._locked(str(filled / f"{own}alive")):
        assert used(filled) == ""
    assert {x.name for x in filled.iterdir()} == {NAME, f"{own}alive", ".build-other-1", "sus_cpu_avx2_1.tmp"}


BUILD = """
from fx_passes.ops.cpu import build, cache
cache.load(build.arch())
"""


def killed_builds(place: Path, times: int) -> int:
    """Builds by a real compiler that are killed at random moments, the compiler with them or not; how many were."""
    killed = 0
    for number in range(times):
        (place / NAME).unlink(missing_ok=True)
        environment = {**os.environ, "SUS_CACHE_DIR": str(place), "CXX": "", "SUS_CPU_ARCH": build.arch()}
        process = subprocess.Popen([sys.executable, "-c", BUILD], env=environment, start_new_session=True)
        before, deadline = set(place.iterdir()), time.monotonic() + 120
        while process.poll() is None and set(place.iterdir()) <= before and time.monotonic() < deadline:
            time.sleep(0.01)
        moment = time.monotonic() + random.Random(number).random() * 8
        while process.poll() is None and time.monotonic() < moment:
            time.sleep(0.01)
        if process.poll() is None:
            killed += 1
            kill: Callable[[int, int], None] = os.killpg if number % 2 else os.kill
            kill(process.pid, signal.SIGKILL)
        process.wait()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # a compiler without its parent writes to nobody
    return killed


@pytest.mark.parametrize("times", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_kill_during_a_build(used: Used, times: int, tmp_path: Path) -> None:
    place = tmp_path / "cache"
    place.mkdir(mode=0o700)
    assert killed_builds(place, times) >= times // 2
    assert used(place) == ""  # whole, or not there and built
    assert used(place, CXX=NONE) == ""
    (place / NAME).unlink()
    assert used(place) == ""
    assert [x.name for x in place.iterdir()] == [NAME]
