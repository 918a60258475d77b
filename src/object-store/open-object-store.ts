/**
 * The object store that a URL names, as it stands in a configuration:
 *
 *   /path/of/a/directory, or file:///path/of/a/directory
 *   s3://bucket/prefix?endpoint=http://host:port&region=…&profile=…&path-style=true|false&checksums=crc32|none&conditional-puts=true|false
 *
 * Credentials are not part of it: they come from the usual places (environment, profile, the machine's role). The S3 client is loaded only when
 * it is wanted. Both kinds try again by `retry`.
 */
import { fileURLToPath } from 'node:url';
import { FileSystemStore } from './file-system-store.ts';
import { ObjectStoreError } from './object-store.ts';
import type { ObjectStore } from './object-store.ts';
import { DEFAULT_RETRY, REAL_ENVIRONMENT, RetryingStore } from './retry.ts';
import type { RetryEnvironment, RetryPolicy } from './retry.ts';

export interface OpenOptions {
  readonly retry?: RetryPolicy;
  readonly environment?: RetryEnvironment;
}

const S3_SETTINGS = ['endpoint', 'region', 'profile', 'path-style', 'checksums', 'conditional-puts'];

/** Throws `rejected` when the URL is not understood. Nothing is sent to an S3 server yet. */
export async function openObjectStore(url: string, options: OpenOptions = {}): Promise<ObjectStore> {
  const { retry = DEFAULT_RETRY, environment = REAL_ENVIRONMENT } = options;
  if (!/^[a-z][a-z0-9+.-]*:/i.test(url)) {
    return new RetryingStore(await FileSystemStore.open(url), retry, environment);
  }
  const parsed = URL.parse(url);
  if (parsed?.protocol === 'file:') {
    return new RetryingStore(await FileSystemStore.open(fileURLToPath(parsed)), retry, environment);
  }
  if (parsed?.protocol !== 's3:' || parsed.hostname === '') throw notUnderstood(url, 'neither a path nor s3://bucket');
  if (parsed.username !== '' || parsed.password !== '') throw notUnderstood('s3://…', 'credentials do not belong here');
  const { searchParams: settings } = parsed;
  const unknown = [...settings.keys()].find((key) => !S3_SETTINGS.includes(key));
  if (unknown !== undefined) throw notUnderstood(url, `${unknown} is none of ${S3_SETTINGS.join(', ')}`);
  const { S3Store } = await import('./s3-store.ts');
  return new S3Store({
    bucket: parsed.hostname,
    prefix: parsed.pathname,
    endpoint: settings.get('endpoint') ?? undefined,
    region: settings.get('region') ?? undefined,
    profile: settings.get('profile') ?? undefined,
    pathStyle: chosen(url, settings, 'path-style', { true: true, false: false }),
    checksums: chosen(url, settings, 'checksums', { crc32: 'crc32', none: 'none' }),
    supportsIfAbsent: chosen(url, settings, 'conditional-puts', { true: true, false: false }),
    retry,
    environment,
  });
}

function chosen<T>(url: string, settings: URLSearchParams, key: string, choices: Record<string, T>): T | undefined {
  const text = settings.get(key);
  if (text === null) return undefined;
  const value = choices[text];
  if (value === undefined) throw notUnderstood(url, `${key} is ${Object.keys(choices).join(' or ')}`);
  return value;
}

function notUnderstood(url: string, reason: string): ObjectStoreError {
  return new ObjectStoreError('rejected', `object store ${url}: ${reason}`);
}
