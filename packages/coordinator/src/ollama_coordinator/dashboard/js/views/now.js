/** Now: every request in flight and waiting, live, and the last that ended. */

import { isUsed, steady, View } from "../view.js";
import { call, path } from "../api.js";
import { h, icon, keyed, setAttr, setText } from "../dom.js";
import { count, fullTime, model, rate, seconds, time } from "../format.js";
import { store } from "../store.js";
import { empty, requestPill } from "../parts/bits.js";
import { confirmed } from "../parts/dialog.js";
import { act } from "../parts/toast.js";
import { openWhy } from "../parts/why.js";

const ORDER = { writing: 0, reading: 1, loading: 2, waiting: 3 };

class NowView extends View {
  build() {
    this.text = (this.query.get("search") ?? "").toLowerCase();
    const search = h("input.inline-field.end", { type: "search", placeholder: "Search model, client, agent", "aria-label": "Search requests", value: this.query.get("search") ?? "", oninput: (event) => { this.text = event.target.value.toLowerCase(); this.remember({ search: event.target.value }); this.draw(); } });
    this.live = h("tbody");
    this.liveTable = table(["Model", "State", "Agent", "Next", "Tokens", "Tokens/s", "Elapsed", "Client", ""], this.live, "Requests in flight and waiting");
    this.more = h("p.muted.small");
    this.over = h("tbody");
    this.overTable = table(["Model", "Result", "Agent", "Waited", "First token", "Tokens", "Tokens/s", "Took", "Client", "Ended"], this.over, "Requests that just ended");
    this.nothing = h("div");
    // What stood still for the pointer goes on when it leaves.
    for (const box of [this.liveTable, this.overTable]) for (const kind of ["pointerleave", "focusout"]) box.addEventListener(kind, () => requestAnimationFrame(() => { if (store.ready && this.isConnected) this.draw(); }));
    this.append(this.head("Now", search), this.nothing, this.liveTable, this.more, h("h2.section", null, "Just finished"), this.overTable);
  }

  changed(changed) {
    if (this.concerns(changed, "requests", "finished")) this.draw();
  }

  draw() {
    const live = Object.values(store.state.requests).filter((one) => this.wanted(one));
    live.sort((a, b) => ORDER[a.state] - ORDER[b.state] || (a.position ?? 0) - (b.position ?? 0) || a.arrived_at.localeCompare(b.arrived_at) || a.id.localeCompare(b.id));
    const over = Object.values(store.state.finished).filter((one) => this.wanted(one));
    over.sort((a, b) => b.finished_at.localeCompare(a.finished_at) || a.id.localeCompare(b.id));
    keyed(this.live, steady(this.live, live, (one) => one.id), (one) => one.id, liveRow);
    if (!isUsed(this.over)) keyed(this.over, over, (one) => one.id, overRow);
    this.liveTable.hidden = !this.live.childElementCount;
    this.overTable.hidden = !over.length;
    this.overTable.previousElementSibling.hidden = !over.length;
    const hidden = store.state.fleet.in_flight + store.state.fleet.waiting - Object.keys(store.state.requests).length;
    setText(this.more, hidden > 0 && !this.text ? `and ${count(hidden)} more` : "");
    this.tellNothing(this.live.childElementCount > 0);
  }

  tellNothing(some) {
    if (some) return this.nothing.replaceChildren();
    if (this.nothing.firstElementChild) return;
    this.nothing.append(empty("now", "Nothing runs and nothing waits", h("p", null, "Requests appear here when they arrive. Try one: "), h("a.button", { href: "#/try" }, "Ask a model")));
  }

  wanted(one) {
    return !this.text || [one.model, one.client, one.agent ?? "", one.state ?? one.status].some((word) => word.toLowerCase().includes(this.text));
  }
}

function table(columns, body, caption) {
  const numeric = new Set(["Tokens", "Tokens/s", "Elapsed", "Waited", "First token", "Took"]);
  return h("div.table-box.requests", null, h("table.stacked", null, h("caption.visually-hidden", null, caption),
    h("thead", null, h("tr", null, columns.map((text) => h(numeric.has(text) ? "th.num" : "th", { scope: "col" }, text || h("span.visually-hidden", null, "Cancel"))))), body));
}

/** A row that opens why it went where it went, by click or Enter. */
function openable(id, ...cells) {
  return h("tr.clickable", { tabindex: "0", onclick: () => openWhy(id), onkeydown: (event) => openByKey(event, id) }, cells);
}

/** Enter opens the panel of a row; prevented, as it would also press the button that gets the focus. */
export function openByKey(event, id) {
  if (event.key !== "Enter" || event.target !== event.currentTarget) return;
  event.preventDefault();
  openWhy(id);
}

function liveRow(request) {
  const name = h("span");
  const state = requestPill();
  const agent = h("td.clip");
  const place = h("td.nowrap");
  const starts = h("oc-since");
  const [tokens, speed] = ["tokens", "tok/s"].map((label) => h("td.num", { "data-label": label }));
  const elapsed = h("oc-since", { at: request.arrived_at });
  const cancel = async (event) => {
    event.stopPropagation();
    const button = event.currentTarget;
    const { client, agent, tokens } = store.state.requests[request.id] ?? request;
    const done = tokens ? ` ${count(tokens)} tokens are lost.` : "";
    if (!await confirmed(`Cancel the request of ${client}?`, `Its client is told that an operator ended it${agent ? `, and ${agent} stops working on it` : ""}.${done}`, "Cancel it")) return;
    button.disabled = true;
    await act(() => call("DELETE", path(["api", "requests", request.id])), "Cancelled");
  };
  const row = openable(request.id, h("td.clip", null, name, h("span.muted.small", null, ` ${request.path}`)), h("td", null, state), agent, place, tokens, speed,
    h("td.num", { "data-label": "for" }, elapsed), h("td.muted.clip", null, request.client),
    h("td.num", null, h("button.ghost.small.danger", { onclick: cancel, "aria-label": `Cancel the request for ${model(request.model)}` }, icon("close"), "Cancel")));
  const line = document.createTextNode("");
  place.append(line, starts);
  row.update = (now) => {
    setText(name, model(now.model));
    state.update(now.state);
    setText(agent, now.agent ?? (now.attempts ? `tried ${now.attempts}` : ""));
    const waiting = now.state === "waiting" && now.position;
    const until = (waiting ? now.starts_at : now.state === "writing" && now.ends_at) || null;
    const late = !waiting && until && Date.parse(until) < store.now();
    const text = now.waits_for ? `waits for ${now.waits_for} to wake` : waiting ? `#${now.position}${until ? ", starts in " : ""}` : late ? "ends later than predicted" : until ? "ends in about " : "";
    if (line.data !== text) line.data = text;
    setAttr(starts, "until", late ? null : until);
    if (!until || late) setText(starts, "");
    row.classList.toggle("gone", Boolean(now.gone));
    row.querySelector("button").hidden = Boolean(now.gone);
    if (now.gone) setText(state, "Ended");
    setText(tokens, now.tokens ? count(now.tokens) : "");
    const span = now.first_byte_at ? (store.now() - Date.parse(now.first_byte_at)) / 1000 : 0;
    setText(speed, now.tokens && span > 0.2 ? rate(now.tokens / span) : "");
  };
  return row;
}

function overRow(request) {
  const status = requestPill();
  status.update(request.status);
  const row = openable(request.id, h("td.clip", null, model(request.model), h("span.muted.small", null, ` ${request.path}`)),
    h("td", { title: request.error ?? "" }, status), h("td.clip", null, request.agent ?? "–"),
    ...[["waited", seconds(request.waited_seconds)], ["first token", seconds(request.first_token_seconds)], ["tokens", count(request.output_tokens)],
      ["tok/s", rate(request.tokens_per_second)], ["took", seconds(request.total_seconds)]].map(([label, text]) => h("td.num", { "data-label": label }, text)),
    h("td.muted.clip", null, request.client), h("td.nowrap.muted", { title: fullTime(request.finished_at) }, time(request.finished_at)));
  return row;
}

customElements.define("now-view", NowView);
