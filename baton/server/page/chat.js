// The chat: sends the conversation, streams the answer, shows how long it took.

import { ask, events, fault } from "./api.js";
import { Conversation, wishes } from "./conversation.js";
import { render } from "./markdown.js";

const byId = (id) => document.getElementById(id);
const talk = byId("talk"), form = byId("ask"), text = byId("text"), send = byId("send"), stop = byId("stop");
const fields = [...document.querySelectorAll("#settings [name]")];
const DRAW_MS = 80; // between two drawings of a growing answer

const IDEAS = {
  chat: ["What does a KV cache hold?", "Explain why batching improves GPU utilization.",
         "Write a Python function that reverses a list, and explain it."],
  text: ["In the future, artificial intelligence will", "On a distant planet, aliens are",
         "In an ancient castle, there is a hidden"],
};

const conversation = new Conversation();
let model = null; // {id, chat}
let running = null; // AbortController
let onRequest = () => {};

export function startChat(described, tellRequest) {
  model = described;
  onRequest = tellRequest;
  document.body.classList.toggle("continues", !model.chat);
  byId("mode").textContent = model.chat ? "" : "This model has no chat template: it continues your text.";
  for (const field of fields) {
    const kept = wishes.load()[field.name];
    if (kept === undefined) continue;
    if (field.type === "checkbox") field.checked = kept;
    else field.value = kept;
  }
  conversation.restore(model.id);
  conversation.turns.forEach((turn, i, turns) => {
    if (model.chat || turn.role === "assistant") show(turn, turns[i - 1]?.content);
  });
  invite();
  byId("ideas").replaceChildren(...IDEAS[model.chat ? "chat" : "text"].map((idea) => button(idea, () => {
    text.value = idea;
    form.requestSubmit();
  })));
}

/** What the text field is for now. */
function invite() {
  byId("welcome").hidden = talk.querySelector(".turn") !== null;
  const [call] = conversation.waiting();
  const what = call ? `Result of ${call.function.name}` : model.chat ? "Message" : "Prompt";
  text.placeholder = `${what} (Enter sends, Shift+Enter: new line)`;
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  const said = text.value;
  if (!model || running || !said.trim()) return;
  text.value = "";
  const [call, another] = conversation.waiting();
  if (!call) return answer({ role: "user", content: model.chat ? said.trim() : said });
  const result = { role: "tool", tool_call_id: call.id, content: said.trim() };
  if (!another) return answer(result);
  conversation.add(result);
  show(result);
  invite();
});
text.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    form.requestSubmit();
  }
});
stop.addEventListener("click", () => running?.abort());
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && running && !document.querySelector("dialog[open]")) running.abort();
});
byId("settings").addEventListener("change", () => wishes.save(Object.fromEntries(
  fields.map((field) => [field.name, field.type === "checkbox" ? field.checked : field.value]))));
byId("fresh").addEventListener("click", () => {
  running?.abort();
  conversation.clear();
  talk.querySelectorAll(".turn").forEach((turn) => turn.remove());
  invite();
  text.focus();
});
byId("export").addEventListener("click", () => {
  const written = JSON.stringify({ model: model?.id, system: settings().system, turns: conversation.turns }, null, 2);
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([written], { type: "application/json" }));
  link.download = "conversation.json";
  link.click();
  URL.revokeObjectURL(link.href);
});
talk.addEventListener("click", (event) => {
  const pressed = event.target.closest("[data-copy]");
  if (pressed) copy(pressed.closest(".code").querySelector("code").textContent, pressed);
});

function button(label, act) {
  const made = document.createElement("button");
  made.type = "button";
  made.textContent = label;
  made.addEventListener("click", act);
  return made;
}

async function copy(what, pressed) {
  try {
    await navigator.clipboard.writeText(what);
  } catch { // over plain http from another machine there is no clipboard
    const field = document.createElement("textarea");
    field.value = what;
    document.body.append(field);
    field.select();
    document.execCommand("copy");
    field.remove();
  }
  const label = pressed.textContent;
  pressed.textContent = "Copied";
  setTimeout(() => { pressed.textContent = label; }, 1200);
}

/** What the reader wants, checked: fields of the request, and `system`. */
function settings() {
  const wanted = { system: "", body: {} };
  for (const field of fields) {
    const value = field.type === "checkbox" ? field.checked : field.value.trim();
    if (value === "" || value === false) continue;
    if (field.name === "system") wanted.system = value;
    else if (field.name === "stop") wanted.body.stop = value.split("\n");
    else if (field.name === "tools") wanted.body.tools = JSON.parse(value);
    else if (field.name === "probabilities") {
      Object.assign(wanted.body, model.chat ? { logprobs: true, top_logprobs: 5 } : { logprobs: 5 });
    } else wanted.body[field.name] = Number(value);
  }
  if (!model?.chat) delete wanted.body.tools;
  return wanted;
}

// ---- bubbles

function bubble(kind, content = "") {
  const turn = document.createElement("div");
  turn.className = `turn ${kind}`;
  turn.append(content);
  talk.append(turn);
  down();
  return turn;
}

const down = () => { talk.scrollTop = talk.scrollHeight; };

/** The bubble of a turn of the conversation. `said`: the turn before it. */
function show(turn, said) {
  if (turn.role === "assistant") {
    const view = new Answer(turn, said);
    view.finish();
    return view.node;
  }
  const node = bubble(turn.role === "tool" ? "user tool" : "user", turn.content);
  const edit = button("Edit", () => {
    if (running) return;
    text.value = turn.content;
    forget(turn, node);
    text.focus();
  });
  actions(node, [edit, button("Copy", (event) => copy(turn.content, event.target))]);
  return node;
}

/** Take this turn and all after it out of the conversation and off the page. */
function forget(turn, node) {
  conversation.cut(turn);
  while (node.nextSibling) node.nextSibling.remove();
  node.remove();
  invite();
}

function actions(node, buttons) {
  const row = document.createElement("div");
  row.className = "actions";
  row.append(...buttons);
  node.append(row);
}

/** The bubble of an answer, which may be growing. */
class Answer {
  constructor(turn, said) {
    this.turn = turn;
    this.said = said; // a text model's answer continues it
    this.node = bubble("assistant");
    this.thoughts = document.createElement("details");
    const summary = document.createElement("summary");
    summary.textContent = "reasoning";
    this.thoughts.append(summary, document.createElement("div"));
    this.body = document.createElement("div");
    this.body.className = "body";
    this.calls = document.createElement("div");
    this.node.append(this.thoughts, this.body, this.calls);
    this.drawing = 0;
  }

  /** Draw soon: at most every DRAW_MS, for a whole answer is drawn anew each time. */
  grow() {
    if (!this.drawing) this.drawing = setTimeout(() => this.draw(), DRAW_MS);
  }

  draw() {
    clearTimeout(this.drawing);
    this.drawing = 0;
    const below = talk.scrollHeight - talk.scrollTop - talk.clientHeight < 40;
    const { content, reasoning_content: thought, tool_calls: calls } = this.turn;
    this.thoughts.hidden = !thought;
    this.thoughts.open = Boolean(thought && !content);
    this.thoughts.lastChild.textContent = thought ?? "";
    if (model.chat) this.body.replaceChildren(render(content ?? ""));
    else {
      const given = document.createElement("span");
      given.className = "given";
      given.textContent = this.said ?? "";
      this.body.replaceChildren(given, content);
    }
    this.calls.replaceChildren(...(calls ?? []).map((call) => {
      const shown = document.createElement("pre");
      shown.className = "call";
      shown.textContent = `${call.function.name}(${call.function.arguments})`;
      return shown;
    }));
    if (below) down();
  }

  /** The end: its line of times, and what can be done with it. */
  finish() {
    this.draw();
    const { turn, node } = this;
    const about = document.createElement("small");
    about.className = "about";
    about.textContent = turn.about ?? "";
    const again = button("Regenerate", () => {
      const at = conversation.turns.indexOf(turn), said = conversation.turns[at - 1];
      if (running || !said) return;
      const before = node.previousElementSibling;
      forget(said, before?.classList.contains("user") ? before : node);
      answer(said);
    });
    const buttons = [button("Copy", (event) => copy(turn.content ?? "", event.target)), again];
    if (turn.tokens) buttons.push(this.tokensButton());
    actions(node, buttons);
    node.append(about);
    down();
  }

  /** Shows each token with its probability, and those that might have been there. */
  tokensButton() {
    const pressed = button("Tokens", () => {
      const on = pressed.ariaPressed !== "true";
      pressed.ariaPressed = String(on);
      if (!on) return this.draw();
      this.body.replaceChildren(...this.turn.tokens.map(({ text: written, chance, others }) => {
        const token = document.createElement("span");
        token.className = `token t${Math.min(4, Math.floor(5 * chance))}`;
        token.textContent = written;
        token.title = [`${percent(chance)}  ${JSON.stringify(written)}`, "",
          ...others.map(([other, its]) => `${percent(its)}  ${JSON.stringify(other)}`)].join("\n");
        return token;
      }));
    });
    pressed.ariaPressed = "false";
    return pressed;
  }
}

const percent = (chance) => `${(100 * chance).toFixed(chance < 0.1 ? 1 : 0)} %`;

// ---- a request

async function answer(said) {
  let wanted;
  try {
    wanted = settings();
  } catch (error) {
    text.value = said.content;
    return bubble("error", `tools: ${error.message}`);
  }
  const { turns } = conversation; // another one, once a new conversation has begun
  talk.querySelectorAll(".turn.error").forEach((turn) => turn.remove());
  const asked = model.chat ? show(said) : null;
  byId("welcome").hidden = true;
  const body = { model: model.id, stream: true, stream_options: { include_usage: true }, ...wanted.body };
  if (model.chat) body.messages = conversation.messages(wanted.system, said);
  else body.prompt = said.content;
  const view = new Answer({ role: "assistant", content: "" }, said.content);
  view.node.classList.add("busy");
  running = new AbortController();
  send.hidden = true;
  stop.hidden = false;
  let failed = null;
  try {
    await stream(model.chat ? "/v1/chat/completions" : "/v1/completions", body, view);
  } catch (error) {
    failed = error;
  }
  const { turn } = view, stopped = failed?.name === "AbortError";
  if (failed) turn.about = stopped ? "stopped" : String(failed.message || failed);
  if (conversation.turns !== turns) {
    clearTimeout(view.drawing);
    view.node.remove();
  } else if (failed && !turn.content && !turn.tool_calls) { // unanswered: it can be sent again
    clearTimeout(view.drawing);
    view.node.remove();
    asked?.remove();
    if (!text.value) text.value = said.content;
    if (!stopped) bubble("error", turn.about);
  } else {
    conversation.add(said, turn);
    view.finish();
  }
  view.node.classList.remove("busy");
  running = null;
  send.hidden = false;
  stop.hidden = true;
  invite();
  text.focus();
}

async function stream(path, body, view) {
  const began = performance.now();
  const response = await ask(path, {
    method: "POST", body: JSON.stringify(body), signal: running.signal,
    headers: { "Content-Type": "application/json" },
  });
  if (!response.ok) throw new Error(await fault(response));
  onRequest(response.headers.get("x-request-id"));
  const { turn } = view;
  let first = 0, last = 0, reason = "", tokens = 0;
  for await (const { data } of events(response)) {
    if (data === "[DONE]") break;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Error(chunk.error.message);
    if (chunk.usage) tokens = chunk.usage.completion_tokens;
    for (const choice of chunk.choices) {
      if (take(turn, choice)) {
        last = performance.now();
        first ||= last;
        view.grow();
      }
      reason = choice.finish_reason || reason;
    }
  }
  const speed = tokens > 1 && last > first ? `, ${Math.round(1000 * (tokens - 1) / (last - first))} tokens/s` : "";
  turn.about = `TTFT ${Math.round((first || performance.now()) - began)} ms, ${tokens} tokens${speed}, ${reason}`;
}

/** Add a chunk's choice to the turn. True: it brought something. */
function take(turn, choice) {
  const delta = choice.delta ?? { content: choice.text };
  if (delta.content) turn.content += delta.content;
  if (delta.reasoning_content) turn.reasoning_content = (turn.reasoning_content ?? "") + delta.reasoning_content;
  for (const part of delta.tool_calls ?? []) {
    turn.tool_calls ??= [];
    const call = turn.tool_calls[part.index] ??= { id: part.id, type: "function", function: { name: "", arguments: "" } };
    call.function.name += part.function?.name ?? "";
    call.function.arguments += part.function?.arguments ?? "";
  }
  const added = chances(choice.logprobs);
  if (added.length) turn.tokens = [...(turn.tokens ?? []), ...added];
  return Boolean(delta.content || delta.reasoning_content || delta.tool_calls);
}

/** Tokens of a chunk with their probabilities, from both APIs' forms of logprobs. */
function chances(logprobs) {
  if (logprobs?.content) {
    return logprobs.content.map((each) => ({
      text: each.token, chance: Math.exp(each.logprob),
      others: each.top_logprobs.map((other) => [other.token, Math.exp(other.logprob)]),
    }));
  }
  return (logprobs?.tokens ?? []).map((token, i) => ({
    text: token, chance: Math.exp(logprobs.token_logprobs[i]),
    others: Object.entries(logprobs.top_logprobs?.[i] ?? {}).map(([other, its]) => [other, Math.exp(its)]),
  }));
}
