"use strict";
// Particle events: energy, tokens and mask, reconstruction, classes, attention and embeddings, all views of an event turning together.

const HIDDEN = [214, 120, 62], VISIBLE = [38, 140, 150];
const classColor = (k) => (k < 0 ? GREY : hexToRgb(DATA.palette[k % DATA.palette.length]));
const events = new Map();
function eventData(index) {
  // Decoded once: the points with what is known of each, and the tokens they take colours from.
  if (!events.has(index)) {
    const e = DATA.events.items[index], bytes = (key, Type = Uint8Array) => (e[key] === undefined ? null : decode(e[key], Type));
    const found = { energy: bytes("energy"), token: bytes("token", Uint16Array), label: bytes("label", Int8Array), predicted: bytes("predicted", Int8Array), hidden: bytes("hidden"), attention: bytes("attention"), colors: bytes("colors"), colors_residual: bytes("colors_residual") };
    found.cloud = new Cloud(xyzOf(e.coord), (i) => rampColor("warm", found.energy[i] / 255), Infinity, false);
    events.set(index, found);
  }
  return events.get(index);
}
function predictedEvent(index) {
  const e = DATA.events.items[index], visible = xyzOf(e.visible), predicted = xyzOf(e.reconstruction), energy = decode(e.reconstruction_energy, Uint8Array);
  const both = new Float32Array(visible.length + predicted.length), first = visible.length / 3;
  both.set(visible); both.set(predicted, visible.length);
  return new Cloud(both, (i) => (i < first ? GREY : rampColor("warm", energy[i - first] / 255)), first, false);
}
function eventViews(index) {
  // Title, cloud and, where points can be picked, what to do with the token of the one picked.
  const e = DATA.events.items[index], painted = (color) => () => eventData(index).cloud.painted(color(eventData(index)));
  const views = [["energy", painted((d) => (i) => rampColor("warm", d.energy[i] / 255))]];
  views.push([e.hidden ? "tokens: visible, hidden" : "tokens", painted((d) => (i) => {
    const t = d.token[i], base = d.hidden ? (d.hidden[t] ? HIDDEN : VISIBLE) : classColor(t), shade = 0.72 + 0.56 * ((t * 37) % 11) / 10;
    return base.map((v) => v * shade);
  })]);
  if (e.reconstruction) views.push(["visible + predicted energy", () => predictedEvent(index)]);
  if (e.label) views.push(["true class", painted((d) => (i) => classColor(d.label[i]))]);
  if (e.predicted) views.push(["predicted class", painted((d) => (i) => classColor(d.predicted[i]))]);
  views.push(["embedding, main components", painted((d) => (i) => d.colors.subarray(3 * d.token[i], 3 * d.token[i] + 3))]);
  views.push(["the same without position", painted((d) => (i) => d.colors_residual.subarray(3 * d.token[i], 3 * d.token[i] + 3))]);
  return views;
}
function attentionView(index, state) {
  // The token of the point that is clicked asks; points are as bright as its attention to their token.
  const e = DATA.events.items[index], canvas = el("canvas", { class: "pick" }), text = el("p");
  let asked = -1;
  const paint = () => {
    const d = eventData(index);
    if (asked < 0) asked = d.token[Math.floor(d.token.length / 2)];
    text.textContent = `attention of token ${asked + 1} of ${e.tokens}, red: click another`;
    return d.cloud.painted((i) => (d.token[i] === asked ? [240, 70, 60] : rampColor("cool", d.attention[asked * e.tokens + d.token[i]] / 255)));
  };
  const view = new View(canvas, paint, state, { limit: 400, label: `Attention of a token of ${e.name}` });
  let down = null;
  canvas.addEventListener("pointerdown", (event) => { down = [event.clientX, event.clientY]; });
  canvas.addEventListener("pointerup", (event) => {
    if (!down || Math.hypot(event.clientX - down[0], event.clientY - down[1]) > 4) return;
    view.draw();
    const box = canvas.getBoundingClientRect(), point = pointAt(canvas, (event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height);
    if (point < 0) return;
    asked = eventData(index).token[point]; view.cloud = paint; view.dirty = true;
  });
  return el("div", {}, el("div", { class: "stage" }, canvas), text);
}
function heroEvents() {
  const state = { spin: 0.25, yaw: -0.7, zoom: 1.12 }, canvas = el("canvas"), caption = el("span");
  $("hero").append(canvas, el("figcaption", {}, caption, el("span", {}, "coloured by energy")));
  const view = new View(canvas, () => eventData(0).cloud, state, { limit: 620, label: "A particle event, turning" });
  let shown = -1;
  state.tick = (now) => {
    const index = Math.floor(now / 9) % DATA.events.items.length;
    if (index === shown) return;
    shown = index; view.cloud = eventData(index).cloud; caption.textContent = DATA.events.items[index].name; state.moved = true;
  };
}
function classLegend() {
  const legend = el("span", { class: "classes" });
  DATA.events.classes.forEach((name, k) => legend.append(el("span", {}, el("i", { style: `background:${DATA.palette[k % DATA.palette.length]}` }), name)));
  return legend;
}
function eventsPanel() {
  const section = $("events"), { items } = DATA.events;
  if (!items.length) return;
  const masked = items.some((e) => e.hidden);
  heading(section, "Events", `Events the training never saw (where the data has a held-out part), as the encoder sees them. Energy is logarithmic, dark low and bright high.${masked ? " Of the tokens, the teal ones are visible to the encoder, the orange ones hidden; what the decoder predicts in their place is coloured by energy." : ""} Attention is that of the last block, mean over its heads; embeddings are the last block's, and the same after a linear fit of position was taken out. Drag to turn.`, el("div", {}, classLegend()));
  const list = el("div", { class: "events" });
  section.append(list);
  items.forEach((e, index) => {
    const state = { spin: 0.2, yaw: -0.55 - 0.4 * index, zoom: 1.12 }, grid = el("div", { class: "views" });
    for (const [title, cloud] of eventViews(index)) {
      const canvas = el("canvas");
      new View(canvas, cloud, state, { limit: 400, label: `${title}, ${e.name}` });
      grid.append(el("div", {}, el("div", { class: "stage" }, canvas), el("p", {}, title)));
    }
    if (e.attention) grid.append(attentionView(index, state));
    list.append(el("article", { class: "card object" }, el("header", {}, el("h3", {}, e.name), el("span", {}, `${e.points.toLocaleString("en")} points, ${e.tokens} tokens`)), grid));
  });
}

/* ---- scores of a segmentation ---------------------------------------------------------------------------------------------- */
function meterCell(value, color = null) {
  return el("td", {}, el("span", { class: "num" }, percent(value)), el("div", { class: "meter" }, el("i", { style: `width:${100 * (value ?? 0)}%${color ? `; background:${color}` : ""}` })));
}
function segmentationPanel() {
  const section = $("segmentation"), s = DATA.segmentation;
  if (!s) return;
  heading(section, "Segmentation", `Every point of the test part: ${s.points.toLocaleString("en")}. ${percent(s.micro.accuracy)} of them are right; the mean IoU is ${percent(s.macro.iou)}.`);
  const kinds = ["precision", "recall", "f1", "iou"], table = el("table", { class: "scores" }), body = el("tbody");
  table.append(el("thead", {}, el("tr", {}, el("th", {}, "Class"), ...["Precision", "Recall", "F1", "IoU"].map((name) => el("th", {}, name)))), body);
  const totals = s.confusion.map((row) => row.reduce((a, b) => a + b, 0));
  s.classes.forEach((name, k) => body.append(el("tr", {}, el("td", {}, name, el("small", {}, `${totals[k].toLocaleString("en")} points`)), ...kinds.map((kind) => meterCell(s.per_class[kind][k], DATA.palette[k % DATA.palette.length])))));
  body.append(el("tr", { class: "own" }, el("td", {}, "Mean over classes"), ...kinds.map((kind) => meterCell(s.macro[kind]))));
  section.append(el("div", { class: "card scroll" }, table));
  section.append(el("div", { class: "pair" }, el("div", { class: "card" }, el("h3", {}, "Confusion: rows are true, columns predicted"), confusionGrid(s.confusion, s.classes))));
}

/* ---- the token probe --------------------------------------------------------------------------------------------------------- */
function tokenProbePanel() {
  const section = $("probes"), p = DATA.token_probe;
  if (!p) return;
  heading(section, "Probe of frozen tokens", p.protocol);
  const table = el("table", { class: "scores" }), body = el("tbody");
  table.append(el("thead", {}, el("tr", {}, el("th", {}, "Features"), ...p.columns.map((c) => el("th", {}, c.name, el("small", {}, c.about))))), body);
  for (const row of p.rows) body.append(el("tr", { class: row.own ? "own" : "" }, el("td", {}, row.name, el("small", {}, row.about)), ...row.cells.map((value) => meterCell(value))));
  section.append(el("div", { class: "card scroll" }, table));
}
