/** The lines that ask the same elsewhere. */

import { base } from "./address.js";

/** A chat as `curl` would send it. Images are left out: they would fill the screen. */
export function curl(body) {
  const json = JSON.stringify(withoutImages(body), null, 2).replaceAll("'", "'\\''");
  return `curl ${base(location)}/api/chat -d '${json}'`;
}

/** The same with Ollama's Python library. */
export function python(body) {
  const { model, messages, options, think } = withoutImages(body);
  const list = messages.map((message) => `    ${literal(message)},`).join("\n");
  const more = `${options ? `, options=${literal(options)}` : ""}${think === undefined ? "" : `, think=${literal(think)}`}`;
  return [
    "from ollama import Client", "",
    `client = Client(host=${literal(base(location))})`,
    `messages = [\n${list}\n]`,
    `for part in client.chat(model=${literal(model)}, messages=messages, stream=True${more}):`,
    "    print(part.message.content, end=\"\", flush=True)",
  ].join("\n");
}

function withoutImages(body) {
  const messages = body.messages.map(({ images, ...message }) => (images ? { ...message, images: images.map(() => "BASE64") } : message));
  return { ...body, messages };
}

/** JSON as Python writes it; texts and numbers are the same in both. */
function literal(value) {
  if (Array.isArray(value)) return `[${value.map(literal).join(", ")}]`;
  if (value !== null && typeof value === "object") return `{${Object.entries(value).map(([key, part]) => `${JSON.stringify(key)}: ${literal(part)}`).join(", ")}}`;
  if (typeof value === "boolean") return value ? "True" : "False";
  return value === null ? "None" : JSON.stringify(value);
}
