"""A Ray cluster: joined, or one of this machine started, and the room for workers in it. No torch."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from wan.distributed.signals import listening
from wan.errors import SwanError, UsageError, one_line, printable
from wan.files import temporary_name

REACH_S = 3.0  # for the cluster's port to answer
_LOOK_S, _AWAY_S = 2.0, 20.0  # how often its head is looked at, and for how long it may be away without a word
# Of Ray's environment: no statistics of use, no log lines, no Ray that nobody asked for; and a few seconds of tries,
# where Ray takes minutes, to reach a cluster that has gone, or what is none.
_QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_BACKEND_LOG_LEVEL": "fatal", "RAY_ENABLE_AUTO_CONNECT": "0"}
_TRIES = {
    "RAY_NUM_REDIS_GET_RETRIES": "2",
    "RAY_gcs_rpc_server_connect_timeout_s": "3",
    "RAY_py_gcs_connect_timeout_s": "3",
}
_TRIES |= {"RAY_CLIENT_INITIAL_CONNECTION_TIMEOUT_S": "1", "RAY_CLIENT_MAX_CONNECTION_TIMEOUT_S": "1"}
_STORE_BYTES = 256 << 20  # of a Ray of this machine, for files on their way; what is larger goes to its folder
_GONE = (
    "{} does not answer any more: where it stays away, Ray ends this process within a minute, with exit code 1; what is"
    " done is kept, and the same command goes on from there"
)
_ADDRESS = re.compile(r"(?P<client>ray://)?(?P<host>[\w.-]+|\[[0-9a-fA-F:]+\]):(?P<port>\d{1,5})")


def add_ray_flag(add: Any) -> None:
    """add: add_argument of a group."""
    add(
        "--ray",
        metavar="ADDRESS",
        help="make the videos on the machines of a Ray cluster: HOST:PORT, ray://HOST:PORT or auto (the one that this"
        " machine belongs to); local: a Ray of this machine alone",
    )


def check_address(address: str) -> None:
    """Raises UsageError for what is none, SwanError where Ray is not installed."""
    if address not in ("local", "auto") and not _ADDRESS.fullmatch(address):
        raise UsageError(f"--ray must be local, auto, HOST:PORT or ray://HOST:PORT, not {printable(address)[:100]}")
    if find_spec("ray") is None:
        raise SwanError("--ray: Ray is not installed: pip install swan-video[ray]")


@contextlib.contextmanager
def joined(address: str) -> Iterator[None]:
    """Within, this process belongs to a cluster; the workers that it has there end with it. From the main thread.

    Raises SwanError, one line, where there is no such cluster.
    """
    check_address(address)
    if match := _ADDRESS.fullmatch(address):
        _reach(address, match["host"].strip("[]"), int(match["port"]))
    with contextlib.ExitStack() as stack:
        with listening() as signals, signals.held():  # an import that is interrupted may go on half done
            for name, value in (_QUIET if address == "local" else _QUIET | _TRIES).items():
                os.environ.setdefault(name, value)
            options = _of_this_machine(stack) if address == "local" else {}
            with _silence():
                import ray
                from ray._private import worker

            worker._worker_logs_enabled = False  # what it prints on stdout, deaths of workers among it
            stack.callback(ray.shutdown)
            _join(ray, address, options)
            if not (match and match["client"]):  # else Ray tells
                context = ray.get_runtime_context()
                stack.enter_context(watched("the head of the cluster", context.gcs_address))
                for node in (one for one in ray.nodes() if one["NodeID"] == context.get_node_id()):
                    own = f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}"
                    stack.enter_context(watched("this machine's Ray", own))
        yield


def _join(ray: Any, address: str, options: Mapping[str, Any]) -> None:
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        with _silence():
            ray.init(address, logging_level=logging.CRITICAL, log_to_driver=False, **options)
    except Exception as error:  # ConnectionError, RuntimeError, ValueError and others
        told = "there is no such cluster, or not for us" if address != "local" else "it cannot be started"
        raise SwanError(f"--ray {address}: {told} ({one_line(error)})") from error
    finally:
        for signum, handler in handlers.items():  # Ray's end the process without a word to anybody
            signal.signal(signum, handler)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Within, what code in C++ writes to stdout and stderr is written nowhere."""
    kept = [os.dup(number) for number in (1, 2)]
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        for number in (1, 2):
            os.dup2(nowhere, number)
        yield
    finally:
        for number, there in zip((1, 2), kept):
            os.dup2(there, number)
            os.close(there)
        os.close(nowhere)


def _of_this_machine(stack: contextlib.ExitStack) -> dict[str, Any]:
    """Arguments of a Ray that is nobody else's, is reached from this machine alone, and leaves nothing behind."""
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # or it takes 127.0.0.1 for this machine's name in a network
    # Names of sockets below have a hundred letters at most: not in a TMPDIR that may be long.
    folder = stack.enter_context(temporary_name(Path("/tmp" if os.name == "posix" else "."), is_folder=True))
    folder.chmod(0o700)
    return {
        "include_dashboard": False,
        "object_store_memory": _STORE_BYTES,
        "_node_ip_address": "127.0.0.1",
        "_temp_dir": str(folder),
    }


@contextlib.contextmanager
def watched(name: str, address: str) -> Iterator[None]:
    """Within, a line on stderr tells of a part of the cluster, at HOST:PORT, that has gone and without which Ray ends
    this process, later and without a word."""
    host, _, port = address.rpartition(":")
    over = threading.Event()

    def watch() -> None:
        seen, is_told = time.monotonic(), False
        while not over.wait(_LOOK_S):
            try:
                socket.create_connection((host.strip("[]"), int(port)), timeout=REACH_S).close()
                seen, is_told = time.monotonic(), False
            except OSError as error:
                if not is_told and time.monotonic() - seen > _AWAY_S:
                    is_told = True
                    told = f"{_GONE.format(f'{name}, {address},')} ({one_line(error)})"
                    print(f"warning: --ray: {told}", file=sys.stderr, flush=True)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        over.set()


def _reach(address: str, host: str, port: int) -> None:
    """Ray itself tries for a minute, with a line each second."""
    try:
        socket.create_connection((host, port), timeout=REACH_S).close()
    except (OSError, OverflowError) as error:
        raise SwanError(f"--ray {address}: nobody answers there ({one_line(error)})") from error


@dataclass
class Place:
    """Room for one worker, held for it whatever ends it; where its machine leaves, Ray finds another.

    bundle: what Ray counts; threads: of each process, None: as many as it likes; is_expected: whether there should be
    room now; neighbours: how many workers may work on a machine, by Ray's names of machines
    """

    number: int
    ranks: int
    bundle: Mapping[str, float]
    threads: int | None
    is_expected: bool
    neighbours: Mapping[str, int]
    _group: Any = field(default=None, repr=False)

    def wait(self, seconds: float) -> bool:
        """Whether there is room within so long."""
        from ray.util import placement_group

        if self._group is None:
            self._group = placement_group([dict(self.bundle)], strategy="STRICT_PACK")
        return self._group.wait(seconds)

    def seat(self) -> Any:
        """An actor there."""
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        from wan.remote.seat import Seat

        return (
            ray.remote(Seat)
            .options(
                num_cpus=self.bundle.get("CPU", 0),
                num_gpus=self.bundle.get("GPU", 0),
                max_restarts=0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=0),
            )
            .remote()
        )

    @property
    def env(self) -> dict[str, str | None]:
        """Ray sets this to the CPUs that an actor asked for, which is none beside GPUs."""
        threads = None if self.threads is None else str(self.threads)
        return {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads)}


def places(count: int | None, ranks: int, on_cpu: bool) -> list[Place]:
    """Places for so many workers (None: as many as there are GPUs for, one without), each of `ranks` processes. on_cpu:
    whether no GPU is to be used. Raises SwanError where there is no room for a single one."""
    import ray

    nodes = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
    return share_out(nodes, count, ranks, on_cpu)


def share_out(nodes: Mapping[str, Mapping[str, float]], count: int | None, ranks: int, on_cpu: bool) -> list[Place]:
    """`places`, of machines with what Ray counts of each."""
    kind = "CPU" if on_cpu or not any(node.get("GPU") for node in nodes.values()) else "GPU"
    room = lambda each: {name: int(node.get(kind, 0) // (each * ranks)) for name, node in nodes.items()}  # noqa: E731
    most = sum(room(1).values())
    if not most:
        needs = f"{ranks} {kind}s, which --gpus_per_job asks for" if ranks > 1 else f"a {kind}"
        raise SwanError(f"--ray: no machine of the cluster has {needs}")
    count = count or (most if kind == "GPU" else 1)
    # Each process has a GPU, or its part of the CPUs of a machine.
    each = 1
    if kind == "CPU":
        largest = math.floor(max(node.get("CPU", 0) for node in nodes.values()))
        each = next((n for n in range(largest // ranks, 1, -1) if sum(room(n).values()) >= count), 1)
    neighbours = {name: min(count, one) for name, one in room(each).items()}
    threads = each if kind == "CPU" else None
    bundle = {kind: float(each * ranks)}
    return [Place(number, ranks, bundle, threads, number < most, neighbours) for number in range(count)]


def said_of(places: Sequence[Place]) -> str | None:
    """What is to be said of them before anything is done."""
    expected = sum(place.is_expected for place in places)
    if expected == len(places):
        return None
    return f"the cluster has room for {expected} of {len(places)} workers; the others wait for machines that join it"
