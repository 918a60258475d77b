/**
 * API keys: who may call the API. The state keeps a hash of each; the key itself is shown once, when it is made. The first one is also
 * kept in a file of the data directory, mode 0600, for the command line.
 */
import { writeFileDurably } from '../base/durable-file.ts';
import { StrataError } from '../base/errors.ts';
import { hashApiKey, newApiKey, readPrivateFile } from './secrets.ts';
import type { ApiKeyRow, State } from './state.ts';

const FIRST_KEY_NAME = 'first key';
/** `last_used_at` is written when it moved by this much: each write is an fsync. */
const LAST_USED_STEP_MS = 60_000;

export class ApiKeys {
  readonly #state: State;
  readonly #now: () => number;

  constructor(state: State, now: () => number) {
    this.#state = state;
    this.#now = now;
  }

  /**
   * Makes sure that the file holds a key that works. A missing file gets a new key, and the lost one works no more; a key in the file that
   * the state does not know (a new state beside an old file) is taken up.
   */
  ensureFirstKey(path: string): void {
    const kept = readPrivateFile(path)?.toString('utf8').trim();
    if (kept !== undefined && kept !== '') {
      if (this.#find(kept) === undefined) this.#insert(FIRST_KEY_NAME, kept);
      return;
    }
    const key = newApiKey();
    // The file first: a key that nobody knows yet is harmless, a row without its key locks everybody out.
    writeFileDurably(path, `${key}\n`, 0o600);
    this.#state.transaction(() => {
      this.#state.run('DELETE FROM api_keys WHERE name = ?', FIRST_KEY_NAME);
      this.#insert(FIRST_KEY_NAME, key);
    });
  }

  /** Throws `unauthorized`; never says what was wrong with the key. */
  authenticate(authorization: string | undefined, remoteAddress: string): ApiKeyRow {
    const key = /^Bearer +(\S+)$/i.exec(authorization ?? '')?.[1];
    const row = key === undefined ? undefined : this.#find(key);
    if (row === undefined) {
      const problem = key === undefined ? 'the request has no API key' : 'the API key is not known';
      throw new StrataError('unauthorized', `${problem}: send "Authorization: Bearer <key>"`);
    }
    const now = this.#now();
    if (now - (row.last_used_at ?? 0) >= LAST_USED_STEP_MS) {
      this.#state.update('api_keys', row.id, { last_used_at: now, last_used_from_addr: remoteAddress });
    }
    return row;
  }

  #find(key: string): ApiKeyRow | undefined {
    return this.#state.get<ApiKeyRow>('SELECT * FROM api_keys WHERE hash = ?', hashApiKey(key));
  }

  #insert(name: string, key: string): void {
    const row = { name, hash: hashApiKey(key), created_at: this.#now(), last_used_at: null, last_used_from_addr: '' };
    this.#state.insert('api_keys', row);
  }
}
