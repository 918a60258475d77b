/**
 * Copies between pieces of memory that do not overlap. Most values are a few dozen bytes: for those, words through a DataView (which V8 makes one load and one
 * store of each, at any offset, without a BigInt ever being made) are twice as quick as a call out of JavaScript. The last word overlaps the one before it.
 */

const WORDS_BYTES_MAX = 384;
const WORD_BYTES = 8;

export function copyBytes(from: DataView, fromAt: number, to: DataView, toAt: number, length: number): void {
  if (length > WORDS_BYTES_MAX) {
    const source = new Uint8Array(from.buffer, from.byteOffset + fromAt, length);
    new Uint8Array(to.buffer, to.byteOffset + toAt, length).set(source);
  } else if (length < WORD_BYTES) {
    for (let i = 0; i < length; i++) to.setUint8(toAt + i, from.getUint8(fromAt + i));
  } else {
    const last = fromAt + length - WORD_BYTES;
    const further = toAt - fromAt;
    for (let at = fromAt; at < last; at += WORD_BYTES) to.setBigInt64(at + further, from.getBigInt64(at, true), true);
    to.setBigInt64(last + further, from.getBigInt64(last, true), true);
  }
}

export function viewOf(bytes: Uint8Array): DataView {
  return new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
}
