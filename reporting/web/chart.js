"use strict";
// What a chart shows, in SVG, from the JSON in its figure (pointing.js: what it does under a pointer and keys):
//   xs      {name: title} of the x axes that one can choose
//   y       title of the y axis
//   kinds   [{label, width, opacity, dots, hollow, smooth, on}]: what is drawn, and whether at first
//   series  [{name, look, row, parts: [{x: {name: numbers}, y: {kind: numbers}, names, low, high}]}]; null is a gap
//   front   whether to draw the Pareto front: the points with nothing lower to their left
//   start   {x, log, smooth} at first

const HEIGHT = 420, LEFT = 58, RIGHT = 14, TOP = 12, BOTTOM = 44, SMOOTH = 0.2;
const CUT = 0.05, MOST = 0.98;                          // of the run, which begins with losses far above all others; of its steps' losses

function short(value) {                                 // 1,234,567 as 1.235M, FLOPs as 1.23e15
  const size = Math.abs(value);
  if (size >= 1e9 || (size > 0 && size < 1e-3)) return value.toExponential(2).replace(/\.?0+e\+?/, "e");
  for (const [unit, letter] of [[1e6, "M"], [1e4, "k"]])
    if (size >= unit) return String(+(value / (letter === "k" ? 1e3 : unit)).toPrecision(4)) + letter;
  return String(+value.toPrecision(5));
}

function ticks(low, high, log, most) {                  // round numbers between low and high
  const found = [];
  if (log && high / low > 4) {
    const decades = Math.log10(high / low), steps = decades < 2 ? [1, 2, 3, 5] : decades < 4 ? [1, 3] : [1];
    const stride = Math.max(1, Math.ceil(decades / most));
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++)
      for (const step of steps) if (power % stride === 0) found.push(step * 10 ** power);
  } else {
    const rough = (high - low) / most, unit = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 2.5, 5, 10].map(k => k * unit).find(step => step >= rough);
    for (let k = Math.ceil(low / step); k * step <= high + step * 1e-9; k++) found.push(+(k * step).toPrecision(12));
  }
  return found.filter(value => value >= low && value <= high);
}

function smoothed(xs, ys, width) {                      // exponential mean over x, each value weighted by its share of x
  let sum = 0, weight = 0, before = xs[0] - ((xs[1] - xs[0]) || 1);
  return ys.map((y, i) => {
    if (y === null) return null;
    const gap = xs[i] - before, keep = Math.exp(-gap / width);
    before = xs[i]; sum = sum * keep + y * (1 - keep); weight = weight * keep + 1 - keep;
    return weight > 0 ? sum / weight : y;
  });
}

class Drawing {
  constructor(figure, index) {
    this.spec = JSON.parse(figure.querySelector("script").textContent);
    this.figure = figure; this.index = index;
    this.bar = make("div", { class: "controls" }, figure);
    this.setUpControls();
    this.svg = make("svg", { height: HEIGHT, tabindex: 0, role: "application", "aria-label": this.spec.y + ", arrow keys read the values" }, figure);
    document.addEventListener("rows", () => this.draw());
    new ResizeObserver(() => this.draw()).observe(figure);
  }

  setUpControls() {
    const { xs, kinds, start = {}, front } = this.spec, add = (name, ...rest) => control(this.bar, name + this.index, ...rest);
    const draw = () => this.draw();
    this.x = add("x", "against ", start.x || Object.keys(xs)[0], Object.entries(xs), () => this.zoom(""));
    if (!(this.x.value in xs)) this.x.value = Object.keys(xs)[0];
    const log = start.log || "";
    this.logX = add("logx", "log x", log.includes("x"), null, draw);
    this.logY = add("logy", "log y", log.includes("y"), null, draw);
    if (kinds.some(kind => kind.smooth))
      this.smooth = add("smooth", "smoothing ", String(start.smooth || 0), { type: "range", min: 0, max: SMOOTH, step: 0.005 }, draw);
    if (!front) this.range = add("range", "y range ", "most", [["most", "without outliers"], ["all", "all"]], draw);
    this.kinds = kinds.map((kind, i) => kinds.length > 1 ? add("kind" + i + "_", kind.label, kind.on !== false, null, draw) : { checked: true });
    this.reset = make("button", { class: "plain", type: "button" }, this.bar, "whole range");
    this.reset.addEventListener("click", () => this.zoom(""));
  }

  // ---- what is drawn: [{series, kind, xs, ys, raw, names...}] with the series' own x values
  curves() {
    const axis = this.x.value, width = +(this.smooth?.value || 0), found = [];
    const shown = this.spec.series.filter(series => !hidden.has(series.row));
    for (const series of shown) for (const part of series.parts) for (const [number, raw] of Object.entries(part.y)) {
      const kind = this.spec.kinds[number], steps = Object.values(part.x)[0];
      if (!this.kinds[number].checked || !part.x[axis]) continue;
      const smooth = kind.smooth && width > 0 && raw.length > 2;
      const ys = smooth ? smoothed(steps, raw, width * (steps.at(-1) - steps[0] || 1)) : raw;
      found.push({ ...part, series, kind, xs: part.x[axis], ys, raw: smooth ? raw : null, all: part.x });
    }
    return found;
  }

  fits(x, y) { return x !== null && y !== null && isFinite(x) && isFinite(y) && !(this.logX.checked && x <= 0) && !(this.logY.checked && y <= 0); }

  limits(curves) {                                      // {x: [low, high], y: [low, high]} with a margin, or of the zoom
    const zoom = state.get("zoom" + this.index, "").split(",").map(Number), xs = [], ys = [];
    if (zoom.length === 4 && zoom.every(isFinite)) return { x: zoom.slice(0, 2), y: zoom.slice(2) };
    const most = this.range?.value === "most", from = most ? CUT * Math.max(...curves.map(curve => curve.xs.at(-1) ?? 0)) : -Infinity;
    const noisy = [];                                   // losses of single steps: the range need not hold each of them
    for (const curve of curves) {
      curve.xs.forEach((x, i) => {
        if (!this.fits(x, curve.ys[i])) return;
        xs.push(x);
        if (x >= from) (most && curve.kind.smooth ? noisy : ys).push(curve.ys[i]);
      });
      for (const edge of [...(curve.low || []), ...(curve.high || [])]) ys.push(edge);
    }
    noisy.sort((a, b) => a - b);
    if (noisy.length) ys.push(noisy[0], noisy[Math.floor(MOST * (noisy.length - 1))]);
    const range = (values, log, margin) => {
      let low = Infinity, high = -Infinity;
      for (const value of values) if (value !== null) { low = Math.min(low, value); high = Math.max(high, value); }
      if (low > high) [low, high] = [log ? 1 : 0, log ? 10 : 1];
      if (low === high) [low, high] = log ? [low / 1.5, high * 1.5] : [low - (Math.abs(low) * 0.05 || 1), high + (Math.abs(high) * 0.05 || 1)];
      const edge = log ? (high / low) ** margin : (high - low) * margin;
      return log ? [low / edge, high * edge] : [low - edge, high + edge];
    };
    return { x: range(xs, this.logX.checked, this.spec.front ? 0.06 : 0.01), y: range(ys, this.logY.checked, 0.05) };
  }

  draw() {
    this.before();
    this.width = this.figure.clientWidth;
    if (!this.width) return;
    this.svg.replaceChildren();
    const curves = this.curves(), span = this.span = this.limits(curves), right = this.width - RIGHT, bottom = HEIGHT - BOTTOM;
    const scale = (log, [low, high], a, b) => log ? value => a + (b - a) * Math.log(value / low) / Math.log(high / low)
      : value => a + (b - a) * (value - low) / (high - low);
    this.toX = scale(this.logX.checked, span.x, LEFT, right);
    this.toY = scale(this.logY.checked, span.y, bottom, TOP);
    this.axes(span, right, bottom);
    const clip = make("clipPath", { id: "clip" + this.index }, this.svg);
    make("rect", { x: LEFT - 5, y: TOP - 5, width: Math.max(1, right - LEFT + 10), height: bottom - TOP + 10 }, clip);
    this.plot = make("g", { "clip-path": `url(#clip${this.index})` }, this.svg);
    this.points = [];
    for (const curve of curves) this.curve(curve);
    if (this.spec.front) this.front(curves);
    this.reset.hidden = !state.get("zoom" + this.index);
    if (!curves.length) make("text", { x: this.width / 2, y: HEIGHT / 2, "text-anchor": "middle" }, this.svg, "no run is shown: tick one in the table");
  }

  axes(span, right, bottom) {
    for (const x of ticks(...span.x, this.logX.checked, Math.max(2, this.width / 110))) {
      make("path", { class: "grid", d: `M${this.toX(x)},${TOP}V${bottom}` }, this.svg);
      make("text", { class: "tick", x: this.toX(x), y: bottom + 17, "text-anchor": "middle" }, this.svg, short(x));
    }
    for (const y of ticks(...span.y, this.logY.checked, 7)) {
      make("path", { class: "grid", d: `M${LEFT},${this.toY(y)}H${right}` }, this.svg);
      make("text", { class: "tick", x: LEFT - 7, y: this.toY(y) + 4, "text-anchor": "end" }, this.svg, short(y));
    }
    make("text", { x: (LEFT + right) / 2, y: HEIGHT - 7, "text-anchor": "middle" }, this.svg, this.spec.xs[this.x.value]);
    make("text", { transform: `translate(13,${(TOP + bottom) / 2}) rotate(-90)`, "text-anchor": "middle" }, this.svg, this.spec.y);
  }

  trace(curve, ys, opacity) {                           // the line through the values, interrupted by gaps
    let path = "", pen = "M";
    curve.xs.forEach((x, i) => {
      const fits = this.fits(x, ys[i]);
      if (fits) path += `${pen}${this.toX(x).toFixed(1)},${this.toY(ys[i]).toFixed(1)}`;
      pen = fits ? "L" : "M";
    });
    const { look } = curve.series, line = make("path", { d: path, fill: "none", "stroke-width": curve.kind.width, "stroke-dasharray": dashes(look),
      "stroke-linejoin": "round", opacity }, this.plot);
    line.style.stroke = colour(look);
    return line;
  }

  curve(curve) {
    const { kind, series } = curve, group = make("g", {}, this.plot);
    if (curve.raw) this.trace(curve, curve.raw, 0.18);
    const line = kind.width ? this.trace(curve, curve.ys, kind.opacity ?? 1) : group;
    curve.xs.forEach((x, i) => {
      if (!this.fits(x, curve.ys[i])) return;
      const px = this.toX(x), py = this.toY(curve.ys[i]);
      this.points.push({ px, py, i, curve, line });
      if (curve.low && curve.low[i] < curve.high[i])
        make("path", { d: `M${px},${this.toY(curve.low[i])}V${this.toY(curve.high[i])}`, "stroke-width": 1.2 }, this.plot).style.stroke = colour(series.look);
      if (kind.dots && curve.xs.length <= 60) {
        const dot = make("path", { d: shape(series.look), transform: `translate(${px.toFixed(1)},${py.toFixed(1)}) scale(${this.spec.front ? 1.15 : 0.8})` }, this.plot);
        dot.style.fill = kind.hollow ? "var(--page)" : colour(series.look);
        dot.style.stroke = colour(series.look);
      }
    });
  }

  front(curves) {                                       // of all that is shown; names beside it where there is room
    const points = this.points.filter(p => this.inside(p)).sort((a, b) => a.px - b.px || b.py - a.py), best = [], taken = [];
    for (const p of points) if (!best.length || p.py > best.at(-1).py) best.push(p);
    let path = "";
    best.forEach((p, i) => { path += i ? `H${p.px}V${p.py}` : `M${p.px},${p.py}`; });
    make("path", { class: "front", d: path }, this.plot);
    for (const p of points) taken.push({ x: p.px - 5, y: p.py - 5, w: 10, h: 10 });
    const controls = points.filter(p => p.curve.series.control);
    for (const p of new Set([...best, ...controls])) this.label(p, taken);
  }

  label(p, taken) {                                     // right of, left of, above or below a point; nowhere if all is taken
    const text = p.curve.series.name, w = 6.7 * text.length, h = 13;
    for (const [x, y] of [[p.px + 8, p.py + 4], [p.px - w - 8, p.py + 4], [p.px - w / 2, p.py - 9], [p.px - w / 2, p.py + 18]]) {
      const box = { x, y: y - 11, w, h };
      const free = x > LEFT && x + w < this.width - 2 && y > TOP && y < HEIGHT - BOTTOM && taken.every(t => x > t.x + t.w || x + w < t.x || box.y > t.y + t.h || box.y + h < t.y);
      if (!free) continue;
      taken.push(box);
      make("text", { x, y }, this.svg, text);
      return;
    }
  }

  inside(p) { return p.px >= LEFT - 5 && p.px <= this.width - RIGHT + 5 && p.py >= TOP - 5 && p.py <= HEIGHT - BOTTOM + 5; }
}
