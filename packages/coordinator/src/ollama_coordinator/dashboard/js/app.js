/** The start: theme, stream, and which view is shown for which address. */

import { connect } from "./live.js";
import { applyTheme, buildShell, markView, setTitle } from "./shell.js";
import { listenToKeys } from "./keys.js";

/** Views by the first part of the address after `#/`; each module is fetched when it is wanted. */
const VIEWS = {
  fleet: ["fleet-view", () => import("./views/fleet.js"), "Fleet"],
  agents: ["agent-view", () => import("./views/agent.js"), "Agent"],
  now: ["now-view", () => import("./views/now.js"), "Now"],
  attention: ["attention-view", () => import("./views/attention.js"), "Attention"],
  models: ["models-view", () => import("./views/models.js"), "Models"],
  model: ["model-view", () => import("./views/model.js"), "Model"],
  history: ["history-view", () => import("./views/history.js"), "History"],
  usage: ["usage-view", () => import("./views/usage.js"), "Usage"],
  try: ["try-view", () => import("./views/try.js"), "Try it"],
  access: ["access-view", () => import("./views/access.js"), "Keys"],
  audit: ["audit-view", () => import("./views/audit.js"), "Audit"],
  settings: ["settings-view", () => import("./views/settings.js"), "Settings"],
};

/** Views that are a part of another one, without a digit of their own. */
const PARTS = new Set(["agents", "model"]);

let shown = 0;

async function show() {
  const [path, query] = location.hash.replace(/^#\/?/, "").split("?");
  const [name, ...rest] = path.split("/").map(decodeURIComponent);
  const [tag, load, title] = VIEWS[name === "models" && rest.length ? "model" : name] ?? VIEWS.fleet;
  const turn = ++shown;
  await load();
  if (turn !== shown) return;
  const view = document.createElement(tag);
  view.argument = rest.join("/");
  view.query = new URLSearchParams(query ?? "");
  const main = document.querySelector("main");
  const first = !main.firstElementChild;
  main.replaceChildren(view);
  main.scrollTop = 0;
  setTitle(title);
  markView(VIEWS[name] ? (name === "agents" ? "fleet" : name) : "fleet");
  if (!first) view.querySelector("h1")?.focus();
}

/** Text that is cut is told whole to who points at it. */
function tellWhole({ target }) {
  const cut = target.closest?.(".clip");
  if (!cut || (cut.title && cut.dataset.cut === undefined)) return;
  if (cut.scrollWidth > cut.clientWidth) [cut.title, cut.dataset.cut] = [cut.textContent, ""];
  else cut.removeAttribute("title");
}

applyTheme();
addEventListener("pointerover", tellWhole);
buildShell();
listenToKeys(Object.keys(VIEWS).filter((name) => !PARTS.has(name)));
addEventListener("hashchange", show);
connect();
show();
