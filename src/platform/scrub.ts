/**
 * Scrub of a running platform, by a process of the same user: layers and objects (pageserver/scrub.ts), then, branch by branch, a sample of pages against an
 * independent replay of the branch's WAL from its safekeepers and what they have offloaded (pageserver/scrub-replay.ts).
 *
 * Gentle by being apart: it has its own small caches and a low priority, and asks the pageserver for nothing but where history is kept, a lease on that, and pages
 * of which a layer is not on this disk.
 */
import { mkdtempSync, rmSync } from 'node:fs';
import { constants, setPriority, tmpdir } from 'node:os';
import { join } from 'node:path';
import type { PlatformFile } from '../api/control.ts';
import { PageserverClient } from '../api/pageserver.ts';
import { readRebuiltLogs } from '../api/rebuilt-logs.ts';
import type { BranchReplay, FileDifference, Finding, PageDifference, ScrubReport, ScrubRequest } from '../api/scrub.ts';
import { toStrataError } from '../base/errors.ts';
import { createLog } from '../base/log.ts';
import { signToken } from '../base/token.ts';
import { LsnLease } from '../compute/lsn-lease.ts';
import type { ObjectStore } from '../object-store/object-store.ts';
import { openObjectStore } from '../object-store/open-object-store.ts';
import { LayerDamagedError } from '../pageserver/layers/block.ts';
import { scrubStore } from '../pageserver/scrub.ts';
import { FilesReplay } from '../pageserver/scrub-files.ts';
import { StoredPages } from '../pageserver/scrub-pages.ts';
import { randomFrom, type ReplayedPage, replayPages } from '../pageserver/scrub-replay.ts';
import type { Lsn } from '../postgres/lsn.ts';
import type { RelationForkKey } from '../postgres/relation.ts';
import { openBranchWal } from './branch-wal.ts';
import { readSecrets } from './platform-directory.ts';
import { restoreWal, scrubWal, type WalScrub, type WalScrubOptions } from './scrub-wal.ts';

export interface PlatformScrubOptions extends ScrubRequest {
  readonly dataDirectory: string;
  readonly file: PlatformFile;
}

export async function scrubPlatform(options: PlatformScrubOptions): Promise<ScrubReport> {
  const { dataDirectory, file, timelineIds, branches, sample, seed, deleteOrphans, onProgress, signal } = options;
  beGentle();
  const { platformSecret } = readSecrets(dataDirectory);
  const token = await signToken(platformSecret, { scope: 'platform' });
  const pageserver = new PageserverClient({ ...file.pageserver, token });
  const scratchDirectory = mkdtempSync(join(tmpdir(), 'strata-scrub-'));
  try {
    // What is only in memory yet cannot be looked at.
    if (sample > 0) for (const { timelineId } of branches) await flush(pageserver, timelineId);
    const status = await pageserver.objectStoreStatus();
    const store = file.objectStore === undefined ? undefined : await openObjectStore(file.objectStore);
    const wanted = timelineIds === undefined ? undefined : new Set(timelineIds);
    const directory = join(dataDirectory, 'pageserver', 'timelines');
    const stored = await scrubStore({
      directory,
      ...(store === undefined ? {} : { store }),
      ...(status === undefined ? {} : { generation: { generation: status.generation, since: status.since } }),
      scratchDirectory,
      isWanted: (timelineId) => wanted === undefined || wanted.has(timelineId),
      deleteOrphans,
      now: Date.now,
      onProgress: ({ where, layers, bytes }) =>
        onProgress(`${where === 'local' ? 'layers' : 'objects'}: ${layers} looked at, ${(bytes / 1e6).toFixed(0)} MB`),
      signal,
    });
    const wal =
      store === undefined ? undefined : await scrubWalOf(options, store, token, await startLsnsOf(pageserver));
    const findings: Finding[] = [...stored.findings, ...(wal?.scrub.findings ?? [])];
    const repaired: Finding[] = [];
    if (options.repair) {
      repaired.push(...(await repair(pageserver, stored.findings)));
      if (wal !== undefined) repaired.push(...(await restoreWal(wal.options, wal.scrub.findings)));
    }
    const replays: BranchReplay[] = [];
    const differences: PageDifference[] = [];
    const fileDifferences: FileDifference[] = [];
    if (sample > 0) {
      for (const [number, branch] of branches.entries()) {
        signal.throwIfAborted();
        const replay = await compareBranch({ ...options, pageserver, directory, branch, seed: seed + number });
        replays.push(replay.replay);
        differences.push(...replay.differences);
        fileDifferences.push(...replay.fileDifferences);
      }
    }
    const { objects, bytes } = wal?.scrub ?? { objects: 0, bytes: 0 };
    const looked = { ...stored, findings, wal: { objects, bytes } };
    return { ...looked, seed, objectStore: store?.description, replays, differences, fileDifferences, repaired };
  } finally {
    rmSync(scratchDirectory, { recursive: true, force: true });
    await pageserver.close();
  }
}

/** Where the logs of all timelines begin. */
async function startLsnsOf(pageserver: PageserverClient): Promise<Map<string, Lsn>> {
  const timelines = await pageserver.listTimelines();
  return new Map(timelines.flatMap((each) => (each.kind === 'loaded' ? [[each.timelineId, each.startLsn]] : [])));
}

async function scrubWalOf(
  { dataDirectory, file, timelineIds, onProgress, signal }: PlatformScrubOptions,
  store: ObjectStore,
  token: string,
  startLsns: ReadonlyMap<string, Lsn>,
): Promise<{ readonly options: WalScrubOptions; readonly scrub: WalScrub }> {
  const wanted = timelineIds === undefined ? undefined : new Set(timelineIds);
  const options: WalScrubOptions = {
    store,
    safekeepers: file.safekeepers.map((address) => ({ address, token })),
    isWanted: (timelineId) => wanted === undefined || wanted.has(timelineId),
    startLsns,
    rebuilt: new Set(readRebuiltLogs(dataDirectory).map(({ timelineId }) => timelineId)),
    onProgress: (objects, bytes) => onProgress(`WAL: ${objects} objects looked at, ${(bytes / 1e6).toFixed(0)} MB`),
    signal,
  };
  return { options, scrub: await scrubWal(options) };
}

async function flush(pageserver: PageserverClient, timelineId: string): Promise<void> {
  try {
    const { memoryBytes } = await pageserver.timelineStatus(timelineId);
    if (memoryBytes > 0) await pageserver.flush(timelineId);
  } catch {
    // A timeline that cannot be flushed is looked at as far as it is in layers.
  }
}

/** Has the pageserver bring back what is damaged here, then what the object store has lost. */
async function repair(pageserver: PageserverClient, findings: readonly Finding[]): Promise<Finding[]> {
  return [...(await repairFiles(pageserver, findings)), ...(await restoreObjects(pageserver, findings))];
}

async function restoreObjects(pageserver: PageserverClient, findings: readonly Finding[]): Promise<Finding[]> {
  const lost = findings.filter(({ where }) => where === 'object store');
  const restored: Finding[] = [];
  for (const timelineId of new Set(lost.map((finding) => finding.timelineId))) {
    const own = lost.filter((finding) => finding.timelineId === timelineId);
    try {
      const left = await pageserver.restoreObjects(timelineId, [...new Set(own.map(({ name }) => name))]);
      restored.push(...own.filter((finding) => !left.some(({ name }) => name === finding.name)));
    } catch {
      // A timeline that cannot be loaded, or a store that does not take it: they are left, and the log says why.
    }
  }
  return restored;
}

async function repairFiles(pageserver: PageserverClient, findings: readonly Finding[]): Promise<Finding[]> {
  const repaired: Finding[] = [];
  const tried = new Map<string, boolean>();
  for (const finding of findings) {
    if (finding.where !== 'local') continue;
    let isRepaired = tried.get(finding.name);
    if (isRepaired === undefined) {
      isRepaired = await pageserver.repairLayer(finding.timelineId, finding.name, finding.offset).then(
        () => true,
        () => false,
      );
      tried.set(finding.name, isRepaired);
    }
    if (isRepaired) repaired.push(finding);
  }
  return repaired;
}

interface ComparisonJob extends PlatformScrubOptions {
  readonly pageserver: PageserverClient;
  readonly directory: string;
  readonly branch: { readonly name: string; readonly timelineId: string };
}

interface Comparison {
  readonly replay: BranchReplay;
  readonly differences: PageDifference[];
  readonly fileDifferences: FileDifference[];
}

async function compareBranch(job: ComparisonJob): Promise<Comparison> {
  const { pageserver, branch, signal } = job;
  const nothing = {
    branch: branch.name,
    timelineId: branch.timelineId,
    records: 0,
    compared: 0,
    fromWalAlone: 0,
    refused: 0,
    files: 0,
  };
  const pages = new StoredPages(job.directory, branch.timelineId);
  let lease: LsnLease | undefined;
  try {
    const index = await pages.load();
    const { oldestLsn } = await pageserver.timelineStatus(branch.timelineId);
    const beginLsn = Math.max(index.startLsn, oldestLsn);
    const endLsn = index.diskConsistentLsn;
    const walBytes = Math.max(0, endLsn - index.startLsn);
    if (endLsn <= beginLsn) {
      return { replay: { ...nothing, walBytes, skipped: 'it has no history of its own in layers' }, ...NO_DIFFERENCES };
    }
    const asked = await windowStart(job, beginLsn, endLsn);
    lease = await LsnLease.take(pageserver, branch.timelineId, asked, {
      signal,
      log: createLog({ name: 'scrub', level: 'silent' }),
      kind: 'scrub',
    });
    const compared = await compareWindow(job, pages, asked, endLsn);
    return { ...compared, replay: { ...nothing, walBytes, ...compared.replay } };
  } catch (error) {
    signal.throwIfAborted();
    const { message } = toStrataError(error);
    return { replay: { ...nothing, walBytes: 0, skipped: message }, ...NO_DIFFERENCES };
  } finally {
    lease?.release();
    pages.close();
  }
}

const NO_DIFFERENCES: Pick<Comparison, 'differences' | 'fileDifferences'> = { differences: [], fileDifferences: [] };

/** Where the replay begins: at the beginning where the WAL is not too much, else somewhere by chance. The end of a record. */
async function windowStart(
  { pageserver, branch, walBytes, seed }: ComparisonJob,
  beginLsn: Lsn,
  endLsn: Lsn,
): Promise<Lsn> {
  const spare = endLsn - walBytes - beginLsn;
  if (spare <= 0) return beginLsn;
  const { lsn } = await pageserver.resolveLsn(
    branch.timelineId,
    beginLsn + Math.floor(randomFrom(seed)() * (spare + 1)),
  );
  return Math.max(lsn, beginLsn);
}

async function compareWindow(
  job: ComparisonJob,
  pages: StoredPages,
  fromLsn: Lsn,
  diskLsn: Lsn,
): Promise<Omit<Comparison, 'replay'> & { readonly replay: Omit<BranchReplay, 'branch' | 'timelineId' | 'walBytes'> }> {
  const { pageserver, branch, dataDirectory, file, sample, seed, walBytes, onProgress, signal } = job;
  const { timelineId } = branch;
  const source = await openBranchWal({ dataDirectory, file, timelineId, startLsn: fromLsn });
  const toLsn = Math.min(diskLsn, fromLsn + walBytes, source.endLsn);
  const read = async (fork: RelationForkKey, blk: number, lsn: Lsn): Promise<Buffer> =>
    (await pages.read(fork, blk, lsn)) ?? (await pageserver.getPages(timelineId, fork, blk, 1, lsn));
  const files = new FilesReplay(await pageserver.basebackup(timelineId, fromLsn), source.version);
  const replayed = await replayPages({
    source: { ...source, endLsn: toLsn, chunks: upTo(source.chunks, toLsn) },
    sample,
    seed,
    readBase: (fork, blk) => read(fork, blk, fromLsn),
    onRecord: (record) => files.take(record),
    onProgress: (lsn) => {
      signal.throwIfAborted();
      const percent = Math.floor((100 * (lsn - fromLsn)) / Math.max(1, toLsn - fromLsn));
      onProgress(`branch ${branch.name}: ${percent} % of ${((toLsn - fromLsn) / 1e6).toFixed(0)} MB of WAL replayed`);
    },
  });
  const differences: PageDifference[] = [];
  for (const page of replayed.pages) {
    signal.throwIfAborted();
    const difference = await differenceOf(page, read);
    if (difference !== undefined) {
      differences.push({
        branch: branch.name,
        timelineId,
        fork: page.fork,
        blk: page.blk,
        lsn: page.lsn,
        ...difference,
      });
    }
  }
  const stored = (await pages.files(files.lsn)) ?? (await pageserver.basebackup(timelineId, files.lsn));
  const fileDifferences = files
    .compare(stored)
    .map((each) => ({ ...each, branch: branch.name, timelineId, lsn: files.lsn }));
  return {
    replay: {
      files: files.count,
      fromLsn,
      toLsn: replayed.endLsn,
      records: replayed.records,
      compared: replayed.pages.length,
      fromWalAlone: replayed.pages.filter((page) => page.isFromWalAlone).length,
      refused: replayed.refused.length,
    },
    differences,
    fileDifferences,
  };
}

async function differenceOf(
  { fork, blk, lsn, page }: ReplayedPage,
  read: (fork: RelationForkKey, blk: number, lsn: Lsn) => Promise<Buffer>,
): Promise<Pick<PageDifference, 'offset' | 'reason'> | undefined> {
  let stored: Buffer;
  try {
    stored = await read(fork, blk, lsn);
  } catch (error) {
    const { message } = toStrataError(error);
    return {
      offset: undefined,
      reason: error instanceof LayerDamagedError ? message : `the store cannot make it: ${message}`,
    };
  }
  if (stored.equals(page)) return undefined;
  const offset = page.findIndex((byte, i) => byte !== stored[i]);
  const count = page.reduce((sum, byte, i) => sum + (byte === stored[i] ? 0 : 1), 0);
  return { offset, reason: `${count} bytes differ, the first is ${stored[offset]}, by WAL it is ${page[offset]}` };
}

/** WAL up to an LSN. */
async function* upTo<T extends { readonly lsn: Lsn; readonly bytes: Buffer }>(
  chunks: AsyncIterable<T>,
  lsn: Lsn,
): AsyncGenerator<T> {
  for await (const chunk of chunks) {
    if (chunk.lsn >= lsn) return;
    yield chunk;
    if (chunk.lsn + chunk.bytes.length >= lsn) return;
  }
}

function beGentle(): void {
  try {
    setPriority(constants.priority.PRIORITY_LOW);
  } catch {
    // Not allowed here: it works at the priority that it has.
  }
}
