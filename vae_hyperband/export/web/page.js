// The page's controls. There is one z, which setZ changes.

const $ = (id) => document.getElementById(id);
const COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00",
  "#56B4E9", "#8C5A2B", "#7A52A5", "#6F6F6F", "#7F0000"];
/** The figures' colours first; labels beyond the tenth go around the circle of hues. */
function colourOf(label) {
  return COLOURS[label] ?? `hsl(${(label * 137.5) % 360} 55% 45%)`;
}

const EDGE = given.map.edge; // the map goes from -EDGE to EDGE
const PREVIEW = 84 / Math.max(W, H); // pixels of the map per pixel of the image under the pointer
// images higher than wide are as high as others are wide
document.documentElement.style.setProperty("--fit", Math.min(1, W / H));

let model, z = new Float32Array(Z), pairs = [0, 0];

function painted(pixels) {
  const picture = new ImageData(W, H);
  for (let p = 0; p < H * W; p++) {
    for (let c = 0; c < 3; c++) {
      const value = pixels[(C === 3 ? c : 0) * H * W + p];
      picture.data[4 * p + c] = 255 * (given.ink ? 1 - value : value); // ink on paper: 0 is white
    }
    picture.data[4 * p + 3] = 255;
  }
  return picture;
}

function show(canvas, pixels) {
  [canvas.width, canvas.height] = [W, H];
  canvas.getContext("2d").putImageData(painted(pixels), 0, 0);
}

function nameOf(label) {
  return given.names[label] ?? `label ${label}`;
}

// ---- z and what follows from it

function setZ(next) {
  z = Float32Array.from(next);
  for (const [place, i] of given.order.entries()) {
    const slider = sliders[place];
    slider.input.value = z[i];
    slider.output.textContent = z[i].toFixed(2);
  }
  drawMap();
  return showDecoded(z);
}

/** Runs one call at a time; of the calls made meanwhile, only the last. */
function latest(work) {
  let busy = false, asked = null;
  return async (...what) => {
    asked = what;
    if (busy) return;
    busy = true;
    try {
      while (asked) {
        const now = asked;
        asked = null;
        await work(...now);
      }
    } finally {
      busy = false;
    }
  };
}

const showDecoded = latest(async (asked) => {
  const pixels = await model.decode(asked);
  for (const id of ["image", "mini"]) show($(id), pixels);
  tell(asked);
});

function announce(text) {
  clearTimeout(telling);
  $("said").textContent = text;
}

let telling;
function tell(asked) {
  clearTimeout(telling); // a screen reader is told where z comes to rest, not each place
  telling = setTimeout(() => {
    const { n, distance } = nearest(asked);
    const length = Math.hypot(...asked);
    $("said").textContent = `|z| = ${length.toFixed(2)}. Nearest of the map's images: ` +
      `${nameOf(given.labels[n])}, ${distance.toFixed(2)} away.`;
  }, 150);
}

/** A small copy stays in sight while the image itself is not. */
function startMini() {
  new IntersectionObserver(([{ intersectionRatio }]) => {
    $("mini").hidden = intersectionRatio > 0.5;
  }, { threshold: 0.5 }).observe($("image"));
}

// ---- sliders

const sliders = given.order.map((i) => {
  const row = document.createElement("label"), name = document.createElement("span");
  const input = document.createElement("input"), output = document.createElement("span");
  [output.className, output.ariaHidden] = ["value", "true"]; // screen readers read the slider's own value
  name.textContent = `z[${i}]  ${given.nats[i].toFixed(2)} nats`;
  const [min, max] = [Math.floor(given.low[i]), Math.ceil(given.high[i])];
  Object.assign(input, { type: "range", min, max, step: 0.05, value: given.mean[i] });
  if (given.nats[i] < 0.01) row.className = "unused";
  input.addEventListener("input", () => {
    const next = z.slice();
    next[i] = Number(input.value);
    setZ(next);
  });
  row.append(name, input, output);
  $("sliders").append(row);
  return { input, output };
});

// ---- map

const SIZE = 640, places = Array.from({ length: N }, (_, n) => onMap(muOf(n)));
const points = document.createElement("canvas");
let hover = null;

function toScreen([u, v]) {
  return [(u / EDGE + 1) * SIZE / 2, (1 - v / EDGE) * SIZE / 2];
}

function fromScreen(event) {
  const box = $("map").getBoundingClientRect();
  return [2 * (event.clientX - box.left) / box.width - 1, 1 - 2 * (event.clientY - box.top) / box.height]
    .map((value) => within(value * EDGE));
}

function within(value) {
  return Math.max(-EDGE, Math.min(EDGE, value));
}

function drawPoints() {
  [points.width, points.height] = [SIZE, SIZE];
  const pen = points.getContext("2d");
  for (let n = 0; n < N; n++) {
    const [x, y] = toScreen(places[n]);
    pen.fillStyle = colourOf(given.labels[n]);
    pen.globalAlpha = 0.75;
    pen.beginPath();
    pen.arc(x, y, 3.2, 0, 2 * Math.PI);
    pen.fill();
  }
}

function drawMap() {
  const canvas = $("map"), pen = canvas.getContext("2d"), [x, y] = toScreen(onMap(z));
  pen.clearRect(0, 0, SIZE, SIZE);
  pen.drawImage(points, 0, 0);
  pen.lineWidth = 2;
  pen.strokeStyle = "#000";
  pen.beginPath();
  pen.arc(x, y, 8, 0, 2 * Math.PI);
  pen.moveTo(x - 13, y);
  pen.lineTo(x + 13, y);
  pen.moveTo(x, y - 13);
  pen.lineTo(x, y + 13);
  pen.stroke();
  if (hover) {
    const wide = PREVIEW * W, high = PREVIEW * H;
    const [left, top] = [hover.x + 12, hover.y + 12].map((value, k) => {
      const length = k ? high : wide;
      return value + length > SIZE ? value - length - 24 : value;
    });
    pen.imageSmoothingEnabled = false;
    pen.drawImage(hover.picture, left, top, wide, high);
    pen.strokeRect(left, top, wide, high);
  }
}

let inside = false;
const preview = latest(async (event) => {
  const place = fromScreen(event), [x, y] = toScreen(place);
  const picture = document.createElement("canvas");
  show(picture, await model.decode(movedTo(z, place)));
  if (inside) hover = { picture, x, y };
  drawMap();
});

function startMap() {
  const canvas = $("map");
  [canvas.width, canvas.height] = [SIZE, SIZE];
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    hover = null;
    setZ(movedTo(z, fromScreen(event)));
  });
  canvas.addEventListener("pointermove", (event) => {
    inside = true;
    if (event.buttons) setZ(movedTo(z, fromScreen(event)));
    else preview(event);
  });
  canvas.addEventListener("pointerleave", () => {
    [inside, hover] = [false, null];
    drawMap();
  });
  const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] };
  canvas.addEventListener("keydown", (event) => {
    const length = EDGE / (event.shiftKey ? 100 : 25);
    if (event.key in steps) {
      event.preventDefault();
      setZ(movedTo(z, onMap(z).map((value, k) => within(value + length * steps[event.key][k]))));
    } else if (event.key === "Enter") {
      setZ(muOf(nearest(z).n));
    }
  });
  for (const label of [...new Set(given.labels)].sort((a, b) => a - b)) {
    const item = document.createElement("li"), dot = document.createElement("i");
    dot.style.background = colourOf(label);
    item.append(dot, nameOf(label));
    $("legend").append(item);
  }
}

// ---- samples, links

const sample = latest(async () => {
  const [seed, label] = ["seed", "label"].map((id) => Number($(id).value));
  setZ(await drawZ(model, $("sampler").value, seed, label));
});

function option(select, value, text) {
  select.append(new Option(text, value));
}

function startSamples() {
  option($("sampler"), "prior", given.vamp ? "the VampPrior" : "the prior N(0, I)");
  option($("label"), -1, "any");
  for (const name of ["mixture", "flow"]) { // the one that was fitted, if any
    if (!given[name]) continue;
    option($("sampler"), name, `the fitted ${name}`);
    $("sampler").value = name;
    given[name].shares.forEach((share, label) => share > 0 && option($("label"), label, nameOf(label)));
  }
  const labelled = () => { $("label-row").hidden = $("sampler").value === "prior"; };
  $("sampler").addEventListener("change", () => { labelled(); sample(); });
  for (const id of ["label", "seed"]) $(id).addEventListener("change", sample);
  $("sample").addEventListener("click", sample);
  $("next").addEventListener("click", () => { $("seed").value = Number($("seed").value) + 1; sample(); });
  $("middle").addEventListener("click", () => setZ(given.mean));
  $("link").addEventListener("click", copyLink);
  labelled();
}

async function copyLink() {
  location.hash = `z=${Array.from(z, (value) => +value.toFixed(4)).join(",")}`;
  try {
    await navigator.clipboard.writeText(location.href);
    announce("The link is copied.");
  } catch { // a page from a file may not write there
    announce("The link is in the address bar.");
  }
}

function linkedZ() {
  const values = location.hash.match(/^#z=([-0-9.,e]+)$/)?.[1].split(",").map(Number);
  return values?.length === Z && values.every(Number.isFinite) ? values : null;
}

// ---- between two images

async function setPair() {
  ["image-a", "image-b"].forEach((id, k) => show($(id), pixelsOf(pairs[k])));
  const [a, b] = pairs.map(muOf), count = 9, all = new Float32Array(count * Z);
  for (let k = 0; k < count; k++) all.set(mixed(a, b, k / (count - 1)), k * Z);
  const pixels = await model.decode(all), strip = $("strip");
  [strip.width, strip.height] = [count * W, H];
  for (let k = 0; k < count; k++) {
    const picture = painted(pixels.subarray(k * PIXELS, (k + 1) * PIXELS));
    strip.getContext("2d").putImageData(picture, k * W, 0);
  }
}

function startPair() {
  pairs = [0, given.labels.findIndex((label) => label !== given.labels[0])].map((n) => Math.max(n, 0));
  $("between").addEventListener("input", () => setZ(mixed(...pairs.map(muOf), Number($("between").value))));
  ["pick-a", "pick-b"].forEach((id, k) => $(id).addEventListener("click", () => {
    pairs[k] = Math.floor(Math.random() * N);
    $("between").value = k;
    setPair();
    setZ(muOf(pairs[k]));
  }));
}
