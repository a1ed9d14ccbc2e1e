/** The coordinator's address as other machines need it. */

const THIS_MACHINE = /^(localhost|.+\.localhost|127(\.\d+){3}|0\.0\.0\.0|\[::1?\])$/;

export const UNKNOWN = "THIS-HOST";

/**
 * The URL to type on another machine: that of the page, unless it leads every machine to itself.
 * @param {{protocol: string, hostname: string, port: string, origin: string}} page the page's `location`
 * @param {string | undefined} address what the coordinator knows of its own
 */
export function urlForOthers(page, address) {
  if (!THIS_MACHINE.test(page.hostname)) return page.origin;
  return `${page.protocol}//${address ?? UNKNOWN}${page.port ? `:${page.port}` : ""}`;
}
