"""Run code that reads a stranger's file in a child process with a limit of time and memory.

    call("visavis.processing.jinja_sandbox:render", …) ──► idle child, or a new one ──► value, bytes

PDF pages, chat templates and tokenizer files are small programs: a few hundred bytes of them can
take all memory or never end, and the libraries that read them can abort the process. Children are
kept for the next call, so that a call costs a round trip through a pipe (about 0.1 ms) and only the
first one the start of Python. A request is JSON and bytes in both directions, never a pickle.

The limit of time is CPU time of the child (`setitimer`), so a loaded machine changes nothing; the
limit of memory is address space beyond what the child had before the call (`RLIMIT_AS`, Linux). On
macOS a thread in the child watches its memory instead. Windows has only the limit of time, as wall
time.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import signal
import struct
import subprocess
import sys
import threading
from contextlib import suppress
from typing import IO, Any

from visavis import errors
from visavis.errors import VisavisError

_FRAME = struct.Struct(">QQ")  # lengths of the JSON and of the bytes after it
_MODULES = "visavis.processing."  # the only functions a child calls
_MAX_REPLY = 1 << 30  # bytes
_RETIRE_AT = 1 << 30  # bytes of address space gained, after which a child is replaced
_WALL_FACTOR = 10  # wall time that a call may take, in limits of CPU time
_START = (
    "import sys, json; sys.path[:] = json.loads(sys.argv[1]); "
    "from visavis.processing.bounded import serve; serve()"
)
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS")


class BoundExceededError(Exception):
    """The child ran out of time or memory, or died; the text says which, as part of a sentence."""


def call(
    function: str, *args: Any, seconds: float, memory: int, data: bytes = b""
) -> tuple[Any, bytes]:
    """Call `module:function(data, *args)` in a child process and return its result.

    Args:
        function: of a module in `visavis.processing`; returns a JSON value and bytes.
        args: JSON values.
        seconds: CPU time it may take.
        memory: bytes it may take.
        data: bytes it is given.

    Raises:
        BoundExceededError: it took more, or the child died.
        VisavisError: the function raised it.
    """
    request = {"function": function, "args": args, "seconds": seconds, "memory": memory}
    with _slots:
        with _lock:
            worker = _idle.pop() if _idle else None
        worker = worker or _Worker()
        try:
            reply, result = worker.ask(request, data, seconds)
        except BaseException:  # an interrupted call leaves half a frame in the pipe
            worker.close()
            raise
        if reply.pop("retire"):
            worker.close()
        else:
            with _lock:
                _idle.append(worker)
    if "exceeded" in reply:
        raise BoundExceededError(reply["exceeded"])
    if "error" in reply:
        kind = getattr(errors, reply["error"], VisavisError)
        raise kind(reply["message"])
    return reply["value"], result


def start() -> None:
    """Start a child in the background if none is idle, so that the next call finds one."""
    with _lock:
        if not _idle:
            _idle.append(_Worker())


class _Worker:
    """The parent's side of one child."""

    def __init__(self) -> None:
        path = json.dumps([os.path.abspath(entry) for entry in sys.path])
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-c", _START, path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # Rust writes its panics there
            env=os.environ | dict.fromkeys(_THREADS, "1") | {"TOKENIZERS_PARALLELISM": "false"},
        )

    def ask(
        self, request: dict[str, Any], data: bytes, seconds: float
    ) -> tuple[dict[str, Any], bytes]:
        assert self.process.stdin is not None and self.process.stdout is not None
        limit = seconds * _WALL_FACTOR if hasattr(signal, "setitimer") else seconds
        timer = threading.Timer(limit, self.process.kill)
        timer.daemon = True
        timer.start()
        try:
            _write(self.process.stdin, request, data)
            return _read(self.process.stdout)
        except (EOFError, OSError):
            code = self.process.wait()
            late = not timer.is_alive() or code == -getattr(signal, "SIGPROF", 0)
            reason = f"it took more than {seconds:g} seconds" if late else _died(code, request)
            raise BoundExceededError(reason) from None
        finally:
            timer.cancel()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with suppress(OSError):  # what was left in its buffer
                    pipe.close()


def _died(code: int, request: dict[str, Any]) -> str:
    name = {-number: number.name for number in signal.Signals}.get(code, f"exit code {code}")
    return (
        f"the library that reads it died ({name}), most often because it needs more than the "
        f"{request['memory'] >> 20} MiB of memory it may take"
    )


def _write(pipe: IO[bytes], value: dict[str, Any], data: bytes) -> None:
    encoded = json.dumps(value).encode()
    pipe.write(_FRAME.pack(len(encoded), len(data)) + encoded)
    pipe.write(data)
    pipe.flush()


def _read(pipe: IO[bytes]) -> tuple[dict[str, Any], bytes]:
    sizes = _FRAME.unpack(_exactly(pipe, _FRAME.size))
    if sum(sizes) > _MAX_REPLY:
        raise EOFError
    return json.loads(_exactly(pipe, sizes[0])), _exactly(pipe, sizes[1])


def _exactly(pipe: IO[bytes], size: int) -> bytes:
    data = pipe.read(size)
    if len(data) < size:
        raise EOFError
    return data


_lock = threading.Lock()
_slots = threading.BoundedSemaphore(max(2, os.cpu_count() or 1))
_idle: list[_Worker] = []


def _forget() -> None:
    """In a forked process: the parent's children are not ours."""
    global _lock, _slots, _idle
    _lock = threading.Lock()
    _slots = threading.BoundedSemaphore(max(2, os.cpu_count() or 1))
    _inherited.extend(_idle)  # kept, or Popen would complain that they still run
    _idle = []


_inherited: list[_Worker] = []


@atexit.register
def _close_all() -> None:
    while _idle:
        _idle.pop().close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


# ---- in the child --------------------------------------------------------------------------------


def serve() -> None:
    """Answer calls on stdin until it is closed."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    for number in (0, 1):  # what a library prints must not become part of a reply
        os.dup2(os.open(os.devnull, os.O_RDWR), number)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    start = _address_space()
    while True:
        try:
            request, data = _read(requests)
        except EOFError:
            return
        reply, result = _answer(request, data)
        reply["retire"] = "exceeded" in reply or _address_space() - start > _RETIRE_AT
        _write(replies, reply, result)


def _answer(request: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
    module, _, name = request["function"].partition(":")
    assert module.startswith(_MODULES), module
    try:
        function = getattr(importlib.import_module(module), name)
        _limit(request["seconds"], request["memory"])
        value, result = function(data, *request["args"])
        return {"value": value}, result
    except VisavisError as error:
        return {"error": type(error).__name__, "message": str(error)}, b""
    except MemoryError:
        return {"exceeded": f"it needs more than {request['memory'] >> 20} MiB of memory"}, b""
    except BaseException as error:  # Rust's panics are no Exceptions
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        return {"exceeded": f"the library that reads it failed with {reason}"}, b""
    finally:
        _limit(0, None)


def _limit(seconds: float, memory: int | None) -> None:
    """Set the limits of one call; 0 and None lift them."""
    if not hasattr(signal, "setitimer"):
        return
    import resource

    signal.setitimer(signal.ITIMER_PROF, seconds)  # SIGPROF ends the process
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        soft = hard if memory is None else _address_space() + memory
        soft = min(soft, hard) if resource.RLIM_INFINITY not in (soft, hard) else soft
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    elif memory is not None:
        _watch(memory)


def _address_space() -> int:
    """Return the bytes of address space of this process; 0 where the system does not say."""
    if sys.platform != "linux":
        return 0
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")


_watching = False


def _watch(memory: int) -> None:
    """End this process when its memory passes a limit (macOS, which ignores RLIMIT_AS)."""
    global _watching
    if _watching:
        return
    _watching = True
    import resource
    import time

    limit = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss + memory

    def watch() -> None:
        while resource.getrusage(resource.RUSAGE_SELF).ru_maxrss <= limit:
            time.sleep(0.02)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
