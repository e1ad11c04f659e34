"""The layout keeps its promises: one-way imports, a light package, files that stay readable."""

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "wmss_jax"

# From the bottom up. A module imports only from layers below its own, and within a layer only where "+" says so.
LAYERS = [
    ["precision", "matmul", "yamlfile", "storage", "durable", "sources", "hlo"],
    ["digests", "weak_config", "training_config"],
    ["stage_config"],
    ["objectives.tokens"],
    ["objectives.mixing", "objectives.likelihood", "objectives.distillation"],
    ["objectives.controls"],
    ["config", "objectives", "curriculum", "packing", "sharding", "hardware", "intervals"],
    ["attention.blockwise", "attention.splash", "attention.triton"],
    ["attention", "optim", "epochs", "diagnostics"],
    ["head", "sampling"],
    ["models.table", "models.rope", "models.multimodal"],
    ["models.lora", "models.hf_config", "models.architecture"],
    ["models.layers"],
    ["models.decoder"],
    ["models.gemma2", "models.gemma3", "models.llama", "models.olmo2", "models.phi3"],
    ["models.mistral", "models.qwen2", "models.qwen3", "models.qwen3_moe", "models.smollm3"],
    ["models"],
    ["flops", "decoding", "weak_source", "neftune", "train_state"],
    ["arms"],
    ["step"],
    ["processes", "watchdog", "compilation", "tensorfile", "tracking", "tokenizer", "examples", "topologies", "card"],
    ["preemption", "streaming", "chat_template", "commit", "evals.sandbox", "evals.inside"],
    ["hf", "encoding", "generate", "evals.graders", "evals.statistics", "evals.killable", "evals.symbolic"],
    ["endings", "evals.catalog"],
    ["evals.questions"],
    ["evals.grading"],
    ["checkpoint", "data", "evals.run", "evals.harness", "peft", "pools"],
    ["roles", "weak_cache"],
    ["programs"],
    ["plan"],
    ["plan_search"],
    ["evals", "inspection", "train", "scoring", "stages"],
    ["agents", "answers", "convert", "evals.command"],
    ["runs"],
    ["selection", "export", "evals.tasks"],
    ["jobs"],
    ["pipeline"],
    ["lab"],
    ["lab.problems", "lab.results"],
    ["lab.study"],
    ["lab.bench", "lab.table"],
    ["lab.workers"],
    ["lab.run"],
    ["demo"],
    ["cli"],
    ["__main__"],
]
CORE = {name for layer in LAYERS[: LAYERS.index(["step"]) + 1] for name in layer}
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}


def _modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
        if name != "__init__":
            yield name, path


MODULES = list(_modules())
each_module = pytest.mark.parametrize("name, path", MODULES, ids=[name for name, _ in MODULES])


def imported(path):
    """Names of this package's modules that a file imports anywhere, TYPE_CHECKING blocks left out."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(node) for test in ast.walk(tree) if isinstance(test, ast.If) and "TYPE_CHECKING" in ast.unparse(test.test)
        for node in ast.walk(test)
    }  # fmt: skip
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "wmss_jax":
            base = node.module.removeprefix("wmss_jax").lstrip(".")
            for alias in node.names:
                full = f"{base}.{alias.name}".lstrip(".")
                yield full if full in RANK else base
        elif isinstance(node, ast.Import):
            yield from (a.name.removeprefix("wmss_jax.") for a in node.names if a.name.startswith("wmss_jax."))


def test_every_module_has_its_place_in_the_order():
    assert {name for name, _ in MODULES} == set(RANK), "give a new module its row in LAYERS"


@each_module
def test_imports_go_one_way(name, path):
    upward = [other for other in imported(path) if other and RANK[other] >= RANK[name]]
    assert not upward, f"{name} imports {upward}, which is not below it"


@each_module
def test_core_does_no_input_or_output(name, path):
    if name in CORE - {"config", "yamlfile", "storage", "digests", "durable"}:
        tree = ast.parse(path.read_text())
        called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        modules = {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
        assert not called & {"open", "print"} and not modules & {"os", "pathlib", "subprocess", "io"}


def seconds(*command, runs=3):
    """Fastest wall time of a command, in seconds."""
    best = float("inf")
    for _ in range(runs):
        start = time.perf_counter()
        subprocess.run([sys.executable, *command], check=True, capture_output=True)
        best = min(best, time.perf_counter() - start)
    return best


def test_importing_the_package_is_light():
    code = "import sys, wmss_jax; assert not {'jax', 'numpy', 'transformers', 'pydantic'} & set(sys.modules)"
    assert seconds("-c", code) - seconds("-c", "pass") < 0.2


def test_public_names_exist():
    import wmss_jax

    for name in wmss_jax.__all__:
        assert getattr(wmss_jax, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = wmss_jax.nonsense
