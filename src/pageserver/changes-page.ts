/**
 * What changed, a page at a time, as the call `changes` gives it (api/pageserver.ts): of a scan (changes.ts) as much as fits into a reply and a
 * moment. The next call goes on behind the last block that was given.
 *
 * Both ends of the window are leased for as long as pages are asked for, so that they are not collected in between.
 */

import type { BlockPosition, ChangedFork, ChangesPage, ChangesRequest } from '../api/pageserver.ts';
import { ChangeScan, ownerOf } from './changes.ts';
import type { Leases } from './retention.ts';
import type { Timeline } from './timeline.ts';

const FORKS_MAX = 1000;
const RANGES_MAX = 16_384;
const PAGE_MS = 2_000;

export async function changesPage(timeline: Timeline, request: ChangesRequest, leases: Leases): Promise<ChangesPage> {
  const { fromLsn, toLsn, after, withRanges } = request;
  const scan = new ChangeScan(timeline, { fromLsn, toLsn, ...(after === undefined ? {} : { after }) });
  const holders = [fromLsn, toLsn].map((lsn) => {
    const { timelineId } = ownerOf(timeline, lsn);
    const holder = `changes of ${timeline.timelineId} at ${lsn}`;
    leases.take(timelineId, holder, lsn);
    return { timelineId, holder };
  });
  const startMs = performance.now();
  const forks: ChangedFork[] = [];
  let rangeCount = 0;
  for (;;) {
    const piece = await scan.next();
    if (piece === undefined) {
      const slruPageCount = await scan.slruPageCount();
      for (const { timelineId, holder } of holders) leases.release(timelineId, holder);
      return { forks, keyBlocksRead: scan.keyBlocksRead, slruPageCount };
    }
    const { fork, ranges, size } = piece;
    forks.push({
      fork,
      blockCount: ranges.reduce((sum, [start, end]) => sum + end - start, 0),
      ...(withRanges ? { ranges } : {}),
      ...(size === undefined
        ? {}
        : {
            size: {
              ...(size.before === undefined ? {} : { before: size.before }),
              ...(size.after === undefined ? {} : { after: size.after }),
            },
          }),
    });
    rangeCount += ranges.length;
    if (forks.length < FORKS_MAX && (!withRanges || rangeCount < RANGES_MAX) && performance.now() - startMs < PAGE_MS) {
      continue;
    }
    const end = ranges.at(-1)?.[1];
    const next: BlockPosition = { fork, ...(piece.isContinued && end !== undefined ? { blk: end - 1 } : {}) };
    return { forks, next, keyBlocksRead: scan.keyBlocksRead };
  }
}
