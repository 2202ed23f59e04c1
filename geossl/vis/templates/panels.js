"use strict";
// The panels of the report; each takes its part of the data and fills its section, or leaves it empty.

const DATA = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const tip = $("tip");
function showTip(event, ...content) {
  tip.replaceChildren(...content); tip.hidden = false;
  const box = tip.getBoundingClientRect(), gap = 16;
  const x = event.clientX + gap + box.width > innerWidth ? event.clientX - gap - box.width : event.clientX + gap;
  const y = Math.min(Math.max(event.clientY - box.height / 2, 8), innerHeight - box.height - 8);
  tip.style.transform = `translate(${Math.round(Math.max(x, 8))}px, ${Math.round(y)}px)`;
}
function hideTip() { tip.hidden = true; }
function heading(section, title, text, ...controls) {
  section.append(el("div", { class: "head" }, el("div", {}, el("h2", {}, title), el("p", {}, text)), ...controls));
}
function missing(section, title, text) { if (DATA.pretraining && !DATA.images.length) section.append(el("div", { class: "head" }, el("h2", {}, title)), el("p", { class: "missing" }, text)); }
function segmented(options, chosen, onChoose) {
  const box = el("div", { class: "segmented", role: "group" });
  for (const [key, label] of options) {
    box.append(el("button", { type: "button", "data-key": key, "aria-pressed": String(key === chosen), onclick: () => {
      for (const b of box.children) b.setAttribute("aria-pressed", String(b.dataset.key === key));
      onChoose(key);
    } }, label));
  }
  return box;
}
const rampBar = (name) => el("i", { style: `background: linear-gradient(90deg, ${RAMPS[name].join(", ")})` });

/* ---- header ------------------------------------------------------------------------------------------------------------- */
function headerPanel() {
  const head = DATA.header;
  $("eyebrow").textContent = head.eyebrow; $("title").textContent = head.title;
  for (const part of head.verdict) $("verdict").append(part.style ? el(part.style === "b" ? "b" : "span", { class: part.style }, part.text) : part.text);
  for (const tile of head.tiles) $("tiles").append(el("div", {}, el("dt", {}, tile.label), el("dd", {}, tile.value, tile.note ? el("small", {}, tile.note) : null)));
  $("footer").textContent = head.footer;
  if (DATA.events.items.length) { heroEvents(); return; }
  if (!DATA.pictures.length) { $("hero").remove(); document.querySelector(".hero").style.gridTemplateColumns = "1fr"; return; }
  // The visible part stands still, the predicted points swell out of it; then the next object.
  const state = { spin: 0.35, grow: 0, yaw: -0.7 }, canvas = el("canvas"), caption = el("span"), phase = el("span");
  $("hero").append(canvas, el("figcaption", {}, caption, phase));
  let shown = -1;
  const clouds = DATA.pictures.map(() => null);
  const view = new View(canvas, () => reconstructionCloud(0, false, false), state, { limit: 620, label: "Reconstruction of the hidden part of an object, turning" });
  state.tick = (now) => {
    const period = 9, index = (Math.floor(now / period) + 1) % DATA.pictures.length, t = reducedMotion ? 5 : now % period;
    if (index !== shown) { shown = index; view.cloud = clouds[index] ??= reconstructionCloud(index, false, false); caption.textContent = DATA.pictures[index].name; state.moved = true; }
    const grow = Math.min(Math.max((t - 2) / 1.6, 0), 1), eased = grow * grow * (3 - 2 * grow), leaving = t > period - 0.8 ? (period - t) / 0.8 : 1;
    const next = eased * leaving;
    if (next !== state.grow) { state.grow = next; state.moved = true; }
    phase.textContent = t < 2 ? "what the encoder sees" : "with what the decoder predicts";
  };
}

/* ---- curves ------------------------------------------------------------------------------------------------------------- */
function curvesPanel() {
  const section = $("curves"), { step, columns } = DATA.metrics;
  if (!step.length) { missing(section, "Curves", "metrics.jsonl holds no training step yet."); return; }
  heading(section, "Curves", "Every logged step; the strong line is a running mean. Point anywhere to read all of them at that step.");
  const grid = el("div", { class: "charts" });
  section.append(grid);
  const card = (kind) => { const c = el("div", { class: "card " + kind }); grid.append(c); return c; };
  const series = (key, color) => {
    const y = columns[key], noisy = y.length > 30;
    return noisy ? [{ name: "step", quiet: true, color, x: step, y, width: 1, opacity: 0.32 }, { name: "mean", color, x: step, y: smooth(y), width: 2.2 }] : [{ name: key, color, x: step, y, width: 2.2 }];
  };
  if (columns.loss) lineChart(card(DATA.curve ? "wide" : "wide-alone"), { title: "Loss", series: series("loss", "var(--accent)"), log: true, height: 260 });
  if (DATA.curve) {
    const c = DATA.curve;
    lineChart(card("wide"), { title: c.title, height: 260, format: c.share ? percent : short, baselines: c.baselines, series: [
      { name: c.name, color: "var(--accent-2)", x: c.step, y: c.mean, band: c.std, width: 2.4, dots: true },
      ...Object.entries(c.classes).map(([name, y]) => ({ name, color: DATA.palette[Math.max(DATA.events.classes.indexOf(name), 0)], x: c.step, y, width: 1.3 })),
      ...(c.official ? [{ name: "official", color: "var(--faint)", x: c.step, y: c.official, width: 1.4, dashed: true }] : []),
    ] });
  }
  const names = DATA.metrics.titles;
  for (const key of Object.keys(columns)) if (key !== "loss") lineChart(card("narrow"), { title: names[key] || key, series: series(key, "var(--accent)"), height: 132, format: key === "data_wait" ? percent : short });
}

/* ---- reconstructions ---------------------------------------------------------------------------------------------------- */
const GREY = [172, 178, 184];
const xyzOf = (base64) => Float32Array.from(decode(base64, Int16Array), (v) => v / 16384);
function heightCloud(base64) { return new Cloud(xyzOf(base64), (i, h) => rampColor("cool", h)); }
function reconstructionCloud(index, byError = false, plain = true) {
  const p = DATA.pictures[index], visible = xyzOf(p.visible), predicted = xyzOf(p.reconstruction), error = decode(p.error, Uint8Array);
  const both = new Float32Array(visible.length + predicted.length);
  both.set(visible); both.set(predicted, visible.length);
  const first = visible.length / 3;
  return new Cloud(both, (i, h) => (i < first ? (plain ? GREY : rampColor("cool", h)) : byError ? rampColor("error", error[i - first] / 255) : rampColor("warm", h)), first);
}
function imagesPanel(section) {
  heading(section, "Images", "Images the training never saw (where the data has a test part), what the network was shown of them, and what it made of it. Errors go from dark (none) to bright (the 99 % quantile).");
  const list = el("div", { class: "objects rows-of-images" });
  section.append(list);
  DATA.images.forEach((row) => {
    const cells = row.cells.map((cell) => {
      const img = el("img", { src: cell.src, alt: `${cell.title} of ${row.name}` });
      const box = el("div", {}, img, el("p", {}, cell.title));
      img.onload = () => { if (img.naturalWidth > 1.5 * img.naturalHeight) box.classList.add("wide"); };  // two images side by side
      return box;
    });
    list.append(el("article", { class: "card object" }, el("header", {}, el("h3", {}, row.name)), el("div", { class: "images" }, ...cells)));
  });
}
function reconstructionsPanel() {
  const section = $("reconstructions");
  if (DATA.events.items.length) return;
  if (DATA.images.length) { imagesPanel(section); return; }
  if (!DATA.pictures.length) { missing(section, "Reconstructions", "This run saved no pictures (run/report/pictures.npz)."); return; }
  let byError = false;
  const legend = el("span", { class: "ramp" }), views = [];
  const paintLegend = () => legend.replaceChildren(...(byError ? ["0", rampBar("error"), `${DATA.error_scale.toFixed(2)} to the nearest input point`] : ["predicted, low", rampBar("warm"), "high"]));
  const control = segmented([["height", "Height"], ["error", "Error"]], "height", (key) => {
    byError = key === "error"; paintLegend();
    for (const [view, index] of views) { view.cloud = () => reconstructionCloud(index, byError); view.dirty = true; }
  });
  paintLegend();
  heading(section, "Reconstructions", "Objects the training never saw (where the data has a test part). The encoder sees the visible part only; beside it that part is grey, and what the decoder predicts is coloured. Drag to turn, double-click to reset.", el("div", {}, control, " ", legend));
  const list = el("div", { class: "objects" });
  section.append(list);
  DATA.pictures.forEach((p, index) => {
    const state = { spin: 0.28, yaw: -0.55 - 0.3 * index };
    const cell = (cloud, text, label) => {
      const canvas = el("canvas"), box = el("div", {}, el("div", { class: "stage" }, canvas), el("p", {}, text));
      const view = new View(canvas, cloud, state, { limit: 400, label: `${label} of ${p.name}` });
      return [box, view];
    };
    const [input] = cell(() => heightCloud(p.input), "input", "Input");
    const [visible] = cell(() => heightCloud(p.visible), `visible, ${Math.round(100 * p.visible_share)} %`, "Visible part");
    const [result, view] = cell(() => reconstructionCloud(index, byError), "visible + predicted", "Reconstruction");
    views.push([view, index]);
    const cells = [input, visible, result];
    if (p.colors) {
      const rgb = decode(p.colors, Uint8Array);
      cells.push(cell(() => heightCloud(p.input).painted((i) => rgb.subarray(3 * i, 3 * i + 3)), "features", "Features of the points")[0]);
    }
    if (p.saliency) {
      const share = decode(p.saliency, Uint8Array);
      cells.push(cell(() => heightCloud(p.input).painted((i) => rampColor("warm", share[i] / 255)), "saliency", "Saliency")[0]);
    }
    if (p.depth) {
      const images = p.depth.map((src, k) => el("img", { src, alt: `What the teacher sees of ${p.name}, view ${k + 1}` }));
      cells.push(el("div", {}, el("div", { class: "stage depth" }, ...images), el("p", {}, "what the teacher sees")));
    }
    list.append(el("article", { class: "card object" }, el("header", {}, el("h3", {}, p.name), el("span", {}, `mean error ${p.mean_error.toFixed(3)}`)), el("div", { class: "trio" }, ...cells)));
  });
  section.append(el("p", { class: "note" }, "Units: the largest distance from an object's centre is 1. Error: distance from a predicted point to the nearest input point." +
    (DATA.pictures.some((p) => p.colors) ? " Features: those of the tokens, carried to the points; the three main components over all objects shown are red, green and blue." : "") +
    (DATA.pictures.some((p) => p.saliency) ? " Saliency: where the 2D teacher looks, dark for little; its images are three depth maps, grey being empty." : "")));
}

/* ---- shared by map and neighbours ---------------------------------------------------------------------------------------- */
const thumbs = new Map();
function thumbCloud(i) {
  if (!thumbs.has(i)) {
    const m = DATA.map, n = m.thumb_points, xyz = Float32Array.from(decodeThumbs().xyz.subarray(3 * n * i, 3 * n * (i + 1)), (v) => v / 127);
    const rgb = decodeThumbs().rgb, base = hexToRgb(colorOf(m.labels[i]));
    thumbs.set(i, new Cloud(xyz, rgb ? (k) => [0, 1, 2].map((c) => 34 + 0.86 * rgb[3 * (n * i + k) + c]) : (k, h) => base.map((v) => v * (0.72 + 0.4 * h) + 18 * h)));
  }
  return thumbs.get(i);
}
let decodedThumbs = null;
function decodeThumbs() { return (decodedThumbs ??= { xyz: decode(DATA.map.thumbs, Int8Array), rgb: DATA.map.thumb_colors ? decode(DATA.map.thumb_colors, Uint8Array) : null }); }
const colorOf = (label) => (label < 0 ? "#8a8f96" : DATA.palette[label % DATA.palette.length]);

/* ---- embedding map ------------------------------------------------------------------------------------------------------ */
function mapPanel() {
  const section = $("map"), m = DATA.map;
  if (DATA.events.items.length) return;
  if (!m) { missing(section, "Embedding map", "This run saved no embeddings (run/report/embedding.npz)."); return; }
  const n = m.labels.length, shown = new Set(DATA.classes.map((_, k) => k));
  let projection = "tsne", style = "dots", at = m.tsne.map((p) => [...p]), hovered = -1, glide = null;
  heading(section, "Embedding map", `Each object's frozen features, ${m.dimensions} numbers, laid out in two dimensions. Point at one to see it and its nearest neighbours in the full space.`,
    el("div", {}, segmented([["dots", "Dots"], ["shapes", "Shapes"]], style, (key) => { style = key; draw(); }), " ",
      segmented([["tsne", "t-SNE"], ["pca", "PCA"]], projection, (key) => move(m[key]))));
  const canvas = el("canvas", { role: "img", "aria-label": "Two-dimensional map of the embeddings coloured by class", tabindex: "0" }), plot = el("div", { class: "card plot" }, canvas), legend = el("div", { class: "legend" }, el("h3", {}, "Classes"));
  section.append(el("div", { class: "mapgrid" }, plot, el("div", { class: "card", style: "padding: 14px 8px" }, legend)));
  section.append(el("p", { class: "note" }, "Ringed: test part. t-SNE keeps neighbourhoods, not distances between far groups; PCA is linear."));
  DATA.classes.forEach((name, k) => {
    const count = m.labels.filter((l) => l === k).length;
    const button = el("button", { type: "button", "aria-pressed": "true", onclick: () => { shown.has(k) ? shown.delete(k) : shown.add(k); button.setAttribute("aria-pressed", String(shown.has(k))); draw(); },
      onpointerenter: () => { focus = k; draw(); }, onpointerleave: () => { focus = -1; draw(); } }, el("i", { style: `background:${colorOf(k)}` }), name.replaceAll("_", " "), el("span", {}, String(count)));
    legend.append(button);
  });
  let focus = -1, place = () => [0, 0];
  function sprite(i, size) {
    // One still picture per object, drawn once.
    const key = "s" + i;
    if (!thumbs.has(key)) { const c = document.createElement("canvas"); c.width = c.height = size; render(c, thumbCloud(i), { yaw: -0.55, pitch: 0.36, zoom: 1.08 }); thumbs.set(key, c); }
    return thumbs.get(key);
  }
  function draw() {
    const ratio = Math.min(devicePixelRatio || 1, 2), W = plot.clientWidth, H = Math.round(Math.min(Math.max(W * 0.66, 380), 640));
    canvas.width = W * ratio; canvas.height = H * ratio; canvas.style.height = H + "px";
    const c = canvas.getContext("2d"), style0 = getComputedStyle(document.documentElement), cardColor = style0.getPropertyValue("--card"), ink = style0.getPropertyValue("--ink");
    c.scale(ratio, ratio);
    const pad = style === "shapes" ? 40 : 26, unit = Math.min(W, H * 1.5);
    place = (i) => [W / 2 + at[i][0] * (W / 2 - pad), H / 2 - at[i][1] * (H / 2 - pad)];
    const alpha = (i) => (!shown.has(m.labels[i]) ? 0 : focus >= 0 && m.labels[i] !== focus ? 0.12 : 1);
    if (style === "shapes") {
      // Greedy: an object is drawn where it covers no earlier one; the others stay as small dots.
      const size = Math.max(40, Math.min(62, unit / 17)), taken = [];
      for (let i = 0; i < n; i++) {
        const [x, y] = place(i);
        if (!alpha(i)) continue;
        c.globalAlpha = alpha(i);
        if (taken.some(([u, v]) => Math.hypot(x - u, y - v) < size * 0.74)) { c.fillStyle = colorOf(m.labels[i]); c.globalAlpha = 0.35 * alpha(i); c.beginPath(); c.arc(x, y, 2.2, 0, 7); c.fill(); continue; }
        taken.push([x, y, i]);
      }
      for (const [x, y, i] of taken) { c.globalAlpha = alpha(i); c.drawImage(sprite(i, 128), x - size / 2, y - size / 2, size, size); }
    } else {
      for (let i = 0; i < n; i++) {
        const a = alpha(i), [x, y] = place(i);
        if (!a) continue;
        c.globalAlpha = a * 0.92; c.fillStyle = colorOf(m.labels[i]);
        c.beginPath(); c.arc(x, y, 4.6, 0, 7); c.fill();
        c.lineWidth = m.test[i] ? 1.3 : 1; c.strokeStyle = m.test[i] ? ink : cardColor; c.stroke();
      }
    }
    c.globalAlpha = 1;
    if (hovered >= 0) {
      const [x, y] = place(hovered);
      c.strokeStyle = ink; c.lineWidth = 1.2;
      for (const j of m.nearest[hovered]) { const [u, v] = place(j); c.globalAlpha = 0.55; c.beginPath(); c.moveTo(x, y); c.lineTo(u, v); c.stroke(); c.globalAlpha = 1; c.fillStyle = colorOf(m.labels[j]); c.beginPath(); c.arc(u, v, 6, 0, 7); c.fill(); c.stroke(); }
      c.globalAlpha = 1; c.fillStyle = colorOf(m.labels[hovered]); c.beginPath(); c.arc(x, y, 8, 0, 7); c.fill(); c.lineWidth = 2; c.stroke();
    }
  }
  function move(target) {
    const from = at.map((p) => [...p]), start = performance.now();
    cancelAnimationFrame(glide);
    const go = (now) => {
      const t = reducedMotion ? 1 : Math.min((now - start) / 700, 1), e = 1 - (1 - t) ** 3;
      at = from.map((p, i) => [p[0] + (target[i][0] - p[0]) * e, p[1] + (target[i][1] - p[1]) * e]); draw();
      if (t < 1) glide = requestAnimationFrame(go);
    };
    glide = requestAnimationFrame(go);
  }
  const preview = el("canvas"), state = { spin: 0.9 };
  const view = new View(preview, null, state, { limit: 320, label: "Object under the pointer" });
  stage.views.delete(view); onScreen.unobserve(preview); view.visible = true;
  canvas.addEventListener("pointermove", (e) => {
    const box = canvas.getBoundingClientRect(), x = e.clientX - box.left, y = e.clientY - box.top;
    let best = -1, gap = 22;
    for (let i = 0; i < n; i++) { if (!shown.has(m.labels[i])) continue; const [u, v] = place(i), d = Math.hypot(u - x, v - y); if (d < gap) { gap = d; best = i; } }
    if (best < 0) { leave(); return; }
    if (best !== hovered) { hovered = best; view.cloud = thumbCloud(best); state.yaw = -0.9; draw(); stage.views.add(view); view.dirty = true; }
    const name = DATA.classes[m.labels[best]].replaceAll("_", " "), near = m.nearest[best].filter((j) => m.labels[j] === m.labels[best]).length;
    showTip(e, preview, el("b", {}, m.names[best]), el("div", { class: "row" }, el("span", {}, el("i", { style: `background:${colorOf(m.labels[best])}` }), name), m.test[best] ? "test" : "train"), el("div", { class: "row" }, el("span", {}, "neighbours of its class"), `${near} of ${m.nearest[best].length}`));
    if (view.dirty) view.draw();
  });
  function leave() { if (hovered >= 0) { hovered = -1; draw(); } stage.views.delete(view); hideTip(); }
  canvas.addEventListener("pointerleave", leave);
  addEventListener("resize", draw); addEventListener("themechange", draw);
  draw();
}

/* ---- neighbours --------------------------------------------------------------------------------------------------------- */
function neighborsPanel() {
  const section = $("neighbors"), m = DATA.map;
  if (!m || !DATA.retrieval.rows.length) return;
  const r = DATA.retrieval;
  heading(section, "Nearest neighbours", `The first object of every class in the ${r.from}, and the objects closest to it (cosine of standardised features; near-duplicates left out). Over all ${r.count} objects of the ${r.from}, ${percent(r.precision)} of the ${r.k} nearest share the class; by chance ${percent(r.chance)} would.`);
  const rows = el("div", { class: "rows" });
  section.append(rows);
  const thumb = (i, kind, note) => {
    const canvas = el("canvas"), name = DATA.classes[m.labels[i]].replaceAll("_", " ");
    new View(canvas, () => thumbCloud(i), {}, { limit: 280, label: `${m.names[i]}, ${name}` });
    return el("div", { class: "thumb " + kind, title: `${m.names[i]} (${name})` }, canvas, el("p", {}, kind === "query" ? m.names[i] : name), note ? el("span", { class: "num" }, note) : null);
  };
  for (const row of r.rows) {
    const label = m.labels[row.query];
    rows.append(el("div", { class: "card shelf" }, thumb(row.query, "query", DATA.classes[label].replaceAll("_", " ")), ...row.found.map((j, k) => thumb(j, m.labels[j] === label ? "same" : "other", row.similarity[k].toFixed(2)))));
  }
}

/* ---- shared by probes and segmentation ----------------------------------------------------------------------------------- */
function confusionGrid(counts, names) {
  const k = counts.length, grid = el("div", { class: "confusion", style: `grid-template-columns: 112px repeat(${k}, minmax(0, 1fr)); max-width: ${112 + 76 * k}px` });
  const title = (i) => names[i].replaceAll("_", " ");
  counts.forEach((row, i) => {
    const total = row.reduce((a, b) => a + b, 0);
    grid.append(el("span", { class: "name" }, title(i)));
    row.forEach((count, j) => {
      const share = total ? count / total : 0, cell = el("span", { class: "cell", style: `background: color-mix(in srgb, var(${i === j ? "--accent" : "--accent-2"}) ${Math.round(100 * Math.sqrt(share))}%, var(--grid))` });
      if (k <= 8) cell.textContent = percent(share);
      cell.addEventListener("pointermove", (e) => showTip(e, el("div", {}, `${count} of ${total} `, el("b", {}, title(i)), i === j ? " recognised" : " taken for ", i === j ? "" : el("b", {}, title(j)))));
      cell.addEventListener("pointerleave", hideTip);
      grid.append(cell);
    });
  });
  grid.append(el("span"));
  for (let j = 0; j < k; j++) grid.append(el("span", { class: "below" }, title(j)));
  return grid;
}

/* ---- probes ------------------------------------------------------------------------------------------------------------- */
function probesPanel() {
  const section = $("probes"), p = DATA.probes;
  if (DATA.token_probe) return;
  if (!p) { missing(section, "Probes", "This run was not probed (run/report/probes.json). tools/evaluate.py probes it any time."); return; }
  heading(section, "Probes of frozen features", `${p.protocol} Large: mean over ${p.resplits} group-aware resplits, with standard deviation (bar: whisker); small: the official split.`);
  const header = el("tr", {}, el("th", {}, "Features"), ...p.columns.map((c) => el("th", {}, c.name, el("small", {}, c.about))));
  const table = el("table", { class: "scores" }, el("thead", {}, header));
  const body = el("tbody");
  for (const row of p.rows) {
    body.append(el("tr", { class: row.own ? "own" : "" }, el("td", {}, row.name, el("small", {}, row.about)), ...row.cells.map((c) => c === null ? el("td", {}, "–") : el("td", {}, el("span", { class: "num" }, percent(c.mean), ` ± ${(100 * c.std).toFixed(1)}`),
      el("div", { class: "meter" }, el("i", { style: `width:${100 * c.mean}%` }), el("b", { style: `left:${100 * (c.mean - c.std)}%; width:${200 * c.std}%` })), el("small", {}, c.official === null ? "no official split" : `official ${percent(c.official)}`)))));
  }
  table.append(body);
  section.append(el("div", { class: "card scroll" }, table));
  const own = p.confusion, grid = confusionGrid(own.counts, DATA.classes), title = (i) => DATA.classes[i].replaceAll("_", " ");
  const recall = el("div", { class: "recall" });
  own.recall.map((value, i) => [value, i]).sort((a, b) => (b[0] ?? -1) - (a[0] ?? -1)).forEach(([value, i]) => recall.append(el("span", {}, title(i)), el("div", { class: "meter" }, el("i", { style: `width:${100 * (value ?? 0)}%; background:${colorOf(i)}` })), el("span", { class: "num" }, percent(value))));
  section.append(el("div", { class: "pair" }, el("div", { class: "card" }, el("h3", {}, `Confusion, ${own.title}: rows are true, columns predicted`), grid), el("div", { class: "card" }, el("h3", {}, "Recall of each class"), recall)));
}

/* ---- set-up ------------------------------------------------------------------------------------------------------------- */
function setupPanel() {
  const section = $("setup");
  heading(section, "Set-up", "The resolved configuration runs again as it is: tools/pretrain.py config.yaml.");
  const pre = el("pre", { class: "yaml" });
  for (const line of DATA.config.split("\n")) {
    const match = line.match(/^(\s*(?:- )?)([\w.]+)(:)(.*)$/);
    if (!match) { pre.append(el("span", { class: line.trim().startsWith("#") ? "c" : "" }, line), "\n"); continue; }
    pre.append(match[1], el("span", { class: "k" }, match[2]), match[3], el("span", { class: /^\s*[-\d.e+]+$|true|false|null/.test(match[4]) ? "n" : "" }, match[4]), "\n");
  }
  const facts = el("table", { class: "facts" });
  for (const [key, value] of DATA.environment) facts.append(el("tr", {}, el("td", {}, key), el("td", {}, value)));
  section.append(el("div", { class: "setup" }, el("div", { class: "card" }, el("h3", {}, "config.yaml"), pre), el("div", { class: "card" }, el("h3", {}, "Environment"), facts)));
}
