import assert from 'node:assert/strict';
import {
  chmodSync,
  existsSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  linkSync,
  utimesSync,
  writeFileSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, test } from 'node:test';
import { FileSystemStore } from './file-system-store.ts';
import type { PutStep } from './file-system-store.ts';
import { isObjectError } from './object-store.ts';
import { namesOf, rejectsWith, testObjectStore } from './object-store.contract.ts';

testObjectStore('file system', {
  open: async () => {
    const directory = mkdtempSync(join(tmpdir(), 'strata-objects-'));
    const store = await FileSystemStore.open(join(directory, 'made', 'by-open'));
    return { store, close: async () => rmSync(directory, { recursive: true }) };
  },
  sortsAnyNames: true,
  isAtomic: true,
  largeSizeBytes: 3 * 1024 * 1024 + 17,
  propertyRuns: 15,
});

describe('file system store', () => {
  let directory: string;
  beforeEach(() => {
    directory = mkdtempSync(join(tmpdir(), 'strata-objects-'));
  });
  afterEach(() => rmSync(directory, { recursive: true }));

  test('a crash at any step of a put leaves the old object or the new one, and no other trace in lists', async () => {
    const steps: PutStep[] = ['created', 'written', 'synced', 'named', 'folder-synced'];
    for (const ifAbsent of [false, true]) {
      for (const crashAt of steps) {
        const name = `crash/${crashAt}-${ifAbsent}`;
        const before = await FileSystemStore.open(directory);
        if (!ifAbsent) await before.put(name, Buffer.from('old'));
        const atStep = (step: PutStep): void => {
          if (step === crashAt) throw new Error(`crash when ${step}`);
        };
        const dying = await FileSystemStore.open(directory, { atStep });
        await assert.rejects(dying.put(name, Buffer.from('new'), { ifAbsent }), /crash when/);
        const after = await FileSystemStore.open(directory);
        const found = await after.get(name).then(String, () => undefined);
        const isNamed = crashAt === 'named' || crashAt === 'folder-synced';
        assert.equal(found, isNamed ? 'new' : ifAbsent ? undefined : 'old', crashAt);
        await after.put(name, Buffer.from('again'));
        assert.equal(String(await after.get(name)), 'again');
        await after.delete(name);
        assert.deepEqual(await namesOf(after, ''), []);
      }
    }
  });

  test('what a crash left unfinished is removed when it is old, not sooner: it may be another process’ work', async () => {
    const store = await FileSystemStore.open(directory);
    const [copied, shared] = [join(directory, '.partial', 'copied'), join(directory, '.partial', 'shared')];
    writeFileSync(copied, 'x');
    const file = join(directory, 'file');
    writeFileSync(file, 'its bytes are old, its name there is not');
    const twoDaysAgo = Date.now() / 1000 - 2 * 86_400;
    utimesSync(file, twoDaysAgo, twoDaysAgo);
    linkSync(file, shared);
    assert.equal(await store.removeUnfinished(60_000), 0);
    assert.equal(await store.removeUnfinished(-60_000), 2);
    assert.equal(await store.removeUnfinished(-60_000), 0);
    assert.deepEqual([existsSync(copied), existsSync(shared), existsSync(file)], [false, false, true]);
  });

  test('a failed put leaves nothing behind', async () => {
    const store = await FileSystemStore.open(directory);
    await store.put('a', Buffer.from('x'));
    await rejectsWith(store.put('a/b', Buffer.from('x')), 'rejected'); // a is an object, so no folder
    await store.put('folder/b', Buffer.from('x'));
    await rejectsWith(store.put('folder', Buffer.from('x')), 'rejected');
    const controller = new AbortController();
    const dying = await FileSystemStore.open(directory, {
      atStep: (step) => {
        if (step === 'synced') controller.abort(new Error('stop'));
      },
    });
    await assert.rejects(dying.put('c', Buffer.from('x'), { signal: controller.signal }), /stop/);
    assert.deepEqual(readdirSync(join(directory, '.partial')), []);
    assert.deepEqual(await namesOf(store, ''), ['a', 'folder/b']);
  });

  test('folders that become empty go away, also while others write into them', async () => {
    const [one, two] = [await FileSystemStore.open(directory), await FileSystemStore.open(directory)];
    const work = async (store: FileSystemStore, own: string): Promise<void> => {
      for (let round = 0; round < 30; round++) {
        await store.put(`deep/er/folder/${own}`, Buffer.from(own));
        assert.equal(String(await store.get(`deep/er/folder/${own}`)), own);
        await store.delete(`deep/er/folder/${own}`);
      }
    };
    await Promise.all([work(one, 'one'), work(two, 'two'), work(two, 'three')]);
    assert.deepEqual(readdirSync(directory), ['.partial']);
  });

  test('what is stored are the bytes themselves, in a file by the object’s name', async () => {
    const store = await FileSystemStore.open(directory);
    await store.put('tenants/t/index-00000001', Buffer.from('plain'));
    assert.equal(readFileSync(join(directory, 'tenants/t/index-00000001'), 'latin1'), 'plain');
  });

  test(
    'an error of the file system has its kind',
    { skip: process.getuid?.() === 0 && 'root may do all' },
    async () => {
      const store = await FileSystemStore.open(directory);
      await store.put('closed/object', Buffer.from('x'));
      chmodSync(join(directory, 'closed'), 0);
      try {
        await assert.rejects(store.get('closed/object'), (error) => isObjectError(error, 'denied'));
      } finally {
        chmodSync(join(directory, 'closed'), 0o700);
      }
    },
  );
});
