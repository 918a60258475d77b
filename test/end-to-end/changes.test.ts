/**
 * What changed, of a real Postgres: every page that differs is named, with its table; nothing is named that was not written.
 */
import assert from 'node:assert/strict';
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { after, before, describe, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { PageserverClient } from '../../src/api/pageserver.ts';
import { signToken } from '../../src/base/token.ts';
import { formatLsn, type Lsn, parseLsn } from '../../src/postgres/lsn.ts';
import { BLOCK_SIZE } from '../../src/postgres/page-size.ts';
import { TestPlatform } from './platform.ts';

const BATCH = 256;

interface Fork {
  readonly tablespace_oid: number;
  readonly database_oid: number;
  readonly relfilenode: number;
  readonly fork: string;
  readonly changed_blocks: number;
  readonly ranges: readonly (readonly [number, number])[];
  readonly blocks_before?: number | null;
  readonly blocks_after?: number | null;
}

interface Table {
  readonly database: string;
  readonly name: string;
  readonly pages: number;
  readonly heap_pages: number;
  readonly index_pages: number;
  readonly toast_pages: number;
  readonly heap_size_before?: number | null;
  readonly heap_size_after?: number | null;
  readonly notes: readonly string[];
}

interface Side {
  readonly branch: string;
  readonly from_lsn: string;
  readonly to_lsn: string;
  readonly pages: number;
  readonly tables: readonly Table[];
}

describe('what changed in a branch', () => {
  let platform: TestPlatform;
  let pageserver: PageserverClient;
  let project: string;

  before(async () => {
    platform = await TestPlatform.start();
    const file = JSON.parse(readFileSync(join(platform.dataDir, 'platform.json'), 'utf8')) as {
      pageserver: { host: string; port: number };
    };
    const token = await signToken(platform.platformSecret, { scope: 'platform' });
    pageserver = new PageserverClient({ ...file.pageserver, token });
    project = (await platform.cliJson<{ id: string }[]>(['projects', 'list']))[0]!.id;
  });
  after(async () => {
    await pageserver.close();
    await platform.destroy();
  });

  async function uriOf(branch: string): Promise<string> {
    return (await platform.cli(['connection-string', branch])).stdout.trim();
  }

  async function branchOf(name: string): Promise<{ id: string; timeline_id: string }> {
    const branches = await platform.cliJson<{ id: string; name: string; timeline_id: string }[]>(['branches', 'list']);
    return branches.find((branch) => branch.name === name)!;
  }

  async function lsnNow(uri = platform.connectionString): Promise<string> {
    return platform.psql('SELECT pg_current_wal_insert_lsn()', uri);
  }

  /** All forks, with their blocks, as the API has them. */
  async function forksOf(branch: string, query: string): Promise<Map<string, Fork>> {
    const forks = new Map<string, Fork>();
    const { id } = await branchOf(branch);
    for (let cursor = ''; ;) {
      const { status, body } = await platform.api(
        'GET',
        `/projects/${project}/branches/${id}/changes?ranges=true&${query}${cursor}`,
      );
      assert.equal(status, 200, JSON.stringify(body));
      const page = body as { forks: Fork[]; pagination?: { next: string } };
      for (const fork of page.forks) {
        const name = `${fork.tablespace_oid}/${fork.database_oid}/${fork.relfilenode}/${fork.fork}`;
        const known = forks.get(name);
        forks.set(name, known === undefined ? fork : { ...fork, ranges: [...known.ranges, ...fork.ranges] });
      }
      if (page.pagination === undefined) return forks;
      cursor = `&cursor=${page.pagination.next}`;
    }
  }

  /** Compares both versions of all pages of all relations, and checks that what differs was named. Resolves to how many pages differ and are named. */
  async function compareAllPages(branch: string, from: Lsn, to: Lsn): Promise<{ differing: number; named: number }> {
    const { timeline_id: timelineId } = await branchOf(branch);
    const forks = await forksOf(branch, `from_lsn=${formatLsn(from)}&to_lsn=${formatLsn(to)}`);
    const sizes = async (
      lsn: Lsn,
    ): Promise<Map<string, { spc: number; db: number; rel: number; fork: number; blocks: number }>> => {
      const { relations } = await pageserver.basebackup(timelineId, lsn);
      return new Map(
        relations
          .filter((relation) => relation.sourceFork === relation.fork)
          .map(({ spc, db, rel, fork, blocks }) => [
            `${spc}/${db}/${rel}/${['main', 'fsm', 'vm', 'init'][fork]}`,
            { spc, db, rel, fork, blocks },
          ]),
      );
    };
    const [then, now] = [await sizes(from), await sizes(to)];
    let differing = 0;
    let named = 0;
    for (const [name, fork] of now) {
      const blocksBefore = then.get(name)?.blocks ?? 0;
      const changes = forks.get(name);
      if (then.get(name)?.blocks !== fork.blocks) {
        assert.equal(changes?.blocks_before ?? null, then.get(name)?.blocks ?? null, name);
        assert.equal(changes?.blocks_after, fork.blocks, name);
      }
      const isNamed = new Set<number>();
      for (const [start, end] of changes?.ranges ?? []) for (let blk = start; blk < end; blk++) isNamed.add(blk);
      named += isNamed.size;
      for (let first = 0; first < fork.blocks; first += BATCH) {
        const count = Math.min(BATCH, fork.blocks - first);
        const old = await pageserver.getPages(timelineId, fork, first, count, from);
        const recent = await pageserver.getPages(timelineId, fork, first, count, to);
        for (let i = 0; i < count; i++) {
          const page = (pages: Buffer): Buffer => pages.subarray(i * BLOCK_SIZE, (i + 1) * BLOCK_SIZE);
          const differs = first + i >= blocksBefore || !page(old).equals(page(recent));
          if (!differs) continue;
          differing++;
          assert(isNamed.has(first + i), `block ${first + i} of ${name} differs and was not named`);
        }
      }
    }
    for (const name of then.keys()) {
      if (!now.has(name)) assert.equal(forks.get(name)?.blocks_after, null, `${name} was dropped`);
    }
    return { differing, named };
  }

  test('rows of known pages, and every page that differs, whatever is done to tables', async () => {
    await platform.psql(`
      CREATE TABLE items (id int PRIMARY KEY, n int, note text) WITH (fillfactor = 70, autovacuum_enabled = off);
      CREATE TABLE quiet (id int PRIMARY KEY);
      CREATE TABLE big (id int, body text);
      CREATE TABLE doomed (id int);
      CREATE TABLE emptied (id int);
      INSERT INTO items SELECT i, 0, 'note ' || i FROM generate_series(1, 20000) AS i;
      INSERT INTO quiet SELECT generate_series(1, 5000);
      INSERT INTO doomed SELECT generate_series(1, 1000);
      INSERT INTO emptied SELECT generate_series(1, 1000)`);
    await platform.psql('VACUUM (FREEZE) items, quiet, big, doomed, emptied');
    await platform.psql('SELECT count(*) FROM items; SELECT count(*) FROM quiet');
    const from = parseLsn(await lsnNow());
    const wanted = 'id % 3000 = 17';
    const pagesOf = async (): Promise<number[]> =>
      (await platform.psql(`SELECT DISTINCT (ctid::text::point)[0]::int FROM items WHERE ${wanted} ORDER BY 1`))
        .split('\n')
        .map(Number);
    const pages = new Set(await pagesOf());
    await platform.psql(`UPDATE items SET n = n + 1 WHERE ${wanted}`);
    for (const page of await pagesOf()) pages.add(page);
    const to = parseLsn(await lsnNow());

    const filenode = await platform.psql("SELECT pg_relation_filenode('items')");
    const forks = await forksOf('main', `from_lsn=${formatLsn(from)}&to_lsn=${formatLsn(to)}`);
    const items = [...forks.values()].find((fork) => String(fork.relfilenode) === filenode && fork.fork === 'main');
    const found: number[] = [];
    for (const [start, end] of items?.ranges ?? []) for (let blk = start; blk < end; blk++) found.push(blk);
    assert.deepEqual(
      found,
      [...pages].sort((a, b) => a - b),
      'the pages of the rows, and no others',
    );
    assert(![...forks.keys()].some((name) => name.includes('quiet')));

    await platform.psql(`
      INSERT INTO big SELECT i, (SELECT string_agg(md5((i * j)::text), '') FROM generate_series(1, 200) AS j) FROM generate_series(1, 50) AS i;
      DROP TABLE doomed;
      TRUNCATE emptied;
      CREATE TABLE fresh AS SELECT generate_series(1, 3000) AS id;
      CREATE INDEX items_n ON items (n);
      DELETE FROM items WHERE id > 15000`);
    await platform.psql('VACUUM items');
    const end = parseLsn(await lsnNow());
    const { differing, named } = await compareAllPages('main', from, end);
    assert(differing > 100 && named < differing * 1.5, `${differing} pages differ, ${named} are named`);

    const side = await platform.cliJson<Side>([
      'branches',
      'changes',
      'main',
      '--from',
      formatLsn(from),
      '--to',
      formatLsn(end),
    ]);
    const table = (name: string): Table | undefined => side.tables.find((each) => each.name === `public.${name}`);
    assert.equal(table('quiet'), undefined);
    assert(table('items')!.heap_pages > pages.size / 2 && table('items')!.index_pages > 0);
    assert.equal(table('items')!.notes.includes('index items_n new'), true);
    assert(table('items')!.heap_size_after! < table('items')!.heap_size_before!, 'VACUUM has cut it');
    assert(table('big')!.toast_pages > 10, 'TOAST is its table’s');
    assert.deepEqual(table('fresh')!.notes, ['new']);
    assert.deepEqual(table('emptied')!.notes, ['rewritten']);
    assert.equal(side.tables.filter((each) => each.notes.includes('dropped')).length, 1, 'doomed, by its number');
    assert(side.tables.some((each) => each.name === 'pg_catalog.pg_class'));
    assert.equal(side.pages, named);

    const { stdout } = await platform.cli([
      'branches',
      'changes',
      'main',
      '--from',
      formatLsn(from),
      '--to',
      formatLsn(end),
    ]);
    assert.match(stdout, /stratadb +public\.big +\d+ +[\d.]+ [kM]B/);
    assert.match(stdout, /system catalogs \(\d+\)/);
  });

  test('a branch and its parent since they parted; nobody is woken when that is not wanted', async () => {
    await platform.cli(['branches', 'create', '--name', 'side']);
    const side = await uriOf('side');
    await platform.psql('UPDATE quiet SET id = id WHERE id < 10; CREATE TABLE only_here (id int)', side);
    await platform.psql('DELETE FROM fresh WHERE id < 100');
    const [own, parents] = await platform.cliJson<Side[]>(['branches', 'changes', 'side', 'main']);
    assert.equal(own!.from_lsn, parents!.from_lsn);
    const names = (each: Side): string[] =>
      each.tables.map(({ name }) => name).filter((name) => name.startsWith('public.'));
    assert.deepEqual(names(own!).sort(), ['public.only_here', 'public.quiet']);
    assert.deepEqual(names(parents!), ['public.fresh']);
    const alone = await platform.cliJson<Side>(['branches', 'changes', 'side']);
    assert.equal(alone.from_lsn, own!.from_lsn);
    assert.deepEqual(names(alone).sort(), ['public.only_here', 'public.quiet']);
    const { timeline_id: timelineId } = await branchOf('side');
    const to = (await pageserver.timelineStatus(timelineId)).lastRecordLsn;
    await compareAllPages('side', parseLsn(alone.from_lsn), to);
    await pageserver.flush(timelineId);
    await compareAllPages('side', parseLsn(alone.from_lsn), to);

    const endpoints = await platform.cliJson<{ id: string; branch_id: string; current_state: string }[]>([
      'endpoints',
      'list',
    ]);
    const { id } = await branchOf('side');
    const endpoint = endpoints.find((each) => each.branch_id === id)!.id;
    await platform.cli(['endpoints', 'suspend', endpoint]);
    const numbers = await platform.cliJson<Side>(['branches', 'changes', 'side', '--no-wake']);
    // What was there when they parted is known from the parent, which is awake.
    assert.deepEqual(names(numbers), ['public.quiet']);
    assert(numbers.tables.some(({ name, notes }) => /^file \d+$/.test(name) && notes.includes('new')));
    const after = await platform.cliJson<{ id: string; current_state: string }[]>(['endpoints', 'list']);
    assert.equal(after.find((each) => each.id === endpoint)?.current_state, 'idle');
  });

  test('between two times', async () => {
    await sleep(20);
    const from = new Date().toISOString();
    await sleep(20);
    await platform.psql('INSERT INTO quiet VALUES (100000)');
    await sleep(20);
    const to = new Date().toISOString();
    await sleep(20);
    await platform.psql('INSERT INTO items VALUES (100000, 1, NULL)');
    const side = await platform.cliJson<Side>(['branches', 'changes', 'main', '--from', from, '--to', to]);
    const names = side.tables.map(({ name }) => name).filter((name) => name.startsWith('public.'));
    assert.deepEqual(names, ['public.quiet']);
  });

  test('what cannot be is refused by value', async () => {
    const fails = async (words: RegExp, ...args: string[]): Promise<void> => {
      await assert.rejects(platform.cli(['branches', 'changes', ...args]), words);
    };
    const earlier = await lsnNow();
    await platform.psql('INSERT INTO quiet VALUES (100001)');
    await fails(/"FFFF\/FFFFFFFFF" is neither an LSN/, 'main', '--from', 'FFFF/FFFFFFFFF');
    await fails(/FFFF\/0 is in the future of branch main: oldest .*, newest/, 'main', '--to', 'FFFF/0');
    await fails(/0\/1 is before the beginning of branch main: oldest/, 'main', '--from', '0/1');
    await fails(/goes backwards/, 'main', '--from', await lsnNow(), '--to', earlier);
    await fails(/cannot be given with two branches/, 'main', 'side', '--from', '0/1');
    await fails(/compared with itself/, 'main', 'main');
    await fails(/no branch "nowhere"/, 'main', 'nowhere');
  });
});
