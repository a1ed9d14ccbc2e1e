/** The coordinator's address as other machines need it. */

const THIS_MACHINE = /^(localhost|.+\.localhost|127(\.\d+){3}|0\.0\.0\.0|\[::1?\])$/;

export const UNKNOWN = "THIS-HOST";

/** Where clients of the page's own machine reach the coordinator, also below a path of a reverse proxy. */
export const base = (page) => page.origin + page.pathname.replace(/\/(dashboard\/?)?$/, "");

/**
 * The URL to type on another machine: that of the page, unless it leads every machine to itself.
 * @param {{protocol: string, hostname: string, port: string, origin: string, pathname: string}} page the page's `location`
 * @param {string | undefined} address what the coordinator knows of its own
 */
export function urlForOthers(page, address) {
  if (!THIS_MACHINE.test(page.hostname)) return base(page);
  return `${page.protocol}//${address ?? UNKNOWN}${page.port ? `:${page.port}` : ""}`;
}
