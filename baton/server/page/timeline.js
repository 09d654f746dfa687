// The picture: a lane for each worker, a bar for each stage of each request.

import { STAGES, QUEUE } from "./lives.js";

const canvas = document.getElementById("canvas");
const tip = document.getElementById("tip");
const pen = canvas.getContext("2d");
const LEFT = 92, TOP = 8, BOTTOM = 22, GAP = 12, DELAY_S = 0.15;

export class Picture {
  constructor(lives) {
    this.lives = lives;
    this.span = 30;
    this.offset = null; // the router's clock minus ours
    this.frozen = null; // the time shown, while paused
    this.mine = new Set(); // beginnings of the names of this page's own requests
    this.pointer = null;
    this.shown = [];
    this.readColours();
    canvas.addEventListener("pointermove", (e) => { this.pointer = [e.offsetX, e.offsetY]; });
    canvas.addEventListener("pointerdown", (e) => { this.pointer = [e.offsetX, e.offsetY]; });
    canvas.addEventListener("pointerleave", () => { this.pointer = null; tip.hidden = true; });
    requestAnimationFrame(() => this.frame());
  }

  readColours() {
    const style = getComputedStyle(document.documentElement);
    const read = (name) => style.getPropertyValue(`--${name}`).trim();
    this.colours = Object.fromEntries(STAGES.map(([name]) => [name, read(name)]));
    this.ink = read("ink");
    this.paper = read("paper");
    this.soft = read("soft");
    this.line = read("line");
    this.wrong = read("wrong");
  }

  /** Adjust the offset to the router's clock, which reads `now`. */
  clock(now) {
    const offset = now - performance.now() / 1000;
    this.offset = this.offset === null || Math.abs(offset - this.offset) > 1 ? offset : Math.max(this.offset, offset);
  }

  now() {
    return this.frozen ?? performance.now() / 1000 + (this.offset ?? 0) - DELAY_S;
  }

  pause(paused) {
    this.frozen = paused ? this.now() : null;
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
    const now = this.now(), from = now - this.span, scale = (width - LEFT - 8) / this.span;
    const x = (time) => LEFT + (time - from) * scale;
    this.grid(x, now, height);
    const names = this.lives.ordered();
    const visible = names.map((name) => this.lives.lanes.get(name).bars.filter((b) => (b.end ?? now) >= from && b.start <= now));
    const rows = visible.map((bars) => bars.reduce((most, bar) => Math.max(most, bar.row + 1), 1));
    const total = rows.reduce((sum, count) => sum + count, 0);
    const tall = Math.min(14, (height - TOP - BOTTOM - GAP * names.length) / total);
    this.shown = [];
    let top = TOP;
    names.forEach((name, i) => {
      pen.fillStyle = this.soft;
      pen.font = "12px system-ui, sans-serif";
      pen.textBaseline = "top";
      pen.fillText(name, 8, top);
      for (const bar of visible[i]) this.bar(bar, x, now, top, tall, width);
      top += rows[i] * tall + GAP / 2;
      pen.fillStyle = this.line;
      pen.fillRect(0, top, width, 1);
      top += GAP / 2;
    });
    this.point();
  }

  grid(x, now, height) {
    const step = this.span <= 10 ? 1 : this.span <= 30 ? 5 : 20;
    pen.fillStyle = this.line;
    pen.font = "11px system-ui, sans-serif";
    pen.textBaseline = "bottom";
    for (let ago = step; ago <= this.span; ago += step) {
      const left = x(now - ago);
      pen.fillStyle = this.line;
      pen.fillRect(left, 0, 1, height - BOTTOM + 4);
      pen.fillStyle = this.soft;
      pen.fillText(`${ago} s ago`, left + 3, height - 5);
    }
  }

  bar(bar, x, now, top, tall, width) {
    const left = Math.max(LEFT, x(bar.start)), right = Math.min(width - 8, x(bar.end ?? now));
    const { life } = bar;
    const mine = [...this.mine].some((name) => life.request.startsWith(name));
    const y = top + bar.row * tall, wide = Math.max(1, right - left);
    const high = Math.max(mine ? 5 : 1, tall - (tall > 4 ? 1.5 : 0.4));
    pen.fillStyle = mine ? this.ink : this.colours[bar.stage];
    pen.fillRect(left, y, wide, high);
    if (mine) {
      pen.fillStyle = this.colours[bar.stage];
      pen.fillRect(left, y + 1, wide, high - 2);
    }
    if (bar.next && right - left > 2) { // where the chunk before it ended
      pen.fillStyle = this.paper;
      pen.fillRect(left, y, 1, high);
    }
    const wrong = life.ended && !["stop", "length"].includes(life.ended);
    if (wrong && life.bars.at(-1) === bar && x(bar.end) > LEFT) {
      pen.fillStyle = this.wrong;
      pen.fillRect(right - 2, y - 1, 4, high + 2);
    }
    this.shown.push({ bar, left, right: left + Math.max(3, wide), top: y, bottom: y + Math.max(3, high) });
  }

  /** What is under the pointer. */
  point() {
    if (!this.pointer) return;
    const [px, py] = this.pointer;
    const found = this.shown.findLast((s) => px >= s.left && px <= s.right && py >= s.top && py <= s.bottom);
    tip.hidden = !found;
    if (!found) return;
    const { life } = found.bar;
    const times = {}, counts = {};
    for (const bar of life.bars) {
      times[bar.stage] = (times[bar.stage] || 0) + ((bar.end ?? this.now()) - bar.start);
      counts[bar.stage] = (bar.next ? counts[bar.stage] : 0) + 1;
    }
    const chunks = (name) => (name === "prefill" && counts[name] > 1 ? `, ${counts[name]} chunks` : "");
    const lines = Object.entries(times).map(([name, s]) => `${name.padEnd(9)}${(1000 * s).toFixed(s < 0.01 ? 2 : 0).padStart(8)} ms${chunks(name)}`);
    const ended = life.ended ? `ended: ${life.ended}` : "running";
    const where = found.bar.lane === QUEUE ? "" : ` on ${found.bar.lane}`;
    tip.textContent = [life.request, `${found.bar.stage}${where}`, `${life.prompt} prompt tokens, ${life.tokens} generated`,
                       ...lines, ended].join("\n");
    const wide = tip.offsetWidth, high = tip.offsetHeight;
    tip.style.left = `${Math.min(px + 14, canvas.clientWidth - wide - 6)}px`;
    tip.style.top = `${Math.max(4, Math.min(py + 14, canvas.clientHeight - high - 6))}px`;
  }
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
