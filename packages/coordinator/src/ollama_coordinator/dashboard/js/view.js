/** What all views have in common: they live while they are shown, and hear of changes. */

import { store } from "./store.js";
import { h } from "./dom.js";

export class View extends HTMLElement {
  connectedCallback() {
    this.stopping = new AbortController();
    this.build();
    this._stop = store.subscribe((changed) => { if (store.ready) this.changed(changed); });
    if (store.ready) this.changed(null);
  }

  disconnectedCallback() {
    this._stop?.();
    this.stopping.abort();
    this.replaceChildren();
  }

  /** Build what does not change. */
  build() {}

  /** The state changed: section → ids of agents, or null for everything. */
  changed(_changed) {}

  /** Whether one of these sections changed. */
  concerns(changed, ...sections) {
    return changed === null || sections.some((section) => changed.has(section));
  }

  /** The head of a view: its title, and controls beside it. */
  head(title, ...controls) {
    return h("header.view-head", null, h("h1", { tabindex: "-1" }, title), ...controls);
  }
}
