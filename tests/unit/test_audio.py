"""Sound in: any format and rate becomes one channel at 16 kHz, and what cannot be read is told in one line."""

from fractions import Fraction

import av
import numpy as np
import pytest
import torch

from tests.unit.sound_helpers import features, tone, write_sound
from tests.unit.tiny_checkpoint import shrunk, wav2vec_state
from tests.unit.video_helpers import ramp, write
from tests.unit.weight_helpers import DictSource
from wan import audio
from wan.audio import RATE, clips_of, features_of, open_audio, steps_of
from wan.errors import SwanError, UsageError
from wan.models import audio as encoder_module
from wan.models.audio import frame_indices, load_audio_encoder

FORMATS = {
    "telephone.wav": (8000, 1, "mono", "pcm_s16le"),
    "as_is.wav": (16000, 1, "mono", "pcm_s16le"),
    "float.wav": (44100, 2, "stereo", "pcm_f32le"),
    "cinema.flac": (48000, 8, "7.1", "flac"),
    "speech.ogg": (48000, 1, "mono", "libopus"),
    "song.mp3": (44100, 2, "stereo", "libmp3lame"),
    "film.mkv": (48000, 6, "5.1", "ac3"),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_and_rate_becomes_one_channel_at_16_khz(name, tmp_path):
    rate, channels, layout, codec = FORMATS[name]
    found = open_audio(write_sound(tmp_path / name, tone(rate, 2.0, channels), rate, layout, codec))
    samples = found.read()
    assert samples.dtype == np.float32 and len(samples) == found.samples and abs(found.seconds - 2) < 0.06
    assert found.peak == np.abs(samples).max() and not found.is_silent
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples))))
    assert abs(spectrum.argmax() * RATE / len(samples) - 440) < 1
    if codec in ("pcm_s16le", "pcm_f32le", "flac"):  # the others lose something
        assert np.abs(samples - tone(RATE, 2.0)[0])[200:-200].max() < 1e-3


def test_channels_are_averaged(tmp_path):
    left, right = tone(RATE, 1.0, loudness=0.5), tone(RATE, 1.0, loudness=0.1)
    found = open_audio(write_sound(tmp_path / "a.wav", np.concatenate([left, right]), RATE, "stereo"))
    assert np.allclose(found.read(), tone(RATE, 1.0, loudness=0.3)[0], atol=1e-4)


def test_what_is_above_half_of_the_rate_does_not_come_back_below_it(tmp_path):
    found = open_audio(write_sound(tmp_path / "a.wav", tone(48000, 1.0, hertz=13000.0), 48000))
    assert np.abs(found.read()[500:-500]).max() < 0.01


def test_silence_is_told(tmp_path):
    found = open_audio(write_sound(tmp_path / "a.wav", np.zeros((1, RATE)), RATE))
    assert found.is_silent and found.samples == RATE


def test_it_is_never_in_memory_as_a_whole(tmp_path):
    path = write_sound(tmp_path / "long.wav", tone(8000, 60.0), 8000)
    assert max(map(len, audio._parts(path))) < RATE


BROKEN = {
    "an empty file": (b"", "damaged, cut off"),
    "noise": (bytes(range(256)) * 40, "damaged, cut off"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_no_sound_is_refused(what, tmp_path):
    data, why = BROKEN[what]
    (tmp_path / "a.wav").write_bytes(data)
    with pytest.raises(SwanError, match=f"^cannot read audio .*a.wav: .*{why}") as error:
        open_audio(tmp_path / "a.wav")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name, codec", [("a.flac", "flac"), ("a.wav", "pcm_s16le")])
def test_one_that_was_cut_off_is_told(name, codec, tmp_path):
    path = write_sound(tmp_path / name, tone(48000, 2.0), 48000, codec=codec)
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(SwanError, match="cut off"):
        open_audio(path)


def test_a_video_without_sound_is_refused(tmp_path):
    path = write(tmp_path / "a.avi", ramp(3))
    with pytest.raises(SwanError, match="it has no sound"):
        open_audio(path)


def test_samples_that_are_no_numbers_are_refused(tmp_path):
    samples = tone(RATE, 1.0)
    samples[0, 500] = np.nan
    path = write_sound(tmp_path / "a.wav", samples, RATE, codec="pcm_f32le")
    with pytest.raises(SwanError, match="some of its samples are no numbers"):
        open_audio(path)


def test_too_little_and_nothing(tmp_path):
    path = write_sound(tmp_path / "a.wav", tone(RATE, 0.02), RATE)
    with pytest.raises(SwanError, match="it lasts 0.020 s, which is too short"):
        open_audio(path)
    with pytest.raises(UsageError, match="--audio: no file .*b.wav"):
        open_audio(tmp_path / "b.wav")


# How much there is


def test_one_that_just_ends_has_another_clip_begin():
    """As officially."""
    assert [clips_of(features, 80, 16) for features in (1, 149, 150, 151)] == [1, 1, 2, 2]
    assert steps_of(RATE) == 49 and features_of(50) == 30


def test_frames_take_the_nearest_feature():
    assert frame_indices(8, 16).tolist() == [0, 2, 4, 6]  # of 0, 1.875, 3.75, 5.625, 7.5: that is the even one, 8
    assert frame_indices(9, 16).tolist() == [0, 2, 4, 6, 8]


# The encoder


@pytest.fixture(scope="module")
def encoder():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return load_audio_encoder(DictSource(wav2vec_state(shrunk("s2v-14B"))), num_heads=2)


def hiss(tmp_path, seconds):
    samples = 0.2 * np.random.default_rng(0).normal(size=(1, seconds * RATE))
    return open_audio(write_sound(tmp_path / "hiss.wav", samples, RATE, codec="pcm_f32le"))


def test_pieces_of_its_convolutions_change_nothing(encoder, monkeypatch, tmp_path):
    audio = hiss(tmp_path, 1)
    whole = features(encoder, audio, 16)
    assert whole.shape == (25, 32, 16)  # 49 steps, so 29 features
    monkeypatch.setattr(encoder_module, "_CHUNK_STEPS", 7)
    assert torch.allclose(features(encoder, audio, 16), whole, atol=1e-5)


def test_a_long_one_is_heard_in_windows(encoder, monkeypatch, tmp_path):
    """Each step is near to what it is where all attend to each other, and there is one for each frame."""
    audio = hiss(tmp_path, 4)
    whole = features(encoder, audio, 16)
    monkeypatch.setattr(encoder_module, "WINDOW_STEPS", 60)
    monkeypatch.setattr(encoder_module, "MARGIN_STEPS", 20)
    parts = features(encoder, audio, 16)
    assert parts.shape == whole.shape
    assert torch.allclose(parts[0], whole[0], atol=1e-4)  # before any attention, 20 steps away from an edge
    assert (parts - whole).abs().mean() < 0.1 * whole.abs().mean()


def test_parts_of_a_file_are_those_of_the_whole(tmp_path):
    audio = hiss(tmp_path, 2)
    whole = audio.read()
    assert np.array_equal(audio.read(5000, 20001), whole[5000:20001])
    assert np.array_equal(audio.read(30000, 99999), whole[30000:])
    assert np.allclose(audio.level, (whole.mean(), whole.std()), atol=1e-6)


def test_names_of_old_files_are_known(tmp_path):
    state = wav2vec_state(shrunk("s2v-14B"))
    start = "wav2vec2.encoder.pos_conv_embed.conv"
    old = {f"{start}.weight_{one}": state[f"{start}.parametrizations.weight.original{i}"] for i, one in enumerate("gv")}
    rest = {name: one for name, one in state.items() if "parametrizations" not in name}
    one, other = (load_audio_encoder(DictSource(names), num_heads=2) for names in (state, rest | old))
    audio = hiss(tmp_path, 1)
    assert torch.equal(features(one, audio, 16), features(other, audio, 16))


def test_another_encoder_is_refused():
    from tests.unit.tiny_checkpoint import clip_state

    with pytest.raises(SwanError, match="not a wav2vec2 encoder, it has no .*; the file looks like a CLIP"):
        load_audio_encoder(DictSource(clip_state()))


def test_sound_that_begins_later_than_the_picture(tmp_path):
    """The silence before it counts: what is heard is then in step with the picture."""
    path = tmp_path / "late.mkv"
    with av.open(str(path), "w") as container:
        video = container.add_stream("mpeg4", rate=10)
        sound = container.add_stream("pcm_s16le", rate=RATE, layout="mono")
        video.width = video.height = 32
        video.pix_fmt = "yuv420p"
        for at in range(20):
            frame = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
            frame.pts, frame.time_base = at, Fraction(1, 10)
            container.mux(video.encode(frame))
        wave = av.AudioFrame.from_ndarray((tone(RATE, 0.5) * 30000).astype(np.int16), "s16", "mono")
        wave.sample_rate, wave.time_base, wave.pts = RATE, Fraction(1, RATE), RATE
        container.mux([*sound.encode(wave), *sound.encode(None), *video.encode(None)])
    heard = open_audio(path).read()
    assert abs(len(heard) / RATE - 1.5) < 0.02 and abs(np.flatnonzero(np.abs(heard) > 0.1)[0] / RATE - 1) < 0.02
