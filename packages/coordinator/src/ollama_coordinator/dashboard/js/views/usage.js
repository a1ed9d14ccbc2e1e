/** Usage: what people, keys and models took, day by day and in sum. */

import { View } from "../view.js";
import { get, path } from "../api.js";
import { h, icon } from "../dom.js";
import { count, model, seconds } from "../format.js";
import { empty, segmented } from "../parts/bits.js";
import { chart } from "../parts/chart.js";
import { act } from "../parts/toast.js";

const KINDS = [["person", "People"], ["key", "Keys"], ["model", "Models"]];
const SPANS = [[7, "7 d"], [30, "30 d"], [90, "90 d"]];
const DAY_MS = 86_400_000;
const NAMELESS = { person: "not kept", key: "without a key", model: "others" };

const CHARTS = [
  { title: "Tokens a day", unit: count, series: [{ label: "written", field: "output_tokens", tone: "var(--series-0)", fill: true }, { label: "read", field: "prompt_tokens", tone: "var(--series-1)", dash: true }] },
  { title: "Requests a day", unit: count, series: [{ label: "requests", field: "requests", tone: "var(--series-0)", fill: true }] },
  { title: "GPU time a day", unit: seconds, series: [{ label: "machines' time", field: "gpu_seconds", tone: "var(--series-4)", fill: true }] },
];

const dayOf = (at) => new Date(at).toISOString().slice(0, 10);

class UsageView extends View {
  build() {
    this.kind = "person";
    this.days = 30;
    this.charts = CHARTS.map((options) => chart(options));
    this.heading = h("th", { scope: "col" });
    this.rows = h("tbody");
    this.table = h("div.table-box", null, h("table.stacked", null, h("caption.visually-hidden", null, "Usage"),
      h("thead", null, h("tr", null, this.heading, ["Requests", "Tokens read", "Tokens written", "GPU time", "Share"].map((text) => h("th.num", { scope: "col" }, text)))), this.rows));
    this.nothing = h("div");
    this.file = h("a.button.end", { download: "usage.csv" }, icon("down"), "CSV");
    this.append(this.head("Usage"), h("div.stack", null,
      h("div.row.wrap", null, segmented("Time", SPANS, this.days, (days) => { this.days = days; this.load(); })),
      h("h2.visually-hidden", null, "Day by day"), h("div.charts", null, this.charts.map((element) => h("div.card", null, element))),
      h("div.row.wrap", null, segmented("Of what", KINDS, this.kind, (kind) => { this.kind = kind; this.load(); }), this.file),
      this.nothing, this.table));
    this.load();
  }

  async load() {
    const turn = (this.turn = (this.turn ?? 0) + 1);
    const now = Date.now();
    const span = { since: dayOf(now - (this.days - 1) * DAY_MS), until: dayOf(now) };
    this.file.href = path(["api", "usage"], { ...span, format: "csv" });
    const asked = (by) => act(() => get(path(["api", "usage"], { ...span, by })));
    const [days, sums] = await Promise.all([asked("day"), asked(this.kind)]);
    if (!days || !sums || turn !== this.turn) return;
    this.draw(days.usage, now);
    this.list(sums.usage);
  }

  draw(used, now) {
    const known = new Map(used.map((one) => [one.day, one]));
    const nothing = { requests: 0, prompt_tokens: 0, output_tokens: 0, gpu_seconds: 0 };
    const points = Array.from({ length: this.days }, (_, index) => {
      const day = dayOf(now - (this.days - 1 - index) * DAY_MS);
      return { ...nothing, ...known.get(day), at: `${day}T00:00:00Z` };
    });
    for (const element of this.charts) element.draw(points);
  }

  list(used) {
    this.heading.textContent = { person: "Person", key: "Key", model: "Model" }[this.kind];
    const all = used.reduce((sum, one) => sum + one.gpu_seconds, 0);
    this.rows.replaceChildren(...used.map((one) => this.row(one, all)));
    this.table.hidden = !used.length;
    this.nothing.replaceChildren(...(used.length ? [] : [empty("usage", "Nothing was used in this time", h("p", null, "COORDINATOR_USAGE says of whom it is added up. Texts of requests and answers are never kept."))]));
  }

  row(one, all) {
    const name = one[this.kind];
    const shown = name ? (this.kind === "model" ? model(name) : name) : NAMELESS[this.kind];
    const share = all ? one.gpu_seconds / all : 0;
    const percentage = `${Math.round(100 * share)} %`;
    return h("tr", { "data-name": name }, h("th", { scope: "row" }, shown),
      [["requests", count(one.requests)], ["read", count(one.prompt_tokens)], ["written", count(one.output_tokens)], ["GPU time", seconds(one.gpu_seconds)]]
        .map(([label, text]) => h("td.num", { "data-label": label }, text)),
      h("td.num", { "data-label": "share" }, h("meter", { min: 0, max: 1, value: share, title: `${percentage} of the machines' time` }), ` ${percentage}`));
  }
}

customElements.define("usage-view", UsageView);
