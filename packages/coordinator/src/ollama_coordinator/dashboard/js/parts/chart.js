/** `<oc-chart>`: lines over time on uPlot, which is fetched when the first chart is shown. */

import { h, setText } from "../dom.js";

const VENDOR = new URL("../../vendor/uplot-1.6.32", import.meta.url).href;
const HEIGHT = 170;
let loading = null;

function library() {
  loading ??= new Promise((resolve, reject) => {
    document.head.append(h("link", { rel: "stylesheet", href: `${VENDOR}.css` }));
    import(`${VENDOR}.js`).then((module) => resolve(module.default), reject);
  });
  return loading;
}

/** @typedef {{label: string, field: string, tone: string, dash?: boolean, fill?: boolean, perMinute?: boolean}} Series */

/** A single value makes no line, so it is drawn as a point. */
function isAlone(plot, series) {
  return plot.data[series].filter((value) => value !== null).length === 1;
}

class Chart extends HTMLElement {
  /**
   * What to draw; points are the API's, with `at` and the fields.
   * @param {{title: string, unit: (value: number) => string, series: Series[], max?: number}} options
   */
  setup(options) {
    this.options = options;
    this.plot = h("div.plot");
    this.none = h("p.muted.small.none", { hidden: true }, "No data in this time.");
    this.legend = h("div.legend.small");
    this.latest = h("b");
    // One number of several lines says of which it is.
    const which = options.series.length > 1 ? h("span.muted.small", null, options.series[0].label) : null;
    this.append(h("header.row", null, h("h3.grow", null, options.title), this.latest, which), this.legend, this.plot, this.none);
    return this;
  }

  connectedCallback() {
    this._again = () => this._rebuild();
    addEventListener("themechange", this._again);
    this._resize = new ResizeObserver(() => this.chart?.setSize({ width: this._width(), height: HEIGHT }));
    this._resize.observe(this);
  }

  disconnectedCallback() {
    removeEventListener("themechange", this._again);
    this._resize.disconnect();
    this.chart?.destroy();
    this.chart = null;
  }

  /** Show points. */
  async draw(points) {
    this.points = points;
    const { series, unit } = this.options;
    const width = points.length > 1 ? (Date.parse(points[1].at) - Date.parse(points[0].at)) / 1000 : 60;
    const read = ({ field, perMinute }) => points.map((point) => (perMinute ? (point[field] * 60) / width : point[field] ?? null));
    const data = [points.map((point) => Date.parse(point.at) / 1000), ...series.map(read)];
    const some = data.slice(1).some((values) => values.some((value) => value !== null));
    this.none.hidden = some;
    this.plot.hidden = !some;
    const last = data[1].filter((value) => value !== null).at(-1);
    setText(this.latest, last === undefined ? "" : unit(last));
    const uPlot = await library();
    if (!this.isConnected) return;
    if (this.chart) this.chart.setData(data);
    else this.chart = new uPlot(this._look(), data, this.plot);
    this._describe(series, data, unit);
  }

  _rebuild() {
    this.chart?.destroy();
    this.chart = null;
    this.legend.replaceChildren();
    if (this.points) this.draw(this.points);
  }

  _describe(series, data, unit) {
    const summary = series.map(({ label }, index) => {
      const values = data[index + 1].filter((value) => value !== null);
      return values.length ? `${label} between ${unit(Math.min(...values))} and ${unit(Math.max(...values))}` : `${label} without data`;
    });
    this.plot.setAttribute("role", "img");
    this.plot.setAttribute("aria-label", `${this.options.title}: ${summary.join(", ")}`);
  }

  _width() {
    return Math.max(160, Math.floor(this.plot.clientWidth || this.clientWidth));
  }

  _look() {
    const style = getComputedStyle(this);
    const colour = (name) => resolved(this, name);
    const { series, unit, max } = this.options;
    const axis = { stroke: colour("var(--muted)"), font: `11px ${style.fontFamily}`, grid: { stroke: colour("var(--line)"), width: 1 }, ticks: { show: false } };
    return {
      width: this._width(),
      height: HEIGHT,
      padding: [8, 24, 0, 0],
      cursor: { y: false, points: { size: 6 } },
      legend: { show: true, live: true, mount: (_, table) => this.legend.append(table) },
      scales: { x: { time: true }, y: { range: (_, low, high) => [0, max ?? Math.max(high * 1.1, 0.001)] } },
      axes: [{ ...axis, space: 60, size: 38 }, { ...axis, size: room, values: (_, ticks) => ticks.map((tick) => unit(tick)) }],
      series: [{ label: "Time", value: (_, at) => (at ? new Date(at * 1000).toLocaleString() : "") }, ...series.map((one) => ({
        label: one.label,
        stroke: colour(one.tone),
        width: 1.5,
        dash: one.dash ? [4, 4] : undefined,
        fill: one.fill ? translucent(colour(one.tone)) : undefined,
        spanGaps: true,
        points: { size: 6, show: isAlone },
        value: (_, value, __, index) => (index === null ? "" : value === null || value === undefined ? "–" : unit(value)),
      }))],
    };
  }
}

/** The width of the longest label of an axis. */
const room = (_, texts) => Math.max(62, 14 + 6.5 * Math.max(0, ...(texts ?? []).map((text) => text.length)));

/** A canvas cannot read variables: what a colour is just now. */
function resolved(element, value) {
  const probe = h("i", { style: { color: value } });
  element.append(probe);
  const colour = getComputedStyle(probe).color;
  probe.remove();
  return colour;
}

const translucent = (colour) => colour.replace(/^rgb\((.*)\)$/, "rgba($1, 0.12)");

customElements.define("oc-chart", Chart);

/** A chart ready to be put somewhere. */
export function chart(options) {
  return document.createElement("oc-chart").setup(options);
}
