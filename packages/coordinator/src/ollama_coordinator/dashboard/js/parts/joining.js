/** Adding a machine: the lines that do it, the machines that ask for it, and those that have come. */

import { call, get, path } from "../api.js";
import { h, icon, keyed, setText } from "../dom.js";
import { store } from "../store.js";
import { agentPill, columnHead, command, withUrl } from "./bits.js";
import { openDialog } from "./dialog.js";
import { act } from "./toast.js";

const LINES = [
  ["Linux, macOS", (url, token, pin) => `${curl(url, pin)}/join | ${token && `AGENT_JOIN_TOKEN=${token} `}sh`],
  ["Windows, in PowerShell", (url, token, pin) => `${token && `$env:AGENT_JOIN_TOKEN='${token}'; `}${pin ? `${curl(url, pin, ".exe")}/join?shell=powershell | Out-String` : `irm ${url}/join`} | iex`],
];
/** `pin` is of the public key of a certificate that the coordinator has made. */
const curl = (url, pin, ending = "") => `curl${ending} -fsSL${pin ? `k --pinnedpubkey '${pin}'` : ""} ${url}`;
const DAY_MS = 86_400_000;

/** The join token that this page has made; a page makes one for all machines. */
let made = null;

async function makeToken() {
  const wanted = { name: `join-${crypto.getRandomValues(new Uint16Array(1))[0].toString(16)}`, rights: ["join"], expires_at: new Date(Date.now() + DAY_MS).toISOString() };
  const key = await act(() => call("POST", "/api/keys", wanted));
  if (key) made = { token: key.join_token, name: key.name, until: key.expires_at };
}

/** The lines that add a machine; with a join token once there is one. `update` draws them anew. */
export function joinLines() {
  const lines = h("div.join-lines");
  const about = h("p.muted.small");
  const make = h("button.small", { type: "button", onclick: async () => { await makeToken(); element.update(); } }, "Make a join token");
  const element = h("div.joining", null, lines, h("div.row.wrap", null, make, about));
  element.update = () => {
    const token = made && Date.parse(made.until) > Date.now() ? made.token : "";
    lines.replaceChildren(...withUrl((url) => LINES.flatMap(([system, line]) => [h("h3.small", null, system), command(line(url, token, store.state.coordinator.pin))])));
    make.hidden = Boolean(token);
    setText(about, token
      ? `The join token '${made.name}' is for any number of machines until ${new Date(made.until).toLocaleString()}. Keys can revoke it.`
      : "A machine of another network needs one. Where keys are asked for, a machine without one asks, and is admitted here.");
  };
  element.update();
  return element;
}

/** Add a machine: open a dialog with the lines, which shows the machine as soon as it is there. */
export async function openJoining() {
  const lines = joinLines();
  let before = null;
  const waiting = h("p.row.muted", { role: "status" }, h("span.pulse", null, icon("online")), "Waiting for the machine…");
  const come = h("ul.come", { "aria-label": "Machines that have joined" });
  const asking = joinRequests();
  const dialog = openDialog("Add a machine", h("div.stack", null,
    h("p", null, "Run one line on a machine that has Ollama. It needs Python 3.11 or uv, and no open port. ", h("a", { href: "join", target: "_blank" }, "What it does")),
    lines, urlForm(), asking, waiting, come));
  const draw = () => {
    if (!store.ready) return;
    const there = Object.values(store.state.agents).filter((agent) => agent.state !== "offline");
    before ??= new Set(there.map((agent) => agent.id));
    const joined = there.filter((agent) => !before.has(agent.id));
    keyed(come, joined, (agent) => agent.id, joinedRow);
    waiting.hidden = joined.length > 0;
    asking.update();
  };
  const stop = store.subscribe(draw);
  dialog.addEventListener("close", stop);
  // A link in the dialog leads to a view behind it.
  dialog.addEventListener("click", (event) => { if (event.target.closest?.("a[href^='#']")) dialog.close(); });
  draw();
  const session = await get("/api/session").catch(() => null);
  if (session?.join_token_needed && session.rights.includes("operate") && !made) {
    await makeToken();
    lines.update();
  }
}

/** Ollamas without an agent, each by its URL; those that were added leave the list. */
function urlForm() {
  const urls = h("textarea", { rows: 2, required: true, placeholder: "https://gateway.example/ollama", spellcheck: "false" });
  const key = h("input", { type: "password", autocomplete: "off" });
  const add = h("button.primary", null, "Add");
  const problems = h("ul.problems", { role: "alert" });
  const submit = async (event) => {
    event.preventDefault();
    add.disabled = true;
    problems.replaceChildren();
    const left = [];
    for (const url of urls.value.split(/\s+/).filter(Boolean)) {
      try {
        await call("POST", "/api/agents", { url, api_key: key.value });
      } catch (error) {
        left.push(url);
        problems.append(h("li", null, error.message));
      }
    }
    urls.value = left.join("\n");
    if (!left.length) key.value = "";
    add.disabled = false;
  };
  return h("details", null, h("summary", null, "An Ollama without an agent"),
    h("form", { onsubmit: submit }, h("label.field", null, "Its URL; one on each line", urls), h("label.field", null, "API key, if they ask for one", key), problems,
      h("div.actions", null, add)));
}

function joinedRow(agent) {
  const name = h("a.agent-name.clip", { href: `#/agents/${encodeURIComponent(agent.id)}` });
  const state = agentPill();
  const row = h("li.row", null, name, state);
  row.update = (now) => { setText(name, now.name); state.update(now.state); };
  return row;
}

/** The machines that want to join, as long as the list of what needs a person has one. */
export function joinRequests() {
  const element = h("div");
  let known = "";
  element.update = async () => {
    const ids = Object.values(store.state.attention ?? {}).filter((one) => one.kind === "join").map((one) => one.id).sort().join();
    if (ids === known) return;
    known = ids;
    const answer = ids ? await act(() => get("/api/join-requests")) : null;
    const rows = (answer?.join_requests ?? []).map(requestRow);
    element.replaceChildren(...(rows.length ? [h("div.table-box", null, h("table.stacked", null, h("caption", null, "Machines that want to join"),
      h("thead", null, h("tr", null, ["Machine", "From", "Fingerprint", "Since", ""].map(columnHead))), h("tbody", null, rows)))] : []));
  };
  return element;
}

function requestRow(one) {
  const answer = async (method, said) => {
    if (await act(() => call(method, path(["api", "join-requests", one.id])), said)) row.remove();
  };
  const row = h("tr", { "data-join": one.id }, h("th", { scope: "row" }, one.machine_name), h("td", null, one.address), h("td.mono", null, one.fingerprint),
    h("td", null, new Date(one.asked_at).toLocaleString()),
    h("td", null, h("div.row", null, h("button.small.primary", { onclick: () => answer("POST", "Admitted: it joins within seconds") }, "Admit"),
      h("button.small.danger", { onclick: () => answer("DELETE", "Refused") }, "Refuse"))));
  return row;
}
