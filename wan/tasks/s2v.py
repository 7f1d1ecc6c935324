"""Video of what a picture shows, moved by speech or song: Wan2.2's S2V (arXiv 2508.18621)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from easydict import EasyDict

from wan.audio import open_audio
from wan.conditioning.sizes import LOST_FRAMES, latent_frames, s2v_size
from wan.errors import UsageError
from wan.media import Sound
from wan.pictures import read_image
from wan.tasks.kind import Kind, Size, embedded_file, first_image, picture_size
from wan.video import VideoFile, open_video

_TTS = ("enable_tts", "tts_prompt_audio", "tts_prompt_text", "tts_text")
_MOST_FRAMES, _MOST_CLIPS = 400, 100_000


class S2V(Kind):
    """A film of clips, as many as the audio needs. A clip is `infer_frames` long; the first one is three frames
    shorter, but where the film starts from the reference itself."""

    inputs = ("image", "audio", "audio_sync", "pose_video", "num_clip", "infer_frames", "start_from_ref", "prompts")
    inputs += _TTS
    needed = ("image", "audio")

    def read(self, spec: EasyDict, get: Mapping[str, Any]) -> dict[str, Any]:
        if asked := next((name for name in _TTS if get[name]), None):
            how = "make the speech with any text-to-speech program and give its file with --audio"
            raise UsageError(f"--{asked}: speech is not made from text here: {how}")
        image, sound, fps = first_image(spec, get), get["audio"] or embedded_file(spec, "audio"), spec.sampling.fps
        if not (image and sound):
            raise UsageError(f"{spec.name} needs --image FILE and --audio FILE")
        if get["fps"] is not None and str(get["fps"]) != str(fps):
            raise UsageError(f"--fps: {spec.name} makes {fps} frames a second, and the audio goes by them")
        count = _whole(get, "infer_frames", spec.sampling.infer_frames, _MOST_FRAMES)
        if count % 4:
            raise UsageError(f"--infer_frames must be a multiple of 4, not {count}")
        picture, audio = picture_size(image), open_audio(sound)
        clips = audio.clips(count, fps)
        read = {"image": picture, "audio": audio, "infer_frames": count}
        read["num_clip"] = min(_whole(get, "num_clip", clips, _MOST_CLIPS), clips)
        read["start_from_ref"] = bool(get["start_from_ref"])
        return read | ({"pose_video": open_video(get["pose_video"])} if get["pose_video"] else {})

    def shape(self, spec: EasyDict, size: Size, frames: int, inputs: Mapping[str, Any]) -> tuple[int, int, int]:
        """The aspect ratio is the image's, of what is asked only the area counts. The frames are those of the first
        clip, of which each has as many latents."""
        first = inputs["infer_frames"] - LOST_FRAMES
        if frames not in (first, spec.sampling.frame_num):
            raise UsageError(f"--frame_num: {spec.name} makes clips of --infer_frames, as many as --audio needs")
        _, width, height = inputs["image"]
        rows, columns = s2v_size(size[0] * size[1], height, width)
        return columns, rows, first

    def encodes(self, sample: Any) -> bool:
        return True

    def encoded_frames(self, spec: EasyDict, sample: Any) -> tuple[int, ...]:
        motion = (spec.dit.motion_frames,) if self._has_motion(sample) else ()
        return (1, *motion, *((sample.infer_frames + 1,) if sample.pose_video else ()))

    def latents_before(self, spec: EasyDict, sample: Any) -> int:
        return latent_frames(spec.dit.motion_frames) if self._has_motion(sample) else 1

    def _has_motion(self, sample: Any) -> bool:
        return sample.start_from_ref or sample.num_clip > 1

    def frames(self, sample: Any) -> int:
        return sample.num_clip * sample.infer_frames - (0 if sample.start_from_ref else LOST_FRAMES)

    def clips(self, spec: EasyDict, sample: Any) -> int:
        return sample.num_clip

    def sound(self, sample: Any) -> Sound:
        """Officially the audio begins with the film, though the frames that it began with were left out."""
        left_out = sample.trim_first_frames + (0 if sample.start_from_ref else LOST_FRAMES)
        return Sound(sample.audio, 0.0 if sample.audio_sync == "official" else left_out / sample.fps)

    def film(self, spec: EasyDict, sample: Any) -> Any:
        from wan.conditioning.s2v import S2VFilm, pose_step, reference_pixels

        def pose(first: int, count: int) -> Iterator[Any]:
            step = pose_step(video.fps, spec.sampling.fps)
            return video.frames(range(first * step, min((first + count) * step, len(video)), step))

        video: VideoFile | None = open_video(sample.pose_video) if sample.pose_video else None
        reference = reference_pixels(read_image(sample.image), sample.height, sample.width)
        how = {"fps": spec.sampling.fps, "motion_frames": spec.dit.motion_frames}
        return S2VFilm(sample, reference, open_audio(sample.audio), pose if video else None, **how)


def _whole(get: Mapping[str, Any], name: str, default: int, most: int) -> int:
    """A number of an option, which may be text."""
    value = get[name]
    try:
        number = default if value is None else int(value)
        if number != float(default if value is None else value) or not 1 <= number <= most:
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise UsageError(f"--{name} must be a whole number from 1 to {most}, not {str(value)[:100]!r}") from None
    return number
