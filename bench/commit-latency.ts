/**
 * What do proposer and safekeepers add to the write that makes a commit durable? Records of a commit's size, one after the other: from `append` to the commit
 * event, against one write of the same size to one file, which is the floor, in turns. And does it cost anything that the safekeeper has many idle branches?
 */
import { closeSync, constants, mkdtempSync, openSync, rmSync, writeSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import type { Proposer } from '../src/compute/proposer.ts';
import { makeWal, MID_SEGMENT_LSN } from '../src/safekeeper/made-wal.test-data.ts';
import { withSafekeepers } from './append.ts';
import { median, percentile, type Row } from './measure.ts';

const RECORD_BYTES = 400;
const WARM_UP = 500;
const TIMEOUT_MS = 60_000;
const IDLE_TIMELINES = 1_000;

export async function commitLatency({ quick }: { readonly quick: boolean }): Promise<Row[]> {
  const count = WARM_UP + (quick ? 1_000 : 5_000);
  const wal = makeWal(
    MID_SEGMENT_LSN,
    Array.from({ length: count }, () => RECORD_BYTES),
  );
  const rows: Row[] = [];
  for (const [safekeeperCount, idleCount] of [
    [1, 0],
    [3, 0],
    [1, IDLE_TIMELINES],
  ] as const) {
    const ours: number[] = [];
    const floors: number[] = [];
    const use = async (proposer: Proposer): Promise<void> => {
      const floor = new FloorFile();
      let at = 0;
      for (const endLsn of wal.ends) {
        const bytes = wal.bytes.subarray(at, endLsn - MID_SEGMENT_LSN);
        const startedAt = performance.now();
        proposer.append(MID_SEGMENT_LSN + at, bytes);
        await proposer.waitCommitted(endLsn, AbortSignal.timeout(TIMEOUT_MS));
        const committedAt = performance.now();
        floor.write(bytes);
        ours.push(committedAt - startedAt);
        floors.push(performance.now() - committedAt);
        at += bytes.length;
      }
      floor.close();
    };
    await withSafekeepers(safekeeperCount, tmpdir(), use, idleCount);
    const measured = ours.slice(WARM_UP);
    const floorMs = median(floors.slice(WARM_UP));
    rows.push({
      question: `added to one durable write by proposer and ${safekeeperCount} safekeeper${safekeeperCount === 1 ? '' : 's'}${idleCount === 0 ? '' : ' with 1,000 idle branches'}, p50`,
      unit: 'ms',
      vanilla: undefined,
      strata: median(measured) - floorMs,
      isRate: false,
      note: `${median(measured).toFixed(2)} ms in all, p99 ${percentile(measured, 0.99).toFixed(2)} ms; the write alone ${floorMs.toFixed(2)} ms`,
    });
  }
  return rows;
}

/** One file that has its full size, written with O_DSYNC. */
class FloorFile {
  readonly #directory = mkdtempSync(join(tmpdir(), 'strata-floor-'));
  readonly #file: number;
  #at = 0;

  constructor() {
    const { O_WRONLY, O_CREAT, O_DSYNC } = constants;
    this.#file = openSync(join(this.#directory, 'file'), O_WRONLY | O_CREAT | O_DSYNC);
    const zeroes = Buffer.alloc(16 * 1024 * 1024);
    writeSync(this.#file, zeroes, 0, zeroes.length, 0);
  }

  write(bytes: Buffer): void {
    writeSync(this.#file, bytes, 0, bytes.length, this.#at);
    this.#at += bytes.length;
  }

  close(): void {
    closeSync(this.#file);
    rmSync(this.#directory, { recursive: true });
  }
}
