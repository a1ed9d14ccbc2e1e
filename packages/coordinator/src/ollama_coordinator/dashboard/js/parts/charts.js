/** The charts of the fleet and of one agent, and the time they show. */

import { get, path } from "../api.js";
import { h } from "../dom.js";
import { percent, rate, seconds } from "../format.js";
import { segmented } from "./bits.js";
import { chart } from "./chart.js";

const SPANS = [[15, "15 min"], [60, "1 h"], [360, "6 h"], [1440, "24 h"], [10080, "7 d"], [43200, "30 d"]];
const REFRESH_MS = 10_000;

const one = "var(--series-0)";
const two = "var(--series-4)";
const three = "var(--series-1)";
const four = "var(--series-2)";

const COMMON = [
  { title: "Tokens written", unit: (value) => `${rate(value)}/s`, series: [{ label: "tokens per second", field: "tokens_per_second", tone: one, fill: true }] },
  { title: "Time to first token", unit: seconds, series: [{ label: "half are faster", field: "first_token_p50", tone: one }, { label: "95 % are faster", field: "first_token_p95", tone: two, dash: true }] },
  { title: "Requests per minute", unit: rate, series: [{ label: "ended", field: "requests", tone: one, fill: true, perMinute: true }, { label: "failed", field: "failed", tone: two, perMinute: true }, { label: "cancelled", field: "cancelled", tone: three, dash: true, perMinute: true }] },
];
const FLEET = [
  ...COMMON,
  { title: "Speed of one request", unit: (value) => `${rate(value)}/s`, series: [{ label: "tokens per second, mean", field: "request_tokens_per_second", tone: three }] },
  { title: "In flight and waiting", unit: rate, series: [{ label: "waiting, mean", field: "waiting", tone: two, fill: true }, { label: "waiting, most", field: "waiting_most", tone: four, dash: true }, { label: "in flight, mean", field: "in_flight", tone: one }] },
];
const HARDWARE = [
  { title: "Use", unit: percent, max: 100, series: [{ label: "GPU", field: "gpu_percent", tone: one }, { label: "CPU", field: "cpu_percent", tone: two }] },
  { title: "Memory", unit: percent, max: 100, series: [{ label: "GPU memory", field: "vram_percent", tone: one }, { label: "main memory", field: "memory_percent", tone: two }] },
  { title: "Hottest GPU", unit: (value) => `${Math.round(value)} °C`, series: [{ label: "temperature", field: "temperature_celsius", tone: two }] },
];
const AGENT = [
  ...COMMON,
  { title: "In flight", unit: rate, series: [{ label: "mean", field: "in_flight", tone: one, fill: true }, { label: "most", field: "in_flight_most", tone: two, dash: true }] },
  ...HARDWARE,
];

/**
 * The charts with their choice of time; they refresh themselves until `signal` aborts.
 * @param {AbortSignal} signal
 * @param {string} [agent] an agent's id; without it the whole fleet
 */
export const charts = (signal, agent) => chartsOf(agent ? AGENT : FLEET, signal, agent);

/** What the machines of the whole fleet measure: means of those that are online, and the hottest. */
export const hardware = (signal) => chartsOf(HARDWARE, signal);

function chartsOf(wanted, signal, agent) {
  const spans = agent ? SPANS.slice(0, 5) : SPANS;
  let minutes = Number(localStorage.getItem("span")) || 60;
  if (!spans.some(([span]) => span === minutes)) minutes = 60;
  const all = wanted.map((options) => chart(options));
  const problem = h("p.notice.bad", { hidden: true });
  let turn = 0;
  const refresh = async () => {
    const mine = ++turn;
    try {
      const { points } = await get(path(["api", "statistics"], { minutes, agent }));
      if (mine !== turn || signal.aborted) return;
      problem.hidden = true;
      for (const element of all) element.draw(points);
    } catch (error) {
      problem.textContent = error.message;
      problem.hidden = false;
    }
  };
  const choose = segmented("Time", spans, minutes, (span) => { minutes = span; localStorage.setItem("span", String(span)); refresh(); });
  const timer = setInterval(() => { if (!document.hidden) refresh(); }, REFRESH_MS);
  signal.addEventListener("abort", () => clearInterval(timer));
  refresh();
  return h("section.stack", { "aria-label": "Charts" }, h("h2.visually-hidden", null, "Charts"), h("div.row", null, choose), problem, h("div.charts", null, all.map((element) => h("div.card", null, element))));
}
