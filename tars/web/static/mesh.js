// The mesh as this node sees it: every node's devices and replicas, files on their way, what moves, what nobody serves.
// Law of this file: as in panels.js. Whatever a peer said of itself is text; its address becomes a link only where it is a web address.
import { bytes, clock, h, keyed, memoryBar, setText, showMemory, showState, showTags } from "./dom.js";

const byId = (id) => document.getElementById(id);

let deployed = [];
let mesh = { nodes: [], nodes_left_out: 0, nodes_by_state: {}, coordinator: null, moves: [], unserved: [] };

/** Keep the deployed models: one that fits nowhere has no replica, and must be seen all the same. */
export function rememberModels(models) {
  deployed = models;
}

export function rememberMesh(description) {
  mesh = description;
}

/** Whether there are other nodes. */
export const isMesh = () => mesh.nodes.length + mesh.nodes_left_out > 1;

const GONE = new Set(["DEAD", "LEFT"]);

/** The nodes; this one as it is now, the others as they told last. */
function nodesNow(node) {
  const replicas = node.replicas.map((replica) => ({
    ...replica, memory_bytes: replica.info?.memory_bytes ?? replica.estimated_bytes, measured: Boolean(replica.info),
  }));
  return mesh.nodes.map((each) => (each.this_node ? { ...each, devices: node.devices, replicas, transfers: node.transfers ?? [] } : each));
}

/** Every replica of the nodes that are there. */
export function allReplicas(node) {
  if (!isMesh()) return node.replicas;
  return nodesNow(node).filter((each) => !GONE.has(each.state)).flatMap((each) => each.replicas);
}

/** What is wanted and loaded nowhere, and why: {model, model_kind, state, why, verdicts}. */
export function absentOf(node) {
  const loaded = new Set(allReplicas(node).map((replica) => replica.model));
  const why = new Map(mesh.unserved.map((each) => [each.model, each]));
  return deployed
    // A model of a node that is not among those that are shown is ready somewhere.
    .filter((model) => !loaded.has(model.name) && model.state !== "ready")
    .map((model) => ({ model: model.name, model_kind: model.model_kind, state: model.state, why: "", verdicts: [], ...why.get(model.name) }));
}

/** Chat models that some node answers for now, by name; `waiting`: whether one is on its way. */
export function chatModels(node) {
  const own = node.replicas.filter((replica) => replica.model_kind === "chat");
  const chat = deployed.filter((model) => model.model_kind === "chat");
  const ready = [...own.filter((replica) => replica.state === "ready").map((replica) => replica.model),
    ...chat.filter((model) => model.state === "ready" && isMesh()).map((model) => model.name)];
  return { ready: [...new Set(ready)], waiting: own.length > 0 || (isMesh() && chat.length > 0) };
}

/* ---- nodes ---- */

function webAddress(text) {
  try {
    const url = new URL(text);
    return url.protocol === "http:" || url.protocol === "https:" ? url.href : null;
  } catch {
    return null;
  }
}

function deviceRow() {
  const name = h("span", { class: "name" });
  const tag = h("span", { class: "tag simulated" }, "simulated");
  const numbers = h("span", { class: "muted" });
  const bar = memoryBar();
  return {
    element: h("div", { class: "node-device" }, h("div", { class: "node-row" }, name, tag, numbers), bar.element),
    update(device) {
      setText(name, device.name.replace(/^NVIDIA /, ""));
      tag.hidden = !device.simulated;
      const memory = showMemory(bar, device);
      setText(numbers, `${memory.held} TARS, ${memory.free} free of ${memory.total}`);
    },
  };
}

function replicaRow() {
  const model = h("span", { class: "name" });
  const memory = h("span", { class: "muted" });
  const state = h("span", { class: "pill" });
  const progress = h("progress", { max: 100 });
  const stage = h("span", { class: "muted" });
  const load = h("div", { class: "load" }, progress, stage);
  const problem = h("p", { class: "error-text" });
  return {
    element: h("div", { class: "node-replica" }, h("div", { class: "node-row" }, model, state), memory, load, problem),
    update({ replica, several }) {
      setText(model, replica.model);
      // Where a node has one device only, it stands right above.
      const place = several ? `, ${replica.device_name.replace(/^NVIDIA /, "")}` : "";
      setText(memory, `${replica.variant}, ${replica.measured ? "" : "about "}${bytes(replica.memory_bytes)}${place}`);
      showState(state, replica.state);
      load.hidden = !replica.progress || replica.state === "ready";
      if (replica.progress) {
        progress.value = replica.progress.percent;
        progress.setAttribute("aria-label", `loading ${replica.model}`);
        setText(stage, `${replica.progress.stage === "fetch" ? "fetching its file" : replica.progress.stage}, ${Math.round(replica.progress.percent)} %`);
      }
      setText(problem, replica.last_error ?? "");
      problem.hidden = !replica.last_error || replica.state === "ready";
    },
  };
}

/** What is to be said of a node that is not simply there. */
function standing(node) {
  const since = node.since === null ? "" : ` since ${clock(new Date(node.since * 1000))}`;
  const had = [...new Set(node.replicas.map((replica) => replica.model))];
  const held = had.length ? ` It had ${had.join(", ")}.` : "";
  if (node.state === "DEAD") return `Does not answer${since}.${held}`;
  if (node.state === "LEFT") return `Stopped${since}.${held}`;
  if (node.state === "SUSPECT") return `Does not answer${since}; others are asked about it.`;
  if (node.state === "DRAINING") return node.replicas.length ? "Gives its memory back: its models go elsewhere where they fit." : "Its memory is given back.";
  return node.devices.length ? "" : "Nothing was heard of its devices yet.";
}

function nodeCard() {
  const name = h("h3");
  const tags = h("div", { class: "tags" });
  const state = h("span", { class: "pill" });
  const words = h("p", { class: "small muted" });
  const devices = h("div", { class: "node-devices" });
  const replicas = h("div", { class: "node-replicas" });
  let linked = null;
  return {
    element: h("article", { class: "card node" }, h("div", { class: "node-head" }, name, state, tags), words, devices, replicas),
    update(node) {
      const address = node.this_node ? null : webAddress(node.client_url);
      if (linked !== `${address} ${node.name}`) {
        linked = `${address} ${node.name}`;
        name.replaceChildren(address === null ? node.name : h("a", { href: address, rel: "noreferrer noopener" }, node.name));
      }
      showTags(tags, [
        node.this_node ? ["this node", ""] : null,
        node.coordinator ? ["coordinates", ""] : null,
        node.version ? [`TARS ${node.version}`, ""] : null,
      ].filter(Boolean));
      showState(state, node.state.toLowerCase());
      setText(words, standing(node));
      words.hidden = !words.textContent;
      // What a node that is gone said of its memory holds no longer.
      const there = GONE.has(node.state) ? { devices: [], replicas: [] } : node;
      keyed(devices, there.devices, (device) => device.id, deviceRow);
      const several = there.devices.length > 1;
      keyed(replicas, there.replicas.map((replica) => ({ replica, several })), ({ replica }) => replica.id, replicaRow);
      devices.hidden = !there.devices.length;
      replicas.hidden = !there.replicas.length;
    },
  };
}

const STATES = ["ALIVE", "SUSPECT", "DRAINING", "DEAD", "LEFT"];

function summary(shown) {
  const total = shown + mesh.nodes_left_out;
  const states = STATES.filter((state) => mesh.nodes_by_state[state]).map((state) => `${mesh.nodes_by_state[state]} ${state.toLowerCase()}`);
  const decides = mesh.coordinator === null ? "nobody coordinates" : `${mesh.coordinator} coordinates`;
  const rest = mesh.nodes_left_out ? `; ${shown} of ${total} are shown, tars status --node NAME shows any` : "";
  const alone = mesh.isolated ? " None of the others answers this node: look first at its own network." : "";
  return `${total} nodes: ${states.join(", ")}; ${decides}${rest}.${alone}`;
}

export function showMesh(node) {
  const nodes = isMesh() ? nodesNow(node) : [];
  byId("mesh-section").hidden = !nodes.length;
  setText(byId("mesh-summary"), nodes.length ? summary(nodes.length) : "");
  keyed(byId("nodes"), nodes, (each) => each.node, nodeCard);
  byId("moves-section").hidden = !mesh.moves.length;
  keyed(byId("moves"), mesh.moves, (move) => move.replica, moveRow);
  const unserved = isMesh() ? absentOf(node) : [];
  byId("unserved-section").hidden = !unserved.length;
  keyed(byId("unserved"), unserved, (model) => model.model, unservedRow);
}

/* ---- what moves, what nobody serves ---- */

function moveRow() {
  const model = h("span", { class: "name" });
  const way = h("span", { class: "muted" });
  const gain = h("p", { class: "small muted" });
  return {
    element: h("article", { class: "move" }, h("div", { class: "failure-head" }, model, way), gain),
    update(move) {
      setText(model, move.model);
      setText(way, `${move.source} → ${move.target}`);
      setText(gain, `Why: ${move.gain}. It answers where it is until it is ready there.`);
    },
  };
}

const KINDS = { chat: "chat", embedding: "embeddings", rerank: "rerank" };

/** A model that nobody serves, with the reason; update({model, model_kind, state, why, verdicts}). */
export function unservedRow() {
  const name = h("h3");
  const kind = h("span", { class: "tag" });
  const state = h("span", { class: "pill" });
  const why = h("p", { class: "error-text" });
  const devices = h("ul", { class: "verdicts small muted" });
  const command = h("span", { class: "mono" });
  const tells = h("span");
  const hint = h("p", { class: "small muted" }, "Loaded nowhere. ", command, tells);
  return {
    element: h("article", { class: "replica" }, h("div", { class: "replica-head" }, name, h("div", { class: "tags" }, kind), state), why, devices, hint),
    update(model) {
      setText(name, model.model);
      setText(kind, KINDS[model.model_kind] ?? model.model_kind);
      showState(state, model.state);
      setText(why, model.why);
      why.hidden = !model.why;
      const rows = model.verdicts.filter((verdict) => !verdict.accepted);
      keyed(devices, rows, (verdict) => `${verdict.device} ${verdict.variant}`, () => {
        const element = h("li");
        return {
          element,
          update(verdict) {
            const place = `${verdict.device_name}${verdict.node_name ? ` of ${verdict.node_name}` : ""}`;
            setText(element, `${place}: ${verdict.variant} needs ${bytes(verdict.needed_bytes)}, ${bytes(verdict.free_bytes)} free; ${verdict.reason}`);
          },
        };
      });
      devices.hidden = !rows.length;
      setText(command, `tars explain ${model.model}`);
      setText(tells, model.why ? " says more." : " says why.");
    },
  };
}

/* ---- model files ---- */

const STAGES = { look: "looking for it", verify: "verifying" };

function transferState(transfer) {
  if (transfer.stage !== "fetch") return (transfer.stage === "look" && transfer.note) || (STAGES[transfer.stage] ?? transfer.stage);
  const from = transfer.sources.length ? ` from ${transfer.sources.join(", ")}` : "";
  const note = transfer.note ? ` (${transfer.note})` : "";
  return `${bytes(transfer.bytes_done)} of ${bytes(transfer.bytes_total)}, ${bytes(transfer.bytes_per_second)}/s${from}${note}`;
}

function transferRow() {
  const name = h("span", { class: "mono" });
  const state = h("span", { class: "small muted" });
  const fill = h("span");
  return {
    element: h("div", { class: "method transfer" }, name, state, h("div", { class: "meter" }, fill)),
    update({ to, transfer }) {
      setText(name, `${transfer.model} ${transfer.variant}${to === null ? "" : ` → ${to}`}`);
      setText(state, transferState(transfer));
      fill.style.width = `${((100 * transfer.bytes_done) / Math.max(1, transfer.bytes_total)).toFixed(1)}%`;
    },
  };
}

export function showTransfers(node) {
  const going = isMesh()
    ? nodesNow(node).filter((each) => !GONE.has(each.state)).flatMap((each) => each.transfers.map((transfer) => ({ at: each.node, to: each.name, transfer })))
    : (node.transfers ?? []).map((transfer) => ({ at: node.node, to: null, transfer }));
  byId("transfers-section").hidden = going.length === 0;
  keyed(byId("transfers"), going, ({ at, transfer }) => `${at} ${transfer.model} ${transfer.variant}`, transferRow);
}
