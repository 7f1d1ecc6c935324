"""What the rows share: the device, shapes, time and memory, models of random weights."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import finish, machine, timed
from benchmarks.peers import Case, products
from benchmarks.random_weights import RandomSource, inputs, on_meta
from wan.errors import SwanError
from wan.models.attention import choose_attention, get_attention
from wan.models.dit import WanModel
from wan.models.vae import WanVAE
from wan.quant.ggml import BY_NAME, GGMLType
from wan.quant.schemes import Scheme
from wan.weights.assign import load_weights

BF16 = torch.bfloat16
SPARE_BYTES = 1 << 30  # of the device: left to the driver and to libraries
H100_TFLOPS = 700.0  # bf16 products, about: what `Row.seconds` goes by


class Skip(Exception):
    """A row cannot be run here; the reason is one line."""


@dataclass(frozen=True)
class Shapes:
    """Configurations as the tasks have them (which need yaml to be read), and sizes of latents [z, frames, rows,
    columns]. few: layers where all of them would tell no more, for they are alike; budgets_gb: of device memory."""

    dit: dict[str, dict[str, Any]]
    latents: dict[str, tuple[int, int, int, int]]
    vae: dict[str, Any]
    few: int
    budgets_gb: tuple[int, ...]


_T2V = {"model_type": "t2v", "in_dim": 16, "out_dim": 16, "freq_dim": 256, "text_dim": 4096, "text_len": 512}
FULL = Shapes(
    dit={
        "14B": _T2V | {"dim": 5120, "ffn_dim": 13824, "num_heads": 40, "num_layers": 40},
        "5B": _T2V
        | {"model_type": "ti2v", "in_dim": 48, "out_dim": 48}
        | {"dim": 3072, "ffn_dim": 14336, "num_heads": 24, "num_layers": 30},
    },
    latents={"480p": (16, 21, 60, 104), "720p": (16, 21, 90, 160), "704p": (48, 31, 44, 80)},  # 81, 81, 121 frames
    vae={"version": "2.1", "dim": 96, "z_dim": 16},
    few=8,
    budgets_gb=(12, 16, 24),
)
_FEW = {"dim": 256, "ffn_dim": 512, "num_heads": 2, "num_layers": 2, "text_dim": 32, "text_len": 16}
TINY = Shapes(
    dit={name: one | _FEW for name, one in FULL.dit.items()},
    latents={"480p": (16, 2, 8, 8), "720p": (16, 3, 8, 8), "704p": (48, 2, 8, 8)},
    vae={"version": "2.1", "dim": 8, "z_dim": 16},
    few=2,
    budgets_gb=(0, 12),
)


class Bench:
    """device: what is measured; deadline: of time.time(), after which no further run of a row begins.

    product_tflops: the measured rate of bf16 products, once that is known.
    """

    def __init__(self, device: torch.device | str, tiny: bool = False, deadline: float = math.inf):
        self.device, self.tiny, self.deadline = torch.device(device), tiny, deadline
        self.shapes = TINY if tiny else FULL
        self.product_tflops: float | None = None
        self._model: tuple[Any, WanModel] | None = None

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    def machine(self) -> dict[str, Any]:
        found = machine() | {"tiny": self.tiny}
        if self.is_cuda:
            about = torch.cuda.get_device_properties(self.device)
            found |= {"gpu": about.name, "vram_bytes": about.total_memory, "cuda": torch.version.cuda}
            found |= {"capability": [about.major, about.minor], "cudnn": torch.backends.cudnn.version()}
        return found

    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.time()

    def expected(self, seconds: float) -> float:
        """What takes so long on an H100, by the measured rate of products."""
        return 0.0 if self.tiny else seconds * max(0.5, H100_TFLOPS / (self.product_tflops or H100_TFLOPS))

    # Time and memory

    @torch.inference_mode()
    def time(self, call: Callable[[], Any], runs: int = 3) -> dict[str, Any]:
        """Seconds of a call that was made before; fewer runs where time is short."""
        seconds: list[float] = []
        while len(seconds) < runs and (not seconds or self.left() > 2 * seconds[-1]):
            seconds.append(timed(call, self.device)[0])
        return {"seconds": median(seconds), "all_seconds": seconds}

    @contextmanager
    def peak(self) -> Iterator[dict[str, int]]:
        """Yields {"peak_bytes": ...} of the device, what was there before with it; on a CPU it stays empty."""
        found: dict[str, int] = {}
        if self.is_cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        yield found
        if self.is_cuda:
            finish(self.device)
            found["peak_bytes"] = torch.cuda.max_memory_allocated(self.device)

    def need(self, size: float, what: str) -> None:
        """Skip where the device has not so many bytes free."""
        if self.is_cuda and size + SPARE_BYTES > (free := torch.cuda.mem_get_info(self.device)[0]):
            raise Skip(f"{what} takes {size / 1e9:.0f} GB of device memory, {free / 1e9:.0f} are free")

    def clear(self) -> None:
        """Let go of what the last row has left."""
        self._model = None
        gc.collect()
        if self.is_cuda:
            torch.cuda.empty_cache()

    # Models

    def config(self, name: str, layers: int | None = None) -> dict[str, Any]:
        config = self.shapes.dit[name]
        return config | {"num_layers": min(layers or config["num_layers"], config["num_layers"])}

    def model(self, config: dict[str, Any], kind: str = "") -> WanModel:
        """A transformer on the device, in bf16, its blocks stored as `kind`, see `stored`. The last one is kept."""
        key = (*config.items(), kind)
        if self._model is None or self._model[0] != key:
            self.clear()
            self.need(weight_bytes(config, kind), f"the transformer in {kind or 'bf16'}")
            source = RandomSource(on_meta(config), self.device, stored(kind))
            model = on_meta(config).eval()
            self._model = key, load_weights(model, source, "dit", device=self.device, dtype=BF16, stream=bool(kind))
        return self._model[1]

    def vae(self, dtype: torch.dtype) -> WanVAE:
        with torch.device("meta"):
            vae = WanVAE(**self.shapes.vae).eval()
        return fill(vae, self.device, dtype)

    def inputs(self, config: dict[str, Any], latent: tuple[int, ...]) -> tuple:
        return inputs(config, latent, self.device)

    def attend(self, model: WanModel, name: str) -> str:
        """Give a model that back end, and tell its name; Skip where it cannot be used here."""
        chosen = self.attention(name)
        model.attention = get_attention(chosen)
        return chosen

    def attention(self, name: str) -> str:
        try:
            chosen, lines = choose_attention(name, BF16, str(self.device))
        except SwanError as error:
            raise Skip(str(error)) from error
        if lines:
            raise Skip(lines[0])
        return chosen


def stored(kind: str) -> GGMLType | Scheme | None:
    """ "" for bf16, a ggml type, "fp8" or "int8"."""
    if kind in ("fp8", "int8"):
        return Scheme(kind, torch.float8_e4m3fn if kind == "fp8" else torch.int8, group=1 << 20)
    return BY_NAME[kind] if kind else None


def weight_bytes(config: dict[str, Any], kind: str = "") -> float:
    per_weight = {"": 2.0, "fp8": 1.0, "int8": 1.0}
    count = sum(one.numel() for one in on_meta(config).parameters())
    return count * (per_weight[kind] if kind in per_weight else BY_NAME[kind].block_bytes / BY_NAME[kind].block_weights)


def fill(model: nn.Module, device: torch.device, dtype: torch.dtype) -> Any:
    """Random values for a model on the meta device."""
    for name, one in list(model.named_parameters()):
        path, _, leaf = name.rpartition(".")
        value = torch.randn(one.shape, device=device, dtype=dtype).mul_(0.02)
        if one.ndim == 1 or leaf == "gamma":
            value.add_(leaf != "bias")
        setattr(model.get_submodule(path), leaf, nn.Parameter(value, requires_grad=False))
    return model.to(device)


def tflop(config: dict[str, Any], latent: tuple[int, ...]) -> float:
    """Of one forward."""
    return products(Case("dit", config, tuple(latent[1:])), "ours").tflop()


def tokens(latent: tuple[int, ...]) -> int:
    return math.prod(latent[1:]) // 4


def relative(actual: Tensor, wanted: Tensor) -> float:
    """Norm of the difference over that of what is wanted."""
    actual, wanted = actual.double().cpu(), wanted.double().cpu()
    return float((actual - wanted).norm() / wanted.norm())
