/** The keyboard: a digit for each view, `/` to search, `?` for help. */

import { h } from "./dom.js";
import { openDialog } from "./parts/dialog.js";

/** The tenth view has the tenth digit of a keyboard. */
const DIGITS = [..."1234567890"];
const typing = (target) => target.closest?.("input, textarea, select, [contenteditable]") !== null;

/** @param {string[]} views in the order of their digits */
export function listenToKeys(views) {
  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || typing(event.target)) return;
    const view = views[DIGITS.indexOf(event.key)];
    if (document.querySelector("dialog[open]")) return;
    if (view) location.hash = `#/${view}`;
    else if (event.key === "?") help(views);
    else if (event.key === "/") {
      const search = document.querySelector("main input[type=search]");
      if (!search) return;
      event.preventDefault();
      search.focus();
    }
  });
}

const NAMES = { fleet: "Fleet", now: "Now", attention: "Attention", models: "Models", history: "History", usage: "Usage", try: "Try it", access: "Keys", audit: "Audit", settings: "Settings" };

export function help(views = Object.keys(NAMES)) {
  const rows = views.map((name, index) => [DIGITS[index], NAMES[name]]);
  rows.push(["/", "Search in this view"], ["Enter", "Open the selected row"], ["Esc", "Close a panel"], ["?", "This help"]);
  openDialog("Keyboard", h("table", null, h("tbody", null, rows.map(([key, text]) =>
    h("tr", null, h("td", null, h("kbd", null, key)), h("td", null, text))))));
}
