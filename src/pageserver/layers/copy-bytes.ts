/** Copies between buffers. Most values are a few dozen bytes, for which a loop is quicker than a call out of JavaScript. */

const LOOP_BYTES_MAX = 96;

export function copyBytes(from: Buffer, fromAt: number, to: Buffer, toAt: number, length: number): void {
  if (length > LOOP_BYTES_MAX) {
    from.copy(to, toAt, fromAt, fromAt + length);
    return;
  }
  for (let i = 0; i < length; i++) to[toAt + i] = from[fromAt + i]!;
}
