/** Models: the union of the fleet, where each is on disk and in memory, and what is done to them. */

import { View } from "../view.js";
import { call, get, path } from "../api.js";
import { h, icon, keyed, setAttr, setText } from "../dom.js";
import { bytes, hue, model, time } from "../format.js";
import { store } from "../store.js";
import { columnHead, command, empty } from "../parts/bits.js";
import { openJoining } from "../parts/joining.js";
import { asked, confirmed } from "../parts/dialog.js";
import { isPartial, isPutAway, operationCard } from "../parts/operation.js";
import { openPull } from "../parts/pull.js";
import { act } from "../parts/toast.js";
import { base } from "../parts/address.js";

const REFRESH_MS = 1500;
/** Of a large fleet the fullest disks are listed. */
const DISKS = 24;
const DONE_SHOWN_MS = 60_000;
const many = (count, one, more) => `${count} ${count === 1 ? one : more}`;
const nameOf = (id) => store.state.agents[id]?.name ?? "an agent that left";

/** Start an operation; its progress comes with the stream. */
const start = (wanted, done) => act(() => call("POST", "/api/operations", wanted), done);

class ModelsView extends View {
  build() {
    this.text = (this.query.get("search") ?? "").toLowerCase();
    this.list = [];
    this.details = new Map();
    const search = h("input.inline-field", { type: "search", placeholder: "Search models", "aria-label": "Search models", value: this.query.get("search") ?? "", oninput: (event) => { this.text = event.target.value.toLowerCase(); this.remember({ search: event.target.value }); this.draw(); } });
    this.operations = h("div.operations");
    this.body = h("tbody");
    this.table = h("div.table-box", null, h("table.models-table.stacked", null, h("caption.visually-hidden", null, "Models of the fleet"), h("thead", null, h("tr", null,
      ["Model", "On disk", "In memory"].map((text) => h("th", { scope: "col" }, text)), h("th.num", { scope: "col" }, "Size"), h("th", { scope: "col" }, "Changed"), h("th", { scope: "col" }, h("span.visually-hidden", null, "Actions")))), this.body));
    this.aliases = h("section.stack.aliases");
    this.advice = h("section.stack.advice");
    this.disks = h("div.disks");
    this.moreDisks = h("p.muted.small.more-disks");
    this.disksTitle = h("h2.section", null, "Disk space");
    this.nothing = h("div");
    this.append(this.head("Models", h("div.row.wrap.end", null, search, h("button.primary", { onclick: () => openPull(this.list) }, icon("down"), "Pull a model"))),
      this.operations, this.nothing, this.table, this.aliases, this.advice, this.disksTitle, this.disks, this.moreDisks);
    this.load();
    this.advise();
  }

  /** Names that stand for models. */
  drawAliases(aliases) {
    const rows = aliases.map((alias) => h("tr", { "data-alias": alias.name },
      h("th", { scope: "row" }, alias.name),
      h("td", { "data-label": "stands for" }, alias.models.join(", then "), alias.hidden_by.length ? h("div.small", null, h("span.pill.warn", null, `not in use: ${alias.hidden_by.join(", ")} has a model of this name`)) : null),
      h("td", { "data-label": "the next serves" }, alias.models.length < 2 ? "–" : alias.wait_seconds === null ? "where the one before cannot" : `after ${alias.wait_seconds} s`),
      h("td", null, h("div.row.model-actions", null,
        h("button.ghost.small", { onclick: () => this.setAlias(alias), "aria-label": `Change ${alias.name}` }, "Change"),
        h("button.ghost.small.danger", { onclick: () => this.removeAlias(alias), "aria-label": `Delete ${alias.name}`, title: "Delete" }, icon("trash"))))));
    const table = h("div.table-box", null, h("table.stacked", null, h("caption.visually-hidden", null, "Aliases"),
      h("thead", null, h("tr", null, ["Alias", "Stands for", "The next serves", ""].map(columnHead))), h("tbody", null, rows)));
    this.aliases.replaceChildren(h("div.row.wrap", null, h("h2.section.grow", null, "Aliases"), h("button", { onclick: () => this.setAlias(null) }, "Add an alias")),
      rows.length ? table : h("p.muted", null, "Let clients ask for another name, such as gpt-4o, or for the first of several models that can serve."));
  }

  async setAlias(known) {
    const values = await asked(known ? `Change ${known.name}` : "Add an alias", [
      ...(known ? [] : [{ name: "name", label: "Name that clients ask for", placeholder: "gpt-4o", required: true }]),
      { name: "models", label: "Models, the preferred one first", value: known?.models.join(", "), placeholder: "qwen3:32b, qwen3:4b", required: true },
      { name: "wait", label: "Seconds after which the next one serves; empty: only if the one before cannot", value: known?.wait_seconds === null ? "" : String(known?.wait_seconds ?? "") },
    ]);
    if (!values) return;
    const wanted = { name: known?.name ?? values.name.trim(), models: values.models.split(",").map((part) => part.trim()).filter(Boolean), wait_seconds: seconds(values.wait.trim()) };
    if (await act(() => call("POST", "/api/aliases", wanted))) this.load();
  }

  async removeAlias({ name, models }) {
    if (!await confirmed(`Delete the alias ${name}?`, `Clients that ask for it are told that there is no such model. ${models.join(", ")} stay where they are.`, "Delete")) return;
    await act(() => call("DELETE", `/api/aliases/${name.split("/").map(encodeURIComponent).join("/")}`), "Deleted");
    this.load();
  }

  /** What would have cut waiting yesterday; a fleet whose policy does not predict has none. */
  async advise() {
    try {
      const { advice, notes } = await get("/api/advice");
      const pieces = advice.map((piece) => h("li", null, h("b", null, piece.text), h("p.muted.small", null, [`${Math.round((100 * piece.saved_seconds) / piece.waited_seconds)} % of what it was waited for`, ...piece.doubts].join(" · "))));
      this.advice.replaceChildren(h("h2.section", null, "What would have cut waiting"), pieces.length ? h("ul.advice-list", null, pieces) : "", pieces.length ? h("div", null, h("button.small", { onclick: () => this.follow() }, "Do it, by copies from machine to machine")) : "", ...notes.map((note) => h("p.muted.small", null, note)));
    } catch {
      this.advice.replaceChildren();
    }
  }

  /** Follow the advice; a model may have to leave for another one. */
  async follow() {
    const sure = await confirmed("Follow this advice?", "Models are copied to these machines from those that have them. Where there is no room, the copy that fewest requests used is deleted there: never the last one, and none that somebody brought within a week.", "Do it");
    if (sure) await act(() => call("POST", "/api/advice", {}));
  }

  changed(changed) {
    if (this.concerns(changed, "operations", "fleet")) this.drawOperations();
    if (this.concerns(changed, "agents")) this.drawDisks();
    const revision = store.state.fleet.changes;
    if (revision !== this.revision) {
      this.revision = revision;
      this.later ??= setTimeout(() => { this.later = null; if (this.isConnected) this.load(); }, this.list.length ? REFRESH_MS : 0);
    }
  }

  async load() {
    try {
      const [all, tags, { aliases }] = await Promise.all([get("/api/models"), get("/api/tags"), get("/api/aliases")]);
      this.drawAliases(aliases);
      this.list = all.models;
      this.details = new Map(tags.models.map((row) => [row.name, row]));
      this.draw();
    } catch {
      // Away; the stream says so, and the next change asks again.
    }
  }

  draw() {
    const shown = this.list.filter((row) => !this.text || row.name.toLowerCase().includes(this.text));
    keyed(this.body, shown.map((row) => ({ ...row, tag: this.details.get(row.name) })), (row) => row.name, modelRow);
    this.table.hidden = !shown.length;
    this.tellNothing(shown.length > 0);
  }

  tellNothing(some) {
    if (some) return this.nothing.replaceChildren();
    const agents = Object.keys(store.state.agents).length;
    const content = this.list.length ? empty("search", "No model matches")
      : agents ? empty("models", "No model on any machine yet", h("p", null, "Pull one for the fleet, here or with any Ollama client:"), command(`OLLAMA_HOST=${base(location)} ollama pull llama3.2`))
      : empty("models", "No machine yet, so no model", h("button", { onclick: openJoining }, "Add a machine"));
    this.nothing.replaceChildren(content);
  }

  drawOperations() {
    const shown = Object.values(store.state.operations ?? {}).filter((one) => !isPutAway(one) && (one.state !== "done" || isPartial(one) || store.now() - Date.parse(one.ended_at) < DONE_SHOWN_MS));
    const all = shown.sort((a, b) => b.started_at.localeCompare(a.started_at));
    keyed(this.operations, all, (one) => one.id, operationCard);
  }

  drawDisks() {
    const agents = Object.values(store.state.agents).filter((agent) => agent.disk_free_bytes !== undefined).sort((a, b) => a.disk_free_bytes - b.disk_free_bytes);
    this.disksTitle.hidden = !agents.length;
    keyed(this.disks, agents.slice(0, DISKS), (agent) => agent.id, disk);
    const more = agents.length - DISKS;
    setText(this.moreDisks, more > 0 ? `and ${more} more, each with at least ${bytes(agents[DISKS].disk_free_bytes)} free` : "");
  }
}

/** A text as JSON's number; one that is none goes as it is, and is refused with a sentence. */
const seconds = (text) => (text === "" ? null : Number.isNaN(Number(text)) ? text : Number(text));

function disk(agent) {
  const name = h("span.clip.grow");
  const value = h("span.nowrap");
  const element = h("div.row.small.disk", null, name, value);
  element.update = (now) => {
    setText(name, now.name);
    setText(value, `${bytes(now.disk_free_bytes)} free`);
    element.classList.toggle("low", now.disk_free_bytes < 20e9);
  };
  return element;
}

function modelRow(row) {
  const about = h("div.muted.small.clip");
  const conflict = h("button.pill.warn.ghost", { onclick: () => explainConflict(element.row) }, icon("resting"), "different contents");
  const holders = h("div.chips");
  const loaded = h("div.chips");
  const size = h("td.num");
  const changed = h("td.muted.nowrap");
  const unload = h("button.ghost.small", { onclick: () => start({ kind: "unload", model: row.name }, "Unloading") }, "Unload");
  const element = h("tr", null,
    h("td", null, h("div.row", null, h("i.swatch", { style: { background: hue(row.name) } }), h("a.model-name.clip", { href: `#/models/${encodeURIComponent(row.name)}` }, model(row.name)), conflict), about),
    h("td", { "data-label": "on" }, holders), h("td", { "data-label": "in memory on" }, loaded), size, changed,
    h("td", null, h("div.row.model-actions", null,
      h("a.button.ghost.small", { href: `#/try?model=${encodeURIComponent(row.name)}` }, "Try"),
      h("button.ghost.small", { onclick: () => load(element.row) }, "Load"), unload,
      h("button.ghost.small", { onclick: () => openPull([element.row], row.name) }, "Replicate"),
      h("button.ghost.small.danger", { onclick: () => remove(element.row), "aria-label": `Delete ${model(row.name)}`, title: "Delete" }, icon("trash")))));
  element.update = (now) => {
    element.row = now;
    const details = now.tag?.details ?? {};
    setText(about, [details.parameter_size, details.quantization_level, details.family, now.digest.replace("sha256:", "").slice(0, 12), ...(now.tag?.capabilities ?? []).filter((word) => word !== "completion")].filter(Boolean).join(" · "));
    conflict.hidden = !now.conflict;
    chips(holders, now.holders);
    chips(loaded, now.loaded_on, (id) => now.contexts[id] ? `${nameOf(id)} · context ${now.contexts[id].toLocaleString()}` : nameOf(id));
    setText(size, bytes(now.size));
    setText(changed, time(now.modified_at));
    unload.hidden = !now.loaded_on.length;
  };
  return element;
}

const CHIPS = 6;
const CHIPS_OF_MANY = 3;

function chips(parent, unsorted, label = nameOf) {
  const ids = [...unsorted].sort((a, b) => nameOf(a).localeCompare(nameOf(b), undefined, { numeric: true }));
  const room = ids.length > CHIPS ? CHIPS_OF_MANY : CHIPS;
  const shown = ids.slice(0, room).map((id) => ({ id, name: label(id) }));
  if (ids.length > room) shown.push({ id: "", name: `and ${ids.length - room} more` });
  keyed(parent, shown, (one) => one.id, ({ id }) => {
    const chip = id ? h("a.tag.clip", { href: `#/agents/${encodeURIComponent(id)}` }) : h("span.tag");
    chip.update = (now) => setText(chip, now.name);
    return chip;
  });
  setAttr(parent, "title", ids.length > CHIPS ? ids.map(label).join(", ") : null);
}

async function load(row) {
  const choices = [["1", "One agent"], ["2", "Two agents"], ["all", "Every holder"], ...row.holders.map((id) => [`agents:${id}`, nameOf(id)])];
  const values = await asked(`Load ${model(row.name)} into memory`, [{ name: "placement", label: "On", kind: "select", value: "1", choices }], "Load");
  if (values) await start({ kind: "load", model: row.name, placement: values.placement });
}

async function remove(row) {
  const holders = row.contents.flatMap((one) => one.holders.map((id) => `${nameOf(id)} · ${bytes(one.size)}`)).sort();
  const sure = await confirmed(`Delete ${model(row.name)}?`, `It is removed from the disk of ${many(holders.length, "agent", "agents")}. Agents that are away delete it when they return.`, "Delete", holders);
  if (sure) await start({ kind: "delete", model: row.name }, "Deleting");
}

async function explainConflict(row) {
  const contents = row.contents.map((one) => `${one.digest.replace("sha256:", "").slice(0, 12)} (${bytes(one.size)}${one.is_preferred ? ", used" : ", not used"}): ${one.holders.map(nameOf).join(", ")}`).join(" — ");
  const sure = await confirmed(`${model(row.name)} is not the same everywhere`, `Requests go only to the content that most agents have. ${contents}. Pulling it again gives every agent the same.`, "Pull it again");
  if (sure) await start({ kind: "pull", model: row.name, placement: "all" });
}

customElements.define("models-view", ModelsView);
