// The conversation: sends it, streams the answer, shows how long it took.

import { ask, events, fault } from "./api.js";

const talk = document.getElementById("talk");
const form = document.getElementById("ask");
const text = document.getElementById("text");
const send = document.getElementById("send");
const stop = document.getElementById("stop");

const IDEAS = {
  chat: ["What does a KV cache hold?", "Explain why batching improves GPU utilization."],
  text: ["In the future, artificial intelligence will", "On a distant planet, aliens are",
         "In an ancient castle, there is a hidden"],
};

let model = null; // {id, chat}
let turns = [];
let running = null; // AbortController
let onRequest = () => {};

export function startChat(described, tellRequest) {
  model = described;
  onRequest = tellRequest;
  document.getElementById("mode").textContent = model.chat ? ""
    : "This model has no chat template: it continues your text.";
  text.placeholder = model.chat ? "Message (Enter sends, Shift+Enter: new line)"
    : "Prompt (Enter sends, Shift+Enter: new line)";
  const ideas = document.getElementById("ideas");
  ideas.replaceChildren(...IDEAS[model.chat ? "chat" : "text"].map((idea) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = idea;
    button.addEventListener("click", () => { text.value = idea; form.requestSubmit(); });
    return button;
  }));
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  const said = text.value;
  if (!model || running || !said.trim()) return;
  text.value = "";
  answer(model.chat ? said.trim() : said);
});
text.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    form.requestSubmit();
  }
});
stop.addEventListener("click", () => running?.abort());
document.getElementById("fresh").addEventListener("click", () => {
  running?.abort();
  turns = [];
  talk.querySelectorAll(".turn").forEach((turn) => turn.remove());
  document.getElementById("welcome").hidden = false;
  text.focus();
});

function bubble(kind, content = "") {
  const turn = document.createElement("div");
  turn.className = `turn ${kind}`;
  turn.append(content);
  talk.append(turn);
  talk.scrollTop = talk.scrollHeight;
  return turn;
}

function settings() {
  const wanted = {};
  for (const field of document.querySelectorAll("#settings input")) {
    if (field.value !== "") wanted[field.name] = Number(field.value);
  }
  return wanted;
}

async function answer(said) {
  document.getElementById("welcome").hidden = true;
  const body = { model: model.id, stream: true, stream_options: { include_usage: true }, ...settings() };
  let path = "/v1/completions";
  let turn;
  if (model.chat) {
    path = "/v1/chat/completions";
    bubble("user", said);
    turns.push({ role: "user", content: said });
    body.messages = turns;
    turn = bubble("assistant busy");
  } else {
    body.prompt = said;
    turn = bubble("assistant busy");
    const given = document.createElement("span");
    given.className = "given";
    given.textContent = said;
    turn.append(given);
  }
  running = new AbortController();
  send.hidden = true;
  stop.hidden = false;
  try {
    await stream(path, body, turn);
  } catch (error) {
    if (error.name !== "AbortError") bubble("error", String(error.message || error));
    else about(turn, "stopped");
  } finally {
    turn.classList.remove("busy");
    running = null;
    send.hidden = false;
    stop.hidden = true;
    text.focus();
  }
}

async function stream(path, body, turn) {
  const began = performance.now();
  const response = await ask(path, {
    method: "POST", body: JSON.stringify(body), signal: running.signal,
    headers: { "Content-Type": "application/json" },
  });
  if (!response.ok) throw new Error(await fault(response));
  onRequest(response.headers.get("x-request-id"));
  const written = document.createTextNode("");
  const thoughts = document.createElement("em"); // what the model reasons before it answers
  turn.append(thoughts, written);
  let first = 0, last = 0, reason = "", tokens = 0;
  for await (const { data } of events(response)) {
    if (data === "[DONE]") break;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Error(chunk.error.message);
    if (chunk.usage) tokens = chunk.usage.completion_tokens;
    for (const choice of chunk.choices) {
      const piece = choice.delta ? choice.delta.content : choice.text;
      const thought = choice.delta && choice.delta.reasoning_content;
      if (piece || thought) {
        last = performance.now();
        first ||= last;
        const below = talk.scrollHeight - talk.scrollTop - talk.clientHeight < 40;
        if (thought) thoughts.textContent += thought;
        if (piece) written.data += piece;
        if (below) talk.scrollTop = talk.scrollHeight;
      }
      reason = choice.finish_reason || reason;
    }
  }
  if (model.chat) turns.push({ role: "assistant", content: written.data });
  const speed = tokens > 1 && last > first ? `, ${Math.round(1000 * (tokens - 1) / (last - first))} tokens/s` : "";
  about(turn, `TTFT ${Math.round((first || performance.now()) - began)} ms, ${tokens} tokens${speed}, ${reason}`);
}

function about(turn, line) {
  const small = document.createElement("small");
  small.className = "about";
  small.textContent = line;
  turn.append(small);
  talk.scrollTop = talk.scrollHeight;
}
