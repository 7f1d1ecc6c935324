"""The clips that vace-tiny is trained on and judged by, shown to the network as inference shows them."""

import random

import pytest
import torch

from benchmarks.judge import judge, objects
from benchmarks.tiny_world_vace import KINDS, all_cases, appears, kept_psnr, make_case
from tools.tiny import train_vace
from tools.tiny.fit import load_vae
from tools.tiny.train_vace import build, hole, margins, rest
from tools.tiny.world import DIRECTIONS, SIZES, combinations, held_out, render, sample
from wan.conditioning.vace import vace_context
from wan.models.dit import WanModel
from wan.tasks import embedded_checkpoint, load_task
from wan.weights.infer_task import infer_task
from wan.weights.locate import locate
from wan.weights.source import open_source

TASK = load_task("vace-tiny")
FILES = locate(embedded_checkpoint(TASK), TASK)


def test_only_the_branch_comes_with_the_task():
    base, branch = (open_source([path]) for path in FILES.dit["model"])
    assert all(name.startswith("vace_") for name in branch.keys()) and not set(base.keys()) & set(branch.keys())
    assert branch.paths[0].stat().st_size <= 4_000_000


def noted(function, results):
    def call(*args):
        results.append(function(*args))
        return results[-1]

    return call


def test_training_shows_a_clip_as_inference_does(monkeypatch):
    """But for the grey of a hole, which is that of the user's picture there."""
    vae = load_vae(FILES, TASK, torch.float32)
    drawn = []
    for name in ("sample", "new_part"):
        monkeypatch.setattr(train_vace, name, noted(getattr(train_vace, name), drawn))
    monkeypatch.setattr(train_vace, "SIZES", SIZES[:1])
    found = train_vace.examples(vae, random.Random(0), 8)[SIZES[0], False]
    clip, mask = drawn[0], drawn[8]  # eight clips, then their masks
    assert found.clips[0] == clip
    frames = render(clip, *SIZES[0])
    theirs = vace_context(vae.encode, frames.masked_fill(mask, 0), mask[None].float(), ())[0]
    torch.testing.assert_close(found.contexts[0].float(), theirs, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(found.latents[0], vae.encode(frames[None])[0], rtol=1e-3, atol=1e-3)


def test_a_branch_that_is_not_trained_changes_nothing():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = WanModel(**load_task("t2v-tiny").dit)
        model = build(base, TASK)
    x, text = torch.randn(1, 16, 2, 4, 4), [torch.randn(3, TASK.dit.text_dim)]
    context = torch.randn(1, 96, 2, 4, 4)
    with torch.no_grad():
        alone = base(x, torch.tensor([500.0]), text)
        together = model(x, torch.tensor([500.0]), text, vace_context=context, vace_context_scale=1.0)
    assert torch.equal(alone, together)
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if name.startswith("vace_")}


@pytest.mark.parametrize("seed", range(4))
def test_a_part_is_made_anew_and_a_part_is_kept(seed):
    rng = random.Random(seed)
    clip = sample(rng, combinations())
    for mask in (hole(rng, clip, 64, 48), margins(rng, 64, 48), rest(rng, 64, 48)):
        assert mask.shape == (17, 48, 64) and 0 < mask.float().mean() < 1


def test_every_kind_is_asked_for_as_often_with_words_never_trained_on():
    asked = all_cases()
    assert len(asked) == 32 and [kind for kind, _, _ in asked] == list(KINDS) * 8
    assert all((clip.color, clip.shape, clip.direction) in held_out() for _, clip, _ in asked)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_benchmark_passes_what_was_asked_for_and_nothing_else(tmp_path, kind, direction):
    clip = next(clip for _, clip, _ in all_cases() if clip.direction == direction)
    case = make_case(kind, clip, tmp_path)
    right = ((render(clip, 64, 64) + 1) * 127.5).round().byte().permute(1, 2, 3, 0).numpy()
    right[case.kept] = case.given[case.kept]
    assert judge(right).shape == clip.shape and appears(case, right)
    assert kept_psnr(case, right) is None if kind == "reference" else kept_psnr(case, right) > 60
    empty = right.copy()
    empty[~case.kept] = right[0, 0, 0]  # what should be made anew is background
    assert not appears(case, empty)
    if kind == "inpaint":  # the shape that was there is not the one asked for
        assert not appears(case, case.given) and len(objects(case.given)) == 17


@pytest.mark.parametrize("name", ["t2v-tiny", "i2v-tiny", "vace-tiny"])
def test_embedded_tasks_are_told_from_their_folders(name):
    """That of vace-tiny has the branch alone, and the rest beside it."""
    assert infer_task(str(embedded_checkpoint(load_task(name))), {})[0] == name
