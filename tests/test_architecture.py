"""The plan of the package: who may import what, how large a file may be, what may never be used."""

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "vae_hyperband"

#: In order: a wing imports only wings before it.
WINGS = [
    "common", "data", "model", "evaluation", "training", "search", "tune", "reporting", "export",
    "commands",
]  # fmt: skip
#: Files of the package itself, which may import everything.
ROOT_FILES = {"__init__", "__main__", "train_vae", "beta_vae_tsb"}

#: Which wing, or which files of one, may import a heavy or optional library.
ONLY_IN = {
    "ray": {"tune"},
    "tyro": {"commands"},
    "optuna": {"search/suggest", "search/optuna_study"},
    "pyarrow": {"tune/storage", "data/sources", "commands/evaluate"},
    "sklearn": {"evaluation/latents", "evaluation/samplers"},
    "scipy": {"training/study"},
    "safetensors": {"evaluation/features", "model/checkpoint", "export/hub"},
    "onnx": {"export/onnx_export"},
    "onnxruntime": {"export/onnx_export"},
    "onnxscript": {"export/onnx_export"},
    "matplotlib": {"reporting/figures", "reporting/search_figure"},
    "tensorboard": {"training/tracker"},
    "PIL": {
        "data/pictures",
        "training/tracker",
        "training/tracking",
        "reporting/animations",
        "reporting/page",
    },
    "jinja2": {"reporting/page"},
    "huggingface_hub": {"model/checkpoint", "export/hub"},
    "wandb": {"training/tracking"},
    "mlflow": {"training/tracking"},
    "trackio": {"training/tracking"},
}

MAX_FILES, MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_PARAMETERS = 10, 500, 60, 6

#: Functions that may be longer or take more, each with its reason.
EXCEPTIONS = {
    "data/batches.get_dataloader": "a public name of the mission; keywords with defaults",
    "model/vae.__init__": "what a model consists of; keywords with defaults",
    "evaluation/bounds.eval_epoch": "a public name of the mission; keywords with defaults",
}

MODULES = {
    path.relative_to(PACKAGE).with_suffix("").as_posix(): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
TREES = {module: ast.parse(path.read_text()) for module, path in MODULES.items()}


def wing_of(module: str) -> str:
    return module.split("/")[0] if "/" in module else ""


def imports(module: str) -> Iterator[str]:
    """Dotted names of what a module imports, those inside of functions included."""
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(module: str) -> set[str]:
    """Which modules of the package a module imports, as keys of :data:`MODULES`."""
    names = {name.replace(".", "/") for name in imports(module)}
    own = {name.removeprefix("vae_hyperband/") for name in names if "vae_hyperband/" in name}
    return own & set(MODULES)


def test_every_file_lies_in_a_wing_of_the_plan():
    assert {wing_of(module) for module in MODULES} == {"", *WINGS}
    assert {module for module in MODULES if not wing_of(module)} == ROOT_FILES
    assert len(MODULES) > 50
    for wing in WINGS:
        files = [m for m in MODULES if wing_of(m) == wing and not m.endswith("__init__")]
        assert 0 < len(files) <= MAX_FILES, files


@pytest.mark.parametrize("module", [module for module in MODULES if wing_of(module)])
def test_imports_run_one_way(module):
    allowed = WINGS[: WINGS.index(wing_of(module)) + 1]
    for other in own_imports(module):
        assert wing_of(other) in allowed, f"{module} imports {other}"


@pytest.mark.parametrize("wing", WINGS)
def test_no_circle_within_a_wing(wing):
    left = {m: {o for o in own_imports(m) if wing_of(o) == wing} for m in MODULES}
    left = {m: others for m, others in left.items() if wing_of(m) == wing}
    while left:
        free = [m for m, others in left.items() if not others & set(left)]
        assert free, f"these import each other: {sorted(left)}"
        for module in free:
            del left[module]


@pytest.mark.parametrize("library", ONLY_IN)
def test_heavy_libraries_are_imported_where_the_plan_says(library):
    found = set()
    for module in MODULES:
        names = [name.replace("torch.utils.tensorboard", "tensorboard") for name in imports(module)]
        if any(name.split(".")[0] == library for name in names):
            found.add(module if module in ONLY_IN[library] else wing_of(module))
    assert found == ONLY_IN[library]  # nor is anything allowed that does not exist


def functions() -> Iterator[tuple[str, int, int]]:
    """``module.function``, its lines and its parameters."""
    for module, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                given = node.args
                names = [a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
                count = len([name for name in names if name not in ("self", "cls", "ctx")])
                yield f"{module}.{node.name}", node.end_lineno - node.lineno + 1, count


def test_files_and_functions_stay_small_enough_to_read():
    lines = {module: len(path.read_text().splitlines()) for module, path in MODULES.items()}
    assert {module: num for module, num in lines.items() if num > MAX_FILE_LINES} == {}
    large = {
        name: (lines, parameters)
        for name, lines, parameters in functions()
        if lines > MAX_FUNCTION_LINES or parameters > MAX_PARAMETERS
    }
    assert {name: size for name, size in large.items() if name not in EXCEPTIONS} == {}
    assert set(EXCEPTIONS) <= set(large), "an exception that is none"


def test_the_training_core_needs_only_torch_numpy_and_tensorboard():
    script = (
        "import sys\n"
        "names = 'ray tyro matplotlib pandas optuna pyarrow sklearn safetensors PIL'\n"
        "for name in names.split(): sys.modules[name] = None\n"
        "import vae_hyperband\n"
        "import vae_hyperband.training.loop\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize(
    "words",
    ["--help", "--version", "slurm", "train --help", "search --help", "train --epochs few"],
)
def test_what_computes_nothing_starts_without_the_libraries_that_compute(words):
    """PyTorch takes more than a second to import."""
    script = (
        "import sys\n"
        "from vae_hyperband.train_vae import main\n"
        "try: status = main(sys.argv[1:])\n"
        "except SystemExit: status = 0\n"
        "assert not {'torch', 'sklearn', 'ray', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(status)\n"
    )
    command = [sys.executable, "-c", script, *words.split()]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == (2 if "few" in words else 0), done.stderr


@pytest.mark.parametrize("module", MODULES)
def test_nothing_on_a_load_path_runs_code(module):
    assert not {"pickle", "dill", "marshal", "shelve", "yaml"} & set(imports(module))
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            assert name not in ("eval", "exec", "os.system", "__import__"), name
            for keyword in node.keywords:
                assert keyword.arg != "shell"
                if name == "torch.load" and keyword.arg == "weights_only":
                    assert ast.unparse(keyword.value) == "True"
            if name == "torch.load":
                assert "weights_only" in [keyword.arg for keyword in node.keywords]


@pytest.mark.parametrize("module", MODULES)
def test_files_of_text_have_the_same_encoding_on_every_system(module):
    for node in ast.walk(TREES[module]):
        if not isinstance(node, ast.Call):
            continue
        method = isinstance(node.func, ast.Attribute)
        name = node.func.attr if method else ast.unparse(node.func)
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        if name == "open":
            modes = [*node.args[1 - method : 2 - method], ast.Constant("r")]
            mode = ast.unparse(given.get("mode", modes[0])).strip("'")
            text = re.fullmatch(r"[rwax]\+?t?", mode)  # not what archives and images open
        else:
            text = method and name in ("read_text", "write_text")
        assert not text or "encoding" in given, f"{module}, line {node.lineno}: no encoding"


def test_the_constraints_name_the_tested_pytorch():
    constraints = (ROOT / "constraints.txt").read_text()
    assert "torch==2.13.0\n" in constraints
    assert "torchvision" not in re.sub(r"#.*", "", constraints)


def test_the_slurm_script_is_valid_shell():
    subprocess.run(["bash", "-n", PACKAGE / "slurm_job.sh"], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", PACKAGE / "slurm_job.sh"], check=True)
