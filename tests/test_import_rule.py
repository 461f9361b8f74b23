"""The one-way street of the architecture: a package imports only from its left; heavy libraries stay at home."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]

# Every folder of the library, and the two files beside them; `label` and `evaluate` stand side by side.
ORDER = (
    *(
        ("errors", "version"),
        ("ops",),
        ("data",),
        ("encoders", "visualize"),
        ("checkpoints",),
        ("segment",),
        ("label", "evaluate"),
    ),
    *(("students",), ("distill",), ("export", "deploy"), ("web",), ("cli",)),
)
RANKS = {name: rank for rank, names in enumerate(ORDER) for name in names}
TOP = len(ORDER)  # the package's own __init__, run.py and experiments: they may import everything
HEAVY = {"optax", "orbax", "tensorflow_datasets", "tensorflow", "torch", "transformers", "grain"}


class Import(NamedTuple):
    name: str  # absolute and dotted; `from a import b` counts as a.b
    line: int
    lazy: bool  # inside a function: runs only when called


def imports(source: str, module: str, *, is_package: bool) -> Iterator[Import]:
    """Every import statement of a module, wherever it stands; TYPE_CHECKING blocks count like any other."""

    def visit(node: ast.AST, lazy: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from (Import(alias.name, child.lineno, lazy) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = child.module or ""
                if child.level:
                    package = module.split(".") if is_package else module.split(".")[:-1]
                    above = package[: len(package) - child.level + 1]
                    base = ".".join([*above, base] if base else above)
                yield from (Import(f"{base}.{alias.name}", child.lineno, lazy) for alias in child.names)
            yield from visit(child, lazy or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))

    return visit(ast.parse(source), False)


def files() -> list[Path]:
    found = sorted((ROOT / "maskclip_jax").rglob("*.py"))
    assert len(found) > 10
    return found


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def rank(dotted: str) -> int:
    """Where a dotted name under maskclip_jax stands; the package itself (and what its __init__ exports) is on top."""
    parts = dotted.split(".")
    return RANKS.get(parts[1], TOP) if len(parts) > 1 else TOP


def imports_of(path: Path) -> list[Import]:
    return list(imports(path.read_text(encoding="utf-8"), module_of(path), is_package=path.name == "__init__.py"))


def rule_breaks(module: str, found: list[Import]) -> list[str]:
    own = [i for i in found if i.name == "maskclip_jax" or i.name.startswith("maskclip_jax.")]
    outside = [i for i in found if i.name.split(".")[0] in ("experiments", "run", "tests")]
    level = lambda name: (rank(name), name.split(".")[1] if rank(name) < TOP else "")  # noqa: E731
    higher = [i for i in own if level(i.name)[0] >= rank(module) and level(i.name) != level(module)]
    return [f"{module}:{i.line} imports {i.name}" for i in (*higher, *outside)]


@pytest.mark.parametrize("path", files(), ids=module_of)
def test_a_package_imports_only_from_its_left(path):
    assert rule_breaks(module_of(path), imports_of(path)) == []


def circles(graph: dict[str, set[str]]) -> set[str]:
    """The modules of a graph that lie on a circle, or between two."""
    while ends := {m for m, needed in graph.items() if not needed} | (set(graph) - set().union(*graph.values())):
        graph = {module: needed - ends for module, needed in graph.items() if module not in ends}
    return set(graph)


def test_no_import_leads_back():
    """No module imports itself by way of others, not even inside a function."""
    modules = {module_of(path) for path in files()}

    def home(name: str) -> str:
        return name if name in modules or "." not in name else home(name.rpartition(".")[0])

    graph = {module_of(path): {home(i.name) for i in imports_of(path)} & modules for path in files()}
    assert not circles(graph)
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set()}) == {"b", "c"}


def test_errors_is_free():
    """Everything may import it, so it imports nothing."""
    assert imports_of(ROOT / "maskclip_jax" / "errors.py") == []


def test_every_folder_has_its_rank():
    top = {module_of(path).split(".")[1] for path in files() if module_of(path) != "maskclip_jax"}
    assert top == set(RANKS)


def test_the_rule_can_be_broken():
    def check(module, source, is_package=False):
        return rule_breaks(module, list(imports(source, module, is_package=is_package)))

    assert check("maskclip_jax.data.images", "from maskclip_jax.encoders import vit")
    assert check("maskclip_jax.data.images", "from ..encoders.vit import ViT")
    assert check("maskclip_jax.ops.conv", "from maskclip_jax.data.preprocess import prepare")
    assert check("maskclip_jax.encoders.vit", "def f():\n    import maskclip_jax.segment.refine")
    assert check("maskclip_jax.segment.refine", "from maskclip_jax import load_clip")
    assert check("maskclip_jax.evaluate.metrics", "import maskclip_jax.distill")
    assert check("maskclip_jax.evaluate.metrics", "import maskclip_jax.label.run")  # neighbours do not know each other
    assert check("maskclip_jax.web.session", "from maskclip_jax.cli.segment import run")
    assert check("maskclip_jax.distill.train", "import experiments.train_clip")
    assert check("maskclip_jax.encoders", "from ..segment import refine", is_package=True)
    assert not check("maskclip_jax.encoders", "from .vit import ViT", is_package=True)
    assert not check(
        "maskclip_jax.distill.train", "from maskclip_jax.evaluate import metrics\nfrom ..encoders import model"
    )
    assert not check("maskclip_jax.data.images", "from maskclip_jax.errors import UserError")


def heavy_imports(path: Path) -> set[tuple[str, bool]]:
    return {(i.name.split(".")[0], i.lazy) for i in imports_of(path) if i.name.split(".")[0] in HEAVY}


def test_orbax_has_one_home():
    """distill/checkpoint.py; and checkpoints/orbax_io.py inside functions, for `run.py convert`."""
    users = {(module_of(path), lazy) for path in files() for name, lazy in heavy_imports(path) if name == "orbax"}
    assert users <= {
        ("maskclip_jax.distill.checkpoint", False),
        ("maskclip_jax.distill.checkpoint", True),
        ("maskclip_jax.checkpoints.orbax_io", True),
    }


def test_training_free_code_imports_nothing_heavy_on_top():
    """TFDS and grain belong to the data sources, which are imported only by those who read a corpus."""
    for path in files():
        if rank(module_of(path)) == RANKS["distill"]:
            continue
        eager = {name for name, lazy in heavy_imports(path) if not lazy}
        allowed = {"tensorflow_datasets", "grain"} if module_of(path).startswith("maskclip_jax.data.") else set()
        assert eager <= allowed, f"{module_of(path)} imports {eager} at import time"


def _modules_after(code: str) -> set[str]:
    script = f"import sys\n{code}\nprint(' '.join(sorted(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return set(result.stdout.split())


def _loaded_after(code: str) -> set[str]:
    return {name.split(".")[0] for name in _modules_after(code)}


def test_a_reader_opens_few_files():
    """What `segment_images` and `load_clip` are made of; readers of one file format or another come when needed."""
    loaded = _modules_after("from maskclip_jax import segment_images, load_clip")
    ours = {name for name in loaded if name.split(".")[0] == "maskclip_jax"}
    assert 10 < len(ours) <= 30, sorted(ours)


def test_importing_the_package_is_light():
    loaded = _loaded_after("import maskclip_jax")
    assert "maskclip_jax" in loaded
    assert loaded & HEAVY == set()


def test_importing_all_training_free_code_is_light():
    names = [
        module_of(path)
        for path in files()
        if rank(module_of(path)) < RANKS["distill"]
        and not {name for name, lazy in heavy_imports(path) if not lazy}  # the data sources
    ]
    assert "maskclip_jax.evaluate.metrics" in names
    loaded = _loaded_after("\n".join(f"import {name}" for name in names))
    assert loaded & HEAVY == set()
