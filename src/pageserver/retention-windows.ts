/**
 * How long each project's history is kept: a file, `<data dir>/retention`, with a JSON object from tenant id to milliseconds, replaced whole. A
 * project that is not in it has the default.
 */

import { mkdirSync, readFileSync } from 'node:fs';
import { dirname } from 'node:path';
import { RETENTION_MS } from '../api/pageserver.ts';
import { writeFileDurably } from '../base/durable-file.ts';
import { checkRetentionMs } from './retention.ts';

export class RetentionWindows {
  readonly #file: string;
  readonly #windows: Map<string, number>;

  constructor(file: string) {
    this.#file = file;
    this.#windows = new Map(Object.entries(read(file)));
  }

  /** Milliseconds. */
  of(tenantId: string): number {
    return this.#windows.get(tenantId) ?? RETENTION_MS.default;
  }

  /** Durable when it returns. Throws `bad-request` for a window that is not offered. */
  set(tenantId: string, retentionMs: number): void {
    if (this.of(tenantId) === checkRetentionMs(retentionMs)) return;
    this.#windows.set(tenantId, retentionMs);
    mkdirSync(dirname(this.#file), { recursive: true });
    writeFileDurably(this.#file, `${JSON.stringify(Object.fromEntries(this.#windows))}\n`, 0o600);
  }
}

function read(file: string): Record<string, number> {
  let text: string;
  try {
    text = readFileSync(file, 'utf8');
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return {};
    throw error;
  }
  return JSON.parse(text) as Record<string, number>;
}
