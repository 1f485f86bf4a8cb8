"""Every command that takes a run takes its name and its paths alike."""

import json
import shutil

import pytest
from test_look import write_search

from vae_hyperband.commands.options import find_ckpt, find_run
from vae_hyperband.common.config import Folders, RunOptions, TrainConfig
from vae_hyperband.common.errors import CheckpointError, ConfigError
from vae_hyperband.train_vae import main
from vae_hyperband.training.loop import fit


@pytest.fixture(scope="module")
def trained(tmp_path_factory, small_data):
    """A working folder with two runs and a search."""
    folder = tmp_path_factory.mktemp("trained")
    folders = {"checkpoints_dir": folder / "checkpoints", "logs_dir": folder / "logs"}
    for name, beta in (("one", 1.0), ("two", 2.0)):
        config = TrainConfig(dataset="custom", latent_dim=2, batch_size=32, epochs=2, beta=beta)
        where = RunOptions(run=name, device="cpu", num_threads=1, data_dir=small_data, **folders)
        fit(config, where, quiet=True)
    write_search(folder / "checkpoints/s")
    return folder


@pytest.fixture
def work(trained, tmp_path, monkeypatch):
    """A copy of it, as the working folder."""
    shutil.copytree(trained, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


COMMANDS = {
    "evaluate": ["--parts", "likelihood", "--device", "cpu", "--json", "-"],
    "sample": ["--num-samples", "4", "--device", "cpu", "--out", "samples.npy"],
    "export": ["--format", "onnx", "--out", "shared"],
    "report": ["--out", "report.html"],
    "compare": ["two", "--json"],
    "animate": ["--kind", "training", "--out", "training.gif"],
}
NEEDS_DATA = ("evaluate", "report")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_run_is_known_by_its_name_and_by_its_paths(work, small_data, command, capsys):
    data = ["--data-dir", str(small_data)] if command in NEEDS_DATA else []
    found = []
    paths = ["checkpoints/one/best.pt", "checkpoints/one", f"{work}/checkpoints/one/"]
    for run in ("one", *paths):
        assert main([command, run, *COMMANDS[command], *data]) == 0, run
        said = capsys.readouterr().out.replace(f"{work}/", "")  # of the absolute path
        files = [path for path in sorted(work.rglob("*")) if path.is_file()]
        contents = [path.read_bytes().replace(f"{work}/".encode(), b"") for path in files]
        found.append((said, contents))
    assert all(one == found[0] for one in found[1:])
    shutil.move(work / "checkpoints", work / "elsewhere")
    elsewhere = [*data, "--checkpoints-dir", "elsewhere"]
    assert main([command, "one", *COMMANDS[command], *elsewhere]) == 0


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("run", "message"),
    [
        ("oen", "checkpoints has no run oen; there are one, two."),
        ("checkpoints/oen", "checkpoints has no run oen; there are one, two."),
        ("elsewhere/one", "elsewhere has no run one, and no other."),
        ("s", "s is a search, not a run: vae-hyperband report s shows it."),
        ("not a name", "needs a plain name"),
        ("", "needs a plain name"),
    ],
)
def test_what_is_no_run_gets_one_line(work, command, run, message, capsys):
    argv = [command, run, *COMMANDS[command]]
    if run == "s" and command == "report":  # which shows searches, too
        assert main(argv) == 0
        assert main([command, "checkpoints/s", *COMMANDS[command]]) == 0
        return
    if command == "animate":  # only --kind walk reads the checkpoint
        argv[argv.index("training")] = "walk"
    assert main(argv) == 2
    said = capsys.readouterr().err
    assert message in said
    assert len(said.splitlines()) == 1


def test_a_name_comes_before_other_files_and_after_checkpoints(work):
    best = work / "checkpoints/one/best.pt"
    (work / "one").mkdir()  # as a folder of data may be called
    assert find_ckpt("one", Folders()).resolve() == best
    assert find_run("one", Folders()).checkpoints_dir == Folders().checkpoints_dir
    shutil.copy(work / "checkpoints/two/best.pt", work / "one/best.pt")
    assert find_ckpt("one", Folders()).resolve() == work / "one/best.pt"
    assert find_run("one", Folders()).ckpt_folder.resolve() == work / "one"
    (work / "two").write_text("notes")
    assert find_ckpt("two", Folders()).resolve() == work / "checkpoints/two/best.pt"
    shutil.copytree(work / "checkpoints/one", work / "checkpoints/three.pt")
    assert find_ckpt("three.pt", Folders()).resolve() == work / "checkpoints/three.pt/best.pt"
    shutil.copy(best, work / "three.pt")
    assert find_ckpt("three.pt", Folders()).resolve() == work / "three.pt"


def test_any_checkpoint_is_taken_by_its_path(work, small_data, capsys, monkeypatch):
    assert find_ckpt("checkpoints/one/latest.pt", Folders()).name == "latest.pt"
    shutil.copy("checkpoints/one/best.pt", "copy of one")  # neither a name nor a .pt file
    how = [*COMMANDS["evaluate"], "--data-dir", str(small_data)]
    assert main(["evaluate", "copy of one", *how]) == 0
    assert json.loads(capsys.readouterr().out)["num_images"] == 60
    with pytest.raises(CheckpointError, match="has no run oen; there are one, two"):
        find_ckpt("oen", Folders())
    with pytest.raises(ConfigError, match="plain name"):
        find_ckpt("not a name", Folders())
    monkeypatch.chdir(work / "checkpoints/two")
    here = find_run(".", Folders(logs_dir=work / "logs"))
    assert (here.run, here.ckpt_folder) == ("two", work / "checkpoints/two")
