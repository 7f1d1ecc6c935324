"""Sample: what is made by one call of an engine."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from wan.cache.options import OPTIONS as CACHE_OPTIONS
from wan.errors import UsageError
from wan.options.extend import check_extend
from wan.options.files import check_lora, relighting_lora
from wan.options.inputs import check_shape, given_pictures, input_of, inputs_of, picture_hashes
from wan.options.machine import check_cache, check_tile
from wan.options.names import AUDIO_SYNCS, LORA_FLAGS, SOLVER_NAMES, LoraChoice
from wan.options.phases import Phase, check_phases, make_phases
from wan.options.sampling import (
    check_boundary,
    check_boundary_step,
    check_guide_scale,
    check_prompt,
    check_seed,
    check_shift,
    check_sigma_max,
    check_sigmas,
    check_step_list,
    check_steps,
)
from wan.options.schema import Asked, Option, derived, is_given, option
from wan.options.values import choice, number, or_default, whole
from wan.tasks import preset_names
from wan.tasks.kinds import kind_of

_WHAT, _SAMPLING, _WEIGHTS = "what to make", "sampling (defaults: the task's official ones)", "weights"
_what, _sampling, _weights, _machine = (partial(option, one) for one in (_WHAT, _SAMPLING, _WEIGHTS, "machine"))
_extending = partial(option, "longer prompts", stored=False)
_CACHE = "cache: skip what changes little from step to step"


def _cache(at: Asked) -> tuple[dict[str, Any], dict[str, Any]]:
    steps, area = at.done["steps"], at.done["width"] * at.done["height"]
    return at.once("cache and coefficients", lambda: check_cache(at, steps, area, bool(inputs_of(at))))


def _input(name: str, kind: str, help: str, **more: Any) -> Any:
    """A field that the kind of task has read."""
    return _what(kind, help, lambda at, given: input_of(at, name), **more)


def _extend(name: str, kind: str, help: str, **more: Any) -> Any:
    """A field of --prompt_extend_NAME."""
    return _extending(kind, help, lambda at, given: check_extend(at, name, given), **more)


def _context_scale(at: Asked, given: Any) -> float | None:
    inputs_of(at)  # refuses it for other kinds of tasks
    if given is None:
        return 1.0 if "context_scale" in kind_of(at.spec).inputs else None
    return number(given, "context_scale", float, "a number", math.isfinite)


def _prompts(at: Asked, given: Any) -> tuple[str, ...]:
    clips = input_of(at, "num_clip")  # refuses them for other kinds of tasks
    if given and clips and len(given) > clips:
        at.warnings.append(f"--prompts has {len(given)} prompts, and the film {clips} clips: the last are not used")
    return tuple(given or ())


def _overlap(at: Asked, given: Any) -> int | None:
    kind, video = kind_of(at.spec), inputs_of(at).get("continue_from")
    if not kind.overlap or (video is None and not at.get["prompts"]):
        if given is not None:
            raise UsageError("--overlap is for --continue_from FILE, or --prompts FILE of i2v, ti2v and vace tasks")
        return None
    most = at.done["frame_num"] - 1
    default = min(kind.overlap, len(video) if video is not None else most, most)
    count = whole(given, max(1, (default - 1) // 4 * 4 + 1), "overlap", 1, most)
    if (count - 1) % 4:
        raise UsageError(f"--overlap must be 1, 5, 9, ... frames (4n+1), not {count}")
    if video is not None and len(video) < count:
        raise UsageError(f"--overlap {count}: --continue_from has {len(video)} frames")
    return count


def _strength(at: Asked, given: Any) -> float | None:
    if at.get["video"] is None:
        if given is not None:
            raise UsageError("--strength is for --video FILE")
        return None
    return number(or_default(given, 0.8), "strength", float, "a number above 0 and at most 1", lambda x: 0 < x <= 1)


def _first_step(at: Asked) -> int:
    """Steps that are left out; one is made in any case."""
    steps, strength = at.done["steps"], at.done["strength"]
    return 0 if strength is None else steps - max(1, round(steps * strength))


def _audio(at: Asked, given: Any) -> str | None:
    audio = inputs_of(at).get("audio")
    if audio is not None and audio.is_silent:
        at.warnings.append(f"--audio {audio.path} is silent: nothing will be spoken")
    return input_of(at, "audio")


def _audio_sync(at: Asked, given: Any) -> str | None:
    inputs_of(at)  # refuses it for other kinds of tasks
    return choice(given, "exact", "audio_sync", AUDIO_SYNCS) if "audio" in kind_of(at.spec).inputs else None


def _num_clip(at: Asked, given: Any) -> int | None:
    clips = input_of(at, "num_clip")
    if given is not None and int(given) > clips:
        at.warnings.append(f"--num_clip {given} is more than --audio needs: {clips}")
    return clips


def _loras(at: Asked, given: Any) -> LoraChoice:
    chosen = check_lora(at.spec, "lora", given)
    more = relighting_lora(at.spec, at.done["ckpt_dir"]) if at.get["use_relighting_lora"] else ()
    return chosen + tuple(one for one in more if one[0] not in dict(chosen))


def _lora(flag: str, what: str) -> Any:
    help = f"a LoRA for {what}, of strength X; may be repeated"
    check = _loras if flag == "lora" else lambda at, given: check_lora(at.spec, flag, given)
    return _weights("loras", help, check)


@dataclass(frozen=True)
class Sample:
    """One video to make, with every default filled in and everything checked.

    extended_from:  what the prompts were before a language model wrote longer ones
    image:          the (first) image, absolute path, or None; image_option: the image that the user gave (None: none,
                    or the one that comes with an embedded task); last_frame: the last frame of flf2v
    audio ...:      of s2v, absolute paths, and numbers with their defaults filled in; None for other tasks
    audio_samples:  that it has at 16 kHz
    size:           what was asked for, "W*H"; with an image only its area counts
    film_frames:    of a video that is made in clips of frame_num frames; None: it is one clip
    width, height:  px of the video; for a video that starts from an image they follow the image's aspect ratio
    guide_scale:    (low-noise, high-noise); twice the same number for a task with one expert
    shift:          None where nothing is shifted; sigma_max: of rCM's own steps, None: its default
    phases:         as the user wrote them, see `by_phase`; None: one
    boundary:       the noise level of the low-noise expert's first step; None: the task's
    boundary_step_index: the first step of the low-noise expert; None: by the noise level
    first_step:     the first of the steps that is made
    vae_tile_px:    side of the VAE's tiles, px; 0: whole frames; None: whole frames where these fit, else tiles
    lora ...:       (absolute path, strength) each
    cache:          options of the cache by their flags, {} for none; coefficients: what its policy needs
    """

    prompt: str = _what("text", "what the video shows", check_prompt)
    prompts: tuple[str, ...] = _what(
        "texts", "of a film of several clips: a prompt a line, one for each clip; the last one stays", _prompts
    )
    use_prompt_extend: bool = _extending(
        "flag",
        "let a language model write a longer prompt, which is shown and stored; where that fails, the prompt stays",
        is_given,
    )
    prompt_extend_method: str | None = _extend(
        "method", "name", "local (default; a chat model of transformers) or api (a service like OpenAI's)"
    )
    prompt_extend_model: str | None = _extend(
        "model", "path", "folder or hub id, default Qwen/Qwen2.5-3B-Instruct; a service's name for it", value="NAME"
    )
    prompt_extend_target_lang: str | None = _extend(
        "target_lang", "name", "language of the longer prompt: zh (default) or en"
    )
    prompt_extend_url: str | None = _extend(
        "url", "path", "the service; default $OPENAI_BASE_URL, else OpenAI's; $OPENAI_API_KEY is the key", value="URL"
    )
    extended_from: tuple[str, ...] = derived(lambda at: ())
    negative_prompt: str = _what(
        "text",
        "what it must not show; default: the task's official text",
        lambda at, given: or_default(given, at.spec.negative_prompt),
    )
    image: str | None = _input("image", "picture", "image to start from (i2v, flf2v, ti2v)")
    image_option: str | None = derived(lambda at: given_pictures(at).get("image"))
    last_frame: str | None = _input("last_frame", "picture", "last frame (flf2v, vace, i2v-A14B)")
    video: Any = _input("video", "picture", "video, or picture, to make anew: see --strength (t2v, i2v, ti2v)")
    continue_from: Any = _input(
        "continue_from", "file", "video whose last frames the first clip begins with (i2v, ti2v, vace)"
    )
    src_video: Any = _input("src_video", "picture", "video, or picture, that steers, or is made anew in part (vace)")
    src_mask: Any = _input(
        "src_mask",
        "picture",
        "mask of it, as video or picture: white is made anew, black stays (vace); video that is white where the"
        " character is (animate)",
    )
    src_ref_images: tuple[Any, ...] = _what(
        "pictures",
        "pictures of what the video shows (vace)",
        lambda at, given: tuple(input_of(at, "src_ref_images") or ()),
    )
    context_scale: float | None = _what("number", "how much these count; default 1 (vace)", _context_scale)
    inpaint: Any = _input("inpaint", "picture", "as --src_mask, but what --src_video shows there is left out (vace)")
    outpaint: tuple[int, ...] | None = _input(
        "outpaint", "numbers", "pixels to add around --src_video (vace)", value="L,T,R,B"
    )
    extend: Any = _input("extend", "picture", "clip, or picture, that the video begins with; see --last_frame (vace)")
    audio: str | None = _what("file", "speech or song, of any format that FFmpeg reads (s2v)", _audio)
    audio_samples: int | None = derived(lambda at: getattr(inputs_of(at).get("audio"), "samples", None))
    audio_sync: str | None = _what(
        "name",
        "exact (default): heard when it is spoken; official: begins with the film, 3 frames late (s2v)",
        _audio_sync,
    )
    pose_video: Any = _input("pose_video", "file", "video of poses that it moves by (s2v)")
    num_clip: int | None = _what(
        "whole", "clips to make; default, and at most: as many as --audio needs (s2v)", _num_clip
    )
    infer_frames: int | None = _input("infer_frames", "whole", "frames of a clip, 4n; default 80 (s2v)")
    start_from_ref: bool | None = _input("start_from_ref", "flag", "begin with --image itself (s2v)")
    src_pose: Any = _input("src_pose", "picture", "video of poses, which has the size of the result (animate)")
    src_face: Any = _input("src_face", "picture", "video of the face alone, 512x512 (animate)")
    src_ref: Any = _input("src_ref", "picture", "picture of the character (animate)")
    replace_flag: bool | None = _input(
        "replace_flag", "flag", "the character takes the place of another one: needs a background and a mask (animate)"
    )
    src_bg: Any = _input("src_bg", "picture", "video without that one, black in its place (animate)")
    refert_num: int | None = _input(
        "refert_num", "whole", "frames that each clip has of the one before, 1 (default) or 5 (animate)"
    )
    size: str = _what(
        "name",
        "pixels, as 832*480 or 832x480; with an image its area, in the image's aspect ratio",
        lambda at, given: check_shape(at)[0],
        value="W*H",
    )
    width: int = derived(lambda at: check_shape(at)[1])
    height: int = derived(lambda at: check_shape(at)[2])
    frame_num: int = _what("whole", "frames, 4n+1; those of a clip (animate)", lambda at, given: check_shape(at)[3])
    film_frames: int | None = derived(lambda at: kind_of(at.spec).film_frames(inputs_of(at)))
    overlap: int | None = _what(
        "whole", "frames, 4n+1, that a clip which goes on has of the film before; default 1 or 5", _overlap
    )
    trim_first_frames: int = _what(
        "whole",
        "leave out the first N frames, which distilled models can spoil",
        lambda at, given: whole(given, 0, "trim_first_frames", 0, at.done["frame_num"] - 1),
    )
    fps: int = _what(
        "whole", "frames per second of the file", lambda at, given: whole(given, at.spec.sampling.fps, "fps", 1, 240)
    )
    seed: int = _what("whole", "default -1: random, and printed", check_seed, spelled=("base_seed",))
    solver: str = _sampling(
        "name",
        f"one of: {', '.join(SOLVER_NAMES)}",
        lambda at, given: choice(given, at.spec.sampling.solver, "sample_solver", SOLVER_NAMES),
        flag="sample_solver",
    )
    denoising_step_list: tuple[float, ...] | None = _sampling(
        "numbers", "timesteps of a step-distilled model, as 1000,750,500,250", check_step_list, value="T,T,..."
    )
    sigmas: tuple[float, ...] | None = _sampling(
        "numbers", "noise level of each step as it is, without a shift, as 1,0.757,0.522", check_sigmas
    )
    phases: str | None = _sampling(
        "text",
        "parts of the steps with guidance, LoRAs, solver and expert of their own, as"
        ' "steps=2,guide=3.5,lora=0 | steps=4,guide=1"',
        check_phases,
    )
    sigma_max: float | None = _sampling(
        "number", "noise that rcm begins with, beside data of 1; default 80", check_sigma_max
    )
    steps: int = _sampling("whole", "number of steps", check_steps, flag="sample_steps")
    strength: float | None = _sampling(
        "number",
        "how much --video changes: the part of the steps that is made, above 0 and at most 1; default 0.8",
        _strength,
    )
    first_step: int = derived(_first_step)
    shift: float | None = _sampling("number", "shift of the noise schedule", check_shift, flag="sample_shift")
    guide_scale: tuple[float, float] = _sampling(
        "numbers",
        "guidance; LOW,HIGH for the two experts of A14B tasks; 1 turns it off",
        check_guide_scale,
        value="X",
        flag="sample_guide_scale",
    )
    boundary: float | None = _sampling(
        "number", "noise level, 0 to 1, below which the low-noise expert works; default: the task's", check_boundary
    )
    boundary_step_index: int | None = _sampling(
        "whole", "first step of the low-noise expert; default: by the noise level", check_boundary_step
    )
    lora: LoraChoice = _lora("lora", "the DiT")
    lora_high: LoraChoice = _lora("lora_high", "the high-noise expert alone")
    lora_low: LoraChoice = _lora("lora_low", "the low-noise expert alone")
    vae_tile_px: int | None = _machine(
        "whole", "decode in tiles of this many pixels; 0: whole frames; default: 0 if it fits", check_tile
    )
    cache: dict[str, Any] = derived(lambda at: _cache(at)[0])
    coefficients: dict[str, Any] = derived(lambda at: _cache(at)[1])
    image_sha256: dict[str, str] = derived(picture_hashes)

    OTHERS: ClassVar[dict[str, Option]] = {
        "first_frame": Option("picture", "first frame (flf2v); the same as --image", _WHAT, stored=False),
        "enable_tts": Option("flag", "not here: give a file of speech with --audio", _WHAT, stored=False),
        **{
            name: Option("text", "as --enable_tts", _WHAT, stored=False)
            for name in ("tts_prompt_audio", "tts_prompt_text", "tts_text")
        },
        "src_root_path": Option(
            "path",
            "folder with src_pose.mp4, src_face.mp4 and src_ref.png, and src_bg.mp4 and src_mask.mp4 (animate)",
            _WHAT,
            value="DIR",
            stored=False,
        ),
        "use_relighting_lora": Option(
            "flag",
            "with the LoRA of the checkpoint that gives a character the light of its background (animate)",
            _WEIGHTS,
            stored=False,
        ),
        "preset": Option(
            "name", f"settings of a kind of model, one of: {', '.join(preset_names())}", _SAMPLING, stored=False
        ),
        **{
            name: Option(one.kind, one.help, _CACHE, stored=name not in ("cache", "cache_quality"))
            for name, one in CACHE_OPTIONS.items()
        },
    }

    @property
    def by_phase(self) -> tuple[Phase, ...]:
        """The phases, of which there is at least one."""
        return make_phases(self.phases, Phase(self.steps, self.solver, self.guide_scale))

    @property
    def phase_of_step(self) -> list[Phase]:
        return [phase for phase in self.by_phase for _ in range(phase.steps)]

    @property
    def is_guided(self) -> bool:
        """Whether any step may have guidance."""
        return any(scale != 1 for phase in self.by_phase for scale in phase.guide_scale)

    @property
    def loras(self) -> dict[str, LoraChoice]:
        """LoRAs by flag, where there are any."""
        return {flag: chosen for flag in LORA_FLAGS if (chosen := getattr(self, flag))}
