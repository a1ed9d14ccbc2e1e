/** Fleet: every machine at a glance. Cards for a few, rows for many. */

import { steady, View } from "../view.js";
import { h, keyed, setText } from "../dom.js";
import { store } from "../store.js";
import { empty, segmented } from "../parts/bits.js";
import { agentCard } from "../parts/agent-card.js";
import { agentRow, agentRowHead } from "../parts/agent-row.js";
import { joinLines, joinRequests, openJoining } from "../parts/joining.js";

const CARDS_AT_MOST = 24;
const PHONE_PX = 760;
/** A screenful is there at once, the rest with the frames that follow. */
const AT_ONCE = 30;
const STATE_CHOICES = [["", "Every state"], ["online", "Online"], ["draining", "Draining"], ["paused", "Paused"], ["resting", "Out of rotation"], ["asleep", "Asleep"], ["offline", "Offline"]];
const ORDER = { online: 0, draining: 1, paused: 2, resting: 3, asleep: 4, offline: 5 };
const total = (agent, field) => agent.gpus.reduce((sum, gpu) => sum + (gpu[field] ?? 0), 0);

const SORTS = {
  name: ["Name", () => 0],
  state: ["State", (a, b) => ORDER[a.state] - ORDER[b.state]],
  load: ["Requests in flight", (a, b) => b.in_flight - a.in_flight],
  speed: ["Tokens per second", (a, b) => (b.sparkline?.[1] ?? 0) - (a.sparkline?.[1] ?? 0)],
  memory: ["Free GPU memory", (a, b) => free(b) - free(a)],
  cpu: ["CPU", (a, b) => (b.cpu_usage ?? 0) - (a.cpu_usage ?? 0)],
};

const byName = (a, b) => a.name.localeCompare(b.name, undefined, { numeric: true });

function free(agent) {
  return total(agent, "memory_total_bytes") - total(agent, "memory_used_bytes");
}

class FleetView extends View {
  build() {
    this.text = (this.query.get("search") ?? "").toLowerCase();
    this.state = this.query.get("state") ?? "";
    this.sort = localStorage.getItem("fleet-sort") ?? "name";
    this.form = localStorage.getItem("fleet-form") ?? "auto";
    const search = h("input.inline-field", { type: "search", placeholder: "Search name, label, model", "aria-label": "Search agents", value: this.query.get("search") ?? "", oninput: (event) => { this.text = event.target.value.toLowerCase(); this.remember({ search: event.target.value }); this.draw(); } });
    const filter = h("select.inline-field", { "aria-label": "State", onchange: (event) => { this.state = event.target.value; this.remember({ state: this.state }); this.draw(); } },
      STATE_CHOICES.map(([value, label]) => h("option", { value, selected: value === this.state }, label)));
    this.states = filter;
    const sort = h("select.inline-field", { "aria-label": "Sort by", onchange: (event) => { this.sort = event.target.value; localStorage.setItem("fleet-sort", this.sort); this.draw(); } },
      Object.entries(SORTS).map(([value, [label]]) => h("option", { value, selected: value === this.sort }, `By ${label.toLowerCase()}`)));
    const form = segmented("Layout", [["auto", "Auto"], ["cards", "Cards"], ["rows", "Rows"]], this.form, (key) => { this.form = key; localStorage.setItem("fleet-form", key); this.draw(); });
    this.controls = h("div.row.wrap.end", null, search, filter, sort, form);
    this.cards = h("div.cards");
    this.rows = h("tbody");
    this.table = h("div.table-box", { hidden: true }, h("table.fleet-table", null, agentRowHead(), this.rows));
    this.nothing = h("div");
    this.most = AT_ONCE;
    this.joining = joinRequests();
    this.hardware = h("details.hardware", { hidden: true, ontoggle: () => this.openHardware() }, h("summary", null, "Hardware over time"));
    this.append(this.head("Fleet", this.controls), this.joining, this.hardware, this.nothing, this.cards, this.table);
    this.hardware.open = localStorage.getItem("fleet-hardware") === "true";
  }

  changed(changed) {
    if (this.concerns(changed, "agents")) this.draw(changed?.get("agents") ?? null);
    if (this.concerns(changed, "attention")) this.joining.update();
  }

  /** @param {Set<string> | null} stale ids of the agents that changed, if only those have to be drawn anew */
  draw(stale = null) {
    if (!store.ready) return;
    const all = Object.values(store.state.agents);
    this.controls.hidden = this.hardware.hidden = all.length === 0;
    this.tellNothing(all.length);
    this.countStates(all);
    const shown = all.filter((agent) => this.wanted(agent)).sort((a, b) => SORTS[this.sort][1](a, b) || byName(a, b) || a.id.localeCompare(b.id));
    if (all.length && !shown.length) this.nothing.replaceChildren(empty("search", "No agent matches", h("p", null, "Search for something else, or show every state.")));
    const inRows = this.form === "rows" || (this.form === "auto" && all.length > CARDS_AT_MOST && innerWidth > PHONE_PX);
    this.cards.hidden = inRows || !shown.length;
    this.table.hidden = !inRows || !shown.length;
    const box = inRows ? this.rows : this.cards;
    const now = steady(box, shown, (agent) => agent.id).filter((agent) => !agent.gone).slice(0, this.most);
    keyed(this.cards, inRows ? [] : now, (agent) => agent.id, agentCard, stale);
    keyed(this.rows, inRows ? now : [], (agent) => agent.id, agentRow, stale);
    if (now.length < shown.length) this.goOn();
  }

  /** The charts of all machines' hardware, which are made when somebody wants them. */
  async openHardware() {
    localStorage.setItem("fleet-hardware", String(this.hardware.open));
    if (!this.hardware.open || this.hardware.children.length > 1) return;
    const { hardware } = await import("../parts/charts.js");
    if (this.isConnected && this.hardware.children.length === 1) this.hardware.append(hardware(this.stopping.signal));
  }

  /** Draw more of a large fleet, once what is there has been painted. */
  goOn() {
    this.next ??= requestAnimationFrame(() => setTimeout(() => {
      this.next = null;
      this.most += AT_ONCE;
      if (this.isConnected) this.draw(new Set());
    }));
  }

  /** How many there are in each state, where one looks for them. */
  countStates(all) {
    STATE_CHOICES.forEach(([state, label], index) => {
      const many = all.filter((agent) => agent.state === state).length;
      setText(this.states.options[index], state ? `${label} (${many})` : label);
    });
  }

  wanted(agent) {
    if (this.state && agent.state !== this.state) return false;
    if (!this.text) return true;
    const words = [agent.name, agent.machine_name, agent.ip_address, ...agent.labels, ...agent.loaded_models.map((model) => model.name)];
    return words.some((word) => word.toLowerCase().includes(this.text));
  }

  tellNothing(count) {
    if (count) return this.nothing.replaceChildren();
    if (this.nothing.firstElementChild) return;
    this.nothing.append(empty("fleet", "No machine yet",
      h("p", null, "Run one line on each machine that has Ollama. It appears on this page within seconds."),
      joinLines(),
      h("p", null, "An Ollama without an agent can be added too, by its URL: ", h("button.small", { onclick: openJoining }, "Add a machine"))));
  }
}

customElements.define("fleet-view", FleetView);
