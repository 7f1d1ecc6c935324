"""README and docs: their commands and Python run, what they name exists, and what exists is named.

A block of commands (```bash) or Python runs in one folder a page, in order; one that is marked `checkpoint` needs files
that are not here, and is checked as far as it goes without: flags, values and what belongs together.
"""

import ast
import importlib
import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.unit.sound_helpers import tone, write_sound
from wan import calibrate, cli, convert, prepare
from wan.audio import RATE
from wan.batch import __main__ as batch
from wan.compat import run_gguf_t2v
from wan.media import write_video
from wan.options import FLAGS, PART_OF, build_request
from wan.plan import parameters
from wan.serve import __main__ as serve
from wan.tasks import load_task, task_names

REPO = Path(__file__).parents[2]
PAGES = {path.name: path.read_text(encoding="utf-8") for path in [REPO / "README.md", *sorted(REPO.glob("docs/*.md"))]}
TEXT = "\n".join(PAGES.values())
PARSERS = {
    "generate.py": cli,
    "wan.convert": convert,
    "wan.calibrate": calibrate,
    "wan.prepare": prepare,
    "wan.batch": batch,
    "wan.serve": serve,
    "wan.compat.run_gguf_t2v": run_gguf_t2v,
}
FLAGS_OF = {
    name: {flag for action in module.make_parser()._actions for flag in action.option_strings}
    for name, module in PARSERS.items()
}
FLAGS_OF["wan.cache.report"] = {"--out"}
FEW = ("--frame_num", "5", "--sample_steps", "3")  # a video that is quickly made
TASK = "t2v-1.3B"  # where a command leaves it to the checkpoint


def blocks(page, language, mark=""):
    return [
        text
        for kind, text in re.findall(r"^```(.*)\n([\s\S]*?)^```", PAGES[page], re.M)
        if kind == f"{language} {mark}".strip()
    ]


def commands(page, mark=""):
    lines = "".join(blocks(page, "bash", mark)).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def program(words):
    """(what is run, its arguments, how many processes)."""
    if words[0] == "torchrun":
        return words[2], words[3:], int(words[1].partition("=")[2])
    return (words[2], words[3:], 1) if words[1] == "-m" else (words[1], words[2:], 1)


def flags_of(name):
    """All flags of a program; those of benchmarks, which cannot be asked without torch, from their text."""
    if name not in FLAGS_OF:
        folder = Path(find_spec(name).origin).parent
        FLAGS_OF[name] = set(re.findall(r'"(--[\w-]+)"', "".join(path.read_text() for path in folder.glob("*.py"))))
    return FLAGS_OF[name]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder that has the embedded models where a clone has them."""
    (tmp_path / "wan").mkdir()
    (tmp_path / "wan/assets").symlink_to(REPO / "wan/assets")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def marked(page):
    is_dist = any(words[0] == "torchrun" for words in commands(page))
    return pytest.param(page, marks=[pytest.mark.dist] if is_dist else [])


@pytest.mark.parametrize("page", [marked(page) for page in PAGES if commands(page)])
def test_commands_run(page, folder, capsys):
    for language, name in (("yaml", "mine.yaml"), ("text", "acts.txt")):
        for text in blocks(page, language):
            (folder / name).write_text(text)
    for words in commands(page):
        if words[0] == "make":  # README's first two, which are run on a fresh clone
            assert f"\n{words[1]}:" in (REPO / "Makefile").read_text()
            continue
        name, arguments, ranks = program(words)
        if name == "generate.py":
            few = (
                FEW[2:] if {"s2v-tiny", "animate-tiny"} & {*arguments} else FEW
            )  # of as many clips as there are inputs for
            few = FEW[:2] if any("cache" in word for word in arguments) else few  # which few steps are not for
            arguments = [*arguments, *(() if {"--preset", "--replay", "--phases"} & {*arguments} else few)]
        if ranks > 1:
            start = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}", str(REPO / name)]
            subprocess.run([*start, *arguments], check=True, capture_output=True)
        else:
            module = PARSERS.get(name) or importlib.import_module(name)
            assert module.main(arguments) == 0, f"{shlex.join(words)}: {capsys.readouterr().err}"


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page, "checkpoint")])
def test_commands_that_need_a_checkpoint_are_right_but_for_that(page, folder):
    for words in commands(page, "checkpoint"):
        name, arguments, ranks = program(words)
        given = vars(PARSERS[name].make_parser().parse_args(arguments))
        if name == "generate.py":
            stand_in(arguments)
            options = {flag: value for flag, value in given.items() if flag in FLAGS}
            build_request({**options, "task": options["task"] or TASK}, ranks)


def stand_in(arguments):
    """Make the files that a command reads."""
    for path in (Path(part) for word in arguments for part in re.split(r"[,:]", word)):
        if path.suffix in (".png", ".jpg"):
            Image.new("RGB", (160, 96)).save(path)
        elif path.suffix == ".mp4":
            write_video(path, np.zeros((9, 96, 96 if path.stem == "face" else 160, 3), np.uint8), 16, {})
        elif path.suffix in (".wav", ".mp3"):
            write_sound(path, tone(RATE, 6.0), RATE, codec={".wav": "pcm_s16le", ".mp3": "libmp3lame"}[path.suffix])
        elif path.suffix == ".txt":
            path.write_text("a man speaks\na man laughs\n")
        elif path.suffix in (".gguf", ".safetensors"):
            path.write_bytes(b"GGUF")
    for flag, value in zip(arguments, arguments[1:]):
        if flag in ("--ckpt_dir", "--dit") and value.startswith(".") and not Path(value).is_file():
            Path(value).mkdir(parents=True, exist_ok=True)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_python_runs(page, folder):
    for block in blocks(page, "python"):
        exec(compile(block, page, "exec"), {})


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python", "checkpoint")])
def test_python_that_needs_a_checkpoint_names_what_exists(page):
    for node in (node for block in blocks(page, "python", "checkpoint") for node in ast.walk(ast.parse(block))):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            assert all(hasattr(module, name.name) for name in node.names)
        if isinstance(node, ast.Call) and (called := ast.unparse(node.func)) in ("Engine", "engine.generate"):
            part = "load" if called == "Engine" else "sample"
            assert {PART_OF[word.arg] for word in node.keywords} == {part}


def test_commands_within_sentences_exist():
    prose = re.sub(r"^```[\s\S]*?^```", "", TEXT, flags=re.M).replace("\n", " ")
    for code in re.findall(r"`((?:python|torchrun|make) [^`]+)`", prose):
        words = [word for word in code.split() if word != "..."]
        if words[0] == "make":
            assert f"\n{words[1]}:" in (REPO / "Makefile").read_text()
        elif words[0] == "python":
            name, arguments, _ = program(words)
            assert name == "generate.py" or find_spec(name), name
            assert {word for word in arguments if word.startswith("-")} <= flags_of(name) | {"--help"}, code


def test_every_block_says_what_it_is():
    kinds = {kind for kind in re.findall(r"^```(.+)$", TEXT, re.M)}
    assert kinds == {"bash", "bash checkpoint", "python", "python checkpoint", "yaml", "text"}


def test_every_flag_is_named_and_no_other():
    named = set(re.findall(r"(?<![\w-])--[a-zA-Z][\w-]*\b", TEXT))
    ours = FLAGS_OF["generate.py"] | FLAGS_OF["wan.convert"] | FLAGS_OF["wan.calibrate"] | FLAGS_OF["wan.cache.report"]
    ours |= FLAGS_OF["wan.prepare"] | FLAGS_OF["wan.batch"] | FLAGS_OF["wan.serve"]
    assert {flag for flag in ours if flag.startswith("--")} - named == set()
    known = (
        ours | FLAGS_OF["wan.compat.run_gguf_t2v"] | flags_of("benchmarks.tiny_world") | {"--nproc_per_node", "--gpus"}
    )
    known |= flags_of("benchmarks.gpu") | {"--head", "--address", "--disable-usage-stats"}  # of ray start
    assert named - known == set()


def test_readme_is_short_and_begins_with_two_commands():
    assert len(PAGES["README.md"].encode()) <= 7000
    assert [words[0] for words in commands("README.md")[:2]] == ["make", "make"]
    assert blocks("README.md", "bash")[0].count("\n") == 2


def test_readme_has_every_task_with_its_checkpoint_and_disk():
    rows = dict(re.findall(r"^\| `(\w[\w.-]+)` \|(.*)\|$", PAGES["README.md"], re.M))
    assert set(rows) == set(task_names())
    for task, row in rows.items():
        spec = load_task(task)
        assert all(hub.removeprefix("Wan-AI/Wan2.1-I2V-14B") in row for hub in spec.get("hub", ())), task
        count = parameters(spec)
        if "hub" not in spec:
            count.pop("wav2vec", None)  # of s2v-tiny a small one, which its files tell
        transformers = count["dit"] * (2 if "experts" in spec else 1)
        stored = 2 * (transformers + count["text"]) + 4 * (count["vae"] + count.get("wav2vec", 0))
        stored += 4.77e9 if "clip" in count else 0
        assert float(row.split("|")[2]) == pytest.approx(stored / 1e9, abs=0.6), task


@pytest.mark.parametrize("page", [*PAGES, "ARCHITECTURE.md", "CONTRIBUTING.md"])
def test_links_lead_somewhere(page):
    path = REPO / page if (REPO / page).exists() else REPO / "docs" / page
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        target, _, heading = link.partition("#")
        found = (path.parent / target) if target else path
        assert found.exists(), link
        if heading:
            titles = re.findall(r"^#+ (.*)$", found.read_text(encoding="utf-8"), re.M)
            assert heading in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles], link


def test_every_measured_figure_has_its_command_and_its_json():
    page = PAGES["measured.md"]
    results = {path.name for path in REPO.glob("benchmarks/results/cpu/*.json")}
    assert results <= set(re.findall(r"results/cpu/([\w.-]+\.json)", page))
    for section in page.split("\n## ")[1:]:
        assert "`python -m benchmarks." in section and "results/cpu/" in section, section
    for row in re.findall(r"^\| `python.*", page, re.M):
        assert "results/cpu/" in row, row


def test_every_page_is_linked_from_the_readme():
    assert {f"docs/{page}" for page in PAGES if page != "README.md"} <= set(
        re.findall(r"\]\(([^)#]+)", PAGES["README.md"])
    )
