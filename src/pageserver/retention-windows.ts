/**
 * How long each project's history is kept, as the control plane has told: a file, `<data dir>/retention`, replaced whole. A project that is not in it, as on a disk that was
 * lost, has the longest window until it is told again: nothing is collected too early. So have all when the file is damaged.
 *
 *   line 1   `strata-retention 1 <CRC32C of the rest, 8 hex digits>`
 *   rest     JSON: an object from tenant id to milliseconds
 */

import { mkdirSync, readFileSync } from 'node:fs';
import { dirname } from 'node:path';
import { RETENTION_MS } from '../api/retention.ts';
import { crc32c } from '../base/crc32c.ts';
import { writeFileDurably } from '../base/durable-file.ts';
import type { Logger } from '../base/log.ts';
import { checkRetentionMs } from './retention.ts';

const HEAD = /^strata-retention 1 ([0-9a-f]{8})\n/;

export class RetentionWindows {
  readonly #file: string;
  readonly #windows: Map<string, number>;

  constructor(file: string, log: Logger) {
    this.#file = file;
    const windows = read(file);
    this.#windows = new Map(Object.entries(windows ?? {}));
    if (windows === undefined)
      log.error({ file }, 'the history windows are damaged; all history is kept until they are set');
  }

  /** Milliseconds. */
  of(tenantId: string): number {
    return this.#windows.get(tenantId) ?? RETENTION_MS.max;
  }

  /** Durable when it returns. Throws `bad-request` for a window that is not offered. */
  set(tenantId: string, retentionMs: number): void {
    if (this.#windows.get(tenantId) === checkRetentionMs(retentionMs)) return;
    mkdirSync(dirname(this.#file), { recursive: true });
    const rest = `${JSON.stringify({ ...Object.fromEntries(this.#windows), [tenantId]: retentionMs })}\n`;
    const checksum = crc32c(Buffer.from(rest)).toString(16).padStart(8, '0');
    writeFileDurably(this.#file, `strata-retention 1 ${checksum}\n${rest}`, 0o600);
    this.#windows.set(tenantId, retentionMs);
  }
}

/** Undefined when the file is damaged. */
function read(file: string): Record<string, number> | undefined {
  let text: string;
  try {
    text = readFileSync(file, 'utf8');
  } catch (error) {
    const { code } = error as NodeJS.ErrnoException;
    if (code === 'ENOENT') return {};
    if (code === 'EIO') return undefined;
    throw error;
  }
  const head = HEAD.exec(text);
  const rest = text.slice(head?.[0].length ?? 0);
  if (head !== null && crc32c(Buffer.from(rest)) !== parseInt(head[1]!, 16)) return undefined;
  try {
    // Without a first line it is one that an earlier version wrote.
    return JSON.parse(rest) as Record<string, number>;
  } catch {
    return undefined;
  }
}
