// The conversation: its turns as the API takes them, kept in this browser only.
//
// A turn is a message {role, content, ...} and what the page notes beside it: `about` (a line of times) and
// `tokens` ([{text, chance, others}], if they were asked for). A turn stays only with its answer.

const KEPT = "conversation", WISHES = "settings";
const NOTES = ["about", "tokens"];
const MOST_KEPT = 2_000_000; // characters; browsers keep about 5 MB

export class Conversation {
  constructor() {
    this.turns = [];
    this.model = "";
  }

  /** Take up what was kept, if it was said to this model. */
  restore(model) {
    this.model = model;
    const kept = read(KEPT);
    const good = (turn) => typeof turn?.content === "string" && typeof turn.role === "string";
    if (kept?.model === model && Array.isArray(kept.turns) && kept.turns.every(good)) this.turns = kept.turns;
  }

  /** Add turns that belong together: what was said, and its answer. */
  add(...turns) {
    this.turns.push(...turns);
    this.keep();
  }

  /** Forget this turn and all after it. */
  cut(turn) {
    const at = this.turns.indexOf(turn);
    if (at >= 0) this.turns.length = at;
    this.keep();
  }

  clear() {
    this.turns = [];
    this.keep();
  }

  keep() {
    write(KEPT, { model: this.model, turns: this.turns }, MOST_KEPT);
  }

  /** The messages to send, with one more. */
  messages(system, more) {
    const said = [...this.turns, more].map((turn) => Object.fromEntries(
      Object.entries(turn).filter(([name]) => !NOTES.includes(name))));
    return system.trim() ? [{ role: "system", content: system }, ...said] : said;
  }

  /** Calls of tools at the end that have no result yet. */
  waiting() {
    const last = this.turns.findLastIndex((turn) => turn.role === "assistant");
    const calls = this.turns[last]?.tool_calls ?? [];
    const answered = new Set(this.turns.slice(last + 1).map((turn) => turn.tool_call_id));
    return calls.filter((call) => !answered.has(call.id));
  }
}

export const wishes = { load: () => read(WISHES) ?? {}, save: (values) => write(WISHES, values, MOST_KEPT) };

function read(name) {
  try {
    return JSON.parse(localStorage.getItem(name));
  } catch {
    return null; // written by something else, or no storage here
  }
}

function write(name, value, most) {
  const text = JSON.stringify(value);
  try {
    if (text.length <= most) localStorage.setItem(name, text);
    else localStorage.removeItem(name);
  } catch { /* the storage is full or forbidden: the page works without */ }
}
