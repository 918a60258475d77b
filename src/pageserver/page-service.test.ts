import assert from 'node:assert/strict';
import { mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { connect } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, describe, test } from 'node:test';
import fc from 'fast-check';
import { replayPoke } from '../../test/pageserver/history-model.ts';
import { encodePageHello, encodePageRequest, PageClient } from '../api/pages.ts';
import { createLog } from '../base/log.ts';
import { signToken } from '../base/token.ts';
import { relationBlockKey, relationSizeKey } from './key.ts';
import { LayerDamagedError } from './layers/block.ts';
import { PageService } from './page-service.ts';
import { Timelines } from './timelines.ts';
import { encodeCountImage, encodeImage } from './value.ts';

const TENANT = 'a'.repeat(32);
const LSN = 0x1000000;
const ID = '1'.padStart(32, '0');
const OTHER = '2'.padStart(32, '0');
const FORK = { spc: 1663, db: 5, fork: 0 };
const host = '127.0.0.1';
const secret = Buffer.alloc(32, 7);
const runs = Number(process.env['STRATA_TEST_RUNS'] ?? 60);

describe('the page service', () => {
  let directory: string;
  let timelines: Timelines;
  let service: PageService;
  let token: string;
  /** Resolves when a damaged layer is whole again. */
  let repaired: PromiseWithResolvers<void>;
  let damages: LayerDamagedError[] = [];

  before(async () => {
    directory = mkdtempSync(join(tmpdir(), 'strata-page-service-'));
    const log = createLog({ name: 'test', level: 'silent' });
    timelines = await Timelines.open(directory, { replay: replayPoke, log, limits: { pageCacheBytes: 0 } });
    for (const timelineId of [ID, OTHER]) {
      const timeline = await timelines.import(
        { tenantId: TENANT, timelineId, pgVersion: 17, lsn: LSN, recordLsn: LSN - 8 },
        async (target) => {
          target.put(relationBlockKey(1663, 5, 100, 0, 0), Buffer.alloc(8192, 100));
          await target.drain();
        },
      );
      // Two relations, each in a layer of its own.
      for (const rel of [100, 200]) {
        const lsn = timeline.lastRecordLsn + 8;
        timeline.put(relationSizeKey(1663, 5, rel, 0), lsn, encodeCountImage(50));
        for (let blk = 0; blk < 50; blk++) {
          timeline.put(relationBlockKey(1663, 5, rel, 0, blk), lsn, encodeImage(Buffer.alloc(8192, rel + blk)));
        }
        timeline.advance(lsn, lsn - 8);
        await timeline.flush();
      }
    }
    repaired = Promise.withResolvers();
    token = await signToken(secret, { scope: 'platform' });
    const repair = (damage: LayerDamagedError): Promise<void> => {
      damages.push(damage);
      return repaired.promise;
    };
    service = await PageService.start({ host, port: 0, secret, timelines, log, repair });
  });
  after(async () => {
    await service.close();
    await timelines.close();
    rmSync(directory, { recursive: true });
  });

  const open = (timelineId = ID): Promise<PageClient> =>
    PageClient.connect({ host, port: service.port, token, timelineId });
  const get = (client: PageClient, rel: number, blk: number, timelineId = ID): Promise<Buffer> =>
    client.getPages({ ...FORK, rel, blk, count: 1, lsn: timelines.get(timelineId).lastRecordLsn });

  test('a page that waits for its layer to be repaired holds up nobody else: not the same timeline, nor others', async () => {
    const folder = join(directory, 'timelines', ID);
    const first = readdirSync(folder)
      .filter((name) => /__[0-9A-F]{16}-/.test(name))
      .sort((a, b) => (a.slice(74) < b.slice(74) ? -1 : 1))[0]!;
    const path = join(folder, first);
    const whole = readFileSync(path);
    writeFileSync(path, Buffer.alloc(whole.length));
    for (const layer of timelines.get(ID).layerMap.all()) layer.close();
    const [waiting, waitingToo, reader, other] = await Promise.all([open(), open(), open(), open(OTHER)]);
    let isAnswered = false;
    const pages = Promise.all([get(waiting, 100, 3), get(waitingToo, 100, 4)]).finally(() => (isAnswered = true));
    for (let blk = 0; blk < 50; blk++) {
      assert.deepEqual(await get(reader, 200, blk), Buffer.alloc(8192, 200 + blk));
      assert.deepEqual(await get(other, 100, blk, OTHER), Buffer.alloc(8192, 100 + blk));
    }
    assert(damages.length >= 2 && damages.every(({ file }) => file === path));
    assert(!isAnswered);
    writeFileSync(path, whole);
    for (const layer of timelines.get(ID).layerMap.all()) layer.close();
    repaired.resolve();
    assert.deepEqual(await pages, [Buffer.alloc(8192, 103), Buffer.alloc(8192, 104)]);
    for (const client of [waiting, waitingToo, reader, other]) client.close();
  });

  test('whatever is sent to it, it answers others, and keeps nothing of it', async () => {
    const hello = encodePageHello({ token, timelineId: ID });
    const request = (requestId: number): Buffer =>
      encodePageRequest({ ...FORK, requestId, rel: 200, blk: requestId % 50, count: 1, lsn: LSN + 16 });
    const whole = Buffer.concat([hello, ...Array.from({ length: 30 }, (_, i) => request(i))]);
    const change = fc.record({
      at: fc.oneof(fc.nat(hello.length), fc.nat(whole.length - 1)),
      how: fc.constantFrom('set', 'big', 'cut', 'end'),
      value: fc.nat(255),
      length: fc.integer({ min: 1, max: 60 }),
    });
    const reader = await open();
    await fc.assert(
      fc.asyncProperty(fc.array(change, { minLength: 1, maxLength: 3 }), async (changes) => {
        let bytes: Buffer = Buffer.from(whole);
        for (const { at, how, value, length } of changes) {
          if (how === 'set') bytes[at % bytes.length] = value;
          else if (how === 'big') bytes.fill(0xff, at % bytes.length, Math.min(bytes.length, (at % bytes.length) + 4));
          else if (how === 'cut') bytes = Buffer.concat([bytes.subarray(0, at), bytes.subarray(at + length)]);
          else bytes = bytes.subarray(0, Math.max(1, at));
        }
        const socket = connect(service.port, host);
        socket.on('error', () => {});
        const closed = new Promise<void>((resolve) => socket.once('close', () => resolve()));
        socket.resume();
        socket.end(bytes);
        assert.deepEqual(await get(reader, 200, 7), Buffer.alloc(8192, 207));
        socket.destroySoon();
        await closed;
      }),
      { numRuns: runs },
    );
    reader.close();
  });
});
