/**
 * The WAL of a branch of a running platform, read from its safekeepers by a process of the same user: the addresses are in platform.json, the
 * secret that opens them is in the platform's data directory.
 *
 * A branch's own WAL begins where it was branched off. What is before is its ancestors', each up to the LSN of the branch; the template that
 * projects begin from has none.
 */
import { setTimeout as sleep } from 'node:timers/promises';
import type { PlatformFile } from '../api/control.ts';
import { PageserverClient, type PageserverTimelineStatus } from '../api/pageserver.ts';
import {
  readWal,
  SafekeeperClient,
  type SafekeeperEndpoint,
  type SafekeeperTimelineStatus,
} from '../api/safekeeper.ts';
import { type WalLags, walLags } from '../api/wal-status.ts';
import type { TimelineWalStatus } from '../api/safekeeper-protocol.ts';
import { StrataError, toStrataError } from '../base/errors.ts';
import { signToken } from '../base/token.ts';
import type { WalConnection } from '../cli/wal.ts';
import type { WalChunk, WalSource } from '../pageserver/wal-directory.ts';
import { formatLsn, type Lsn } from '../postgres/lsn.ts';
import { toPgVersion } from '../postgres/version.ts';
import { readSecrets } from './platform-directory.ts';
import { TEMPLATE_TENANT_ID } from './template.ts';

/** One that is stopped, or hangs, still takes connections. */
const STATUS_TIMEOUT_MS = 3_000;

export interface BranchWalOptions {
  readonly dataDirectory: string;
  readonly file: PlatformFile;
  readonly timelineId: string;
  /** Without it, where the branch's own WAL begins. */
  readonly startLsn?: Lsn | undefined;
}

/** WAL of one timeline, `[fromLsn, toLsn)`. */
interface Range {
  readonly tenantId: string;
  readonly timelineId: string;
  readonly fromLsn: Lsn;
  readonly toLsn: Lsn;
}

/** What is committed when it is called. Throws `unavailable` when the platform cannot be reached, `bad-request` for an LSN without WAL. */
export async function openBranchWal(options: BranchWalOptions): Promise<WalSource> {
  const { file, timelineId } = options;
  const { platformSecret } = readSecrets(options.dataDirectory);
  const token = await signToken(platformSecret, { scope: 'platform' });
  const endpoints = file.safekeepers.map((address) => ({ address, token }));
  const pageserver = new PageserverClient({ ...file.pageserver, token });
  try {
    const status = await pageserver.timelineStatus(timelineId);
    const newest = await newestCommit(endpoints, status.tenantId, timelineId);
    const endLsn = newest?.commitLsn ?? status.startLsn;
    if (options.startLsn !== undefined) await rangesOf(pageserver, status, options.startLsn, endLsn); // says where WAL begins
    const startLsn =
      options.startLsn === undefined
        ? status.startLsn
        : await recordBoundary(pageserver, timelineId, options.startLsn, status);
    const ranges = await rangesOf(pageserver, status, startLsn, endLsn);
    return {
      version: toPgVersion(status.pgVersion),
      startLsn,
      endLsn,
      chunks: readRanges(endpoints, ranges),
    };
  } finally {
    await pageserver.close();
  }
}

/** How readers that are not ours get the WAL of a branch: with a token for it alone. */
export async function branchWalConnection(
  options: Pick<BranchWalOptions, 'dataDirectory' | 'file' | 'timelineId'>,
): Promise<WalConnection> {
  const { dataDirectory, file, timelineId } = options;
  const { platformSecret } = readSecrets(dataDirectory);
  const password = await signToken(platformSecret, { scope: 'timeline', timelineId });
  return { safekeepers: file.safekeepers, user: timelineId, password };
}

/** What the WAL of all branches waits for, as far as safekeepers answer. */
export async function readWalLags(options: Pick<BranchWalOptions, 'dataDirectory' | 'file'>): Promise<WalLags> {
  const { platformSecret } = readSecrets(options.dataDirectory);
  const token = await signToken(platformSecret, { scope: 'platform' });
  const statuses = new Map<number, readonly TimelineWalStatus[]>();
  const silent: number[] = [];
  await Promise.all(
    options.file.safekeepers.map(async (address, index) => {
      const id = address.id ?? index + 1;
      const client = new SafekeeperClient({ address, token });
      const timeout = sleep(STATUS_TIMEOUT_MS, undefined, { ref: false });
      const status = await Promise.race([client.walStatus().catch(() => undefined), timeout]);
      client.close();
      if (status === undefined) silent.push(id);
      else statuses.set(id, status);
    }),
  );
  return { lags: walLags(statuses), silent };
}

async function recordBoundary(
  pageserver: PageserverClient,
  timelineId: string,
  lsn: Lsn,
  status: PageserverTimelineStatus,
): Promise<Lsn> {
  if (lsn > status.lastRecordLsn) {
    throw new StrataError(
      'bad-request',
      `the branch ends at ${formatLsn(status.lastRecordLsn)}, before ${formatLsn(lsn)}`,
    );
  }
  return (await pageserver.resolveLsn(timelineId, lsn)).lsn;
}

/** The parts of history from `startLsn` to `endLsn`, oldest first. */
async function rangesOf(
  pageserver: PageserverClient,
  newest: PageserverTimelineStatus,
  startLsn: Lsn,
  endLsn: Lsn,
): Promise<Range[]> {
  const ranges: Range[] = [];
  let toLsn = endLsn;
  for (let status = newest; ;) {
    if (status.tenantId === TEMPLATE_TENANT_ID) {
      throw new StrataError(
        'bad-request',
        `there is no WAL at ${formatLsn(startLsn)}: the project's begins at ${formatLsn(toLsn)}`,
      );
    }
    const { tenantId, timelineId } = status;
    const fromLsn = Math.max(startLsn, status.startLsn);
    if (fromLsn < toLsn) ranges.unshift({ tenantId, timelineId, fromLsn, toLsn });
    if (startLsn >= status.startLsn || status.ancestorTimelineId === undefined) return ranges;
    toLsn = Math.min(toLsn, status.ancestorLsn ?? status.startLsn);
    status = await pageserver.timelineStatus(status.ancestorTimelineId);
  }
}

/** The safekeeper that knows the most of the timeline; undefined when it was never written. */
async function newestCommit(
  endpoints: readonly SafekeeperEndpoint[],
  tenantId: string,
  timelineId: string,
): Promise<(SafekeeperTimelineStatus & { readonly endpoint: SafekeeperEndpoint }) | undefined> {
  const answers = await Promise.allSettled(
    endpoints.map(async (endpoint) => {
      const client = new SafekeeperClient(endpoint);
      try {
        return { ...(await client.status(tenantId, timelineId)), endpoint };
      } finally {
        client.close();
      }
    }),
  );
  const known = answers.flatMap((answer) => (answer.status === 'fulfilled' ? [answer.value] : []));
  if (known.length > 0) return known.reduce((best, each) => (each.commitLsn > best.commitLsn ? each : best));
  const failed = answers.flatMap((answer) => (answer.status === 'rejected' ? [toStrataError(answer.reason)] : []));
  const serious = failed.find((error) => error.code !== 'not-found');
  if (serious !== undefined) throw serious;
  return undefined;
}

async function* readRanges(
  endpoints: readonly SafekeeperEndpoint[],
  ranges: readonly Range[],
): AsyncGenerator<WalChunk> {
  for (const { tenantId, timelineId, fromLsn, toLsn } of ranges) {
    const newest = await newestCommit(endpoints, tenantId, timelineId);
    if (newest === undefined || newest.commitLsn < toLsn) {
      const has = newest === undefined ? 'none of it' : `it up to ${formatLsn(newest.commitLsn)}`;
      throw new StrataError('unavailable', `WAL to ${formatLsn(toLsn)} is wanted, the safekeepers have ${has}`);
    }
    const abort = new AbortController();
    let at = fromLsn;
    for await (const chunk of readWal({ ...newest.endpoint, tenantId, timelineId, fromLsn, signal: abort.signal })) {
      const bytes = chunk.bytes.subarray(0, toLsn - chunk.lsn);
      at = chunk.lsn + bytes.length;
      if (bytes.length > 0) yield { lsn: chunk.lsn, bytes: Buffer.from(bytes) };
      if (at >= toLsn) break;
    }
    abort.abort();
  }
}
