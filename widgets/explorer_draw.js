// Pure parts of the explorer: reading the buffer, statistics of cells, colours, the heat map's canvas, curves in SVG.

function halfToFloat(half) {
  const sign = half & 0x8000 ? -1 : 1, exponent = (half >> 10) & 31, fraction = half & 1023;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  if (exponent === 0) return sign * fraction * 2 ** -24;
  return sign * 2 ** (exponent - 15) * (1 + fraction / 1024);
}

function readArray(bytes, { dtype, shape, offset }) {
  const count = shape.reduce((a, b) => a * b, 1);
  const begin = bytes.byteOffset + offset;
  if (dtype === "<u2") return new Uint16Array(bytes.buffer, begin, count);
  if (dtype === "<i4") return new Int32Array(bytes.buffer, begin, count);
  return Float32Array.from(new Uint16Array(bytes.buffer, begin, count), halfToFloat);
}

// A trace as the page uses it. `row` counts shown layers from the first, `column` shown positions.
function readTrace(meta, bytes) {
  if (bytes.byteOffset % 4) bytes = bytes.slice();
  const arrays = Object.fromEntries(Object.entries(meta.arrays).map(([name, one]) => [name, readArray(bytes, one)]));
  const rows = meta.layers.length, columns = meta.positions.length, top = meta.arrays.top.shape[2];
  const at = (row, column) => row * columns + column;
  const text = (index) => visible(meta.vocabulary[index]);
  const best = (row, column) => arrays.top[at(row, column) * top];
  const place = (row, column, index) => {
    for (let k = 0; k < top; k++) if (arrays.top[at(row, column) * top + k] === index) return k;
    return -1;
  };
  const prob = (row, column, index) => {
    const c = meta.chosen.indexOf(index);
    if (c >= 0 && arrays.chosen_logs) return Math.exp(arrays.chosen_logs[at(row, column) * meta.chosen.length + c]);
    const k = place(row, column, index);
    return k < 0 ? NaN : arrays.probs[at(row, column) * top + k];
  };
  const rank = (row, column, index) => {
    const c = meta.chosen.indexOf(index);
    if (c >= 0 && arrays.chosen_ranks) return arrays.chosen_ranks[at(row, column) * meta.chosen.length + c];
    const k = place(row, column, index);
    return k < 0 ? NaN : k;
  };
  const topOf = (row, column) => Array.from({ length: top }, (_, k) => {
    const index = arrays.top[at(row, column) * top + k];
    return { index, text: text(index), prob: arrays.probs[at(row, column) * top + k] };
  });
  const peerOf = (layer) => meta.hops.find((hop) => hop.start < layer && layer <= hop.end);
  return { meta, arrays, rows, columns, top, at, text, best, prob, rank, topOf, peerOf };
}

const visible = (token) => token.replaceAll(" ", "␣").replaceAll("\n", "⏎").replaceAll("\t", "⇥");

const STATISTICS = {
  probability: { label: "probability of the best token", range: [0, 1], need: "probs",
    value: (t, r, c) => t.arrays.probs[t.at(r, c) * t.top] },
  entropy: { label: "entropy (nats)", need: "entropy", value: (t, r, c) => t.arrays.entropy[t.at(r, c)] },
  rank: { label: "rank of the chosen token", log: true, need: "top", digits: 0,
    value: (t, r, c, tokens) => t.rank(r, c, tokens[0] ?? t.best(t.rows - 1, c)) },
  kl: { label: "KL to the prediction (nats)", need: "kl", value: (t, r, c) => t.arrays.kl[t.at(r, c)] },
  norm: { label: "norm of the state", log: true, need: "norm",
    value: (t, r, c) => t.arrays.norm[t.at(r, c)] * t.meta.norm_scale },
  cos_previous: { label: "similarity to the layer before", need: "cos_previous",
    value: (t, r, c) => t.arrays.cos_previous[t.at(r, c)] },
  cos_last: { label: "similarity to the last layer", need: "cos_last",
    value: (t, r, c) => t.arrays.cos_last[t.at(r, c)] },
  difference: { label: "log-probability, token A − token B", need: "probs", diverging: true,
    value: (t, r, c, tokens) => Math.log(t.prob(r, c, tokens[0] ?? -1)) - Math.log(t.prob(r, c, tokens[1] ?? -1)) },
};

// cividis (Nuñez, Anderton, Renslow 2018) and a blue-orange scale: both read the same with any colour vision
const SEQUENTIAL = [[0, 32, 77], [49, 68, 107], [87, 93, 109], [124, 123, 120], [165, 156, 116], [210, 193, 92], [255, 234, 70]];
const DIVERGING = [[5, 72, 128], [67, 147, 195], [190, 215, 232], [245, 245, 245], [253, 208, 162], [230, 130, 40], [140, 60, 5]];

function colour(stops, share) {
  const x = Math.min(1, Math.max(0, share)) * (stops.length - 1), low = Math.min(stops.length - 2, Math.floor(x));
  return stops[low].map((one, i) => Math.round(one + (stops[low + 1][i] - one) * (x - low)));
}
const isLight = ([r, g, b]) => 0.299 * r + 0.587 * g + 0.114 * b > 140;

// Values of all cells and the colours' range. `minus`: a second trace, for the difference of the two.
function valuesOf(name, trace, tokens, minus) {
  const statistic = STATISTICS[name], values = new Float32Array(trace.rows * trace.columns);
  const chosen = tokens(trace), others = minus && tokens(minus); // looked up once: the list of tokens is long
  for (let r = 0; r < trace.rows; r++) {
    for (let c = 0; c < trace.columns; c++) {
      const one = statistic.value(trace, r, c, chosen);
      values[trace.at(r, c)] = minus ? one - statistic.value(minus, r, c, others) : one;
    }
  }
  return values;
}
function rangeOf(name, lists, difference) {
  const statistic = STATISTICS[name];
  if (statistic.range && !difference) return statistic.range;
  let low = Infinity, high = -Infinity;
  for (const values of lists) for (const one of values) if (Number.isFinite(one)) {
    low = Math.min(low, one); high = Math.max(high, one);
  }
  if (low > high) return [0, 1];
  if (difference || statistic.diverging) { const most = Math.max(Math.abs(low), Math.abs(high)) || 1; return [-most, most]; }
  return low === high ? [low, low + 1] : [low, high];
}
function shareOf(value, [low, high], log) {
  if (log && low >= 0) return (Math.log1p(value) - Math.log1p(low)) / (Math.log1p(high) - Math.log1p(low));
  return (value - low) / (high - low);
}
const shown = (value, digits = 3) => Number.isNaN(value) ? "not among the best" : !Number.isFinite(value) ? "infinite"
  : Math.abs(value) >= 10 ** digits || digits === 0 ? value.toFixed(0) : value.toPrecision(digits);

function drawMap(canvas, { trace, values, range, diverging, log, size, changed, ink }) {
  const ratio = globalThis.devicePixelRatio || 1, { width, height } = size;
  canvas.width = Math.round(trace.columns * width * ratio);
  canvas.height = Math.round(trace.rows * height * ratio);
  canvas.style.width = `${trace.columns * width}px`;
  canvas.style.height = `${trace.rows * height}px`;
  const pen = canvas.getContext("2d");
  pen.scale(ratio, ratio);
  pen.font = "11px ui-monospace, Menlo, Consolas, monospace";
  pen.textBaseline = "middle";
  const gap = width > 6 && height > 6 ? 1 : 0, letters = Math.floor((width - 6) / 6.7);
  for (let r = 0; r < trace.rows; r++) {
    const y = (trace.rows - 1 - r) * height; // the last layer on top
    for (let c = 0; c < trace.columns; c++) {
      const value = values[trace.at(r, c)], x = c * width;
      if (!Number.isFinite(value)) { // no colour of the scale: an empty cell with a stroke
        pen.strokeStyle = ink; pen.globalAlpha = 0.35;
        pen.beginPath(); pen.moveTo(x + 2, y + height - 3); pen.lineTo(x + width - 3, y + 2); pen.stroke();
        pen.globalAlpha = 1;
      } else {
        const shade = colour(diverging ? DIVERGING : SEQUENTIAL, shareOf(value, range, log));
        pen.fillStyle = `rgb(${shade})`;
        pen.fillRect(x, y, width - gap, height - gap);
        pen.fillStyle = isLight(shade) ? "#111" : "#fff";
      }
      if (!Number.isFinite(value)) pen.fillStyle = ink;
      if (letters >= 2 && height >= 13) {
        const token = trace.text(trace.best(r, c));
        pen.fillText(token.length > letters ? token.slice(0, letters - 1) + "…" : token, x + 3, y + height / 2);
      }
      if (changed?.has(`${trace.meta.layers[r]},${trace.meta.positions[c]}`)) { // a notched corner and a frame
        pen.fillStyle = "#fff"; pen.strokeStyle = "#000"; pen.lineWidth = 1;
        pen.beginPath(); pen.moveTo(x + width - gap, y); pen.lineTo(x + width - gap - 8, y); pen.lineTo(x + width - gap, y + 8);
        pen.closePath(); pen.fill(); pen.stroke();
      }
    }
  }
}

const SVG = "http://www.w3.org/2000/svg";
function svg(name, attributes = {}, ...children) {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

const STROKES = [
  { colour: "#0072b2", dash: "" }, { colour: "#d55e00", dash: "6 3" }, { colour: "#009e73", dash: "2 3" },
  { colour: "#cc79a7", dash: "9 3 2 3" }, { colour: "#9a7d0a", dash: "12 4" }, { colour: "#56b4e9", dash: "4 2 1 2" },
]; // Okabe & Ito, and a dash for each

// Curves over the layers. `lines`: [{name, values}], a NaN breaks the line.
function curves(layers, lines, { label, low, high, marked, width = 340, height = 150 }) {
  const finite = lines.flatMap((line) => line.values).filter(Number.isFinite);
  low ??= finite.length ? Math.min(...finite) : 0;
  high ??= finite.length ? Math.max(...finite) : 1;
  if (high === low) high = low + 1;
  const left = 44, bottom = height - 24, first = layers[0], last = layers.at(-1);
  const x = (layer) => left + (width - left - 10) * (last === first ? 0.5 : (layer - first) / (last - first));
  const y = (value) => bottom - (bottom - 10) * (value - low) / (high - low);
  const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", class: "nbx-curve", "aria-label": label });
  const name = svg("title"); name.textContent = label; picture.append(name);
  for (const value of [low, (low + high) / 2, high]) {
    picture.append(svg("line", { x1: left, x2: width - 10, y1: y(value), y2: y(value), class: "nbx-axis" }));
    const words = svg("text", { x: left - 5, y: y(value) + 4, "text-anchor": "end" }); words.textContent = Math.abs(value) >= 1e5 ? value.toExponential(1) : shown(value, 2);
    picture.append(words);
  }
  for (const layer of new Set([first, layers[Math.floor(layers.length / 2)], last])) {
    const words = svg("text", { x: x(layer), y: height - 7, "text-anchor": "middle" }); words.textContent = layer;
    picture.append(words);
  }
  if (marked !== undefined) picture.append(svg("line", { x1: x(marked), x2: x(marked), y1: 6, y2: bottom, class: "nbx-marked" }));
  lines.forEach((line, i) => {
    const stroke = STROKES[i % STROKES.length];
    let path = "", pen = false;
    line.values.forEach((value, row) => {
      if (!Number.isFinite(value)) { pen = false; return; }
      path += `${pen ? "L" : "M"}${x(layers[row]).toFixed(1)} ${y(value).toFixed(1)}`;
      picture.append(svg("circle", { cx: x(layers[row]), cy: y(value), r: 1.8, fill: stroke.colour }));
      pen = true;
    });
    picture.append(svg("path", { d: path, fill: "none", stroke: stroke.colour, "stroke-width": 2, "stroke-dasharray": stroke.dash }));
  });
  return picture;
}
