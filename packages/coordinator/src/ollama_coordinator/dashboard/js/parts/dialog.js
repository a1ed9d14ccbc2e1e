/** Dialogs on the browser's own `<dialog>`: it keeps the focus and closes with Escape. */

import { h, icon } from "../dom.js";

/**
 * Open a dialog with a title and content; `panel` opens it along the right edge.
 * @returns {HTMLDialogElement}
 */
export function openDialog(title, content, { panel = false } = {}) {
  const heading = h("h2.grow", null, title);
  const close = h("button.ghost", { onclick: () => dialog.close(), "aria-label": "Close" }, icon("close"));
  const dialog = h(panel ? "dialog.panel" : "dialog", { "aria-label": title }, h("div.row", null, heading, close), content);
  dialog.addEventListener("close", () => dialog.remove());
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
  document.body.append(dialog);
  dialog.showModal();
  return dialog;
}

/**
 * Ask before something that cannot be taken back; `listed` is what it is done to, one a line. Enter
 * does nothing yet. Resolves to whether it was wanted.
 */
export function confirmed(title, text, verb, listed = []) {
  return new Promise((resolve) => {
    let answer = false;
    const keep = h("button", { onclick: () => dialog.close() }, "Keep");
    const dialog = openDialog(title, h("div", null, listed.length ? h("ul.listed", null, listed.map((one) => h("li", null, one))) : null, h("p.muted", null, text), h("div.actions", null, keep,
      h("button.danger.primary", { onclick: () => { answer = true; dialog.close(); } }, verb))));
    dialog.addEventListener("close", () => resolve(answer));
    keep.focus();
  });
}

/**
 * Ask for values. Each field: {name, label, value, kind?: "text" | "textarea" | "select", choices?}.
 * Resolves to an object of texts, or null.
 */
export function asked(title, fields, verb = "Save") {
  return new Promise((resolve) => {
    let answer = null;
    const inputs = fields.map((field) => [field.name, control(field)]);
    const submit = (event) => {
      event.preventDefault();
      answer = Object.fromEntries(inputs.map(([name, input]) => [name, input.value]));
      dialog.close();
    };
    const dialog = openDialog(title, h("form", { onsubmit: submit },
      fields.map((field, index) => h("label.field", null, field.label, inputs[index][1])),
      h("div.actions", null, h("button", { type: "button", onclick: () => dialog.close() }, "Cancel"), h("button.primary", null, verb))));
    dialog.addEventListener("close", () => resolve(answer));
    inputs[0]?.[1].focus();
  });
}

function control({ kind, value, choices, placeholder, required }) {
  if (kind === "select") return h("select", { value: undefined }, choices.map(([key, label]) => h("option", { value: key, selected: key === value }, label)));
  if (kind === "textarea") return h("textarea", { rows: 4, value: value ?? "", placeholder });
  return h("input", { type: "text", value: value ?? "", placeholder, required, autocomplete: "off" });
}
