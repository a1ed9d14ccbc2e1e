/** Try it: a chat with any model, who served it and how fast, and the lines that do the same. */

import { View } from "../view.js";
import { errorText, get, lines } from "../api.js";
import { h, icon, setText } from "../dom.js";
import { count, model, rate, seconds } from "../format.js";
import { markdown } from "../markdown.js";
import { store } from "../store.js";
import { command, empty, segmented } from "../parts/bits.js";
import { curl, python } from "../parts/snippets.js";
import { toast } from "../parts/toast.js";
import { openWhy } from "../parts/why.js";

const NANOSECONDS = 1e9;
const LARGEST_IMAGE_BYTES = 20e6;
/** Parameters of a request: Ollama's name, ours, and what it may be. */
const OPTIONS = [
  ["temperature", "Temperature", { min: 0, max: 2 }],
  ["top_p", "Top p", { min: 0, max: 1 }],
  ["num_predict", "Tokens at most", { min: 1, step: 1 }],
  ["num_ctx", "Context", { min: 1, step: 1 }],
  ["seed", "Seed", { min: 0, step: 1 }],
];

class TryView extends View {
  build() {
    this.messages = [];
    this.images = [];
    this.models = new Map();
    this.select = h("select.inline-field", { "aria-label": "Model", onchange: () => this.chosen() });
    this.log = h("div.chat", { role: "log", "aria-live": "off", "aria-label": "Conversation" });
    this.input = h("textarea", { rows: 2, placeholder: "Ask something. Enter sends, Shift+Enter makes a new line.", "aria-label": "Message", onkeydown: (event) => this.key(event), oninput: () => this.snippet() });
    this.file = h("input", { type: "file", accept: "image/*", multiple: true, hidden: true, onchange: () => this.addImages() });
    this.attach = h("button", { type: "button", "aria-label": "Add an image", title: "Add an image", onclick: () => this.file.click(), hidden: true }, icon("image"));
    this.send = h("button.primary", { type: "submit" }, icon("send"), "Send");
    this.stop = h("button.danger", { type: "button", hidden: true, onclick: () => this.asking?.abort() }, icon("stop"), "Stop");
    this.thumbs = h("div.row.wrap.thumbs");
    this.lines = h("div");
    this.form = "curl";
    const compose = h("form.compose", { onsubmit: (event) => { event.preventDefault(); this.ask(); } }, this.thumbs, h("div.row", null, this.input, this.file, this.attach, this.send, this.stop));
    this.system = h("textarea", { rows: 2, placeholder: "Such as: Answer in one sentence.", oninput: () => this.snippet() });
    this.options = Object.fromEntries(OPTIONS.map(([name, , attributes]) => [name, h("input", { type: "number", step: "any", placeholder: "default", ...attributes, oninput: () => this.snippet() })]));
    this.think = h("select", { onchange: () => this.snippet() }, [["", "default"], ["true", "yes"], ["false", "no"]].map(([value, label]) => h("option", { value }, label)));
    this.thinkField = h("label.field", { hidden: true }, "Think first", this.think);
    const tuning = h("details.card.lines", null, h("summary", null, "System prompt and parameters"), h("div.stack", null,
      h("label.field", null, "System prompt", this.system),
      h("div.parameters", null, OPTIONS.map(([name, label]) => h("label.field", null, label, this.options[name])), this.thinkField)));
    this.append(this.head("Try it", this.select, h("button.end", { onclick: () => this.clear() }, "New chat")), tuning, this.log, compose,
      h("details.card.lines", { open: innerWidth > 1000 }, h("summary", null, "The same request elsewhere"), segmented("Language", [["curl", "curl"], ["python", "Python"]], "curl", (form) => { this.form = form; this.snippet(); }), this.lines));
    this.stopping.signal.addEventListener("abort", () => this.asking?.abort());
    this.clear();
    this.load();
  }

  async load() {
    try {
      const { models } = await get("/api/tags");
      const chats = models.filter((row) => !row.capabilities || row.capabilities.includes("completion")).sort((a, b) => a.name.localeCompare(b.name));
      this.models = new Map(chats.map((row) => [row.name, row]));
      const wanted = this.query.get("model") ?? localStorage.getItem("try-model") ?? this.warm(chats);
      this.select.replaceChildren(...chats.map((row) => h("option", { value: row.name, selected: row.name === wanted }, model(row.name))));
      this.select.disabled = this.send.disabled = !chats.length;
      if (!chats.length) this.log.replaceChildren(empty("try", "No model to talk to", h("p", null, "Pull one first."), h("a.button", { href: "#/models" }, "Open the models")));
      this.chosen(false);
    } catch (error) {
      toast(error.message, "bad");
    }
  }

  /** A model that is in memory answers at once. */
  warm(models) {
    const loaded = new Set(Object.values(store.state.agents).flatMap((agent) => agent.loaded_models.map((row) => row.name)));
    return (models.find((row) => loaded.has(row.name)) ?? models[0])?.name;
  }

  chosen(keep = true) {
    if (keep) localStorage.setItem("try-model", this.select.value);
    const known = this.models.get(this.select.value);
    const sees = known?.capabilities ? known.capabilities.includes("vision") : Boolean(known?.details?.families?.some((family) => /clip|mllama|vl|gemma3/.test(family)));
    this.attach.hidden = !sees;
    this.thinkField.hidden = !known?.capabilities?.includes("thinking");
    if (!sees) this.setImages([]);
    this.snippet();
  }

  clear() {
    this.asking?.abort();
    this.messages = [];
    this.log.replaceChildren(empty("try", "Ask a model of the fleet", h("p", null, "The coordinator chooses the agent, as for any other client. The coordinator keeps nothing of this chat.")));
    this.snippet();
  }

  key(event) {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    if (!this.asking) this.ask();
  }

  async addImages() {
    const files = [...this.file.files].filter((file) => file.size <= LARGEST_IMAGE_BYTES);
    if (files.length < this.file.files.length) toast("An image is larger than 20 MB.", "bad");
    this.file.value = "";
    this.setImages([...this.images, ...(await Promise.all(files.map(base64)))]);
  }

  setImages(images) {
    this.images = images;
    this.thumbs.replaceChildren(...images.map((image, index) => h("button.thumb", { type: "button", "aria-label": `Remove image ${index + 1}`, onclick: () => this.setImages(images.filter((_, other) => other !== index)) }, h("img", { src: image.url, alt: "" }))));
    this.snippet();
  }

  body(text) {
    const message = { role: "user", content: text };
    if (this.images.length) message.images = this.images.map((image) => image.data);
    const system = this.system.value.trim();
    // It stands before the whole conversation, so that it can be changed at any turn.
    const said = this.messages.filter((one) => one.role !== "system");
    const options = Object.fromEntries(Object.entries(this.options).filter(([, input]) => input.value !== "" && input.validity.valid).map(([name, input]) => [name, Number(input.value)]));
    return {
      model: this.select.value,
      messages: [...(system ? [{ role: "system", content: system }] : []), ...said, message],
      stream: true,
      ...(Object.keys(options).length && { options }),
      ...(!this.thinkField.hidden && this.think.value && { think: this.think.value === "true" }),
    };
  }

  snippet() {
    if (!this.select.value) return this.lines.replaceChildren();
    const asked = this.messages.findLastIndex((message) => message.role === "user");
    const body = this.body(this.input.value || "Why is the sky blue?");
    if (!this.input.value && asked >= 0) body.messages = this.messages.slice(0, asked + 1);
    this.lines.replaceChildren(command(this.form === "curl" ? curl(body) : python(body)));
  }

  async ask() {
    const text = this.input.value.trim();
    if (!text || !this.select.value) return;
    const wrong = Object.values(this.options).find((input) => !input.reportValidity());
    if (wrong) return wrong.focus();
    const body = this.body(text);
    if (!this.messages.length) this.log.replaceChildren();
    this.messages = body.messages;
    this.log.append(h("div.said.user", null, this.images.map((image) => h("img.shown", { src: image.url, alt: "An image you sent" })), h("p", null, text)));
    this.input.value = "";
    this.setImages([]);
    const answer = new Answer(body.model);
    this.log.append(answer.element);
    this.asking = new AbortController();
    this.busy(true);
    try {
      await answer.read(body, this.asking.signal, () => this.log.scrollTo(0, this.log.scrollHeight));
    } catch (error) {
      answer.broke(error);
    }
    this.asking = null;
    this.busy(false);
    this.messages.push({ role: "assistant", content: answer.text });
    this.snippet();
  }

  busy(busy) {
    this.send.hidden = busy;
    this.stop.hidden = !busy;
    this.select.disabled = busy;
    if (!busy && this.isConnected) this.input.focus();
  }
}

/** One answer while it comes. */
class Answer {
  constructor(name) {
    this.text = "";
    this.thinking = "";
    this.content = h("div.markdown", { "aria-live": "polite" }, h("p.muted.pulse", null, `Waiting for ${model(name)}…`));
    this.thought = h("p.muted");
    this.thoughts = h("details.thoughts", { hidden: true }, h("summary.muted.small", null, "Thoughts"), this.thought);
    this.meta = h("p.muted.small.meta");
    this.element = h("div.said.assistant", null, this.thoughts, this.content, this.meta);
  }

  async read(body, signal, moved) {
    const started = performance.now();
    const response = await fetch("api/chat", { method: "POST", body: JSON.stringify(body), signal });
    if (!response.ok) throw new Error(await errorText(response));
    const agent = decodeURIComponent(response.headers.get("x-ollama-coordinator-agent") ?? "");
    const request = response.headers.get("x-ollama-coordinator-request");
    let first = null;
    for await (const part of lines(response)) {
      if (part.error) throw new Error(part.error);
      first ??= (performance.now() - started) / 1000;
      this.add(part.message ?? {}, moved);
      if (part.done) this.tell(agent, request, first, part);
    }
    this.render();
  }

  add(message, moved) {
    this.text += message.content ?? "";
    this.thinking += message.thinking ?? "";
    // At most once a frame: a fast model writes hundreds of tokens a second.
    this.frame ??= requestAnimationFrame(() => { this.frame = null; this.render(); moved(); });
  }

  render() {
    this.thoughts.hidden = !this.thinking;
    setText(this.thought, this.thinking);
    if (this.text) this.content.replaceChildren(...markdown(this.text));
  }

  tell(agent, request, first, last) {
    const facts = [["first token", seconds(first)], ["loading", last.load_duration > 1e8 && seconds(last.load_duration / NANOSECONDS)],
      ["prompt", last.prompt_eval_count && `${count(last.prompt_eval_count)} tokens`], ["written", last.eval_count && `${count(last.eval_count)} tokens`],
      ["speed", last.eval_duration && `${rate(last.eval_count / (last.eval_duration / NANOSECONDS))} tokens/s`], ["took", seconds(last.total_duration / NANOSECONDS)]];
    const details = facts.filter(([, value]) => value).map(([label, value]) => `${label} ${value}`).join(" · ");
    this.meta.replaceChildren(agent ? `Served by ${agent} · ` : "", details, " ", request ? h("button.ghost.small", { onclick: () => openWhy(request) }, "Why there?") : "");
  }

  broke(error) {
    this.render();
    if (!this.text) this.content.replaceChildren();
    const stopped = error.name === "AbortError";
    this.content.append(h(stopped ? "p.muted" : "p.notice.bad", null, stopped ? "Stopped." : error.message));
  }
}

function base64(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve({ url: reader.result, data: reader.result.split(",")[1] });
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}

customElements.define("try-view", TryView);
