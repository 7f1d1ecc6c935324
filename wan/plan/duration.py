"""How long the stages of a run take, estimated from what there is to compute and to read, and what would take less."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from easydict import EasyDict

from wan.cache.options import check_coefficients, check_options
from wan.options import Request
from wan.plan.machine import CPU_FLOPS, Machine
from wan.plan.memory import Workload
from wan.plan.placement import Placement, fitting, least
from wan.plan.runs import text_encoding
from wan.plan.smaller import smaller_frames, smaller_sizes
from wan.plan.transfers import transfers
from wan.plan.weights import count_parameters, expert_names
from wan.tasks import load_preset, load_task, task_names

# What a stage reaches of the rate of one large product of matrices in its type. CPU: measured, two cores of Zen 4, fp32
# and bf16, at the width of the 1.3B: DiT 0.7 to 1, decoding 0.9 to 1.3, the text encoder's layers 0.7 to 1.4. GPU: not
# measured by us, but from published times: the official DiT on an H100 (327 s for 40 steps of 14B at 480p); a VAE on an
# H200 that decodes 81 frames at 480p in 14.5 s in fp32, where convolutions use TF32, and in 4.8 s in bf16.
_REACHED = {
    "cpu": {"dit": 0.85, "text": 0.8, "vae fp32": 1.0, "vae bf16": 1.0},
    "cuda": {"dit": 0.5, "text": 0.3, "vae fp32": 0.3, "vae bf16": 0.06},
}
_BYTES_A_TOKEN = 3  # of UTF-8, roughly: a Chinese character, or most of a short word
LONG_SECONDS = 3600.0
_WORTH = 0.9  # of the time: what takes more is not told


def stage_seconds(load: Workload, machine: Machine, placement: Placement) -> dict[str, float]:
    """Seconds of the stages, as the JSON line of a run has them, and in all; "load" is of the DiT, the other models are
    loaded in the stages that use them. A cache's skips are not foreseen."""
    request, spec = load.request, load.spec
    kind = "cpu" if machine.device == "cpu" else "cuda"
    reached = _REACHED[kind]
    vae_rate = (machine.vae_flops or machine.flops) * reached[f"vae {request.load.vae_dtype}"] * request.load.grid.size
    tiled = load.changed(vae_tile_px=placement.vae_tile_px)
    read = {name: one.reading.stored / machine.disk_rate for name, one in load.components.items()}

    tokens = min(spec.dit.text_len, max(len(prompt.encode()) for prompt in load.prompts) // _BYTES_A_TOKEN + 2)
    on_host = placement.text == "cpu" and machine.device != "cpu"
    text_rate = CPU_FLOPS if on_host else machine.flops * reached["text"]
    text = text_encoding(spec.text, len(load.prompts), tokens, request.load.t5_dtype).flops / text_rate
    if placement.text == "stream":
        text += load.components["t5"].sizes(placement.packed.get("t5", "")).total / machine.transfer_rate
    seconds = {"encode_text": read["t5"] + text}
    clips, released = load.clips, placement.released
    times = {name: clips if name in released else 1 for name in read}  # that a model is loaded
    if "encode_audio" in load.stages:
        seconds["encode_audio"] = read["wav2vec"] + load.hearing().flops / (machine.flops * reached["text"])
    if "encode_image" in load.stages:
        work = tiled.encoding(kind).flops / vae_rate
        if "clip" in load.components:
            work += load.looking().flops / (machine.flops * reached["text"])
        of_clip = ("vae", "clip") if "clip" in load.components else ("vae",)
        seconds["encode_image"] = clips * work + sum(times[name] * read[name] for name in of_clip)
    seconds["load"] = sum(times[name] * read[name] for name in expert_names(spec))
    waited = transfers(load, machine, placement)["exposed_seconds_per_forward"]
    forward = load.forward_flops.total / request.load.grid.sequence / (machine.flops * reached["dit"]) + waited
    seconds["denoise"] = load.forwards / request.load.grid.cfg * forward
    dense = [name for name in expert_names(spec) if placement.packed.get(name) != "stream"]
    seconds["denoise"] += sum(load.rewrites[name] * read[name] for name in dense)  # from the file, with other LoRAs
    seconds["decode"] = clips * tiled.decoding(kind).flops / vae_rate
    if load.decoder == "tae" or "encode_image" not in load.stages or "vae" in released:
        seconds["decode"] += times[load.decoder] * read[load.decoder]
    return seconds | {"total": sum(seconds.values())}


# What would take less


def shorter(load: Workload, machine: Machine, seconds: Mapping[str, float]) -> list[dict[str, Any]]:
    """For a long run: changes that this request allows, {"change": flags, "seconds": of the run, None: not known}.

    One of each kind: the first that ends within LONG_SECONDS, else the shortest.
    """
    if seconds["total"] <= LONG_SECONDS:
        return []
    found: dict[str, dict[str, Any]] = {}
    for kind, what, other in _changes(load):
        total = None if other is None else _total(other, machine)
        if total is not None and total > _WORTH * seconds["total"]:
            continue
        before = found.get(kind, {}).get("seconds")
        if kind not in found or (before > LONG_SECONDS and total < before):
            found[kind] = {"change": what, "seconds": total}
    return list(found.values())


def _total(load: Workload, machine: Machine) -> float:
    decision = fitting(load, machine) or least(load, machine)
    return stage_seconds(load, machine, decision.placement)["total"]


def _changes(load: Workload) -> Iterator[tuple[str, str, Workload | None]]:
    """(kind, flags, what there is to do with them: None where that is not known beforehand)."""
    request, spec = load.request, load.spec
    for size in smaller_sizes(request, spec):
        yield "size", f"--size {size.flag}", load.changed(size=size.flag, width=size.width, height=size.height)
    for frames in smaller_frames(request):
        yield "frames", f"--frame_num {frames}", load.changed(frame_num=frames)
    sample = request.sample
    is_free = not (sample.denoising_step_list or sample.phases or sample.shift is None)
    is_free = is_free and sample.boundary_step_index is None
    if is_free and sample.steps >= 20 and not sample.cache:  # whose settings are for a number of steps
        steps = sample.steps // 2
        yield "steps", f"--sample_steps {steps}", load.changed(steps=steps)
    # Both take guidance away, which --cfg_parallel shares out, and a cache has nothing to skip in so few steps.
    if is_free and request.load.grid.cfg == 1 and not sample.cache:
        for name in ("distill-4step", "distill-2step"):  # there are more models for the first
            options = load_preset(name, spec)
            steps = tuple(map(float, options["denoising_step_list"]))
            if len(steps) < sample.steps:
                fields = {"steps": len(steps), "denoising_step_list": steps, "guide_scale": (1.0, 1.0)}
                fields["boundary_step_index"] = options.get("boundary_step_index")
                yield "preset", f"--preset {name} with weights or a LoRA distilled for it", load.changed(**fields)
                break
    if not sample.cache and (flag := _cache_flag(request, spec)):
        yield "cache", f"a cache, such as --{flag}", None
    for what, other in _other_models(load):
        yield "task", what, other


def _cache_flag(request: Request, spec: EasyDict) -> str | None:
    """A cache that this run allows: one whose coefficients are known, else one that needs none."""
    for flag in ("teacache", "fbcache"):
        try:
            options, _ = check_options({flag: True}, request.sample.steps)
            check_coefficients(options, spec.get("coefficients"), tuple(spec.get("experts", ["model"])))
        except ValueError:
            continue
        return flag
    return None


def _other_models(load: Workload) -> Iterator[tuple[str, Workload]]:
    """Smaller models that take the same inputs. Files and LoRAs that were given are of this one."""
    request, spec, sample = load.request, load.spec, load.request.sample
    if sample.loras or request.load.files or spec.kind in ("flf2v", "s2v", "animate"):
        return
    for name in task_names():
        other = load_task(name)
        size = f"{sample.width}*{sample.height}"
        fits = other.kind in (spec.kind, "ti2v") and not other.get("checkpoint")
        if not fits or count_parameters(other, "dit") >= count_parameters(spec, "dit"):
            continue
        if size not in other.sampling.sizes:
            size = min(other.sampling.sizes, key=lambda one: _far(one, sample.width, sample.height))
        width, height = map(int, size.split("*"))
        fields = {"task": name, "size": size, "width": width, "height": height, "steps": other.sampling.steps}
        fields |= {"cache": {}, "ckpt_dir": other.hub[0], "ckpt_option": other.hub[0]}
        fields |= dict.fromkeys(("denoising_step_list", "sigmas", "sigma_max", "phases", "boundary_step_index"))
        fields |= {"solver": other.sampling.solver, "shift": other.sampling.shift}
        guide = other.sampling.guide_scale
        fields["guide_scale"] = tuple(guide) if isinstance(guide, (list, tuple)) else (guide, guide)
        yield f"--task {name} --size {size}", Workload(request.changed(**fields), other)


def _far(size: str, width: int, height: int) -> tuple[bool, int]:
    """How far an official size is from another: lying or standing first, then by its area."""
    its_width, its_height = map(int, size.split("*"))
    return (its_height > its_width) != (height > width), abs(its_width * its_height - width * height)
