/** `<oc-since at="…">`: the time since then (or until then), counted by the coordinator's clock. */

import { setText } from "../dom.js";
import { coarse, fullTime } from "../format.js";
import { store } from "../store.js";

const shown = new Set();

class Since extends HTMLElement {
  static observedAttributes = ["at", "until"];

  connectedCallback() {
    shown.add(this);
    this.count();
  }

  disconnectedCallback() {
    shown.delete(this);
  }

  attributeChangedCallback() {
    this.count();
  }

  count() {
    const until = this.getAttribute("until");
    const at = Date.parse(until ?? this.getAttribute("at") ?? "");
    if (Number.isNaN(at)) return setText(this, "");
    const seconds = ((until ? at - store.now() : store.now() - at)) / 1000;
    setText(this, coarse(seconds));
    if (!this.title) this.title = fullTime(until ?? this.getAttribute("at"));
  }
}

customElements.define("oc-since", Since);
setInterval(() => { for (const element of shown) element.count(); }, 1000);
