/**
 * The asking side of get-page.ts and nested-branches.ts: a process of its own (page-client.c), which asks as a backend of Postgres does. The server is in this
 * process and has its main thread to itself meanwhile, as the pageserver has.
 */
import { execFile, execFileSync } from 'node:child_process';
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { promisify } from 'node:util';
import { BLOCK_SIZE } from '../src/postgres/page-size.ts';

export interface PageWork {
  readonly host: string;
  readonly port: number;
  readonly token: string;
  readonly timelineId: string;
  readonly table: { readonly spc: number; readonly db: number; readonly rel: number; readonly blocks: number };
  readonly lsn: number;
  readonly singles: number;
  /** The part of the table that is read, as fractions: single pages in its first half, batches in the second. */
  readonly from: number;
  readonly to: number;
}

export interface PageTimes {
  readonly singlesUs: readonly number[];
  readonly batchesMegabytesPerSecond: number;
  /** What a single page, and a page of a batch, took of the processor where the server is, on all threads. */
  readonly singleServerUs: number;
  readonly batchedServerUs: number;
}

const BATCH = 64;
const OUTPUT_BYTES_MAX = 64 * 1024 * 1024;

/** A compiled page-client.c, and where its tokens are. */
export class PageAsker implements Disposable {
  readonly #directory = mkdtempSync(join(tmpdir(), 'strata-page-client-'));
  readonly #program = join(this.#directory, 'page-client');
  #count = 0;

  constructor() {
    const wire = join(import.meta.dirname, '../src/compute/shim/wire.c');
    const source = join(import.meta.dirname, 'page-client.c');
    execFileSync(process.env['CC'] ?? 'cc', ['-std=gnu11', '-O2', '-o', this.#program, source, wire]);
  }

  async ask(work: PageWork): Promise<PageTimes> {
    const { host, port, token, timelineId, table, lsn, singles } = work;
    const tokenFile = join(this.#directory, 'token');
    writeFileSync(tokenFile, token);
    const first = Math.floor(table.blocks * work.from);
    const blocks = Math.floor(table.blocks * (work.to - work.from));
    const place = [timelineId, lsn, table.spc, table.db, table.rel, first, blocks];
    // Other pages each time, and the same in each run of the benchmark.
    const seed = this.#count++;
    const args = [host, port, tokenFile, ...place, singles, BATCH, seed].map(String);
    const { stdout } = await promisify(execFile)(this.#program, args, { maxBuffer: OUTPUT_BYTES_MAX });
    const [singlesLine, totals] = stdout.split('\n');
    const [singlesServerNs = 0, bytes = 0, batchesNs = 0, batchesServerNs = 0] = totals!.split(' ').map(Number);
    return {
      singlesUs: singlesLine!.split(' ').map((text) => Number(text) / 1000),
      batchesMegabytesPerSecond: bytes / 1e6 / (batchesNs / 1e9),
      singleServerUs: singlesServerNs / 1000 / singles,
      batchedServerUs: batchesServerNs / 1000 / (bytes / BLOCK_SIZE),
    };
  }

  [Symbol.dispose](): void {
    rmSync(this.#directory, { recursive: true, force: true });
  }
}
