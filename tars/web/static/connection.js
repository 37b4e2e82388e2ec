// How the page talks to its own node: requests with the API key where one is needed, and server-sent events read from a fetch
// (EventSource cannot send a key). Law of this file: it knows the wire, not the page.

const KEY_NAME = "tars-api-key";
const SILENCE_MS = 5000; // the node writes every second; five missed ones are an outage, not a hiccup
const RETRY_MS = [500, 1000, 2000, 5000]; // a restart takes a few seconds; a sleeping PC need not be asked more often

export const apiKey = {
  get: () => sessionStorage.getItem(KEY_NAME),
  set: (key) => sessionStorage.setItem(KEY_NAME, key),
  forget: () => sessionStorage.removeItem(KEY_NAME),
};

/** fetch() of a path on this node, with the key. */
export function request(path, { headers = {}, ...options } = {}) {
  const key = apiKey.get();
  return fetch(path, {
    ...options,
    headers: key ? { ...headers, Authorization: `Bearer ${key}` } : headers,
    cache: "no-store",
    credentials: "omit",
    redirect: "error",
  });
}

/** The events of a text/event-stream body: yields {event, data} (data as text); `onBytes` runs at every sign of life. */
export async function* serverSentEvents(body, onBytes = () => {}) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      onBytes();
      buffer += value;
      let end;
      while ((end = buffer.search(/\r?\n\r?\n/)) >= 0) {
        const block = buffer.slice(0, end);
        buffer = buffer.slice(end).replace(/^\r?\n\r?\n/, "");
        const data = [];
        let event = "message";
        for (const line of block.split(/\r?\n/)) {
          if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
          else if (line.startsWith("event:")) event = line.slice(6).trim();
        }
        if (data.length) yield { event, data: data.join("\n") };
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** The message of an error answer of any of the node's faces. */
export async function errorMessage(response) {
  try {
    const { error } = await response.json();
    return error.message;
  } catch {
    return `the node answered ${response.status}`;
  }
}

/**
 * Watch the node's description for as long as the page is looked at.
 * `on.models(list)` whenever the deployed models changed, `on.mesh(object)` whenever the mesh did, `on.description(object)`, `on.unreachable(since: Date, reason)`, `on.keyNeeded(wrong: boolean)`.
 * Returns {restart()} for when a key was entered.
 */
export function watchNode(on) {
  let attempt = 0;
  let since = null;
  let running = null;

  async function once(signal, alive) {
    const response = await request("/events", { signal, headers: { Accept: "text/event-stream" } });
    if (response.status === 401) return "key";
    if (!response.ok) throw new Error(await errorMessage(response));
    for await (const { event, data } of serverSentEvents(response.body, alive)) {
      if (event === "models") on.models(JSON.parse(data).models);
      if (event === "mesh") on.mesh(JSON.parse(data));
      if (event !== "description") continue;
      attempt = 0;
      since = null;
      on.description(JSON.parse(data));
    }
    throw new Error("the node closed the connection");
  }

  async function loop(stop) {
    while (!stop.signal.aborted) {
      const abort = new AbortController();
      const stopNow = () => abort.abort();
      stop.signal.addEventListener("abort", stopNow);
      let watchdog = setTimeout(stopNow, SILENCE_MS);
      const alive = () => {
        clearTimeout(watchdog);
        watchdog = setTimeout(stopNow, SILENCE_MS);
      };
      try {
        if ((await once(abort.signal, alive)) === "key") {
          on.keyNeeded(apiKey.get() !== null);
          return;
        }
      } catch (error) {
        if (stop.signal.aborted) return;
        since ??= new Date();
        // A TypeError is the browser's word for "no connection"; its own text helps nobody.
        const silent = error instanceof TypeError || error.name === "AbortError";
        on.unreachable(since, silent ? null : error.message);
      } finally {
        clearTimeout(watchdog);
        stop.signal.removeEventListener("abort", stopNow);
      }
      await new Promise((done) => setTimeout(done, RETRY_MS[Math.min(attempt, RETRY_MS.length - 1)]));
      attempt += 1;
    }
  }

  function start() {
    running?.abort();
    running = new AbortController();
    loop(running);
  }

  // A tab in the background costs the node nothing.
  document.addEventListener("visibilitychange", () => (document.hidden ? running?.abort() : start()));
  start();
  return { restart: start };
}
