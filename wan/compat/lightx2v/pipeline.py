"""LightX2V's pipeline class: its names and defaults, the engine behind them. No torch until `create_generator`."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from wan.compat.lightx2v.arguments import arguments, as_keys, defaults_of, differ
from wan.compat.lightx2v.config import read_config
from wan.compat.lightx2v.given import Given, is_nothing
from wan.compat.lightx2v.models import model_class, our_kind
from wan.compat.lightx2v.ranks import agree, join, start
from wan.compat.lightx2v.translate import Translated, renamed, retold, translate
from wan.distributed.launch import World
from wan.errors import SwanError, UsageError, printable
from wan.options import Output, Request, build_load, build_sample, check_device, check_written
from wan.options.files import check_save_file
from wan.options.names import LORA_FLAGS
from wan.options.values import shown
from wan.tasks.kinds import kind_of

if TYPE_CHECKING:
    from wan.engine import Engine, Event, Video

log = logging.getLogger(__name__)
RESULT = "lightx2v_gen_result.png"  # its default; of a video the ending is .mp4 here


class LightX2VPipeline:
    """As LightX2V's: made, told by `enable_*` and by attributes what to load, `create_generator`, and then `generate`.

    Every argument, attribute and key of a JSON file has an effect, or is answered by a warning or an error that names
    it and says why (see `keys`). Attributes may be set and read as items of a dict; those that say what a video is like
    hold for the videos that follow. Errors are UsageError and SwanError, one line.

    `engine` is the `wan.Engine` behind it, None before `create_generator`. `close()` gives all memory back, as does the
    end of a `with`.
    """

    def __init__(
        self,
        task: str = "",
        model_path: str | os.PathLike = "",
        model_cls: str = "",
        support_tasks: Sequence[str] = (),
        sf_model_path: str | None = None,
        dit_original_ckpt: str | os.PathLike | None = None,
        low_noise_original_ckpt: str | os.PathLike | None = None,
        high_noise_original_ckpt: str | os.PathLike | None = None,
        transformer_model_name: str | None = None,
        **inputs: Any,
    ):
        """inputs: further keys, as LightX2V's own examples give them (`src_ref_images`)."""
        self._keys: dict[str, Any] = {}
        self._defaults: set[str] = set()  # keys that nobody gave
        self._places: dict[str, str] = {}  # key -> the file that it is from
        self._theirs: Translated | None = None  # when the engine was made
        self._engine: Engine | None = None
        self._world = World()
        self._has_switched = False
        self._warned: set[str] = set()
        model_class(model_cls)
        if not model_path:
            raise UsageError("model_path is needed: the folder of a checkpoint, or a hub id")
        self._set(arguments(locals()), LightX2VPipeline.__init__)
        self._set(inputs)
        for one in filter(None, (task, *support_tasks)):
            self._kind(one)

    def enable_offload(
        self,
        cpu_offload: bool = False,
        offload_granularity: str = "block",
        text_encoder_offload: bool = False,
        image_encoder_offload: bool = False,
        vae_offload: bool = False,
    ) -> None:
        """offload_granularity: block, phase or model. The rest: whether these are let go of after use."""
        self._enable(LightX2VPipeline.enable_offload, locals())

    def enable_quantize(
        self,
        dit_quantized: bool = False,
        text_encoder_quantized: bool = False,
        image_encoder_quantized: bool = False,
        dit_quantized_ckpt: str | os.PathLike | None = None,
        low_noise_quantized_ckpt: str | os.PathLike | None = None,
        high_noise_quantized_ckpt: str | os.PathLike | None = None,
        text_encoder_quantized_ckpt: str | os.PathLike | bool | None = False,
        image_encoder_quantized_ckpt: str | os.PathLike | bool | None = False,
        quant_scheme: str = "fp8-sgl",
        text_encoder_quant_scheme: str | None = None,
        skip_fp8_block_index: Sequence[int] = (0, 43, 44, 45, 46, 47),
    ) -> None:
        """The files are quantised already; quant_scheme is what those of transformer and encoders must hold."""
        said = dict(locals())
        scheme = said.pop("quant_scheme")
        parts = {"dit": dit_quantized, "t5": text_encoder_quantized, "clip": image_encoder_quantized}
        self._enable(LightX2VPipeline.enable_quantize, said)
        self._set({f"{part}_quant_scheme": scheme for part, is_packed in parts.items() if is_packed})
        if not any(parts.values()) and scheme != "fp8-sgl":
            self._set({"dit_quant_scheme": scheme})

    def enable_lora(self, lora_configs: Sequence[Mapping[str, Any]], lora_dynamic_apply: bool = False) -> None:
        """lora_configs: path, strength and, for two experts, name: high_noise_model or low_noise_model."""
        self._enable(LightX2VPipeline.enable_lora, locals())

    def enable_cache(
        self,
        cache_method: str = "Tea",
        coefficients: Sequence[Any] = (),
        teacache_thresh: float = 0.15,
        use_ret_steps: bool = False,
        magcache_calibration: bool = False,
        magcache_K: int = 6,
        magcache_thresh: float = 0.24,
        magcache_retention_ratio: float = 0.2,
        magcache_ratios: Sequence[Any] = (),
        residual_diff_threshold: float | None = None,
        downsample_factor: int | None = None,
    ) -> None:
        """cache_method: Tea, Mag, or another one of `feature_caching`. coefficients, magcache_ratios: those that come
        along where none are given. The last two: of FirstBlock."""
        self._enable(LightX2VPipeline.enable_cache, locals())

    def enable_parallel(self, cfg_p_size: int = 1, seq_p_size: int = 1, seq_p_attn_type: str = "ulysses") -> None:
        """For a script that torchrun starts: sizes that make up the number of processes."""
        parallel = {"cfg_p_size": cfg_p_size, "seq_p_size": seq_p_size, "seq_p_attn_type": seq_p_attn_type}
        if seq_p_size == 1 and seq_p_attn_type == "ulysses":
            del parallel["seq_p_attn_type"]
        self._enable(LightX2VPipeline.enable_parallel, {"parallel": parallel})

    def enable_lightvae(
        self,
        use_lightvae: bool = False,
        use_tae: bool = False,
        vae_path: str | os.PathLike | None = None,
        tae_path: str | os.PathLike | None = None,
    ) -> None:
        """use_tae: decode with a tiny VAE; use_lightvae: a pruned VAE in place of the full one."""
        self._enable(LightX2VPipeline.enable_lightvae, locals())

    def create_generator(
        self,
        attn_mode: str = "flash_attn2",
        infer_steps: int = 50,
        num_frames: int = 81,
        height: int = 480,
        width: int = 832,
        guidance_scale: float | Sequence[float] = 5.0,
        sample_shift: float = 5.0,
        fps: int = 16,
        aspect_ratio: str = "16:9",
        boundary: float = 0.900,
        boundary_step_index: int = 2,
        denoising_step_list: Sequence[float] = (1000, 750, 500, 250),
        config_json: str | os.PathLike | None = None,
        rope_type: str = "torch_complex_rope",
        resize_mode: str | None = None,
        audio_fps: int = 24000,
        double_precision_rope: bool = True,
        norm_modulate_backend: str = "torch",
        distilled_sigma_values: Sequence[float] | None = None,
    ) -> None:
        """Find and check the files, and say how videos are sampled: by config_json, or by the arguments.

        guidance_scale: [high noise, low noise] for two experts; 1: none. denoising_step_list, boundary_step_index: of
        distilled model classes; boundary: of the others with two experts. An attention that cannot run here is
        replaced, which a warning says. Called again, it makes another engine.
        """
        method, said = LightX2VPipeline.create_generator, arguments(locals())
        path = said.pop("config_json")
        if path is None:
            self._set({**said, "enable_cfg": guidance_scale != 1}, method)
        else:
            if not isinstance(path, (str, os.PathLike)):
                raise UsageError(f"config_json must be the path of a file, not {shown(path)}")
            self._read(os.fspath(path), said, method)
        self.close()
        self._world = join()
        theirs = translate(_of_files(self._keys), self._places, defaults=self._defaults)
        self._tell(theirs.notes)
        for one in self.get("support_tasks"):
            if self._kind(one) != theirs.spec.kind:
                raise UsageError(f"support_tasks: {one} is none of {theirs.spec.name}, which the checkpoint is of")
        with self._failing(theirs):
            self._engine = self._make(theirs)
            theirs.check_schemes(self._engine.checkpoint)
        self._theirs, self._has_switched = theirs, False

    def switch_lora(
        self,
        lora_path: str | os.PathLike = "",
        strength: float = 1.0,
        high_lora_path: str | os.PathLike = "",
        high_lora_strength: float = 1.0,
        low_lora_path: str | os.PathLike = "",
        low_lora_strength: float = 1.0,
    ) -> None:
        """From now on make videos with this LoRA in place of all others; without a path, with none."""
        if self._engine is None:
            raise UsageError("switch_lora comes after create_generator; before it there is enable_lora")
        paths = {"lora": lora_path, "lora_high": high_lora_path, "lora_low": low_lora_path}
        strengths = strength, high_lora_strength, low_lora_strength
        chosen = {flag: [(path, one)] for (flag, path), one in zip(paths.items(), strengths) if path}
        names = {"lora": "lora_path", "lora_high": "high_lora_path", "lora_low": "low_lora_path"}
        with self._failing(replace(self._theirs, names=names, places="")):
            self._engine.set_loras(**chosen)
        self._has_switched = True

    def generate(
        self,
        seed: int | None = 42,
        prompt: str = "",
        negative_prompt: str = "",
        save_result_path: str | os.PathLike | None = RESULT,
        task: str | None = None,
        image_path: Any = None,
        action_path: Any = None,
        video_path: Any = None,
        image_strength: Any = None,
        i2i_denoise_strength: Any = None,
        image_frame_idx: Any = None,
        last_frame_path: Any = None,
        audio_path: str | os.PathLike | None = None,
        src_ref_images: Any = None,
        src_video: Any = None,
        src_mask: Any = None,
        return_result_tensor: bool = False,
        target_shape: Sequence[int] = (),
        num_frames: int | None = None,
        sr_ratio: float = 2.0,
        prompt_ref: str = "人物动作的参考视频",
        *,
        on_event: Callable[[Event], object] | None = None,
        **keys: Any,
    ) -> dict[str, Any]:
        """Make a video and write it to save_result_path; with return_result_tensor it is returned instead.

        seed: None, or -1, for a random one; target_shape: [height, width]. keys: further ones (`src_pose_path`,
        `src_face_path`, `replace_flag`, ...), for this video. What is not given is as the attribute of that name.
        on_event: see `Engine.generate`.

        Returns {"video": fp32 tensor [T, H, W, 3] in 0..1, or None}.
        """
        if self._engine is None:
            raise UsageError("generate comes after create_generator")
        said = arguments(locals())
        del said["keys"], said["on_event"]
        defaults = defaults_of(LightX2VPipeline.generate)
        asked = {name: value for name, value in said.items() if differ(value, defaults[name])}
        asked |= {"seed": -1} if seed is None else {}
        call = as_keys(asked) | keys
        left = {name: value for name, value in as_keys(said).items() if name not in call and name not in self._keys}
        config = self._keys | left | call
        Given(config, self._places)  # refuses what is unknown
        path, returned = config.pop("save_result_path"), config.pop("return_result_tensor")
        with self._failing(self._theirs):
            request = self._request(config, set(left) | self._defaults - set(call), None if returned else path)
            video = self._run(request, on_event)
        return {"video": _tensor(video) if returned else None}

    def close(self) -> None:
        """Give all memory back. `create_generator` makes another engine."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    @property
    def engine(self) -> Engine | None:
        return self._engine

    # Keys, as attributes and as items

    def __getattr__(self, name: str) -> Any:
        keys = self.__dict__.get("_keys", {})
        if name not in keys:
            raise AttributeError(f"{type(self).__name__} has no {name}, or it was not set")
        return keys[name]

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            super().__setattr__(name, value)
        else:
            self._set({name: value})

    def __delattr__(self, name: str) -> None:
        self.__getattr__(name)
        del self._keys[name]

    def __getitem__(self, name: str) -> Any:
        return self._keys[name]

    def __delitem__(self, name: str) -> None:
        del self._keys[name]

    __setitem__ = __setattr__

    def __contains__(self, name: str) -> bool:
        return name in self._keys

    def get(self, name: str, default: Any = None) -> Any:
        return self._keys.get(name, default)

    def update(self, *tables: Mapping[str, Any] | Iterable[tuple[str, Any]], **keys: Any) -> None:
        for table in (*tables, keys):
            self._set(dict(table))

    modify_config = update

    def __enter__(self) -> LightX2VPipeline:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _set(self, values: Mapping[str, Any], method: Callable[..., Any] | None = None, place: str = "") -> None:
        """Take keys, or arguments of a method, whose defaults nobody gave. place: the file that they are from."""
        defaults = defaults_of(method) if method else {}
        for argument, value in values.items():
            for name, one in as_keys({argument: value}).items():
                Given({name: one}, place)
                self._keys[name] = one
                is_default = argument in defaults and not differ(value, defaults[argument])
                self._defaults = self._defaults | {name} if is_default else self._defaults - {name}
                self._places = {**self._places, name: place}

    def _enable(self, method: Callable[..., Any], values: Mapping[str, Any]) -> None:
        if self._engine is not None:
            raise UsageError(f"{method.__name__} after create_generator would have no effect: call it before")
        self._set(arguments(values), method)

    def _read(self, path: str, arguments: Mapping[str, Any], method: Callable[..., Any]) -> None:
        """Take the keys of a file, which go before those that were set, and before arguments beside it."""
        keys, defaults = read_config(path), defaults_of(method)
        place = printable(path)
        for name, value in keys.items():
            if name in self._keys and name not in self._defaults and differ(value, self._keys[name]):
                self._tell([f"{place}: {name} {shown(value)} takes the place of {shown(self._keys[name])}"])
        for name, value in arguments.items():
            if name != "resize_mode" and differ(value, defaults[name]):
                self._tell([f"{name} {shown(value)}: has no effect beside config_json, {place}"])
        self._set({"resize_mode": arguments["resize_mode"]}, method)
        self._set(keys, place=place)

    def _kind(self, task: str) -> str:
        """The kind of our tasks that a task of LightX2V is."""
        return our_kind(self.get("model_cls"), task)

    # What is made

    def _make(self, theirs: Translated) -> Engine:
        world, load = self._world, build_load(theirs.part("load"), self._world.size)
        device = check_device(load.device)
        from wan.distributed.parallel import Parallel
        from wan.engine import Engine

        device_type = "cuda" if device.startswith("cuda") else "cpu"
        if world.size > 1:
            start(world, device_type, load.dist_timeout)
            device = f"cuda:{world.local_rank}" if device == "cuda" else device
        parallel = Parallel(*load.grid, device_type=device_type, local_size=world.local_size)
        return Engine.of(replace(load, device=device), theirs.spec, parallel)

    def _request(self, config: Mapping[str, Any], defaults: set[str], path: Any) -> Request:
        engine, spec = self._engine, self._theirs.spec
        task = config.get("task")
        if task and self._kind(task) != spec.kind:
            raise UsageError(f"task {task!r} needs another checkpoint: this one is of {spec.name}")
        self._keys["task"] = task  # of the videos that follow
        for needed in {"i2v": ["image_path"], "flf2v": ["image_path", "last_frame_path"]}.get(task, ()):
            if is_nothing(config.get(needed)):
                raise UsageError(f"task {task!r} needs {needed}")
        theirs = translate(_of_files(config), self._places, spec=spec, defaults=defaults)
        self._tell(theirs.notes)
        before = self._theirs.part("load")
        for flag in before.keys() | theirs.part("load").keys():
            if before.get(flag) != theirs.part("load").get(flag):
                key = theirs.names.get(flag) or self._theirs.names.get(flag, flag)
                raise UsageError(f"{key} says what is loaded: set it before create_generator")
        options = theirs.part("sample")
        if self._has_switched:
            options = {flag: value for flag, value in options.items() if flag not in LORA_FLAGS}
        try:
            request = build_sample(options, engine.load)
            if path is None:
                return request
            output = Output(_checked(path, request, spec), preview=None, preview_every=1, cache_trace=None)
            request = replace(request, output=output)
            check_written(request)
        except SwanError as error:
            raise renamed(error, {**theirs.names, "save_file": "save_result_path"}, theirs.places) from None
        return request

    def _run(self, request: Request, on_event: Callable[[Event], object] | None) -> Video:
        world, engine = self._world, self._engine
        if world.size > 1:
            from wan.cli import compare_files

            agree(world, request, self._theirs.spec, engine.device.type)
            compare_files(world, engine.checkpoint, request)

        def tell(event: Event) -> None:
            if event.kind == "warning":
                self._tell([retold(event.text, self._theirs.names, self._places)])
            elif event.kind == "note":
                log.info(event.text)
            elif event.stage:
                world.stage = event.stage
                log.info("%s: %d of %d", event.stage, event.done, event.total)
            if on_event is not None:
                on_event(event)

        video = engine.make(request, on_event=tell)
        if request.output is not None and world.rank == 0:
            video.write(request.output.save_file)
            log.info("saved in %s", request.output.save_file)
        return video

    def _tell(self, lines: Iterable[str]) -> None:
        """Warn of each line, once."""
        for line in lines:
            if line not in self._warned:
                self._warned.add(line)
                warnings.warn(line, stacklevel=_caller())

    @contextmanager
    def _failing(self, theirs: Translated) -> Iterator[None]:
        """Of several processes, one that fails says so to the others, which would wait for it."""
        try:
            yield
        except Exception as error:
            error = theirs.renamed(error) if isinstance(error, SwanError) else error
            if self._world.size > 1:
                self._world.report(f"error: {error}", getattr(error, "exit_code", 1))
            raise error from None


def _of_files(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Without those that are of the pipeline alone."""
    return {name: value for name, value in keys.items() if name not in ("support_tasks", "return_result_tensor")}


def _caller() -> int:
    """How far above whoever asks the caller of this project's code is."""
    level, frame = 0, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals["__name__"].startswith("wan."):
        level, frame = level + 1, frame.f_back
    return level + 1


def _checked(path: Any, request: Request, spec: Any) -> str:
    frames = kind_of(spec).frames(request.sample) - request.sample.trim_first_frames
    path = os.fspath(path)
    return check_save_file(path.removesuffix(".png") + ".mp4" if path == RESULT and frames > 1 else path, frames)


def _tensor(video: Video) -> Any:
    import torch

    return torch.from_numpy(video.frames).float().div_(255)
