/**
 * Which object store is the platform's, and whether it can be used: asked once, at start, so that what is wrong is told to a person and not to a log.
 *
 * The store knows whose it is by an object of its own, `platform`: `strata-object-store 1 <id>\n`. The id is in the control plane's settings as well. So a store
 * that is empty because a disk is not mounted, or another platform's, is refused before anything is lost or mixed; and one that was copied elsewhere is accepted
 * there. Whoever says that the content is lost for good (`--refill-object-store`) has an empty one taken, which the pageserver then fills with what it has
 * (pageserver/remote/restore.ts).
 */
import { randomBytes } from 'node:crypto';
import { existsSync, readdirSync } from 'node:fs';
import { join, resolve } from 'node:path';
import { StrataError } from '../base/errors.ts';
import type { Settings } from '../control/settings.ts';
import { isObjectError, ObjectStoreError } from '../object-store/object-store.ts';
import type { ObjectStore } from '../object-store/object-store.ts';
import { openObjectStore } from '../object-store/open-object-store.ts';
import type { RetryPolicy } from '../object-store/retry.ts';

const IDENTITY_NAME = 'platform';
/** In the settings: the folder in the data directory, wherever that is. */
const DEFAULT = 'default';
/** A person waits. */
const START_RETRY: RetryPolicy = {
  attempts: 4,
  firstDelayMs: 200,
  maxDelayMs: 1_000,
  attemptTimeoutMs: 5_000,
  totalTimeoutMs: 15_000,
};

/**
 * The URL of the store, which is there and ours. `given` is the option's, undefined when there is none: then the one that was used before. `isRefill`: one that is
 * empty takes the place of the one that was used before. Throws `bad-request`, `unavailable`, `forbidden` or `conflict` with what to do next.
 */
export async function chooseObjectStore(
  given: string | undefined,
  dataDirectory: string,
  settings: Settings,
  isRefill = false,
): Promise<string> {
  const recorded = settings.get('object-store-url');
  const isUrl = given !== undefined && /^[a-z][a-z0-9+.-]*:/i.test(given);
  const chosen = given === undefined ? (recorded ?? DEFAULT) : isUrl ? given : resolve(given);
  const url = chosen === DEFAULT ? join(dataDirectory, 'object-store') : chosen;
  let store: ObjectStore;
  let foundId: string | undefined;
  try {
    store = await openObjectStore(url, { retry: START_RETRY });
    foundId = await readIdentity(store);
  } catch (error) {
    throw explained(url, error);
  }
  let id = settings.get('object-store-id');
  if (foundId !== undefined && foundId !== id) {
    const next = 'choose another bucket, prefix or directory with --object-store';
    const why =
      id === undefined
        ? 'a store is for one data directory'
        : `this data directory's is ${shown(recorded, dataDirectory)}`;
    throw new StrataError('conflict', `the object store ${url} belongs to another platform (${why}): ${next}`);
  }
  if (foundId === undefined) {
    if (id !== undefined && recorded !== undefined && isRefill) {
      assertCanRefill(dataDirectory, url);
    } else if (id !== undefined && recorded !== undefined) {
      const before = shown(recorded, dataDirectory);
      const what = recorded === chosen ? 'is empty or is not mounted' : `does not have what is in ${before}`;
      const next =
        recorded === chosen
          ? 'bring its content back, and start again'
          : `start with --object-store ${before}, or copy everything from there first`;
      const lost = 'if that is lost for good, --refill-object-store fills this one with what the local disk still has';
      throw new StrataError('conflict', `the object store ${url} ${what}: ${next}; ${lost}`);
    }
    id ??= randomBytes(16).toString('hex');
    settings.set('object-store-id', id);
    await writeIdentity(store, id).catch((error: unknown) => {
      throw explained(url, error);
    });
  }
  if (recorded !== chosen) settings.set('object-store-url', chosen);
  return url;
}

function assertCanRefill(dataDirectory: string, url: string): void {
  const timelines = join(dataDirectory, 'pageserver', 'timelines');
  if (existsSync(timelines) && readdirSync(timelines).length > 0) return;
  throw new StrataError(
    'conflict',
    `the object store ${url} cannot be refilled: ${timelines} has nothing either; bring back a copy of one of them`,
  );
}

async function readIdentity(store: ObjectStore): Promise<string | undefined> {
  try {
    const text = (await store.get(IDENTITY_NAME)).toString('latin1');
    const match = /^strata-object-store 1 ([0-9a-f]{32})\n$/.exec(text);
    if (match === null) throw new ObjectStoreError('rejected', `its object "${IDENTITY_NAME}" is not of Strata`);
    return match[1];
  } catch (error) {
    if (isObjectError(error, 'not-found')) return undefined;
    throw error;
  }
}

async function writeIdentity(store: ObjectStore, id: string): Promise<void> {
  await store.put(IDENTITY_NAME, Buffer.from(`strata-object-store 1 ${id}\n`));
}

function shown(recorded: string | undefined, dataDirectory: string): string {
  return recorded === undefined || recorded === DEFAULT ? join(dataDirectory, 'object-store') : recorded;
}

function explained(url: string, error: unknown): StrataError {
  if (!(error instanceof ObjectStoreError)) {
    const reason = error instanceof Error ? error.message : String(error);
    return new StrataError('bad-request', `the object store ${url} cannot be used: ${reason}`, { cause: error });
  }
  const isS3 = url.startsWith('s3:');
  const say = (code: StrataError['code'], next: string): StrataError =>
    new StrataError(code, `the object store ${url} cannot be used: ${error.message}; ${next}`, { cause: error });
  switch (error.kind) {
    case 'denied':
      return say(
        'forbidden',
        isS3
          ? 'check the credentials (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or profile=… in the URL) and that they may list, read, write and delete there'
          : 'check who owns the directory',
      );
    case 'transient':
      return say('unavailable', isS3 ? 'check endpoint=… in the URL, and that the server runs' : 'check the disk');
    default:
      return say('bad-request', isS3 ? 'check the name of the bucket, or make it' : 'check --object-store');
  }
}
