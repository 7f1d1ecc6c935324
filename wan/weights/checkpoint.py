"""The files of a task's models: found once, opened once, and handed on to all that read them. Opening imports torch."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Hashable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from wan.errors import SwanError
from wan.weights.containers.safetensors_header import read_index
from wan.weights.locate import locate
from wan.weights.source import INDEX_SUFFIX, Source, open_source


class Checkpoint:
    """Components by name: "model", or "high" and "low", and "vae", "t5" and perhaps "clip", "wav2vec", "tae".

    A file is opened when its component is first asked for, and stays open: what was checked is what is read, and a file
    that has changed since is an error. ckpt_dir, spec, single, partial: see `locate`. hub: whether a run would
    download what is missing here.
    """

    def __init__(
        self,
        ckpt_dir: str | PathLike | None,
        spec: Mapping[str, Any],
        single: Mapping[str, str | PathLike] | None = None,
        partial: bool = False,
    ):
        self.spec, self.files = spec, locate(ckpt_dir, spec, single, partial)
        self.hub = partial and bool(ckpt_dir) and not os.path.exists(os.path.expanduser(ckpt_dir))
        self._single = {"model" if name == "dit" else name for name in single or {}}
        self._sources: dict[str, Source] = {}
        self.derived: dict[Hashable, Any] = {}  # what others have made of its headers, to be made once

    @property
    def components(self) -> list[str]:
        """Those of the task; a VAE beside a TAE, which some videos can do without, only if it is here."""
        encoders = [part for part in ("clip", "wav2vec") if self.spec["files"].get(part)]
        vaes = ["vae"] if self.files.vae or not self.files.tae else []
        return [*self.files.dit, *vaes, *(["tae"] if self.files.tae else []), "t5", *encoders]

    @property
    def decoder(self) -> str:
        """The component that decodes."""
        return "tae" if self.files.tae else "vae"

    def kind(self, name: str) -> str:
        """What a component is: "dit", "vae", "t5", "clip" or "wav2vec"."""
        return "dit" if name in self.files.dit else "vae" if name == "tae" else name

    def paths(self, name: str) -> list[Path]:
        """The files of a component, "dit" too being "model", or the folder of the "tokenizer"; [] where they are
        missing, or not all there yet of those that a run would download."""
        name = "model" if name == "dit" else name
        if name == "tokenizer":
            return [self.files.tokenizer] if self.files.tokenizer else []
        paths = self.files.dit[name] if name in self.files.dit else getattr(self.files, name) or []
        return paths if not self.hub or name in self._single or all(map(_is_whole, paths)) else []

    def source(self, name: str) -> Source:
        """The tensors of a component. Raises SwanError as `open_source`."""
        name = "model" if name == "dit" else name
        if name not in self._sources:
            self._sources[name] = open_source(self.paths(name))
        return self._sources[name]


def _is_whole(path: Path) -> bool:
    """Whether all shards of an index are here; whoever opens a bad one refuses it."""
    if path.name.endswith(INDEX_SUFFIX):
        with contextlib.suppress(SwanError):
            return all(os.path.isfile(path.parent / name) for name in set(read_index(path).values()))
    return True
