/**
 * Frames: how messages are cut out of a TCP stream between the parts of the platform.
 *
 *   offset  size  field
 *        0     4  payload length, little-endian, not counting these 5 bytes
 *        4     1  type, meaning given by the service
 *        5     n  payload
 */
import { StrataError } from './errors.ts';

export const FRAME_HEADER_BYTES = 5;
const DEFAULT_MAX_PAYLOAD_BYTES = 1 << 30;

export interface Frame {
  readonly type: number;
  readonly payload: Buffer;
}

/** The frame's bytes; payload parts are copied once. */
export function encodeFrame(type: number, ...parts: readonly Uint8Array[]): Buffer {
  let length = 0;
  for (const part of parts) length += part.length;
  const frame = Buffer.allocUnsafe(FRAME_HEADER_BYTES + length);
  frame.writeUInt32LE(length, 0);
  frame[4] = type;
  let offset = FRAME_HEADER_BYTES;
  for (const part of parts) {
    frame.set(part, offset);
    offset += part.length;
  }
  return frame;
}

/** Cuts frames out of chunks as they arrive. Payloads may share memory with a pushed chunk. */
export class FrameReader {
  /** A longer frame is refused as soon as its header is there. May be raised when the sender is known. */
  maxPayloadBytes: number;
  #chunks: Buffer[] = [];
  #bufferedBytes = 0;

  constructor(maxPayloadBytes = DEFAULT_MAX_PAYLOAD_BYTES) {
    this.maxPayloadBytes = maxPayloadBytes;
  }

  push(chunk: Buffer): void {
    if (chunk.length === 0) return;
    this.#chunks.push(chunk);
    this.#bufferedBytes += chunk.length;
  }

  /** Copies what is here of a frame that is not whole: who pushed it uses that memory again. */
  keepRest(): void {
    if (this.#bufferedBytes > 0) this.#chunks = [Buffer.concat(this.#chunks)];
  }

  /** The next whole frame, or undefined until more bytes come. Throws on a length beyond the limit. */
  next(): Frame | undefined {
    if (this.#bufferedBytes < FRAME_HEADER_BYTES) return undefined;
    const header = this.#first(FRAME_HEADER_BYTES);
    const length = header.readUInt32LE(0);
    const type = header[4] ?? 0;
    if (length > this.maxPayloadBytes) {
      throw new StrataError(
        'bad-request',
        `a frame of type ${type} claims ${length} bytes, the limit is ${this.maxPayloadBytes}`,
      );
    }
    const whole = FRAME_HEADER_BYTES + length;
    if (this.#bufferedBytes < whole) return undefined;
    const bytes = this.#first(whole);
    this.#chunks[0] = bytes.subarray(whole);
    if (bytes.length === whole) this.#chunks.shift();
    this.#bufferedBytes -= whole;
    return { type, payload: bytes.subarray(FRAME_HEADER_BYTES, whole) };
  }

  /**
   * Takes what is here of a frame that is not whole yet, when it has this type and at least `leastBytes` of its payload are here: large frames then need not be
   * joined. The rest of the payload must be taken with `rest` before the next frame.
   */
  nextPartial(type: number, leastBytes: number): { readonly payload: Buffer; readonly leftBytes: number } | undefined {
    if (this.#bufferedBytes < FRAME_HEADER_BYTES + leastBytes) return undefined;
    const bytes = this.#first(FRAME_HEADER_BYTES + leastBytes);
    const length = bytes.readUInt32LE(0);
    if (bytes[4] !== type || length > this.maxPayloadBytes || FRAME_HEADER_BYTES + length <= this.#bufferedBytes) {
      return undefined;
    }
    this.#chunks.shift();
    this.#bufferedBytes -= bytes.length;
    const payload = bytes.subarray(FRAME_HEADER_BYTES);
    return { payload, leftBytes: length - payload.length };
  }

  /** Bytes of a payload that `nextPartial` began, at most `maxBytes` and as they came; undefined until there are more. */
  rest(maxBytes: number): Buffer | undefined {
    const first = this.#chunks[0];
    if (first === undefined) return undefined;
    const bytes = first.subarray(0, maxBytes);
    if (bytes.length === first.length) this.#chunks.shift();
    else this.#chunks[0] = first.subarray(bytes.length);
    this.#bufferedBytes -= bytes.length;
    return bytes;
  }

  /** Makes the first chunk hold at least `bytes` bytes; joins chunks only when needed. */
  #first(bytes: number): Buffer {
    const first = this.#chunks[0];
    if (first !== undefined && first.length >= bytes) return first;
    const joined = Buffer.concat(this.#chunks);
    this.#chunks = [joined];
    return joined;
  }
}
