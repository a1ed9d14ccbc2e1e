/** Settings: limits and policy. What the environment sets is shown as such and stays as it is. */

import { View } from "../view.js";
import { call, get } from "../api.js";
import { h, icon } from "../dom.js";
import { fullTime } from "../format.js";
import { command, withUrl } from "../parts/bits.js";
import { joinLines } from "../parts/joining.js";
import { store } from "../store.js";
import { act } from "../parts/toast.js";

const PLACES = { default: "default", dashboard: "set here", environment: "set by the environment" };

class SettingsView extends View {
  build() {
    this.form = h("form.settings", { onsubmit: (event) => this.save(event) });
    this.joining = joinLines();
    this.asking = h("div");
    this.coordinators = h("section", { hidden: true });
    this.append(this.head("Settings"), this.form,
      h("h2.section", null, "Agents"),
      h("p.muted", null, "Name, labels, notes, drain and remove are on each agent's card and page in ", h("a", { href: "#/fleet" }, "Fleet"), ". To add a machine, run one line there:"),
      this.joining,
      h("h2.section", null, "For your clients"),
      h("p.muted", null, "Any Ollama or OpenAI client works with this address:"),
      this.asking,
      this.coordinators);
    this.load();
  }

  changed(changed) {
    if (!this.concerns(changed, "coordinator")) return;
    this.joining.update();
    this.asking.replaceChildren(...withUrl((url) => [command(`OLLAMA_HOST=${url}\nOPENAI_BASE_URL=${url}/v1`)]));
    this.show(store.state.coordinator.coordinators ?? []);
  }

  /** Who shares the database, and who leads: only where there can be several. */
  show(coordinators) {
    this.coordinators.hidden = coordinators.length === 0;
    this.coordinators.replaceChildren(
      h("h2.section", null, "Coordinators"),
      h("p.muted", null, "They share one database. One leads and decides which machine serves what; the others pass requests on, and one of them takes its place when it stops. Clients and agents may use any."),
      h("div.table-box", null, h("table.stacked", null, h("caption.visually-hidden", null, "Coordinators that share the database"),
        h("thead", null, h("tr", null, ["Address", "Version", "Started", "Leads"].map((text) => h("th", { scope: "col" }, text)))),
        h("tbody", null, coordinators.map((one) => h("tr", { "data-name": one.url }, h("th.mono", { scope: "row" }, one.url), h("td", null, one.version), h("td", null, fullTime(one.since)),
          h("td", null, one.leads_since ? h("span.pill", null, `leads since ${fullTime(one.leads_since)}`) : h("span.muted", null, "stands by"))))))));
  }

  async load() {
    const answer = await act(() => get("/api/settings"));
    if (answer) this.draw(answer.settings);
  }

  draw(settings) {
    this.settings = settings;
    this.inputs = new Map();
    const rows = settings.map((setting) => this.row(setting));
    const save = h("button.primary", { type: "submit" }, "Save");
    this.form.replaceChildren(h("div.table-box", null, h("table.stacked", null, h("caption.visually-hidden", null, "Settings of the coordinator"),
      h("thead", null, h("tr", null, ["Setting", "Value", "From", "Variable"].map((text) => h("th", { scope: "col" }, text)))), h("tbody", null, rows))),
      h("div.row", null, save, h("span.muted.small", null, "Changes apply at once, and no request is lost.")));
  }

  row(setting) {
    const input = setting.editable ? control(setting) : h("span.mono", null, text(setting.value) || "–");
    if (setting.editable) this.inputs.set(setting.name, input);
    const reset = setting.source === "dashboard" ? h("button.ghost.small", { type: "button", onclick: () => this.send({ [setting.name]: null }) }, "Reset") : null;
    const id = `setting-${setting.name}`;
    input.id = id;
    return h("tr", { "data-name": setting.name }, h("th.setting-name", { scope: "row" }, h("label", { for: id }, setting.text)),
      h("td", null, h("div.row", null, input, setting.unit && setting.editable ? h("span.muted.small", null, setting.unit) : null)),
      h("td", null, h("div.row", null, h("span.pill", null, setting.source === "environment" ? icon("stop") : null, setting.editable || setting.source === "environment" ? PLACES[setting.source] : "at the start"), reset)),
      h("td.mono.muted", null, setting.variable));
  }

  save(event) {
    event.preventDefault();
    const wanted = {};
    for (const setting of this.settings) {
      const input = this.inputs.get(setting.name);
      if (!input) continue;
      const value = typeof setting.value === "boolean" ? input.value === "true" : typeof setting.value === "number" ? Number(input.value) : input.value.trim();
      if (value !== setting.value) wanted[setting.name] = value;
    }
    if (Object.keys(wanted).length) this.send(wanted);
  }

  async send(wanted) {
    const answer = await act(() => call("PATCH", "/api/settings", wanted), "Saved");
    if (answer) this.draw(answer.settings);
  }
}

const text = (value) => (Array.isArray(value) ? value.join(", ") : String(value ?? ""));

const SPOKEN = { true: "yes", false: "no" };

function control({ value, choices: known, minimum, maximum }) {
  const choices = typeof value === "boolean" ? ["true", "false"] : known;
  if (choices.length) return h("select", null, choices.map((choice) => h("option", { value: choice, selected: choice === String(value) }, SPOKEN[choice] ?? choice)));
  if (typeof value === "number") return h("input", { type: "number", value: String(value), min: String(minimum), max: String(maximum), step: "any" });
  return h("input", { type: "text", value: String(value) });
}

customElements.define("settings-view", SettingsView);
