"""The laws of the house: who may import what, what may never be used, what the docs may claim."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "vae_hyperband"

# from the ground floor to the roof: a room imports only rooms before it
FLOORS = [
    "errors", "files", "checks", "config", "randomness", "drawn", "idx", "data", "download",
    "layers", "likelihoods", "model", "objective",
    "features", "distances", "bounds", "checkpoint", "keeping", "process", "state", "tracking",
    "steps", "training", "dry_run",
    "search_config", "trials", "trained",
    "latents", "disentanglement", "flow", "samplers", "evaluation_config", "measuring",
    "evaluation", "study",
    "rules", "journal", "board", "watching", "storage", "cluster",
    "draws", "worker", "tuning", "search",
    "search_dry_run", "figures", "search_figures",
    "study_figures", "projector", "report", "animations", "html_page", "html_report",
    "sharing", "onnx_graph", "onnx_check", "explorer", "options", "completion", "comparing",
    "ckpt_commands", "export_command", "run_commands", "search_command", "study_command",
    "main_job", "train_vae",
    "beta_vae_tsb", "__init__",
]  # fmt: skip
#: rooms that may import a heavy or optional library
ALONE = {
    "ray": {"cluster", "draws", "worker", "tuning", "search"},
    "optuna": {"draws"},
    "pyarrow": {"storage"},
    "sklearn": {"latents", "disentanglement", "samplers"},
    "safetensors": {"features", "checkpoint", "sharing"},
    "onnx": {"onnx_graph"},
    "onnxruntime": {"onnx_check"},
    "tyro": {
        "options",
        "completion",
        "ckpt_commands",
        "export_command",
        "run_commands",
        "search_command",
        "study_command",
        "train_vae",
    },
    "matplotlib": {"figures", "search_figures", "study_figures"},
    "tensorboard": {"tracking", "animations"},
    "PIL": {"animations", "html_page", "projector"},
}


def imports(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [node.module]
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def test_every_room_is_on_the_plan():
    assert sorted(path.stem for path in PACKAGE.glob("*.py")) == sorted(FLOORS)


@pytest.mark.parametrize("room", FLOORS)
def test_imports_run_one_way(room):
    below = FLOORS[: FLOORS.index(room)]
    for name in imports(PACKAGE / f"{room}.py"):
        parts = name.split(".")
        if parts[0] == "vae_hyperband" and len(parts) > 1 and parts[1] in FLOORS:
            assert parts[1] in below, f"{room} imports {parts[1]}"
        library = "tensorboard" if name.startswith("torch.utils.tensorboard") else parts[0]
        assert room in ALONE.get(library, {room}), f"{room} imports {library}"


def test_the_training_core_needs_only_torch_numpy_and_tensorboard():
    script = (
        "import sys\n"
        "names = 'ray tyro matplotlib pandas optuna pyarrow sklearn safetensors'\n"
        "for name in names.split(): sys.modules[name] = None\n"
        "import vae_hyperband\n"
        "import vae_hyperband.training\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=lambda path: path.stem)
def test_nothing_on_a_load_path_runs_code(path):
    tree = ast.parse(path.read_text())
    assert not {"pickle", "dill", "marshal", "shelve", "yaml"} & set(imports(path))
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            assert name not in ("eval", "exec", "os.system", "__import__"), name
            for keyword in node.keywords:
                assert keyword.arg != "shell"
                if name == "torch.load" and keyword.arg == "weights_only":
                    assert ast.unparse(keyword.value) == "True"
            if name == "torch.load":
                assert "weights_only" in [keyword.arg for keyword in node.keywords]


def test_rooms_stay_small_enough_to_read():
    lines = {path.name: len(path.read_text().splitlines()) for path in PACKAGE.glob("*.py")}
    too_long = {name: count for name, count in lines.items() if count > 300}
    assert not too_long


def test_the_package_and_its_constraints_name_the_same_version():
    import vae_hyperband

    pyproject = (ROOT / "pyproject.toml").read_text()
    assert f'version = "{vae_hyperband.__version__}"' in pyproject
    constraints = (ROOT / "constraints.txt").read_text()
    assert "torch==2.13.0\n" in constraints
    assert "torchvision" not in re.sub(r"#.*", "", constraints)


def test_the_slurm_script_is_valid_shell():
    subprocess.run(["bash", "-n", PACKAGE / "slurm_job.sh"], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", PACKAGE / "slurm_job.sh"], check=True)
