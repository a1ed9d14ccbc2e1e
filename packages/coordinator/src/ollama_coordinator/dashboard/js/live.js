/** The event stream: connected, lost and found again by itself. */

import { takeOver } from "./early.js";
import { get } from "./api.js";
import { store } from "./store.js";

const SILENCE_MS = 40_000;
const AGAIN_MS = 1_500;

/** What the stream is doing: "connecting", "live" or "lost"; listeners hear of changes. */
export const live = {
  state: "connecting",
  since: Date.now(),
  listeners: new Set(),
};

let source = null;
let silence = 0;

function become(state) {
  if (live.state === state) return;
  live.state = state;
  live.since = Date.now();
  for (const listener of live.listeners) listener(live);
}

function heard() {
  become("live");
  clearTimeout(silence);
  // A line that went dead without a word (a laptop that slept) is given up.
  silence = setTimeout(() => { become("lost"); open(); }, SILENCE_MS);
}

const HEARING = {
  snapshot: (event) => { store.snapshot(JSON.parse(event.data)); heard(); },
  patch: (event) => { store.patch(JSON.parse(event.data)); heard(); },
  beat: heard,
};

function open() {
  source?.close();
  source = takeOver(HEARING) ?? new EventSource("dashboard/events");
  for (const [kind, hear] of Object.entries(HEARING)) source.addEventListener(kind, hear);
  source.addEventListener("error", () => {
    become("lost");
    // The browser comes back by itself after a cut line, not after an answer it did not like.
    if (source.readyState === EventSource.CLOSED) setTimeout(again, AGAIN_MS);
  });
}

/** Open the stream anew, once it is known that this page may still look on. */
async function again() {
  await get("api/session").catch(() => null);
  open();
}

/** Start listening. */
export function connect() {
  open();
  addEventListener("pagehide", () => source?.close());
  addEventListener("pageshow", (event) => { if (event.persisted) open(); });
}
