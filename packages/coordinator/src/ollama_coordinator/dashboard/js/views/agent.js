/** One agent: what it does, its charts, its models with learned speeds, its requests, its log. */

import { View } from "../view.js";
import { get, path } from "../api.js";
import { h, setAttr, setText } from "../dom.js";
import { bytes, count, fullTime, memory, model, rate, seconds, time } from "../format.js";
import { setTitle } from "../shell.js";
import { store } from "../store.js";
import { agentPill, empty, eventRow, fact } from "../parts/bits.js";
import { aboutText, isOnPurpose, outdatedText, slotDots, whyText } from "../parts/agent-card.js";
import { agentLog } from "../parts/agent-log.js";
import { canWake, drain, drainVerb, edit, remove, restart, wake } from "../parts/agent-actions.js";
import { charts } from "../parts/charts.js";
import { memoryBars } from "../parts/memory.js";
import { historyRow } from "./history.js";

const REFRESH_MS = 5000;
const FACTS = ["Address", "Reached at", "Ollama", "Agent", "Platform", "Registered", "Last heard", "Disk free", "Main memory", "Active requests it reports", "Preference", "Backup", "Network card", "Told by hand", "Other programs", "Notes"];

class AgentView extends View {
  build() {
    this.heading = h("span");
    this.pill = agentPill();
    this.since = h("oc-since");
    const agent = () => store.state.agents[this.argument];
    this.drainButton = h("button", { onclick: () => drain(agent()) }, "Drain");
    this.wakeButton = h("button", { onclick: () => wake(agent()), title: "Send a magic packet (Wake-on-LAN)" }, "Wake");
    this.restartButton = h("button", { onclick: () => restart(agent()), title: "Its agent started this Ollama" }, "Restart Ollama");
    const head = this.head(this.heading, this.pill, h("span.muted.nowrap", null, "for ", this.since), h("div.row.wrap.end", null, this.wakeButton, this.drainButton,
      h("button", { onclick: () => edit(agent()) }, "Edit"), this.restartButton,
      h("button.danger", { onclick: async () => { if (await remove(agent())) location.hash = "#/fleet"; } }, "Remove")));
    this.reason = h("p.notice.bad", { hidden: true });
    this.outdated = h("p.notice", { hidden: true });
    this.about = h("p.muted");
    this.findings = h("ul.findings");
    this.labels = h("div.row.wrap");
    this.bars = memoryBars();
    this.slots = slotDots();
    this.facts = Object.fromEntries(FACTS.map((label) => [label, fact(label)]));
    this.models = h("tbody");
    this.requests = h("tbody");
    this.events = h("ol.events");
    this.content = h("div.stack", null, this.reason, this.findings, this.outdated, this.about, this.labels,
      h("div.card.stack", null, this.bars, this.slots), h("dl.facts.card", null, Object.values(this.facts)),
      charts(this.stopping.signal, this.argument),
      h("h2.section", null, "Models"), box(["Model", "Size", "In memory", "Reads", "Writes", "Loads in", "At once", "Measured"], this.models),
      h("h2.section", null, "Last requests", h("a.small.more", { href: `#/history?agent=${encodeURIComponent(this.argument)}` }, "All of them")),
      box(["Ended", "Model", "Result", "Agent", "Client", "Waited", "First token", "Prompt", "Tokens", "Tokens/s", "Took"], this.requests),
      h("h2.section", null, "Events"), this.events, agentLog(this.stopping.signal, this.argument));
    this.gone = h("div", { hidden: true }, empty("offline", "This agent is not registered", h("p", null, "It was removed, or the address is wrong."), h("a.button", { href: "#/fleet" }, "To the fleet")));
    this.append(h("p.small", null, h("a", { href: "#/fleet" }, "← Fleet")), head, this.gone, this.content);
    const timer = setInterval(() => { if (!document.hidden) this.load(); }, REFRESH_MS);
    this.stopping.signal.addEventListener("abort", () => clearInterval(timer));
    this.load();
  }

  changed(changed) {
    if (!this.concerns(changed, "agents") || (changed && !changed.get("agents").has(this.argument))) return;
    const agent = store.state.agents[this.argument];
    this.gone.hidden = Boolean(agent);
    this.content.hidden = !agent;
    if (agent) this.draw(agent);
  }

  draw(agent) {
    setText(this.heading, agent.name);
    setTitle(agent.name);
    this.pill.update(agent.state);
    setAttr(this.since, "at", agent.since);
    setText(this.drainButton, drainVerb(agent));
    this.wakeButton.hidden = !canWake(agent);
    const why = whyText(agent);
    this.reason.hidden = !why;
    setText(this.reason, why);
    this.reason.classList.toggle("bad", !isOnPurpose(agent));
    this.restartButton.hidden = !agent.owned;
    const findings = agent.findings.filter((one) => !why?.includes(one.text));
    this.findings.hidden = !findings.length;
    this.findings.replaceChildren(...findings.map(findingRow));
    this.outdated.hidden = !agent.outdated;
    setText(this.outdated, outdatedText(agent));
    setText(this.about, aboutText(agent));
    this.labels.replaceChildren(...agent.labels.map((label) => h("span.tag", null, label)));
    this.bars.update(agent);
    this.slots.update(agent);
    const values = {
      Address: `${agent.ip_address}:${agent.ollama_port}`, "Reached at": agent.by_url ? agent.url : agent.link ? "the link that its agent opens" : agent.relay ? `${agent.url} (the agent's relay)` : null,
      Ollama: agent.ollama_version, Agent: agent.agent_version ?? "none, bare Ollama", Platform: agent.platform,
      Registered: fullTime(agent.registered_at), "Last heard": time(agent.last_seen), "Disk free": agent.disk_free_bytes && bytes(agent.disk_free_bytes),
      "Main memory": agent.memory_total_bytes && memory(agent.memory_total_bytes), "Active requests it reports": agent.active_requests === undefined ? null : count(agent.active_requests),
      Preference: agent.preference === 1 ? null : String(agent.preference),
      Backup: agent.backup_seconds ? `if the others would take ${agent.backup_seconds} s longer` : null, "Network card": agent.mac, "Told by hand": byHandText(agent.by_hand),
      "Other programs": agent.foreign_memory_bytes ? `take ${memory(agent.foreign_memory_bytes)} where models could be` : null, Notes: agent.notes,
    };
    for (const [label, text] of Object.entries(values)) this.facts[label].set(text);
  }

  async load() {
    try {
      const [details, history] = await Promise.all([get(path(["api", "agents", this.argument, "details"])), get(path(["api", "history"], { agent: this.argument, limit: 15 }))]);
      this.models.replaceChildren(...details.models.map(modelRow));
      this.requests.replaceChildren(...(history.requests.length ? history.requests.map(historyRow) : [h("tr", null, h("td.muted", { colspan: "11" }, "It has served no request yet."))]));
      this.events.replaceChildren(...(details.events.length ? details.events.map((event) => eventRow(event)) : [h("li.muted", null, "Nothing was logged since the coordinator started.")]));
    } catch {
      // The stream says what is wrong: the coordinator is away, or the agent is gone.
    }
  }
}

/** What an operator says of the machine, in place of its agent. */
function byHandText(told) {
  if (!told) return null;
  const gpu = told.gpu && (told.gpu === "none" ? "no GPU" : `GPU ${told.gpu}`);
  return [told.slots && `${count(told.slots)} slot${told.slots === 1 ? "" : "s"}`, told.memory_bytes && `${memory(told.memory_bytes)} for models`, gpu].filter(Boolean).join(", ");
}

const TONES = { failed: "bad", warning: "warn" };

/** One thing that its doctor found, and what to do about it. */
function findingRow(finding) {
  return h("li", null, h(`span.pill${TONES[finding.level] ? `.${TONES[finding.level]}` : ""}`, null, finding.check),
    h("div", null, h("p", null, finding.text), finding.remedy ? h("p.muted.small", null, `→ ${finding.remedy}`) : null));
}

function box(columns, body) {
  const texts = new Set(["Model", "Result", "Agent", "Client", "Ended", "In memory"]);
  return h("div.table-box", null, h("table.stacked.finished", null, h("thead", null, h("tr", null, columns.map((text) => h(texts.has(text) ? "th" : "th.num", { scope: "col" }, text)))), body));
}

function modelRow(row) {
  const estimate = row.estimate;
  const measured = estimate ? estimate.samples[1] : 0;
  const per = (value) => (estimate ? `${rate(value)} tok/s` : "–");
  const cell = (label, text) => h("td.num", { "data-label": label }, text);
  return h(estimate && !measured ? "tr.guessed" : "tr", null, h("td", null, h("a", { href: `#/models/${encodeURIComponent(row.name)}` }, model(row.name))), cell("size", bytes(row.size)), h("td", null, row.loaded ? h("span.pill.good", null, "loaded") : ""),
    cell("reads", per(estimate?.prefill_tokens_per_second)), cell("writes", per(estimate?.decode_tokens_per_second)), cell("loads in", estimate ? seconds(estimate.load_seconds) : "–"),
    cell("at once", estimate ? count(estimate.slots) : "–"), h("td.num.muted", { "data-label": "measured", title: measured ? "" : "Estimated from the model's size until it is measured" }, measured ? `${count(measured)} time${measured === 1 ? "" : "s"}` : "estimated"));
}

customElements.define("agent-view", AgentView);
