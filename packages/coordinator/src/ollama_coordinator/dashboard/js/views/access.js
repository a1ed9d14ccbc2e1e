/** Keys: who may come in, and with what rights. A key's text is shown once, when it is made. */

import { View } from "../view.js";
import { call, get } from "../api.js";
import { h } from "../dom.js";
import { fullTime, time } from "../format.js";
import { columnHead, empty } from "../parts/bits.js";
import { confirmed, openDialog } from "../parts/dialog.js";
import { act } from "../parts/toast.js";

const RIGHTS = [
  ["use", "use: ask models, list them"],
  ["manage", "manage: also pull, delete, load and unload models"],
  ["operate", "operate: everything, keys and settings too"],
  ["join", "join: for agents"],
  ["watch", "watch: look at this dashboard and /metrics"],
];
/** What a key may use: the API's name, the label in the dialog, and how a row says it. */
const LIMITS = [
  ["requests_per_minute", "Requests a minute", "requests a minute"],
  ["concurrent", "Requests at a time", "at a time"],
  ["tokens_per_day", "Tokens a day", "tokens a day"],
  ["gpu_seconds_per_day", "GPU seconds a day", "GPU seconds a day"],
];
const LANES = [["", "by what its requests do"], ["interactive", "interactive: somebody waits"], ["batch", "batch: others first"]];
const DAY_MS = 86_400_000;

const rightsOf = (key) => [...key.rights, key.in_path && "in an address", key.names_users && "names users", !key.continues && "not continued elsewhere"].filter(Boolean).join(", ");

const limitsOf = (key) => [
  ...LIMITS.filter(([name]) => key.limits[name]).map(([name, , text]) => `${key.limits[name].toLocaleString()} ${text}`),
  key.lane && `${key.lane} lane`, key.weight !== 1 && `share ${key.weight}`,
].filter(Boolean).join(", ") || "none";

class AccessView extends View {
  build() {
    this.rows = h("tbody");
    this.nothing = h("div");
    const table = h("div.table-box", null, h("table.stacked", null, h("caption.visually-hidden", null, "Keys"),
      h("thead", null, h("tr", null, ["Name", "Key", "Rights", "Models", "Limits", "State", "Last used", ""].map(columnHead))), this.rows));
    this.append(this.head("Keys", h("button.primary", { onclick: () => this.make() }, "Make a key")),
      h("p.muted.intro", null, "From the first key on, everybody on the network needs one, but the machines of the fleet: make the first for yourself."),
      this.nothing, table);
    this.load();
  }

  async load() {
    const answer = await act(() => get("/api/keys"));
    if (!answer) return;
    const keys = answer.keys.toReversed();
    this.first = !keys.length;
    this.rows.replaceChildren(...keys.map((key) => this.row(key)));
    this.nothing.replaceChildren(...(keys.length ? [] : [empty("access", "No key was made yet")]));
  }

  row(key) {
    const ended = key.revoked_at ? "revoked" : key.expires_at && Date.parse(key.expires_at) <= Date.now() ? "expired" : "";
    const until = key.expires_at ? `until ${new Date(key.expires_at).toLocaleString()}` : "in force";
    const revoke = key.revoked_at ? null : h("button.small.danger", { onclick: () => this.revoke(key) }, "Revoke");
    return h("tr", { "data-name": key.name }, h("th", { scope: "row" }, key.name), h("td.mono", null, `${key.hint}…`),
      h("td", { "data-label": "rights" }, rightsOf(key)), h("td", { "data-label": "models" }, key.models.join(", ") || "all"),
      h("td", { "data-label": "limits" }, limitsOf(key)),
      h("td", null, h(ended ? "span.pill.bad" : "span.pill.good", null, ended || until)),
      h("td", { "data-label": "last used", title: key.last_used_at ? fullTime(key.last_used_at) : null }, key.last_used_at ? time(key.last_used_at) : "never"), h("td", null, revoke));
  }

  async revoke(key) {
    if (!await confirmed(`Revoke '${key.name}'?`, "Its requests are refused at once, and its log-ins end.", "Revoke")) return;
    if (await act(() => call("DELETE", `/api/keys/${encodeURIComponent(key.id)}`), "Revoked")) this.load();
  }

  make() {
    const name = h("input", { type: "text", required: true, maxlength: 64, autocomplete: "off" });
    const rights = RIGHTS.map(([right]) => h("input", { type: "checkbox", value: right, checked: right === (this.first ? "operate" : "use") }));
    const models = h("input", { type: "text", placeholder: "all, or such as llama3*, qwen3:*", autocomplete: "off" });
    const days = h("input", { type: "number", min: 1, max: 36500, placeholder: "never" });
    const inPath = h("input", { type: "checkbox" });
    const users = h("input", { type: "checkbox" });
    const limits = LIMITS.map(() => h("input", { type: "number", min: 0, step: 1, placeholder: "no limit" }));
    const weight = h("input", { type: "number", min: 0.01, max: 100, step: "any", placeholder: "1" });
    const lane = h("select", null, LANES.map(([value, text]) => h("option", { value }, text)));
    const continues = h("input", { type: "checkbox", checked: true });
    const check = (input, text) => h("label.row", null, input, text);
    const submit = async (event) => {
      event.preventDefault();
      const wanted = {
        name: name.value.trim(),
        rights: rights.filter((box) => box.checked).map((box) => box.value),
        models: models.value.split(",").map((part) => part.trim()).filter(Boolean),
        expires_at: days.value ? new Date(Date.now() + Number(days.value) * DAY_MS).toISOString() : null,
        limits: Object.fromEntries(LIMITS.map(([limit], index) => [limit, Number(limits[index].value)])),
        weight: Number(weight.value) || 1,
        lane: lane.value,
        in_path: inPath.checked,
        names_users: users.checked,
        continues: continues.checked,
      };
      const made = await act(() => call("POST", "/api/keys", wanted));
      if (!made) return;
      dialog.close();
      this.reveal(made);
    };
    const dialog = openDialog("Make a key", h("form", { onsubmit: submit }, h("label.field", null, "Name", name),
      h("fieldset", null, h("legend", null, "Rights"), RIGHTS.map(([, text], index) => check(rights[index], text))),
      h("label.field", null, "Models", models), h("label.field", null, "Days until it expires", days),
      h("details", null, h("summary", null, "Limits, share and lane"), h("div.stack", null, LIMITS.map(([, label], index) => h("label.field", null, label, limits[index])),
        h("label.field", null, "Share among those that wait for one model", weight), h("label.field", null, "Lane", lane))),
      check(inPath, "It may stand in an address (for clients that send no key)"), check(users, "It says for which user it asks (Open WebUI)"),
      check(continues, "Its answers go on at another agent when theirs breaks them off"),
      h("div.actions", null, h("button", { type: "button", onclick: () => dialog.close() }, "Cancel"), h("button.primary", null, "Make"))));
    name.focus();
  }

  reveal(made) {
    const shown = openDialog(`The key of '${made.name}'`, h("div", null, h("p", null, "It is shown this once:"), h("pre.mono", { "data-key": "" }, made.key),
      this.first ? h("p.muted", null, "Log in with it from now on, but on the coordinator's own machine.") : null,
      made.in_path ? h("p.muted", null, `OLLAMA_HOST=${location.origin}/k/KEY`) : null));
    // Not sooner: with the first key this page may have to log in, and the key would be gone.
    shown.addEventListener("close", () => this.load());
  }
}

customElements.define("access-view", AccessView);
