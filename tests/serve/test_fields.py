"""Requests to options, without a server."""

import pytest

from wan.options import FLAGS, PART_OF
from wan.serve.body import _nested
from wan.serve.fields import read_fields
from wan.serve.inputs import Inputs
from wan.serve.models import Loras, Model, read_models
from wan.serve.refused import Refused, without_paths

MODELS = read_models(None, {"task": "t2v-tiny"})
MANY = {
    "one": Model("one", {"task": "t2v-tiny", "fps": 10}, "t2v-tiny"),
    "two": Model("two", {"task": "i2v-tiny"}, "i2v-tiny"),
    "talk": Model("talk", {"task": "s2v-tiny"}, "s2v-tiny"),
}


def read(models=MANY, **body):
    return read_fields({"prompt": "a", **body}, models, Loras(None))


def options(**body):
    return {name: value for name, value in read(**body).options.items() if name != "prompt"}


@pytest.mark.parametrize(
    "body, told",
    [
        ({"seconds": "1"}, {"frame_num": 9}),  # 10 frames a second, by the server; 4n + 1
        ({"seconds": "1", "fps": 16}, {"frame_num": 17, "fps": 16}),
        ({"seconds": 2, "num_frames": 32}, {"frame_num": 33}),
        ({"num_frames": "5"}, {"frame_num": 5}),
        ({"frame_num": 7}, {"frame_num": 7}),  # by its own name, as it is: the check refuses it
        ({"width": 64, "height": "96"}, {"size": "64x96"}),
        ({"size": "64x64", "width": 32, "height": 32}, {"size": "64x64"}),
        ({"enable_teacache": "true"}, {"teacache": True}),
        ({"seed": None, "negative_prompt": ""}, {}),
        ({"guidance_scale": "4"}, {"sample_guide_scale": "4"}),
        ({"model": "two", "guidance_scale": 4, "guidance_scale_2": 3}, {"sample_guide_scale": [3, 4]}),
        ({"model": "two", "guidance_scale_high": 5}, {"sample_guide_scale": [3.0, 5]}),
        ({"model": "talk", "prompts": "a\nb"}, {"prompts": ["a", "b"]}),
    ],
)
def test_names_of_others(body, told):
    assert options(**body) == told


@pytest.mark.parametrize(
    "body, told",
    [
        ({"prompt": " "}, "prompt is missing"),
        ({"model": "sora-2"}, "there are: one, two, talk"),
        ({"model": ["one"]}, "no model"),
        ({"ckpt_dir": "/x"}, "for the server to say"),
        ({"task": "i2v-tiny"}, "for the server to say"),
        ({"attention": "sdpa"}, "for the server to say"),
        ({"save_file": "/x.mp4"}, "unknown field 'save_file'"),
        ({"cache_trace": "/x"}, "unknown field"),
        ({"cache_coefficients": "/x"}, "unknown field"),
        ({"src_root_path": "/x"}, "unknown field"),
        ({"prompt_extend_url": "http://x"}, "unknown field"),
        ({"use_prompt_extend": True}, "not extended by this server"),
        ({"sede": 1}, "unknown field 'sede'"),
        ({"seconds": "many"}, "seconds must be a number above 0"),
        ({"seconds": "nan"}, "seconds must be a number"),
        ({"seconds": -1}, "seconds must be a number"),
        ({"num_frames": 1.5}, "num_frames must be a whole number"),
        ({"num_frames": True}, "num_frames must be a whole number"),
        ({"width": 64}, "width and height belong together"),
        ({"video_params": 3}, "video_params must be an object"),
        ({"seed": {"a": 1}}, "--seed must be a number"),
        ({"model": "talk", "seconds": 3}, "as long as what it is made from"),
        ({"guidance_scale_2": 3}, "for models with two experts"),
        ({"lora": "style"}, "no LoRA 'style'; there are: none"),
        ({"teacache": "perhaps"}, "--teacache must be true or false"),
    ],
)
def test_what_is_wrong_is_named(body, told):
    with pytest.raises(Refused, match=told):
        read(**body)


def test_which_flags_are_open_to_requests():
    """A new option of text, or a name, may be one that strangers must not set: it is looked at here first."""
    kinds = ("text", "texts", "name", "path", "file", "picture", "pictures", "loras")
    flags = [name for name, one in FLAGS.items() if PART_OF[name] == "sample" and one.kind in kinds]
    is_open = []
    for name in flags:
        try:
            read(**{name: "x"})
            is_open.append(name)
        except Refused as error:
            assert "unknown field" in str(error) or "no LoRA" in str(error) or "extended" in str(error), name
    files = "image last_frame video continue_from src_video src_mask src_ref_images inpaint extend audio pose_video"
    files += " src_pose src_face src_ref src_bg first_frame"
    texts = (
        "prompt prompts negative_prompt audio_sync size sample_solver phases tts_prompt_audio tts_prompt_text tts_text"
    )
    texts += " preset fb_metric teacache_policy cache_predictor cache_device cache cache_quality"
    assert set(is_open) == {*files.split(), *texts.split()}


def test_files_are_sources_and_no_options():
    wanted = read(model="two", input_reference="data:,", last_frame={"image_url": "x"})
    assert wanted.sources == {"image": "data:,", "last_frame": {"image_url": "x"}}
    assert "image" not in wanted.options
    assert read(model="talk", audio_reference="data:,").sources == {"audio": "data:,"}


def test_forms_are_nested_as_the_client_writes_them():
    items = [("a", "1"), ("b[c]", "2"), ("b[d][e]", "3"), ("f[]", "4"), ("f[]", "5"), ("g", "6"), ("g", "7")]
    assert _nested(items) == {"a": "1", "b": {"c": "2", "d": {"e": "3"}}, "f": ["4", "5"], "g": ["6", "7"]}
    for wrong in (
        [("a[", "1")],
        [("a[b][c][d][e]", "1")],
        [("a", "1"), ("a[b]", "2")],
        [("a[b]", "1"), ("a", "2")],
        [("", "1")],
    ):
        with pytest.raises(Refused):
            _nested(wrong)


@pytest.mark.parametrize(
    "source, told",
    [
        ("/etc/passwd", "must be a file that is sent"),
        ("../../secret.png", "must be a file that is sent"),
        ("file:///etc/passwd", "must be a file that is sent"),
        ("http://127.0.0.1/", "URLs are not fetched here"),
        ("data:image/png;base64,%%%", "no base64"),
        ("data:text/html;base64,PGh0bWw+PC9odG1sPg==", "no picture of a format"),
        ("data:application/zip;base64,UEsDBBQAAAAIAA==", "no picture of a format"),
        ("data:image/png;base64,", "no picture of a format"),
        ({"file_id": "file-1"}, "no files are kept here"),
        ({"image_url": {"a": 1}}, "must be a file"),
        ({}, "must be a file"),
        (7, "must be a file"),
    ],
)
def test_sources_that_are_no_pictures(source, told, tmp_path):
    with pytest.raises(Refused, match=told) as caught:
        Inputs(False, 1000).store({"image": source}, tmp_path)
    assert caught.value.param == "image"


@pytest.mark.parametrize(
    "text, told",
    [
        (
            "cannot read image /var/lib/swan/jobs/video_1/inputs/image-0.png: damaged",
            "cannot read image image-0.png: damaged",
        ),
        ("--size 832*480: no", "--size 832*480: no"),
        ("16/9 and 3/4, and/or a", "16/9 and 3/4, and/or a"),
        ("no folder '/home/me/my models'", "no folder 'my models'"),
        ("see https://example.com/a", "see https://example.com/a"),
        ("~/x/y.png", "y.png"),
        ("/a", "a"),
    ],
)
def test_messages_tell_no_folders(text, told):
    assert without_paths(text) == told
