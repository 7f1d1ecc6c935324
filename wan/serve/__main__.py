"""Makes videos for others, by HTTP, as OpenAI's Videos API has them.

    python -m wan.serve --task t2v-A14B --ckpt_dir ./Wan2.2-T2V-A14B
    python -m wan.serve --models models.yaml --lora_dir loras --host 0.0.0.0 --api_key_file keys.txt

Flags of generate.py say what is loaded, and are the defaults of what a request does not say. Jobs and videos are kept
in --data: a server that was ended in any way goes on with them. One line of JSON on stdout tells the URL.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wan.cli import add_flags
from wan.command import module_parser, put, run_process
from wan.errors import SwanError, UsageError, printable
from wan.files import open_plain
from wan.options import FLAGS, PART_OF
from wan.options.values import number, whole
from wan.remote.cluster import add_ray_flag, check_address, joined, places, said_of
from wan.serve.models import Loras, read_models

_MOST_KEYS_BYTES, _LEAST_KEY = 1 << 20, 16
_MOST_CONNECTIONS = 1000
_CLOSE_S = 5  # for those who watch, when the server ends
_NEEDED = {
    "serve": ("fastapi", "uvicorn", "httptools", "python_multipart", "prometheus_client"),
    "web": ("gradio",),
}  # by extra


def make_parser() -> argparse.ArgumentParser:
    parser = module_parser("wan.serve", __doc__)
    group = parser.add_argument_group("server")
    add = group.add_argument
    add("--host", default="127.0.0.1", help="address to be reached at; one that is not this machine's own needs keys")
    add("--port", default="8000", metavar="N", help="default 8000; 0: any that is free")
    add("--data", default="swan-serve", metavar="DIR", help="folder of jobs and videos; default swan-serve")
    add("--models", metavar="FILE", help="several models: a JSON or YAML file, {NAME: {FLAG: VALUE}}")
    add("--lora_dir", metavar="DIR", help="LoRAs that requests may name: the files of this folder")
    add("--api_key_file", metavar="FILE", help="keys of clients, one a line")
    add("--cors", metavar="ORIGIN", action="append", help="let pages of this origin ask; may be repeated")
    add("--allow_urls", action="store_true", help="fetch inputs from public URLs")
    add("--max_queue", default="100", metavar="N", help="jobs that may wait; default 100")
    add("--max_hours", metavar="X", help="refuse videos that are expected to take longer; default: none")
    add("--max_upload_mb", default="200", metavar="N", help="size of a request; default 200")
    add("--keep_hours", metavar="X", help="delete videos so long after they are made; default: never")
    add("--keep_gb", metavar="X", help="delete the oldest videos while all take more than this; default: never")
    add("--workers", metavar="N", help="processes that make videos; default: one a GPU, one without")
    add(
        "--gpus_per_job", default="1", metavar="N", help="processes of a worker, which make a video together; default 1"
    )
    add_ray_flag(add)
    add("--web", action="store_true", help="a page to make videos with, at the URL of the server")
    add("--root_path", metavar="PATH", help="of --web: where a proxy has the page, as /swan; default /")
    add("--quiet", action="store_true", help="no lines about jobs on stderr")
    flags = {name: one for name, one in FLAGS.items() if PART_OF[name] != "output" or name == "preview_every"}
    add_flags(parser, flags)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Until it is told to end."""
    args = make_parser().parse_args(argv)
    _check_packages("serve")
    if args.web:
        _check_packages("web")
    if args.ray is not None:
        check_address(args.ray)
    from wan.serve.app import make_app
    from wan.serve.refused import hide
    from wan.serve.service import Settings
    from wan.serve.store import Store
    from wan.serve.workers import say

    common = {name: value for name, value in vars(args).items() if PART_OF.get(name) in ("load", "sample")}
    ranks = whole(args.gpus_per_job, 1, "gpus_per_job", 1, 64)
    models = read_models(args.models, {name: value for name, value in common.items() if value is not None}, ranks)
    settings = Settings(
        host=args.host,
        keys=_keys(args.api_key_file, args.host),
        origins=tuple(args.cors or ()),
        allow_urls=args.allow_urls,
        max_queue=whole(args.max_queue, 0, "max_queue", 1, 1_000_000),
        max_s=_above_0(args.max_hours, "max_hours", 3600.0),
        max_upload_bytes=1_000_000 * whole(args.max_upload_mb, 0, "max_upload_mb", 1, 100_000),
        keep_s=_above_0(args.keep_hours, "keep_hours", 3600.0),
        keep_bytes=_above_0(args.keep_gb, "keep_gb", 1e9),
        workers=None if args.workers is None else whole(args.workers, 0, "workers", 1, 64),
        ranks=ranks,
        preview_every=whole(args.preview_every, 0, "preview_every", 0, 1000),
        quiet=args.quiet,
    )
    if args.root_path is not None and not (args.web and re.fullmatch(r"(/[\w.~-]+)+", args.root_path)):
        raise UsageError("--root_path is of --web, and begins with a slash, as /swan")
    listening = _listen(args.host, whole(args.port, 0, "port", 0, 65535))
    with listening, contextlib.ExitStack() as stack:
        data = Path(args.data).resolve()
        hide(data)
        store, loras = Store(data), Loras(args.lora_dir)
        url = _url(listening)
        seats = None
        if args.ray is not None:
            stack.enter_context(joined(args.ray))
            on_cpu = all(model.options.get("device") == "cpu" for model in models.values())
            seats = places(settings.workers, ranks, on_cpu)
            if (line := said_of(seats)) and not settings.quiet:
                say(line)
        web = None
        if args.web:
            from wan.serve.web.mount import Web

            web = Web(data, settings.max_upload_bytes, args.root_path or "")
        told = json.dumps({"url": url, "models": list(models)})
        _run(make_app(settings, store, models, loras, lambda: put(told), seats, web), listening)
    return 0


def _run(app: Any, listening: socket.socket) -> None:
    import uvicorn

    from wan.serve.patience import Patience

    config = uvicorn.Config(
        app,
        http=Patience,
        log_level="error",
        access_log=False,
        server_header=False,
        limit_concurrency=_MOST_CONNECTIONS,
        timeout_graceful_shutdown=_CLOSE_S,
    )
    uvicorn.Server(config).run(sockets=[listening])


def _check_packages(extra: str) -> None:
    from importlib.util import find_spec

    if missing := [name for name in _NEEDED[extra] if find_spec(name) is None]:
        told = f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed"
        raise SwanError(f"{told}: pip install swan-video[{extra}]")


def _keys(path: str | None, host: str) -> tuple[str, ...]:
    from wan.serve.guard import is_loopback

    if path is None:
        if not is_loopback(host):
            raise UsageError(f"--host {host} can be reached by others: give --api_key_file")
        return ()
    with open_plain(path) as file:
        text = file.read(_MOST_KEYS_BYTES).decode("utf-8", "replace")
    keys = tuple(line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#"))
    if not keys or any(len(key) < _LEAST_KEY or not key.isascii() for key in keys):
        raise UsageError(
            f"--api_key_file: {printable(path)} must have keys of at least {_LEAST_KEY} letters, one a line"
        )
    return keys


def _above_0(value: str | None, flag: str, unit: float) -> float | None:
    return None if value is None else unit * number(value, flag, float, "a number above 0", lambda x: 0 < x < 1e9)


def _listen(host: str, port: int) -> socket.socket:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        return socket.create_server(found[0][4][:2], family=found[0][0], backlog=512)
    except OSError as error:
        raise SwanError(f"cannot listen at {host}, port {port}: {error.strerror or error}") from error


def _url(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


if __name__ == "__main__":
    run_process(main)
