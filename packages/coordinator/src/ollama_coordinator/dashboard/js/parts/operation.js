/** A model operation with its progress on each agent. */

import { call, path } from "../api.js";
import { h, icon, keyed, setAttr, setText } from "../dom.js";
import { bytes, model } from "../format.js";
import { pill } from "./bits.js";
import { act } from "./toast.js";

const STATES = {
  waiting: { label: "Waiting", tone: "warn", icon: "history" },
  running: { label: "Running", tone: "accent", icon: "down" },
  done: { label: "Done", tone: "good", icon: "check" },
  failed: { label: "Failed", tone: "bad", icon: "close" },
  pending: { label: "When it returns", tone: "warn", icon: "history" },
  cancelled: { label: "Cancelled", tone: "", icon: "stop" },
};
const VERBS = { pull: "Pull", push: "Push", create: "Create", copy: "Copy", delete: "Delete", load: "Load", unload: "Unload" };

/** Whether it is over and worked on some agents only. */
export const isPartial = (operation) => operation.state === "done" && operation.targets.some((target) => target.state !== "done");

export function operationCard(operation) {
  const state = pill(STATES);
  const since = h("oc-since.muted.small", { at: operation.started_at });
  const cancel = h("button.ghost.small.danger", { onclick: () => act(() => call("DELETE", path(["api", "operations", operation.id]))) }, icon("close"), "Cancel");
  const error = h("p.small.reason", { hidden: true });
  const targets = h("ul.targets");
  const card = h("article.card.operation", { "aria-label": `${VERBS[operation.kind]} ${operation.model}` },
    h("header", null, h("b.clip", null, `${VERBS[operation.kind] ?? operation.kind} ${model(operation.model)}`), state, since, h("span.end", null, cancel)), error, targets);
  card.update = (now) => {
    state.update(now.state);
    const over = !["waiting", "running"].includes(now.state);
    cancel.hidden = over;
    since.hidden = over;
    error.hidden = !now.error;
    setText(error, now.error);
    card.classList.toggle("over", over);
    const shown = over ? now.targets.filter((target) => target.state !== "done") : now.targets;
    targets.hidden = !shown.length;
    keyed(targets, shown, (target) => target.agent_id, targetRow);
  };
  return card;
}

function targetRow(target) {
  const state = pill(STATES);
  const text = h("span.muted.small.grow.clip");
  const amount = h("span.small.nowrap");
  const bar = h("progress", { max: "1", "aria-label": `Progress on ${target.agent}` });
  const element = h("li", null, h("div.row", null, h("span.clip.target-name", null, target.agent), state, text, amount), bar);
  element.update = (now) => {
    state.update(now.state);
    setText(text, now.error ?? now.status);
    setAttr(text, "title", now.error ?? now.status);
    setText(amount, now.total ? `${bytes(now.completed)} of ${bytes(now.total)}` : "");
    bar.hidden = now.state !== "running";
    if (now.total) bar.value = now.completed / now.total;
    else bar.removeAttribute("value");
  };
  return element;
}
