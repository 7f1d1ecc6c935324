"""Flags of the caches, and files of coefficients."""

from __future__ import annotations

import json
import math

import pytest
from wan.cache.coefficients import load_coefficients, read_coefficients, write_coefficients
from wan.cache.options import COMMON, check_coefficients, check_options, make_manager, policy_of
from wan.cache.policy import POLICIES

from tests.caching.network import sample
from tests.caching.toy import STEPS, decisions

# Flags


def test_fbcache_has_priority(models):
    options, warnings = check_options({"fbcache": True, "teacache": True, "teacache_thresh": 1e9}, STEPS)
    assert policy_of(options).name == "fbcache"
    assert warnings == ["--fbcache and --teacache: fbcache, which measures the change, decides alone"]
    manager = make_manager(options, {})
    sample(models, manager)
    assert {one.policy for one in manager.telemetry.decisions} == {"fbcache"}
    alone = make_manager(check_options({"fbcache": True}, STEPS)[0], {})
    sample(models, alone)
    assert decisions(manager) == decisions(alone)


def test_unknown_rescaling_is_linear_with_a_warning():
    options, warnings = check_options({"teacache": True, "teacache_policy": "cubic"}, 20)
    assert options["teacache_policy"] == "linear" and len(warnings) == 1
    assert "unknown --teacache_policy 'cubic'; linear is used" in warnings[0]


@pytest.mark.parametrize("steps", [1, 4, 9])
def test_runs_of_few_steps_are_refused(steps):
    with pytest.raises(ValueError, match=f"--magcache harms a run of {steps} steps.*--cache_force"):
        check_options({"magcache": True}, steps)
    assert check_options({"magcache": True, "cache_force": True}, steps)[0]["magcache"]


def test_options_that_were_given_are_kept():
    """False is a value where the default is true; every option of the one policy has a value, no other has."""
    options, _ = check_options({"fbcache": True, "fb_cfg_sep_diff": False, "fb_thresh": 0, "teacache": False}, 20)
    assert options["fb_cfg_sep_diff"] is False and options["fb_thresh"] == 0
    assert set(options) == {
        "fbcache",
        *POLICIES["fbcache"].flags,
        *COMMON,
    }
    assert check_options({"teacache": None, "fbcache": False}, 20) == ({}, [])


WRONG = [
    ({"teacache_thresh": "0.1"}, "--teacache_thresh has no effect without --teacache"),
    ({"fbcache": True, "mag_K": 3}, "--mag_K has no effect without --magcache"),
    ({"cache_device": "cpu"}, "--cache_device has no effect without --fbcache or --teacache or"),
    ({"magcache": True, "cache_max_skips": 3}, "--cache_max_skips has no effect with --magcache"),
    ({"fbcache": True, "cache_coefficients": "a"}, "--cache_coefficients has no effect: fbcache, as it is set"),
    ({"teacache": True, "cache_coefficients": "a"}, "--cache_coefficients has no effect: teacache, as it is set"),
    ({"fbcache": True, "magcache": True}, "--fbcache and --magcache cannot go together; choose one"),
    ({"easycache": True, "teacache": True}, "cannot go together"),
    ({"teacache": True, "teacache_thresh": "much"}, "--teacache_thresh must be a number, not 'much'"),
    ({"teacache": True, "teacache_thresh": "nan"}, "--teacache_thresh must be a number, not nan"),
    ({"teacache": True, "teacache_thresh": math.inf}, "--teacache_thresh must be a number, not inf"),
    ({"teacache": True, "teacache_thresh": True}, "--teacache_thresh must be a number, not True"),
    ({"teacache": True, "teacache_warmup": -1}, "--teacache_warmup must be a whole number of at least 0, not -1"),
    ({"teacache": True, "teacache_warmup": 1.5}, "--teacache_warmup must be a whole number of at least 0, not 1.5"),
    ({"fbcache": True, "fb_downsample": "0"}, "--fb_downsample must be a whole number of at least 1, not 0"),
    ({"fbcache": True, "fb_ema": "1"}, "--fb_ema must be from 0 to below 1, not 1"),
    ({"fbcache": True, "fb_metric": "l3"}, "unknown --fb_metric 'l3'; choose one of: hidden_rel_l1, "),
    ({"fbcache": True, "fb_cfg_sep_diff": "maybe"}, "--fb_cfg_sep_diff must be true or false, not 'maybe'"),
    ({"fbcache": "no"}, "--fbcache must be true or false, not 'no'"),
    ({"magcache": True, "mag_retention": 1.1}, "--mag_retention must be from 0 to 1, not 1.1"),
    ({"magcache": True, "mag_K": 0}, "--mag_K must be a whole number of at least 1, not 0"),
    ({"magcache": True, "cache_predictor": "second"}, "unknown --cache_predictor 'second'; choose one of: zero, "),
    ({"magcache": True, "mag_ratios": "1,x"}, "--mag_ratios must be numbers with commas between them, at most 1000"),
    ({"magcache": True, "mag_ratios": [-1.0]}, "--mag_ratios must be numbers"),
    ({"magcache": True, "mag_ratios": []}, "--mag_ratios must be numbers"),
    ({"magcache": True, "mag_ratios": [1] * 1001}, "--mag_ratios must be numbers"),
    ({"magcache": True, "mag_ratios": "1", "cache_coefficients": "a"}, "--cache_coefficients has no effect: magcache"),
    ({"teacache": True, "teacache_polynomial": "1"}, "--teacache_polynomial has no effect with --teacache"),
    ({"fbcache": True, "cache_max_skips": 10**400}, None),
]


@pytest.mark.parametrize("flags, message", WRONG)
def test_wrong_flags(flags, message):
    if message is None:
        assert check_options(flags, 20)
        return
    with pytest.raises(ValueError) as caught:
        check_options(flags, 20)
    assert message in str(caught.value) and "\n" not in str(caught.value)


# Coefficients


@pytest.mark.parametrize("model", ["wan2.2-t2v-A14B", None, "no-such-model"])
def test_coefficients_that_are_not_known(model):
    options, _ = check_options({"teacache": True, "teacache_policy": "polynomial"}, 40)
    with pytest.raises(ValueError) as caught:
        check_coefficients(options, model, ("high", "low"))
    message = str(caught.value)
    assert (
        f"no teacache embedding coefficients are known for expert high of {model or 'this model'}; measure" in message
    )
    assert "wan.calibrate" in message and "\n" not in message


def test_coefficients_from_a_file(tmp_path):
    file = tmp_path / "c.json"
    ratios = {"high": [1.0, 0.9], "low": [1.0, 0.8]}
    write_coefficients(file, {"mine": {"magcache": {"ratios": ratios}}}, "a note")
    options, _ = check_options({"magcache": True, "cache_coefficients": str(file)}, 40)
    for model in ("mine", "another", None):  # a file of one model holds for any
        assert check_coefficients(options, model, ("high", "low"))["ratios"] == ratios
    with pytest.raises(ValueError, match="no magcache coefficients are known for another"):
        check_coefficients(options, "another", ("model",))
    two = {name: {"magcache": {"ratios": ratios}} for name in ("mine", "yours")}
    write_coefficients(file, two, "")
    with pytest.raises(ValueError, match="holds coefficients of mine, yours, not of another"):
        load_coefficients("another", file)
    write_coefficients(file, {}, "")
    with pytest.raises(ValueError, match="holds coefficients of no model"):
        load_coefficients("mine", file)
    assert [item.name for item in tmp_path.iterdir()] == ["c.json"]


def entry(**content):
    return json.dumps({"format": "cache-coefficients-1", "models": {"m": content}})


DAMAGED = [
    "",
    "[]",
    "null",
    "{",
    '{"format": "other", "models": {}}',
    '{"format": "cache-coefficients-1", "models": []}',
    '{"format": "cache-coefficients-1", "models": {"m": 3}}',
    entry(teacache=3),
    entry(teacache={"embedding": 3}),
    entry(teacache={"embedding": {}}),
    entry(teacache={"embedding": {"polynomial": {"model": []}}}),
    entry(teacache={"embedding": {"polynomial": {"model": ["1"]}}}),
    entry(teacache={"embedding": {"polynomial": {"model": "12345"}}}),
    entry(teacache={"embedding": {"polynomial": {"model": [math.nan]}}}),
    entry(teacache={"embedding": {"polynomial": {"model": [1]}, "range": {"model": [1]}}}),
    entry(teacache={"embedding": {"polynomial": {"model": [1]}, "range": {"model": [1, 2, 3]}}}),
    entry(magcache={}),
    entry(magcache={"ratios": [1, 2]}),
    entry(magcache={"ratios": {"model": [True]}}),
    entry(magcache={"ratios": {"model": [10**400]}}),
]


@pytest.mark.parametrize("text", DAMAGED)
def test_damaged_coefficients(tmp_path, text):
    file = tmp_path / "c.json"
    file.write_text(text)
    with pytest.raises(ValueError) as caught:
        read_coefficients(file)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)
    assert "not a coefficients file" in str(caught.value) or "the coefficients of m are damaged" in str(caught.value)


def test_coefficients_that_are_no_text(tmp_path):
    (tmp_path / "c.json").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "c.json", tmp_path, tmp_path / "none.json"):
        with pytest.raises(ValueError, match="not a coefficients file"):
            read_coefficients(path)
