/**
 * Times of the API: RFC 3339 text with a zone. Points in history are in microseconds since 1970, as Postgres keeps commit times (numbers are exact for
 * them until the year 2255); rows are stamped in milliseconds.
 */
import { StrataError } from '../base/errors.ts';

const RFC_3339 = /^(\d{4}-\d{2}-\d{2})[Tt ](\d{2}:\d{2}:\d{2})(?:\.(\d{1,9}))?([Zz]|[+-]\d{2}:\d{2})$/;

/** Microseconds since 1970; digits beyond microseconds are cut off. Throws `bad-request` naming the text. */
export function parseTimestampUs(text: string): number {
  const match = RFC_3339.exec(text);
  const seconds = match ? Date.parse(`${match[1]}T${match[2]}${match[4]!.toUpperCase()}`) / 1000 : NaN;
  // Date.parse takes the 30th of February for the 2nd of March.
  const isDay =
    match !== null && new Date(Date.parse(`${match[1]}T00:00:00Z`)).getUTCDate() === Number(match[1]!.slice(8));
  if (match === null || !isDay || !Number.isFinite(seconds)) {
    const example = 'such as 2026-01-31T12:00:00.123456Z';
    throw new StrataError('bad-request', `${JSON.stringify(text)} is not a time with a zone ${example}`);
  }
  const fraction = Number((match[3] ?? '').slice(0, 6).padEnd(6, '0'));
  return seconds * 1_000_000 + fraction;
}

/** With three digits of a second, or six where they say more. */
export function formatTimestampUs(timestampUs: number): string {
  const text = new Date(Math.floor(timestampUs / 1000)).toISOString();
  const rest = timestampUs % 1000;
  return rest === 0 ? text : `${text.slice(0, -1)}${String(rest).padStart(3, '0')}Z`;
}

export function formatTimestampMs(timestampMs: number): string {
  return new Date(timestampMs).toISOString();
}
