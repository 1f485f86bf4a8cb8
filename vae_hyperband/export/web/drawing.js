// Drawing or dropping an image, which is encoded; then the page starts.

const INK = Math.max(1, Math.round(560 / Math.max(W, H))); // so many pixels for one of the image
const board = $("draw"), pen = board.getContext("2d", { willReadFrequently: true });

/** Black or white, whichever is more like the images' first row. */
function groundOf() {
  let sum = 0;
  for (let n = 0; n < N; n++) for (let p = 0; p < W; p++) sum += images[n * PIXELS + p];
  return given.ink || sum > 127.5 * N * W ? "#fff" : "#000";
}

const ground = groundOf();

function clearBoard() {
  pen.fillStyle = ground;
  pen.fillRect(0, 0, board.width, board.height);
}

/** The drawing at the model's size; with ink on paper, bright where there is ink. */
function drawnPixels() {
  const small = document.createElement("canvas");
  [small.width, small.height] = [W, H];
  const tool = small.getContext("2d");
  tool.imageSmoothingQuality = "high";
  tool.drawImage(board, 0, 0, W, H);
  const { data } = tool.getImageData(0, 0, W, H), pixels = new Float32Array(PIXELS);
  for (let p = 0; p < H * W; p++) {
    const grey = (0.299 * data[4 * p] + 0.587 * data[4 * p + 1] + 0.114 * data[4 * p + 2]) / 255;
    for (let c = 0; c < C; c++) {
      const value = C === 1 ? grey : data[4 * p + c] / 255;
      pixels[c * H * W + p] = given.ink ? 1 - value : value;
    }
  }
  return pixels;
}

const encodeDrawing = latest(async () => setZ((await model.encode(drawnPixels())).mu));

/** An image file, fitted into the area; a white garment on black is turned round. */
async function place(file) {
  try {
    const picture = await createImageBitmap(file);
    const scale = Math.min(board.width / picture.width, board.height / picture.height);
    const [wide, high] = [picture.width * scale, picture.height * scale];
    clearBoard();
    pen.drawImage(picture, (board.width - wide) / 2, (board.height - high) / 2, wide, high);
    if (!$("dark").checked) {
      pen.globalCompositeOperation = "difference"; // |white - colour|
      pen.fillStyle = "#fff";
      pen.fillRect((board.width - wide) / 2, (board.height - high) / 2, wide, high);
      pen.globalCompositeOperation = "source-over";
    }
    await encodeDrawing();
  } catch {
    announce(`${file.name} is not an image that this browser can read.`);
  }
}

function startDrawing() {
  [board.width, board.height] = [W * INK, H * INK];
  $("dark-row").hidden = !given.ink; // else a file is taken as it is
  clearBoard();
  let last = null;
  const spot = (event) => {
    const box = board.getBoundingClientRect();
    return [(event.clientX - box.left) * board.width / box.width,
      (event.clientY - box.top) * board.height / box.height];
  };
  const stroke = (event) => {
    const [x, y] = spot(event);
    Object.assign(pen, {
      strokeStyle: ground === "#fff" ? "#000" : "#fff", lineCap: "round",
      lineWidth: Math.max(board.width, board.height) * 3 / 35, // of 28 pixels 2.4
    });
    pen.beginPath();
    pen.moveTo(...(last ?? [x, y]));
    pen.lineTo(x, y);
    pen.stroke();
    last = [x, y];
    encodeDrawing();
  };
  board.addEventListener("pointerdown", (event) => {
    board.setPointerCapture(event.pointerId);
    last = null;
    stroke(event);
  });
  board.addEventListener("pointermove", (event) => event.buttons && stroke(event));
  $("clear").addEventListener("click", () => { clearBoard(); encodeDrawing(); });
  $("file").addEventListener("change", () => $("file").files[0] && place($("file").files[0]));
  addEventListener("dragover", (event) => event.preventDefault());
  addEventListener("drop", (event) => {
    event.preventDefault();
    if (event.dataTransfer.files[0]) place(event.dataTransfer.files[0]);
  });
}

try {
  drawPoints();
  startMap();
  startMini();
  startSamples();
  startPair();
  startDrawing();
  model = await startModel();
  await setPair();
  await setZ(linkedZ() ?? muOf(0));
  addEventListener("hashchange", () => {
    const linked = linkedZ(); // a link that was just made here is of this z, up to its rounding
    if (linked?.some((value, i) => Math.abs(value - z[i]) > 1e-4)) setZ(linked);
  });
  window.explorer = { // for the console, and for tests
    ...model, drawZ: (...what) => drawZ(model, ...what), setZ, z: () => z, nearest,
  };
  ["aria-busy", "inert"].forEach((name) => $("main").removeAttribute(name));
} catch (error) {
  $("trouble").hidden = false;
  $("trouble").textContent = `This page cannot run here (${error}). It needs a browser with ` +
    "WebAssembly SIMD and DecompressionStream, as all have from 2023 on.";
  throw error;
}
