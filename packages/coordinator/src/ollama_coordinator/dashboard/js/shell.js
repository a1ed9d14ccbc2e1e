/** The frame around the views: navigation, the fleet in five numbers, the state of the line. */

import { call, get } from "./api.js";
import { h, icon, setAttr, setText } from "./dom.js";
import { count, rate } from "./format.js";
import { live } from "./live.js";
import { store } from "./store.js";
import { help } from "./keys.js";
import { openJoining } from "./parts/joining.js";
import "./parts/spark.js";
import "./parts/clock.js";

const ENTRIES = [
  ["fleet", "Fleet"], ["now", "Now"], ["attention", "Attention"], ["models", "Models"], ["history", "History"], ["usage", "Usage"], ["try", "Try it"], ["access", "Keys"], ["audit", "Audit"], ["settings", "Settings"],
];

/** The viewer's choice, or what the system prefers. */
export function applyTheme() {
  const theme = localStorage.getItem("theme");
  setAttr(document.documentElement, "data-theme", theme === "light" || theme === "dark" ? theme : null);
}

function toggleTheme() {
  const dark = document.documentElement.dataset.theme
    ? document.documentElement.dataset.theme === "dark"
    : matchMedia("(prefers-color-scheme: dark)").matches;
  localStorage.setItem("theme", dark ? "light" : "dark");
  applyTheme();
  dispatchEvent(new Event("themechange"));
}

async function logOut() {
  await call("DELETE", "dashboard/session");
  location.reload();
}

export function buildShell() {
  const links = ENTRIES.map(([name, label]) =>
    h("a", { href: `#/${name}`, "data-view": name }, icon(name), h("span", null, label), h("span.count", { "data-count": name })));
  const version = h("span");
  const leave = h("button.ghost.small", { onclick: logOut, hidden: true }, "Log out");
  get("api/session").then(({ name, session }) => { leave.hidden = !session; leave.title = `Logged in with the key '${name}'`; }, () => null);
  const side = h("aside.side", { "aria-label": "Navigation" },
    h("a.brand", { href: "#/fleet" }, icon("fleet"), h("span", null, "Ollama Coordinator")),
    h("nav.nav", { "aria-label": "Views" }, links),
    h("button.add-machine", { onclick: openJoining, title: "Add a machine" }, icon("add"), h("span", null, "Add a machine")),
    h("footer", null, version, leave,
      h("button.ghost.small.end", { onclick: toggleTheme, "aria-label": "Switch between dark and light", title: "Dark or light" }, icon("theme")),
      h("button.ghost.small", { onclick: () => help(), "aria-label": "Keyboard help", title: "Keyboard (?)" }, icon("help"))));
  const strip = buildStrip();
  const lost = h("div.notice.lost", { role: "status", hidden: true });
  const main = h("main", { id: "main", tabindex: "-1" });
  const skip = h("a.skip", { href: "#main", onclick: (event) => { event.preventDefault(); main.focus(); } }, "Skip to content");
  document.body.append(skip, side, h("div", null, strip.element, lost), main, h("div.toasts", { role: "status", "aria-live": "polite" }));
  store.subscribe(() => {
    strip.update();
    setText(version, `v${store.state.coordinator.version ?? ""}`);
    const problem = store.state.coordinator.problem;
    if (live.state === "live") { lost.hidden = !problem; setText(lost, problem ?? ""); }
    counts();
  });
  live.listeners.add(() => tellLine(lost));
  setInterval(() => { if (live.state === "lost") tellLine(lost); }, 1000);
}

let title = "";

/** The tab's title: how much needs attention, which view it is. */
export function setTitle(view) {
  title = view;
  const open = Object.keys(store.state.attention ?? {}).length;
  document.title = `${open ? `(${open}) ` : ""}${title} · Ollama Coordinator`;
}

/** Which entry is the current one. */
export function markView(name) {
  for (const link of document.querySelectorAll(".nav a")) {
    setAttr(link, "aria-current", link.dataset.view === name ? "page" : null);
  }
}

function counts() {
  const { fleet } = store.state;
  const active = (fleet.in_flight ?? 0) + (fleet.waiting ?? 0);
  setText(document.querySelector('[data-count="now"]'), active ? count(active) : "");
  setText(document.querySelector('[data-count="fleet"]'), fleet.agents ? count(fleet.agents) : "");
  const open = Object.values(store.state.attention ?? {});
  const badge = document.querySelector('[data-count="attention"]');
  setText(badge, open.length ? count(open.length) : "");
  setAttr(badge, "data-severity", ["critical", "warning", "note"].find((severity) => open.some((one) => one.severity === severity)));
  setTitle(title);
}

function tellLine(lost) {
  const gone = live.state === "lost";
  document.body.classList.toggle("stale", gone);
  const silent = Math.round((Date.now() - live.since) / 1000);
  lost.hidden = !gone && !store.state.coordinator.problem;
  setText(lost, gone ? `Connection to the coordinator lost ${silent} s ago. Reconnecting…` : store.state.coordinator.problem ?? "");
  const pill = document.querySelector(".link-state");
  const [text, tone, name] = { live: ["Live", "good", "online"], lost: ["Reconnecting", "bad", "resting"], connecting: ["Connecting", "", "offline"] }[live.state];
  if (pill.dataset.state === live.state) return;
  pill.dataset.state = live.state;
  pill.className = `pill link-state ${tone}`;
  pill.replaceChildren(icon(name), document.createTextNode(text));
}

function buildStrip() {
  const stat = (label, title) => {
    const value = h("b", null, "–");
    return { value, element: h("div.stat", { title }, value, h("span", null, label)) };
  };
  const online = stat("online", "Agents in rotation, of all agents");
  const flight = stat("in flight", "Requests on an agent");
  const slots = h("span");
  flight.element.append(slots);
  const waiting = stat("waiting", "Requests in the queue");
  const speed = stat("tokens/s", "Tokens written in the whole fleet, in the last 5 seconds");
  const spark = document.createElement("oc-spark");
  spark.setAttribute("label", "Tokens per second in the last minutes");
  speed.element.append(spark);
  const element = h("header.strip", { "aria-label": "The fleet in numbers" },
    online.element, flight.element, waiting.element, speed.element,
    h("span.pill.link-state", { role: "status" }, icon("offline"), "Connecting"));
  const update = () => {
    const { fleet } = store.state;
    setText(online.value, `${count(fleet.states?.online ?? 0)}/${count(fleet.agents ?? 0)}`);
    setText(flight.value, count(fleet.in_flight));
    setText(slots, fleet.slots ? `of ${count(Math.max(fleet.slots, fleet.in_flight))} slots` : "");
    setAttr(slots, "title", "Slots of all models in memory: so many requests can run at once");
    setText(waiting.value, count(fleet.waiting));
    setText(speed.value, rate(fleet.sparkline?.[1] ?? 0));
    spark.points = store.sparks.fleet;
  };
  return { element, update };
}
