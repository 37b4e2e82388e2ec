// The status page of a TARS node: joins the connection, the panels and the "try it" box.
import { apiKey, watchNode } from "./connection.js";
import { clock } from "./dom.js";
import { rememberMesh, rememberModels, showMesh, showTransfers } from "./mesh.js";
import { showDevices, showErrors, showMethods, showNode, showNumbers, showReplicas } from "./panels.js";
import { offerModels, showEndpoints } from "./try_it.js";

const byId = (id) => document.getElementById(id);
const main = byId("main");
const notice = byId("notice");
const keyForm = byId("key-form");

function showNotice(text) {
  notice.hidden = !text;
  if (notice.textContent !== text) notice.textContent = text;
  document.body.classList.toggle("stale", Boolean(text));
}

byId("node-name").textContent = location.host;

const connection = watchNode({
  models: rememberModels,
  mesh: rememberMesh,
  description(node) {
    showNotice("");
    keyForm.hidden = true;
    if (main.hidden) {
      main.hidden = false;
      showEndpoints();
    }
    for (const show of [showNode, showNumbers, showMesh, showDevices, showTransfers, showReplicas, showMethods, showErrors, offerModels]) show(node);
  },
  unreachable(since, reason) {
    showNotice(`Node unreachable since ${clock(since)}${reason ? `: ${reason}` : ""}. Trying again.`);
  },
  keyNeeded(wrong) {
    showNotice("");
    apiKey.forget();
    main.hidden = true;
    keyForm.hidden = false;
    byId("key-error").hidden = !wrong;
    byId("key-error").textContent = wrong ? "This node does not know that key." : "";
    byId("key-input").focus();
  },
});

keyForm.addEventListener("submit", (event) => {
  event.preventDefault();
  apiKey.set(byId("key-input").value.trim());
  byId("key-input").value = "";
  connection.restart();
});
