// "Show me": what prefill and decode apart are good for, measured on this cluster, with real requests.
//
//     act 1   eight streams decode; a long prompt comes, and a prefill worker fills it (role_policy: split)
//     act 2   the same, and the decode worker fills it between its steps (role_policy: colocated)
//
// The picture has a row for each stream and a dot for each piece of text, at the time when it came here.

import { ask, events, fault } from "./api.js";
import { digits } from "./timeline.js";

export const ACTS = [
  { policy: "split", title: "Prefill and decode apart" },
  { policy: "colocated", title: "Prefill and decode together" },
];
const STREAMS = 8, SETTLED = 12; // pieces of each stream before the long prompt
const LONG = 2048, SHORT = 24, LEAST_LONG = 256; // tokens of prompts
const ANSWER = 4000; // tokens of a stream at most
const AFTER_MS = 400, BEFORE_MS = 400; // shown around the long prompt
const MOST_MS = 60_000; // of an act
const SETTLE_MS = 20_000; // until the streams run
const LITTLE = 1.3; // gaps that differ by less are alike
const SEED_TEXT = "A long prompt comes while others read their answers. ";

const byId = (id) => document.getElementById(id);
const wait = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

export class ShowMe {
  /** `lives`: the page's; `mine(request)`: this page's own request of this name was sent. */
  constructor(lives, mine) {
    this.lives = lives;
    this.mine = mine;
    this.acts = [];
    this.stopping = null;
    this.both = false;
    byId("show-me").addEventListener("click", () => this.play());
    byId("show-stop").addEventListener("click", () => this.stopping?.abort(new Error("stopped")));
    byId("show-close").addEventListener("click", () => { byId("show").hidden = true; });
  }

  /** Whether there are workers of both roles. */
  possible(both) {
    this.both = both;
    byId("show-me").disabled = !both || this.stopping !== null;
    byId("show-me").title = both ? "Two short experiments with real requests on this server"
      : "This needs a living prefill worker and a living decode worker";
  }

  /** Both acts, one after the other. `workers` of the cluster must have a prefill worker. */
  async play() {
    if (this.stopping) return;
    this.stopping = new AbortController();
    const deadline = setTimeout(() => this.stopping.abort(new Error("it took too long")), 2 * MOST_MS);
    byId("show").hidden = false;
    byId("show-stop").hidden = false;
    byId("show-me").disabled = true;
    this.acts = [];
    ACTS.forEach((_, i) => { byId(`show-said-${i}`).textContent = ""; });
    this.say("Two acts. In each, eight requests generate text, and a long prompt comes.");
    byId("show").scrollIntoView({ block: "nearest" });
    const drawing = setInterval(() => this.draw(), 50);
    try {
      const models = await ask("/v1/models");
      if (!models.ok) throw new Error(await fault(models));
      const model = (await models.json()).data[0];
      const ids = await this.prompt(model);
      for (const act of ACTS) {
        const played = { ...act, streams: [], long: null };
        this.acts.push(played);
        this.say(`${act.title}: eight requests generate, and a prompt of ${ids.length.toLocaleString("en")} tokens comes.`);
        await this.act(played, model, ids);
        await wait(500); // the last news of the router
        played.life = [...this.lives.all.values()].find((life) => life.request.includes(`${played.name}-long-`));
        played.facts = facts(played);
        if (act.policy === "split" && played.facts.worker && !played.facts.worker.startsWith("prefill")) {
          throw new Error(`${played.facts.worker} computed the long prompt: no prefill worker takes one now`);
        }
        byId(`show-said-${this.acts.length - 1}`).textContent = told(played);
      }
      this.say(conclusion(...this.acts.map((act) => act.facts)));
    } catch (error) {
      const why = this.stopping.signal.aborted ? this.stopping.signal.reason.message : error.message;
      this.say(`The comparison ended early: ${why}.`);
    }
    clearInterval(drawing);
    clearTimeout(deadline);
    this.stopping.abort(new Error("done"));
    this.stopping = null;
    byId("show-stop").hidden = true;
    byId("show-me").disabled = !this.both;
    byId("show-me").textContent = "Show me again";
    this.draw();
  }

  say(line) {
    byId("show-says").textContent = line;
  }

  /** Token ids of the long prompt: as long as the context allows. */
  async prompt(model) {
    const length = Math.min(LONG, model.max_model_len - SHORT);
    if (length < LEAST_LONG) throw new Error(`the context of ${model.max_model_len} tokens is too short for a long prompt`);
    const answer = await ask("/tokenize", this.body({ model: model.id, prompt: SEED_TEXT.repeat(40) }));
    if (!answer.ok) throw new Error(await fault(answer));
    const { tokens } = await answer.json();
    return Array.from({ length }, (_, i) => tokens[i % tokens.length]);
  }

  body(fields) {
    return {
      method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(fields),
      signal: this.stopping.signal,
    };
  }

  /** One act: until the long prompt's first token, and a little longer. */
  async act(act, model, ids) {
    act.name = `show-${Math.random().toString(36).slice(2, 10)}`;
    const ending = new AbortController();
    const signal = AbortSignal.any([ending.signal, this.stopping.signal]);
    const most = Math.min(model.max_model_len - SHORT - 1, ANSWER);
    // A salt of its own: what an earlier act computed is not used again.
    const fields = { model: model.id, stream: true, temperature: 1, role_policy: act.policy, cache_salt: act.name };
    act.streams = Array.from({ length: STREAMS }, () => []);
    // The choices of one request: a browser opens six connections to a server, and no more.
    const short = { ...fields, request_id: act.name, prompt: ids.slice(0, SHORT), n: STREAMS, max_tokens: most, ignore_eos: true };
    const running = this.follow(short, signal, (choice) => act.streams[choice.index].push(performance.now()));
    const failed = running.then(() => { throw new Error("the streams ended before the long prompt had come"); });
    failed.catch(() => {});
    try {
      const late = performance.now() + SETTLE_MS;
      while (act.streams.some((times) => times.length < SETTLED)) {
        if (performance.now() > late) throw new Error(`${STREAMS} streams did not run together: this server is busy, or has fewer places`);
        await Promise.race([wait(20), failed]);
      }
      await Promise.race([wait(BEFORE_MS), failed]);
      act.long = { sent: performance.now(), first: null };
      const body = { ...fields, request_id: `${act.name}-long`, prompt: ids, max_tokens: 1 };
      await this.follow(body, signal, () => { act.long.first ??= performance.now(); });
      if (act.long.first === null) throw new Error("the long prompt had no answer");
      await wait(AFTER_MS);
    } finally {
      ending.abort();
      await running.catch(() => {});
    }
  }

  /** One request, read to its end. `piece(choice)` is called whenever text comes. */
  async follow(fields, signal, piece) {
    try {
      const answer = await ask("/v1/completions", { ...this.body(fields), signal });
      if (!answer.ok) throw new Error(await fault(answer));
      this.mine(answer.headers.get("x-request-id"));
      for await (const { data } of events(answer)) {
        if (data === "[DONE]") continue;
        const news = JSON.parse(data);
        if (news.error) throw new Error(news.error.message);
        for (const choice of news.choices ?? []) if (choice.text) piece(choice);
      }
    } catch (error) {
      if (!signal.aborted) throw error;
    }
  }

  // ---- the picture

  draw() {
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue(`--${name}`).trim();
    const most = Math.max(...this.acts.map((act) => spanOf(act)), 1);
    ACTS.forEach((_, i) => {
      const canvas = byId(`show-act-${i}`), act = this.acts[i];
      const width = canvas.clientWidth, height = canvas.clientHeight, dots = devicePixelRatio;
      canvas.width = width * dots;
      canvas.height = height * dots;
      const pen = canvas.getContext("2d");
      pen.scale(dots, dots);
      if (!act?.long) return;
      drawAct(pen, width, height, act, most, colour);
      if (act.facts) canvas.setAttribute("aria-label", `${act.title}: ${told(act)}`);
    });
  }
}

const spanOf = (act) => (act.long ? (act.long.first ?? performance.now()) - act.long.sent : 0) + AFTER_MS;

/** A row for each stream, a dot for each piece; the time in which the long prompt is computed is tinted. */
function drawAct(pen, width, height, act, most, colour) {
  const left = 8, right = 8, top = 18, bottom = 16;
  const x = (at) => left + ((at - act.long.sent + BEFORE_MS) / (most + BEFORE_MS)) * (width - left - right);
  const end = act.long.first ?? performance.now();
  pen.globalAlpha = 0.18;
  pen.fillStyle = colour("prefill");
  pen.fillRect(x(act.long.sent), top - 4, x(end) - x(act.long.sent), height - top - bottom + 4);
  pen.globalAlpha = 1;
  for (const bar of act.life?.bars ?? []) { // the router's times, from the same begin
    if (bar.end === null || bar.stage === "decode") continue;
    const from = x(act.long.sent + 1000 * (bar.start - act.life.bars[0].start));
    const to = x(act.long.sent + 1000 * (bar.end - act.life.bars[0].start));
    pen.fillStyle = colour(bar.stage);
    pen.fillRect(from, top - 4, Math.max(to - from, 2), 4);
  }
  pen.font = "11px system-ui, sans-serif";
  pen.fillStyle = colour("prefill");
  const label = `long prompt: ${digits(end - act.long.sent)} ms to its first token`;
  pen.fillText(label, Math.max(left, Math.min(x(act.long.sent), width - right - pen.measureText(label).width)), 11);
  const row = (height - top - bottom) / act.streams.length;
  const marked = act.facts ? act.streams.findIndex((times) => gapOf(act, times)?.ms === act.facts.gap) : -1;
  act.streams.forEach((times, i) => {
    const y = top + row * (i + 0.5);
    pen.fillStyle = colour("decode");
    for (const at of times) {
      if (x(at) >= left && x(at) <= width - right) pen.fillRect(x(at) - 1, y - row * 0.35, 2, row * 0.7);
    }
    if (i !== marked) return;
    const gap = gapOf(act, times), words = `${digits(gap.ms)} ms`;
    pen.fillStyle = colour("stall");
    pen.fillRect(x(gap.from), y - 1, x(gap.to) - x(gap.from), 2);
    const at = Math.min(x(gap.to) + 4, width - right - pen.measureText(words).width);
    pen.fillStyle = colour("card");
    pen.fillRect(at - 2, y - 7, pen.measureText(words).width + 4, 14);
    pen.fillStyle = colour("stall");
    pen.fillText(words, at, y + 4);
  });
  pen.fillStyle = colour("soft");
  pen.fillText("0", x(act.long.sent) - 3, height - 4);
  const last = `${digits(most)} ms`;
  pen.fillText(last, width - right - pen.measureText(last).width, height - 4);
}

/** The longest gap of a stream while the long prompt was computed, and a little later. */
const gapOf = (act, times) => longest(times, act.long.sent, act.long.first + AFTER_MS / 2);

/** The longest gap between two pieces of a stream, of those that touch this time: {from, to, ms}. */
export function longest(times, begin, end) {
  let found = null;
  for (let i = 1; i < times.length; i++) {
    if (times[i] < begin || times[i - 1] > end) continue;
    const ms = times[i] - times[i - 1];
    if (!found || ms > found.ms) found = { from: times[i - 1], to: times[i], ms };
  }
  return found;
}

/** How far apart tokens were in this time, in ms: its length over the number of pieces of a stream. */
const paceOf = (act, begin, end) => (end - begin) * act.streams.length
  / Math.max(act.streams.flat().filter((at) => at > begin && at <= end).length, 1);

/** What an act has shown, in ms: the streams' longest and mean gap while the long prompt was computed, the
 * mean one before, the long prompt's time to first token, and its stages as the router saw them. */
export function facts(act) {
  const { sent, first } = act.long;
  const gaps = act.streams.map((times) => gapOf(act, times)?.ms ?? 0);
  const began = Math.min(...act.streams.map((times) => times[0]));
  const stage = (name) => (act.life?.bars ?? []).filter((bar) => bar.stage === name && bar.end !== null)
    .reduce((sum, bar) => sum + 1000 * (bar.end - bar.start), 0);
  const filled = (act.life?.bars ?? []).find((bar) => bar.stage === "prefill");
  return {
    gap: Math.max(...gaps), during: paceOf(act, sent, first), usual: paceOf(act, began, sent), ttft: first - sent,
    prefill: stage("prefill"), handover: stage("handover"), worker: filled?.lane ?? "",
    moved: act.life?.moved ?? 0, transport: act.life?.transport ?? "", prompt: act.life?.prompt ?? 0,
  };
}

/** One act in words. */
export function told(act) {
  const { gap, during, usual, ttft, prefill, handover, moved, worker } = act.facts;
  const kv = moved ? `${digits(moved / 1e6)} MB of KV cache went over in ${digits(handover)} ms`
    : "its KV cache was handed over in place, in shared memory";
  const how = act.policy === "colocated" ? "The decode worker computed the long prompt between its own steps. "
    : worker ? `${worker} computed the long prompt in ${digits(prefill)} ms; ${kv}. ` : "";
  return `${how}Meanwhile the streams had a token every ${digits(during)} ms, before that every ${digits(usual)} ms; the longest gap was `
    + `${digits(gap)} ms. The long prompt's first token came after ${digits(ttft)} ms.`;
}

/** What to learn from both, by the mean gaps alone: the longest is one event, and may be the machine's. */
export function conclusion(apart, together) {
  const [less, more] = apart.during <= together.during ? [apart, together] : [together, apart];
  const times = more.during / Math.max(less.during, 0.001);
  if (times < LITTLE) return "The streams noticed little of the long prompt either way: with this model and machine there is not much to separate.";
  if (less === apart) {
    return `Together, tokens came ${digits(times)} times as far apart while the long prompt was computed: eight streams waited for somebody else's prompt. That is why prefill and decode are apart.`;
  }
  return `Here tokens came ${digits(times)} times as far apart with prefill and decode apart: the two workers share this machine's cores, or its GPU.`;
}
