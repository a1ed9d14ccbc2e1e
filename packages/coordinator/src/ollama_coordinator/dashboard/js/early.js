/** The event stream, opened before the rest of the page is here; what comes meanwhile is kept. */

const KINDS = ["snapshot", "patch", "beat"];

/** What was opened early; `null` once somebody has taken it over. */
let early = { source: new EventSource("dashboard/events"), kept: [] };
const keep = (event) => early.kept.push(event);
for (const kind of KINDS) early.source.addEventListener(kind, keep);

/**
 * Take the stream over, once: `null` when it was taken or has already failed.
 * @param {Record<string, (event: MessageEvent) => void>} listeners by kind; they hear what was kept
 * @returns {EventSource | null}
 */
export function takeOver(listeners) {
  const mine = early;
  early = null;
  if (!mine) return null;
  for (const kind of KINDS) mine.source.removeEventListener(kind, keep);
  if (mine.source.readyState === EventSource.CLOSED) return null;
  for (const event of mine.kept) listeners[event.type](event);
  return mine.source;
}
