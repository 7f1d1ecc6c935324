"""What a server makes videos with: models by name, each a set of options of generate.py. No torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from easydict import EasyDict

from wan.errors import SwanError, UsageError, printable
from wan.files import visible_files
from wan.options import FLAGS, PART_OF, build_load, build_sample, of_part
from wan.options.beside import beside, with_preset
from wan.options.config import read_table
from wan.options.values import of_kind
from wan.serve.refused import hide
from wan.tasks import load_task
from wan.tasks.kind import Kind
from wan.tasks.kinds import kind_of

_NAME = re.compile(r"\w[\w.:/@ -]{0,199}")
_LORAS = (".safetensors", ".pt", ".pth", ".bin")


@dataclass(frozen=True)
class Model:
    """options: what is loaded, and what a request does not say; task: of the files, where it is not given."""

    name: str
    options: Mapping[str, Any]
    task: str

    @property
    def spec(self) -> EasyDict:
        return load_task(self.task)

    @property
    def kind(self) -> Kind:
        return kind_of(self.spec)

    def merged(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """All options of a video, of which those `given` are a request's. Raises UsageError for an unknown preset."""
        usual, given = beside(with_preset(self.options, self.spec), given, self.spec)
        if given.get("use_prompt_extend") is False:
            usual = {name: value for name, value in usual.items() if not name.startswith("prompt_extend_")}
        options = usual | given
        options.pop("preset", None)  # what it says is there
        return options

    @property
    def load(self) -> dict[str, Any]:
        return of_part(self.options, "load")


def read_models(path: str | None, common: Mapping[str, Any], ranks: int = 1) -> dict[str, Model]:
    """The models of a JSON or YAML file, {name: {option: value}}; without one, that of the `common` options, which are
    also for all of a file that do not have their own. The first one is the default. ranks: processes that make a video
    together.

    Raises UsageError or SwanError, one line.
    """
    if path is None:
        model = _model("", common, ranks)
        return {model.name: model}
    told = read_table(path, "models", "models by name, as {cats: {task: t2v-1.3B, ckpt_dir: ...}}")
    found = {}
    for name, options in told.items():
        where = f"--models: {printable(path)}: {printable(str(name))[:100]}"
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise UsageError(f"{where}: a name has 1 to 200 letters, digits and .:/@-_")
        if not isinstance(options, dict):
            raise UsageError(f"{where} must have options by their names, as {{task: t2v-1.3B}}")
        if unknown := [one for one in options if PART_OF.get(one) not in ("load", "sample")]:
            raise UsageError(f"{where}: unknown option {printable(str(unknown[0]))[:100]}; see generate.py --help")
        try:
            found[name] = _model(name, {**common, **options}, ranks)
        except SwanError as error:
            raise type(error)(f"{where}: {error}") from error
    return found


def _model(name: str, options: Mapping[str, Any], ranks: int) -> Model:
    options = {flag: of_kind(value, flag, FLAGS[flag].kind) for flag, value in options.items() if value is not None}
    load = build_load(of_part(options, "load"), ranks)
    model = Model(name or load.task, options, load.task)
    if not model.kind.inputs and ranks == 1:  # else what a video is made from is not here yet
        build_sample(of_part(model.merged({"prompt": "a"}), "sample"), load)
    return model


class Loras:
    """LoRAs that a request may name: files of one folder, as they are there now."""

    def __init__(self, folder: str | None):
        self._folder = None if folder is None else Path(folder).resolve()
        if self._folder is not None and not self._folder.is_dir():
            raise UsageError(f"--lora_dir: no folder {printable(folder)}")
        if self._folder is not None:
            hide(self._folder)

    def names(self) -> dict[str, Path]:
        """Files by their names without an ending."""
        files = visible_files(self._folder) if self._folder is not None else []
        return {path.stem: path for path in files if path.suffix in _LORAS}

    def path(self, name: str) -> Path | None:
        """Of a name that is listed, with its ending or without."""
        names = self.names()
        return names.get(name) or next((path for path in names.values() if path.name == name), None)
