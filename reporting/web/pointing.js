"use strict";
// A chart under a pointer and keys: values on hover, a zoom by a drawn rectangle, and with the keyboard what a pointer finds.

const FAR = 60;                                         // pixels from a point beyond which a pointer is at none

class Chart extends Drawing {
  constructor(figure, index) {
    super(figure, index);
    this.tip = make("div", { class: "tip", role: "status", hidden: "" }, figure);
    const on = (name, act) => this.svg.addEventListener(name, act);
    on("pointermove", event => this.move(event));
    on("pointerleave", () => { this.from = null; this.forget(); });
    on("pointerdown", event => { this.from = event.pointerType === "mouse" ? this.at(event) : null; this.move(event); });
    on("pointerup", event => this.release(event));
    on("dblclick", () => this.zoom(""));
    on("keydown", event => this.key(event));
    on("blur", () => this.forget());
  }

  at(event) { const box = this.svg.getBoundingClientRect(); return [event.clientX - box.left, event.clientY - box.top]; }

  before() { this.forget(); }                           // what is told is of points that draw() is about to replace

  forget() {
    this.told = null;
    this.tip.hidden = true;
    this.svg.querySelectorAll(".cross, .band").forEach(mark => mark.remove());
    this.svg.querySelectorAll(".near").forEach(line => line.classList.remove("near"));
  }

  move(event) {
    const [x, y] = this.at(event);
    this.forget();
    if (this.from && Math.hypot(x - this.from[0], y - this.from[1]) > 6) {
      const [a, b] = this.from;
      make("rect", { class: "band", x: Math.min(a, x), y: Math.min(b, y), width: Math.abs(x - a), height: Math.abs(y - b) }, this.svg);
      return;
    }
    let near = null, least = FAR ** 2;
    for (const p of this.points || []) {
      const far = (p.px - x) ** 2 + (p.py - y) ** 2;
      if (far < least && this.inside(p)) [near, least] = [p, far];
    }
    if (near) this.tell(near, x, y);
  }

  tell(near, x, y) {                                    // the point's own values, and the others' at the same place
    const { curve, i, line, px } = near, { spec, tip } = this;
    this.told = near;
    line.classList.add("near");
    make("path", { class: "cross", d: `M${px},${TOP}V${HEIGHT - BOTTOM}` }, this.svg);
    tip.replaceChildren();
    const say = (a, b, kind) => { const row = make("div", { class: kind || "" }, tip); make("span", {}, row, a); make("span", {}, row, b); };
    make("b", {}, tip, curve.names?.[i] ?? curve.series.name);
    say(spec.kinds.length > 1 ? curve.kind.label + (curve.raw ? ", smoothed" : "") : spec.y, curve.ys[i].toFixed(4));
    for (const [name, title] of Object.entries(spec.xs)) if (curve.all[name]?.[i] != null) say(title, short(curve.all[name][i]), "soft");
    const others = spec.front ? [] : this.beside(near);
    if (others.length) make("div", { class: "soft" }, tip, "beside it");
    for (const p of others) say(p.curve.series.name, p.curve.ys[p.i].toFixed(4));
    tip.hidden = false;
    const left = x + 16 + tip.offsetWidth > this.width ? Math.max(0, x - 16 - tip.offsetWidth) : x + 16;
    const down = this.svg.getBoundingClientRect().top - this.figure.getBoundingClientRect().top;
    tip.style.left = left + "px"; tip.style.top = down + Math.max(0, y - tip.offsetHeight / 2) + "px";
  }

  beside(near, most = 8) {                              // the nearest point in x of every other curve of this kind, by value
    const found = new Map();
    for (const p of this.points) {
      if (p.curve.kind !== near.curve.kind || p.curve === near.curve) continue;
      const far = Math.abs(p.px - near.px), known = found.get(p.curve);
      if (far < 25 && (!known || far < Math.abs(known.px - near.px))) found.set(p.curve, p);
    }
    const close = [...found.values()].sort((a, b) => Math.abs(a.py - near.py) - Math.abs(b.py - near.py)).slice(0, most);
    return close.sort((a, b) => a.curve.ys[a.i] - b.curve.ys[b.i]);
  }

  key(event) {                                          // left and right along a curve, up and down to the curves beside it
    const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key], now = this.told;
    if (event.key === "Escape") { now ? this.forget() : this.zoom(""); return; }
    if (!step) return;
    event.preventDefault();
    const [x, y] = step, far = p => now ? x * (p.px - now.px) + y * (p.py - now.py) : x * p.px + y * p.py;
    const where = !now || this.spec.front ? this.points : x ? this.points.filter(p => p.curve === now.curve) : this.beside(now, Infinity);
    const ahead = where.filter(p => this.inside(p) && (!now || far(p) > 0)).sort((a, b) => far(a) - far(b));
    if (!ahead.length) return;
    this.forget();
    this.tell(ahead[0], ahead[0].px, ahead[0].py);
  }

  release(event) {
    const [x, y] = this.at(event), from = this.from;
    this.from = null;
    if (!from || Math.abs(x - from[0]) < 12 || Math.abs(y - from[1]) < 12) return;
    const back = (log, [low, high], share) => log ? low * (high / low) ** share : low + (high - low) * share;
    const across = v => back(this.logX.checked, this.span.x, (v - LEFT) / (this.width - RIGHT - LEFT));
    const along = v => back(this.logY.checked, this.span.y, (HEIGHT - BOTTOM - v) / (HEIGHT - BOTTOM - TOP));
    this.zoom([across(Math.min(x, from[0])), across(Math.max(x, from[0])), along(Math.max(y, from[1])), along(Math.min(y, from[1]))].map(v => v.toPrecision(6)).join(","));
  }

  zoom(range) { state.set("zoom" + this.index, range, ""); this.draw(); }
}
