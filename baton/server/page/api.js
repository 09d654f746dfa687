// HTTP calls: JSON, and server-sent events read with fetch, because EventSource cannot send the API key.

let key = stored("key") || "";

/** What this browser keeps, null where it keeps nothing: storage may be forbidden. */
export function stored(name, storage = () => sessionStorage) {
  try {
    return storage().getItem(name);
  } catch {
    return null;
  }
}

export function store(name, value, storage = () => sessionStorage) {
  try {
    storage().setItem(name, value);
  } catch { /* then it lasts as long as the page */ }
}

export function headers(more = {}) {
  return key ? { Authorization: `Bearer ${key}`, ...more } : more;
}

/** fetch, with a prompt for the key if the server requires one. */
export async function ask(path, options = {}) {
  const answer = await fetch(path, { ...options, headers: headers(options.headers) });
  if (answer.status !== 401 || !(await askForKey())) return answer;
  return fetch(path, { ...options, headers: headers(options.headers) });
}

let asking = null;

/** One dialog for all requests that need a key. True: there is a key to try. */
function askForKey() {
  if (asking) return asking;
  const dialog = document.getElementById("key-dialog");
  const field = document.getElementById("key");
  dialog.showModal();
  asking = new Promise((resolve) => {
    dialog.addEventListener("close", () => {
      asking = null;
      if (dialog.returnValue === "ok" && field.value) {
        key = field.value;
        store("key", key);
      }
      resolve(dialog.returnValue === "ok");
    }, { once: true });
  });
  return asking;
}

/** The events of a response, one after the other: {name, data}, data as text. */
export async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const parts = (rest + value).split("\n\n");
      rest = parts.pop();
      for (const part of parts) {
        const event = { name: "", data: "" };
        for (const line of part.split("\n")) {
          if (line.startsWith("event: ")) event.name = line.slice(7);
          if (line.startsWith("data: ")) event.data += line.slice(6);
        }
        if (event.data) yield event;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** The server's error message. */
export async function fault(answer) {
  try {
    return (await answer.json()).error.message;
  } catch {
    return `the server answered ${answer.status}`;
  }
}
