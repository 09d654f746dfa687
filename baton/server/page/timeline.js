// The picture: a lane for each worker, all of one height, and below them TTFT and ITL on the same axis.
//
//     lane      a strip: how many requests are here (the batch); below it a bar for each stage of each request
//     arrow     a hand-over: from the end of a request's prefill to the begin of its decode
//     mark      something happened to a worker

import { STAGES, QUEUE } from "./lives.js";

const canvas = document.getElementById("canvas");
const tip = document.getElementById("tip");
const pen = canvas.getContext("2d");
const TOP = 20, BOTTOM = 22, GAP = 10, STRIP = 16, CHART = 44, DELAY_S = 0.15;
const LEAST_SPAN = 1, MOST_SPAN = 140; // seconds
const FEW_ARROWS = 60;
const KEPT_S = 150;

export class Picture {
  constructor(lives) {
    this.lives = lives;
    this.span = 30;
    this.offset = null; // the router's clock minus ours
    this.frozen = null; // the time shown, while paused
    this.gone = null; // when the server was last heard
    this.mine = new Set(); // beginnings of the names of this page's own requests
    this.points = []; // {at, itl, most} in ms, once a second
    this.marks = []; // {at, text}
    this.pointer = null;
    this.selected = null;
    this.onSelect = () => {};
    this.onPause = () => {};
    this.shown = [];
    this.readColours();
    canvas.addEventListener("pointermove", (e) => this.moved(e));
    canvas.addEventListener("pointerdown", (e) => {
      this.pointer = [e.offsetX, e.offsetY];
      this.drag = { x: e.offsetX, now: this.now(), far: false };
    });
    canvas.addEventListener("pointerup", () => {
      if (this.drag && !this.drag.far) this.select(this.under(this.pointer)?.bar.life ?? null);
      this.drag = null;
    });
    canvas.addEventListener("pointerleave", () => { this.pointer = this.drag = null; tip.hidden = true; });
    canvas.addEventListener("wheel", (e) => {
      if (!e.ctrlKey && !e.metaKey) return;
      e.preventDefault();
      this.zoom(e.deltaY > 0 ? 1.25 : 0.8);
    }, { passive: false });
    canvas.addEventListener("keydown", (e) => this.key(e));
    requestAnimationFrame(() => this.frame());
  }

  readColours() {
    const style = getComputedStyle(document.documentElement);
    const read = (name) => style.getPropertyValue(`--${name}`).trim();
    this.colours = Object.fromEntries(STAGES.map(([name]) => [name, read(name)]));
    for (const name of ["ink", "paper", "soft", "line", "wrong", "card", "accent"]) this[name] = read(name);
  }

  /** Adjust the offset to the router's clock, which reads `now`. */
  clock(now) {
    const offset = now - performance.now() / 1000;
    this.offset = this.offset === null || Math.abs(offset - this.offset) > 1 ? offset : Math.max(this.offset, offset);
    this.gone = null;
  }

  now() {
    return this.frozen ?? this.gone ?? performance.now() / 1000 + (this.offset ?? 0) - DELAY_S;
  }

  pause(paused) {
    this.frozen = paused ? this.now() : null;
    this.onPause(paused);
  }

  /** Nothing is heard from the server: time stands still. */
  stop() {
    this.gone ??= this.offset === null ? 0 : this.now();
  }

  zoom(factor) {
    this.span = Math.min(MOST_SPAN, Math.max(LEAST_SPAN, this.span * factor));
  }

  note(at, itl) {
    this.points.push({ at, ...itl });
    this.points = this.points.filter((point) => point.at > at - KEPT_S);
    this.marks = this.marks.filter((mark) => mark.at > at - KEPT_S);
  }

  mark(text) {
    this.marks.push({ at: this.now(), text });
  }

  select(life) {
    this.selected = life;
    this.onSelect(life);
  }

  moved(e) {
    this.pointer = [e.offsetX, e.offsetY];
    if (!this.drag) return;
    const by = e.offsetX - this.drag.x;
    if (!this.drag.far && Math.abs(by) < 5) return;
    this.drag.far = true;
    this.pause(true);
    this.frozen = this.drag.now - by / this.scale;
  }

  /** Arrows go from request to request, + and - zoom, Escape selects nothing. */
  key(e) {
    if (e.key === "+" || e.key === "-") this.zoom(e.key === "-" ? 1.25 : 0.8);
    else if (e.key === "Escape") this.select(null);
    else if (e.key === "ArrowLeft" || e.key === "ArrowRight") {
      const order = [...new Set(this.shown.map((each) => each.bar.life))].sort((a, b) => a.bars[0].start - b.bars[0].start);
      const at = order.indexOf(this.selected), step = e.key === "ArrowLeft" ? -1 : 1;
      this.select(order[at < 0 ? order.length - 1 : Math.min(order.length - 1, Math.max(0, at + step))] ?? null);
    } else return;
    e.preventDefault();
  }

  frame() {
    if (!document.hidden && canvas.clientWidth) this.draw();
    requestAnimationFrame(() => this.frame());
  }

  draw() {
    const ratio = devicePixelRatio || 1, width = canvas.clientWidth, height = canvas.clientHeight;
    if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
      canvas.width = Math.round(width * ratio);
      canvas.height = Math.round(height * ratio);
    }
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.clearRect(0, 0, width, height);
    this.left = width < 500 ? 78 : 116;
    this.right = width - 8;
    const now = this.now(), from = now - this.span;
    this.scale = (this.right - this.left) / this.span;
    const view = { now, from, x: (time) => this.left + (time - from) * this.scale, width, height };
    this.grid(view);
    const names = this.lives.ordered();
    const room = height - TOP - BOTTOM - 2 * (CHART + GAP) - GAP * names.length;
    const tall = room / (names.length - 0.5); // the queue's lane has half of a worker's
    this.shown = [];
    let top = TOP;
    for (const name of names) {
      const high = Math.max(8, name === QUEUE ? tall / 2 : tall);
      this.lane(name, view, top, high);
      top += high + GAP;
    }
    this.arrows(view);
    this.ttft(view, top);
    this.itl(view, top + CHART + GAP);
    this.happenings(view);
    this.point();
  }

  grid({ x, now, height }) {
    const step = [0.2, 0.5, 1, 2, 5, 10, 20, 30].find((each) => each * this.scale >= 64) ?? 60;
    pen.font = "11px system-ui, sans-serif";
    pen.textBaseline = "bottom";
    for (let ago = step; ago <= this.span; ago += step) {
      const left = x(now - ago);
      pen.fillStyle = this.line;
      pen.fillRect(left, TOP - 4, 1, height - BOTTOM - TOP + 8);
      pen.fillStyle = this.soft;
      pen.fillText(`${Number(ago.toFixed(1))} s ago`, left + 3, height - 4);
    }
  }

  /** Small text that fits into `room` pixels. */
  write(left, top, words, { colour = this.soft, room = 1e9, bold = false } = {}) {
    pen.font = `${bold ? "600 12px" : "11px"} system-ui, sans-serif`;
    pen.textBaseline = "top";
    pen.fillStyle = colour;
    let text = words;
    while (text.length > 1 && pen.measureText(text).width > room) text = `${text.slice(0, -2)}…`;
    pen.fillText(text, left, top);
  }

  lane(name, view, top, high) {
    const { from, now } = view;
    const bars = this.lives.lanes.get(name).bars.filter((bar) => (bar.end ?? now) >= from && bar.start <= now);
    const strip = high >= 3 * STRIP ? STRIP : 0;
    const { busy, most } = this.strip(bars, view, top, strip);
    this.write(8, top, name, { colour: this.ink, room: this.left - 14, bold: true });
    if (high >= 30 && name !== QUEUE) this.write(8, top + 15, `busy ${Math.round(100 * busy)} %`, { room: this.left - 14 });
    if (high >= 44) this.write(8, top + 29, `${name === QUEUE ? "most" : "batch"} ${most}`, { room: this.left - 14 });
    const rows = bars.reduce((count, bar) => Math.max(count, bar.row + 1), 1);
    const each = Math.min(18, (high - strip - 2) / rows);
    for (const bar of bars) this.bar(bar, view, top + strip + 2, each);
    pen.fillStyle = this.line;
    pen.fillRect(0, top + high + GAP / 2, view.width, 1);
  }

  /** How many requests were here at each time; how much of the time any, and the most at once. */
  strip(bars, { from, now, x }, top, high) {
    const steps = [];
    for (const bar of bars) steps.push([Math.max(from, bar.start), 1], [Math.min(now, bar.end ?? now), -1]);
    steps.sort((a, b) => a[0] - b[0] || a[1] - b[1]);
    let count = 0, most = 0, busy = 0, last = from;
    const levels = [];
    for (const [at, change] of steps) {
      if (count) busy += at - last;
      levels.push([last, at, count]);
      last = at;
      count += change;
      most = Math.max(most, count);
    }
    pen.fillStyle = this.soft;
    pen.globalAlpha = 0.35;
    for (const [start, end, level] of levels) {
      if (!level || !high) continue;
      const tall = (level / most) * (high - 2);
      pen.fillRect(x(start), top + high - tall, Math.max(0.6, x(end) - x(start)), tall);
    }
    pen.globalAlpha = 1;
    return { busy: busy / (now - from), most };
  }

  bar(bar, { x, now }, top, tall) {
    const left = Math.max(this.left, x(bar.start)), right = Math.min(this.right, x(bar.end ?? now));
    const { life } = bar;
    const marked = life === this.selected || [...this.mine].some((name) => life.request.startsWith(name));
    const y = top + bar.row * tall, wide = Math.max(1, right - left);
    const high = Math.max(marked ? 5 : 1, tall - (tall > 4 ? 1.5 : 0.4));
    pen.fillStyle = marked ? this.ink : this.colours[bar.stage];
    pen.fillRect(left, y, wide, high);
    if (marked) {
      pen.fillStyle = this.colours[bar.stage];
      pen.fillRect(left, y + 1, wide, high - 2);
    }
    if (bar.next && right - left > 2) { // where the chunk before it ended
      pen.fillStyle = this.paper;
      pen.fillRect(left, y, 1, high);
    }
    const wrong = life.ended && !["stop", "length"].includes(life.ended);
    if (wrong && life.bars.at(-1) === bar && x(bar.end) > this.left) {
      pen.fillStyle = this.wrong;
      pen.fillRect(right - 2, y - 1, 4, high + 2);
    }
    this.shown.push({ bar, left, right: left + Math.max(3, wide), top: y, bottom: y + Math.max(3, high) });
  }

  /** From where a prompt was filled to where it is decoded. */
  arrows({ x }) {
    const from = this.shown.filter(({ bar }) => bar.handover);
    const where = new Map(this.shown.map((each) => [each.bar, each]));
    pen.lineWidth = 1.5;
    for (const begin of from) {
      const bars = begin.bar.life.bars, end = where.get(bars[bars.indexOf(begin.bar) + 1]);
      if (!end || end.bar.lane === begin.bar.lane) continue;
      const [x1, y1, x2, y2] = [x(begin.bar.end), begin.bottom, Math.max(this.left, x(end.bar.start)), end.top];
      pen.strokeStyle = pen.fillStyle = this.colours.handover;
      pen.globalAlpha = from.length > FEW_ARROWS ? 0.35 : 0.9;
      pen.beginPath();
      pen.moveTo(x1, y1);
      pen.lineTo(x2, y2);
      pen.stroke();
      if (from.length > FEW_ARROWS) continue;
      const down = Math.sign(y2 - y1) || 1;
      pen.beginPath();
      pen.moveTo(x2, y2);
      pen.lineTo(x2 - 4, y2 - 7 * down);
      pen.lineTo(x2 + 4, y2 - 7 * down);
      pen.fill();
    }
    pen.globalAlpha = 1;
  }

  /** TTFT: a dot for each request at its first token. */
  ttft(view, top) {
    const dots = [];
    for (const life of this.lives.all.values()) {
      const ms = ttftOf(life);
      if (ms !== null && life.first >= view.from && life.first <= view.now) dots.push([life.first, ms]);
    }
    const y = this.chart("TTFT", "ms, each request", dots.map((dot) => dot[1]), top);
    pen.fillStyle = this.accent;
    for (const [at, ms] of dots) pen.fillRect(view.x(at) - 1.5, y(ms) - 1.5, 3, 3);
  }

  /** ITL: the upper ends of its histogram's buckets, over the last ten seconds. */
  itl({ from, now, x }, top) {
    const points = this.points.filter((point) => point.at >= from - 1 && point.at <= now && point.p99 !== undefined);
    const y = this.chart("ITL", "ms, p50 and p99", points.map((point) => point.p99), top);
    for (const [name, dash] of [["p50", []], ["p99", [3, 3]]]) {
      pen.strokeStyle = this.colours.decode;
      pen.lineWidth = 1.5;
      pen.setLineDash(dash);
      pen.beginPath();
      for (const point of points) pen.lineTo(Math.max(this.left, x(point.at)), y(point[name]));
      pen.stroke();
    }
    pen.setLineDash([]);
  }

  /** A frame for values from 0 to their largest. The function from a value to its height. */
  chart(name, unit, values, top) {
    const most = Math.max(1, ...values);
    this.write(8, top, name, { colour: this.ink, bold: true });
    this.write(8, top + 15, unit, { room: this.left - 14 });
    this.write(8, top + 29, values.length ? `to ${digits(most)}` : "–", { room: this.left - 14 });
    pen.fillStyle = this.line;
    pen.fillRect(this.left, top + CHART, this.right - this.left, 1);
    return (value) => top + CHART - (value / most) * (CHART - 4);
  }

  happenings({ x, from, now, height }) {
    let until = -1;
    for (const mark of this.marks) {
      if (mark.at < from || mark.at > now) continue;
      const left = x(mark.at);
      pen.strokeStyle = this.wrong;
      pen.lineWidth = 1;
      pen.setLineDash([4, 3]);
      pen.beginPath();
      pen.moveTo(left, TOP - 4);
      pen.lineTo(left, height - BOTTOM);
      pen.stroke();
      pen.setLineDash([]);
      if (left < until) continue;
      const wide = pen.measureText(mark.text).width;
      this.write(Math.min(left, this.right - wide), 4, mark.text, { colour: this.wrong });
      until = left + wide + 10;
    }
  }

  under([px, py]) {
    return this.shown.findLast((s) => px >= s.left && px <= s.right && py >= s.top && py <= s.bottom);
  }

  /** What is under the pointer. */
  point() {
    if (!this.pointer || this.drag?.far) return;
    const found = this.under(this.pointer);
    tip.hidden = !found;
    if (!found) return;
    const [px, py] = this.pointer;
    tip.textContent = describe(found.bar.life, this.now(), found.bar).join("\n");
    const wide = tip.offsetWidth, high = tip.offsetHeight;
    tip.style.left = `${Math.max(4, Math.min(px + 14, canvas.clientWidth - wide - 6))}px`;
    tip.style.top = `${Math.max(4, Math.min(py + 14, canvas.clientHeight - high - 6))}px`;
  }
}

/** A request in lines of text. */
export function describe(life, now, bar = null) {
  const times = {}, counts = {};
  for (const each of life.bars) {
    times[each.stage] = (times[each.stage] || 0) + ((each.end ?? now) - each.start);
    counts[each.stage] = (each.next ? counts[each.stage] : 0) + 1;
  }
  const more = (name) => (name === "prefill" && counts[name] > 1 ? `, ${counts[name]} chunks`
    : name === "handover" ? `, ${moved(life)}` : "");
  const lines = Object.entries(times).map(([name, s]) => `${name.padEnd(9)}${digits(1000 * s).padStart(8)} ms${more(name)}`);
  const where = bar && (bar.lane === QUEUE ? [bar.stage] : [`${bar.stage} on ${bar.lane}`]);
  const ms = ttftOf(life), first = ms === null ? [] : [`TTFT ${digits(ms)} ms`];
  return [life.request, ...(where ?? []), `${life.prompt} prompt tokens, ${life.tokens} generated`, ...first, ...lines,
          life.ended ? `ended: ${life.ended}` : "running"];
}

/** In ms; null before the first token, and where the page did not see the begin. */
function ttftOf(life) {
  return life.first === null || life.bars[0].stage !== QUEUE ? null : 1000 * (life.first - life.bars[0].start);
}

function moved(life) {
  if (!life.moved) return `written in place (${life.transport || "shared memory"})`;
  return `${digits(life.moved / 2 ** 20)} MiB by ${life.transport}`;
}

/** Three significant digits. */
export function digits(value) {
  return value === 0 ? "0" : value >= 100 ? Math.round(value).toLocaleString("en") : value.toPrecision(3);
}

export function drawLegend() {
  document.getElementById("legend").replaceChildren(...STAGES.map(([name, title]) => {
    const entry = document.createElement("li");
    const colour = document.createElement("i");
    colour.className = name;
    entry.append(colour, title);
    return entry;
  }));
}
