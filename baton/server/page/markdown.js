// Markdown to DOM nodes: the subset that models write. Text of a model never becomes HTML source, so there
// is nothing to sanitize: every node is made here, by createElement, and links go to http(s) only.
// Time is linear in the text: a delimiter that is not closed is looked for once.

const FENCE = /^ {0,3}(`{3,}(?!`)|~{3,}(?!~))([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})(?=\s|$)/;
const RULE = /^ {0,3}([-*_])(?:\s*\1){2,}\s*$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)(?:([-*+])|(\d{1,9})[.)])\s+(.*)$/;
const DIVIDER = /^:?-+:?$/; // a cell of the line below a table's head
const DEEPEST = 8; // quotes and lists in each other; deeper ones are text

/** The text as a fragment. */
export function render(text) {
  const made = document.createDocumentFragment();
  blocks(text.replaceAll("\r\n", "\n").split("\n"), made, 0);
  return made;
}

function make(name, parent, text) {
  const node = document.createElement(name);
  if (text !== undefined) node.textContent = text;
  parent.append(node);
  return node;
}

function blocks(lines, parent, depth) {
  let paragraph = [];
  const finish = () => {
    if (paragraph.length) inline(paragraph.join("\n"), make("p", parent));
    paragraph = [];
  };
  for (let i = 0; i < lines.length;) {
    const line = lines[i];
    let found;
    if ((found = FENCE.exec(line))) {
      finish();
      i = fence(lines, i, found, parent);
    } else if (!line.trim()) {
      finish();
      i++;
    } else if ((found = HEADING.exec(line))) {
      finish();
      inline(title(line.slice(found[0].length)), make(`h${Math.min(6, found[1].length + 2)}`, parent)); // h1, h2 are the page's
      i++;
    } else if (RULE.test(line)) {
      finish();
      make("hr", parent);
      i++;
    } else if (depth < DEEPEST && QUOTE.test(line)) {
      finish();
      const quoted = [];
      while (i < lines.length && QUOTE.test(lines[i])) quoted.push(lines[i++].replace(QUOTE, ""));
      blocks(quoted, make("blockquote", parent), depth + 1);
    } else if (depth < DEEPEST && (found = ITEM.exec(line)) && found[1].length < 4) {
      finish();
      i = list(lines, i, found, parent, depth);
    } else if (line.includes("|") && i + 1 < lines.length && divides(lines[i + 1])) {
      finish();
      i = table(lines, i, parent);
    } else {
      paragraph.push(line);
      i++;
    }
  }
  finish();
}

/** A code block with a button that copies it. One that is not closed yet goes on to the end. */
function fence(lines, at, found, parent) {
  const [, mark, info] = found, [language] = info.trim().split(/\s/, 1);
  const code = [];
  let i = at + 1;
  const closes = (line) => line.trim().startsWith(mark) && !line.trim().replaceAll(mark[0], "");
  while (i < lines.length && !closes(lines[i])) code.push(lines[i++]);
  const box = make("div", parent);
  box.className = "code";
  make("span", box, language || "code");
  const copy = make("button", box, "Copy");
  copy.type = "button";
  copy.dataset.copy = "code";
  make("code", make("pre", box), code.join("\n")).parentNode.tabIndex = 0;
  return i + 1;
}

function list(lines, at, found, parent, depth) {
  const indent = found[1].length, ordered = found[3] !== undefined;
  const made = make(ordered ? "ol" : "ul", parent);
  if (ordered && Number(found[3]) !== 1) made.start = Number(found[3]);
  let i = at;
  while (i < lines.length) {
    const item = ITEM.exec(lines[i]);
    if (!item || Math.abs(item[1].length - indent) > 1 || (item[3] !== undefined) !== ordered) break;
    const inside = [item[4]];
    i++;
    while (i < lines.length) {
      const line = lines[i], own = line.length - line.trimStart().length;
      if (!line.trim()) {
        const next = lines[i + 1];
        if (next === undefined || next.length - next.trimStart().length < indent + 2) break;
      } else if (own < indent + 2) break;
      inside.push(line.slice(Math.min(own, indent + (ordered ? 3 : 2))));
      i++;
    }
    const entry = make("li", made);
    if (inside.length === 1) inline(inside[0], entry);
    else blocks(inside, entry, depth + 1);
    while (i + 1 < lines.length && !lines[i].trim() && ITEM.test(lines[i + 1])) i++; // a loose list
  }
  return i;
}

/** A heading without the # that may close it. */
function title(text) {
  const whole = text.trim();
  let end = whole.length;
  while (whole[end - 1] === "#") end--;
  return end === 0 || /\s/.test(whole[end - 1]) ? whole.slice(0, end).trim() : whole;
}

const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());
const divides = (line) => line.includes("-") && cells(line).every((cell) => DIVIDER.test(cell));

function table(lines, at, parent) {
  const frame = make("div", parent);
  frame.className = "wide";
  const made = make("table", frame);
  const head = make("tr", make("thead", made));
  const names = cells(lines[at]);
  for (const cell of names) inline(cell, make("th", head));
  const body = make("tbody", made);
  let i = at + 2;
  for (; i < lines.length && lines[i].includes("|") && lines[i].trim(); i++) {
    const row = make("tr", body);
    for (const cell of cells(lines[i]).slice(0, names.length)) inline(cell, make("td", row));
  }
  return i;
}

const WORD = /[\p{L}\p{N}]/u;
const PUNCTUATION = /[\p{P}\p{S}]/u;
const MOST_OPEN = 64; // delimiters that wait for their end
const LABEL = 1000, ADDRESS = 2048; // characters of a link

/** Code, emphasis, links. */
function inline(text, parent) {
  const spans = new Spans(parent), missing = new Set(); // marks of code that come no more
  let plain = 0, i = 0;
  const done = (to) => {
    if (i > plain) parent.append(text.slice(plain, i));
    plain = i = to;
  };
  while (i < text.length) {
    const char = text[i];
    if (char === "\\" && /[\\`*_~[\]()#>|.!-]/.test(text[i + 1] ?? "")) {
      done(i + 1);
      i++;
    } else if (char === "\n") {
      done(i + 1);
      make("br", parent);
    } else if (char === "`") {
      const [mark] = /^`+/.exec(text.slice(i, i + 16));
      const from = i + mark.length, end = missing.has(mark) ? -1 : text.indexOf(mark, from);
      if (end < 0) {
        missing.add(mark);
        i = from;
        continue;
      }
      done(end + mark.length);
      make("code", parent, text.slice(from, end).replace(/^ (.*) $/s, "$1"));
    } else if (char === "[") {
      const found = /^\[([^[\]]+)\]\(\s*(https?:\/\/[^\s()<>]+)[^()]*\)/i.exec(text.slice(i, i + LABEL + ADDRESS));
      if (!found) { // what else it may be stays text
        i++;
        continue;
      }
      done(i + found[0].length);
      inline(found[1], anchor(found[2], parent));
    } else if (char === "h" && /^https?:\/\//.test(text.slice(i, i + 8)) && !WORD.test(text[i - 1] ?? "")) {
      const found = /^[^\s<>"'`]*[^\s<>"'`.,;:!?)\]}*_]/.exec(text.slice(i, i + ADDRESS));
      done(i + found[0].length);
      anchor(found[0], parent).textContent = found[0];
    } else if (char === "*" || char === "_" || char === "~") {
      let end = i;
      while (text[end] === char) end++;
      const [count, before, after] = [end - i, text[i - 1] ?? " ", text[end] ?? " "];
      done(end);
      spans.add(char, count, before, after);
    } else {
      i++;
    }
  }
  done(text.length);
}

/** Emphasis, as CommonMark pairs its delimiters: the nearest that fits. */
class Spans {
  constructor(parent) {
    this.parent = parent;
    this.open = []; // runs of delimiters: {node, char, count, total, closes}
  }

  add(char, count, before, after) {
    const node = document.createTextNode(char.repeat(count));
    this.parent.append(node);
    const [spaceBefore, spaceAfter] = [/\s/.test(before), /\s/.test(after)];
    const [markBefore, markAfter] = [PUNCTUATION.test(before), PUNCTUATION.test(after)];
    const left = !spaceAfter && (!markAfter || spaceBefore || markBefore);
    const right = !spaceBefore && (!markBefore || spaceAfter || markAfter);
    const opens = char === "_" ? left && (!right || markBefore) : left;
    const closes = char === "_" ? right && (!left || markAfter) : right;
    const run = { node, char, count, total: count, closes };
    if (closes) this.close(run, opens);
    if (opens && run.count && this.open.length < MOST_OPEN) this.open.push(run);
  }

  close(run, opens) {
    const least = run.char === "~" ? 2 : 1;
    while (run.count >= least) {
      const at = this.open.findLastIndex((other) => other.char === run.char && other.count >= least
        && !((other.closes || opens) && (other.total + run.total) % 3 === 0 && other.total % 3));
      if (at < 0) return;
      const other = this.open[at], both = Math.min(run.count, other.count, 2);
      const span = document.createElement(run.char === "~" ? "del" : both === 2 ? "strong" : "em");
      while (other.node.nextSibling !== run.node) span.append(other.node.nextSibling);
      other.node.after(span);
      for (const each of [run, other]) {
        each.count -= both;
        each.node.data = each.char.repeat(each.count);
      }
      this.open.length = other.count ? at + 1 : at;
    }
  }
}

function anchor(address, parent) {
  const made = make("a", parent);
  made.href = address;
  made.target = "_blank";
  made.rel = "noopener noreferrer nofollow";
  return made;
}
