"""The processes of a script that torchrun started. No torch, but in `start`."""

from __future__ import annotations

import atexit
import functools
from typing import Any

from wan.distributed.launch import Disagreement, World
from wan.errors import SwanError, UsageError
from wan.options import Request
from wan.options.alike import request_facts


@functools.cache
def join() -> World:
    """This process among those that torchrun started, for all pipelines of it."""
    try:
        world = World.from_environment()
    except ValueError as error:
        raise UsageError(str(error)) from error
    atexit.register(world.close)
    return world


@functools.cache
def start(world: World, device_type: str, timeout_s: float) -> None:
    """Meet the others, once."""
    try:
        world.start(device_type, timeout_s)
    except RuntimeError as error:
        raise SwanError(str(error)) from error


def agree(world: World, request: Request, spec: Any, device_type: str) -> None:
    """Raises UsageError where they were not given the same."""
    try:
        world.agree(request_facts(request, spec, device_type, seeded=True))
    except Disagreement as error:
        raise UsageError(f"{error}; give all processes the same") from error
