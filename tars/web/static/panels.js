// What the page shows of a node's description. Law of this file: description in, elements out; it asks the node for nothing.
import { bytes, clock, count, duration, facts, h, keyed, memoryBar, setText, showMemory, showState, showTags } from "./dom.js";
import { absentOf, allReplicas, isMesh, unservedRow } from "./mesh.js";

const byId = (id) => document.getElementById(id);

export function showNode(node) {
  document.title = `${node.name} · TARS`;
  setText(byId("node-name"), node.name);
  showState(byId("node-state"), node.state);
  facts(byId("node-facts"), [
    ["up", duration(node.uptime_seconds)],
    ["version", node.version],
    ["on", node.platform + (node.wsl2 ? " (WSL2)" : "")],
  ]);
  setText(byId("devices-title"), isMesh() ? `Devices of ${node.name}` : "Devices");
  setText(byId("replicas-title"), isMesh() ? `Models on ${node.name}` : "Models");
}

/* ---- numbers ---- */

const RATE_SECONDS = 60;
const history = []; // [time in ms, total calls], newest last

function remember(node) {
  const now = Date.now();
  // A smaller total is a restarted node: its history starts anew.
  if (history.length && history[history.length - 1][1] > node.calls.total) history.length = 0;
  history.push([now, node.calls.total]);
  while (history.length > 2 && now - history[0][0] > (RATE_SECONDS + 1) * 1000) history.shift();
}

function callsInLastMinute() {
  return history[history.length - 1][1] - history[0][1];
}

function sparkline() {
  const deltas = history.slice(1).map(([, total], index) => total - history[index][1]);
  const most = Math.max(1, ...deltas);
  return deltas.map((delta, index) => {
    const x = 100 - ((deltas.length - 1 - index) * 100) / RATE_SECONDS;
    return `${index ? "L" : "M"}${x.toFixed(1)} ${(23 - (delta / most) * 20).toFixed(1)}`;
  }).join("");
}

function tile(label, extra = null) {
  const value = document.createTextNode("");
  const unit = h("span", { class: "unit" });
  const element = h("div", { class: "tile" }, h("div", { class: "label" }, label), h("div", { class: "value" }, value, unit), extra);
  return {
    element,
    name: element.firstElementChild,
    set(number, unitText = "", alarm = false) {
      if (value.data !== number) value.data = number;
      setText(unit, unitText);
      element.classList.toggle("alarm", alarm);
    },
  };
}

let tiles = null;
const COUNTED = [["active", "Calls now", "Calls here now"], ["total", "Calls in all", "Calls here in all"], ["failed", "Failed", "Failed here"]];

export function showNumbers(node) {
  remember(node);
  if (!tiles) {
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
    const base = document.createElementNS("http://www.w3.org/2000/svg", "path");
    base.setAttribute("class", "base");
    base.setAttribute("d", "M0 23L100 23");
    for (const [name, value] of [["class", "spark"], ["viewBox", "0 0 100 26"], ["preserveAspectRatio", "none"], ["aria-hidden", "true"]]) svg.setAttribute(name, value);
    svg.append(base, path);
    tiles = { ready: tile("Models ready"), active: tile("Calls now"), total: tile("Calls in all"), failed: tile("Failed"), rate: tile("Last minute", svg), path };
    byId("tiles").append(...["ready", "active", "total", "failed", "rate"].map((name) => tiles[name].element));
  }
  const replicas = allReplicas(node);
  const ready = replicas.filter((replica) => replica.state === "ready").length;
  const absent = absentOf(node).length;
  const alarm = absent > 0 || replicas.some((replica) => replica.state === "failed");
  tiles.ready.set(`${ready}`, `of ${replicas.length + absent}`, alarm);
  // What the others answer is counted there.
  for (const [name, alone, here] of COUNTED) setText(tiles[name].name, isMesh() ? here : alone);
  tiles.active.set(count(node.calls.active));
  tiles.total.set(count(node.calls.total));
  const share = node.calls.total ? (node.calls.failed / node.calls.total) * 100 : 0;
  tiles.failed.set(count(node.calls.failed), node.calls.failed ? `${share < 1 ? share.toFixed(1) : Math.round(share)} %` : "");
  const seen = Math.round((history[history.length - 1][0] - history[0][0]) / 1000);
  setText(tiles.rate.name, seen < RATE_SECONDS ? `Last ${Math.max(1, seen)} s` : "Last minute");
  const recent = callsInLastMinute();
  tiles.rate.set(count(recent), recent === 1 ? "call" : "calls");
  tiles.path.setAttribute("d", sparkline());
}

/* ---- devices ---- */

const HOT_CELSIUS = 85; // consumer cards throttle from about 83-90 °C

function deviceCard() {
  const name = h("h3");
  const tags = h("div", { class: "tags" });
  const bar = memoryBar();
  const legend = h("dl", { class: "legend" });
  const readings = h("dl", { class: "readings" });
  const notes = h("p", { class: "muted small" });
  const element = h("article", { class: "card device" }, h("div", { class: "device-head" }, name, tags), h("div", { class: "memory" }, bar.element, legend), readings, notes);
  return {
    element,
    update(device) {
      setText(name, device.name);
      const labels = [
        device.simulated ? ["simulated", "simulated"] : null,
        device.simulated && device.kind === "cpu" ? null : [device.kind === "cpu" ? "CPU" : device.kind.toUpperCase(), ""],
        device.compute_capability ? [`cc ${device.compute_capability}`, ""] : null,
        [device.precision, ""],
        device.unified_memory && device.kind !== "cpu" ? ["unified memory", ""] : null,
      ].filter(Boolean);
      showTags(tags, labels);

      const memory = showMemory(bar, device);
      facts(legend, [
        ["TARS", memory.held, "held"],
        ["free", `${memory.free} of ${memory.total}`],
        ["other", memory.other, "used-other"],
        ["TARS may hold", memory.bound, "limit"],
      ]);
      facts(readings, [
        ["utilisation", device.utilisation_percent === null ? null : `${device.utilisation_percent} %`],
        ["temperature", device.temperature_celsius === null ? null : `${device.temperature_celsius} °C`, device.temperature_celsius >= HOT_CELSIUS ? "hot" : ""],
        ["power", device.power_watts === null ? null : `${Math.round(device.power_watts)} W`],
        ["driver", device.driver],
      ]);
      readings.hidden = !readings.children.length;
      setText(notes, device.notes.join(" "));
      notes.hidden = !device.notes.length;
    },
  };
}

export function showDevices(node) {
  keyed(byId("devices"), node.devices, (device) => device.id, deviceCard, "No device found.");
}

/* ---- models ---- */

const KINDS = { chat: "chat", embedding: "embeddings", rerank: "rerank" };

function speed(info) {
  const speeds = info?.speeds;
  if (!speeds) return null;
  const together = speeds.decode_tokens_per_second_all_slots;
  if (speeds.decode_tokens_per_second) {
    const alone = `${count(Math.round(speeds.decode_tokens_per_second))} tokens/s`;
    return together && info.slots > 1 ? `${alone}, ${count(Math.round(together))} with all slots` : alone;
  }
  if (speeds.texts_per_second) return `${count(Math.round(speeds.texts_per_second))} texts/s`;
  return null;
}

const share = (part, whole) => `${whole ? Math.round((100 * part) / whole) : 0} %`;

/** What the engine counts, as readings; it may be a ping interval old. */
function engineReadings({ info, counters, model_kind: kind }) {
  if (!counters || !info) return [];
  const waiting = counters.waiting ? `, ${count(counters.waiting)} waiting` : "";
  if (kind !== "chat") return [["texts now", counters.running || counters.waiting ? `${count(counters.running)}${waiting}` : null]];
  return [
    ["slots busy", `${count(counters.running)} of ${count(info.slots)}${waiting}`],
    ["KV cache", counters.kv_cells ? `${share(counters.kv_used, counters.kv_cells)} of ${count(counters.kv_cells)} tokens used, ${share(counters.kv_cached, counters.kv_cells)} kept for reuse` : null],
    ["prompts reused", counters.prompt_tokens ? share(counters.prompt_tokens_cached, counters.prompt_tokens) : null],
  ];
}

function replicaRow() {
  const model = h("h3");
  const tags = h("div", { class: "tags" });
  const state = h("span", { class: "pill" });
  const stage = h("span", { class: "muted" });
  const progress = h("progress", { max: 100 });
  const load = h("div", { class: "load" }, progress, stage);
  const readings = h("dl", { class: "readings" });
  const problem = h("p", { class: "error-text" });
  const element = h("article", { class: "replica" }, h("div", { class: "replica-head" }, model, tags, state), load, readings, problem);
  return {
    element,
    update(replica) {
      setText(model, replica.model);
      const labels = [KINDS[replica.model_kind] ?? replica.model_kind, replica.variant, replica.simulated ? "simulated" : null].filter(Boolean);
      showTags(tags, labels.map((text) => [text, text === "simulated" ? "simulated" : ""]));
      showState(state, replica.state);
      load.hidden = replica.progress === null || replica.state === "ready";
      if (replica.progress !== null) {
        progress.value = replica.progress.percent;
        progress.setAttribute("aria-label", `loading ${replica.model}`);
        setText(stage, `${replica.progress.stage}, ${Math.round(replica.progress.percent)} %`);
      }
      const { info } = replica;
      const context = info?.context ? `${count(info.context)} tokens` : null;
      facts(readings, [
        ["on", replica.device_name],
        ["memory", info ? bytes(info.memory_bytes) : `about ${bytes(replica.estimated_bytes)}`],
        ["context", context],
        ["dimensions", info?.dimensions ? `${info.dimensions}` : null],
        ["speed", speed(info)],
        ...engineReadings(replica),
        ["calls", `${count(replica.calls_total)}${replica.active_calls ? `, ${replica.active_calls} now` : ""}${replica.queued_calls ? `, ${replica.queued_calls} waiting` : ""}`],
        ["restarts", replica.restarts ? count(replica.restarts) : null],
        ["engine", info?.backend || null],
      ]);
      setText(problem, replica.last_error ?? "");
      problem.hidden = !replica.last_error || replica.state === "ready";
    },
  };
}

export function showReplicas(node) {
  // In a mesh what nobody serves has a list of its own: it is no matter of this node.
  const absent = isMesh() ? [] : absentOf(node).map((model) => ({ id: `absent ${model.model}`, absent: model }));
  const empty = isMesh() ? "Nothing is loaded here." : "No model is deployed here.";
  keyed(byId("replicas"), [...node.replicas, ...absent], (row) => row.id, (row) => {
    if (!row.absent) return replicaRow();
    const view = unservedRow();
    return { element: view.element, update: ({ absent: model }) => view.update(model) };
  }, empty);
}

/* ---- calls and errors ---- */

function methodRow() {
  const name = h("span", { class: "mono" });
  const number = h("span");
  const fill = h("span");
  const element = h("div", { class: "method" }, name, number, h("div", { class: "meter" }, fill));
  return {
    element,
    update([method, calls, most]) {
      setText(name, method);
      setText(number, count(calls));
      fill.style.width = `${((calls / most) * 100).toFixed(1)}%`;
    },
  };
}

export function showMethods(node) {
  const rows = Object.entries(node.calls.by_method).sort(([a, x], [b, y]) => y - x || a.localeCompare(b));
  const most = Math.max(1, ...rows.map(([, calls]) => calls));
  keyed(byId("methods"), rows.map(([method, calls]) => [method, calls, most]), ([method]) => method, methodRow, "No call yet.");
}

function failureRow(error) {
  const at = new Date(error.at * 1000);
  const element = h("article", { class: "failure" },
    h("div", { class: "failure-head" }, h("b", {}, error.error_kind), h("span", { class: "mono muted" }, error.method), h("time", { datetime: at.toISOString() }, clock(at))),
    h("p", {}, error.message),
    h("p", { class: "mono muted" }, `trace ${error.trace_id}`));
  return { element, update() {} };
}

export function showErrors(node) {
  keyed(byId("errors"), node.recent_errors, (error) => `${error.at} ${error.trace_id}`, failureRow, "None since the node started.");
}
