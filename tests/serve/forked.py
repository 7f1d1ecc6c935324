"""A server that is forked, as are its processes, from one that has imported torch: as others but for how they start."""

import contextlib
import os
import pickle
import signal
import socket
import threading
import traceback
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from types import SimpleNamespace

from wan.command import run_process
from wan.serve import child
from wan.serve.__main__ import main


def serve(flags, folder, stdout, stderr):
    """What `python -m wan.serve *flags` does, in this process."""
    os.chdir(folder)
    for number, path in ((1, stdout), (2, stderr)):
        with open(path, "ab") as file:
            os.dup2(file.fileno(), number)
    forks = Forks()
    child.multiprocessing = SimpleNamespace(get_context=lambda _: forks)
    run_process(lambda: main(flags))


class Forks:
    """In place of a context of multiprocessing. Forks come from a process without threads, made here, at first."""

    Pipe = staticmethod(Pipe)

    def __init__(self):
        self._socket, theirs = socket.socketpair()
        self._lock = threading.Lock()
        if os.fork() == 0:
            self._socket.close()
            _fork_for(theirs)
        theirs.close()

    def Process(self, target, args, daemon):  # noqa: N802
        return _Process(self._socket, self._lock, target, args)


class _Process:
    def __init__(self, socket, lock, target, args):
        self._socket, self._lock, self._target, self._args = socket, lock, target, args
        self.pid = self.exitcode = None

    def start(self):
        pipe, *rest = self._args
        self._told, theirs = os.pipe()
        with self._lock:
            socket.send_fds(self._socket, [pickle.dumps((self._target, rest))], [pipe.fileno(), theirs])
        os.close(theirs)
        self.pid = self._read()

    def kill(self):
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def join(self):
        self.exitcode = self._read()
        os.close(self._told)

    def _read(self):
        return int.from_bytes(os.read(self._told, 4), "big", signed=True)


def _fork_for(server):
    """Until the server has gone. Each process is forked by one that waits for its end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        message, files, _, _ = socket.recv_fds(server, 1 << 16, 2)
        if not message:
            os._exit(0)
        if os.fork() == 0:
            server.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _run(*pickle.loads(message), *files)
        for file in files:
            os.close(file)


def _run(target, args, pipe, told):
    process = os.fork()
    if process == 0:
        os.close(told)
        code = 1
        try:
            target(Connection(pipe), *args)
            code = 0
        except SystemExit as end:
            code = end.code
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(pipe)
    with contextlib.suppress(BrokenPipeError):  # the server has gone
        _tell(told, process)
        _tell(told, os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]))
    os._exit(0)


def _tell(told, number):
    os.write(told, number.to_bytes(4, "big", signed=True))
