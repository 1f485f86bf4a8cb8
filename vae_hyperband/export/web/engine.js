// The model in the page: ONNX Runtime Web over the embedded graphs, and what z is drawn from.
// `ort` is ONNX Runtime Web, which the page holds above this script.

const given = JSON.parse(document.getElementById("data").textContent);
const Z = given.latentDim, [C, H, W] = given.shape, PIXELS = C * H * W;

function bytes(text) {
  return Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
}

function floats(text) {
  return new Float32Array(bytes(text).buffer);
}

async function unzipped(text) {
  const stream = new Blob([bytes(text)]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).arrayBuffer();
}

const images = bytes(given.images); // N * PIXELS, 0 to 255
const mu = floats(given.mu); // N * Z
const N = given.labels.length;

/** The pixels of image n, in [0, 1]. */
function pixelsOf(n) {
  return Float32Array.from(images.subarray(n * PIXELS, (n + 1) * PIXELS), (value) => value / 255);
}

/** The posterior mean of image n. */
function muOf(n) {
  return mu.slice(n * Z, (n + 1) * Z);
}

async function startModel() {
  ort.env.wasm.numThreads = 1; // more need headers that a file does not have
  ort.env.wasm.wasmBinary = await unzipped(given.runtime);
  const how = { executionProviders: ["wasm"] };
  const [encoder, decoder] = await Promise.all(
    [given.encoder, given.decoder].map((graph) => ort.InferenceSession.create(bytes(graph), how)));
  const velocity = given.flow && await ort.InferenceSession.create(bytes(given.flow.velocity), how);
  let last = Promise.resolve();
  // one at a time: the runtime takes no second call while one is under way
  const run = (session, feeds) => (last = last.catch(() => {}).then(() => session.run(feeds)));
  const row = (values) => new ort.Tensor("float32", Float32Array.from(values), [1, values.length]);
  return {
    /** x, B * PIXELS values in [0, 1] -> {mu, logvar}, B * Z each. */
    async encode(x) {
      const size = [x.length / PIXELS, C, H, W];
      const found = await run(encoder, { x: new ort.Tensor("float32", x, size) });
      return { mu: found.mu.data, logvar: found.logvar.data };
    },
    /** z, B * Z values -> B * PIXELS pixel means in [0, 1]. */
    async decode(z) {
      const found = await run(decoder, { z: new ort.Tensor("float32", z, [z.length / Z, Z]) });
      return found.image.data;
    },
    /** Where the flow's path from noise ends, for a label: by the midpoint rule, as in flow.py. */
    async flow(noise, label) {
      const { mean, std, shares, steps } = given.flow;
      const kind = row(shares.map((_, l) => Number(l === label)));
      const moved = async (z, at, t, length) => { // from z along the velocity at that place and time
        const { v } = await run(velocity, { z: row(at), t: row([t]), label: kind });
        return z.map((value, i) => value + length * v.data[i]);
      };
      let z = Float32Array.from(noise);
      for (let k = 0; k < steps; k++) {
        const half = await moved(z, z, k / steps, 0.5 / steps);
        z = await moved(z, half, (k + 0.5) / steps, 1 / steps);
      }
      return z.map((value, i) => mean[i] + std[i] * value);
    },
  };
}

/** Uniform numbers in [0, 1) that depend on the seed alone (SplitMix32). */
function uniforms(seed) {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x9e3779b9) >>> 0;
    let mixed = state ^ (state >>> 16);
    mixed = Math.imul(mixed, 0x21f0aaad);
    mixed ^= mixed >>> 15;
    mixed = Math.imul(mixed, 0x735a2d97);
    return ((mixed ^ (mixed >>> 15)) >>> 0) / 2 ** 32;
  };
}

/** Standard normal numbers, by Box & Muller 1958. */
function normals(uniform, count) {
  return Float64Array.from({ length: count }, () =>
    Math.sqrt(-2 * Math.log(1 - uniform())) * Math.cos(2 * Math.PI * uniform()));
}

/** The index that a uniform number chooses among shares that sum to 1. */
function chosen(shares, number) {
  for (let i = 0, sum = 0; i < shares.length; i++) {
    sum += shares[i];
    if (number < sum) return i;
  }
  return shares.findLastIndex((share) => share > 0);
}

const mixture = given.mixture && {
  ...given.mixture, weights: floats(given.mixture.weights), means: floats(given.mixture.means),
  roots: floats(given.mixture.roots),
};

/** One z of "prior", "mixture" or "flow"; of a label, or of any where it is -1. */
async function drawZ(model, sampler, seed, label) {
  const uniform = uniforms(seed);
  if (sampler === "flow") {
    const kind = label >= 0 ? label : chosen(given.flow.shares, uniform());
    return model.flow(normals(uniform, Z), kind);
  }
  if (sampler === "prior" && !given.vamp) return Float32Array.from(normals(uniform, Z));
  if (sampler === "prior") { // a VampPrior: the mean of the pseudo-inputs' posteriors
    const k = Math.floor(uniform() * given.vamp.count), at = k * Z, noise = normals(uniform, Z);
    const centre = floats(given.vamp.mu), spread = floats(given.vamp.sigma);
    return Float32Array.from(noise, (value, i) => centre[at + i] + spread[at + i] * value);
  }
  const { shares, components: K, weights, means, roots } = mixture;
  const l = label >= 0 ? label : chosen(shares, uniform());
  const at = l * K + chosen(weights.subarray(l * K, (l + 1) * K), uniform());
  const noise = normals(uniform, Z), z = new Float32Array(Z);
  for (let i = 0; i < Z; i++) {
    let value = means[at * Z + i];
    for (let j = 0; j <= i; j++) value += roots[(at * Z + i) * Z + j] * noise[j];
    z[i] = value;
  }
  return z;
}

/** The image whose posterior mean is nearest to z, and how far it is. */
function nearest(z) {
  let best = 0, least = Infinity;
  for (let n = 0; n < N; n++) {
    let sum = 0;
    for (let i = 0; i < Z && sum < least; i++) sum += (mu[n * Z + i] - z[i]) ** 2;
    if (sum < least) [best, least] = [n, sum];
  }
  return { n: best, distance: Math.sqrt(least) };
}

// ---- the map: the plane of the two directions in which the means vary most

const centre = floats(given.map.centre), axes = [0, 1].map((k) => floats(given.map.axes[k]));

function onMap(z) {
  return axes.map((axis) => axis.reduce((sum, a, i) => sum + a * (z[i] - centre[i]), 0));
}

/** z moved in the plane to that place; what it is outside of the plane stays. */
function movedTo(z, place) {
  const now = onMap(z), steps = place.map((value, k) => value - now[k]);
  return Float32Array.from(z, (value, i) => value + steps[0] * axes[0][i] + steps[1] * axes[1][i]);
}

function mixed(a, b, t) {
  return Float32Array.from(a, (value, i) => value + t * (b[i] - value));
}
