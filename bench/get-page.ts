/**
 * How long does one page take from the page store, and how fast do many come? Over a socket: with what ingest has flushed (pages of about 10 records
 * to be replayed, and of 100 to 200), then after compaction (images). And how long is the main thread held up while another compacts? The floor is a server that answers the same requests with the same bytes from memory.
 */
import { createServer } from 'node:net';
import { monitorEventLoopDelay } from 'node:perf_hooks';
import { Worker } from 'node:worker_threads';
import { createLog } from '../src/base/log.ts';
import { listen } from '../src/base/rpc.ts';
import { signToken } from '../src/base/token.ts';
import { PageService } from '../src/pageserver/page-service.ts';
import { decodePageHello, encodeHelloReply, encodePagesHeader, PAGE_REQUEST_BYTES } from '../src/api/pages.ts';
import { BLOCK_SIZE } from '../src/postgres/page-size.ts';
import type { PageTimes, PageWork } from './page-client.ts';
import { percentile, type Row } from './measure.ts';
import { ingestAll, TIMELINE_ID, withRecordedCluster } from './page-store.ts';

const SECRET = Buffer.alloc(32, 1);
const HOST = '127.0.0.1';

export async function getPage({ quick }: { readonly quick: boolean }): Promise<Row[]> {
  const workload = { rows: quick ? 150_000 : 500_000, pagesOfTenRecords: quick ? 4_000 : 10_000 };
  return withRecordedCluster(workload, async (recorded) => {
    const { store, timeline, table } = recorded;
    await ingestAll(recorded);
    await timeline.flush();
    const service = await PageService.start({
      host: HOST,
      port: 0,
      secret: SECRET,
      timelines: store,
      log: createLog({ name: 'bench', level: 'error' }),
    });
    const floor = await startFloor();
    try {
      const token = await signToken(SECRET, { scope: 'platform' });
      const work: PageWork = {
        host: HOST,
        port: service.port,
        token,
        timelineId: TIMELINE_ID,
        table,
        lsn: timeline.lastRecordLsn,
        singles: quick ? 500 : 2000,
        from: 0,
        to: 0.5,
      };
      await askFromThread({ ...work, port: floor.port });
      const least = await askFromThread({ ...work, port: floor.port });
      // V8 compiles what it has seen often: the first reads of a process are for that, and not counted.
      const tenRecords = { ...work, table: recorded.tenRecords! };
      await askFromThread({ ...tenRecords, to: 0.3 });
      const few = await askFromThread({ ...tenRecords, from: 0.3, to: 1 });
      const flushed = await askFromThread(work);
      const delays = monitorEventLoopDelay({ resolution: 1 });
      delays.enable();
      await store.compaction.merge(timeline, (runs) => runs);
      delays.disable();
      // The way to an image is new to V8; pages of the other half are not in the blocks that these have.
      for (let round = 0; round < 5; round++) await askFromThread(work);
      const other = { ...work, from: 0.5, to: 1 };
      const compacted = await askFromThread(other);
      const again = await askFromThread(other);
      return [
        latency('one page of ten records', few, least),
        latency('one page of 100 to 200 records', flushed, least),
        latency('one page with an image', compacted, least),
        latency('one page, read before', again, least),
        rate('batches of 64 pages of ten records', few, least),
        rate('batches of 64 pages of 100 to 200 records', flushed, least),
        rate('batches of 64 pages with images', compacted, least),
        rate('batches of 64 pages, read before', again, least),
        {
          question: 'longest stall of the main thread while a layer is compacted',
          unit: 'ms',
          vanilla: undefined,
          strata: delays.max / 1e6,
          isRate: false,
          note: `p99 ${(delays.percentile(99) / 1e6).toFixed(1)} ms`,
        },
      ];
    } finally {
      await service.close();
      floor.close();
    }
  });
}

function latency(what: string, times: PageTimes, floor: PageTimes): Row {
  const figure = (fraction: number): string => percentile(times.singlesUs, fraction).toFixed(0);
  return {
    question: `GetPage, ${what}, p50`,
    unit: 'µs',
    vanilla: undefined,
    strata: percentile(times.singlesUs, 0.5),
    isRate: false,
    note: `p99 ${figure(0.99)} µs; a server without a store: ${percentile(floor.singlesUs, 0.5).toFixed(0)} µs`,
  };
}

function rate(what: string, times: PageTimes, floor: PageTimes): Row {
  return {
    question: `GetPage, ${what}`,
    unit: 'MB/s',
    vanilla: undefined,
    strata: times.batchesMegabytesPerSecond,
    isRate: true,
    note: `a server without a store: ${floor.batchesMegabytesPerSecond.toFixed(0)} MB/s`,
  };
}

export function askFromThread(work: PageWork): Promise<PageTimes> {
  return new Promise((resolve, reject) => {
    const worker = new Worker(new URL('page-client.ts', import.meta.url), { workerData: work });
    worker.once('message', resolve);
    worker.once('error', reject);
  });
}

async function startFloor(): Promise<{ port: number; close: () => void }> {
  const pages = Buffer.alloc(256 * BLOCK_SIZE, 7);
  const server = createServer((socket) => {
    let input = Buffer.alloc(0);
    let isWelcome = false;
    socket.setNoDelay(true);
    socket.on('error', () => socket.destroy());
    socket.on('data', (chunk: Buffer) => {
      input = Buffer.concat([input, chunk]);
      if (!isWelcome) {
        const hello = decodePageHello(input);
        if (hello === undefined) return;
        isWelcome = true;
        input = input.subarray(hello.bytes);
        socket.write(encodeHelloReply({ kind: 'welcome' }));
      }
      for (; input.length >= PAGE_REQUEST_BYTES; input = input.subarray(PAGE_REQUEST_BYTES)) {
        const length = input.readUInt32LE(36) * BLOCK_SIZE;
        socket.write(Buffer.concat([encodePagesHeader(input.readUInt32LE(4), length), pages.subarray(0, length)]));
      }
    });
  });
  await listen(server, HOST, 0);
  const address = server.address();
  return {
    port: typeof address === 'object' && address !== null ? address.port : 0,
    close: () => server.close(),
  };
}
