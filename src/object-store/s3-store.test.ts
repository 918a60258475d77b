import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { existsSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, afterEach, before, beforeEach, describe, test } from 'node:test';
import { crc32 } from 'node:zlib';
import { FaultProxy } from '../../test/object-store/fault-proxy.ts';
import type { ProxyFault } from '../../test/object-store/fault-proxy.ts';
import { namedServer, startMoto, startS3rver } from '../../test/object-store/s3-servers.ts';
import type { S3Server } from '../../test/object-store/s3-servers.ts';
import { patternOf, rejectsWith, testObjectStore } from './object-store.contract.ts';
import { REAL_ENVIRONMENT } from './retry.ts';
import type { RetriedFailure, RetryPolicy } from './retry.ts';
import { S3Store } from './s3-store.ts';
import type { S3StoreOptions } from './s3-store.ts';

const PART_BYTES = 5 * 1024 * 1024; // the least that S3 takes
const RETRY: RetryPolicy = {
  attempts: 4,
  firstDelayMs: 5,
  maxDelayMs: 20,
  attemptTimeoutMs: 5000,
  totalTimeoutMs: 20_000,
};

function storeOf(server: S3Server, more: Partial<S3StoreOptions> = {}): S3Store {
  return new S3Store({
    bucket: server.bucket,
    prefix: `test-${randomBytes(8).toString('hex')}`,
    endpoint: server.endpoint,
    credentials: server.credentials,
    supportsIfAbsent: server.knows.ifAbsent,
    partSizeBytes: PART_BYTES,
    retry: RETRY,
    ...more,
  });
}

const servers = [...(await Promise.all([startS3rver(), startMoto()])), namedServer()];
for (const server of servers) if (server !== undefined) testServer(server);

function testServer(server: S3Server): void {
  const { name } = server;
  describe(`S3, ${name}`, () => {
    after(() => server.stop());

    testObjectStore(name, {
      open: async () => {
        const store = storeOf(server);
        return { store, close: async () => store.close() };
      },
      sortsAnyNames: name !== 's3rver',
      isAtomic: name !== 's3rver',
      largeSizeBytes: PART_BYTES + 17,
      propertyRuns: 6,
    });
    testFaults(server);
  });
}

function testFaults(server: S3Server): void {
  describe('behind a bad network', () => {
    let proxy: FaultProxy;
    let store: S3Store;
    let directory: string;
    let file: string;
    const failures: RetriedFailure[] = [];
    const large = patternOf(2 * PART_BYTES + 17);

    before(() => {
      directory = mkdtempSync(join(tmpdir(), 'strata-s3-'));
      file = join(directory, 'large');
      writeFileSync(file, large);
    });
    after(() => rmSync(directory, { recursive: true }));
    beforeEach(async () => {
      proxy = await FaultProxy.start(server.endpoint);
      store = open();
      failures.length = 0;
    });
    afterEach(async () => {
      store.close();
      await proxy.stop();
    });

    function open(more: Partial<S3StoreOptions> = {}): S3Store {
      const environment = { ...REAL_ENVIRONMENT, onRetry: (failure: RetriedFailure) => failures.push(failure) };
      return storeOf(server, { endpoint: proxy.url, environment, ...more });
    }

    function uploadRequests(pattern: RegExp): string[] {
      return proxy.requests.filter((line) => pattern.test(line));
    }

    test('each way in which a request or its reply can get lost is overcome by another attempt', async () => {
      const faults: ProxyFault[] = [
        { kind: 'refuse' },
        { kind: 'lose-reply' },
        { kind: 'cut-request', afterBytes: 300 },
        { kind: 'cut-reply', afterBytes: 40 },
        { kind: 'answer', status: 503, code: 'SlowDown' },
        { kind: 'answer', status: 500, code: 'InternalError' },
        { kind: 'answer', status: 400, code: 'RequestTimeout' },
      ];
      for (const fault of faults) {
        const bytes = Buffer.from(`stored in spite of ${JSON.stringify(fault)}`);
        proxy.failOnce(/^PUT /, fault);
        await store.put('lost/object', bytes);
        proxy.failOnce(/^GET /, fault);
        assert.deepEqual(await store.get('lost/object'), bytes);
        proxy.failOnce(/^GET /, fault);
        assert.deepEqual(await store.getRange('lost/object', 3, 9), bytes.subarray(3, 9));
        proxy.failOnce(/^GET /, fault);
        assert.equal((await store.list('lost/')).objects.length, 1);
        proxy.failOnce(/^DELETE /, fault);
        await store.delete('lost/object');
        proxy.failOnce(/^POST .*delete/, fault);
        await store.deleteMany(['lost/object', 'lost/other']);
        // The code is in the body, which the answer to a HEAD has not.
        const headFault = fault.kind === 'answer' ? ({ ...fault, status: 503 } as const) : fault;
        proxy.failOnce(/^HEAD /, headFault);
        await rejectsWith(store.head('lost/object'), 'not-found');
        assert.equal(failures.length, 7, `retries with ${JSON.stringify(fault)}`);
        failures.length = 0;
      }
    });

    test('an answer that breaks off is no object, and leaves no file', async () => {
      const bytes = patternOf(300_000);
      await store.put('cut/object', bytes);
      for (const afterBytes of [10, 600, 100_000, 300_000]) {
        const to = join(directory, `to-${afterBytes}`);
        proxy.failOnce(/^GET /, { kind: 'cut-reply', afterBytes });
        assert.deepEqual((await store.getToFile('cut/object', to)).crc32, crc32(bytes));
        proxy.failOnce(/^GET /, { kind: 'cut-reply', afterBytes });
        assert.ok(bytes.equals(await store.get('cut/object')));
        assert.equal(failures.length, 2, `after ${afterBytes} bytes`);
        failures.length = 0;
        proxy.chooseFault = () => ({ kind: 'cut-reply', afterBytes });
        await rejectsWith(store.getToFile('cut/object', `${to}-never`), 'transient');
        assert.equal(existsSync(`${to}-never`), false);
        failures.length = 0;
      }
    });

    test('a bit that changes on the way is noticed where the server keeps checksums', async (context) => {
      if (!server.knows.checksums) return context.skip('this server keeps no checksums');
      const bytes = patternOf(100_000);
      await store.put('bit/object', bytes);
      assert.equal((await store.head('bit/object')).crc32, crc32(bytes));
      proxy.failOnce(/^GET /, { kind: 'damage-reply', atBodyByte: 50_000 });
      assert.ok(bytes.equals(await store.get('bit/object')));
      assert.match(String(failures[0]?.error), /received CRC32/);
      proxy.chooseFault = () => ({ kind: 'damage-reply', atBodyByte: 50_000 });
      await rejectsWith(store.getToFile('bit/object', join(directory, 'to')), 'damaged');
      await store.putFile('bit/large', file);
      proxy.chooseFault = () => undefined;
      assert.equal((await store.head('bit/large')).crc32, crc32(large));
    });

    test('a server that never answers costs the deadline, a caller who gives up nothing more', async () => {
      proxy.chooseFault = () => ({ kind: 'hang' });
      await assert.rejects(store.get('hang/object', { timeoutMs: 150 }), { kind: 'transient', code: 'timeout' });
      const patient = open({ retry: { ...RETRY, attempts: 2, attemptTimeoutMs: 60 } });
      await assert.rejects(patient.get('hang/object'), { kind: 'transient', code: 'timeout' });
      assert.equal(failures.length, 1);
      const controller = new AbortController();
      setTimeout(() => controller.abort(new Error('no longer wanted')), 30);
      await assert.rejects(store.putFile('hang/object', file, { signal: controller.signal }), /no longer wanted/);
      patient.close();
    });

    test('errors that another attempt would not change come at once', async () => {
      const cases = [
        [403, 'AccessDenied', 'denied'],
        [403, 'SignatureDoesNotMatch', 'denied'],
        [404, 'NoSuchBucket', 'rejected'],
        [404, 'NoSuchKey', 'not-found'],
        [400, 'InvalidRequest', 'rejected'],
        [501, 'NotImplemented', 'unsupported'],
      ] as const;
      for (const [status, code, kind] of cases) {
        proxy.chooseFault = () => ({ kind: 'answer', status, code });
        await rejectsWith(store.get('error/object'), kind);
        if (code !== 'NoSuchKey') await rejectsWith(store.put('error/object', Buffer.from('x')), kind);
      }
      assert.equal(failures.length, 0);
    });

    test('a part that fails is sent again by itself', async () => {
      proxy.failOnce(/^PUT .*partNumber=2/, { kind: 'cut-request', afterBytes: 1_000_000 });
      await store.putFile('parts/object', file);
      assert.ok(large.equals(await store.get('parts/object')));
      assert.equal(uploadRequests(/^PUT .*partNumber=/).length, 4);
      assert.equal(uploadRequests(/^POST .*uploads/).length, 1);
    });

    test('an upload that cannot be ended is aborted', async () => {
      proxy.chooseFault = (line) => (/^PUT .*partNumber=3/.test(line) ? { kind: 'refuse' } : undefined);
      await rejectsWith(store.putFile('aborted/object', file), 'transient');
      assert.ok(uploadRequests(/^DELETE .*uploadId=/).length > 0);
      await rejectsWith(store.head('aborted/object'), 'not-found');
      proxy.chooseFault = () => undefined;
      if (server.knows.abortUpload) assert.equal(await store.removeUnfinished(-60_000), 0);
    });

    test('an upload that a crash left is aborted when it is old', async (context) => {
      if (!server.knows.abortUpload) return context.skip('this server does not list uploads');
      proxy.chooseFault = (line) => (/^DELETE |partNumber=3/.test(line) ? { kind: 'refuse' } : undefined);
      await rejectsWith(store.putFile('left/object', file), 'transient');
      proxy.chooseFault = () => undefined;
      if (server.name !== 'moto') assert.equal(await store.removeUnfinished(60 * 60 * 1000), 0); // moto knows no times
      assert.equal(await store.removeUnfinished(-60_000), 1);
      assert.equal(await store.removeUnfinished(-60_000), 0);
    });

    test('a lost reply to the end of an upload does not lose the object', async (context) => {
      if (!server.knows.checksums)
        return context.skip('this server answers the repetition with a server error for ever');
      proxy.failOnce(/^POST .*uploadId=/, { kind: 'lose-reply' });
      await store.putFile('ended/object', file);
      assert.ok(large.equals(await store.get('ended/object')));
      assert.equal(uploadRequests(/^POST .*uploads/).length, 1);
    });

    test('without checksums and with deletions by MD5 everything works as well', async () => {
      const plain = open({ checksums: 'none' });
      await plain.putFile('plain/large', file);
      await plain.put('plain/small', Buffer.from('x'));
      assert.ok(large.equals(await plain.get('plain/large')));
      await plain.deleteMany(['plain/large', 'plain/small']);
      assert.deepEqual((await plain.list('')).objects, []);
      plain.close();
    });

    test('more than a thousand are deleted in batches', async () => {
      const names = Array.from({ length: 2001 }, (_, index) => `batch/${index}`);
      await store.put('batch/2000', Buffer.from('x'));
      await store.deleteMany(names);
      assert.equal(uploadRequests(/^POST .*delete/).length, 3);
      assert.deepEqual((await store.list('batch/')).objects, []);
    });

    test('wrong credentials are denied', async (context) => {
      if (server.name !== 's3rver') return context.skip('only one of the servers checks keys');
      const intruder = open({ credentials: { accessKeyId: 'GUESSED', secretAccessKey: 'guessed' } });
      await rejectsWith(intruder.get('secret/object'), 'denied');
      await rejectsWith(intruder.put('secret/object', Buffer.from('x')), 'denied');
      intruder.close();
    });
  });
}
