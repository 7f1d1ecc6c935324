"""The models of a task: which are here, how they are loaded, with which LoRAs, and who goes when room is needed."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed import DeviceMesh

from wan.distributed.fsdp import shard_model, weight_mesh
from wan.distributed.parallel import Parallel
from wan.errors import UsageError
from wan.file_checks import check_encodes, check_files, open_loras, settle_matmul
from wan.memory.experts import Check, Experts, load_expert, read_ahead
from wan.models.attention import choose_attention
from wan.models.audio import load_audio_encoder
from wan.models.dit import WanModel
from wan.models.encoders import Shard, load_clip_encoder, load_text_encoder
from wan.models.vae import empty_vae
from wan.models.vae_base import VideoVAE
from wan.options import LoadOptions, Request, check_device
from wan.options.files import check_loras
from wan.options.names import LoraChoice
from wan.options.phases import Phase, scaled
from wan.plan import (
    Held,
    Placement,
    free_ram,
    make_plan,
    measure,
    resident_indices,
)
from wan.plan.runs import DTYPES, KEPT
from wan.quant.linear import multiply_in_8_bits
from wan.quant.scratch import free_scratch, return_freed_memory
from wan.stage_checks import StageChecks
from wan.weights.assign import load_weights
from wan.weights.checkpoint import Checkpoint
from wan.weights.containers.mapped import in_file_bytes
from wan.weights.infer import vae_config
from wan.weights.lora import Lora, set_loras

if TYPE_CHECKING:
    from typing_extensions import Self

STAGE_OF = {  # by model
    "t5": "encode_text",
    "wav2vec": "encode_audio",
    "clip": "encode_image",
    "vae": "decode",
    "tae": "decode",
}


class Residency:
    """Models of a checkpoint, loaded when they are first asked for, as the plan of the last video has it.

    keeps: whether they stay between their uses, while memory allows; check: is called between steps, chunks of the VAE
    and weights, and ends the run by raising
    """

    def __init__(self, checkpoint: Checkpoint, load: LoadOptions, parallel: Parallel | None = None):
        self.spec, self.checkpoint, self.parallel = checkpoint.spec, checkpoint, parallel or Parallel()
        self.load, self.files = replace(load, checkpoint=checkpoint), checkpoint.files
        self.device = torch.device(load.device)
        self.checks = StageChecks(self.files, self.parallel)
        self.notes: list[str] = []
        self.plan: dict[str, Any] = {}
        self.placement: Placement | None = None
        self.attention = "sdpa"  # chosen with the first plan
        self.asked_loras: dict[str, LoraChoice] = {}  # by flag
        self.loras: dict[str, list[tuple[Lora, float]]] = self._open_loras({})  # by expert
        self.keeps = False
        self.check: Callable[[], None] = lambda: None
        self.experts = Experts(self._load_expert, lambda: self.device, keep_all=False)
        self._loaded: weakref.WeakValueDictionary[str, WanModel] = weakref.WeakValueDictionary()  # experts
        self._models: dict[str, Any] = {}  # but for the experts
        self._used: dict[str, None] = {}  # names of models that are here, the one used last at the end
        self._meshes: dict[str, DeviceMesh] = {}

    @classmethod
    def from_load(cls, load: LoadOptions, spec: Any, parallel: Parallel | None = None) -> Self:
        """Finds the files and checks them against the task; loads nothing yet.

        Raises UsageError or SwanError, one line, before any work is done.
        """
        load = replace(load, device=check_device(load.device))
        choose_attention(*attention_of(load, spec))
        checkpoint = Checkpoint(load.ckpt_dir, spec, load.files)
        notes = check_files(checkpoint)
        matmul, lines = settle_matmul(checkpoint, load.matmul, load.device)
        pipe = cls(checkpoint, replace(load, matmul=matmul), parallel)
        pipe.notes += notes + lines
        if load.task_told:
            pipe.notes.insert(0, f"task: {load.task}, {load.task_told}")
        return pipe

    @classmethod
    def from_request(cls, request: Request, spec: Any, parallel: Parallel | None = None) -> Self:
        """One that is placed for a request, with its LoRAs."""
        pipe = cls.from_load(request.load, spec, parallel)
        pipe.plan_for(request)
        if request.sample.loras:
            pipe.set_loras(**request.sample.loras)
        return pipe

    def plan_for(self, request: Request) -> dict[str, Any]:
        """The plan of a video, by the memory that there is now: what models of this pipeline hold can be let go of.
        From now on it is followed; models that it places otherwise will be loaded anew.

        Raises UsageError where the video does not fit into a budget; nothing has changed then.
        """
        plan = self.planned(request)
        placement, before = Placement(**plan["placement"]), self.placement
        types = {"dtype": plan["dtypes"]["dit"], "t5_dtype": plan["dtypes"]["t5"]}
        self.load = replace(self.load, **types, auto_dtype=False, auto_t5_dtype=False)
        if before is None:
            self._choose_attention()
        self.plan, self.placement, self.checks.load = plan, placement, self.load
        if before is not None:
            if (placement.text, placement.packed["t5"]) != (before.text, before.packed["t5"]):
                self._let_go("t5")
            for name in self._models.keys() - {row["component"] for row in plan["weights"]}:
                self._let_go(name)
            same = ("offload", "resident_blocks", "blocks_from", "packed")
            if any(getattr(placement, name) != getattr(before, name) for name in same):
                self.experts.release()
        self.experts.keep_all = self.keeps or placement.offload == "none"
        return plan

    def planned(self, request: Request, beside: int = 0) -> dict[str, Any]:
        """The plan of a video, which is not followed yet: the first rank's, for the one that has the least memory.

        beside: bytes of other pipelines of this process, which count as free
        """
        decided = ("device", "dtype", "auto_dtype", "t5_dtype", "auto_t5_dtype", "matmul", "checkpoint")
        request = request.changed(**{name: getattr(self.load, name) for name in decided})
        held = Held(**{"ram" if self.device.type == "cpu" else "device": self.taken_bytes() + beside})
        check_encodes(request, self.spec)
        machine = measure(self.device, request, self.spec, self.parallel.local_size, held)
        machines = self.parallel.gather_objects(machine)
        least = min(machines, key=lambda one: (one.vram_bytes or 0, one.ram_bytes))
        return self.parallel.told(lambda: make_plan(request, self.spec, least))

    def _choose_attention(self) -> None:
        self.attention, notes = choose_attention(*attention_of(self.load, self.spec))
        chosen = sorted(set(self.parallel.gather_objects(self.attention)))
        if len(chosen) > 1:
            raise UsageError(
                f"--attention {self.load.attention} is {' and '.join(chosen)} on these processes: give one"
            )
        self.checks.attention, self.notes = self.attention, self.notes + notes

    def take_notes(self) -> list[str]:
        """Lines about the files, told once."""
        notes, self.notes = self.notes, []
        return notes

    # LoRAs

    def set_loras(self, lora: Any = (), lora_high: Any = (), lora_low: Any = ()) -> None:
        """From now on have these LoRAs and no others, in loaded models and in those that will be loaded.

        Each as the flag of the same name: "PATH[:STRENGTH]" or (path, strength), or a list of those. Raises UsageError
        or SwanError, one line; where the files do not fit, nothing has changed. On several processes all call it alike.
        """
        asked = check_loras(self.spec, {"lora": lora, "lora_high": lora_high, "lora_low": lora_low})
        self.loras, self.asked_loras = self._open_loras(asked), asked
        self.experts.forget_prepared()
        self._apply_loras(*self._loaded)

    def _open_loras(self, asked: Mapping[str, LoraChoice]) -> dict[str, list[tuple[Lora, float]]]:
        """Expert -> its LoRAs, checked by their headers against the shapes of the task."""
        loras = open_loras(asked, self.spec)
        self.notes += dict.fromkeys(note for chosen in loras.values() for lora, _ in chosen for note in lora.notes)
        return loras

    def _loras_of(self, name: str, phase: Phase) -> list[tuple[Lora, float]]:
        """Of an expert, with the strengths that they have in a phase."""
        strengths = scaled(self.asked_loras, phase.lora)
        chosen = [x for flag in ("lora", f"lora_{name}") for _, x in strengths.get(flag, ())]
        return [(lora, x) for (lora, _), x in zip(self.loras[name], chosen, strict=True)]

    def _use_loras(self, name: str, phase: Phase) -> None:
        """Bring the expert that is used now to the strengths of a phase."""
        wanted = self._loras_of(name, phase)
        if wanted != self.loras[name]:
            self.loras[name] = wanted
            self._apply_loras(name)

    def _apply_loras(self, *names: str) -> None:
        """Give the loaded ones among these experts the LoRAs that they should have."""
        try:
            for name in names:
                if model := self._loaded.get(name):
                    set_loras(model, self.checkpoint.source(name), self.loras[name], self.device)
                    model.offload.forget()
        except BaseException:
            self.experts.release()  # some have them, others not: they will be loaded anew
            raise

    # Models

    @contextmanager
    def _model(self, name: str, stage: str = "") -> Iterator[Any]:
        """A model for the length of a stage; let go of afterwards when offloading, unless models are kept."""
        self._make_room(stage or STAGE_OF[name], name)
        if name not in self._models:
            self._models[name] = getattr(self, f"_load_{name}")()
            return_freed_memory()  # what passed by on the way
        try:
            yield self._models[name]
        finally:
            if name in self.placement.released and not self.keeps:
                self._let_go(name)

    def _make_room(self, stage: str, name: str) -> None:
        """Before a model is used: others go, the least recently used first, until the peak of the stage fits."""
        self._used[name] = self._used.pop(name, None)
        if not self.keeps:
            return
        machine, where = self.plan["machine"], "ram" if self.device.type == "cpu" else "device"
        budget = machine["ram_bytes"] if where == "ram" else machine["vram_bytes"]
        need = self.plan["memory_bytes"][stage][where] * (1 + self.plan["margin"])
        while len(self._used) > 1 and self.held_bytes(but=name) + need > budget:
            self._let_go(next(iter(self._used)))

    def held_bytes(self, but: str = "") -> int:
        """Of the weights of models that are here, `but` one, on the device."""
        here = [name for name in self._used if name != but and (name in self._models or name in self.experts)]
        rows = self.plan.get("weights", ())
        return sum(row["bytes"] for row in rows if row["component"] in here and row["where"] != "disk")

    def taken_bytes(self) -> int:
        """Of these, what is not free: weights that lie in files are, as the system counts."""
        if self.device.type != "cpu":
            return self.held_bytes()
        models = [*self._models.values(), *self._loaded.values()]
        return max(0, self.held_bytes() - sum(in_file_bytes(model) for model in models))

    def _let_go(self, name: str) -> None:
        self._used.pop(name, None)
        if name in self.files.dit:
            self.experts.let_go(name)
        elif self._models.pop(name, None) is not None and name in ("t5", "clip", "wav2vec"):
            gc.collect()  # transformers' models hold themselves in a cycle
        empty_cache()

    def release(self) -> None:
        """Let go of all models."""
        self.experts.release()
        for name in [*self._used, *self._models]:
            self._let_go(name)

    def _read_ahead(self, following: Collection[str]) -> None:
        """The expert whose turn comes later, while another computes: into RAM, or into the system's cache of files, if
        free memory can hold it."""
        for name in following:
            if name in self.experts:
                continue
            files = self.checkpoint.source(name).paths
            if self.placement.next_expert == "ram":
                self.experts.prepare(name)
            elif sum(path.stat().st_size for path in files) <= free_ram():
                read_ahead(files)

    def _load_t5(self):
        where = self.placement.text
        device = self.device if where == "device" else torch.device("cpu")
        return load_text_encoder(
            self.checkpoint.source("t5"),
            self.files.tokenizer,
            text_len=self.spec.dit.text_len,
            device=device,
            dtype=DTYPES[self.load.t5_dtype],
            kept=KEPT.get(self.load.t5_dtype),
            stream=self.placement.packed["t5"] == "stream",
            shard=self._shard(device) if self.load.t5_fsdp else None,
            stream_to=self.device if where == "stream" else None,
        )

    def _load_clip(self):
        types = {"dtype": DTYPES[self.load.dtype], "kept": KEPT.get(self.load.dtype)}
        return load_clip_encoder(self.checkpoint.source("clip"), device=self.device, **types)

    def _load_wav2vec(self):
        return load_audio_encoder(self.checkpoint.source("wav2vec"), device=self.device, dtype=torch.float32)

    def _load_vae(self, name: str = "vae") -> VideoVAE:
        source = self.checkpoint.source(name)
        vae, dtype = empty_vae(vae_config(source, self.spec)), DTYPES[self.load.vae_dtype]
        vae.between_chunks = lambda: self.check()
        return load_weights(vae, source, "vae", device=self.device, dtype=dtype)

    def _load_tae(self) -> VideoVAE:
        return self._load_vae("tae")

    def _load_expert(self, name: str, device: torch.device, check: Check) -> WanModel:
        if device == self.device:  # while another expert computes there, its memory is left alone
            self._make_room("denoise", name)
            empty_cache()
        with torch.device("meta"):
            model = WanModel(**self.spec.dit, attention=self.attention, parallel=self.parallel)
        offload = self.placement.offload
        load_expert(
            model,
            self.checkpoint.source(name),
            device=device,
            compute_device=self.device,
            dtype=DTYPES[self.load.dtype],
            kept=KEPT.get(self.load.dtype),
            packed=self.placement.packed[name] == "stream",
            loras=self.loras[name],
            shard=self._shard(self.device) if self.load.dit_fsdp else None,
            granularity=offload if offload in ("block", "phase") else None,
            resident_blocks=resident_indices(len(model.units()), self.placement.resident_blocks),
            blocks_from=self.placement.blocks_from,
            check=lambda: (check(), self.check()),
        )
        if self.load.matmul != "bf16":
            multiply_in_8_bits(model, self.load.matmul)
        self._loaded[name] = model
        return model

    def _shard(self, device: torch.device) -> Shard:
        if device.type not in self._meshes:
            self._meshes[device.type] = weight_mesh(device.type, self.parallel.local_size)
        return lambda model, blocks: shard_model(model, blocks, self._meshes[device.type])


def attention_of(load: LoadOptions, spec: Any) -> tuple[str, torch.dtype, str, int, int]:
    """What `choose_attention` is asked."""
    return load.attention, DTYPES[load.dtype], load.device, load.grid.ring, spec.dit.dim // spec.dit.num_heads


def empty_cache() -> None:
    free_scratch()
    return_freed_memory()
    if torch.cuda.is_initialized():  # a run on the CPU leaves the GPU alone
        torch.cuda.empty_cache()
