/**
 * Multipart uploads: https://docs.aws.amazon.com/AmazonS3/latest/userguide/mpuoverview.html
 *
 * An object appears when its upload is completed. Until then its parts take space but nobody sees them: an upload that fails is aborted at
 * once, one that a crash left is aborted when it is old.
 */
import type { FileHandle } from 'node:fs/promises';
import { crc32 } from 'node:zlib';
import {
  AbortMultipartUploadCommand,
  CompleteMultipartUploadCommand,
  CreateMultipartUploadCommand,
  ListMultipartUploadsCommand,
  UploadPartCommand,
} from '@aws-sdk/client-s3';
import type { CompletedPart, S3Client } from '@aws-sdk/client-s3';
import { ObjectStoreError } from './object-store.ts';
import type { ObjectInfo } from './object-store.ts';
import { checksumOf, checksumToBase64 } from './s3-checksum.ts';

export interface S3Connection {
  readonly client: S3Client;
  readonly bucket: string;
  /** Before every name; '' or ending in '/'. */
  readonly prefix: string;
  /** Sends with retries and makes errors ours. */
  request<T>(what: string, signal: AbortSignal, run: (signal: AbortSignal) => Promise<T>): Promise<T>;
}

export interface Upload {
  readonly name: string;
  readonly file: FileHandle;
  readonly sizeBytes: number;
  readonly partSizeBytes: number;
  readonly partConcurrency: number;
  readonly hasChecksums: boolean;
  readonly ifAbsent: boolean;
  readonly signal: AbortSignal;
  head(): Promise<ObjectInfo>;
}

const UPLOAD_ATTEMPTS = 3;
const ABORT_TIMEOUT_MS = 10_000;

/** Uploads the file. When the upload vanished from the server before we learnt its end, it is made once more. */
export async function uploadInParts(connection: S3Connection, upload: Upload): Promise<void> {
  for (let attempt = 1; ; attempt++) {
    try {
      return await uploadOnce(connection, upload);
    } catch (error) {
      if (!isUploadGone(error) || attempt === UPLOAD_ATTEMPTS) throw error;
    }
  }
}

/** Aborts uploads below the prefix that began before `beforeMs`; tells how many. */
export async function abortStaleUploads(
  connection: S3Connection,
  beforeMs: number,
  signal: AbortSignal,
): Promise<number> {
  const { client, bucket, prefix } = connection;
  let count = 0;
  let marker: { KeyMarker?: string; UploadIdMarker?: string } = {};
  for (;;) {
    const command = new ListMultipartUploadsCommand({ Bucket: bucket, Prefix: prefix, ...marker });
    const page = await connection.request('list uploads', signal, (abortSignal) =>
      client.send(command, { abortSignal }),
    );
    for (const { Key: key, UploadId: id, Initiated: initiated } of page.Uploads ?? []) {
      if (key === undefined || id === undefined || initiated === undefined || initiated.getTime() >= beforeMs) continue;
      await abort(connection, key, id, signal);
      count += 1;
    }
    if (page.IsTruncated !== true) return count;
    marker = { KeyMarker: page.NextKeyMarker, UploadIdMarker: page.NextUploadIdMarker };
  }
}

async function uploadOnce(connection: S3Connection, upload: Upload): Promise<void> {
  const { client, bucket, prefix } = connection;
  const { name, signal } = upload;
  const at = { Bucket: bucket, Key: prefix + name };
  const checksum = upload.hasChecksums ? ({ ChecksumAlgorithm: 'CRC32', ChecksumType: 'FULL_OBJECT' } as const) : {};
  const create = new CreateMultipartUploadCommand({ ...at, ...checksum });
  const { UploadId: id } = await connection.request(`begin upload of ${name}`, signal, (abortSignal) =>
    client.send(create, { abortSignal }),
  );
  if (id === undefined) throw new ObjectStoreError('transient', `begin upload of ${name}: the answer has no id`);
  try {
    const { parts, crc32: wholeCrc32 } = await sendParts(connection, upload, id);
    await complete(connection, upload, id, parts, wholeCrc32);
  } catch (error) {
    // With its own deadline: the caller's may be what ended us. If it fails too, the upload is left for abortStaleUploads.
    await abort(connection, at.Key, id, AbortSignal.timeout(ABORT_TIMEOUT_MS)).catch(() => {});
    throw error;
  }
}

/** Sends all parts, some at a time. The first failure ends the others. */
async function sendParts(
  connection: S3Connection,
  upload: Upload,
  id: string,
): Promise<{ parts: CompletedPart[]; crc32: number }> {
  const { name, sizeBytes, partSizeBytes } = upload;
  const partCount = Math.ceil(sizeBytes / partSizeBytes);
  const failure = new AbortController();
  const signal = AbortSignal.any([upload.signal, failure.signal]);
  const parts: CompletedPart[] = Array.from({ length: partCount });
  let nextIndex = 0;
  let whole = 0;
  let reading: Promise<unknown> = Promise.resolve();

  /** Parts are read in order, so that the whole's checksum grows with them. */
  const readNext = async (index: number): Promise<Buffer> => {
    const start = index * partSizeBytes;
    const bytes = Buffer.allocUnsafe(Math.min(partSizeBytes, sizeBytes - start));
    for (let offset = 0; offset < bytes.length;) {
      const { bytesRead } = await upload.file.read(bytes, offset, bytes.length - offset, start + offset);
      if (bytesRead === 0) throw new ObjectStoreError('rejected', `the file of ${name} shrank during its upload`);
      offset += bytesRead;
    }
    whole = crc32(bytes, whole);
    return bytes;
  };

  const work = async (): Promise<void> => {
    while (nextIndex < partCount && !signal.aborted) {
      const index = nextIndex++;
      const turn = reading.then(() => readNext(index));
      reading = turn.catch(() => {});
      const bytes = await turn;
      const command = new UploadPartCommand({
        Bucket: connection.bucket,
        Key: connection.prefix + name,
        UploadId: id,
        PartNumber: index + 1,
        Body: bytes,
        ContentLength: bytes.length,
        ...(upload.hasChecksums ? checksumOf(bytes) : {}),
      });
      const what = `put part ${index + 1} of ${partCount} of ${name}`;
      const { ETag } = await connection.request(what, signal, (abortSignal) =>
        connection.client.send(command, { abortSignal }),
      );
      parts[index] = { PartNumber: index + 1, ETag, ChecksumCRC32: command.input.ChecksumCRC32 };
    }
  };

  let first: { readonly error: unknown } | undefined;
  const workers = Array.from({ length: Math.min(upload.partConcurrency, partCount) }, () =>
    work().catch((error: unknown) => {
      first ??= { error };
      failure.abort(error);
    }),
  );
  await Promise.all(workers);
  if (first !== undefined) throw first.error;
  upload.signal.throwIfAborted();
  return { parts, crc32: whole };
}

async function complete(
  connection: S3Connection,
  upload: Upload,
  id: string,
  parts: CompletedPart[],
  wholeCrc32: number,
): Promise<void> {
  const checksum = { ChecksumCRC32: checksumToBase64(wholeCrc32), ChecksumType: 'FULL_OBJECT' } as const;
  const command = new CompleteMultipartUploadCommand({
    Bucket: connection.bucket,
    Key: connection.prefix + upload.name,
    UploadId: id,
    MultipartUpload: { Parts: parts },
    IfNoneMatch: upload.ifAbsent ? '*' : undefined,
    ...(upload.hasChecksums ? { ...checksum, MpuObjectSize: upload.sizeBytes } : {}),
  });
  let attempts = 0;
  try {
    await connection.request(`end upload of ${upload.name}`, upload.signal, (abortSignal) => {
      attempts += 1;
      return connection.client.send(command, { abortSignal });
    });
  } catch (error) {
    if (attempts === 1 || !isUploadGone(error) || !upload.hasChecksums) throw error;
    // An earlier attempt may have ended it, and its reply was lost.
    const info = await upload.head().catch(() => undefined);
    if (info?.sizeBytes !== upload.sizeBytes || info.crc32 !== wholeCrc32) throw error;
  }
}

async function abort(connection: S3Connection, key: string, id: string, signal: AbortSignal): Promise<void> {
  const command = new AbortMultipartUploadCommand({ Bucket: connection.bucket, Key: key, UploadId: id });
  try {
    await connection.request(`abort upload of ${key}`, signal, (abortSignal) =>
      connection.client.send(command, { abortSignal }),
    );
  } catch (error) {
    if (!isUploadGone(error)) throw error;
  }
}

function isUploadGone(error: unknown): boolean {
  return error instanceof ObjectStoreError && error.cause instanceof Error && error.cause.name === 'NoSuchUpload';
}
