// The "try it" box: a chat with this node, through the same OpenAI-compatible call that everybody else makes.
import { apiKey, errorMessage, request, serverSentEvents } from "./connection.js";
import { h, keyed, setText } from "./dom.js";
import { chatModels } from "./mesh.js";

const byId = (id) => document.getElementById(id);
const form = byId("try-form");
const text = byId("try-text");
const models = byId("try-model");
const log = byId("try-log");
const send = byId("try-send");
const stop = byId("try-stop");
const clear = byId("try-clear");
const hint = byId("try-hint");

let messages = [];
let running = null;

/** Offer the chat models that are ready; say why none is. */
export function offerModels(node) {
  const { ready, waiting } = chatModels(node);
  keyed(models, ready, (name) => name, (name) => ({ element: h("option", { value: name }, name), update() {} }));
  models.disabled = !ready.length;
  send.disabled = !ready.length || running !== null;
  if (ready.length) setText(hint, "");
  else setText(hint, waiting ? "The chat model is not ready yet." : "No chat model is deployed here.");
}

function addTurn(kind, who, content = "") {
  const what = h("div", { class: "what" }, content);
  const note = h("div", { class: "note" });
  note.hidden = true;
  const element = h("div", { class: `turn ${kind}` }, h("div", { class: "who" }, who), what, note);
  log.append(element);
  log.scrollTop = log.scrollHeight;
  return {
    add(piece) {
      const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
      what.append(piece);
      if (atEnd) log.scrollTop = log.scrollHeight;
    },
    end(className, noteText) {
      element.className = `turn ${className}`;
      setText(note, noteText);
      note.hidden = !noteText;
      log.scrollTop = log.scrollHeight;
    },
  };
}

function setRunning(controller) {
  running = controller;
  stop.hidden = !controller;
  send.disabled = controller !== null || models.disabled;
  clear.hidden = controller !== null || !messages.length;
}

async function ask(question) {
  const model = models.value;
  addTurn("user", "You", question);
  const turn = addTurn("running", model);
  const abort = new AbortController();
  setRunning(abort);
  const started = performance.now();
  let answer = "";
  let firstAfter = null;
  let usage = null;
  let cut = false;
  try {
    const response = await request("/v1/chat/completions", {
      method: "POST",
      signal: abort.signal,
      headers: { "Content-Type": "application/json", Accept: "text/event-stream" },
      body: JSON.stringify({ model, messages: [...messages, { role: "user", content: question }], stream: true, stream_options: { include_usage: true } }),
    });
    if (!response.ok) throw new Error(await errorMessage(response));
    for await (const { data } of serverSentEvents(response.body)) {
      if (data === "[DONE]") break;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      if (chunk.usage) usage = chunk.usage;
      const choice = chunk.choices[0];
      const piece = choice?.delta.content;
      if (choice?.finish_reason === "length") cut = true;
      if (!piece) continue;
      firstAfter ??= performance.now() - started;
      answer += piece;
      turn.add(piece);
    }
    messages.push({ role: "user", content: question }, { role: "assistant", content: answer });
    turn.end("assistant", summary(usage, firstAfter, performance.now() - started, cut));
  } catch (error) {
    if (abort.signal.aborted) {
      turn.end("assistant", "stopped");
    } else {
      turn.add((answer ? "\n" : "") + (error instanceof TypeError ? "The node does not answer." : error.message));
      turn.end("failed", "");
    }
  } finally {
    setRunning(null);
  }
}

function summary(usage, firstAfter, total, cut) {
  const parts = [];
  if (usage) parts.push(`${usage.completion_tokens} tokens`);
  if (firstAfter !== null) parts.push(`first after ${Math.round(firstAfter)} ms`);
  if (usage && firstAfter !== null && usage.completion_tokens > 1 && total > firstAfter) {
    parts.push(`${Math.round((usage.completion_tokens - 1) / ((total - firstAfter) / 1000))} tokens/s`);
  }
  if (cut) parts.push("cut at the token limit");
  return parts.join(" · ");
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  const question = text.value.trim();
  if (!question || running || send.disabled) return;
  text.value = "";
  ask(question);
});
text.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    form.requestSubmit();
  }
});
stop.addEventListener("click", () => running?.abort());
clear.addEventListener("click", () => {
  messages = [];
  log.replaceChildren();
  clear.hidden = true;
  text.focus();
});

/** The addresses that other programs call; they are this page's own origin. */
export function showEndpoints() {
  const rows = [
    ["OpenAI API", `${location.origin}/v1`],
    ["JSON-RPC", `${location.origin}/rpc`],
    ["REST", `${location.origin}/inference`],
    ["Metrics", `${location.origin}/metrics`],
    ["API key", apiKey.get() ? "needed" : "none needed"],
  ];
  byId("endpoints").replaceChildren(...rows.map(([term, value]) => h("div", {}, h("dt", {}, term), h("dd", { class: term === "API key" ? "" : "mono" }, value))));
}
