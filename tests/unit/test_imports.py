"""The order of imports, and what a module may not do: see ARCHITECTURE.md."""

import ast
import functools
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
BESIDE = ("cache", "distributed")  # folders whose modules are those of wan.cache and wan.distributed

# A module imports from its own layer or from those before it.
LAYERS = [
    ("wan", "wan.errors", "wan.files", "wan.finite", "wan.kernels", "wan.cache", "wan.distributed"),
    ("wan.tasks", "wan.pictures", "wan.media", "wan.video", "wan.audio", "wan.command"),
    ("wan.quant", "wan.weights"),
    ("wan.memory",),
    ("wan.models",),
    ("wan.solvers", "wan.conditioning"),
    ("wan.tasks.kind", "wan.tasks.kinds", "wan.tasks.image", "wan.tasks.latent", "wan.tasks.vace")
    + ("wan.tasks.s2v", "wan.tasks.animate"),
    ("wan.denoise", "wan.options", "wan.plan"),
    ("wan.memory.experts", "wan.memory.residency", "wan.file_checks", "wan.stage_checks"),
    ("wan.pipeline", "wan.dry_run", "wan.preview", "wan.prompt_extend"),
    ("wan.engine", "wan.unfinished"),
    ("wan.engines",),
    ("wan.cli", "wan.convert", "wan.compat", "wan.calibrate", "wan.prepare", "wan.__main__"),
    ("wan.batch", "wan.serve", "wan.remote"),
    ("generate",),
]


def module_name(path):
    parts = path.relative_to(REPO).with_suffix("").parts
    parts = ("wan", *parts) if parts[0] in BESIDE else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for package in ("wan", *BESIDE) for path in sorted((REPO / package).rglob("*.py"))}
FILES["generate"] = REPO / "generate.py"


@functools.cache
def tree_of(module):
    return ast.parse(FILES[module].read_text(encoding="utf-8"), str(FILES[module]))


def layer(module):
    """Index of the layer that lists the module or, failing that, the longest listed parent (the root's only itself)."""
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        parent = ".".join(parts[:length])
        if parent == "wan" and length < len(parts):
            break
        for index, members in enumerate(LAYERS):
            if parent in members:
                return index
    pytest.fail(f"{module} is in no layer: add it to LAYERS and to ARCHITECTURE.md")


def own_imports(module, nodes):
    """Modules of this repository imported by `nodes`, as (module, line)."""
    for node in nodes:
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = [] if node.level == 0 else package_of(module).split(".")
            base = base[: len(base) - node.level + 1] + ([node.module] if node.module else [])
            parent = ".".join(base)
            # `from wan import media` imports a module, `from wan import __version__` the package
            names = [f"{parent}.{a.name}" if f"{parent}.{a.name}" in FILES else parent for a in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] in ("wan", "generate"):
                yield name, node.lineno


def package_of(module):
    return module if FILES[module].name == "__init__.py" else module.rpartition(".")[0]


@pytest.mark.parametrize("module", FILES)
def test_imports_go_to_the_left(module):
    for imported, line in own_imports(module, ast.walk(tree_of(module))):
        assert layer(imported) <= layer(module), f"{FILES[module].name}:{line} imports {imported}"


def test_cache_and_distributed_know_nothing_of_wan():
    for module, tree in zip(FILES, map(tree_of, FILES)):
        root = ".".join(module.split(".")[:2])
        if root in ("wan.cache", "wan.distributed"):
            assert {".".join(name.split(".")[:2]) for name, _ in own_imports(module, ast.walk(tree))} <= {root}, module


def test_no_cycles_at_import():
    graph = {
        module: {name for name, _ in own_imports(module, tree.body) if name != module and name in FILES}
        for module, tree in zip(FILES, map(tree_of, FILES))
    }
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError


@pytest.mark.parametrize("module", FILES)
def test_nothing_is_patched(module):
    """Nothing assigns to `.forward`, by `=` or by `setattr`."""
    for node in ast.walk(tree_of(module)):
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        if isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
            targets = [leaf for target in targets for leaf in ast.walk(target)]
            assert not any(isinstance(leaf, ast.Attribute) and leaf.attr == "forward" for leaf in targets), node.lineno
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "setattr":
            name = node.args[1]
            assert not (isinstance(name, ast.Constant) and name.value == "forward"), node.lineno


@pytest.mark.parametrize("module", FILES)
def test_optional_packages_are_not_needed(module):
    """What only some machines have is imported inside functions; diffusers, the peer, nowhere. So are modules named
    `triton`, which need it."""
    optional = {"flash_attn", "flash_attn_interface", "sageattention", "triton", "xformers", "ray"}
    if module.rpartition(".")[2] != "triton":
        assert not imported_roots(tree_of(module).body) & optional
    assert not any(name.endswith(".triton") for name, _ in own_imports(module, tree_of(module).body))
    assert "diffusers" not in imported_roots(ast.walk(tree_of(module)))


def test_the_page_of_a_server_is_imported_where_it_is_asked_for():
    """Without --web nothing needs gradio."""
    for module, tree in zip(FILES, map(tree_of, FILES)):
        if not module.startswith("wan.serve.web"):
            assert not any(name.startswith("wan.serve.web") for name, _ in own_imports(module, tree.body)), module
            assert "gradio" not in imported_roots(ast.walk(tree)), module


def imported_roots(nodes):
    roots = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            roots.add(node.module.split(".")[0])
    return roots


@pytest.mark.parametrize(
    "module",
    [
        "wan",
        "wan.cli",
        "wan.convert",
        "wan.serve.__main__",
        "wan.serve.app",
        "wan.batch.__main__",
        "wan.batch.pool",
        "wan.remote.seat",
        "wan.prepare",
        "wan.compat",
        "wan.compat.lightx2v",
        "wan.compat.run_gguf_t2v",
        "wan.options",
        "wan.tasks",
        "wan.weights.locate",
        "wan.weights.infer_task",
        "wan.cache",
        "generate",
    ],
)
def test_import_is_cheap(module):
    code = f"import sys, {module}; print(*({{'torch', 'numpy', 'transformers', 'cv2', 'ray'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
