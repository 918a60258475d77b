/**
 * The frontend/backend protocol, version 3: what a relay, a proxy and a replication client need of it. (Message formats: the chapter
 * "Frontend/Backend Protocol" of Postgres' documentation.) All integers are big-endian here, unlike in files.
 *
 *   a typed message    u8 type, u32 length (of itself and the payload), payload
 *   a startup packet   u32 length (of all), u32 code, then by code:
 *     major version in the high half (3.0 = 196608, 3.2 = 196610)   names and values ended by zero bytes, ended by a zero byte
 *     80877103  wants TLS       80877104  wants GSSAPI encryption      both answered by one byte, S/G or N
 *     80877102  cancel: u32 process id, secret key (4 bytes; up to 256 in protocol 3.2)
 */

export const PROTOCOL_3_0 = 196608;
export const PROTOCOL_3_2 = 196610;
export const SSL_REQUEST_CODE = 80877103;
export const GSSENC_REQUEST_CODE = 80877104;
export const CANCEL_REQUEST_CODE = 80877102;

/** Postgres' own limit of a startup packet. */
export const MAX_STARTUP_PACKET_BYTES = 10_000;
/** A typed message is a length of 31 bits; no message that is held whole here needs more than this. */
export const DEFAULT_MAX_MESSAGE_BYTES = 64 * 1024 * 1024;
const MAX_CANCEL_KEY_BYTES = 256;

/** Bytes that are not the protocol. To be answered with SQLSTATE 08P01 and the connection's end. */
export class ProtocolError extends Error {
  override readonly name = 'ProtocolError';
}

export type StartupPacket =
  | { readonly kind: 'startup'; readonly protocol: number; readonly parameters: ReadonlyMap<string, string> }
  | { readonly kind: 'ssl-request' }
  | { readonly kind: 'gssenc-request' }
  | { readonly kind: 'cancel'; readonly processId: number; readonly secretKey: Buffer };

export interface WireMessage {
  /** The type's character: 'Q', 'R', 'd', … */
  readonly type: string;
  readonly payload: Buffer;
}

/** The length of the startup packet at the start of `bytes`, or undefined when fewer than 4 are here. */
export function startupPacketLength(bytes: Buffer): number | undefined {
  if (bytes.length < 4) return undefined;
  const length = bytes.readUInt32BE(0);
  if (length < 8 || length > MAX_STARTUP_PACKET_BYTES) throw new ProtocolError(`startup packet of ${length} bytes`);
  return length;
}

/** Decodes a whole startup packet, length included. */
export function decodeStartupPacket(bytes: Buffer): StartupPacket {
  if (startupPacketLength(bytes) !== bytes.length)
    throw new ProtocolError(`startup packet is not the ${bytes.length} bytes given`);
  const code = bytes.readUInt32BE(4);
  if (code === SSL_REQUEST_CODE || code === GSSENC_REQUEST_CODE) {
    if (bytes.length !== 8) throw new ProtocolError(`encryption request of ${bytes.length} bytes`);
    return { kind: code === SSL_REQUEST_CODE ? 'ssl-request' : 'gssenc-request' };
  }
  if (code === CANCEL_REQUEST_CODE) {
    const keyLength = bytes.length - 12;
    if (keyLength < 4 || keyLength > MAX_CANCEL_KEY_BYTES)
      throw new ProtocolError(`cancel request of ${bytes.length} bytes`);
    return { kind: 'cancel', processId: bytes.readUInt32BE(8), secretKey: Buffer.from(bytes.subarray(12)) };
  }
  if (code >>> 16 !== 3) throw new ProtocolError(`protocol version ${code >>> 16}.${code & 0xffff}`);
  return { kind: 'startup', protocol: code, parameters: decodeParameters(bytes.subarray(8)) };
}

export function encodeStartupPacket(parameters: ReadonlyMap<string, string>, protocol: number = PROTOCOL_3_0): Buffer {
  let text = '';
  for (const [name, value] of parameters) {
    if (name === '' || name.includes('\0') || value.includes('\0'))
      throw new ProtocolError(`parameter ${JSON.stringify(name)}`);
    text += `${name}\0${value}\0`;
  }
  const body = Buffer.from(`${text}\0`, 'utf8');
  return Buffer.concat([u32s(8 + body.length, protocol), body]);
}

export function encodeSslRequest(): Buffer {
  return u32s(8, SSL_REQUEST_CODE);
}

export function encodeCancelRequest(processId: number, secretKey: Buffer): Buffer {
  return Buffer.concat([u32s(12 + secretKey.length, CANCEL_REQUEST_CODE, processId), secretKey]);
}

/** A typed message from the parts of its payload. */
export function encodeMessage(type: string, ...payload: readonly (Buffer | string)[]): Buffer {
  const parts = payload.map((part) => (typeof part === 'string' ? Buffer.from(part, 'utf8') : part));
  let length = 4;
  for (const part of parts) length += part.length;
  const header = Buffer.alloc(5);
  header.write(type, 0, 1, 'latin1');
  header.writeUInt32BE(length, 1);
  return Buffer.concat([header, ...parts]);
}

/** A text as the protocol has it: ended by a zero byte. */
export function cstring(text: string): Buffer {
  return Buffer.from(`${text}\0`, 'utf8');
}

/** Cuts a stream into typed messages. A payload is a view of what was pushed, or a copy when it came in pieces. */
export class MessageReader {
  readonly #maxBytes: number;
  #chunks: Buffer[] = [];
  #length = 0;
  /** Bytes that must be here before it is worth looking again. */
  #needed = 5;

  constructor(maxBytes: number = DEFAULT_MAX_MESSAGE_BYTES) {
    this.#maxBytes = maxBytes;
  }

  /** How many pushed bytes were not taken out yet. */
  get bufferedBytes(): number {
    return this.#length;
  }

  push(bytes: Buffer): void {
    if (bytes.length === 0) return;
    this.#chunks.push(bytes);
    this.#length += bytes.length;
  }

  /** The next whole message, or undefined until more is pushed. Throws ProtocolError for a length that cannot be. */
  next(): WireMessage | undefined {
    if (this.#length < this.#needed) return undefined;
    const bytes = this.#join();
    const length = bytes.readUInt32BE(1);
    if (length < 4 || length > this.#maxBytes) {
      throw new ProtocolError(`message 0x${bytes[0]!.toString(16)} of ${length} bytes`);
    }
    this.#needed = 1 + length;
    if (bytes.length < this.#needed) return undefined;
    const payload = bytes.subarray(5, this.#needed);
    this.#chunks = [bytes.subarray(this.#needed)];
    this.#length -= this.#needed;
    this.#needed = 5;
    return { type: String.fromCharCode(bytes[0]!), payload };
  }

  /** Takes all bytes not consumed yet, for a relay that stops looking at messages. */
  takeRest(): Buffer {
    const rest = this.#join();
    this.#chunks = [];
    this.#length = 0;
    this.#needed = 5;
    return rest;
  }

  #join(): Buffer {
    if (this.#chunks.length !== 1) this.#chunks = [Buffer.concat(this.#chunks, this.#length)];
    return this.#chunks[0]!;
  }
}

/**
 * What a server says before all else to a client that asks for a later protocol than 3.2, or for options of it (names that begin with `_pq_.`), none of which is
 * known here: a NegotiateProtocolVersion. Undefined when there is nothing to say.
 */
export function encodeNegotiation(protocol: number, parameters: ReadonlyMap<string, string>): Buffer | undefined {
  const unknown = Array.from(parameters.keys()).filter((name) => name.startsWith('_pq_.'));
  if (protocol <= PROTOCOL_3_2 && unknown.length === 0) return undefined;
  return encodeMessage('v', u32s(Math.min(protocol, PROTOCOL_3_2), unknown.length), ...unknown.map(cstring));
}

/** The fields of an ErrorResponse or NoticeResponse that programs use. */
export interface WireError {
  readonly severity: string;
  /** SQLSTATE. */
  readonly code: string;
  readonly message: string;
  readonly detail?: string | undefined;
  readonly hint?: string | undefined;
}

/** An ErrorResponse. A severity of FATAL tells the client that the connection ends with it. */
export function encodeErrorResponse(error: WireError): Buffer {
  const fields = [`S${error.severity}`, `V${error.severity}`, `C${error.code}`, `M${error.message}`];
  if (error.detail !== undefined) fields.push(`D${error.detail}`);
  if (error.hint !== undefined) fields.push(`H${error.hint}`);
  const text = fields.map((field) => `${field.replaceAll('\0', '')}\0`).join('');
  return encodeMessage('E', `${text}\0`);
}

/** Decodes the payload of an ErrorResponse or NoticeResponse. */
export function decodeErrorResponse(payload: Buffer): WireError {
  const fields = new Map<string, string>();
  let at = 0;
  while (at < payload.length && payload[at] !== 0) {
    const end = payload.indexOf(0, at);
    if (end < 0) throw new ProtocolError('a field of an error response has no end');
    fields.set(String.fromCharCode(payload[at]!), payload.toString('utf8', at + 1, end));
    at = end + 1;
  }
  return {
    severity: fields.get('V') ?? fields.get('S') ?? '',
    code: fields.get('C') ?? '',
    message: fields.get('M') ?? '',
    detail: fields.get('D'),
    hint: fields.get('H'),
  };
}

function decodeParameters(bytes: Buffer): Map<string, string> {
  const parameters = new Map<string, string>();
  let at = 0;
  while (bytes[at] !== 0) {
    const nameEnd = bytes.indexOf(0, at);
    const valueEnd = nameEnd < 0 ? -1 : bytes.indexOf(0, nameEnd + 1);
    if (valueEnd < 0) throw new ProtocolError('startup packet ends inside a parameter');
    parameters.set(bytes.toString('utf8', at, nameEnd), bytes.toString('utf8', nameEnd + 1, valueEnd));
    at = valueEnd + 1;
  }
  if (at !== bytes.length - 1)
    throw new ProtocolError(`startup packet has ${bytes.length - 1 - at} bytes after its end`);
  return parameters;
}

function u32s(...values: readonly number[]): Buffer {
  const bytes = Buffer.alloc(4 * values.length);
  values.forEach((value, i) => bytes.writeUInt32BE(value >>> 0, 4 * i));
  return bytes;
}
