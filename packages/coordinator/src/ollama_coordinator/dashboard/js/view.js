/** What all views have in common: they live while they are shown, and hear of changes. */

import { store } from "./store.js";
import { h } from "./dom.js";

const hovers = matchMedia("(hover: hover)");

/** Whether the pointer or the keyboard is in an element: then what is in it stays where it is. */
export const isUsed = (element) => (hovers.matches && element.matches(":hover")) || element.querySelector(":focus-visible") !== null;

/**
 * The items in the order in which they are shown now, while the pointer or the focus is there; new
 * ones are at the end, and those that are gone stay, with `gone` set.
 * @template T
 * @param {Element} parent one that `keyed` fills
 * @param {T[]} items
 * @param {(item: T) => string} keyOf
 */
export function steady(parent, items, keyOf) {
  if (!isUsed(parent)) {
    parent.__steady = items;
    return items;
  }
  const now = new Map(items.map((item) => [keyOf(item), item]));
  const before = (parent.__steady ?? []).map((item) => now.get(keyOf(item)) ?? { ...item, gone: true });
  const known = new Set(before.map(keyOf));
  return (parent.__steady = [...before, ...items.filter((item) => !known.has(keyOf(item)))]);
}

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

  /** Keep filters in the page's address, without a step back for each; empty ones are left out. */
  remember(filters) {
    for (const [name, value] of Object.entries(filters)) {
      if (value) this.query.set(name, value);
      else this.query.delete(name);
    }
    const [before] = location.hash.split("?");
    history.replaceState(null, "", `${before || "#/fleet"}${this.query.size ? `?${this.query}` : ""}`);
  }

  /** The head of a view: its title, and controls beside it. */
  head(title, ...controls) {
    return h("header.view-head", null, h("h1", { tabindex: "-1" }, title), ...controls);
  }
}
