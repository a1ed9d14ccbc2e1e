/** History: charts over time, and every finished request with filters, pages and export. */

import { View } from "../view.js";
import { get, path } from "../api.js";
import { h, icon } from "../dom.js";
import { count, fullTime, model, rate, seconds, time } from "../format.js";
import { empty, requestPill, segmented } from "../parts/bits.js";
import { charts } from "../parts/charts.js";
import { openWhy } from "../parts/why.js";
import { act } from "../parts/toast.js";
import { openByKey } from "./now.js";

/** The columns of `historyRow`. */
export const HISTORY_COLUMNS = [["Ended"], ["Model"], ["Result"], ["Agent"], ["Client"], ["Waited", "num"], ["First token", "num"], ["Prompt", "num"], ["Tokens", "num"], ["Tokens/s", "num"], ["Took", "num"]];
const STATUSES = [["", "Every result"], ["served", "Served"], ["failed", "Failed"], ["cancelled", "Cancelled"], ["refused", "Refused"]];

class HistoryView extends View {
  build() {
    this.filters = {};
    for (const name of ["model", "agent", "client", "status", "since", "until"]) this.filters[name] = this.query.get(name) ?? "";
    this.pages = [""];
    this.form = h("div.row.wrap.filters");
    this.body = h("tbody");
    this.table = h("div.table-box", null, h("table.stacked.finished", null, h("caption.visually-hidden", null, "Finished requests"),
      h("thead", null, h("tr", null, HISTORY_COLUMNS.map(([text, kind]) => h(kind ? `th.${kind}` : "th", { scope: "col" }, text)))), this.body));
    this.nothing = h("div");
    this.newer = h("button", { onclick: () => { this.pages.pop(); this.load(); } }, "Newer");
    this.older = h("button", { onclick: () => { this.pages.push(this.next); this.load(); } }, "Older");
    const list = h("section", { "aria-label": "Finished requests" }, this.form, this.nothing, this.table,
      h("div.row.pager", null, this.newer, this.older, h("button.ghost.end", { onclick: () => this.first() }, "Newest")));
    this.parts = { list, charts: null };
    const shown = this.query.get("show") === "charts" ? "charts" : "list";
    this.append(this.head("History", h("div.end", null, segmented("Show", [["list", "Requests"], ["charts", "Charts"]], shown, (name) => this.show(name)))), list);
    this.show(shown);
    this.fillFilters();
    this.load();
  }

  /** One of the two parts; the charts are made when they are first wanted. */
  show(name) {
    if (name === "charts" && !this.parts.charts) this.append((this.parts.charts = charts(this.stopping.signal)));
    for (const [key, part] of Object.entries(this.parts)) if (part) part.hidden = key !== name;
    this.remember({ show: name === "charts" ? name : "" });
  }

  async fillFilters() {
    const choices = (await act(() => get("/api/history/choices"))) ?? { model: [], agent: [], client: [] };
    const select = (name, every, values, label = (value) => value) =>
      h("select.inline-field", { "aria-label": every, onchange: (event) => this.filter(name, event.target.value) },
        h("option", { value: "" }, every), withChosen(values, this.filters[name]).map((value) => h("option", { value, selected: value === this.filters[name] }, label(value))));
    const when = (name, label) => h("label.row.small.muted", null, label, h("input.inline-field", { type: "datetime-local", value: local(this.filters[name]), onchange: (event) => this.filter(name, event.target.value ? new Date(event.target.value).toISOString() : "") }));
    this.form.replaceChildren(select("model", "Every model", choices.model, model), select("agent", "Every agent", choices.agent), select("client", "Every client", choices.client),
      h("select.inline-field", { "aria-label": "Result", onchange: (event) => this.filter("status", event.target.value) }, STATUSES.map(([value, label]) => h("option", { value, selected: value === this.filters.status }, label))),
      h("span.row.wrap", null, when("since", "From"), when("until", "to")), h("span.row.end", null, this.exportLink("csv"), this.exportLink("json")));
    this.setLinks();
  }

  exportLink(format) {
    return h("a.button", { "data-format": format, download: `requests.${format}` }, icon("down"), format.toUpperCase());
  }

  setLinks() {
    for (const link of this.form.querySelectorAll("a[data-format]")) {
      link.href = path(["api", "history", "export"], { ...this.filters, format: link.dataset.format });
    }
  }

  filter(name, value) {
    this.filters[name] = value;
    this.remember({ [name]: value });
    this.setLinks();
    this.first();
  }

  first() {
    this.pages = [""];
    this.load();
  }

  async load() {
    const turn = (this.turn = (this.turn ?? 0) + 1);
    const query = { ...this.filters, after: this.pages.at(-1), limit: 50 };
    const page = await act(() => get(path(["api", "history"], query)));
    if (!page || turn !== this.turn) return;
    this.next = page.next;
    this.newer.disabled = this.pages.length === 1;
    this.older.disabled = !page.next;
    this.body.replaceChildren(...page.requests.map(historyRow));
    this.table.hidden = !page.requests.length;
    const filtered = Object.values(this.filters).some(Boolean);
    this.nothing.replaceChildren(...(page.requests.length ? [] : [empty("history", filtered ? "No request matches" : "Nothing has finished yet", h("p", null, filtered ? "Change or clear a filter." : "Every request is listed here when it ends. Texts of requests and answers are never kept."))]));
  }
}

/** A time as `datetime-local` takes it, in the viewer's zone. */
function local(iso) {
  const at = new Date(iso);
  if (Number.isNaN(at.getTime())) return "";
  return new Date(at.getTime() - at.getTimezoneOffset() * 60_000).toISOString().slice(0, 16);
}

function withChosen(values, chosen) {
  return chosen && !values.includes(chosen) ? [chosen, ...values] : values;
}

/** One finished request; opens its reasons. */
export function historyRow(request) {
  const status = requestPill();
  status.update(request.status);
  const open = () => openWhy(request.id);
  return h("tr.clickable", { tabindex: "0", onclick: open, onkeydown: (event) => openByKey(event, request.id) },
    h("td.nowrap", { title: fullTime(request.finished_at) }, time(request.finished_at)), h("td.clip", null, model(request.model), h("span.muted.small", null, ` ${request.path}`)),
    h("td", { title: request.error }, status), h("td.clip", { "data-label": request.agent ? null : "agent" }, request.agent ?? "–"), h("td.muted.clip", null, request.client),
    [["waited", seconds(request.waited_seconds)], ["first token", seconds(request.first_token_seconds)], ["prompt", count(request.prompt_tokens)], ["tokens", count(request.output_tokens)],
      ["tok/s", rate(request.tokens_per_second)], ["took", seconds(request.total_seconds)]].map(([label, text]) => h("td.num", { "data-label": label }, text)));
}

customElements.define("history-view", HistoryView);
