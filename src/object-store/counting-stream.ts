/** A step of a pipeline that counts the bytes passing through and computes their CRC32. */
import { Transform } from 'node:stream';
import type { TransformCallback } from 'node:stream';
import { crc32 } from 'node:zlib';

export class CountingStream extends Transform {
  sizeBytes = 0;
  crc32 = 0;

  override _transform(chunk: Buffer, _encoding: BufferEncoding, done: TransformCallback): void {
    this.sizeBytes += chunk.length;
    this.crc32 = crc32(chunk, this.crc32);
    done(null, chunk);
  }
}
