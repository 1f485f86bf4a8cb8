"""The latent explorer in a real browser: it computes what PyTorch does, and can be worked."""

import dataclasses
import json
import time

import numpy as np
import pytest
import torch
from chromium import Watched, barriers, until

from vae_hyperband.common.config import RunOptions, TrainConfig
from vae_hyperband.common.errors import ConfigError
from vae_hyperband.data.fashion_mnist import FASHION_MNIST_CLASSES
from vae_hyperband.data.splits import Split, load_split
from vae_hyperband.evaluation.bounds import eval_dataloader
from vae_hyperband.evaluation.flow import Flow
from vae_hyperband.evaluation.latents import encode_split
from vae_hyperband.evaluation.samplers import LearnedFlow, Mixture
from vae_hyperband.export import explorer
from vae_hyperband.export.explorer import page
from vae_hyperband.model.initialization import initialize, initialized_vae
from vae_hyperband.model.vae import VAE
from vae_hyperband.reporting import figures
from vae_hyperband.train_vae import main
from vae_hyperband.training.loop import fit

browsing = pytest.mark.browser


@pytest.fixture(scope="module")
def train():
    return load_split("train", None, "drawn")


@pytest.fixture(scope="module")
def split(train):
    held_out = load_split("validation", None, "drawn")
    return dataclasses.replace(
        held_out, images_NCHW=held_out.images_NCHW[:300], labels_N=held_out.labels_N[:300]
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("explorer")


@pytest.fixture(scope="module")
def ckpt(folder, train):
    """28x28, trained for a moment, so that latents mean something."""
    config = TrainConfig(dataset="drawn", latent_dim=6, epochs=1, beta=0.3)
    where = RunOptions(
        run="a", device="cpu", checkpoints_dir=folder / "checkpoints", logs_dir=folder / "logs"
    )
    return fit(config, where).best


@pytest.fixture(scope="module")
def exported(ckpt, folder):
    """index.html as the command writes it, with the sampler."""
    command = ["export", str(ckpt), "--format", "web", "--out", str(folder / "web")]
    assert main([*command, "--sampler", "mixture", "--num-images", "300"]) == 0
    return folder / "web" / "index.html"


def opened(chromium, path, fragment="", **context):
    watched = Watched(chromium, **context)
    watched.page.goto(path.as_uri() + fragment)
    watched.page.wait_for_selector("main:not([aria-busy])", timeout=60_000)
    return watched


@pytest.fixture(scope="module")
def watched(chromium, exported):
    return opened(chromium, exported, color_scheme="light")


@pytest.fixture
def web(watched):
    """The page, as it was opened."""
    watched.page.evaluate("explorer.setZ(new Float32Array(6))")
    return watched.page


@pytest.fixture(scope="module")
def model(ckpt):
    from vae_hyperband.model.checkpoint import load_model

    return load_model(ckpt).requires_grad_(False)


def computed(page, name, values):
    """What the page's encoder or decoder makes of an array."""
    code = f"values => explorer.{name}(Float32Array.from(values))"
    if name == "encode":
        code += ".then(found => [Array.from(found.mu), Array.from(found.logvar)])"
    else:
        code += ".then(found => Array.from(found))"
    return torch.tensor(page.evaluate(code, values.flatten().tolist()))


def drawn(page, num, sampler, label):
    """So many z of a sampler of the page, by the seeds from 0 on."""
    code = (
        "([num, ...how]) => Promise.all(Array.from({ length: num }, (_, i) => "
        "explorer.drawZ(how[0], i, how[1]))).then(found => found.map(z => Array.from(z)))"
    )
    return torch.tensor(page.evaluate(code, [num, sampler, label]))


def z_of(page):
    return torch.tensor(page.evaluate("Array.from(explorer.z())"))


def settle(page, before):
    """Wait until z is another one."""
    until(
        page,
        "before => explorer.z().some((value, i) => Math.abs(value - before[i]) > 1e-6)",
        arg=before.tolist(),
    )
    return z_of(page)


@browsing
def test_the_page_computes_what_pytorch_does(web, model, split):
    x_BCHW = split.pixels(slice(64))
    z_BZ = 2 * torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
    mu_BZ, logvar_BZ = model.encode(x_BCHW)
    mu, logvar = computed(web, "encode", x_BCHW)
    torch.testing.assert_close(mu.view_as(mu_BZ), mu_BZ, rtol=0, atol=1e-4)
    torch.testing.assert_close(logvar.view_as(logvar_BZ), logvar_BZ, rtol=0, atol=1e-4)
    images = computed(web, "decode", z_BZ).view(64, 1, 28, 28)
    torch.testing.assert_close(images, model.decode_images(z_BZ), rtol=0, atol=1e-4)


@browsing
def test_a_colour_model_with_a_vamp_prior_runs_too(chromium, tmp_path):
    model = initialized_vae(5, 16, 3, seed=1, likelihood="continuous-bernoulli", pseudo_inputs=4)
    model.eval().requires_grad_(False)
    stream = torch.Generator().manual_seed(2)
    images = torch.randint(256, (20, 3, 16, 16), dtype=torch.uint8, generator=stream)
    split = Split(images, torch.arange(20) % 3, "0")
    found = page(model, split, "T & <b>", {})
    (tmp_path / "index.html").write_text(found)
    watched = opened(chromium, tmp_path / "index.html")
    z_BZ = torch.randn(9, 5, generator=stream)
    decoded = computed(watched.page, "decode", z_BZ).view(9, 3, 16, 16)
    torch.testing.assert_close(decoded, model.decode_images(z_BZ), rtol=0, atol=1e-4)
    assert watched.page.title() == "T & <b>"
    z_NZ, expected = drawn(watched.page, 4000, "prior", -1), model.sample_prior(4000, stream)
    torch.testing.assert_close(z_NZ.mean(0), expected.mean(0), rtol=0, atol=0.1)
    torch.testing.assert_close(z_NZ.std(0), expected.std(0), rtol=0.05, atol=0)
    assert watched.troubles == []
    watched.context.close()


@browsing
@pytest.mark.parametrize(
    ("shape", "settings"),
    [
        ((3, 20, 33), {"network": "residual", "widths": (4, 8)}),
        ((1, 47, 12), {"widths": (4, 6, 8)}),
    ],
    ids=["wide, colour, residual", "high, grey"],
)
def test_images_of_any_size_are_computed_and_shown_as_they_are(chromium, tmp_path, shape, settings):
    channels, height, width = shape
    model = initialized_vae(5, (height, width), channels, seed=1, **settings)
    model.eval().requires_grad_(False)
    stream = torch.Generator().manual_seed(2)
    images = torch.randint(128, 256, (20, *shape), dtype=torch.uint8, generator=stream)
    split = Split(images, torch.arange(20) % 2, "0")
    (tmp_path / "index.html").write_text(page(model, split, "One", {}))
    watched = opened(chromium, tmp_path / "index.html")
    web, x_BCHW = watched.page, split.pixels(slice(4))
    mu_BZ, logvar_BZ = model.encode(x_BCHW)
    mu, logvar = computed(web, "encode", x_BCHW)
    torch.testing.assert_close(mu.view_as(mu_BZ), mu_BZ, rtol=0, atol=1e-4)
    torch.testing.assert_close(logvar.view_as(logvar_BZ), logvar_BZ, rtol=0, atol=1e-4)
    decoded = computed(web, "decode", mu_BZ).view_as(x_BCHW)
    torch.testing.assert_close(decoded, model.decode_images(mu_BZ), rtol=0, atol=1e-4)
    shown = web.evaluate(
        f"[...document.getElementById('image-a').getContext('2d')"
        f".getImageData(0, 0, {width}, {height}).data]"
    )
    first = images[0].expand(3, -1, -1).permute(1, 2, 0)
    assert torch.equal(torch.tensor(shown).view(height, width, 4)[:, :, :3], first.long())
    for name in ("image", "image-a", "draw"):
        box = web.locator(f"#{name}").bounding_box()
        assert abs(box["width"] / box["height"] / (width / height) - 1) < 0.05, name
        assert max(box["width"], box["height"]) < 360, name
    web.click("#clear")  # the ground is white, as the images' is brighter than grey
    white = model.encode(torch.ones(1, *shape))[0][0]
    until(
        web,
        "white => explorer.z().every((value, i) => Math.abs(value - white[i]) < 1e-4)",
        arg=white.tolist(),
    )
    assert web.locator("#dark").is_hidden()
    assert watched.troubles == []
    watched.context.close()


@browsing
def test_nothing_is_asked_of_any_network_and_nothing_else_may_run(watched, web, exported):
    assert watched.requests == [exported.as_uri()]
    assert watched.troubles == []
    for attempt in (
        "fetch('http://127.0.0.1:9/')",
        "new Promise((done, fail) => { const image = new Image(); image.onerror = fail; "
        "image.onload = done; image.src = 'http://127.0.0.1:9/a.png'; })",
        "new Promise((done, fail) => { const script = document.createElement('script'); "
        "script.textContent = 'window.broken = 1'; document.body.append(script); "
        "window.broken ? done() : fail(); })",
    ):
        assert web.evaluate(f"{attempt}.then(() => 'allowed', () => 'refused')") == "refused"
    for what in (  # by the policy, not because nothing answers there
        "Connecting to 'http://127.0.0.1:9/' violates",
        "Loading the image 'http://127.0.0.1:9/a.png' violates",
        "Executing inline script violates",
    ):
        assert any(said.startswith(what) for said in watched.troubles), watched.troubles
    watched.troubles.clear()


@browsing
def test_sliders_are_ordered_by_what_their_dimension_says_and_change_the_image(web, model, split):
    posteriors = encode_split(model, eval_dataloader(split))
    kl_Z = 0.5 * (posteriors.mu_NZ**2 + posteriors.logvar_NZ.exp() - 1 - posteriors.logvar_NZ)
    order = kl_Z.mean(dim=0).argsort(descending=True).tolist()
    labels = web.locator("#sliders label span:first-child").all_text_contents()
    assert [int(label.split("]")[0][2:]) for label in labels] == order
    shown = "document.getElementById('image').toDataURL()"
    until(web, "document.getElementById('image').width === 28")
    before, z = web.evaluate(shown), z_of(web)
    slider = web.locator("#sliders input").first
    slider.focus()
    slider.press("End")
    now = settle(web, z)
    expected = torch.zeros(6)
    expected[order[0]] = now[order[0]]
    assert now[order[0]] >= 4
    assert torch.equal(now, expected)
    until(web, f"before => {shown} !== before", arg=before)


@browsing
def test_the_image_shown_is_the_one_decoded(web, model):
    z = torch.tensor([0.5, -1, 0.25, 1, -0.5, 0.75])
    web.evaluate("z => explorer.setZ(z)", z.tolist())
    expected = 255 * (1 - model.decode_images(z[None])[0, 0])
    code = (
        "Array.from(document.getElementById('image').getContext('2d')"
        ".getImageData(0, 0, 28, 28).data)"
    )
    shown = torch.tensor(web.evaluate(code)).view(28, 28, 4)[:, :, 0]
    assert (shown - expected).abs().max() <= 0.51


@browsing
def test_the_map_is_worked_by_keyboard_and_pointer(web, split, model):
    canvas, z = web.locator("#map"), z_of(web)
    canvas.focus()
    canvas.press("ArrowRight")
    right = settle(web, z)
    canvas.press("ArrowUp")
    up = settle(web, right)
    assert torch.dot(right - z, up - right).abs() < 1e-4  # at right angles
    for _ in range(60):  # more than from one edge to the other
        canvas.press("ArrowLeft")
    edge = z_of(web)
    canvas.press("ArrowLeft")
    assert torch.allclose(z_of(web), edge, atol=1e-5)  # it stays on the map
    web.evaluate("z => explorer.setZ(z)", up.tolist())
    canvas.press("Enter")
    taken = settle(web, up)
    mu_NZ = encode_split(model, eval_dataloader(split)).mu_NZ
    nearest = (mu_NZ - up).norm(dim=1).argmin()
    torch.testing.assert_close(taken, mu_NZ[nearest], rtol=0, atol=1e-5)
    canvas.click(position={"x": 40, "y": 60})
    settle(web, taken)
    canvas.hover(position={"x": 90, "y": 90})
    seen = (
        "Array.from(document.getElementById('map').getContext('2d').getImageData(0, 0, 640, 640)"
        ".data).reduce((a, b) => a + b)"
    )
    before = web.evaluate(seen)
    canvas.hover(position={"x": 120, "y": 200})
    until(web, f"before => {seen} !== before", before)


@browsing
def test_a_seed_gives_the_same_sample_and_the_next_another(web):
    web.select_option("#sampler", "prior")
    web.fill("#seed", "7")
    web.press("#seed", "Enter")
    first = z_of(web)
    web.click("#next")
    second = settle(web, first)
    web.fill("#seed", "7")
    web.click("#sample")
    assert torch.equal(settle(web, second), first)


@browsing
def test_samples_are_of_the_prior_and_of_the_mixture(web, ckpt):
    z_NZ = drawn(web, 6000, "prior", -1).double()
    torch.testing.assert_close(z_NZ.mean(0), torch.zeros(6).double(), rtol=0, atol=0.06)
    torch.testing.assert_close(z_NZ.T.cov(), torch.eye(6).double(), rtol=0, atol=0.08)
    from vae_hyperband.evaluation.samplers import FORMAT, KEYS, sampler_file
    from vae_hyperband.model.checkpoint import load_pt

    found = load_pt(sampler_file(ckpt, "mixture"), FORMAT, KEYS)
    mixture = Mixture(**found["tensors"])
    for label in (None, 1):
        expected = mixture.draw(6000, torch.Generator().manual_seed(0), label).double()
        z_NZ = drawn(web, 6000, "mixture", -1 if label is None else label).double()
        size = expected.std(0)
        assert ((z_NZ.mean(0) - expected.mean(0)) / size).abs().max() < 0.08
        apart = (z_NZ.T.cov() - expected.T.cov()) / torch.outer(size, size)
        assert apart.abs().max() < 0.1


@browsing
def test_the_flow_goes_where_pytorch_s_goes(chromium, tmp_path):
    model = initialized_vae(5, 8, 1, seed=1).eval().requires_grad_(False)
    stream = torch.Generator().manual_seed(2)
    images = torch.randint(256, (24, 1, 8, 8), dtype=torch.uint8, generator=stream)
    split = Split(images, torch.arange(24) % 3, "0")
    flow = initialize(Flow(5, num_labels=3, width=24, depth=2), stream)
    flow.mean_Z, flow.std_Z = torch.linspace(-1, 1, 5), torch.linspace(0.5, 2, 5)
    shares_L = torch.tensor([0.0, 0.75, 0.25])
    sampler = LearnedFlow(shares_L, flow)
    (tmp_path / "index.html").write_text(page(model, split, "One", {}, sampler))
    watched = opened(chromium, tmp_path / "index.html")
    noise_NZ = torch.randn(6, 5, generator=stream)
    label_N = torch.tensor([0, 1, 2, 2, 1, 0])
    found = watched.page.evaluate(
        "paths => Promise.all(paths.map(([noise, label]) => explorer.flow(noise, label)"
        ".then(z => Array.from(z))))",
        [
            [noise_Z, label]
            for noise_Z, label in zip(noise_NZ.tolist(), label_N.tolist(), strict=True)
        ],
    )
    expected = flow.path(noise_NZ, label_N)
    torch.testing.assert_close(torch.tensor(found), expected, rtol=0, atol=1e-4)
    z_NZ, expected = drawn(watched.page, 400, "flow", -1), sampler.draw(4000, stream)
    apart = (z_NZ.mean(0) - expected.mean(0)) / expected.std(0)
    assert apart.abs().max() < 0.2  # four standard errors
    assert watched.page.input_value("#sampler") == "flow"
    labels = watched.page.locator("#label option").all_text_contents()
    assert labels == ["any", "label 1", "label 2"]  # no training image has label 0
    before = z_of(watched.page)
    watched.page.select_option("#label", "2")
    seed_0_of_label_2 = watched.page.evaluate("explorer.drawZ('flow', 0, 2).then(z => [...z])")
    assert settle(watched.page, before).tolist() == seed_0_of_label_2
    assert watched.troubles == []
    watched.context.close()


@browsing
def test_a_link_brings_back_the_same_z(chromium, exported, web):
    web.evaluate("explorer.setZ([0.5, -1.25, 0.0625, 2, -3, 0.75])")
    web.click("#link")
    until(web, "location.hash.length > 3")
    until(web, "document.getElementById('said').textContent.includes('link is')")
    web.evaluate("dispatchEvent(new HashChangeEvent('hashchange'))")  # as the new link itself does
    time.sleep(0.5)  # what the page says of z comes after 150 ms, and must not take its place
    assert "link is" in web.text_content("#said")
    fragment = web.evaluate("location.hash")
    again = opened(chromium, exported, fragment)
    assert z_of(again.page).tolist() == [0.5, -1.25, 0.0625, 2, -3, 0.75]
    again.context.close()
    broken = opened(chromium, exported, "#z=1,2,<script>")
    assert z_of(broken.page).isfinite().all()
    assert broken.troubles == []
    broken.context.close()


@browsing
def test_one_dimension_and_twelve_labels(chromium, tmp_path):
    model = initialized_vae(1, 8, 1, seed=1).eval().requires_grad_(False)
    images = torch.randint(256, (24, 1, 8, 8), generator=torch.Generator().manual_seed(2))
    split = Split(images.to(torch.uint8), torch.arange(24) % 12, "0")
    posteriors = encode_split(model, eval_dataloader(split))
    (tmp_path / "index.html").write_text(page(model, split, "One", {}))
    watched = opened(chromium, tmp_path / "index.html")
    assert z_of(watched.page).tolist() == posteriors.mu_NZ[0].tolist()  # no link is not z = 0
    dots = "Array.from(document.querySelectorAll('#legend i'), dot => dot.style.background)"
    assert len(set(watched.page.evaluate(dots))) == 12
    assert watched.troubles == []
    watched.context.close()


@browsing
def test_a_finger_scrolls_over_pictures_and_draws_where_one_draws(chromium, exported):
    watched = opened(
        chromium, exported, viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True
    )
    page, devtools = watched.page, watched.context.new_cdp_session(watched.page)
    for name, scrolls in (("image", True), ("strip", True), ("map", False), ("draw", False)):
        page.evaluate(f"document.getElementById('{name}').scrollIntoView({{block: 'center'}})")
        hidden = str(name == "image").lower()  # the small copy, while the image itself is in sight
        until(page, f"document.getElementById('mini').hidden === {hidden}")
        before = page.evaluate("scrollY")
        box = page.locator(f"#{name}").bounding_box()
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        for moved in range(0, 101, 10):
            kind = "touchMove" if moved else "touchStart"
            touch = {"type": kind, "touchPoints": [{"x": x, "y": y - moved}]}
            devtools.send("Input.dispatchTouchEvent", touch)
        devtools.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
        assert (abs(page.evaluate("scrollY") - before) > 50) == scrolls, name
    watched.context.close()


def test_nothing_can_be_clicked_before_the_model_is_there(exported):
    html = exported.read_text()
    assert '<main id="main" aria-busy="true" inert>' in html
    assert '"aria-busy", "inert"' in html  # what is taken away when it is


@browsing
def test_drawing_and_files_are_encoded(web, model, split, tmp_path):
    z = z_of(web)
    web.locator("#draw").scroll_into_view_if_needed()
    box = web.locator("#draw").bounding_box()
    web.mouse.move(box["x"] + 60, box["y"] + 60)
    web.mouse.down()
    web.mouse.move(box["x"] + 200, box["y"] + 180, steps=4)
    web.mouse.up()
    drawn = settle(web, z)
    web.click("#clear")
    empty = settle(web, drawn)
    torch.testing.assert_close(
        empty, model.encode(torch.zeros(1, 1, 28, 28))[0][0], rtol=0, atol=1e-3
    )
    # an image of the map, as a file: the map's nearest is the image itself
    import matplotlib.image

    number = 17
    for name, picture, dark in (
        ("dark.png", 255 - split.images_NCHW[number, 0], True),
        ("light.png", split.images_NCHW[number, 0], False),
    ):
        matplotlib.image.imsave(tmp_path / name, picture.numpy(), cmap="gray", vmin=0, vmax=255)
        web.set_checked("#dark", dark)
        before = z_of(web)
        web.set_input_files("#file", tmp_path / name)
        settle(web, before)
        assert web.evaluate("explorer.nearest(explorer.z()).n") == number
        web.click("#clear")
    (tmp_path / "text.png").write_text("no image")
    web.set_input_files("#file", tmp_path / "text.png")
    until(web, "document.getElementById('said').textContent.includes('not an image')")


@browsing
def test_interpolation_ends_at_the_two_images(web):
    slider, z = web.locator("#between"), z_of(web)
    slider.focus()
    slider.press("End")
    last = settle(web, z)
    slider.press("Home")
    first = settle(web, last)
    assert web.evaluate("explorer.nearest(explorer.z())") == {"n": 0, "distance": 0}
    slider.press("ArrowRight")
    torch.testing.assert_close(settle(web, first), first + 0.01 * (last - first))


@browsing
def test_every_control_has_a_name_and_nothing_is_cut_off_on_a_phone(chromium, exported):
    size = {"width": 390, "height": 844}
    watched = opened(chromium, exported, viewport=size, color_scheme="dark")
    page = watched.page
    assert page.evaluate("document.scrollingElement.scrollWidth") <= 390
    controls = page.locator("button, input, select, canvas:not([aria-hidden])")
    assert controls.count() > 20
    for i in range(controls.count()):
        name = controls.nth(i).evaluate(
            "e => (e.getAttribute('aria-label') ?? e.labels?.[0]?.textContent ?? e.textContent)"
            ".trim()"
        )
        assert name, controls.nth(i).evaluate("e => e.outerHTML")
    ink, paper = page.evaluate(
        "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
    )
    assert min(_numbers(ink)) > 200 > 60 > max(_numbers(paper))  # dark
    assert watched.troubles == []
    watched.context.close()


@browsing
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_that_keeps_people_out(chromium, exported, scheme):
    watched = opened(chromium, exported, color_scheme=scheme)
    assert barriers(watched.page) == []
    watched.page.set_viewport_size({"width": 390, "height": 844})
    assert barriers(watched.page) == []
    live = watched.page.locator("output, [role=status], [role=alert], [aria-live]")
    assert live.count() == 2  # who listens is told where z comes to rest, and of troubles
    watched.page.evaluate("document.getElementById('image').removeAttribute('aria-label')")
    assert len(barriers(watched.page)) == 1  # it does look
    watched.context.close()


def _numbers(colour):
    return [int(part) for part in colour.split("(")[1].rstrip(")").split(",")[:3]]


def test_a_page_is_made_without_a_browser(split, tmp_path):
    """In make test: the parts that need none."""
    model = initialized_vae(1, 28, 1, seed=0).eval().requires_grad_(False)
    named = dataclasses.replace(split, class_names=FASHION_MNIST_CLASSES)
    html = page(model, named, "</title><script>", {"a": "<&"})
    assert html.count("<script") == 2
    assert "<title>&lt;/title&gt;&lt;script&gt;</title>" in html
    data = json.loads(html.split('id="data">')[1].split("</script>")[0])
    assert data["latentDim"] == 1
    assert data["names"] == list(FASHION_MNIST_CLASSES)
    assert data["order"] == [0]
    assert len(data["labels"]) == len(split)
    assert np.isfinite(data["nats"]).all()


def test_a_page_of_images_of_two_channels_is_refused():
    model = VAE(2, 8, 2)
    split = Split(torch.zeros(4, 2, 8, 8, dtype=torch.uint8), torch.zeros(4).long(), "0")
    with pytest.raises(ConfigError, match="2 channels"):
        page(model, split, "", {})


def test_the_colours_of_the_map_start_with_those_of_the_figures():
    script = (explorer.FOLDER / "page.js").read_text()
    colours = script.split("COLOURS = [")[1].split("]")[0]
    assert all(colour in colours for colour in (figures.ORANGE, figures.BLUE, figures.GREEN))
