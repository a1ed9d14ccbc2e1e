/** Attention: what needs a person, the worst first, and the events of all agents. */

import { View } from "../view.js";
import { get } from "../api.js";
import { h, keyed, setAttr, setText } from "../dom.js";
import { model } from "../format.js";
import { store } from "../store.js";
import { empty, eventRow, segmented } from "../parts/bits.js";

const REFRESH_MS = 5000;
const ORDER = ["critical", "warning", "note"];

class AttentionView extends View {
  build() {
    this.nothing = h("div");
    this.list = h("ul.concerns", { "aria-label": "What needs attention" });
    this.events = h("ol.events");
    this.source = this.query.get("log") === "all" ? "all" : "";
    const choose = segmented("Events", [["", "Of the machines"], ["all", "The coordinator's whole log"]], this.source, (source) => {
      this.source = source;
      this.remember({ log: source });
      this.load();
    });
    this.append(this.head("Attention"), this.nothing, this.list, h("div.row.wrap.section", null, h("h2", null, "Events"), choose), this.events);
    const timer = setInterval(() => { if (!document.hidden) this.load(); }, REFRESH_MS);
    this.stopping.signal.addEventListener("abort", () => clearInterval(timer));
    this.load();
  }

  changed(changed) {
    if (!this.concerns(changed, "attention")) return;
    const open = Object.values(store.state.attention ?? {});
    open.sort((a, b) => ORDER.indexOf(a.severity) - ORDER.indexOf(b.severity) || a.since.localeCompare(b.since) || a.id.localeCompare(b.id));
    keyed(this.list, open, (one) => one.id, concernRow);
    this.nothing.replaceChildren(...(open.length ? [] : [empty("check", "Nothing needs attention")]));
  }

  async load() {
    const source = this.source;
    try {
      const { events } = await get(source ? "/api/log" : "/api/events");
      if (source !== this.source) return;
      this.events.replaceChildren(...(events.length ? events.map((event) => eventRow(event, true)) : [h("li.muted", null, "Nothing was logged since the coordinator started.")]));
    } catch (error) {
      // Where the coordinator is away the stream says so; the whole log may need another right.
      if (source) this.events.replaceChildren(h("li.muted", null, error.message));
    }
  }
}

function concernRow(concern) {
  const severity = h("b.small");
  const agent = concern.agent_id && h("a", { href: `#/agents/${encodeURIComponent(concern.agent_id)}` }, concern.subject);
  const about = concern.model && h("a", { href: `#/models/${encodeURIComponent(concern.model)}` }, model(concern.model));
  const subject = h("span", null, agent && about ? [agent, " · ", about] : agent || about || h("b", null, concern.subject));
  const text = h("p");
  const row = h("li.card", null, severity, subject, h("span.muted.small.nowrap", null, "for ", h("oc-since", { at: concern.since })), text);
  row.update = (now) => {
    setAttr(row, "data-severity", now.severity);
    setText(severity, now.severity);
    setText(text, now.text);
  };
  return row;
}

customElements.define("attention-view", AttentionView);
