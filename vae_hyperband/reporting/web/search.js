// The charts of a search, drawn with D3. What is filtered and which trial is pointed at is one state,
// which every chart and the table of trials follow.

const data = JSON.parse(document.getElementById("data").textContent);
const trials = data.trials.filter((trial) => trial.score !== null); // the others have only a row
trials.sort((a, b) => b.score - a.score); // the best one is drawn last, above the others
const winner = trials.find((trial) => trial.number === data.winner);
const rows = new Map([...document.querySelectorAll("#trials tr")].map((row) => [Number(row.dataset.trial), row]));
const dark = matchMedia("(prefers-color-scheme: dark)");
const filters = new Map(); // by the name of an axis: the lowest and the highest value shown
let charts = [];

// ---- Axes, scales and colours

// Upper end of a scale of losses: those of a few diverged trials would leave no room for the others.
function upperEnd(values) {
  const [low, high] = [0.25, 0.75].map((share) => d3.quantile(values, share));
  return Math.min(d3.max(values), high + 1.5 * (high - low));
}

const scores = trials.map((trial) => trial.score);
const axes = data.axes.map((axis, i) => ({ ...axis, of: (trial) => trial.values[i] }));
axes.push({ name: "epochs", ends: [0, data.maxEpochs], of: (trial) => trial.epochs });
axes.push({ name: data.short, ends: withRoom([d3.min(scores), upperEnd(scores)]), of: (trial) => trial.score });

// The ends of a scale; a little wider if they are equal.
function withRoom([low, high]) {
  return high > low ? [low, high] : [low - 1, high + 1];
}

function scaleOf(axis, range) {
  if (axis.labels) return d3.scaleLinear([-0.5, axis.labels.length - 0.5], range);
  return (axis.log ? d3.scaleLog : d3.scaleLinear)(axis.ends, range).clamp(true);
}

// Trials of the same choice lie beside each other, not on one another.
function place(axis, trial) {
  const beside = axis.labels ? (((trial.number * 0.618034) % 1) - 0.5) * 0.6 : 0;
  return axis.of(trial) + beside;
}

function ticks(axis, make, count) {
  if (axis.labels) make.tickValues(d3.range(axis.labels.length)).tickFormat((i) => axis.labels[i]);
  else make.tickValues(axis.log ? logTicks(axis.ends) : make.scale().ticks(count)).tickFormat(d3.format(".4~g"));
  return make.tickSizeOuter(0);
}

// 1, 2 and 5 times powers of ten; evenly spaced ones where fewer than two of those fit.
function logTicks(ends) {
  const found = d3.scaleLog().domain(ends).ticks().filter((tick) => /^[125]/.test(d3.format(".0e")(tick)));
  return found.length > 1 ? found : d3.ticks(...ends, 3);
}

function color(trial) {
  const [best, worst] = axes.at(-1).ends;
  const share = Math.min((trial.score - best) / (worst - best), 1);
  return d3.interpolateViridis(dark.matches ? 1 - 0.85 * share : 0.9 * share);
}

const titled = (name) => name.replaceAll("_", " ");
const nameOf = (trial) => `trial_${String(trial.number).padStart(3, "0")}`;
const few = trials.length <= 200;

// ---- Charts: each shows some of the trials, marks the one that is pointed at, and finds the nearest

const widthOf = (parent) => Math.max(parent.clientWidth, 200);

function chart(parent, width, height, label) {
  const svg = d3.select(parent).append("svg").attr("width", width).attr("height", height);
  svg.attr("role", "img").attr("aria-label", label);
  return svg;
}

// The layers of a chart: all trials, the winner, and the one that is pointed at above them.
function layers(svg) {
  return ["all", "winner", "pointed"].map((name) => svg.append("g").attr("class", name));
}

function watchPointer(svg, nearest) {
  svg.on("pointermove", (event) => {
    if (event.buttons) return; // a brush is being dragged
    const found = nearest(...d3.pointer(event, svg.node()));
    point(found, event);
  });
  svg.on("pointerleave", () => point(null));
  svg.on("click", (event) => {
    const found = nearest(...d3.pointer(event, svg.node()));
    if (found && !event.target.closest(".brush")) rows.get(found.number).focus();
  });
}

function within(found, distance) {
  const best = d3.least(found, distance);
  return best && distance(best) < 24 ? best : null;
}

function parallel() {
  const parent = document.getElementById("parallel");
  const [height, top, bottom, side] = [320, 34, 12, 52];
  const width = Math.max(parent.parentElement.clientWidth, 96 * axes.length);
  const svg = chart(parent, width, height, "Parallel coordinates: a line per trial, an axis per hyperparameter");
  const x = d3.scalePoint(d3.range(axes.length), [side, width - side]);
  const y = axes.map((axis) => scaleOf(axis, [height - bottom, top]));
  const heights = (trial) => axes.map((axis, i) => y[i](place(axis, trial)));
  const path = (trial) => d3.line()(heights(trial).map((at, i) => [x(i), at]));
  const [all, best, pointed] = layers(svg);
  const lines = all.selectAll("path").data(trials).join("path").attr("d", path).attr("stroke", color);
  all.classed("many", !few);
  best.append("path").attr("d", path(winner));
  const brushes = axes.map((axis, i) => {
    const group = svg.append("g").attr("class", "axis").attr("transform", `translate(${x(i)},0)`);
    group.call(ticks(axis, d3.axisLeft(y[i]), 6));
    group.append("text").attr("class", "name").attr("y", top - 16).text(titled(axis.name));
    const brush = d3.brushY().extent([[-14, top], [14, height - bottom]]);
    brush.on("brush end", ({ selection, sourceEvent }) => {
      if (sourceEvent) filter(axis, selection && selected(axis, y[i], selection));
    });
    group.append("g").attr("class", "brush").call(brush);
    return () => {
      const range = filters.get(axis.name);
      const half = axis.labels ? 0.5 : 0;
      const [low, high] = range ? [y[i](Math.max(range[0], y[i].domain()[0]) - half), y[i](Math.min(range[1], y[i].domain()[1]) + half)] : [];
      group.select(".brush").call(brush.move, range && low > high ? [high, low] : null);
    };
  });
  let visible = trials;
  watchPointer(svg, (px, py) => {
    const left = Math.max(0, Math.min(axes.length - 2, Math.floor((px - side) / x.step())));
    const share = (px - x(left)) / x.step();
    return within(visible, (trial) => {
      const [from, to] = [left, left + 1].map((i) => y[i](place(axes[i], trial)));
      return Math.abs(from + share * (to - from) - py);
    });
  });
  return {
    show(shown) {
      visible = trials.filter((trial) => shown.has(trial));
      lines.classed("out", (trial) => !shown.has(trial));
      best.classed("out", !shown.has(winner));
    },
    moveBrushes: () => brushes.forEach((move) => move()),
    point: (trial) => pointed.selectAll("path").data(trial ? [trial] : []).join("path").attr("d", path),
  };
}

// What a brush from one pixel to another selects; at an end of the axis, whatever lies beyond.
function selected(axis, scale, [from, to]) {
  const [low, high] = [scale.invert(to), scale.invert(from)];
  if (axis.labels) return [Math.ceil(low), Math.floor(high)];
  const [bottom, top] = scale.range();
  return [to >= bottom - 1 ? -Infinity : low, from <= top + 1 ? Infinity : high];
}

function curves() {
  const parent = document.getElementById("curves");
  const [width, height, left, bottom] = [widthOf(parent), 300, 46, 34];
  const svg = chart(parent, width, height, `${data.metric} of each trial after each epoch`);
  const x = d3.scaleLinear(withRoom([1, data.maxEpochs]), [left + 8, width - 12]);
  const y = d3.scaleLinear([0, 1], [height - bottom, 10]);
  const grid = svg.append("g").attr("class", "axis grid").attr("transform", `translate(${left},0)`);
  const below = svg.append("g").attr("class", "axis").attr("transform", `translate(0,${height - bottom})`);
  below.call(d3.axisBottom(x).tickValues(wholeTicks(x)).tickFormat(d3.format("d")).tickSizeOuter(0));
  below.append("text").attr("class", "name").attr("x", (left + width) / 2).attr("y", 30).text("epoch");
  svg.append("clipPath").attr("id", "curves-area").append("rect")
    .attr("x", left).attr("width", width - left).attr("y", 4).attr("height", height - bottom - 2);
  const area = svg.append("g").attr("clip-path", "url(#curves-area)");
  const [all, best, pointed] = layers(area);
  all.classed("many", !few);
  const line = d3.line((_, i) => x(i + 1), (value) => y(value));
  const draw = (group, found) => {
    group.selectAll("path").data(found).join("path").attr("d", (trial) => line(trial.curve)).attr("stroke", color);
    group.selectAll("circle").data(found).join("circle").attr("class", (trial) => trial.outcome).attr("r", few ? 3.5 : 2)
      .attr("cx", (trial) => x(trial.curve.length)).attr("cy", (trial) => y(trial.curve.at(-1)))
      .attr("stroke", color).attr("fill", color);
  };
  let visible = trials;
  watchPointer(svg, (px, py) =>
    within(visible, (trial) => d3.min(trial.curve, (value, i) => Math.hypot(x(i + 1) - px, y(value) - py))),
  );
  return {
    show(shown) {
      visible = trials.filter((trial) => shown.has(trial));
      const values = visible.flatMap((trial) => trial.curve);
      if (values.length) y.domain(withRoom([d3.min(values), upperEnd(values)])).nice();
      grid.call(d3.axisLeft(y).ticks(6, ".4~g").tickSize(left - width));
      draw(all, visible);
      draw(best, shown.has(winner) ? [winner] : []);
    },
    point: (trial) => draw(pointed, trial ? [trial] : []),
  };
}

function wholeTicks(scale) {
  return scale.ticks(8).filter(Number.isInteger);
}

function budget() {
  const parent = document.getElementById("budget");
  const [width, height, left, bottom] = [widthOf(parent), 300, 46, 34];
  const svg = chart(parent, width, height, "Number of trials that trained at least so many epochs");
  const epochs = d3.range(1, data.maxEpochs + 1);
  const x = d3.scaleLinear([0.5, data.maxEpochs + 0.5], [left, width - 8]);
  const y = d3.scaleLinear([0, 1], [height - bottom, 30]);
  const below = svg.append("g").attr("class", "axis").attr("transform", `translate(0,${height - bottom})`);
  below.call(d3.axisBottom(x).tickValues(wholeTicks(x)).tickFormat(d3.format("d")).tickSizeOuter(0));
  below.append("text").attr("class", "name").attr("x", (left + width) / 2).attr("y", 30).text("epoch");
  const sideways = svg.append("g").attr("class", "axis").attr("transform", `translate(${left},0)`);
  const bars = svg.append("g");
  const words = svg.append("text").attr("class", "words").attr("x", left).attr("y", 16);
  const each = Math.max((x(2) - x(1)) * 0.86, 1);
  const bar = (kind, low, high) =>
    bars.selectAll(`.${kind}`).data(epochs).join("rect").attr("class", kind).attr("width", each)
      .attr("x", (epoch) => x(epoch) - each / 2)
      .attr("y", (epoch) => y(high(epoch))).attr("height", (epoch) => y(low(epoch)) - y(high(epoch)));
  return {
    show(shown) {
      const trained = [...shown].map((trial) => trial.epochs);
      const reached = (epoch) => d3.count(trained.filter((most) => most >= epoch));
      y.domain([0, Math.max(trained.length, 1)]);
      sideways.call(d3.axisLeft(y).tickValues(wholeTicks(y)).tickFormat(d3.format("d")).tickSizeOuter(0));
      bar("trained", () => 0, reached);
      bar("saved", reached, () => trained.length);
      const [spent, full] = [d3.sum(trained), trained.length * data.maxEpochs];
      const number = d3.format(",");
      words.text(`${number(spent)} epochs trained, ${number(full - spent)} not (${d3.format(".0%")(full ? 1 - spent / full : 0)})`);
    },
    point() {},
  };
}

// Points of all trials, in a small chart; horizontal axis of a hyperparameter, or of any function.
function slice(axis, value, label) {
  const parent = d3.select("#slices").append("figure");
  parent.append("figcaption").text(titled(axis.name) + (label ? ` and ${label}` : ""));
  const [width, height, left, bottom] = [widthOf(parent.node()), 190, 46, 22];
  const svg = chart(parent.node(), width, height, `${label ?? data.metric} by ${titled(axis.name)}`);
  const x = scaleOf(axis, [left + 8, width - 10]);
  const y = d3.scaleLinear([0, 1], [height - bottom, 10]).clamp(true);
  const grid = svg.append("g").attr("class", "axis grid").attr("transform", `translate(${left},0)`);
  const below = svg.append("g").attr("class", "axis").attr("transform", `translate(0,${height - bottom})`);
  below.call(ticks(axis, d3.axisBottom(x), 4));
  const [all, best, pointed] = layers(svg);
  const spot = (trial) => [x(place(axis, trial)), y(value(trial))];
  const draw = (group, found, size) => {
    group.selectAll("circle").data(found).join("circle").attr("class", (trial) => trial.outcome).attr("r", size)
      .attr("transform", (trial) => `translate(${spot(trial)})`).attr("stroke", color).attr("fill", color);
  };
  let visible = trials;
  watchPointer(svg, (px, py) => {
    const distance = (trial) => Math.hypot(spot(trial)[0] - px, spot(trial)[1] - py);
    return within(visible, distance);
  });
  return {
    show(shown) {
      visible = trials.filter((trial) => shown.has(trial));
      const values = visible.map(value);
      if (values.length) y.domain(withRoom([d3.min(values), upperEnd(values)])).nice();
      grid.call(d3.axisLeft(y).ticks(4, ".4~g").tickSize(left - width));
      draw(all, visible, few ? 3.2 : 2);
      const star = d3.symbol(d3.symbolStar, 110)();
      best.selectAll("path").data(shown.has(winner) ? [winner] : []).join("path").attr("d", star)
        .attr("transform", (trial) => `translate(${spot(trial)})`);
    },
    point: (trial) => draw(pointed, trial ? [trial] : [], 6),
  };
}

function slices() {
  const found = axes.slice(0, -2).map((axis) => slice(axis, (trial) => trial.score));
  if (data.axes.some((axis) => axis.name === "beta")) {
    const rates = trials.map((trial) => trial.rate);
    const rate = { name: "rate (KL)", ends: withRoom(d3.extent(rates)), of: (trial) => trial.rate };
    found.push(slice(rate, (trial) => trial.distortion, "distortion (reconstruction)"));
  }
  return found;
}

// ---- The state, and what follows from it

function passes(trial) {
  return axes.every((axis) => {
    const [range, value] = [filters.get(axis.name), axis.of(trial)];
    return !range || (value !== null && value >= range[0] && value <= range[1]);
  });
}

function filter(axis, range) {
  if (range) filters.set(axis.name, range);
  else filters.delete(axis.name);
  remember();
  requestAnimationFrame(update);
}

function update() {
  const shown = new Set(trials.filter(passes));
  for (const each of charts) each.show(shown);
  for (const trial of data.trials) rows.get(trial.number).hidden = !passes(trial);
  const best = trials.findLast((trial) => shown.has(trial));
  const words = `${shown.size} of ${trials.length} trials shown`;
  document.getElementById("count").textContent =
    best ? `${words}; the best of them is ${nameOf(best)}: ${d3.format(".2f")(best.score)}` : words;
  document.getElementById("clear").disabled = !filters.size;
  for (const axis of axes) {
    const range = filters.get(axis.name) ?? [-Infinity, Infinity];
    const ends = axis.labels ? [Math.max(range[0], 0), Math.min(range[1], axis.labels.length - 1)] : range;
    axis.inputs.forEach((input, i) => {
      if (input !== document.activeElement) input.value = Number.isFinite(ends[i]) ? d3.format(".5~g")(ends[i]) : "";
    });
  }
  const first = [...rows.values()].find((row) => !row.hidden);
  for (const row of rows.values()) row.tabIndex = row === first ? 0 : -1;
}

function point(trial, event) {
  for (const each of charts) each.point(trial);
  for (const [number, row] of rows) row.classList.toggle("pointed", number === trial?.number);
  const tip = document.getElementById("tip");
  tip.hidden = !(trial && event);
  if (tip.hidden) return;
  tip.textContent = `${trial.text}; ${data.short} ${d3.format(".2f")(trial.score)}`;
  const [width, height] = [tip.offsetWidth, tip.offsetHeight];
  tip.style.left = `${Math.max(4, Math.min(event.clientX + 14, innerWidth - width - 4))}px`;
  tip.style.top = `${event.clientY + 18 + height < innerHeight ? event.clientY + 18 : event.clientY - height - 12}px`;
}

function draw() {
  for (const old of document.querySelectorAll("#charts svg, #slices figure")) old.remove();
  drawLegend();
  charts = [parallel(), curves(), budget(), ...slices()];
  charts[0].moveBrushes();
  update();
}

function drawLegend() {
  const legend = d3.select("#legend").text("");
  legend.append("span").text(`Colour: ${data.short}, from the best `);
  const strip = legend.append("svg").attr("width", 90).attr("height", 10).attr("aria-hidden", "true").attr("shape-rendering", "crispEdges");
  const [best, worst] = axes.at(-1).ends;
  strip.selectAll("rect").data(d3.range(30)).join("rect").attr("x", (i) => 3 * i).attr("width", 3).attr("height", 10)
    .attr("fill", (i) => color({ score: best + (i / 29) * (worst - best) }));
  legend.append("span").text(" to the worst. ");
  legend.append("span").attr("class", "winner").text("Orange: the best trial. ");
  legend.append("span").text(`Filled marks: trained to the end; open ones: stopped early${document.getElementById("follow") ? "; dotted ones: under way" : ""}.`);
}

// ---- Filters by keyboard, the table, the address

for (const axis of axes) {
  const set = d3.select("#filters").append("fieldset");
  set.append("legend").text(titled(axis.name));
  axis.inputs = ["from", "to"].map((word) => {
    const label = set.append("label").text(`${word} `);
    if (!axis.labels) {
      const end = d3.format(".4~g")(axis.ends[word === "from" ? 0 : 1]);
      return label.append("input").attr("type", "number").attr("step", "any").attr("placeholder", end).node();
    }
    const select = label.append("select");
    select.selectAll("option").data(axis.labels).join("option").attr("value", (_, i) => i).text((name) => name);
    return select.node();
  });
  set.on("change", () => {
    const [low, high] = axis.inputs.map((input) => (input.value === "" ? null : Number(input.value)));
    const all = axis.labels ? low === 0 && high === axis.labels.length - 1 : low === null && high === null;
    filter(axis, all ? null : [low ?? -Infinity, high ?? Infinity]);
    charts[0].moveBrushes();
  });
}
document.getElementById("filters").addEventListener("submit", (event) => event.preventDefault());
document.getElementById("clear").addEventListener("click", () => {
  filters.clear();
  charts[0].moveBrushes();
  remember();
  update();
});

const body = document.getElementById("trials");
body.addEventListener("focusin", ({ target }) => {
  for (const row of rows.values()) row.tabIndex = row === target ? 0 : -1;
  point(trials.find((trial) => trial.number === Number(target.dataset.trial)) ?? null);
});
body.addEventListener("focusout", () => point(null));
body.addEventListener("pointerover", ({ target }) => {
  const row = target.closest("tr");
  point(trials.find((trial) => trial.number === Number(row.dataset.trial)) ?? null);
});
body.addEventListener("pointerleave", () => point(null));
body.addEventListener("keydown", (event) => {
  const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (!step) return;
  const visible = [...body.rows].filter((row) => !row.hidden);
  visible[visible.indexOf(event.target) + step]?.focus();
  event.preventDefault();
});
body.parentElement.tHead.addEventListener("click", remember);

// The address keeps filters and order, so that reloading, a bookmark and a copied link show the same.
function remember() {
  const words = new URLSearchParams();
  for (const [name, range] of filters) words.set(name, range.map((end) => (Number.isFinite(end) ? end : "")).join(".."));
  const head = document.querySelector("th[aria-sort]");
  words.set("sort", `${head.cellIndex} ${head.getAttribute("aria-sort")}`);
  try {
    history.replaceState(null, "", `#${words}`);
  } catch {
    // a page within another one, as notebooks show it, may have no address of its own
  }
}

function recall() {
  const words = new URLSearchParams(location.hash.slice(1));
  for (const axis of axes) {
    const ends = (words.get(axis.name) ?? "").split("..");
    const range = ends.map((end, i) => (end === "" ? [-Infinity, Infinity][i] : Number(end)));
    if (range.length === 2 && !range.some(Number.isNaN)) filters.set(axis.name, range);
  }
  const [column, order] = (words.get("sort") ?? "").split(" ");
  const head = body.parentElement.tHead.rows[0].cells[Number(column)];
  if (!head || !["ascending", "descending"].includes(order)) return; // a link may have been cut off
  while (head.getAttribute("aria-sort") !== order) head.querySelector("button").click();
}

document.getElementById("charts").hidden = false;
recall();
draw();
dark.addEventListener("change", draw);
let drawnFor = innerWidth;
addEventListener("resize", () => {
  if (innerWidth === drawnFor) return; // a phone's bars come and go
  drawnFor = innerWidth;
  requestAnimationFrame(draw);
});
