/** One machine as a card. Built once; `update` changes what differs. */

import { h, icon, keyed, setAttr, setText } from "../dom.js";
import { bytes, count, hue, isNumber, memory, model, percent, rate } from "../format.js";
import { store } from "../store.js";
import { agentName, agentPill } from "./bits.js";
import { memoryBars } from "./memory.js";
import { agentMenu } from "./agent-actions.js";

export function agentCard(agent) {
  const state = agentPill();
  const name = agentName(agent.id);
  const since = h("oc-since");
  const about = h("p.muted.small.clip");
  const reason = h("p.reason.small", { hidden: true });
  const outdated = h("p.muted.small", { hidden: true });
  const labels = h("div.row.wrap.labels");
  const bars = memoryBars();
  const models = h("ul.loaded");
  const meters = h("div.meters");
  const slots = slotDots();
  const spark = h("oc-spark", { label: "Tokens per second in the last minutes" });
  const speed = h("b");
  const card = h("article.card.agent", { "aria-label": "Agent" },
    h("header", null, name, state, h("span.muted.small.nowrap", null, "for ", since), agentMenu(agent.id)), about, reason, outdated, labels, bars, models,
    h("footer", null, meters, h("div.flow", null, slots, spark, h("span.small.nowrap", { title: "Tokens written, in the last 5 seconds" }, h("span.muted", null, "now "), speed, h("span.muted", null, " tok/s")))));
  card.update = (now) => {
    name.update(now);
    setAttr(card, "aria-label", `Agent ${now.name}`);
    setAttr(card, "data-state", now.state);
    state.update(now.state);
    setAttr(since, "at", now.since);
    setText(about, aboutText(now));
    setAttr(about, "title", aboutText(now));
    const why = whyText(now);
    reason.hidden = !why;
    setText(reason, why);
    reason.classList.toggle("calm", isOnPurpose(now));
    outdated.hidden = !now.outdated;
    setText(outdated, outdatedText(now));
    keyed(labels, now.labels, (label) => label, (label) => h("span.tag.clip", null, label));
    labels.hidden = !now.labels.length;
    bars.update(now);
    models.hidden = !now.loaded_models.length;
    keyed(models, now.loaded_models, (row) => row.name, loadedModel);
    keyed(meters, readings(now), (reading) => reading.label, meter);
    slots.update(now);
    spark.points = store.sparks.agents[now.id] ?? [];
    setText(speed, rate(now.sparkline?.[1] ?? 0));
  };
  return card;
}

/** Whether what `whyText` says is as its owner or an operator wants it. */
export const isOnPurpose = (agent) => agent.state === "paused" || Boolean(agent.waking) || (Boolean(agent.overruled) && agent.state === "online");

/** Why it gets no requests, what it may be taken for, or which of its models cannot run. */
export function whyText(agent) {
  if (agent.state === "resting") return agent.out_of_rotation;
  if (agent.waking) return "It was sent a magic packet and has time to wake.";
  if (agent.state === "paused") return `It takes no new requests by itself: ${agent.paused}`;
  if (agent.overruled && agent.paused) return `It serves because an operator overruled it: ${agent.paused}`;
  const broken = Object.entries(agent.broken_models ?? {}).map(([name, fault]) => `${name} is not offered: ${fault}`);
  const avoided = Object.entries(agent.avoided_models ?? {}).map(([name, reason]) => `Others are asked first for ${name}: ${reason}`);
  return agent.conflict || [agent.left_behind, ...broken, ...avoided].filter(Boolean).join("; ");
}

/** What to do about an agent that is older than its coordinator; empty where it is not. */
export function outdatedText(agent) {
  return agent.outdated ? `Its agent ${agent.agent_version} is older than this coordinator, ${store.state.coordinator.version}: run ollama-coordinator-agent upgrade there.` : "";
}

/** Version, address with relay or link, and the platform. */
export function aboutText(agent) {
  const address = agent.by_url ? agent.url : `${agent.ip_address}${agent.link ? " by its link" : `:${agent.ollama_port}${agent.relay ? " by relay" : ""}`}`;
  return [agent.ollama_version && `Ollama ${agent.ollama_version}`, address, agent.models && `${count(agent.models)} model${agent.models === 1 ? "" : "s"} on disk`, agent.platform]
    .filter(Boolean).join(" · ");
}

function loadedModel(row) {
  const mark = h("i.swatch", { style: { background: hue(row.name) } });
  const name = h("span.clip.grow", { title: row.name }, model(row.name));
  const size = h("span.muted");
  const speed = h("span.speed", { title: "Learned: tokens of the prompt read, and of the answer written, per second" });
  const item = h("li", null, mark, name, speed, size);
  item.update = (now) => {
    setText(size, now.size ? bytes(now.size) : "");
    setText(speed, now.samples ? `reads ${rate(now.prefill)}, writes ${rate(now.decode)} tok/s` : "");
  };
  return item;
}

function readings(agent) {
  const list = [];
  const push = (label, value, title) => { if (isNumber(value)) list.push({ label, value, text: percent(value), title }); };
  push("CPU", agent.cpu_usage, "CPU of the whole machine");
  push("RAM", agent.memory_usage, agent.memory_total_bytes ? `of ${memory(agent.memory_total_bytes)}` : "Main memory");
  const gpus = agent.gpus.filter((gpu) => isNumber(gpu.utilization_percent));
  if (gpus.length) push("GPU", gpus.reduce((sum, gpu) => sum + gpu.utilization_percent, 0) / gpus.length, gpus.map((gpu) => gpu.name).join(", "));
  const hottest = Math.max(...agent.gpus.map((gpu) => gpu.temperature_celsius ?? -1));
  if (hottest >= 0) list.push({ label: "Temp", value: hottest, text: `${Math.round(hottest)} °C`, title: "The hottest GPU", hot: hottest >= 85 });
  return list;
}

function meter(reading) {
  const value = h("b");
  const bar = h("i");
  const element = h("div.meter", { title: reading.title }, h("span.muted.small", null, reading.label), value, h("span.meter-bar", null, bar));
  element.update = (now) => {
    setText(value, now.text);
    bar.style.setProperty("width", `${Math.min(100, now.value)}%`);
    element.classList.toggle("high", now.hot || (now.label !== "Temp" && now.value >= 90));
  };
  return element;
}

const MOST_DOTS = 8;

/** Slots in use and free: dots while they are few. */
const inUse = (used, total) => `${used} of ${total} slot${total === 1 ? "" : "s"} in use`;

/** A dot for each slot, and how many are in use, in the words of `say`. */
export function slotDots(say = inUse) {
  const dots = h("span.dots", { "aria-hidden": "true" });
  const text = h("span.small");
  const element = h("span.slots", null, dots, text);
  element.update = (agent) => {
    const total = Math.max(agent.slots, agent.in_flight);
    setText(text, say(agent.in_flight, total));
    setAttr(element, "title", "Requests in flight here, and how many the models in memory can run at once");
    const few = total <= MOST_DOTS;
    const wanted = few ? Array.from({ length: total }, (_, index) => ({ key: String(index), used: index < agent.in_flight })) : [];
    keyed(dots, wanted, (dot) => dot.key, () => { const dot = h("i"); dot.update = ({ used }) => dot.classList.toggle("used", used); return dot; });
  };
  return element;
}
