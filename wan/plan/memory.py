"""Peak bytes of each stage of a run, on the device and in the machine's memory, for a given placement.

The peak of a stage is what it keeps, and the larger of what loading and what computing needs besides.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

from easydict import EasyDict

from wan.audio import steps_of
from wan.cache.options import policy_of
from wan.conditioning.sizes import latent_shape
from wan.denoise import boundary_of, experts_of, scale_of
from wan.distributed.grid import split
from wan.options import Request
from wan.plan import runs
from wan.plan.machine import CONTEXT_BYTES, CUDA_PROCESS_BYTES, PROCESS_BYTES
from wan.plan.runs import DTYPES
from wan.plan.weights import (
    HEAP_BYTES,
    Component,
    Sizes,
    as_gguf,
    component,
    components,
    expert_names,
    lora_bytes,
    share,
)
from wan.quant.products import working_bytes
from wan.solvers import solver_of
from wan.tasks.kind import Kind
from wan.tasks.kinds import kind_of
from wan.weights.infer import AUDIO_LAYERS

TOKENIZER_BYTES = 2500  # for each entry of the vocabulary; measured: 650 MB for 256,384 random pieces of some 15 bytes
GPU_SLACK = 1.05  # fragments and workspaces of libraries over what tensors need on a GPU; assumed
SLOTS = 2  # units of streamed blocks in device memory: one computes, one arrives


@dataclass(frozen=True)
class Workload:
    """What a run computes with, whatever lies where."""

    request: Request
    spec: EasyDict

    @cached_property
    def kind(self) -> Kind:
        return kind_of(self.spec)

    @cached_property
    def clips(self) -> int:
        return self.kind.clips(self.spec, self.request.sample)

    @cached_property
    def components(self) -> dict[str, Component]:
        return components(self.request, self.spec)

    def changed(self, gguf: Mapping[str, str] | None = None, **fields: Any) -> Workload:
        """The same with other fields of the request, but for those that name files, and with some components as GGUF
        files that are not there yet: name -> type. No file is looked into again."""
        other = Workload(self.request.changed(**fields), self.spec)
        if fields.keys() & {"dtype", "t5_dtype"}:
            return other
        known = dict(self.components)
        if "vae_dtype" in fields:
            known |= {name: component(other.request, self.spec, name) for name in ("vae", "tae") if name in known}
        for name, kind in (gguf or {}).items():
            load = other.request.load
            known[name] = as_gguf(known[name], kind, load.t5_dtype if name == "t5" else load.dtype)
        other.__dict__.update(components=known, loras=self.loras)  # in place of what `cached_property` would find
        return other

    @property
    def vae_configs(self) -> dict[str, Mapping[str, Any]]:
        """Of the VAEs that there is work for."""
        return {name: one.config for name, one in self.components.items() if one.kind == "vae"}

    @property
    def decoder(self) -> str:
        """The component that decodes."""
        return "tae" if "tae" in self.components else "vae"

    @cached_property
    def latent(self) -> tuple[int, int, int, int]:
        size = self.request.sample.frame_num, self.request.sample.height, self.request.sample.width
        channels, frames, *sides = latent_shape(self.spec.vae.z_dim, *size, self.spec.vae_stride[1])
        return channels, frames + self.kind.extra_frames(self.request.sample), *sides

    @cached_property
    def all_tokens(self) -> int:
        return runs.token_count(self.spec, self.latent)

    @property
    def tokens(self) -> int:
        """Of the rank that has most."""
        return split(self.all_tokens, self.request.load.grid.sequence)[0]

    @property
    def branches(self) -> int:
        """That one process computes: cond and uncond."""
        return 2 if self.request.sample.is_guided and self.request.load.grid.cfg == 1 else 1

    @cached_property
    def stages(self) -> list[str]:
        has = {"encode_audio": "wav2vec" in self.components, "encode_image": self.kind.encodes(self.request.sample)}
        return ["encode_text", *(stage for stage in has if has[stage]), "denoise", "decode"]

    @cached_property
    def expert_of_step(self) -> list[str]:
        sample = self.request.sample
        timesteps = solver_of(sample).timesteps.tolist()
        boundary = boundary_of(self.spec, sample)
        return experts_of(timesteps, boundary, sample.boundary_step_index, sample.first_step)

    @property
    def forwards(self) -> int:
        """Of the DiT in the whole run: two a step with guidance."""
        phases = self.request.sample.phase_of_step[self.request.sample.first_step :]
        scales = [scale_of(name, phase.guide_scale) for name, phase in zip(self.expert_of_step, phases, strict=True)]
        return self.clips * sum(1 if scale == 1 else 2 for scale in scales)

    @cached_property
    def rewrites(self) -> Counter[str]:
        """How often the weights of each expert get other strengths of LoRAs, in the whole run."""
        sample, count = self.request.sample, Counter()
        phases = sample.phase_of_step[sample.first_step :]
        for name in self.experts if sample.loras else ():
            own = [phase.lora for phase, expert in zip(phases, self.expert_of_step) if expert == name]
            count[name] = self.clips * sum(before != after for before, after in pairwise(own))
        return count

    @cached_property
    def forward_flops(self) -> runs.Forward:
        return runs.forward_flops(self.spec, self.latent)

    @cached_property
    def experts(self) -> list[str]:
        """The networks that have steps: of two, one may have none, and is never loaded."""
        return [name for name in expert_names(self.spec) if name in self.expert_of_step]

    @cached_property
    def loras(self) -> dict[str, int]:
        return lora_bytes(self.request)

    @property
    def audio_bytes(self) -> int:
        """What the audio encoder makes of the audio, for all clips."""
        sample = self.request.sample
        if "wav2vec" not in self.components:
            return 0
        frames = self.clips * sample.infer_frames
        return AUDIO_LAYERS * self.spec.dit.audio_dim * frames * DTYPES[self.request.load.dtype].itemsize

    def lora_bytes(self, expert: str) -> int:
        return self.loras.get("lora", 0) + self.loras.get(f"lora_{expert}", 0)

    def cache_bytes(self) -> tuple[int, bool]:
        """(bytes, whether they are on the device) of what a cache keeps while the network runs."""
        options, itemsize = self.request.sample.cache, DTYPES[self.request.load.dtype].itemsize
        if not options:
            return 0, True
        policy = policy_of(options)
        residuals = 1 if options["cache_predictor"] == "zero" else 2
        if policy.level == "prediction":  # latents: the last input, and input and output of the last computed step
            one, itemsize, extra = math.prod(self.latent), 4, 3 * self.branches
        else:
            one = self.tokens * self.spec.dit.dim
            measured = self.branches if options.get("fb_cfg_sep_diff", True) else 1
            extra = measured / options.get("fb_downsample", 1) if policy.probe_blocks else 0
        kept = self.branches * residuals - 1  # the branch that runs has let go of the one that will be replaced
        on_device = options["cache_device"] != "cpu"
        # What the policy measures against stays where it was made.
        return int((kept + extra) * one * itemsize), on_device

    @property
    def prompts(self) -> list[str]:
        request = self.request
        return [request.sample.prompt] + [request.sample.negative_prompt] * (
            self.branches == 2 or request.load.grid.cfg == 2
        )

    @property
    def text_tokens(self) -> int:
        """Of the longest prompt, at most: it is not tokenized here; no token is shorter than a letter, and the end has
        one of its own."""
        return min(self.spec.dit.text_len, max(map(len, self.prompts)) + 2)

    def encoding(self, device: str) -> runs.Count:
        """Of the images and videos of a clip, by the VAE, with the videos that they are encoded in, one at a time."""
        request = self.request
        size, each = (request.sample.height, request.sample.width), self.kind.encoded_frames(self.spec, request.sample)
        how = request.load.vae_dtype, device, request.sample.vae_tile_px or 0, request.load.grid.size
        counts = [runs.encoding(self.components["vae"].config, frames, *size, *how) for frames in each]
        return runs.Count(max(one.peak for one in counts), sum(one.flops for one in counts))

    def decoding(self, device: str) -> runs.Count:
        request = self.request
        how = request.load.vae_dtype, device, request.sample.vae_tile_px or 0, request.load.grid.size
        channels, frames, *sides = self.latent
        frames += self.kind.latents_before(self.spec, request.sample)
        return runs.decoding(self.components[self.decoder].config, (channels, frames, *sides), *how)

    def previewing_bytes(self, device: str) -> int:
        """Of a TAE that shows steps, and what it makes. Who calls the engine from Python says that only later."""
        component, output = self.components[self.decoder], self.request.output
        if "widths" not in component.config or (output is not None and not output.preview):
            return 0
        count = runs.sketching(component.config, self.latent, self.request.load.vae_dtype, device)
        return component.dense.total + count.peak

    def text_encoding(self) -> runs.Count:
        return runs.text_encoding(self.spec.text, len(self.prompts), self.text_tokens, self.request.load.t5_dtype)

    def looking(self) -> runs.Count:
        """Of the image, by CLIP."""
        return runs.image_looking(2 if self.request.sample.last_frame else 1, self.request.load.dtype)

    def hearing(self) -> runs.Count:
        """Of the audio, by its encoder."""
        wav2vec = runs.key(self.spec.get("wav2vec", {}))
        return runs.hearing(wav2vec, steps_of(self.request.sample.audio_samples))

    def working_in_8_bits(self, matmul: str) -> int:
        """What products in 8 bits take, of the widest input of a block's layers, on the rank that has most tokens."""
        return working_bytes(self.tokens, max(self.spec.dit.dim, self.spec.dit.ffn_dim), matmul)

    def working_bytes(self, stage: str, device: str) -> int:
        """What a stage holds at most beside weights, where it computes."""
        request = self.request
        if stage == "encode_text":
            return self.text_encoding().peak
        if stage == "encode_audio":
            return self.hearing().peak
        if stage == "denoise":
            how = request.load.dtype, device, request.load.grid
            solvers = {phase.solver for phase in request.sample.by_phase}
            rest = request.sample.is_guided, request.sample.image is not None
            peak = max(runs.denoising_bytes(self.spec, self.latent, *how, solver, *rest) for solver in solvers)
            return peak + self.previewing_bytes(device)
        if stage == "decode":
            return self.decoding(device).peak
        peak, sample = self.encoding(device).peak, request.sample
        if self.spec.kind == "vace":  # frames and mask stay, and a copy of the frames is cut out of them
            peak += 4 * 5 * sample.frame_num * sample.height * sample.width
        if self.spec.kind == "animate":  # what was read of a video is there until it is encoded
            peak += 3 * sample.frame_num * sample.height * sample.width
        return max(peak, self.looking().peak if "clip" in self.components else 0)


def memory_by_stage(load: Workload, device: str, placement, is_first: bool = True) -> dict[str, dict[str, int]]:
    """Stage -> {"device": bytes, "ram": bytes} of one process; on a CPU only "ram". is_first: of several processes it
    is the one that encodes for all."""
    on_cpu = device == "cpu"
    held = _Held(load, on_cpu, placement, is_first)
    found: dict[str, dict[str, int]] = {}
    again = [stage for stage in load.stages if stage not in ("encode_text", "encode_audio")]
    for stage in load.stages + (again if load.clips > 1 else []):  # later clips find the first one's models
        keeps, working, loading = held.stage(stage)
        keeps = {**keeps, "ram": keeps["ram"] + (load.audio_bytes if stage != "encode_text" else 0)}
        if on_cpu:
            sizes = {"ram": PROCESS_BYTES + keeps["device"] + keeps["ram"] + max(working, loading)}
        else:
            sizes = {
                "device": CONTEXT_BYTES + int(GPU_SLACK * (keeps["device"] + working)),
                "ram": CUDA_PROCESS_BYTES + keeps["ram"] + loading,
            }
        before = found.get(stage, sizes)
        found[stage] = {where: max(size, before[where]) for where, size in sizes.items()}
    return found


class _Held:
    """What is in memory as the stages of one run go by."""

    def __init__(self, load: Workload, on_cpu: bool, placement, is_first: bool):
        self.load, self.on_cpu, self.placement = load, on_cpu, placement
        self.encodes = {"t5": is_first or load.request.load.t5_fsdp, "clip": is_first, "wav2vec": is_first}
        self.kept: dict[str, dict[str, int]] = {}  # by models of earlier stages

    def stage(self, stage: str) -> tuple[Mapping[str, int], int, int]:
        """(bytes kept through it, and besides: on the device for computing, in RAM for loading)."""
        load = self.load
        work = load.working_bytes(stage, "cpu" if self.on_cpu else "cuda")
        encoder = {"encode_text": "t5", "encode_audio": "wav2vec"}.get(stage)
        if encoder and not self.encodes[encoder]:
            return {where: sum(sizes[where] for sizes in self.kept.values()) for where in ("device", "ram")}, 0, 0
        if stage == "encode_text":
            own, work, names = *self._text(work), ["t5"]
        elif stage == "denoise":
            own, work, names = *self._denoise(work), load.experts
        else:
            names = [{"encode_audio": "wav2vec", "decode": load.decoder}.get(stage, "vae")]
            names += ["clip"] * (stage == "encode_image" and "clip" in load.components and self.encodes["clip"])
            sizes = [one.total + one.unpacked for one in (load.components[name].dense for name in names)]
            stay = [size for name, size in zip(names, sizes) if name not in self.placement.released]
            own = {"device": max(sum(stay), max(sizes)), "ram": 0}
            work += min(HEAP_BYTES, work) if self.on_cpu else 0  # no more than there was to free
        others = [sizes for name, sizes in self.kept.items() if name not in names]
        keeps = {where: own[where] + sum(sizes[where] for sizes in others) for where in own}
        models = [load.components[name] for name in names]
        loading = max(one.reading.beside if self.on_cpu else one.reading.largest for one in models)
        self._leave(names)
        return keeps, work, loading

    def _leave(self, names: list[str]) -> None:
        """What stays for the stages that follow."""
        for name in names:
            if name in self.placement.released:
                continue
            where = "ram" if name == "t5" and self.placement.text != "device" else "device"
            size = self._shared(name, self.load.components[name].sizes(self.placement.packed.get(name, "")).total)
            tokenizer = self._tokenizer if name == "t5" else 0
            self.kept[name] = {"device": 0, "ram": tokenizer}
            self.kept[name][where] += size

    @property
    def _tokenizer(self) -> int:
        return TOKENIZER_BYTES * self.load.spec.text.vocab

    def _is_shared(self, name: str) -> bool:
        request = self.load.request
        return request.load.t5_fsdp if name == "t5" else request.load.dit_fsdp and name in expert_names(self.load.spec)

    def _shared(self, name: str, size: int) -> int:
        return share(size, self.load.request.load.grid.size) if self._is_shared(name) else size

    def _gathered(self, name: str, sizes: Sizes) -> int:
        """Of weights that are shared out: what is whole while the model computes, at most.

        What is outside of blocks is so to the end. FSDP keeps what has arrived until the next block has, gathers the
        one after that meanwhile, and copies each out of what has arrived; gloo gathers into memory of its own.
        """
        if not self._is_shared(name):
            return 0
        block = max(sizes.units("block"), default=0)
        outside, own = sizes.total - sum(sizes.units("block")), int(self.on_cpu)
        return max((1 + own) * outside, 2 * outside + (1 + own) * block, outside + (3 + own) * block)

    def _text(self, work: int) -> tuple[dict[str, int], int]:
        load, placement = self.load, self.placement
        sizes = load.components["t5"].sizes(placement.packed.get("t5", ""))
        tokenizer = self._tokenizer
        whole = self._shared("t5", sizes.total) + self._gathered("t5", sizes)
        if self.on_cpu or placement.text == "cpu":
            where = "device" if self.on_cpu else "ram"
            own = {"device": 0, "ram": 0} | {where: whole + sizes.unpacked}
            own["ram"] += tokenizer + (0 if self.on_cpu else work)
            return own, work if self.on_cpu else 0
        if placement.text == "stream":
            # One layer at a time, of which the embedding is the largest.
            embedding = load.components["t5"].reading.largest
            return {"device": embedding, "ram": whole + tokenizer}, work
        return {"device": whole + sizes.unpacked, "ram": tokenizer}, work

    def _denoise(self, work: int) -> tuple[dict[str, int], int]:
        """One expert at a time, but where both are kept; the larger counts."""
        each = [self._expert(name) for name in self.load.experts]
        if self.placement.offload == "none":
            own = {where: sum(one[where] for one in each) for where in ("device", "ram")}
        else:
            own = {where: max(one[where] for one in each) for where in ("device", "ram")}
        if self.placement.next_expert == "ram":
            last = self.load.components[self.load.experts[-1]]
            own["ram"] += last.sizes(self.placement.packed.get(last.name, "")).total
        size, on_device = self.load.cache_bytes()
        own["device" if on_device or self.on_cpu else "ram"] += size
        return own, work

    def _expert(self, name: str) -> dict[str, int]:
        load, placement = self.load, self.placement
        mode = placement.packed.get(name, "")
        sizes = load.components[name].sizes(mode)
        matmul = load.request.load.matmul
        in_8_bits = mode == "stream" and matmul in ("fp8", "int8")
        unpacked = load.working_in_8_bits(matmul) if in_8_bits else sizes.unpacked
        beside = unpacked + (load.lora_bytes(name) if mode == "stream" else 0)
        if placement.offload not in ("block", "phase"):
            whole = self._shared(name, sizes.total)
            return {"device": whole + self._gathered(name, sizes) + beside, "ram": 0}
        units, travel = sizes.units(placement.offload), sizes.streamed(placement.resident_blocks)
        streamed = sum(map(sum, travel))
        count = len(travel) if placement.offload == "block" else sum(map(len, travel))
        slots = min(SLOTS, count) * max(units)
        own = {"device": sizes.total - streamed + slots + beside, "ram": 0}
        if not self.on_cpu:
            at_rest = streamed if placement.blocks_from == "ram" else max(units)
            own["ram"] = slots + at_rest
        return own
