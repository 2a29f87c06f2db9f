"""Every system call by which a child works on files, each with the choice to let it happen, fail or be the end.

By ptrace, so that SQLite's calls are seen like Python's and nothing in the package has to know. Linux on x86-64 only.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from survival.process import Progress, fork

SUPPORTED = sys.platform == "linux" and platform.machine() == "x86_64"

#: number -> (name, which arguments are descriptors, which are (folder descriptor, path))
_CALLS: dict[int, tuple[str, tuple[int, ...], tuple[tuple[int | None, int], ...]]] = {
    0: ("read", (0,), ()),
    1: ("write", (0,), ()),
    2: ("open", (), ((None, 0),)),
    17: ("pread", (0,), ()),
    18: ("pwrite", (0,), ()),
    20: ("writev", (0,), ()),
    40: ("sendfile", (0,), ()),
    74: ("fsync", (0,), ()),
    75: ("fdatasync", (0,), ()),
    76: ("truncate", (), ((None, 0),)),
    77: ("ftruncate", (0,), ()),
    82: ("rename", (), ((None, 0), (None, 1))),
    83: ("mkdir", (), ((None, 0),)),
    84: ("rmdir", (), ((None, 0),)),
    86: ("link", (), ((None, 0), (None, 1))),
    87: ("unlink", (), ((None, 0),)),
    257: ("open", (), ((0, 1),)),
    258: ("mkdir", (), ((0, 1),)),
    263: ("unlink", (), ((0, 1),)),
    264: ("rename", (), ((0, 1), (2, 3))),
    265: ("link", (), ((0, 1), (2, 3))),
    277: ("sync_file_range", (0,), ()),
    285: ("fallocate", (0,), ()),
    295: ("pread", (0,), ()),
    296: ("pwritev", (0,), ()),
    316: ("rename", (), ((0, 1), (2, 3))),
    326: ("copy_file_range", (2,), ()),
    328: ("pwritev", (0,), ()),
}
#: What changes nothing: it may fail, but to die there is to die before the next call.
READS = {"read", "pread"}
#: What a full disk refuses.
TAKES_SPACE = {"write", "pwrite", "writev", "pwritev", "sendfile", "copy_file_range", "fallocate", "mkdir", "link"}
TAKES_SPACE |= {"fsync", "fdatasync"}  # where space is given late

_TRACEME, _CONT, _GETREGS, _SETREGS, _SYSCALL, _SETOPTIONS = 0, 7, 12, 13, 24, 0x4200
_OPTIONS = 0x1 | 0x100000  # TRACESYSGOOD: syscall stops can be told; EXITKILL: no child outlives its parent
_RAX, _ORIG_RAX = 10, 15
_ARGUMENTS = (14, 13, 12, 7, 9, 8)  # rdi, rsi, rdx, r10, r8, r9
_AT_FDCWD = 0xFFFFFF9C

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.restype = ctypes.c_long
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_Registers = ctypes.c_ulong * 27


class Call(NamedTuple):
    """A call that is about to happen. ``path`` is relative to the traced root."""

    number: int
    name: str
    path: str


#: Told of each call: None lets it happen, an error number makes it fail, KILL ends the child before it.
Decide = Callable[[Call], int | None]
KILL = -1


def _ptrace(request: int, pid: int, data: object = None) -> None:
    if _libc.ptrace(request, pid, None, data) < 0:
        raise OSError(ctypes.get_errno(), f"ptrace {request}: {os.strerror(ctypes.get_errno())}")


def begin() -> None:
    """In the child: from here on its calls are seen."""
    os.kill(os.getpid(), signal.SIGUSR1)


def end() -> None:
    """In the child: from here on they are not."""
    os.kill(os.getpid(), signal.SIGUSR2)


def traced(root: os.PathLike[str], work: Callable[[Progress], object], decide: Decide) -> tuple[bool, Progress]:
    """Run ``work`` in a child and ask ``decide`` about each call on files under ``root`` between its ``begin()`` and
    ``end()``. Returns whether the child was killed, and its progress.

    Raises AssertionError if the child failed by itself.
    """

    def wait_for_tracer(progress: Progress) -> object:
        _ptrace(_TRACEME, 0)
        os.kill(os.getpid(), signal.SIGSTOP)
        return work(progress)

    pid, progress = fork(wait_for_tracer)
    os.waitpid(pid, 0)
    try:
        _ptrace(_SETOPTIONS, pid, _OPTIONS)
        return _follow(pid, os.path.realpath(root) + "/", decide, progress), progress
    except BaseException:
        try:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass
        raise


def _follow(pid: int, root: str, decide: Decide, progress: Progress) -> bool:
    registers = _Registers()
    watching, entering, failing, number, deliver = False, True, 0, 0, 0
    while True:
        _ptrace(_SYSCALL if watching else _CONT, pid, deliver)
        deliver = 0
        _, status = os.waitpid(pid, 0)
        if os.WIFEXITED(status):
            if os.WEXITSTATUS(status):
                raise AssertionError(f"the child failed in {progress.phase}:\n{progress.words}")
            return False
        if os.WIFSIGNALED(status):
            raise AssertionError(f"the child died of {signal.Signals(os.WTERMSIG(status)).name} in {progress.phase}")
        stop = os.WSTOPSIG(status)
        if stop == signal.SIGUSR1:
            watching, entering = True, True
        elif stop == signal.SIGUSR2:
            watching = False
        elif stop != signal.SIGTRAP | 0x80:
            deliver = stop  # a signal of its own
        elif entering:
            entering = False
            _ptrace(_GETREGS, pid, ctypes.byref(registers))
            path = _path(pid, registers, root)
            if path is not None:
                number += 1
                decision = decide(Call(number, _CALLS[registers[_ORIG_RAX]][0], path))
                if decision == KILL:
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
                    return True
                if decision:
                    failing = decision
                    registers[_ORIG_RAX] = ctypes.c_ulong(-1).value  # no call: nothing happens
                    _ptrace(_SETREGS, pid, ctypes.byref(registers))
        else:
            entering = True
            if failing:
                _ptrace(_GETREGS, pid, ctypes.byref(registers))
                registers[_RAX] = ctypes.c_ulong(-failing).value
                _ptrace(_SETREGS, pid, ctypes.byref(registers))
                failing = 0


def _path(pid: int, registers: ctypes.Array[ctypes.c_ulong], root: str) -> str | None:
    """The file that a call is about, if the call counts and the file lies under the root."""
    if (known := _CALLS.get(registers[_ORIG_RAX])) is None:
        return None
    _, descriptors, paths = known
    for argument in descriptors:
        place = _descriptor(pid, registers[_ARGUMENTS[argument]] & 0xFFFFFFFF)
        if (place + "/").startswith(root):
            return place[len(root) :]
    for folder, argument in paths:
        place = _text(pid, registers[_ARGUMENTS[argument]])
        if not place.startswith("/") and folder is not None:
            base = registers[_ARGUMENTS[folder]] & 0xFFFFFFFF
            place = os.path.join(
                os.readlink(f"/proc/{pid}/cwd") if base == _AT_FDCWD else _descriptor(pid, base), place
            )
        if (place + "/").startswith(root):
            return place[len(root) :]
    return None


def _descriptor(pid: int, number: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/fd/{number}")
    except OSError:
        return ""


def _text(pid: int, address: int) -> str:
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        data = b""
        while b"\0" not in data and len(data) < 4096:  # never past the end of a page that may be the last
            data += os.pread(memory.fileno(), 4096 - (address + len(data)) % 4096, address + len(data))
    return os.fsdecode(data.split(b"\0")[0])


def possible() -> bool:
    """Whether processes may be traced here."""
    if not SUPPORTED:
        return False
    try:
        traced(Path("/"), lambda _: None, lambda _: None)
    except OSError as error:
        if error.errno in (errno.EPERM, errno.EACCES, errno.ENOSYS):
            return False
        raise
    except AssertionError:  # the child was refused
        return False
    return True
