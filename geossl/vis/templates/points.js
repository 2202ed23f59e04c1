"use strict";
// A small software renderer of point clouds: every point is a lit sphere in a depth buffer, edges are darkened where depth jumps,
// occlusion and a contact shadow are baked once per cloud. It needs no GPU, so the report looks the same everywhere.

const RAMPS = {
  cool: ["#2a2f7c", "#27639c", "#1f93a0", "#63b98f", "#c9d184", "#fbe7a8"],
  warm: ["#5a2468", "#a52f63", "#e0523f", "#f58b3c", "#ffc867"],
  error: ["#3c8f6e", "#e8c552", "#d3402f"],
};
const reducedMotion = matchMedia("(prefers-reduced-motion: reduce)").matches;

function hexToRgb(hex) { return [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16)); }
function rampColor(name, t) {
  const stops = RAMPS[name], x = Math.min(Math.max(t, 0), 1) * (stops.length - 1), i = Math.min(Math.floor(x), stops.length - 2);
  const a = hexToRgb(stops[i]), b = hexToRgb(stops[i + 1]);
  return a.map((v, c) => v + (b[c] - v) * (x - i));
}
function decode(base64, Type) {
  const text = atob(base64), bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return new Type(bytes.buffer);
}

class Cloud {
  // xyz: Float32Array [3 n]; color(i, height 0..1) -> [r, g, b]; grows: points from this index on can be shrunk away (0..1);
  // stands: on a floor, which catches its shadow
  constructor(xyz, color, grows = Infinity, stands = true) {
    this.xyz = xyz; this.n = xyz.length / 3; this.grows = grows;
    let low = Infinity, high = -Infinity;
    for (let i = 2; i < xyz.length; i += 3) { low = Math.min(low, xyz[i]); high = Math.max(high, xyz[i]); }
    this.low = low; this.high = high;
    this.rgb = new Uint8ClampedArray(3 * this.n);
    for (let i = 0; i < this.n; i++) this.rgb.set(color(i, (xyz[3 * i + 2] - low) / Math.max(high - low, 1e-6)), 3 * i);
    this.occlusion(); this.ground = null;
    if (stands) this.shadow();
  }
  painted(color) {
    // The same points in other colours, light and shadow shared.
    const copy = Object.create(this);
    copy.rgb = new Uint8ClampedArray(3 * this.n);
    for (let i = 0; i < this.n; i++) copy.rgb.set(color(i), 3 * i);
    return copy;
  }
  occlusion() {
    // Mean spacing gives the size of the spheres; how much lies above and around a point gives its ambient light.
    const { xyz, n } = this, reach = 0.25, light = new Float32Array(n);
    let spacing = 0, mean = 0;
    for (let i = 0; i < n; i++) {
      let nearest = 4, covered = 0;
      for (let j = 0; j < n; j++) {
        const dx = xyz[3 * j] - xyz[3 * i], dy = xyz[3 * j + 1] - xyz[3 * i + 1], dz = xyz[3 * j + 2] - xyz[3 * i + 2];
        const d2 = dx * dx + dy * dy + dz * dz;
        if (j === i || d2 > reach * reach) continue;
        if (d2 < nearest) nearest = d2;
        const d = Math.sqrt(d2) + 1e-6;
        covered += (1 - d / reach) * (0.25 + Math.max(0, dz / d));
      }
      spacing += Math.sqrt(Math.min(nearest, 0.01)); light[i] = covered; mean += covered;
    }
    mean = mean / n + 1e-6;
    for (let i = 0; i < n; i++) light[i] = 0.62 + 0.55 * Math.exp(-0.75 * light[i] / mean);
    this.light = light;
    this.radius = Math.min(Math.max(0.84 * spacing / n, 0.013), 0.06);
  }
  shadow() {
    const { xyz, n } = this, size = 64, span = 3.2, grid = new Float32Array(size * size);
    this.floor = this.low - this.radius;
    for (let i = 0; i < n; i++) {
      const height = xyz[3 * i + 2] - this.floor, sigma = 1 + 9 * height * 0.5, cells = Math.ceil(2 * sigma);
      const u = (xyz[3 * i] / span + 0.5) * size, v = (xyz[3 * i + 1] / span + 0.5) * size, amount = 1 / (sigma * sigma);
      for (let y = Math.max(0, Math.floor(v - cells)); y <= Math.min(size - 1, v + cells); y++)
        for (let x = Math.max(0, Math.floor(u - cells)); x <= Math.min(size - 1, u + cells); x++)
          grid[y * size + x] += amount * Math.exp(-((x - u) ** 2 + (y - v) ** 2) / (2 * sigma * sigma));
    }
    for (let k = 0; k < grid.length; k++) grid[k] = 1 - Math.exp(-150 * grid[k] / n);
    this.ground = { grid, size, span };
  }
}

const splats = new Map();
function splat(radius) {
  // Pixels of a lit sphere of this radius (quarter steps): offsets, height towards the viewer, light, highlight.
  const key = Math.max(2, Math.round(radius * 4));
  if (!splats.has(key)) {
    const r = key / 4, R = Math.ceil(r), pixels = [];
    for (let y = -R; y <= R; y++) for (let x = -R; x <= R; x++) {
      const q = (x * x + y * y) / (r * r);
      if (q > 1) continue;
      const nx = x / r, ny = -y / r, nz = Math.sqrt(1 - q);
      const key1 = -0.46 * nx + 0.72 * ny + 0.52 * nz, fill = 0.8 * nx + 0.1 * ny + 0.58 * nz;
      const shine = Math.pow(Math.max(0, -0.26 * nx + 0.42 * ny + 0.87 * nz), 22);
      pixels.push([x, y, nz, 0.46 + 0.56 * Math.max(0, key1) + 0.12 * Math.max(0, fill), 34 * shine]);
    }
    const table = { n: pixels.length, x: new Int16Array(pixels.length), y: new Int16Array(pixels.length), z: new Float32Array(pixels.length), light: new Float32Array(pixels.length), shine: new Float32Array(pixels.length) };
    pixels.forEach((p, i) => { [table.x[i], table.y[i], table.z[i], table.light[i], table.shine[i]] = p; });
    splats.set(key, table);
  }
  return splats.get(key);
}

let scratch = null;
function render(canvas, cloud, view) {
  const W = canvas.width, H = canvas.height, context = canvas.getContext("2d");
  if (!scratch || scratch.n < W * H) scratch = { n: W * H, depth: new Float32Array(W * H), id: new Int32Array(W * H), light: new Float32Array(W * H), shine: new Float32Array(W * H) };
  const { depth, id, light, shine } = scratch;
  depth.fill(1e9, 0, W * H); id.fill(-1, 0, W * H);
  const D = 3.7, F = 0.43 * Math.min(W, H) * Math.sqrt(D * D - 1) * (view.zoom || 1);
  const cy = Math.cos(view.yaw), sy = Math.sin(view.yaw), cp = Math.cos(view.pitch), sp = Math.sin(view.pitch);
  const { xyz, n, radius } = cloud, grow = view.grow === undefined ? 1 : view.grow;
  for (let i = 0; i < n; i++) {
    const size = i < cloud.grows ? 1 : grow;
    if (size <= 0.02) continue;
    const x = xyz[3 * i], y = xyz[3 * i + 1], z = xyz[3 * i + 2];
    const x1 = x * cy - y * sy, y1 = x * sy + y * cy, w = D + y1 * cp - z * sp, s = F / w;
    const px = Math.round(W / 2 + x1 * s), py = Math.round(H / 2 - (y1 * sp + z * cp) * s), r = radius * size * s, t = splat(r);
    const unit = radius * size;
    for (let k = 0; k < t.n; k++) {
      const X = px + t.x[k], Y = py + t.y[k];
      if (X < 0 || Y < 0 || X >= W || Y >= H) continue;
      const at = Y * W + X, d = w - t.z[k] * unit;
      if (d < depth[at]) { depth[at] = d; id[at] = i; light[at] = t.light[k]; shine[at] = t.shine[k]; }
    }
  }
  const image = context.createImageData(W, H), out = image.data, { rgb, light: ambient, ground } = cloud;
  const step = Math.max(1, Math.round(W / 200)), strength = document.documentElement.dataset.theme === "dark" ? 165 : 105;
  for (let Y = 0; Y < H; Y++) {
    // The floor: on one row of pixels the ray length and the depth are constant.
    const up = -(Y - H / 2) / F, fall = -sp + up * cp, t = ground && fall < -1e-3 ? (cloud.floor - D * sp) / fall : -1;
    const rowY = -D * cp + t * (cp + up * sp);
    for (let X = 0; X < W; X++) {
      const at = Y * W + X, o = 4 * at, i = id[at];
      if (i < 0) {
        if (t <= 0) continue;
        const fx = ((X - W / 2) / F) * t;
        const u = ((fx * cy + rowY * sy) / ground.span + 0.5) * ground.size - 0.5, v = ((rowY * cy - fx * sy) / ground.span + 0.5) * ground.size - 0.5;
        const u0 = Math.floor(u), v0 = Math.floor(v);
        if (u0 < 0 || v0 < 0 || u0 >= ground.size - 1 || v0 >= ground.size - 1) continue;
        const a = u - u0, b = v - v0, g = ground.grid, k = v0 * ground.size + u0;
        const dark = (g[k] * (1 - a) + g[k + 1] * a) * (1 - b) + (g[k + ground.size] * (1 - a) + g[k + ground.size + 1] * a) * b;
        out[o] = 12; out[o + 1] = 15; out[o + 2] = 22; out[o + 3] = strength * dark;
        continue;
      }
      let jump = 0;
      const here = depth[at] - 0.02;
      if (X >= step) jump += Math.max(0, here - depth[at - step]);
      if (X < W - step) jump += Math.max(0, here - depth[at + step]);
      if (Y >= step) jump += Math.max(0, here - depth[at - step * W]);
      if (Y < H - step) jump += Math.max(0, here - depth[at + step * W]);
      const fog = 1.06 - 0.13 * (depth[at] - D + 1);
      const l = light[at] * ambient[i] * fog * (0.35 + 0.65 * Math.exp(-3.2 * Math.min(jump, 1.2)));
      out[o] = rgb[3 * i] * l + shine[at]; out[o + 1] = rgb[3 * i + 1] * l + shine[at]; out[o + 2] = rgb[3 * i + 2] * l + shine[at]; out[o + 3] = 255;
    }
  }
  context.putImageData(image, 0, 0);
}

function pointAt(canvas, x, y) {
  // The point drawn at a place (shares of the width and height) of the canvas that was rendered last, or near it; -1 for none.
  const W = canvas.width, H = canvas.height, px = Math.round(x * W), py = Math.round(y * H);
  let best = -1, gap = 1e9;
  for (let Y = Math.max(0, py - 8); Y <= Math.min(H - 1, py + 8); Y++) for (let X = Math.max(0, px - 8); X <= Math.min(W - 1, px + 8); X++) {
    const i = scratch.id[Y * W + X], d = (X - px) ** 2 + (Y - py) ** 2;
    if (i >= 0 && d < gap) { gap = d; best = i; }
  }
  return best;
}

// Views that share a state turn together. Only what is on screen is drawn.
const stage = { views: new Set(), last: 0 };
const onScreen = new IntersectionObserver((entries) => entries.forEach((e) => { e.target.view.visible = e.isIntersecting; e.target.view.dirty = true; }), { rootMargin: "120px" });
class View {
  constructor(canvas, cloud, state, { limit = 420, label = "" } = {}) {
    this.canvas = canvas; this.cloud = cloud; this.state = state; this.limit = limit; this.dirty = true; this.visible = false;
    state.yaw ??= -0.55; state.pitch ??= 0.36; state.held ??= false;
    canvas.view = this; canvas.tabIndex = 0; canvas.setAttribute("role", "img"); canvas.setAttribute("aria-label", label);
    let from = null;
    canvas.addEventListener("pointerdown", (e) => { from = [e.clientX, e.clientY, state.yaw, state.pitch]; state.held = true; canvas.setPointerCapture(e.pointerId); });
    canvas.addEventListener("pointermove", (e) => {
      if (!from) return;
      this.turn(from[2] + (e.clientX - from[0]) * 0.011, from[3] + (e.clientY - from[1]) * 0.008);
    });
    for (const type of ["pointerup", "pointercancel"]) canvas.addEventListener(type, () => { from = null; });
    canvas.addEventListener("dblclick", () => { state.held = false; this.turn(-0.55, 0.36); });
    canvas.addEventListener("keydown", (e) => {
      const step = { ArrowLeft: [-0.15, 0], ArrowRight: [0.15, 0], ArrowUp: [0, 0.1], ArrowDown: [0, -0.1] }[e.key];
      if (step) { e.preventDefault(); state.held = true; this.turn(state.yaw + step[0], state.pitch + step[1]); }
    });
    stage.views.add(this); onScreen.observe(canvas);
  }
  turn(yaw, pitch) { this.state.yaw = yaw; this.state.pitch = Math.min(Math.max(pitch, -0.2), 1.4); this.state.moved = true; }
  draw() {
    const scale = Math.max(1.6, Math.min(devicePixelRatio || 1, 2)), side = this.canvas.clientWidth, tall = this.canvas.clientHeight || side;
    if (!side) return;
    const shrink = Math.min(1, this.limit / (side * scale)), W = Math.round(side * scale * shrink), H = Math.round(tall * scale * shrink);
    if (this.canvas.width !== W || this.canvas.height !== H) { this.canvas.width = W; this.canvas.height = H; }
    if (typeof this.cloud === "function") this.cloud = this.cloud();
    render(this.canvas, this.cloud, this.state);
    this.dirty = false;
  }
}
function frame(now) {
  requestAnimationFrame(frame);
  if (now - stage.last < 30) return;
  const seconds = Math.min(0.1, (now - stage.last) / 1000), moving = new Set();
  stage.last = now;
  for (const view of stage.views) if (view.visible) moving.add(view.state);
  for (const state of moving) {
    if (state.spin && !state.held && !reducedMotion) { state.yaw += state.spin * seconds; state.moved = true; }
    if (state.tick) state.tick(now / 1000, state);
  }
  for (const view of stage.views) if (view.visible && (view.dirty || view.state.moved)) view.draw();
  for (const state of moving) state.moved = false;
}
function redrawAll() { for (const view of stage.views) view.dirty = true; }
addEventListener("resize", redrawAll);
