/** Short messages that go away by themselves, and actions that tell when they fail. */

import { h } from "../dom.js";

const SHOWN_MS = 5000;

export function toast(text, tone = "") {
  const element = h(tone ? `div.toast.${tone}` : "div.toast", null, text);
  document.querySelector(".toasts").append(element);
  setTimeout(() => element.remove(), tone === "bad" ? SHOWN_MS * 2 : SHOWN_MS);
}

/** Do something; say so when it worked, and why when it did not. */
export async function act(work, done) {
  try {
    const result = await work();
    if (done) toast(done, "good");
    return result ?? true;
  } catch (error) {
    toast(error.message, "bad");
    return null;
  }
}
