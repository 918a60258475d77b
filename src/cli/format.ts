/**
 * Text for people: tables, and times relative to now.
 */
const SECOND_MS = 1000;
const UNITS: readonly (readonly [name: string, sizeMs: number])[] = [
  ['day', 24 * 3600 * SECOND_MS],
  ['hour', 3600 * SECOND_MS],
  ['minute', 60 * SECOND_MS],
  ['second', SECOND_MS],
];

/** Columns are as wide as their widest cell; nothing but the header when there are no rows. */
export function formatTable(header: readonly string[], rows: readonly (readonly string[])[]): string {
  const widths = header.map((title, column) => Math.max(title.length, ...rows.map((row) => row[column]?.length ?? 0)));
  const line = (cells: readonly string[]) =>
    cells
      .map((cell, column) => cell.padEnd(widths[column] ?? 0))
      .join('  ')
      .trimEnd();
  return [line(header), ...rows.map(line)].join('\n');
}

/** One name and value per line. */
export function formatFields(fields: readonly (readonly [name: string, value: string])[]): string {
  const width = Math.max(...fields.map(([name]) => name.length));
  return fields.map(([name, value]) => `${name.padEnd(width)}  ${value}`).join('\n');
}

/** `3 minutes`, `1 hour`; below a second: `less than a second`. */
export function formatDuration(durationMs: number): string {
  for (const [name, sizeMs] of UNITS) {
    const count = Math.floor(durationMs / sizeMs);
    if (count >= 1) return `${count} ${name}${count === 1 ? '' : 's'}`;
  }
  return 'less than a second';
}

/** `3 minutes ago`; `just now` for what is not yet a second old, or ahead by the difference of two clocks. */
export function formatAgo(timestamp: string | undefined, nowMs: number): string {
  if (timestamp === undefined) return '-';
  const ageMs = nowMs - Date.parse(timestamp);
  return ageMs < SECOND_MS ? 'just now' : `${formatDuration(ageMs)} ago`;
}

/** To three digits: 512 B, 1.23 MB, 45.6 GB; powers of 1000. */
export function formatBytes(bytes: number): string {
  return withUnit(bytes, 1000);
}

/** In the units in which options take sizes, as Postgres': 1 GB is 1024 MB. Whole numbers without decimals, as they are given. */
export function formatSize(bytes: number): string {
  return withUnit(bytes, 1024).replace(/\.0+ /, ' ');
}

function withUnit(bytes: number, base: 1000 | 1024): string {
  const units = ['B', 'kB', 'MB', 'GB', 'TB', 'PB'];
  let value = bytes;
  let unit = 0;
  while (value >= base - 0.5 && unit < units.length - 1) {
    value /= base;
    unit++;
  }
  const digits = unit === 0 || value >= 99.95 ? 0 : value >= 9.995 ? 1 : 2;
  return `${value.toFixed(digits)} ${units[unit]}`;
}
