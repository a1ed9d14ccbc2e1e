/** Numbers and times as people read them; times are in the viewer's zone. */

const integer = new Intl.NumberFormat(undefined, { maximumFractionDigits: 0 });
const oneDigit = new Intl.NumberFormat(undefined, { maximumFractionDigits: 1 });
const clock = new Intl.DateTimeFormat(undefined, { hour: "2-digit", minute: "2-digit", second: "2-digit" });
const dated = new Intl.DateTimeFormat(undefined, { month: "short", day: "numeric", hour: "2-digit", minute: "2-digit", second: "2-digit" });
const full = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "long" });

const NOTHING = "–";

export const isNumber = (value) => typeof value === "number" && Number.isFinite(value);

export function count(value) {
  return isNumber(value) ? integer.format(value) : NOTHING;
}

/** A rate or another number that may be small: 0.4, 12.5, 1,204. */
export function rate(value) {
  if (!isNumber(value)) return NOTHING;
  return value >= 100 ? integer.format(value) : oneDigit.format(value);
}

export function percent(value) {
  return isNumber(value) ? `${integer.format(value)} %` : NOTHING;
}

/** Bytes in units of 1000, as disks and Ollama itself count. */
export function bytes(value) {
  if (!isNumber(value)) return NOTHING;
  const units = ["B", "KB", "MB", "GB", "TB", "PB"];
  let unit = 0;
  let size = Math.abs(value);
  while (size >= 1000 && unit < units.length - 1) { size /= 1000; unit += 1; }
  return `${size >= 100 || unit === 0 ? integer.format(size) : oneDigit.format(size)} ${units[unit]}`;
}

/** Memory in units of 1024, as machines are sold. */
export function memory(value) {
  return isNumber(value) ? `${oneDigit.format(value / 2 ** 30)} GiB` : NOTHING;
}

/** A duration in seconds: 35 ms, 4.2 s, 3 min 20 s, 2 h 5 min, 3 d 4 h. */
export function seconds(value) {
  if (!isNumber(value)) return NOTHING;
  if (value < 0) return "0 s";
  if (value < 1) return `${Math.round(value * 1000)} ms`;
  if (value < 59.95) return `${oneDigit.format(value)} s`;
  return coarse(value);
}

/** The same without fractions, for what counts up. */
export function coarse(value) {
  const s = Math.max(0, Math.floor(value));
  if (s < 60) return `${s} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min ${s % 60} s`;
  if (s < 86400) return `${Math.floor(s / 3600)} h ${Math.floor((s % 3600) / 60)} min`;
  return `${Math.floor(s / 86400)} d ${Math.floor((s % 86400) / 3600)} h`;
}

/** A time of today as a clock, an older one with its date. */
export function time(iso) {
  const at = new Date(iso);
  if (Number.isNaN(at.getTime())) return NOTHING;
  return at.toDateString() === new Date().toDateString() ? clock.format(at) : dated.format(at);
}

export function fullTime(iso) {
  const at = new Date(iso);
  return Number.isNaN(at.getTime()) ? "" : full.format(at);
}

/** A model's name without the tag that everybody means. */
export function model(name) {
  return String(name ?? "").replace(/:latest$/, "");
}

const COLOURS = 8;
const coloured = new Map();

/** One of eight colours, the same for a name everywhere on this page; two names share one late. */
export function hue(name) {
  if (!coloured.has(name)) {
    let hash = 7;
    for (const sign of String(name)) hash = (hash * 31 + sign.codePointAt(0)) >>> 0;
    const uses = Array.from({ length: COLOURS }, (_, index) => [...coloured.values()].filter((used) => used === index).length);
    const least = Math.min(...uses);
    let colour = hash % COLOURS;
    while (uses[colour] !== least) colour = (colour + 1) % COLOURS;
    coloured.set(name, colour);
  }
  return `var(--series-${coloured.get(name)})`;
}

export const STATES = {
  online: { label: "Online", tone: "good", icon: "online" },
  draining: { label: "Draining", tone: "warn", icon: "draining" },
  paused: { label: "Paused", tone: "warn", icon: "paused" },
  resting: { label: "Out of rotation", tone: "bad", icon: "resting" },
  asleep: { label: "Asleep", tone: "", icon: "asleep" },
  offline: { label: "Offline", tone: "", icon: "offline" },
};

export const REQUEST_STATES = {
  waiting: { label: "Waiting", tone: "warn", icon: "history" },
  loading: { label: "Loading model", tone: "accent", icon: "down" },
  reading: { label: "Reading prompt", tone: "accent", icon: "search" },
  writing: { label: "Writing", tone: "good", icon: "now" },
  served: { label: "Served", tone: "good", icon: "check" },
  refused: { label: "Refused", tone: "warn", icon: "resting" },
  failed: { label: "Failed", tone: "bad", icon: "close" },
  cancelled: { label: "Cancelled", tone: "", icon: "stop" },
};
