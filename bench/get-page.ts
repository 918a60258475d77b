/**
 * How long does one page take from the page store, and how fast do many come? Over a socket, from a store whose caches are too small for
 * the table, so that pages come from layers. The floor is a server that answers the same requests with the same bytes from memory.
 */
import { createServer } from 'node:net';
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
  return withRecordedCluster(quick ? 150_000 : 500_000, async (recorded) => {
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
        singles: quick ? 2000 : 10_000,
      };
      const first = await inWorker(work);
      const again = await inWorker(work);
      const least = await inWorker({ ...work, port: floor.port });
      return [
        latency('one page, first read', first, least),
        latency('one page, read before', again, least),
        rate('batches of 64 pages, first read', first, least),
        rate('batches of 64 pages, read before', again, least),
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

function inWorker(work: PageWork): Promise<PageTimes> {
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
