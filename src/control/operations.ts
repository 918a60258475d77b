/**
 * Operations: each change of the world outside the state (a timeline, a compute) has a durable row, written before the change begins and
 * closed after it ended. After a crash the rows still open say what has to be done again or given up (see control.ts, recover).
 *
 *   begin (in a transaction with the rows that the change is about) → run: the work → finished | failed, in one transaction with what follows from it
 *
 * Work must be repeatable: a crash between the work and its closing means that it is done again.
 */
import { setTimeout as sleep } from 'node:timers/promises';
import { StrataError, errorTable, toStrataError } from '../base/errors.ts';
import type { Logger } from '../base/log.ts';
import { newOperationId } from './ids.ts';
import { type Page, type PageRequest, decodeCursor, encodeCursor } from './pagination.ts';
import type { OperationAction, OperationRow, OperationStatus, State } from './state.ts';

const CLOSE_DEADLINE_MS = 10_000;
const RETRY_DELAYS_MS = [100, 300, 1000, 3000, 10_000];

export interface OperationRefs {
  readonly projectId: string;
  readonly branchId?: string;
  readonly endpointId?: string;
}

export interface OperationOutcome<T> {
  /** What follows from success; same transaction as the row's `finished`. */
  readonly onFinished?: (result: T) => void;
  /** What follows from failure; same transaction as the row's `failed`. */
  readonly onFailed?: (error: StrataError) => void;
  /** Try again, for a while, after errors for which that can help. */
  readonly retry?: boolean;
}

export class Operations {
  readonly #state: State;
  readonly #now: () => number;
  readonly #log: Logger;
  readonly #inFlight = new Set<Promise<unknown>>();
  readonly #stopping = new AbortController();

  constructor(state: State, now: () => number, log: Logger) {
    this.#state = state;
    this.#now = now;
    this.#log = log;
  }

  /** Writes the row; call it in the transaction that makes the change known. */
  begin(action: OperationAction, refs: OperationRefs, status: OperationStatus = 'running'): string {
    const now = this.#now();
    const id = newOperationId();
    this.#state.insert('operations', {
      id,
      project_id: refs.projectId,
      branch_id: refs.branchId ?? null,
      endpoint_id: refs.endpointId ?? null,
      action,
      status,
      error: null,
      failures_count: 0,
      retry_at: null,
      created_at: now,
      updated_at: now,
    });
    return id;
  }

  /** Does the work and closes the row. Rejects with the work's error, as a StrataError. */
  async run<T>(id: string, work: () => Promise<T>, outcome: OperationOutcome<T> = {}): Promise<T> {
    for (let attempt = 0; ; attempt++) {
      let result: T;
      try {
        this.#setStatus(id, 'running');
        result = await work();
      } catch (thrown) {
        const error = toStrataError(thrown);
        const delayMs = outcome.retry && errorTable[error.code].retry ? RETRY_DELAYS_MS[attempt] : undefined;
        if (delayMs !== undefined) {
          if (await this.#waitToRetry(id, error, delayMs)) continue;
          throw error; // The platform stops: the row stays open and the next start takes it up.
        }
        this.#state.transaction(() => {
          this.fail(id, error.message);
          outcome.onFailed?.(error);
        });
        throw error;
      }
      this.#state.transaction(() => {
        this.finish(id);
        outcome.onFinished?.(result);
      });
      return result;
    }
  }

  /** Lets work go on without a caller; its error is logged. `idle` waits for it. */
  inBackground(what: string, work: Promise<unknown>): void {
    const logged = work.catch((error: unknown) => this.#log.error({ err: error }, `${what} failed`));
    const tracked: Promise<unknown> = logged.finally(() => this.#inFlight.delete(tracked));
    this.#inFlight.add(tracked);
  }

  /** Resolves when no background work is left. */
  async idle(): Promise<void> {
    while (this.#inFlight.size > 0) await Promise.all(this.#inFlight);
  }

  /** Ends waits for retries, then waits a while for background work. What did not finish stays open for the next start. */
  async close(): Promise<void> {
    this.#stopping.abort();
    await Promise.race([this.idle(), sleep(CLOSE_DEADLINE_MS, undefined, { ref: false })]);
  }

  finish(id: string): void {
    this.#state.update('operations', id, { status: 'finished', error: null, retry_at: null, updated_at: this.#now() });
  }

  fail(id: string, message: string): void {
    const now = this.#now();
    this.#state.run(
      `UPDATE operations SET status = 'failed', error = ?, failures_count = failures_count + 1, retry_at = NULL, updated_at = ? WHERE id = ?`,
      message,
      now,
      id,
    );
  }

  /** In the order in which they began. */
  unfinished(): OperationRow[] {
    return this.#state.all<OperationRow>(
      `SELECT * FROM operations WHERE status IN ('scheduling', 'running') ORDER BY sequence`,
    );
  }

  byIds(ids: readonly string[]): OperationRow[] {
    return ids
      .map((id) => this.#state.get<OperationRow>('SELECT * FROM operations WHERE id = ?', id))
      .filter((row) => row !== undefined);
  }

  get(projectId: string, id: string): OperationRow {
    const row = this.#state.get<OperationRow>(
      'SELECT * FROM operations WHERE project_id = ? AND id = ?',
      projectId,
      id,
    );
    if (row === undefined) throw new StrataError('not-found', `operation ${id} does not exist in project ${projectId}`);
    return row;
  }

  /** Newest first. */
  list(projectId: string, page: PageRequest): Page<OperationRow> {
    const before = page.cursor === undefined ? Number.MAX_SAFE_INTEGER : decodeSequence(page.cursor);
    const items = this.#state.all<OperationRow>(
      'SELECT * FROM operations WHERE project_id = ? AND sequence < ? ORDER BY sequence DESC LIMIT ?',
      projectId,
      before,
      page.limit,
    );
    const last = items.at(-1);
    return { items, ...(last === undefined ? {} : { cursor: encodeCursor([last.sequence]) }) };
  }

  /** Only where it differs, so that the usual case (begun as running) costs no write. */
  #setStatus(id: string, status: OperationStatus): void {
    this.#state.run(
      'UPDATE operations SET status = ?, updated_at = ? WHERE id = ? AND status <> ?',
      status,
      this.#now(),
      id,
      status,
    );
  }

  async #waitToRetry(id: string, error: StrataError, delayMs: number): Promise<boolean> {
    if (this.#stopping.signal.aborted) return false;
    const now = this.#now();
    this.#state.run(
      'UPDATE operations SET error = ?, failures_count = failures_count + 1, retry_at = ?, updated_at = ? WHERE id = ?',
      error.message,
      now + delayMs,
      now,
      id,
    );
    this.#log.warn({ operation: id, err: error }, `operation is tried again in ${delayMs} ms`);
    return sleep(delayMs, true, { signal: this.#stopping.signal, ref: false }).catch(() => false);
  }
}

function decodeSequence(cursor: string): number {
  const [sequence] = decodeCursor(cursor);
  if (typeof sequence !== 'number')
    throw new StrataError('bad-request', `cursor is not one of ours: ${JSON.stringify(cursor)}`);
  return sequence;
}
