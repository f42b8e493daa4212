"""Imports go one way, and private PyTorch API stays in one file: read from the source."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fp8compile

PACKAGE = Path(fp8compile.__file__).parent
# Each module may import from layers below its own; within a layer, see ALLOWED_SIBLINGS.
LAYERS = (
    {"errors", "formats", "histogram", "progress"},
    {"arguments", "recipe", "cost"},
    {"ops", "attention", "internals"},
    {"observers", "profiles", "untouched", "read_only"},
    {"ir", "modules", "options", "pretrained"},
    {"scaling", "dump", "report", "regions", "moments", "rounding", "edge_records", "verify"},
    {"states"},
    {"frozen", "named_state", "static", "quantized_weights"},
    {"records", "compiled_graph", "observer", "checkpoints"},
    {"passes", "backends"},
    {"compile"},
    {"explanation", "profiling", "doctor", "viewer"},
    {"calibration", "monitoring"},
    {"cli"},
    {"__main__"},
)
# PyTorch's underscored names that are used outside of internals.py on purpose.
TOLERATED = {
    "torch._ops.OpOverload",  # the type of torch.ops.x.y.default, for isinstance
    "torch._ops.HigherOrderOperator",
    "torch._C._nn.linear",  # what F.linear is, when Dynamo looks through it
    "torch.utils._pytree.tree_leaves",
    "torch.utils._pytree.tree_map",
    "torch.utils._pytree.tree_map_only",
    "torch.autograd._unsafe_preserve_version_counter",
    "torch._inductor.list_options",
    "torch._inductor.list_mode_options",
    "torch._scaled_mm",  # cuBLASLt's FP8 GEMM has no public name before F.scaled_mm
}


def sources() -> dict[str, Path]:
    """Module name -> file, without the package itself; links are followed."""
    found = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = list(file.relative_to(PACKAGE).with_suffix("").parts)
        if parts[-1] == "__init__":
            parts.pop()
        if parts:
            found[".".join(parts)] = file
    for folder in ("passes", "backends"):
        for file in sorted((PACKAGE / folder).rglob("*.py")):
            parts = [folder, *file.relative_to(PACKAGE / folder).with_suffix("").parts]
            found[".".join(p for p in parts if p != "__init__")] = file
    return found


def layer_of(module: str) -> int:
    top = module.split(".")[0]
    return next(i for i, layer in enumerate(LAYERS) if top in layer)


def own_imports(module: str, file: Path) -> Iterator[str]:
    """The modules of this package that a file imports, by name inside the package."""
    package = module.split(".") if file.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            if node.module:
                yield ".".join([*base, node.module])
            else:
                yield from (".".join([*base, alias.name]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fp8compile"):
            yield str(node.module).removeprefix("fp8compile").lstrip(".")
        elif isinstance(node, ast.Import):
            own = [a.name for a in node.names if a.name.split(".")[0] == "fp8compile"]
            yield from (name.removeprefix("fp8compile.") for name in own)


def private_uses(tree: ast.AST) -> Iterator[str]:
    """Every name below ``torch`` with an underscored part, imported or reached by attributes."""
    inner = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.Attribute) and id(node) not in inner:
            names = [ast.unparse(node)]
        for name in names:
            first, *rest = name.split(".")
            if first == "torch" and any(p.startswith("_") and not p.endswith("__") for p in rest):
                yield name


MODULES = sources()


def test_every_module_has_a_layer() -> None:
    assert {module.split(".")[0] for module in MODULES} == set().union(*LAYERS)
    assert len(MODULES) > 20


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_one_way(module: str) -> None:
    own = module.split(".")[0]
    for imported in own_imports(module, MODULES[module]):
        top = imported.split(".")[0]
        if top != own:
            assert layer_of(imported) < layer_of(module), f"{module} imports {imported}"


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"internals"}))
def test_private_torch_api_stays_in_internals(module: str) -> None:
    found = set(private_uses(ast.parse(MODULES[module].read_text()))) - TOLERATED
    assert not found, f"{module} uses {sorted(found)}"


def test_what_is_tolerated_is_used() -> None:
    trees = [ast.parse(file.read_text()) for file in MODULES.values()]
    assert set().union(*(set(private_uses(tree)) for tree in trees)) >= TOLERATED


def test_the_check_sees_private_uses() -> None:
    code = "from torch._inductor import config\nimport torch._dynamo\ntorch.a._b.c(torch.d)"
    assert set(private_uses(ast.parse(code))) == {
        "torch._inductor.config",
        "torch._dynamo",
        "torch.a._b.c",
    }


@pytest.mark.parametrize("module", MODULES)
def test_every_module_has_a_docstring_and_annotations(module: str) -> None:
    tree = ast.parse(MODULES[module].read_text())
    assert ast.get_docstring(tree), module
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and not _is_kernel(node):
            assert node.returns is not None, f"{module}.{node.name} has no return annotation"


def _is_kernel(node: ast.FunctionDef) -> bool:
    return any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)


def test_only_known_packages_are_imported() -> None:
    always = {"torch", "triton", "networkx", "sympy", "numpy", "rich", "safetensors", "fp8compile"}
    optional = {"monitoring.plots": {"matplotlib"}}
    for module, file in MODULES.items():
        known = always | optional.get(module, set())
        for node in ast.walk(ast.parse(file.read_text())):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [str(node.module)]
            for name in (name.split(".")[0] for name in names):
                assert name in known or name in sys.stdlib_module_names, f"{module}: {name}"
