/** Points in a branch's history, as people write them: an LSN, or a time with its zone. */
import { CliError } from './errors.ts';

const LSN = /^[0-9A-Fa-f]{1,8}\/[0-9A-Fa-f]{1,8}$/;
/** As RFC 3339, or as Postgres prints timestamptz: a space for the T, a zone of hours only. */
const TIME = /^(\d{4}-\d{2}-\d{2})[T ](\d{2}:\d{2}(?::\d{2}(?:\.\d{1,6})?)?) ?(Z|[+-]\d{2}(?::?\d{2})?)?$/i;

/** What `--at` says, in the API's words. */
export function parsePoint(text: string, what = '--at'): { parent_lsn: string } | { parent_timestamp: string } {
  if (LSN.test(text)) return { parent_lsn: text };
  const match = TIME.exec(text);
  const given = JSON.stringify(text);
  if (match === null) {
    throw new CliError(
      `${what} ${given} is neither an LSN (0/16B3748) nor a time with its zone (2026-01-31T12:00:00.5Z)`,
      2,
    );
  }
  const [, date, time, zone] = match as unknown as [string, string, string, string | undefined];
  if (zone === undefined)
    throw new CliError(`${what} ${given} has no time zone: add Z for UTC, or an offset such as +02:00`, 2);
  const seconds = time.length === 5 ? `${time}:00` : time;
  return { parent_timestamp: `${date}T${seconds}${fullZone(zone)}` };
}

/** `+02` and `+0200` as `+02:00`. */
function fullZone(zone: string): string {
  if (zone.length === 1) return 'Z';
  return `${zone.slice(0, 3)}:${zone.slice(3).replace(':', '') || '00'}`;
}
