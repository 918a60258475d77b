/**
 * The control plane's secrets: role passwords (kept, encrypted, so that connection strings can be shown), their SCRAM verifiers (what
 * Postgres checks against), and API keys (only a hash is kept).
 *
 * A sealed password: u8 version = 1, 12 bytes nonce, ciphertext, 16 bytes tag: AES-256-GCM under the key file's 32 bytes. The context (whose
 * password it is) is authenticated with it, so that a row's bytes mean nothing in another row.
 */
import { createCipheriv, createDecipheriv, createHash, createHmac, pbkdf2, randomBytes, randomInt } from 'node:crypto';
import { chmodSync, readFileSync } from 'node:fs';
import { promisify } from 'node:util';
import { writeFileDurably } from '../base/durable-file.ts';
import { StrataError } from '../base/errors.ts';

const SEAL_VERSION = 1;
const KEY_SIZE = 32;
const NONCE_SIZE = 12;
const TAG_SIZE = 16;
/** What Postgres itself uses by default (scram_iterations). */
const SCRAM_ITERATIONS = 4096;
const SCRAM_SALT_SIZE = 16;
const ALPHANUMERIC = 'ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789';
const PASSWORD_LENGTH = 16;
const API_KEY_LENGTH = 48;

const pbkdf2Async = promisify(pbkdf2);

/** Seals and opens small secrets with a key that lives in a file, mode 0600, made when it is missing. */
export class SecretBox {
  readonly #key: Buffer;

  constructor(key: Buffer) {
    if (key.length !== KEY_SIZE) {
      throw new StrataError('internal', `the key for stored passwords is ${key.length} bytes, not ${KEY_SIZE}`);
    }
    this.#key = key;
  }

  static fromFile(path: string): SecretBox {
    const existing = readPrivateFile(path);
    if (existing !== undefined) return new SecretBox(existing);
    const key = randomBytes(KEY_SIZE);
    writeFileDurably(path, key, 0o600);
    return new SecretBox(key);
  }

  seal(secret: string, context: string): Buffer {
    const nonce = randomBytes(NONCE_SIZE);
    const cipher = createCipheriv('aes-256-gcm', this.#key, nonce).setAAD(Buffer.from(context));
    const sealed = Buffer.concat([cipher.update(secret, 'utf8'), cipher.final()]);
    return Buffer.concat([Buffer.of(SEAL_VERSION), nonce, sealed, cipher.getAuthTag()]);
  }

  /** Throws `internal` when the bytes were changed, belong elsewhere, or were sealed with another key. */
  open(sealed: Uint8Array, context: string): string {
    const bytes = Buffer.from(sealed);
    const bodyStart = 1 + NONCE_SIZE;
    const tagStart = bytes.length - TAG_SIZE;
    if (tagStart < bodyStart || bytes[0] !== SEAL_VERSION) {
      throw new StrataError('internal', `a stored secret of ${bytes.length} bytes has an unknown form (${context})`);
    }
    const decipher = createDecipheriv('aes-256-gcm', this.#key, bytes.subarray(1, bodyStart));
    decipher.setAAD(Buffer.from(context)).setAuthTag(bytes.subarray(tagStart));
    try {
      return decipher.update(bytes.subarray(bodyStart, tagStart)).toString('utf8') + decipher.final('utf8');
    } catch (error) {
      const message = `a stored secret cannot be opened with the data directory's key (${context})`;
      throw new StrataError('internal', message, { cause: error });
    }
  }
}

/** Reads a file that only its owner may read; undefined when it is missing. A mode that became wider is set back. */
export function readPrivateFile(path: string): Buffer | undefined {
  try {
    const bytes = readFileSync(path);
    chmodSync(path, 0o600);
    return bytes;
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return undefined;
    throw error;
  }
}

export function newPassword(): string {
  return randomText(PASSWORD_LENGTH);
}

export function newApiKey(): string {
  return `strata_${randomText(API_KEY_LENGTH)}`;
}

/** Keys are 280 bits of chance, so one plain hash is enough: there is nothing to guess. */
export function hashApiKey(key: string): string {
  return createHash('sha256').update(key).digest('hex');
}

/** `SCRAM-SHA-256$4096:<salt>$<StoredKey>:<ServerKey>` for an ASCII password (SASLprep leaves those alone). RFC 5802, RFC 7677. */
export async function scramVerifier(password: string, salt: Buffer = randomBytes(SCRAM_SALT_SIZE)): Promise<string> {
  const salted = await pbkdf2Async(password, salt, SCRAM_ITERATIONS, 32, 'sha256');
  const clientKey = createHmac('sha256', salted).update('Client Key').digest();
  const storedKey = createHash('sha256').update(clientKey).digest('base64');
  const serverKey = createHmac('sha256', salted).update('Server Key').digest('base64');
  return `SCRAM-SHA-256$${SCRAM_ITERATIONS}:${salt.toString('base64')}$${storedKey}:${serverKey}`;
}

function randomText(length: number): string {
  let text = '';
  for (let index = 0; index < length; index++) text += ALPHANUMERIC[randomInt(ALPHANUMERIC.length)];
  return text;
}
