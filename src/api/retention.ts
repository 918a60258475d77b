/** History windows: what the command line and the API offer, and the pageserver keeps. */

const HOUR_MS = 60 * 60_000;
/** How long history is kept, for each project. */
export const RETENTION_MS = { min: 6 * HOUR_MS, default: 7 * 24 * HOUR_MS, max: 30 * 24 * HOUR_MS } as const;
