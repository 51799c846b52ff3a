"""The house: who imports whom, what is public, what is optional, and what a source file may look like."""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted([*(ROOT / "clp_engine").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])

# Each row may import from itself and from the rows above it. A module that no row names fails: give it a place.
ORDER = (
    ("clp_kernels",),
    ("clp_engine.weighting", "clp_engine.config", "clp_engine.prompt_template", "clp_engine.extras"),
    (
        "clp_engine.conditioning",
        "clp_engine.layers",
        "clp_engine.targets",
        "clp_engine.collapsing",
        "clp_engine.storage",
        "clp_engine.packing",
        "clp_engine.generation",
        "clp_engine.continuous_batching",
        "clp_engine.model",
        "clp_engine.checkpoint",
        "clp_engine.pretrained",
        "clp_engine.peft_folder",
        "clp_engine.adapters",
        "clp_engine.finetuned",
        "clp_engine.sampling",
        "clp_engine.decoding",
        "clp_engine.rollout",
        "clp_engine.logprobs",
        "clp_engine.operator_shapes",
    ),
    ("clp_engine.rewards", "clp_engine.data"),
    ("clp_engine.training", "clp_engine.baselines", "clp_engine.evaluation"),
    ("clp_engine",),  # the package's own __init__: its public names
    ("clp_engine.demo",),
    ("clp_engine.cli",),
)
# Imported where they are used, inside functions. (triton: by its kernels' own file, which is itself imported so.)
OPTIONAL = (
    "datasets",
    "gguf",
    "matplotlib",
    "moocore",
    "nltk",
    "pandas",
    "peft",
    "rouge_score",
    "scipy",
    "trl",
    "yaml",
)


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[1:] if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Dotted names of what is imported anywhere below `tree`, `from a import b` as a.b, with line numbers."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def module_level_statements(tree: ast.Module) -> Iterator[ast.stmt]:
    """Statements that run at import: not those of functions, nor those under TYPE_CHECKING."""
    pending: list[ast.stmt] = list(tree.body)
    while pending:
        node = pending.pop(0)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        blocks = [getattr(node, field, []) for field in ("body", "orelse", "finalbody", "handlers")]
        nested = [child for block in blocks for child in block]
        if nested:
            pending += nested
        else:
            yield node


def place(module: str) -> int | None:
    """Row of ORDER that holds `module`: the longest name that is it or contains it."""
    rows = {name: row for row, group in enumerate(ORDER) for name in group}
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        name = ".".join(parts[:length])
        if name in rows and (name != "clp_engine" or length == len(parts)):
            return rows[name]
    return None


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_imports_run_one_way(path: Path) -> None:
    own = module_name(path)
    own_row = place(own)
    assert own_row is not None, f"{own} has no place in ORDER"
    modules = {module_name(source) for source in SOURCES}
    for name, line in imported_modules(ast.parse(path.read_text())):
        if name.split(".")[0] not in ("clp_engine", "clp_kernels"):
            continue
        imported = name if name in modules else name.rpartition(".")[0]
        row = place(imported or name)
        assert row is not None, f"{own}:{line} imports {name}, which has no place in ORDER"
        assert row <= own_row, f"{own}:{line} imports {name}, which stands above it"


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_optional_packages_are_not_imported_at_module_level(path: Path) -> None:
    statements = list(module_level_statements(ast.parse(path.read_text())))
    imported = {name.split(".")[0] for statement in statements for name, _ in imported_modules(statement)}
    assert not imported & set(OPTIONAL)


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_triton_is_spelled_in_kernel_files_only(path: Path) -> None:
    imported = {name.split(".")[0] for name, _ in imported_modules(ast.parse(path.read_text()))}
    assert "triton" not in imported or re.search(r"_triton(_kernels)?$", module_name(path)), path


def test_the_kernels_folder_is_no_package() -> None:
    # A top-level package named `kernels` would hide Hugging Face's, which transformers imports.
    assert not (ROOT / "kernels" / "__init__.py").exists()


PUBLIC = {
    "clp_engine": ["CLPConfig", "CLPModel", "CLPTrainer", "CLPTrainingConfig", "evaluation", "get_clp_model"],
    "clp_engine.evaluation": ["Front", "hypervolume", "plot_fronts", "sweep"],
    "clp_engine.rewards": ["Brevity", "Closeness", "RougeL", "resolve", "score"],
    "clp_engine.training": ["CLPTrainer", "CLPTrainingConfig"],
    "clp_kernels": [
        *("available_backends", "backend", "backend_for", "mixed_linear", "mixed_linear_ref"),
        *("mixed_embedding", "mixed_embedding_ref", "mixed_norm", "mixed_norm_ref"),
        *("Projection", "mixed_qkv", "mixed_qkv_ref"),
    ],
}
SIGNATURES = {
    ("clp_kernels", "mixed_linear"): (
        "x base deltas coefficients bias=None * bias_deltas=None row_map=None backend=None batch_invariant=False",
    ),
    ("clp_kernels", "mixed_embedding"): ("ids base deltas coefficients * row_map=None padding_idx=None backend=None",),
    ("clp_kernels", "mixed_norm"): (
        "x weight weight_deltas coefficients bias=None * bias_deltas=None row_map=None eps=1e-06 kind=rms offset=0.0 "
        "cast_before_scale=False backend=None",
    ),
    ("clp_kernels", "mixed_qkv"): (
        "x norm_weight q k v coefficients cos sin * q_norm=None k_norm=None eps=1e-06 row_map=None backend=None "
        "batch_invariant=False",
    ),
    ("clp_engine", "get_clp_model"): ("model config",),
    ("clp_engine.evaluation", "sweep"): (
        "model eval_ds reward_funcs processing_class=None grid=11 kl_weights=None num_generations=1 "
        "max_completion_length=64 batch_size=32 do_sample=False seed=0",
    ),
}


@pytest.mark.parametrize(("module", "name"), [(module, name) for module, names in PUBLIC.items() for name in names])
def test_public_names(module: str, name: str) -> None:
    imported = __import__(module, fromlist=["_"])
    assert name in imported.__all__
    assert getattr(imported, name) is not None


@pytest.mark.parametrize(("module", "name"), SIGNATURES)
def test_public_signatures(module: str, name: str) -> None:
    import inspect

    function = getattr(__import__(module, fromlist=["_"]), name)
    words = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in words:
            words.append("*")
        has_default = parameter.default is not parameter.empty
        words.append(f"{parameter.name}={parameter.default}" if has_default else parameter.name)
    (expected,) = SIGNATURES[module, name]
    assert " ".join(words).startswith(expected)


def test_config_fields() -> None:
    import dataclasses

    from clp_engine import CLPConfig

    assert [field.name for field in dataclasses.fields(CLPConfig)][:8] == [
        "rewards",
        "variant",
        "target_modules",
        "parameterization",
        "train_shared",
        "min_kl_weight",
        "weight_domain",
        "default_reward_weights",
    ]


# Hides distributions' packages from a new interpreter, as if they were not installed: those in HIDDEN at the time.
HIDE = """
import sys
from importlib.machinery import PathFinder
HIDDEN = {hidden!r}
find_spec = PathFinder.find_spec
def find_unless_hidden(cls, name, path=None, target=None):
    return None if name.split(".")[0] in HIDDEN else find_spec(name, path, target)
PathFinder.find_spec = classmethod(find_unless_hidden)
"""
OPTIONAL_USE = {
    "matplotlib": ("eval", "clp_engine.evaluation.plot_fronts({'clp': FRONT}, 'front.png')"),
    "moocore": ("eval", "FRONT.hypervolume(ref=[0, 0], unit=[1, 1])"),
    "rouge_score": ("eval", "clp_engine.rewards.RougeL()"),
    "datasets": ("train", "clp_engine.data.load_dataset_rows('owner/name')"),
    "gguf": ("demo", "clp_engine.data.smollm2.convert_gguf(Path('model.gguf'), Path('folder'))"),
}
# One interpreter, which takes seconds to import: all of them are hidden then, and at each use its own package alone.
USE = """
import json
from pathlib import Path
import numpy as np
import clp_engine, clp_engine.data.smollm2, clp_engine.evaluation, clp_engine.rewards, clp_engine.training
samples = []
FRONT = clp_engine.evaluation.Front(
    reward_names=["a", "b"], reward_weights=np.eye(2), kl_weights=None, rewards=np.array([[1.0, 0.5], [0.5, 1.0]]),
    samples=samples, measures=[{{}}, {{}}], base=None, seconds=0.0)
errors = {{}}
for package, use in {uses!r}.items():
    assert package not in sys.modules, package
    HIDDEN[:] = [package]
    try:
        eval(use)
    except ImportError as error:
        errors[package] = str(error)
print(json.dumps(errors))
"""


def run_python(code: str, folder: Path) -> str:
    path = [str(ROOT), str(ROOT / "kernels")]
    result = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {path!r}\n{code}"],
        capture_output=True,
        text=True,
        cwd=folder,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def errors_of_missing_extras(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    code = HIDE.format(hidden=list(OPTIONAL_USE))
    code += USE.format(uses={package: use for package, (_, use) in OPTIONAL_USE.items()})
    return json.loads(run_python(code, tmp_path_factory.mktemp("missing")))


@pytest.mark.parametrize("package", OPTIONAL_USE)
def test_a_missing_extra_is_named_at_its_use(package: str, errors_of_missing_extras: dict[str, str]) -> None:
    extra, _ = OPTIONAL_USE[package]
    assert f'pip install "clp_engine[{extra}]"' in errors_of_missing_extras[package]


def test_everything_optional_may_be_missing(tmp_path: Path) -> None:
    code = HIDE.format(hidden=[*OPTIONAL[:-1], "triton"])
    output = run_python(
        code + "import clp_engine\nfrom clp_engine import *\nimport clp_engine.demo, clp_kernels\nprint('imported')",
        tmp_path,
    )
    assert output.strip() == "imported"


def test_the_kernels_import_no_compiler(tmp_path: Path) -> None:
    for package in ("clp_kernels", "clp_engine.model"):
        output = run_python(f"import {package}\nprint({{'triton', 'torch._dynamo'}} & set(sys.modules))", tmp_path)
        assert output.strip() == "set()", package


TEXT = sorted(
    path
    for pattern in ("clp_engine/**/*", "kernels/**/*", "csrc/*", "tests/**/*", "bench/**/*", ".ci/*", "*")
    for path in ROOT.glob(pattern)
    if path.is_file()
    and (
        path.suffix in {".py", ".cpp", ".cu", ".h", ".cuh", ".sh", ".md", ".toml", ".txt"} or path.parent.name == ".ci"
    )
    and "build" not in path.relative_to(ROOT).parts
)


@pytest.mark.parametrize("path", TEXT, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_short_and_ascii(path: Path) -> None:
    text = path.read_bytes().decode("utf-8")
    assert text.isascii(), f"not ASCII: {sorted({character for character in text if not character.isascii()})}"
    assert text.count("\n") <= 400
    if path.suffix in (".py", ".cpp", ".cu", ".h", ".cuh"):
        assert path.stem not in ("utils", "util", "helpers", "common", "misc", "manager", "base")


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_no_exception_is_swallowed_whole(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type is not None else ""
            assert caught not in ("", "Exception", "BaseException"), f"{path}:{node.lineno}"
