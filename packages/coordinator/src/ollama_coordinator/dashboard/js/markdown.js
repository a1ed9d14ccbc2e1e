/**
 * Markdown as models write it, rendered to elements: headings, lists, code, quotes, tables, emphasis,
 * links. Text stays text; nothing is ever parsed as HTML, and links only lead to http, https, mailto.
 */

import { h } from "./dom.js";

/** @param {string} source @returns {Node[]} */
export function markdown(source) {
  return blocks(source.replace(/\r\n?/g, "\n").split("\n"));
}

const FENCE = /^\s{0,3}(`{3,}|~{3,})\s*([\w+#.-]*)/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const RULE = /^\s{0,3}([-*_])(\s*\1){2,}\s*$/;
const TABLE_RULE = /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/;

function blocks(lines) {
  const out = [];
  for (let at = 0; at < lines.length; ) {
    const line = lines[at];
    const [node, next] = !line.trim() ? [null, at + 1]
      : FENCE.test(line) ? code(lines, at)
      : /^\s{0,3}#{1,6}\s/.test(line) ? heading(line, at)
      : RULE.test(line) ? [h("hr"), at + 1]
      : /^\s{0,3}>/.test(line) ? quote(lines, at)
      : ITEM.test(line) ? list(lines, at)
      : line.includes("|") && TABLE_RULE.test(lines[at + 1] ?? "") && lines[at + 1].includes("-") ? table(lines, at)
      : paragraph(lines, at);
    if (node) out.push(node);
    at = next;
  }
  return out;
}

function code(lines, at) {
  const [, fence, language] = FENCE.exec(lines[at]);
  let end = at + 1;
  while (end < lines.length && !lines[end].trim().startsWith(fence)) end += 1;
  return [h("pre.code", language ? { "data-language": language } : null, h("code", null, lines.slice(at + 1, end).join("\n"))), end + 1];
}

function heading(line, at) {
  const [, signs, text] = /^\s*(#{1,6})\s+(.*?)\s*#*\s*$/.exec(line) ?? [null, "#", line];
  return [h(`h${Math.min(6, signs.length + 2)}`, null, inline(text)), at + 1];
}

function quote(lines, at) {
  let end = at;
  while (end < lines.length && /^\s{0,3}>/.test(lines[end])) end += 1;
  return [h("blockquote", null, blocks(lines.slice(at, end).map((line) => line.replace(/^\s{0,3}>\s?/, "")))), end];
}

function list(lines, at) {
  const [, indent, mark] = ITEM.exec(lines[at]);
  const ordered = /\d/.test(mark);
  const items = [];
  let end = at;
  while (end < lines.length) {
    const found = ITEM.exec(lines[end]);
    if (found && found[1].length <= indent.length) {
      if (/\d/.test(found[2]) !== ordered || found[1].length < indent.length) break;
      items.push([found[3]]);
    } else if (lines[end].trim() && /^\s{2,}|^\t/.test(lines[end])) items.at(-1).push(lines[end].slice(Math.min(indent.length + 2, lines[end].search(/\S/))));
    else if (!lines[end].trim() && (ITEM.test(lines[end + 1] ?? "") || /^\s{2,}\S/.test(lines[end + 1] ?? ""))) items.at(-1).push("");
    else break;
    end += 1;
  }
  const start = ordered ? Number.parseInt(mark, 10) : 1;
  const content = items.map((item) => h("li", null, item.length === 1 ? inline(item[0]) : tight(item)));
  return [h(ordered ? "ol" : "ul", ordered && start !== 1 ? { start } : null, content), end];
}

/** An item of several lines: its first paragraph without the paragraph's space. */
function tight(item) {
  const nodes = blocks(item);
  return nodes[0]?.tagName === "P" ? [...nodes[0].childNodes, ...nodes.slice(1)] : nodes;
}

function table(lines, at) {
  const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => inline(cell.trim()));
  let end = at + 2;
  while (end < lines.length && lines[end].includes("|")) end += 1;
  return [h("div.table-box", null, h("table", null, h("thead", null, h("tr", null, cells(lines[at]).map((cell) => h("th", null, cell)))),
    h("tbody", null, lines.slice(at + 2, end).map((line) => h("tr", null, cells(line).map((cell) => h("td", null, cell))))))), end];
}

function paragraph(lines, at) {
  let end = at + 1;
  while (end < lines.length && lines[end].trim() && !FENCE.test(lines[end]) && !ITEM.test(lines[end]) && !/^\s{0,3}(#{1,6}\s|>)/.test(lines[end])) end += 1;
  return [h("p", null, inline(lines.slice(at, end).join("\n"))), end];
}

const INLINE = /(`+)([\s\S]*?[^`])\1(?!`)|\*\*([\s\S]+?)\*\*|__([\s\S]+?)__|\*([^\s*][\s\S]*?)\*|\b_([^_\s][\s\S]*?)_\b|~~([\s\S]+?)~~|\[([^\]\n]+)\]\(([^)\s]+)\)|(https?:\/\/[^\s<>)\]]+[^\s<>)\].,;:!?'"])|( {2,}\n)/g;

/** @param {string} text @returns {(Node|string)[]} */
function inline(text) {
  const out = [];
  let last = 0;
  for (const found of text.matchAll(INLINE)) {
    if (found.index > last) out.push(text.slice(last, found.index));
    out.push(span(found));
    last = found.index + found[0].length;
  }
  if (last < text.length) out.push(text.slice(last));
  return out;
}

function span([whole, , code, strong, strong2, em, em2, gone, label, target, address]) {
  if (code !== undefined) return h("code", null, code.trim());
  if (strong ?? strong2) return h("strong", null, inline(strong ?? strong2));
  if (em ?? em2) return h("em", null, inline(em ?? em2));
  if (gone) return h("del", null, inline(gone));
  if (label) return link(target, inline(label)) ?? whole;
  if (address) return link(address, address);
  return h("br");
}

function link(target, content) {
  if (!/^(https?:|mailto:)/i.test(target)) return null;
  return h("a", { href: target, rel: "noopener noreferrer nofollow", target: "_blank" }, content);
}
