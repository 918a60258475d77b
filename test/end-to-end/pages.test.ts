/**
 * The pages that Strata serves are Postgres' own.
 *
 * With wal_consistency_checking = all each record carries the pages as they must be after it. They are read from a safekeeper, and the
 * pageserver is asked for each page as of the end of its record; the two must be equal under the masks that Postgres itself uses for the
 * same comparison. At the end the pages that the running Postgres has are compared with those that the pageserver has.
 */
import assert from 'node:assert/strict';
import { after, before, describe, test } from 'node:test';
import type { Client } from 'pg';
import { PageClient } from '../../src/api/pages.ts';
import { type ListedTimeline, PageserverClient } from '../../src/api/pageserver.ts';
import { readWal } from '../../src/api/safekeeper.ts';
import { signToken } from '../../src/base/token.ts';
import { restoreImage } from '../../src/pageserver/redo/image.ts';
import { maskPage } from '../../src/pageserver/redo/redo.ts';
import { formatLsn, type Lsn, parseLsn } from '../../src/postgres/lsn.ts';
import { PD_ALL_VISIBLE, pageFlags, pageIsNew, pageLsn, setPageLsn } from '../../src/postgres/page.ts';
import { BLOCK_SIZE } from '../../src/postgres/page-size.ts';
import { FORK_MAIN, FORK_VM, forkName, GLOBAL_TABLESPACE, type RelationForkKey } from '../../src/postgres/relation.ts';
import {
  RM_BRIN,
  RM_BTREE,
  RM_GIN,
  RM_GIST,
  RM_HASH,
  RM_HEAP,
  RM_HEAP2,
  RM_SEQ,
  RM_SPGIST,
} from '../../src/postgres/rmgr.ts';
import type { PgVersion } from '../../src/postgres/version.ts';
import { WalReader } from '../../src/postgres/wal/reader.ts';
import type { WalRecord } from '../../src/postgres/wal/record.ts';
import { TestPlatform } from './platform.ts';

const HOST = '127.0.0.1';
const PG_VERSION: PgVersion = 17;
const SCALE = Number(process.env['STRATA_TEST_PAGES_SCALE'] ?? 1);
const TRANSACTIONS = Number(process.env['STRATA_TEST_PAGES_TRANSACTIONS'] ?? 150);
/** Of the images that are not the last of their page, one in this many is compared too: pages in the past are right as well. */
const PAST_EVERY = 20;
const PAGE_HEADER_BYTES = 24;
const SPGIST_METAPAGE = 0;
/** SpGistMetaPageData (src/include/access/spgist_private.h): the magic number, then pages with free space, which no record carries. */
const SPGIST_LAST_USED_AT = PAGE_HEADER_BYTES + 4;
const SPGIST_LAST_USED_END = SPGIST_LAST_USED_AT + 8 * 8;
/** Pages of a relation that are compared at the end, from its start and from its end. */
const SAMPLE_BLOCKS = 40;

/** Whose masks a relation's pages are compared under, by access method. */
const RMGR_OF_METHOD: Readonly<Record<string, number>> = {
  heap: RM_HEAP,
  btree: RM_BTREE,
  hash: RM_HASH,
  gin: RM_GIN,
  gist: RM_GIST,
  spgist: RM_SPGIST,
  brin: RM_BRIN,
};

/** What WAL says of one page: its bytes after the record that ends at `lsn`. */
interface Image {
  readonly fork: RelationForkKey;
  readonly blk: number;
  readonly lsn: Lsn;
  readonly rmid: number;
  readonly page: Buffer;
}

describe('pages of a pgbench run', () => {
  let platform: TestPlatform;
  let admin: Client;
  let pageserver: PageserverClient;
  let pages: PageClient;
  let timeline: { readonly tenantId: string; readonly timelineId: string; readonly startLsn: Lsn };
  let endLsn: Lsn;

  before(async () => {
    platform = await TestPlatform.start();
    const endpointId = new URL(platform.connectionString).searchParams.get('options')?.split('=')[1] ?? '';
    await platform.psql('SELECT 1');
    admin = await platform.connectAdmin(endpointId);
    await admin.query("ALTER SYSTEM SET wal_consistency_checking = 'all'");
    await admin.query('ALTER SYSTEM SET autovacuum = off'); // nothing changes while pages are compared
    await admin.query('SELECT pg_reload_conf()');
    await admin.query('CREATE EXTENSION pageinspect');

    await platform.pgbench(['-i', '-s', String(SCALE), '-q']);
    await platform.psql(`
      CREATE INDEX ON pgbench_history USING brin (mtime);
      CREATE TABLE words (id bigserial PRIMARY KEY, body text, tags int[], area point);
      CREATE INDEX ON words USING hash (body);
      CREATE INDEX ON words USING gin (tags);
      CREATE INDEX ON words USING gist (area);
      CREATE INDEX ON words USING spgist (body);
      INSERT INTO words (body, tags, area)
        SELECT md5(i::text), ARRAY[i % 7, i % 11, i], point(i % 97, i % 89) FROM generate_series(1, 3000) AS i;
      DELETE FROM words WHERE id % 3 = 0;
      UPDATE words SET body = body || 'x' WHERE id % 5 = 0;`);
    await platform.psql('VACUUM words');
    await platform.psql('UPDATE words SET tags = tags || 5 WHERE id % 4 = 0');
    const load = platform.pgbench(['-c', '4', '-t', String(TRANSACTIONS), '-n']);
    await platform.psql('VACUUM pgbench_accounts');
    await load;
    await platform.psql('VACUUM (FREEZE) pgbench_tellers');

    const token = await signToken(platform.platformSecret, { scope: 'platform' });
    [pageserver, pages, timeline] = await connectStorage(platform, token);
    await admin.query('CHECKPOINT');
    await admin.query('BEGIN; CREATE TEMPORARY TABLE last (n int) ON COMMIT DROP; COMMIT');
    const { rows } = await admin.query<{ lsn: string }>('SELECT pg_current_wal_flush_lsn()::text AS lsn');
    endLsn = parseLsn(rows[0]?.lsn ?? '');
    await pageserver.waitLsn(timeline.timelineId, endLsn, 60_000);
  });
  after(async () => {
    pages?.close();
    await pageserver?.close();
    await admin?.end().catch(() => {});
    await platform?.destroy();
  });

  test('are the same as the images of wal_consistency_checking, at the end and in the past', async (t) => {
    const [port] = platform.listeningPorts('safekeeper 1');
    assert(port !== undefined);
    const token = await signToken(platform.platformSecret, { scope: 'platform' });
    const last = new Map<string, Image>();
    let imageCount = 0;
    let pastCount = 0;
    const differences: string[] = [];
    const rmids = new Set<number>();
    const compareOne = async (image: Image): Promise<void> => {
      const found = await pages.getPages({ ...image.fork, lsn: image.lsn, blk: image.blk, count: 1 });
      const difference = differenceOf(found, image.page, image.rmid, image.fork.fork, image.blk);
      if (difference === undefined) return;
      differences.push(`${nameOf(image.fork)} ${image.blk} at ${formatLsn(image.lsn)}: ${difference}`);
    };
    for await (const records of readRecords({ port, token, ...timeline, endLsn })) {
      const past: Promise<void>[] = [];
      for (const record of records) {
        for (const image of imagesOf(record)) {
          const key = `${nameOf(image.fork)} ${image.blk}`;
          const before = last.get(key);
          last.set(key, image);
          rmids.add(image.rmid);
          if (before !== undefined && imageCount++ % PAST_EVERY === 0) {
            pastCount++;
            past.push(compareOne(before));
          }
        }
      }
      await Promise.all(past);
    }
    const all = [...last.values()];
    for (let from = 0; from < all.length; from += 64) await Promise.all(all.slice(from, from + 64).map(compareOne));
    t.diagnostic(
      `${all.length} last images, ${pastCount} earlier ones, of resource managers ${[...rmids].sort((a, b) => a - b).join(' ')}`,
    );
    assert.deepEqual(differences.slice(0, 10), [], `${differences.length} pages differ`);
    assert(all.length > 500, `only ${all.length} pages were compared`);
    for (const rmid of [RM_HEAP, RM_HEAP2, RM_BTREE, RM_HASH, RM_GIN, RM_GIST, RM_SPGIST, RM_BRIN, RM_SEQ]) {
      assert(rmids.has(rmid), `no image of resource manager ${rmid}`);
    }
  });

  test('are the same as those that the running Postgres has: tables, indexes, catalogs and visibility maps', async (t) => {
    const differences: string[] = [];
    let count = 0;
    for (const relation of await storedRelations(admin)) {
      for (const fork of [FORK_MAIN, FORK_VM]) {
        const blocks = fork === FORK_MAIN ? relation.blocks : relation.mapBlocks;
        const picked = Array.from({ length: blocks }, (_, blk) => blk).filter(
          (blk) => blk < SAMPLE_BLOCKS || blk >= blocks - SAMPLE_BLOCKS,
        );
        for (const blk of picked) {
          const { rows } = await admin.query<{ page: Buffer }>('SELECT get_raw_page($1, $2, $3) AS page', [
            relation.name,
            fork === FORK_MAIN ? 'main' : forkName(fork).replace(/^_/, ''),
            blk,
          ]);
          const theirs = rows[0]!.page;
          const { spc, db, rel } = relation;
          // A page may have been pruned since, by whoever read it.
          const lsn = Math.max(endLsn, pageLsn(theirs));
          const ours = await pageserver.getPages(timeline.timelineId, { spc, db, rel, fork }, blk, 1, lsn);
          if (relation.rmid === RM_SPGIST && blk === SPGIST_METAPAGE) forgetLastUsedPages(ours, theirs);
          const difference = differenceOf(ours, theirs, relation.rmid, fork, blk, true);
          if (difference !== undefined) differences.push(`${relation.name}.${fork} ${blk}: ${difference}`);
          count++;
        }
      }
    }
    t.diagnostic(`${count} pages`);
    assert.deepEqual(differences.slice(0, 10), [], `${differences.length} of ${count} pages differ`);
    assert(count > 500, `only ${count} pages were compared`);
  });
});

/** The pageserver's two services, and the one project's timeline. */
async function connectStorage(
  platform: TestPlatform,
  token: string,
): Promise<[PageserverClient, PageClient, Extract<ListedTimeline, { kind: 'loaded' }>]> {
  const ports = platform.listeningPorts('pageserver');
  for (const port of ports) {
    const [rpcPort] = ports.filter((other) => other !== port);
    assert(rpcPort !== undefined, `the pageserver listens on ${ports.join(' ')}`);
    const platformToken = { host: HOST, token };
    const probe = { ...platformToken, port, timelineId: '17'.padStart(32, '0') };
    const isPagePort = await PageClient.connect(probe).then(
      (client) => (client.close(), true),
      () => false,
    );
    if (!isPagePort) continue;
    const pageserver = new PageserverClient({ ...platformToken, port: rpcPort });
    const loaded = (await pageserver.listTimelines()).filter((listed) => listed.kind === 'loaded');
    const own = loaded.find((listed) => listed.ancestorTimelineId !== undefined);
    assert(own !== undefined, 'the project has a timeline');
    const { timelineId } = own;
    return [pageserver, await PageClient.connect({ ...platformToken, port, timelineId }), own];
  }
  throw new Error(`none of the ports ${ports.join(' ')} serves pages`);
}

/** A timeline's own records up to `endLsn`, by chunk of WAL. */
async function* readRecords(source: {
  port: number;
  token: string;
  tenantId: string;
  timelineId: string;
  startLsn: Lsn;
  endLsn: Lsn;
}): AsyncGenerator<WalRecord[], void, void> {
  const { port, token, tenantId, timelineId, startLsn, endLsn } = source;
  const reader = new WalReader(startLsn, PG_VERSION);
  const address = { host: HOST, port };
  for await (const chunk of readWal({ address, token, tenantId, timelineId, fromLsn: startLsn })) {
    reader.push(chunk.lsn, chunk.bytes);
    const records: WalRecord[] = [];
    for (let record = reader.next(); record !== undefined; record = reader.next()) {
      if (record.endLsn > endLsn) break;
      records.push(record);
    }
    yield records;
    if (chunk.lsn + chunk.bytes.length >= endLsn) return;
  }
}

function imagesOf(record: WalRecord): Image[] {
  return record.blocks
    .filter((block) => block.hasImage)
    .map((block) => {
      const page = Buffer.alloc(BLOCK_SIZE);
      restoreImage(page, record, block);
      if (block.applyImage && !pageIsNew(page)) setPageLsn(page, record.endLsn); // as redo does
      const { spc, db, rel, fork, blk } = block;
      return { fork: { spc, db, rel, fork }, blk, lsn: record.endLsn, rmid: record.rmid, page };
    });
}

/** How two pages differ under the masks; `isSettled`: no record is under way, so maps must have the same bits. */
function differenceOf(
  ours: Buffer,
  theirs: Buffer,
  rmid: number,
  fork: number,
  blk: number,
  isSettled = false,
): string | undefined {
  const [a, b] = [Buffer.from(ours), Buffer.from(theirs)];
  if (a.equals(b)) return undefined;
  if (fork === FORK_VM && isSettled) {
    return a.subarray(PAGE_HEADER_BYTES).equals(b.subarray(PAGE_HEADER_BYTES)) ? undefined : 'visibility bits differ';
  }
  const isHeap = fork === FORK_MAIN && (rmid === RM_HEAP || rmid === RM_HEAP2);
  if (isHeap && ((pageFlags(a) ^ pageFlags(b)) & PD_ALL_VISIBLE) !== 0) return 'PD_ALL_VISIBLE differs';
  try {
    maskPage(a, rmid, blk, PG_VERSION);
    maskPage(b, rmid, blk, PG_VERSION);
  } catch (error) {
    return error instanceof Error ? error.message : String(error);
  }
  if (a.equals(b)) return undefined;
  const at = a.findIndex((byte, offset) => byte !== b[offset]);
  const hex = (page: Buffer): string => page.toString('hex', at, at + 16);
  return `byte ${at}: ${hex(a)}, Postgres has ${hex(b)}`;
}

function forgetLastUsedPages(...metapages: readonly Buffer[]): void {
  for (const page of metapages) page.fill(0, SPGIST_LAST_USED_AT, SPGIST_LAST_USED_END);
}

function nameOf({ spc, db, rel, fork }: RelationForkKey): string {
  return `${spc}/${db}/${rel}${forkName(fork)}`;
}

interface StoredRelation extends Omit<RelationForkKey, 'fork'> {
  readonly name: string;
  readonly rmid: number;
  readonly blocks: number;
  readonly mapBlocks: number;
}

/** What is stored of this database and of the shared catalogs; but sequences, whose WAL says a value that is ahead. */
async function storedRelations(client: Client): Promise<StoredRelation[]> {
  const { rows } = await client.query<{
    name: string;
    method: string | null;
    rel: number;
    db: number;
    spc: number;
    blocks: number;
    map: number;
  }>(`
    SELECT c.oid::regclass::text AS name, a.amname AS method, pg_relation_filenode(c.oid)::int AS rel,
           CASE WHEN c.relisshared THEN 0 ELSE d.oid END::int AS db,
           CASE WHEN c.relisshared THEN ${GLOBAL_TABLESPACE} ELSE d.dattablespace END::int AS spc,
           (pg_relation_size(c.oid) / ${BLOCK_SIZE})::int AS blocks, (pg_relation_size(c.oid, 'vm') / ${BLOCK_SIZE})::int AS map
      FROM pg_class AS c JOIN pg_database AS d ON d.datname = current_database() LEFT JOIN pg_am AS a ON a.oid = c.relam
     WHERE c.relkind IN ('r', 'i', 't') AND c.relpersistence = 'p' AND pg_relation_filenode(c.oid) IS NOT NULL`);
  return rows.map(({ name, method, rel, db, spc, blocks, map }) => {
    const rmid = RMGR_OF_METHOD[method ?? ''];
    assert(rmid !== undefined, `${name} has access method ${method}`);
    return { name, rmid, rel, db, spc, blocks, mapBlocks: map };
  });
}
