/**
 * How long does one page take from the page store, and how fast do many come? Over a socket: with what ingest has flushed (pages of about 10 records
 * to be replayed, and of 100 to 200), then after compaction (images). And how long is the main thread held up while another compacts?
 *
 * The asking side is a process with a blocking socket (page-client.c), for that is who waits for pages: a backend of Postgres, by the page shim. (A client in
 * Node has an event loop of its own to go through and collects garbage for what it receives, which took longer than all that the server does.) The floor is a
 * server that answers the same requests of the same client with as many bytes from memory, in this process like the other one: what is above it is what the
 * page store takes. Images are read again and again from a table much larger than the cache of blocks, which is full, as it is in a pageserver that has been up for
 * a while: nearly every block is read and decompressed. "Read before" is a table for which there is room.
 */
import { createServer } from 'node:net';
import { monitorEventLoopDelay } from 'node:perf_hooks';
import { createLog } from '../src/base/log.ts';
import { listen } from '../src/base/rpc.ts';
import { signToken } from '../src/base/token.ts';
import { relationBlockKey, relationSizeKey } from '../src/pageserver/key.ts';
import { PageService } from '../src/pageserver/page-service.ts';
import type { Timeline } from '../src/pageserver/timeline.ts';
import type { Timelines } from '../src/pageserver/timelines.ts';
import { encodeCountImage, encodeImage } from '../src/pageserver/value.ts';
import {
  decodePageHello,
  encodeHelloReply,
  encodePagesHeader,
  MAX_PAGES_PER_REQUEST,
  PAGE_REQUEST_BYTES,
  PAGE_RESPONSE_HEADER_BYTES,
} from '../src/api/pages.ts';
import { BLOCK_SIZE } from '../src/postgres/page-size.ts';
import { PageAsker } from './page-client.ts';
import type { PageTimes, PageWork } from './page-client.ts';
import { median, percentile, type Row } from './measure.ts';
import { ingestAll, TIMELINE_ID, withRecordedCluster } from './page-store.ts';
import type { RecordedTable } from './page-store.ts';

const SECRET = Buffer.alloc(32, 1);
const HOST = '127.0.0.1';
/** Of which three quarters are for values: a tenth of the large table. */
const BLOCK_CACHE_BYTES = 16 * 1024 * 1024;
/** Of pages, of the table whose images all have room in the cache. */
const SMALL_TABLE_BLOCKS = 1500;

export async function getPage({ quick }: { readonly quick: boolean }): Promise<Row[]> {
  const workload = { rows: quick ? 300_000 : 500_000, pagesOfTenRecords: quick ? 4_000 : 10_000 };
  return withRecordedCluster(workload, async (recorded) => {
    const { store, timeline, table } = recorded;
    await ingestAll(recorded);
    await timeline.flush();
    const token = await signToken(SECRET, { scope: 'platform' });
    const ids = { host: HOST, token, timelineId: TIMELINE_ID, lsn: timeline.lastRecordLsn };
    const all = { ...ids, table, singles: quick ? 500 : 2000, from: 0, to: 1 };
    using asker = new PageAsker();

    const floor = await startFloor();
    const least = await askOften(asker, { ...all, port: floor.port }, quick);
    floor.close();

    let service = await serve(store);
    // What is made of records is kept: each page is asked for once, and the first of them are for V8's compiler.
    const tenRecords = { ...all, port: service.port, table: recorded.tenRecords! };
    await asker.ask({ ...tenRecords, to: 0.3 });
    const few = await asker.ask({ ...tenRecords, from: 0.3 });
    const flushed = await asker.ask({ ...all, port: service.port });
    const large = await putImages(timeline, table, table.rel + 1_000_000, table.blocks * 4);
    const small = await putImages(timeline, table, table.rel + 2_000_000, SMALL_TABLE_BLOCKS);
    await store.compaction.settled();
    const delays = monitorEventLoopDelay({ resolution: 1 });
    delays.enable();
    await store.compaction.merge(timeline, (runs) => runs);
    delays.disable();
    await service.close();

    const uncached = await recorded.reopen({ blockCacheBytes: BLOCK_CACHE_BYTES, pageCacheBytes: 0 });
    const ofImages = { ...all, lsn: uncached.timeline.lastRecordLsn };
    service = await serve(uncached.store);
    const images = await askOften(asker, { ...ofImages, port: service.port, table: large }, quick);
    await service.close();
    service = await serve((await recorded.reopen({})).store);
    const cached = await askOften(asker, { ...ofImages, port: service.port, table: small }, quick);
    await service.close();
    return [
      latency('one page of ten records', few, least),
      latency('one page of 100 to 200 records', flushed, least),
      latency('one page with an image', images, least),
      latency('one page, read before', cached, least),
      rate('batches of 64 pages of ten records', few, least),
      rate('batches of 64 pages of 100 to 200 records', flushed, least),
      rate('batches of 64 pages with images', images, least),
      rate('batches of 64 pages, read before', cached, least),
      {
        question: 'longest stall of the main thread while a layer is compacted',
        unit: 'ms',
        vanilla: undefined,
        strata: delays.max / 1e6,
        isRate: false,
        note: `p99 ${(delays.percentile(99) / 1e6).toFixed(1)} ms`,
      },
    ];
  });
}

/** Images of the pages of a table, over and over, as those of another one. */
async function putImages(timeline: Timeline, from: RecordedTable, rel: number, blocks: number): Promise<RecordedTable> {
  const { spc, db } = from;
  const before = timeline.lastRecordLsn;
  const lsn = before + 8;
  timeline.put(relationSizeKey(spc, db, rel, 0), lsn, encodeCountImage(blocks));
  for (let blk = 0; blk < blocks; blk++) {
    const page = timeline.getPages({ ...from, fork: 0 }, blk % from.blocks, 1, before);
    timeline.put(relationBlockKey(spc, db, rel, 0, blk), lsn, encodeImage(page));
  }
  timeline.advance(lsn, before);
  await timeline.flush();
  return { spc, db, rel, blocks };
}

function serve(timelines: Timelines): Promise<PageService> {
  const log = createLog({ name: 'bench', level: 'error' });
  return PageService.start({ host: HOST, port: 0, secret: SECRET, timelines, log });
}

/** Some rounds for V8's compiler, then those that count. */
async function askOften(asker: PageAsker, work: PageWork, quick: boolean): Promise<PageTimes> {
  const times: PageTimes[] = [];
  for (let round = 0; round < 3; round++) await asker.ask(work);
  for (let round = 0; round < (quick ? 5 : 9); round++) times.push(await asker.ask(work));
  return {
    singlesUs: times.flatMap(({ singlesUs }) => singlesUs),
    batchesMegabytesPerSecond: median(times.map((each) => each.batchesMegabytesPerSecond)),
    singleServerUs: median(times.map((each) => each.singleServerUs)),
    batchedServerUs: median(times.map((each) => each.batchedServerUs)),
  };
}

function latency(what: string, times: PageTimes, floor: PageTimes): Row {
  const figure = (fraction: number): string => percentile(times.singlesUs, fraction).toFixed(0);
  return {
    question: `GetPage, ${what}, p50`,
    unit: 'µs',
    vanilla: undefined,
    strata: percentile(times.singlesUs, 0.5),
    isRate: false,
    note:
      `p99 ${figure(0.99)} µs, ${times.singleServerUs.toFixed(0)} µs of the server's processor; ` +
      `a server without a store: ${percentile(floor.singlesUs, 0.5).toFixed(0)} and ${floor.singleServerUs.toFixed(0)} µs`,
  };
}

function rate(what: string, times: PageTimes, floor: PageTimes): Row {
  return {
    question: `GetPage, ${what}`,
    unit: 'MB/s',
    vanilla: undefined,
    strata: times.batchesMegabytesPerSecond,
    isRate: true,
    note:
      `${times.batchedServerUs.toFixed(1)} µs of the server's processor for each page; ` +
      `a server without a store: ${floor.batchesMegabytesPerSecond.toFixed(0)} MB/s, ${floor.batchedServerUs.toFixed(1)} µs`,
  };
}

async function startFloor(): Promise<{ port: number; close: () => void }> {
  // More than the client has under way.
  const memories = [1, 2, 3, 4].map((fill) =>
    Buffer.alloc(PAGE_RESPONSE_HEADER_BYTES + MAX_PAGES_PER_REQUEST * BLOCK_SIZE, fill),
  );
  let answered = 0;
  const server = createServer((socket) => {
    let input: Buffer = Buffer.alloc(0);
    let isWelcome = false;
    socket.setNoDelay(true);
    socket.on('error', () => socket.destroy());
    socket.on('data', (chunk: Buffer) => {
      input = input.length === 0 ? chunk : Buffer.concat([input, chunk]);
      if (!isWelcome) {
        const hello = decodePageHello(input);
        if (hello === undefined) return;
        isWelcome = true;
        input = input.subarray(hello.bytes);
        socket.write(encodeHelloReply({ kind: 'welcome' }));
      }
      for (; input.length >= PAGE_REQUEST_BYTES; input = input.subarray(PAGE_REQUEST_BYTES)) {
        const length = input.readUInt32LE(36) * BLOCK_SIZE;
        const response = memories[answered++ % memories.length]!.subarray(0, PAGE_RESPONSE_HEADER_BYTES + length);
        encodePagesHeader(input.readUInt32LE(4), length).copy(response);
        socket.write(response);
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
