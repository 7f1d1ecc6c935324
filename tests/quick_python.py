"""A stand-in for Python where it is started many times: what it runs is forked from a process that has imported torch
and planned such videos. `serve` is that process, `write_client` the stand-in.
"""

import contextlib
import gc
import io
import json
import os
import runpy
import socket
import sys
from pathlib import Path

CLIENT = """#!{python} -IS
import json, os, socket, sys
if len(sys.argv) == 1 or sys.argv[1].startswith("-"):
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
with socket.socket(socket.AF_UNIX) as server:
    server.connect({path!r})
    socket.send_fds(server, [json.dumps([os.getcwd(), sys.argv[1:]]).encode()], [0, 1, 2])
    sys.exit(int(server.recv(9)))
"""


PLANNED = (
    ("--task", "t2v-tiny"),
    ("--task", "t2v-tiny", "--frame_num", "5"),
    ("--task", "i2v-tiny", "--frame_num", "5"),
    ("--task", "s2v-tiny", "--infer_frames", "8", "--num_clip", "2"),
)


def write_client(path: Path, server: Path) -> None:
    """A program at `path` that takes the arguments of Python and ends as what it runs does."""
    path.write_text(CLIENT.format(python=sys.executable, path=str(server)))
    path.chmod(0o755)


def serve(path: str) -> None:
    """Of tests/conftest.py, from which it is forked itself."""
    import wan.cli

    with contextlib.redirect_stdout(io.StringIO()):
        for flags in PLANNED:
            wan.cli.main([*flags, "--dry_run"])
    gc.freeze()
    with socket.create_server(path, family=socket.AF_UNIX) as server:
        while True:
            with server.accept()[0] as client:
                asked, outputs, _, _ = socket.recv_fds(client, 1 << 16, 3)
                child = os.fork()
                if child == 0:
                    return run(*json.loads(asked), outputs)
                client.sendall(str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])).encode())
            for one in outputs:
                os.close(one)


def run(folder: str, arguments: list[str], files: list[int]) -> None:
    """`python *arguments` in a folder, with these in place of the standard input and outputs."""
    for place, file in enumerate(files):
        os.dup2(file, place)
    os.chdir(folder)
    sys.argv = arguments
    runpy.run_path(arguments[0], run_name="__main__")
