/** A machine's memory as a bar: each loaded model a segment, what else is used, what is free. */

import { h, keyed, setAttr, setText } from "../dom.js";
import { hue, isNumber, memory, model, percent } from "../format.js";

/** One bar for all GPUs together (Ollama spreads a model over them), or for main memory. */
export function memoryBars() {
  const title = h("span.clip.grow");
  const value = h("span.nowrap");
  const track = h("div.track", { role: "img" });
  const each = h("ul.gpus");
  const element = h("div.memory", null, h("div.row.small.muted", null, title, value), track, each);
  element.update = (agent) => {
    const pool = poolOf(agent);
    element.hidden = !pool;
    if (!pool) return;
    setText(title, pool.title);
    const other = pool.parts.find((part) => !part.tone);
    setText(value, `${bare(pool.used)} of ${memory(pool.total)} used${other ? `, ${bare(other.bytes)} by others` : ""}`);
    setAttr(value, "title", other ? "The hatched part: what other programs and Ollama itself use beside the models" : null);
    setAttr(track, "aria-label", spoken(pool));
    keyed(track, pool.parts, (part) => part.key, segment);
    keyed(each, agent.gpus.length > 1 ? agent.gpus.map((gpu, place) => ({ ...gpu, place })) : [], (gpu) => String(gpu.place), gpuLine);
  };
  return element;
}

const bare = (bytes) => memory(bytes).replace(" GiB", "");

/** @returns {{title: string, total: number, used: number, parts: {key: string, label: string, bytes: number, share: number, tone: string}[]} | null} */
export function poolOf(agent) {
  const gpus = agent.gpus.filter((gpu) => gpu.memory_total_bytes);
  const onGpu = gpus.length > 0;
  const told = agent.by_hand ?? {};
  const total = told.memory_bytes ?? (onGpu ? gpus.reduce((sum, gpu) => sum + gpu.memory_total_bytes, 0) : agent.memory_total_bytes);
  if (!total) return null;
  const sizes = agent.loaded_models.map((row) => ({ name: row.name, bytes: onGpu ? row.size_vram ?? 0 : row.size ?? 0 })).filter((row) => row.bytes > 0);
  const models = sizes.reduce((sum, row) => sum + row.bytes, 0);
  const reported = onGpu
    ? gpus.reduce((sum, gpu) => sum + (gpu.memory_used_bytes ?? 0), 0)
    : isNumber(agent.memory_usage) ? (agent.memory_usage / 100) * (agent.memory_total_bytes ?? 0) : 0;
  const other = Math.max(0, reported - models);
  const used = Math.min(total, models + other);
  const parts = sizes.map((row) => ({ key: row.name, label: model(row.name), bytes: row.bytes, share: row.bytes / total, tone: hue(row.name) }));
  if (other > total * 0.004) parts.push({ key: "\u0000other", label: "other", bytes: other, share: other / total, tone: "" });
  const names = [...new Set(gpus.map((gpu) => gpu.name))];
  const byHand = told.gpu && told.gpu !== "none" ? `${told.gpu} (told by hand)` : told.memory_bytes && "Memory for models (told by hand)";
  const title = byHand || (onGpu ? `${gpus.length > 1 ? `${gpus.length} × ` : ""}${names.join(", ")}` : agent.gpus.length ? "Main memory, which the GPU shares" : "Main memory (no GPU reported)");
  return { title, total, used, parts };
}

function spoken(pool) {
  const parts = pool.parts.map((part) => `${part.label} ${memory(part.bytes)}`);
  return `${memory(pool.used)} of ${memory(pool.total)} used${parts.length ? `: ${parts.join(", ")}` : ""}`;
}

function segment(part) {
  const element = h("span.segment", part.tone ? { style: { "--tone": part.tone } } : { "data-other": true });
  element.update = (now) => {
    element.style.setProperty("width", `${Math.min(100, now.share * 100).toFixed(2)}%`);
    setAttr(element, "title", `${now.label}: ${memory(now.bytes)}`);
    setText(element, now.tone && now.share > 0.16 ? now.label : "");
  };
  return element;
}

function gpuLine(gpu) {
  const text = h("span.grow.clip");
  const value = h("span.nowrap");
  const element = h("li.small.muted.row", null, text, value);
  element.update = (now) => {
    setText(text, `${now.index ?? 0} · ${now.name}`);
    const facts = [
      now.memory_total_bytes && `${memory(now.memory_used_bytes ?? 0)} / ${memory(now.memory_total_bytes)}`,
      isNumber(now.utilization_percent) && percent(now.utilization_percent),
      isNumber(now.temperature_celsius) && `${Math.round(now.temperature_celsius)} °C`,
    ];
    setText(value, facts.filter(Boolean).join(" · "));
  };
  return element;
}
