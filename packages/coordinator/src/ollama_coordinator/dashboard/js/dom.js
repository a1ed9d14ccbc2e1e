/** Building and updating the page; every text goes in as text, never as markup. */

const SVG = "http://www.w3.org/2000/svg";

/**
 * An element: `h("button.primary", {onclick, "aria-label": "…"}, "text", child)`.
 * @param {string} spec tag with classes
 * @param {Record<string, any>} [props] listeners (on…), attributes, `style` as an object
 * @param {...any} children nodes, texts, arrays; null and false are left out
 * @returns {HTMLElement}
 */
export function h(spec, props, ...children) {
  const [tag, ...classes] = spec.split(".");
  const element = document.createElement(tag || "div");
  if (classes.length) element.className = classes.join(" ");
  setProps(element, props ?? {});
  element.append(...flat(children));
  return element;
}

function setProps(element, props) {
  for (const [name, value] of Object.entries(props)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "style") for (const [key, v] of Object.entries(value)) element.style.setProperty(key, v);
    else if (name === "value" || name === "checked") element[name] = value;
    else element.setAttribute(name, value === true ? "" : plain(String(value)));
  }
}

function flat(children) {
  const shown = children.flat(3).filter((child) => child !== null && child !== undefined && child !== false);
  return shown.map((child) => (typeof child === "string" ? plain(child) : child));
}

// Control characters, and those that turn the direction of the text after them.
const STEERING = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u202a-\u202e\u2066-\u2069]/g;

/** A text with an escape in place of each character that changes how others are shown. */
export function plain(text) {
  return text.replace(STEERING, (found) => (found === "\r" ? "" : `\\u${found.charCodeAt(0).toString(16).padStart(4, "0")}`));
}

/** An SVG element with attributes. */
export function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, String(value));
  element.append(...children);
  return element;
}

const PATHS = {
  fleet: "M4 5h16v5H4zM4 14h16v5H4zM8 7.5h.01M8 16.5h.01",
  now: "M3 12h4l3-8 4 16 3-8h4",
  attention: "M12 3a6 6 0 0 0-6 6v5l-2 3h16l-2-3V9a6 6 0 0 0-6-6zM10 20.5h4",
  models: "M12 3l8 4.5v9L12 21l-8-4.5v-9zM4 7.5l8 4.5 8-4.5M12 12v9",
  history: "M3 12a9 9 0 1 0 3-6.7L3 8M3 3v5h5M12 7v5l3.5 2",
  audit: "M6 3h9l4 4v14H6zM9 11h7M9 15h7M9 7h3",
  usage: "M4 20V10M10 20V4M16 20v-8M22 20H2",
  try: "M4 5h16v11H9l-5 4z",
  access: "M15 4a5 5 0 1 0 0 10 5 5 0 0 0 0-10zM11.5 12.5 4 20v1h3v-2h2v-2l3-3M16 8h.01",
  settings: "M4 7h9M17 7h3M4 17h3M11 17h9M15 4.5v5M9 14.5v5",
  online: "M12 2a10 10 0 1 0 0 20 10 10 0 0 0 0-20z",
  offline: "M12 3a9 9 0 1 0 0 18 9 9 0 0 0 0-18z",
  draining: "M12 3v13m0 0-6-6m6 6 6-6M5 21h14",
  asleep: "M20 14.5A8.5 8.5 0 1 1 9.5 4a7 7 0 0 0 10.500 10.500z",
  paused: "M8 5v14M16 5v14",
  resting: "M12 3 2 21h20zM12 10v5M12 18h.01",
  close: "M6 6l12 12M18 6 6 18",
  copy: "M9 9h11v11H9zM5 15H4V4h11v1",
  search: "M11 4a7 7 0 1 0 0 14 7 7 0 0 0 0-14zM16 16l5 5",
  theme: "M12 3a9 9 0 1 0 9 9 7 7 0 0 1-9-9z",
  stop: "M6 6h12v12H6z",
  send: "M4 12 20 4l-5 16-3-7z",
  image: "M4 5h16v14H4zM4 16l5-5 5 5 2-2 4 4M15 9h.01",
  down: "M12 4v12m0 0-5-5m5 5 5-5M5 20h14",
  trash: "M4 7h16M9 7V4h6v3M6 7l1 13h10l1-13",
  more: "M5 12h.01M12 12h.01M19 12h.01",
  add: "M12 5v14M5 12h14",
  check: "M5 12.5l4.5 4.5L19 7",
  help: "M9 9a3 3 0 1 1 4 2.8c-.8.4-1 .9-1 1.7M12 17h.01M12 2a10 10 0 1 0 0 20 10 10 0 0 0 0-20z",
};

/** A drawn icon; it says nothing to a screen reader, the text beside it does. */
export function icon(name) {
  const filled = name === "online" || name === "stop";
  return svg(
    "svg",
    { viewBox: "0 0 24 24", width: 16, height: 16, fill: filled ? "currentColor" : "none", stroke: "currentColor", "stroke-width": 2, "stroke-linecap": "round", "stroke-linejoin": "round", "aria-hidden": "true" },
    svg("path", { d: PATHS[name] ?? "" }),
  );
}

/** Set an element's text if it differs. */
export function setText(element, text) {
  const value = text === null || text === undefined ? "" : plain(String(text));
  if (element.textContent !== value) element.textContent = value;
}

/** Set or remove an attribute if it differs. */
export function setAttr(element, name, value) {
  if (value === null || value === undefined || value === false) element.removeAttribute(name);
  else if (element.getAttribute(name) !== plain(String(value))) element.setAttribute(name, plain(String(value)));
}

/**
 * Make a parent's children mirror a list: nodes are kept by key, made once, updated, moved.
 * @template T
 * @param {Element} parent
 * @param {T[]} items
 * @param {(item: T) => string} keyOf
 * @param {(item: T) => Element & {update?: (item: T) => void}} create
 * @param {Set<string> | null} [stale] the keys that changed; all of them without it
 */
export function keyed(parent, items, keyOf, create, stale = null) {
  const known = (parent.__keyed ??= new Map());
  const wanted = new Set();
  let cursor = parent.firstElementChild;
  for (const item of items) {
    const key = keyOf(item);
    if (wanted.has(key)) continue;
    wanted.add(key);
    let node = known.get(key);
    const fresh = !node;
    if (fresh) known.set(key, (node = create(item)));
    if (fresh || stale === null || stale.has(key)) node.update?.(item);
    if (node === cursor) cursor = cursor.nextElementSibling;
    else parent.insertBefore(node, cursor);
  }
  for (const [key, node] of known) {
    if (wanted.has(key)) continue;
    node.remove();
    known.delete(key);
  }
}
