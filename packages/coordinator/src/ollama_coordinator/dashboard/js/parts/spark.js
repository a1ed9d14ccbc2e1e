/** `<oc-spark>`: the last minutes as a small line. Set `points`; the newest is last. */

import { setAttr, svg } from "../dom.js";

const WIDTH = 100;
const HEIGHT = 24;
const SHOWN = 60;

class Spark extends HTMLElement {
  connectedCallback() {
    if (this._line) return;
    this._area = svg("path", { class: "spark-area" });
    this._line = svg("path", { class: "spark-line" });
    const label = this.getAttribute("label") ?? "";
    this.append(svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img", "aria-label": label }, this._area, this._line));
    this._draw();
  }

  /** @param {number[]} points */
  set points(points) {
    this._points = points;
    this._draw();
  }

  _draw() {
    const points = this._points ?? [];
    if (!this._line) return;
    // A machine that has written nothing has nothing to show.
    const some = points.length > 1 && points.some((value) => value > 0);
    const most = Math.max(1, ...points);
    const step = WIDTH / (SHOWN - 1);
    const start = WIDTH - (points.length - 1) * step;
    const path = points.map((value, index) =>
      `${(start + index * step).toFixed(1)},${(HEIGHT - 2 - (HEIGHT - 4) * (value / most)).toFixed(1)}`).join("L");
    setAttr(this._line, "d", some ? `M${path}` : "");
    setAttr(this._area, "d", some ? `M${path}L${WIDTH},${HEIGHT}L${start.toFixed(1)},${HEIGHT}Z` : "");
  }
}

customElements.define("oc-spark", Spark);
