/** An agent's own log, asked for while it is open: the agent sends it with its next heartbeats. */

import { get, path } from "../api.js";
import { h, plain, setText } from "../dom.js";
import { fullTime, time } from "../format.js";

const REFRESH_MS = 2500;
const LONG_SECONDS = 30;

/**
 * @param {AbortSignal} signal ends the questions
 * @param {string} agent its id
 */
export function agentLog(signal, agent) {
  const lines = h("ol.events.log");
  const server = h("pre.log", { tabindex: "0" });
  const state = h("p.muted.small", { role: "status" });
  const serverTitle = h("h3", { hidden: true }, "Log of its ollama serve");
  const box = h("details.card.stack", null, h("summary", null, "The agent's own log"), state, lines, serverTitle, server);
  let last = 0;
  let asking = false;
  const look = async () => {
    // One question at a time: a late answer must not come after a newer one.
    if (asking || !box.open || document.hidden || signal.aborted) return;
    asking = true;
    try {
      const reply = await get(path(["api", "agents", agent, "log"]));
      setText(state, stateText(reply));
      last = showLines(lines, reply.lines, last);
      serverTitle.hidden = server.hidden = !reply.server;
      showServer(server, (reply.server ?? []).join("\n"));
    } catch (error) {
      setText(state, error.message);
    } finally {
      asking = false;
    }
  };
  box.addEventListener("toggle", look);
  const timer = setInterval(look, REFRESH_MS);
  signal.addEventListener("abort", () => clearInterval(timer));
  server.hidden = true;
  return box;
}

function stateText(reply) {
  if (!reply.sends) return "There is no agent of ours on that machine, so there is no log to show.";
  if (reply.reported_at) return `The last ${reply.lines.length} lines. Last sent at ${time(reply.reported_at)}; new ones follow while this is open.`;
  if (reply.asked_seconds > LONG_SECONDS) return "The agent does not send it. It is away, or older than this coordinator.";
  return "Asked. The agent sends it with its next heartbeat, within ten seconds.";
}

/**
 * Lines are added at the end; `last` is the number of the newest that is shown. None at all: the
 * coordinator has forgotten them, and the agent sends them again.
 */
function showLines(list, lines, last) {
  if (!lines.length) {
    list.replaceChildren();
    return 0;
  }
  const atEnd = list.scrollTop + list.clientHeight >= list.scrollHeight - 8;
  for (const line of lines) if (line.number > last) list.append(logRow(line));
  while (list.childElementCount > lines.length) list.firstElementChild.remove();
  if (atEnd) list.scrollTop = list.scrollHeight;
  return lines.at(-1).number;
}

function logRow(line) {
  return h("li", { "data-level": line.level }, h("time", { title: fullTime(line.at) }, time(line.at)), h("span.mono.text", null, line.text));
}

function showServer(element, text) {
  if (element.textContent === plain(text)) return;
  const atEnd = element.scrollTop + element.clientHeight >= element.scrollHeight - 8;
  setText(element, text);
  if (atEnd) element.scrollTop = element.scrollHeight;
}
