/**
 * S3 servers that tests start on loopback.
 *
 * - s3rver (from npm): knows range reads, lists and multipart uploads. It does not know conditional puts, checksums, or the abort and list of uploads;
 *   it shows an object while it is written; and it sorts names as paths: `a-1` before `a`, `a/b` before `a-b`. It checks the key's id; signatures
 *   are not checked, as it computes those of requests to the bucket itself in another way. Its list tokens need a cipher that OpenSSL has only with its
 *   legacy provider.
 * - moto_server, where it is on the PATH: knows all of these.
 * - Any other: STRATA_TEST_S3_ENDPOINT and STRATA_TEST_S3_BUCKET, with credentials from the usual places. What the tests write is under a random prefix.
 */
import { spawn } from 'node:child_process';
import type { ChildProcess } from 'node:child_process';
import { once } from 'node:events';
import { mkdtempSync, rmSync } from 'node:fs';
import { connect } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { setTimeout as sleep } from 'node:timers/promises';
import { CreateBucketCommand, S3Client } from '@aws-sdk/client-s3';
import { freePort } from '../../src/base/free-port.ts';
import type { S3Credentials } from '../../src/object-store/s3-store.ts';

export interface S3Server {
  readonly name: string;
  readonly endpoint: string;
  readonly bucket: string;
  readonly credentials: S3Credentials | undefined;
  readonly knows: S3Abilities;
  stop(): Promise<void>;
}

export interface S3Abilities {
  readonly ifAbsent: boolean;
  readonly checksums: boolean;
  readonly abortUpload: boolean;
  /** Sorts any names as S3 does. */
  readonly order: boolean;
}

const BUCKET = 'strata';
const START_MS = 15_000;

export async function startS3rver(): Promise<S3Server> {
  const directory = mkdtempSync(join(tmpdir(), 'strata-s3rver-'));
  const program = `
    const S3rver = require('@20minutes/s3rver');
    const options = { address: '127.0.0.1', port: 0, silent: true, allowMismatchedSignatures: true, directory: process.argv[1], configureBuckets: [{ name: '${BUCKET}' }] };
    new S3rver(options).run().then((address) => console.log(address.port));
    process.stdin.resume().on('end', () => process.exit());`;
  const child = spawn(process.execPath, ['--openssl-legacy-provider', '-e', program, directory], {
    cwd: import.meta.dirname,
    stdio: ['pipe', 'pipe', 'inherit'],
  });
  killAtExit(child);
  const [port] = (await once(createInterface(child.stdout), 'line', { signal: AbortSignal.timeout(START_MS) })) as [
    string,
  ];
  return {
    name: 's3rver',
    endpoint: `http://127.0.0.1:${port}`,
    bucket: BUCKET,
    credentials: { accessKeyId: 'S3RVER', secretAccessKey: 'S3RVER' },
    knows: { ifAbsent: false, checksums: false, abortUpload: false, order: false },
    stop: async () => {
      await stopChild(child);
      rmSync(directory, { recursive: true, force: true });
    },
  };
}

/** Undefined where it is not installed. */
export async function startMoto(): Promise<S3Server | undefined> {
  const port = await freePort();
  const child = spawn('moto_server', ['-H', '127.0.0.1', '-p', String(port)], { stdio: 'ignore' });
  let isGone = false;
  child.once('exit', () => (isGone = true)).once('error', () => (isGone = true)); // there is no such program
  killAtExit(child);
  if (!(await waitForPort(port, () => isGone))) return undefined;
  const endpoint = `http://127.0.0.1:${port}`;
  const credentials = { accessKeyId: 'test', secretAccessKey: 'test' };
  const client = new S3Client({ endpoint, region: 'us-east-1', forcePathStyle: true, credentials });
  await client.send(new CreateBucketCommand({ Bucket: BUCKET }));
  client.destroy();
  return {
    name: 'moto',
    endpoint,
    bucket: BUCKET,
    credentials,
    knows: { ifAbsent: true, checksums: true, abortUpload: true, order: true },
    stop: () => stopChild(child),
  };
}

/** The server that the environment names, if it names one. */
export function namedServer(): S3Server | undefined {
  const endpoint = process.env['STRATA_TEST_S3_ENDPOINT'];
  const bucket = process.env['STRATA_TEST_S3_BUCKET'];
  if (endpoint === undefined || bucket === undefined) return undefined;
  const knows = { ifAbsent: true, checksums: true, abortUpload: true, order: true };
  return { name: endpoint, endpoint, bucket, credentials: undefined, knows, stop: async () => {} };
}

function killAtExit(child: ChildProcess): void {
  process.once('exit', () => child.kill('SIGKILL'));
}

async function stopChild(child: ChildProcess): Promise<void> {
  if (child.exitCode !== null || child.signalCode !== null) return;
  const exit = once(child, 'exit');
  child.kill('SIGKILL');
  await exit;
}

/** Whether something listens there before `isGone`. */
async function waitForPort(port: number, isGone: () => boolean): Promise<boolean> {
  for (const deadline = Date.now() + START_MS; Date.now() < deadline; await sleep(50)) {
    if (isGone()) return false;
    const socket = connect(port, '127.0.0.1');
    const isOpen = await once(socket, 'connect').then(
      () => true,
      () => false,
    );
    socket.destroy();
    if (isOpen) return true;
  }
  throw new Error(`nothing listens on port ${port} after ${START_MS} ms`);
}
