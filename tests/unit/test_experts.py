"""The expert whose turn comes later is read ahead into the system's cache."""

import contextlib
import ctypes
import mmap
import os
import threading
import time
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.common import in_fresh_process
from benchmarks.loading import anonymous_bytes, peak_anonymous
from wan import pipeline
from wan.errors import SwanError
from wan.memory import experts as experts_module
from wan.memory import residency
from wan.memory.experts import CPU, Experts, load_expert, read_ahead
from wan.memory.offload import Cpu
from wan.models.dit import WanModel
from wan.options import build_request
from wan.pipeline import WanPipeline
from wan.quant.scratch import return_freed_memory
from wan.tasks import load_task
from wan.weights.containers import mapped
from wan.weights.containers.opened import OpenedFile
from wan.weights.lora import open_lora, set_loras
from wan.weights.source import open_source

SMALL = {"dim": 32, "ffn_dim": 64, "num_heads": 2, "num_layers": 2, "text_dim": 8, "text_len": 4, "freq_dim": 32}


def cached_share(path):
    """How much of a file is in the page cache."""
    size = path.stat().st_size
    pages = -(-size // mmap.PAGESIZE)
    with path.open("rb") as file, mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY) as memory:
        start, resident = ctypes.c_char.from_buffer(memory), (ctypes.c_ubyte * pages)()
        ctypes.CDLL(None).mincore(ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(size), resident)
        del start
        return sum(page & 1 for page in resident) / pages


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="needs Linux")
def test_files_are_read_into_the_cache(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(os.urandom(8 << 20))
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if cached_share(path) > 0.1:
        pytest.skip("this file system keeps its files in memory")
    read_ahead([path, tmp_path / "gone"]).join()
    until = time.monotonic() + 30
    while cached_share(path) < 0.5 and time.monotonic() < until:
        time.sleep(0.05)
    assert cached_share(path) >= 0.5


@pytest.mark.parametrize("free_bytes, ahead", [(1 << 40, ["low_noise_model"]), (1000, [])])
def test_only_what_comes_later_and_fits(monkeypatch, tmp_path, free_bytes, ahead):
    asked, steps = [], []
    monkeypatch.setattr(residency, "read_ahead", lambda paths: asked.append((len(steps), paths)))
    monkeypatch.setattr(residency, "free_ram", lambda: free_bytes)
    options = {"task": "i2v-tiny", "sample_steps": 4, "device": "cpu", "save_file": str(tmp_path / "a.mp4")}
    request = build_request(options)
    pipe = WanPipeline.from_request(request, load_task("i2v-tiny"))
    pipe(request, progress=lambda stage, done, total: steps.append(done) if stage == "denoise" and done else None)
    assert [path.parent.name for _, [path] in asked] == ahead and all(done == 1 for done, _ in asked)


STEP, LEVEL = "boundary_step_index", "boundary"


@pytest.mark.parametrize(
    "where, place, runs",
    [({STEP: 0}, "ram", "low"), ({STEP: 0}, "disk", "low"), ({STEP: 1}, "ram", "high"), ({LEVEL: 0}, "ram", "high")],
)
def test_an_expert_without_a_step_is_not_read(monkeypatch, tmp_path, where, place, runs):
    asked = []
    monkeypatch.setattr(residency, "read_ahead", asked.append)
    options = {"task": "i2v-tiny", "sample_steps": 1, "device": "cpu", "save_file": str(tmp_path / "a.mp4")}
    request = build_request(options | where)
    pipe = WanPipeline.from_request(request, load_task("i2v-tiny"))
    pipe.placement, real = replace(pipe.placement, next_expert=place), pipe.experts._load

    def load(name, device, check):
        asked.append(name)
        return real(name, device, check)

    pipe.experts._load = load
    pipe(request)
    assert asked == [runs]


def test_the_noise_level_decides_which_expert_runs():
    """As the plan counts their steps: all that are at or above it are of the first one."""
    from wan.plan import look, make_plan
    from wan.solvers import solver_of

    for boundary in (None, 0.0, 0.5, 0.9, 0.99, 1.0):
        request = build_request({"task": "i2v-tiny", "sample_steps": 20, "boundary": boundary})
        level = load_task("i2v-tiny").boundary if boundary is None else boundary
        high = sum(timestep >= 1000 * level for timestep in solver_of(request.sample).timesteps.tolist())
        told = make_plan(request, load_task("i2v-tiny"), look(request))["steps_by_expert"]
        assert told == {"high": high, "low": 20 - high}


class Streams:
    """torch.cuda's streams where there is no GPU: what is called within which."""

    def __init__(self, monkeypatch):
        self.calls, self.current = [], None
        monkeypatch.setattr(torch.cuda, "Stream", self.make)
        monkeypatch.setattr(torch.cuda, "stream", self.within)

    def make(self, device):
        stream = SimpleNamespace(device=device)
        stream.synchronize = lambda: self.calls.append(("synchronize", stream))
        return stream

    @contextlib.contextmanager
    def within(self, stream):
        before, self.current = self.current, stream
        yield
        self.current = before

    def call(self, what):
        self.calls.append((what, self.current))


def test_loading_ahead_has_a_queue_of_its_own_on_the_gpu(monkeypatch):
    """LoRAs are merged there: behind what computes, the loading would wait for it."""
    streams, device = Streams(monkeypatch), torch.device("cuda:1")
    model = torch.nn.Linear(2, 2)
    monkeypatch.setattr(model, "to", lambda where: model)

    def load(name, where, check):
        streams.call("load")
        return model

    experts = Experts(load, lambda: device, keep_all=False)
    experts.prepare("low")
    assert experts["low"] is model
    [(loaded, stream), (ended, same)] = streams.calls
    assert (loaded, ended) == ("load", "synchronize") and stream is same and stream.device == device


def test_loras_of_streamed_blocks_are_merged_in_a_queue_of_their_own(monkeypatch, tmp_path):
    streams, device = Streams(monkeypatch), torch.device("cuda:1")
    with torch.device("meta"):
        model = WanModel(**SMALL)
    save_file({name: torch.ones(one.shape) for name, one in model.named_parameters()}, tmp_path / "a.safetensors")
    monkeypatch.setattr(experts_module, "set_loras", lambda *_: None)
    monkeypatch.setattr(experts_module, "make_device", lambda _: Cpu())

    def merge(model, name, base, where):
        streams.call(where)
        return torch.zeros(model.get_parameter(name).shape)

    monkeypatch.setattr(experts_module, "with_loras", merge)
    options = {"dtype": torch.float32, "packed": False, "granularity": "block", "blocks_from": "disk"}
    source = open_source(tmp_path / "a.safetensors")
    load_expert(model, source, device=torch.device("cpu"), compute_device=device, **options)
    streams.calls.clear()  # of what is resident
    with model.offload.hold(model.blocks[0]):
        assert not model.blocks[0].ffn["0"].weight.any()
    model.offload.close()
    assert {where for where, _ in streams.calls} == {device}
    [stream] = {id(stream): stream for _, stream in streams.calls}.values()
    assert stream.device == device


@pytest.mark.parametrize("blocks_from", [None, "ram"])
def test_a_load_with_loras_reads_each_byte_once(blocks_from, monkeypatch, tmp_path):
    """A product, a DoRA, which needs the weight twice, and a difference; on a network that has none yet."""
    with torch.device("meta"):
        shapes = {name: tuple(one.shape) for name, one in WanModel(**SMALL).named_parameters()}
    weights = {name: torch.randn(shape).bfloat16() for name, shape in shapes.items()}
    save_file(weights, tmp_path / "a.safetensors")
    up, down = torch.randn(32, 4), torch.randn(4, 32)
    pair = {"lora_up.weight": up, "lora_down.weight": down}
    tensors = {f"blocks.{i}.self_attn.q.{part}": one.clone() for i in (0, 1) for part, one in pair.items()}
    tensors |= {f"blocks.1.self_attn.k.{part}": one.clone() for part, one in pair.items()}
    tensors |= {"blocks.1.self_attn.k.dora_scale": torch.rand(32, 1) + 0.5, "blocks.0.norm3.diff_b": torch.ones(32)}
    save_file(tensors, tmp_path / "lora.safetensors")
    lora, source, read = open_lora(tmp_path / "lora.safetensors", shapes), open_source(tmp_path / "a.safetensors"), []
    fill = OpenedFile.fill

    def counted(file, view, start, *args):
        if file.path.name == "a.safetensors":
            read.append((start, start + len(view)))
        fill(file, view, start, *args)

    def made(loras, **options):
        with torch.device("meta"):
            model = WanModel(**SMALL)
        return load_expert(
            model, source, device=CPU, compute_device=CPU, dtype=torch.bfloat16, packed=False, loras=loras, **options
        )

    monkeypatch.setattr(OpenedFile, "fill", counted)
    options = {"granularity": "block", "blocks_from": blocks_from} if blocks_from else {}
    model = made([(lora, 0.5)], **options)
    spans, last = sorted(read), (tmp_path / "a.safetensors").stat().st_size
    assert (
        sum(end - start for start, end in spans) == sum(one.nbytes for one in weights.values()) and spans[-1][1] == last
    )
    assert all(end == start for (_, end), (start, _) in pairwise(spans))
    after = made([])
    set_loras(after, source, [(lora, 0.5)])
    for name, value in after.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    read.clear()
    set_loras(after, source, [(lora, 0.25)])
    assert len(read) == len(set(read)) == len(lora.updates) == 4
    model.offload.close()


def test_a_stage_is_timed_on_the_device_that_it_runs_on(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    for name in ("cuda:1", "cpu"):
        with pipeline._timed("decode", Counter(), lambda *_: None, torch.device(name)):
            pass
    assert waited == [torch.device("cuda:1")]


def test_the_next_expert_is_loaded_while_the_first_one_runs(tmp_path):
    options = {"task": "i2v-tiny", "sample_steps": 4, "device": "cpu", "save_file": str(tmp_path / "a.mp4")}
    request, spec = build_request(options), load_task("i2v-tiny")
    wanted = WanPipeline.from_request(request, spec)(request)
    pipe = WanPipeline.from_request(request, spec)
    pipe.placement = replace(pipe.placement, next_expert="ram")  # as with a GPU
    loaded, real = [], pipe.experts._load

    def load(name, device, check):
        loaded.append((name, threading.current_thread().name))
        return real(name, device, check)

    pipe.experts._load = load
    result = pipe(request)
    assert torch.equal(result.latents, wanted.latents)
    [(first, main), (second, thread)] = loaded
    assert (first, second) == ("high", "low") and main == "MainThread" and thread.startswith("expert")
    for seconds in (result.seconds, wanted.seconds):
        assert 0 < seconds["swap"] < seconds["denoise"] and 0 < seconds["load"] < seconds["denoise"]


def test_an_expert_that_cannot_be_loaded_ahead_fails_in_its_turn(tmp_path):
    options = {"task": "i2v-tiny", "sample_steps": 4, "device": "cpu", "save_file": str(tmp_path / "a.mp4")}
    request = build_request(options)
    pipe = WanPipeline.from_request(request, load_task("i2v-tiny"))
    pipe.placement = replace(pipe.placement, next_expert="ram")
    real = pipe.experts._load

    def load(name, device, check):
        if name == "low":
            raise SwanError("low.safetensors: gone")
        return real(name, device, check)

    pipe.experts._load = load
    steps = []
    with pytest.raises(SwanError, match=r"low.safetensors: gone"):
        pipe(request, progress=lambda stage, done, total: steps.append(done) if stage == "denoise" else None)
    assert max(steps) > 0


def test_loading_ahead_ends_with_the_run(tmp_path):
    """And is waited for: the interpreter cannot end while a thread is inside torch."""
    options = {"task": "i2v-tiny", "sample_steps": 12, "device": "cpu", "save_file": str(tmp_path / "a.mp4")}
    pipe = WanPipeline.from_request(build_request(options), load_task("i2v-tiny"))
    pipe.placement = replace(pipe.placement, next_expert="ram")
    real, running, weights = pipe.experts._load, threading.Event(), []

    def load(name, device, check):
        def slow():
            running.set()
            weights.append(name)
            time.sleep(0.1)
            check()

        return real(name, device, slow if name == "low" else check)

    def progress(stage, done, total):
        if stage == "denoise" and done == 2:
            assert running.wait(60)
            raise KeyboardInterrupt

    pipe.experts._load = load
    with pytest.raises(KeyboardInterrupt):
        pipe(build_request(options), progress=progress)
    for thread in threading.enumerate():
        if thread.name.startswith("expert"):
            assert not thread.daemon
            thread.join(60)
    assert len(weights) < 20 and "low" not in pipe.experts


SIZES = {"dim": 512, "ffn_dim": 2048, "num_heads": 4, "num_layers": 12, "text_dim": 64, "text_len": 8}


def swap(folder, keep_all):
    """(bytes of an expert, most that both took): in a process of its own."""
    mapped._LEAST_BYTES = 1 << 60  # in memory of their own, not in their files
    with torch.device("meta"):
        sizes = [one.numel() * 2 for one in WanModel(**SIZES).parameters()]

    def load(name, device, check=None):
        with torch.device("meta"):
            model = WanModel(**SIZES)
        source = open_source(folder / f"{name}.safetensors")
        options = {"compute_device": device, "dtype": torch.bfloat16, "packed": False}
        return load_expert(model, source, device=device, **options)

    experts = Experts(load, lambda: torch.device("cpu"), keep_all)
    load("high", torch.device("cpu"))  # what the first use of anything takes
    return_freed_memory()
    before = anonymous_bytes()
    with peak_anonymous() as seen:
        for name in ("high", "low"):
            assert experts[name].dtype == torch.bfloat16
    return sum(sizes), max(sizes), max(seen) - before


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux")
def test_two_experts_never_share_the_memory(tmp_path):
    with torch.device("meta"):
        shapes = {name: one.shape for name, one in WanModel(**SIZES).named_parameters()}
    for name in ("high", "low"):
        save_file(
            {one: torch.rand(shape).bfloat16() for one, shape in shapes.items()}, tmp_path / f"{name}.safetensors"
        )
    expert, largest, one = in_fresh_process(swap, tmp_path, False)
    assert expert > 100e6 and one < 1.1 * expert + 2 * largest
    assert in_fresh_process(swap, tmp_path, True)[2] > 1.8 * expert
