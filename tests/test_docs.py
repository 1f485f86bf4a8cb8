"""The documentation states what was measured, and names only what exists."""

import importlib
import json
import math
import posixpath
import re
import shlex
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from vae_hyperband import kl_to_standard_normal, reconstruction_nats, train_vae
from vae_hyperband.commands import COMMANDS, options
from vae_hyperband.common.config import TrainConfig

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "vae_hyperband"
README = (ROOT / "README.md").read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
#: Every page of the documentation, by its path.
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for path in (
        *sorted(ROOT.glob("*.md")),
        ROOT / "benchmarks/RECORDS.md",
        *sorted((ROOT / "docs").glob("*.md")),
    )
}
#: README and the pages of docs/, whose examples are for users.
EXAMPLES = "".join(PAGES[page] for page in PAGES if page == "README.md" or page[:5] == "docs/")


def raw(name: str) -> dict:
    return json.loads((ROOT / f"benchmarks/{name}.json").read_text())


def measured() -> dict[str, str]:
    """The numbers that stand between <!--name--> and <!--/--> in the pages, from the raw files."""
    recipe, main_job, training = (
        raw(name) for name in ("default_recipe", "main_job_evaluation", "training_speed")
    )
    assert main_job["split"] == "test"
    numbers = {
        "mean": f"{recipe['test_bound_mean']:.2f}",
        "sd": f"{recipe['test_bound_sd_over_seeds']:.2f}",
        "recon": f"{recipe['test_recon_loss_mean']:.2f}",
        "kl": f"{recipe['test_KL_divergence_mean']:.2f}",
        "run": f"{main_job['bound']['mean']:.2f}",
        "run_se": f"{main_job['bound']['standard_error']:.2f}",
        "run_recon": f"{main_job['recon_loss']['mean']:.2f}",
        "run_kl": f"{main_job['KL_divergence']['mean']:.2f}",
        "floor": f"{main_job['entropy_floor']:.2f}",
        "mean_image": f"{main_job['mean_image']:.2f}",
    }
    contenders = {
        "ours": "ours", "reference": "reference", "pythae": "pythae", "products": "matrix products"
    }  # fmt: skip
    for mark, name in contenders.items():
        for threads, part in ((2, "all_threads"), (1, "one_thread")):
            assert training[part]["threads"] == threads
            median = training[part]["images_per_second"][name]["median"]
            numbers[f"{mark}_{threads}"] = f"{median:,.0f}"
    share = raw("time_to_quality")["share_of_time_median"]["5"]
    numbers["quality_share"] = f"{share:.2f}"
    numbers["search_share"] = f"{100 * raw('search_overhead')['share_in_training_steps']:.0f}"
    sampled = raw("generation_speed")["images_per_second"]["sample"]["median"]
    numbers["sample"] = f"{sampled:,.0f}"
    saving = raw("safety_cost")["saving"]["share_of_training"]["median"]
    numbers["saving"] = f"{100 * saving:.1f}"
    return numbers


def marked(page: str) -> list[tuple[str, str]]:
    """Names and values of the numbers that a page has between <!--name--> and <!--/-->."""
    return re.findall(r"<!--(\w+)-->(.*?)<!--/-->", PAGES[page])


def test_marked_numbers_are_those_of_the_raw_files(scripts):
    _, pages = scripts
    expected = measured()
    for page in ("README.md", "docs/results.md"):
        for name, value in marked(page):
            if name not in pages.NUMBERS:  # those are of docs/results.json, and compared below
                assert value == expected[name], f"{page}: {name}"
    assert set(dict(marked("docs/results.md"))) == {*expected, *pages.NUMBERS}
    assert len(marked("README.md")) >= 9
    for page, text in PAGES.items():  # Markdown takes such a line for HTML and breaks the paragraph
        assert not re.search(r"^ *<!--[^/].*?<!--/-->", text, re.MULTILINE), page


def test_the_speeds_keep_their_claims():
    training = raw("training_speed")
    ratios = {name: value["median"] for name, value in training["all_threads"]["ours_to"].items()}
    assert ratios["matrix products"] > 0.5
    assert ratios["reference"] > 1.9
    assert ratios["pythae"] > 1.7
    assert ratios["ours, bare step"] > 0.97
    assert training["share_of_a_run_that_is_not_training"]["median"] < 0.065


def test_the_default_recipe_keeps_its_promise():
    recipe = raw("default_recipe")
    assert recipe["n"] == len(recipe["runs"]) == 3
    assert max(run["test_bound"] for run in recipe["runs"]) <= 245
    assert TrainConfig.from_dict(recipe["config"]) == TrainConfig()


def test_the_numbers_of_the_search_page_are_those_of_the_raw_files():
    page = PAGES["docs/search.md"]
    worth = raw("scheduler_worth")
    markers = re.findall(r"<!--([^/]+?) (\d+|median)-->(.*?)<!--/-->", page)
    assert len(markers) == 6 * len(worth["methods"])
    for method, budget, value in markers:
        found = worth["methods"][method]
        if budget == "median":
            assert value == f"{found['median_epochs_to_within_0.5']:.0f}"
        else:
            assert value == f"{found['regret'][budget]['mean']:.2f}"
    for run in raw("stock_ray_tune")["runs"]:
        assert " ".join(map(str, run["last_epochs"])) in page


def plus_minus(row: dict[str, float], form: str = "+.2f") -> str:
    mean = "0.00" if f"{row['mean']:.2f}" in ("0.00", "-0.00") else f"{row['mean']:{form}}"
    return f"{mean} +- {row['half_interval']:.2f}"


def rules_table(worth: dict, is_asha: bool) -> str:
    """Ray's rules and the paper's promotion, minus this package's, after equal epochs."""
    lines = []
    for space, by_workers in worth["rules_by_space_and_workers"].items():
        for workers, rules in by_workers.items():
            for name, rule in rules.items():
                if "difference" in rule and ("ASHA" in name) == is_asha:
                    cells = [plus_minus(rule["difference"][b]) for b in rule["difference"]]
                    lines.append(f"| {space}, {workers} | {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def whole_searches_table(worth: dict, numbers: tuple[str, ...]) -> str:
    """Mean epochs and mean regret of whole searches, by number of trials."""
    lines = []
    for name in ("ASHA", "Ray's ASHA", "ASHA with promotion"):
        rows = worth["whole_searches_by_space"]["grid"][name]
        cells = [
            f"{rows[n]['regret']['mean']:.2f} after {rows[n]['epochs']['mean']:.0f}"
            for n in numbers
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def test_the_numbers_about_ray_s_schedulers_are_those_of_the_raw_file():
    page, worth = PAGES["docs/search.md"], raw("scheduler_worth")
    section = page.split("## How these differ from Ray's schedulers")[1].split("\n## ")[0]
    plain = " ".join(section.split())
    assert rules_table(worth, is_asha=True) in section
    assert rules_table(worth, is_asha=False) in PAGES["benchmarks/RECORDS.md"]
    assert whole_searches_table(worth, ("6", "8", "12", "15", "18", "24", "36")) in section
    assert worth["environment"]["ray"] in section
    whole = worth["whole_searches_by_space"]["grid"]
    n = worth["num_searches"]
    ours, rays = (whole[name]["12"] for name in ("ASHA", "Ray's ASHA"))
    assert (
        f"12 trials take {rays['epochs']['mean']:.0f} epochs instead of "
        f"{ours['epochs']['mean']:.0f}, and the best of them is stopped in "
        f"{rays['searches_that_stopped_their_best_trial']} of {n} searches instead of "
        f"{ours['searches_that_stopped_their_best_trial']}"
    ) in plain
    for name in ("HyperBand", "median stopping"):
        differences = worth["rules_by_space_and_workers"]["grid"]["1"][f"Ray's {name}"][
            "difference"
        ]
        for budget in ("36", "108"):
            assert f"{plus_minus(differences[budget])} nats after {budget} epochs" in plain
    six, eight = (
        whole["ASHA with promotion"][k]["searches_without_a_fully_trained_trial"] for k in "68"
    )
    assert f"{six} of {n} searches with 6 trials and {eight} of {n} with 8" in plain
    promotion = whole["ASHA with promotion"]["15"]
    assert f"{promotion['epochs']['mean']:.0f}" == f"{ours['epochs']['mean']:.0f}" == "38"
    ends = (row["regret"]["mean"] for row in (promotion, ours))
    assert "ends at {:.2f} instead of {:.2f}".format(*ends) in plain


def test_what_the_search_page_concludes_about_promotion_follows_from_the_figures():
    worth = raw("scheduler_worth")
    for by_workers in worth["rules_by_space_and_workers"].values():
        for rules in by_workers.values():
            found = rules["ASHA with promotion"]["difference"].values()
            better = [row for row in found if row["mean"] + row["half_interval"] < 0]
            assert len(found) == 6
            assert len(better) == 4  # "at four of the six budgets in each setting"
            late = [rules["ASHA with promotion"]["difference"][b]["mean"] for b in ("54", "81")]
            assert max(late) < 0
    page = " ".join(PAGES["docs/search.md"].split())
    assert "at four of the six budgets in each of the four settings" in page


def test_what_the_search_page_says_of_ray_s_asha_follows_from_the_figures():
    def better(space: str, workers: str) -> list[tuple[str, bool]]:
        """Budgets at which the interval excludes zero, and whether Ray's rule is better there."""
        rules = raw("scheduler_worth")["rules_by_space_and_workers"][space][workers]
        found = rules["Ray's ASHA"]["difference"].items()
        return [(b, row["mean"] < 0) for b, row in found if abs(row["mean"]) > row["half_interval"]]

    assert better("grid", "1") == [("81", True), ("108", True)]
    assert better("grid", "4") == [(b, True) for b in ("9", "18", "81", "108")]
    assert better("continuous", "1") == [(b, False) for b in ("36", "54", "81", "108")]
    assert better("continuous", "4") == [
        *(("9", True), ("18", True)), *(("81", False), ("108", False))
    ]  # fmt: skip


def test_the_numbers_of_the_evaluation_page_are_those_of_the_raw_files():
    accuracy = raw("feature_net")["test_accuracy"]
    assert f"<!--feature_accuracy-->{accuracy:.3f}<!--/-->" in PAGES["docs/evaluation.md"]


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
    # the README's four: latent 32 at beta 1 and at a low beta, the best bound, the best images
    _, _, *rows = pages.highlights(results).splitlines()
    assert [row.split("|")[1].split(":")[0].strip() for row in rows] == [
        "VAE, latent 32", "beta-VAE, beta 0.05, latent 32", "best bound", "best images"
    ]  # fmt: skip
    _, _, default, first, *_ = pages.variants(results).splitlines()
    assert default.startswith("| nothing else | 240.00 |  |")  # a KL that was not measured
    assert first.startswith("| `--kl-warmup-epochs 3` | 241.00 |")
    page = (
        "head\n<!--models-->\nold\n<!--/models-->\nraw <!--raw_probe-->old<!--/-->, "
        "real <!--real_fid-->old<!--/-->, more <!--else-->old<!--/-->\n"
    )
    lines = pages.filled("docs/results.md", page, results).splitlines()
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
        assert pages.filled(page, PAGES[page], results) == PAGES[page]


def test_the_tables_of_likelihoods_are_what_was_measured(scripts):
    likelihoods = importlib.import_module("likelihoods")
    for images in likelihoods.EPOCHS:
        assert likelihoods.table(likelihoods.load(), images) in PAGES["docs/objectives.md"]


def commands() -> list[str]:
    """The commands of README and docs/: of their blocks, and within their text and tables."""
    blocks = re.findall(r"```sh\n(.*?)```", EXAMPLES, flags=re.DOTALL)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    starts = r"vae-hyperband (?!completion)|make |python -m |pip "
    inline = re.findall(rf"`((?:{starts})[^`]+)`", EXAMPLES)
    return list(dict.fromkeys(line for line in [*lines, *inline] if line))


@pytest.mark.parametrize("line", commands())
def test_every_command_of_the_documentation_is_valid(line, monkeypatch, tmp_path):
    """The options are read by the real parser; what they start is tested elsewhere."""
    words = shlex.split(line.partition(">")[0])  # without the file that the output goes to
    if words[0] == "make":
        assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text()
    elif words[1:] == ["--version"]:
        assert train_vae.main(words[1:]) == 0
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
        checkpoint = SimpleNamespace(config=config)
        monkeypatch.setattr("vae_hyperband.model.checkpoint.load_ckpt", lambda path: checkpoint)
        files = dict(re.findall(r"```toml\n# (\S+)\n(.*?)```", EXAMPLES, flags=re.DOTALL))
        monkeypatch.chdir(tmp_path)
        (tmp_path / "space.toml").write_text(files["space.toml"])
        files["best_config.json"] = json.dumps({"config": config.to_dict()})
        read = options.read_settings

        def written(path):
            (tmp_path / path.name).write_text(files[path.name])
            return read(tmp_path / path.name)

        monkeypatch.setattr(options, "read_settings", written)
        train_vae.main(words[1:])
        assert len(parsed) == 1
    elif words[0] == "pip":
        extras = PYPROJECT["project"]["optional-dependencies"]
        for name in re.findall(r"\[(\w+)\]", line):
            assert name in extras
        for word in words[words.index("-c") + 1 : words.index("-c") + 2] if "-c" in words else ():
            assert (ROOT / word).is_file()
    elif words[0] == "source":
        assert words[1] == ".venv/bin/activate"
        assert "\nVENV ?= .venv\n" in (ROOT / "Makefile").read_text()
    elif words[:3] == ["uv", "pip", "install"]:
        for name in re.findall(r"[\w,]+", words[-1]):
            assert set(name.split(",")) <= set(PYPROJECT["project"]["optional-dependencies"])
    elif words[0] == "docker":
        assert '\nENTRYPOINT ["vae-hyperband"]\n' in (ROOT / "Dockerfile").read_text()
    elif words[0] == "apptainer":
        assert (ROOT / words[-1]).is_file()
    elif words[0] == "sbatch":
        assert any((PACKAGE / word).is_file() for word in words)
    elif words[1] == "-c":
        compile(words[2], "the command line", "exec")
    else:
        assert words[0] in ("python", "python3")
        if words[1:3] == ["-m", "venv"]:
            return
        name = words[2].replace(".", "/") if words[1] == "-m" else words[1].removesuffix(".py")
        assert (ROOT / f"{name}.py").is_file() or (ROOT / name / "__main__.py").is_file()


@pytest.mark.faults
def test_the_python_of_the_readme_runs(fashion_mnist, tmp_path, monkeypatch):
    [code] = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(code, names)
    assert names["images"].shape == (64, 1, 28, 28)
    assert names["report"]["num_images"] == 10_000
    # by hand and by fit: the same loop, the same noise, the same images
    assert names["losses"]["bound"] == pytest.approx(names["report"]["bound"]["mean"], abs=1e-3)


def python_of(page: str) -> str:
    """The only example in Python of a page."""
    [block] = re.findall(r"```python\n(.*?)```", PAGES[page], flags=re.DOTALL)
    return block


def test_the_documented_way_from_arrays_trains(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(python_of("docs/own-images.md"), "own-images.md", "exec"), names)
    assert names["result"].finished
    assert names["result"].state.model.image_shape == (3, 28, 20)


def test_the_model_and_its_loss_work_in_a_loop_of_another_package():
    names = {}
    exec(compile(python_of("docs/migrating.md"), "migrating.md", "exec"), names)
    assert all(parameter.grad is not None for parameter in names["model"].parameters())


def test_losses_of_other_packages_are_translated_to_the_same_gradients():
    """The rows of the table in docs/migrating.md: the same up to a factor and a constant."""
    generator = torch.Generator().manual_seed(0)
    shape = (6, 3, 8, 8)
    logits = torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
    mu = torch.randn(6, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    x = torch.rand(shape, generator=generator, dtype=torch.float64)
    size, weight = math.prod(shape[1:]), 0.00025
    squares = (logits.sigmoid() - x).square()
    entropies = functional.binary_cross_entropy_with_logits(logits, x, reduction="none")
    kl = kl_to_standard_normal(mu, torch.zeros_like(mu)).mean()

    def ours(beta: float, likelihood: str, sigma: float = 1.0) -> Tensor:
        return reconstruction_nats(logits, x, likelihood, sigma=sigma).mean() + beta * kl

    pairs = (
        (entropies.flatten(1).sum(1).mean() + kl, ours(1, "bernoulli")),
        (0.5 * squares.flatten(1).sum(1).mean() + kl, ours(1, "gaussian")),
        (squares.mean() + weight * kl, ours(weight * size / 2, "gaussian")),
        (squares.mean() + weight * kl, ours(weight * size / (2 * 0.1**2), "gaussian", 0.1)),
        (entropies.mean() + weight * kl, ours(weight * size, "bernoulli")),
    )
    for theirs, translated in pairs:
        found = [
            torch.cat(
                [g.flatten() for g in torch.autograd.grad(loss, (logits, mu), retain_graph=True)]
            )
            for loss in (theirs, translated)
        ]
        assert functional.cosine_similarity(*found, dim=0) == pytest.approx(1, abs=1e-12)
    constant = ((pairs[1][1] - pairs[1][0]) / size).item()
    assert constant == pytest.approx(0.919, abs=1e-3)
    assert weight * 3 * 64 * 64 / 2 == pytest.approx(1.54, abs=0.005)


def test_the_readme_is_short():
    lines = README.splitlines()
    assert len(lines) <= 120
    for line in lines:
        shown = re.sub(r"<!--.*?-->", "", line)  # the marks of numbers are not shown
        assert len(shown) <= 100 or line.startswith("|") or "](" in line, line


def anchors(page: str) -> set[str]:
    """The names by which a page's headings are linked, made as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page, flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_of_a_page_leads_to_a_file_and_heading(page):
    targets = re.findall(r"\]\((?!http)([^)#]*)(?:#([^)]+))?\)", PAGES[page])
    for file, anchor in targets:
        path = ROOT / page if not file else (ROOT / page).parent / file
        assert path.is_file(), file
        if anchor:
            assert anchor in anchors(path.read_text()), f"{file}#{anchor}"


def links_of(page: str) -> set[str]:
    """The files that a page links to, as paths in the repository."""
    found = re.findall(r"\]\((?!http|#)([^)#]+)", PAGES[page])
    return {posixpath.normpath(posixpath.join(posixpath.dirname(page), name)) for name in found}


def test_every_page_is_linked_from_the_page_of_tasks_and_that_from_the_readme():
    assert set(PAGES) - {"README.md", "docs/index.md"} == {
        name for name in links_of("docs/index.md") if name.endswith(".md")
    }
    assert {"docs/index.md", "docs/install.md", "PROMISES.md", "CONTRIBUTING.md"} <= links_of(
        "README.md"
    )


@pytest.mark.parametrize("page", [page for page in PAGES if page != "CHANGELOG.md"])
def test_every_script_that_a_page_names_exists(page):
    """Also outside of links; modules are named from the package's folder, as model/vae.py is."""
    text = re.sub(r"\]\([^)]*\)", "]", PAGES[page])  # the links have their own test
    for name in re.findall(r"[\w/]+\.(?:py|sh)\b", text):
        assert any((folder / name).is_file() for folder in (ROOT, PACKAGE)), name


def test_the_map_has_every_module():
    modules: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        if path.stem != "__init__":
            wing = path.parent.relative_to(PACKAGE).as_posix()
            modules.setdefault(wing, set()).add(path.stem)
    the_map = CONTRIBUTING.split("## The map")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`\w+/`|package root) \| .+ \| (.+) \|$", the_map, re.MULTILINE)
    named = {}
    for wing, files in rows:
        outside = re.sub(r"\([^)]*\)", "", files)  # in brackets: what a module has
        named["." if wing == "package root" else wing.strip("`/")] = set(
            re.findall(r"`(\w+)`", outside)
        )
    assert named == modules
    assert [wing for wing in named if wing != "."] == architecture_wings()


def architecture_wings() -> list[str]:
    from test_architecture import WINGS

    return WINGS


def test_the_map_s_rows_of_changes_name_what_exists():
    table = CONTRIBUTING.split("## Where to begin with a change")[1].split("\n## ")[0]
    rows = re.findall(r"^\| \w.+$", table, re.MULTILINE)[1:]
    assert len(rows) >= 8
    for row in rows:
        files = [PACKAGE / name for name in re.findall(r"`([\w/]+\.py)`", row)]
        code = "".join(path.read_text() for path in files if path.is_file())
        for name in re.findall(r"`(\w+)`", row):
            assert re.search(rf"\b{name}\b", code), f"{row}: {name}"
