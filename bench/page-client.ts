/** The asking side of get-page.ts, in a thread of its own: single pages in no order, then others in batches of 64, two at a time. */
import { parentPort, workerData } from 'node:worker_threads';
import { PageClient } from '../src/api/pages.ts';
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
}

const BATCH = 64;

async function ask(work: PageWork): Promise<PageTimes> {
  const client = await PageClient.connect(work);
  const { blocks, ...relation } = work.table;
  const start = Math.floor(blocks * work.from);
  const half = Math.floor((blocks * (work.to - work.from)) / 2);
  const range = { ...relation, fork: 0, lsn: work.lsn };
  const singlesUs: number[] = [];
  for (let i = 0; i < work.singles; i++) {
    const startMs = performance.now();
    await client.getPages({ ...range, blk: start + ((i * 7919) % half), count: 1 });
    singlesUs.push((performance.now() - startMs) * 1000);
  }
  const startMs = performance.now();
  let pending: Promise<Buffer> = Promise.resolve(Buffer.alloc(0));
  let bytes = 0;
  for (let blk = start + half; blk + BATCH <= start + 2 * half; blk += BATCH) {
    const next = client.getPages({ ...range, blk, count: BATCH });
    await pending;
    pending = next;
    bytes += BATCH * BLOCK_SIZE;
  }
  await pending;
  const batchesMegabytesPerSecond = bytes / 1000 / (performance.now() - startMs);
  client.close();
  return { singlesUs, batchesMegabytesPerSecond };
}

if (parentPort !== null) parentPort.postMessage(await ask(workerData as PageWork));
