/** One machine as a row, for large fleets. */

import { h, keyed, setAttr, setText } from "../dom.js";
import { isNumber, memory, percent, rate } from "../format.js";
import { store } from "../store.js";
import { agentName, agentPill, columnHead } from "./bits.js";
import { poolOf } from "./memory.js";
import { slotDots } from "./agent-card.js";
import { agentMenu } from "./agent-actions.js";

export function agentRowHead() {
  const columns = ["Agent", "State", "Memory, and what is loaded", "Free", "CPU", "GPU", "In flight", "Tokens/s", ""];
  return h("thead", null, h("tr", null, columns.map(columnHead)));
}

export function agentRow(agent) {
  const name = agentName(agent.id);
  const about = h("div.muted.small.clip");
  const state = agentPill();
  const since = h("oc-since");
  const track = h("div.track.thin", { role: "img" });
  const [free, cpu, gpu, speed] = [h("td.num"), h("td.num"), h("td.num"), h("span")];
  const slots = slotDots((used, total) => `${used} of ${total}`);
  const spark = h("oc-spark", { label: "Tokens per second in the last minutes" });
  const row = h("tr.agent-row", null,
    h("th.name-cell", { scope: "row" }, name, about),
    h("td.nowrap", null, state, h("div.muted.small", null, "for ", since)), h("td.memory-cell", null, track), free, cpu, gpu,
    h("td", null, slots), h("td", null, h("div.row.speed-cell", null, spark, speed)), h("td", null, agentMenu(agent.id)));
  row.update = (now) => {
    name.update(now);
    setText(about, [now.ollama_version, now.ip_address].filter(Boolean).join(" · "));
    state.update(now.state);
    setAttr(since, "at", now.since);
    setAttr(row, "data-state", now.state);
    const pool = poolOf(now);
    track.hidden = !pool;
    if (pool) {
      keyed(track, pool.parts, (part) => part.key, segment);
      setAttr(track, "aria-label", pool.parts.map((part) => part.label).join(", ") || "nothing loaded");
    }
    setText(free, pool ? memory(pool.total - pool.used) : "");
    setText(cpu, percent(now.cpu_usage));
    const load = now.gpus.filter((one) => isNumber(one.utilization_percent));
    setText(gpu, load.length ? percent(load.reduce((sum, one) => sum + one.utilization_percent, 0) / load.length) : "–");
    slots.update(now);
    spark.points = store.sparks.agents[now.id] ?? [];
    setText(speed, rate(now.sparkline?.[1] ?? 0));
    speed.classList.toggle("muted", !now.sparkline?.[1]);
  };
  return row;
}

function segment(part) {
  const element = h("span.segment", part.tone ? { style: { "--tone": part.tone } } : { "data-other": true });
  element.update = (now) => {
    element.style.setProperty("width", `${Math.min(100, now.share * 100).toFixed(2)}%`);
    setAttr(element, "title", `${now.label}: ${memory(now.bytes)}`);
  };
  return element;
}
