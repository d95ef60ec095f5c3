"""Where the compiled kernel is kept, and what of it is loaded.

To load a library is to run it. So the directory and the file must belong to this user or root, nobody else may be able
to write to them or to exchange a directory above them, links are not followed, and what was checked is what is loaded:
the file stays open from the check to the load. A file ends in a hash of its contents, so that a damaged one is seen and
built again.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import grp
import hashlib
import itertools
import os
import shutil
import socket
import stat
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

from fx_passes.ops.cpu import build
from fx_passes.ops.cpu.build import BuildError

SYMBOLS = (
    "sus_forward",
    "sus_backward",
    "sus_lists_usable",
    "sus_lists_count",
    "sus_lists_export",
    "sus_lists_free",
    "sus_release_memory",
)
_SEAL = b"SUS library 1\0\0\0"  # before the hash
_SEALED = len(_SEAL) + hashlib.sha256().digest_size
_BUILDS = ".build-"  # directories of compilers at work
_LEFT = 3600  # seconds after which a directory that cannot be locked is taken to be left over
_loads = itertools.count()


class _Untrusted(Exception):
    """A file or directory that others may have written; the message says why."""


def cache_directory() -> Path | None:
    """SUS_CACHE_DIR, or the place for this user's caches; None where there is neither."""
    chosen = os.environ.get("SUS_CACHE_DIR")
    if chosen:
        return Path(os.path.abspath(chosen))
    caches = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(caches):  # which does not count, says XDG
        home = os.path.expanduser("~")
        if not os.path.isabs(home):  # neither HOME nor an entry of this user
            return None
        caches = os.path.join(home, ".cache")
    return Path(caches) / "sus-lightning"


def _group() -> int | None:
    """The group that SUS_CACHE_GROUP trusts, by name or number."""
    wanted = os.environ.get("SUS_CACHE_GROUP")
    if not wanted:
        return None
    try:
        return int(wanted) if wanted.isdecimal() else grp.getgrnam(wanted).gr_gid
    except KeyError:
        raise ValueError(f"SUS_CACHE_GROUP must be a group of this machine, but it is {wanted!r}") from None


def _check(what: str, found: os.stat_result, above: bool = False) -> None:
    """Raises `_Untrusted` where others than this user and root decide what a file or directory contains.

    A directory `above` may be writable by all if it is sticky: others cannot exchange there what is not theirs.
    """
    owners, group, mode = {0, os.geteuid()}, _group(), stat.S_IMODE(found.st_mode)
    if above:
        owners.add(os.stat("/").st_uid)  # root, where user namespaces show it under another number
    shared = group is not None and found.st_gid == group
    if found.st_uid not in owners and not (shared and not above):
        raise _Untrusted(f"{what} belongs to another user ({found.st_uid})")
    if above and mode & stat.S_ISVTX:
        return
    if mode & (0o002 if shared else 0o022):
        raise _Untrusted(f"others can write to {what} (mode {mode:04o})")


def _make(path: str) -> None:
    """A private directory and, for what is missing above it, more of them."""
    missing = []
    while not os.path.lexists(path):
        missing.append(path)
        path = os.path.dirname(path)
    for name in reversed(missing):
        with contextlib.suppress(FileExistsError):
            os.mkdir(name, 0o700)


def _check_links(path: str) -> None:
    for name in (path, *map(str, Path(path).parents)):
        if os.path.islink(name) and os.lstat(name).st_uid not in (0, os.geteuid()):
            raise _Untrusted(f"{name} is another user's link")


def _is_default(found: os.stat_result) -> bool:
    """Whether this is our own place, which an earlier version may have made under the user's umask."""
    return found.st_uid == os.geteuid() and not os.environ.get("SUS_CACHE_DIR")


def refusal(path: Path, writing: bool) -> str | None:
    """Why a directory would not be used as the cache, or not be written to, or None. Makes and changes nothing.

    Raises:
        ValueError: SUS_CACHE_GROUP is no group of this machine.
    """
    existing = next(place for place in (path, *path.parents) if os.path.lexists(place))
    try:
        _check_links(str(path))
        real = os.path.realpath(existing)
        for name in map(str, Path(real).parents):
            _check(name, os.stat(name), above=True)
        found = os.stat(real)
        if existing != path or not _is_default(found):
            _check(real, found, above=existing != path)
    except (OSError, _Untrusted) as error:
        return str(error)
    if not stat.S_ISDIR(found.st_mode):
        return f"{real} is no directory"
    if writing and not os.access(real, os.W_OK | os.X_OK):
        return f"this user cannot write to {real}"
    return None


def _open_directory(path: str) -> int:
    """A descriptor of a directory that nobody else writes to, made if need be. Raises OSError and `_Untrusted`."""
    _check_links(path)
    path = os.path.realpath(path)
    _make(path)
    for name in map(str, Path(path).parents):
        _check(name, os.stat(name), above=True)
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        found = os.fstat(directory)
        if _is_default(found) and found.st_mode & 0o022:
            os.fchmod(directory, 0o700)
            found = os.fstat(directory)
        _check(path, found)
    except BaseException:
        os.close(directory)
        raise
    return directory


def _seal(contents: bytes, name: str) -> bytes:
    return contents + _SEAL + hashlib.sha256(contents + name.encode()).digest()


def _is_whole(sealed: bytes, name: str) -> bool:
    """Whether it is what was once written under this name."""
    return len(sealed) > _SEALED and _seal(sealed[:-_SEALED], name) == sealed


@contextlib.contextmanager
def _opened(directory: int, name: str) -> Iterator[int]:
    # Without waiting, should it be a pipe.
    file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=directory)
    try:
        yield file
    finally:
        os.close(file)


def _load_file(directory: int, name: str) -> ctypes.CDLL:
    """The library in a directory. Raises FileNotFoundError, `_Untrusted`, or BuildError for a damaged one."""
    try:
        with _opened(directory, name) as file:
            found = os.fstat(file)
            if not stat.S_ISREG(found.st_mode):
                raise _Untrusted(f"{name} is no file")
            _check(name, found)
            with open(file, "rb", closefd=False) as reader:
                sealed = reader.read()
            if not _is_whole(sealed, name):
                raise BuildError(f"{name} is damaged")
            return _load(file, sealed)
    except FileNotFoundError:
        raise
    except OSError as error:  # among them, that it is a link
        raise _Untrusted(f"{name} cannot be used: {error}") from error


def _load(file: int, sealed: bytes) -> ctypes.CDLL:
    """What an open file contains, and not what its name stands for by now."""
    # Under a name of its own each time: the dynamic linker does not look again at one that it knows.
    path = f"/proc/self/{'./' * next(_loads)}fd/{file}"
    try:
        if os.path.exists(path):
            return _with_symbols(ctypes.CDLL(path))
        with tempfile.TemporaryDirectory(prefix="sus-lightning-") as private:
            copy = os.path.join(private, "sus.so")
            Path(copy).write_bytes(sealed)
            return _with_symbols(ctypes.CDLL(copy))
    except (OSError, AttributeError) as error:
        raise BuildError(f"the library does not load: {error}") from error


def _with_symbols(library: ctypes.CDLL) -> ctypes.CDLL:
    for name in SYMBOLS:
        getattr(library, name)
    return library


def _remove_left_builds(path: str) -> None:
    """Directories whose builder is gone: killed, or on a machine that fell silent."""
    for entry in os.listdir(path):
        found = os.path.join(path, entry)
        with contextlib.suppress(OSError):
            if entry.startswith(f"{_BUILDS}{_host()}-"):
                with contextlib.suppress(OSError), _locked(found):
                    shutil.rmtree(found, ignore_errors=True)
            if entry.startswith(_BUILDS) or (entry.startswith("sus_cpu_") and entry.endswith(".tmp")):
                if time.time() - os.lstat(found).st_mtime < _LEFT:
                    continue
                if os.path.isdir(found):
                    shutil.rmtree(found, ignore_errors=True)
                else:
                    os.unlink(found)


def _host() -> str:
    return "".join(x for x in socket.gethostname() if x.isalnum())[:32] or "host"


@contextlib.contextmanager
def _locked(path: str) -> Iterator[None]:
    """Holds a directory until the end of the block or of the process. Raises OSError where another process does."""
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(directory)


@contextlib.contextmanager
def _place(path: str) -> Iterator[str]:
    """A private directory for a build, locked where the file system can, and removed in the end."""
    place = ""
    try:
        with contextlib.ExitStack() as stack:
            while True:
                place = tempfile.mkdtemp(prefix=f"{_BUILDS}{_host()}-", dir=path)
                try:
                    stack.enter_context(_locked(place))
                except (BlockingIOError, FileNotFoundError):  # another process takes it to be left over
                    continue
                except OSError:
                    pass
                if os.path.isdir(place):
                    break
            yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _build(arch: str, path: str, directory: int) -> ctypes.CDLL:
    """Compiles a library and puts it into a directory, in one step for the file system. Processes may build at once."""
    name = build.name(arch)
    build.find_compiler()  # which may raise: nothing has been made yet
    _remove_left_builds(path)
    with _place(path) as place:
        sealed = _seal(build.compile_library(arch, place), name)
        new = os.open(os.path.join(place, name), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with open(new, "wb") as writer:
            writer.write(sealed)
            group = _group()
            if group is not None:
                with contextlib.suppress(OSError):  # its members read it, where this user is one
                    os.fchown(new, -1, group)
                    os.fchmod(new, 0o640)
            writer.flush()
            os.fsync(new)
        held = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            library = _load_file(held, name)  # what does not load is not kept
            os.replace(name, name, src_dir_fd=held, dst_dir_fd=directory)
            os.fsync(directory)
        finally:
            os.close(held)
        return library


def load(arch: str) -> ctypes.CDLL:
    """The library for an instruction set: that of the cache, or a new one. Raises BuildError where there is none."""
    path = cache_directory()
    try:
        if path is None:
            raise _Untrusted("this user has no home directory")
        directory = _open_directory(str(path))
    except (OSError, _Untrusted) as error:
        return _load_private(arch, f"the cache cannot be used: {error}")
    try:
        try:
            return _load_file(directory, build.name(arch))
        except FileNotFoundError:
            pass
        except (_Untrusted, BuildError) as error:
            warnings.warn(f"sus_attention builds its native CPU kernel again: in {path}, {error}", stacklevel=4)
        try:
            return _build(arch, os.path.realpath(path), directory)
        except (OSError, _Untrusted) as error:
            return _load_private(arch, f"cannot write to the cache: {error}")
    finally:
        os.close(directory)


def _load_private(arch: str, reason: str) -> ctypes.CDLL:
    """A library that only this process has, compiled in a temporary directory."""
    place = tempfile.mkdtemp(prefix="sus-lightning-")  # of mode 0700
    try:
        directory = _open_directory(place)
        try:
            library = _build(arch, place, directory)
        finally:
            os.close(directory)
    except (OSError, _Untrusted) as error:
        raise BuildError(f"{reason}; nor can a temporary directory: {error} (SUS_CACHE_DIR chooses a place)") from error
    except BuildError as error:
        raise BuildError(f"{reason}; {error}") from error
    finally:
        shutil.rmtree(place, ignore_errors=True)
    warnings.warn(
        f"sus_attention compiled its native CPU kernel for this process only: {reason} (SUS_CACHE_DIR chooses a place)",
        stacklevel=5,
    )
    return library
