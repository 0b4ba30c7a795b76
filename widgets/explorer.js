// The explorer: maps of layers × tokens, details of cells, new runs. The parts before it are pure or the way to Python.

function el(name, attributes = {}, ...children) { // text is only ever set as text, never as HTML
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value === true) node.setAttribute(key, "");
    else if (value !== false && value != null) node.setAttribute(key, value);
  }
  node.append(...children.filter((one) => one != null));
  return node;
}
const MOST_PINS = 6;
const BESIDE = 92; // pixels beside the cells of a map: numbers of layers, names of servers
const same = (one, other) => one.index === other.index && one.row === other.row && one.column === other.column;
const labelled = (words, control) => el("label", {}, el("span", {}, words), control);

class ExplorerPage {
  constructor(root, key, traces, view) {
    this.root = root;
    root.dataset.lmSuppressShortcuts = "true"; // JupyterLab hears keys before the page does: R would make a raw cell
    this.began = performance.now();
    this.traces = traces;
    this.note = view.note ?? "";
    this.name = view.name || "explorer"; // the variable that holds it in Python
    this.statistic = traces[0].arrays[STATISTICS[view.statistic]?.need] ? view.statistic : "probability";
    this.pair = ["", ""]; // texts of tokens A and B
    this.pins = (view.pins ?? []).map((one) => this.found(one)).filter(Boolean);
    this.source = this.found(view.source); this.target = this.found(view.target);
    this.changed = null;
    this.shown = traces.map((_, i) => i); // the runs on show: the prompts, or one of them and what a patch made of it
    this.originals = traces.length;
    this.cursor = { map: 0, row: traces[0].rows - 1, column: traces[0].columns - 1 };
    this.build();
    this.link = new Link(key, (live) => this.showLive(live), (message) => this.told(message));
    this.root.dataset.first = (performance.now() - this.began).toFixed(1);
  }

  // -- what is there ------------------------------------------------------------------------------------------------

  build() {
    this.root.replaceChildren();
    this.status = el("div", { class: "nbx-status", role: "status", "aria-live": "polite" });
    this.error = el("div", { class: "nbx-error", role: "alert" });
    this.maps = el("div", { class: "nbx-maps" });
    this.details = el("div", { class: "nbx-details" });
    this.tip = el("div", { class: "nbx-tip", "aria-hidden": "true", hidden: true });
    const choices = Object.entries(STATISTICS).filter(([, one]) => this.traces[0].arrays[one.need]);
    this.chooser = el("select", { onchange: () => { this.statistic = this.chooser.value; this.draw(); this.tell(); } },
      ...choices.map(([name, one]) => el("option", { value: name, selected: name === this.statistic }, one.label)));
    this.tokenInputs = [0, 1].map((i) => el("input", { size: 9, spellcheck: "false", placeholder: i ? "␣Rome" : "␣Paris",
      onchange: () => this.follow(), onkeydown: (event) => event.key === "Enter" && this.follow() }));
    this.legend = el("div", { class: "nbx-legend" });
    this.offline = el("span", { class: "nbx-offline" });
    this.root.append(
      el("div", { class: "nbx-tools" }, labelled("Show", this.chooser), labelled("token A", this.tokenInputs[0]),
        labelled("token B", this.tokenInputs[1]), this.legend),
      el("div", { class: "nbx-note" }, this.note), this.maps, this.status, this.error, this.details, this.runPanel(), this.tip);
    this.draw();
    this.showDetails();
  }

  runPanel() {
    const button = (words, act, hint) => el("button", { type: "button", title: hint, onclick: act }, words);
    this.sourceWords = el("output", {}, "none"); this.targetWords = el("output", {}, "none");
    this.runPatch = button("Run the patch", () => this.patch(), "Key R");
    this.strength = el("input", { type: "range", min: -4, max: 4, step: 0.1, value: 1, "aria-label": "strength",
      oninput: () => { this.strengthWords.textContent = Number(this.strength.value).toFixed(1); this.showCodes(); },
      onchange: () => this.link.live && this.source && this.steer() });
    this.strengthWords = el("output", {}, "1.0");
    this.runSteer = button("Continue the text", () => this.steer(), "Generate with the direction added");
    this.results = el("div", { class: "nbx-results" });
    this.patchCode = el("div"); this.steerCode = el("div");
    this.runs = el("details", { class: "nbx-runs" },
      el("summary", {}, "Patch and steer ", this.offline),
      el("p", {}, "The source's state is put in place of the target's, and the rest of the model runs again. ",
        "Choose a cell, then a button (or the keys S, T and R)."),
      el("div", { class: "nbx-tools" },
        button("Source", () => this.choose("source"), "Key S: the chosen cell is where the state comes from"), this.sourceWords,
        button("Target", () => this.choose("target"), "Key T: the chosen cell is where it goes"), this.targetWords, this.runPatch),
      this.patchCode,
      el("p", {}, "Steering adds the source's state, minus the target's if there is one, at the source's layer, to every token."),
      el("div", { class: "nbx-tools" }, labelled("Strength", this.strength), this.strengthWords, this.runSteer),
      this.steerCode, this.results);
    return this.runs;
  }

  // -- maps ---------------------------------------------------------------------------------------------------------

  views() {
    const views = this.shown.map((index) => ({ trace: this.traces[index], index,
      name: index < this.originals ? this.traces[index].meta.title || `run ${index + 1}` : "patched" }));
    const [one, two] = views.map((view) => view.trace);
    if (two && one.rows === two.rows && one.columns === two.columns) {
      views.push({ trace: two, minus: one, index: this.shown[1], name: "difference: second − first" });
    }
    return views;
  }

  tokensOf(trace) {
    return this.pair.map((words) => {
      const found = words ? trace.meta.vocabulary.findIndex((one) => visible(one) === visible(words)) : -1;
      return found >= 0 ? found : undefined;
    });
  }

  draw() {
    const views = this.views(), statistic = STATISTICS[this.statistic];
    const ink = getComputedStyle(this.root).color;
    const lists = views.map((view) => valuesOf(this.statistic, view.trace, (t) => this.tokensOf(t), view.minus));
    const plain = rangeOf(this.statistic, lists.filter((_, i) => !views[i].minus), false);
    this.drawn = views.map((view, i) => {
      const difference = Boolean(view.minus);
      const range = difference ? rangeOf(this.statistic, [lists[i]], true) : plain;
      return { ...view, values: lists[i], range, diverging: difference || statistic.diverging, log: statistic.log && !difference };
    });
    this.maps.replaceChildren(...this.drawn.map((view, i) => this.mapOf(view, i, ink)));
    this.showLegend();
    this.place();
  }

  mapOf(view, i, ink) {
    const { trace } = view, { meta } = trace;
    const size = { width: Math.max(9, Math.min(84, Math.floor(this.room(trace.columns) / trace.columns))), height: trace.rows > 34 ? 9 : trace.rows > 20 ? 14 : 20 };
    if (trace.columns <= 40) size.width = Math.max(size.width, 34);
    const canvas = el("canvas", { "aria-hidden": "true" });
    drawMap(canvas, { ...view, size, ink, changed: view.index >= this.originals ? this.changed : null });
    const focus = el("div", { class: "nbx-focus" });
    const layers = el("div", { class: "nbx-layers", "aria-hidden": "true" }), every = Math.ceil(13 / size.height);
    meta.layers.forEach((layer, row) => {
      if ((trace.rows - 1 - row) % every) return;
      layers.append(el("span", { style: `top:${(trace.rows - 1 - row) * size.height}px;height:${size.height}px` }, String(layer)));
    });
    const grid = el("div", {
      class: "nbx-grid", tabindex: "0", role: "application", "aria-roledescription": "heat map",
      "aria-label": `${view.name}: layers by tokens, ${STATISTICS[this.statistic].label}. Arrow keys move, Enter pins, Escape lets go, S and T choose source and target, R runs the patch.`,
      style: `width:${trace.columns * size.width}px;height:${trace.rows * size.height}px`,
      onkeydown: (event) => this.key(event), onfocus: () => this.focusMap(i),
      onmousemove: (event) => this.hover(event, view, size), onmouseleave: () => { this.tip.hidden = true; },
      onclick: (event) => this.click(event, i, size),
    }, canvas, focus);
    for (const hop of meta.hops) { // a line where one server's blocks end, over the last state it made
      const row = meta.layers.findLastIndex((layer) => layer <= hop.end);
      if (row < 0 || hop.end >= meta.blocks) continue;
      grid.append(el("div", { class: "nbx-border", style: `top:${(trace.rows - 1 - row) * size.height - 1}px` }));
    }
    const servers = el("div", { class: "nbx-servers" });
    for (const hop of meta.hops) {
      const rows = meta.layers.map((layer, row) => (layer > hop.start && layer <= hop.end ? row : -1)).filter((row) => row >= 0);
      if (!rows.length) continue;
      const words = `blocks [${hop.start}, ${hop.end}) by ${hop.peer}, ${(hop.seconds * 1000).toFixed(0)} ms`;
      servers.append(el("span", { title: words, role: "img", "aria-label": words,
        style: `top:${(trace.rows - 1 - rows.at(-1)) * size.height}px;height:${rows.length * size.height - 2}px` }, `…${hop.peer.slice(-4)}`));
    }
    const names = el("div", { class: "nbx-tokens", "aria-hidden": "true", style: `width:${trace.columns * size.width}px` });
    const step = size.width < 16 ? Math.ceil(16 / size.width) : 1;
    meta.positions.forEach((position, column) => {
      if (column % step) return;
      names.append(el("span", { style: `left:${column * size.width + size.width / 2}px`, title: `position ${position}` }, visible(meta.tokens[position])));
    });
    view.parts = { grid, focus, size };
    return el("figure", { class: "nbx-map" }, el("figcaption", {}, view.name, meta.thinned ? ` (${meta.thinned} layers between are left out)` : ""),
      el("div", { class: "nbx-scroll" }, layers, el("div", { class: "nbx-middle" }, grid, names), servers));
  }

  room(columns) { // pixels for the cells of one map; three or two stand in a row if a word fits into a cell then
    const width = this.root.clientWidth || 800, each = (across) => (width - 20 * (across - 1)) / across - BESIDE;
    if (this.drawn.length > 2 && each(3) / columns >= 62) return each(3);
    return this.drawn.length > 1 && each(2) / columns >= 34 ? each(2) : each(1);
  }

  showLegend() {
    this.legend.replaceChildren(...this.drawn.filter((view, i) => !i || view.minus).map((view) => {
      const stops = view.diverging ? DIVERGING : SEQUENTIAL, digits = STATISTICS[this.statistic].digits;
      const bar = el("i", { style: `background:linear-gradient(90deg,${stops.map((one) => `rgb(${one})`).join(",")})` });
      return el("span", {}, view.minus ? "difference " : "", shown(view.range[0], digits), bar, shown(view.range[1], digits), view.log ? " (log)" : "");
    }));
  }

  // -- cells --------------------------------------------------------------------------------------------------------

  get view() { return this.drawn[this.cursor.map] ?? this.drawn[0]; }

  words(view, row, column) {
    const { trace } = view, layer = trace.meta.layers[row], position = trace.meta.positions[column];
    const value = view.values[trace.at(row, column)], best = trace.topOf(row, column)[0];
    return `layer ${layer}, token ${position} ${visible(trace.meta.tokens[position])}: best ${best.text} ${shown(best.prob, 2)}; `
      + `${STATISTICS[this.statistic].label} ${shown(value, STATISTICS[this.statistic].digits)}`;
  }

  place() {
    this.drawn.forEach((view, i) => {
      const { focus, grid, size } = view.parts, { trace } = view;
      const put = (node, row, column) => Object.assign(node.style, { left: `${column * size.width}px`,
        top: `${(trace.rows - 1 - row) * size.height}px`, width: `${size.width}px`, height: `${size.height}px` });
      focus.hidden = i !== this.cursor.map;
      put(focus, Math.min(this.cursor.row, trace.rows - 1), Math.min(this.cursor.column, trace.columns - 1));
      grid.querySelectorAll(".nbx-pin").forEach((one) => one.remove());
      const marks = [...this.pins.map((pin, n) => [pin, String(n + 1), ""]), [this.source, "S", "nbx-source"], [this.target, "T", "nbx-target"]];
      for (const [pin, words, kind] of marks) {
        if (!pin || pin.index !== view.index || (view.minus && kind)) continue;
        const mark = el("div", { class: `nbx-pin ${kind}`, "aria-hidden": "true" }, el("b", {}, words));
        put(mark, pin.row, pin.column); grid.append(mark);
      }
    });
  }

  cellAt(event, view, size) {
    const box = view.parts.grid.getBoundingClientRect();
    const column = Math.floor((event.clientX - box.left) / size.width), fromTop = Math.floor((event.clientY - box.top) / size.height);
    const row = view.trace.rows - 1 - fromTop;
    return row >= 0 && row < view.trace.rows && column >= 0 && column < view.trace.columns ? { row, column } : null;
  }

  hover(event, view, size) {
    const cell = this.cellAt(event, view, size);
    this.tip.hidden = !cell;
    if (!cell) return;
    const hop = view.trace.peerOf(view.trace.meta.layers[cell.row]);
    this.tip.replaceChildren(el("div", {}, this.words(view, cell.row, cell.column)), bars(view.trace, cell.row, cell.column),
      el("small", {}, hop ? `computed by ${hop.peer}` : view.trace.meta.layers[cell.row] ? "" : "the embeddings, made here"));
    const box = this.root.getBoundingClientRect();
    const left = Math.max(0, Math.min(event.clientX - box.left + 14, box.width - 270));
    Object.assign(this.tip.style, { left: `${left}px`, top: `${event.clientY - box.top + 16}px` });
  }

  click(event, map, size) {
    const cell = this.cellAt(event, this.drawn[map], size);
    if (!cell) return;
    const began = performance.now();
    this.cursor = { map, ...cell };
    this.pin();
    this.root.dataset.detail = (performance.now() - began).toFixed(1);
  }

  focusMap(map) {
    if (this.cursor.map === map) return;
    const { trace } = this.drawn[map];
    this.cursor = { map, row: Math.min(this.cursor.row, trace.rows - 1), column: Math.min(this.cursor.column, trace.columns - 1) };
    this.moved();
  }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const { trace } = this.view, c = this.cursor;
    const acts = {
      ArrowUp: () => { c.row = Math.min(trace.rows - 1, c.row + 1); }, ArrowDown: () => { c.row = Math.max(0, c.row - 1); },
      ArrowLeft: () => { c.column = Math.max(0, c.column - 1); }, ArrowRight: () => { c.column = Math.min(trace.columns - 1, c.column + 1); },
      Home: () => { c.column = 0; }, End: () => { c.column = trace.columns - 1; },
      PageUp: () => { c.row = trace.rows - 1; }, PageDown: () => { c.row = 0; },
      Enter: () => this.pin(), Escape: () => this.letGo(), " ": () => this.pin(),
      s: () => this.choose("source"), t: () => this.choose("target"), r: () => this.patch(),
    };
    const act = acts[event.key.length === 1 ? event.key.toLowerCase() : event.key];
    if (!act) return;
    event.preventDefault(); event.stopPropagation(); // the notebook has keys of its own
    act();
    if (event.key.startsWith("Arrow") || ["Home", "End", "PageUp", "PageDown"].includes(event.key)) this.moved();
  }

  moved() { this.place(); this.say(this.words(this.view, this.cursor.row, this.cursor.column)); this.showDetails(); }
  say(words) { this.status.textContent = words; }

  cell() {
    const { trace, index } = this.view, { row, column } = this.cursor;
    return { index, row, column, layer: trace.meta.layers[row], position: trace.meta.positions[column] };
  }

  pin() {
    const cell = this.cell();
    this.pins = [...this.pins.filter((one) => !same(one, cell)), cell].slice(-MOST_PINS);
    this.place(); this.showDetails();
    this.say(`Pinned: ${this.words(this.view, cell.row, cell.column)}`);
    this.tell();
  }

  letGo() {
    this.pins = []; this.source = this.target = null; this.tip.hidden = true;
    this.place(); this.showDetails(); this.showCodes(); this.say("Nothing is pinned"); this.tell();
  }

  choose(kind) {
    this[kind] = this.cell(); this.runs.open = true;
    this.place(); this.showCodes();
    this.say(`${kind}: layer ${this[kind].layer}, token ${this[kind].position}`);
    this.tell();
  }

  tell() {
    const plain = (cell) => cell && { trace: cell.index, layer: cell.layer, position: cell.position };
    this.link?.tell({ action: "select", pins: this.pins.map(plain), source: plain(this.source) ?? null, target: plain(this.target) ?? null,
      statistic: this.statistic });
  }

  told(message) { // Python chose a cell
    if (message.action !== "select" || !message.cell) return;
    const cell = this.found(message.cell), map = this.drawn.findIndex((view) => view.index === cell?.index);
    if (map < 0) return;
    this.cursor = { map, row: cell.row, column: cell.column };
    this.pins = [...this.pins.filter((one) => !same(one, cell)), cell].slice(-MOST_PINS);
    this.moved();
  }

  found(cell) { // a cell as Python names it; null if these runs do not show it
    const { trace: index, layer, position } = cell ?? {}, meta = this.traces[index]?.meta;
    const row = meta ? meta.layers.indexOf(layer) : -1, column = meta ? meta.positions.indexOf(position) : -1;
    return row < 0 || column < 0 ? null : { index, row, column, layer, position };
  }

  // -- details ------------------------------------------------------------------------------------------------------

  showDetails() {
    const view = this.view, { trace } = view;
    const shownCell = this.pins.at(-1) ?? this.cell();
    const of = this.traces[shownCell.index] ?? trace, { row, column } = shownCell, { meta } = of;
    const layer = meta.layers[row], hop = of.peerOf(layer);
    const followed = [...new Set([...this.pins.map((pin) => [pin.index, this.traces[pin.index]?.best(pin.row, pin.column)])
      .filter(([index]) => index === shownCell.index).map(([, token]) => token),
      ...this.tokensOf(of).filter((one) => one !== undefined), of.best(row, column), of.best(of.rows - 1, column)])].slice(0, STROKES.length);
    const every = Array.from({ length: of.rows }, (_, r) => r);
    const lines = followed.map((token) => ({ name: of.text(token), values: every.map((r) => of.prob(r, column, token)) }));
    const keys = el("ul", { class: "nbx-keys" }, ...lines.map((line, i) => {
      const stroke = STROKES[i], sample = svg("svg", { width: 30, height: 10, "aria-hidden": "true" },
        svg("line", { x1: 0, x2: 30, y1: 5, y2: 5, stroke: stroke.colour, "stroke-width": 2.5, "stroke-dasharray": stroke.dash }));
      return el("li", {}, sample, line.values.some(Number.isFinite) ? line.name : `${line.name} (not among the best here)`);
    }));
    const where = `layer ${layer}, token ${meta.positions[column]} “${visible(meta.tokens[meta.positions[column]])}”`;
    this.details.replaceChildren(
      el("section", {}, el("h4", {}, `${this.pins.length ? "Pinned" : "Here"}: ${where}`), bars(of, row, column),
        el("small", {}, hop ? `computed by …${hop.peer.slice(-8)}, blocks [${hop.start}, ${hop.end})` : layer ? "" : "the embeddings, made here"),
        this.code(`trace = ${this.run(shownCell.index)}\nplace = trace.layers.index(${layer}), trace.positions.index(${meta.positions[column]})\n`
          + `best = [(trace.token_text(one), prob) for one, prob in zip(trace.top_ids[place], trace.top_probs[place])]\n`
          + `state = trace.state(${layer}, ${meta.positions[column]})`)),
      el("section", {}, el("h4", {}, "Through the layers: probability"),
        curves(meta.layers, lines, { label: `probability of ${lines.map((one) => one.name).join(", ")} by layer`, low: 0, high: 1, marked: layer }), keys),
      of.arrays.norm ? el("section", {}, el("h4", {}, "Norm of the state"), curves(meta.layers,
        [{ name: "norm", values: every.map((r) => STATISTICS.norm.value(of, r, column)) }],
        { label: `norm of the state of ${where} by layer`, low: 0, marked: layer })) : null);
    this.showCodes();
  }

  run(index) { return this.traces.length > 1 ? `${this.name}.traces[${index}]` : `${this.name}.trace`; }

  code(plain) {
    return el("details", { class: "nbx-code" }, el("summary", {}, "as code"), el("pre", {}, plain),
      el("button", { type: "button", onclick: async (event) => {
        try { await navigator.clipboard.writeText(plain); event.target.textContent = "Copied"; }
        catch { const range = document.createRange(); range.selectNodeContents(event.target.previousSibling); getSelection().removeAllRanges(); getSelection().addRange(range); }
      } }, "Copy as code"));
  }

  showCodes() {
    const { source: s, target: t } = this, say = (cell) => cell ? `layer ${cell.layer}, token ${cell.position}${cell.index ? `, run ${cell.index + 1}` : ""}` : "none";
    this.sourceWords.textContent = say(s); this.targetWords.textContent = say(t);
    this.showLive(this.link?.live ?? false);
    const state = (cell) => `${this.run(cell.index)}.state(${cell.layer}, ${cell.position})`;
    this.patchCode.replaceChildren(...(s && t ? [this.code(`import nbrunner\n\nbefore = ${this.run(t.index)}\n`
      + `edit = nbrunner.Edit.set(${t.layer}, ${state(s)}, ${t.position})\n`
      + `after = ${this.name}.model.trace(before.ids, edits=[*before.edits, edit], tokenizer=before.tokenizer)\n`
      + "nbrunner.explore([before, after])")] : []));
    this.steerCode.replaceChildren(...(s ? [this.code(`import nbrunner\nimport torch\n\nrun = ${this.run(s.index)}\n`
      + `direction = ${state(s)}${t ? ` - ${state(t)}` : ""}\nedit = nbrunner.Edit.add(${s.layer}, direction, strength=${Number(this.strength.value).toFixed(1)})\n`
      + `out = ${this.name}.model.generate(torch.tensor([run.ids]), max_new_tokens=16, do_sample=False, edits=[*run.edits, edit])\n`
      + "run.tokenizer.decode(out[0, len(run.ids):])")] : []));
  }

  // -- new runs -----------------------------------------------------------------------------------------------------

  showLive(live) {
    this.root.dataset.live = live;
    this.offline.textContent = live ? "" : "(needs the kernel: run the cell again)";
    this.runPatch.disabled = this.busy || !(live && this.source && this.target);
    this.runSteer.disabled = this.busy || !(live && this.source);
  }

  async asked(content, what, show) {
    if (this.busy) return;
    this.busy = true; this.error.textContent = ""; this.say(`${what} …`); this.showLive(this.link.live);
    try { await show(await this.link.ask(content)); }
    catch (error) { this.error.textContent = `${what} did not work: ${error.message}`; this.say(""); }
    finally { this.busy = false; this.showLive(this.link.live); }
  }

  ends() {
    const plain = (cell) => cell && { trace: cell.index, layer: cell.layer, position: cell.position };
    return { source: plain(this.source) ?? null, target: plain(this.target) ?? null };
  }

  patch() {
    if (!this.source || !this.target) { this.say("Choose a source (S) and a target (T) first"); return undefined; }
    return this.asked({ action: "patch", ...this.ends() }, "The patched run", (answer) => {
      this.take(readTrace(answer.meta, bytesOf(answer.buffers[0])), answer);
      const [before, after] = this.shown.map((i) => this.traces[i]).map((trace) => trace.topOf(trace.rows - 1, trace.columns - 1));
      this.results.replaceChildren(el("p", {}, answer.words), el("button", { type: "button", onclick: () => this.back() }, "Back to the prompts"), el("table", {}, el("caption", {}, "What comes next"),
        el("tr", {}, ...["before", "", "patched", ""].map((one) => el("th", { scope: "col" }, one))),
        ...before.map((one, k) => el("tr", {}, el("td", {}, one.text), el("td", {}, shown(one.prob, 2)), el("td", {}, after[k].text), el("td", {}, shown(after[k].prob, 2))))));
      this.say(answer.words);
    });
  }

  take(patched, answer) {
    this.traces = [...this.traces.slice(0, this.originals), patched];
    this.changed = new Set(answer.changed.map(([layer, position]) => `${layer},${position}`));
    this.showRuns([answer.base, this.originals], answer.note);
  }

  back() { this.results.replaceChildren(); this.showRuns(this.traces.slice(0, this.originals).map((_, i) => i), this.note); }

  showRuns(runs, note) {
    this.shown = runs;
    const [first] = runs.map((i) => this.traces[i]);
    this.pins = this.pins.filter((pin) => runs.includes(pin.index));
    this.cursor = { map: 0, row: first.rows - 1, column: first.columns - 1 };
    this.root.querySelector(".nbx-note").textContent = note;
    this.draw(); this.showDetails();
  }

  steer() {
    if (!this.source) { this.say("Choose a source (S) first"); return undefined; }
    return this.asked({ action: "steer", ...this.ends(), strength: Number(this.strength.value) }, "The steered text", (answer) => {
      this.results.replaceChildren(el("dl", {}, el("dt", {}, "without"), el("dd", {}, visible(answer.plain)),
        el("dt", {}, `steered, strength ${answer.strength}`), el("dd", { class: "nbx-steered" }, visible(answer.steered))));
      this.say(`Steered: ${answer.steered}`);
    });
  }

  follow() { // tokens A and B: known from the best ones, or measured by a new run
    const pair = this.tokenInputs.map((one) => one.value.replaceAll("␣", " "));
    if (pair.join("\n") === this.pair.join("\n")) return undefined; // leaving the field: a map drawn now would lose the click
    this.pair = pair;
    const wanted = this.pair.filter(Boolean);
    const measured = this.traces.every((trace) => this.tokensOf(trace).filter((one) => one !== undefined).every((one) => trace.meta.chosen.includes(one))
      && this.tokensOf(trace).filter((one) => one !== undefined).length === wanted.length);
    const show = () => { this.draw(); this.showDetails(); };
    if (measured || !this.link.live) { show(); return undefined; }
    return this.asked({ action: "follow", tokens: wanted }, "Measuring the tokens", (answer) => {
      this.traces = answer.metas.map((meta, i) => readTrace(meta, bytesOf(answer.buffers[i])));
      show(); this.say("The tokens are measured at every cell");
    });
  }
}

function bars(trace, row, column) {
  return el("ol", { class: "nbx-bars" }, ...trace.topOf(row, column).map((one) => el("li", {},
    el("span", {}, one.text), el("i", { style: `width:${Math.max(1, Math.min(1, one.prob) * 100)}%` }), el("b", {}, shown(one.prob, 2)))));
}

function bytesOf(view) {
  return view instanceof DataView || ArrayBuffer.isView(view) ? new Uint8Array(view.buffer, view.byteOffset, view.byteLength) : new Uint8Array(view);
}

async function unpack(words) {
  const raw = Uint8Array.from(atob(words), (one) => one.charCodeAt(0));
  return new Uint8Array(await new Response(new Blob([raw]).stream().pipeThrough(new DecompressionStream("gzip"))).arrayBuffer());
}

async function startPage(key, data, view) {
  const began = performance.now();
  const roots = [...document.querySelectorAll(`[data-nbx="${key}"]:not([data-ready])`)];
  for (const root of roots) root.dataset.ready = "";
  const traces = await Promise.all(data.map(async (one) => readTrace(one.meta, await unpack(one.data))));
  for (const root of roots) show(root, key, traces, view);
  for (const root of roots) root.dataset.started = (performance.now() - began).toFixed(1);
}

function show(root, key, traces, view) {
  const page = new ExplorerPage(root, key, traces, view);
  let width = root.clientWidth;
  const seen = new ResizeObserver(() => {
    if (!root.isConnected || Math.abs(root.clientWidth - width) < 20) return;
    width = root.clientWidth; page.draw();
  });
  seen.observe(root);
  const theme = new MutationObserver(() => page.draw()); // the strokes of empty cells are in the text's colour
  theme.observe(document.body, { attributes: true, attributeFilter: ["data-jp-theme-light"] });
  return () => { seen.disconnect(); theme.disconnect(); page.link.close(); };
}

const initialize = ({ model }) => registerLink(model);

function render({ model, el: place }) { // in front ends whose pages cannot see the kernel's side: the view itself
  const root = el("div", { class: "nbx" });
  const bytes = bytesOf(model.get("data")), traces = [];
  for (const meta of model.get("metas")) {
    traces.push(readTrace(meta, bytes.slice(meta.begin, meta.begin + meta.size)));
  }
  place.append(root);
  return show(root, model.get("key"), traces, model.get("view"));
}

export default { initialize, render };
