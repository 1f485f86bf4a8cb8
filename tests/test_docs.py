"""The README says what was measured, and names only what exists."""

import importlib
import json
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import vae_hyperband
from vae_hyperband import train_vae
from vae_hyperband.commands import COMMANDS, options, train
from vae_hyperband.common.config import TrainConfig

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def quoted(name: str) -> str:
    """The number between <!--name--> and <!--/--> in the README."""
    [value] = re.findall(rf"<!--{name}-->(.*?)<!--/-->", README)
    return value


def test_results_in_the_readme_are_those_of_the_raw_files():
    recipe = json.loads((ROOT / "benchmarks/default_recipe.json").read_text())
    main_job = json.loads((ROOT / "benchmarks/main_job_evaluation.json").read_text())
    assert quoted("mean") == f"{recipe['test_bound_mean']:.2f}"
    assert quoted("sd") == f"{recipe['test_bound_sd_over_seeds']:.2f}"
    assert quoted("recon") == f"{recipe['test_recon_loss_mean']:.2f}"
    assert quoted("kl") == f"{recipe['test_KL_divergence_mean']:.2f}"
    assert quoted("run") == f"{main_job['bound']['mean']:.2f}"
    assert quoted("run_se") == f"{main_job['bound']['standard_error']:.2f}"
    assert quoted("run_recon") == f"{main_job['recon_loss']['mean']:.2f}"
    assert quoted("run_kl") == f"{main_job['KL_divergence']['mean']:.2f}"
    assert main_job["split"] == "test"


def test_the_speeds_in_the_readme_are_those_of_the_raw_files():
    training, quality, searched, generation = (
        json.loads((ROOT / f"benchmarks/{name}.json").read_text())
        for name in ("training_speed", "time_to_quality", "search_overhead", "generation_speed")
    )
    contenders = {
        "ours": "ours", "reference": "reference", "pythae": "pythae", "products": "matrix products"
    }  # fmt: skip
    for mark, name in contenders.items():
        for threads, part in ((2, "all_threads"), (1, "one_thread")):
            assert training[part]["threads"] == threads
            median = training[part]["images_per_second"][name]["median"]
            assert quoted(f"{mark}_{threads}") == f"{median:,.0f}"
    assert quoted("quality_share") == f"{quality['share_of_time_median']['5']:.2f}"
    assert quoted("search_share") == f"{100 * searched['share_in_training_steps']:.0f}"
    assert quoted("sample") == f"{generation['images_per_second']['sample']['median']:,.0f}"


def test_the_speeds_keep_their_claims():
    training = json.loads((ROOT / "benchmarks/training_speed.json").read_text())
    ratios = {name: value["median"] for name, value in training["all_threads"]["ours_to"].items()}
    assert ratios["matrix products"] > 0.5
    assert ratios["reference"] > 1.9
    assert ratios["pythae"] > 1.7
    assert ratios["ours, bare step"] > 0.97
    assert training["share_of_a_run_that_is_not_training"]["median"] < 0.065


def test_the_default_recipe_keeps_its_promise():
    recipe = json.loads((ROOT / "benchmarks/default_recipe.json").read_text())
    assert recipe["n"] == len(recipe["runs"]) == 3
    assert max(run["test_bound"] for run in recipe["runs"]) <= 245
    assert TrainConfig.from_dict(recipe["config"]) == TrainConfig()


def test_the_numbers_of_the_search_page_are_those_of_the_raw_files():
    page = (ROOT / "docs/search.md").read_text()
    worth = json.loads((ROOT / "benchmarks/scheduler_worth.json").read_text())
    markers = re.findall(r"<!--([^/]+?) (\d+|median)-->(.*?)<!--/-->", page)
    assert len(markers) == 6 * len(worth["methods"])
    for method, budget, value in markers:
        found = worth["methods"][method]
        if budget == "median":
            assert value == f"{found['median_epochs_to_within_0.5']:.0f}"
        else:
            assert value == f"{found['regret'][budget]['mean']:.2f}"
    stock = json.loads((ROOT / "benchmarks/stock_ray_tune.json").read_text())
    for run in stock["runs"]:
        assert " ".join(map(str, run["last_epochs"])) in page


def test_the_numbers_of_the_evaluation_page_are_those_of_the_raw_files():
    page = (ROOT / "docs/evaluation.md").read_text()
    net = json.loads((ROOT / "benchmarks/feature_net.json").read_text())
    assert f"<!--feature_accuracy-->{net['test_accuracy']:.3f}<!--/-->" in page


@pytest.fixture(scope="module")
def scripts():
    """reproduce.py and results_pages.py, which lie outside of the package."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import reproduce
    import results_pages

    yield reproduce, results_pages
    sys.path.remove(str(ROOT / "benchmarks"))


def made_up(config, bound, **more):
    names = ("linear_probe", "fid_reconstructions", "fid_prior", "fid_mixture", "fid_flow")
    values = {name: {"mean": 0.5, "standard_error": 0.1} for name in names}
    values["raw_linear_probe"] = {"mean": 0.8447, "standard_error": 0.1}
    values["fid_real"] = {"mean": 0.0957, "standard_error": 0.1}
    values["bound"] = {"mean": bound, "standard_error": 1.0}
    return {"config": config.to_dict(), **values, **more}


def test_tables_have_means_and_intervals_over_seeds(scripts):
    reproduce, pages = scripts
    results = {
        part: {"rows": [made_up(c, bound + c.seed, name=name) for name, c in configs().items()]}
        for part, configs, bound in (
            ("table", reproduce.table_configs, 240.0), ("sweep", reproduce.sweep_configs, 250.0),
            ("bound", reproduce.bound_configs, 236.0), ("variants", reproduce.variant_configs, 241),
            ("sharp", lambda: {"best": reproduce.config(beta=0.02)}, 353.0),
        )
    }  # fmt: skip
    head, _, *lines = pages.models(results).splitlines()
    assert head.startswith("| model | test bound | linear probe |")
    # 3 latent sizes x 2 betas, 5 more betas, the best bound, the best images
    assert len(lines) == 6 + 5 + 1 + 1
    assert lines[0] == (
        "| VAE, latent 16 | 241.00 +- 2.48 | 0.500 +- 0.000 "
        + "| 0.50 +- 0.00 " * 4 + "|"
    )  # fmt: skip
    assert lines[-1].startswith("| best images: `--beta 0.02` | 353.00 | 0.500 |")
    assert lines[-2].startswith("| best bound: `--prior vamp --epochs 40` | 236.00 | 0.500 |")
    _, _, default, first, *_ = pages.variants(results).splitlines()
    assert default.startswith("| nothing else | 240.00 |  |")  # a KL that was not measured
    assert first.startswith("| `--kl-warmup-epochs 3` | 241.00 |")
    page = (
        "head\n<!--models-->\nold\n<!--/models-->\nraw <!--raw_probe-->old<!--/-->, "
        "real <!--real_fid-->old<!--/-->, more <!--else-->old<!--/-->\n"
    )
    lines = pages.filled("README.md", page, results).splitlines()
    assert "\n".join(lines[2:-2]) == pages.models(results)
    assert lines[-1] == (
        "raw <!--raw_probe-->0.845<!--/-->, real <!--real_fid-->0.10<!--/-->, "
        "more <!--else-->old<!--/-->"
    )


def test_the_best_images_are_those_with_the_lowest_validation_fid(scripts):
    reproduce, _ = scripts
    rows = [made_up(c, 300.0, name=name) for name, c in reproduce.sharp_configs().items()]
    rows[1]["fid_flow"]["mean"] = 0.1
    assert reproduce.best_of(rows) == rows[1]["name"]
    assert reproduce.best_sampler(rows[1]) == ("flow", 0.1)


def test_the_pages_tables_are_what_was_measured(scripts):
    _, pages = scripts
    results = json.loads(pages.RESULTS.read_text())
    assert set(results) == {"table", "sweep", "variants", "drawn", "bound", "bits", "sharp"}
    for page in pages.PAGES:
        text = (ROOT / page).read_text()
        assert pages.filled(page, text, results) == text


def commands() -> list[str]:
    text = README + (ROOT / "docs" / "guide.md").read_text()
    blocks = re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


@pytest.mark.parametrize("line", commands())
def test_every_command_of_the_readme_exists(line, monkeypatch):
    """The options are read by the real parser; what they start is tested elsewhere."""
    words = shlex.split(line)
    if words[0] == "make":
        assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text()
    elif words[0] == "vae-hyperband":
        parsed = []

        def stop_after_parsing(args_type, argv, prog, default=None):
            parsed.append(real(args_type, argv, prog, default))
            raise KeyboardInterrupt

        real = options.parse_options
        for place in {place.partition(":")[0] for place in COMMANDS.values()} - {"commands"}:
            module = importlib.import_module(f"vae_hyperband.{place}")
            monkeypatch.setattr(module, "parse_options", stop_after_parsing)
        # what these commands name is made by the commands before them
        config = TrainConfig()
        monkeypatch.setattr(train, "load_ckpt", lambda path: SimpleNamespace(config=config))
        monkeypatch.setattr(train, "read_json", lambda path: {"config": config.to_dict()})
        train_vae.main(words[1:])
        assert len(parsed) == 1
    elif words[0] == "sbatch":
        assert any((ROOT / word).is_file() for word in words)
    else:
        assert words[0] == "python"
        name = words[2].replace(".", "/") + ".py" if words[1] == "-m" else words[1]
        assert (ROOT / name).is_file()


@pytest.mark.faults
def test_the_python_of_the_readme_runs(fashion_mnist, tmp_path, monkeypatch, options):
    [code] = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    fashion = vae_hyperband.TrainConfig(epochs=1, batch_size=1000)
    vae_hyperband.fit(fashion, vae_hyperband.RunOptions(run="fashion-best"), quiet=True)
    names: dict[str, object] = {}
    exec(code, names)
    assert names["report"]["num_images"] == 10_000
    # by hand and by fit: the same loop, the same noise, the same images
    assert names["losses"]["bound"] == pytest.approx(names["report"]["bound"]["mean"], abs=1e-3)


def test_the_guide_s_way_to_idx_files_is_one(tmp_path, monkeypatch, capsys):
    [block] = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs" / "guide.md").read_text(), flags=re.DOTALL
    )
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "guide.md", "exec"), {})
    assert train_vae.main(["data", "--dataset", "custom", "--data-dir", "."]) == 0
    said = capsys.readouterr().out
    for split, number in (("train", 500), ("validation", 100), ("test", 100)):
        assert re.search(rf"{split} +{number} images \(1, 32, 32\)", said)


def test_every_file_that_the_guide_links_exists():
    text = (ROOT / "docs" / "guide.md").read_text()
    targets = re.findall(r"\]\((?!http)([^)#]+)", text)
    assert len(targets) > 10
    for target in targets:
        assert (ROOT / "docs" / target).is_file(), target


def test_every_file_and_picture_that_the_readme_links_exists():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).is_file(), target
