/** The state of the fleet in this page: a snapshot, merged with every difference that comes. */

const SPARK_POINTS = 60;

/** @typedef {{coordinator: any, fleet: any, agents: Record<string, any>, requests: Record<string, any>, finished: Record<string, any>}} State */

class Store {
  constructor() {
    /** @type {State} */
    this.state = { coordinator: {}, fleet: {}, agents: {}, requests: {}, finished: {} };
    this.sparks = { fleet: [], agents: {} };
    this.ready = false;
    this.skew = 0;
    this._listeners = new Set();
    this._changed = new Map();
    this._frame = 0;
  }

  /** Milliseconds since the epoch by the coordinator's clock. */
  now() {
    return Date.now() - this.skew;
  }

  /** Take over a snapshot. */
  snapshot(data) {
    this._clock(data.now);
    const before = this.state;
    this.state = { coordinator: {}, fleet: {}, agents: {}, requests: {}, finished: {}, ...data.state };
    this.sparks = data.sparks ?? { fleet: [], agents: {} };
    this.ready = true;
    for (const section of new Set([...Object.keys(before), ...Object.keys(this.state)])) {
      const ids = { ...before[section], ...this.state[section] };
      this._note(section, Object.keys(ids));
    }
  }

  /** Merge a difference (RFC 7396). */
  patch(data) {
    this._clock(data.now);
    for (const [section, change] of Object.entries(data.patch)) {
      if (change === null) delete this.state[section];
      else this.state[section] = merge(this.state[section], change);
      this._note(section, Object.keys(change ?? {}));
    }
    this._sparklines(data.patch);
  }

  _sparklines(patch) {
    if (patch.fleet?.sparkline) push(this.sparks.fleet, patch.fleet.sparkline[1]);
    for (const [id, change] of Object.entries(patch.agents ?? {})) {
      if (change === null) delete this.sparks.agents[id];
      else if (change.sparkline) push((this.sparks.agents[id] ??= []), change.sparkline[1] ?? 0);
    }
  }

  _clock(now) {
    this.skew = Date.now() - Date.parse(now);
  }

  /**
   * Calls `listener(changed)` for changes, at most once a frame, with section → set of ids (agents only).
   * @returns {() => void} stops it
   */
  subscribe(listener) {
    this._listeners.add(listener);
    return () => this._listeners.delete(listener);
  }

  _note(section, ids) {
    const known = this._changed.get(section) ?? new Set();
    // A page in the background gets no frame for hours; only listeners for agents read single ids.
    if (section === "agents") for (const id of ids) known.add(id);
    this._changed.set(section, known);
    if (!this._frame) this._frame = requestAnimationFrame(() => this._tell());
  }

  _tell() {
    const changed = this._changed;
    this._changed = new Map();
    this._frame = 0;
    for (const listener of [...this._listeners]) listener(changed);
  }
}

function push(points, value) {
  points.push(value);
  if (points.length > SPARK_POINTS) points.shift();
}

function merge(target, change) {
  if (change === null || typeof change !== "object" || Array.isArray(change)) return change;
  const merged = target !== null && typeof target === "object" && !Array.isArray(target) ? target : {};
  for (const [key, value] of Object.entries(change)) {
    if (value === null) delete merged[key];
    else merged[key] = merge(merged[key], value);
  }
  return merged;
}

export const store = new Store();
