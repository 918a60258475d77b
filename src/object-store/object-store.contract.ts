/**
 * What every object store must do: one suite, run against each implementation by its own test file.
 */
import assert from 'node:assert/strict';
import { existsSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, describe, test } from 'node:test';
import { crc32 } from 'node:zlib';
import fc from 'fast-check';
import { isObjectError, listAll, ObjectStoreError } from './object-store.ts';
import type { ObjectStore } from './object-store.ts';

export interface ContractSubject {
  /** An empty store. */
  open(): Promise<{ readonly store: ObjectStore; close(): Promise<void> }>;
  /** False: names are sorted as S3 does only when no name or folder continues another with `-`, `.` or `/`. */
  readonly sortsAnyNames: boolean;
  /** False: a test server that shows objects while they are written. */
  readonly isAtomic: boolean;
  /** A size that this store handles in several steps. */
  readonly largeSizeBytes: number;
  readonly propertyRuns: number;
}

export function testObjectStore(title: string, subject: ContractSubject): void {
  describe(`object store: ${title}`, () => {
    let store: ObjectStore;
    let opened: Awaited<ReturnType<ContractSubject['open']>>;
    let directory: string;
    before(async () => {
      opened = await subject.open();
      store = opened.store;
      directory = mkdtempSync(join(tmpdir(), 'strata-object-store-'));
    });
    after(async () => {
      await opened.close();
      rmSync(directory, { recursive: true });
    });

    test('an object is read as it was put, replaced whole, and gone when it was deleted', async () => {
      const name = 'whole/object';
      await store.put(name, Buffer.from('first'));
      assert.equal(String(await store.get(name)), 'first');
      await store.put(name, Buffer.from('the second one'));
      assert.equal(String(await store.get(name)), 'the second one');
      const info = await store.head(name);
      assert.equal(info.sizeBytes, 14);
      assert.ok(Math.abs(info.modifiedMs - Date.now()) < 120_000, `modified at ${info.modifiedMs}`);
      if (info.crc32 !== undefined) assert.equal(info.crc32, crc32(Buffer.from('the second one')));
      await store.delete(name);
      await rejectsWith(store.get(name), 'not-found');
      await store.delete(name); // again, as after a lost reply
    });

    test('an empty object is an object', async () => {
      await store.put('empty/object', Buffer.alloc(0));
      assert.equal((await store.get('empty/object')).length, 0);
      assert.equal((await store.head('empty/object')).sizeBytes, 0);
      const path = join(directory, 'empty');
      assert.deepEqual(await store.getToFile('empty/object', path), { sizeBytes: 0, crc32: crc32(Buffer.alloc(0)) });
      assert.equal(readFileSync(path).length, 0);
    });

    test('what is not there is not found, whatever is asked of it', async () => {
      const path = join(directory, 'absent');
      await rejectsWith(store.get('absent/object'), 'not-found');
      await rejectsWith(store.head('absent/object'), 'not-found');
      await rejectsWith(store.getRange('absent/object', 0, 1), 'not-found');
      await rejectsWith(store.getToFile('absent/object', path), 'not-found');
      assert.equal(existsSync(path), false);
      assert.deepEqual(await store.list('absent/'), { objects: [], next: undefined });
      await store.put('folder/object', Buffer.from('x'));
      await rejectsWith(store.get('folder'), 'not-found');
      await rejectsWith(store.head('folder'), 'not-found');
      await store.delete('folder');
      assert.equal(String(await store.get('folder/object')), 'x');
    });

    test('a range is exact, and one that the object does not have is damage', async () => {
      const bytes = Buffer.from(Array.from({ length: 1000 }, (_, index) => index & 255));
      await store.put('range/object', bytes);
      const ranges: [number, number][] = [[0, 1], [0, 1000], [1, 2], [999, 1000], [100, 900], [5, 5], [1000, 1000]]; // prettier-ignore
      for (const [start, end] of ranges) {
        const range = await store.getRange('range/object', start, end);
        assert.deepEqual(range, bytes.subarray(start, end), `[${start}, ${end})`);
      }
      await rejectsWith(store.getRange('range/object', 990, 1001), 'damaged');
      await rejectsWith(store.getRange('range/object', 1000, 1001), 'damaged');
      await rejectsWith(store.getRange('range/object', 5, 4), 'rejected');
      await rejectsWith(store.getRange('range/object', -1, 4), 'rejected');
    });

    test('a file goes in and comes out, small and large, and replaces what was there', async () => {
      for (const sizeBytes of [0, 1, 4096, subject.largeSizeBytes, subject.largeSizeBytes + 1]) {
        const bytes = patternOf(sizeBytes);
        const [from, to] = [join(directory, 'from'), join(directory, 'to')];
        writeFileSync(from, bytes);
        writeFileSync(to, 'something else that is replaced');
        await store.putFile('file/object', from);
        const { sizeBytes: received, crc32: checksum } = await store.getToFile('file/object', to);
        assert.equal(received, sizeBytes);
        assert.equal(checksum, crc32(bytes));
        assert.ok(readFileSync(to).equals(bytes), `${sizeBytes} bytes`);
        assert.equal((await store.head('file/object')).sizeBytes, sizeBytes);
        if (sizeBytes > 4096) {
          const range = await store.getRange('file/object', sizeBytes - 4096, sizeBytes);
          assert.ok(range.equals(bytes.subarray(-4096)));
        }
      }
      await rejectsWith(store.putFile('file/other', join(directory, 'no-such-file')), 'rejected');
      await rejectsWith(store.head('file/other'), 'not-found');
      await rejectsWith(store.getToFile('file/object', join(directory, 'no-such-folder', 'file')), 'rejected');
    });

    test('a file that is shared with the store is the object, whatever becomes of either name', async () => {
      const bytes = patternOf(100_000);
      const [from, to] = [join(directory, 'from'), join(directory, 'to')];
      rmSync(from, { force: true });
      writeFileSync(from, bytes);
      await store.putFile('shared/object', from, { share: true });
      await store.putFile('shared/object', from, { share: true }); // as after a lost reply
      rmSync(from);
      writeFileSync(to, 'something else that is replaced');
      const { sizeBytes, crc32: checksum } = await store.getToFile('shared/object', to, { share: true });
      assert.deepEqual([sizeBytes, checksum], [bytes.length, crc32(bytes)]);
      assert.ok(readFileSync(to).equals(bytes));
      await store.put('shared/object', Buffer.from('replaced'));
      assert.ok(readFileSync(to).equals(bytes));
      await store.putFile('shared/object', to, { share: true });
      await store.delete('shared/object');
      assert.ok(readFileSync(to).equals(bytes));
      await rejectsWith(store.getToFile('shared/object', to, { share: true }), 'not-found');
      await rejectsWith(store.putFile('shared/other', join(directory, 'no-such-file'), { share: true }), 'rejected');
    });

    test('of several puts that want to be the first, one is', async (context) => {
      if (!store.supportsIfAbsent) {
        await rejectsWith(store.put('first/object', Buffer.from('0'), { ifAbsent: true }), 'unsupported');
        await rejectsWith(store.head('first/object'), 'not-found');
        return context.skip('this server has no conditional puts');
      }
      const attempts = Array.from({ length: 8 }, (_, index) =>
        store.put('first/object', Buffer.from(`by ${index}`), { ifAbsent: true }),
      );
      const results = await Promise.allSettled(attempts);
      const winners = results.flatMap((result, index) => (result.status === 'fulfilled' ? [index] : []));
      assert.equal(winners.length, 1);
      for (const result of results) {
        if (result.status === 'rejected') assert.ok(isObjectError(result.reason, 'exists'), String(result.reason));
      }
      assert.equal(String(await store.get('first/object')), `by ${winners[0]}`);
      const large = join(directory, 'large');
      writeFileSync(large, patternOf(subject.largeSizeBytes));
      await rejectsWith(store.putFile('first/object', large, { ifAbsent: true }), 'exists');
      await store.delete('first/object');
      await store.putFile('first/object', large, { ifAbsent: true });
      assert.equal((await store.head('first/object')).sizeBytes, subject.largeSizeBytes);
    });

    test('no name leads out of the store, and none is accepted that some store could not keep', async () => {
      const bad = ['', '/', 'a/', '/a', 'a//b', '.', '..', '../a', 'a/../b', 'a/./b', '.partial/a', 'a\\b', 'a\0b', 'ä', 'a b', '-a', 'x'.repeat(901), `a/${'x'.repeat(256)}`]; // prettier-ignore
      for (const name of bad) {
        await rejectsWith(store.put(name, Buffer.from('x')), 'rejected');
        await rejectsWith(store.get(name), 'rejected');
        await rejectsWith(store.head(name), 'rejected');
        await rejectsWith(store.getRange(name, 0, 1), 'rejected');
        await rejectsWith(store.delete(name), 'rejected');
        await rejectsWith(store.deleteMany(['good', name]), 'rejected');
      }
      for (const prefix of ['/', '../', 'a/../', '.']) await rejectsWith(store.list(prefix), 'rejected');
      await rejectsWith(store.list('', { limit: 0 }), 'rejected');
      await rejectsWith(store.list('', { limit: 1001 }), 'rejected');
      const long = `${'s'.repeat(200)}/${'t'.repeat(200)}/${'u'.repeat(200)}`;
      await store.put(long, Buffer.from('x'));
      assert.equal((await store.list(long)).objects.length, 1);
      await store.delete(long);
    });

    test(
      'readers see the old object or the new one, never a mixture',
      { skip: !subject.isAtomic && 'this server is not atomic' },
      async () => {
        const contents = Array.from({ length: 6 }, (_, index) => Buffer.alloc(200_000, index));
        await store.put('atomic/object', contents[0]!);
        let isDone = false;
        const read = async (): Promise<number> => {
          let count = 0;
          for (; !isDone || count === 0; count++) {
            const bytes = await store.get('atomic/object');
            assert.ok(contents.some((content) => content.equals(bytes)));
          }
          return count;
        };
        const readers = [read(), read()];
        for (const content of contents) await store.put('atomic/object', content);
        isDone = true;
        await Promise.all(readers);
      },
    );

    test('an aborted call rejects with the signal’s reason', async () => {
      const reason = new Error('enough');
      const signal = AbortSignal.abort(reason);
      const path = join(directory, 'aborted');
      writeFileSync(path, 'x');
      const calls = [
        store.put('aborted/object', Buffer.from('x'), { signal }),
        store.putFile('aborted/object', path, { signal }),
        store.get('aborted/object', { signal }),
        store.getRange('aborted/object', 0, 1, { signal }),
        store.getToFile('aborted/object', `${path}-to`, { signal }),
        store.head('aborted/object', { signal }),
        store.list('aborted/', { signal }),
        store.delete('aborted/object', { signal }),
        store.deleteMany(['aborted/object'], { signal }),
      ];
      for (const result of await Promise.allSettled(calls)) {
        assert.equal(result.status === 'rejected' && result.reason, reason);
      }
      await rejectsWith(store.head('aborted/object'), 'not-found');
    });

    test('many are deleted at once, among them some that are not there', async () => {
      const names = Array.from({ length: 60 }, (_, index) => `many/${String(index).padStart(4, '0')}`);
      await Promise.all(names.map((name) => store.put(name, Buffer.from(name))));
      const absent = Array.from({ length: 1000 }, (_, index) => `many/absent-${index}`);
      await store.deleteMany([...names.slice(0, 50), ...absent, ...names.slice(0, 10)]);
      assert.deepEqual(await namesOf(store, 'many/'), names.slice(50));
      await store.deleteMany([]);
      await store.deleteMany(names);
      assert.deepEqual(await namesOf(store, 'many/'), []);
    });

    test('random histories: what is read and listed is what a map would hold', async () => {
      // Folders end in d and leaves in f, so that no name is the folder of another.
      const alphabet = subject.sortsAnyNames
        ? ['a', 'b', 'a-', 'a.b', 'A', '0', '_', 'a-b', 'ab']
        : ['a', 'b', 'c', '0'];
      const folder = fc.constantFrom(...alphabet).map((segment) => `${segment}d`);
      const leaf = fc.constantFrom(...alphabet).map((segment) => `${segment}f`);
      const name = subject.sortsAnyNames
        ? fc.tuple(fc.array(folder, { maxLength: 3 }), leaf).map(([folders, last]) => [...folders, last].join('/'))
        : fc.tuple(folder, folder, leaf).map((segments) => segments.join('/'));
      const command = fc.oneof(
        { weight: 4, arbitrary: fc.record({ kind: fc.constant('put' as const), name, size: fc.nat(40) }) },
        { weight: 1, arbitrary: fc.record({ kind: fc.constant('put-file' as const), name, size: fc.nat(5000) }) },
        { weight: 2, arbitrary: fc.record({ kind: fc.constant('delete' as const), names: fc.array(name, { maxLength: 4 }) }) }, // prettier-ignore
        { weight: 2, arbitrary: fc.record({ kind: fc.constant('get' as const), name, start: fc.nat(30), end: fc.nat(60) }) }, // prettier-ignore
        { weight: 3, arbitrary: fc.record({ kind: fc.constant('list' as const), name, cut: fc.nat(12), limit: fc.integer({ min: 1, max: 5 }) }) }, // prettier-ignore
      );
      let run = 0;
      const property = fc.asyncProperty(fc.array(command, { minLength: 5, maxLength: 30 }), async (commands) => {
        const root = `random/${String(run++).padStart(5, '0')}/`;
        const model = new Map<string, Buffer>();
        for (const [step, each] of commands.entries()) {
          if (each.kind === 'put' || each.kind === 'put-file') {
            const bytes = Buffer.alloc(each.size, step + 1);
            const path = join(directory, 'random');
            if (each.kind === 'put') await store.put(root + each.name, bytes);
            else {
              writeFileSync(path, bytes);
              await store.putFile(root + each.name, path);
            }
            model.set(root + each.name, bytes);
          } else if (each.kind === 'delete') {
            const [first] = each.names;
            if (each.names.length === 1 && first !== undefined) await store.delete(root + first);
            else await store.deleteMany(each.names.map((one) => root + one));
            for (const one of each.names) model.delete(root + one);
          } else if (each.kind === 'get') {
            const expected = model.get(root + each.name);
            const [start, end] = [Math.min(each.start, each.end), Math.max(each.start, each.end)];
            if (expected === undefined) await rejectsWith(store.get(root + each.name), 'not-found');
            else {
              assert.deepEqual(await store.get(root + each.name), expected);
              const range = store.getRange(root + each.name, start, end);
              if (start < end && end > expected.length) await rejectsWith(range, 'damaged');
              else assert.deepEqual(await range, expected.subarray(start, end));
            }
          } else {
            const prefix = root + each.name.slice(0, each.cut);
            const expected = [...model.keys()].filter((one) => one.startsWith(prefix)).sort();
            const listed: string[] = [];
            for await (const object of listAll(store, prefix, { limit: each.limit })) {
              assert.equal(object.sizeBytes, model.get(object.name)?.length, object.name);
              listed.push(object.name);
            }
            assert.deepEqual(listed, expected);
            // A listing may begin after any name, there or not.
            const page = await store.list(prefix, { after: root + each.name, limit: each.limit });
            const rest = expected.filter((one) => one > root + each.name);
            assert.deepEqual(page.objects.map((object) => object.name), rest.slice(0, each.limit)); // prettier-ignore
            assert.equal(page.next !== undefined, rest.length > each.limit);
          }
        }
      });
      await fc.assert(property, { numRuns: subject.propertyRuns });
    });
  });
}

export async function rejectsWith(call: Promise<unknown>, kind: ObjectStoreError['kind']): Promise<void> {
  await assert.rejects(call, (error) => {
    assert.ok(error instanceof ObjectStoreError, `${String(error)} is no ObjectStoreError`);
    assert.equal(error.kind, kind, error.message);
    return true;
  });
}

export async function namesOf(store: ObjectStore, prefix: string): Promise<string[]> {
  const names: string[] = [];
  for await (const { name } of listAll(store, prefix)) names.push(name);
  return names;
}

/** Bytes in which no two stretches are alike. */
export function patternOf(sizeBytes: number): Buffer {
  const bytes = Buffer.alloc(sizeBytes);
  for (let at = 0; at + 4 <= sizeBytes; at += 4) bytes.writeUInt32LE(Math.imul(at, 0x9e3779b1) >>> 0, at);
  return bytes;
}
