// The page: puts the parts together, and reads the feed.

import { ask, events, headers, store, stored } from "./api.js";
import { startChat } from "./chat.js";
import { Lives } from "./lives.js";
import { ShowMe } from "./showme.js";
import { Picture, describe, digits, drawLegend } from "./timeline.js";

const byId = (id) => document.getElementById(id);
const lives = new Lives();
const picture = new Picture(lives);

const showMe = new ShowMe(lives, (request) => picture.mine.add(request));

// ---- light and dark

const dark = matchMedia("(prefers-color-scheme: dark)");
function setTheme(theme) {
  const wanted = theme || stored("theme", () => localStorage) || (dark.matches ? "dark" : "light");
  document.documentElement.className = wanted;
  if (theme) store("theme", theme, () => localStorage);
  picture.readColours();
  showMe.draw();
}
byId("theme").addEventListener("click", () => {
  setTheme(document.documentElement.className === "dark" ? "light" : "dark");
});
dark.addEventListener("change", () => setTheme());
setTheme();

// ---- the two views

drawLegend();
for (const button of document.querySelectorAll("[data-span]")) {
  button.addEventListener("click", () => {
    picture.span = Number(button.dataset.span);
    picture.pause(false);
    for (const other of document.querySelectorAll("[data-span]")) other.ariaPressed = String(other === button);
  });
}
byId("nearer").addEventListener("click", () => picture.zoom(0.5));
byId("farther").addEventListener("click", () => picture.zoom(2));
byId("pause").addEventListener("click", (event) => picture.pause(event.target.ariaPressed !== "true"));
picture.onPause = (paused) => {
  byId("pause").ariaPressed = String(paused);
  byId("pause").textContent = paused ? "Resume" : "Pause";
};
picture.onSelect = (life) => {
  byId("detail").hidden = !life;
  if (life) detail();
};
byId("detail-close").addEventListener("click", () => picture.select(null));
function detail() {
  const life = picture.selected;
  if (!life) return;
  const lines = describe(life, picture.now()).join("\n");
  if (byId("detail-text").textContent !== lines) byId("detail-text").textContent = lines;
}
setInterval(detail, 500);
for (const [id, live] of [["show-chat", false], ["show-live", true]]) {
  byId(id).addEventListener("click", () => {
    document.body.classList.toggle("see-live", live);
    byId("show-chat").ariaPressed = String(!live);
    byId("show-live").ariaPressed = String(live);
  });
}
byId("trace").addEventListener("click", async (event) => {
  if (!headers().Authorization) return; // the link itself does
  event.preventDefault();
  const link = document.createElement("a");
  link.href = URL.createObjectURL(await (await ask("/trace.json")).blob());
  link.download = "trace.json";
  link.click();
});

// ---- the feed

const GONE_S = 60; // so long a worker that is gone keeps its row
let workers = new Map(); // by name, what was last said of each: {worker, since: when it was gone}

/** What happened to a worker: a mark on the time axis, and a line below the table. */
function happened(words) {
  picture.mark(words);
  const line = document.createElement("li");
  line.textContent = `${new Date().toLocaleTimeString()} ${words}`;
  byId("events").prepend(line);
  if (byId("events").children.length > 20) byId("events").lastChild.remove();
}

/** Tells what happened to workers since the last news. */
function compare(current) {
  const first = workers.size === 0, now = performance.now() / 1000, before = workers;
  const named = new Map(current.map((worker) => [lives.label(worker.worker), worker]));
  workers = new Map();
  for (const [name, worker] of named) {
    const old = before.get(name);
    if (!first && (!old || old.since || old.worker.worker !== worker.worker)) happened(`${name} joined`);
    else if (old && old.worker.state !== worker.state) happened(`${name}: ${worker.state}`);
    workers.set(name, { worker, since: null });
  }
  for (const [name, old] of before) {
    if (named.has(name)) continue;
    if (!old.since) happened(`${name} is gone`);
    const since = old.since ?? now;
    if (now - since < GONE_S) workers.set(name, { worker: { ...old.worker, state: "gone" }, since });
  }
}

const show = {
  cluster(data) {
    byId("dot").className = `dot ${data.ready ? "ready" : "lost"}`;
    byId("model").textContent = data.ready ? `${data.model}, context ${data.context.toLocaleString("en")}`
      : `waiting: ${data.waiting_for}`;
    byId("model").title = byId("model").textContent;
    byId("degraded").hidden = !data.degraded && data.ready;
    byId("degraded").textContent = data.ready ? data.degraded : `Not ready: ${data.waiting_for}`;
    lives.workers(data.workers);
    const alive = data.workers.filter((worker) => worker.state === "alive").map((worker) => worker.role);
    showMe.possible(alive.includes("prefill") && alive.includes("decode"));
    compare(data.workers);
    byId("workers").tBodies[0].replaceChildren(...[...workers].map(([name, { worker }]) => {
      const row = document.createElement("tr");
      for (const value of [name, worker.role, worker.device, worker.state, worker.how]) {
        const cell = document.createElement("td");
        cell.textContent = value;
        row.append(cell);
      }
      row.cells[3].className = worker.state;
      return row;
    }));
    for (const name of workers.keys()) lives.known.add(name);
  },
  moments(data) {
    picture.clock(data.now);
    for (const moment of data.moments) lives.add(moment);
    lives.prune(data.now);
  },
  numbers(data) {
    picture.clock(data.now);
    const { ended, first_tokens: firsts, recent_s: recent, gaps, span_s: span } = data.rests_on;
    const two = (pair, sign = "") => (pair ? `${sign}${digits(pair.p50)} / ${sign}${digits(pair.p99)}` : "–");
    byId("running").textContent = data.running ?? "–";
    byId("waiting").textContent = data.waiting ?? "–";
    byId("tokens_per_s").textContent = data.tokens_per_s === null ? "–" : Math.round(data.tokens_per_s).toLocaleString("en");
    byId("rate-basis").textContent = `(${Math.round(span)} s)`;
    byId("ttft_ms").textContent = two(data.ttft_ms);
    byId("ttft-basis").textContent = `(${firsts} in ${recent} s)`;
    byId("itl_ms").textContent = two(data.itl_most_ms, "≤ ");
    byId("itl-basis").textContent = `(${gaps.toLocaleString("en")} in ${Math.round(span)} s)`;
    byId("kv").textContent = `${data.kv_used.toLocaleString("en")} / ${data.kv_total.toLocaleString("en")}`;
    byId("pool").value = data.kv_total ? data.kv_used / data.kv_total : 0;
    const line = ended ? `${data.verdict} (${ended} ended in ${recent} s)` : data.verdict;
    if (byId("verdict").textContent !== line) byId("verdict").textContent = line;
    picture.note(data.now, data.itl_most_ms ?? {});
  },
};

async function follow() {
  for (let wait = 500; ; wait = Math.min(2 * wait, 10_000)) {
    try {
      const answer = await ask("/timeline");
      if (!answer.ok) throw new Error(String(answer.status));
      byId("feed").textContent = "";
      document.body.classList.remove("stale");
      wait = 500;
      for await (const { name, data } of events(answer)) show[name]?.(JSON.parse(data));
    } catch { /* reported below */ }
    picture.stop();
    document.body.classList.add("stale");
    byId("dot").className = "dot lost";
    byId("feed").textContent = "The server does not answer. What you see is the last it said.";
    await new Promise((resolve) => setTimeout(resolve, wait));
  }
}

async function begin() {
  for (;;) {
    let models = null;
    try {
      models = await (await ask("/v1/models")).json();
    } catch { /* it may be starting */ }
    if (models?.data?.length) return startChat(models.data[0], (request) => request && picture.mine.add(request));
    await new Promise((resolve) => setTimeout(resolve, 1000));
  }
}

begin();
follow();
