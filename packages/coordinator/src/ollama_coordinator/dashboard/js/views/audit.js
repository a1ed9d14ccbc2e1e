/** Audit: who changed what, from where. */

import { View } from "../view.js";
import { get, path } from "../api.js";
import { h, icon } from "../dom.js";
import { fullTime, time } from "../format.js";
import { empty } from "../parts/bits.js";
import { act } from "../parts/toast.js";

const COLUMNS = ["When", "Who", "From", "What", "About", "Details"];

class AuditView extends View {
  build() {
    this.by = this.query.get("by") ?? "";
    this.pages = [""];
    this.rows = h("tbody");
    this.table = h("div.table-box", null, h("table.stacked", null, h("caption.visually-hidden", null, "Changes"),
      h("thead", null, h("tr", null, COLUMNS.map((text) => h("th", { scope: "col" }, text)))), this.rows));
    this.nothing = h("div");
    this.newer = h("button", { onclick: () => { this.pages.pop(); this.load(); } }, "Newer");
    this.older = h("button", { onclick: () => { this.pages.push(this.next); this.load(); } }, "Older");
    this.files = ["csv", "json"].map((format) => h("a.button", { "data-format": format, download: `audit.${format}` }, icon("down"), format.toUpperCase()));
    const who = h("input.inline-field", { type: "search", "aria-label": "Who", placeholder: "Everybody", value: this.by, onchange: (event) => this.filter(event.target.value.trim()) });
    this.append(this.head("Audit"), h("div.row.wrap.filters", null, who, h("span.row.end", null, this.files)), this.nothing, this.table,
      h("div.row.pager", null, this.newer, this.older));
    this.load();
  }

  filter(by) {
    this.by = by;
    this.pages = [""];
    this.load();
  }

  async load() {
    const turn = (this.turn = (this.turn ?? 0) + 1);
    for (const link of this.files) link.href = path(["api", "audit", "export"], { by: this.by, format: link.dataset.format });
    const page = await act(() => get(path(["api", "audit"], { by: this.by, after: this.pages.at(-1), limit: 50 })));
    if (!page || turn !== this.turn) return;
    this.next = page.next;
    this.newer.disabled = this.pages.length === 1;
    this.older.disabled = !page.next;
    this.rows.replaceChildren(...page.changes.map(changeRow));
    this.table.hidden = !page.changes.length;
    this.nothing.replaceChildren(...(page.changes.length ? [] : [empty("audit", "Nothing was changed yet", h("p", null, "Keys, settings, machines, models, cancelled requests, log-ins: each change is listed here with who made it."))]));
  }
}

function changeRow(change) {
  const details = Object.entries(change.details).filter(([, value]) => value !== "" && value !== null).map(([name, value]) => `${name}=${typeof value === "object" ? JSON.stringify(value) : value}`).join("  ");
  const who = change.key && change.key !== change.by ? `${change.by} (${change.key})` : change.by;
  return h("tr", null, h("td.nowrap", { title: fullTime(change.at) }, time(change.at)), h("th", { scope: "row" }, who), h("td.mono", null, change.address),
    h("td.mono", null, change.action), h("td", null, change.subject), h("td.mono.muted.small", null, details));
}

customElements.define("audit-view", AuditView);
