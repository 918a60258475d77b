/**
 * The client's half of SCRAM-SHA-256 without channel binding, as Postgres speaks it in its SASL messages.
 * (RFC 5802, RFC 7677; Postgres: the chapter "SASL Authentication".)
 */
import { createHash, createHmac, pbkdf2Sync, randomBytes, timingSafeEqual } from 'node:crypto';

const NONCE_BYTES = 18;
const GS2_HEADER = 'n,,';

export class ScramClient {
  readonly #password: string;
  readonly #firstBare: string;
  #serverSignature: Buffer | undefined;

  constructor(password: string, nonce: string = randomBytes(NONCE_BYTES).toString('base64')) {
    this.#password = password;
    this.#firstBare = `n=,r=${nonce}`; // Postgres takes the user from the startup packet.
  }

  first(): string {
    return GS2_HEADER + this.#firstBare;
  }

  /** The answer to the server's first message, with the proof. Throws when that is not an answer to ours. */
  final(serverFirst: string): string {
    const fields = attributes(serverFirst);
    const nonce = fields.get('r') ?? '';
    const salt = fields.get('s');
    const iterations = Number(fields.get('i'));
    const ownNonce = this.#firstBare.slice('n=,r='.length);
    if (salt === undefined || !Number.isInteger(iterations) || iterations < 1 || !nonce.startsWith(ownNonce)) {
      throw new Error('the server does not speak SCRAM');
    }
    const withoutProof = `c=${Buffer.from(GS2_HEADER).toString('base64')},r=${nonce}`;
    const transcript = `${this.#firstBare},${serverFirst},${withoutProof}`;
    const salted = pbkdf2Sync(this.#password.normalize('NFKC'), Buffer.from(salt, 'base64'), iterations, 32, 'sha256');
    const clientKey = hmac(salted, 'Client Key');
    const signature = hmac(createHash('sha256').update(clientKey).digest(), transcript);
    const proof = clientKey.map((byte, index) => byte ^ signature[index]!);
    this.#serverSignature = hmac(hmac(salted, 'Server Key'), transcript);
    return `${withoutProof},p=${Buffer.from(proof).toString('base64')}`;
  }

  /** Throws when the server does not know the password either. */
  verify(serverFinal: string): void {
    const signature = Buffer.from(attributes(serverFinal).get('v') ?? '', 'base64');
    const expected = this.#serverSignature;
    if (expected === undefined || signature.length !== expected.length || !timingSafeEqual(signature, expected)) {
      throw new Error('the server could not prove that it knows the password');
    }
  }
}

function attributes(message: string): Map<string, string> {
  return new Map(message.split(',').map((part) => [part.slice(0, 1), part.slice(2)]));
}

function hmac(key: Buffer, text: string): Buffer {
  return createHmac('sha256', key).update(text).digest();
}
