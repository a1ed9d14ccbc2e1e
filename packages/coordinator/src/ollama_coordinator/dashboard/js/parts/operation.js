/** A model operation with its progress on each agent. */

import { call, path } from "../api.js";
import { h, icon, keyed, setAttr, setText } from "../dom.js";
import { bytes, coarse, model } from "../format.js";
import { pill } from "./bits.js";
import { confirmed } from "./dialog.js";
import { act } from "./toast.js";
import { store } from "../store.js";

const RATE_MEMORY_SECONDS = 5;

const STATES = {
  waiting: { label: "Waiting", tone: "warn", icon: "history" },
  running: { label: "Running", tone: "accent", icon: "down" },
  done: { label: "Done", tone: "good", icon: "check" },
  partial: { label: "Done in part", tone: "warn", icon: "resting" },
  failed: { label: "Failed", tone: "bad", icon: "close" },
  pending: { label: "When it returns", tone: "warn", icon: "history" },
  "left out": { label: "Left out", tone: "warn", icon: "resting" },
  cancelled: { label: "Cancelled", tone: "", icon: "stop" },
};
const VERBS = { pull: "Pull", push: "Push", create: "Create", copy: "Copy", delete: "Delete", load: "Load", unload: "Unload" };

/** Operations that were put away in this browser; the coordinator forgets them by itself. */
const putAway = new Set(JSON.parse(sessionStorage.getItem("put-away") ?? "[]"));
export const isPutAway = (operation) => putAway.has(operation.id);

/** Whether it is over and worked on some agents only. */
export const isPartial = (operation) => operation.state === "done" && operation.targets.some((target) => target.state !== "done");

export function operationCard(operation) {
  const state = pill(STATES);
  const since = h("span.muted.small.nowrap", null, "for ", h("oc-since", { at: operation.started_at }));
  const name = `${(VERBS[operation.kind] ?? operation.kind).toLowerCase()} of ${model(operation.model)}`;
  const cancel = h("button.ghost.small.danger", { onclick: async () => {
    if (await confirmed(`Cancel the ${name}?`, "It ends on every machine. What was fetched stays for the next time.", "Cancel it")) act(() => call("DELETE", path(["api", "operations", operation.id])));
  } }, icon("close"), "Cancel");
  const again = h("button.ghost.small", { onclick: () => retry(card.row) }, "Try again");
  const away = h("button.ghost.small", { onclick: () => {
    putAway.add(operation.id);
    sessionStorage.setItem("put-away", JSON.stringify([...putAway].slice(-200)));
    card.remove();
  } }, "Dismiss");
  const error = h("p.small.reason", { hidden: true });
  const targets = h("ul.targets");
  const card = h("article.card.operation", { "aria-label": `${VERBS[operation.kind]} ${operation.model}` },
    h("header", null, h("b.clip", null, `${VERBS[operation.kind] ?? operation.kind} ${model(operation.model)}`), state, since, h("span.row.end", null, again, away, cancel)), error, targets);
  card.update = (now) => {
    card.row = now;
    state.update(isPartial(now) ? "partial" : now.state);
    const over = !["waiting", "running"].includes(now.state);
    cancel.hidden = over;
    since.hidden = over;
    const shown = over ? alike(now.targets.filter((target) => target.state !== "done")) : now.targets;
    const said = shown.some((target) => target.error && now.error?.includes(target.error));
    error.hidden = !now.error || said;
    setText(error, now.error);
    again.hidden = !RETRIED.has(now.kind) || !now.targets.some((target) => FAILED.has(target.state)) || !over;
    away.hidden = !over;
    card.classList.toggle("over", over);
    targets.hidden = !shown.length;
    keyed(targets, shown, (target) => target.agent_id, targetRow);
  };
  return card;
}

const RETRIED = new Set(["pull", "load", "unload", "delete"]);
const FAILED = new Set(["failed", "cancelled"]);

/** The same once more, on the agents on which it failed. */
function retry({ kind, model: name, targets }) {
  const failed = targets.filter((target) => FAILED.has(target.state)).map((target) => target.agent_id);
  const where = kind === "pull" || kind === "load" ? { placement: `agents:${failed.join(",")}` } : {};
  return act(() => call("POST", "/api/operations", { kind, model: name, ...where }));
}

/** Targets that ended with the same words as one of them, with all their names. */
function alike(targets) {
  const groups = new Map();
  for (const target of targets) {
    const key = `${target.state} ${target.error ?? target.status}`;
    groups.set(key, [...(groups.get(key) ?? []), target]);
  }
  return [...groups.values()].map((group) => (group.length === 1 ? group[0]
    : { ...group[0], agent: `${group.length} machines`, names: group.map((one) => one.agent).join(", "), total: 0 }));
}

/** Bytes a second, of what came lately; null until it is known. */
function speedometer() {
  let before = null;
  let speed = null;
  return (completed) => {
    const at = store.now() / 1000;
    if (before && at - before.at < 0.5) return speed;
    if (before && completed >= before.completed) {
      const share = Math.min(1, (at - before.at) / RATE_MEMORY_SECONDS);
      const now = (completed - before.completed) / (at - before.at);
      speed = speed === null ? now : speed + share * (now - speed);
    }
    before = { at, completed };
    return speed;
  };
}

function targetRow(target) {
  const speedOf = speedometer();
  const names = h("p.muted.small", { hidden: true });
  const state = pill(STATES);
  const text = h("span.muted.small.grow.clip");
  const amount = h("span.small.nowrap");
  const bar = h("progress", { max: "1", "aria-label": `Progress on ${target.agent}` });
  const element = h("li", null, h("div.row", null, h("span.clip.target-name", null, target.agent), state, text, amount), names, bar);
  element.update = (now) => {
    state.update(now.state);
    setText(text, now.error ?? now.status);
    setAttr(text, "title", now.error ?? now.status);
    names.hidden = !now.names;
    setText(names, now.names);
    const runs = now.state === "running" && now.total > 0;
    const speed = runs ? speedOf(now.completed) : null;
    const left = speed > 0 && now.completed < now.total ? `${bytes(speed)}/s, ${coarse((now.total - now.completed) / speed)} left` : "";
    setText(amount, [now.total ? `${bytes(now.completed)} of ${bytes(now.total)}` : "", left].filter(Boolean).join(" · "));
    bar.hidden = now.state !== "running";
    if (now.total) bar.value = now.completed / now.total;
    else bar.removeAttribute("value");
  };
  return element;
}
