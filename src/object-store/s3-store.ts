/**
 * An object store in an S3 bucket, of AWS or of any server that speaks S3.
 *
 * - *Requests:* every one (each part of a multipart upload too) is tried again by our own policy (retry.ts); the client's own retries are off.
 * - *Uploads:* a file up to one part's size is one PUT. A larger one is a multipart upload of parts that are read one after the other and sent
 *   a few at a time; memory is `partConcurrency` parts. A failed one is aborted; what a crash leaves, `removeUnfinished` does. Bodies are always
 *   buffers of known length, so nothing is sent "aws-chunked", which many servers do not understand.
 * - *Checksums:* `crc32` (default) sends each body's CRC32 in a header and asks for the stored one when reading. A server that knows them refuses
 *   a body that changed on the way, and a read is checked to the end; a server that does not ignores them. `none` leaves them out, and
 *   identifies deletions by Content-MD5, as older servers want. Lengths are checked always.
 * - *Lists* go on by `start-after`, not by the server's token, so that they can go on after a restart.
 *   Directory buckets ("S3 Express") do not list in order: a list that is out of order is refused.
 * - *Lost reply to the end of a multipart upload:* the upload is gone when it is tried again. If the object is there with our length and checksum
 *   it was ours; otherwise the whole upload is made once more.
 */
import { createHash } from 'node:crypto';
import { createWriteStream } from 'node:fs';
import { open, unlink } from 'node:fs/promises';
import { addAbortSignal } from 'node:stream';
import type { Readable } from 'node:stream';
import { pipeline } from 'node:stream/promises';
import { crc32 } from 'node:zlib';
import {
  DeleteObjectCommand,
  DeleteObjectsCommand,
  GetObjectCommand,
  HeadObjectCommand,
  ListObjectsV2Command,
  PutObjectCommand,
  S3Client,
} from '@aws-sdk/client-s3';
import type { GetObjectCommandOutput, S3ClientConfig } from '@aws-sdk/client-s3';
import { CountingStream } from './counting-stream.ts';
import {
  checkLimit,
  checkName,
  checkPrefix,
  checkRange,
  isObjectError,
  LIST_LIMIT,
  ObjectStoreError,
  withDeadline,
} from './object-store.ts';
import type {
  CallOptions,
  Downloaded,
  ListedObject,
  ListOptions,
  ListPage,
  ObjectInfo,
  ObjectStore,
  PutOptions,
} from './object-store.ts';
import { DEFAULT_RETRY, REAL_ENVIRONMENT, retry } from './retry.ts';
import type { RetryEnvironment, RetryPolicy } from './retry.ts';
import { checksumOf, wholeChecksum } from './s3-checksum.ts';
import { kindOfS3Error, toObjectError } from './s3-error.ts';
import { abortStaleUploads, uploadInParts } from './s3-multipart.ts';
import type { S3Connection } from './s3-multipart.ts';

export interface S3StoreOptions {
  readonly bucket: string;
  /** Put before every name, with a slash between. */
  readonly prefix?: string;
  /** Absent: AWS. */
  readonly endpoint?: string;
  /** Absent: AWS_REGION or the profile's; with an endpoint, us-east-1. */
  readonly region?: string;
  /** `endpoint/bucket/name` instead of `bucket.endpoint/name`. Default: true with an endpoint, false without. */
  readonly pathStyle?: boolean;
  /** Absent: the environment, the profile, the container's or the machine's role, as with every AWS tool. */
  readonly credentials?: S3Credentials;
  /** A profile of ~/.aws. Absent: AWS_PROFILE or `default`. */
  readonly profile?: string;
  readonly partSizeBytes?: number;
  readonly partConcurrency?: number;
  readonly checksums?: 'crc32' | 'none';
  /** False for a server that ignores If-None-Match. */
  readonly supportsIfAbsent?: boolean;
  readonly retry?: RetryPolicy;
  readonly environment?: RetryEnvironment;
}

export interface S3Credentials {
  readonly accessKeyId: string;
  readonly secretAccessKey: string;
  readonly sessionToken?: string;
}

export const PART_SIZE_BYTES = 16 * 1024 * 1024;
const PART_CONCURRENCY = 4;
const PART_COUNT_MAX = 10_000;
const DELETE_BATCH = 1000;
const CONNECT_TIMEOUT_MS = 10_000;
const SOCKETS_MAX = 64;

export class S3Store implements ObjectStore {
  readonly description: string;
  readonly supportsIfAbsent: boolean;
  readonly #client: S3Client;
  readonly #bucket: string;
  readonly #prefix: string;
  readonly #partSizeBytes: number;
  readonly #partConcurrency: number;
  readonly #checksums: 'crc32' | 'none';
  readonly #retry: RetryPolicy;
  readonly #environment: RetryEnvironment;

  constructor(options: S3StoreOptions) {
    this.#client = new S3Client(clientConfig(options));
    this.#bucket = options.bucket;
    const prefix = options.prefix?.replace(/^\/+|\/+$/g, '') ?? '';
    if (prefix !== '') checkName(prefix);
    this.#prefix = prefix === '' ? '' : `${prefix}/`;
    this.description = `s3://${options.bucket}/${prefix}`;
    this.supportsIfAbsent = options.supportsIfAbsent ?? true;
    this.#partSizeBytes = options.partSizeBytes ?? PART_SIZE_BYTES;
    this.#partConcurrency = options.partConcurrency ?? PART_CONCURRENCY;
    this.#checksums = options.checksums ?? 'crc32';
    this.#retry = options.retry ?? DEFAULT_RETRY;
    this.#environment = options.environment ?? REAL_ENVIRONMENT;
    if (this.#checksums === 'none') identifyDeletionsByMd5(this.#client);
  }

  async put(name: string, bytes: Uint8Array, options: PutOptions = {}): Promise<void> {
    this.#checkPut(name, options);
    const command = new PutObjectCommand({
      ...this.#at(name),
      Body: bytes,
      ContentLength: bytes.length,
      ...(this.#checksums === 'crc32' ? checksumOf(bytes) : {}),
      IfNoneMatch: options.ifAbsent === true ? '*' : undefined,
    });
    await this.#request(`put ${name}`, options, (signal) => this.#client.send(command, { abortSignal: signal }));
  }

  async putFile(name: string, path: string, options: PutOptions = {}): Promise<void> {
    this.#checkPut(name, options);
    const what = `put ${name} (${this.description})`;
    // The parts have deadlines of their own; all of them together only if the caller says so.
    await withDeadline(what, options, Infinity, async (signal) => {
      await using file = await open(path, 'r').catch((error: unknown) => {
        throw toObjectError(error, what);
      });
      const { size } = await file.stat();
      if (size <= this.#partSizeBytes) {
        const bytes = Buffer.allocUnsafe(size);
        const { bytesRead } = await file.read(bytes, 0, size, 0);
        if (bytesRead !== size) throw new ObjectStoreError('rejected', `${path} changed during its upload`);
        return this.put(name, bytes, { ifAbsent: options.ifAbsent, signal });
      }
      await uploadInParts(this.#connection(), {
        name,
        file,
        sizeBytes: size,
        partSizeBytes: Math.max(this.#partSizeBytes, Math.ceil(size / PART_COUNT_MAX)),
        partConcurrency: this.#partConcurrency,
        hasChecksums: this.#checksums === 'crc32',
        ifAbsent: options.ifAbsent === true,
        signal,
        head: () => this.head(name, { signal }),
      });
    });
  }

  async get(name: string, options: CallOptions = {}): Promise<Buffer> {
    checkName(name);
    return this.#request(`get ${name}`, options, async (signal) => {
      const output = await this.#getWithChecksum(name, signal);
      const bytes = await readBody(output, signal, 0, Infinity);
      this.#checkReceived(name, output, bytes.length, () => crc32(bytes));
      return bytes;
    });
  }

  async getRange(name: string, start: number, end: number, options: CallOptions = {}): Promise<Buffer> {
    checkName(name);
    checkRange(name, start, end);
    if (start === end) return Buffer.alloc(0);
    return this.#request(`get ${name} [${start}, ${end})`, options, async (signal) => {
      const command = new GetObjectCommand({ ...this.#at(name), Range: `bytes=${start}-${end - 1}` });
      const output = await this.#client.send(command, { abortSignal: signal });
      // A server may send more than was asked for, or ignore the range.
      const first = Number(/^bytes (\d+)-/.exec(output.ContentRange ?? '')?.[1] ?? 0);
      const bytes = await readBody(output, signal, start - first, end - first);
      if (bytes.length === end - start) return bytes;
      throw new ObjectStoreError('damaged', `${name} ends at byte ${start + bytes.length}, before ${end}`);
    });
  }

  async getToFile(name: string, path: string, options: CallOptions = {}): Promise<Downloaded> {
    checkName(name);
    return this.#request(`get ${name}`, options, async (signal) => {
      const output = await this.#getWithChecksum(name, signal);
      const counter = new CountingStream();
      try {
        await pipeline(bodyOf(output), counter, createWriteStream(path), { signal });
        this.#checkReceived(name, output, counter.sizeBytes, () => counter.crc32);
      } catch (error) {
        await unlink(path).catch(() => {});
        throw error;
      }
      return { sizeBytes: counter.sizeBytes, crc32: counter.crc32 };
    });
  }

  async head(name: string, options: CallOptions = {}): Promise<ObjectInfo> {
    checkName(name);
    return this.#request(`head ${name}`, options, async (signal) => {
      const ChecksumMode = this.#checksums === 'crc32' ? 'ENABLED' : undefined;
      const command = new HeadObjectCommand({ ...this.#at(name), ChecksumMode });
      const output = await this.#client.send(command, { abortSignal: signal });
      const { ContentLength: sizeBytes, LastModified: modified } = output;
      if (sizeBytes === undefined) throw new ObjectStoreError('transient', `head ${name}: the answer has no length`);
      return { sizeBytes, modifiedMs: modified?.getTime() ?? 0, crc32: wholeChecksum(output) };
    });
  }

  async list(prefix: string, options: ListOptions = {}): Promise<ListPage> {
    checkPrefix(prefix);
    const limit = options.limit ?? LIST_LIMIT;
    checkLimit(limit);
    const { after } = options;
    return this.#request(`list ${prefix}`, options, async (signal) => {
      const command = new ListObjectsV2Command({
        Bucket: this.#bucket,
        Prefix: this.#prefix + prefix,
        StartAfter: after === undefined ? undefined : this.#prefix + after,
        MaxKeys: limit,
      });
      const output = await this.#client.send(command, { abortSignal: signal });
      const objects: ListedObject[] = [];
      let last = after ?? '';
      for (const { Key: key, Size: sizeBytes, LastModified: modified } of output.Contents ?? []) {
        const name = key?.slice(this.#prefix.length) ?? '';
        if (name <= last) {
          const message = `${this.description} does not list in order: ${name} after ${last}`;
          throw new ObjectStoreError('rejected', message);
        }
        last = name;
        // Others may keep other things in the bucket, such as the empty `folder/` of a console.
        if (isName(name)) objects.push({ name, sizeBytes: sizeBytes ?? 0, modifiedMs: modified?.getTime() ?? 0 });
      }
      return { objects, next: output.IsTruncated === true ? last : undefined };
    });
  }

  async delete(name: string, options: CallOptions = {}): Promise<void> {
    checkName(name);
    const command = new DeleteObjectCommand(this.#at(name));
    try {
      await this.#request(`delete ${name}`, options, (signal) => this.#client.send(command, { abortSignal: signal }));
    } catch (error) {
      if (!isObjectError(error, 'not-found')) throw error;
    }
  }

  async deleteMany(names: readonly string[], options: CallOptions = {}): Promise<void> {
    names.forEach(checkName);
    const left = [...new Set(names)];
    const what = `delete ${left.length} objects (${this.description})`;
    await withDeadline(what, options, Infinity, async (signal) => {
      for (let at = 0; at < left.length; at += DELETE_BATCH) {
        await this.#deleteBatch(left.slice(at, at + DELETE_BATCH), signal);
      }
    });
  }

  /** Multipart uploads. A server that cannot list them leaves no choice but its own rules for them. */
  async removeUnfinished(olderThanMs: number, options: CallOptions = {}): Promise<number> {
    const what = `abort stale uploads (${this.description})`;
    return withDeadline(what, options, Infinity, (signal) =>
      abortStaleUploads(this.#connection(), Date.now() - olderThanMs, signal).catch((error: unknown) => {
        if (isObjectError(error, 'unsupported')) return 0;
        throw error;
      }),
    );
  }

  /** Closes the connections. */
  close(): void {
    this.#client.destroy();
  }

  async #deleteBatch(names: readonly string[], signal: AbortSignal): Promise<void> {
    await this.#request(`delete ${names.length} objects`, { signal }, async (attemptSignal) => {
      const Objects = names.map((name) => ({ Key: this.#prefix + name }));
      const command = new DeleteObjectsCommand({ Bucket: this.#bucket, Delete: { Objects, Quiet: true } });
      const output = await this.#client.send(command, { abortSignal: attemptSignal });
      // The batch is one answer, but each object has its own fate. Repeating those that are gone does no harm.
      for (const { Key: key, Code: code = 'InternalError', Message: message } of output.Errors ?? []) {
        const kind = kindOfS3Error(code, 0);
        if (kind !== 'not-found') throw new ObjectStoreError(kind, `delete ${key}: ${code}: ${message}`);
      }
    });
  }

  /**
   * Asks for the stored checksum by the header itself: the client's own parameter would also make it compute the checksum, a second time and
   * in a slower way, and report a difference as an untyped error.
   */
  async #getWithChecksum(name: string, signal: AbortSignal): Promise<GetObjectCommandOutput> {
    const command = new GetObjectCommand(this.#at(name));
    if (this.#checksums === 'crc32') {
      command.middlewareStack.add(
        (next) => (args) => {
          (args.request as SentRequest).headers['x-amz-checksum-mode'] = 'ENABLED';
          return next(args);
        },
        { step: 'build' },
      );
    }
    return this.#client.send(command, { abortSignal: signal });
  }

  #checkReceived(name: string, output: GetObjectCommandOutput, sizeBytes: number, received: () => number): void {
    if (output.ContentLength !== undefined && output.ContentLength !== sizeBytes) {
      const message = `get ${name}: the answer broke off after ${sizeBytes} of ${output.ContentLength} bytes`;
      throw new ObjectStoreError('transient', message);
    }
    const stored = this.#checksums === 'crc32' ? wholeChecksum(output) : undefined;
    if (stored === undefined || stored === received()) return;
    const message = `get ${name}: received CRC32 ${received().toString(16)}, stored ${stored.toString(16)}`;
    throw new ObjectStoreError('damaged', message);
  }

  #checkPut(name: string, options: PutOptions): void {
    checkName(name);
    if (options.ifAbsent !== true || this.supportsIfAbsent) return;
    throw new ObjectStoreError('unsupported', `${this.description} is configured as a store without conditional puts`);
  }

  #at(name: string): { Bucket: string; Key: string } {
    return { Bucket: this.#bucket, Key: this.#prefix + name };
  }

  #connection(): S3Connection {
    return {
      client: this.#client,
      bucket: this.#bucket,
      prefix: this.#prefix,
      request: (what, signal, run) => this.#request(what, { signal }, run),
    };
  }

  async #request<T>(what: string, options: CallOptions, run: (signal: AbortSignal) => Promise<T>): Promise<T> {
    const fullWhat = `${what} (${this.description})`;
    return retry(fullWhat, this.#retry, this.#environment, options, (attempt) =>
      withDeadline(fullWhat, attempt, attempt.timeoutMs, async (signal) => {
        try {
          return await run(signal);
        } catch (error) {
          throw toObjectError(error, fullWhat);
        }
      }),
    );
  }
}

interface SentRequest {
  headers: Record<string, string>;
  body?: string | Uint8Array;
}

function clientConfig(options: S3StoreOptions): S3ClientConfig {
  const hasEndpoint = options.endpoint !== undefined;
  return {
    endpoint: options.endpoint,
    region: options.region ?? (hasEndpoint ? (process.env['AWS_REGION'] ?? 'us-east-1') : undefined),
    forcePathStyle: options.pathStyle ?? hasEndpoint,
    credentials: options.credentials,
    profile: options.profile,
    maxAttempts: 1,
    // Ours are in headers that we set; the client would append its own behind the body.
    requestChecksumCalculation: 'WHEN_REQUIRED',
    responseChecksumValidation: 'WHEN_REQUIRED',
    requestHandler: {
      connectionTimeout: CONNECT_TIMEOUT_MS,
      httpAgent: { keepAlive: true, maxSockets: SOCKETS_MAX },
      httpsAgent: { keepAlive: true, maxSockets: SOCKETS_MAX },
    },
  };
}

function identifyDeletionsByMd5(client: S3Client): void {
  client.middlewareStack.add(
    (next, context) => (args) => {
      const { headers, body } = args.request as SentRequest;
      if (context.commandName === 'DeleteObjectsCommand' && body !== undefined) {
        for (const name of Object.keys(headers)) {
          if (/^x-amz-(sdk-)?checksum/i.test(name)) delete headers[name];
        }
        headers['content-md5'] = createHash('md5').update(body).digest('base64');
      }
      return next(args);
    },
    { step: 'build', priority: 'low' },
  );
}

function bodyOf(output: GetObjectCommandOutput): Readable {
  if (output.Body === undefined) throw new ObjectStoreError('transient', 'the answer has no body');
  return output.Body as Readable;
}

/** Bytes `[start, end)` of the body, or what there is of them. */
async function readBody(
  output: GetObjectCommandOutput,
  signal: AbortSignal,
  start: number,
  end: number,
): Promise<Buffer> {
  const body = addAbortSignal(signal, bodyOf(output));
  const chunks: Buffer[] = [];
  let at = 0;
  for await (const chunk of body as AsyncIterable<Buffer>) {
    if (at + chunk.length > start) chunks.push(chunk.subarray(Math.max(0, start - at), end - at));
    at += chunk.length;
    if (at >= end) break; // destroys the body
  }
  return Buffer.concat(chunks);
}

function isName(name: string): boolean {
  try {
    checkName(name);
    return true;
  } catch {
    return false;
  }
}
