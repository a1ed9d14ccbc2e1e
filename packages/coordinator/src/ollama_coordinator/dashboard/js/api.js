/** The coordinator's API. Errors carry its own sentence. */

/** A path as seen from the page, which a reverse proxy may serve below another path. */
const relative = (path) => path.replace(/^\//, "");

/**
 * @param {string} method
 * @param {string} path
 * @param {unknown} [body] sent as JSON
 */
export async function call(method, path, body) {
  const init = { method, headers: {} };
  if (body !== undefined) {
    init.body = JSON.stringify(body);
    init.headers["content-type"] = "application/json";
  }
  let response;
  try {
    response = await fetch(relative(path), init);
  } catch {
    throw new Error("the coordinator does not answer");
  }
  // The session has ended: the page that takes a key is at this page's address.
  if (response.status === 401) location.reload();
  if (!response.ok) throw new Error(await errorText(response));
  if (response.status === 204) return null;
  const text = await response.text();
  return text ? JSON.parse(text) : null;
}

export const get = (path) => call("GET", path);

/** The sentence in an error answer. */
export async function errorText(response) {
  const text = await response.text();
  try {
    const { error } = JSON.parse(text);
    return (typeof error === "string" ? error : error?.message) || text;
  } catch {
    return text || `status ${response.status}`;
  }
}

/** A path with each part escaped and a query without its empty values. */
export function path(parts, query = {}) {
  const pairs = Object.entries(query).filter(([, value]) => value !== "" && value !== null && value !== undefined);
  const search = new URLSearchParams(pairs).toString();
  return `${parts.map(encodeURIComponent).join("/")}${search ? `?${search}` : ""}`;
}

/** Read a streamed answer of JSON lines. */
export async function* lines(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) break;
    const parts = (rest + value).split("\n");
    rest = parts.pop();
    for (const part of parts) if (part.trim()) yield JSON.parse(part);
  }
  if (rest.trim()) yield JSON.parse(rest);
}
