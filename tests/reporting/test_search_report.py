"""The report of a search: what it says, and its charts in a real browser."""

import html
import json
import re

import pytest
from chromium import Watched, barriers, until
from simulated import FAILED, WHY, simulate

from vae_hyperband.common.config import Places
from vae_hyperband.common.errors import ConfigError
from vae_hyperband.reporting.report import follow_search, report, write_report
from vae_hyperband.search.decisions import read_search
from vae_hyperband.search.trials import DECISIONS, RESULT
from vae_hyperband.train_vae import main

browsing = pytest.mark.browser


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("searches")


@pytest.fixture(scope="module")
def boards(folder):
    """Searches that have finished or were left, by their name."""
    return {
        "small": simulate(folder / "checkpoints/small", 64),
        "left": simulate(folder / "checkpoints/left", 64, share=0.4),
    }


def place(folder, run):
    return Places(run=run, checkpoints_dir=folder / "checkpoints", logs_dir=folder / "logs")


def is_live(page):
    """Whether the page reloads itself."""
    return 'id="follow"' in page


def data_of(page):
    """What the page's script is given."""
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])


def test_a_search_is_read_while_it_runs_as_it_stands(folder, boards):
    for name, board in boards.items():
        found = read_search(folder / "checkpoints" / name)
        assert found.trials == board.trials
        assert found.finished == board.finished == (name != "left")
        assert found.config == board.config


def test_the_report_of_a_search_that_has_not_finished_says_so(folder, boards):
    board, page = boards["left"], report(place(folder, "left"))
    ended, trials = board.totals.ended, len(board.trials)
    assert 20 < ended < trials < 64
    assert f"{ended} of 64 trials ended, {trials - ended} under way" in page
    assert f"{board.best.name} leads with" in page
    assert page.count("<tr data-trial=") + page.count('<tr class="winner" data-trial=') == trials
    assert page.count('<td data-value="under way">') == trials - ended
    assert is_live(page)
    assert "Importance" in page
    finished = report(place(folder, "small"))
    assert "Not finished" not in finished
    assert not is_live(finished)
    assert "75%</td>" in finished


def test_the_charts_get_what_the_trials_did_and_no_markup(folder, boards):
    page = report(place(folder, "small"))
    assert WHY not in page
    assert html.escape(WHY, quote=False) in page.replace("&#39;", "'")
    data = data_of(page)
    assert [axis["name"] for axis in data["axes"]] == [
        "latent_dim", "learning_rate", "batch_size", "beta",
    ]  # fmt: skip
    for trial, shown in zip(boards["small"].trials, data["trials"], strict=True):
        values = [
            axis["labels"][value] if "labels" in axis else value
            for axis, value in zip(data["axes"], shown["values"], strict=True)
        ]
        assert values == [
            f"{v:g}" if name != "learning_rate" else v for name, v in trial.hyperparameters.items()
        ]
        assert shown["curve"] == pytest.approx(trial.curve("bound"), rel=1e-5)
        assert (shown["score"] is None) == (trial.number == FAILED)
    assert WHY in data["trials"][FAILED]["text"]


def test_following_a_search_rewrites_its_report_until_the_end(folder, boards, tmp_path):
    source, target = folder / "checkpoints/small", tmp_path / "checkpoints/s"
    target.mkdir(parents=True)
    (target / "search.json").write_bytes((source / "search.json").read_bytes())
    lines = (source / DECISIONS).read_bytes().splitlines(keepends=True)
    (target / DECISIONS).write_bytes(b"".join(lines[:40]))
    written = follow_search(place(tmp_path, "s"))
    first = next(written).read_text()
    (target / DECISIONS).write_bytes(b"".join(lines[:-1]))
    second = next(written).read_text()
    (target / DECISIONS).write_bytes(b"".join(lines))
    (target / RESULT).write_bytes((source / RESULT).read_bytes())
    last = next(written).read_text()
    assert len(data_of(first)["trials"]) < len(data_of(second)["trials"]) == 64
    assert [is_live(page) for page in (first, second, last)] == [True, True, False]
    assert last == report(place(folder, "small")).replace("Search small", "Search s").replace(
        "--run small", "--run s"
    )
    with pytest.raises(StopIteration):
        next(written)
    (target / DECISIONS).unlink()
    assert [path.read_text() for path in follow_search(place(tmp_path, "s"))] == [last]


def test_only_a_search_is_followed(folder, boards, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/latest.pt").touch()
    places = ["--checkpoints-dir", str(tmp_path), "--logs-dir", str(tmp_path / "logs")]
    assert main(["report", "run", "--watch", *places]) == 2
    assert "holds no search that has begun" in capsys.readouterr().err
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / DECISIONS).touch()
    searched = Places(run="s", checkpoints_dir=tmp_path, logs_dir=tmp_path / "logs")
    for settings in ("{", '{"num_trials": [1]}', '{"what": 1}'):
        (tmp_path / "s/search.json").write_text(settings)
        with pytest.raises(ConfigError, match=r"search\.json|is damaged"):
            report(searched)
    (tmp_path / "s/search.json").write_text('{"num_trials": 5}')  # a log without a trial
    page = report(searched)
    assert "0 of 5 trials ended" in page
    assert is_live(page)  # its first results will be shown


# ---- In a browser


def opened(chromium, folder, run, fragment="", **context):
    path = write_report(place(folder, run))
    watched = Watched(chromium, viewport={"width": 1100, "height": 2000}, **context)
    watched.page.goto(path.as_uri() + fragment)
    return watched


def shown_rows(page):
    """Numbers of the trials whose rows are shown, from the first row on."""
    return page.evaluate(
        "[...document.querySelectorAll('#trials tr')].filter(row => row.offsetParent)"
        ".map(row => Number(row.dataset.trial))"
    )


def drag(page, axis, start, end):
    """Brush an axis of the parallel coordinates between two shares of its height from the top."""
    box = page.locator("#parallel .brush .overlay").nth(axis).bounding_box()
    across = box["x"] + box["width"] / 2
    page.mouse.move(across, box["y"] + start * box["height"])
    page.mouse.down()
    page.mouse.move(across, box["y"] + (start + end) / 2 * box["height"])
    page.mouse.move(across, box["y"] + end * box["height"])
    page.mouse.up()


@browsing
@pytest.mark.parametrize("run", ["small", "large"])
def test_a_brush_filters_charts_and_table_together(chromium, folder, boards, run):
    if run == "large":
        boards = {run: simulate(folder / "checkpoints/large", 1000)}
    watched = opened(chromium, folder, run)
    page, scored = watched.page, [t for t in boards[run].trials if t.number != FAILED]
    lines = page.locator("#parallel .all path:not(.out)")
    assert lines.count() == len(scored)
    drag(page, 5, 0.8, 1.1)  # the best scores
    until(page, "document.querySelectorAll('#parallel .all path.out').length > 0")
    visible = shown_rows(page)
    by_score = sorted(scored, key=lambda trial: trial.score("bound"))
    assert visible == [trial.number for trial in by_score[: len(visible)]]
    assert 0 < len(visible) < len(scored)
    assert page.locator("#slices figure:nth-child(1) .all circle").count() == len(visible)
    assert page.locator("#curves .all path").count() == len(visible)
    assert lines.count() == len(visible)
    best = by_score[0]
    assert page.locator("#count").inner_text() == (
        f"{len(visible)} of {len(scored)} trials shown; the best of them is {best.name}: "
        f"{best.score('bound'):.2f}"
    )
    spent = sum(trial.num_epochs for trial in by_score[: len(visible)])
    assert f"{spent:,} epochs trained" in page.locator("#budget .words").text_content()
    drag(page, 0, 0.0, 0.2)  # and latent_dim 64
    both = [t.number for t in by_score[: len(visible)] if t.hyperparameters["latent_dim"] == 64]
    until(page, f"document.querySelectorAll('#parallel .all path:not(.out)').length == {len(both)}")
    assert shown_rows(page) == both
    page.reload()  # the address has kept it
    assert shown_rows(page) == both
    assert page.locator("#parallel .brush .selection:visible").count() == 2
    page.locator("#clear").click()
    assert len(shown_rows(page)) == len(boards[run].trials)
    assert page.locator("#parallel .brush .selection:visible").count() == 0
    assert watched.troubles == []
    assert page.title() == f"Search {run}"
    assert {request.split("#")[0] for request in watched.requests} == {page.url.split("#")[0]}
    watched.context.close()


@browsing
def test_the_keyboard_does_what_the_pointer_does(chromium, folder, boards):
    watched = opened(chromium, folder, "small")
    page = watched.page
    page.locator("summary").press("Enter")
    rate = page.locator("fieldset", has_text="learning rate").locator("input")
    rate.nth(0).fill("0.002")
    rate.nth(0).press("Tab")
    page.locator("fieldset", has_text="batch size").locator("select").nth(1).select_option("128")
    chosen = {
        trial.number
        for trial in boards["small"].trials
        if trial.hyperparameters["learning_rate"] >= 0.002
        and trial.hyperparameters["batch_size"] <= 128
    }
    until(page, "document.querySelectorAll('#trials tr[hidden]').length > 0")
    assert set(shown_rows(page)) == chosen
    assert 0 < len(chosen) < 64
    page.locator("#trials tr[tabindex='0']").focus()
    page.keyboard.press("ArrowDown")
    second = shown_rows(page)[1]
    assert page.evaluate("document.activeElement.dataset.trial") == str(second)
    # that trial is marked in every chart
    assert page.locator("#parallel .pointed path").count() == 1
    assert page.locator("#curves .pointed path").count() == 1
    assert page.locator("#slices .pointed circle").count() == 5
    assert watched.troubles == []
    watched.context.close()


@browsing
def test_pointing_at_a_mark_names_its_trial_and_a_click_goes_to_its_row(chromium, folder, boards):
    # the second half of this link was lost
    watched = opened(chromium, folder, "small", fragment="#beta=x..y&epochs=3&sort=2+desc")
    page = watched.page
    assert len(shown_rows(page)) == 64
    mark = page.locator("#slices figure:nth-child(2) circle").first
    box = mark.bounding_box()
    number = page.evaluate("e => d3.select(e).datum().number", mark.element_handle())
    across, down = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(across, down)
    trial = boards["small"].trials[number]
    assert page.locator("#tip").inner_text().startswith(f"{trial.name} {trial.outcome} at epoch")
    assert f"{trial.score('bound'):.2f}" in page.locator("#tip").inner_text()
    assert page.locator("#trials tr.pointed").get_attribute("data-trial") == str(number)
    page.mouse.click(across, down)
    assert page.evaluate("document.activeElement.dataset.trial") == str(number)
    assert page.evaluate("document.activeElement.getBoundingClientRect().top < innerHeight")
    page.mouse.move(1, 1)
    assert not page.locator("#tip").is_visible()
    # a failed trial has a row, whose text is text
    page.locator(f"#trials tr[data-trial='{FAILED}']").hover()
    assert WHY in page.locator(f"#trials tr[data-trial='{FAILED}']").inner_text()
    assert watched.troubles == []
    watched.context.close()


@browsing
def test_the_page_of_a_running_search_reloads_itself(chromium, folder, boards, tmp_path):
    path = write_report(place(folder, "left"), tmp_path / "a.html")
    watched = Watched(chromium)
    watched.page.goto(path.as_uri() + "#beta=1..2")
    assert "Not finished" in watched.page.locator("header").inner_text()
    shown = shown_rows(watched.page)
    write_report(place(folder, "small"), path)
    watched.page.locator("header", has_text=" won with ").wait_for()
    assert len(shown) < len(shown_rows(watched.page)) < 64  # and keeps what was filtered
    assert watched.troubles == []
    watched.context.close()


@browsing
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_barrier_and_a_phone_shows_it(chromium, folder, boards, scheme):
    watched = opened(chromium, folder, "left", color_scheme=scheme)
    watched.page.locator("#follow").uncheck()
    watched.page.locator("summary").click()
    for width in (1100, 390):
        watched.page.set_viewport_size({"width": width, "height": 844})
        until(watched.page, "document.querySelector('#curves svg').clientWidth <= innerWidth")
        assert barriers(watched.page) == []
        assert watched.page.evaluate("document.scrollingElement.scrollWidth") <= width
    assert watched.troubles == []
    watched.context.close()


@browsing
def test_without_scripts_the_page_has_the_picture(chromium, folder, boards):
    watched = opened(chromium, folder, "small", java_script_enabled=False)
    assert watched.page.locator("img").is_visible()
    assert not watched.page.locator("#clear").is_visible()
    watched.context.close()
