/** What an operator does to an agent: drain, resume, rename, label, note, restart, remove. */

import { call, path } from "../api.js";
import { h, icon } from "../dom.js";
import { store } from "../store.js";
import { asked, confirmed } from "./dialog.js";
import { act } from "./toast.js";

const address = (id) => path(["api", "agents", id]);
const change = (id, patch, done) => act(() => call("PATCH", address(id), patch), done);

/** What draining or resuming is called for an agent. */
export const drainVerb = (agent) => (agent.state === "paused" ? "Serve anyway" : agent.status === "draining" ? "Resume" : "Drain");

export function drain(agent) {
  const draining = agent.state !== "draining" && agent.status !== "draining";
  return change(agent.id, { draining, overruled: !draining && Boolean(agent.paused) }, draining ? `${agent.name} gets no new requests` : `${agent.name} serves again`);
}

export async function restart(agent) {
  const sure = await confirmed(`Restart the Ollama of ${agent.name}?`, "Its models leave its memory. It is restarted only if nothing runs there, and gets requests again once it answers.", "Restart");
  if (!sure) return null;
  return act(() => call("POST", `${address(agent.id)}/restart`), `${agent.name} restarts its Ollama at its next heartbeat`);
}

export const canWake = (agent) => agent.status === "offline" && Boolean(agent.mac);

export function wake(agent) {
  return act(() => call("POST", path(["api", "agents", agent.id, "wake"])), `${agent.name} was sent a magic packet`);
}

export async function edit(agent) {
  const byHand = agent.by_hand ?? {};
  const values = await asked(`Edit ${agent.name}`, [
    { name: "display_name", label: "Display name (empty: the machine's own)", value: agent.display_name ?? "", placeholder: agent.machine_name },
    { name: "labels", label: "Labels, separated by commas", value: agent.labels.join(", ") },
    { name: "notes", label: "Notes", value: agent.notes, kind: "textarea" },
    { name: "preference", label: "Preference: 2 counts as twice as fast, 0.5 as half", value: String(agent.preference ?? 1) },
    { name: "backup_seconds", label: "Backup: taken only if all others would take so many seconds longer (0: as the others)", value: String(agent.backup_seconds ?? 0) },
    { name: "slots", label: "Slots: requests that a model runs at once (empty: as its agent reports, or as found)", value: String(byHand.slots ?? "") },
    { name: "memory", label: "Memory for models in GiB (empty: as its agent reports)", value: byHand.memory_bytes ? String(Math.round((byHand.memory_bytes / 2 ** 30) * 100) / 100) : "" },
    { name: "gpu", label: "GPU: its name, or none (empty: as its agent reports)", value: byHand.gpu ?? "" },
  ]);
  if (!values) return null;
  const labels = [...new Set(values.labels.split(",").map((label) => label.trim()).filter(Boolean))];
  const preference = Number(values.preference);
  const patch = { display_name: values.display_name.trim() || null, labels, notes: values.notes };
  if (preference > 0) patch.preference = preference;
  const backup = Number(values.backup_seconds);
  if (backup >= 0) patch.backup_seconds = backup;
  patch.slots = Number(values.slots) || null;
  patch.memory_bytes = Math.round(Number(values.memory) * 2 ** 30) || null;
  patch.gpu = values.gpu.trim() || null;
  return change(agent.id, patch, "Saved");
}

export async function remove(agent) {
  const sure = await confirmed(`Remove ${agent.name}?`, "The coordinator forgets it and its settings. Its running requests go on. If its agent still runs, it registers again within seconds.", "Remove");
  if (!sure) return null;
  return act(() => call("DELETE", address(agent.id)), `${agent.name} removed`);
}

/** A menu button for an agent that is looked up when it opens. */
export function agentMenu(id) {
  const button = h("button.small.end.dots-button", { "aria-label": "Actions", title: "Drain, edit, restart, remove", "aria-haspopup": "menu", onclick: (event) => { event.stopPropagation(); open(button, id); } }, icon("more"));
  return button;
}

function open(button, id) {
  const agent = store.state.agents[id];
  if (!agent || document.querySelector(".menu")) return;
  const entries = [
    ...(canWake(agent) ? [["Wake", wake]] : []),
    [drainVerb(agent), drain],
    ["Edit name, labels, machine", edit],
    ...(agent.owned ? [["Restart its Ollama", restart]] : []),
    ["Remove", remove],
  ];
  const menu = h("div.menu", { role: "menu" }, entries.map(([label, action]) =>
    h(action === remove ? "button.ghost.danger" : "button.ghost", { role: "menuitem", onclick: () => { close(); action(agent); } }, label)));
  const close = () => { menu.remove(); removeEventListener("pointerdown", outside, true); button.focus(); };
  const outside = (event) => { if (!menu.contains(event.target)) close(); };
  menu.addEventListener("keydown", (event) => walk(event, menu, close));
  const place = button.getBoundingClientRect();
  menu.style.setProperty("top", `${Math.min(place.bottom + 4, innerHeight - 140)}px`);
  menu.style.setProperty("right", `${Math.max(8, innerWidth - place.right)}px`);
  document.body.append(menu);
  menu.firstElementChild.focus();
  addEventListener("pointerdown", outside, true);
}

function walk(event, menu, close) {
  const items = [...menu.children];
  const at = items.indexOf(document.activeElement);
  if (event.key === "Escape" || event.key === "Tab") { event.preventDefault(); close(); }
  else if (event.key === "ArrowDown") { event.preventDefault(); items[(at + 1) % items.length].focus(); }
  else if (event.key === "ArrowUp") { event.preventDefault(); items[(at + items.length - 1) % items.length].focus(); }
}
