/** One model: its machines and their speeds, who asks for it, what it did, where else it would fit. */

import { View } from "../view.js";
import { get, path } from "../api.js";
import { h, setText } from "../dom.js";
import { bytes, count, model, rate, seconds, time } from "../format.js";
import { setTitle } from "../shell.js";
import { store } from "../store.js";
import { empty, fact } from "../parts/bits.js";
import { fit, openPull } from "../parts/pull.js";
import { HISTORY_COLUMNS, historyRow } from "./history.js";

const REFRESH_MS = 5000;
const LOOKED_AT = 500;
const SHOWN = 15;
const FACTS = ["Size", "Parameters", "Quantization", "Family", "Capabilities", "Digest", "Changed"];

class ModelView extends View {
  build() {
    const name = this.argument;
    setTitle(model(name));
    this.facts = Object.fromEntries(FACTS.map((label) => [label, fact(label)]));
    [this.machines, this.fits, this.users, this.requests] = ["tbody", "tbody", "tbody", "tbody"].map((tag) => h(tag));
    this.usersTitle = h("h2.section");
    const search = path(["#", "history"], { model: name }).replace("%23", "#");
    this.content = h("div.stack", null, h("dl.facts.card", null, Object.values(this.facts)),
      h("h2.section", null, "Machines that have it"), table("Machines that have it", ["Agent", "In memory", "Reads", "Writes", "Loads in", "At once", "Measured"], this.machines),
      h("h2.section", null, "Where else it would fit"), table("Where else it would fit", ["Agent", "By its size", ""], this.fits),
      this.usersTitle, table("Who asks for it", ["Client", "Requests", "Tokens", "Failed", "Last"], this.users),
      h("h2.section", null, "Last requests", h("a.small.more", { href: search }, "All of them, and export")), table("Last requests", HISTORY_COLUMNS.map(([text]) => text), this.requests));
    this.gone = h("div", { hidden: true }, empty("models", "No machine has this model", h("p", null, "It was deleted, or the address is wrong."), h("a.button", { href: "#/models" }, "To the models")));
    this.append(h("p.small", null, h("a", { href: "#/models" }, "← Models")),
      this.head(model(name), h("div.row.wrap.end", null, h("a.button", { href: `#/try?model=${encodeURIComponent(name)}` }, "Try it"), h("button", { onclick: () => openPull(this.all ?? [], name) }, "Copy to machines"))), this.gone, this.content);
    const timer = setInterval(() => { if (!document.hidden) this.load(); }, REFRESH_MS);
    this.stopping.signal.addEventListener("abort", () => clearInterval(timer));
    this.load();
  }

  async load() {
    try {
      const [{ models }, tags, estimates, history] = await Promise.all([get("/api/models"), get("/api/tags"), get("/api/estimates").catch(() => []), get(path(["api", "history"], { model: this.argument, limit: LOOKED_AT }))]);
      this.all = models;
      const row = models.find((one) => model(one.name).toLowerCase() === model(this.argument).toLowerCase());
      this.gone.hidden = Boolean(row);
      this.content.hidden = !row;
      if (row) this.draw(row, tags.models.find((one) => one.name === row.name), estimates, history.requests);
    } catch {
      // Away; the stream says so, and the next turn asks again.
    }
  }

  draw(row, tag, estimates, requests) {
    const details = tag?.details ?? {};
    const values = { Size: bytes(row.size), Parameters: details.parameter_size, Quantization: details.quantization_level, Family: details.family, Capabilities: tag?.capabilities?.join(", "), Digest: row.digest.replace("sha256:", "").slice(0, 12), Changed: time(row.modified_at) };
    for (const [label, text] of Object.entries(values)) this.facts[label].set(text);
    const holders = new Set(row.contents.flatMap((content) => content.holders));
    const learned = new Map(estimates.filter((one) => model(one.model.split("/").at(-1)) === model(row.name.split("/").at(-1))).map((one) => [one.agent_id, one]));
    const agents = Object.values(store.state.agents).sort((a, b) => a.name.localeCompare(b.name, undefined, { numeric: true }));
    this.machines.replaceChildren(...agents.filter((one) => holders.has(one.id)).map((one) => machineRow(one, row, learned.get(one.id))));
    const others = agents.filter((one) => !holders.has(one.id));
    this.fits.replaceChildren(...(others.length ? others.map((one) => fitRow(one, row, () => openPull(this.all, row.name, one.id))) : [nothing(3, "Every machine has it.")]));
    const users = byClient(requests);
    setText(this.usersTitle, requests.length < LOOKED_AT ? "Who asks for it" : `Who asked for it in the last ${count(LOOKED_AT)} requests`);
    this.users.replaceChildren(...(users.length ? users.map(userRow) : [nothing(5, "Nobody has asked for it yet.")]));
    this.requests.replaceChildren(...(requests.length ? requests.slice(0, SHOWN).map(historyRow) : [nothing(11, "Nobody has asked for it yet.")]));
  }
}

const TEXTS = new Set(["Agent", "In memory", "By its size", "Client", "Last", "Ended", "Model", "Result", ""]);

function table(caption, columns, body) {
  return h("div.table-box", null, h("table.stacked.finished", null, h("caption.visually-hidden", null, caption),
    h("thead", null, h("tr", null, columns.map((text) => h(TEXTS.has(text) ? "th" : "th.num", { scope: "col" }, text || h("span.visually-hidden", null, "Actions"))))), body));
}

const nothing = (columns, text) => h("tr", null, h("td.muted", { colspan: columns }, text));
const agentLink = (agent) => h("th", { scope: "row" }, h("a", { href: `#/agents/${encodeURIComponent(agent.id)}` }, agent.name));
const cell = (label, text) => h("td.num", { "data-label": label }, text);

function machineRow(agent, row, learned) {
  const measured = learned?.samples[1] ?? 0;
  const loaded = row.loaded_on.includes(agent.id);
  const context = row.contexts[agent.id];
  return h(learned && !measured ? "tr.guessed" : "tr", null, agentLink(agent),
    h("td", { "data-label": loaded ? null : "in memory" }, loaded ? h("span.pill.good", null, context ? `context ${context.toLocaleString()}` : "loaded") : h("span.muted", null, "no")),
    cell("reads", learned ? `${rate(learned.prefill_tokens_per_second)} tok/s` : "–"), cell("writes", learned ? `${rate(learned.decode_tokens_per_second)} tok/s` : "–"),
    cell("loads in", learned ? seconds(learned.load_seconds) : "–"), cell("at once", learned ? count(learned.slots) : "–"), cell("measured", measured ? `${count(measured)} time${measured === 1 ? "" : "s"}` : "estimated"));
}

function fitRow(agent, row, pull) {
  const { fits, text } = fit(agent, row.size);
  return h("tr", null, agentLink(agent), h("td", null, h(fits ? "span.pill.good" : "span.pill.warn", null, fits ? "fits" : "does not fit"), ` ${text.replace(/^fits · /, "")}`),
    h("td.num", null, h("button.small", { onclick: pull, "aria-label": `Pull it there: ${agent.name}` }, "Pull it there")));
}

/** What each client asked for, those with most requests first. */
function byClient(requests) {
  const clients = new Map();
  for (const one of requests) {
    const sum = clients.get(one.client) ?? { client: one.client, requests: 0, tokens: 0, failed: 0, last: one.finished_at };
    sum.requests += 1;
    sum.tokens += (one.prompt_tokens ?? 0) + (one.output_tokens ?? 0);
    sum.failed += one.status === "failed" ? 1 : 0;
    clients.set(one.client, sum);
  }
  return [...clients.values()].sort((a, b) => b.requests - a.requests || a.client.localeCompare(b.client));
}

function userRow(user) {
  return h("tr", null, h("th", { scope: "row" }, user.client), cell("requests", count(user.requests)), cell("tokens", count(user.tokens)), cell("failed", user.failed ? count(user.failed) : ""), h("td.muted", { "data-label": "last" }, time(user.last)));
}

customElements.define("model-view", ModelView);
