/** Small pieces that several views show. */

import { h, icon, setAttr, setText } from "../dom.js";
import { REQUEST_STATES, STATES, fullTime, time } from "../format.js";
import { store } from "../store.js";
import { UNKNOWN, urlForOthers } from "./address.js";
import { toast } from "./toast.js";

/** A state as a pill with a shape, a colour and a word. */
export function pill(known) {
  const element = h("span.pill");
  element.update = (state) => {
    if (element.dataset.state === state) return;
    element.dataset.state = state;
    const { label, tone, icon: name } = known[state] ?? { label: state, tone: "", icon: "offline" };
    element.className = `pill ${tone}`;
    element.replaceChildren(icon(name), document.createTextNode(label));
  };
  return element;
}

export const agentPill = () => pill(STATES);
export const requestPill = () => pill(REQUEST_STATES);

/** A command to type, with a button that copies it. */
export function command(text) {
  const shown = h("pre", { tabindex: "0" }, text);
  const copy = async () => {
    // Browsers have no clipboard for a page without TLS; the old command still works there.
    getSelection().selectAllChildren(shown);
    const done = navigator.clipboard ? await navigator.clipboard.writeText(text).then(() => true, () => false) : document.execCommand("copy");
    if (done) toast("Copied", "good");
    else toast("The browser does not let this page copy; the text is selected.", "bad");
  };
  return h("div.command", null, shown, h("button", { onclick: copy, "aria-label": "Copy the command" }, icon("copy")));
}

/** The head of a table's column; an empty one is that of buttons. */
export const columnHead = (text) => h("th", { scope: "col" }, text || h("span.visually-hidden", null, "Actions"));

/** What to show where there is nothing yet. */
export function empty(name, title, ...content) {
  return h("div.empty", null, icon(name), h("h2", null, title), ...content);
}

/** What `build` makes of the coordinator's URL, to type on any machine; below it, what is left to do. */
export function withUrl(build) {
  const url = urlForOthers(location, store.state.coordinator.address);
  if (!url.includes(UNKNOWN)) return build(url);
  const hint = `Put an address of the coordinator's machine for ${UNKNOWN}, one on which it listens (COORDINATOR_HOST).`;
  return [...build(url), h("p.muted.small", null, hint)];
}

/** A labelled value for lists of facts; `set` changes it. */
export function fact(label) {
  const value = h("dd");
  const element = h("div.fact", null, h("dt", null, label), value);
  element.set = (text, title) => {
    setText(value, text);
    element.hidden = text === null || text === undefined || text === "";
    if (title) value.title = title;
  };
  return element;
}

/** A link to an agent: its name gives way where there is no room, and not what tells it apart. */
export function agentName(id) {
  const called = h("span.clip");
  const mark = h("span.nowrap");
  const link = h("a.agent-name", { href: `#/agents/${encodeURIComponent(id)}` }, called, mark);
  link.update = (agent) => {
    const name = agent.display_name ?? agent.machine_name;
    setText(called, name);
    setText(mark, agent.name.slice(name.length));
    setAttr(link, "title", agent.name);
  };
  return link;
}

/** A line of an agent's log; with the agent where lines of several are together. */
export function eventRow(event, named = false) {
  const facts = Object.entries(event.facts).map(([key, value]) => `${key}=${value}`).join("  ");
  const agent = named && event.agent_id ? h("a", { href: `#/agents/${encodeURIComponent(event.agent_id)}` }, event.agent || event.agent_id) : null;
  return h("li", { "data-level": event.level }, h("time", { title: fullTime(event.at) }, time(event.at)), agent, h("b", null, event.event), h("span.muted.mono", null, facts));
}

/** Buttons of which one is pressed. */
export function segmented(label, choices, chosen, onchange) {
  const buttons = choices.map(([key, text]) => h("button", { type: "button", "aria-pressed": String(key === chosen), onclick: () => choose(key) }, text));
  const choose = (key) => {
    choices.forEach(([other], index) => buttons[index].setAttribute("aria-pressed", String(other === key)));
    onchange(key);
  };
  return h("div.segmented", { role: "group", "aria-label": label }, buttons);
}
