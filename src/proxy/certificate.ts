/**
 * The proxy's self-signed certificate, made at first start. Clients use sslmode=require, which encrypts without checking names.
 */
import { existsSync, mkdirSync, readFileSync } from 'node:fs';
import { dirname } from 'node:path';
import { generate } from 'selfsigned';
import { writeFileDurably } from '../base/durable-file.ts';

export interface Certificate {
  readonly cert: string;
  readonly key: string;
}

const TEN_YEARS_MS = 10 * 365 * 24 * 3600 * 1000;
const ONE_DAY_MS = 24 * 3600 * 1000;

/** Reads the pair of files, or makes them for localhost (key 0600). */
export async function loadOrMakeCertificate(certFile: string, keyFile: string): Promise<Certificate> {
  if (!existsSync(certFile) || !existsSync(keyFile)) {
    const made = await generate([{ name: 'commonName', value: 'localhost' }], {
      keyType: 'ec',
      curve: 'P-256',
      algorithm: 'sha256',
      notBeforeDate: new Date(Date.now() - ONE_DAY_MS),
      notAfterDate: new Date(Date.now() + TEN_YEARS_MS),
      extensions: [
        {
          name: 'subjectAltName',
          altNames: [
            { type: 2, value: 'localhost' },
            { type: 7, ip: '127.0.0.1' },
            { type: 7, ip: '::1' },
          ],
        },
      ],
    });
    mkdirSync(dirname(keyFile), { recursive: true, mode: 0o700 });
    writeFileDurably(keyFile, made.private, 0o600);
    writeFileDurably(certFile, made.cert, 0o644);
  }
  return { cert: readFileSync(certFile, 'utf8'), key: readFileSync(keyFile, 'utf8') };
}
