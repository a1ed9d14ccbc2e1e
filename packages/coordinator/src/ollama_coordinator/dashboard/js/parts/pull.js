/** The dialog of a pull: which machines, what they have room for, and how large the model is. */

import { call } from "../api.js";
import { h, setText } from "../dom.js";
import { bytes, memory, model as short } from "../format.js";
import { store } from "../store.js";
import { openDialog } from "./dialog.js";
import { poolOf } from "./memory.js";
import { act } from "./toast.js";

/** A runner needs its weights, and about so much more with a small context. */
const RUNNER_FACTOR = 1.15;
const RULES = [["", "As the coordinator is set"], ["fitting", "Every machine that can hold it"], ["all", "Every machine"], ["1", "One, with the most free disk"], ["2", "Two"], ["3", "Three"], ["these", "These:"]];

/**
 * Whether a model of a size fits on an agent: on its disk, and into which memory. Facts that an agent
 * does not report are left out.
 * @param {number | undefined} size bytes on disk
 * @returns {{fits: boolean, text: string}}
 */
export function fit(agent, size) {
  const free = agent.disk_free_bytes;
  const pool = poolOf(agent);
  const facts = [free !== undefined && `${bytes(free)} of disk free`, pool && `${memory(pool.total)} ${agent.gpus.some((gpu) => gpu.memory_total_bytes) ? "GPU memory" : "memory"}`];
  if (!size) return { fits: true, text: facts.filter(Boolean).join(" · ") };
  const room = free === undefined || free > size;
  const runs = !pool || pool.total > size * RUNNER_FACTOR;
  facts.unshift(room ? (runs ? "fits" : "larger than its memory") : "no room on its disk");
  return { fits: room && runs, text: facts.filter(Boolean).join(" · ") };
}

/**
 * Ask what to pull onto which machines, and start it.
 * @param {any[]} models the rows of `/api/models`
 * @param {string} [name] the model, where it is known
 * @param {string} [agent] the id of the machine that is chosen at first
 */
export function openPull(models, name = "", agent = "") {
  const copies = Boolean(name) && !agent;
  const known = new Map(models.map((row) => [short(row.name), row]));
  const input = h("input", { type: "text", value: short(name), required: true, autocomplete: "off", placeholder: "llama3.2", list: "known-models", oninput: () => draw() });
  const rule = h("select", { onchange: () => draw() }, RULES.map(([value, label]) => h("option", { value, selected: value === (agent ? "these" : name ? "all" : "") }, label)));
  const given = models.find((row) => short(row.name) === short(name) && name);
  const origins = [["", "The internet, once for all"], ["fleet", "Machines that have it"], ...(given?.holders ?? []).map((id) => [id, store.state.agents[id]?.name ?? id])];
  const origin = h("select", null, origins.map(([value, label]) => h("option", { value, selected: value === (copies ? "fleet" : "") }, label)));
  const labels = [...new Set(Object.values(store.state.agents).flatMap((one) => one.labels))].sort();
  rule.append(...labels.map((label) => h("option", { value: `label:${label}` }, `Those labelled ${label}`)));
  const size = h("p.muted.small", { role: "status" });
  const agents = Object.values(store.state.agents).sort((a, b) => a.name.localeCompare(b.name, undefined, { numeric: true }));
  const rows = agents.map((one) => {
    const box = h("input", { type: "checkbox", checked: one.id === agent, onchange: () => { rule.value = "these"; } });
    const text = h("span.muted.small.end");
    return { one, box, text, element: h("li", null, h("label.row.wrap", null, box, h("span", null, one.name), text)) };
  });
  const draw = () => {
    const row = known.get(short(input.value.trim()));
    const holders = new Set(row?.contents.flatMap((content) => content.holders) ?? []);
    setText(size, row ? `${bytes(row.size)}. ${holders.size} of ${agents.length} machines ${holders.size === 1 ? "has" : "have"} it.` : "How large it is, is known when the pull begins. A machine without room for it says so, and the others go on.");
    for (const { one, text, element } of rows) {
      const { fits, text: facts } = fit(one, row?.size);
      setText(text, [holders.has(one.id) ? "has it" : facts, one.state === "online" ? "" : one.state].filter(Boolean).join(" · "));
      element.classList.toggle("unfit", !fits && !holders.has(one.id));
    }
  };
  const submit = async (event) => {
    event.preventDefault();
    const chosen = rows.filter(({ box }) => box.checked).map(({ one }) => one.id);
    if (rule.value === "these" && !chosen.length) return rows[0]?.box.focus();
    const placement = rule.value === "these" ? `agents:${chosen.join(",")}` : rule.value;
    dialog.close();
    await act(() => call("POST", "/api/operations", { kind: "pull", model: input.value.trim(), ...(placement && { placement }), ...(origin.value && { from: origin.value }) }));
  };
  const dialog = openDialog(copies ? `Copy ${short(name)} to more machines` : "Pull a model", h("form", { onsubmit: submit },
    h("label.field", null, "Name, as in Ollama's library", input), h("datalist", { id: "known-models" }, [...known.keys()].map((value) => h("option", { value }))),
    size, h("label.field", null, "From", origin), h("label.field", null, "Where", rule), h("ul.listed", { "aria-label": "Machines" }, rows.map(({ element }) => element)),
    h("div.actions", null, h("button", { type: "button", onclick: () => dialog.close() }, "Cancel"), h("button.primary", null, copies ? "Copy" : "Pull"))));
  draw();
  (name ? rule : input).focus();
}
