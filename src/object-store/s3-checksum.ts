/** CRC32 (that of zlib and Ethernet) as S3 has it in headers: base64 of its four bytes, big-endian. */
import { crc32 } from 'node:zlib';

/** The parameters of a put that carry the checksum of its body. */
export function checksumOf(bytes: Uint8Array): { ChecksumAlgorithm: 'CRC32'; ChecksumCRC32: string } {
  return { ChecksumAlgorithm: 'CRC32', ChecksumCRC32: checksumToBase64(crc32(bytes)) };
}

export function checksumToBase64(checksum: number): string {
  const bytes = Buffer.alloc(4);
  bytes.writeUInt32BE(checksum);
  return bytes.toString('base64');
}

/** The checksum of the whole object, if the server told that: one of the parts' checksums (`COMPOSITE`, "…-3") says nothing about the whole. */
export function wholeChecksum(output: { ChecksumCRC32?: string; ChecksumType?: string }): number | undefined {
  const text = output.ChecksumCRC32;
  if (text === undefined || text.length !== 8 || output.ChecksumType === 'COMPOSITE') return undefined;
  return Buffer.from(text, 'base64').readUInt32BE();
}
