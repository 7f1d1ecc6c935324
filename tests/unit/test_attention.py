"""Attention: what is chosen by itself, what stands in for what cannot be used, and that this is said.

Packages and GPUs are imitated: none of these kernels has run here.
"""

import sys
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend

from wan import Engine
from wan.cli import main
from wan.errors import SwanError, UsageError
from wan.models import attention
from wan.models.attention import BACK_ENDS, choose_attention, get_attention
from wan.models.attention_names import BACK_END_NAMES, WITHOUT_BACK_END, lightx2v_attention
from wan.options import build_load
from wan.pipeline import WanPipeline
from wan.tasks import load_task

BF16 = torch.bfloat16
SDPA = "import torch.nn.functional as F\ndef exact(q, k, v):\n    return F.scaled_dot_product_attention(q, k, v)\n"
ROWS = f"{SDPA}def by_rows(q, k, v):\n    return exact(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)\n"
# What each package is called by, and how.
PACKAGES = {
    "flash_attn": f"{ROWS}def flash_attn_func(q, k, v, return_attn_probs=False):\n    return by_rows(q, k, v)\n",
    "flash_attn_interface": f"{ROWS}def flash_attn_func(q, k, v):\n    return by_rows(q, k, v), None\n",
    "flash_attn/cute": f"{ROWS}def flash_attn_func(q, k, v, return_lse=False):\n    return by_rows(q, k, v), None\n",
    "sageattention": f"{ROWS}def sageattn(q, k, v, tensor_layout, return_lse=False):\n    return by_rows(q, k, v)\n"
    "def sageattn_qk_int8_pv_fp16_cuda():\n    pass\n",
    "sageattn3": f"{SDPA}sageattn3_blackwell = exact\n",
    "spas_sage_attn": f"{SDPA}def spas_sage2_attn_meansim_topk_cuda(q, k, v, topk, is_causal, output_dtype):\n"
    "    assert not is_causal and output_dtype == q.dtype\n    return exact(q, k, v) + 1\n",
}
VERSIONS = {"flash_attn": "2.8.3", "sageattention": "2.2.0"}


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """machine(major, packages, cudnn): a GPU of that compute capability, packages that are installed, torch's cuDNN."""

    def make(major, *packages, versions=VERSIONS, cudnn=None):
        monkeypatch.setattr(torch.backends.cudnn, "version", lambda: cudnn)
        monkeypatch.setattr(attention, "attend", lambda *_: None)  # sdpa is torch's, to the bit
        monkeypatch.setattr(torch.cuda, "is_available", lambda: major > 0)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (major, 0))
        for name in packages:
            folder = tmp_path / name
            folder.mkdir(parents=True)
            (folder / "__init__.py").write_text(PACKAGES[name])
            if name in versions:
                info = tmp_path / f"{name}-{versions[name]}.dist-info"
                info.mkdir()
                (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {versions[name]}\n")
        monkeypatch.syspath_prepend(tmp_path)

    yield make
    for name in list(sys.modules):
        if name.partition(".")[0] in {package.partition("/")[0] for package in PACKAGES}:
            del sys.modules[name]


def test_the_names_are_those_of_the_back_ends():
    assert tuple(BACK_ENDS) == BACK_END_NAMES and not set(BACK_ENDS) & set(WITHOUT_BACK_END)


@pytest.mark.parametrize(
    "major, packages, dtype, device, chosen",
    [
        (0, [], BF16, "auto", "sdpa"),
        (9, [], BF16, "cuda", "sdpa"),
        (9, ["flash_attn", "flash_attn_interface", "sageattention"], BF16, "cuda", "flash_attn3"),
        (9, ["flash_attn_interface"], torch.float32, "cuda", "sdpa"),
        (9, ["flash_attn_interface"], BF16, "cpu", "sdpa"),
        (10, ["flash_attn_interface", "flash_attn/cute", "sageattn3"], torch.float16, "cuda:0", "flash_attn4"),
        (8, ["flash_attn", "sageattention", "spas_sage_attn"], BF16, "cuda", "sdpa"),  # whose kernel is the same
    ],
)
def test_auto_goes_by_gpu_type_and_packages(machine, major, packages, dtype, device, chosen):
    machine(major, *packages)
    assert choose_attention("auto", dtype, device) == (chosen, [])


@pytest.mark.parametrize(
    "major, packages, cudnn, dtype, chosen",
    [
        (9, [], 91501, BF16, "cudnn"),
        (9, [], 91002, BF16, "sdpa"),  # whose numbers are wrong for some lengths
        (9, ["flash_attn_interface"], 91501, BF16, "flash_attn3"),
        (9, [], 91501, torch.float32, "sdpa"),
        (10, ["flash_attn/cute"], 91900, BF16, "cudnn"),
        (10, ["flash_attn/cute"], 91002, BF16, "flash_attn4"),
        (8, [], 91900, BF16, "sdpa"),
    ],
)
def test_auto_takes_cudnn_where_it_is_new_enough(machine, major, packages, cudnn, dtype, chosen):
    machine(major, *packages, cudnn=cudnn)
    assert choose_attention("auto", dtype, "cuda", ring=2, head_dim=128) == (chosen, [])


def test_cudnn_is_named_and_gives_what_a_ring_merges(machine, monkeypatch):
    """What torch is asked for; this CPU has no cuDNN."""
    machine(9, cudnn=91900)
    asked, q = [], torch.randn(1, 5, 3, 64, dtype=BF16)
    exact = get_attention("sdpa").with_lse(q, q, q)

    def of_cudnn(q, k, v, bias, compute_log_sumexp):
        assert bias is None and compute_log_sumexp
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
        return out, lse.unsqueeze(-1), None

    monkeypatch.setattr(attention, "sdpa_kernel", lambda back_end: asked.append(back_end) or nullcontext())
    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_cudnn_attention", of_cudnn)
    one = get_attention("cudnn")
    assert torch.equal(one(q, q, q), get_attention("sdpa")(q, q, q)) and asked == [SDPBackend.CUDNN_ATTENTION]
    assert all(torch.equal(*pair) for pair in zip(one.with_lse(q, q, q), exact, strict=True))


def test_an_old_cudnn_is_told():
    with pytest.raises(UsageError, match="'cudnn' needs cuDNN 9.15.1 or later, as torch has it, and a CUDA device"):
        choose_attention("cudnn", BF16, "cuda")


@pytest.mark.parametrize(
    "asked, dtype, head_dim, reason",
    [
        ("flash_attn3", torch.float32, 128, "'flash_attn3' computes in bf16 and fp16, not float32"),
        ("flash_attn3", BF16, 12, "'flash_attn3' takes heads of at most 256 numbers, a multiple of 8, not 12"),
        ("cudnn,flash_attn3", BF16, 12, "'cudnn' takes heads of at most 128 numbers, a multiple of 8, not 12"),
        ("sage_attn3,auto", torch.float32, 128, "'sage_attn3' computes in bf16 and fp16, not float32"),
    ],
)
def test_what_a_back_end_cannot_take_goes_to_sdpa_with_a_line(machine, asked, dtype, head_dim, reason):
    machine(9, "flash_attn_interface", cudnn=91900)
    name, lines = choose_attention(asked, dtype, "cuda", head_dim=head_dim)
    assert name == "sdpa"
    assert lines[0] == f"warning: --attention {asked}: attention back end {reason}; sdpa is used"
    assert choose_attention("auto", dtype, "cuda", head_dim=head_dim) == ("sdpa", [])  # not asked for: no line


def test_heads_of_a_part_that_a_back_end_cannot_take(machine):
    """As those of an adapter may be, beside blocks whose heads it takes."""
    machine(9, "flash_attn_interface")
    q = torch.randn(1, 5, 3, 12, dtype=BF16)
    assert torch.equal(get_attention("flash_attn3")(q, q, q), get_attention("sdpa")(q, q, q))


def test_auto_passes_over_a_package_that_does_not_work(machine, tmp_path):
    machine(9, "flash_attn_interface")
    (tmp_path / "flash_attn_interface/__init__.py").write_text("raise ImportError('undefined symbol')")
    assert choose_attention("auto", BF16, "cuda") == ("sdpa", [])
    with pytest.raises(SwanError, match="the package flash_attn_interface cannot be used: undefined symbol"):
        choose_attention("flash_attn3", BF16, "cuda")
    _, [line] = choose_attention("flash_attn3,sdpa", BF16, "cuda")
    assert "undefined symbol" in line and line.endswith("; sdpa is used")


@pytest.mark.parametrize("asked, chosen", [("sage_attn3,sage_attn2,sdpa", "sage_attn2"), ("svg_attn,auto", "sdpa")])
def test_what_cannot_be_used_gives_way_with_a_line(machine, asked, chosen):
    machine(12, "sageattention")
    name, lines = choose_attention(asked, BF16, "cuda")
    assert name == chosen and len(lines) == 1
    assert lines[0].startswith(f"warning: --attention {asked}: attention ")
    assert lines[0].endswith(f"; {chosen} is used")


@pytest.mark.parametrize(
    "asked, ring, message",
    [
        ("radial_attn", 1, "attention 'radial_attn' leaves out part of the attention, and is not part of Swan: give"),
        ("npu_flash_attn", 1, "attention 'npu_flash_attn' is for accelerators that are not supported: give what else"),
        ("sage_attn3", 1, "attention back end 'sage_attn3' needs compute capability 10.x and 12.x, this GPU has 9.x"),
        ("sparge_attn", 2, "attention back end 'sparge_attn' cannot merge the parts that --ring_size 2 makes"),
        ("flash_attn3", 1, "attention back end 'flash_attn3' needs the package flash_attn_interface and a CUDA device"),
        ("flash_attn3,svg_attn", 1, "--attention flash_attn3,svg_attn: none of these can be used: attention back end"),
        ("sdpa2", 1, "unknown attention back end 'sdpa2'"),
    ],
)
def test_what_cannot_be_used_alone_is_one_line(machine, asked, ring, message):
    machine(9, "sageattn3", "spas_sage_attn")
    with pytest.raises(UsageError) as error:
        choose_attention(asked, BF16, "cuda", ring)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_version_1_of_sageattention_is_not_taken_for_2(machine, tmp_path):
    machine(9, "sageattention", versions={"sageattention": "1.0.6"})
    with pytest.raises(UsageError, match=r"needs the package sageattention \(version 2 or later\)"):
        choose_attention("sage_attn2", BF16, "cuda")


def test_nor_is_a_folder_of_its_sources(machine, tmp_path):
    machine(9, "sageattention", versions={})
    assert choose_attention("sage_attn2", BF16, "cuda") == ("sage_attn2", [])
    (tmp_path / "sageattention/__init__.py").write_text("def sageattn(q, k, v, **more):\n    pass\n")
    del sys.modules["sageattention"]
    with pytest.raises(SwanError, match="the package sageattention cannot be used"):
        choose_attention("sage_attn2", BF16, "cuda")


def test_version_4_alone_is_not_version_2(machine):
    machine(10, "flash_attn/cute")
    assert BACK_ENDS["flash_attn4"].is_installed() and not BACK_ENDS["flash_attn2"].is_installed()


@pytest.mark.parametrize("name", [name for name in BACK_END_NAMES if BACK_ENDS[name].package])
def test_packages_are_called_as_they_want_to_be(machine, name):
    """The result has our axes, whatever theirs."""
    machine(9, BACK_ENDS[name].package.replace(".", "/"))
    q, k = (torch.randn(1, tokens, 3, 64, generator=torch.Generator().manual_seed(tokens)) for tokens in (130, 40))
    q, k = q.to(BF16), k.to(BF16)
    for keys in (q, k):
        whole = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, keys, keys))).transpose(1, 2)
        leaves_out = name == "sparge_attn" and keys is q  # the imitation adds 1 where it is called
        torch.testing.assert_close(get_attention(name)(q, keys, keys), whole + 1 if leaves_out else whole)


@pytest.mark.parametrize(
    "theirs, ours",
    [
        ("torch_sdpa", "sdpa"),
        ("flash_attn3", "flash_attn3,auto"),
        ("sage_attn2", "sage_attn2,auto"),
        ("sage_attn2_k_int8_v_fp8", "sage_attn2,auto"),
        ("nbhd_attn", "nbhd_attn,auto"),
        ("mlu_sage_attn", "mlu_sage_attn,auto"),
        ("warp", None),
    ],
)
def test_names_of_lightx2v(theirs, ours):
    assert lightx2v_attention(theirs) == ours
    if ours:
        assert build_load({"attention": ours}).attention == ours


def test_the_choice_is_in_the_report_and_the_line_is_told_once():
    quick = {"size": "32*48", "frame_num": 5, "sample_steps": 1, "sample_guide_scale": 1}
    with Engine(device="cpu", attention="radial_attn,auto") as engine:
        events = []
        reports = [engine.generate(**quick, on_event=events.append).report for _ in range(2)]
    assert [report["attention"] for report in reports] == ["sdpa", "sdpa"]
    [line] = [event.text for event in events if event.kind == "warning" and "radial" in event.text]
    assert line.startswith("--attention radial_attn,auto: attention 'radial_attn' leaves out part of the attention")


def test_processes_attend_alike():
    pipe = WanPipeline.from_load(build_load({"device": "cpu"}), load_task("t2v-tiny"))
    pipe.parallel.gather_objects = lambda one: [one, "flash_attn3"]
    with pytest.raises(UsageError, match="--attention auto is flash_attn3 and sdpa on these processes: give one"):
        pipe._choose_attention()


@pytest.mark.parametrize(
    "flags, code, message",
    [
        (["--attention", "warp"], 2, "unknown --attention 'warp'; choose one of: auto, sdpa, cudnn, flash_attn2"),
        (["--attention", "sdpa,"], 2, "unknown --attention ''; choose one of"),
        (["--attention", "sage_attn3"], 0, "'sage_attn3' computes in bf16 and fp16, not float32; sdpa is used"),
        (["--attention", "radial_attn"], 2, "attention 'radial_attn' leaves out part"),
        (["--attention", "radial_attn,sdpa"], 0, "--attention radial_attn,sdpa: attention 'radial_attn' leaves out"),
    ],
)
def test_command_line(capsys, flags, code, message):
    assert main([*flags, "--device", "cpu", "--dry_run"]) == code
    out, err = capsys.readouterr()
    assert message in (err if code else out)
