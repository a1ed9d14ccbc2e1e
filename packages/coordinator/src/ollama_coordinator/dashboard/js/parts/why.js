/** Why a request went where it went: its attempts, the candidates and their estimates. */

import { get, path } from "../api.js";
import { h } from "../dom.js";
import { count, fullTime, model, rate, seconds, time } from "../format.js";
import { requestPill } from "./bits.js";
import { openDialog } from "./dialog.js";

const TERMS = [
  ["wait_seconds", "wait for a place"], ["load_seconds", "load the model"], ["prefill_seconds", "read the prompt"],
  ["decode_seconds", "write, as its receiver feels it"], ["crowding_seconds", "crowding"], ["evict_seconds", "models pushed out"], ["failure_seconds", "recent failures"], ["backup_seconds", "it is a backup"],
];
/** The same colour for a term in every row. */
const TONES = new Map(TERMS.map(([field], index) => [field, `var(--series-${index})`]));
const SHOWN_AT_ONCE = 8;
const ACTIONS = { go: "goes at once", load: "loads the model", wait: "waits" };

/** Open the panel of a request. */
export async function openWhy(id) {
  const body = h("div.stack", null, h("p.muted", null, "…"));
  openDialog(`Request ${id}`, body, { panel: true });
  try {
    body.replaceChildren(...content(await get(path(["api", "requests", id]))));
  } catch (error) {
    body.replaceChildren(h("p.notice.bad", null, error.message));
  }
}

function content(request) {
  const state = requestPill();
  state.update(request.status ?? request.state);
  const parts = [h("div.row", null, state, h("span.muted", null, model(request.model))), facts(request)];
  const lane = request.lane_reason || attempts(request).map((one) => one.decision?.lane_reason).find(Boolean);
  if (lane) parts.push(h("p.notice", null, `Lane: ${lane}. The header X-Ollama-Coordinator-Lane: interactive overrules it.`));
  if (request.error) parts.push(h("p.notice.bad", null, request.error));
  const tried = attempts(request);
  if (tried.length) parts.push(h("h2", null, tried.length > 1 ? `${tried.length} attempts` : "Why this agent"));
  else parts.push(h("p.muted", null, request.state === "waiting" ? "It has no lease yet; this is what would be decided now." : "It never got a lease on an agent."));
  for (const attempt of tried) parts.push(attemptPart(attempt, tried.length > 1));
  if (request.now) parts.push(h("h2", null, "If it were decided now"), request.now.rule ? h("p.rule", null, h("b", null, "Decided by "), `${request.now.rule}.`) : null, h("p.muted.small", null, sentence(request.now)), candidates(request.now));
  return parts.filter(Boolean);
}

const attempts = (request) => (Array.isArray(request.attempts) ? request.attempts : []);
const tokens = (many) => `${count(many)} ${many === 1 ? "token" : "tokens"}`;

function facts(request) {
  const list = [
    ["Asked for", request.alias], ["Lane", request.lane], ["Route", request.path], ["Client", request.client], ["Agent", request.agent],
    ["Arrived", fullTime(request.arrived_at)], ["Waited", request.waited_seconds !== undefined && seconds(request.waited_seconds)],
    ["Loading", request.load_seconds && seconds(request.load_seconds)], ["First token", request.first_token_seconds && seconds(request.first_token_seconds)],
    ["Took", request.total_seconds !== undefined && seconds(request.total_seconds)], ["End expected", request.ends_at && time(request.ends_at)], ["Prompt", request.prompt_tokens && `${tokens(request.prompt_tokens)}${request.state === "finished" ? "" : " (estimate)"}`],
    ["Written", request.output_tokens && tokens(request.output_tokens)], ["Speed", request.tokens_per_second && `${rate(request.tokens_per_second)} tokens/s`], ["Status", request.http_status || null],
  ];
  return h("dl.facts", null, list.filter(([, value]) => value).map(([label, value]) => h("div.fact", null, h("dt", null, label), h("dd", null, value))));
}

function attemptPart(attempt, several) {
  const parts = [];
  if (several || attempt.reason) {
    parts.push(h("p", null, h("b", null, attempt.agent), attempt.result ? ` – ${attempt.result}` : "", attempt.reason ? h("span.muted", null, `: ${attempt.reason}`) : ""));
  }
  if (attempt.continues) parts.push(h("p", null, `It went on after ${tokens(attempt.continues)} of the answer.`));
  parts.push(h("p.rule", null, h("b", null, "Decided by "), attempt.rule || attempt.decision?.rule || "a policy that counts and does not predict", "."));
  if (attempt.decision) parts.push(h("p.muted.small", null, sentence(attempt.decision)), candidates(attempt.decision, attempt.agent_id));
  const refused = Object.entries(attempt.refused ?? {});
  if (refused.length) {
    parts.push(h("h3", null, "Holders that could not take it"),
      h("ul.refusals", null, refused.map(([agent, reason]) => h("li", null, h("b", null, agent), h("span.muted", null, `: ${reason}`)))));
  }
  return h("div.stack", null, parts);
}

function sentence(decision) {
  const expected = decision.expected_output_tokens ? ` An answer of about ${count(decision.expected_output_tokens)} tokens was expected.` : "";
  return `Sorted by cost, in predicted seconds: the lowest one wins.${expected}`;
}

function candidates(decision, chosen = decision.chosen) {
  const known = decision.candidates ?? [];
  if (!known.length) return h("p.muted", null, "No other agent could serve it.");
  const most = Math.max(...known.map((one) => one.cost ?? 0), 0.001);
  const seen = new Set();
  const rows = known.map((one) => {
    const first = one.agent_id === chosen && one.action === decision.action && !seen.has(chosen);
    if (first) seen.add(chosen);
    return candidate(one, first, most);
  });
  const dearer = rows.length > SHOWN_AT_ONCE + 2 ? rows.splice(SHOWN_AT_ONCE) : [];
  return h("div.stack", null, h("ol.candidates", null, rows),
    dearer.length ? h("details", null, h("summary", null, `${count(dearer.length)} more candidates, dearer or refused`), h("ol.candidates", { start: SHOWN_AT_ONCE + 1 }, dearer)) : null,
    decision.unevaluated ? h("p.muted.small", null, unevaluated(decision.unevaluated)) : null);
}

function unevaluated(many) {
  const machines = many === 1 ? "One more machine has" : `${count(many)} more machines have`;
  return `${machines} the model and ${many === 1 ? "was" : "were"} not evaluated in detail: at most 50 are for one request, and 2,000 a second in all.`;
}

function candidate(one, chosen, most) {
  const terms = TERMS.filter(([field]) => one[field] > 0.0005);
  const bar = h("div.cost", { "aria-hidden": "true" }, terms.map(([field, label]) =>
    h("i", { title: `${label}: ${seconds(one[field])}`, style: { width: `${(100 * one[field]) / most / (one.preference || 1)}%`, "--tone": TONES.get(field) } })));
  const details = one.refused ?? (terms.map(([field, label]) => `${label} ${seconds(one[field])}`).join(", ") || "nothing to wait for");
  const extras = [one.cached_tokens && `${count(one.cached_tokens)} prompt tokens cached`, one.preference && one.preference !== 1 && `preference ${one.preference}`, one.unload?.length && `unloads ${one.unload.map(shortModel).join(", ")}`];
  return h(chosen ? "li.chosen" : "li", null,
    h("div.row", null, h("b.clip", null, one.agent), h("span.muted.small.grow.nowrap", null, one.refused ? "refused" : ACTIONS[one.action] ?? one.action), chosen ? h("span.pill.good", null, "chosen") : null, h("span.num", null, one.cost === null || one.cost === undefined ? "–" : seconds(one.cost))),
    one.refused ? null : bar, h("p.muted.small", null, [details, ...extras.filter(Boolean)].join(" · ")));
}

function shortModel(key) {
  return model(key.replace(/^registry\.ollama\.ai\/library\//, ""));
}
