// The page: puts the parts together, and reads the feed.

import { ask, events } from "./api.js";
import { startChat } from "./chat.js";
import { Lives } from "./lives.js";
import { Picture, drawLegend } from "./timeline.js";

const byId = (id) => document.getElementById(id);
const lives = new Lives();
const picture = new Picture(lives);

// ---- light and dark

const dark = matchMedia("(prefers-color-scheme: dark)");
function setTheme(theme) {
  const wanted = theme || localStorage.getItem("theme") || (dark.matches ? "dark" : "light");
  document.documentElement.className = wanted;
  if (theme) localStorage.setItem("theme", theme);
  picture.readColours();
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
    for (const other of document.querySelectorAll("[data-span]")) other.ariaPressed = String(other === button);
  });
}
byId("pause").addEventListener("click", (event) => {
  const paused = event.target.ariaPressed !== "true";
  event.target.ariaPressed = String(paused);
  event.target.textContent = paused ? "Resume" : "Pause";
  picture.pause(paused);
});
for (const [id, live] of [["show-chat", false], ["show-live", true]]) {
  byId(id).addEventListener("click", () => {
    document.body.classList.toggle("see-live", live);
    byId("show-chat").ariaPressed = String(!live);
    byId("show-live").ariaPressed = String(live);
  });
}
byId("trace").addEventListener("click", async (event) => {
  if (!sessionStorage.getItem("key")) return; // the link itself does
  event.preventDefault();
  const link = document.createElement("a");
  link.href = URL.createObjectURL(await (await ask("/trace.json")).blob());
  link.download = "trace.json";
  link.click();
});

// ---- the feed

const show = {
  cluster(data) {
    byId("dot").className = `dot ${data.ready ? "ready" : "lost"}`;
    byId("model").textContent = data.ready ? `${data.model}, context ${data.context.toLocaleString("en")}`
      : `waiting: ${data.waiting_for}`;
    lives.workers(data.workers);
    byId("workers").tBodies[0].replaceChildren(...data.workers.map((worker) => {
      const row = document.createElement("tr");
      const name = lives.label(worker.worker);
      for (const value of [name, worker.role, worker.device, worker.state, worker.how]) {
        const cell = document.createElement("td");
        cell.textContent = value;
        row.append(cell);
      }
      row.cells[3].className = worker.state;
      return row;
    }));
  },
  moments(data) {
    picture.clock(data.now);
    for (const moment of data.moments) lives.add(moment);
    lives.prune(data.now);
  },
  numbers(data) {
    const two = (pair) => (pair ? `${number(pair.p50)} / ${number(pair.p99)} ms` : "–");
    byId("running").textContent = data.running ?? "–";
    byId("waiting").textContent = data.waiting ?? "–";
    byId("tokens_per_s").textContent = data.tokens_per_s === null ? "–" : Math.round(data.tokens_per_s).toLocaleString("en");
    byId("ttft_ms").textContent = two(data.ttft_ms);
    byId("itl_ms").textContent = two(data.itl_ms);
    byId("kv").textContent = `${data.kv_used} / ${data.kv_total}`;
    byId("pool").value = data.kv_total ? data.kv_used / data.kv_total : 0;
    if (byId("verdict").textContent !== data.verdict) byId("verdict").textContent = data.verdict;
  },
};
const number = (value) => (value < 10 ? value.toFixed(1) : Math.round(value).toLocaleString("en"));

async function follow() {
  for (let wait = 500; ; wait = Math.min(2 * wait, 10_000)) {
    try {
      const answer = await ask("/timeline");
      if (!answer.ok) throw new Error(String(answer.status));
      byId("feed").textContent = "";
      wait = 500;
      for await (const { name, data } of events(answer)) show[name]?.(JSON.parse(data));
    } catch { /* reported below */ }
    byId("dot").className = "dot lost";
    byId("feed").textContent = "disconnected, trying again";
    await new Promise((resolve) => setTimeout(resolve, wait));
  }
}

async function begin() {
  for (;;) {
    try {
      const models = await (await ask("/v1/models")).json();
      startChat(models.data[0], (request) => request && picture.mine.add(request));
      return;
    } catch {
      await new Promise((resolve) => setTimeout(resolve, 1000));
    }
  }
}

begin();
follow();
