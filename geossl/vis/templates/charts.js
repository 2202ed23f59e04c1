"use strict";
// Line charts as inline SVG with one cursor shared by all of them.

const SVG = "http://www.w3.org/2000/svg";
function svg(tag, attributes = {}, parent = null, text = null) {
  const node = document.createElementNS(SVG, tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== null) node.textContent = text;
  if (parent) parent.append(node);
  return node;
}
function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "style") node.style.cssText = value;
    else if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else node.setAttribute(key, value);
  }
  node.append(...children.filter((c) => c !== null));
  return node;
}
function ticks(low, high, wanted) {
  const raw = (high - low) / wanted, power = 10 ** Math.floor(Math.log10(raw)), unit = [1, 2, 2.5, 5, 10].find((m) => m * power >= raw) * power, list = [];
  for (let t = Math.ceil(low / unit - 1e-9) * unit; t <= high + unit * 1e-6; t += unit) list.push(Math.abs(t) < unit * 1e-6 ? 0 : t);
  return list;
}
function logTicks(low, high) {
  const list = [];
  for (let p = Math.floor(Math.log10(low)); p <= Math.ceil(Math.log10(high)); p++) for (const m of [1, 2, 5]) { const t = m * 10 ** p; if (t >= low * 0.999 && t <= high * 1.001) list.push(t); }
  return list.length > 1 ? list : ticks(low, high, 4);
}
function short(value) {
  if (value === null || value === undefined || !isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size === 0) return "0";
  if (size >= 1e6) return (value / 1e6).toPrecision(3).replace(/\.?0+$/, "") + "M";
  if (size >= 1e4) return (value / 1e3).toPrecision(3).replace(/\.?0+$/, "") + "k";
  if (size < 1e-3) return value.toExponential(1).replace("e-", "e−");
  return String(+value.toPrecision(3));
}
const percent = (value) => (value === null || value === undefined ? "–" : (100 * value).toFixed(1) + " %");
const plain = (text) => text.replace(/\.0(?= %)/, "");

const charts = [];
// series: [{ name, color, x, y, width?, opacity?, band? (half width per point), dots?, dashed?, quiet? }]; baselines: [{ name, value, color }]
function lineChart(parent, { title, series, baselines = [], height = 230, log = false, format = short, note = "" }) {
  const readout = el("output"), holder = el("div", { class: "chart" });
  parent.append(el("div", { class: "chart-head" }, el("h3", {}, title), readout), holder);
  const chart = { holder, readout, series, draw, cursor: null };
  function draw() {
    holder.replaceChildren();
    const W = Math.max(holder.clientWidth, 160), H = height, left = 44, right = baselines.length ? 124 : 12, top = 10, bottom = 24;
    const root = svg("svg", { viewBox: `0 0 ${W} ${H}`, height: H, role: "img", "aria-label": title + (note ? ": " + note : "") }, holder);
    const xs = series.flatMap((s) => s.x), ys = series.flatMap((s) => s.y.flatMap((y, i) => (y === null ? [] : s.band ? [y - s.band[i], y + s.band[i]] : [y]))).concat(baselines.map((b) => b.value));
    let x0 = Math.min(...xs), x1 = Math.max(...xs), y0 = Math.min(...ys), y1 = Math.max(...ys);
    if (x1 === x0) { x0 -= 1; x1 += 1; }
    const useLog = log && y0 > 0;
    if (useLog) { const pad = (y1 / y0) ** 0.05; y0 /= pad; y1 *= pad; } else { const pad = (y1 - y0) * 0.07 || Math.abs(y1) * 0.1 || 1; y0 = y0 >= 0 && y0 - pad < 0 ? 0 : y0 - pad; y1 += pad; }
    const X = (x) => left + ((x - x0) / (x1 - x0)) * (W - left - right);
    const Y = useLog ? (y) => top + (1 - Math.log(y / y0) / Math.log(y1 / y0)) * (H - top - bottom) : (y) => top + (1 - (y - y0) / (y1 - y0)) * (H - top - bottom);
    for (const t of useLog ? logTicks(y0, y1) : ticks(y0, y1, H > 160 ? 5 : 3)) {
      svg("line", { class: "gridline", x1: left, x2: W - right, y1: Y(t), y2: Y(t) }, root);
      svg("text", { x: left - 7, y: Y(t) + 4, "text-anchor": "end" }, root, plain(format(t)));
    }
    for (const t of ticks(x0, x1, W > 420 ? 6 : 3)) svg("text", { x: X(t), y: H - 5, "text-anchor": "middle" }, root, short(t));
    svg("line", { class: "axis", x1: left, x2: W - right, y1: H - bottom, y2: H - bottom }, root);
    let lastLabel = -99;
    for (const b of [...baselines].sort((a, c) => c.value - a.value)) {
      svg("line", { class: "baseline", x1: left, x2: W - right, y1: Y(b.value), y2: Y(b.value), stroke: b.color }, root);
      lastLabel = Math.max(Y(b.value) + 4, lastLabel + 13);
      svg("text", { class: "label", x: W - right + 6, y: lastLabel, style: `fill:${b.color}` }, root, `${b.name} ${format(b.value)}`);
    }
    for (const s of series) {
      const known = s.x.map((x, i) => [x, s.y[i], i]).filter((p) => p[1] !== null && (!useLog || p[1] > 0));
      if (!known.length) continue;
      if (s.band) {
        const upper = known.map(([x, y, i]) => `${X(x)},${Y(y + s.band[i])}`), lower = known.map(([x, y, i]) => `${X(x)},${Y(y - s.band[i])}`).reverse();
        svg("polygon", { points: [...upper, ...lower].join(" "), fill: s.color, opacity: 0.16 }, root);
      }
      svg("polyline", { points: known.map(([x, y]) => `${X(x).toFixed(1)},${Y(y).toFixed(1)}`).join(" "), fill: "none", stroke: s.color, "stroke-width": s.width || 2, "stroke-linejoin": "round", "stroke-linecap": "round", opacity: s.opacity || 1, "stroke-dasharray": s.dashed ? "2 4" : "none" }, root);
      if (s.dots || known.length === 1) for (const [x, y] of known) svg("circle", { cx: X(x), cy: Y(y), r: 3.2, fill: s.color }, root);
    }
    const cross = svg("line", { class: "cross", y1: top, y2: H - bottom, visibility: "hidden" }, root);
    const marks = series.map((s) => svg("circle", { r: 4, fill: s.color, stroke: "var(--card)", "stroke-width": 1.5, visibility: "hidden" }, root));
    chart.show = (step) => {
      const parts = [];
      series.forEach((s, k) => {
        const i = step === null ? -1 : nearest(s, step);
        const far = i < 0 || s.quiet || step < x0 || step > x1;
        marks[k].setAttribute("visibility", far ? "hidden" : "visible");
        if (far) return;
        marks[k].setAttribute("cx", X(s.x[i])); marks[k].setAttribute("cy", Y(s.y[i]));
        parts.push(`${series.filter((q) => !q.quiet).length > 1 ? s.name + " " : ""}${format(s.y[i])}${s.band ? " ± " + format(s.band[i]) : ""}`);
      });
      const inside = step !== null && step >= x0 && step <= x1;
      cross.setAttribute("visibility", inside ? "visible" : "hidden");
      if (inside) { cross.setAttribute("x1", X(step)); cross.setAttribute("x2", X(step)); }
      readout.textContent = parts.length ? `step ${Math.round(step)}:  ${parts.join("   ")}` : latest();
    };
    root.addEventListener("pointermove", (e) => {
      const box = root.getBoundingClientRect(), x = ((e.clientX - box.left) / box.width) * W;
      const step = x0 + ((x - left) / (W - left - right)) * (x1 - x0);
      for (const other of charts) other.show(Math.min(Math.max(step, x0), x1));
    });
    root.addEventListener("pointerleave", () => charts.forEach((other) => other.show(null)));
    chart.show(null);
  }
  function latest() {
    const s = series.find((q) => !q.quiet), y = s.y.filter((v) => v !== null).at(-1);
    return `${format(y)}${s.band ? " ± " + format(s.band.at(-1)) : ""}`;
  }
  charts.push(chart);
  draw();
  return chart;
}
function nearest(s, step) {
  let best = -1, gap = Infinity;
  for (let i = 0; i < s.x.length; i++) if (s.y[i] !== null && Math.abs(s.x[i] - step) < gap) { gap = Math.abs(s.x[i] - step); best = i; }
  return best;
}
// Centred running mean with a window of about one fortieth of the run.
function smooth(y) {
  const half = Math.max(1, Math.round(y.length / 80));
  return y.map((_, i) => { const part = y.slice(Math.max(0, i - half), i + half + 1).filter((v) => v !== null); return part.length ? part.reduce((a, b) => a + b, 0) / part.length : null; });
}
addEventListener("resize", () => charts.forEach((chart) => chart.draw()));
