/**
 * Scrub of a running platform: a clean one passes, also while it is written to; damage, loss, orphans and wrong pages are found and named.
 */
import assert from 'node:assert/strict';
import { existsSync, mkdtempSync, readdirSync, readFileSync, renameSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, describe, test } from 'node:test';
import { PageserverClient } from '../../src/api/pageserver.ts';
import { signToken } from '../../src/base/token.ts';
import type { Key } from '../../src/pageserver/key.ts';
import { LayerCache, LayerFile } from '../../src/pageserver/layers/layer-file.ts';
import { layerFileName } from '../../src/pageserver/layers/layer-format.ts';
import { LayerWriter } from '../../src/pageserver/layers/layer-writer.ts';
import { decodeTimelineIndex, encodeTimelineIndex } from '../../src/pageserver/timeline-index.ts';
import { TestPlatform, waitUntil } from './platform.ts';

interface Finding {
  readonly where: string;
  readonly name: string;
  readonly offset: number;
  readonly reason: string;
}

interface Report {
  readonly seed: number;
  readonly local_layers: number;
  readonly object_layers: number;
  readonly wal_objects: number;
  readonly findings: readonly Finding[];
  readonly repaired: readonly Finding[];
  readonly orphans: readonly { readonly name: string }[];
  readonly orphans_deleted: number;
  readonly branches: readonly {
    readonly branch: string;
    readonly compared: number;
    readonly from_wal_alone: number;
    readonly refused: number;
    readonly files: number;
    readonly skipped: string | null;
  }[];
  readonly differences: readonly { readonly branch: string; readonly block: number; readonly reason: string }[];
  readonly file_differences: readonly { readonly file: string; readonly offset: number; readonly reason: string }[];
}

describe('scrub', () => {
  let platform: TestPlatform;
  let pageserver: PageserverClient;
  let timelineId: string;
  let folder: string;

  before(async () => {
    platform = await TestPlatform.start();
    const file = JSON.parse(readFileSync(join(platform.dataDir, 'platform.json'), 'utf8')) as {
      pageserver: { host: string; port: number };
    };
    const token = await signToken(platform.platformSecret, { scope: 'platform' });
    pageserver = new PageserverClient({ ...file.pageserver, token });
    const branches = await platform.cliJson<{ name: string; timeline_id: string }[]>(['branches', 'list']);
    timelineId = branches.find(({ name }) => name === 'main')!.timeline_id;
    folder = join(platform.dataDir, 'pageserver', 'timelines', timelineId);
    await platform.psql(`
      CREATE TABLE items (id int PRIMARY KEY, note text);
      INSERT INTO items SELECT i, 'note ' || i FROM generate_series(1, 20000) AS i;
      UPDATE items SET note = note || ' again' WHERE id % 7 = 0;
      DELETE FROM items WHERE id % 11 = 0;
      CREATE INDEX ON items (note);
      CREATE TABLE gone AS SELECT generate_series(1, 5000) AS id;
      INSERT INTO items VALUES (100001, 'a MARKER of one page')`);
    await platform.psql('VACUUM items');
    await platform.psql('TRUNCATE gone');
    await platform.psql('INSERT INTO gone SELECT generate_series(1, 100)');
    await stored();
  });
  after(async () => {
    await pageserver.close();
    await platform.destroy();
  });

  /** Everything is in layers, and in the store. */
  async function stored(): Promise<void> {
    const head = await platform.psql('SELECT pg_current_wal_flush_lsn()');
    await platform.cli(['branches', 'at', head]);
    await pageserver.flush(timelineId);
    for (let i = 0; i < 1200; i++) {
      const status = await pageserver.objectStoreStatus();
      if (status === undefined || status.pendingTimelines === 0) return;
      await new Promise((done) => setTimeout(done, 50));
    }
    throw new Error('uploads do not end');
  }

  async function scrub(...args: string[]): Promise<{ code: number; report: Report; error: string }> {
    const found = await platform.cli(['scrub', '--output', 'json', ...args]).then(
      ({ stdout, stderr }) => ({ code: 0, stdout, stderr }),
      (error: { code: number; stdout: string; stderr: string }) => error,
    );
    assert(found.stdout !== '', `exit code ${found.code}: ${found.stderr}`);
    return { code: found.code, report: JSON.parse(found.stdout) as Report, error: found.stderr };
  }

  /** As a file of its own: it may be one with an object. */
  function replace(path: string, bytes: Buffer): void {
    writeFileSync(`${path}.partial`, bytes);
    renameSync(`${path}.partial`, path);
  }

  /** The largest delta layer, once no merge is under way. */
  async function settledLayer(): Promise<string> {
    for (let before = ''; ;) {
      const names = readdirSync(folder).filter((name) => /__[0-9A-F]{16}-/.test(name));
      const size = (name: string): number => readFileSync(join(folder, name)).length;
      if (names.join() === before) return join(folder, names.sort((a, b) => size(b) - size(a))[0]!);
      before = names.join();
      await new Promise((done) => setTimeout(done, 2_000));
    }
  }

  test('a clean platform passes, and most of it is compared with its WAL', async () => {
    await platform.cli(['branches', 'create', '--name', 'side']);
    const { code, report, error } = await scrub('--seed', '7', '--sample', '600');
    assert.equal(code, 0, `${JSON.stringify(report)} ${error}`);
    assert.deepEqual([report.seed, report.findings, report.differences, report.file_differences], [7, [], [], []]);
    assert(report.local_layers >= 2 && report.object_layers >= 1, JSON.stringify(report));
    const main = report.branches.find(({ branch }) => branch === 'main')!;
    assert(main.compared > 200 && main.from_wal_alone > 100, JSON.stringify(main));
    assert.equal(main.refused, 0);
    assert(main.files > 100, JSON.stringify(main));
    assert.match(report.branches.find(({ branch }) => branch === 'side')!.skipped ?? '', /no history of its own/);
    const again = await scrub('--seed', '7', '--sample', '600', '--branch', 'main');
    assert.equal(again.report.branches[0]?.compared, main.compared, 'a seed gives the same pages');
    const { stdout } = await platform.cli(['scrub', '--sample', '20']);
    assert.match(stdout, /pages of main +\d+ states compared with .* of its WAL/);
  });

  test('there is no false alarm while it is written to', async () => {
    await platform.pgbench(['-i', '-q']);
    const load = platform.pgbench(['-n', '-c', '2', '-T', '15']);
    const flushes = (async () => {
      for (let i = 0; i < 12; i++) {
        await pageserver.flush(timelineId);
        await new Promise((done) => setTimeout(done, 500));
      }
    })();
    for (let i = 0; i < 3; i++) {
      const { code, report } = await scrub('--sample', '300');
      assert.equal(code, 0, JSON.stringify(report));
    }
    await Promise.all([load, flushes]);
    await stored();
  });

  test('nor when a database is copied under the number of one that is gone', async () => {
    const url = new URL(platform.connectionString);
    url.pathname = '/first';
    await platform.psql('CREATE DATABASE first OID 70000');
    await platform.psql("CREATE TABLE t AS SELECT i, repeat('x', 500) FROM generate_series(1, 5000) AS i", url.href);
    await platform.psql('CREATE DATABASE kept TEMPLATE first');
    await platform.psql('DROP DATABASE first');
    await platform.psql('CREATE DATABASE first OID 70000 TEMPLATE kept STRATEGY FILE_COPY');
    await stored();
    const { code, report } = await scrub('--sample', '3000', '--branch', 'main');
    assert.equal(code, 0, JSON.stringify(report.differences.slice(0, 3)));
    assert(report.branches[0]!.refused > 100, 'of what is copied no WAL has the pages');
  });

  test('a layer that is damaged or gone here is named, and repaired when that is asked for', async () => {
    const path = await settledLayer();
    const bytes = readFileSync(path);
    const damaged = Buffer.from(bytes);
    damaged[Math.floor(bytes.length / 2)]! ^= 255;
    replace(path, damaged);
    const found = await scrub('--sample', '0');
    assert.equal(found.code, 1);
    assert.deepEqual([...new Set(found.report.findings.map(({ name }) => name))], [path]);
    assert.match(found.report.findings[0]!.reason, /checksum/);
    assert.match(found.error, /scrub --repair/);
    const repaired = await scrub('--sample', '0', '--repair');
    assert.equal(repaired.code, 0, JSON.stringify(repaired.report));
    assert(repaired.report.repaired.length > 0);
    assert.deepEqual((await scrub('--sample', '50')).report.findings, []);
    assert(!existsSync(path) || readFileSync(path).equals(bytes));
  });

  test('damaged and missing objects are named, and orphans are deleted when that is asked for', async () => {
    const root = join(platform.dataDir, 'object-store');
    const name = readdirSync(join(root, 'layers'))
      .flatMap((tenant) => readdirSync(join(root, 'layers', tenant)).map((id) => join('layers', tenant, id)))
      .filter((each) => each.endsWith(timelineId))
      .flatMap((each) => readdirSync(join(root, each)).map((layer) => join(each, layer)))
      .sort((a, b) => readFileSync(join(root, b)).length - readFileSync(join(root, a)).length)[0]!;
    const bytes = readFileSync(join(root, name));
    const damaged = Buffer.from(bytes);
    damaged[50]! ^= 1;
    replace(join(root, name), damaged);
    const flipped = await scrub('--sample', '0');
    rmSync(join(root, name));
    const missing = await scrub('--sample', '0');
    const repaired = await scrub('--sample', '0', '--repair');
    assert.equal(repaired.code, 0, JSON.stringify(repaired.report));
    assert.deepEqual(repaired.report.repaired, repaired.report.findings);
    assert.deepEqual((await scrub('--sample', '0')).report.findings, []);
    assert.equal(flipped.code, 1);
    assert(flipped.report.findings.every((finding) => finding.name === name && finding.where === 'object store'));
    assert.equal(missing.code, 1);
    assert.deepEqual(
      missing.report.findings.map(({ reason }) => reason),
      ['the object is not there'],
    );

    const orphan = name.replace(/-[0-9a-f]{8}$/, '-00000000');
    writeFileSync(join(root, orphan), 'nobody names it');
    const found = await scrub('--sample', '0');
    assert.equal(found.code, 0, JSON.stringify(found.report));
    assert(found.report.orphans.some((each) => each.name === orphan));
    const gone = await scrub('--sample', '0', '--delete-orphans');
    assert.equal(gone.report.orphans_deleted, gone.report.orphans.length);
    assert(!existsSync(join(root, orphan)));
  });

  test('damaged and missing objects of WAL are named, and come again from the safekeepers’ disks when that is asked for', async () => {
    const root = join(platform.dataDir, 'object-store');
    const list = (): string[] =>
      readdirSync(join(root, 'wal'), { recursive: true, encoding: 'utf8' })
        .filter((name) => name.includes(timelineId) && /[0-9A-F]{16}-[0-9A-F]{16}$/.test(name))
        .map((name) => join('wal', name))
        .sort();
    await waitUntil(() => list().length > 0, 'WAL is offloaded', 90_000);
    const clean = await scrub('--sample', '0');
    assert.equal(clean.code, 0, JSON.stringify(clean.report));
    assert(clean.report.wal_objects > 0);
    const [name] = list() as [string];
    const bytes = readFileSync(join(root, name));
    const damaged = Buffer.from(bytes);
    damaged[Math.floor(bytes.length / 2)]! ^= 4;
    replace(join(root, name), damaged);
    const flipped = await scrub('--sample', '0');
    assert.deepEqual([flipped.code, flipped.report.findings.map((each) => each.name)], [1, [name]]);
    assert.match(flipped.report.findings[0]!.reason, /CRC/);
    rmSync(join(root, name));
    const missing = await scrub('--sample', '0');
    assert.equal(missing.code, 1);
    assert.match(missing.report.findings[0]!.reason, /no object has the WAL from/);
    replace(join(root, name), damaged);
    const repaired = await scrub('--sample', '0', '--repair');
    assert.equal(repaired.code, 0, JSON.stringify(repaired.report));
    assert.deepEqual((await scrub('--sample', '0')).report.findings, []);
  });

  test('a wrong page in a layer whose checksums are right is found by replaying WAL', async () => {
    // Nothing more is written: the pageserver would write its index anew, and scrub have it flush.
    const endpoints = await platform.cliJson<{ id: string }[]>(['endpoints', 'list']);
    for (const { id } of endpoints) await platform.cli(['endpoints', 'suspend', id]);
    await platform.cli(['branches', 'at']);
    await pageserver.flush(timelineId);
    await settledLayer();
    const indexPath = join(folder, 'index');
    const index = decodeTimelineIndex(readFileSync(indexPath), indexPath);
    const scratch = mkdtempSync(join(tmpdir(), 'strata-scrub-e2e-'));
    const cache = new LayerCache({ blockBytesMax: 1 << 24, openFilesMax: 8 });
    let altered = 0;
    for (const layer of index.layers) {
      if (layer.kind === 'image') continue;
      const path = join(folder, layerFileName(layer));
      const file = new LayerFile(path, layer, cache);
      const entries: { key: Key; lsn: number; value: Buffer }[] = [];
      file.forEachValue((key, lsn, value) => entries.push({ key, lsn, value }));
      if (!entries.some(({ value }) => value.includes('MARKER'))) continue;
      const writer = await LayerWriter.create(scratch, { ...layer, timelineId });
      for (const { key, lsn, value } of entries) {
        const bytes = Buffer.from(value);
        for (let at = bytes.indexOf('MARKER'); at >= 0; at = bytes.indexOf('MARKER', at)) {
          bytes.write('WRONG!', at);
          altered++;
        }
        writer.add(key, lsn, bytes);
        if (writer.isBusy) await writer.drain();
      }
      const written = await writer.finish();
      const whole = { layer: readFileSync(path), index: readFileSync(indexPath) };
      replace(path, readFileSync(join(scratch, layerFileName(written))));
      const layers = index.layers.map((each) => (each === layer ? { ...layer, sizeBytes: written.sizeBytes } : each));
      replace(indexPath, encodeTimelineIndex({ ...index, layers }));
      const { code, report } = await scrub('--sample', '5000', '--seed', '1', '--branch', 'main');
      replace(path, whole.layer);
      replace(indexPath, whole.index);
      assert.equal(code, 1);
      assert.deepEqual(
        report.findings.filter(({ where }) => where === 'local'),
        [],
        'its checksums are right',
      );
      assert(report.differences.length >= 1, JSON.stringify(report));
      assert(report.differences.every(({ reason }) => /bytes differ/.test(reason)));
    }
    rmSync(scratch, { recursive: true });
    assert(altered > 0, 'the record is in a layer');
    const { code } = await scrub('--sample', '500', '--branch', 'main');
    assert.equal(code, 0);
  });
});
